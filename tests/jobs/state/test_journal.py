"""The journal of a run: only complete lines are read, wherever its writers are killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.state.journal import Journal, points, read_journal, read_tail, summarized
from tests.support import reporting_tasks

ROOT = Path(__file__).parents[3]


def steps(run: Path) -> list[int]:
    """Return the steps of all lines in the journal of a run."""
    return [line["step"] for line in read_journal(run)[0]]


def test_line_truncated_by_a_kill_is_skipped(tmp_path):
    """A partial line is skipped while it is being written and after the next attempt has opened its journal."""
    for name in (None, "shared"):
        run = tmp_path / str(name)
        journal = Journal(run, name)
        journal.metrics(1, {"a": 1.0})
        assert journal.file
        journal.file.write(b'{"step": 2, "metr')
        lines, ends = read_journal(run)
        assert [line["step"] for line in lines] == [1]
        Journal(run, name).metrics(2, {"a": 2.0})
        assert [line["step"] for line in read_journal(run, ends)[0]] == [2]
        assert steps(run) == [1, 2]


def test_line_truncated_at_every_byte(tmp_path):
    """A partial line is never read, whichever part of it remains after a crash of the node."""
    line = b'{"time": 17.5, "step": 3, "metrics": {"a": 1.5}}\n'
    complete = b'{"time": 18.5, "step": 4, "metrics": {"a": 2.5}}\n'
    for cut in range(len(line)):
        run = tmp_path / str(cut)
        (run / "journal").mkdir(parents=True)
        (run / "journal/1.jsonl").write_bytes(complete + line[:cut])
        (run / "journal/2.jsonl").write_bytes(line[cut:] + b"\0" * 7 + b"\n" + complete)
        read = list(points(read_journal(run)[0], set()))
        assert read == [("a", 2.5, 18.5, 4)] if cut else [("a", 2.5, 18.5, 4), ("a", 1.5, 17.5, 3)]


def test_lines_are_read_between_two_ends(tmp_path):
    journal = Journal(tmp_path)
    journal.metrics(1, {"a": 1.0})
    _, first = read_journal(tmp_path)
    journal.metrics(2, {"a": 2.0})
    Journal(tmp_path).metrics(3, {"a": 3.0})
    _, second = read_journal(tmp_path)
    journal.metrics(4, {"a": 4.0})
    lines, ends = read_journal(tmp_path, first, second)
    assert ([line["step"] for line in lines], ends) == ([2, 3], second)
    assert [line["step"] for line in read_tail(tmp_path)] == [1, 2, 4, 3]


def test_fp8_metrics_are_summarized_by_their_extremes():
    """Headroom is critical where it is low, saturation where it is high."""
    names = [f"dit_blocks.{block}.mlp.linear1.input" for block in range(3)]
    metrics = {
        f"fp8/{description}/{name}": float(value)
        for description in ("headroom", "scale")
        for value, name in enumerate(names)
    }
    assert summarized({"train/loss": 0.5, **metrics, "fp8/saturation_rate/a.grad_output": 0.25}) == {
        "train/loss": 0.5,
        "fp8/headroom/input_min": 0.0,
        "fp8/scale/input_min": 0.0,
        "fp8/scale/input_max": 2.0,
        "fp8/saturation_rate/grad_output_max": 0.25,
    }


def test_metrics_of_earlier_runs_have_their_current_names_and_units():
    earlier = {
        "fp8/overflow_share/a.input": 0.5,
        "train/data_wait": 0.1,
        "data/valid": 7.0,
        "system/memory_gb_node12": 2**30 / 1e9,
        "system/ram_gb_node0": 2.0,
        "system/load_node0": 3.0,
    }
    assert summarized(earlier) == {
        "fp8/saturation_rate/input_max": 0.5,
        "train/data_loading_fraction": 0.1,
        "data/num_valid": 7.0,
        "system/node_12/max_memory_allocated_gib": pytest.approx(1.0),
        "system/node_0/system_memory_usage_megabytes": 2000.0,
        "system/node_0/load_average_1m": 3.0,
    }


@pytest.mark.slow
def test_256_tasks_at_once_of_which_50_are_killed(tmp_path):
    """Every point is read exactly once, as in a run without kills."""
    words = [sys.executable, "-m", "tests.support.reporting_tasks", str(tmp_path), "256", "20", "50"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "256 tasks done, 50 kills\n"), done.stderr
    read = {(key, step): value for key, value, _, step in points(read_journal(tmp_path)[0], set())}
    assert read == reporting_tasks.expected(256, 20)
    assert len(list(points(read_journal(tmp_path)[0], set()))) == len(read)
