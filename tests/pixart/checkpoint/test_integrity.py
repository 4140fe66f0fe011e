"""Checksums of checkpoints: their arithmetic, and that no altered file of a checkpoint or of its exports is read."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest
import torch

from conversion import to_bf16
from conversion.export.writers import EXPORTS
from conversion.reading import formats
from jobs.state.checkpoint_names import checkpoint_record
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.integrity import crc32c_of_concatenation, length_and_crc32c
from pixart.checkpoint.normalization import Normalization
from pixart.checkpoint.safetensors_stream import BUFFER, save_tensors
from pixart.model.dit import DiT
from pixart.model.fp8.plan import Plan
from pixart.sampling import loading

SIZES = {"in_dim": 4, "dim": 32, "cond_dim": 16, "num_heads": 2, "num_blocks": 1, "base_image_size": 8, "text_dim": 48}
LINEAR = "dit_blocks.0.mlp.linear1"


@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (5, 0), (1, 1), (1000, 7), (3, 100_003)])
def test_the_checksum_of_a_concatenation_needs_no_data(lengths):
    generator = random.Random(sum(lengths))
    first, second = (generator.randbytes(length) for length in lengths)
    combined = crc32c_of_concatenation(google_crc32c.value(first), google_crc32c.value(second), len(second))
    assert combined == google_crc32c.value(first + second)


def test_the_writer_returns_the_checksum_of_the_file(tmp_path):
    state = {"large": torch.arange(BUFFER // 4 + 999, dtype=torch.float32), "small": torch.ones(3)}
    assert save_tensors(state, tmp_path / "file") == length_and_crc32c(tmp_path / "file")
    assert save_tensors({}, tmp_path / "empty") == length_and_crc32c(tmp_path / "empty")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """Path of a checkpoint as a conversion writes it, with all exports."""
    torch.manual_seed(0)
    state = DiT(**SIZES).state_dict()
    moments = {f"{name}.{key}": torch.rand_like(value) for name, value in state.items() for key in ("exp_avg",)}
    scales = {f"{LINEAR}.scale": torch.tensor([50.0, 1.0, 1.0]), f"{LINEAR}.amax_history": torch.ones(3, 16)}
    checkpoint = Checkpoint(
        stage=2,
        step=7,
        config=SIZES,
        normalization=Normalization(mean=(0.0,) * 4, std=(1.0,) * 4),
        model=state,
        ema=state,
        optimizer=moments,
        plan=Plan(linears=(LINEAR,)),
        scales=scales,
    )
    directory = tmp_path_factory.mktemp("converted") / "step.fp8"
    with checkpoints.atomic_directory(directory) as partial:
        checksums = checkpoints.write_state(checkpoint, partial)
        for export in EXPORTS.values():
            export(checkpoint, partial)
        checkpoints.write_metadata(checkpoint, partial, checksums)
    return directory


def flip(position: float) -> Callable[[Path], None]:
    """Return a function that flips one bit of a file at a fraction of its length."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(position * (len(content) - 1))] ^= 0x10
        file.write_bytes(content)

    return damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])  # more than a final newline


def zero(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-64] + bytes(64) if len(content) > 64 else bytes(len(content)))


DAMAGES = [*(flip(position) for position in (0.0, 0.2, 0.5, 0.8, 1.0)), truncate, zero, Path.unlink]


def test_no_damage_of_any_file_is_read(converted, tmp_path):
    """Every damage is refused by the reader of the file's folder, and the launcher refuses an altered record."""
    files = [path.relative_to(converted) for path in sorted(converted.rglob("*")) if path.is_file()]
    copy, accepted, tried = tmp_path / "copy", [], 0
    for name in files:
        for damage in DAMAGES:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(converted, copy)
            damage(copy / name)
            if (copy / name).exists() and (copy / name).read_bytes() == (converted / name).read_bytes():
                continue
            tried += 1
            reads_inference = name.parts[0] == "inference"
            try:
                if reads_inference and (copy / "inference" / loading.INFERENCE_FILE).exists():
                    loading.load(copy / "inference")
                elif not reads_inference:
                    checkpoints.load(copy)
                else:
                    continue  # without its record the folder is not one of FP8 weights
                accepted.append((str(name), damage))
            except ValueError:
                pass
    assert not accepted
    assert tried > 80


def test_the_launcher_refuses_an_altered_record(converted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    marker = copy / checkpoints.MARKER
    marker.write_text(marker.read_text().replace('"step": 7', '"step": 8'))
    for read in (checkpoint_record, checkpoints.read_metadata, checkpoints.load):
        with pytest.raises(ValueError, match=r"training.json: was edited or is damaged"):
            read(copy)


@pytest.mark.parametrize(
    "name", ["transformer/config.json", "ema/diffusion_pytorch_model.safetensors", "fp8.safetensors"]
)
@pytest.mark.parametrize("damage", [flip(0.5), truncate, Path.unlink])
def test_the_conversion_to_bf16_refuses_the_files_that_load_refuses(converted, tmp_path, name, damage):
    copy, output = tmp_path / "copy.fp8", tmp_path / "output"
    shutil.copytree(converted, copy)
    damage(copy / name)
    assert to_bf16.main([str(copy), "--output", str(output)]) == 2
    assert not output.exists()


@pytest.mark.parametrize("part", ["transformer", "ema", f"ema/{checkpoints.WEIGHTS}"])
def test_a_damaged_part_of_a_checkpoint_is_refused(converted, tmp_path, part):
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    assert formats.read(copy / part, base_latent_size=8).stage == 2
    flip(0.9)(copy / part if (copy / part).is_file() else copy / part / checkpoints.WEIGHTS)
    with pytest.raises(ValueError, match=r"missing, damaged or truncated; use another checkpoint"):
        formats.read(copy / part, base_latent_size=8)


def test_weights_in_fp8_are_not_read_without_their_scales(converted):
    with pytest.raises(ValueError, match=r"has dtype torch.float8_e4m3fn, whose scale is not known; give a folder"):
        formats.read(converted / "inference" / checkpoints.WEIGHTS, base_latent_size=8, ignore_unknown=True)


def test_a_folder_that_the_metadata_does_not_list_is_not_read(converted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    (copy / "state").mkdir()
    (copy / "state" / ".metadata").write_bytes(b"damaged")
    assert checkpoints.load(copy).model.keys() == checkpoints.load(converted).model.keys()


@pytest.mark.parametrize("key", ["files", "sha256"])
def test_no_damaged_key_turns_checksums_off(converted, tmp_path, key):
    copy = tmp_path / "copy"
    shutil.copytree(converted / "inference", copy)
    record = copy / loading.INFERENCE_FILE
    record.write_text(record.read_text().replace(f'"{key}": ', f'"{key[:-1]}z": '))
    with pytest.raises(ValueError, match=r"inference.json: was edited or is damaged"):
        loading.load(copy)


def test_a_checkpoint_of_version_0_1_is_read(converted, tmp_path):
    """Its metadata has no checksum, and those of a converted one have no files."""
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    metadata = json.loads((copy / checkpoints.MARKER).read_text())
    metadata = {key: value for key, value in metadata.items() if key != "sha256"}
    (copy / checkpoints.MARKER).write_text(json.dumps({**metadata, "format": 1, "files": {}}))
    assert checkpoints.load(copy).step == checkpoint_record(copy)["step"] == 7
