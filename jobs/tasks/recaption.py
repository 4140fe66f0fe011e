"""The recaption job: rewrite users' prompts as captions with the model that captioned the dataset."""

import json
from dataclasses import asdict
from pathlib import Path

from jobs.state.journal import Journal
from pixart.atomic import write_atomically
from pixart.config import recipe as recipe_file


def run(run_folder: str, *, requests: list[str], model: str) -> list[dict[str, str]]:
    """Rewrite the requests by the instruction of the run's dataset.

    Return the request, text and problem of each, in the order of the requests.
    """
    from pixart.data.captions.rewriting import rewrite, vllm_generator

    captions = recipe_file.load(Path(run_folder) / "config.json").data.captions
    rewritten = [asdict(item) for item in rewrite(requests, captions, vllm_generator(model, captions))]
    path = Path(run_folder) / "rewritten.jsonl"
    write_atomically(path, "".join(json.dumps(item) + "\n" for item in rewritten))
    Journal(run_folder).artifact(path)
    return rewritten
