"""What the tests themselves are run with: their distribution over workers, and the table at their end."""

from collections.abc import Sequence

import pytest

from tests.support.distribution import FIRST, distribute, group
from tests.support.recovery_times import RECOVERY, table


def test_table_of_recovery_times():
    """A row per fault in their order; a job whose test has not passed has no time."""
    times = [(RECOVERY, ("requeue", "train", 12.6)), ("other", 1), (RECOVERY, ("requeue", "caption", 9.2))]
    assert table([*times, (RECOVERY, ("cancel", "train", 101.0))]) == [
        "fault                    caption       train",
        "requeue                      9 s        13 s",
        "cancel                         -       101 s",
    ]
    assert table([("other", 1)]) == []


class Item:
    """A test as far as its distribution looks at it."""

    def __init__(self, file: str, *, slow: bool = False, mark: str = "", fixtures: Sequence[str] = ()) -> None:
        self.location, self.fixturenames = (file, 0, "test"), fixtures
        self.marks = {"slow": pytest.mark.slow.mark} if slow else {}
        if mark:
            self.add_marker(pytest.mark.xdist_group(mark))

    def get_closest_marker(self, name: str):
        return self.marks.get(name)

    def add_marker(self, mark) -> None:
        self.marks[mark.name] = mark.mark


def test_groups_of_tests_that_share_a_worker():
    assert group(Item("a.py")) == "a.py"
    assert group(Item("a.py", fixtures=["tmp_path", "small_demo"])) == "demo"
    assert group(Item("a.py", fixtures=["dev_cluster"], mark="slurm-train")) == "slurm-train"


def test_the_longest_groups_come_first():
    """Then files with a slow test, then the others; within a group the order stays."""
    items = [Item("a.py"), Item("b.py"), Item("c.py"), Item("b.py", slow=True), Item("c.py", fixtures=["dev_cluster"])]
    items.append(Item("d.py", mark="slurm-train"))
    ordered = list(items)
    distribute(ordered)
    assert [items.index(item) for item in ordered] == [5, 4, 1, 3, 0, 2]
    assert [item.marks["xdist_group"].args[0] for item in ordered] == [
        *("slurm-train", "slurm", "b.py", "b.py", "a.py", "c.py")
    ]


def test_groups_that_come_first_exist(request):
    """Each is one of a test's, where all tests are collected."""
    groups = {group(item) for item in request.session.items}
    if len({item.location[0] for item in request.session.items}) < 50:
        pytest.skip("needs a run of all tests")
    assert groups >= set(FIRST)
