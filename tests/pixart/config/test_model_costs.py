"""Parameters and operations by formula, against the model itself and PyTorch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from pixart.config.model import ModelConfig
from pixart.config.model_costs import num_parameters, text_encoder_operations, training_operations
from pixart.model.dit import DiT
from pixart.model.flops import training_flops

MODELS = {
    "XL/2": ModelConfig(),
    "small": ModelConfig(dim=96, cond_dim=64, num_heads=4, num_blocks=3, mlp_ratio=3, num_classes=5, patch_size=1),
}
ENCODERS = {
    "bert": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
    "t5": {"d_model": 64, "d_ff": 96, "d_kv": 8, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
    "gemma2": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("text_dim", [48, 2048])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_formulas_equal_the_model(model, stage, text_dim):
    config = model.dit_arguments()
    if stage == 2:
        del config["num_classes"]
        config["text_dim"] = text_dim
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in DiT(**config).parameters())
    assert num_parameters(model, stage, text_dim) == parameters
    assert training_operations(model, stage, 32 * 32, 77, text_dim).total == training_flops(config, 32, 77)


@pytest.mark.parametrize("kind", ENCODERS)
def test_operations_of_text_encoders(kind):
    config = {**ENCODERS[kind], "model_type": kind, "vocab_size": 100, "pad_token_id": 0}
    model = AutoModel.from_config(AutoConfig.for_model(**config))
    tokens = torch.ones(1, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        (model.encoder if kind == "t5" else model)(input_ids=tokens)
    assert text_encoder_operations(config, 40) == pytest.approx(counter.get_total_flops(), rel=0.01)
