"""Rewrite prompts in the style of the captions, with the captioning model.

The instruction and the sampling are those of the dataset (data.captions.*) if it exists, else of the recipe. Uses a
running vLLM server, or else submits a job that starts the vLLM engine, and waits for it. A prompt whose
rewritten text fails the checks twice is returned unchanged.
"""

import contextlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command, RecipeOptions, SubmissionOptions, argument, option
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.prompts import dataset_captions, read_prompts
from jobs.state.run import Run
from jobs.submission.datasets import open_dataset
from jobs.submission.launch import Launch, NothingSubmitted
from jobs.submission.submit import run_ranks
from pixart.atomic import write_atomically
from pixart.terminal import printable
from slurm.executor import Cluster

SUFFIXES = (".txt", ".jsonl", ".parquet")
MAX_COMPARED = 10_000  # captions of the dataset that prompts are compared with
KIND = "recaption"


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions, SubmissionOptions):
    """The options of `recaption`."""

    prompts: tuple[str, ...] = argument("PROMPT", convert=str, help="Prompt to rewrite; repeatable.")
    file: str | None = option("--file", metavar="FILE", help="File with more prompts, one per line (default: none).")
    output: str | None = option(
        "--output",
        metavar="FILE",
        help="Write the results to this .txt, .jsonl or .parquet file (default: standard output).",
    )
    model: str | None = option(
        "--model",
        metavar="MODEL",
        help="Model by folder or hub name (default: the recipe's captioner, or the server's).",
    )
    server: str | None = option(
        "--server", metavar="URL", help="Running vLLM server, such as http://node:8000/v1 (default: submit a job)."
    )
    compare: str | None = option(
        "--compare", metavar="DATASET", help="Report how similar the results are to its captions (default: no report)."
    )


def run(options: Options) -> int:
    home = runs.home(options.home)
    with launching(
        "recaption", options, home, read_recipe(home, options), overrides=options.overrides, wait=True
    ) as launch:
        print(recaption(launch, options))
    return 0


def recaption(launch: Launch, options: Options) -> str:
    """Rewrite the prompts, and return them or the name of the file that they were written to."""
    prompts = collect_prompts(options)
    output = check_output(options)
    captions = dataset_captions(options.compare, MAX_COMPARED) if options.compare else []
    if options.compare and not captions:
        raise ValueError(f"--compare {options.compare}: the dataset has no captions; run 'caption' first")
    use_captions_of_dataset(launch, options)
    if launch.dry_run and options.server:
        raise NothingSubmitted(f"{len(prompts)} prompts to {options.server}")
    if options.server:
        rewritten = rewrite_by_server(launch, prompts, options.server, options.model)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the results
            rewritten = runs.result(submit_recaption(launch, prompts, options.model))
    print_problems(rewritten)
    if captions:
        from pixart.data.captions.similarity import compare, report

        print(report(compare(captions, [item["text"] for item in rewritten])), file=sys.stderr)
    if output is None:
        return "\n".join(item["text"] for item in rewritten)
    write_atomically(output, encode(rewritten, output.suffix))
    return f"rewritten: {output}"


def use_captions_of_dataset(launch: Launch, options: Options) -> None:
    """Set the recipe's `data` to that of the dataset, whose captions the results are to resemble, if it exists.

    Raises ValueError if the options name a dataset that does not exist, or other instructions than the dataset's.
    """
    if ledger.manifest(launch.dataset) is not None:
        open_dataset(launch)
    elif options.names_dataset:
        raise ValueError(f"dataset {launch.dataset} does not exist; run 'caption' to create it, or name another one")


def collect_prompts(options: Options) -> list[str]:
    """Return the prompts of the command line and of --file, on one line each. Raises ValueError without a prompt."""
    prompts = list(options.prompts)
    if options.file:
        prompts += [item["prompt"] for item in read_prompts(options.file)]
    normalized = [" ".join(prompt.split()) for prompt in prompts if prompt.strip()]
    if not normalized:
        raise ValueError("recaption: there are no prompts; give a PROMPT, or a --file with one per line")
    return normalized


def check_output(options: Options) -> Path | None:
    """Return the path of --output. Raises ValueError if it cannot be written, or is the file of the prompts."""
    if options.output is None:
        return None
    output = Path(options.output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output {output}: the name must end in {', '.join(SUFFIXES)}")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: the folder {output.parent} does not exist")
    if options.file and output.exists() and output.samefile(options.file):
        raise ValueError(f"--output {output}: is the file of --file; name another file")
    return output


def rewrite_by_server(launch: Launch, prompts: list[str], url: str, model: str | None) -> list[dict[str, str]]:
    """Rewrite the prompts with a running vLLM server, by the instruction and sampling of the dataset's captions."""
    from pixart.data.captions.rewriting import rewrite, server_generator

    generate = server_generator(url.rstrip("/"), model)
    return [asdict(item) for item in rewrite(prompts, launch.recipe.data.captions, generate)]


def submit_recaption(launch: Launch, prompts: list[str], model: str | None) -> Run:
    """Submit the job that rewrites the prompts, with the profile's Python for recaption, else for caption."""
    pythons = launch.profile.python
    if "caption" in pythons:
        launch.profile = replace(launch.profile, python={KIND: pythons["caption"], **pythons})
    model = model or launch.recipe.data.caption_model
    return run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape(KIND, 1, 1),
        {"requests": prompts, "model": model},
        parameters={"model": model, "requests": len(prompts)},
        tags={},
        total=1,
    )


def print_problems(rewritten: list[dict[str, str]]) -> None:
    """Print the prompts that were not rewritten, with the reason."""
    for item in rewritten:
        if item["problem"]:
            print(f"unchanged ({item['problem']}): {printable(item['request'])}", file=sys.stderr)


def encode(rewritten: list[dict[str, str]], suffix: str) -> str | bytes:
    """Return the contents of the output file in the format that its suffix names."""
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rewritten), sink)
        return sink.getvalue().to_pybytes()
    return "".join((json.dumps(item) if suffix == ".jsonl" else item["text"]) + "\n" for item in rewritten)


COMMAND = Command(Options, run)
