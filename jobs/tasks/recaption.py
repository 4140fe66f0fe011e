"""The recaption job: rewrite users' prompts as captions with the model that captioned the dataset."""

import json
from dataclasses import asdict
from pathlib import Path

from jobs.state.journal import Journal
from pixart.atomic import write_atomically


def run(run_folder: str, *, requests: list[str], model: str) -> list[dict[str, str]]:
    """Rewrite the requests, and return the request, text and problem of each, in the order of the requests."""
    from pixart.data.captions.rewriting import rewrite, vllm_generator

    rewritten = [asdict(item) for item in rewrite(requests, vllm_generator(model))]
    path = Path(run_folder) / "rewritten.jsonl"
    write_atomically(path, "".join(json.dumps(item) + "\n" for item in rewritten))
    Journal(run_folder).artifact(path)
    return rewritten
