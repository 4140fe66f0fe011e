"""The serve command: on this machine until an interrupt, and as a Slurm job that is reached, idle and cancelled."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from benchmarks.serving import ServerProcess
from jobs import launch
from jobs.state import endpoint as endpoints
from jobs.state import run as runs
from pixart.checkpoint import directory as checkpoints
from tests.end_to_end.test_recaption import vllm_profile
from tests.jobs.tasks.test_sample import checkpoint_of
from tests.support.cluster_fixture import wait_until
from tests.support.demo_fixture import Demo
from tests.support.environment import bare_environment
from tests.support.serving_fixture import SavedModels
from tests.support.vllm_fixture import needs_vllm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PATH = "/v1/images/generations"
PROMPT = {"prompt": "a red circle", "steps": 2}


def newest_run(home: Path) -> runs.Run:
    return runs.load(runs.folders(home)[-1])


def interrupt(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal as a terminal does, which reaches all processes by Ctrl-C, or to the launcher alone."""
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


@pytest.fixture(scope="module")
def slow_model(saved_models: SavedModels, tmp_path_factory) -> Path:
    """Checkpoint of a model whose images take seconds, so that a test can interrupt them."""
    checkpoint = checkpoint_of(saved_models.recipe, 2, dim=128, num_blocks=6)
    return checkpoints.save(checkpoint, tmp_path_factory.mktemp("slow") / "stage2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_on_this_machine_runs_until_an_interrupt(slow_model: Path, tmp_path, number):
    words = [sys.executable, "-m", "jobs.launch", "serve", str(slow_model), "--port", "0"]
    environment = {**bare_environment(), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*words, "--home", str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stdout
    line = process.stdout.readline()
    assert line.startswith("serving: http://127.0.0.1:")
    url = line.split()[1].rstrip("/")
    answer = httpx2.post(f"{url}{PATH}", json=PROMPT, timeout=60)
    assert answer.status_code == 200
    assert "lineage" in httpx2.get(f"{url}/lineage").text.lower()
    run = newest_run(tmp_path)
    assert (run.folder / endpoints.FILE).stat().st_mode & 0o777 == 0o600
    with ThreadPoolExecutor(1) as threads:
        begun = threads.submit(httpx2.post, f"{url}{PATH}", json={**PROMPT, "n": 8, "steps": 100}, timeout=60)
        wait_until(lambda: "pixart_active_images 8.0" in httpx2.get(f"{url}/metrics").text, 30, interval=0.01)
        interrupt(process, number)
        assert len(begun.result().json()["data"]) == 8  # what runs is finished
    output, _ = process.communicate(timeout=60)
    assert output == "ended: interrupted\n"
    assert process.returncode == 0
    assert not (run.folder / endpoints.FILE).exists()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")


def test_an_idle_server_ends_with_its_result(saved_models: SavedModels, tmp_path, capsys):
    words = ["--home", str(tmp_path), "--cluster", "local", "--port", "0", "--idle-minutes", "0.01"]
    assert launch.main(["serve", str(saved_models.checkpoints[1]), *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ended: idle, after 0 images"
    assert runs.result(newest_run(tmp_path)) == {"ended": "idle", "images": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "fp8"], "--weights fp8: "),
        (["--port", "65536"], "'65536' is not a port"),
        (["--idle-minutes", "nan"], "'nan' is not a number of at least 0"),
        (["--vae", "demo", "--dataset", "data"], "give either these or --dataset"),
    ],
)
def test_bad_input_is_one_line(saved_models: SavedModels, tmp_path, capsys, words, message):
    try:
        code = launch.main(
            ["serve", str(saved_models.checkpoints[2]), "--home", str(tmp_path), "--cluster", "local", *words]
        )
    except SystemExit as exited:
        code = exited.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_released_model_is_served(small_demo: Demo, tmp_path):
    """By alias and version; a version that does not exist is refused."""
    checkpoint = small_demo.runs("train")[-1]
    done = small_demo.command("release", str(checkpoint), "--name", "served")
    assert done.returncode == 0, done.stderr
    refused = small_demo.command("serve", "models:/served/7")
    assert (refused.returncode, "no such release" in refused.stderr) == (2, True)
    with ServerProcess("models:/served@newest", small_demo.home) as server:
        answer = httpx2.post(f"{server.url}{PATH}", json=PROMPT, timeout=60).json()
        (model,) = httpx2.get(f"{server.url}/v1/models").json()["data"]
    assert len(answer["data"]) == 1
    assert model["id"].startswith(f"{checkpoint.name}/step-")
    for run in small_demo.runs("serve"):
        shutil.rmtree(run)  # other tests take the newest run


@pytest.mark.vllm
@needs_vllm
def test_vllm_beside_the_server_rewrites(saved_models: SavedModels, tmp_path, tiny_qwen):
    """A random model does not answer with text: the prompt is rewritten, or kept with the problem in the answer."""
    profile = vllm_profile(tmp_path)
    words = ["--cluster", str(profile), "--recaption-model", str(tiny_qwen)]
    with ServerProcess(str(saved_models.checkpoints[2]), tmp_path / "home", *words) as server:
        answer = httpx2.post(f"{server.url}{PATH}", json={**PROMPT, "recaption": True}, timeout=280).json()
        (image,) = answer["data"]
        assert (image["revised_prompt"] == image["prompt"]) == ("recaption_problem" in answer)
        processes = vllm_processes(tiny_qwen)
        assert processes
    wait_until(lambda: not vllm_processes(tiny_qwen), 30)


def vllm_processes(model: Path) -> list[str]:
    """Return the processes whose command line names a model."""
    numbers = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # processes that end meanwhile
            if str(model).encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                numbers.append(folder.name)
    return numbers


@pytest.mark.slurm
def test_a_server_on_a_cluster(dev_cluster, saved_models: SavedModels, tmp_path, capsys):
    words = ["serve", str(saved_models.checkpoints[2]), "--home", str(tmp_path)]

    def start(*more: str) -> tuple[runs.Run, endpoints.Endpoint]:
        assert launch.main([*words, *more]) == 0
        run = newest_run(tmp_path)
        wait_until(lambda: endpoints.load(run.folder) is not None, 180, "the endpoint", interval=0.5)
        return run, endpoints.load(run.folder)

    run, endpoint = start()
    assert "next: python -m jobs.launch status" in capsys.readouterr().out
    assert launch.main(["status", run.folder.name, "--home", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"tunnel: ssh -N -L {endpoint.port}:{endpoint.node}:{endpoint.port} " in shown
    assert f"http://localhost:{endpoint.port}/#token={endpoint.token}" in shown
    url = f"http://127.0.0.1:{endpoint.port}"  # the nodes of the development cluster are this machine
    assert httpx2.post(f"{url}/v1/images/generations", json=PROMPT).status_code == 401
    headers = {"Authorization": f"Bearer {endpoint.token}"}
    assert httpx2.post(f"{url}/v1/images/generations", json=PROMPT, headers=headers, timeout=60).status_code == 200
    assert launch.main(["cancel", run.folder.name, "--home", str(tmp_path)]) == 0
    wait_until(lambda: not runs.is_active(runs.elements(run)), 60, "the end", interval=0.5)
    assert runs.elements(run)[0].state == "cancelled"
    assert not (run.folder / endpoints.FILE).exists()

    run, endpoint = start("--idle-minutes", "0.02")
    wait_until(lambda: not runs.is_active(runs.elements(run)), 120, "the end", interval=0.5)
    assert runs.result(run) == {"ended": "idle", "images": 0}
    assert endpoint.token not in (run.folder / runs.RECORD).read_text()
