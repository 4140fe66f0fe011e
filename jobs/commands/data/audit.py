"""Audit a dataset: report its statistics, and check them against limits.

Writes audit.html and audit.json to the dataset. Training needs a passed audit; the limits are the audit.* keys.
"""

from jobs.commands.data.dataset import DatasetOptions, open_writable_dataset, select_shards, submit_dataset_job
from jobs.commands.hints import describe_submission, next_command
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command
from jobs.state import audit_files, ledger
from jobs.state import run as runs
from jobs.submission.launch import Launch


def run(options: DatasetOptions) -> int:
    home = runs.home(options.home)
    with launching("audit", options, home, read_recipe(home, options), overrides=options.overrides) as launch:
        print(audit(launch, options))
    return 0


def audit(launch: Launch, options: DatasetOptions) -> str:
    """Submit the audit. Raises ValueError if captions are missing."""
    manifest = open_writable_dataset(launch)
    ledger.captions(launch.dataset, select_shards(launch, manifest["data"]["num_shards"]))
    submitted = submit_dataset_job(launch, "audit")
    if not launch.wait:
        return describe_submission(options, submitted)
    stage = 1 if (manifest.get("adopted") or {}).get("form", "labels") == "labels" else 2
    return (
        f"audited: {launch.dataset}/{audit_files.FOLDER}/{audit_files.PAGE}\n"
        f"next: {next_command(options, 'train', '--stage', str(stage))}"
    )


COMMAND = Command(DatasetOptions, run)
