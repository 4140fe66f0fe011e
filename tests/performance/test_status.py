"""The status of a run with many shards appears quickly."""

import json
import time

from jobs.commands.runs import status
from jobs.state import ledger
from tests.jobs.state.test_run import make_run


def test_ten_thousand_shards_in_two_seconds(tmp_path, capsys):
    shards = 10_000
    run = make_run(tmp_path, jobs=[(f"5_{shard}", (shard,)) for shard in range(shards)], shards=shards)
    folder = ledger.path(run.dataset, "caption", 0).parent
    folder.mkdir(parents=True)
    for shard in range(0, shards, 2):
        (folder / f"{shard:05d}.json").write_text(json.dumps({}))
    begun = time.perf_counter()
    status.run(status.Options(home=str(tmp_path), run=None))
    assert time.perf_counter() - begun < 2
    assert "5000" in capsys.readouterr().out
