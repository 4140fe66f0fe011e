"""Resources that jobs have used, as sacct lists them and as ranks record them."""

import json

import pytest

from slurm import usage
from slurm.usage import FILE, Meter, Usage, parse, parse_clock, parse_size

# Lines of `sacct --parsable2` with the columns of `usage.COLUMNS`, of Slurm 22.05 and 24.11.
SACCT = """12_0|COMPLETED|600|1||20:00|||
12_0.batch|COMPLETED|600|1|1|00:01|9M|cpu=00:00:01,mem=9M|cpu=00:00:01,mem=9M
12_0.0|COMPLETED|590|1|1|19:59|8192M|cpu=00:19:59,gres/gpumem=7G,gres/gpuutil=40|gres/gpumem=9G,gres/gpuutil=98
13|TIMEOUT|7200|2||1-00:00:00|||
13.0|CANCELLED by 0|7200|2|8|1-00:00:00|1.5G||
14|RUNNING|60|1||00:00:00|||
15|CANCELLED by 1000|0|1||00:00:00|||
16|COMPLETED|30|1||00:00:00|||
16.0|COMPLETED|30|1|1|00:00:00|0||
sacct: warning: a line of another form
"""


def test_listing_of_sacct():
    usages = parse(SACCT.splitlines())
    assert usages == {
        "12_0": Usage(
            seconds=600, processors=2.0, memory_bytes=8192 * 2**20, gpu_percent=40, gpu_memory_bytes=9 * 2**30
        ),
        "13": Usage(seconds=7200, processors=86_400 / 7200 / 8, memory_bytes=4 * 1.5 * 2**30),  # four tasks per node
        "16": Usage(seconds=30, processors=None, memory_bytes=None),  # without a plugin that gathers them
    }


def test_clusters_without_accounting(programs):
    programs(sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert usage.accounted(["12_0"]) == {}
    programs(sacct=f"cat <<'END'\n{SACCT}END")
    assert list(usage.accounted(["12_0", "12_1"])) == ["12_0"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", 0), ("00:01.500", 1.5), ("02:03:04", 7384), ("2-00:00:01", 172_801)],
)
def test_clock(text, seconds):
    assert parse_clock(text) == seconds


@pytest.mark.parametrize(("text", "size"), [("", None), ("0", None), ("300K", 307_200), ("1.5G", 1.5 * 2**30)])
def test_size(text, size):
    assert parse_size(text) == size


def test_ranks_record_their_usage(tmp_path):
    """A node's memory is the sum of its ranks; of several attempts, the longest counts."""
    for restart, seconds in ((0, 100.0), (1, 40.0)):
        for rank in range(4):
            line = {"job": "7", "restart": restart, "rank": rank, "node": f"n{rank // 2}", "seconds": seconds + rank}
            line |= {"processor_seconds": 2 * (seconds + rank), "memory_bytes": 1000 * (rank + 1)}
            with (tmp_path / FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"job": "7", "resta')
    assert usage.recorded(tmp_path) == {"7": Usage(seconds=103, processors=2.0, memory_bytes=7000)}
    assert usage.recorded(tmp_path / "nothing") == {}


def test_this_process_is_measured(tmp_path):
    meter = Meter()
    filled = bytearray(200 << 20)
    meter.record(tmp_path, job="1", restart=0, rank=0, node="n1")
    assert len(filled) < usage.recorded(tmp_path)["1"].memory_bytes < 20 * len(filled)


def test_a_full_disk_fails_no_task(tmp_path):
    (tmp_path / FILE).symlink_to("/dev/full")
    Meter().record(tmp_path, job="1", restart=0, rank=0, node="n1")
