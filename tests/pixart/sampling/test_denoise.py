import torch

from pixart.model.dit import DiT
from pixart.sampling.denoise import sample

SIZES = {"in_dim": 4, "dim": 16, "cond_dim": 8, "num_heads": 2, "num_blocks": 1, "base_image_size": 8, "num_classes": 3}


def random_model() -> DiT:
    torch.manual_seed(0)
    model = DiT(**SIZES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def labels(*values: int) -> dict[str, torch.Tensor]:
    return {"label": torch.tensor(values)}


@torch.no_grad()
def sample_reference(model: DiT, label: int, null: int, steps: int, guidance: float, seed: int) -> torch.Tensor:
    """Sample one image with Euler steps from t = 0 to t = 1."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        t = torch.tensor([step / steps])
        with_class, without = (model(x, t, label=torch.tensor([value])) for value in (label, null))
        x = x + (without + guidance * (with_class - without)) / steps
    return x[0]


def test_sample_matches_euler_with_guidance():
    model = random_model()
    for guidance in (1.0, 3.0):
        actual = sample(model, labels(0, 1), labels(2, 2), latent_size=8, steps=7, guidance=guidance, seed=5)
        for index in range(2):
            expected = sample_reference(model, index, 2, 7, guidance, 5 + index)
            assert torch.allclose(actual[index], expected, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch():
    model = random_model()
    options = {"latent_size": 8, "steps": 3, "guidance": 2.0}
    both = sample(model, labels(0, 1), labels(2, 2), seed=0, **options)
    second = sample(model, labels(1), labels(2), seed=1, **options)
    assert torch.allclose(both[1], second[0], atol=1e-5)
