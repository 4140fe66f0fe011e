"""Training on stored latents: bit-exact resume, FP8, skipped steps, damaged checkpoints, errors."""

import dataclasses
import gzip
import itertools
import json
import logging
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from conversion.convert import convert
from conversion.options import Options
from pixart.checkpoint import directory as checkpoints
from pixart.data import manifest as manifests
from pixart.data.loading.loader import Loader
from pixart.data.store.zarr_store import Store
from pixart.model.sdpa_autotune import autotune, set_kernels_by_tokens
from pixart.training.loop import train
from pixart.training.metrics import DivergedError, NullReporter
from pixart.training.process_group import process_group
from pixart.training.trainer import Trainer


class RecordingReporter(NullReporter):
    """Reporter that stores everything in memory."""

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


def run_stage(recipe, run, stage, config, start=None, reporter=None):
    return train(
        stage=stage,
        model=recipe.model,
        config=config,
        dataset=recipe.data.path,
        recipe=recipe.name,
        run=run,
        start=start,
        reporter=reporter,
    )


def assert_equal(actual: checkpoints.Checkpoint, expected: checkpoints.Checkpoint) -> None:
    assert actual.step == expected.step
    for field in ("model", "ema", "optimizer", "scales"):
        first, second = getattr(actual, field), getattr(expected, field)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), f"{field}: {key}"


@pytest.fixture(scope="module")
def stage1(small_recipe, tmp_path_factory):
    reporter = RecordingReporter()
    last = run_stage(small_recipe, tmp_path_factory.mktemp("stage1"), 1, small_recipe.stage1, reporter=reporter)
    return last, reporter.losses


@pytest.fixture(scope="module")
def converted(stage1, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "c.fp8"
    convert(stage1[0], output, Options(num_batches=2, batch_size=8))
    return output


def test_resume_is_exact(small_recipe, stage1, tmp_path):
    """A run resumed after 3 of 6 steps has the losses, weights, EMA weights and moments of an uninterrupted one."""
    uninterrupted, losses = stage1
    reporter = RecordingReporter()
    first = uninterrupted.parent / "step-00000003"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / first.name).symlink_to(first)
    last = run_stage(small_recipe, tmp_path, 1, small_recipe.stage1, reporter=reporter)
    assert reporter.losses == {step: losses[step] for step in (4, 5, 6)}
    assert checkpoints.load(last).provenance["recipe"] == "demo"
    assert_equal(checkpoints.load(last), checkpoints.load(uninterrupted))


def test_training_without_clipping(small_recipe, stage1, tmp_path):
    """Weights are those of a limit that no gradient reaches, and the gradient norm is logged."""
    runs = {}
    for name, limit in (("none", None), ("unreached", 1e9), ("clipped", 0.01)):
        reporter = RecordingReporter()
        config = dataclasses.replace(small_recipe.stage1, max_grad_norm=limit, steps=3)
        last = run_stage(small_recipe, tmp_path / name, 1, config, reporter=reporter)
        runs[name] = checkpoints.load(last), reporter.values["train/grad_norm"]
    assert_equal(runs["none"][0], runs["unreached"][0])
    assert runs["none"][1] == runs["unreached"][1]
    assert min(runs["none"][1].values()) > 0.01
    weight = "dit_blocks.0.mlp.linear1.weight"
    assert not torch.equal(runs["none"][0].model[weight], runs["clipped"][0].model[weight])


def test_fp8_resume_is_exact_and_scales_move(small_recipe, converted, tmp_path):
    start = checkpoints.load(converted)
    assert start.provenance["recipe"] == "demo"  # of the run that the conversion began with
    uninterrupted = run_stage(small_recipe, tmp_path / "uninterrupted", 2, small_recipe.stage2, start=converted)
    (tmp_path / "resumed/checkpoints").mkdir(parents=True)
    (tmp_path / "resumed/checkpoints/step-00000003").symlink_to(uninterrupted.parent / "step-00000003")
    resumed = run_stage(small_recipe, tmp_path / "resumed", 2, small_recipe.stage2)
    end = checkpoints.load(uninterrupted)
    assert_equal(checkpoints.load(resumed), end)
    name = "dit_blocks.0.mlp.linear1.amax_history"
    assert end.scales[name].shape == start.scales[name].shape
    assert not torch.equal(end.scales[name], start.scales[name])
    assert all(torch.isfinite(scale).all() and (scale > 0).all() for key, scale in end.scales.items() if "scale" in key)
    # The text projections receive gradients once the zero-initialized output projection has been updated.
    assert end.scales["dit_blocks.0.cross_attention.q_proj.amax_history"][-1, 2] > 0


@pytest.mark.slow
def test_the_last_steps_are_in_bf16(small_recipe, converted, tmp_path):
    """All linears change to BF16 after 4 of 6 steps; runs resumed before and after the change continue it exactly."""
    config = dataclasses.replace(small_recipe.stage2, finish_bf16_steps=2, save_every=1, keep_last=6)
    last = run_stage(small_recipe, tmp_path / "run", 2, config, start=converted)
    planned = checkpoints.load(converted).plan.linears
    plans = {step: checkpoints.load(last.parent / f"step-{step:08}").plan for step in (4, 5, 6)}
    assert plans[4].linears == planned
    assert plans[5].linears == plans[6].linears == ()
    assert {plans[6].kept[name] for name in planned} == {"stage2.finish_bf16_steps=2"}
    for step in (4, 5):
        run = tmp_path / f"resumed{step}/checkpoints"
        run.mkdir(parents=True)
        (run / f"step-{step:08}").symlink_to(last.parent / f"step-{step:08}")
        resumed = run_stage(small_recipe, run.parent, 2, config)
        assert_equal(checkpoints.load(resumed), checkpoints.load(last))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
def test_compiled_fp8_training_equals_eager_training(small_recipe, converted, tmp_path):
    """With captions of many lengths, micro-batches, recomputation, validation and previews."""
    results = {}
    for compile in (False, True):
        reporter = RecordingReporter()
        (tmp_path / str(compile)).mkdir()
        config = dataclasses.replace(
            small_recipe.stage2,
            compile=compile,
            gradient_accumulation_steps=2,
            activation_checkpointing="selective",
            **{"validate_every": 2, "num_validation_samples": 6, "preview_every": 3, "num_previews": 3},
        )
        run_stage(small_recipe, tmp_path / str(compile), 2, config, start=converted, reporter=reporter)
        results[compile] = reporter
    for name in ("train/loss", "val/loss", "val/loss_ema"):
        eager, compiled = results[False].values[name], results[True].values[name]
        assert compiled.keys() == eager.keys()
        assert all(compiled[step] == pytest.approx(eager[step], rel=5e-3) for step in eager)
    assert len(results[True].artifacts) == 2


def test_stage2_starts_at_the_loss_of_stage1(small_recipe, stage1, converted):
    reporter = RecordingReporter()
    config = dataclasses.replace(small_recipe.stage2, steps=1, lr=0.0, cond_dropout_prob=0.0)
    run_stage(small_recipe, converted.parent / "run", 2, config, start=converted, reporter=reporter)
    last_of_stage1 = min(stage1[1].values())
    assert reporter.losses[1] < 1.3 * last_of_stage1  # on another batch; an end-to-end test compares the same one


@pytest.mark.slow
def test_bf16_trains_with_float32_master_weights(small_recipe, tmp_path):
    reporter = RecordingReporter()
    config = dataclasses.replace(small_recipe.stage1, precision="bf16", steps=30, lr=3e-3)
    last = run_stage(small_recipe, tmp_path, 1, config, reporter=reporter)
    losses = list(reporter.losses.values())
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
def test_errors(small_recipe, tmp_path, stage, changes, message):
    config = dataclasses.replace(small_recipe.train(stage), **changes)
    with pytest.raises(ValueError, match=message):
        run_stage(small_recipe, tmp_path, stage, config)
    assert not (tmp_path / "checkpoints").exists()


def test_checkpoint_of_another_stage_is_rejected(small_recipe, stage1, tmp_path):
    config = dataclasses.replace(small_recipe.stage2, fp8=False)
    with pytest.raises(ValueError, match="stage=2: the checkpoint is of stage 1"):
        run_stage(small_recipe, tmp_path, 2, config, start=stage1[0])


@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("recipe", ["current", "rowwise"])
def test_torchao_trains_with_its_recipes(small_recipe, stage1, tmp_path, recipe):
    """Losses, emulated on a CPU, are close to those of BF16, and a checkpoint without scales is resumed."""
    convert(stage1[0], tmp_path / "c.fp8", Options(num_batches=2, batch_size=8, fp8_recipe=recipe))
    losses = {}
    for fp8 in (True, False):
        reporter, run = RecordingReporter(), tmp_path / str(fp8)
        config = dataclasses.replace(small_recipe.stage2, fp8=fp8)
        last = run_stage(small_recipe, run, 2, config, start=tmp_path / "c.fp8", reporter=reporter)
        losses[fp8] = reporter.losses
    assert losses[True] != losses[False]
    assert all(losses[True][step] == pytest.approx(losses[False][step], rel=0.05) for step in losses[True])
    resumed = RecordingReporter()
    longer = dataclasses.replace(small_recipe.stage2, steps=8)
    run_stage(small_recipe, tmp_path / "True", 2, longer, reporter=resumed)
    assert sorted(resumed.losses) == [7, 8]
    assert checkpoints.load(last).plan is None
    saved = checkpoints.load(tmp_path / "True/checkpoints/step-00000008")
    assert saved.plan is not None
    assert not saved.scales


def test_a_step_with_a_non_finite_gradient_is_skipped_and_reported(small_recipe, tmp_path, monkeypatch):
    """Weights and moments do not change, and the incident names the rows of the batch."""
    reporter = RecordingReporter()
    make_loss_nan(monkeypatch, {4})
    config = dataclasses.replace(small_recipe.stage1, save_every=1, keep_last=9)
    run_stage(small_recipe, tmp_path, 1, config, reporter=reporter)
    before, after, later = (checkpoints.load(tmp_path / f"checkpoints/step-{step:08d}") for step in (3, 4, 5))
    for name, tensor in before.model.items():
        assert torch.equal(tensor, after.model[name])
        assert torch.isfinite(later.model[name]).all()
    for name, tensor in before.optimizer.items():
        assert torch.equal(tensor, after.optimizer[name])
    assert not torch.equal(later.model["patchify.weight"], after.model["patchify.weight"])
    ((step, text),) = reporter.incidents
    assert step == 4
    assert "update skipped" in text
    order = Loader(Store(manifests.read(small_recipe.data.path)), global_batch_size=8, seed=0).order
    assert [int(row) for row in text.partition("rows ")[2].split(", ")] == order.rows(3).tolist()


def test_too_many_consecutive_skipped_steps_end_the_run(small_recipe, tmp_path, monkeypatch):
    make_loss_nan(monkeypatch, {2, 3, 4})
    config = dataclasses.replace(small_recipe.stage1, max_skipped_steps=3)
    with pytest.raises(DivergedError, match="step 4: the gradients of the last 3 steps were not finite"):
        run_stage(small_recipe, tmp_path, 1, config)


def make_loss_nan(monkeypatch, steps: set[int]) -> None:
    """Make the loss of these steps NaN."""
    from pixart.model.rectified_flow import flow_loss
    from pixart.training import trainer

    count = itertools.count(1)

    def loss(velocity, data, noise):
        return flow_loss(velocity, data, noise) * (float("nan") if next(count) in steps else 1)

    monkeypatch.setattr(trainer, "flow_loss", loss)


@pytest.mark.slow
def test_fp8_scales_stay_finite_after_a_skipped_step(small_recipe, converted, tmp_path, monkeypatch):
    make_loss_nan(monkeypatch, {3})
    last = run_stage(small_recipe, tmp_path, 2, small_recipe.stage2, start=converted)
    assert all(torch.isfinite(scale).all() for scale in checkpoints.load(last).scales.values())


@pytest.mark.slow
def test_a_loss_spike_is_reported_with_its_rows(small_recipe, tmp_path, monkeypatch):
    from pixart.model.rectified_flow import flow_loss
    from pixart.training import trainer

    count = itertools.count(1)
    monkeypatch.setattr(trainer, "flow_loss", lambda *tensors: flow_loss(*tensors) * (30 if next(count) == 28 else 1))
    reporter = RecordingReporter()
    config = dataclasses.replace(small_recipe.stage1, steps=30, save_every=30, lr=0.0, log_every=10)
    run_stage(small_recipe, tmp_path, 1, config, reporter=reporter)
    ((step, text),) = reporter.incidents
    assert step == 28
    assert "standard deviations above the mean" in text
    assert len(text.partition("rows ")[2].split(", ")) == config.global_batch_size
    assert len(reporter.losses) == 30


@pytest.mark.slow
def test_damaged_checkpoint_is_skipped_for_the_previous_one(small_recipe, tmp_path, caplog):
    config = dataclasses.replace(small_recipe.stage1, steps=9)
    uninterrupted = run_stage(small_recipe, tmp_path / "uninterrupted", 1, config)
    run_stage(small_recipe, tmp_path / "run", 1, dataclasses.replace(config, steps=6))
    state = tmp_path / "run/checkpoints/step-00000006/state/__0_0.distcp"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    reporter = RecordingReporter()
    resumed = run_stage(small_recipe, tmp_path / "run", 1, config, reporter=reporter)
    assert min(reporter.losses) == 4  # resumed after step 3
    assert "step-00000006 is skipped" in caplog.text
    assert "damaged" in reporter.incidents[0][1]
    assert (tmp_path / "run/checkpoints/step-00000006.damaged").exists()
    assert_equal(checkpoints.load(resumed), checkpoints.load(uninterrupted))
    with pytest.raises(ValueError, match="damaged or truncated"):
        checkpoints.load(tmp_path / "run/checkpoints/step-00000006.damaged")


@pytest.mark.slow
def test_pruning_keeps_the_last_checkpoints_and_multiples(small_recipe, tmp_path):
    config = dataclasses.replace(small_recipe.stage1, steps=12, save_every=2, keep_last=2, keep_every=4)
    run_stage(small_recipe, tmp_path, 1, config)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        f"step-{step:08d}" for step in (4, 8, 10, 12)
    ]
    assert not list(tmp_path.glob("checkpoints/.*"))


@pytest.mark.slow
def test_previews_and_profiler_trace(small_recipe, tmp_path):
    from PIL import Image

    reporter = RecordingReporter()
    config = dataclasses.replace(small_recipe.stage1, preview_every=3, num_previews=3, profile_step=2)
    run_stage(small_recipe, tmp_path, 1, config, reporter=reporter)
    previews = sorted((tmp_path / "previews").glob("*.png"))
    assert [preview.name for preview in previews] == ["step-00000003.png", "step-00000006.png"]
    first, second = (Image.open(preview).convert("RGB") for preview in previews)
    assert first.size == second.size
    assert first.tobytes() != second.tobytes()
    trace = tmp_path / "profiles/step-00000002.json.gz"
    assert set(reporter.artifacts) == {*previews, trace}
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("aten::addmm" in event.get("name", "") for event in events)


def test_progress_lines(small_recipe, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="pixart")
    run_stage(small_recipe, tmp_path, 1, dataclasses.replace(small_recipe.stage1, log_every=3))
    lines = [message for message in caplog.messages if message.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["3/6", "6/6"]
    for label in ("loss", "gradient norm", "learning rate", "images/s", "tokens/s", "TFLOP/s per rank", "GiB", "left"):
        assert label in lines[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_attention_is_autotuned_at_the_sizes_of_the_run(small_recipe, caplog, stage):
    caplog.set_level(logging.INFO, logger="pixart")
    config = dataclasses.replace(small_recipe.train(stage), fp8=False, gradient_accumulation_steps=2)
    with process_group() as ranks:
        store = Store(manifests.read(small_recipe.data.path))
        trainer = Trainer(None, stage, small_recipe.model, config, store, ranks)
        kernels = trainer.autotune_attention()
    assert autotune.cache_info().currsize
    text_tokens = None if stage == 1 else 32
    expected = autotune(batch=4, heads=2, head_dim=16, tokens=16, text_tokens=text_tokens, device=torch.device("cpu"))
    assert kernels == {16: expected}
    assert ("cross-attention" in caplog.text) == (stage == 2)
    set_kernels_by_tokens(trainer.model, kernels)
    assert {block.attention.attention.kernel for block in trainer.model.dit_blocks} == {expected[0]}
