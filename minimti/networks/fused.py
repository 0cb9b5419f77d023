"""Group norm and GEGLU with fewer passes over memory, for CUDA. A reader can skip this: it equals the plain layers.

PyTorch's group norm on CUDA copies a channels-last input to channels-first and back (pytorch issue 111824). SiLU, the
shift before the norm and the product of GEGLU are passes of their own. The operators here keep channels innermost and
compute each of these layers as one operator, with Triton kernels (triton_kernels.py). They are registered with
`torch.library`, so that checkpointing, torch.compile and CUDA graphs treat them like PyTorch's own operators. The
weights are frozen: only the input gets a gradient.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_forced: bool | None = None


@contextmanager
def forced(on: bool) -> Iterator[None]:
    """Within the block, the operators are used everywhere (True) or nowhere (False).

    True also turns off the forms of other layers that are for a CPU (`on_cpu`), so that a step dispatches there what it
    dispatches on a GPU. The kernels run on a CPU in Triton's interpreter only: with TRITON_INTERPRET=1 set before
    Triton is imported.
    """
    global _forced
    before, _forced = _forced, on
    try:
        yield
    finally:
        _forced = before


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether the operators take this input: on CUDA with Triton, and only where the weights get no gradient."""
    wanted = x.is_cuda if _forced is None else _forced
    frozen = not (weight.requires_grad and torch.is_grad_enabled())
    return wanted and frozen and x.dtype in _DTYPES and x.dtype == weight.dtype and _kernels() is not None


def on_cpu(x: Tensor) -> bool:
    """Whether a layer computes this input in the form that is fastest on a CPU, where it has one."""
    return x.device.type == "cpu" and not _forced


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from minimti.networks import triton_kernels
    except ImportError:  # CPU builds of PyTorch come without Triton
        return None
    return triton_kernels


@contextmanager
def _launching(x: Tensor) -> Iterator[ModuleType]:
    """The kernels; within the block they run on the device of x. Triton launches on the current device."""
    kernels = _kernels()
    assert kernels is not None
    with torch.cuda.device_of(x):
        yield kernels


def group_norm(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None, silu: bool) -> Tensor:
    """norm(x + shift), then SiLU if asked for.

    x        [N, C, ..., ...]; copied first where channels are not innermost in memory
    shift    [N, C], the same for all positions, without a gradient; or None
    returns  the shape of x, channels innermost
    """
    rows = x.permute(0, 2, 3, 1).contiguous()  # [N, ..., ..., C]
    y, _ = _group_norm(rows.flatten(1, 2), shift, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)  # [N, R, C]
    return y.view(rows.shape).permute(0, 3, 1, 2)  # [N, C, ..., ...]


def geglu(projected: Tensor) -> Tensor:
    """[..., 2 H] -> [..., H]: the first half of the features times the exact GELU of the second."""
    rows = projected.contiguous().flatten(0, -2)  # [R, 2 H]
    return _geglu(rows).view(*projected.shape[:-1], -1)  # [..., H]


# --------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("minimti::group_norm", mutates_args=())
def _group_norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """x [N, R, C] contiguous -> the result, and for the backward pass `affine`, fp32 [4, N, C].

    These are scale and offset of x for the result before SiLU, then scale and offset of x for the normalised input.
    """
    with _launching(x) as kernels:
        return kernels.group_norm(x, None if shift is None else shift.contiguous(), weight, bias, groups, eps, silu)


@_group_norm.register_fake
def _(x: Tensor, shift: Any, weight: Any, bias: Any, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(4, x.shape[0], x.shape[2], dtype=torch.float32)


@torch.library.custom_op("minimti::group_norm_backward", mutates_args=())
def _group_norm_backward(dy: Tensor, x: Tensor, affine: Tensor, weight: Tensor, groups: int, silu: bool) -> Tensor:
    """The gradient with respect to x [N, R, C]."""
    with _launching(x) as kernels:
        return kernels.group_norm_backward(dy.contiguous(), x, affine, weight, groups, silu)


@_group_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, affine: Tensor, weight: Tensor, groups: int, silu: bool) -> Tensor:
    return torch.empty_like(x)


def _save_for_group_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, _, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, output[1], weight)
    ctx.set_materialize_grads(False)  # `affine` never gets a gradient


def _differentiate_group_norm(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, affine, weight = ctx.saved_tensors
    return _group_norm_backward(dy, x, affine, weight, ctx.groups, ctx.silu), None, None, None, None, None, None


_group_norm.register_autograd(_differentiate_group_norm, setup_context=_save_for_group_norm)


@torch.library.custom_op("minimti::geglu", mutates_args=())
def _geglu(projected: Tensor) -> Tensor:
    """[R, 2 H] contiguous -> [R, H]."""
    with _launching(projected) as kernels:
        return kernels.geglu(projected)


@_geglu.register_fake
def _(projected: Tensor) -> Tensor:
    return projected.new_empty(projected.shape[0], projected.shape[1] // 2)


@torch.library.custom_op("minimti::geglu_backward", mutates_args=())
def _geglu_backward(dy: Tensor, projected: Tensor) -> Tensor:
    """The gradient with respect to projected [R, 2 H]."""
    with _launching(projected) as kernels:
        return kernels.geglu_backward(dy.contiguous(), projected)


@_geglu_backward.register_fake
def _(dy: Tensor, projected: Tensor) -> Tensor:
    return torch.empty_like(projected)


def _save_for_geglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate_geglu(ctx: Any, dy: Tensor) -> Tensor:
    (projected,) = ctx.saved_tensors
    return _geglu_backward(dy, projected)


_geglu.register_autograd(_differentiate_geglu, setup_context=_save_for_geglu)
