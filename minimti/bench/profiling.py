"""Where the GPU time of a step goes, by kind of kernel, from PyTorch's profiler."""

import json
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minimti.bench.measure import timed
from minimti.bench.report import NotMeasurable

# The first pattern that occurs in a kernel's name gives its category; lower and upper case are the same. Attention and
# convolutions come before products, because the names of many of their kernels contain gemm or cutlass.
CATEGORIES = {
    "copies": r"nchwToNhwc|nhwcToNchw|tensorTransform|memcpy|memset|CatArray|copy_kernel|direct_copy|transpose",
    "attention": r"sdpa|fmha|flash_|flash::|attention|softmax",
    "convolutions": r"fprop|dgrad|wgrad|implicit_gemm|implicit_convolve|winograd|conv(?!ert)",
    "norms": r"norm|RowwiseMoments|ComputeInternalGradients|ComputeFusedParams|ComputeBackwardFusedParams|welford",
    "products": r"nvjet|gemm|gemv|cutlass|cublas|splitK|matmul",
}
# Triton kernels of networks/triton_kernels.py: its group norm in passes, each a function of its own.
OUR_NORMS = re.compile(r"_(sums|affine|apply|backward_sums|backward_means|backward_apply)(_\d.*)?")
ELEMENTWISE, IDLE = "element-wise", "idle"


class Kernel(NamedTuple):
    """One piece of work on the GPU: a kernel, a copy or a memset. Times are microseconds."""

    name: str
    start: float
    duration: float


def category(name: str) -> str:
    """The category of a kernel by its name; what no pattern matches is element-wise.

    Inductor's Triton kernels are named after all operators that they fuse, which for the element-wise ones ("poi") may
    be the convolution whose bias they add.
    """
    if OUR_NORMS.fullmatch(name):
        return "norms"
    if name.startswith("triton_tem_"):
        return "products"
    if name.startswith("triton_"):
        kinds = ["norms"] if name.startswith("triton_poi_") else ["attention", "norms"]
    else:
        kinds = list(CATEGORIES)
    return next((kind for kind in kinds if re.search(CATEGORIES[kind], name, re.IGNORECASE)), ELEMENTWISE)


def shares(kernels: Sequence[Kernel], step_s: float) -> dict[str, float]:
    """Milliseconds by category, the time in which nothing runs, and the number of kernels.

    step_s  seconds of the step without the profiler, which slows the CPU down. Idle is what the kernels leave of it.

    Kernels that run at the same time count fully in their categories, and once in the time that is not idle.
    """
    found = dict.fromkeys([*CATEGORIES, ELEMENTWISE], 0.0)
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        found[category(kernel.name)] += kernel.duration / 1e3
        end = kernel.start + kernel.duration
        busy += max(0.0, end - max(kernel.start, until)) / 1e3
        until = max(until, end)
    return found | {IDLE: max(0.0, 1e3 * step_s - busy), "step": 1e3 * step_s, "kernels": len(kernels)}


def gpu_time(step: Callable[[], Tensor]) -> dict[str, float]:
    """The `shares` of a step on CUDA that has run before. Raises NotMeasurable where the profiler records no kernel."""
    seconds = statistics.median(timed(step, "cuda") for _ in range(3))
    for _ in range(2):  # the first time the profiler starts up, and can miss the first kernels
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        kernels = kernels_of(json.loads(trace.read_text(errors="replace")))
    if not kernels:
        raise NotMeasurable("the profiler recorded no kernel")
    return shares(kernels, seconds)


def kernels_of(trace: dict[str, Any]) -> list[Kernel]:
    """What ran on the GPU, from a Chrome trace of PyTorch's profiler; its own overhead is not part of it."""
    ran = {"kernel", "gpu_memcpy", "gpu_memset"}
    events = [event for event in trace["traceEvents"] if event.get("cat") in ran and event.get("ph") == "X"]
    return [Kernel(event["name"], float(event["ts"]), float(event["dur"])) for event in events]
