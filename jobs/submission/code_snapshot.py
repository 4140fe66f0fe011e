"""Copy of the code that queued jobs run from, and the state of the git checkout."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("jobs", "pixart", "conversion", "slurm")


def copy_code(target: Path) -> None:
    """Copy the suite's packages, so that editing the checkout does not change a queued job."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))


def git(*words: str) -> str | None:
    """Return the output of a git command in the checkout; None without git or outside of a repository."""
    try:
        process = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return process.stdout if process.returncode == 0 else None


def record_git(folder: Path) -> str | None:
    """Write git.txt with the commit and the uncommitted changes, and return the commit."""
    commit = git("rev-parse", "HEAD")
    if commit is not None:
        (folder / "git.txt").write_text(f"commit {commit}\n{git('status', '--short')}\n{git('diff', 'HEAD')}")
    return commit and commit.strip()
