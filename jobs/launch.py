"""`python -m jobs.launch JOB`: submits the suite's jobs to a Slurm cluster, or runs them on this machine."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from conversion.options import Parser, add_options, non_empty
from pixart.recipes import DEFAULT_RECIPE, RECIPES

JOBS = {
    "init": "fixes a dataset: its source, shards, image size, VAE, text encoder and captioner",
    "caption": "captions and screens the images of a dataset, one shard per array element",
    "latents": "encodes a captioned dataset's images and text, one shard per array element",
    "audit": "merges what screening and captions say of a dataset to one page, and judges it",
    "verify": "compares every file of a dataset with the ledger; what was altered is to be made again",
    "train": "trains stage 1 or stage 2",
    "convert": "brings a checkpoint into FP8, stage 1 into stage 2 on the way",
    "sample": "samples pictures from a checkpoint",
    "recaption": "rewrites requests in the style of the captions, by the model that wrote those",
    "pipeline": "submits all of them, each to begin when the one before it has succeeded",
    "demo": "runs all of them, from rendered scenes to counted pictures",
}
AFTERWARDS = {
    "status": "shows how a run stands, by its data and by Slurm",
    "logs": "prints what a run's tasks have said",
    "retry": "submits just what a run has not finished",
    "cancel": "ends a run's jobs",
    "sync": "brings runs' journals into MLflow, from a machine that reaches it",
    "open": "shows a run's page in a browser, and says where it lies",
    "lineage": "shows what a run, PNG, checkpoint or dataset comes from",
    "release": "registers a checkpoint's averaged weights as a model version in MLflow",
}
OVERRIDES = "configuration by dotted key, such as stage1.steps=100 or data.source=s3://bucket/photos; repeatable"


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m jobs.launch", description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB", parser_class=Parser)
    for name, summary in {**JOBS, **AFTERWARDS}.items():
        job = jobs.add_parser(name, help=summary, description=f"{name}: {summary}.")
        job.add_argument(
            "--home", type=non_empty, help="folder of datasets, runs and tracking (default: $PIXART_HOME, else outputs)"
        )
        if name == "lineage":
            job.add_argument("what", nargs="?", help="run, PNG, checkpoint or dataset (default: the newest run)")
            job.add_argument("--html", metavar="FILE", type=non_empty, help="write it as a page too")
        elif name == "release":
            job.add_argument("checkpoint", help="checkpoint or run folder")
            job.add_argument("--name", default="pixart", help="of the registered model (default: pixart)")
        elif name in AFTERWARDS:
            job.add_argument("run", nargs="?", metavar="RUN", help="folder, name or part of it (default: the newest)")
        elif name != "convert":
            add_settings(job)
        if name == "open":
            job.add_argument("--print", action="store_true", help="say where it lies, and open no browser")
        if name in JOBS or name == "retry":
            add_submission(job)
        if name in ("caption", "latents"):
            job.add_argument("--array", help="shards: 0-255, 3,7,9-12, 0-999:10, and %%N for N at once (default: all)")
        if name in ("train", "pipeline", "demo"):
            job.add_argument("--nodes", type=positive, default=1, help="nodes; on this machine, ranks (default: 1)")
        if name == "train":
            job.add_argument(
                "--stage", type=int, choices=(1, 2), help="1: classes, 2: text (default: the checkpoint's, else 1)"
            )
            job.add_argument("--from", dest="start", type=non_empty, help="checkpoint or run to go on from")
            job.add_argument("--resume", type=non_empty, help="run folder to continue in")
            job.add_argument(
                "--accept-failed-conversion", action="store_true", help="go on from a checkpoint that failed its checks"
            )
        if name in ("train", "pipeline", "demo"):
            job.add_argument(
                "--accept-failed-audit",
                action="store_true",
                help="train on a dataset without a passed audit",
            )
        if name == "convert":
            job.add_argument("checkpoint", help="checkpoint, run folder or .pt file")
            job.add_argument("--output", type=non_empty, help="directory to write (default: beside the checkpoint)")
            add_options(job)
            job.set_defaults(overrides=[], settings=DEFAULT_RECIPE, dataset=None)
        if name == "sample":
            add_sampling(job)
        if name == "recaption":
            job.add_argument("requests", nargs="*", metavar="REQUEST")
            job.add_argument("--file", type=non_empty, help="more requests, one a line")
            job.add_argument(
                "--output", type=non_empty, help=".txt, .jsonl or .parquet file (default: standard output)"
            )
            job.add_argument("--model", help="folder or hub name (default: the recipe's captioner, or the server's)")
            job.add_argument(
                "--server", metavar="URL", type=non_empty, help="a running vLLM server, such as http://node:8000/v1"
            )
            job.add_argument("--compare", metavar="DATASET", help="report how alike its captions and the answers are")
        if name == "logs":
            job.add_argument("--shard", type=int, metavar="N", help="of this shard only")
            job.add_argument("-f", dest="follow", action="store_true", help="go on as more is written")
    return parser


def add_sampling(job: argparse.ArgumentParser) -> None:
    job.add_argument("checkpoint", help="checkpoint, run folder or a conversion's inference/")
    job.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="stage 2; repeatable (default: the dataset's)"
    )
    job.add_argument("--file", type=non_empty, help='more prompts, one a line; of a .jsonl file "text" or "prompt"')
    job.add_argument("--recaption", action="store_true", help="rewrite the prompts in the style of the captions first")
    job.add_argument("--server", metavar="URL", type=non_empty, help="of --recaption: a running vLLM server")
    job.add_argument("--model", help="of --recaption: folder or hub name (default: the captioner's, or the server's)")
    job.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME|INDEX",
        help="stage 1; repeatable, none for no class (default: one picture of each of the dataset's first classes)",
    )
    job.add_argument(
        "--per-prompt",
        type=positive,
        default=1,
        metavar="N",
        help="pictures of each prompt or class; all count on from sample.seed (default: 1)",
    )
    job.add_argument("--weights", choices=("ema", "master"), default="ema", help="(default: ema, the average)")
    job.add_argument(
        "--export",
        metavar="FOLDER",
        type=non_empty,
        help="write a diffusers pipeline, and pictures just where asked for",
    )


def add_settings(job: argparse.ArgumentParser) -> None:
    job.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=OVERRIDES)
    job.add_argument(
        "--recipe", dest="settings", default=DEFAULT_RECIPE, help=f"one of {', '.join(RECIPES)} (default: demo)"
    )
    job.add_argument("--dataset", type=non_empty, help="the dataset's directory, short for data.path=DIRECTORY")


def add_submission(job: argparse.ArgumentParser) -> None:
    job.add_argument("--cluster", help="profile by name or path (default: $PIXART_CLUSTER, else local without Slurm)")
    job.add_argument(
        "--gpus-per-node", type=positive, metavar="N", help="ranks of a training node (default: the profile's)"
    )
    job.add_argument("--wait", action="store_true", help="on a cluster: stay until the end, with a progress line")
    job.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        code = run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # such as a home that may not be written to
        name = f"{error.filename}: " if error.filename else ""
        print(f"error: {name}{error.strerror or error}", file=sys.stderr)
        return 2
    return code


def run(arguments: Sequence[str] | None) -> int:
    options = make_parser().parse_args(arguments)
    if options.job in AFTERWARDS and options.job != "retry":
        return look(options)
    from jobs.commands import dispatch
    from jobs.submission.launch import JobFailedError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, jobs on this machine end with the launcher
    try:
        return dispatch.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except JobFailedError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1


def look(options: argparse.Namespace) -> int:
    """The commands that submit nothing."""
    from jobs.commands import inspect
    from jobs.commands import runs as status
    from jobs.state import run as runs
    from jobs.tracking.mlflow_store import StoreError

    try:
        return {**status.COMMANDS, **inspect.COMMANDS}[options.job](runs.home(options.home), options)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StoreError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
