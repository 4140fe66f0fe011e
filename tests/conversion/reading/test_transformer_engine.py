"""Files of the original training with TransformerEngine: outputs, moments, extra states and layouts."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conversion.reading import formats
from pixart.checkpoint.directory import Checkpoint
from pixart.config.training import TrainConfig
from pixart.model.dit import DiT, load_model, parameter_groups
from pixart.training.optimizer import make_optimizer, optimizer_tensors
from tests.support.transformer_engine_files import EPS, make_inputs, original_model, original_optimizer, train_original

EXTRA_STATES = {1: 2 * (7 + 2 + 2) + 3, 2: 2 * (7 + 7 + 2) + 5}  # of two blocks


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2], ids=["stage 1", "stage 2"])
def original(request) -> DiT:
    return original_model(request.param)


def read(content: object, tmp_path: Path) -> Checkpoint:
    path = tmp_path / f"te-{len(list(tmp_path.iterdir()))}.pt"  # a file that was read stays mapped
    torch.save(content, path)
    return formats.read(path, base_latent_size=8)


def output(checkpoint: Checkpoint, weights: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return load_model(checkpoint.config, dict(getattr(checkpoint, weights)))(**inputs)


def test_training_file(original, tmp_path):
    content = train_original(original)
    checkpoint = read(content, tmp_path)
    stage = original.stage
    assert (checkpoint.stage, checkpoint.step, checkpoint.config["qk_norm_eps"]) == (stage, 3, EPS)
    assert checkpoint.provenance["skipped_extra_states"] == dict.fromkeys(("model", "model_ema"), EXTRA_STATES[stage])
    assert checkpoint.provenance["cond_dropout_prob"] == {1: 0.1, 2: 0.0}[stage]
    inputs = make_inputs(original)
    for weights, state in (("model", original.state_dict()), ("ema", content["model_ema"])):
        original.load_state_dict(state)
        with torch.no_grad():
            expected = original(**inputs)
        assert (output(checkpoint, weights, inputs) - expected).abs().max() < 1e-5
        checkpoint.config.pop("qk_norm_eps")
        assert (output(checkpoint, weights, inputs) - expected).abs().max() > 1e-4  # with PyTorch's default
        checkpoint.config["qk_norm_eps"] = EPS


def test_moments_have_the_names_of_the_original_parameters(original, tmp_path):
    content = train_original(original)
    checkpoint = read(content, tmp_path)
    optimizer = original_optimizer(original)
    optimizer.load_state_dict(content["optimizer"])
    names = dict(original.named_parameters())
    assert len(checkpoint.optimizer) == 3 * len(names)
    for name, parameter in names.items():
        for field, value in optimizer.state[parameter].items():
            assert torch.equal(checkpoint.optimizer[f"{name}.{field}"], value), name


@pytest.mark.parametrize("stage", [1, 2])
def test_state_dict_alone(stage, tmp_path):
    original = original_model(stage)
    checkpoint = read(original.state_dict(), tmp_path)
    assert (checkpoint.stage, checkpoint.step, checkpoint.config["qk_norm_eps"]) == (stage, 0, EPS)
    assert checkpoint.provenance["skipped_extra_states"] == {"model": EXTRA_STATES[stage]}
    inputs = make_inputs(original)
    with torch.no_grad():
        assert (output(checkpoint, "ema", inputs) - original(**inputs)).abs().max() < 1e-5


def test_files_of_the_original_training(shared_data):
    expected = torch.load(shared_data / "te/expected.pt", weights_only=True)
    inputs = {"x": expected["x"], "t": expected["t"]}
    text = {"text": expected["text"], "text_mask": expected["mask"]}
    stage1 = formats.read(shared_data / "te/stage1.pt")
    assert (output(stage1, "model", {**inputs, "label": expected["lab"]}) - expected["ref"]["s1"]).abs().max() < 1e-5
    checkpoint = formats.read(shared_data / "te/stage2_training.pt")
    for weights in ("model", "ema"):
        assert (output(checkpoint, weights, {**inputs, **text}) - expected["ref"][weights]).abs().max() < 1e-5
    for name, state in expected["mom"].items():
        assert all(torch.equal(checkpoint.optimizer[f"{name}.{field}"], value) for field, value in state.items()), name
    assert len(checkpoint.optimizer) == 3 * len(expected["mom"])
    assert checkpoint.provenance["skipped_extra_states"] == {"model": 53, "model_ema": 53}
    reparameterized = formats.read(shared_data / "te/stage2_reparameterized.pt")
    assert (reparameterized.stage, reparameterized.step) == (2, 0)
    assert reparameterized.provenance["skipped_extra_states"] == {"model": 53}


def assert_same_next_step(content: dict[str, Any], checkpoint: Checkpoint, original: DiT) -> None:
    """Compare a step of the original optimizer with one of the suite's, from the same gradients."""
    converted = load_model(checkpoint.config, {name: value.clone() for name, value in checkpoint.model.items()})
    original_adamw = original_optimizer(original)
    original_adamw.load_state_dict(content["optimizer"])
    group = content["optimizer"]["param_groups"][0]
    config = TrainConfig(
        steps=9,
        global_batch_size=2,
        warmup_steps=0,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        decay_qk_norm=checkpoint.provenance["decay_qk_norm"],
    )
    suite_adamw = make_optimizer(converted, config)
    for name, tensor in optimizer_tensors(suite_adamw, converted).items():
        tensor.copy_(checkpoint.optimizer[name])
    before = {name: parameter.detach().clone() for name, parameter in original.named_parameters()}
    for name, parameter in original.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        converted.get_parameter(name).grad = parameter.grad.clone()
    original_adamw.step()
    suite_adamw.step()
    for name, parameter in original.named_parameters():
        assert (parameter - converted.get_parameter(name)).abs().max() < 1e-6, name
        assert not torch.equal(parameter, before[name]), name


def test_next_step_matches_the_original_training(original, tmp_path):
    content = train_original(original)
    assert_same_next_step(content, read(content, tmp_path), original)


def test_next_step_matches_the_shared_file(shared_data):
    path = shared_data / "te/stage2_training.pt"
    content, checkpoint = torch.load(path, weights_only=True), formats.read(path)
    original = load_model(checkpoint.config, {name: value.clone() for name, value in checkpoint.model.items()})
    for name, module in list(original.named_modules()):  # the original's norms are no `nn.RMSNorm`
        if isinstance(module, nn.RMSNorm):
            norm = nn.Module()
            norm.weight = module.weight
            original.set_submodule(name, norm)
    assert_same_next_step(content, checkpoint, original)


class MaliciousObject:
    """Object that creates a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("alone", [False, True], ids=["training file", "state dict alone"])
@pytest.mark.parametrize("kind", ["pickle in uint8", "pickle in BytesIO", "None"])
def test_extra_states_are_not_unpickled(kind, alone, tmp_path):
    malicious = pickle.dumps(MaliciousObject(tmp_path / "created"))
    value = {
        "pickle in uint8": torch.frombuffer(bytearray(malicious), dtype=torch.uint8),
        "pickle in BytesIO": io.BytesIO(malicious),
        "None": None,
    }[kind]
    content = train_original(original_model(2))
    states = (content["model"], content["model_ema"])
    for state in states:
        state.update({key: value for key in state if key.endswith("_extra_state")})
    checkpoint = read(states[1] if alone else content, tmp_path)
    assert checkpoint.provenance["skipped_extra_states"]["model"] == EXTRA_STATES[2]
    assert all(tensor.is_floating_point() for tensor in checkpoint.model.values())
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("place", ["extra state", "entry beside the model"])
def test_malicious_object_is_refused(place, tmp_path):
    content = train_original(original_model(2))
    key, state = ("adaLN1._extra_state", content["model"]) if place == "extra state" else ("other", content)
    state[key] = MaliciousObject(tmp_path / "created")
    with pytest.raises(ValueError, match=r"te-0\.pt cannot be read: it refers to posix\.mkdir, and only tensors"):
        read(content, tmp_path)
    assert not (tmp_path / "created").exists()


def test_groups_of_bf16_training_keep_their_rule(tmp_path):
    """The sizes of the groups choose the rule, whether or not the file has extra states."""
    original = original_model(2)
    content = train_original(original)
    decayed, undecayed = parameter_groups(original_model(2, transformer_engine=False))
    parameters = dict(original.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [parameters[name] for name in group]} for group in (decayed, undecayed)])
    for index, parameter in enumerate(parameters.values()):
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.full_like(parameter, index),
            "exp_avg_sq": torch.full_like(parameter, index),
        }
    content["optimizer"] = optimizer.state_dict()
    checkpoint = read(content, tmp_path)
    assert all((checkpoint.optimizer[f"{name}.exp_avg"] == index).all() for index, name in enumerate(parameters))
    assert "decay_qk_norm" not in checkpoint.provenance
    assert checkpoint.config["qk_norm_eps"] == EPS


def test_groups_of_transformer_engine_imply_its_eps(tmp_path):
    content = train_original(original_model(2))
    for name in ("model", "model_ema"):
        content[name] = {key: value for key, value in content[name].items() if not key.endswith("_extra_state")}
    checkpoint = read(content, tmp_path)
    assert checkpoint.provenance["decay_qk_norm"]
    assert checkpoint.config["qk_norm_eps"] == EPS
    del content["optimizer"]
    assert "qk_norm_eps" not in read(content, tmp_path).config


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_files_keep_pytorchs_eps(stage, tmp_path):
    content = train_original(original_model(stage, transformer_engine=False))
    checkpoint = read(content, tmp_path)
    assert "qk_norm_eps" not in checkpoint.config
    assert not {"skipped_extra_states", "decay_qk_norm"} & checkpoint.provenance.keys()
    assert checkpoint.provenance["cond_dropout_prob"] == {1: 0.1, 2: 0.0}[stage]
    del content["optimizer"]["param_groups"]
    again = read(content, tmp_path)
    assert all(torch.equal(again.optimizer[name], tensor) for name, tensor in checkpoint.optimizer.items())


def test_sizes_at_28_blocks():
    """The numbers of parameters in the groups of a full-size stage 2, counted from files of the original training."""
    with torch.device("meta"):
        model = DiT(text_dim=2048)
    assert [len(group) for group in parameter_groups(model)] == [314, 398]
    assert [len(group) for group in parameter_groups(model, decay_qk_norm=True)] == [426, 286]


@pytest.mark.parametrize("groups", [[[0, 1], [2]], [list(range(60))], [], [{"lr": 1.0}], 3, [["a"], ["b"]]], ids=str)
def test_unknown_groups_are_refused_in_one_line(groups, tmp_path):
    content = train_original(original_model(2))
    if isinstance(groups, list):
        groups = [group if isinstance(group, dict) else {"params": group} for group in groups]
    content["optimizer"]["param_groups"] = groups
    with pytest.raises(ValueError, match=r"te-0\.pt.*param_groups") as caught:
        read(content, tmp_path)
    assert "\n" not in str(caught.value)


def test_swapped_groups_are_refused(tmp_path):
    content = train_original(original_model(2))
    first, second = content["optimizer"]["param_groups"]
    first["params"][0], second["params"][0] = second["params"][0], first["params"][0]
    with pytest.raises(ValueError, match="needs a floating-point tensor of shape"):
        read(content, tmp_path)


@pytest.mark.parametrize(
    "renamed",
    [
        ("mlp.linear1.weight", "mlp.fc1_weight"),
        ("attention.attention.q_proj.weight", "attention.attention.layernorm_qkv.query_weight"),
        ("mlp.linear1.bias", "mlp.linear1.layer_norm_bias"),
    ],
    ids=lambda renamed: renamed[1],
)
def test_fused_modules_are_refused_with_the_cause(renamed, tmp_path):
    state = {key.replace(*renamed): value for key, value in original_model(2).state_dict().items()}
    with pytest.raises(ValueError, match=rf"dit_blocks\.0\.{renamed[1]} is not a parameter .* te\.LayerNormLinear"):
        read(state, tmp_path)
