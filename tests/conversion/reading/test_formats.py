import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file

from conversion.reading import formats
from pixart.checkpoint import directory as checkpoints
from pixart.config.training import TrainConfig
from pixart.model.dit import DiT
from pixart.training.optimizer import make_optimizer, optimizer_tensors
from tests.support.checkpoints import CONFIG, legacy_content


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_legacy_file_is_recognized_by_content(stage1, tmp_path, prefix, dtype):
    path = tmp_path / "any.name"
    torch.save(legacy_content(stage1, prefix, dtype), path)
    checkpoint = formats.read(path, base_latent_size=8)
    assert (checkpoint.stage, checkpoint.step, checkpoint.config) == (1, 8, CONFIG)
    for name, tensor in checkpoint.model.items():
        assert torch.equal(tensor, stage1.model[name].to(dtype).float()), name
    for name, tensor in stage1.optimizer.items():
        assert torch.equal(checkpoint.optimizer[name], tensor), name
    assert checkpoint.normalization.std[0] == pytest.approx(1 / 1.5305)
    assert checkpoint.normalization.apply(torch.ones(1, 4, 1, 1))[0, 0, 0, 0] == pytest.approx(1.5305 - 0.177456)


def test_files_of_the_original_training(shared_data):
    for name in ("dev_stage1", "dev_stage1_bf16"):
        expected = torch.load(shared_data / f"legacy/{name}.expected.pt", weights_only=True)
        checkpoint = formats.read(shared_data / f"legacy/{name}.pt", base_latent_size=16)
        assert checkpoint.config == expected["config"]
        assert checkpoint.step == 8
        assert {float(checkpoint.optimizer[key]) for key in checkpoint.optimizer if key.endswith(".step")} == {8.0}


def test_without_optimizer_and_ema(stage1, tmp_path):
    content = legacy_content(stage1)
    torch.save({"model": content["model"]}, tmp_path / "m.pt")
    checkpoint = formats.read(tmp_path / "m.pt", base_latent_size=8)
    assert checkpoint.step == 0
    assert torch.equal(checkpoint.ema["patchify.weight"], stage1.model["patchify.weight"])
    assert checkpoint.optimizer["patchify.weight.exp_avg"].abs().max() == 0


@pytest.mark.parametrize("kind", [".pt, weights only", "safetensors", "diffusers folder"])
def test_weights_only(stage1, tmp_path, kind):
    """The EMA equals the weights, and the moments are zero."""
    path = tmp_path / "weights"
    match kind:
        case ".pt, weights only":
            torch.save(stage1.model, path)
        case "safetensors":
            save_file(stage1.model, path)
        case "diffusers folder":
            model = DiT(**CONFIG)
            model.load_state_dict(stage1.model)
            model.save_pretrained(path)
    checkpoint = formats.read(path, base_latent_size=8)
    assert checkpoint.provenance["source_format"] == kind
    assert checkpoint.config == CONFIG
    for state in (checkpoint.model, checkpoint.ema):
        assert state.keys() == stage1.model.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in stage1.model.items())
    assert checkpoint.optimizer.keys() == stage1.optimizer.keys()
    assert not any(tensor.any() for tensor in checkpoint.optimizer.values())


def test_distributed_checkpoint(stage1, tmp_path):
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in stage1.optimizer.items():
        name, _, field = key.rpartition(".")
        states.setdefault(name, {})[field] = tensor
    content = {"model": stage1.model, "model_ema": stage1.ema, "optimizer": {"state": states}, "step": 7}
    torch.distributed.checkpoint.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    checkpoint = formats.read(tmp_path / "dcp", base_latent_size=8)
    assert (checkpoint.step, checkpoint.config) == (8, CONFIG)
    for field in ("model", "ema", "optimizer"):
        actual, expected = getattr(checkpoint, field), getattr(stage1, field)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items()), field


@pytest.mark.parametrize("name", ["dev_stage1", "dev_stage1_bf16"])
def test_next_step_matches_the_original_training(shared_data, name):
    """AdamW with the file's state in the original parameter groups takes the same step as this suite's optimizer."""
    path = shared_data / f"legacy/{name}.pt"
    content = torch.load(path, weights_only=True)
    checkpoint = formats.read(path, base_latent_size=16)
    original, converted = DiT(**checkpoint.config), DiT(**checkpoint.config)
    weights = {key.removeprefix("_orig_mod.").removeprefix("module."): value for key, value in content["model"].items()}
    original.load_state_dict(weights)
    converted.load_state_dict(checkpoint.model)

    groups: tuple[list, list] = [], []
    for module in original.modules():
        normalizes = isinstance(module, torch.nn.LayerNorm | torch.nn.RMSNorm | torch.nn.Embedding)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            groups[parameter_name == "bias" or normalizes].append(parameter)
    original_optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    original_optimizer.load_state_dict(content["optimizer"])
    saved = content["optimizer"]["param_groups"][0]
    names = {"lr": saved["lr"], "weight_decay": saved["weight_decay"], "eps": saved["eps"]}
    config = TrainConfig(
        steps=9, global_batch_size=4, warmup_steps=0, beta1=saved["betas"][0], beta2=saved["betas"][1], **names
    )
    suite_optimizer = make_optimizer(converted, config)
    for name, tensor in optimizer_tensors(suite_optimizer, converted).items():
        tensor.copy_(checkpoint.optimizer[name])

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, checkpoint.config["in_dim"], 16, 16, generator=generator)
    for model, optimizer in ((original, original_optimizer), (converted, suite_optimizer)):
        velocity = model(latents, torch.full((4,), 0.3), label=torch.arange(4))
        (velocity - latents).square().mean().backward()
        optimizer.step()
    before = {key: tensor.float() for key, tensor in weights.items()}
    for key, parameter in original.named_parameters():
        assert (parameter - converted.get_parameter(key)).abs().max() < 1e-6, key
        assert not torch.equal(parameter, before[key]), key


def test_checkpoint_directory_and_run_folder(stage1, tmp_path):
    checkpoints.save(stage1, tmp_path / "run/checkpoints/step-00000008")
    for path in (tmp_path / "run", tmp_path / "run/checkpoints/step-00000008"):
        assert torch.equal(formats.read(path).model["patchify.weight"], stage1.model["patchify.weight"])
    with pytest.raises(ValueError, match="--base-latent-size"):
        formats.read(tmp_path / "run", base_latent_size=8)


def broken(kind: str, content: dict) -> object:
    model, moments = content["model"], content["optimizer"]["state"]
    key = next(name for name in model if name.endswith("linear1.weight"))
    match kind:
        case "list":
            return [1, 2]
        case "no model":
            return {"weights": model}
        case "no tensors":
            return {"model": {"patchify.weight": 3}}
        case "foreign":
            return {"model": {"conv.weight": torch.zeros(3, 3)}}
        case "shape":
            model[key] = model[key][:, :-1]
        case "heads":
            model[key.replace("mlp.linear1", "attention.attention.q_norm")] = torch.zeros(7)
        case "missing":
            del model[key]
        case "moments":
            moments[3]["exp_avg"] = moments[3]["exp_avg"][:-1]
        case "count":
            del moments[3]
    return content


@pytest.mark.parametrize(
    "kind", ["list", "no model", "no tensors", "foreign", "shape", "heads", "missing", "moments", "count"]
)
def test_broken_content_is_refused_in_one_line(stage1, tmp_path, kind):
    path = tmp_path / "c.pt"
    torch.save(broken(kind, legacy_content(stage1)), path)
    with pytest.raises(ValueError, match=r"c\.pt") as caught:
        formats.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + b"\0" * 99])
def test_file_that_is_not_a_checkpoint(tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a PyTorch checkpoint"):
        formats.read(path)


def test_truncated_and_missing_file(legacy_file):
    content = legacy_file.read_bytes()
    for fraction in (0.2, 0.7, 0.999):
        legacy_file.write_bytes(content[: int(len(content) * fraction)])
        with pytest.raises(ValueError, match="truncated"):
            formats.read(legacy_file)
    with pytest.raises(ValueError, match="no such file"):
        formats.read(legacy_file.with_name("other.pt"))


def test_pickled_code_is_not_executed(tmp_path):
    class MaliciousObject:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"model": {"a": MaliciousObject()}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        formats.read(tmp_path / "c.pt")
    assert not (tmp_path / "written").exists()
