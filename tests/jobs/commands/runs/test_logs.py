"""The logs of a run: of one rank, with errors before the output."""

import pytest

from jobs import launch
from jobs.state.run import Run


@pytest.fixture
def run(tmp_path) -> Run:
    """Run of three ranks with an output and an error log each."""
    folder = tmp_path / "runs/20260101-000000-train-abcd"
    (folder / "logs").mkdir(parents=True)
    run = Run(
        folder=folder,
        kind="train",
        executor="local",
        dataset="",
        total=2,
        nodes=1,
        ranks_per_node=3,
        jobs=(("7", ()),),
    )
    run.save()
    for rank in range(3):
        for stream in ("out", "err"):
            run.log("7", rank, stream).write_text(f"{stream} of rank {rank}\n")
    return run


def test_logs_of_one_rank(run, capsys):
    words = ["logs", str(run.folder), "--home", str(run.folder.parents[1])]
    assert launch.main([*words, "--rank", "1"]) == 0
    heads = [f"==> {run.log('7', 1, stream)} <==" for stream in ("err", "out")]
    assert capsys.readouterr().out.splitlines() == [heads[0], "err of rank 1", heads[1], "out of rank 1"]
    assert launch.main(words) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("==>")]
    assert printed == [f"{stream} of rank {rank}" for stream in ("err", "out") for rank in range(3)]
    assert launch.main([*words, "--rank", "3"]) == 2
    assert "has the ranks 0 to 2" in capsys.readouterr().err
