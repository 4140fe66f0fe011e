"""`doctor --fetch` against a model hub on this machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment import bare_environment
from tests.support.hub_fixture import Hub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]


def doctor(home: Path, hub: str, vae: str, *words: str) -> tuple[int, list[str]]:
    """Run `doctor` with an empty cache of its own, and return its exit code and the lines about the VAE."""
    command = [sys.executable, "-m", "jobs.launch", "doctor", "--home", str(home), "--set", f"data.vae={vae}", *words]
    environment = {**bare_environment(), "HF_ENDPOINT": hub, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "Traceback" not in done.stderr, done.stderr  # the progress of a download goes there
    return done.returncode, [line for line in done.stdout.splitlines() if "data.vae" in line]


def test_a_model_is_fetched_once_with_its_licence(hub, tmp_path):
    assert doctor(tmp_path, hub, "owner/model/vae")[0] == 2
    assert Hub.requested == []
    code, (line,) = doctor(tmp_path, hub, "owner/model/vae", "--fetch")
    assert code == 0, line
    assert line.startswith("ok ")
    assert line.endswith("/vae, licence apache-2.0")
    fetched = ["README.md", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert sorted(Hub.requested) == fetched
    offline = "http://127.0.0.1:9"
    assert doctor(tmp_path, offline, "owner/model/vae", "--fetch") == (0, [line])


def test_a_failed_download_is_reported_on_one_line(hub, tmp_path):
    for name, message in (
        ("owner/gated", f"its licence is not accepted; accept it at {hub}/owner/gated"),
        ("owner/none", f"no such model at {hub}"),
    ):
        code, (line,) = doctor(tmp_path, hub, name, "--fetch")
        assert code == 2
        assert f"missing  data.vae: {name}: {message}" in line
    code, (line,) = doctor(tmp_path, "http://127.0.0.1:9", "owner/model/vae", "--fetch")
    assert code == 2
    assert "http://127.0.0.1:9 did not serve it" in line
