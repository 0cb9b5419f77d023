"""Measures a case: its cost from shapes, its seconds and peak memory on this machine; and prints both as a table."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minimti.bench.cases import Case, Library, Model, build, fill, inputs, skeleton
from minimti.bench.cost import Cost, estimate_cost
from minimti.bench.reference import Diffusers
from minimti.invert import Recipe
from minimti.pipeline import compile_unet
from minimti.svd import SVD

CostPair = tuple[Cost, Cost | None]  # ours, diffusers' (None where the case does without)


def estimate(case: Case) -> CostPair:
    """The cost of one step of the case."""
    return _estimate(SVD, case), _estimate(Diffusers, case) if case.compared else None


def _estimate(library: Library, case: Case) -> Cost:
    model = skeleton(library, case)
    return estimate_cost(lambda: (fill(model, case, "cpu"), *inputs(case, "cpu")), case.step.run)


def encoding_per_step(encode: Cost, recipe: Recipe, num_frames: int) -> Cost:
    """The share of one training step in encoding the cached views, from the cost of encoding a clip of `num_frames`.

    A view is encoded once; its conditioning image is one frame more.
    """
    share = recipe.num_cached_views / recipe.steps * (num_frames + 1) / num_frames
    return replace(encode, tflop=encode.tflop * share, traffic_tb=encode.traffic_tb * share)


@dataclass(frozen=True)
class Timing:
    """Medians over the runs. None where a library was left out or ran out of memory; peaks are None but on CUDA."""

    ours_s: float | None
    diffusers_s: float | None
    ours_gib: float | None  # peak of allocated memory: weights, inputs, activations
    diffusers_gib: float | None
    ratio: float | None  # diffusers : ours in seconds, above 1 where ours is faster; the median of the runs' ratios
    ratio_min: float | None
    ratio_max: float | None


class Run(NamedTuple):
    """One run of a step."""

    seconds: float
    gib: float | None  # peak of allocated memory, on CUDA


def clock(
    case: Case,
    device: str,
    repeats: int,
    by_turns: bool,
    build: Callable[[Library, Case, str], Model] = build,
) -> Timing:
    """Times `repeats` runs of either library, after one run that compiles, chooses kernels and allocates.

    by_turns  True: both models are in memory and run by turns, so that other work on the machine slows both alike.
              False: one model is built, timed and freed before the other is built, so that peaks are of one alone.
              The ratios then pair the i-th runs.
    build     makes the model of a library
    """
    libraries: list[Library] = [SVD, Diffusers] if case.compared else [SVD]
    runs: dict[Library, list[Run]] = {}
    if by_turns:
        runs = _runs(libraries, case, device, repeats, build)
    else:
        for library in libraries:
            runs |= _runs([library], case, device, repeats, build)
            gc.collect()  # a compiled module is part of a reference cycle
            torch.cuda.empty_cache()
    return summarise(runs.get(SVD, []), runs.get(Diffusers, []))


def _runs(
    libraries: Sequence[Library], case: Case, device: str, repeats: int, build: Callable[[Library, Case, str], Model]
) -> dict[Library, list[Run]]:
    """The runs of some libraries by turns, without a library that is out of memory."""
    tensors = inputs(case, device)
    steps: dict[Library, Callable[[], Tensor]] = {}
    for library in libraries:
        try:
            model = build(library, case, device)
            if case.compiled and isinstance(model, SVD):
                compile_unet(model.unet)
            step = partial(case.step.run, model, *tensors)
            step()
            steps[library] = step
        except torch.OutOfMemoryError:
            print(f"  {library.__name__}: not enough memory", file=sys.stderr)
    rounds = [{library: _run(step, device) for library, step in steps.items()} for _ in range(repeats)]
    return {library: [results[library] for results in rounds] for library in steps}


def _run(step: Callable[[], Tensor], device: str) -> Run:
    if device == "cpu":
        began = time.perf_counter()
        step()
        return Run(time.perf_counter() - began, None)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return Run(start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() / 2**30)  # from ms


def summarise(ours: Sequence[Run], theirs: Sequence[Run]) -> Timing:
    """The timing of a case from the runs of either library; none where a library was not timed."""
    ratios = [b.seconds / a.seconds for a, b in zip(ours, theirs)]
    return Timing(
        ours_s=statistics.median(run.seconds for run in ours) if ours else None,
        diffusers_s=statistics.median(run.seconds for run in theirs) if theirs else None,
        ours_gib=max((run.gib for run in ours if run.gib is not None), default=None),
        diffusers_gib=max((run.gib for run in theirs if run.gib is not None), default=None),
        ratio=statistics.median(ratios) if ratios else None,
        ratio_min=min(ratios, default=None),
        ratio_max=max(ratios, default=None),
    )


def table(costs: Mapping[str, CostPair], timings: Mapping[str, Timing]) -> str:
    """Markdown with aligned columns, ours / diffusers; a column in which nothing was measured is left out."""
    rows = [["step", "peak GiB", "TFLOP", "TB moved", "A100 s, at least", "s here", "GiB here", "diffusers : ours"]]
    for name in {**costs, **timings}:
        row = [name]
        pair = costs.get(name, ())
        for field, digits in (("peak_gib", 2), ("tflop", 2), ("traffic_tb", 3), ("roofline_s", 3)):
            row.append(cell([getattr(cost, field, None) for cost in pair], digits))
        timing = timings.get(name)
        row.append(cell([timing.ours_s, timing.diffusers_s], 3) if timing else "-")
        row.append(cell([timing.ours_gib, timing.diffusers_gib], 2) if timing else "-")
        has_ratio = timing is not None and timing.ratio is not None
        row.append("{ratio:.2f} ({ratio_min:.2f}..{ratio_max:.2f})".format(**vars(timing)) if has_ratio else "-")
        rows.append(row)
    columns = [column for column in zip(*rows) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    lines = list(zip(*columns))
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def cell(values: Sequence[float | None], digits: int) -> str:
    """The numbers of one cell of the table, joined by slashes; "-" for None and for a cell without numbers."""
    if all(value is None for value in values):
        return "-"
    return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values)
