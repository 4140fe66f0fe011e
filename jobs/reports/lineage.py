"""Lineage of an image, a checkpoint, a run or a dataset, from the records in the folders themselves.

A PNG names its checkpoint, a checkpoint its conversion or run, and a run its initial checkpoint and its dataset.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversion.report.text import PAGE, REPORT
from jobs.state import audit_files, ledger
from jobs.state import run as runs
from jobs.state.checkpoint_names import INFERENCE, MARKER, acceptance, checkpoint_record, find_checkpoint
from jobs.state.run import Run
from jobs.state.run_metadata import FILE as DESCRIPTION
from jobs.state.run_metadata import read_description
from pixart.config.dataset import is_url
from pixart.config.renamed_keys import rename_stage

LETTERS = 500  # longest text of a PNG that is shown; longer ones, such as the command, are not


@dataclass(kw_only=True)
class Node:
    """A node of the lineage graph; its `name`, a path or a URL, is unique."""

    kind: str  # picture, samples, checkpoint, training, conversion, dataset, or the kind of another run
    name: str
    facts: dict[str, str] = field(default_factory=dict)
    pages: dict[str, Path] = field(default_factory=dict)
    parents: list["Node"] = field(default_factory=list)


def trace(home: Path, what: str | None) -> Node:
    """Return the node of a PNG, a checkpoint, a dataset or a run, linked to all its ancestors.

    None means the newest run. Raises ValueError if `what` is none of these.
    """
    walk = Walk(home)
    path = Path(what or "")
    if what and is_url(what):
        return walk.dataset(what)
    if what and path.is_file():
        return walk.picture(path.absolute())
    if what and ((path / MARKER).exists() or (path / INFERENCE).exists()):
        return walk.checkpoint(path.absolute())
    if what and (path / "manifest.json").exists():
        return walk.dataset(str(path.absolute()))
    return walk.run(runs.find(home, what))


class Walk:
    """A traversal of the lineage graph that creates one node for each object, however often it is reached."""

    def __init__(self, home: Path) -> None:
        self.homes = [home]
        self.nodes: dict[str, Node] = {}
        self.loaded: dict[Path, Run] = {}

    def known(self) -> list[Run]:
        """Return the runs of all home folders that the traversal has reached."""
        for folder in sorted({folder for home in self.homes for folder in runs.folders(home)} - self.loaded.keys()):
            self.loaded[folder] = runs.load(folder)
        return list(self.loaded.values())

    def made(self, kind: str, name: str, /, **facts: Any) -> Node:
        """Create and register a node; facts that are None or empty are left out."""
        told = {key.replace("_", " "): str(value) for key, value in facts.items() if value not in (None, "")}
        node = self.nodes[name] = Node(kind=kind, name=name, facts=told)
        return node

    def picture(self, path: Path) -> Node:
        """Return the node of a sampled PNG. Raises ValueError if it is not one that `sample` wrote."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                written = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
        except (UnidentifiedImageError, OSError):
            raise ValueError(f"{path} is no picture, no checkpoint, no dataset and no run") from None
        if "checkpoint" not in written:
            raise ValueError(f"{path} names no checkpoint: it is no picture that `sample` wrote, or was changed since")
        told = {
            key: value for key, value in written.items() if len(value) <= LETTERS and key not in ("checkpoint", "run")
        }
        node = self.made("picture", str(path), **told)
        checkpoint = self.checkpoint(Path(written["checkpoint"]))
        named = Path(written.get("run", "")) / runs.RECORD
        run = runs.load(named.parent) if named.is_file() else self.run_with(path, written["checkpoint"])
        node.parents = [self.run(run) if run else checkpoint]
        return node

    def run_with(self, path: Path, checkpoint: str) -> Run | None:
        """Return the sampling run that wrote an image with the same content; None if no known run did.

        `path` may be a copy outside of the run folder.
        """
        digest = hashlib.sha256(path.read_bytes()).digest()
        for run in self.known():
            if run.kind == "sample" and run.request.get("checkpoint") == checkpoint:
                for own in run.folder.glob("samples/*.png"):
                    if hashlib.sha256(own.read_bytes()).digest() == digest:
                        return run
        return None

    def checkpoint(self, path: Path) -> Node:
        """Return the node of a checkpoint; one that no longer exists, or is of another program, has no parents."""
        if str(path) in self.nodes:
            return self.nodes[str(path)]
        if path.parent.name == "checkpoints" and (path.parents[1] / runs.RECORD).exists():
            self.homes.append(path.parents[3])
        if (path / INFERENCE).exists():
            node = self.made("checkpoint", str(path), form="FP8 weights for inference")
            node.parents = [self.checkpoint(path.parent)]
            return node
        if not (path / MARKER).exists():
            there = "" if path.exists() else "not there any more"
            return self.made("checkpoint", str(path), note=there or "a file of another program")
        record = checkpoint_record(path)
        origin = record["provenance"]
        node = self.made("checkpoint", str(path), stage=record["stage"], step=f"{record['step']:,}")
        if (path / REPORT).exists():
            node.parents = [self.conversion(path, origin)]
        elif path.name.startswith("step-") and path.name[5:].isdecimal() and (path.parents[1] / runs.RECORD).exists():
            node.parents = [self.run(runs.load(path.parents[1]))]
        elif "converted_from" in origin:
            node.parents = [self.source(path, origin)]
        elif record["dataset"]:
            node.parents = [self.dataset(record["dataset"], origin.get("dataset_hash"))]
        return node

    def conversion(self, output: Path, origin: dict[str, Any]) -> Node:
        """Return the node of the conversion that wrote a checkpoint; `origin` is the checkpoint's provenance."""
        node = self.made(
            "conversion",
            f"{output} (conversion)",
            strategy=origin.get("reparameterization"),
            acceptance=acceptance(origin),
            calibrated_on=origin.get("calibration_data"),
        )
        node.pages = {"report": output / PAGE}
        for run in self.known():
            if run.kind == "convert" and run.request.get("output") == str(output):
                node.facts["run"] = run.folder.name
        node.parents = [self.source(output, origin)]
        return node

    def source(self, output: Path, origin: dict[str, Any]) -> Node:
        """Return the node of the checkpoint that was converted.

        If the recorded path no longer exists, as after a home folder was moved, its name beside the output is taken.
        """
        named = Path(origin["converted_from"])
        path = named if named.exists() else output.with_name(named.name)
        if (path / runs.RECORD).exists():
            path = find_checkpoint(str(path))
        node = self.checkpoint(path)
        node.facts["SHA-256"] = origin["source_sha256"]
        return node

    def run(self, run: Run) -> Node:
        """Return the node of a run, a child of its checkpoint and, unless it samples or converts, of its dataset."""
        name = str(run.folder)
        if name in self.nodes:
            return self.nodes[name]
        self.homes.append(run.folder.parents[1])
        about = read_description(run.folder) if (run.folder / DESCRIPTION).exists() else {"tags": {}, "parameters": {}}
        tags, parameters = about["tags"], about["parameters"]
        if run.kind == "train":
            logged = rename_stage(parameters)
            told = {key: logged.get(key) for key in ("stage", "steps", "global_batch_size", "lr", "fp8")}
        else:
            told = {"shards": len(run.elements) or None, "guidance": parameters.get("guidance")}
        kind = {"train": "training", "convert": "conversion", "sample": "samples"}.get(run.kind, run.kind)
        jobs = ", ".join(run.job_ids)
        node = self.made(kind, name, **told, jobs=jobs, commit=tags.get("pixart.commit"), user=tags.get("pixart.user"))
        node.pages = {"summary": run.folder / "summary.html", "samples": run.folder / "samples.png"}
        if start := tags.get("pixart.parent_checkpoint"):
            node.parents.append(self.checkpoint(Path(start)))
        if run.kind != "sample" and run.kind != "convert":
            node.parents.append(self.dataset(run.dataset))
        return node

    def dataset(self, path: str, trained_on: str | None = None) -> Node:
        """Return the node of a dataset; if it no longer exists, only with the hash `trained_on`."""
        if path in self.nodes:
            return self.nodes[path]
        manifest = ledger.manifest(path)
        if manifest is None:
            return self.made("dataset", path, hash=trained_on, note="not there any more")
        data, models = manifest["data"], manifest["models"]
        node = self.made(
            "dataset",
            path,
            source=f"adopted from {data['source']}" if data["captioner"] == "adopted" else data["source"],
            images=f"{manifest['images']:,} of {data['image_size']} px in {data['num_shards']} shards",
            **captioner(data, models["captioner"]),
            VAE=f"{data['vae']} ({models['vae']})",
            text_encoder=f"{data['text_encoder']} ({models['text_encoder']})",
            hash=manifest["hash"],
        )
        for kind in ("adopt", "caption", "latents", "audit"):
            names = {run.folder.name for run in self.known() if run.kind == kind and run.dataset == path}
            if names:
                node.facts[kind] = ", ".join(sorted(names))
        node.pages = {"audit": Path(path) / audit_files.FOLDER / audit_files.PAGE}
        return node


def captioner(data: dict[str, Any], fingerprint: str) -> dict[str, str]:
    """Return the facts about a dataset's captioner: for a model also the instruction, whose hash ends `fingerprint`."""
    from pixart.data.captions.captioner import INSTRUCTION, prompt_hash

    if data["captioner"] == "adopted":
        return {"captioner": f"adopted ({fingerprint})", "instruction": "adopted: the captions name none"}
    if data["captioner"] != "vllm":
        return {"captioner": data["captioner"]}
    own = fingerprint.endswith(f"-{prompt_hash(INSTRUCTION)}")
    said = INSTRUCTION if own else "another version's, by its hash above"
    return {"captioner": f"vllm, {data['caption_model']} ({fingerprint})", "instruction": said}


def in_order(node: Node) -> list[Node]:
    """Return the node and all its ancestors, in topological order with the ancestors first."""
    found: dict[str, Node] = {}

    def add(one: Node) -> None:
        for parent in one.parents:
            add(parent)
        found.setdefault(one.name, one)

    add(node)
    return list(found.values())


def show(node: Node) -> None:
    """Print the lineage as a tree, back in time from top to bottom; paths are not truncated."""
    from rich.console import Console
    from rich.text import Text

    console, shown = Console(highlight=False, soft_wrap=True), set()

    def branch(one: Node, indent: str, begin: str) -> None:
        again = "  (as above)" if one.name in shown else ""
        path = one.name.removesuffix(" (conversion)")
        console.print(Text.assemble(indent, begin, (one.kind, "bold"), f"  {path}{again}"))
        if again:
            return
        shown.add(one.name)
        indent += "    " if begin else ""
        below = "|" if one.parents else " "
        for key, value in one.facts.items():
            console.print(Text(f"{indent}{below}   {key:<13} {value}"))
        for parent in one.parents:
            branch(parent, indent, "+-- ")

    branch(node, "", "")
