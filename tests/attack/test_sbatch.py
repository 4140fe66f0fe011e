"""Hostile texts in every value that reaches an sbatch script, which is then run with stubs of Slurm's programs."""

import dataclasses
import os
import shlex
import subprocess
from pathlib import Path

from slurm.executor import Cluster
from slurm.profile import Profile
from tests.attack.campaign import campaign
from tests.attack.hostile import ESCAPES, INJECTIONS, MARKER, PATHS

TEXTS = (*INJECTIONS, *ESCAPES, *PATHS[:12])
TEXT_KEYS = [
    "partition",
    "account",
    "qos",
    "constraint",
    "exclude",
    "mail_user",
    "mail_type",
    "gpu_type",
    "reservation",
    "wckey",
    "container",
]
LIST_KEYS = ("modules", "srun_args", "container_mounts")
BASE = Profile(name="a", executor="slurm", gpus_per_node=2, memory_gb=8, minutes={"train": 10})
STUB = '#!/bin/sh\nprintf "%s\\n" "$@" >> "$STUB_LOG"\n'


def changed_values(text: str) -> dict[str, tuple[Profile, Path]]:
    """Return a profile and a run folder with the text in one place each, by the name of the place."""
    run = Path("/home/user/runs/a")
    places = {key: (dataclasses.replace(BASE, **{key: text}), run) for key in TEXT_KEYS}
    places |= {key: (dataclasses.replace(BASE, **{key: [text]}), run) for key in LIST_KEYS}
    places["environment"] = (dataclasses.replace(BASE, environment={"A": text}), run)
    places["partitions"] = (dataclasses.replace(BASE, partitions={"train": text}), run)
    return {**places, "run folder": (BASE, Path(f"/home/user/{text}/runs/a"))}


def test_no_value_of_a_script_runs_or_adds_an_option(record_property, tmp_path):
    """The script has the same options as that of harmless values, and runs nothing but Slurm's programs."""
    attack = campaign("sbatch scripts", short=120, long=800)
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for program in ("srun", "module"):
        (stubs / program).write_text(STUB)
        (stubs / program).chmod(0o755)
    environment = {"PATH": f"{stubs}:{os.environ['PATH']}", "STUB_LOG": str(tmp_path / "log"), "HOME": str(tmp_path)}
    cases = [(text, *item) for text in TEXTS for item in changed_values(text).items()]
    attack.generator.shuffle(cases)
    for text, place, (profile, run) in cases[: attack.tries]:
        cluster = Cluster(profile, run, code=Path("/home/user/code"))
        name = f"{place}: {text!r}"
        script = attack.attempt(name, lambda cluster=cluster: cluster.sbatch_text(cluster.ranks_shape("train", 2, 2)))
        if script is None:
            continue
        harmless = Cluster(*changed_values("harmless")[place], code=Path("/home/user/code"))
        expected = harmless.sbatch_text(harmless.ranks_shape("train", 2, 2))
        left_out = {"--reservation"} if not text else set()  # an empty text is no reservation
        if [option for option in options(expected) if option not in left_out - set(options(script))] != options(script):
            attack.wrong(name, f"the options are {options(script)}, not {options(expected)}")
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, timeout=20)
        if (tmp_path / MARKER).exists():
            attack.wrong(name, "the text was run")
            (tmp_path / MARKER).unlink()
    attack.finish(record_property)


def options(script: str) -> list[str]:
    """Return the names of the options in a script, as sbatch parses its lines."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [word.partition("=")[0] for line in lines for word in shlex.split(line) if word.startswith("--")]
