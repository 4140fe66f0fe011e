"""Evaluation folders: the request, its shards as elements of an array job, and where their results are.

An evaluation is HOME/evaluations/NAME-HASH, and the hash is that of the request: the same request is the same folder,
whose shards are not computed twice. The elements of the array are the shards of the images of each variant (a
checkpoint with its sampling settings), followed by the shards of the reference.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from jobs.state import ledger
from pixart import records
from pixart.atomic import write_atomically
from pixart.config.sampling import EvaluationConfig
from pixart.evaluation.protocol import short_hash
from pixart.records import Count, Parts, Positive, Prompts
from pixart.relocation import home_of, portable, present

FOLDER = "evaluations"  # in the home folder
REQUEST, PROMPTS = "request.json", "prompts.jsonl"
RESULTS, PAGE = "evaluation.json", "evaluation.html"
SAMPLE, JUDGE = "evaluate", "judge"  # kinds of the array jobs, and names of their ledgers
Scores = dict[str, dict[str, float]]  # of images, by figure and number of the image


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A checkpoint with the settings of its sampling."""

    checkpoint: str
    stage: Literal[1, 2]
    step: Count
    record: str  # hash of the checkpoint's metadata
    weights: str
    steps: Positive
    guidance: float


class Reference(TypedDict):
    """The images that an evaluation compares with; "none" is no images, and "statistics" a file of their statistics."""

    kind: Literal["dataset", "folder", "statistics", "none"]
    path: str
    hash: str
    count: Count
    num_shards: Parts


class PromptRecord(TypedDict):
    """A prompt, or a class by its index and name; a scene of the demo is its seed and number."""

    prompt: NotRequired[str]
    label: NotRequired[Count]
    class_name: NotRequired[str]
    scene: NotRequired[tuple[Count, Count]]
    questions: NotRequired[list[dict[str, Any]]]
    tag: NotRequired[str | None]


class ScoreRecord(TypedDict):
    """The scores of one image, by its number."""

    row: Count


class VariantResults(TypedDict):
    """The results of a variant, beside the fields of Variant."""

    checkpoint: str
    settings: str
    protocol: dict[str, Any]
    figures: dict[str, dict[str, Any]]


class Results(TypedDict):
    """The results of an evaluation."""

    request: dict[str, Any]
    variants: list[VariantResults]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What an evaluation computes; everything that its shards depend on."""

    variants: tuple[Variant, ...]
    prompts: str  # hash of the prompts
    num_prompts: Prompts
    reference: Reference  # kind (dataset, folder, statistics or none), path, hash, number of images and of shards
    settings: dict[str, Any]  # the configuration's section `evaluation`
    data: str  # dataset of the VAE and the text encoder
    data_hash: str
    image_size: Positive  # of the sampled images, pixels per side
    judge: str = ""  # model that judges the questions; "" for none
    caption_back: bool = False
    clip: str = ""  # folder of a CLIP model; "" for none

    @property
    def hash(self) -> str:
        return short_hash(asdict(self))

    @property
    def num_images(self) -> int:
        """Number of images of each variant."""
        return self.num_prompts * self.settings["images_per_prompt"]

    @property
    def num_shards(self) -> int:
        """Number of shards of each variant; none is empty."""
        return min(self.settings["num_shards"], self.num_images)

    @property
    def num_reference_shards(self) -> int:
        return self.reference["num_shards"]

    @property
    def num_samples(self) -> int:
        """Number of array elements that sample; the reference's follow them."""
        return len(self.variants) * self.num_shards

    @property
    def elements(self) -> list[int]:
        """The elements of the array job."""
        return list(range(self.num_samples + self.num_reference_shards))

    @property
    def keeps_images(self) -> bool:
        return self.settings["save_images"] or bool(self.judge) or self.caption_back

    @property
    def is_judged(self) -> bool:
        return bool(self.judge)

    def locate(self, element: int) -> tuple[int | None, int]:
        """Return the index of an element's variant, None for the reference, and its shard."""
        if element >= self.num_samples:
            return None, element - self.num_samples
        return divmod(element, self.num_shards)

    def rows(self, shard: int) -> range:
        """Return the images of a shard; image i is number i % images_per_prompt of prompt i // images_per_prompt."""
        return split(self.num_images, self.num_shards, shard)

    def reference_rows(self, shard: int) -> range:
        return split(self.reference["count"], self.num_reference_shards, shard)


def split(count: int, parts: int, index: int) -> range:
    """Return part `index` of `count` rows in `parts` parts of nearly equal size."""
    return range(count * index // parts, count * (index + 1) // parts)


def write(folder: Path, request: Request, prompts: list[dict[str, Any]]) -> None:
    """Write a new evaluation folder; the request is written last."""
    write_atomically(folder / PROMPTS, "".join(json.dumps(prompt) + "\n" for prompt in prompts))
    record = portable(asdict(request), home_of(folder))
    write_atomically(folder / REQUEST, json.dumps(record, indent=2) + "\n")


def read(folder: str | Path) -> Request:
    """Return the request of an evaluation. Raises ValueError if the folder is no evaluation, or is damaged."""
    path = Path(folder) / REQUEST
    if not path.is_file():
        raise ValueError(f"{folder}: is no evaluation; name a folder in HOME/{FOLDER}")
    content = present(records.read(path, dict[str, Any]), home_of(path.parent))
    request: Request = records.convert(content, Request, str(path))
    records.convert(request.settings, EvaluationConfig, f"{path}: settings")
    return request


def read_prompts(folder: str | Path) -> list[dict[str, Any]]:
    """Return the prompts of an evaluation: `prompt` or `label` with `class_name`, and `scene`, `questions` or `tag`.

    The prompt of a demo scene is its caption.
    """
    prompts = records.read_lines(Path(folder) / PROMPTS, PromptRecord)
    if any("scene" in prompt for prompt in prompts):
        from pixart.demo.scenes import caption, make_scene

        return [
            {**prompt, "prompt": caption(make_scene(*prompt["scene"]))} if "scene" in prompt else prompt
            for prompt in prompts
        ]
    return prompts


def statistics_path(folder: str | Path, variant: int | None, shard: int) -> Path:
    """Return the path of a shard's feature statistics."""
    return variant_folder(folder, variant) / f"{shard:05d}.npz"


def variant_folder(folder: str | Path, variant: int | None) -> Path:
    return Path(folder) / ("reference" if variant is None else f"variants/{variant:03d}")


def scores_path(folder: str | Path, variant: int, shard: int, job: str = SAMPLE) -> Path:
    """Return the path of the scores of a shard's images, one line each."""
    return variant_folder(folder, variant) / f"{shard:05d}.{job}.jsonl"


def image_path(folder: str | Path, variant: int, row: int) -> Path:
    return variant_folder(folder, variant) / "images" / f"{row:06d}.png"


def read_scores(folder: str | Path, request: Request, variant: int, job: str = SAMPLE) -> list[dict[str, Any]]:
    """Return the scores of all images of a variant, in the order of the rows."""
    paths = [scores_path(folder, variant, shard, job) for shard in range(request.num_shards)]
    return [record for path in paths for record in records.read_lines(path, ScoreRecord)]


def is_complete(folder: str | Path, request: Request, element: int, job: str = SAMPLE) -> bool:
    """Return whether an element's results exist and were made from this request."""
    entry = ledger.read(folder, job, element)
    return entry is not None and entry.manifest == request.hash and last_file(folder, request, element, job).exists()


def last_file(folder: str | Path, request: Request, element: int, job: str) -> Path:
    """Return the file that a task writes last for an element, before the ledger's entry."""
    variant, shard = request.locate(element)
    return statistics_path(folder, None, shard) if variant is None else scores_path(folder, variant, shard, job)


def missing(folder: str | Path, request: Request, job: str = SAMPLE) -> list[int]:
    """Return the elements that a job has not completed."""
    elements = request.elements if job == SAMPLE else list(range(request.num_samples))
    return [element for element in elements if not is_complete(folder, request, element, job)]


def folders(home: Path) -> list[Path]:
    """Return the evaluation folders of a home folder, oldest first."""
    return sorted((path.parent for path in (home / FOLDER).glob(f"*/{REQUEST}")), key=lambda path: path.stat().st_mtime)


def of_checkpoint(home: Path, checkpoint: Path) -> list[Path]:
    """Return the finished evaluations that have a checkpoint among their variants."""
    finished = [folder for folder in folders(home) if (folder / RESULTS).exists()]
    return [
        folder for folder in finished if any(variant.checkpoint == str(checkpoint) for variant in read(folder).variants)
    ]
