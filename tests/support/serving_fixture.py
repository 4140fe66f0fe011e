"""A server of a small model with random weights, in a thread of the test's process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.tasks import serve as task
from pixart.checkpoint import directory as checkpoints
from pixart.config.keys import overrides
from pixart.config.recipe import Recipe, to_json
from pixart.serving import server
from pixart.serving.requests import Limits
from pixart.serving.service import Service
from tests.jobs.tasks.test_sample import checkpoint_of

STEPS, GUIDANCE = 4, 2.0


@dataclass(kw_only=True)
class RunningServer:
    """A server, the parts that it is made of, and the run folder that its images name."""

    service: Service
    url: str
    folder: Path
    checkpoint: Path
    recipe: Recipe
    stopping: threading.Event
    thread: threading.Thread
    reasons: list[str]

    def stop(self) -> str:
        """Ask the server to end, wait for it, and return why it ended."""
        self.stopping.set()
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.reasons[0]


@dataclass(frozen=True, kw_only=True)
class SavedModels:
    """Checkpoints of both stages with random weights, and the recipe of their dataset."""

    recipe: Recipe
    checkpoints: dict[int, Path]


@pytest.fixture(scope="session")
def saved_models(small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> SavedModels:
    folder = tmp_path_factory.mktemp("served")
    settings = [f"sample.steps={STEPS}", f"sample.guidance={GUIDANCE}"]
    saved = {stage: checkpoints.save(checkpoint_of(small_recipe, stage), folder / f"stage{stage}") for stage in (1, 2)}
    return SavedModels(recipe=overrides.apply(small_recipe, settings), checkpoints=saved)


@contextmanager
def running_server(
    models: SavedModels,
    folder: Path,
    *,
    stage: int = 2,
    weights: tuple[str, ...] = ("ema",),
    token: str | None = None,
    limits: dict[str, Any] | None = None,
    idle_seconds: float = 0,
    **parts: Any,
) -> Iterator[RunningServer]:
    """Run a server on a free port; `parts` are fields of `Service`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(to_json(models.recipe))
    checkpoint = models.checkpoints[stage]
    pipelines, describe = task.load_pipelines(
        folder, checkpoint, list(weights), models.recipe, {"base_latent_size": None}
    )
    model = task.served_model(checkpoint, pipelines, models.recipe, parts.get("recaptioner") is not None)
    service = Service(model=model, pipelines=pipelines, describe=describe, limits=Limits(**(limits or {})), **parts)
    listener = server.open_socket("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    stopping, ready, reasons = threading.Event(), threading.Event(), list[str]()

    def run() -> None:
        reasons.append(
            server.serve(
                service,
                listener,
                token=token,
                should_stop=stopping.is_set,
                idle_seconds=idle_seconds,
                drain_seconds=30,
                on_ready=ready.set,
            )
        )

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    running = RunningServer(
        service=service,
        url=url,
        folder=folder,
        checkpoint=checkpoint,
        recipe=models.recipe,
        stopping=stopping,
        thread=thread,
        reasons=reasons,
    )
    yield running
    running.stop()


class HeldSteps:
    """Lets a test decide when the engine of a server takes its next denoising step."""

    def __init__(self, service: Service) -> None:
        self.step, self.allowed, self.begun = service.engine.step, threading.Semaphore(0), threading.Semaphore(0)
        service.engine.step = self.held_step

    def held_step(self) -> None:
        self.begun.release()
        self.allowed.acquire()
        self.step()

    def wait(self) -> None:
        """Wait until the engine is about to take a step."""
        assert self.begun.acquire(timeout=60)

    def release(self, steps: int = 1_000_000) -> None:
        """Let the engine take further steps."""
        self.allowed.release(steps)


Serve = Callable[..., Any]


@pytest.fixture(scope="session")
def text_server(saved_models: SavedModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Server of a text-conditional model with both sets of weights, without a token."""
    with running_server(saved_models, tmp_path_factory.mktemp("run") / "serve", weights=("ema", "master")) as running:
        yield running


@pytest.fixture
def serve(saved_models: SavedModels, tmp_path: Path) -> Iterator[Serve]:
    """Callable that runs another server until the end of the test; its arguments are those of `running_server`."""
    running: list[Any] = []

    def start(**options: Any) -> RunningServer:
        context = running_server(saved_models, tmp_path / f"run-{len(running)}", **options)
        running.append(context)
        return context.__enter__()

    yield start
    for context in running:
        context.__exit__(None, None, None)
