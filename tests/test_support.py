"""Tools of the tests: the distribution over workers, and the table of recovery times."""

import pytest

from tests.support.distribution import COLLECTED, distribute, group
from tests.support.recovery_times import RECOVERY, table


def test_table_of_recovery_times():
    """Rows are in the order of the faults; a job whose test has not passed has no time."""
    times = [(RECOVERY, ("requeue", "train", 12.6)), ("other", 1), (RECOVERY, ("requeue", "caption", 9.2))]
    assert table([*times, (RECOVERY, ("cancel", "train", 101.0))]) == [
        "fault                    caption       train",
        "requeue                      9 s        13 s",
        "cancel                         -       101 s",
    ]
    assert table([("other", 1)]) == []


FAULTS = "tests/end_to_end/test_slurm.py::test_a_fault_changes_nothing"


class Item:
    """The part of a test item that the distribution uses."""

    def __init__(self, nodeid: str, *, slow: bool = False) -> None:
        self.nodeid, self.slow = nodeid, slow

    def get_closest_marker(self, name: str) -> bool:
        return name == "slow" and self.slow


def test_groups_of_tests_that_share_a_worker():
    assert group("tests/a.py::test_one[x::y]") == "tests/a.py"
    assert group(f"{FAULTS}[preempt-train]") == "slurm-train"
    assert group("tests/end_to_end/test_slurm.py::test_status[True]") == "slurm"
    assert group("tests/end_to_end/test_commands.py::test_demo_links") == group(
        "tests/end_to_end/test_pages.py::test_a"
    )


def test_the_longest_groups_come_first():
    """Files with a slow test, other files, and tests that measure time follow; the order within a group is kept."""
    names = ["tests/performance/test_a.py::b", "a.py::c", "b.py::d", "c.py::e", "b.py::f", "c.py::g"]
    items = [*(Item(name, slow=name == "b.py::f") for name in names), Item(f"{FAULTS}[cancel-train]", slow=True)]
    ordered = list(items)
    distribute(ordered)
    assert [items.index(item) for item in ordered] == [6, 2, 4, 1, 3, 5, 0]


FIXTURES = {"slurm": "dev_cluster", "vllm": "vllm_environment", "demo": "small_demo"}


@pytest.mark.parametrize(("name", "fixture"), FIXTURES.items())
def test_tests_of_an_expensive_fixture_are_in_its_groups(request, name: str, fixture: str):
    """All tests that use one of the fixtures alone belong to one of its groups."""
    users = [
        item
        for item in request.config.stash[COLLECTED]
        if set(FIXTURES.values()) & set(getattr(item, "fixturenames", ())) == {fixture}
    ]
    assert {group(item.nodeid).partition("-")[0] for item in users} <= {name}
