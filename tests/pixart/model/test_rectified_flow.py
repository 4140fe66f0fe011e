import torch

from pixart.model.rectified_flow import flow_loss, interpolate, sample_time, shift_time, stratified_time
from pixart.sampling.denoise import make_scheduler


def test_interpolation_between_noise_and_data():
    data, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0.0, 1.0, 0.25])
    x = interpolate(data, noise, t)
    assert torch.equal(x[0], noise[0])
    assert torch.equal(x[1], data[1])
    assert torch.allclose(x[2], 0.25 * data[2] + 0.75 * noise[2])


def test_loss_is_the_squared_error_of_the_velocity():
    data, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert flow_loss(data - noise, data, noise) == 0
    assert torch.isclose(flow_loss(data - noise + 2, data, noise), torch.tensor(4.0))


def test_time_is_logit_normal():
    generator = torch.Generator().manual_seed(0)
    for draw in (sample_time, stratified_time):
        logit = draw(100_000, generator).logit()
        assert abs(logit.mean()) < 0.02
        assert abs(logit.std() - 1) < 0.02


def test_stratified_time_has_one_draw_per_stratum():
    t = stratified_time(50, torch.Generator().manual_seed(1))
    normal = torch.special.ndtr(t.double().logit())
    assert torch.equal((normal * 50).floor().long(), torch.arange(50))


def test_the_shift_is_that_of_the_noise_level():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for shift in (0.5, 3.0):
        noise_level = 1 - t
        expected = 1 - shift * noise_level / (1 + (shift - 1) * noise_level)
        assert torch.allclose(shift_time(t, shift), expected, rtol=0, atol=1e-15)
    assert shift_time(t, 1.0) is t


def test_a_shifted_schedule_is_that_of_the_scheduler_of_diffusers():
    sigmas = torch.linspace(1, 1 / 20, 20)
    scheduler = make_scheduler(2.5)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    assert torch.allclose(1 - shift_time(1 - sigmas, 2.5), scheduler.sigmas[:-1], atol=1e-6)
