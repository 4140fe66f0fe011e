"""Training on a dataset with aspect buckets: batches, validation, previews, FP8, compilation."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conversion.batches import dataset_batches
from conversion.convert import convert
from conversion.options import Options
from pixart.checkpoint import directory as checkpoints
from pixart.data import manifest as manifests
from pixart.data.store.zarr_store import Store
from pixart.model.dit import DiT
from pixart.model.flops import training_flops
from pixart.model.fp8.plan import check_gemm_alignment
from pixart.model.sdpa import AttentionKernel
from pixart.model.sdpa_autotune import set_kernels_by_tokens
from pixart.training.process_group import process_group
from pixart.training.trainer import Trainer, new_model
from pixart.training.validation import Validator
from tests.pixart.training.test_loop import RecordingReporter, assert_equal, run_stage
from tests.support import ranks as processes

pytestmark = pytest.mark.slow

LATENTS = {(8, 8), (4, 16), (16, 4), (6, 12), (12, 6), (6, 10)}


def settings(recipe, stage: int, **changes):
    watched = {"validate_every": 6, "num_validation_samples": 6, "preview_every": 6, "num_previews": 6}
    return dataclasses.replace(recipe.train(stage), **{"global_batch_size": 4, **watched, **changes})


@pytest.fixture(scope="module")
def stage1(bucketed_recipe, tmp_path_factory):
    reporter, run = RecordingReporter(), tmp_path_factory.mktemp("bucketed-stage1")
    last = run_stage(bucketed_recipe, run, 1, settings(bucketed_recipe, 1, steps=18), reporter=reporter)
    return last, reporter


@pytest.fixture(scope="module")
def converted(stage1, tmp_path_factory):
    output = tmp_path_factory.mktemp("bucketed-converted") / "c.fp8"
    report = convert(stage1[0], output, Options(num_batches=2, batch_size=4))
    return output, report


def test_every_bucket_is_trained_validated_and_previewed(stage1):
    _, reporter = stage1
    assert len(reporter.losses) == 18
    assert all(np.isfinite(list(values.values())).all() for values in reporter.values.values())
    assert {"val/loss", "val/loss_ema"} <= reporter.values.keys()
    assert [file.name for file in reporter.artifacts if "preview" in str(file)][-1] == "step-00000018.png"
    assert Image.open(reporter.artifacts[-1]).size[0] > 6 * 64


def test_resume_is_exact(bucketed_recipe, stage1, tmp_path):
    first = stage1[0].parent / "step-00000015"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / first.name).symlink_to(first)
    last = run_stage(bucketed_recipe, tmp_path, 1, settings(bucketed_recipe, 1, steps=18))
    assert_equal(checkpoints.load(last), checkpoints.load(stage1[0]))


def trainer_of(recipe, stage: int, ranks, **changes) -> tuple[Trainer, Store]:
    store = Store(manifests.read(recipe.data.path))
    return Trainer(None, stage, recipe.model, settings(recipe, stage, fp8=False, **changes), store, ranks), store


def test_metrics_count_tokens_and_operations_by_bucket(bucketed_recipe, tmp_path):
    reporter = RecordingReporter()
    config = settings(bucketed_recipe, 1, steps=6, log_every=1, validate_every=0, preview_every=0)
    run_stage(bucketed_recipe, tmp_path, 1, config, reporter=reporter)
    images, tokens = (reporter.values[f"train/{name}_per_second"] for name in ("images", "tokens"))
    per_image = {round(tokens[step] / images[step]) for step in images}
    assert per_image <= {16, 18, 15}
    assert len(per_image) > 1


def test_operations_depend_on_the_shape(stage1):
    config = checkpoints.load_without_tensors(stage1[0]).config
    flops = {size: training_flops(config, size, 32) for size in LATENTS}
    assert training_flops(config, 8, 32) == flops[8, 8] == flops[4, 16]
    assert flops[6, 10] < flops[8, 8] < flops[6, 12]


def validation_loss(recipe, rows: list[int], file: str | None = None) -> float:
    with process_group() as ranks:
        trainer, store = trainer_of(recipe, 1, ranks)
        loss = Validator(trainer, store, np.array(rows)).loss()
        if file and ranks.is_first:
            Path(file).write_text(repr(loss))
    return loss


def test_validation_is_the_mean_over_rows_for_any_number_of_ranks(bucketed_recipe, tmp_path):
    """With buckets of unequal numbers of rows, of which some are not a multiple of the ranks."""
    rows = [0, 1, 6, 12, 18, 20, 25, 31, 70]
    losses = [validation_loss(bucketed_recipe, rows)]
    processes.run(2, validation_loss, bucketed_recipe, rows, str(tmp_path / "loss"))
    assert float((tmp_path / "loss").read_text()) == pytest.approx(losses[0], rel=1e-5)


def test_rows_of_fp8_products_are_checked_in_every_bucket(bucketed_recipe):
    with process_group() as ranks:
        trainer, _ = trainer_of(bucketed_recipe, 2, ranks)
    rows = trainer.rows_per_image()
    assert rows.pop("text tokens") == 8
    assert sorted(rows.values()) == [15, 16, 16, 16, 18, 18]
    check_gemm_alignment(16, rows)
    for images, shape in ((8, "6x10"), (4, "6x12")):
        with pytest.raises(ValueError, match=f"image tokens of {shape} latents") as error:
            check_gemm_alignment(images, rows)
        assert "\n" not in str(error.value)


def plain_model(recipe) -> DiT:
    """Return an initialized model of stage 1 that is not sharded, with fused projections as in training."""
    model = new_model(1, recipe.model, manifests.read(recipe.data.path))
    model.fuse_projections()
    return model


def test_attention_kernels_by_shape(bucketed_recipe):
    """Kernels that differ are chosen by the number of tokens; equal ones do not look at it."""
    default, other = AttentionKernel(), AttentionKernel(backend="math")
    model = plain_model(bucketed_recipe)
    attention = model.dit_blocks[0].attention.attention
    set_kernels_by_tokens(model, {15: (default, default), 16: (default, default)})
    assert not attention.kernels_by_tokens
    inputs = [torch.randn(1, 1, tokens, 32) for tokens in (15, 16)]
    expected = [attention(x[0], x[0]) for x in inputs]
    set_kernels_by_tokens(model, {15: (default, default), 16: (other, default)})
    assert attention.kernels_by_tokens == {15: default, 16: other}
    for x, y in zip(inputs, expected, strict=True):
        assert torch.allclose(attention(x[0], x[0]), y, atol=1e-5)


def test_conversion_calibrates_on_every_bucket(bucketed_recipe, stage1, converted):
    _, report = converted
    assert {tuple(size) for size in report["calibration_latents"]} == LATENTS
    assert report["num_batches"] >= 6
    assert report["acceptance"]["passed"]
    batches = dataset_batches(bucketed_recipe.data.path, checkpoints.load(stage1[0]), 12, 4)
    assert {tuple(batch.latents.shape[-2:]) for batch in batches[:6]} == LATENTS
    shapes = [tuple(batch.latents.shape[-2:]) for batch in batches]
    assert all(shapes.count(size) == 2 for size in LATENTS)


def test_stage_2_in_fp8(bucketed_recipe, converted, tmp_path):
    reporter = RecordingReporter()
    config = settings(bucketed_recipe, 2, steps=12, fp8=True)
    last = run_stage(bucketed_recipe, tmp_path, 2, config, start=converted[0], reporter=reporter)
    assert checkpoints.load(last).plan is not None
    assert len(reporter.losses) == 12
    assert np.isfinite(list(reporter.losses.values())).all()


def test_a_patch_that_does_not_divide_a_bucket_is_refused(bucketed_recipe):
    recipe = dataclasses.replace(bucketed_recipe, model=dataclasses.replace(bucketed_recipe.model, patch_size=4))
    with process_group() as ranks, pytest.raises(ValueError, match=r"model\.patch_size=4: .* latents of \d+ x \d+"):
        trainer_of(recipe, 1, ranks)


@pytest.mark.parametrize("dynamic", [None, False])
def test_compilations_are_at_most_one_per_bucket(bucketed_recipe, dynamic):
    """Traced with and without dynamic shapes; a backend does not change the number of graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = plain_model(bucketed_recipe)
    for block in model.blocks:
        forward = torch.compile(block.forward, fullgraph=True, backend="eager", dynamic=dynamic)
        block.forward = forward  # type: ignore[method-assign]
    for _ in range(3):
        for height, width in sorted(LATENTS):
            velocity = model(torch.randn(4, 16, height, width), torch.rand(4), torch.zeros(4, dtype=torch.long))
            velocity.sum().backward()
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= len(LATENTS)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
def test_blocks_are_compiled_at_most_once_per_bucket(bucketed_recipe, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reporter = RecordingReporter()
    config = settings(bucketed_recipe, 1, steps=24, compile=True, validate_every=0, preview_every=0)
    run_stage(bucketed_recipe, tmp_path, 1, config, reporter=reporter)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= len(LATENTS)
    assert np.isfinite(list(reporter.losses.values())).all()
