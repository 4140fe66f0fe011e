"""An exported folder loads with diffusers where the suite is not installed, and gives the same images."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from pixart.sampling.pipeline import PixArtPipeline
from tests.pixart.sampling.test_pipeline import PROMPTS, STEPS, classes, texts  # noqa: F401 - fixtures

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
VERSIONS = ("==0.40.0", "")  # the oldest that is supported, and the newest
CODE = """
import importlib.util, json, sys
import diffusers, numpy, torch
assert not any(importlib.util.find_spec(name) for name in ("pixart", "jobs", "conversion", "slurm"))
folder, out, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
generator = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
images = pipeline(**arguments, generator=generator).images
numpy.save(out, numpy.stack([numpy.asarray(image) for image in images]))
assert not any(name.partition(".")[0] == "pixart" for name in sys.modules)
print(diffusers.__version__)
"""


def diffusers_folder(version: str) -> Path:
    """Return a folder with this version of diffusers alone, which is made once; skip the test if it cannot be made.

    Its dependencies, such as torch, are those of this environment.
    """
    pytest.importorskip("uv", reason="needs uv to install another version of diffusers")
    folder = ROOT / "build" / f"diffusers{version or '-newest'}"
    if version and (folder / "diffusers").is_dir():
        return folder
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder]
    done = subprocess.run([*command, f"diffusers{version}"], capture_output=True, text=True, timeout=300)
    if done.returncode and not (folder / "diffusers").is_dir():
        pytest.skip(f"diffusers{version} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder


def images_without_the_suite(export: Path, version: str, arguments: dict, out: Path) -> np.ndarray:
    """Return the images (B, H, W, 3) that the folder gives in a Python whose import path does not have the suite.

    Packages come by PYTHONPATH, for which Python reads no .pth file, and so not that of the suite's installation.
    """
    paths = [str(diffusers_folder(version)), sysconfig.get_path("purelib")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(out.parent),
    }
    python = str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
    command = [python, "-c", CODE, export, out, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not version or done.stdout.strip() == version.removeprefix("==")
    return np.load(out)


def images(pipeline: PixArtPipeline, arguments: dict) -> np.ndarray:
    generator = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
    return np.stack([np.asarray(image) for image in pipeline(**arguments, generator=generator).images])


@pytest.mark.parametrize("version", VERSIONS)
def test_an_export_gives_the_same_images_without_the_suite(texts, classes, tmp_path, version):  # noqa: F811
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    for name, pipeline, subject in (
        ("text", texts, {"prompt": PROMPTS}),
        ("class", classes, {"class_labels": ["square", 2]}),
    ):
        arguments = {**subject, **settings}
        pipeline.save_pretrained(tmp_path / name)
        seen = images_without_the_suite(tmp_path / name, version, arguments, tmp_path / f"{name}.npy")
        assert np.array_equal(seen, images(pipeline, arguments))
