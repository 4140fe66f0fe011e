"""Distribution of the tests over the workers of pytest-xdist: `pytest -n 4`.

The tests of a file form a group, which runs on one worker; so do the tests of several files that share an expensive
fixture. Workers take the groups in order: the longest ones, which mostly wait (for Slurm, for an engine) while others
compute, come first; tests that measure time come last, when all other workers have ended.

pytest-xdist's own groups, `--dist loadgroup`, have no effect in its version 3.8 with pytest 9.2.
"""

import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest

ALONE = "performance"  # the group of the tests that measure time
ALONE_SECONDS = 1200  # maximum wait for the other workers
COLLECTED = pytest.StashKey[tuple[pytest.Item, ...]]()  # all tests, also those that the options deselect
ENDED = "ended"  # key of a worker's input: the folder where each worker creates a file with its ID when it ends

# Groups and the pattern of their tests' names, the longest first; all other groups are files.
GROUPS = {
    "vllm-kills": r"end_to_end/test_captioning\.py",
    "slurm-train": r"test_slurm\.py::test_a_fault_changes_nothing\[.*-train\]",
    "slurm": r"test_slurm(_nodes)?\.py::(?!test_a_fault_changes_nothing)|test_serve\.py::test_a_server_on_a_c",
    "slurm-latents": r"test_slurm\.py::test_a_fault_changes_nothing\[.*-latents\]",
    "slurm-caption": r"test_slurm\.py::test_a_fault_changes_nothing\[.*-caption\]",
    "vllm": r"end_to_end/test_recaption\.py|captions/test_captioner\.py|model/test_gpu_kernels\.py|test_distances\.py|"
    r"evaluation/test_judge\.py|test_serve\.py::test_vllm_",
    "demo": r"tasks/test_evaluate\.py|tracking/test_hub\.py|reports/test_browser\.py|tests/test_(prose|reference)\.py|"
    r"attack/test_(pages|records|read_only_home)\.py|end_to_end/test_(pages|estimate|moved_home)\.py|"
    r"test_commands\.py::test_demo_|test_serve\.py::test_a_released_",
    "resume": r"training/test_resume\.py",
    ALONE: r"^tests/performance/",
}


def group(name: str) -> str:
    """Return the group of a test: the one whose pattern matches its name, otherwise its file."""
    return next((key for key, pattern in GROUPS.items() if re.search(pattern, name)), name.partition("::")[0])


def distribute(items: list[pytest.Item]) -> None:
    """Sort the tests in place: groups with a pattern, files with a slow test, other files, those that measure time."""
    slow = {group(item.nodeid) for item in items if item.get_closest_marker("slow")}
    order = {name: index for index, name in enumerate(GROUPS)}
    order[ALONE] = len(GROUPS) + 2

    def rank(item: pytest.Item) -> int:
        name = group(item.nodeid)
        return order.get(name, len(GROUPS) + (name not in slow))

    items.sort(key=rank)


class Workers:
    """Plugin of the main process, which starts the workers, and of each worker."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log):
        from xdist.scheduler import LoadScopeScheduling

        class ByGroup(LoadScopeScheduling):
            def _split_scope(self, nodeid: str) -> str:
                return group(nodeid)

        config.option.loadscopereorder = False  # it would sort groups by their number of tests
        return ByGroup(config, log)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        self.folder = self.folder or Path(tempfile.mkdtemp(prefix="pytest-workers-"))
        node.workerinput[ENDED] = str(self.folder)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.stash[COLLECTED] = tuple(items)
        if hasattr(config, "workerinput"):
            distribute(items)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if worker := getattr(session.config, "workerinput", None):
            (Path(worker[ENDED]) / worker["workerid"]).touch()

    def pytest_unconfigure(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder)


@pytest.fixture(scope="session")
def alone(request) -> None:
    """Wait until this is the only worker that still runs tests."""
    if worker := getattr(request.config, "workerinput", None):
        deadline = time.monotonic() + ALONE_SECONDS
        while len(list(Path(worker[ENDED]).iterdir())) < worker["workercount"] - 1 and time.monotonic() < deadline:
            time.sleep(0.2)
