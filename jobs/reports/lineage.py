"""Lineage of an image, a checkpoint, a run or a dataset, from the records in the folders themselves.

A PNG names its checkpoint, a checkpoint its conversion or run, and a run its initial checkpoint and its dataset.
"""

import hashlib
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from conversion.report.text import PAGE, REPORT
from jobs.reports import efficiency
from jobs.state import audit_files, evaluation, ledger
from jobs.state import run as runs
from jobs.state.checkpoint_names import INFERENCE, MARKER, acceptance, checkpoint_record, find_checkpoint
from jobs.state.run import Run
from jobs.state.run_metadata import FILE as DESCRIPTION
from jobs.state.run_metadata import read_description
from pixart import records
from pixart.config.dataset import data_from_dict, is_url
from pixart.config.renamed_keys import rename_stage
from pixart.relocation import home_of, present
from pixart.terminal import printable

EVALUATING = ("evaluate", "judge", "summarize")  # kinds of the jobs of an evaluation
MAX_TEXT_LENGTH = 500  # longer texts of a PNG, such as the command, are not shown


class EvaluationRequest(TypedDict):
    """The arguments of a job of an evaluation, as far as the lineage reads them."""

    folder: str


@dataclass(kw_only=True)
class Node:
    """A node of the lineage graph; its `name`, a path or a URL, is unique."""

    kind: str  # picture, samples, checkpoint, training, conversion, dataset, or the kind of another run
    name: str
    facts: dict[str, str] = field(default_factory=dict)
    pages: dict[str, Path] = field(default_factory=dict)
    parents: list["Node"] = field(default_factory=list)


def trace(home: Path, subject: str | None) -> Node:
    """Return the node of a PNG, a checkpoint, a dataset or a run, linked to all its ancestors.

    None means the newest run. Raises ValueError if `subject` is none of these, or for records in a circle.
    """
    node = find_node(home, subject)
    topological_order(node)
    return node


def find_node(home: Path, subject: str | None) -> Node:
    """Return the node that a PNG, a checkpoint, a dataset or a run is, linked to its ancestors."""
    traversal = Traversal(home)
    path = Path(subject or "")
    if subject and is_url(subject):
        return traversal.dataset(subject)
    if subject and path.is_file():
        return traversal.picture(path.absolute())
    if subject and ((path / MARKER).exists() or (path / INFERENCE).exists()):
        return traversal.checkpoint(path.absolute())
    if subject and (path / "manifest.json").exists():
        return traversal.dataset(str(path.absolute()))
    if subject and (path / evaluation.REQUEST).exists():
        return traversal.evaluation(path.absolute())
    return traversal.run(runs.find(home, subject))


def trace_checkpoint(home: Path, path: Path) -> Node:
    """Return the node of a checkpoint, which may be a file of another program, linked to all its ancestors."""
    return Traversal(home).checkpoint(path)


class Traversal:
    """A traversal of the lineage graph that creates exactly one node for each object."""

    def __init__(self, home: Path) -> None:
        self.homes = [home]
        self.nodes: dict[str, Node] = {}
        self.loaded: dict[Path, Run] = {}

    def known_runs(self) -> list[Run]:
        """Return the runs of all home folders that the traversal has reached."""
        for folder in sorted({folder for home in self.homes for folder in runs.folders(home)} - self.loaded.keys()):
            self.loaded[folder] = runs.load(folder)
        return list(self.loaded.values())

    def add_node(self, kind: str, name: str, /, **facts: Any) -> Node:
        """Create and register a node; facts that are None or empty are left out."""
        present = {key.replace("_", " "): str(value) for key, value in facts.items() if value not in (None, "")}
        node = self.nodes[name] = Node(kind=kind, name=name, facts=present)
        return node

    def picture(self, path: Path) -> Node:
        """Return the node of a sampled PNG. Raises ValueError if it was not written by `sample`."""
        from PIL import Image, UnidentifiedImageError

        from pixart.sampling.png import XMP_CHUNK

        try:
            with Image.open(path) as image:
                metadata = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
        except (UnidentifiedImageError, OSError):
            raise ValueError(f"{path}: not an image; name a PNG, a checkpoint, a dataset or a run") from None
        if "checkpoint" not in metadata:
            raise ValueError(f"{path}: names no checkpoint; name an unmodified PNG that `sample` wrote")
        home = home_of(path) or self.homes[0]
        metadata = present(metadata, home)
        if command := metadata.get("command"):
            metadata["command"] = shlex.join(present(shlex.split(command), home))
        # The XMP packet of a served image says what that of every image of a model says.
        facts = {
            key: value
            for key, value in metadata.items()
            if len(value) <= MAX_TEXT_LENGTH and key not in ("checkpoint", "run", XMP_CHUNK)
        }
        node = self.add_node("picture", str(path), **facts)
        checkpoint = self.checkpoint(Path(metadata["checkpoint"]))
        record = Path(metadata.get("run", "")) / runs.RECORD
        run = runs.load(record.parent) if record.is_file() else self.run_with(path, metadata["checkpoint"])
        node.parents = [self.run(run) if run else checkpoint]
        return node

    def run_with(self, path: Path, checkpoint: str) -> Run | None:
        """Return the sampling run that wrote an image with the same content; None if no known run did.

        `path` may be a copy outside of the run folder.
        """
        digest = hashlib.sha256(path.read_bytes()).digest()
        for run in self.known_runs():
            if run.kind == "sample" and run.request.get("checkpoint") == checkpoint:
                for sample in run.folder.glob("samples/*.png"):
                    if hashlib.sha256(sample.read_bytes()).digest() == digest:
                        return run
        return None

    def checkpoint(self, path: Path) -> Node:
        """Return the node of a checkpoint; one that no longer exists, or of another program, has no parents."""
        if str(path) in self.nodes:
            return self.nodes[str(path)]
        run = path.parent.parent  # of a checkpoint of a training run
        if path.parent.name == "checkpoints" and (run / runs.RECORD).exists():
            self.homes.append(run.parent.parent)
        if (path / INFERENCE).exists():
            node = self.add_node("checkpoint", str(path), form="FP8 weights for inference")
            node.parents = [self.checkpoint(path.parent)]
            return node
        if not (path / MARKER).exists():
            note = "" if path.exists() else "no longer exists"
            return self.add_node("checkpoint", str(path), note=note or "written by another program")
        record = checkpoint_record(path)
        provenance = record["provenance"]
        node = self.add_node("checkpoint", str(path), stage=record["stage"], step=f"{record['step']:,}")
        if names := [folder.name for home in self.homes for folder in evaluation.of_checkpoint(home, path)]:
            node.facts["evaluations"] = ", ".join(dict.fromkeys(names))
        if (path / REPORT).exists():
            node.parents = [self.conversion(path, provenance)]
        elif path.name.startswith("step-") and path.name[5:].isdecimal() and (run / runs.RECORD).exists():
            node.parents = [self.run(runs.load(run))]
        elif "converted_from" in provenance:
            node.parents = [self.source(path, provenance)]
        elif record["dataset"]:
            node.parents = [self.dataset(record["dataset"], provenance.get("dataset_hash"))]
        return node

    def conversion(self, output: Path, provenance: dict[str, Any]) -> Node:
        """Return the node of the conversion that wrote a checkpoint; `origin` is the checkpoint's provenance."""
        node = self.add_node(
            "conversion",
            f"{output} (conversion)",
            strategy=provenance.get("reparameterization"),
            acceptance=acceptance(provenance),
            calibrated_on=provenance.get("calibration_data"),
        )
        node.pages = {"report": output / PAGE}
        for run in self.known_runs():
            if run.kind == "convert" and run.request.get("output") == str(output):
                node.facts["run"] = run.folder.name
        node.parents = [self.source(output, provenance)]
        return node

    def source(self, output: Path, provenance: dict[str, Any]) -> Node:
        """Return the node of the checkpoint that was converted.

        If the recorded path no longer exists, as after a home folder was moved, its name beside the output is taken.
        """
        recorded = Path(provenance["converted_from"])
        path = recorded if recorded.exists() else output.with_name(recorded.name)
        if (path / runs.RECORD).exists():
            path = find_checkpoint(str(path))
        node = self.checkpoint(path)
        node.facts["SHA-256"] = provenance["source_sha256"]
        return node

    def run(self, run: Run) -> Node:
        """Return the node of a run, a child of its checkpoint and, unless it samples or converts, of its dataset."""
        name = str(run.folder)
        if name in self.nodes:
            return self.nodes[name]
        self.homes.append(run.home)
        if run.kind in EVALUATING:
            node = self.add_node(run.kind, name, shards=len(run.elements) or None, jobs=", ".join(run.job_ids))
            request = records.convert(run.request, EvaluationRequest, str(run.folder / runs.RECORD))
            node.parents = [self.evaluation(Path(request["folder"]))]
            return node
        tags: dict[str, str] = {}
        parameters: dict[str, Any] = {}
        if (run.folder / DESCRIPTION).exists():
            description = read_description(run.folder)
            tags, parameters = description["tags"], description["parameters"]
        if run.kind == "train":
            logged = rename_stage(parameters)
            facts = {key: logged.get(key) for key in ("stage", "steps", "global_batch_size", "lr", "fp8")}
        else:
            facts = {"shards": len(run.elements) or None, "guidance": parameters.get("guidance")}
        kind = {"train": "training", "convert": "conversion", "sample": "samples", "serve": "server"}.get(
            run.kind, run.kind
        )
        jobs = ", ".join(run.job_ids)
        node = self.add_node(
            kind, name, **facts, jobs=jobs, commit=tags.get("pixart.commit"), user=tags.get("pixart.user")
        )
        node.facts |= efficiency.facts(run)
        node.pages = {"summary": run.folder / "summary.html", "samples": run.folder / "samples.png"}
        if start := tags.get("pixart.parent_checkpoint"):
            node.parents.append(self.checkpoint(Path(start)))
        if run.kind not in ("sample", "serve", "convert"):
            node.parents.append(self.dataset(run.dataset))
        return node

    def evaluation(self, folder: Path) -> Node:
        """Return the node of an evaluation, a child of its checkpoints and of the dataset that it compares with."""
        if str(folder) in self.nodes:
            return self.nodes[str(folder)]
        request = evaluation.read(folder)
        node = self.add_node(
            "evaluation",
            str(folder),
            images=f"{request.num_images:,} of {request.num_prompts:,} prompts",
            features=request.settings["features"] if request.reference["kind"] != "none" else None,
            reference=request.reference["path"],
            judged_by=request.judge,
        )
        node.pages = {"results": folder / evaluation.PAGE}
        node.parents = [
            self.checkpoint(Path(one)) for one in dict.fromkeys(item.checkpoint for item in request.variants)
        ]
        if request.reference["kind"] == "dataset":
            node.parents.append(self.dataset(request.reference["path"]))
        return node

    def dataset(self, path: str, trained_on: str | None = None) -> Node:
        """Return the node of a dataset; if it no longer exists, only with the hash `trained_on`."""
        if path in self.nodes:
            return self.nodes[path]
        manifest = ledger.manifest(path)
        if manifest is None:
            return self.add_node("dataset", path, hash=trained_on, note="no longer exists")
        data, models = manifest["data"], manifest["models"]
        node = self.add_node(
            "dataset",
            path,
            source=f"adopted from {data['source']}" if data["captioner"] == "adopted" else data["source"],
            images=f"{manifest['images']:,} of {data['image_size']} px in {data['num_shards']} shards",
            **captioner(data, models["captioner"]),
            VAE=f"{data['vae']} ({models['vae']})",
            text_encoder=f"{data['text_encoder']} ({models['text_encoder']})",
            hash=manifest["hash"],
        )
        if origin := manifest.get("captions_from"):
            node.facts["captions"] = f"taken over from the dataset of hash {origin['hash']}"
            node.parents = [self.dataset(ledger.captions_origin(path, manifest), origin["hash"])]
        for kind in ("adopt", "caption", "latents", "audit"):
            names = {run.folder.name for run in self.known_runs() if run.kind == kind and run.dataset == path}
            if names:
                node.facts[kind] = ", ".join(sorted(names))
        node.pages = {"audit": Path(path) / audit_files.FOLDER / audit_files.PAGE}
        return node


def captioner(data: dict[str, Any], fingerprint: str) -> dict[str, str]:
    """Return the facts about a dataset's captioner: for a model also the instruction, whose hash ends `fingerprint`."""
    from pixart.data.captions.captioner import prompt_hash, sampling_settings

    if data["captioner"] == "adopted":
        return {"captioner": f"adopted ({fingerprint})", "instruction": "adopted with the captions, and not known"}
    if data["captioner"] != "vllm":
        return {"captioner": data["captioner"]}
    captions = data_from_dict(data).captions
    is_current = fingerprint.endswith(f"-{prompt_hash(captions.image_instruction)}")
    return {
        "captioner": f"vllm, {data['caption_model']} ({fingerprint})",
        "instruction": captions.image_instruction if is_current else "of another version; see the hash above",
        "sampling": ", ".join(f"{name} {value}" for name, value in sampling_settings(captions).items()),
    }


def topological_order(node: Node) -> list[Node]:
    """Return the node and all its ancestors, in topological order with the ancestors first.

    Raises ValueError if records say that a node is among its own ancestors.
    """
    ordered: dict[str, Node] = {}
    open_nodes: set[str] = set()

    def add(one: Node) -> None:
        if one.name in ordered:
            return
        if one.name in open_nodes:
            raise ValueError(f"{one.name}: its records name it among its own ancestors; restore them")
        open_nodes.add(one.name)
        for parent in one.parents:
            add(parent)
        ordered[one.name] = one

    add(node)
    return list(ordered.values())


def show(node: Node) -> None:
    """Print the lineage as a tree, from descendants to ancestors; paths are not truncated."""
    from rich.console import Console
    from rich.text import Text

    console, shown = Console(highlight=False, soft_wrap=True), set()

    def branch(one: Node, indent: str, begin: str) -> None:
        again = "  (as above)" if one.name in shown else ""
        path = one.name.removesuffix(" (conversion)")
        console.print(Text.assemble(indent, begin, (one.kind, "bold"), f"  {printable(path)}{again}"))
        if again:
            return
        shown.add(one.name)
        indent += "    " if begin else ""
        below = "|" if one.parents else " "
        for key, value in one.facts.items():
            console.print(Text(f"{indent}{below}   {printable(key):<13} {printable(value)}"))
        for parent in one.parents:
            branch(parent, indent, "+-- ")

    branch(node, "", "")
