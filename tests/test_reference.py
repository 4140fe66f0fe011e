"""The pages of docs/reference are current, and what they say by hand agrees with the code in both directions."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conversion import to_bf16, to_fp8
from jobs import launch
from jobs.commands.registry import ENTRIES
from jobs.tracking import node_agent
from pixart.config.keys.fields import fields_by_key
from slurm.devcluster import __main__ as devcluster
from slurm.task import TERMINATED_EXIT_CODE
from tests.support.documentation import facts, reference

ROOT = Path(__file__).parents[1]
PACKAGES = ("jobs", "conversion", "pixart", "slurm")
METRIC_GROUPS = ("train", "val", "fp8", "data", "conversion", "sample", "eval", "serve", "system")
# Modules that write metrics or describe them; the others read them.
METRIC_WRITERS = (
    *("pixart/training/metrics.py", "pixart/training/validation.py", "jobs/tracking/sync.py", "jobs/tasks/audit.py"),
    *("jobs/tasks/convert.py", "jobs/tasks/sample.py", "jobs/tasks/serve.py", "jobs/tracking/node_agent.py"),
)


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the strings of a module, those with fields with FIELD in the place of each."""
    nodes = list(ast.walk(tree))
    inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "FIELD" for part in node.values)


def is_documented_metric(name: str) -> bool:
    return any(re.fullmatch(re.sub("[A-Z]{2,}", ".+", pattern), name) for pattern, _, _ in facts.METRICS)


def is_documented_file(name: str) -> bool:
    return name.startswith(".") or any(Path(name).match(pattern) for pattern, _, _ in facts.RUN_FILES)


@pytest.mark.parametrize(("name", "text"), reference.pages().items(), ids=lambda value: str(value)[:20].strip("<!- "))
def test_generated_pages_are_current(name, text):
    assert (reference.FOLDER / name).read_text() == text, "run `make docs`"


def test_every_page_of_the_reference_is_generated():
    assert {path.name for path in reference.FOLDER.iterdir()} == set(reference.pages())


def test_every_option_is_documented(capsys):
    programs = [(launch.main, [name, "--help"]) for name in ENTRIES]
    programs += [(other.main, ["--help"]) for other in (to_fp8, to_bf16, devcluster)]
    for main, arguments in programs:
        with pytest.raises(SystemExit):
            main(arguments)
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", capsys.readouterr().out))
    page = (reference.FOLDER / "commands.md").read_text()
    assert len(options) > 80
    assert {option for option in options if not re.search(rf"^\| `(?:-\w, )?{option}[ `]", page, re.MULTILINE)} == set()


def test_every_key_is_documented():
    page = (reference.FOLDER / "configuration.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| [^`|]+ \| `[^|]*` \| `[^|]*` \| [A-Z].+\. \|$", page, re.MULTILINE)
    assert sorted(rows) == sorted(fields_by_key())


def test_exit_codes_are_those_of_the_code():
    def returned(path: Path, functions: set[str]) -> set[int]:
        codes = set()
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name in functions:
                for node in ast.walk(function):
                    fails = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fail"
                    if fails or isinstance(node, ast.Return):
                        places = node.args if isinstance(node, ast.Call) else [node.value]
                        codes |= {code for place in places if place for code in integers(place)}
        return codes

    def integers(place: ast.expr) -> set[int]:
        ends = [place.body, place.orelse] if isinstance(place, ast.IfExp) else [place]
        return {end.value for end in ends if isinstance(end, ast.Constant) and type(end.value) is int}

    launcher = returned(ROOT / "jobs/launch.py", {"main", "run"})
    for path in (ROOT / "jobs/commands").rglob("*.py"):
        launcher |= returned(path, {"run"})
    assert set(facts.EXIT_CODES["jobs.launch"]) == launcher
    assert set(facts.EXIT_CODES["conversion.to_fp8"]) == returned(ROOT / "conversion/to_fp8.py", {"main"})
    assert set(facts.EXIT_CODES["conversion.to_bf16"]) == returned(ROOT / "conversion/to_bf16.py", {"main"})
    assert set(facts.EXIT_CODES["slurm.devcluster"]) == returned(ROOT / "slurm/devcluster/__main__.py", {"main"})
    assert set(facts.EXIT_CODES["a task on a node"]) == {TERMINATED_EXIT_CODE}


def test_every_variable_is_documented_and_exists():
    strings = {text for _, tree in sources() for text in texts(tree)}
    strings |= {path.read_text() for path in (ROOT / "slurm/profiles").glob("*.toml")}
    strings.add((ROOT / "Makefile").read_text())
    names = {name for text in strings for name in re.findall(r"\bPIXART_[A-Z_]+\b", text)}
    assert names == set(facts.ENVIRONMENT)
    for name in facts.FOREIGN_ENVIRONMENT:
        assert any(name in text for text in strings), name


def test_documented_files_of_a_run_are_names_in_the_code():
    names = {text for _, tree in sources() for text in texts(tree)}
    for pattern, _, _ in facts.RUN_FILES:
        name = pattern.replace("*", "FIELD")
        assert name in names or any(text.startswith(f"{name}/") for text in names), pattern


def test_every_metric_in_the_code_is_documented():
    places = 0
    for path in METRIC_WRITERS:
        for text in texts(ast.parse((ROOT / path).read_text())):
            if re.fullmatch(rf"(?:{'|'.join(METRIC_GROUPS)})/[\w./]+[\w.]", text):
                places += 1
                written = re.compile(re.escape(text).replace("FIELD", ".+"))
                assert any(written.fullmatch(name) for name, _, _ in facts.METRICS), f"{path}: {text}"
    assert places > 25


def test_every_metric_of_a_node_is_documented(tmp_path):
    for name in node_agent.node_metrics(tmp_path, (0, 0), (1, 2)):
        assert any(pattern == f"system/node_NODE/{name}" for pattern, _, _ in facts.METRICS), name


def test_every_documented_metric_is_in_the_code():
    names = {text for _, tree in sources() for text in texts(tree)}
    for pattern, _, _ in facts.METRICS:
        last = re.sub("[A-Z]{2,}", "FIELD", pattern.rpartition("/")[2])
        assert pattern.startswith("eval/") or any(name.endswith(last) for name in names), pattern


@pytest.mark.slow
def test_the_demo_writes_documented_files_and_metrics(small_demo):
    from jobs.state.journal import read_journal

    folders = [path.parent for path in small_demo.home.glob("runs/*/tracking.json")]
    assert len(folders) > 5
    for folder in folders:
        assert [path.name for path in folder.iterdir() if not is_documented_file(path.name)] == []
        metrics = {name for line in read_journal(folder)[0] for name in line.get("metrics", {})}
        assert [name for name in metrics if not is_documented_metric(name)] == []
