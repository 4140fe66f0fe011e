"""Publication of a checkpoint on a model hub: its exported pipeline with a model card."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from jobs.state.checkpoint_names import find_checkpoint

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_repository(name: str) -> None:
    """Raise ValueError unless `name` is OWNER/NAME."""
    if not REPOSITORY.fullmatch(name):
        raise ValueError(f"--push-to-hub {name!r}: is no repository; give OWNER/NAME")


def push(name: str, repository: str) -> str:
    """Upload the exported pipeline of checkpoint `name` to a private repository, and return its URL.

    The repository is created if it does not exist. HF_ENDPOINT and HF_TOKEN are honoured. Raises ValueError if the
    checkpoint cannot be exported, or the hub refuses the upload or does not answer.
    """
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    checkpoint = find_checkpoint(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pipeline"
        command = [sys.executable, "-m", "jobs.tracking.hub", str(checkpoint), str(folder), repository]
        process = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if process.returncode:
            raise ValueError(f"{checkpoint}: cannot be exported; {process.stderr.strip().rpartition(chr(10))[2]}")
        api = HfApi()
        try:
            api.create_repo(repository, private=True, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"Upload {checkpoint.parents[1].name}"
            )
        except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"--push-to-hub {repository}: {constants.ENDPOINT} did not take it ({reason}); set HF_TOKEN to a token "
                "that may write there"
            ) from None
    return f"{constants.ENDPOINT}/{repository}"


def export(checkpoint: Path, folder: Path, name: str) -> None:
    """Write the pipeline of a training run's checkpoint. Runs in a process of its own, as it imports torch."""
    from jobs.tasks import sample
    from pixart.config.recipe import from_json

    run = checkpoint.parents[1]
    configuration = from_json((run / "config.json").read_text())
    model, record = sample.load_weights(checkpoint, "ema", None)
    pipeline, sources = sample.open_pipeline(model, record, configuration, checkpoint, export=True)
    provenance = {**sample.origin(run, model.stage, record, checkpoint, "ema"), **sources}
    sample.write_export(pipeline, folder, provenance, configuration, run.parents[1], name)


if __name__ == "__main__":
    try:
        export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except ValueError as error:
        sys.exit(str(error))
