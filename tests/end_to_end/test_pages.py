"""Pages in a real browser: those of the suite and MLflow's user interface, in light and dark mode."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import launch
from jobs.state.journal import Journal
from jobs.tracking.mlflow_store import run_id
from tests.support.accessibility import LARGE, check_accessible, check_narrow
from tests.support.browser_fixture import SCREENSHOTS
from tests.support.demo_fixture import STEPS, Demo
from tests.support.mlflow_fixture import MlflowServer

pytestmark = pytest.mark.slow
SCHEMES = ("light", "dark")
# Errors of MLflow 3.17's page: it requests a user although there are no accounts, and observes sizes.
MLFLOW_ERRORS = ("mlflow/users/current", "ResizeObserver")


@pytest.fixture(scope="module")
def demo(small_demo: Demo) -> Demo:
    """Demo with a release, and with an incident in its second training run as a longer run may have."""
    run = small_demo.runs("train")[-1]
    Journal(run).incident(7, "step left out: the gradient was not finite")
    assert small_demo.command("sync").returncode == 0
    done = small_demo.command("release", str(run))
    assert done.returncode == 0, done.stderr
    return small_demo


@pytest.fixture(scope="module")
def mlflow_page(demo: Demo, tmp_path_factory):
    """URL of an MLflow server on the store of the demo."""
    server = MlflowServer(tmp_path_factory.mktemp("page"), f"sqlite:///{demo.home}/mlflow.db")
    server.start()
    yield server.uri
    server.stop()


def opened(demo: Demo, kind: str) -> Path:
    """Return the path of the page that `open` prints for the newest run of a kind."""
    done = demo.command("open", "--print", demo.runs(kind)[-1].name)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def check_drawings(page) -> None:
    """Assert that every drawing has a size and labels, and that every image is loaded."""
    for drawing in page.query_selector_all("figure svg[role=img]"):
        box = drawing.bounding_box()
        assert box
        assert box["width"] > 300
        assert box["height"] > 100
        assert drawing.query_selector_all("text")
    for picture in page.query_selector_all("img"):
        assert picture.evaluate("picture => picture.complete && picture.naturalWidth > 0")


def wide(page) -> bool:
    """Return whether the page itself scrolls horizontally."""
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["train", "convert", "audit", "sample"])
def test_page_by_kind_of_run(demo, open_page, kind, scheme):
    path = opened(demo, kind)
    with open_page(path.as_uri(), scheme, f"page-{kind}") as page:
        check_drawings(page)
        assert not wide(page)
        check_accessible(page)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
        check_narrow(page)
        page.screenshot(path=SCREENSHOTS / f"page-{kind}-{scheme}-400.png", full_page=True)
        page.set_viewport_size(LARGE)


def test_training_page_summarizes_the_run(demo, open_page):
    with open_page(opened(demo, "train").as_uri(), "light", "training") as page:
        words = page.inner_text("body")
        assert f"{STEPS} of {STEPS}" in words
        assert "step left out: the gradient was not finite" in words
        for heading in (
            "Loss",
            "Gradient norm",
            "Learning rate",
            "Throughput",
            "Previews",
            "Incidents",
            "FP8 headroom",
        ):
            assert page.query_selector(f"h2:text-is('{heading}')"), heading
        assert len(page.query_selector_all(".previews img")) == STEPS // 4
        assert page.query_selector_all("path.event title")
        assert page.query_selector("h2:text-is('FP8 headroom') + figure g.series path.dot")  # logged once
        losses = page.query_selector("h2:text-is('Loss') + figure")
        assert len(losses.query_selector_all("g.series path.curve, g.series path.faint")) >= STEPS
        assert "optimizer step" in losses.inner_text()


def test_training_runs_on_one_chart(demo, open_page):
    stages = [run.name for run in demo.runs("train")]
    done = demo.command("open", "--print", *stages)
    assert done.returncode == 0, done.stderr
    with open_page(Path(done.stdout.strip()).as_uri(), "dark", "comparison") as page:
        assert len(page.query_selector_all("h2:text-is('train/loss') + figure g.series")) == len(stages)
        assert "stage" in page.inner_text("h2:text-is('Settings that differ') + *")
        check_drawings(page)
        assert not wide(page)
        check_accessible(page)
        check_narrow(page)
        page.set_viewport_size(LARGE)
    for words, message in (
        ([stages[0], demo.runs("audit")[-1].name], "only training runs are compared"),
        ([stages[0], stages[0]], "names a run twice"),
        ([*stages, "--port", "8000"], "only the page of a dataset is served"),
    ):
        refused = demo.command("open", "--print", *words)
        assert (refused.returncode, message in refused.stderr) == (2, True)


def test_lineage_of_a_copied_png(demo, open_page, tmp_path):
    """A copy of the PNG suffices, and every link of the page leads to an existing file."""
    picture = next(iter(sorted((demo.runs("sample")[-1] / "samples").glob("*.png"))))
    shutil.copy(picture, tmp_path / "picture.png")
    done = demo.command("lineage", str(tmp_path / "picture.png"), "--html", str(tmp_path / "lineage.html"))
    assert done.returncode == 0, done.stderr
    prompt = json.loads((demo.runs("sample")[-1] / "samples.json").read_text())["pictures"][0]["prompt"]
    stage1, stage2 = demo.runs("train")
    printed = done.stdout
    for name in (prompt, stage1, stage2, f"{stage1}/checkpoints/step-{STEPS:08d}.fp8", demo.runs("sample")[-1]):
        assert str(name) in printed, name
    for name in (f"{stage2}/checkpoints/step-{STEPS:08d}", demo.home / "datasets/demo", "captioner", "labels"):
        assert str(name) in printed, name
    for kind in ("convert", "caption", "latents", "audit"):
        assert demo.runs(kind)[-1].name in printed, kind
    with open_page((tmp_path / "lineage.html").as_uri(), "light", "lineage") as page:
        links = [link.get_attribute("href") for link in page.query_selector_all("svg a")]
        assert len(links) >= 4
        for link in links:
            assert (tmp_path / link).resolve().is_file(), link
        page.click("svg a:has-text('report')")
        assert "Conversion to FP8" in page.inner_text("h1")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_mlflow_shows_runs_curves_images_and_pages(demo, open_page, mlflow_page, scheme):
    run = run_id(demo.runs("train")[-1])
    at = f"{mlflow_page}/#/experiments/1"
    with open_page(f"{at}/runs", scheme, "mlflow-runs", expected_errors=MLFLOW_ERRORS) as page:
        page.wait_for_selector("text=8 matching runs")
        page.wait_for_selector("a:has-text('demo-')")
    with open_page(f"{at}/runs/{run}/model-metrics", scheme, "mlflow-metrics", expected_errors=MLFLOW_ERRORS) as page:
        page.set_viewport_size({"width": 1280, "height": 5000})  # charts outside the viewport are not drawn
        for name in ("loss", "grad_norm", "lr", "images_per_second"):
            page.wait_for_selector(f"text={name}")
        page.wait_for_selector(".js-plotly-plot path.js-line", state="attached")
        page.wait_for_selector("text=preview")
        page.focus("[role=slider]")
        page.keyboard.press("ArrowRight")  # moves the slider to the first image
        picture = page.wait_for_selector("img[src*='preview%2Bstep%2B4%2B']")
        page.wait_for_function("picture => picture.complete && picture.naturalWidth > 0", arg=picture)
    with open_page(f"{at}/runs/{run}/system-metrics", scheme, "mlflow-system", expected_errors=MLFLOW_ERRORS) as page:
        page.wait_for_selector("text=cpu_utilization_percentage")
    with open_page(
        f"{at}/runs/{run}/artifacts/summary.html", scheme, "mlflow-page", expected_errors=MLFLOW_ERRORS
    ) as page:
        frame = page.wait_for_selector("iframe").content_frame()
        frame.wait_for_selector("h2:text-is('Gradient norm')")
    with open_page(f"{mlflow_page}/#/models/pixart", scheme, "mlflow-model", expected_errors=MLFLOW_ERRORS) as page:
        page.wait_for_selector("text=Version 1", state="attached")


def test_mlflow_has_previews_by_step_and_the_released_weights(demo):
    import mlflow
    import torch
    from mlflow.tracking import MlflowClient

    from pixart.checkpoint import directory as checkpoints
    from pixart.model.dit import DiT

    store = f"sqlite:///{demo.home}/mlflow.db"
    client, run = MlflowClient(store), run_id(demo.runs("train")[-1])
    pictures = [file.path for file in client.list_artifacts(run, "images")]
    assert sorted(int(path.split("+")[2]) for path in pictures if path.endswith(".png")) == [4, 8, STEPS]
    (version,) = client.search_model_versions("name = 'pixart'")
    model = mlflow.models.Model.load(
        mlflow.artifacts.download_artifacts(f"{version.source}/MLmodel", tracking_uri=store)
    )
    assert [one.name for one in model.get_input_schema().inputs] == ["latents", "timestep", "text_states", "text_mask"]
    assert version.description.startswith(f"EMA weights of stage 2 at step {STEPS}: train/loss ")
    released = DiT.from_pretrained(mlflow.artifacts.download_artifacts(version.source, tracking_uri=store)).state_dict()
    average = checkpoints.load(demo.runs("train")[-1] / f"checkpoints/step-{STEPS:08d}").ema
    assert released.keys() == average.keys()
    assert all(torch.equal(released[name], average[name]) for name in average)
    assert version.run_id == run
    assert version.tags["stage"] == "2"
    assert version.tags["acceptance"] in ("PASS", "FAIL")
    assert client.get_model_version_by_alias("pixart", "newest").version == version.version
    again = demo.command("release", str(demo.runs("train")[-1]))
    assert again.returncode == 0
    assert len(client.search_model_versions("name = 'pixart'")) == 1


def test_a_checkpoint_with_other_bytes_is_not_released(demo, tmp_path, capsys):
    run = shutil.copytree(demo.runs("train")[-1], tmp_path / "runs/20260101-000000-train-abcd")
    *_, weights = sorted(run.glob("checkpoints/step-*/state/*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    assert launch.main(["release", str(run), "--home", str(tmp_path)]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f"{weights.name}: missing, damaged or truncated; use another checkpoint")
