"""Every record of a finished demo damaged in many ways, and the commands that read it."""

import shutil
from pathlib import Path

import pytest

from jobs.state import ledger
from pixart.checkpoint import directory as checkpoints
from pixart.data import manifest as manifests
from pixart.sampling import loading
from tests.attack.campaign import Campaign, campaign
from tests.attack.hostile import damages
from tests.support.demo_fixture import Demo

pytestmark = pytest.mark.slow
WRITTEN_ONLY = ("report.json", "samples.json", "origin.json")  # records that no command reads, but for pages


@pytest.fixture(scope="module")
def copied(small_demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Home folder with a copy of the finished demo, whose records name it."""
    home = tmp_path_factory.mktemp("copied") / "outputs"
    shutil.copytree(small_demo.home, home)
    for file in (*home.glob("runs/**/*.json"), *home.glob("submissions/**/*.json")):
        text = file.read_text()
        if "sha256" not in text:
            file.write_text(text.replace(str(small_demo.home), str(home)))
    return home


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIXART_CLUSTER", "local")
    monkeypatch.chdir(tmp_path)


def commands_of(file: Path, home: Path) -> list[list[str]]:
    """Return the commands that read a record of a home folder; none of them submits a job."""
    place = file.relative_to(home).parts[0]
    common = ["--home", str(home)]
    if place == "datasets":
        words = [["train"], ["latents"], ["lineage", str(home / "datasets/demo")], ["audit"]]
    elif "checkpoints" in file.parts:
        checkpoint = str(next(parent for parent in file.parents if parent.name.startswith("step-")))
        words = [["train", "--from", checkpoint], ["sample", checkpoint], ["lineage", checkpoint]]
    elif file.name in ("mlflow.json", "tracking.json"):
        words = [["lineage", str(file.parent)], ["runs"]] if place == "runs" else [["runs"]]
    else:
        words = [["status", str(file.parent)], ["lineage", str(file.parent)], ["runs"], ["logs", str(file.parent)]]
        words += [["train", "--resume", str(file.parent)]] if "-train-" in file.parent.name else []
        words += [["retry", str(file.parent)]]
    dry = ("train", "latents", "audit", "sample", "retry")
    return [[*line, *common, *(["--dry-run"] if line[0] in dry else [])] for line in words]


def readers_of(file: Path, home: Path):
    """Return the functions of tasks that read a record, and what they may return for a damaged one."""
    if file.name == "manifest.json":
        return [lambda: manifests.read(file.parent), lambda: ledger.require_complete(str(file.parent))]
    if file.name == "training.json":
        return [lambda: checkpoints.load_without_tensors(file.parent)]
    if file.name == "inference.json":
        return [lambda: loading.read_inference_record(file.parent)]
    if "ledger" in file.parts:
        return [lambda: ledger.captions(str(home / "datasets/demo"), [0, 1, 2, 3])]
    return []


def test_no_damaged_record_is_a_traceback(copied, record_property):
    """A damaged record is one line that names it, or, where the altered value is allowed, is used as it says."""
    attack = campaign("records", short=700, long=9000)
    files = [path for path in sorted(copied.rglob("*.json")) if is_record(path)]
    per_file = max(1, attack.tries // len(files) // 4)
    for file in files:
        content = file.read_bytes()
        try:
            for name, damage in damages(content, attack.generator)[:per_file]:
                file.write_bytes(damage())
                use(attack, file, copied, f"{file.relative_to(copied)}: {name}")
        finally:
            file.write_bytes(content)
    attack.finish(record_property)


def is_record(path: Path) -> bool:
    return path.name not in ("zarr.json", *WRITTEN_ONLY) and "mlartifacts" not in path.parts


def use(attack: Campaign, file: Path, home: Path, name: str) -> None:
    """Run what reads a record."""
    for words in commands_of(file, home):
        code, text = attack.command(name, words)
        if code == 2 and file.name not in text and "ledger" not in file.parts and str(file.parent) not in text:
            attack.wrong(name, f"{words[0]}: the error does not name the file: {text[-200:]!r}")
    for read in readers_of(file, home):
        attack.attempt(name, read)
