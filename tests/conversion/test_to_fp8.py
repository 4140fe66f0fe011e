import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conversion import to_bf16
from conversion.convert import convert, prepare
from conversion.options import Options
from conversion.to_fp8 import main
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint import safetensors_stream
from pixart.model.dit import DiT
from pixart.model.fp8 import linear as fp8
from pixart.model.fp8 import scaling
from pixart.model.fp8.plan import fused_linears

QUICK = ["--num-batches", "2", "--batch-size", "16", "--text-dim", "48", "--base-latent-size", "8"]
KEEP_STAGE = [*QUICK, "--stage", "1"]


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_legacy_file_becomes_a_checkpoint_for_fp8_training(legacy_file, capsys):
    assert main([str(legacy_file), *QUICK]) == 0
    printed = capsys.readouterr().out
    directory = legacy_file.with_name("ckpt.fp8")
    assert f"written     {directory}" in printed
    assert "WARNING     scales were calibrated on synthetic data" in printed
    saved = checkpoints.load(directory)
    assert (saved.stage, saved.step) == (2, 0)
    assert saved.plan is not None
    model = DiT(**saved.config)
    model.load_state_dict(saved.model, strict=True)
    fp8.swap_linears(model, saved.plan)
    scaling.load_scale_state(model, saved.scales)
    for name, linear in fp8.float8_linears(model):
        group = next((group for group in fused_linears(saved.plan.linears) if name in group), [name])
        amax = max(float(model.get_submodule(member).weight.detach().abs().max()) for member in group)
        assert float(linear.scale[fp8.WEIGHT]) == pytest.approx(448 / amax / 2 if amax else 1, rel=1e-6), name
        assert (linear.amax_history[1:] == linear.amax_history[1]).all()
    report = json.loads((directory / "report.json").read_text())
    assert [check["passed"] for check in report["acceptance"]["checks"]] == [True] * 5, printed
    assert saved.provenance["acceptance"] == "PASS"
    assert report["gradient_cosine_similarity"] > 0.9
    errors = report["reparameterization"]["mean_error"]
    assert errors["fitted"] < errors["paper"] / 2
    assert "<html" in (directory / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dev_stage1", "dev_stage1_bf16"])
def test_files_of_the_original_training_pass_and_are_fitted(shared_data, tmp_path, name):
    report = convert(shared_data / f"legacy/{name}.pt", tmp_path / "out", Options(base_latent_size=16, text_dim=48))
    assert report["acceptance"]["passed"], report["acceptance"]
    error = report["reparameterization"]["mean_error"]
    assert error["fitted"] <= 0.4 * error["paper"]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
)
@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise", "mxfp8"])
def test_conversion_on_a_gpu(legacy_file, recipe):
    words = [*QUICK, "--device", "cuda", "--fp8-recipe", recipe]
    assert main([str(legacy_file), *words]) == 0


def test_unaligned_batches_are_refused_on_a_gpu(legacy_file, tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.batches.SYNTHETIC_TEXT_TOKENS", 20)
    for device, batch_size in (("cpu", 1), ("cuda", 4)):
        prepare(legacy_file, tmp_path / "out", Options(device=device, batch_size=batch_size, base_latent_size=8))
    with pytest.raises(ValueError, match="1 images have 20 text tokens"):
        prepare(legacy_file, tmp_path / "out", Options(device="cuda", batch_size=1, base_latent_size=8))


@pytest.mark.slow
def test_ranks_divide_the_batches(legacy_file):
    """Two ranks with half of the batches each get the scales of a single one; only rank 0 writes and prints."""
    processes, saved = {}, {}
    for ranks in (1, 2):
        output = legacy_file.with_name(f"ranks-{ranks}")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        words += ["-m", "conversion.to_fp8", str(legacy_file), *QUICK, "--stage", "1", "--output", str(output)]
        words += ["--num-batches", "5"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes[ranks] = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert processes[ranks].returncode == 0, processes[ranks].stderr
        saved[ranks] = checkpoints.load(output)
    assert saved[1].scales
    assert saved[1].scales.keys() == saved[2].scales.keys()
    assert all(torch.equal(value, saved[2].scales[key]) for key, value in saved[1].scales.items())
    assert processes[2].stdout.count("written  ") == 1
    assert processes[2].stderr.count("calibrating on 5 batches") == 1


@pytest.mark.slow
def test_existing_output_is_replaced_only_with_overwrite(legacy_file, capsys):
    directory = legacy_file.with_name("ckpt.fp8")
    assert main([str(legacy_file), *KEEP_STAGE]) == 0
    before = tree(directory.parent)
    assert main([str(legacy_file), *KEEP_STAGE]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([str(legacy_file), *KEEP_STAGE, "--margin", "2", "--overwrite"]) == 0
    assert tree(directory.parent) == before
    assert checkpoints.read_metadata(directory)["plan"]["margin"] == 2
    with pytest.raises(ValueError, match="already an FP8 checkpoint"):
        convert(directory, directory.with_name("twice"), Options(num_batches=1, batch_size=2))
    (directory.parent / "mine").mkdir()
    with pytest.raises(ValueError, match="not a checkpoint"):
        convert(legacy_file, directory.parent / "mine", Options(num_batches=1, batch_size=2, overwrite=True))
    with pytest.raises(ValueError, match="not a checkpoint"):
        convert(legacy_file, legacy_file, Options(num_batches=1, batch_size=2, overwrite=True))


def test_conversion_back_to_bf16_is_exact(stage1, tmp_path):
    """Weights, EMA, moments, step and normalization return bit for bit if the stage is kept."""
    source = checkpoints.save(stage1, tmp_path / "checkpoint")
    options = Options(stage=1, num_batches=2, batch_size=4)
    convert(source, tmp_path / "checkpoint.fp8", options)
    assert to_bf16.main([str(tmp_path / "checkpoint.fp8")]) == 0
    original, restored = checkpoints.load(source), checkpoints.load(tmp_path / "checkpoint.bf16")
    for field in ("model", "ema", "optimizer"):
        before, after = getattr(original, field), getattr(restored, field)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert (original.step, original.stage) == (restored.step, restored.stage)
    assert original.normalization == restored.normalization
    assert restored.plan is None
    assert to_bf16.main([str(source)]) == 2
    assert to_bf16.main([str(tmp_path / "checkpoint.fp8")]) == 2  # the output exists


def test_dry_run_writes_nothing(legacy_file, capsys):
    before = tree(legacy_file.parent)
    assert main([str(legacy_file), *QUICK, "--dry-run", "--keep-bf16", "*linear2"]) == 0
    assert "mlp.linear2 in BF16: matches --keep-bf16" in capsys.readouterr().out
    assert tree(legacy_file.parent) == before


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["current", "rowwise", "mxfp8"])
def test_recipes_without_stored_scales(legacy_file, capsys, recipe):
    assert main([str(legacy_file), *KEEP_STAGE, "--fp8-recipe", recipe]) == 0
    assert "scales      none stored" in capsys.readouterr().out
    saved = checkpoints.load(legacy_file.with_name("ckpt.fp8"))
    assert saved.plan.recipe == recipe
    assert saved.scales == {}
    assert (
        json.loads((legacy_file.with_name("ckpt.fp8") / "report.json").read_text())["gradient_cosine_similarity"] > 0.97
    )
    again = legacy_file.with_name("again")
    assert (
        main([str(legacy_file), *KEEP_STAGE, "--fp8-recipe", recipe, "--export", "inference", "--output", str(again)])
        == 2
    )
    assert not again.exists()


@pytest.mark.slow
def test_failed_conversion_is_written_and_marked(legacy_file, capsys):
    """Calibration on one batch of two images, without headroom, underestimates the amax of the validation batches."""
    assert main([str(legacy_file), *QUICK, "--num-batches", "1", "--batch-size", "2", "--margin", "0"]) == 3
    printed = capsys.readouterr().out
    assert "FAIL        grad_weight SQNR loss vs. dynamic scaling" in printed
    assert "--accept-failed-conversion" in printed
    assert checkpoints.read_metadata(legacy_file.with_name("ckpt.fp8"))["provenance"]["acceptance"] == "FAIL"


@pytest.mark.parametrize("stage", [1, 2])
def test_a_flipped_bit_on_disk_fails_the_conversion(legacy_file, monkeypatch, capsys, stage):
    write_state = checkpoints.write_state

    def write_damaged_state(checkpoint, partial):
        checksums = write_state(checkpoint, partial)
        with (partial / checkpoints.STATE_FILES["ema"]).open("r+b") as file:
            _, _, offset, _ = safetensors_stream.read_header(Path(file.name))["linear_out.bias"]
            file.seek(offset + 3)
            byte = file.read(1)[0]
            file.seek(offset + 3)
            file.write(bytes([byte ^ 1]))
        return checksums

    monkeypatch.setattr(checkpoints, "write_state", write_damaged_state)
    assert main([str(legacy_file), *QUICK, "--stage", str(stage)]) == 3
    assert "FAIL        Carried tensors that are not bit-identical to the source: 1 of" in capsys.readouterr().out


def test_interrupted_conversion_leaves_no_files(legacy_file, monkeypatch, capsys):
    before = tree(legacy_file.parent)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("conversion.convert.page", interrupt)  # after the weights are written
    assert main([str(legacy_file), *KEEP_STAGE]) == 130
    assert tree(legacy_file.parent) == before


def test_stage1_can_be_kept(legacy_file):
    assert main([str(legacy_file), "--stage", "1", "--output", str(legacy_file.with_name("kept")), *QUICK]) == 0
    saved = checkpoints.load(legacy_file.with_name("kept"))
    assert (saved.stage, saved.step) == (1, 8)
    original = torch.load(legacy_file, weights_only=True)["model"]
    assert all(torch.equal(tensor, original[f"_orig_mod.{name}"]) for name, tensor in saved.model.items())


def test_dataset_with_other_latent_channels_is_refused(small_recipe, legacy_file, capsys):
    assert main([str(legacy_file), "--dataset", small_recipe.data.path]) == 2
    assert "16 channels, the model reads 4" in capsys.readouterr().err
    assert not legacy_file.with_name("ckpt.fp8").exists()


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "shape", "empty directory", "output", "dataset"])
def test_invalid_input_is_refused_in_one_line_with_nothing_written(legacy_file, tmp_path, capsys, kind):
    path, extra = legacy_file, []
    match kind:
        case "missing":
            path = tmp_path / "nowhere.pt"
        case "text":
            path.write_text("no checkpoint")
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        case "shape":
            content = torch.load(path, weights_only=True)
            content["model"]["_orig_mod.linear_out.bias"] = torch.zeros(3)
            torch.save(content, path)
        case "empty directory":
            path = tmp_path / "empty"
            path.mkdir()
        case "output":
            (tmp_path / "mine").mkdir()
            extra = ["--output", str(tmp_path / "mine")]
        case "dataset":
            extra = ["--dataset", str(tmp_path / "nowhere")]
    before = tree(tmp_path)
    assert main([str(path), *extra]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert captured.err.count("error") == 1
    assert captured.out == ""
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "arguments", [[], ["c.pt", "--reparameterization", "magic"], ["c.pt", "--num-batches", "many"]]
)
def test_invalid_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("option", ["num-batches", "batch-size", "amax-history-len", "text-dim", "base-latent-size"])
def test_numbers_below_the_minimum_exit_2(legacy_file, option, capsys):
    assert main([str(legacy_file), f"--{option}", "0"]) == 2
    assert f"error: --{option} 0: must be at least" in capsys.readouterr().err
