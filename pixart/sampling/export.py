"""Code of an exported pipeline: the folder loads in diffusers without this suite installed.

Diffusers executes `pipeline.py` of the folder, and a module in the folder of each component whose class is not of
diffusers or transformers, only with `trust_remote_code=True`. Each of these files is made of modules of the suite, one
after the other, without the imports between them.
"""

import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pixart.checkpoint import normalization
from pixart.data.encoders import text_encoder, vae
from pixart.demo import patch_vae
from pixart.model import dit, layers, sdpa
from pixart.sampling import denoise

SUITE_IMPORT = re.compile(r"^( *)from pixart[\w.]* import (?:\([^)]*\)|[^\n]*)\n", re.MULTILINE)
TRANSFORMER, VAE = "pixart_dit", "pixart_patch_vae"  # modules in the folders of these components
DEMO_FITTING = "DEMO_VAE = "  # from here on, `patch_vae` fits and stores the demo's autoencoder
PIPELINE_HEAD = '''"""The pipeline of this folder; diffusers executes it with `trust_remote_code=True`."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin

DiT = PatchAutoencoder = ModelMixin  # their modules are in the folders of the components
'''


def component_code() -> dict[str, str]:
    """Return the code of the components' modules, by their paths in the exported folder."""
    autoencoder = inspect.getsource(patch_vae.PatchAutoencoder)
    head = inspect.getsource(patch_vae).partition(DEMO_FITTING)[0]
    return {
        f"transformer/{TRANSFORMER}.py": "\n\n".join(module_code(module) for module in (sdpa, layers, dit)),
        f"vae/{VAE}.py": f"{SUITE_IMPORT.sub('', head)}\n\n{autoencoder}",
    }


def pipeline_code(pipeline_module: ModuleType) -> str:
    """Return the code of `pipeline.py`, which has no component's class."""
    parts: list[str] = [
        PIPELINE_HEAD,
        module_code(normalization),
        *(inspect.getsource(item) for item in (text_encoder.Tokenizer, text_encoder.Encoder)),
        inspect.getsource(vae.decode),
        inspect.getsource(dit.null_labels),
        module_code(denoise),
        inspect.getsource(write_code),
        module_code(pipeline_module),
    ]
    return "\n\n".join(parts)


def module_code(module: ModuleType) -> str:
    """Return the source of a module without its docstring and its imports from the suite."""
    source = inspect.getsource(module).partition('"""\n')[2]
    return SUITE_IMPORT.sub(r"\1pass\n", source) if "TYPE_CHECKING" in source else SUITE_IMPORT.sub("", source)


def write_code(pipeline: Any, folder: Path, suite_code: Callable[[], dict[str, str]] | None = None) -> dict[str, str]:
    """Write the code that a pipeline needs into its folder, and return its files' modules by component.

    `suite_code` returns the code by path; a pipeline that was loaded from an exported folder copies the files that its
    classes come from.
    """
    kinds = {"pipeline.py": type(pipeline), "transformer/pixart_dit.py": type(pipeline.transformer)}
    modules = {"transformer": "pixart_dit"}
    if type(pipeline.vae).__name__ == "PatchAutoencoder":
        kinds["vae/pixart_patch_vae.py"], modules["vae"] = type(pipeline.vae), "pixart_patch_vae"
    sources = suite_code() if suite_code else {}
    for name, kind in kinds.items():
        file = sys.modules[kind.__module__].__file__
        assert file
        (folder / name).write_text(sources.get(name) or Path(file).read_text())
    return modules


def checksum_lines(folder: Path) -> str:
    """Return the SHA-256 of every file of a folder with its path relative to it, as `sha256sum` writes them."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder)}\n")
    return "".join(lines)
