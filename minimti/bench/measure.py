"""Measures a case: its cost from shapes, its seconds and its memory on this machine."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minimti.bench.cases import LIBRARIES, Case, Library, Model, build, fill, inputs, skeleton, start
from minimti.bench.cost import Cost, estimate_cost
from minimti.bench.reference import Diffusers
from minimti.invert import Recipe
from minimti.networks import fused
from minimti.svd import SVD

CostPair = tuple[Cost, Cost | None]  # ours, diffusers' (None where the case does without)
Build = Callable[[Library, Case, str], Model]

# ---------------------------------------------------------------------------------------------- costs


def estimate(case: Case) -> CostPair:
    """The cost of one step of the case, ours with the fused operators of a GPU."""
    return _estimate(SVD, case), _estimate(Diffusers, case) if case.compared else None


def _estimate(library: Library, case: Case) -> Cost:
    model = skeleton(library, case)
    with fused.forced(True):
        return estimate_cost(lambda: (fill(model, case, "cpu"), *inputs(case, "cpu")), case.step.run)


def encoding_per_step(encode: Cost, recipe: Recipe, num_frames: int) -> Cost:
    """The share of one training step in encoding the cached views, from the cost of encoding a clip of `num_frames`.

    A view is encoded once; its conditioning image is one frame more.
    """
    share = recipe.num_cached_views / recipe.steps * (num_frames + 1) / num_frames
    return replace(encode, tflop=encode.tflop * share, traffic_tb=encode.traffic_tb * share)


# ---------------------------------------------------------------------------------------------- one library alone


@dataclass(frozen=True)
class Line:
    """A step of one library in one form, with nothing else in memory."""

    case: str
    library: str  # a key of LIBRARIES
    form: str  # see cases.start
    first_s: float  # until the first result: kernels are chosen, the step is compiled or recorded
    seconds: float  # median over the runs after two more for warm-up
    min_s: float
    max_s: float
    allocated_gib: float | None  # peak from the first run on: weights, inputs, activations; None but on CUDA
    reserved_gib: float | None  # the same, of what PyTorch took from the card: what other programs cannot have


def alone(name: str, case: Case, library: str, form: str, device: str, repeats: int, build: Build = build) -> Line:
    """Measures a case under the name that it has in the report; `build` makes the model."""
    free(device)
    model = build(LIBRARIES[library], case, device)
    tensors = inputs(case, device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step = start(model, case, form, tensors)
    step()
    synchronize(device)
    first = time.perf_counter() - began
    for _ in range(2):
        step()
    seconds = [timed(step, device) for _ in range(repeats)]
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if device == "cuda" else ()
    allocated, reserved = (peak / 2**30 for peak in peaks) if peaks else (None, None)
    return Line(name, library, form, first, statistics.median(seconds), min(seconds), max(seconds), allocated, reserved)


def timed(step: Callable[[], Tensor], device: str) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: str) -> None:
    """Waits until the device has nothing to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Gives back the memory of models that nothing refers to any more."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes seconds
        torch.compiler.reset()  # compiled code refers to the weights
    gc.collect()  # a compiled module is part of a reference cycle
    if device == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------- both by turns


@dataclass(frozen=True)
class Ratio:
    """Both libraries by turns."""

    form: str  # ours; diffusers runs as it comes
    ours_s: float  # median over the runs
    diffusers_s: float
    ratio: float  # diffusers : ours in seconds, above 1 where ours is faster; the median of the rounds' ratios
    ratio_min: float
    ratio_max: float


def by_turns(case: Case, form: str, device: str, repeats: int, build: Build = build) -> Ratio:
    """Times our form of a case and diffusers' eager one, both in memory, after a run of each for warm-up.

    Other work on the machine slows both alike.
    """
    free(device)
    tensors, steps = inputs(case, device), []
    for library in LIBRARIES.values():
        step = start(build(library, case, device), case, form if library is SVD else "eager", tensors)
        step()
        steps.append(step)
    ours, theirs = zip(*([timed(step, device) for step in steps] for _ in range(repeats)))
    return summarise(form, ours, theirs)


def summarise(form: str, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio from the seconds of both libraries, round by round."""
    ratios = [b / a for a, b in zip(ours, theirs)]
    return Ratio(
        form=form,
        ours_s=statistics.median(ours),
        diffusers_s=statistics.median(theirs),
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
    )
