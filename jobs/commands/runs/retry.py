"""Submit the failed elements of a run again.

Elements that are done or active are not submitted. The recipe is that of the run; so is the cluster profile, unless
--cluster is given.
"""

from dataclasses import dataclass

from jobs.commands.launching import launching, load_profile, read_run_recipe
from jobs.commands.options import Command, RunOptions, SubmissionOptions
from jobs.state import run as runs
from jobs.state.run import Run
from jobs.state.run_metadata import read_profile
from jobs.submission.launch import Launch
from jobs.submission.submit import resubmit


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, SubmissionOptions):
    """The options of `retry`."""


def run(options: Options) -> int:
    home = runs.home(options.home)
    failed = runs.find(home, options.run)
    profile = load_profile(options) if options.cluster else read_profile(failed.folder)
    with launching("retry", options, home, read_run_recipe(failed.folder), profile=profile) as launch:
        print(retry(launch, failed))
    return 0


def retry(launch: Launch, failed: Run) -> str:
    """Submit what has failed, and describe it."""
    resubmitted, elements = resubmit(launch, failed)
    if not elements:
        return f"nothing to do: every element of {failed.folder.name} is done or active"
    subject = f"{len(elements)} of {resubmitted.total} shards" if resubmitted.elements else resubmitted.kind
    if launch.wait:
        return f"{subject} done"
    return f"submitted {subject} again as {resubmitted.jobs[-1][0].partition('_')[0]}"


COMMAND = Command(Options, run)
