"""Commands to look at what was made: open, lineage, release."""

import argparse
import os
import webbrowser
from pathlib import Path

from jobs.reports import lineage, lineage_page, run_pages
from jobs.state import run as runs
from jobs.state.ledger import write_atomically
from jobs.tracking.model_registry import release
from jobs.tracking.sync import gather


def open_command(home: Path, options: argparse.Namespace) -> int:
    """Prints where a run's page lies, made anew unless it is somebody else's; with a display a browser shows it too."""
    run = runs.find(home, options.run)
    if run.writable:
        gather(run, pages=True)
    path = run_pages.main_page(run)
    print(path)
    if not options.print and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(path.as_uri())
    return 0


def lineage_command(home: Path, options: argparse.Namespace) -> int:
    node = lineage.trace(home, options.what)
    if options.html:
        target = Path(options.html).absolute()
        if not target.parent.is_dir() or target.is_dir():
            raise ValueError(f"--html {options.html}: no file can be there")
        if target.exists() and target.suffix != ".html":
            raise ValueError(f"--html {options.html}: is there, and is no page")
        write_atomically(target, lineage_page.page(node, target.parent))
    lineage.show(node)
    if options.html:
        print(f"page: {target}")
    return 0


def release_command(home: Path, options: argparse.Namespace) -> int:
    print(release(home, options.checkpoint, options.name))
    return 0


COMMANDS = {"open": open_command, "lineage": lineage_command, "release": release_command}
