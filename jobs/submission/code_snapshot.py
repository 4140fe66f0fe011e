"""The code of a submission: a copy that queued jobs run from, and what git says of the checkout."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("jobs", "pixart", "conversion", "slurm")


def copy_code(target: Path) -> None:
    """Copies the suite's packages, so that editing the checkout does not change a job that waits."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))


def git(*words: str) -> str | None:
    """Output of a git command in the suite's checkout; None where it is none, or has no git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def record_git(folder: Path) -> str | None:
    """Writes git.txt, the commit and what differs from it, and returns the commit."""
    commit = git("rev-parse", "HEAD")
    if commit is not None:
        (folder / "git.txt").write_text(f"commit {commit}\n{git('status', '--short')}\n{git('diff', 'HEAD')}")
    return commit and commit.strip()
