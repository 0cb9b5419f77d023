"""A function recorded once as a CUDA graph and replayed. A reader can skip this: the results are the function's own.

PyTorch launches the kernels of a full-size training step one by one from Python, which takes longer than the GPU needs
to run them. A replay launches all of them at once.
"""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
Result = TypeVar("Result")


class Graphed:
    """A function of CUDA tensors. The first call records it; later calls replay the record on the new values.

    The function must do the same operations in every call, on inputs of the same shapes, and must not fetch values from
    the GPU. Where it cannot be recorded, it is called as it is, with a warning.
    """

    def __init__(self, function: Function):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()  # the memory that the graph reads
        self.outputs: tuple[Tensor, ...] = ()  # and writes

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """function(*inputs), in new tensors."""
        with torch.cuda.device_of(inputs[0]):  # else graphs are those of the current device
            if not self.inputs:
                self._record(inputs)
            if self.graph is None:
                return self.function(*inputs)
            for own, given in zip(self.inputs, inputs, strict=True):
                own.copy_(given)
            self.graph.replay()
            return tuple(output.clone() for output in self.outputs)

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t) for t in inputs)
        try:
            self.graph, self.outputs = record(lambda: self.function(*self.inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"the step cannot be recorded as a CUDA graph and runs without ({reason})", stacklevel=4)


def record(step: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The CUDA graph of a step, and what every replay fills anew. Raises RuntimeError where that is not possible.

    PyTorch's peaks of memory begin anew here.
    """
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    torch.cuda.reset_peak_memory_stats()
    with torch.cuda.stream(side):  # kernels are chosen and compiled before the recording
        for _ in range(2):
            step()
    current.wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the graph has memory of its own, and takes nothing from what the warm-up left
    peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()  # what a step takes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # A block that is given back at once. The tensors of the step are cut from it; otherwise the graph would take a
        # new segment for every tensor that fits into none of the free ones.
        torch.empty(peak, dtype=torch.uint8, device="cuda")
        result = step()
    return graph, result
