"""Selective activation checkpointing: which results of the forward pass a training step keeps for its backward pass.

The weights are frozen, so that activations take all the memory that grows with a clip. Each block (a res block or a
transformer) keeps its input and, of what it computes, only the expensive results: those of matrix products,
convolutions and attention that took many FLOPs per byte of result. The rest is computed again in the backward pass.
The gradients are the same.

The mode "low" keeps no results. Its transformers checkpoint each of their layers as well: when one is computed again,
the inputs of all its layers are in memory, but what a layer computes inside is there for one layer at a time.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

SLICE_BYTES = 2**25  # fits the caches of a CPU

# The FLOPs per byte from which each mode keeps a result. At full size in bf16, a matrix product in front of attention
# or feed-forward takes 320 to 1280, one behind a feed-forward 1280 to 5120, a 3x3 convolution 2880 to 23040, attention
# among the positions of a frame 288 to 18432.
MODES = {"fast": 500.0, "balanced": 1500.0, "low": math.inf}

aten = torch.ops.aten
_ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def flops_per_byte(op: Any, args: tuple[Any, ...]) -> float:
    """FLOPs per byte of the result of an ATen operator `op` (such as torch.ops.aten.mm.default) called with `args`.

    0 for everything but matrix products, convolutions and attention.
    """
    if op in (aten.mm.default, aten.bmm.default):
        terms = args[0].shape[-1]
    elif op is aten.addmm.default:
        terms = args[1].shape[-1]
    elif op is aten.convolution.default:
        terms = args[1][0].numel()
    elif op in _ATTENTION:
        terms = 2 * args[1].shape[-2]  # Q K^T, then the sum over V
    else:
        return 0.0
    return 2 * terms / args[0].element_size()


def _policy(threshold: float, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = flops_per_byte(op, args) >= threshold
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointed(nn.Module):
    """A module that calls parts of itself under activation checkpointing, in the mode given to `set_mode`."""

    mode: str | None = None  # a key of MODES; None: no checkpointing
    slice_bytes = SLICE_BYTES
    compiled: type[nn.Module] | None = None  # parts of this class are compiled

    def checkpointed(self, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """part(*inputs), keeping for the backward pass what the mode keeps. Without gradients, just the call."""
        call = _compiled_call() if self.compiled and isinstance(part, self.compiled) else _call
        return call(part, self.mode, *inputs)

    def checkpointed_inside(self, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """part(*inputs), for a part of what `checkpointed` calls; checkpointed once more in the mode "low" alone."""
        return _call(part, self.mode if self.mode == "low" else None, *inputs)

    def in_slices(self, part: Callable[[Tensor], Tensor], x: Tensor, num_slices: int) -> Tensor:
        """part(x) for x [rows, C], slice by slice of the rows; `part` must treat every row alike.

        Slices bound the memory of intermediate results. With gradients this pays only in the mode "low", which
        computes them again; in the other modes autograd would keep them for all slices, and x goes as a whole.
        """
        if num_slices == 1 or (torch.is_grad_enabled() and self.mode != "low"):
            return self.checkpointed_inside(part, x)
        return torch.cat([self.checkpointed_inside(part, rows) for rows in x.chunk(num_slices)])


def _call(part: Callable[..., Tensor], mode: str | None, *inputs: Any) -> Tensor:
    if mode is None or not torch.is_grad_enabled():
        return part(*inputs)
    context_fn = partial(create_selective_checkpoint_contexts, partial(_policy, MODES[mode]))
    return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)


@functools.cache
def _compiled_call() -> Callable[..., Tensor]:
    """`_call`, compiled for each part and shape. A checkpoint around a compiled function would not be compiled."""
    torch._dynamo.config.cache_size_limit = 256  # the transformers; since PyTorch 2.7 also called recompile_limit
    return torch.compile(_call, fullgraph=True, dynamic=False)


def compile_parts(network: nn.Module, kind: type[nn.Module]) -> None:
    """torch.compile for all parts of a class that the network calls under checkpointing. A graph break is an error."""
    for module in network.modules():
        if isinstance(module, Checkpointed):
            module.compiled = kind


def set_mode(network: nn.Module, mode: str | None, slice_bytes: int = SLICE_BYTES) -> None:
    """Sets what the training steps of a network keep: a key of MODES, or None for everything autograd needs.

    slice_bytes  hidden layer that a feed-forward computes at once, where it goes in slices
    """
    for module in network.modules():
        if isinstance(module, Checkpointed):
            module.mode, module.slice_bytes = mode, slice_bytes
