"""What a step dispatches, counted from shapes alone: operators, bytes, and the layout of what convolutions read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minimti.bench.cases import LIBRARIES, Case, empty_weight, fill, inputs, official_cases, skeleton
from minimti.bench.cost import effects
from minimti.bench.report import table
from minimti.config import SVDConfig
from minimti.networks import fused


@dataclass
class Count:
    """What was counted."""

    operators: int = 0  # those that do work: no views, no allocations
    terabytes: float = 0.0  # read and written by them, each counted alone
    convolutions_outermost: int = 0  # 2D convolutions whose input does not have its channels innermost
    convolutions: int = 0  # 2D convolutions


def counted_cases(config: SVDConfig) -> dict[str, tuple[Case, str]]:
    """The cases to count, each with the device of its fake tensors.

    Denoising is counted on fake tensors of a GPU, which does not need to be there; attention appears as its plain
    formula on them. A backward pass needs a real device, so training is counted on fake tensors of a CPU, with our
    layers in the forms that a GPU runs.
    """
    cases = official_cases(config)
    names = ("denoise", "train_fast", "train_balanced", "train_low")
    return {name: (cases[name], "cuda" if name == "denoise" else "cpu") for name in names}


def count(case: Case, device: str, library: str) -> Count:
    """Counts one step of a library ("ours" or "diffusers"), and what prepares it, on fake tensors of a device."""
    model = skeleton(LIBRARIES[library], case)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), fused.forced(True):
        fill(model, case, device, empty_weight)
        tensors = inputs(case, device)
        with _Counter() as counter:
            case.step.run(model, *tensors)
    return counter.found


class _Counter(TorchDispatchMode):
    """Counts the operators that are dispatched while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Count()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        written, nbytes, is_view = effects(op, (args, kwargs), results)
        if not written or is_view or op.name().startswith("aten::empty"):
            return results
        self.found.operators += 1
        self.found.terabytes += nbytes / 1e12
        if op is torch.ops.aten.convolution.default and args[0].ndim == 4:
            self.found.convolutions += 1
            innermost = args[0].is_contiguous(memory_format=torch.channels_last)
            self.found.convolutions_outermost += not innermost
            if innermost:  # as on a GPU; on a PyTorch without CUDA, fake tensors lose the layout that cuDNN keeps
                results = results.contiguous(memory_format=torch.channels_last)
        return results


def as_json(ours: Mapping[str, Count]) -> dict[str, dict[str, Any]]:
    """Counts by case, for --json."""
    fields = ("operators", "terabytes", "convolutions_outermost")
    return {name: {field: asdict(count)[field] for field in fields} for name, count in ours.items()}


def as_table(ours: Mapping[str, Count], theirs: Mapping[str, Count]) -> str:
    """Counts by case, ours / diffusers; `theirs` may lack cases."""
    rows = [["step", "operators", "TB moved", "convolutions that read channels outermost"]]
    for name, count in ours.items():
        pair = [count, theirs[name]] if name in theirs else [count]
        operators, terabytes = (f"{c.operators:,}" for c in pair), (f"{c.terabytes:.3f}" for c in pair)
        outermost = (f"{c.convolutions_outermost} of {c.convolutions}" for c in pair)
        rows.append([name, " / ".join(operators), " / ".join(terabytes), " / ".join(outermost)])
    return table(rows)
