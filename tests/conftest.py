"""Fixtures of all tests: the shared test data if available, and a small finished dataset of rendered scenes."""

import dataclasses
from pathlib import Path

import pytest

from pixart.config.recipe import Recipe, to_json
from pixart.recipes import demo
from tests.support import recovery_times
from tests.support.browser_fixture import browser, open_page  # noqa: F401 - fixtures
from tests.support.bucketed_recipe import bucketed_recipe  # noqa: F401 - a fixture
from tests.support.checkpoints import legacy_file, stage1  # noqa: F401 - fixtures
from tests.support.cluster_fixture import dev_cluster, running_cluster  # noqa: F401 - fixtures
from tests.support.demo_fixture import small_demo  # noqa: F401 - a fixture
from tests.support.distribution import Workers, alone  # noqa: F401 - a fixture
from tests.support.hub_fixture import hub  # noqa: F401 - a fixture
from tests.support.mlflow_fixture import mlflow_server  # noqa: F401 - a fixture
from tests.support.programs_fixture import programs  # noqa: F401 - a fixture
from tests.support.serving_fixture import saved_models, serve, text_server  # noqa: F401 - fixtures
from tests.support.vllm_fixture import answering_qwen, tiny_qwen, vllm_environment  # noqa: F401 - fixtures

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Workers())


def pytest_terminal_summary(terminalreporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    lines = recovery_times.table(item for report in reports for item in report.user_properties)
    if lines:
        terminalreporter.section("seconds from a fault until all data is complete")
        terminalreporter.write("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the shared test data; tests that use it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared test data beside the repository, at {SHARED}")
    return SHARED


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import path of torchao for one test.

    It is installed in a separate folder because diffusers logs messages about an installed torchao at every start.
    """
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / ".venv-torchao")
    pytest.importorskip("torchao.float8", reason="needs the extra torchao, which `make check` puts into .venv-torchao")


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Recipe of a dataset of 64 scenes in 4 shards, with captions and latents, and of a very small model."""
    from jobs.tasks import caption, init_dataset, latents

    recipe = demo(str(tmp_path_factory.mktemp("home")))
    short = {"steps": 6, "global_batch_size": 8, "warmup_steps": 2, "save_every": 3, "log_every": 1}
    short |= {"validate_every": 0, "num_validation_samples": 0, "preview_every": 0}
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, max_images=64, num_shards=4),
        model=dataclasses.replace(recipe.model, dim=32, cond_dim=32, num_heads=2, num_blocks=2),
        stage1=dataclasses.replace(recipe.stage1, **short),
        stage2=dataclasses.replace(recipe.stage2, **short),
    )
    init_dataset.run(to_json(recipe))
    caption.run(recipe.data.path, [0, 1, 2, 3])
    latents.run(recipe.data.path, [0, 1, 2, 3])
    return recipe
