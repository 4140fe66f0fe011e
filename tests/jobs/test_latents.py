import dataclasses

import numpy as np
import pyarrow.parquet as pq

from jobs import caption, init, latents
from pixart.config import to_json
from pixart.data import manifest as manifests
from pixart.data.store import Store
from pixart.data.text import TextEncoder
from pixart.recipes import demo


def test_short_captions_are_stored_beside_long_ones(tmp_path):
    recipe = demo(str(tmp_path))
    data = dataclasses.replace(recipe.data, images=6, shards=2, short_captions=True)
    init.run(to_json(dataclasses.replace(recipe, data=data)))
    caption.run(data.path, [0, 1])
    latents.run(data.path, [0, 1])
    store = Store(manifests.read(data.path))
    encoder = TextEncoder(data.text_encoder, tokens=data.text_tokens, scale=data.text_scale)
    parts = [pq.read_table(caption.part_path(data.path, shard)) for shard in range(2)]
    captions = [text for part in parts for text in part["short_caption"].to_pylist()]
    ids, mask = encoder.tokenize(captions)
    rows = np.arange(6)
    assert (store.read("short_token_ids", rows) == ids).all()
    assert (store.read("short_token_mask", rows) == mask).all()
    states = encoder.states(ids, mask).numpy()
    assert np.allclose(store.read("short_text_states", rows), states, atol=2e-2)
