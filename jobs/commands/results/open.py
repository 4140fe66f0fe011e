"""Show the page of a run, compare training runs, or browse the captions of a dataset.

The path of the page is printed. A run's page is updated first, unless the run is read-only. The page of several runs
compares their results, settings and curves, and is written to `comparisons` in the home folder. The page of a dataset
is at an address of this machine alone until an interrupt; with --print, its audit is printed. The browser opens only if
there is a display.
"""

import os
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.commands.options import Command, CommonOptions, argument, nonempty, option, positive
from jobs.reports import run_pages
from jobs.state import audit_files, ledger
from jobs.state import run as runs
from jobs.tracking.sync import update_folder
from pixart.atomic import write_atomically

COMPARISONS = "comparisons"  # in the home folder
MAX_NAME = 200  # characters of a page's name, which file systems limit


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The options of `open`."""

    runs: tuple[str, ...] = argument(
        "RUN",
        convert=nonempty,
        help="Folder, name or part of the name of a run, several training runs, or the folder of a dataset "
        "(default: the newest run).",
    )
    port: int | None = option(
        "--port", metavar="PORT", convert=positive, help="Port of a dataset's page (default: a free one)."
    )

    print_only: bool = option(
        "--print", default=False, help="Print the path and open no browser (default: open one if there is a display)."
    )


def run(options: Options) -> int:
    first = options.runs[0] if options.runs else None
    if len(options.runs) < 2 and first and (Path(first) / ledger.MANIFEST).is_file():
        return show_dataset(Path(first).absolute(), options)
    if options.port:
        raise ValueError(f"--port {options.port}: only the page of a dataset is served; leave it out")
    home = runs.home(options.home)
    if len(options.runs) > 1:
        path = compare(home, [runs.find(home, name) for name in options.runs])
    else:
        opened = runs.find(home, first)
        if opened.writable:
            update_folder(opened, pages=True)
        path = run_pages.main_page(opened)
    print(path)
    show(path.as_uri(), options)
    return 0


def compare(home: Path, compared: list[runs.Run]) -> Path:
    """Write the page that compares training runs, and return its path."""
    names = list(dict.fromkeys(run.folder.name for run in compared))
    if len(names) < len(compared):
        raise ValueError(f"open {' '.join(names)}: names a run twice; give different runs")
    path = (home / COMPARISONS / f"{'--'.join(names)[:MAX_NAME]}.html").absolute()
    content = run_pages.comparison_page(compared)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, content)
    return path


def show_dataset(dataset: Path, options: Options) -> int:
    """Serve the page of a dataset until an interrupt, or print the path of its audit."""
    if options.print_only:
        print(dataset / audit_files.FOLDER / audit_files.PAGE)
        return 0
    try:
        from jobs.reports.browser import app
    except ModuleNotFoundError as error:
        raise ValueError(f"open {dataset}: needs {error.name}; install the extra 'browse'") from None

    def opened(url: str) -> None:
        print(f"browsing: {url}  (until Ctrl+C)", flush=True)
        show(url, options)

    with suppress(KeyboardInterrupt):
        app.serve(str(dataset), options.port or 0, opened)
    return 0


def show(url: str, options: Options) -> None:
    """Open a page in the browser, if there is a display."""
    if not options.print_only and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(url)


COMMAND = Command(Options, run)
