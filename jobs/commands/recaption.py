"""The command that rewrites users' requests: recaption."""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from jobs.state import ledger, run
from jobs.state.prompts import dataset_captions, read_prompts
from jobs.state.run import Run
from jobs.submission.launch import Launch, NothingSubmitted
from jobs.submission.submit import run_ranks
from slurm.executor import Cluster

SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPARED = 10_000  # captions of a dataset that are compared with


def recaption_command(launch: Launch, options: argparse.Namespace) -> str:
    """By a server that runs already, from this process; else by an engine of its own, as a job."""
    requests = read_requests(options)
    output = Path(options.output) if options.output else None
    if output and output.suffix not in SUFFIXES:
        raise ValueError(f"--output {output}: must end in {', '.join(SUFFIXES)}")
    if output and not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}")
    if output and options.file and output.exists() and output.samefile(options.file):
        raise ValueError(f"--output {output}: is the file that --file names")
    captions = dataset_captions(options.compare, COMPARED) if options.compare else []
    if options.compare and not captions:
        raise ValueError(f"--compare {options.compare}: has no captions")
    if launch.dry_run and options.server:
        raise NothingSubmitted(f"{len(requests)} requests to {options.server}")
    if options.server:
        found = rewritten_by_server(requests, options)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the answers
            found = run.result(submit_recaption(launch, requests, options.model))
    tell_problems(found)
    if captions:
        from pixart.data.captions.similarity import compare, report

        print(report(compare(captions, [each["text"] for each in found])), file=sys.stderr)
    if output is None:
        return "\n".join(each["text"] for each in found)
    ledger.write_atomically(output, encoded(found, output.suffix))
    return f"rewritten: {output}"


def rewritten_by_server(requests: list[str], options: argparse.Namespace) -> list[dict[str, str]]:
    from pixart.data.captions.rewriting import rewrite, server_generator

    return [asdict(each) for each in rewrite(requests, server_generator(options.server.rstrip("/"), options.model))]


def submit_recaption(launch: Launch, requests: list[str], model: str | None) -> Run:
    """In the Python that the profile has for captions, where it names none for recaption."""
    pythons, kind = launch.profile.python, "recaption"
    if "caption" in pythons:
        launch.profile = replace(launch.profile, python={kind: pythons["caption"], **pythons})
    model = model or launch.recipe.data.caption_model
    return run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape(kind, 1, 1),
        {"requests": requests, "model": model},
        parameters={"model": model, "requests": len(requests)},
        tags={},
        total=1,
    )


def tell_problems(found: list[dict[str, str]]) -> None:
    for each in found:
        if each["problem"]:
            print(f"left as it is ({each['problem']}): {each['request']}", file=sys.stderr)


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
        requests += [each["prompt"] for each in read_prompts(options.file)]
    requests = [" ".join(request.split()) for request in requests if request.strip()]
    if not requests:
        raise ValueError("recaption needs a request, or a --file of them, one a line")
    return requests
