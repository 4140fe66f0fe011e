"""The checkpoints of the cases: weights, EMA weights, moments and step are those of the plain file, or are refused.

The kinds are also made in `tests/conversion/reading/test_world.py`, without the shared files.
"""

import pathlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from conversion.reading import formats
from pixart.checkpoint.directory import Checkpoint

COMPLETE = (
    *("names_dit.pt", "names_global_step.pt", "names_tutorial.pt", "names_pixart.pt", "wrapped_compiled_blocks.pt"),
    *("wrapped_checkpointed_blocks.pt", "average_swa.pt", "beside_namespace.pt", "beside_numpy_scalar.pt"),
    *("beside_path.pt", "step_numpy.pt", "format_before_1_6.pt"),
)
WITHOUT_MOMENTS = ("dcp_numpy_step", "dcp_rng_state")


@pytest.fixture(scope="module")
def checkpoints(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what the script of the cases writes."""
    script = shared_data.parent / "cases/make_checkpoints.py"
    if not script.exists():
        pytest.skip(f"the cases are not at {script.parent}")
    folder = tmp_path_factory.mktemp("checkpoints")
    subprocess.run([sys.executable, script, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def plain(shared_data: Path) -> Checkpoint:
    return formats.read(shared_data / "legacy/dev_stage1.pt")


def check_same(actual: Checkpoint, expected: Checkpoint, fields: tuple[str, ...]) -> None:
    assert (actual.step, actual.config) == (expected.step, expected.config)
    for field in fields:
        state = getattr(expected, field)
        assert getattr(actual, field).keys() == state.keys()
        assert all(torch.equal(getattr(actual, field)[name], state[name]) for name in state)


@pytest.mark.parametrize("name", COMPLETE)
def test_file(checkpoints, plain, name):
    check_same(formats.read(checkpoints / name), plain, ("model", "ema", "optimizer"))


@pytest.mark.parametrize("name", WITHOUT_MOMENTS)
def test_directory(checkpoints, plain, name):
    check_same(formats.read(checkpoints / name), plain, ("model", "ema"))


@pytest.mark.parametrize("name", ["dcp_truncated"])
def test_truncated_directory(checkpoints, name):
    with pytest.raises(ValueError, match=r"__0_0\.distcp is truncated") as caught:
        formats.read(checkpoints / name)
    assert "\n" not in str(caught.value)


def test_every_checkpoint_of_the_script_has_a_test(checkpoints):
    assert {path.name for path in checkpoints.iterdir()} == {*COMPLETE, *WITHOUT_MOMENTS, "dcp_truncated"}


@pytest.mark.parametrize("name", ["a DCP directory that Python 3.13 wrote"])
def test_python_3_13(stage1, tmp_path, name):
    """Python 3.13 says that a path is of the module pathlib._local."""
    dcp.save({"model": stage1.model, "step": stage1.step - 1}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    metadata = pickle.loads((tmp_path / "dcp/.metadata").read_bytes())
    metadata.storage_meta.checkpoint_id = pathlib.PosixPath("/checkpoints/7")
    content = pickle.dumps(metadata, protocol=2)
    assert b"cpathlib\nPosixPath\n" in content
    (tmp_path / "dcp/.metadata").write_bytes(content.replace(b"cpathlib\n", b"cpathlib._local\n"))
    read = formats.read(tmp_path / "dcp", base_latent_size=8)
    assert read.step == stage1.step
    assert all(torch.equal(read.model[key], stage1.model[key]) for key in stage1.model)
