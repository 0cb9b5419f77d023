"""Diffusion after Karras et al. 2022 ("EDM") as Stable Video Diffusion uses it, in the symbols of both papers.

x0 is a clean latent, n unit noise, sigma the noise level, x = x0 + sigma n. A `network` is F_theta with its
conditioning bound: network(c_in x, c_noise) -> [B, F, C, H, W]. A `denoiser` is D(x, sigma), an estimate of
x0. All arithmetic here is in the dtype of x, which the callers keep at fp32.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]
Solver = Callable[[Denoiser, Tensor, Tensor], Iterator[Tensor]]

# Align Your Steps (Sabour et al. 2024) for Stable Video Diffusion in 10 steps, without the 0 at the end.
AYS_SIGMAS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034)


def precondition(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise of sigma > 0 (sgm's VScalingWithEDMcNoise)."""
    c_skip = 1 / (sigma**2 + 1)
    c_out = -sigma / (sigma**2 + 1).sqrt()
    c_in = 1 / (sigma**2 + 1).sqrt()
    c_noise = sigma.log() / 4
    return c_skip, c_out, c_in, c_noise


def denoise(network: Network, x: Tensor, sigma: Tensor) -> Tensor:
    """D_theta(x; sigma) of equation 2; x [B, F, C, H, W], sigma [B]."""
    c_skip, c_out, c_in, c_noise = precondition(_per_item(sigma, x))
    return c_skip * x + c_out * network(c_in * x, c_noise.flatten())


def loss(network: Network, x0: Tensor, sigma: Tensor, n: Tensor) -> Tensor:
    """Equation 1 with lambda = (1 + sigma^2) / sigma^2, as a mean over all elements; x0, n [B, F, C, H, W], sigma [B].

    With this weight the error of D on x0 equals the error of F on v = (n - sigma x0) / sqrt(1 + sigma^2). It is
    computed on v, where nothing cancels at small or large sigma.
    """
    sigma = _per_item(sigma, x0)
    _, _, c_in, c_noise = precondition(sigma)
    v = (n - sigma * x0) * c_in
    return (network(c_in * (x0 + sigma * n), c_noise.flatten()) - v).square().mean()


def training_sigma(quantile: Tensor, p_mean: float, p_std: float, sigma_max: float) -> Tensor:
    """Quantiles in [0,1] of ln(sigma) ~ N(p_mean, p_std^2) -> sigma, at most sigma_max; fp32, the same shape.

    Uniformly random quantiles draw from the distribution. Evenly spread ones cover it with fewer draws (Kingma et al.
    2021, "Variational diffusion models", I.1).
    """
    z = torch.special.ndtri(quantile.double().clamp(1e-6, 1 - 1e-6)).float()
    return (p_mean + p_std * z).exp().clamp(max=sigma_max)


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """[num_steps + 1] noise levels from sigma_max down to sigma_min, then 0 (EDM equation 5)."""
    ramp = torch.linspace(0, 1, num_steps)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1)])


def ays_sigmas(num_steps: int) -> Tensor:
    """[num_steps + 1] noise levels of AYS_SIGMAS, then 0; for other numbers than 10, ln(sigma) is interpolated.

    They were optimised for SVD's own range of noise, which begins at 700.
    """
    known = torch.tensor(AYS_SIGMAS).log()
    place = torch.linspace(0, len(known) - 1, num_steps)
    before = place.long().clamp(max=len(known) - 2)
    return torch.cat([known[before].lerp(known[before + 1], place - before).exp(), torch.zeros(1)])


def guidance_scale(minimum: float, maximum: float, num_frames: int) -> Tensor:
    """[F, 1, 1, 1]: guidance scales that rise linearly over the frames, not over the steps."""
    return torch.linspace(minimum, maximum, num_frames).view(-1, 1, 1, 1)


def guide(negative: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance on two estimates of x0 [B, F, C, H, W], scale [F, 1, 1, 1]."""
    return negative + scale * (positive - negative)


# Solvers of the probability flow ODE dx/dsigma = (x - D(x, sigma)) / sigma. They take unit noise n [B, F, C, H, W] and
# sigmas [steps + 1] that end with 0, and yield x after each step; the last is the sample. The step to 0 is always
# Euler's: it ends on D itself.


def euler(denoiser: Denoiser, n: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Order 1, one evaluation per step (EDM algorithm 1 without its correction): SVD's official sampler."""
    x = n * (1 + sigmas[0] ** 2).sqrt()
    for sigma, sigma_next in pairwise(sigmas):
        d = (x - denoiser(x, sigma.expand(len(x)))) / sigma
        x = x + (sigma_next - sigma) * d
        yield x


def heun(denoiser: Denoiser, n: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Order 2, two evaluations per step (EDM algorithm 1, without stochasticity)."""
    x = n * (1 + sigmas[0] ** 2).sqrt()
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        d = (x - denoiser(x, sigma.expand(len(x)))) / sigma
        ahead = x + (sigma_next - sigma) * d
        if step < len(sigmas) - 2:
            d_next = (ahead - denoiser(ahead, sigma_next.expand(len(x)))) / sigma_next
            ahead = x + (sigma_next - sigma) * (d + d_next) / 2
        x = ahead
        yield x


def dpmpp_2m(denoiser: Denoiser, n: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Order 2, one evaluation per step: DPM-Solver++(2M), Lu et al. 2022 algorithm 2, for alpha = 1.

    Its time is lambda = -ln(sigma), and h is a step of it. D is extrapolated to the middle of a step from the step
    before.
    """
    x = n * (1 + sigmas[0] ** 2).sqrt()
    before: tuple[Tensor, Tensor] | None = None  # D and h of the step before
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        D = denoiser(x, sigma.expand(len(x)))
        h = (sigma / sigma_next).log()
        middle = D
        if before is not None and step < len(sigmas) - 2:
            D_before, h_before = before
            middle = D + (D - D_before) * h / (2 * h_before)
        x = sigma_next / sigma * x + (1 - sigma_next / sigma) * middle
        before = D, h
        yield x


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "dpmpp-2m": dpmpp_2m}


def _per_item(sigma: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], with as many axes as x."""
    return sigma.view(-1, *[1] * (x.ndim - 1))  # [B, 1, 1, 1, 1] for a clip
