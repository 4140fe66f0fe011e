"""The command that rewrites users' requests: recaption."""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from jobs import ledger, runs
from jobs.submission import Launch, NothingSubmitted, run_ranks
from slurm.cluster import Cluster

SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPARED = 10_000  # captions of a dataset that are compared with


def recaption_command(launch: Launch, options: argparse.Namespace) -> str:
    """By a server that runs already, from this process; else by an engine of its own, as a job."""
    requests = read_requests(options)
    output = Path(options.output) if options.output else None
    if output and output.suffix not in SUFFIXES:
        raise ValueError(f"--output {output}: must end in {', '.join(SUFFIXES)}")
    captions = dataset_captions(options.compare) if options.compare else []
    if launch.dry_run and options.server:
        raise NothingSubmitted(f"{len(requests)} requests to {options.server}")
    if options.server:
        from pixart.data.recaption import rewrite, server

        found = [asdict(each) for each in rewrite(requests, server(options.server.rstrip("/"), options.model))]
    else:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the answers
            found = rewritten_by_job(launch, requests, options.model or launch.recipe.data.caption_model)
    for each in found:
        if each["problem"]:
            print(f"left as it is ({each['problem']}): {each['request']}", file=sys.stderr)
    if captions:
        from pixart.data.caption_style import compare, report

        print(report(compare(captions, [each["text"] for each in found])), file=sys.stderr)
    if output is None:
        return "\n".join(each["text"] for each in found)
    ledger.write_atomically(output, encoded(found, output.suffix))
    return f"rewritten: {output}"


def rewritten_by_job(launch: Launch, requests: list[str], model: str) -> list[dict[str, str]]:
    """In the Python that the profile has for captions, where it names none for recaption."""
    pythons, kind = launch.profile.python, "recaption"
    if "caption" in pythons:
        launch.profile = replace(launch.profile, python={kind: pythons["caption"], **pythons})
    job = run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape(kind, 1, 1),
        {"requests": requests, "model": model},
        parameters={"model": model, "requests": len(requests)},
        tags={},
        total=1,
    )
    return runs.result(job)


def encoded(found: list[dict[str, str]], suffix: str) -> str | bytes:
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(found), sink)
        return sink.getvalue().to_pybytes()
    return "".join((json.dumps(each) if suffix == ".jsonl" else each["text"]) + "\n" for each in found)


def read_requests(options: argparse.Namespace) -> list[str]:
    requests = list(options.requests)
    if options.file:
        try:
            requests += Path(options.file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--file {options.file}: {getattr(error, 'strerror', None) or error}") from None
    requests = [" ".join(request.split()) for request in requests if request.strip()]
    if not requests:
        raise ValueError("recaption needs a request, or a --file of them, one a line")
    return requests


def dataset_captions(dataset: str) -> list[str]:
    """Captions of the valid rows, of the parts that are there."""
    import pyarrow.parquet as pq

    found: list[str] = []
    for shard in sorted(ledger.shards(dataset, "caption")):
        table = pq.read_table(Path(dataset) / "captions" / f"{shard:05d}.parquet", columns=["caption", "valid"])
        found += [row["caption"] for row in table.to_pylist() if row["valid"]]
        if len(found) >= COMPARED:
            break
    if not found:
        raise ValueError(f"--compare {dataset}: has no captions")
    return found[:COMPARED]
