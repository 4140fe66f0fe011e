"""The evaluate command on a finished small demo: figures, resuming, pages, records and errors."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from jobs.state import evaluation, ledger
from pixart.sampling.contact_sheet import MIN_CELL
from tests.support.demo_fixture import SETTINGS as SETTINGS_OF_DEMO
from tests.support.demo_fixture import Demo

pytestmark = pytest.mark.slow
SETTINGS = {
    "features": "efficientnet-lite0:16",
    "feature_image_size": 32,
    "num_prompts": 24,
    "num_shards": 2,
    "num_reference_images": 24,
    "num_bootstraps": 5,
    "save_images": "true",
}


def words(**changed: object) -> list[str]:
    """Return the options that set the evaluation's keys."""
    values = {**SETTINGS, "steps": None, **changed}
    return [
        word for name, value in values.items() if value is not None for word in ("--set", f"evaluation.{name}={value}")
    ] + ["--set", "sample.steps=2"]


@pytest.fixture(scope="module")
def evaluated(small_demo: Demo) -> Path:
    """Evaluate the last checkpoint of stage 2 with two guidances, and return the folder."""
    run = str(small_demo.runs("train")[-1])
    done = small_demo.command("evaluate", run, "--guidance", "1", "--guidance", "2", *words())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 images" in done.stdout or "48 images in 4 shards" in done.stdout
    return Path(next(line for line in done.stdout.splitlines() if line.startswith("evaluated: ")).split()[1]).parent


def test_results_have_figures_with_intervals_and_protocols(evaluated: Path):
    results = json.loads((evaluated / evaluation.RESULTS).read_text())
    first, second = results["variants"]
    assert first["protocol"]["guidance"] == 1
    assert second["protocol"]["guidance"] == 2
    assert first["protocol"]["hash"] != second["protocol"]["hash"]
    assert {"fd", "kid", "precision", "recall", "density", "coverage", "sliced_wasserstein", "counted"} <= set(
        first["figures"]
    )
    for figure in first["figures"].values():
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert results["reference"]["resize"] == "32 px, PIL bicubic"
    assert results["reference"]["count"] == 24
    page = (evaluated / evaluation.PAGE).read_text()
    assert "Fréchet distance" in page
    assert "Worst prompts by Counted prompts" in page
    assert page.count("data:image/jpeg") == 16
    assert "2 protocols" in page


def test_an_interrupted_evaluation_continues_and_gives_the_same(small_demo: Demo, evaluated: Path):
    """Only the element without a ledger entry is computed again, with the same results."""
    before = (evaluated / evaluation.RESULTS).read_text()
    times = {path: path.stat().st_mtime_ns for path in (evaluated / "variants").rglob("*.npz")}
    ledger.path(evaluated, evaluation.SAMPLE, 1).unlink()
    lost = evaluation.statistics_path(evaluated, 0, 1)
    lost.write_bytes(lost.read_bytes()[:100])  # as a task that was killed would leave it without atomic files
    run = str(small_demo.runs("train")[-1])
    done = small_demo.command("evaluate", run, "--guidance", "1", "--guidance", "2", *words())
    assert done.returncode == 0, done.stderr
    changed = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {lost}
    after = json.loads((evaluated / evaluation.RESULTS).read_text())
    for old, new in zip(json.loads(before)["variants"], after["variants"], strict=True):
        assert old["figures"] == new["figures"]


def test_images_do_not_depend_on_the_shards(small_demo: Demo, evaluated: Path):
    """Another number of shards gives the same noise to each prompt, and figures that agree."""
    run = str(small_demo.runs("train")[-1])
    done = small_demo.command("evaluate", run, "--guidance", "1", *words(num_shards=3))
    assert done.returncode == 0, done.stderr
    other = Path(next(line for line in done.stdout.splitlines() if line.startswith("evaluated: ")).split()[1]).parent
    assert other != evaluated
    one, two = (json.loads((folder / evaluation.RESULTS).read_text())["variants"][0] for folder in (evaluated, other))
    assert one["figures"]["fd"]["value"] == pytest.approx(two["figures"]["fd"]["value"], rel=1e-3)
    assert one["protocol"] == two["protocol"]


def test_records_of_an_evaluation(small_demo: Demo, evaluated: Path):
    """MLflow has the figures at the checkpoint's step, lineage shows the evaluation, open finds its page."""
    from jobs.tracking.mlflow_store import Tracker, run_id

    run = small_demo.runs("summarize")[0]
    history = Tracker(small_demo.home).client.get_metric_history(str(run_id(run)), "eval/fd")
    assert [point.step for point in history] == [12]
    shown = small_demo.command("lineage", str(evaluated)).stdout
    assert "evaluation" in shown
    assert "training" in shown
    shown = small_demo.command("lineage", str(small_demo.runs("train")[-1] / "checkpoints/step-00000012")).stdout
    assert evaluated.name in shown
    opened = small_demo.command("open", run.name, "--print").stdout
    assert opened.strip() == str(evaluated / evaluation.PAGE)


def test_reference_statistics_of_an_earlier_evaluation(small_demo: Demo, evaluated: Path):
    """The merged reference gives the same distance as its images, and is refused for another extractor."""
    run, file = str(small_demo.runs("train")[-1]), str(evaluated / "reference.npz")
    done = small_demo.command("evaluate", run, "--guidance", "1", "--reference", file, *words())
    assert done.returncode == 0, done.stderr
    other = Path(next(line for line in done.stdout.splitlines() if line.startswith("evaluated: ")).split()[1]).parent
    one, two = (json.loads((folder / evaluation.RESULTS).read_text())["variants"][0] for folder in (evaluated, other))
    assert one["figures"]["fd"] == two["figures"]["fd"]
    assert one["protocol"] == two["protocol"]
    refused = small_demo.command("evaluate", run, "--reference", file, *words(features="efficientnet-lite0:24"))
    assert refused.returncode == 2
    assert "was made with features='efficientnet-lite0:16'" in refused.stderr


def test_compare_pairs_images(small_demo: Demo, evaluated: Path):
    """Two settings of one checkpoint are compared image by image."""
    done = small_demo.command("compare", f"{evaluated}#1", f"{evaluated}#2")
    assert done.returncode == 0, done.stderr
    assert "counted:" in done.stdout
    assert "sign test p=" in done.stdout
    assert "over 24 images" in done.stdout
    assert small_demo.command("compare", f"{evaluated}#1", f"{evaluated}#3").returncode == 2


def test_bf16_and_fp8_of_one_conversion_are_compared(small_demo: Demo):
    """Runs in BF16 and in FP8 from the same converted checkpoint are compared with intervals and a sign test."""
    converted, fp8 = next(small_demo.home.glob("runs/*/checkpoints/*.fp8")), small_demo.runs("train")[1]
    keys = [*SETTINGS_OF_DEMO, "stage2.fp8=false", "stage2.preview_every=0"]
    options = [word for key in keys if not key.startswith("data.") for word in ("--set", key)]
    trained = small_demo.command("train", "--from", str(converted), *options)
    assert trained.returncode == 0, trained.stderr
    folders = []
    for run in (small_demo.runs("train")[-1], fp8):
        done = small_demo.command("evaluate", str(run), "--reference", "none", *words())
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("evaluated: "))
        folders.append(str(Path(line.split()[1]).parent))
    done = small_demo.command("compare", *folders)
    shutil.rmtree(small_demo.runs("train")[-1])  # other tests take the newest run
    assert done.returncode == 0, done.stderr
    assert "sign test" in done.stdout


def test_training_evaluates_checkpoints_and_previews_prompts(small_demo: Demo):
    """`evaluate_every` evaluates beside training and keeps the checkpoint; `sample.prompts` are previewed."""
    converted = next(small_demo.home.glob("runs/*/checkpoints/*.fp8"))
    (small_demo.folder / "prompts.txt").write_text("a red circle\na blue star\n")
    keys = ["steps=6", "save_every=2", "keep_last=1", "evaluate_every=4", "preview_every=6", "warmup_steps=1"]
    keys += ["global_batch_size=8", "num_validation_samples=0", "validate_every=0"]
    options = [word for key in keys for word in ("--set", f"stage2.{key}")] + words(num_prompts=18)
    options += ["--set", "sample.prompts=prompts.txt"]
    done = small_demo.command("train", "--from", str(converted), *options)
    assert done.returncode == 0, done.stderr
    run = small_demo.runs("train")[-1]
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000004", "step-00000006"]
    log = (run / "evaluations.log").read_text()
    assert "evaluated: " in log, log
    assert len(evaluation.of_checkpoint(small_demo.home, run / "checkpoints/step-00000004")) == 1
    with Image.open(run / "previews/step-00000006.png") as sheet:
        assert sheet.width < 3 * MIN_CELL  # two images in place of eight
    shutil.rmtree(run)  # other tests take the newest run


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (["--prompts", "bad.jsonl"], {}, "bad.jsonl: line 1: is not JSON"),
        (["--prompts", "other.json"], {}, "is no file of COCO captions"),
        (["--reference", "empty"], {}, "holds no images"),
        (["--reference", "missing"], {}, "missing: does not exist"),
        ([], {"features": "empty"}, "empty: is no feature extractor"),
        ([], {"features": "efficientnet-lite0:99"}, "has no layer of width '99'"),
        ([], {"num_prompts": 16}, "16 images: the Fréchet distance needs more than 16"),
        ([], {"distances": "fid"}, "must be one of fd, kid"),
        (["--judge", "model"], {}, "no prompt has questions"),
        (["--caption-back"], {}, "give --judge MODEL"),
        (["--clip", "empty"], {}, "is no CLIP model"),
        (["--weights", "best"], {}, "is not one of ema, master"),
        (["STAGE1"], {}, "evaluate them separately"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    small_demo: Demo, options: list[str], settings: dict[str, object], message: str
):
    folder = small_demo.folder
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "bad.jsonl").write_text("a red circle\n")
    (folder / "other.json").write_text("[]")
    options = [str(small_demo.runs("train")[0]) if word == "STAGE1" else word for word in options]
    before = sorted((small_demo.home / "runs").iterdir())
    done = small_demo.command("evaluate", str(small_demo.runs("train")[-1]), *options, *words(**settings))
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted((small_demo.home / "runs").iterdir()) == before
    shutil.rmtree(folder / "empty")
