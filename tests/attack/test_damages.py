"""A converted checkpoint, its exports and an exported pipeline with one damage each: no reader uses altered values.

Every reader is tried on every damage. It has to refuse it, or to return what it returns without the damage, which is so
where it does not read the damaged file.
"""

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from conversion.convert import convert
from conversion.options import Options
from conversion.reading import formats
from conversion.to_bf16 import restore
from jobs.tasks import sample
from jobs.tracking import model_registry
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.recipes import demo
from pixart.sampling.model_card import CHECKSUMS
from pixart.training.checkpointing import verify
from pixart.training.process_group import Ranks
from tests.attack.campaign import campaign
from tests.jobs.tasks.test_sample import checkpoint_of

ALONE = Ranks(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
State = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two converted checkpoints of the same shapes, `a` and `b`, and a pipeline exported from `a`."""
    folder = tmp_path_factory.mktemp("artefacts")
    recipe = demo(str(folder))
    recipe = replace(recipe, data=replace(recipe.data, path=""))
    options = Options(
        num_batches=1, batch_size=2, text_dim=48, exports=("transformer-engine", "torchao", "inference"), overwrite=True
    )
    for number, name in enumerate("ab"):
        source = replace(checkpoint_of(recipe, 1), dataset=None, step=number)
        source.ema = {key: tensor + number * 1e-3 for key, tensor in source.ema.items()}
        source.optimizer = {f"{key}.exp_avg": tensor * (number + 1) for key, tensor in source.model.items()}
        checkpoints.save(source, folder / f"{name}.stage1")
        convert(folder / f"{name}.stage1", folder / name, options)
    model, record = sample.load_weights(folder / "a.stage1", "ema", None)
    pipeline, sources = sample.open_pipeline(model, record, recipe, folder / "a.stage1", export=True)
    provenance = {**sample.origin(folder, 1, record, folder / "a.stage1", "ema"), **sources}
    sample.write_export(pipeline, folder / "pipeline", provenance, recipe, folder)
    return folder


def tensors_of(checkpoint: Checkpoint) -> dict[str, State]:
    return {group: dict(state) for group, state in checkpoint.tensors().items()}


def read_by_training(folder: Path) -> Any:
    verify(folder / "a", ALONE)
    return tensors_of(checkpoints.load(folder / "a", verify=False)), checkpoints.read_metadata(folder / "a")


def read_by_conversion(folder: Path) -> Any:
    return tensors_of(formats.read(folder / "a", base_latent_size=None))


def read_by_to_bf16(folder: Path) -> Any:
    with TemporaryDirectory() as output:
        restore(folder / "a", Path(output, "bf16"))
        return digest(tensors_of(checkpoints.load(Path(output, "bf16"))))


def read_by_release(folder: Path) -> Any:
    with TemporaryDirectory() as output:
        model_registry.export(folder / "a", Path(output, "ema"))
        return Path(output, "ema", checkpoints.WEIGHTS).read_bytes()


def read_by_sample(name: str) -> Callable[[Path], Any]:
    """Return a reader of weights to sample from or to export, by their path in the folder."""

    def read(folder: Path) -> Any:
        latent_size = 8 if name.startswith("a/") and not name.endswith("inference") else None
        model, record = sample.load_weights(folder / name, "ema", latent_size)
        return model.state_dict(), {key: record[key] for key in ("stage", "step", "normalization")}

    return read


def read_with_sha256sum(folder: Path) -> Any:
    """Check a pipeline as its model card says; diffusers' own reader has no checksums."""
    done = subprocess.run(["sha256sum", "--check", "--strict", "--status", CHECKSUMS], cwd=folder / "pipeline")
    if done.returncode:
        raise ValueError("refused by sha256sum")
    return {str(path): path.read_bytes() for path in (folder / "pipeline").rglob("*") if path.is_file()}


READERS: dict[str, Callable[[Path], Any]] = {
    "train": read_by_training,
    "to_fp8": read_by_conversion,
    "to_bf16": read_by_to_bf16,
    "release": read_by_release,
    "sample": read_by_sample("a"),
    "sample inference": read_by_sample("a/inference"),
    "sample transformer": read_by_sample("a/transformer"),
    "sample ema": read_by_sample("a/ema"),
    "sha256sum": read_with_sha256sum,
}
# The reader that has to refuse a damaged file, by the start of its path; of a checkpoint's other files, all of these.
GUARDS = {"a/inference": ("sample inference",), "pipeline": ("sha256sum",)}
CHECKPOINT_GUARDS = ("train", "to_fp8", "to_bf16", "release", "sample")


def digest(value: Any) -> str:
    """Return the SHA-256 of tensors and records in containers."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + data).hexdigest()
    if isinstance(value, Mapping):
        return digest([(key, digest(value[key])) for key in sorted(value)])
    return hashlib.sha256(
        repr([digest(item) for item in value] if isinstance(value, tuple) else value).encode()
    ).hexdigest()


def flip(generator: random.Random, file: Path) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


def payload_start(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def flip_exponent(generator: random.Random, file: Path) -> None:
    """Flip a high bit of a number in a safetensors file, or a bit of another file."""
    content = bytearray(file.read_bytes())
    start, width = (payload_start(content), 4) if file.suffix == ".safetensors" else (0, 1)
    content[start + width * generator.randrange((len(content) - start) // width) + width - 1] ^= (
        1 << generator.randrange(7)
    )
    file.write_bytes(content)


def zero(generator: random.Random, file: Path) -> None:
    """Zero the tensors of a safetensors file, or the whole of another file."""
    content = file.read_bytes()
    start = payload_start(content) if file.suffix == ".safetensors" else 0
    file.write_bytes(content[:start] + bytes(len(content) - start))


def truncate(generator: random.Random, file: Path) -> None:
    """Cut off more than a final newline."""
    os.truncate(file, generator.randrange(max(file.stat().st_size - 1, 1)))


def append(generator: random.Random, file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(generator.randbytes(generator.randrange(1, 5000)))


def remove(generator: random.Random, file: Path) -> None:
    """Remove a file, or in a third of the cases its whole folder."""
    if generator.randrange(3) or file.parent.name in ("a", "pipeline"):
        file.unlink()
    else:
        shutil.rmtree(file.parent)


def exchange(generator: random.Random, file: Path) -> None:
    """Put the same file of the other checkpoint in its place, of a pipeline one of its other files."""
    other = Path(*("b" if part == "a" else part for part in file.parts))
    file.write_bytes((other if other != file else generator.choice(files_below(file.parent))).read_bytes())


def swap(generator: random.Random, file: Path) -> None:
    """Exchange two files of a folder's tree, of the same kind where there are two."""
    root = next(parent for parent in file.parents if parent.name in ("a", "pipeline"))
    same = [path for path in files_below(root) if path.suffix == file.suffix and path != file]
    other = generator.choice(same or [path for path in files_below(root) if path != file])
    content = file.read_bytes()
    shutil.copyfile(other, file)
    other.write_bytes(content)


DAMAGES = (flip, flip_exponent, zero, truncate, append, remove, exchange, swap)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files that are damaged, by their paths in the folder."""
    files = [*files_below(folder / "a"), *files_below(folder / "pipeline")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_reader_uses_damaged_files(artefacts, tmp_path, capfd, record_property):
    attack = campaign("damages of checkpoints", short=140, long=1000)
    intact, work = contents(artefacts), tmp_path / "work"
    expected = {name: digest(reader(artefacts)) for name, reader in READERS.items()}
    altered = 0
    for number in range(attack.tries):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(artefacts, work)
        damage = DAMAGES[number % len(DAMAGES)]
        name = attack.generator.choice(sorted(intact))
        damage(attack.generator, work / name)
        damaged = contents(work)
        changed = {key for key in intact if damaged.get(key) != intact[key]}
        if not changed:
            continue
        altered += 1
        guards = {guard for key in changed for guard in guards_of(key)}
        for reader, read in READERS.items():
            if (reader == "sha256sum") != name.startswith("pipeline"):
                continue
            label = f"{damage.__name__} of {', '.join(sorted(changed))}, by {reader}"
            value = attack.attempt(label, lambda read=read: (read(work),))
            if value is not None and reader in guards:
                attack.wrong(label, "read instead of refused")
            elif value is not None and digest(value[0]) != expected[reader]:
                attack.wrong(label, "other values were read")
    print(f"{altered} damages")
    assert altered >= min(attack.tries, 110)
    attack.finish(record_property)


def guards_of(name: str) -> tuple[str, ...]:
    """Return the readers that have to refuse a damage of a file."""
    return next((readers for start, readers in GUARDS.items() if name.startswith(start)), CHECKPOINT_GUARDS)
