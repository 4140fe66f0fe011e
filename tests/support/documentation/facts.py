"""What no parser knows: exit codes, environment variables, files of run folders and metrics.

tests/test_reference.py compares each table with the code, in both directions.
"""

EXIT_CODES = {
    "jobs.launch": {
        0: "success",
        1: "a job failed, MLflow refused a record, an element of the run that `status` shows has failed, or the reader "
        "of the output has closed it",
        2: "bad input, with nothing written, or `doctor` found something missing",
        130: "interrupted by Ctrl-C",
    },
    "conversion.to_fp8": {
        0: "the checkpoint is written and has passed its acceptance checks",
        2: "bad input, with nothing written",
        3: "the checkpoint is written, but has failed its acceptance checks",
        130: "interrupted by Ctrl-C, with nothing written",
    },
    "conversion.to_bf16": {0: "the checkpoint is written", 2: "bad input, with nothing written"},
    "slurm.devcluster": {0: "success", 2: "bad input, or the cluster does not start"},
    "a task on a node": {143: "ended by a signal of the cluster, after it has saved or abandoned its work"},
}

ENVIRONMENT = {
    "PIXART_CLUSTER": "Cluster profile by name or path, in place of `--cluster`; required on a machine with Slurm.",
    "PIXART_HOME": "Home folder of datasets, runs and tracking, in place of `--home` (default: `outputs`).",
    "PIXART_MAIL": "Address that Slurm writes to, in the profile `hpg-b200`; it may be empty.",
    "PIXART_CACHE": "Folder on a local disk of the node that caches blocks of remote datasets (default: "
    "`~/.cache/pixart`).",
    "PIXART_CACHE_GB": "Limit of that cache in gigabytes (default: 64).",
    "PIXART_SERVE_TOKEN": "Bearer token of `serve` (default: a random one where others can reach the server).",
    "PIXART_ATTACK": "`long` makes the tests in `tests/attack` run the long campaign; `make attack` sets it.",
}
FOREIGN_ENVIRONMENT = {
    "SLURM_ACCOUNT": "Account of the jobs, in the profile `hpg-b200`.",
    "MLFLOW_TRACKING_URI": "MLflow server (default: one SQLite file in the home folder).",
    "WANDB_MODE": "`online` uploads the export of `--report wandb` (default: an offline run).",
    "WANDB_PROJECT": "Project of that export (default: `pixart`).",
    "HF_HOME": "Folder of models by hub name; all nodes that load a model need to see it.",
    "HF_ENDPOINT": "Address of the model hub.",
    "HF_TOKEN": "Token for models whose licence must be accepted, and for `release --push-to-hub`.",
    "MASTER_ADDR": "Address at which the ranks of a training job meet; the profile `dev` sets it.",
}

# Files of a run folder: name with * for a part that differs, writer, content.
RUN_FILES = (
    ("run.json", "launcher", "The record of the run: kind, dataset, elements, jobs and the request."),
    ("config.json", "launcher", "The resolved configuration."),
    ("profile.json", "launcher", "The resolved cluster profile."),
    ("command.txt", "launcher", "The command as it was typed."),
    ("git.txt", "launcher", "Commit and uncommitted changes of the checkout; only in a git repository."),
    ("sbatch.txt", "launcher", "The text that sbatch was given; only on Slurm."),
    ("code-*", "launcher", "The copy of the code that the jobs of a submission run from; only on Slurm."),
    ("tracking.json", "launcher", "Parameters, tags, parent and status for MLflow."),
    ("excluded_nodes.json", "launcher and tasks", "Nodes that the jobs of the run avoid, and why."),
    ("attempts.jsonl", "tasks", "One line for each start of each rank: node, time and restart count."),
    ("usage.jsonl", "tasks", "One line for each end of each rank: seconds, processor seconds and memory."),
    ("logs", "tasks", "Output, errors and results by job and rank, as submitit names them."),
    ("journal", "tasks", "Metrics, artifacts, tags and incidents, one file for each process."),
    ("result.json", "tasks", "The result of rank 0, which marks the run done; not of arrays."),
    ("mlflow.json", "synchronization", "What MLflow has of the journal."),
    ("tracking.log", "synchronization", "Errors of MLflow, which fail no job."),
    ("wandb", "synchronization", "The export of `--report wandb`."),
    ("lineage.html", "synchronization", "The page of what the run was made from."),
    ("summary.html", "synchronization", "The page of a training run: curves, previews and incidents."),
    ("checkpoints", "`train`", "Checkpoints `step-*`, each complete once it has `training.json`."),
    ("previews", "`train`", "Images of fixed conditions, by step."),
    ("profiles", "`train`", "The profiler's trace of three steps, with `profile_step`."),
    ("evaluate.toml", "`train`", "The settings of evaluations while training."),
    ("evaluations.log", "`train`", "The output of evaluations while training."),
    ("samples", "`sample`", "One PNG for each image, with its settings, and the steps of `--frames`."),
    ("samples.png", "`sample`", "All images on one sheet."),
    ("samples.json", "`sample`", "Prompts, seeds and settings of the images."),
    ("rewritten.jsonl", "`recaption`", "Requests and their rewritten texts."),
    ("endpoint.json", "`serve`", "Address and token of the running server; only its user can read it."),
)

# Metrics: name with a word in capitals for a part that differs, unit, meaning.
METRICS = (
    ("train/loss", "", "Mean squared error of the velocity, over the global batch of the step."),
    ("train/grad_norm", "", "Norm of the gradient before clipping."),
    ("train/lr", "", "Learning rate of the step."),
    ("train/seconds_per_step", "s", "Mean duration of the interval's steps."),
    ("train/images_per_second", "images/s", "Throughput of all ranks."),
    ("train/tokens_per_second", "tokens/s", "Throughput of all ranks in image and text tokens."),
    ("train/tflops_per_rank", "TFLOP/s", "Counted operations per second and rank."),
    ("train/mfu", "share", "Counted operations relative to the card's peak; only for cards with a known peak."),
    ("train/data_loading_fraction", "share", "Time spent waiting for data."),
    ("val/loss", "", "Loss of the master weights on the validation images."),
    ("val/loss_ema", "", "Loss of the EMA weights on the validation images."),
    ("fp8/scale/LINEAR.SLOT", "", "Scale of a linear's input, weight or grad_output; in MLflow the extremes."),
    ("fp8/headroom/LINEAR.SLOT", "powers of two", "How often the last amax may double before it saturates."),
    ("fp8/saturation_rate/LINEAR.SLOT", "share", "Steps in which the tensor was saturated."),
    ("data/images", "images", "Rows of a finished shard; the step is the shard."),
    ("data/num_valid", "images", "Valid rows of a shard, or of the dataset in an audit."),
    ("data/seconds", "s", "Duration of a shard."),
    ("data/images_per_second", "images/s", "Throughput of a shard."),
    ("data/rows", "images", "Rows of the dataset in an audit."),
    ("data/CHECK", "share", "Value of a check of the audit, such as `data/duplicates`."),
    ("data/rejected_REASON", "share", "Rows that were rejected for a reason."),
    ("conversion/loss_NAME", "", "Validation loss before and after a conversion, such as `loss_stage_2_FP8`."),
    ("conversion/gradient_cosine_similarity", "", "Cosine of the first step's gradients in BF16 and FP8."),
    ("conversion/output_error_STRATEGY", "", "Mean output error of a reparameterization over t."),
    ("sample/color", "share", "Images of the demo with the right main color."),
    ("sample/shape", "share", "Images of the demo with the right main shape."),
    ("eval/FIGURE", "", "A figure of an evaluation, at the step of the checkpoint."),
    ("eval/FIGURE_END", "", "Its 95 % interval, where END is `low` or `high`."),
    ("eval/SETTINGS/FIGURE", "", "A figure with other settings than the first ones of a sweep."),
    ("serve/images", "images", "Images that a server has made until its end."),
    ("system/queue_seconds", "s", "Time from the submission to the first start."),
    ("system/node_NODE/cpu_utilization_percentage", "%", "Busy processors of a node."),
    ("system/node_NODE/system_memory_usage_megabytes", "MB", "Memory in use."),
    ("system/node_NODE/system_memory_usage_percentage", "%", "Memory in use."),
    ("system/node_NODE/disk_usage_megabytes", "MB", "Space in use on the file system of the run folder."),
    ("system/node_NODE/disk_usage_percentage", "%", "Space in use on that file system."),
    ("system/node_NODE/disk_available_megabytes", "MB", "Free space on that file system."),
    ("system/node_NODE/gpu_utilization_percentage", "%", "Utilization, as a mean over the node's GPUs."),
    ("system/node_NODE/gpu_memory_usage_megabytes", "MB", "Memory in use, as a mean over the node's GPUs."),
    ("system/node_NODE/gpu_power_usage_watts", "W", "Power, as a mean over the node's GPUs."),
    ("system/node_NODE/load_average_1m", "", "Processes that run or wait, in training."),
    ("system/node_NODE/max_memory_allocated_gib", "GiB", "Peak memory of the node's first rank, in training."),
)
