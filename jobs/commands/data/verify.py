"""Compare every file of a dataset with the checksums in its ledger.

Shards with altered files no longer count as done, so that the next run of their job writes them again.
"""

import shlex

from jobs.commands.data.dataset import DatasetOptions, is_adopted, open_writable_dataset, submit_dataset_job
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command
from jobs.state import run as runs
from jobs.submission.launch import Launch
from jobs.submission.submit import describe_submission


def run(options: DatasetOptions) -> int:
    home = runs.home(options.home)
    with launching("verify", options, home, read_recipe(home, options), overrides=options.overrides) as launch:
        print(verify(launch))
    return 0


def verify(launch: Launch) -> str:
    """Submit the verification, and describe the altered shards."""
    manifest = open_writable_dataset(launch)
    submitted = submit_dataset_job(launch, "verify")
    if not launch.wait:
        return describe_submission(submitted)
    altered = {job: shards for job, shards in runs.result(submitted).items() if shards}
    if not altered:
        return f"verified: every file of {launch.dataset} matches its ledger"
    summary = "; ".join(f"{job} {len(shards)} shards, such as {shards[0]}" for job, shards in altered.items())
    following = next(iter(altered))
    if is_adopted(manifest):
        following = f"adopt {shlex.quote(manifest['data']['source'])}"
    return (
        f"altered: {summary}; they no longer count as done\n"
        f"next: python -m jobs.launch {following} --dataset {launch.dataset}"
    )


COMMAND = Command(DatasetOptions, run)
