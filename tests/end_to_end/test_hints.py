"""Every next command that a command prints is executed verbatim, for two recipes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pixart.data.sources.open import open_source
from pixart.demo.scenes import SHAPES
from tests.support.environment import bare_environment

pytestmark = pytest.mark.slow
NEXT = re.compile(r"^next:? +(python -m .+)$", re.MULTILINE)
STEPS = [f"stage{stage}.{value}" for stage in (1, 2) for value in ("steps=2", "global_batch_size=8", "log_every=1")]
DEMO = [
    *STEPS,
    "model.dim=32",
    "model.cond_dim=32",
    "model.num_heads=2",
    "model.num_blocks=2",
    "data.num_shards=2",
    "data.max_images=48",
    "sample.count=2",
    "sample.steps=1",
]
DEMO += [f"stage{stage}.{value}" for stage in (1, 2) for value in ("validate_every=0", "preview_every=0")]
XL = """
recipe = "xl"
dataset = "my photos dataset"

[data]
source = "photos of shapes"
num_shards = 2
image_size = 64
vae = "demo"
text_encoder = "minilm"
captioner = "labels"
store_text_embeddings = true
max_text_tokens = 32

[audit]
max_duplicates = 1.0
max_same_opening = 1.0

[model]
dim = 32
cond_dim = 32
num_heads = 2
num_blocks = 2
base_latent_size = 8
num_classes = 5

[sample]
steps = 1
count = 2
"""
STAGE = """
[stage{}]
steps = 2
global_batch_size = 8
precision = "fp32"
compile = false
activation_checkpointing = "none"
validate_every = 0
preview_every = 0
num_validation_samples = 0
"""
CHAIN = ["caption", "latents", "audit", "train", "conversion", "train", "sample", "lineage"]


def execute(folder: Path, line: str) -> str:
    """Run a command line in a shell, as it was printed; return what it prints."""
    done = subprocess.run(
        line.replace("python", sys.executable, 1),
        shell=True,
        capture_output=True,
        text=True,
        cwd=folder,
        env=bare_environment(),
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def follow(folder: Path, line: str) -> list[str]:
    """Execute a command line and each one that is printed as the next; return the lines that were printed."""
    followed: list[str] = []
    while printed := NEXT.findall(execute(folder, line)):
        (line,) = printed
        followed.append(line)
    return followed


def names(lines: list[str]) -> list[str]:
    """Return the names of the commands."""
    return [re.split(r"[ .]", line)[2 if " -m conversion" in line else 4] for line in lines]


def write_photos(folder: Path) -> None:
    """Write rendered scenes as an image folder with a subfolder for each shape."""
    for index, scene in enumerate(open_source("demo", max_images=48, image_size=64).read(0, 48)):
        path = folder / SHAPES[scene.label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(scene.data)


@pytest.fixture(scope="module", params=["demo", "xl"])
def followed(request, tmp_path_factory) -> tuple[Path, str, list[str]]:
    """Folder, home and printed commands from a dataset's creation to the lineage of samples."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "demo":
        words = " ".join(f"--set {value}" for value in DEMO)
        return folder, "my home", follow(folder, f"python -m jobs.launch init --home 'my home' {words}")
    (folder / "run.toml").write_text(XL + STAGE.format(1) + STAGE.format(2))
    write_photos(folder / "photos of shapes")
    return folder, "outputs", follow(folder, "python -m jobs.launch init --config run.toml --set stage1.lr=0.001")


def test_the_complete_path_is_printed(followed):
    """The recipe of the second stage is the one of the first, also where the conversion does not know it."""
    folder, home, lines = followed
    assert names(lines) == CHAIN
    stages = [line for line in lines if " train " in line]
    assert [re.search(r"--stage (\d)", line)[1] for line in stages] == ["1", "2"]
    assert len(list((folder / home).glob("runs/*-train-*/checkpoints/step-00000002"))) == 2
    assert all(("--home" in line) == (home == "my home") for line in lines if "conversion" not in line)


def test_commands_for_runs(followed):
    folder, home, _ = followed
    option = "" if home == "outputs" else f" --home '{home}'"
    for run in sorted((folder / home / "runs").iterdir())[-2:]:
        (line,) = NEXT.findall(execute(folder, f"python -m jobs.launch status {run.name}{option}"))
        assert line == f"python -m jobs.launch open {run.name}{option}"
        assert Path(execute(folder, f"{line} --print").strip()).is_file()


def test_altered_captions_are_made_again(followed):
    folder, home, _ = followed
    options = "--config run.toml" if home == "outputs" else f"--home '{home}' --set data.num_shards=2"
    (part,) = folder.rglob("captions/00001.parquet")
    part.write_bytes(b"altered")
    (line,) = NEXT.findall(execute(folder, f"python -m jobs.launch verify {options}"))
    assert line == f"python -m jobs.launch caption {options}"
    (line,) = NEXT.findall(execute(folder, line))
    assert line == f"python -m jobs.launch latents {options}"
    execute(folder, line)


def test_on_a_cluster_the_conversion_is_a_job(followed):
    """With --cluster, the conversion is a job too, and training continues on the cluster."""
    folder, home, _ = followed
    option = f" --home '{home}'" if home != "outputs" else ""
    (checkpoint, *_) = sorted((folder / home).glob("runs/*-train-*/checkpoints/step-00000002"))
    line = f"python -m jobs.launch convert '{checkpoint}' --output again.fp8 --cluster local{option}"
    (line,) = NEXT.findall(execute(folder, line))
    assert line == f"python -m jobs.launch train --stage 2 --from {folder}/again.fp8{option} --cluster local"
    recipe = execute(folder, f"{line} --dry-run")
    assert f'"name": "{"xl" if home == "outputs" else "demo"}"' in recipe
    assert '"steps": 2' in recipe
