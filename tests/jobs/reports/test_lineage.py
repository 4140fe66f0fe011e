"""The captioner in the lineage of a dataset; the rest of the lineage is tested on the pages of a demo."""

import pytest

from jobs.reports import lineage
from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.captions.captioner import INSTRUCTION, prompt_hash
from pixart.data.manifest import Manifest


@pytest.mark.parametrize(
    ("prompt", "instruction"), [(prompt_hash(INSTRUCTION), INSTRUCTION), ("00000000", "of another version")]
)
def test_the_captioner_and_its_prompt(tmp_path, prompt, instruction):
    data = DataConfig(path=str(tmp_path / "data"), captioner="vllm", caption_model="some/model")
    models = {"vae": "aa", "text_encoder": "bb", "captioner": f"cc-{prompt}"}
    sizes = {"images": 4, "rows_per_shard": 1, "latent_shape": (4, 8, 8), "text_dim": 9}
    manifests.write(Manifest(data=data, class_names=(), models=models, **sizes))
    node = lineage.trace(tmp_path, data.path)
    assert node.facts["captioner"] == f"vllm, some/model (cc-{prompt})"
    assert node.facts["instruction"].startswith(instruction)
