"""The status of a run of many shards appears at once."""

import json
import time

from jobs.commands import runs as status
from jobs.state import ledger
from tests.jobs.state.test_run import make_run, options


def test_ten_thousand_shards_in_two_seconds(tmp_path, capsys):
    shards = 10_000
    run = make_run(tmp_path, jobs=[(f"5_{shard}", (shard,)) for shard in range(shards)], shards=shards)
    folder = ledger.path(run.dataset, "caption", 0).parent
    folder.mkdir(parents=True)
    for shard in range(0, shards, 2):
        (folder / f"{shard:05d}.json").write_text(json.dumps({}))
    begun = time.perf_counter()
    status.status_command(tmp_path, options())
    assert time.perf_counter() - begun < 2
    assert "5000" in capsys.readouterr().out
