"""The judge job: answers of a vision-language model about the images of an evaluation, shard by shard."""

import hashlib
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.state import evaluation, ledger
from jobs.state.evaluation import Request
from jobs.tasks.caption import for_each_shard
from jobs.tasks.evaluation.evaluate import RECIPE
from pixart.atomic import write_atomically
from pixart.config import recipe as recipe_file

BATCH_SIZE = 256  # images in memory


def run(folder: str, elements: list[int]) -> None:
    """Judge the images of elements one after the other; those with a ledger entry of this request are skipped.

    Raises ValueError or RuntimeError at the end if an element failed.
    """
    request = evaluation.read(folder)
    done = evaluation.JUDGE
    todo = [element for element in elements if not evaluation.is_complete(folder, request, element, done)]
    if not todo:
        return
    if unsampled := [element for element in todo if not evaluation.is_complete(folder, request, element)]:
        raise ValueError(f"{folder}: shard {unsampled[0]} has no images; run 'evaluate' again")

    from pixart.evaluation.judge import Judge

    captions = recipe_file.load(Path(folder) / RECIPE).data.captions
    judge = Judge(request.judge, captions)
    prompts = evaluation.read_prompts(folder)
    for_each_shard(todo, lambda element: judge_shard(Path(folder), request, prompts, element, judge))


def judge_shard(folder: Path, request: Request, prompts: list[dict[str, Any]], element: int, judge) -> None:
    """Write the judgements of a shard, one line per image, and its ledger entry."""
    from PIL import Image

    from pixart.evaluation.prompt_following import Question

    begun, lines = time.monotonic(), []
    variant, shard = request.locate(element)
    assert variant is not None  # the reference is not judged
    rows = iter(request.rows(shard))
    while batch := list(islice(rows, BATCH_SIZE)):
        images = [Image.open(evaluation.image_path(folder, variant, row)).convert("RGB") for row in batch]
        selected = [prompts[row // request.settings["images_per_prompt"]].get("questions", []) for row in batch]
        judgements = judge.answer(images, [[Question(**values) for values in questions] for questions in selected])
        captions = judge.describe(images) if request.caption_back else [None] * len(images)
        for row, several, caption in zip(batch, judgements, captions, strict=True):
            probabilities = [judgement.probability for judgement in several]
            answers = [judgement.answer for judgement in several]
            line: dict[str, Any] = {"row": row, "probabilities": probabilities, "answers": answers}
            lines.append(line if caption is None else {**line, "caption": caption})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(evaluation.scores_path(folder, variant, shard, evaluation.JUDGE), text)
    entry = ledger.Entry(
        manifest=request.hash,
        inputs="",
        rows=len(lines),
        valid=sum(None not in line["probabilities"] for line in lines),
        checksum=hashlib.sha256(text.encode()).hexdigest(),
        seconds=time.monotonic() - begun,
        versions={"judge": judge.name},
    )
    ledger.record(folder, evaluation.JUDGE, element, entry)
