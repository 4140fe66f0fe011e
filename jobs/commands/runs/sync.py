"""Send the journals of runs to MLflow.

If the nodes of a cluster cannot reach the MLflow server, run this command on a machine that can. Without RUN, all runs
with unsent data are sent.
"""

from dataclasses import dataclass

from jobs.commands.options import Command, CommonOptions, argument, check_report, option
from jobs.state import run as runs
from jobs.tracking import wandb_export
from jobs.tracking.mlflow_store import Tracker, needs_sync
from jobs.tracking.sync import set_final_status, sync_folder


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The options of `sync`."""

    run: str | None = argument("RUN", help="Folder, name or part of the name of a run (default: every run).")
    report: str | None = option(
        "--report",
        metavar="NAME",
        help="Tracker beside MLflow to send the runs to: wandb, as an offline run in RUN/wandb, which `wandb sync` "
        "uploads (default: MLflow alone).",
    )


def run(options: Options) -> int:
    check_report(options.report)
    home = runs.home(options.home)
    folders = [runs.find(home, options.run).folder] if options.run else runs.folders(home)
    if not folders:
        raise ValueError(f"--home {home}: has no runs; run a job such as 'caption' first")
    tracker, sent = Tracker(home), 0
    for folder in folders:
        loaded = runs.load(folder)
        set_final_status(loaded, runs.elements(loaded))
        if options.run or needs_sync(folder):
            sync_folder(tracker, folder)
            sent += 1
        if options.report and (exported := wandb_export.export(folder)):
            print(f"exported: {exported}")
    print(f"synchronized {sent} of {len(folders)} runs with {tracker.uri}; the others were up to date")
    return 0


COMMAND = Command(Options, run)
