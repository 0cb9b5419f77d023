"""The diffusion arithmetic against closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimti import edm


def sigma_like(x, value):
    return torch.full((x.shape[0],), value, dtype=x.dtype)


@given(st.floats(math.log(0.002), math.log(700)))
def test_preconditioning_keeps_unit_variance(log_sigma):
    """For unit data, input and target of the network have unit variance at every noise level (EDM, appendix B.6)."""
    sigma = torch.tensor(log_sigma, dtype=torch.float64).exp()
    c_skip, c_out, c_in, c_noise = edm.precondition(sigma)
    assert math.isclose(c_in**2 * (1 + sigma**2), 1)
    target_variance = ((1 - c_skip) ** 2 + (c_skip * sigma) ** 2) / c_out**2
    assert math.isclose(target_variance, 1)
    assert math.isclose(c_noise, 0.25 * log_sigma, abs_tol=1e-12)


def test_karras_sigmas():
    sigmas = edm.karras_sigmas(25, 0.002, 700.0, 7.0)
    assert len(sigmas) == 26 and sigmas[-1] == 0
    assert sigmas[0].item() == pytest.approx(700, rel=1e-5) and sigmas[-2].item() == pytest.approx(0.002, rel=1e-3)
    steps = sigmas[:-1].double() ** (1 / 7)
    assert torch.allclose(steps.diff(), steps.diff().mean().expand(24), rtol=1e-3)


@pytest.mark.parametrize("steps, expected", [(25, 0.855), (50, 0.926), (100, 0.963)])
def test_euler_on_a_unit_gaussian(steps, expected):
    """D(x) = x / (1 + sigma^2) is exact for unit Gaussian data, and the ODE then ends where the unit noise was:
    what is missing to 1 is Euler's own error."""
    n = torch.randn(1, 2, 4, 8, 8, dtype=torch.float64)
    sigmas = edm.karras_sigmas(steps, 0.002, 700.0, 7.0).double()
    *_, x = edm.euler(lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1, 1) ** 2), n, sigmas)
    assert torch.allclose(x / n, torch.full_like(x, expected), atol=5e-4)


def error_on_a_unit_gaussian(solver: str, num_steps: int) -> float:
    n = torch.randn(1, 2, 4, 8, 8, dtype=torch.float64)
    sigmas = edm.karras_sigmas(num_steps, 0.002, 700.0, 7.0).double()
    *_, x = edm.SOLVERS[solver](lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1, 1) ** 2), n, sigmas)
    return (x / n - 1).abs().max().item()


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpmpp-2m", 2)])
def test_solvers_have_their_order(solver, order):
    """Twice the steps, 2^order times less error. The last step ends at 0 from 0.002, whatever the number of steps:
    what that leaves is far below."""
    errors = [error_on_a_unit_gaussian(solver, num_steps) for num_steps in (100, 200, 400)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver, expected", [("euler", [4, 2, 1]), ("heun", [4, 2, 2, 1, 1]), ("dpmpp-2m", [4, 2, 1])])
def test_solvers_evaluate_the_denoiser_at_these_sigmas(solver, expected):
    """They start from the noise of the data and the largest sigma together, and end on D: here on 7."""
    seen, n = [], torch.randn(3, 2, 4, 8, 8)

    def denoiser(x, sigma):
        seen.append((x, sigma))
        return torch.full_like(x, 7.0)

    xs = list(edm.SOLVERS[solver](denoiser, n, torch.tensor([4.0, 2.0, 1.0, 0.0])))
    assert torch.allclose(seen[0][0], n * 17**0.5)
    assert [sigma.tolist() for _, sigma in seen] == [[sigma] * 3 for sigma in expected]
    assert len(xs) == 3 and torch.allclose(xs[-1], torch.full_like(n, 7.0), atol=1e-5)


def test_solvers_of_order_2_need_fewer_steps():
    """16 evaluations of DPM-Solver++ for Euler's 25. Heun's 16 steps are 31: it only pays where much is asked."""
    limit = error_on_a_unit_gaussian("euler", 25)
    assert error_on_a_unit_gaussian("dpmpp-2m", 16) < limit
    assert error_on_a_unit_gaussian("heun", 16) < limit
    assert error_on_a_unit_gaussian("heun", 50) < error_on_a_unit_gaussian("euler", 100) / 3


@given(log_sigma=st.floats(math.log(0.002), math.log(700)))
def test_loss_is_the_weighted_error_of_the_denoiser(log_sigma):
    """Equation 1 with lambda = (1 + sigma^2) / sigma^2, computed the direct way, in float64."""
    x0, n = torch.randn(2, 2, 3, 4, 8, 8, dtype=torch.float64)
    sigma = sigma_like(x0, math.exp(log_sigma))

    def network(x, c_noise):
        return torch.tanh(x) + c_noise.view(-1, 1, 1, 1, 1)

    s = sigma.view(-1, 1, 1, 1, 1)
    direct = ((1 + s**2) / s**2 * (edm.denoise(network, x0 + s * n, sigma) - x0) ** 2).mean()
    assert math.isclose(edm.loss(network, x0, sigma, n), direct, rel_tol=1e-6)


def test_loss_vanishes_for_the_true_v():
    x0, n = torch.randn(2, 1, 2, 4, 8, 8)
    for value in (0.002, 1.0, 700.0):
        sigma = sigma_like(x0, value)
        v = (n - value * x0) / math.sqrt(1 + value**2)
        assert edm.loss(lambda x, c_noise, v=v: v, x0, sigma, n) < 1e-10


def test_training_sigma():
    quantiles = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    sigma = edm.training_sigma(quantiles, 2.8, 1.6, 700.0)
    assert sigma.dtype == torch.float32 and sigma.median().item() == pytest.approx(16.4, rel=0.05)
    assert sigma.log().clamp(max=6).std().item() == pytest.approx(1.6, rel=0.05)
    assert sigma.max() == 700 and 0.005 < (sigma == 700).float().mean() < 0.02
    assert edm.training_sigma(torch.tensor([0.0, 0.5, 1.0]), 0.0, 1.0, 700.0).log().tolist() == pytest.approx(
        [-4.75, 0, 4.75], abs=0.01
    )


def test_guidance_rises_over_frames():
    scale = edm.guidance_scale(1.0, 3.0, 14)
    assert scale.shape == (14, 1, 1, 1)
    assert scale[0] == 1 and scale[-1] == 3 and torch.allclose(scale.diff(dim=0), torch.tensor(2 / 13))
    negative, positive = torch.randn(2, 1, 14, 4, 8, 8)
    guided = edm.guide(negative, positive, scale)
    assert torch.allclose(guided[:, 0], positive[:, 0], atol=1e-6)
    assert torch.allclose(guided[:, -1], 3 * positive[:, -1] - 2 * negative[:, -1], atol=1e-5)


def test_align_your_steps_is_the_published_table_and_between_its_entries_geometric():
    published = torch.tensor([700, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0])
    assert torch.allclose(edm.ays_sigmas(10), published, rtol=1e-5)
    sigmas = edm.ays_sigmas(19)  # every second one is an entry
    assert torch.allclose(sigmas[:-1:2], published[:-1], rtol=1e-5)
    assert torch.allclose(sigmas[1:-1:2], (published[:-2] * published[1:-1]).sqrt(), rtol=1e-5)
    for steps in (1, 2, 7, 25, 100):
        sigmas = edm.ays_sigmas(steps)
        assert len(sigmas) == steps + 1 and (sigmas.diff() < 0).all() and sigmas[-1] == 0
        assert abs(sigmas[0] - 700) < 0.01
