"""Print the path of a run's page, and show it in a browser.

The page is updated first, unless the run is read-only. The browser opens only if there is a display.
"""

import os
import webbrowser
from dataclasses import dataclass

from jobs.commands.options import Command, RunOptions, option
from jobs.reports import run_pages
from jobs.state import run as runs
from jobs.tracking.sync import update_folder


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """The options of `open`."""

    print_only: bool = option(
        "--print", default=False, help="Print the path and open no browser (default: open one if there is a display)."
    )


def run(options: Options) -> int:
    opened = runs.find(runs.home(options.home), options.run)
    if opened.writable:
        update_folder(opened, pages=True)
    path = run_pages.main_page(opened)
    print(path)
    if not options.print_only and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(path.as_uri())
    return 0


COMMAND = Command(Options, run)
