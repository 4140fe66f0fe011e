"""The rooms' rules: who may import whom, what the launcher must not load, and no configuration without a reader."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from pixart.config import recipe
from pixart.model.dit import DiT

ROOT = Path(__file__).parents[1]
ROOMS = ("jobs", "pixart", "conversion", "slurm")
ALLOWED = {
    "pixart/model": {"pixart/model"},
    "pixart/html": {"pixart/html"},
    "pixart/data": {"pixart/data", "pixart/demo", "pixart/html", "pixart/config"},
    "pixart/demo": {"pixart/demo"},
    "pixart/training": {
        *("pixart/training", "pixart/model", "pixart/data", "pixart/config"),
        *("pixart/checkpoint", "pixart/sampling"),
    },
    "conversion": {"conversion", "pixart"},
    "slurm": {"slurm"},
    "jobs": {"jobs", "slurm", "pixart", "conversion"},
}
HEAVY = {"torch", "vllm", "diffusers", "transformers", "pixart.data", "pixart.model", "pixart.training"}
HEAVY |= {"conversion.to_fp8", "conversion.calibration.amax"}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_import_directions(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            if name.split(".")[0] in ROOMS:
                target = name.replace(".", "/")
                assert any(target.startswith(allowed) for allowed in ALLOWED[room]), f"{file} imports {name}"


def test_jobs_load_nothing_heavy_at_their_top():
    for file in (ROOT / "jobs").rglob("*.py"):
        for name in imports(file, top_level_only=True):
            assert not any(name == heavy or name.startswith(f"{heavy}.") for heavy in HEAVY), f"{file} imports {name}"


@pytest.mark.parametrize("module", ["pixart.config.recipe", "pixart.recipes", "jobs.launch", "jobs.commands.dispatch"])
def test_the_launcher_never_loads_torch(module):
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


def test_every_knob_has_a_reader():
    files = [
        path
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if "config" not in path.parts and path.stem != "recipes"
    ]
    read = {
        node.attr for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)
    }
    for kind in (
        recipe.ScreeningConfig,
        recipe.DataConfig,
        recipe.AuditConfig,
        recipe.TrainConfig,
        recipe.SampleConfig,
    ):
        for field in dataclasses.fields(kind):
            assert field.name in read, f"{kind.__name__}.{field.name} is never read"
    arguments = set(inspect.signature(DiT.__init__).parameters)
    assert {field.name for field in dataclasses.fields(recipe.ModelConfig)} <= arguments
