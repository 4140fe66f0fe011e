"""Stage-2 files of the original training, in BF16 or with TransformerEngine, become FP8 checkpoints to train from."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from conversion import convert, to_bf16, to_fp8
from conversion.reading import formats
from conversion.report.text import UNTRAINED_GUIDANCE
from jobs.tasks import caption, init_dataset, latents
from pixart.checkpoint import directory as checkpoints
from pixart.config.recipe import Recipe, to_json
from pixart.model.dit import DiT
from pixart.model.fp8 import linear
from pixart.recipes import demo
from pixart.sampling import loading
from pixart.training.loop import train
from pixart.training.metrics import NullReporter
from tests.support.transformer_engine_files import EPS, make_inputs, original_model, train_original

QUICK = ["--num-batches", "2", "--batch-size", "8", "--base-latent-size", "8"]
TEXT_DIM = 384  # of the demo's text encoder
ENGINES = {"TransformerEngine": True, "BF16": False}


@pytest.fixture(params=ENGINES)
def stage2_file(request, tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model_3.pt"
    model = original_model(2, text_dim=TEXT_DIM, transformer_engine=ENGINES[request.param])
    torch.save(train_original(model), path)
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Recipe of a small dataset of pixels in [0, 1], as those that the original training read."""
    recipe = demo(str(tmp_path_factory.mktemp("home")))
    data = dataclasses.replace(recipe.data, max_images=32, num_shards=1, pixel_range=(0, 1))
    short = {"steps": 6, "global_batch_size": 8, "warmup_steps": 0, "save_every": 3, "log_every": 1, "lr": 1e-4}
    short |= {"validate_every": 0, "num_validation_samples": 0, "preview_every": 0, "cond_dropout_prob": 0.25}
    recipe = dataclasses.replace(recipe, data=data, stage2=dataclasses.replace(recipe.stage2, **short))
    init_dataset.run(to_json(recipe))
    caption.run(data.path, [0])
    latents.run(data.path, [0])
    return recipe


class LossReporter(NullReporter):
    """Reporter that stores the losses."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def metrics(self, step, values):
        if "train/loss" in values:
            self.losses[step] = values["train/loss"]


def test_conversion_keeps_stage_and_training_state(stage2_file, capsys):
    assert to_fp8.main([str(stage2_file), *QUICK]) == 0
    printed = capsys.readouterr().out
    source, saved = formats.read(stage2_file, base_latent_size=8), checkpoints.load(stage2_file.with_suffix(".fp8"))
    assert (saved.stage, saved.step, saved.config) == (2, 3, source.config)
    for group in ("model", "ema", "optimizer"):
        before, after = getattr(source, group), getattr(saved, group)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), group
    assert saved.provenance["acceptance"] == "PASS"
    assert saved.plan.linears
    assert UNTRAINED_GUIDANCE in printed
    report = json.loads((stage2_file.with_suffix(".fp8") / "report.json").read_text())
    html = (stage2_file.with_suffix(".fp8") / "report.html").read_text()
    assert report["cond_dropout_prob"] == saved.provenance["cond_dropout_prob"] == 0
    assert report["stages"] == [2, 2]
    assert UNTRAINED_GUIDANCE.replace(">", "&gt;") in html
    command = f"train --stage 2 --from {stage2_file.with_suffix('.fp8')} --dataset DATASET"
    if "qk_norm_eps" in source.config:
        skipped = "never unpickled: 37 in model and 37 in model_ema"
        assert report["skipped_extra_states"] == {"model": 37, "model_ema": 37}
        assert saved.provenance["skipped_extra_states"] == {"model": 37, "model_ema": 37}
        assert skipped in printed
        assert skipped in html
        assert f"{command} --set stage2.decay_qk_norm=true\n" in printed
    else:
        assert "_extra_state" not in printed + html
        assert f"{command}\n" in printed


def test_dry_run_names_skipped_tensors(stage2_file, capsys):
    assert to_fp8.main([str(stage2_file), *QUICK, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    is_transformer_engine = "qk_norm_eps" in formats.read(stage2_file, base_latent_size=8).config
    assert ("37 in model and 37 in model_ema" in printed) == is_transformer_engine
    assert UNTRAINED_GUIDANCE in printed
    assert not stage2_file.with_suffix(".fp8").exists()


@pytest.mark.slow
def test_training_continues_in_fp8(stage2_file, recipe, tmp_path):
    """Training starts from the state of the file, reports finite losses, and keeps eps and the record of dropout."""
    start = tmp_path / "model_3.fp8"
    assert to_fp8.main([str(stage2_file), *QUICK, "--num-batches", "6", "--dataset", recipe.data.path]) == 0
    config = dataclasses.replace(recipe.stage2, decay_qk_norm=True)
    reporter = LossReporter()
    model, dataset = recipe.model, recipe.data.path
    last = train(
        stage=2, model=model, config=config, dataset=dataset, run=tmp_path / "run", start=start, reporter=reporter
    )
    assert sorted(reporter.losses) == [4, 5, 6]
    assert all(0 < loss < 100 for loss in reporter.losses.values())
    source, trained = checkpoints.load(start), checkpoints.load(last)
    assert trained.step == 6
    assert source.config.items() <= trained.config.items()
    assert trained.plan is not None
    assert {float(trained.optimizer[name]) for name in trained.optimizer if name.endswith(".step")} == {6.0}
    assert trained.provenance["cond_dropout_prob"] == 0.25
    assert trained.provenance["decay_qk_norm"]
    assert loading.load(last)[0].config.qk_norm_eps == source.config.get("qk_norm_eps")


def test_eps_is_kept_by_export_and_from_pretrained(tmp_path, capsys):
    torch.manual_seed(0)
    path, folder = tmp_path / "model_3.pt", tmp_path / "model_3.fp8"
    original = original_model(2)
    torch.save(train_original(original), path)
    assert to_fp8.main([str(path), *QUICK, "--export", "inference"]) == 0
    for weights in ("transformer", "ema", "inference"):
        assert DiT.load_config(folder / weights)["qk_norm_eps"] == EPS
    model = DiT.from_pretrained(folder / "transformer")
    inputs = make_inputs(original)
    with torch.no_grad():
        assert (model(**inputs) - original(**inputs)).abs().max() < 1e-5
    exported, _ = loading.load(folder / "inference")
    assert {module.eps for name, module in exported.named_modules() if name.endswith("_norm")} == {EPS}
    assert linear.float8_linears(exported)

    assert to_bf16.main([str(folder)]) == 0
    again = convert.training_of_source(formats.read(tmp_path / "model_3.bf16"), 2)  # nothing is skipped in this one
    assert again == {
        "stages": [2, 2],
        "skipped_extra_states": {},
        "unused_entries": {},
        "dropped_tensors": {},
        "cond_dropout_prob": 0.0,
        "decay_qk_norm": True,
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_stage1_with_transformer_engine_is_converted(stage, tmp_path, capsys):
    torch.manual_seed(0)
    path = tmp_path / "model_3.pt"
    torch.save(train_original(original_model(1)), path)
    assert to_fp8.main([str(path), *QUICK, "--stage", str(stage), "--text-dim", "48"]) == 0
    saved = checkpoints.load(tmp_path / "model_3.fp8")
    assert (saved.stage, saved.config["qk_norm_eps"], saved.provenance["cond_dropout_prob"]) == (stage, EPS, 0.1)
    assert saved.provenance["skipped_extra_states"] == {"model": 25, "model_ema": 25}
    printed = capsys.readouterr().out
    assert UNTRAINED_GUIDANCE not in printed
    assert f"--set stage{stage}.decay_qk_norm=true" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["te/stage2_training", "te/stage2_reparameterized", "legacy/dev_stage2"])
def test_stage2_files_of_the_original_training_pass(shared_data, tmp_path, name, capsys):
    side = "16" if "legacy" in name else "32"
    words = [str(shared_data / f"{name}.pt"), "--output", str(tmp_path / "out"), "--base-latent-size", side]
    assert to_fp8.main([*words, "--num-batches", "2", "--batch-size", "4"]) == 0
    assert UNTRAINED_GUIDANCE in capsys.readouterr().out
    saved = checkpoints.load(tmp_path / "out")
    assert saved.config.get("qk_norm_eps") == (EPS if "te/" in name else None)
    assert saved.provenance["cond_dropout_prob"] == 0
