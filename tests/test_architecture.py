"""Rules that import-linter does not check: imports of the launcher, crowded folders, unused configuration."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pixart.config.dataset import AuditConfig, DataConfig, ScreeningConfig
from pixart.config.model import ModelConfig
from pixart.config.sampling import SampleConfig
from pixart.config.training import TrainConfig
from pixart.model.dit import DiT

ROOT = Path(__file__).parents[1]
ROOMS = ("jobs", "pixart", "conversion", "slurm")
MOST_MODULES = 13  # per folder
HEAVY = {"torch", "vllm", "diffusers", "transformers", "conversion.convert", "conversion.calibration.amax"}
HEAVY |= {f"pixart.{name}" for name in ("checkpoint", "data", "demo", "model", "sampling", "training")}
LOAD_COMMANDS = "from jobs.commands import registry\nfor name in registry.ENTRIES: registry.load(name)"


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Return the names that a module imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_folders_have_at_most_thirteen_modules(room):
    modules = [path for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"]
    assert modules
    for folder, count in Counter(path.parent for path in modules).items():
        assert count <= MOST_MODULES, f"{folder} has {count} modules"


def test_the_documented_folders_are_those_that_exist():
    """The table of docs/architecture.md names every folder with its number of modules."""
    table = re.findall(r"^\| `([\w/]+)` \| (\d+) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    modules = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"]
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in modules)
    assert {folder: int(count) for folder, count in table} == counts


def test_jobs_load_nothing_heavy_at_their_top():
    for file in (ROOT / "jobs").rglob("*.py"):
        for name in imports(file, top_level_only=True):
            assert not any(name == heavy or name.startswith(f"{heavy}.") for heavy in HEAVY), f"{file} imports {name}"


@pytest.mark.parametrize(
    "imports", ["import pixart.config.keys.overrides, pixart.recipes", "import jobs.launch", LOAD_COMMANDS]
)
def test_the_launcher_never_loads_torch(imports):
    code = f"import sys\n{imports}\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.stdout == "[]\n", process.stderr


def test_every_knob_has_a_reader():
    files = [
        path
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if "config" not in path.relative_to(ROOT).parts and path.stem != "recipes"
    ]
    read = {
        node.attr for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)
    }
    for kind in (
        ScreeningConfig,
        DataConfig,
        AuditConfig,
        TrainConfig,
        SampleConfig,
    ):
        for field in dataclasses.fields(kind):
            assert field.name in read, f"{kind.__name__}.{field.name} is never read"
    arguments = set(inspect.signature(DiT.__init__).parameters)
    assert ModelConfig().dit_arguments().keys() <= arguments
