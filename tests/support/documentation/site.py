"""Build the site of the documentation with MkDocs Material: `python -m tests.support.documentation.site`.

MkDocs reads pages from one folder. The pages of this repository are therefore copied to build/pages in the tree that
they have here, so that links between README, docs and benchmarks are valid both in the repository and in the site.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGES = ROOT / "build" / "pages"
SITE = ROOT / "build" / "site"
TOP_LEVEL = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
FOLDERS = ("docs", "benchmarks")
SUFFIXES = (".md", ".png", ".svg", ".css", ".js")


def copy_pages() -> None:
    """Replace build/pages by the present pages, images and style sheets."""
    shutil.rmtree(PAGES, ignore_errors=True)
    files = [ROOT / name for name in TOP_LEVEL]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in files:
        target = PAGES / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def build() -> subprocess.CompletedProcess[str]:
    """Build the site in build/site. Dead links and pages missing from the navigation are errors."""
    copy_pages()
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--config-file",
        str(ROOT / "mkdocs.yml"),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    process = build()
    print(process.stdout + process.stderr, end="", file=sys.stderr)
    if process.returncode == 0:
        print(f"open {SITE / 'index.html'}")
    sys.exit(process.returncode)
