"""Compare every file of a dataset with the checksums in its ledger.

Shards with altered files no longer count as done, so that the next run of their job writes them again.
"""

from jobs.commands.data.dataset import DatasetOptions, open_writable_dataset, submit_dataset_job
from jobs.commands.hints import describe_submission, next_command
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command
from jobs.state import ledger
from jobs.state import run as runs
from jobs.submission.launch import Launch


def run(options: DatasetOptions) -> int:
    home = runs.home(options.home)
    with launching("verify", options, home, read_recipe(home, options), overrides=options.overrides) as launch:
        print(verify(launch, options))
    return 0


def verify(launch: Launch, options: DatasetOptions) -> str:
    """Submit the verification, and describe the altered shards."""
    manifest = open_writable_dataset(launch)
    submitted = submit_dataset_job(launch, "verify")
    if not launch.wait:
        return describe_submission(options, submitted)
    altered = {job: shards for job, shards in runs.result(submitted).items() if shards}
    if not altered:
        return f"verified: every file of {launch.dataset} matches its ledger"
    summary = "; ".join(f"{job} {len(shards)} shards, such as {shards[0]}" for job, shards in altered.items())
    following = ["adopt", manifest["data"]["source"]] if ledger.is_adopted(manifest) else [next(iter(altered))]
    return f"altered: {summary}; they no longer count as done\nnext: {next_command(options, *following)}"


COMMAND = Command(DatasetOptions, run)
