"""The captioner in the lineage of a dataset; the rest of the lineage is tested on the pages of a demo."""

import pytest

from jobs.reports import lineage
from pixart import records
from pixart.config.captions import IMAGE_INSTRUCTION, visible_attributes
from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.captions.captioner import prompt_hash
from pixart.data.manifest import Manifest


@pytest.mark.parametrize(
    ("prompt", "instruction"), [(prompt_hash(IMAGE_INSTRUCTION), IMAGE_INSTRUCTION), ("00000000", "of another version")]
)
def test_the_captioner_and_its_prompt(tmp_path, prompt, instruction):
    data = DataConfig(path=str(tmp_path / "data"), captioner="vllm", caption_model="some/model")
    models = {"vae": "aa", "text_encoder": "bb", "captioner": f"cc-{prompt}"}
    sizes = {"images": 4, "rows_per_shard": 1, "latent_shape": (4, 8, 8), "text_dim": 9}
    manifests.write(Manifest(data=data, class_names=(), models=models, **sizes))
    node = lineage.trace(tmp_path, data.path)
    assert node.facts["captioner"] == f"vllm, some/model (cc-{prompt})"
    assert node.facts["instruction"].startswith(instruction)


def test_the_instruction_and_sampling_of_the_dataset(tmp_path):
    captions = visible_attributes()
    data = DataConfig(path=str(tmp_path / "data"), captioner="vllm", caption_model="some/model", captions=captions)
    models = {"vae": "aa", "text_encoder": "bb", "captioner": f"cc-{prompt_hash(captions.image_instruction)}"}
    sizes = {"images": 4, "rows_per_shard": 1, "latent_shape": (4, 8, 8), "text_dim": 9}
    manifests.write(Manifest(data=data, class_names=(), models=models, **sizes))
    node = lineage.trace(tmp_path, data.path)
    assert node.facts["instruction"] == captions.image_instruction != IMAGE_INSTRUCTION
    assert node.facts["sampling"] == "temperature 0.7, top_p 0.85, top_k 30, max_tokens 120"


def test_records_in_a_circle_are_refused(tmp_path):
    """A checkpoint that was converted from itself by its own record has no lineage."""
    path = tmp_path / "stage2.fp8"
    path.mkdir()
    config = {"in_dim": 4, "dim": 32}
    record = {"format": 2, "stage": 2, "step": 1, "config": config, "plan": None, "dataset": None, "files": {}}
    record |= {"normalization": {"mean": [0.0], "std": [1.0]}}
    record |= {"provenance": {"converted_from": str(path), "source_sha256": "aa"}}
    (path / "training.json").write_bytes(records.dumps(record))
    with pytest.raises(ValueError, match="name it among its own ancestors"):
        lineage.trace(tmp_path, str(path))
