"""Motion-textual inversion: optimise the tokens of one motion on one clip, everything else frozen (paper 3.3)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from minimti import edm
from minimti.augment import augment
from minimti.config import SVDConfig
from minimti.motion import Motion
from minimti.muon import Muon
from minimti.svd import SVD, Conditioning

View = tuple[Tensor, Conditioning]
LR, MOMENTUM = 0.2, 0.9  # of Muon
OWN = 0.25  # the rate of what sets have each to themselves, over that of what all of them share
PAPER_LR = 1e-2  # of Adam, paper B.2
SAVING = 2  # the steps of the paper's recipe over those of ours
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are evenly spread however many there are
VIEWS = 25  # augmented views of the clip that steps take turns with, where it is not a fresh one for each
REPORT = 10  # steps between two looks at the losses: on a GPU every look makes it wait for us


def view(svd: SVD, clip: Tensor, learned: Motion, flip: bool, index: int) -> View:
    """What the UNet sees of the clip [F, 3, H, W] in [-1,1] after one random augmentation, the index-th of its seed.

    Returns scaled latents [1, F, z, h, w], and the conditioning on the first frame.
    """
    generator = _generator(learned.seed, 2 * index)
    frames = augment(clip, generator, flip)
    with torch.no_grad():
        return svd.encode(frames[None]), svd.prepare(frames[:1], learned.sets, learned.micro, generator)


def recipe(config: SVDConfig, paper: bool = False) -> dict:
    """The settings of `invert` for a model: ours, or those of paper B.2."""
    steps, lr = (config.num_iterations, PAPER_LR) if paper else (config.num_iterations // SAVING, LR)
    return {"steps": steps, "lr": lr, "p_mean": config.p_mean, "p_std": config.p_std, "paper": paper}


def invert(
    svd: SVD,
    views: Callable[[int], View],
    learned: Motion,
    *,
    steps: int,
    lr: float,
    p_mean: float,
    p_std: float,
    paper: bool = False,
) -> Iterator[float]:
    """Optimises `learned.tokens` in place and yields the loss of every step, some steps late where there is a GPU.

    By Muon, a step that all sets share and a shorter one of each, the rate falling from `lr` to 0 along half a cosine,
    on evenly spread sigmas; with `paper` as in B.2, by Adam at a constant rate, on independent sigmas, for which it
    takes SAVING times the steps.

    `views` gives the view of a step's number. The draws of a step depend on its number and the seed in `learned` alone.
    Raises FloatingPointError after a loss or a gradient that is not finite, which never enters the tokens.
    """
    svd.requires_grad_(False)
    tokens = learned.tokens.requires_grad_()
    rows = tokens.detach().view(-1, tokens.shape[-1])  # the same numbers as a matrix, a row for each token of each set
    if paper:
        optimiser = torch.optim.Adam([rows], lr)
    else:
        shared = torch.zeros_like(tokens[0])  # [N, d], the step that all sets are to take
        optimiser = Muon([{"params": [shared]}, {"params": [rows], "lr": OWN * lr}], lr, momentum=MOMENTUM)
        falling = CosineAnnealingLR(optimiser, steps)
    first = torch.rand(1, generator=_generator(learned.seed, 1))
    unseen: list[tuple[int, Tensor, Tensor]] = []  # step, sigma, and the loss on its device
    for step in range(steps):
        x0, cond = views(step)
        generator = _generator(learned.seed, 2 * step + 1)
        independent = torch.rand(1, generator=generator)
        quantile = independent if paper else (first + step * GOLDEN) % 1
        sigma = edm.training_sigma(quantile, p_mean, p_std, svd.config.sigma_max)
        n = torch.randn(x0.shape, generator=generator)
        spatial, temporal = learned.sets

        cond = replace(cond, spatial=spatial, temporal=temporal)
        loss = edm.loss(svd.network(cond), x0, sigma.to(x0), n.to(x0))
        tokens.grad = None
        # The mean over so many elements would leave gradients too small for half precision inside the network.
        (loss * x0.numel()).backward()
        tokens.grad /= x0.numel()
        loss = torch.where(tokens.grad.isfinite().all(), loss.detach(), torch.nan)
        rows.grad = tokens.grad.nan_to_num_(0, 0, 0).view_as(rows)
        if paper:
            optimiser.step()
        else:
            shared.grad = tokens.grad.sum(dim=0)
            optimiser.step()
            falling.step()
            rows.view_as(tokens).add_(shared)
            shared.zero_()
        learned.steps = step + 1
        unseen.append((learned.steps, sigma, loss))
        if loss.device.type == "cpu" or len(unseen) == REPORT or learned.steps == steps:
            for (number, sigma, _), value in zip(unseen, torch.stack([loss for *_, loss in unseen]).tolist()):
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss of step {number} (sigma {sigma.item():.3g}) is not finite")
                yield value
            unseen.clear()


def _generator(seed: int, draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + draw + 1)
