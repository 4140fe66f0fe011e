"""The three main commands exactly as documented, and bad input to each of them."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conversion.export.writers import export_inference
from jobs import launch
from jobs.state import ledger
from jobs.state.run import Run
from jobs.tracking.mlflow_store import read_journal
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.config.dataset import DataConfig
from pixart.config.keys import overrides
from pixart.config.recipe import from_json, to_json
from pixart.data import manifest as manifests
from pixart.data.manifest import Manifest
from pixart.model.dit import DiT
from pixart.model.fp8.plan import Plan
from pixart.recipes import demo
from tests.support.environment import bare_environment
from tests.support.refusal import check_refusal

pytestmark = pytest.mark.slow


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line as a user does, without variables of the suite."""
    words = command.replace("python", sys.executable, 1).split(" ")
    return subprocess.run(
        words, capture_output=True, text=True, cwd=folder, env=bare_environment(), stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bare")


@pytest.mark.slow
def test_the_three_commands_as_written(folder, shared_data):
    shutil.copy(shared_data / "legacy/dev_stage1.pt", folder / "ckpt.pt")

    done = run(folder, "python -m jobs.launch caption --array 0-255")
    assert done.returncode == 0, done.stderr
    dataset = folder / "outputs/datasets/demo"
    assert f"{dataset}/captions" in done.stdout
    entries = ledger.entries(dataset, "caption", list(range(256)))
    assert len(entries) == 256
    assert sum(entry.valid for entry in entries.values()) == ledger.manifest(dataset)["images"]

    done = run(folder, "python -m conversion.to_fp8 ckpt.pt")
    assert done.returncode == 0, done.stderr
    assert "written     ckpt.fp8" in done.stdout
    plan = checkpoints.load(folder / "ckpt.fp8").plan
    sensitive = [name for name, reason in plan.kept.items() if reason.startswith("sensitive")]
    assert len(plan.linears) + len(sensitive) == 24
    assert len(sensitive) <= 4

    done = run(folder, "python -m jobs.launch train --nodes 4")
    assert done.returncode == 0, done.stdout + done.stderr
    last = next(line for line in done.stdout.splitlines() if "checkpoint" in line).split()[-1]
    saved = checkpoints.load(last)
    steps = demo("").stage1.steps
    assert (saved.stage, saved.step) == (1, steps)
    logs = list((Path(last).parents[1] / "logs").glob("*_log.out"))
    assert len(logs) == 4  # one per rank
    lines, _ = read_journal(Path(last).parents[1])
    logged = [line["step"] for line in lines if "train/loss" in line.get("metrics", {})]
    assert logged == list(range(1, steps + 1))  # only rank 0 logs metrics


def tree(folder: Path) -> list[str]:
    """Return the paths of all files and folders in a folder."""
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python -m jobs.launch paint", "paint"),
        ("python -m jobs.launch trian", "unknown command 'trian'; did you mean 'train'?"),
        ("python -m jobs.launch --verison", "unknown option '--verison'; did you mean '--version'?"),
        ("python -m jobs.launch --home x train", "the command goes before its options"),
        ("python -m jobs.launch train --ndoes 4", "unknown option '--ndoes'; did you mean '--nodes'?"),
        ("python -m jobs.launch train --node 4", "unknown option '--node'; did you mean '--nodes'?"),
        ("python -m jobs.launch train --zzz", "unknown option '--zzz'; run `python -m jobs.launch train --help`"),
        ("python -m jobs.launch train now", "unexpected argument 'now'"),
        ("python -m jobs.launch sample", "required: CHECKPOINT"),
        ("python -m jobs.launch sample text --export folder", "did you mean '--export-pipeline'?"),
        ("python -m jobs.launch caption --cluster nowhere", "unknown cluster profile 'nowhere'"),
        ("python -m jobs.launch init --set data.screening.min_side=0", "data.screening.min_side=0"),
        ("python -m jobs.launch init --set data.screening=1", "data.screening.min_side"),
        ("python -m jobs.launch audit --set audit.max_plain=2", "audit.max_plain=2"),
        ("python -m jobs.launch verify --dataset s3://bucket/data", "s3://bucket/data"),
        ("python -m jobs.launch caption --array 5-2", "'5-2'"),
        ("python -m jobs.launch caption --array a", "'a'"),
        ("python -m jobs.launch caption --array -1", "--array"),
        ("python -m jobs.launch caption --array=-1", "'-1'"),
        ("python -m jobs.launch caption --array ", "--array: is empty"),
        ("python -m jobs.launch caption --array 0-999999999999", "at most 1000000 shards"),
        ("python -m jobs.launch caption --array 0-300", "shard 300"),
        ("python -m jobs.launch caption --home ", "--home: is empty"),
        ("python -m jobs.launch caption --home broken.pt", "Not a directory"),
        ("python -m jobs.launch caption --home s3://bucket/home", "a folder of a file system"),
        ("python -m jobs.launch status --home what?", "without ? % #"),
        ("python -m jobs.launch caption --dataset images", "holds other files, such as dog.png"),
        ("python -m jobs.launch status --home newer", "run.json: is damaged or of another version"),
        ("python -m jobs.launch caption --home /proc/home", "/proc/home"),
        ("python -m jobs.launch caption --set data.path=", "data.path: is empty"),
        ("python -m jobs.launch caption --set data.text_scale=nan", "data.text_scale=nan"),
        ("python -m jobs.launch train --set stage1.beta1=2", "stage1.beta1=2"),
        ("python -m jobs.launch caption --dataset broken.pt", "Not a directory"),
        ("python -m jobs.launch caption --dataset damaged", "manifest.json: is not JSON"),
        ("python -m jobs.launch caption --cluster damaged/binary.toml", "damaged/binary.toml"),
        ("python -m jobs.launch latents", "demo does not exist; run 'caption'"),
        ("python -m jobs.launch audit", "demo does not exist; run 'caption'"),
        ("python -m jobs.launch verify", "demo does not exist; run 'caption'"),
        ("python -m jobs.launch demo --nodes 3", "does not divide over 3 ranks"),
        ("python -m jobs.launch demo --set model.num_heads=3", "model.dim=128"),
        ("python -m jobs.launch demo --set stage1.fp8=true", "stage1.fp8=true"),
        ("python -m jobs.launch pipeline --set stage2.fp8_backend=torchao", "fp8_backend=torchao"),
        ("python -m jobs.launch caption --recipe nothing", "unknown recipe 'nothing'"),
        ("python -m jobs.launch caption --set data.sauce=demo", "data.sauce: unknown key; did you mean data.source?"),
        ("python -m jobs.launch caption --set data.source=/no/such/folder", "/no/such/folder"),
        ("python -m jobs.launch caption --set data.vae=/no/such/vae", "/no/such/vae"),
        ("python -m jobs.launch caption --set data.num_shards=0", "data.num_shards=0"),
        ("python -m jobs.launch train --nodes 0", "'0'"),
        ("python -m jobs.launch train --stage 3", "3"),
        ("python -m jobs.launch train --stage 2", "conversion.to_fp8"),
        ("python -m jobs.launch train --from nowhere", "nowhere"),
        ("python -m jobs.launch train --from broken.pt", "no checkpoint directory"),
        ("python -m jobs.launch train --from truncated", "truncated"),
        ("python -m jobs.launch train --from half", "half/ema/config.json: missing, damaged or truncated"),
        ("python -m jobs.launch sample text --file prompts.CSV", "one prompt per line, or a .jsonl file"),
        ("python -m jobs.launch train --from damaged", "training.json: is damaged"),
        ("python -m jobs.launch train --set model.num_blocks=0", "model.num_blocks=0"),
        ("python -m jobs.launch train --set stage1.lr=inf", "stage1.lr=inf"),
        ("python -m jobs.launch train --resume nowhere", "nowhere"),
        ("python -m jobs.launch train --resume ", "--resume: is empty"),
        ("python -m jobs.launch train --resume run --recipe xl", "is a run of the recipe demo"),
        ("python -m jobs.launch train --resume foreign", "config.json: is damaged or of another version"),
        ("python -m jobs.launch train --from ", "--from: is empty"),
        ("python -m jobs.launch train --set stage1.max_grad_norm=0", "max_grad_norm=0"),
        ("python -m jobs.launch train --set stage1.beta1=1", "beta1=1"),
        ("python -m jobs.launch train --set stage1.seed=99999999999999999999", "seed=99999999999999999999"),
        ("python -m jobs.launch train --set data.source=data", "demo does not exist; run 'caption' to create it"),
        ("python -m jobs.launch convert done --output ", "--output: is empty"),
        ("python -m conversion.to_fp8 truncated --dataset ", "--dataset: is empty"),
        ("python -m jobs.launch init --set data.source=.", "would be inside its own source"),
        ("python -m jobs.launch recaption dog --server ", "--server: is empty"),
        ("python -m conversion.to_fp8 unknown --text-dim 9", "its tensors are not those of a stage-1 or stage-2 model"),
        ("python -m conversion.to_bf16 fp8-training --output fp8-training --overwrite", "is or holds the source"),
        ("python -m conversion.to_bf16 fp8-training --output broken.pt/x", "broken.pt"),
        ("python -m jobs.launch train --recipe demo --from failed", "--accept-failed-conversion"),
        ("python -m jobs.launch train --recipe demo --from failed-earlier", "--accept-failed-conversion"),
        ("python -m jobs.launch train --nodes 3", "does not divide over 3 ranks"),
        (
            "python -m jobs.launch train --set stage1.gradient_accumulation_steps=3",
            "stage1.gradient_accumulation_steps=3",
        ),
        (
            "python -m jobs.launch train --set stage1.validate_every=5 --set stage1.num_validation_samples=0",
            "num_validation_samples",
        ),
        ("python -m jobs.launch train --set stage1.sharding=half", "fsdp or hsdp"),
        ("python -m jobs.launch train --set stage1.fp8=true", "conversion.to_fp8"),
        ("python -m jobs.launch train --set stage1.short_caption_prob=0.5", "stage 1 reads no captions"),
        ("python -m jobs.launch train --recipe demo --from done --set model.dim=64", "model.dim=64"),
        ("python -m jobs.launch convert nowhere", "nowhere"),
        ("python -m jobs.launch convert done", "--overwrite"),
        ("python -m jobs.launch convert broken.pt", "no PyTorch checkpoint"),
        ("python -m jobs.launch convert pipe.pt", "pipe.pt"),
        ("python -m jobs.launch convert text --stage 1 --output out", "is already a stage-2 checkpoint"),
        ("python -m jobs.launch convert failed --output out --dataset nodata", "--dataset nodata"),
        ("python -m jobs.launch convert failed --num-batches 0", "--num-batches 0: must be at least 1"),
        ("python -m jobs.launch sample nowhere", "nowhere"),
        ("python -m jobs.launch sample done", "done: names no dataset"),
        ("python -m jobs.launch sample lost", "nodata does not exist; give its present path by --dataset"),
        ("python -m jobs.launch sample text --dataset nodata", "nodata does not exist"),
        ("python -m jobs.launch sample text --set data.max_text_tokens=7", "data.max_text_tokens=7"),
        ("python -m jobs.launch sample text --set sample.guidance=nan", "sample.guidance=nan"),
        ("python -m jobs.launch sample text --set sample.seed=-1", "sample.seed=-1"),
        ("python -m jobs.launch sample text --class circle", "is a checkpoint of stage 2"),
        ("python -m jobs.launch sample text --file nowhere.txt", "--file nowhere.txt"),
        ("python -m jobs.launch sample text --file empty.txt", "--file empty.txt"),
        ("python -m jobs.launch sample text --file bad.jsonl", "bad.jsonl: line 2"),
        ("python -m jobs.launch sample text --recaption", "--recaption rewrites prompts"),
        (
            "python -m jobs.launch sample text --prompt dog --server http://127.0.0.1:9/v1",
            "--server: needs --recaption",
        ),
        ("python -m jobs.launch sample text --prompt dog --recaption --server http://127.0.0.1:9/v1", "127.0.0.1:9"),
        ("python -m jobs.launch sample text --prompt dog --model qwen", "--model: needs --recaption"),
        ("python -m jobs.launch sample text --per-prompt 0", "'0'"),
        ("python -m jobs.launch sample text --size 1024", "must be WIDTHxHEIGHT in pixels"),
        ("python -m jobs.launch sample text --size 1024x768", "was not trained at this size"),
        ("python -m jobs.launch sample text --force-size", "--force-size: needs --size"),
        ("python -m jobs.launch sample text --weights best", "best"),
        ("python -m jobs.launch sample text --export-pipeline done", "--export-pipeline done: exists"),
        ("python -m jobs.launch sample text --export-pipeline broken.pt/folder", "lies below a file"),
        ("python -m jobs.launch sample text --export-pipeline ", "--export-pipeline: is empty"),
        ("python -m jobs.launch sample wide", "text embeddings of width 11"),
        ("python -m jobs.launch sample fp8 --weights master", "--weights master"),
        ("python -m jobs.launch sample fp8 --export-pipeline folder", "is in FP8"),
        ("python -m jobs.launch sample classes --prompt dog", "is a checkpoint of stage 1"),
        ("python -m jobs.launch sample classes --file bad.jsonl", "is a checkpoint of stage 1"),
        ("python -m jobs.launch sample classes --recaption", "is a checkpoint of stage 1"),
        ("python -m jobs.launch sample classes --class owl", "--class owl"),
        ("python -m jobs.launch sample classes --class 2", "--class 2"),
        ("python -m jobs.launch sample classes --class=-1", "--class -1"),
        ("python -m jobs.launch recaption", "there are no prompts"),
        ("python -m jobs.launch recaption --file nowhere.txt", "--file nowhere.txt"),
        ("python -m jobs.launch recaption dog --output dog.png", "--output dog.png"),
        ("python -m jobs.launch recaption dog --output nowhere/dogs.txt", "the folder nowhere does not exist"),
        ("python -m jobs.launch recaption --file dogs.txt --output ./dogs.txt", "is the file of --file"),
        ("python -m jobs.launch recaption dog --compare nowhere", "--compare nowhere"),
        ("python -m jobs.launch recaption dog --compare broken.pt", "Not a directory"),
        ("python -m jobs.launch recaption dog --server http://127.0.0.1:9/v1", "127.0.0.1:9"),
        ("python -m jobs.launch status", "has no runs"),
        ("python -m jobs.launch status nowhere", "has no runs"),
        ("python -m jobs.launch status --home damaged", "run.json: is not JSON"),
        ("python -m jobs.launch retry", "has no runs"),
        ("python -m jobs.launch logs --shard x", "'x'"),
        ("python -m jobs.launch sync", "has no runs"),
        ("python -m jobs.launch open nowhere", "has no runs"),
        ("python -m jobs.launch lineage", "has no runs"),
        ("python -m jobs.launch lineage broken.pt", "not an image"),
        ("python -m jobs.launch lineage damaged", "training.json: is damaged"),
        ("python -m jobs.launch lineage other.png", "names no checkpoint"),
        ("python -m jobs.launch lineage done --html nowhere/page.html", "nowhere"),
        ("python -m jobs.launch lineage done --html damaged", "--html damaged"),
        ("python -m jobs.launch lineage done --html done/training.json", "is not an HTML page"),
        ("python -m jobs.launch release nowhere", "nowhere"),
        ("python -m jobs.launch release done", "not in a run folder"),
        ("python -m jobs.launch release done --name a/b", "'a/b'"),
        ("python -m conversion.to_fp8 nowhere.pt", "nowhere.pt"),
        ("python -m conversion.to_fp8 broken.pt", "broken.pt"),
        ("python -m conversion.to_fp8 pipe.pt", "pipe.pt"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(tmp_path, monkeypatch, capfd, stage1, command, message):
    """Commands are called in this process as `python -m` would call them: imports would take longer than the test."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - bare_environment().keys():
        monkeypatch.delenv(name)
    for name, value in bare_environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "broken.pt").write_text("no checkpoint")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    weights = checkpoints.save(stage1, tmp_path / "truncated") / "transformer" / checkpoints.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    checkpoints.save(dataclasses.replace(stage1, plan=Plan(linears=())), tmp_path / "fp8-training")
    shutil.rmtree(checkpoints.save(stage1, tmp_path / "half") / "ema")
    for name in ("done", "done.fp8"):
        checkpoints.save(stage1, tmp_path / name)
    for name, key in (("failed", "acceptance"), ("failed-earlier", "gate")):  # the key of an earlier version
        checkpoints.save(dataclasses.replace(stage1, provenance={key: "FAIL"}), tmp_path / name)
    save_samplable_checkpoints(stage1, tmp_path)
    save_damaged_files(tmp_path)
    save_runs(tmp_path)
    before = tree(tmp_path)
    module, *arguments = command.removeprefix("python -m ").split(" ")
    check_refusal(importlib.import_module(module).main, arguments, message, capfd)
    assert tree(tmp_path) == before


def test_resumed_run_keeps_its_configuration(tmp_path, monkeypatch, stage1, capsys):
    """If the newest checkpoint is truncated, the previous one is used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIXART_CLUSTER", "local")
    configuration = overrides.apply(
        demo(str(tmp_path)), ["stage1.global_batch_size=8", "stage1.lr=0.5", "stage1.steps=20", "model.dim=64"]
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(to_json(configuration))
    for step in (3, 9):
        saved = checkpoints.save(dataclasses.replace(stage1, step=step), tmp_path / f"run/checkpoints/step-{step:08d}")
    arguments = ["train", "--resume", "run", "--set", "stage1.lr=0.25", "--accept-failed-audit", "--dry-run"]
    for newest in (9, 3):
        assert launch.main(arguments) == 0
        printed = capsys.readouterr().out
        recipe = from_json(printed[printed.index("{") : printed.rindex("}") + 1])
        assert (recipe.stage1.global_batch_size, recipe.stage1.lr, recipe.stage1.steps) == (8, 0.25, 20)
        assert launch.main([*arguments, "--set", "stage1.steps=2"]) == 2
        assert f"has done {newest} steps" in capsys.readouterr().err
        weights = saved / "transformer" / checkpoints.WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-10])


def test_continuing_an_fp8_checkpoint_in_bf16_is_reported(tmp_path, monkeypatch, stage1, capsys):
    monkeypatch.setenv("PIXART_CLUSTER", "local")
    checkpoints.save(dataclasses.replace(stage1, plan=Plan(linears=())), tmp_path / "start")
    words = ["train", "--recipe", "demo", "--from", str(tmp_path / "start"), "--home", str(tmp_path)]
    words += ["--accept-failed-audit", "--dry-run"]
    assert launch.main(words) == 0
    assert "stage1.fp8=true keeps them" in capsys.readouterr().err
    assert launch.main([*words, "--set", "stage1.fp8=true"]) == 0
    assert not capsys.readouterr().err


def test_active_run_is_not_resumed(tmp_path, monkeypatch, stage1, capsys):
    monkeypatch.setenv("PIXART_CLUSTER", "local")
    folder = tmp_path / "runs/20260101-000000-train-abcd"
    checkpoints.save(dataclasses.replace(stage1, step=3), folder / "checkpoints/step-00000003")
    (folder / "config.json").write_text(to_json(demo(str(tmp_path))))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "submitit"]) as process:
        jobs = ((str(process.pid), ()),)
        Run(folder=folder, kind="train", executor="local", dataset="", total=9, nodes=1, jobs=jobs).save()
        assert launch.main(["train", "--home", str(tmp_path), "--resume", str(folder)]) == 2
        assert f"the run is active as job {process.pid}" in capsys.readouterr().err
        process.kill()


def test_paths_are_relative_to_the_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIXART_CLUSTER", "local")
    (tmp_path / "photos").mkdir()
    words = ["init", "--set", "data.source=photos", "--set", "data.vae=owner/vae", "--home", "home", "--dry-run"]
    assert launch.main(words) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["source"], data["vae"]) == (f"{tmp_path}/photos", "owner/vae")
    assert data["text_encoder"] == "minilm"


def test_the_convert_job_takes_checkpoints_of_other_kinds(tmp_path, monkeypatch, stage1, capsys):
    monkeypatch.setenv("PIXART_CLUSTER", "local")
    folder = tmp_path / "weights"
    checkpoints.save_weights(stage1.model, stage1.config, folder)
    words = ["convert", str(folder), "--home", str(tmp_path / "home"), "--dry-run"]
    assert launch.main(words) == 0
    file = folder / checkpoints.WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])
    assert launch.main(words) == 2
    assert "damaged or truncated" in capsys.readouterr().err


def save_damaged_files(folder: Path) -> None:
    """Write truncated, unknown and binary files in place of those that commands read first, and a FIFO."""
    run = folder / "damaged/runs/20260101-000000-train-abcd"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"kind": ')
    (folder / "damaged/training.json").write_text("{}")
    newer = folder / "newer/runs/20260101-000000-train-abcd"
    Run(folder=newer, kind="train", executor="local", dataset="", total=9).save()
    (newer / "run.json").write_text((newer / "run.json").read_text().replace("{", '{"hosts": 3, ', 1))
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images/dog.png")
    (folder / "damaged/manifest.json").write_text('{"data": {}')
    (folder / "damaged/binary.toml").write_bytes(b"\xff\xfe")
    os.mkfifo(folder / "pipe.pt")


def save_runs(folder: Path) -> None:
    """Write the configuration of a run, one of another version, and weights of an unknown model."""
    for name, changed in (("run", {}), ("foreign", {"audit": {"max_noise": 1}})):
        (folder / name).mkdir()
        values = {**json.loads(to_json(demo(str(folder)))), **changed}
        (folder / name / "config.json").write_text(json.dumps(values))
    (folder / "unknown").mkdir()
    (folder / "unknown/config.json").write_text('{"act_fn": "silu"}')
    save_file({"weight": torch.zeros(2)}, folder / "unknown" / checkpoints.WEIGHTS)


def save_samplable_checkpoints(stage1: Checkpoint, folder: Path) -> None:
    """Write a dataset, checkpoints of both stages, an FP8 export, and prompt files."""
    data = DataConfig(path=str(folder / "data"))
    sizes = {"images": 4, "rows_per_shard": 2, "latent_shape": (4, 8, 8), "text_dim": 9}
    manifests.write(Manifest(data=data, class_names=("circle", "square"), models={}, **sizes))
    saved = {"classes": ("data", None), "text": ("data", 9), "wide": ("data", 11), "lost": ("nodata", 9)}
    for name, (dataset, text_dim) in saved.items():
        config = {**stage1.config, **({"num_classes": None, "text_dim": text_dim} if text_dim else {})}
        state = DiT(**config).state_dict()
        kind = {"stage": 2 if text_dim else 1, "config": config, "model": state, "ema": state, "optimizer": {}}
        checkpoints.save(dataclasses.replace(stage1, dataset=str(folder / dataset), **kind), folder / name)
    text = dataclasses.replace(checkpoints.load(folder / "text"), plan=Plan(linears=()))
    export_inference(text, folder)
    (folder / "inference").rename(folder / "fp8")
    (folder / "empty.txt").write_text("\n")
    (folder / "prompts.CSV").write_text("text\na dog\n")
    (folder / "dogs.txt").write_text("a dog\n")
    (folder / "bad.jsonl").write_text('{"text": "a dog"}\n{"caption": "a cat"}\n')


@pytest.mark.slow
def test_demo_links_its_runs_and_ends_with_a_picture(small_demo):
    """`make demo` runs the same command with its default number of steps."""
    from mlflow.tracking import MlflowClient

    assert "main color right in" in small_demo.output
    assert small_demo.sheet.stat().st_size > 1000
    client = MlflowClient(f"sqlite:///{small_demo.home}/mlflow.db")
    stored = client.search_runs([client.get_experiment_by_name("pixart").experiment_id])
    jobs = {run.data.tags["pixart.job"]: run for run in stored}
    assert set(jobs) == {"demo", "caption", "latents", "audit", "train", "convert", "sample"}
    assert len(stored) == 8
    parents = {run.data.tags.get("mlflow.parentRunId") for run in stored if run.data.tags["pixart.job"] != "demo"}
    assert parents == {jobs["demo"].info.run_id}
    assert {run.info.status for run in stored} == {"FINISHED"}
    for run in stored:
        assert {"pixart.cluster", "pixart.user", "pixart.command", "pixart.run"} <= run.data.tags.keys()
    for run in (jobs["caption"], jobs["train"]):
        assert {"pixart.jobs", "pixart.attempt", "pixart.dataset"} <= run.data.tags.keys()
    history = client.get_metric_history(jobs["caption"].info.run_id, "data/images")
    assert sorted((point.step, point.value) for point in history) == [(shard, 16) for shard in range(4)]
    artifacts = {run.data.tags["pixart.job"]: client.list_artifacts(run.info.run_id) for run in stored}
    pages = {job: {file.path for file in files} for job, files in artifacts.items()}
    assert {"summary.html", "lineage.html"} <= pages["train"]
    assert {"report.html", "lineage.html"} <= pages["convert"]
    assert {"audit.html", "lineage.html"} <= pages["audit"]
    assert {"samples.png", "lineage.html"} <= pages["sample"]


@pytest.mark.slow
def test_interrupting_ends_the_jobs_too(tmp_path):
    """SIGTERM to the launcher ends its tasks, and the same command continues with the remaining shards."""
    words = [
        sys.executable,
        "-m",
        "jobs.launch",
        "caption",
        "--set",
        "data.max_images=8000",
        "--set",
        "data.num_shards=200",
    ]
    launcher = subprocess.Popen(
        words, cwd=tmp_path, env=bare_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    dataset = tmp_path / "outputs/datasets/demo"
    deadline = time.monotonic() + 60
    while not list(dataset.glob("ledger/caption/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.terminate()
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert "interrupted\n" in errors
    assert "jobs/launch.py" not in errors  # submitit's controller prints a traceback, the launcher must not
    time.sleep(2)
    done = len(list(dataset.glob("ledger/caption/*.json")))
    time.sleep(1)
    assert 0 < len(list(dataset.glob("ledger/caption/*.json"))) == done < 200
    again = run(tmp_path, "python -m jobs.launch caption")
    assert again.returncode == 0, again.stderr
    assert len(list(dataset.glob("ledger/caption/*.json"))) == 200
    assert not list(dataset.rglob(".*"))
