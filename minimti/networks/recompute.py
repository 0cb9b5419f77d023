"""What a training step keeps of the forward pass, and what it computes again on the way back.

The weights are frozen, so only activations count. A block (a res block or a transformer) keeps its input; of what it
computes on the way it keeps the results that were dear: of matrix products, convolutions and attention that took many
FLOPs per byte of result. Everything else is computed again in the backward pass. The result is the same.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Modes, and the FLOPs per byte from which a result is kept. At full size in bf16, a matrix product in front of
# attention or feed-forward has 320 to 1280, one behind a feed-forward 1280 to 5120, a 3x3 convolution 2880 to 23040,
# attention among the positions of a frame 288 to 18432.
MODES = {"fast": 500.0, "balanced": 1500.0, "low": 18000.0}

# Bytes of hidden layer that a feed-forward makes at once where memory counts most.
SLICE = 2**25

aten = torch.ops.aten
_ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def flops_per_byte(op, args) -> float:
    """Of an ATen operator's result; 0 for one that is no product, convolution or attention."""
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


def _policy(threshold: float, context, op, *args, **kwargs) -> CheckpointPolicy:
    keep = flops_per_byte(op, args) >= threshold
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointed(nn.Module):
    """A module that calls parts of itself checkpointed, in the mode that `set_mode` gave it."""

    mode: str | None = None  # keep all that autograd wants

    def checkpointed(self, part: Callable[..., Tensor], *inputs) -> Tensor:
        """part(*inputs), keeping as much for the backward pass as the mode says."""
        if self.mode is None or not torch.is_grad_enabled():
            return part(*inputs)
        context_fn = partial(create_selective_checkpoint_contexts, partial(_policy, MODES[self.mode]))
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)

    def in_slices(self, part: Callable[[Tensor], Tensor], x: Tensor, num_slices: int) -> Tensor:
        """part(x), for a part that treats the rows of x [rows, C] alike; in slices wherever memory counts more."""
        if num_slices == 1 or (torch.is_grad_enabled() and self.mode != "low"):
            return part(x)
        return torch.cat([self.checkpointed(part, rows) for rows in x.chunk(num_slices)])


def set_mode(network: nn.Module, mode: str | None) -> None:
    """Has a network keep as much as `mode` (of MODES) says; None: all that autograd wants."""
    for module in network.modules():
        if isinstance(module, Checkpointed):
            module.mode = mode
