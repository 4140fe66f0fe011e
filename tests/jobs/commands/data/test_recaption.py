"""`recaption` takes the instruction and the sampling of the dataset, else those of the recipe."""

import dataclasses

import pytest

from jobs import launch
from pixart.config.captions import REWRITE_INSTRUCTION, visible_attributes
from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.manifest import Manifest
from tests.pixart.data.captions.test_rewriting import FakeServer, url  # noqa: F401 - a fixture


@pytest.fixture
def dataset(tmp_path) -> str:
    """Directory of a dataset with sampled captions; only its manifest exists."""
    data = DataConfig(path=str(tmp_path / "data"), captions=visible_attributes())
    models = {"vae": "aa", "text_encoder": "bb", "captioner": "cc"}
    sizes = {"images": 4, "rows_per_shard": 1, "latent_shape": (4, 8, 8), "text_dim": 9}
    manifests.write(Manifest(data=data, class_names=(), models=models, **sizes))
    return data.path


def recaption(tmp_path, url, *words):  # noqa: F811
    return launch.main(
        ["recaption", "red ball", "--server", url, "--home", str(tmp_path), "--cluster", "local", *words]
    )


def test_the_dataset_gives_the_instruction_and_the_sampling(tmp_path, url, dataset):  # noqa: F811
    assert recaption(tmp_path, url, "--dataset", dataset) == 0
    (body,) = FakeServer.bodies
    assert body["messages"][0]["content"] == visible_attributes().rewrite_instruction
    assert (body["temperature"], body["top_k"]) == (0.7, 30)


def test_the_recipe_gives_them_without_a_dataset(tmp_path, url):  # noqa: F811
    (tmp_path / "mine.txt").write_text("Rewrite it.\n")
    mine = ["--set", f"data.captions.rewrite_instruction=@{tmp_path}/mine.txt", "--set", "data.captions.top_k=7"]
    assert recaption(tmp_path, url) == recaption(tmp_path, url, *mine) == 0
    default, custom = FakeServer.bodies
    assert default["messages"][0]["content"] == REWRITE_INSTRUCTION
    assert (custom["messages"][0]["content"], custom["top_k"]) == ("Rewrite it.", 7)


def test_another_instruction_than_the_datasets_is_refused(tmp_path, url, dataset, capsys):  # noqa: F811
    assert recaption(tmp_path, url, "--dataset", dataset, "--set", "data.captions.temperature=0") == 2
    assert capsys.readouterr().err.startswith(
        f"error: data.captions.temperature=0.0: the dataset {dataset} was created"
    )
    assert recaption(tmp_path, url, "--dataset", f"{dataset}-2") == 2
    assert "data-2 does not exist; run 'caption'" in capsys.readouterr().err
    assert FakeServer.bodies == []
    same = dataclasses.astuple(visible_attributes())[2]
    assert recaption(tmp_path, url, "--dataset", dataset, "--set", f"data.captions.temperature={same}") == 0
