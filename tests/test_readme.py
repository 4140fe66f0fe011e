"""The commands, options and configuration keys in README and docs exist, as do the files that they link to."""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from conversion import to_bf16, to_fp8
from jobs import launch
from jobs.commands.options import RecipeOptions
from jobs.commands.registry import ENTRIES
from pixart.config.keys import overrides
from pixart.recipes import DEFAULT_RECIPE, RECIPES
from slurm.devcluster import __main__ as devcluster
from slurm.profile import BY_KIND, JOB_KINDS, Profile

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text() for page in PAGES)
COMMANDS = re.findall(r"^    python -m ([a-z0-9_.]+) ?(.*)$", README, re.MULTILINE)
FOREIGN = {
    "--check",  # of sha256sum
    "--nproc-per-node",
    "--strict",  # of sha256sum
    "--backend-store-uri",
    "--images",
    "--editable",
    "--no-build-isolation",
    "--format",
}  # of torchrun, MLflow, benchmarks.gpu_day, uv and sinfo


@pytest.mark.parametrize("words", [words for module, words in COMMANDS if module == "jobs.launch"])
def test_commands_of_the_launcher(words):
    _, options = launch.parse_command(shlex.split(words, comments=True))
    if isinstance(options, RecipeOptions):
        overrides.apply(RECIPES[options.recipe or DEFAULT_RECIPE]("home"), list(options.overrides))


def test_other_commands_are_modules():
    others = {module for module, _ in COMMANDS} - {"jobs.launch"}
    assert others == {"conversion.to_fp8", "slurm.devcluster", "benchmarks.gpu_day"}
    for module in others:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "check", "attack", "docs"} == set(re.findall(r"\bmake ([a-z]+)(?:`|  )", README)) & set(
        targets
    )


def test_options(capsys):
    """Every option in the documentation is an option of a command, except for the foreign ones."""
    helps = [(launch.main, [name, "--help"]) for name in ENTRIES]
    for main, arguments in (*helps, *((other.main, ["--help"]) for other in (to_fp8, to_bf16, devcluster))):
        with pytest.raises(SystemExit):
            main(arguments)
    existing = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README)) - existing == FOREIGN


def test_keys():
    """Every key in the documentation exists and accepts the value given there, if any."""
    keys = re.findall(r"`(?:--set )?((?:data|stage1|stage2|sample|audit|model)\.[a-z_.]+)(=[^`]*)?`", README)
    assert len(keys) > 10
    for key, value in keys:
        if key == "audit.html":  # a file, not a key
            continue
        value_of_key = RECIPES["demo"]("home")
        for part in key.split("."):
            value_of_key = getattr(value_of_key, part)
        if len(value) > 1:
            overrides.apply(RECIPES["demo"]("home"), [key + value])


def test_every_key_of_a_cluster_profile_is_explained():
    page = (ROOT / "docs/clusters.md").read_text()
    keys = {item.name for item in dataclasses.fields(Profile)} - {"name"}
    explained = set(re.findall(r"`\[?([a-z_]+)\]?`", page.partition("| key | meaning |")[2]))
    assert keys <= explained
    for table, kind in re.findall(r"\[([a-z]+)\] ([a-z]+) =", README):
        assert table in BY_KIND
        assert kind in JOB_KINDS


def test_the_page_on_profiles_has_the_values_of_the_included_one():
    included = tomllib.loads((ROOT / "slurm/profiles/hpg-b200.toml").read_text())
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/profiles.md").read_text(), re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        for key, value in tomllib.loads(block).items():
            assert key in {item.name for item in dataclasses.fields(Profile)}
            if key in included:
                assert (included[key] | value if isinstance(value, dict) else value) == included[key]


def test_every_command_is_in_the_table_of_the_readme():
    table = (ROOT / "README.md").read_text().partition("| purpose | commands |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z-]+)`", table)) == set(ENTRIES)


def test_links_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
