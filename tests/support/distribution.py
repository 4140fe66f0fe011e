"""How pytest-xdist distributes the tests over its workers.

Tests that share an expensive fixture form a group, which one worker runs; others form a group per file. Workers take
the groups in the order of the collection, so the longest come first, and beside those that mostly wait (for Slurm, for
an engine) others compute.
"""

import pytest

# The longest groups, by descending duration; then come files with slow tests, then the others.
FIRST = ("slurm-train", "vllm-kills", "slurm", "slurm-latents", "slurm-caption", "vllm", "demo")
# The group of the tests that use a fixture, directly or not.
GROUP_OF_FIXTURE = {"small_demo": "demo", "dev_cluster": "slurm", "vllm_environment": "vllm"}


def group(item: pytest.Item) -> str:
    """Return the group of a test: by its own mark, by an expensive fixture, or else its file."""
    if mark := item.get_closest_marker("xdist_group"):
        return str(mark.args[0])
    fixtures = getattr(item, "fixturenames", ())
    return next((name for fixture, name in GROUP_OF_FIXTURE.items() if fixture in fixtures), item.location[0])


def distribute(items: list[pytest.Item]) -> None:
    """Mark each test with its group and sort the tests in place, the groups that take long first."""
    groups = [group(item) for item in items]
    slow = {name for name, item in zip(groups, items, strict=True) if item.get_closest_marker("slow")}
    for name, item in zip(groups, items, strict=True):
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(name))
    order = {name: index for index, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(name := group(item), len(order) + (name not in slow)))
