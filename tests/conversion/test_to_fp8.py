import json
from pathlib import Path

import pytest
import torch

from conversion.to_fp8 import convert, main
from pixart import checkpoint as checkpoints
from pixart.model import fp8
from pixart.model.dit import DiT

QUICK = ["--batches", "2", "--batch", "4", "--text-dim", "48", "--base-image-size", "8"]


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
    fp8.load_scale_state(model, saved.scales)
    for name, linear in fp8.float8_linears(model):
        amax = float(linear.weight.detach().abs().max())
        assert float(linear.scale[fp8.WEIGHT]) == pytest.approx(448 / amax if amax else 1, rel=1e-6), name
        assert (linear.amax_history[1:] == linear.amax_history[1]).all()
    report = json.loads((directory / "conversion.json").read_text())
    losses = list(report["losses"].values())
    assert losses[2] == pytest.approx(losses[0], rel=0.05)
    assert report["gradient_cosine"] > 0.9
    assert max(report["output_error"]["fitted"]) < max(report["output_error"]["paper"])


def test_again_replaces_only_its_own(legacy_file):
    assert main([str(legacy_file), *QUICK]) == 0
    assert main([str(legacy_file), *QUICK, "--reparam", "paper"]) == 0
    directory = legacy_file.with_name("ckpt.fp8")
    assert checkpoints.read_record(directory)["provenance"]["reparameterization"] == "paper"
    other = legacy_file.with_name("other.pt")
    other.write_bytes(legacy_file.read_bytes())
    with pytest.raises(ValueError, match="no earlier conversion"):
        convert(other, directory, batches=1, batch=2)
    with pytest.raises(ValueError, match="FP8 checkpoint already"):
        convert(directory, directory.with_name("twice"), batches=1, batch=2)


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
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert tree(tmp_path) == before


@pytest.mark.parametrize("arguments", [[], ["c.pt", "--reparam", "magic"], ["c.pt", "--batches", "0"]])
def test_bad_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
