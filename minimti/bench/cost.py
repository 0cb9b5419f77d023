"""The cost of a computation, found from shapes alone: nothing is allocated and nothing is multiplied."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# NVIDIA's figures for an A100 with 80 GB.
A100_FLOPS = 312e12  # per second, bf16 with fp32 accumulation
A100_BANDWIDTH = 2.0e12  # bytes per second

aten = torch.ops.aten


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _cpu_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_, **__) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


# Some supported versions of PyTorch have no FLOP formulas for fused attention on a CPU.
FORMULAS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


@dataclass(frozen=True)
class Cost:
    """What a computation needs."""

    weights_gib: float  # parameters and buffers
    peak_gib: float  # largest sum of live tensors, weights included; an allocator needs more
    tflop: float  # matrix products, convolutions and attention
    traffic_tb: float  # read and written by the operators, each counted alone: no fusion, no cache

    @property
    def roofline_s(self) -> float:
        """Seconds on an A100 that only computes, or only moves memory, at its peak rate: a bound, not a forecast.

        The memory part can be beaten only by fused operators or by a cache (an A100 has 40 MB).
        """
        return max(self.tflop * 1e12 / A100_FLOPS, self.traffic_tb * 1e12 / A100_BANDWIDTH)


def estimate_cost(build: Callable[[], tuple[Any, ...]], step: Callable[..., Any]) -> Cost:
    """The cost of step(*build()).

    build  returns modules and tensors, all on the CPU; what it does itself is not counted
    step   must not depend on the values of tensors, and must not run under `torch.inference_mode`, which hides the
           parts of composite operators (`torch.no_grad` does not)

    FLOPs follow torch's formulas. Its FlopCounterMode is not used, because it keeps references to tensors that
    recomputation would free, so the same run could not measure the peak.
    """
    with FakeTensorMode(), torch.device("cpu"):
        state = build()
        meter = _Meter()
        for item in state:
            if isinstance(item, nn.Module):
                meter.hold(*item.parameters(), *item.buffers())
        weights = meter.live
        meter.hold(*(item for item in state if isinstance(item, Tensor)))
        with meter:
            step(*state)
    return Cost(weights / 2**30, meter.peak / 2**30, meter.flops / 1e12, meter.traffic / 1e12)


class _Meter(TorchDispatchMode):
    """Counts every operator, and every storage from its creation until the last reference to it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.held: set[int] = set()  # storages by id
        self.live = self.peak = self.traffic = 0  # bytes
        self.flops = 0

    def hold(self, *tensors: Tensor) -> None:
        for storage in map(Tensor.untyped_storage, tensors):
            if id(storage) not in self.held:
                self.held.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _release(self, key: int, nbytes: int) -> None:
        self.held.remove(key)
        self.live -= nbytes

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        written, nbytes, is_view = effects(op, (args, kwargs), results)
        self.hold(*written)
        if not is_view:
            self.traffic += nbytes
        if op.overloadpacket in FORMULAS:
            self.flops += FORMULAS[op.overloadpacket](*args, **(kwargs or {}), out_val=results)
        return results


def effects(op: Any, inputs: Any, results: Any) -> tuple[list[Tensor], int, bool]:
    """The tensors that an operator returned, the bytes of these and of its inputs, and whether it only made views."""
    read, written = ([x for x in tree_leaves(values) if isinstance(x, Tensor)] for values in (inputs, results))
    storages = {id(tensor.untyped_storage()) for tensor in read}
    is_view = all(id(tensor.untyped_storage()) in storages for tensor in written) and not op._schema.is_mutable
    return written, sum(tensor.nbytes for tensor in read + written), is_view
