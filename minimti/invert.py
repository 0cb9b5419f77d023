"""Motion-textual inversion: optimise the tokens of one motion on one clip, everything else frozen (paper 3.3)."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from minimti import edm
from minimti.augment import augment
from minimti.motion import Motion
from minimti.svd import SVD, Conditioning

View = tuple[Tensor, Conditioning]


def view(svd: SVD, clip: Tensor, learned: Motion, flip: bool, index: int) -> View:
    """What the UNet sees of the clip [F, 3, H, W] in [-1,1] after one random augmentation, the index-th of its seed.

    Returns scaled latents [1, F, z, h, w], and the conditioning on the first frame.
    """
    generator = _generator(learned.seed, 2 * index)
    frames = augment(clip, generator, flip)
    with torch.no_grad():
        return svd.encode(frames[None]), svd.prepare(frames[:1], learned.sets, learned.micro, generator)


def invert(
    svd: SVD, views: Callable[[int], View], learned: Motion, *, steps: int, lr: float, p_mean: float, p_std: float
) -> Iterator[float]:
    """Optimises `learned.tokens` in place and yields the loss of every step.

    `views` gives the view of a step's number. The draws of a step depend on its number and the seed in `learned` alone.
    Raises FloatingPointError before a loss that is not finite would spoil the tokens.
    """
    svd.requires_grad_(False)
    tokens = learned.tokens.requires_grad_()
    adam = torch.optim.Adam([tokens], lr=lr)
    for step in range(steps):
        x0, cond = views(step)
        generator = _generator(learned.seed, 2 * step + 1)
        sigma = edm.training_sigma(torch.randn(1, generator=generator), p_mean, p_std, svd.config.sigma_max)
        n = torch.randn(x0.shape, generator=generator)
        spatial, temporal = learned.sets

        cond = replace(cond, spatial=spatial, temporal=temporal)
        loss = edm.loss(svd.network(cond), x0, sigma.to(x0), n.to(x0))
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of step {step + 1} (sigma {sigma.item():.3g}) is not finite")
        adam.zero_grad()
        # The mean over so many elements would leave gradients too small for half precision inside the network.
        (loss * x0.numel()).backward()
        tokens.grad /= x0.numel()
        adam.step()
        learned.steps = step + 1
        yield loss.item()


def _generator(seed: int, draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + draw + 1)
