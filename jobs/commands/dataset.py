"""The commands that make and judge a dataset: init, caption, latents, audit, verify."""

import argparse
from typing import Any

from jobs.commands.shard_ranges import parse_array
from jobs.state import audit_files, ledger
from jobs.state import run as runs
from jobs.state.run import Run
from jobs.submission.datasets import use_dataset
from jobs.submission.launch import Launch, NothingSubmitted
from jobs.submission.submit import describe_submission, run_array, run_ranks
from jobs.submission.wait import waited
from jobs.tasks import audit
from pixart.config.dataset import is_url
from pixart.config.recipe import to_json
from slurm.executor import Cluster


def init_command(launch: Launch, options: argparse.Namespace) -> str:
    if launch.dry_run:
        raise NothingSubmitted(to_json(launch.recipe))
    manifest = use_own_dataset(launch, options)
    data = manifest["data"]
    return (
        f"dataset {launch.dataset}: {manifest['images']} images of {data['source']} in {data['num_shards']} shards of "
        f"{manifest['rows_per_shard']}, {data['image_size']} px, hash {manifest['hash']}\n"
        f"next: python -m jobs.launch caption --dataset {launch.dataset}"
    )


def array_command(launch: Launch, options: argparse.Namespace) -> str:
    asked, limit = parse_array(options.array) if options.array is not None else (None, None)
    job = options.job
    manifest = use_own_dataset(launch, options, asked)
    shards = check_shards(launch, manifest["data"]["num_shards"], asked)
    if job == "latents":
        ledger.captions(launch.dataset, shards)
    run = run_array(launch, job, shards, limit)
    if not launch.wait:
        return describe_submission(run)
    entries = ledger.entries(launch.dataset, job, shards)
    rows, valid = sum(entry.rows for entry in entries.values()), sum(entry.valid for entry in entries.values())
    place = {"caption": "captions", "latents": ledger.ARRAYS}[job]
    following = {"caption": "latents", "latents": "audit"}[job]
    return (
        f"{job}: {len(shards)} shards, {valid} of {rows} images valid, in {launch.dataset}/{place}\n"
        f"next: python -m jobs.launch {following} --dataset {launch.dataset}"
    )


def use_own_dataset(launch: Launch, options: argparse.Namespace, asked: list[int] | None = None) -> dict[str, Any]:
    """The manifest of a dataset that may be written to; `init` and `caption` make it.

    Raises ValueError for one behind a URL, or that is not there or would not have the shards of `asked`.
    """
    if is_url(launch.dataset):
        raise ValueError(
            f"{options.job} of {launch.dataset}: a dataset is made on a file system, and copied from there"
        )
    if ledger.manifest(launch.dataset) is None and not launch.dry_run:
        if options.job not in ("init", "caption"):
            raise ValueError(f"dataset {launch.dataset}: there is none; caption makes it")
        check_shards(launch, launch.recipe.data.num_shards, asked)
    return use_dataset(launch, options.overrides)


def check_shards(launch: Launch, shards: int, asked: list[int] | None) -> list[int]:
    if asked is None:
        return list(range(shards))
    if asked[-1] >= shards:
        raise ValueError(
            f"--array: shard {asked[-1]} is not there, the dataset {launch.dataset} has shards 0 to {shards - 1}"
        )
    return asked


def audit_command(launch: Launch, options: argparse.Namespace) -> str:
    manifest = use_own_dataset(launch, options)
    ledger.captions(launch.dataset, check_shards(launch, manifest["data"]["num_shards"], None))
    run = submit_single(launch, "audit")
    if not launch.wait:
        return describe_submission(run)
    return f"audited: {launch.dataset}/{audit_files.FOLDER}/{audit_files.PAGE}\n" + (
        f"next: python -m jobs.launch train --stage 1 --dataset {launch.dataset}"
    )


def verify_command(launch: Launch, options: argparse.Namespace) -> str:
    use_own_dataset(launch, options)
    run = submit_single(launch, "verify")
    if not launch.wait:
        return describe_submission(run)
    altered = {job: shards for job, shards in runs.result(run).items() if shards}
    if not altered:
        return f"verified: {launch.dataset} is what its ledger says"
    what = "; ".join(f"{job} {len(shards)} shards, such as {shards[0]}" for job, shards in altered.items())
    return (
        f"altered: {what}; they no longer count as done\n"
        f"next: python -m jobs.launch {next(iter(altered))} --dataset {launch.dataset}"
    )


def submit_single(launch: Launch, kind: str, after: list[str] | None = None) -> Run:
    """One process that reads the whole dataset."""
    return run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape(kind, 1, 1),
        {},
        parameters={"dataset": launch.dataset},
        tags={},
        total=1,
        after=after or [],
    )


def prepare_dataset(launch: Launch, manifest: dict[str, Any], *, any_source: bool = False) -> list[str]:
    """Runs what is missing of the two data jobs, so that training on the embedded default needs no step before it.

    Returns the jobs to wait for.
    """
    shards = check_shards(launch, manifest["data"]["num_shards"], None)
    after: list[str] = []
    for job in ("caption", "latents"):
        there = ledger.current(launch.dataset, job, shards, manifest["hash"]) if "hash" in manifest else set()
        missing = [shard for shard in shards if shard not in there]
        if missing and not any_source and launch.recipe.data.source != "demo":
            raise ValueError(
                f"dataset {launch.dataset} is not whole: {job} lacks {len(missing)} of {len(shards)} shards"
            )
        if missing:
            print(f"{job} first: {len(missing)} of {len(shards)} shards of the dataset are not there yet", flush=True)
        if missing and not launch.dry_run:
            after = waited(launch, run_array(launch, job, missing, None, after))
    return after


def require_audit(launch: Launch, after: list[str], *, any_source: bool = False) -> list[str]:
    """Audits what was made just now, or of the demo; else raises ValueError unless the dataset has passed.

    Returns the jobs to wait for.
    """
    if launch.dry_run:
        return after
    if not after:
        try:
            audit.require(launch.dataset)
            return []
        except ValueError:
            if not any_source and launch.recipe.data.source != "demo":
                raise
    print("audit first: the dataset as it is has not been audited yet", flush=True)
    return waited(launch, submit_single(launch, "audit", after))
