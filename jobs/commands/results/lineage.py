"""Show what a run, an image, a checkpoint or a dataset was made from.

Follows the records from a sampled PNG to its checkpoint, the training runs, the conversion, the dataset and its models.
"""

from dataclasses import dataclass
from pathlib import Path

from jobs.commands.options import Command, CommonOptions, argument, option
from jobs.reports import lineage, lineage_page
from jobs.state import run as runs
from pixart.atomic import write_atomically


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The options of `lineage`."""

    subject: str | None = argument("SUBJECT", help="Run, PNG, checkpoint or dataset (default: the newest run).")
    html: str | None = option(
        "--html", metavar="FILE", help="Write the lineage as an HTML page to this file too (default: print it only)."
    )


def run(options: Options) -> int:
    node = lineage.trace(runs.home(options.home), options.subject)
    page = check_page(options.html) if options.html else None
    if page:
        write_atomically(page, lineage_page.page(node, page.parent))
    lineage.show(node)
    if page:
        print(f"page: {page}")
    return 0


def check_page(name: str) -> Path:
    """Return the path of the HTML page. Raises ValueError if it cannot be written, or is another kind of file."""
    page = Path(name).absolute()
    if not page.parent.is_dir() or page.is_dir():
        raise ValueError(f"--html {name}: cannot be a file; name a file in an existing folder")
    if page.exists() and page.suffix != ".html":
        raise ValueError(f"--html {name}: the file exists and is not an HTML page; name another file")
    return page


COMMAND = Command(Options, run)
