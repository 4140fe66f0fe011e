"""An evaluation as arrays on a real Slurm: sampling in four elements, a judge by vLLM, and the summary after both."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.state import evaluation, ledger
from jobs.state import run as runs
from slurm.devcluster.cluster import DevCluster
from slurm.task import attempts
from tests.support.demo_fixture import Demo
from tests.support.vllm_fixture import PYTHON, VARIABLES, needs_vllm

pytestmark = [pytest.mark.slurm, pytest.mark.vllm, pytest.mark.slow, needs_vllm]
SHARDS = 4
PROMPTS = [
    {"prompt": f"{number} {color} shapes", "vqa_list": [[f"Is it {color}?", answer], ["Is it big?", word]]}
    | {"skills": ["color", "size"]}
    for number, color, answer, word in (
        ("two", "red", "red", "tall"),
        ("one", "blue", "blue", "small"),
        ("two", "white", "white", "yes"),
        ("a", "green", "tall", "hippopotamus"),
    )
]


@pytest.fixture(scope="module")
def profile(dev_cluster: DevCluster, tmp_path_factory) -> Path:
    """Profile of the development cluster with vLLM's Python for captions, and therefore for the judge."""
    path = tmp_path_factory.mktemp("profile") / "judge.toml"
    variables = "\n".join(f'{name} = "{value}"' for name, value in VARIABLES.items())
    path.write_text(f"""
executor = "slurm"
partition = "main"
gpus_per_node = 1
cpus_per_task = 1
array_parallelism = 2
poll_seconds = 1
[python]
caption = "{PYTHON}"
[environment]
{variables}
[minutes]
evaluate = 20
judge = 20
summarize = 20
""")
    return path


def test_arrays_with_a_judge(small_demo: Demo, answering_qwen: Path, profile: Path):
    """Each element runs once; the scores are the means of the judge's probabilities; nothing is computed again."""
    file = small_demo.folder / "questions.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    command = [
        sys.executable,
        "-m",
        "jobs.launch",
        "evaluate",
        str(small_demo.runs("train")[-1]),
        "--reference",
        "none",
    ]
    command += ["--prompts", str(file), "--judge", str(answering_qwen), "--home", str(small_demo.home)]
    command += ["--cluster", str(profile), "--wait", "--set", f"evaluation.num_shards={SHARDS}"]
    command += ["--set", "sample.steps=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=small_demo.folder, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(next(line for line in done.stdout.splitlines() if line.startswith("evaluated: ")).split()[1]).parent
    for kind in (evaluation.SAMPLE, evaluation.JUDGE):
        run = runs.load(small_demo.runs(kind)[-1])
        assert run.elements == tuple(range(SHARDS))
        assert ledger.shards(folder, kind) == set(range(SHARDS))
        started = [line["job"] for line in attempts(run.folder)]
        assert len(started) == len(set(started)) == SHARDS

    request = evaluation.read(folder)
    (variant,) = json.loads((folder / evaluation.RESULTS).read_text())["variants"]
    lines = evaluation.read_scores(folder, request, 0, evaluation.JUDGE)
    judged = [line["probabilities"] for line in lines if None not in line["probabilities"]]
    assert [line["row"] for line in lines] == list(range(4))
    assert 1 <= len(judged) < 4
    means = [math.sqrt(one * two) for one, two in judged]
    assert variant["figures"]["soft_tifa"]["value"] == pytest.approx(sum(means) / len(means))
    colors = [line["probabilities"][0] for line in lines if line["probabilities"][0] is not None]
    assert variant["skills"]["color"]["value"] == pytest.approx(sum(colors) / len(colors))
    assert variant["not_judged"] == sum(value is None for line in lines for value in line["probabilities"])
    assert f"judged by {answering_qwen}" in (folder / evaluation.PAGE).read_text()

    count = {kind: len(small_demo.runs(kind)) for kind in (evaluation.SAMPLE, evaluation.JUDGE)}
    again = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=small_demo.folder, timeout=200)
    assert again.returncode == 0, again.stderr
    assert count == {kind: len(small_demo.runs(kind)) for kind in count}
