"""Models of a recipe: whether their files are on disk, their licences, and the download of those that are not.

Models by hub name are in the cache of huggingface_hub (HF_HOME); HF_ENDPOINT and HF_TOKEN are honoured.
"""

from collections.abc import Iterator
from pathlib import Path

from conversion.reading.folders.layout import Index
from jobs.commands.doctor.finding import Finding, missing, ok
from pixart import records
from pixart.config.recipe import Recipe

BUILT_IN = {"vae": "demo", "text_encoder": "minilm"}
SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # of the files that define a model
DOCUMENTS = ("README.md", "LICENSE*")


def named(recipe: Recipe) -> dict[str, str]:
    """Return the models of a recipe by their configuration key, without those that come with the suite."""
    models = {f"data.{key}": getattr(recipe.data, key) for key in BUILT_IN}
    models = {key: name for key, name in models.items() if name != BUILT_IN[key.removeprefix("data.")]}
    if recipe.data.captioner == "vllm":
        models["data.caption_model"] = recipe.data.caption_model
    return models


def check(recipe: Recipe, *, fetch: bool) -> Iterator[Finding]:
    """Yield what is on disk of each model, after the download of what is missing if `fetch`."""
    from pixart.data.encoders.vae import cached_folder

    for key, name in named(recipe).items():
        if Path(name).exists() or name.startswith(("/", ".")):
            folder: Path | None = Path(name)
        else:
            problem = download(name) if fetch and not is_complete(cached_folder(name)) else None
            folder = cached_folder(name)
            if problem:
                yield missing(key, f"{name}: {problem}")
                continue
        yield describe(key, name, folder)


def describe(key: str, name: str, folder: Path | None) -> Finding:
    """Return whether the files of a model are complete, and its licence."""
    from pixart.data.encoders.licences import licence

    if folder is None or not is_complete(folder):
        local = folder is not None and not in_cache(folder)
        state = "has no weights" if local and folder and folder.exists() else "is not on disk"
        advice = (
            "name a folder with config.json and its .safetensors files" if local else f"run 'doctor --fetch'{token()}"
        )
        return missing(key, f"{name} {state}; {advice}")
    return ok(key, f"{folder}, licence {licence(folder)}")


def token() -> str:
    """Return the remark that there is no token for models whose licence must be accepted; empty if there is one."""
    from huggingface_hub import get_token

    return "" if get_token() else ", and set HF_TOKEN first if its licence must be accepted"


def in_cache(folder: Path) -> bool:
    return "snapshots" in folder.parts


def is_complete(folder: Path | None) -> bool:
    """Return whether a model folder has its configuration and all files of its weights."""
    if folder is None or not (folder / "config.json").is_file():
        return False
    for index in folder.glob("*.safetensors.index.json"):
        return all((folder / file).is_file() for file in set(records.read(index, Index)["weight_map"].values()))
    return any(path.is_file() for path in folder.glob("*.safetensors"))


def download(name: str) -> str | None:
    """Download the files of a hub model; return the problem, with its remedy, if that fails."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    from pixart.data.encoders.vae import split_hub_name

    repository, subfolder = split_hub_name(name)
    folder = f"{subfolder}/" if subfolder else ""
    patterns = [*(f"{folder}*{suffix}" for suffix in SUFFIXES), *DOCUMENTS]
    print(f"fetching {name} from {constants.ENDPOINT}", flush=True)
    try:
        snapshot_download(repository, allow_patterns=patterns)
    except GatedRepoError:
        page = f"{constants.ENDPOINT}/{repository}"
        return f"its licence is not accepted; accept it at {page}, and set HF_TOKEN to a token of that account"
    except RepositoryNotFoundError:
        return f"no such model at {constants.ENDPOINT}, or it needs a token; correct the name, or set HF_TOKEN"
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{constants.ENDPOINT} did not serve it ({reason}); try again on a machine with a network"
    return None
