"""Software of the jobs: the interpreter of each kind of job, its packages with their versions, and its build of torch.

The interpreters run the profile's modules and setup lines first, as a job does.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jobs.commands.doctor.finding import Finding, missing, ok
from pixart.config.recipe import Recipe
from pixart.config.training import resolve_fp8_backend
from slurm.profile import Profile

DISTRIBUTION = "pixart-suite"
TIMEOUT_SECONDS = 120  # of an interpreter on a cold network file system, behind its modules
# Packages that each kind of job imports, beyond those of this one; all versions follow from this suite's metadata.
CAPTIONING = ("submitit", "pyarrow", "pillow", "numpy", "fsspec", "filelock")
ENCODING = (*CAPTIONING, "torch", "diffusers", "transformers", "zarr", "google-crc32c")
TRAINING = (*ENCODING, "safetensors", "einops", "scipy")
PACKAGES = {"caption": CAPTIONING, "latents": ENCODING, "train": TRAINING, "convert": TRAINING, "sample": TRAINING}
BACKENDS = {"te": "transformer-engine", "torchao": "torchao"}
# Prints the versions of Python, of the installed packages, and of the CUDA that torch is built for.
INSPECTION = """
import importlib.metadata, json, re, sys
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
cuda = None
if "torch" in versions:
    file = importlib.metadata.distribution("torch").locate_file("torch/version.py")
    found = re.search(r"^cuda.*= '([0-9.]+)'", open(file).read(), re.MULTILINE)
    cuda = found and found[1]
print("\\n" + json.dumps({"python": sys.version.split()[0], "versions": versions, "cuda": cuda}))
"""


def check(profile: Profile, recipe: Recipe) -> Iterator[Finding]:
    """Yield what each interpreter has and lacks for the jobs of a recipe."""
    kinds_of: dict[str, list[str]] = {}
    for kind in PACKAGES:
        kinds_of.setdefault(profile.python.get(kind) or shlex.quote(sys.executable), []).append(kind)
    for python, kinds in kinds_of.items():
        subject = f"environment of {', '.join(kinds)}"
        needed = needed_packages(recipe, kinds)
        result = inspect(profile, python, list(needed))
        if isinstance(result, str):
            yield missing(subject, f"{python} does not start ({result}); correct [python] or setup in the profile")
            continue
        yield ok(subject, f"{python}, Python {result['python']}")
        ranges = tested_ranges()
        for name, users in needed.items():
            version, allowed = result["versions"].get(name), ranges.get(name)
            if version is None:
                yield missing(name, f"not installed for {', '.join(users)}; run '{python} -m pip install {name}'")
            elif allowed and not allowed.specifier.contains(version, prereleases=True):
                yield missing(
                    name, f"{version} is outside of the tested versions {allowed.specifier}; install one of them"
                )
            elif name in ("torch", "vllm", *BACKENDS.values()):
                yield ok(name, version)
        if "torch" in result["versions"] and profile.gpus_per_node:
            yield check_cuda(result["versions"]["torch"], result["cuda"])


def check_cuda(torch: str, cuda: str | None) -> Finding:
    """Return whether a build of torch can use GPUs."""
    if cuda:
        return ok("CUDA", f"torch {torch} is built for CUDA {cuda}")
    return missing("CUDA", f"torch {torch} is built without CUDA, and the profile has GPUs; install a CUDA build")


def needed_packages(recipe: Recipe, kinds: list[str]) -> dict[str, list[str]]:
    """Return the packages that jobs of these kinds import for a recipe, with the kinds that need each."""
    packages = {kind: set(PACKAGES[kind]) for kind in kinds}
    if "caption" in kinds and recipe.data.captioner == "vllm":
        packages["caption"].add("vllm")
    if "train" in kinds and recipe.stage2.fp8:
        backend = resolve_fp8_backend(recipe.stage2.fp8_backend, recipe.stage2.fp8_recipe)
        packages["train"] |= {BACKENDS[backend]} if backend in BACKENDS else set()
    names = sorted(set().union(*packages.values()))
    return {name: [kind for kind in kinds if name in packages[kind]] for name in names}


def inspect(profile: Profile, python: str, names: list[str]) -> dict | str:
    """Return the versions that an interpreter has, after the modules and setup lines; an error message if it fails."""
    lines = [*(f"module load {shlex.quote(name)}" for name in profile.modules), *profile.setup]
    words = f"{python} -c {shlex.quote(INSPECTION)} {shlex.join(names)}"
    try:
        done = subprocess.run(
            ["bash", "-c", "\n".join([*lines, words])],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_SECONDS} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def tested_ranges() -> dict[str, Requirement]:
    """Return the requirements of this suite's metadata by package, with extras; empty if it is not installed."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in lines]
    return {
        canonicalize_name(item.name): item
        for item in requirements
        if item.marker is None or ("dev" not in str(item.marker) and item.marker.evaluate({"extra": extra_of(item)}))
    }


def extra_of(requirement: Requirement) -> str:
    """Return the extra that a requirement belongs to; an empty text if it belongs to none."""
    words = str(requirement.marker).split("extra == ")
    return words[1].strip("\"'() ") if len(words) > 1 else ""
