"""Training on real stored latents: resume bit for bit, FP8, ranks, falling loss, refusals."""

import dataclasses
import gzip
import itertools
import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from conversion.options import Options
from conversion.to_fp8 import convert
from pixart.checkpoint import directory as checkpoints
from pixart.data import manifest as manifests
from pixart.data.loading.loader import Loader
from pixart.data.loading.sampler import rows_of_step
from pixart.data.store.zarr_store import Store
from pixart.model.sdpa_autotune import measured, use
from pixart.training.loop import train
from pixart.training.metrics import DivergedError, Quiet
from pixart.training.process_group import process_group
from pixart.training.trainer import Training


class Curves(Quiet):
    """What a run has told."""

    def __init__(self):
        self.values: dict[str, dict[int, float]] = defaultdict(dict)
        self.incidents: list[tuple[int, str]] = []
        self.artifacts: list[Path] = []

    def metrics(self, step, values):
        for name, value in values.items():
            self.values[name][step] = value

    def incident(self, step, text):
        self.incidents.append((step, text))

    def artifact(self, file):
        self.artifacts.append(file)

    @property
    def losses(self) -> dict[int, float]:
        return self.values["train/loss"]


def run_stage(recipe, run, stage, config, start=None, curves=None):
    return train(
        stage=stage, model=recipe.model, config=config, dataset=recipe.data.path, run=run, start=start, reporter=curves
    )


def assert_equal(one: checkpoints.Checkpoint, other: checkpoints.Checkpoint) -> None:
    assert one.step == other.step
    for field in ("model", "ema", "optimizer", "scales"):
        first, second = getattr(one, field), getattr(other, field)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), f"{field}: {key}"


@pytest.fixture(scope="module")
def stage1(small_recipe, tmp_path_factory):
    curves = Curves()
    last = run_stage(small_recipe, tmp_path_factory.mktemp("stage1"), 1, small_recipe.stage1, curves=curves)
    return last, curves.losses


@pytest.fixture(scope="module")
def converted(stage1, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "c.fp8"
    convert(stage1[0], output, Options(batches=2, batch=8))
    return output


def test_resume_is_exact(small_recipe, stage1, tmp_path):
    """Stopped after 3 of 6 steps and gone on: losses, weights, average and moments are those of one go."""
    whole, losses = stage1
    curves = Curves()
    first = whole.parent / "step-00000003"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / first.name).symlink_to(first)
    last = run_stage(small_recipe, tmp_path, 1, small_recipe.stage1, curves=curves)
    assert curves.losses == {step: losses[step] for step in (4, 5, 6)}
    assert_equal(checkpoints.load(last), checkpoints.load(whole))


def test_fp8_resume_is_exact_and_scales_move(small_recipe, converted, tmp_path):
    start = checkpoints.load(converted)
    whole = run_stage(small_recipe, tmp_path / "whole", 2, small_recipe.stage2, start=converted)
    (tmp_path / "again/checkpoints").mkdir(parents=True)
    (tmp_path / "again/checkpoints/step-00000003").symlink_to(whole.parent / "step-00000003")
    again = run_stage(small_recipe, tmp_path / "again", 2, small_recipe.stage2)
    one = checkpoints.load(whole)
    assert_equal(checkpoints.load(again), one)
    name = "dit_blocks.0.mlp.linear1.amax_history"
    assert one.scales[name].shape == start.scales[name].shape
    assert not torch.equal(one.scales[name], start.scales[name])
    assert all(torch.isfinite(scale).all() and (scale > 0).all() for key, scale in one.scales.items() if "scale" in key)
    # Gradients reach the text's projections once the zero projection behind them has moved.
    assert one.scales["dit_blocks.0.cross_attention.q_proj.amax_history"][-1, 2] > 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
def test_fp8_compiled_with_all_that_a_run_does(small_recipe, converted, tmp_path):
    """Captions of many lengths, micro-batches, recomputation, validation and previews; the losses of eager steps."""
    found = {}
    for compile in (False, True):
        curves = Curves()
        (tmp_path / str(compile)).mkdir()
        config = dataclasses.replace(
            small_recipe.stage2,
            compile=compile,
            gradient_accumulation_steps=2,
            activation_checkpointing="selective",
            **{"validate_every": 2, "num_validation_samples": 6, "preview_every": 3, "num_previews": 3},
        )
        run_stage(small_recipe, tmp_path / str(compile), 2, config, start=converted, curves=curves)
        found[compile] = curves
    for name in ("train/loss", "val/loss", "val/loss_ema"):
        eager, compiled = found[False].values[name], found[True].values[name]
        assert compiled.keys() == eager.keys()
        assert all(compiled[step] == pytest.approx(eager[step], rel=5e-3) for step in eager)
    assert len(found[True].artifacts) == 2


def test_stage2_begins_where_stage1_ended(small_recipe, stage1, converted):
    curves = Curves()
    config = dataclasses.replace(small_recipe.stage2, steps=1, lr=0.0, cond_dropout_prob=0.0)
    run_stage(small_recipe, converted.parent / "run", 2, config, start=converted, curves=curves)
    last_of_stage1 = min(stage1[1].values())
    assert curves.losses[1] < 1.3 * last_of_stage1  # another batch; the end-to-end test compares the same ones


@pytest.mark.slow
def test_bf16_trains_with_float32_masters(small_recipe, tmp_path):
    curves = Curves()
    config = dataclasses.replace(small_recipe.stage1, precision="bf16", steps=30, lr=3e-3)
    last = run_stage(small_recipe, tmp_path, 1, config, curves=curves)
    losses = list(curves.losses.values())
    state = checkpoints.load(last).model
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert not torch.equal(state["patchify.weight"], state["patchify.weight"].bfloat16().float())
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (1, {"global_batch_size": 7, "fp8": True}, "conversion.to_fp8"),
        (2, {}, "conversion.to_fp8"),
    ],
)
def test_refusals(small_recipe, tmp_path, stage, changes, message):
    config = dataclasses.replace(small_recipe.train(stage), **changes)
    with pytest.raises(ValueError, match=message):
        run_stage(small_recipe, tmp_path, stage, config)
    assert not (tmp_path / "checkpoints").exists()


def test_stage_of_the_checkpoint_is_checked(small_recipe, stage1, tmp_path):
    config = dataclasses.replace(small_recipe.stage2, fp8=False)
    with pytest.raises(ValueError, match="stage 1, not 2"):
        run_stage(small_recipe, tmp_path, 2, config, start=stage1[0])


@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("recipe", ["current", "rowwise"])
def test_torchao_trains_by_a_plan_of_its_recipes(small_recipe, stage1, tmp_path, recipe):
    """Emulated on a CPU; near to what BF16 training gives, and a checkpoint without scales goes on."""
    convert(stage1[0], tmp_path / "c.fp8", Options(batches=2, batch=8, recipe=recipe))
    found = {}
    for fp8 in (True, False):
        curves, run = Curves(), tmp_path / str(fp8)
        config = dataclasses.replace(small_recipe.stage2, fp8=fp8)
        last = run_stage(small_recipe, run, 2, config, start=tmp_path / "c.fp8", curves=curves)
        found[fp8] = curves.losses
    assert found[True] != found[False]
    assert all(found[True][step] == pytest.approx(found[False][step], rel=0.05) for step in found[True])
    again = Curves()
    longer = dataclasses.replace(small_recipe.stage2, steps=8)
    run_stage(small_recipe, tmp_path / "True", 2, longer, curves=again)
    assert sorted(again.losses) == [7, 8]
    assert checkpoints.load(last).plan is None
    saved = checkpoints.load(tmp_path / "True/checkpoints/step-00000008")
    assert saved.plan is not None
    assert not saved.scales


def test_a_gradient_that_is_not_finite_is_left_out_and_told(small_recipe, tmp_path, monkeypatch):
    """Weights, moments and what follows are those of a run without the step; the rows are named."""
    curves = Curves()
    spoiled(monkeypatch, {4})
    config = dataclasses.replace(small_recipe.stage1, save_every=1, keep_last=9)
    run_stage(small_recipe, tmp_path, 1, config, curves=curves)
    before, after, later = (checkpoints.load(tmp_path / f"checkpoints/step-{step:08d}") for step in (3, 4, 5))
    for name, tensor in before.model.items():
        assert torch.equal(tensor, after.model[name])
        assert torch.isfinite(later.model[name]).all()
    for name, tensor in before.optimizer.items():
        assert torch.equal(tensor, after.optimizer[name])
    assert not torch.equal(later.model["patchify.weight"], after.model["patchify.weight"])
    (told,) = curves.incidents
    assert told[0] == 4
    assert "left out" in told[1]
    order = Loader(Store(manifests.read(small_recipe.data.path)), batch=8, seed=0).order
    assert [int(row) for row in told[1].partition("rows ")[2].split(", ")] == rows_of_step(order, 3, 8).tolist()


def test_too_many_of_them_in_a_row_end_the_run(small_recipe, tmp_path, monkeypatch):
    spoiled(monkeypatch, {2, 3, 4})
    config = dataclasses.replace(small_recipe.stage1, max_skipped_steps=3)
    with pytest.raises(DivergedError, match="last 3 steps to step 4 were not finite"):
        run_stage(small_recipe, tmp_path, 1, config)


def spoiled(monkeypatch, steps: set[int]) -> None:
    """The loss of these steps is not a number."""
    from pixart.model.rectified_flow import flow_loss
    from pixart.training import trainer as step

    count = itertools.count(1)

    def loss(velocity, data, noise):
        return flow_loss(velocity, data, noise) * (float("nan") if next(count) in steps else 1)

    monkeypatch.setattr(step, "flow_loss", loss)


@pytest.mark.slow
def test_fp8_scales_survive_a_step_that_is_left_out(small_recipe, converted, tmp_path, monkeypatch):
    spoiled(monkeypatch, {3})
    last = run_stage(small_recipe, tmp_path, 2, small_recipe.stage2, start=converted)
    assert all(torch.isfinite(scale).all() for scale in checkpoints.load(last).scales.values())


@pytest.mark.slow
def test_a_spike_is_told_with_its_rows(small_recipe, tmp_path, monkeypatch):
    from pixart.model.rectified_flow import flow_loss
    from pixart.training import trainer as step

    count = itertools.count(1)
    monkeypatch.setattr(step, "flow_loss", lambda *tensors: flow_loss(*tensors) * (30 if next(count) == 28 else 1))
    curves = Curves()
    config = dataclasses.replace(small_recipe.stage1, steps=30, save_every=30, lr=0.0, log_every=10)
    run_stage(small_recipe, tmp_path, 1, config, curves=curves)
    ((step_told, text),) = curves.incidents
    assert step_told == 28
    assert "deviations over its mean" in text
    assert len(text.partition("rows ")[2].split(", ")) == config.global_batch_size
    assert len(curves.losses) == 30


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_for_the_one_before(small_recipe, tmp_path, capfd):
    config = dataclasses.replace(small_recipe.stage1, steps=9)
    whole = run_stage(small_recipe, tmp_path / "whole", 1, config)
    run_stage(small_recipe, tmp_path / "run", 1, dataclasses.replace(config, steps=6))
    state = tmp_path / "run/checkpoints/step-00000006/state/__0_0.distcp"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    curves = Curves()
    again = run_stage(small_recipe, tmp_path / "run", 1, config, curves=curves)
    assert min(curves.losses) == 4  # of the one after step 3
    assert "step-00000006 is left out" in capfd.readouterr().err
    assert "damaged" in curves.incidents[0][1]
    assert (tmp_path / "run/checkpoints/step-00000006.damaged").exists()
    assert_equal(checkpoints.load(again), checkpoints.load(whole))
    with pytest.raises(ValueError, match="damaged or truncated"):
        checkpoints.load(tmp_path / "run/checkpoints/step-00000006.damaged")


@pytest.mark.slow
def test_the_newest_checkpoints_and_the_multiples_are_kept(small_recipe, tmp_path):
    config = dataclasses.replace(small_recipe.stage1, steps=12, save_every=2, keep_last=2, keep_every=4)
    run_stage(small_recipe, tmp_path, 1, config)
    assert [path.name for path in checkpoints.steps(tmp_path)] == [f"step-{step:08d}" for step in (4, 8, 10, 12)]
    assert not list(tmp_path.glob("checkpoints/.*"))


@pytest.mark.slow
def test_previews_and_a_trace(small_recipe, tmp_path):
    from PIL import Image

    curves = Curves()
    config = dataclasses.replace(small_recipe.stage1, preview_every=3, num_previews=3, profile_step=2)
    run_stage(small_recipe, tmp_path, 1, config, curves=curves)
    pictures = sorted((tmp_path / "previews").glob("*.png"))
    assert [picture.name for picture in pictures] == ["step-00000003.png", "step-00000006.png"]
    first, second = (Image.open(picture).convert("RGB") for picture in pictures)
    assert first.size == second.size
    assert first.tobytes() != second.tobytes()
    trace = tmp_path / "profiles/step-00000002.json.gz"
    assert set(curves.artifacts) == {*pictures, trace}
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("aten::addmm" in event.get("name", "") for event in events)


def test_a_line_tells_how_it_goes(small_recipe, tmp_path, capsys):
    run_stage(small_recipe, tmp_path, 1, dataclasses.replace(small_recipe.stage1, log_every=3))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["3/6", "6/6"]
    for word in ("loss", "gradient", "lr", "images/s", "tokens/s", "TFLOP/s", "GB", "data wait", "left"):
        assert word in lines[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_attention_is_measured_at_the_sizes_of_the_run(small_recipe, capsys, stage):
    """And whatever comes out, every block has it."""
    config = dataclasses.replace(small_recipe.train(stage), fp8=False, gradient_accumulation_steps=2)
    with process_group() as ranks:
        store = Store(manifests.read(small_recipe.data.path))
        training = Training(None, stage, small_recipe.model, config, store, ranks)
        found = training.fastest_attention()
    assert measured.cache_info().currsize
    assert found == measured(
        batch=4, heads=2, width=16, tokens=16, text=None if stage == 1 else 32, device=torch.device("cpu")
    )
    assert ("to the text" in capsys.readouterr().out) == (stage == 2)
    use(training.model, *found)
    assert {block.attention.attention.kernel for block in training.model.dit_blocks} == {found[0]}
