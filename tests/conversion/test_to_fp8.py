import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conversion import to_bf16, to_fp8
from conversion.options import Options
from conversion.to_fp8 import convert, main
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint import safetensors_stream
from pixart.model.dit import DiT
from pixart.model.fp8 import linear as fp8
from pixart.model.fp8 import scaling

QUICK = ["--batches", "2", "--batch", "16", "--text-dim", "48", "--base-latent-size", "8"]


KEEP = [*QUICK, "--stage", "1"]  # quicker still


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_legacy_file_to_a_checkpoint_that_training_can_use(legacy_file, capsys):
    assert main([str(legacy_file), *QUICK]) == 0
    printed = capsys.readouterr().out
    directory = legacy_file.with_name("ckpt.fp8")
    assert f"written     {directory}" in printed
    assert "synthetic" in printed  # said loudly
    saved = checkpoints.load(directory)
    assert (saved.stage, saved.step) == (2, 0)
    assert saved.plan is not None
    model = DiT(**saved.config)
    model.load_state_dict(saved.model, strict=True)
    fp8.swap_linears(model, saved.plan)
    scaling.load_scale_state(model, saved.scales)
    for name, linear in fp8.float8_linears(model):
        amax = float(linear.weight.detach().abs().max())
        assert float(linear.scale[fp8.WEIGHT]) == pytest.approx(448 / amax / 2 if amax else 1, rel=1e-6), name
        assert (linear.amax_history[1:] == linear.amax_history[1]).all()
    report = json.loads((directory / "report.json").read_text())
    assert [check["passed"] for check in report["gate"]["checks"]] == [True] * 5, printed
    assert saved.provenance["gate"] == "PASS"
    assert report["gradient_cosine"] > 0.9
    errors = report["reparameterization"]["mean_error"]
    assert errors["fitted"] < errors["paper"] / 2
    assert "<html" in (directory / "report.html").read_text()


@pytest.mark.parametrize("name", ["dev_stage1", "dev_stage1_bf16"])
def test_original_files_pass_and_are_fitted(shared_data, tmp_path, name):
    report = convert(shared_data / f"legacy/{name}.pt", tmp_path / "out", Options(base_latent_size=16, text_dim=48))
    assert report["gate"]["passed"], report["gate"]
    error = report["reparameterization"]["mean_error"]
    assert error["fitted"] <= 0.4 * error["paper"]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
)
@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise", "mxfp8"])
def test_conversion_on_a_gpu(legacy_file, recipe):
    words = [*QUICK, "--device", "cuda", "--recipe", recipe]
    assert main([str(legacy_file), *words]) == 0


def test_batches_that_a_gpu_cannot_multiply_are_refused_before_anything_else(legacy_file, tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.batches.SYNTHETIC_TEXT_TOKENS", 20)
    for device, batch in (("cpu", 1), ("cuda", 4)):
        to_fp8.prepare(legacy_file, tmp_path / "out", Options(device=device, batch=batch, base_latent_size=8))
    with pytest.raises(ValueError, match="1 images at once have 20 states of text"):
        to_fp8.prepare(legacy_file, tmp_path / "out", Options(device="cuda", batch=1, base_latent_size=8))


@pytest.mark.slow
def test_ranks_share_the_batches(legacy_file):
    """Two ranks with half of the batches each find what one finds; only the first of them writes and speaks."""
    ended, saved = {}, {}
    for ranks in (1, 2):
        output = legacy_file.with_name(f"by-{ranks}")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        words += ["-m", "conversion.to_fp8", str(legacy_file), *QUICK, "--stage", "1", "--output", str(output)]
        words += ["--batches", "5"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended[ranks] = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert ended[ranks].returncode == 0, ended[ranks].stderr
        saved[ranks] = checkpoints.load(output)
    assert saved[1].scales
    assert saved[1].scales.keys() == saved[2].scales.keys()
    assert all(torch.equal(value, saved[2].scales[key]) for key, value in saved[1].scales.items())
    assert ended[2].stdout.count("written  ") == 1
    assert ended[2].stderr.count("calibrating on 5 batches") == 1


@pytest.mark.slow
def test_an_output_that_exists_is_replaced_only_on_request(legacy_file, capsys):
    directory = legacy_file.with_name("ckpt.fp8")
    assert main([str(legacy_file), *KEEP]) == 0
    before = tree(directory.parent)
    assert main([str(legacy_file), *KEEP]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([str(legacy_file), *KEEP, "--margin", "2", "--overwrite"]) == 0
    assert tree(directory.parent) == before
    assert checkpoints.read_record(directory)["plan"]["margin"] == 2
    with pytest.raises(ValueError, match="FP8 checkpoint already"):
        convert(directory, directory.with_name("twice"), Options(batches=1, batch=2))
    (directory.parent / "mine").mkdir()
    with pytest.raises(ValueError, match="no checkpoint"):
        convert(legacy_file, directory.parent / "mine", Options(batches=1, batch=2, overwrite=True))
    with pytest.raises(ValueError, match="no checkpoint"):
        convert(legacy_file, legacy_file, Options(batches=1, batch=2, overwrite=True))


def test_the_way_back_is_exact(stage1, tmp_path):
    """Weights, average, moments, step and normalization, for a checkpoint whose stage stays."""
    source = checkpoints.save(stage1, tmp_path / "own")
    options = Options(stage=1, batches=2, batch=4)
    convert(source, tmp_path / "own.fp8", options)
    assert to_bf16.main([str(tmp_path / "own.fp8")]) == 0
    one, other = checkpoints.load(source), checkpoints.load(tmp_path / "own.bf16")
    for field in ("model", "ema", "optimizer"):
        before, after = getattr(one, field), getattr(other, field)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert (one.step, one.stage, one.normalization, other.plan) == (other.step, other.stage, other.normalization, None)
    assert to_bf16.main([str(source)]) == 2
    assert to_bf16.main([str(tmp_path / "own.fp8")]) == 2  # it is there


def test_dry_run_writes_nothing(legacy_file, capsys):
    before = tree(legacy_file.parent)
    assert main([str(legacy_file), *QUICK, "--dry-run", "--keep-bf16", "*linear2"]) == 0
    assert "mlp.linear2 in BF16: asked for" in capsys.readouterr().out
    assert tree(legacy_file.parent) == before


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["current", "rowwise", "mxfp8"])
def test_recipes_without_scales_say_so(legacy_file, capsys, recipe):
    assert main([str(legacy_file), *KEEP, "--recipe", recipe]) == 0
    assert "none to keep" in capsys.readouterr().out
    saved = checkpoints.load(legacy_file.with_name("ckpt.fp8"))
    assert saved.plan.recipe == recipe
    assert saved.scales == {}
    assert json.loads((legacy_file.with_name("ckpt.fp8") / "report.json").read_text())["gradient_cosine"] > 0.97
    again = legacy_file.with_name("again")
    assert main([str(legacy_file), *KEEP, "--recipe", recipe, "--export", "inference", "--output", str(again)]) == 2
    assert not again.exists()


@pytest.mark.slow
def test_a_conversion_that_does_not_pass_is_kept_and_marked(legacy_file, capsys):
    """Calibrated, by one batch of two images and without headroom, for less than what is to come."""
    assert main([str(legacy_file), *QUICK, "--batches", "1", "--batch", "2", "--margin", "0"]) == 3
    printed = capsys.readouterr().out
    assert "FAIL        weight gradients below dynamic scaling" in printed
    assert "--accept-failed-conversion" in printed
    assert checkpoints.read_record(legacy_file.with_name("ckpt.fp8"))["provenance"]["gate"] == "FAIL"


@pytest.mark.parametrize("stage", [1, 2])
def test_one_wrong_bit_on_the_disk_fails_the_conversion(legacy_file, monkeypatch, capsys, stage):
    written = checkpoints.write_state

    def damaging(checkpoint, partial):
        written(checkpoint, partial)
        with (partial / checkpoints.STATE_FILES["ema"]).open("r+b") as file:
            _, _, place, _ = safetensors_stream.entries(Path(file.name))["linear_out.bias"]
            file.seek(place + 3)
            byte = file.read(1)[0]
            file.seek(place + 3)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(checkpoints, "write_state", damaging)
    assert main([str(legacy_file), *QUICK, "--stage", str(stage)]) == 3
    assert "FAIL        carried tensors with other bits than their source's: 1 of" in capsys.readouterr().out


def test_interrupted_leaves_nothing(legacy_file, monkeypatch, capsys):
    before = tree(legacy_file.parent)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("conversion.to_fp8.page", stop)  # the weights are written by then
    assert main([str(legacy_file), *KEEP]) == 130
    assert tree(legacy_file.parent) == before


def test_stage1_can_be_kept(legacy_file):
    assert main([str(legacy_file), "--stage", "1", "--output", str(legacy_file.with_name("kept")), *QUICK]) == 0
    saved = checkpoints.load(legacy_file.with_name("kept"))
    assert (saved.stage, saved.step) == (1, 8)
    original = torch.load(legacy_file, weights_only=True)["model"]
    assert all(torch.equal(tensor, original[f"_orig_mod.{name}"]) for name, tensor in saved.model.items())


def test_a_dataset_of_another_vae_is_refused(small_recipe, legacy_file, capsys):
    assert main([str(legacy_file), "--data", small_recipe.data.path]) == 2
    assert "16 channels, the model reads 4" in capsys.readouterr().err
    assert not legacy_file.with_name("ckpt.fp8").exists()


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "shape", "empty directory", "output", "data"])
def test_bad_input_is_one_line_exit_2_and_nothing_written(legacy_file, tmp_path, capsys, kind):
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
        case "data":
            extra = ["--data", str(tmp_path / "nowhere")]
    before = tree(tmp_path)
    assert main([str(path), *extra]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert captured.err.count("error") == 1
    assert captured.out == ""
    assert tree(tmp_path) == before


@pytest.mark.parametrize("arguments", [[], ["c.pt", "--reparam", "magic"], ["c.pt", "--batches", "many"]])
def test_bad_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("option", ["batches", "batch", "history", "text-dim", "base-latent-size"])
def test_numbers_too_small_exit_2(legacy_file, option, capsys):
    assert main([str(legacy_file), f"--{option}", "0"]) == 2
    assert f"error: --{option} must be at least" in capsys.readouterr().err
