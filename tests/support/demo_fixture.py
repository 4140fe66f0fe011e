"""The complete demo with too few steps to learn anything, run once for several kinds of tests."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.environment import bare_environment

STEPS = 12
SETTINGS = ["data.max_images=64", "data.num_shards=4", "sample.count=4", "sample.steps=2"]
SETTINGS += [
    f"stage{stage}.{value}"
    for stage in (1, 2)
    for value in ("global_batch_size=8", "warmup_steps=2", "log_every=1", "preview_every=4")
]
SETTINGS += [f"stage{stage}.{value}" for stage in (1, 2) for value in ("num_validation_samples=6", "validate_every=4")]
SETTINGS += [f"stage{stage}.steps={STEPS}" for stage in (1, 2)]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A finished demo: the working directory and the output of its command."""

    folder: Path  # working directory of the command
    output: str

    @property
    def home(self) -> Path:
        return self.folder / "outputs"

    @property
    def sheet(self) -> Path:
        return Path(next(line for line in self.output.splitlines() if line.startswith("sampled: ")).split()[1])

    def runs(self, kind: str) -> list[Path]:
        """Return the run folders of one kind, oldest first."""
        return sorted(self.home.glob(f"runs/*-{kind}-*"))

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a launcher command in the working directory of the demo."""
        return launch(self.folder, *words)


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.launch", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=bare_environment())


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Finished demo of 64 images and 12 steps per stage."""
    folder = tmp_path_factory.mktemp("demo")
    done = launch(folder, "demo", *(word for value in SETTINGS for word in ("--set", value)))
    assert done.returncode == 0, done.stdout + done.stderr
    return Demo(folder=folder, output=done.stdout)
