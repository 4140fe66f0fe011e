"""The transformer: compatibility with existing checkpoints, and each layer against a naive implementation."""

import math

import pytest
import torch
import torch.nn.functional as F

from pixart.model.dit import DiT, null_labels, parameter_groups
from pixart.model.layers import Attention, PositionEmbedding, TimeEmbedding

SIZES = {"in_dim": 4, "dim": 32, "cond_dim": 16, "num_heads": 2, "num_blocks": 2, "base_image_size": 8}


def random_model(**options: int) -> DiT:
    """Return a model with random parameters, so that no layer is hidden by a zero initialization."""
    torch.manual_seed(0)
    model = DiT(**SIZES, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", ["dev_stage1", "dev_stage1_bf16"])
def test_original_stage1_outputs(shared_data, name):
    expected = torch.load(shared_data / f"legacy/{name}.expected.pt", weights_only=True)
    saved = torch.load(shared_data / f"legacy/{name}.pt", weights_only=True)
    for key, out in (("model", "out"), ("model_ema", "ema_out")):
        model = DiT(**expected["config"])
        state = {name.removeprefix("_orig_mod."): tensor.float() for name, tensor in saved[key].items()}
        model.load_state_dict(state, strict=True)
        actual = model(expected["x"], expected["t"], expected["label"])
        assert (actual - expected[out]).abs().max() <= 1e-5
        if key == "model":
            wide = model(expected["x_wide"], expected["t_wide"], expected["label_wide"])
            assert (wide - expected["out_wide"]).abs().max() <= 1e-5


def test_original_stage2_outputs(shared_data):
    saved = torch.load(shared_data / "legacy/dev_stage2.pt", weights_only=True)
    model = DiT(**saved["config"])
    model.load_state_dict(saved["model"], strict=True)
    actual = model(saved["x"], saved["t"], text=saved["text_tokens"], text_mask=saved["text_mask"])
    assert (actual - saved["out"]).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [{"num_classes": 5}, {"text_dim": 24}])
def test_pretrained_round_trip_is_exact(tmp_path, options):
    model = random_model(**options)
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert loaded.config.dim == 32
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_state_dict_keys():
    stage1 = set(DiT(**SIZES, num_classes=5).state_dict())
    block = {
        f"attention.attention.{name}_proj.{kind}" for name in ("q", "k", "v", "out") for kind in ("weight", "bias")
    }
    block |= {"attention.attention.q_norm.weight", "attention.attention.k_norm.weight"}
    block |= {f"{name}.{kind}" for name in ("mlp.linear1", "mlp.linear2") for kind in ("weight", "bias")}
    modulation = {f"{name}.{kind}" for name in ("adaLN1", "adaLN2") for kind in ("weight", "bias")}
    outside = {"patchify.weight", "patchify.bias", "time_proj.freqs", "pos_embed.div_term"}
    outside |= {"linear_out.weight", "linear_out.bias"} | modulation
    expected = outside | {"cond_proj.weight"} | {f"dit_blocks.{i}.{key}" for i in (0, 1) for key in block | modulation}
    assert stage1 == expected
    stage2 = set(DiT(**SIZES, text_dim=24).state_dict())
    cross = {key.replace("attention.attention", "cross_attention") for key in block if key.startswith("attention")}
    single = {f"{name}_single.{kind}" for name in ("adaLN1", "adaLN2") for kind in ("weight", "bias")}
    per_block = block | cross | {"adaLNembed"}
    assert stage2 == outside | single | {f"dit_blocks.{i}.{key}" for i in (0, 1) for key in per_block}


def test_time_embedding_against_the_formula():
    half = 8
    actual = TimeEmbedding(16)(torch.tensor([0.3]))[0]
    for k in range(half):
        angle = 0.3 * math.exp(-math.log(10000) * k / (half - 1))
        assert actual[2 * k] == pytest.approx(math.sin(angle), abs=1e-6)
        assert actual[2 * k + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_position_embedding_against_the_formula():
    actual = PositionEmbedding(16, base_grid=4)(2, 8).view(2, 8, 16)
    for y in range(2):
        for x in range(8):
            for k in range(4):
                frequency = math.exp(-math.log(10000) * 2 * k / 8)
                assert actual[y, x, 2 * k] == pytest.approx(math.sin(y * 4 / 2 * frequency), abs=1e-5)
                assert actual[y, x, 8 + 2 * k + 1] == pytest.approx(math.cos(x * 4 / 8 * frequency), abs=1e-5)


def test_attention_against_its_formula():
    torch.manual_seed(0)
    attention = Attention(8, 2, kv_dim=6)
    torch.nn.init.normal_(attention.q_norm.weight)
    query, context = torch.randn(3, 5, 8), torch.randn(3, 7, 6)
    mask = torch.rand(3, 7) < 0.6
    mask[:, 0] = True

    def rms_norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * weight

    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q = rms_norm(attention.q_proj(query)[..., part], attention.q_norm.weight)
        k = rms_norm(attention.k_proj(context)[..., part], attention.k_norm.weight)
        scores = (q @ k.transpose(1, 2) / 2).masked_fill(~mask[:, None], -torch.inf)
        heads.append(scores.softmax(-1) @ attention.v_proj(context)[..., part])
    expected = attention.out_proj(torch.cat(heads, -1))
    assert torch.allclose(attention(query, context, mask), expected, atol=1e-5)


def test_masked_text_has_no_effect():
    model = random_model(text_dim=24)
    x, t, text = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 6, 24)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    changed = text.clone()
    changed[1, 3:] = 100
    first, second = (model(x, t, text=tokens, text_mask=mask) for tokens in (text, changed))
    assert torch.equal(first, second)
    changed[1, 0] += 1
    assert not torch.allclose(model(x, t, text=changed, text_mask=mask)[1], first[1])


def test_stage1_block_against_the_paper():
    """DiT's adaLN-zero block, written out with the modulation chunks in the checkpoints' order."""
    model = random_model(num_classes=5)
    block = model.dit_blocks[0]
    x, condition = torch.randn(2, 16, 32), torch.randn(2, 16)
    m = block.adaLN2(F.silu(block.adaLN1(condition))).view(2, 6, 1, 32)
    gamma1, beta1, gamma2, beta2, alpha1, alpha2 = (m[:, i] for i in range(6))
    inner = F.layer_norm(x, (32,)) * (1 + gamma1) + beta1
    expected = x + alpha1 * block.attention.attention(inner, inner)
    inner = F.layer_norm(expected, (32,)) * (1 + gamma2) + beta2
    expected = expected + alpha2 * block.mlp.linear2(F.silu(block.mlp.linear1(inner)))
    assert torch.allclose(block(x, condition, None, None), expected, atol=1e-5)


def test_new_model_predicts_zero_and_has_a_stage():
    for options, stage in (({"num_classes": 5}, 1), ({"text_dim": 24}, 2)):
        model = DiT(**SIZES, **options)
        assert model.stage == stage
        extra = {"label": null_labels(model, 2)} if stage == 1 else {"text": torch.randn(2, 3, 24)}
        assert model(torch.randn(2, 4, 8, 8), torch.rand(2), **extra).abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"num_classes": 5, "text_dim": 24}])
def test_exactly_one_of_num_classes_and_text_dim_is_required(options):
    with pytest.raises(ValueError, match="num_classes"):
        DiT(**SIZES, **options)


def test_parameter_groups_partition_the_parameters():
    model = DiT(**SIZES, text_dim=24)
    decayed, undecayed = parameter_groups(model)
    assert sorted(decayed + undecayed) == sorted(name for name, _ in model.named_parameters())
    assert all(name.endswith("bias") or "norm" in name for name in undecayed)
    assert "dit_blocks.0.adaLNembed" in decayed
    stage1 = parameter_groups(DiT(**SIZES, num_classes=5))
    assert "cond_proj.weight" in stage1[1]
    assert stage1[0][0] == "patchify.weight"
