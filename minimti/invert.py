"""Motion-textual inversion: optimise the tokens of one motion on one clip, everything else frozen (paper 3.3)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minimti import edm
from minimti.augment import augment
from minimti.motion import Motion
from minimti.svd import SVD


def invert(
    svd: SVD, clip: Tensor, motion: Motion, *, steps: int, lr: float, flip: bool, p_mean: float, p_std: float
) -> Iterator[float]:
    """Optimises `motion.tokens` in place and yields the loss of every step.

    clip is [F, 3, H, W] in [-1,1] on the device of the model. The draws of a step depend on the motion's seed and the
    step's number alone. Raises FloatingPointError where a loss is not finite, with the tokens of the step before.
    """
    svd.requires_grad_(False)
    tokens = motion.tokens.requires_grad_()
    adam = torch.optim.Adam([tokens], lr=lr)
    for step in range(steps):
        generator = torch.Generator().manual_seed(motion.seed * 1_000_003 + step)
        frames = augment(clip, generator, flip)
        with torch.no_grad():
            x0 = svd.encode(frames[None])
        sigma = edm.training_sigma(torch.randn(1, generator=generator), p_mean, p_std, svd.config.sigma_max)
        n = torch.randn(x0.shape, generator=generator)
        cond = svd.prepare(frames[:1], (motion.spatial(1), motion.temporal(1)), motion.micro, generator)

        loss = edm.loss(svd.network(cond), x0, sigma.to(x0), n.to(x0))
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of step {step + 1} (sigma {sigma.item():.3g}) is not finite")
        adam.zero_grad()
        loss.backward()
        adam.step()
        motion.steps = step + 1
        yield loss.item()
