"""Hostile names of folders, files, runs, checkpoints, datasets and options on the command line."""

import pytest

from jobs.commands import registry
from tests.attack.campaign import campaign
from tests.attack.hostile import ESCAPES, INJECTIONS, MARKER, PATHS

NAMES = tuple(text for text in (*PATHS, *INJECTIONS, *ESCAPES) if "\0" not in text)  # no argument of a program has one
DRY = ["--dry-run"]
PLACES = {
    "home": lambda text: ["runs", "--home", text],
    "status": lambda text: ["status", text],
    "logs": lambda text: ["logs", text],
    "lineage": lambda text: ["lineage", text],
    "retry": lambda text: ["retry", text, *DRY],
    "open": lambda text: ["open", "--print", text],
    "train --from": lambda text: ["train", "--from", text, *DRY],
    "train --resume": lambda text: ["train", "--resume", text, *DRY],
    "train --dataset": lambda text: ["train", "--dataset", text, *DRY],
    "latents --dataset": lambda text: ["latents", "--dataset", text, *DRY],
    "audit --dataset": lambda text: ["audit", "--dataset", text, *DRY],
    "adopt": lambda text: ["adopt", text, *DRY],
    "sample": lambda text: ["sample", text, *DRY],
    "sample --file": lambda text: ["sample", "nowhere", "--file", text, *DRY],
    "convert": lambda text: ["convert", text, *DRY],
    "evaluate": lambda text: ["evaluate", text, *DRY],
    "compare": lambda text: ["compare", text, text],
    "cluster": lambda text: ["train", "--cluster", text, *DRY],
    "config file": lambda text: ["config", "--config", text],
    "recipe": lambda text: ["config", "--recipe", text],
    "array": lambda text: ["caption", "--array", text, *DRY],
    "nodes": lambda text: ["train", "--nodes", text, *DRY],
    "command": lambda text: [text],
    "option": lambda text: ["train", f"--{text}"],
    "source": lambda text: ["caption", "--set", f"data.source={text}", *DRY],
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PIXART_CLUSTER", "local")
    monkeypatch.setenv("PIXART_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_hostile_names_are_refused_in_one_line(record_property, tmp_path):
    """Nothing is written for a refused or a dry command, and nothing runs."""
    attack = campaign("names and paths", short=500, long=len(PLACES) * len(NAMES))
    assert "train" in registry.ENTRIES
    cases = [(place, text) for place in PLACES for text in NAMES]
    attack.generator.shuffle(cases)
    for place, text in cases[: attack.tries]:
        attack.command(place, PLACES[place](text))
        if left := [path.name for path in tmp_path.iterdir()]:
            attack.wrong(f"{place}: {text!r}", f"{left} were written")
            break
    assert not (tmp_path / MARKER).exists()
    attack.finish(record_property)
