import pytest

from slurm import limits
from slurm.limits import Partition, parse_minutes


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("infinite", None), ("1-00:00:00", 1440), ("2-12:30:00", 3630), ("4:00:00", 240), ("30:00", 30)],
)
def test_time_limits(text: str, minutes: int | None):
    assert parse_minutes(text) == minutes


def test_the_most_generous_limits_of_several_partitions(programs):
    listing = """main*|2:00:00|n1|gpu:b200:8(S:0)
main*|2:00:00|n2|gpu:b200:8
urgent|1-00:00:00|n1|(null)
secret|infinite|n3|gpu:4
"""
    programs(sinfo=f"[ \"$2\" = --all ] && cat <<'END'\n{listing}END")
    assert limits.partition(None) == Partition(minutes=120, nodes=2, gpus_per_node=8)
    assert limits.partition("main,urgent") == Partition(minutes=1440, nodes=2, gpus_per_node=8)
    assert limits.partition("secret") == Partition(minutes=None, nodes=1, gpus_per_node=4)
    with pytest.raises(ValueError, match="partition 'nowhere': no such partition"):
        limits.partition("main,nowhere")
