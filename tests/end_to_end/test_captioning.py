"""Captioning jobs with a real vLLM engine, undisturbed and killed at random moments; no source item is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.state import ledger
from jobs.tasks import caption
from tests.attack.campaign import is_long
from tests.support.environment import bare_environment
from tests.support.vllm_fixture import PYTHON, VARIABLES, needs_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.slow, needs_vllm]
SHARDS = 8
KILLS = 20 if is_long() else 8
DAMAGED = {"truncated": 3, "unreadable": 3, "plain": 2}
MARK = "PIXART_TEST_MARK"  # environment variable that identifies the processes of a launch


@pytest.fixture(scope="module")
def source(shared_data, tmp_path_factory) -> Path:
    """Folder of the photos, with truncated, unreadable and solid-color files added."""
    folder = tmp_path_factory.mktemp("source")
    for path in shared_data.glob("photos/*/*.jpg"):
        (folder / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, folder / path.parent.name / path.name)
    classes = sorted(path for path in folder.iterdir())
    photos = sorted(folder.glob("*/*.jpg"))
    for index in range(DAMAGED["truncated"]):
        content = photos[10 * index].read_bytes()
        (classes[9 * index] / "truncated.jpg").write_bytes(content[: len(content) // 2])
    for index in range(DAMAGED["unreadable"]):
        (classes[20 + index] / "unreadable.jpg").write_bytes(random.Random(index).randbytes(3000))
    from PIL import Image

    for index in range(DAMAGED["plain"]):
        Image.new("RGB", (200, 150), (30, 80 * index, 90)).save(classes[40 + index] / "plain.jpg")
    return folder


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    """Cluster profile that runs the caption job in the Python environment of vLLM."""
    file = tmp_path_factory.mktemp("profile") / "vllm.toml"
    file.write_text(f"""
executor = "local"
array_parallelism = 1
[python]
caption = "{PYTHON}"
[environment]
{chr(10).join(f'{name} = "{value}"' for name, value in VARIABLES.items())}
""")
    return file


class Captioning:
    """A dataset that is captioned by one or more launches, of which each may be killed."""

    def __init__(self, home: Path, source: Path, model: Path, profile: Path) -> None:
        self.home, self.dataset, self.mark = home, home / "data", uuid.uuid4().hex
        self.temporary = home / "tmp"
        settings = {
            "data.path": self.dataset,
            "data.source": source,
            "data.max_images": "none",
            "data.num_shards": SHARDS,
            "data.captioner": "vllm",
            "data.caption_model": model,
        }
        self.words = [sys.executable, "-m", "jobs.launch", "caption", "--array", f"0-{SHARDS - 1}", "--home", str(home)]
        self.words += ["--cluster", str(profile)]
        self.words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]

    def start(self) -> subprocess.Popen[str]:
        """Start the command that captions all shards; it skips those that are complete."""
        self.temporary.mkdir(exist_ok=True)
        environment = {**bare_environment(), MARK: self.mark, "TMPDIR": str(self.temporary)}
        return subprocess.Popen(
            self.words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=self.home
        )

    def kill(self) -> int:
        """Send SIGKILL to every process of the launch, including the engine, and return their number."""
        killed = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                belongs = f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if belongs:
                os.kill(int(folder.name), signal.SIGKILL)
                killed += 1
        return killed

    def rows(self) -> list[dict]:
        """Return the rows of all shards without their durations."""
        parts = [pq.read_table(caption.part_path(self.dataset, shard)).drop(["seconds"]) for shard in range(SHARDS)]
        return [row for part in parts for row in part.to_pylist()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source, tiny_qwen, profile) -> tuple[list[dict], float]:
    """Rows of an uninterrupted launch and its duration in seconds."""
    bench = Captioning(tmp_path_factory.mktemp("undisturbed"), source, tiny_qwen, profile)
    begun = time.monotonic()
    process = bench.start()
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert not list(bench.temporary.iterdir())
    return bench.rows(), time.monotonic() - begun


def test_every_row_is_accounted_for(undisturbed, source):
    rows, _ = undisturbed
    files = sorted(str(path.relative_to(source)) for path in source.glob("*/*.jpg"))
    assert [row["id"] for row in rows] == files
    reasons = [row["reason"] for row in rows if not row["valid"] and not row["reason"].startswith("caption: ")]
    assert {reason: reasons.count(reason) for reason in reasons} == DAMAGED
    for row in rows:
        assert bool(row["reason"]) != row["valid"]
        assert row["caption"] or not row["valid"]
        assert row["model"].endswith("qwen")
        assert len(row["prompt_hash"]) >= 8


def test_killed_at_random_moments(undisturbed, tmp_path, source, tiny_qwen, profile):
    """Each completed dataset equals that of an uninterrupted launch; kills continue with the next dataset."""
    wanted, seconds = undisturbed
    chance, kills, round_ = random.Random(0), 0, 0
    while kills < KILLS or round_ == 0:
        home = tmp_path / f"{round_}"
        home.mkdir()
        bench = Captioning(home, source, tiny_qwen, profile)
        while len(ledger.shards(bench.dataset, "caption")) < SHARDS:
            from_nothing, begun = not ledger.shards(bench.dataset, "caption"), time.monotonic()
            process = bench.start()
            try:
                process.wait(chance.uniform(0.2, 1.05 * seconds) if kills < KILLS else None)
            except subprocess.TimeoutExpired:
                assert bench.kill()
                kills += 1
                process.wait()
            else:
                assert process.returncode == 0, process.communicate()[0]
                if from_nothing:  # on a busy machine, the first launch may have been slow
                    seconds = min(seconds, time.monotonic() - begun)
        assert bench.rows() == wanted
        round_ += 1
        shutil.rmtree(home)
