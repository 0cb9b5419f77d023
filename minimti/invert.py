"""Motion-textual inversion: optimise the tokens of one motion on one clip, everything else frozen (paper 3.3, B.2)."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile, zip_longest
from typing import Protocol

import torch
from torch import Tensor

from minimti import edm
from minimti.augment import augment
from minimti.config import SVDConfig
from minimti.motion import Motion
from minimti.muon import SharedMuon
from minimti.networks.graph import Graphed
from minimti.ranks import ALONE, Ranks
from minimti.svd import SVD, Conditioning

View = tuple[Tensor, Conditioning]  # scaled latents [1, F, z, h, w] of the augmented clip, and what conditions them

PAPER_STEPS_RATIO = 2  # steps of the paper's recipe over steps of the muon recipe
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are evenly spread for any number of them
MIN_SCALE = 1.0  # scale of the loss below which a gradient that overflows in fp16 is given up
FETCH_EVERY = 10  # steps between two fetches of losses from the device: each fetch makes a GPU wait


@dataclass(frozen=True)
class Recipe:
    """How tokens are optimised. `make_recipe` has the two that are named."""

    optimizer: str  # "adam", or "muon" (muon.SharedMuon)
    shared_start: bool  # all token sets start alike, from zeros and noise (motion.zero_start), not from their frames
    spread_sigmas: bool  # noise levels are evenly spread over the steps, not drawn independently
    steps: int
    lr: float
    p_mean: float  # ln(sigma) ~ N(p_mean, p_std^2)
    p_std: float
    crop: bool  # views are crops of the clip (augment.py), not the whole picture
    num_cached_views: int  # augmented views that are encoded once and used in turn; 0 encodes a fresh one every step

    @property
    def num_views(self) -> int:
        """How many different views all steps see."""
        return min(self.num_cached_views or self.steps, self.steps)


def make_recipe(config: SVDConfig, name: str | None = None) -> Recipe:
    """The recipe "paper" (B.2) or "muon" (ours) for a model; None stands for the model's default.

    Raises ValueError for another name.
    """
    name = name or config.recipe
    if name == "paper":
        return Recipe(
            optimizer="adam",
            shared_start=False,
            spread_sigmas=False,
            steps=config.num_iterations,
            lr=1e-2,
            p_mean=config.p_mean,
            p_std=config.p_std,
            crop=True,
            num_cached_views=100,  # the paper does not mention any; 0 does without
        )
    if name == "muon":
        return Recipe(
            optimizer="muon",
            shared_start=True,
            spread_sigmas=True,
            steps=config.num_iterations // PAPER_STEPS_RATIO,
            lr=0.2,
            p_mean=config.p_mean,
            p_std=config.p_std,
            crop=False,
            num_cached_views=25,
        )
    raise ValueError(f"unknown recipe {name!r}: paper or muon")


@dataclass
class State:
    """Where an inversion stands between two steps: all that it needs to go on as if it had not been stopped.

    Draws need no state: they depend on the seed and the number of the step alone. In fp16 the scale of the loss begins
    anew, which changes the last bits.
    """

    tokens: Tensor  # as Motion.tokens
    optimizer: dict  # the part "state" of torch_optimizer.state_dict()
    steps: int  # done
    views: list[View]  # encoded so far, in order
    begun: int = 0  # steps that were done when the rate's schedule began: more than 0 where steps were added at the end


def invert(
    svd: SVD,
    views: Callable[[int], View],
    motion: Motion,
    recipe: Recipe,
    fetch_every: int | None = None,
    optimizer: "TokenOptimizer | None" = None,
    ranks: Ranks = ALONE,
) -> Iterator[float]:
    """Optimises `motion.tokens` in place, from step `motion.steps` to `recipe.steps`, and yields each step's loss.

    `views(step)` returns the view for a step. The random draws of a step depend on its number and `motion.seed` alone.
    `optimizer` is that of the recipe (default: a new one).
    Losses are fetched from the device every `fetch_every` steps (default: FETCH_EVERY, on a CPU 1) and yielded then.
    `ranks`: several processes each add other noise to the same view. Losses and gradients are means over them.

    Raises FloatingPointError after a loss or a gradient that is not finite, in all processes alike. Tokens and
    `motion.steps` are then those of the last good step.
    """
    svd.requires_grad_(False)
    optimizer = optimizer or make_optimizer(motion, recipe)
    compute = _recorded(svd, motion) if motion.tokens.is_cuda else partial(loss_and_gradient, svd, motion)
    finite = torch.ones((), dtype=torch.bool, device=motion.tokens.device)  # no step so far went wrong
    fetch_every = fetch_every or (1 if motion.tokens.device.type == "cpu" else FETCH_EVERY)
    scale = None
    pending: list[Tensor] = []  # losses on the device
    for step in range(motion.steps, recipe.steps):
        x0, cond = views(step)
        sigma, n = draw(recipe, svd.config.sigma_max, motion.seed, step * ranks.count + ranks.rank, x0.shape)
        scale = x0.new_full((), x0.numel()) if scale is None else scale
        loss, grad = compute((x0, cond), sigma.to(x0), n.to(x0), scale)
        while svd.dtype == torch.float16 and scale > MIN_SCALE and not grad.isfinite().all():
            scale = scale / 2  # fp16 overflows above 65504
            loss, grad = compute((x0, cond), sigma.to(x0), n.to(x0), scale)
        loss, grad = ranks.mean(loss, grad)
        finite = finite & loss.isfinite() & grad.isfinite().all()
        _step_if(finite, optimizer, grad)
        motion.steps = step + 1
        pending.append(torch.where(finite, loss, torch.nan))
        if len(pending) == fetch_every or motion.steps == recipe.steps:
            losses = torch.stack(pending).tolist()
            good = list(takewhile(math.isfinite, losses))
            motion.steps -= len(losses) - len(good)
            yield from good
            if len(good) < len(losses):
                raise FloatingPointError(_not_finite(svd, motion, recipe, ranks))
            pending.clear()


def _not_finite(svd: SVD, motion: Motion, recipe: Recipe, ranks: Ranks) -> str:
    """What to print about the step that follows `motion.steps`: the same in all processes."""
    draws = range(motion.steps * ranks.count, (motion.steps + 1) * ranks.count)
    sigmas = [draw(recipe, svd.config.sigma_max, motion.seed, index, torch.Size())[0].item() for index in draws]
    return (
        f"the loss or gradient of step {motion.steps + 1} (sigma {', '.join(f'{sigma:.3g}' for sigma in sigmas)}, seed"
        f" {motion.seed}) is not finite: try a lower --lr, or --dtype float32 or bfloat16; the tokens are those of step"
        f" {motion.steps}"
    )


def view(svd: SVD, clips: Tensor, motion: Motion, flip: bool, crop: bool, index: int) -> View:
    """The index-th random view of clips [clips, F, 3, H, W] in [-1,1], which take turns.

    It is augmented, encoded, and conditioned on its first frame. `flip` allows mirrored views, `crop` cropped ones.
    """
    generator = _generator(motion.seed, 2 * index)
    frames = augment(clips[index % len(clips)].to(svd.device), generator, flip, crop)
    with torch.no_grad():
        return svd.encode(frames[None]), svd.prepare(frames[:1], motion.sets, motion.micro, generator)


def draw(recipe: Recipe, sigma_max: float, seed: int, index: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The noise level sigma [1] and the unit noise n of the index-th draw, on the CPU: the same for every device.

    A step takes a draw for each process. With spread sigmas, the quantile of draw i is that of draw 0 plus i GOLDEN,
    modulo 1.
    """
    generator = _generator(seed, 2 * index + 1)
    quantile = torch.rand(1, generator=generator)
    if recipe.spread_sigmas:
        first = torch.rand(1, generator=_generator(seed, 1))
        quantile = (first + index * GOLDEN % 1) % 1  # the product in double precision: in fp32 it would be coarse
    sigma = edm.training_sigma(quantile, recipe.p_mean, recipe.p_std, sigma_max)
    return sigma, torch.randn(shape, generator=generator)


def loss_and_gradient(
    svd: SVD, motion: Motion, view: View, sigma: Tensor, n: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of one step (equation 1), and its gradient with respect to the tokens, shaped as `motion.tokens`.

    Inside the network, gradients are those of scale * loss. By default the scale is the number of elements of x0: the
    loss is a mean over them, and its gradients would be too small for half precision.
    """
    x0, cond = view
    scale = x0.new_full((), x0.numel()) if scale is None else scale
    tokens = motion.tokens.detach().requires_grad_()
    spatial, temporal = replace(motion, tokens=tokens).sets
    network = svd.network(replace(cond, spatial=spatial, temporal=temporal))
    loss = edm.loss(network, x0, sigma, n)
    (grad,) = torch.autograd.grad(loss * scale, tokens)
    return loss.detach(), grad / scale


def _recorded(svd: SVD, motion: Motion) -> Callable[[View, Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """`loss_and_gradient` as a CUDA graph (networks/graph.py)."""

    def step(tokens: Tensor, x0: Tensor, concat: Tensor, micro: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        current = replace(motion, tokens=tokens)
        return loss_and_gradient(svd, current, (x0, Conditioning(concat, micro, *current.sets)), *rest)

    graph, fetches = Graphed(step), svd.fetches

    def replay(view: View, *rest: Tensor) -> tuple[Tensor, ...]:
        nonlocal graph, fetches
        svd.fetch("unet")
        if svd.fetches != fetches:  # its weights are in other memory than those that were recorded
            graph, fetches = Graphed(step), svd.fetches
        x0, cond = view
        return graph(motion.tokens, x0, cond.concat, cond.micro, *rest)

    return replay


class TokenOptimizer(Protocol):
    """Changes tokens in place."""

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """What holds all of its tensors: parameters and state."""

    def step(self, grad: Tensor) -> None:
        """One step along a gradient of the tokens' shape."""


class Adam:
    """The paper's optimiser (B.2), at a constant rate."""

    def __init__(self, tokens: Tensor, lr: float):
        self.tokens = tokens
        self.torch_optimizer = torch.optim.Adam([tokens], lr, capturable=tokens.is_cuda)

    def step(self, grad: Tensor) -> None:
        """One step along a gradient of the tokens' shape."""
        self.tokens.grad = grad
        self.torch_optimizer.step()
        self.tokens.grad = None


def make_optimizer(motion: Motion, recipe: Recipe, state: State | None = None) -> TokenOptimizer:
    """The recipe's optimiser for the step that follows `motion.steps`; new, or that of a state."""
    optimizer: TokenOptimizer
    if recipe.optimizer == "muon":
        begun, done = (state.begun, state.steps) if state else (0, 0)
        optimizer = SharedMuon(motion.tokens, recipe.lr, recipe.steps - begun, done - begun)
    else:
        optimizer = Adam(motion.tokens, recipe.lr)
    if state:
        inner = optimizer.torch_optimizer
        # all but the state follows from recipe and device
        inner.load_state_dict({**inner.state_dict(), "state": deepcopy(state.optimizer)})
    return optimizer


def _step_if(finite: Tensor, optimizer: TokenOptimizer, grad: Tensor) -> None:
    """A step that changes neither tokens nor optimiser state where `finite`, a scalar on the device, is False.

    Python does not wait for the value of `finite`. State that the first step creates is zero before it.
    """

    def tensors() -> list[Tensor]:
        inner = optimizer.torch_optimizer
        params = [p for group in inner.param_groups for p in group["params"]]
        return params + [t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor)]

    before = [tensor.clone() for tensor in tensors()]
    optimizer.step(grad)
    for tensor, old in zip_longest(tensors(), before):
        old = torch.zeros_like(tensor) if old is None else old
        tensor.copy_(torch.where(finite.to(tensor.device), tensor, old))


def _generator(seed: int, number: int) -> torch.Generator:
    """Number 2 i is for view i, number 2 i + 1 for noise i. The seed itself is left for the initial tokens."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number + 1)
