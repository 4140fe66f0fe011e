"""Cluster profiles: one TOML file holds everything that is specific to a cluster.

A profile is named after a file in `slurm/profiles/`, or given as the path of a file. `$NAME` in a string is replaced by
the environment variable, except in the shell lines of `setup` and `node_check`.
"""

import dataclasses
import os
import re
import shutil
import tomllib
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

FOLDER = Path(__file__).parent / "profiles"
JOB_KINDS = (
    *("init", "adopt", "caption", "latents", "audit", "verify", "train", "convert", "sample", "serve", "recaption"),
    *("evaluate", "judge", "summarize"),
)
BY_KIND = ("minutes", "gpus", "cpus", "memory", "partitions", "qualities", "python")  # tables by job kind
WITHOUT_GPU = ("init", "adopt", "audit", "verify", "summarize")  # kinds of jobs that compute nothing on a GPU
MAX_NUMBER = 10_000_000  # minutes, GB and so on of a profile
VARIABLE = re.compile(r"\$([A-Z_][A-Z0-9_]*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Settings of a cluster and resources of its jobs; the keys of tables by job kind are those of JOB_KINDS."""

    name: str
    executor: Literal["local", "slurm"]
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    mail_user: str | None = None
    mail_type: str | None = None
    gpus_per_node: int = 0
    gpu_type: str | None = None
    cpus_per_task: int = 1
    memory_gb: int | None = None  # per node; None: the partition's default
    reservation: str | None = None
    wckey: str | None = None
    poll_seconds: int = 30  # between queries of a launcher that waits
    requeue: bool = True  # after preemption and the failure of a node
    signal_seconds: int = 120  # seconds between SIGUSR2 and the time limit, to save a checkpoint
    node_check: str | None = None  # shell command on each node before training; its last line is the node's error
    max_slowdown_percent: int = 50  # of a rank's matrix product relative to the median, from which its node is avoided
    array_parallelism: int = 0  # array elements that run at once; 0: all, or on this machine one per processor
    minutes: dict[str, int] = field(default_factory=dict)  # time limit by job kind
    gpus: dict[str, int] = field(default_factory=dict)  # GPUs per node by job kind, in place of those it needs
    cpus: dict[str, int] = field(default_factory=dict)  # processors per task by job kind
    memory: dict[str, int] = field(default_factory=dict)  # GB per node by job kind
    partitions: dict[str, str] = field(default_factory=dict)  # by job kind
    qualities: dict[str, str] = field(default_factory=dict)  # quality of service (QOS) by job kind
    python: dict[str, str] = field(default_factory=dict)  # interpreter by job kind (default: the launcher's)
    modules: list[str] = field(default_factory=list)  # names for `module load`
    setup: list[str] = field(default_factory=list)  # shell lines before the task
    environment: dict[str, str] = field(default_factory=dict)
    srun_args: list[str] = field(default_factory=list)
    container: str | None = None  # image for srun's --container-image (pyxis)
    container_mounts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise ValueError for a number that is negative or larger than any cluster's."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        tables = {f"{key}.{kind}": value for key in BY_KIND for kind, value in values[key].items()}
        for key, value in (values | tables).items():
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{key} = {value!r} must not be negative")
            if isinstance(value, int) and value > MAX_NUMBER:
                raise ValueError(f"{key} = {value!r} must be at most {MAX_NUMBER}")


def for_kind(profile: Profile, kind: str) -> Profile:
    """Return the profile with the resources of one kind of job in place of the general ones."""
    gpus = profile.gpus.get(kind, 0 if kind in WITHOUT_GPU else profile.gpus_per_node)
    return dataclasses.replace(
        profile,
        gpus_per_node=min(gpus, profile.gpus_per_node),
        cpus_per_task=profile.cpus.get(kind, profile.cpus_per_task),
        memory_gb=profile.memory.get(kind, profile.memory_gb),
        partition=profile.partitions.get(kind, profile.partition),
        qos=profile.qualities.get(kind, profile.qos),
    )


def default_name() -> str:
    """Return the profile that PIXART_CLUSTER names, else `local`.

    Raises ValueError if PIXART_CLUSTER is unset on a machine with Slurm.
    """
    if name := os.environ.get("PIXART_CLUSTER"):
        return name
    if shutil.which("sbatch"):
        raise ValueError(
            f"PIXART_CLUSTER: not set on a machine with Slurm; set it, or give --cluster, to {allowed_names()}"
        )
    return "local"


def allowed_names() -> str:
    """Return the part of an error message that lists the names of profiles."""
    return "one of " + ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml"))) + " or the path of a .toml file"


def load(name: str) -> Profile:
    """Load a profile by name or path.

    Raises ValueError if it does not exist, or, naming the key, if a key or value is invalid.
    """
    is_path = name.endswith(".toml")
    path = Path(name) if is_path else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise ValueError(f"--cluster {name}: unknown cluster profile {name!r}; it must be {allowed_names()}")
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"profile {path}: not a TOML file; {error}") from error
    hints = get_type_hints(Profile)
    for key, value in values.items():
        if key not in hints or key == "name":
            allowed = ", ".join(item.name for item in dataclasses.fields(Profile) if item.name != "name")
            raise ValueError(f"profile {path}: unknown key {key!r}; it must be one of {allowed}")
        values[key] = expand(check(value, hints[key], key, path), key, path)
    if "executor" not in values:
        raise ValueError(f"profile {path}: 'executor' is missing; it must be local or slurm")
    for key in BY_KIND:
        if unknown := sorted(set(values.get(key, {})) - set(JOB_KINDS)):
            raise ValueError(
                f"profile {path}: {key}.{unknown[0]} is not a job kind; it must be one of {', '.join(JOB_KINDS)}"
            )
    try:
        return Profile(name=path.stem, **values)
    except ValueError as error:
        raise ValueError(f"profile {path}: {error}") from None


def check(value: Any, kind: Any, key: str, path: Path) -> Any:
    """Return the value if it matches the annotation `kind`. Raises ValueError, naming `key`, otherwise."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        kind, origin = arguments[0], None
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"profile {path}: {key} = {value!r} must be one of {', '.join(arguments)}")
        return value
    if origin is dict and isinstance(value, dict):
        return {name: check(item, arguments[1], f"{key}.{name}", path) for name, item in value.items()}
    if origin is list and isinstance(value, list):
        return [check(item, arguments[0], key, path) for item in value]
    wanted = origin or kind
    if type(value) is not wanted:
        raise ValueError(f"profile {path}: {key} = {value!r} must be of type {wanted.__name__}")
    return value


def expand(value: Any, key: str, path: Path) -> Any:
    """Replace environment variables in a value, except in shell lines. Raises ValueError for one that is not set."""
    if isinstance(value, dict):
        return {name: expand(item, f"{key}.{name}", path) for name, item in value.items()}
    if not isinstance(value, str) or key.startswith(("setup", "node_check")):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"profile {path}: {key} needs the environment variable {match[1]}; export it")
        return os.environ[match[1]]

    return VARIABLE.sub(variable, value)
