"""The Triton kernels behind fused.py, on rows [N, R, C] with channels innermost. All arithmetic is in fp32.

A group norm is three kernels: sums for each channel over parts of the rows, their combination for each group, and the
result. A sum over the rows of an image would otherwise occupy few of a GPU's multiprocessors. Numbers that differ from
layer to layer are not specialised: every specialisation is compiled, and the first step waits for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The fastest of eight forms tried on an H100 (minimti/bench/results/).
ROWS, BACKWARD_ROWS, CHANNELS = 128, 64, 64  # size of a tile
PART_ROWS, MAX_PARTS = 256, 64  # rows that one program sums up at least, and parts of an image at most
ELEMENTS = 1024  # size of a tile of GEGLU


def group_norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """fused._group_norm. x [N, R, C], shift [N, C] or None, weight and bias [C] -> [N, R, C] and fp32 [4, N, C]."""
    n, rows, channels = x.shape
    y = torch.empty_like(x)
    affine = x.new_empty(4, n, channels, dtype=torch.float32)
    parts, part_rows = _parts(rows, ROWS)
    sums = x.new_empty(2, n, parts, channels, dtype=torch.float32)
    per_group = channels // groups
    tiles = triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS), n
    _sums[(parts, *tiles[1:])](x, sums, n, rows, channels, parts, part_rows, ROWS, CHANNELS)
    _affine[(n, groups)](
        x, sums, x if shift is None else shift, weight, bias, affine, n, rows, channels, parts, per_group, eps,
        shift is not None, MAX_PARTS, triton.next_power_of_2(max(per_group, 128)),
    )  # fmt: skip
    _apply[tiles](x, affine, y, n, rows, channels, silu, ROWS, CHANNELS)
    return y, affine


def group_norm_backward(dy: Tensor, x: Tensor, affine: Tensor, weight: Tensor, groups: int, silu: bool) -> Tensor:
    """fused._group_norm_backward. dy and x [N, R, C], affine fp32 [4, N, C] -> [N, R, C]."""
    n, rows, channels = x.shape
    dx = torch.empty_like(x)
    parts, part_rows = _parts(rows, BACKWARD_ROWS)
    sums = x.new_empty(2, n, parts, channels, dtype=torch.float32)
    means = x.new_empty(2, n, groups, dtype=torch.float32)
    per_group = channels // groups
    tiles = triton.cdiv(rows, BACKWARD_ROWS), triton.cdiv(channels, CHANNELS), n
    _backward_sums[(parts, *tiles[1:])](
        dy, x, affine, weight, sums, n, rows, channels, parts, part_rows, silu, BACKWARD_ROWS, CHANNELS
    )
    sizes = MAX_PARTS, triton.next_power_of_2(max(per_group, 128))
    _backward_means[(n, groups)](sums, means, n, rows, channels, parts, per_group, *sizes)
    _backward_apply[tiles](
        dy, x, affine, weight, means, dx, n, rows, channels, groups, per_group, silu, BACKWARD_ROWS, CHANNELS
    )
    return dx


def geglu(projected: Tensor) -> Tensor:
    """fused._geglu. [R, 2 H] -> [R, H]."""
    rows, hidden = projected.shape[0], projected.shape[1] // 2
    y = projected.new_empty(rows, hidden)
    _geglu[(triton.cdiv(y.numel(), ELEMENTS),)](projected, y, y.numel(), hidden, ELEMENTS)
    return y


def geglu_backward(dy: Tensor, projected: Tensor) -> Tensor:
    """fused._geglu_backward. dy [R, H], projected [R, 2 H] -> [R, 2 H]."""
    d_projected = torch.empty_like(projected)
    grid = (triton.cdiv(dy.numel(), ELEMENTS),)
    _geglu_backward[grid](dy, projected, d_projected, dy.numel(), projected.shape[1] // 2, ELEMENTS)
    return d_projected


def _parts(rows: int, tile_rows: int) -> tuple[int, int]:
    """Into how many parts the rows of an image go, and the rows of each, a multiple of those of a tile."""
    parts = max(1, min(MAX_PARTS, triton.cdiv(rows, PART_ROWS)))
    part_rows = triton.cdiv(triton.cdiv(rows, parts), tile_rows) * tile_rows
    return triton.cdiv(rows, part_rows), part_rows


@triton.jit(do_not_specialize=["N", "R", "parts", "part_rows"])
def _sums(X, SUMS, N, R, C, parts, part_rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """SUMS [2, N, parts, C]: the sum of x - pivot and of its square over each part of the rows.

    The pivot of a channel is its first row. A mean that is large beside the deviation would cancel in the squares.
    """
    part, block, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    pivot = tl.load(X + n.to(tl.int64) * R * C + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, part_rows, ROWS):
        r = part * part_rows + first + tl.arange(0, ROWS)
        mask = (r < R)[:, None] & (c < C)[None, :]
        x = tl.load(X + (n.to(tl.int64) * R + r[:, None]) * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - pivot[None, :], 0.0)
        total += tl.sum(x, 0)
        squares += tl.sum(x * x, 0)
    at = (n * parts + part) * C + c
    tl.store(SUMS + at, total, mask=c < C)
    tl.store(SUMS + N * parts * C + at, squares, mask=c < C)


@triton.jit(do_not_specialize=["N", "R", "parts", "per_group"])
def _affine(
    X, SUMS, SHIFT, WEIGHT, BIAS, AFFINE, N, R, C, parts, per_group, eps,
    SHIFTED: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """AFFINE [4, N, C] from SUMS: mean and variance of a group are combined from those of its channels."""
    n, group = tl.program_id(0), tl.program_id(1)
    i, part = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    c, within = group * per_group + i, i < per_group
    mask = (part < parts)[:, None] & within[None, :]
    at = (n * parts + part[:, None]) * C + c[None, :]
    total = tl.sum(tl.load(SUMS + at, mask=mask, other=0.0), 0)
    squares = tl.sum(tl.load(SUMS + N * parts * C + at, mask=mask, other=0.0), 0)
    mean = tl.load(X + n.to(tl.int64) * R * C + c, mask=within, other=0.0).to(tl.float32) + total / R
    if SHIFTED:
        mean += tl.load(SHIFT + n * C + c, mask=within, other=0.0).to(tl.float32)
    group_mean = tl.sum(tl.where(within, mean, 0.0), 0) / per_group
    apart = mean - group_mean
    deviations = squares - total * total / R + R * apart * apart
    variance = tl.sum(tl.where(within, deviations, 0.0), 0) / (R * per_group)
    rstd = 1.0 / tl.sqrt(variance + eps)
    offset = -group_mean
    if SHIFTED:
        offset += tl.load(SHIFT + n * C + c, mask=within, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + c, mask=within, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + c, mask=within, other=0.0).to(tl.float32)
    at = AFFINE + n * C + c
    tl.store(at, weight * rstd, mask=within)
    tl.store(at + N * C, bias + offset * rstd * weight, mask=within)
    tl.store(at + 2 * N * C, rstd + 0.0 * weight, mask=within)
    tl.store(at + 3 * N * C, offset * rstd + 0.0 * weight, mask=within)


@triton.jit(do_not_specialize=["N", "R"])
def _apply(X, AFFINE, Y, N, R, C, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """y = x scale + offset, then SiLU."""
    block, n = tl.program_id(1), tl.program_id(2)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    mask = (r < R)[:, None] & (c < C)[None, :]
    at = (n.to(tl.int64) * R + r[:, None]) * C + c[None, :]
    scale = tl.load(AFFINE + n * C + c, mask=c < C, other=0.0)
    offset = tl.load(AFFINE + (N + n) * C + c, mask=c < C, other=0.0)
    y = tl.load(X + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _normalised_gradient(dy, x, AFFINE, WEIGHT, n, N, c, C, SILU: tl.constexpr):
    """The gradient with respect to the normalised input x_hat, and x_hat, of a tile [ROWS, CHANNELS]."""
    within = c < C
    if SILU:
        scale = tl.load(AFFINE + n * C + c, mask=within, other=0.0)
        offset = tl.load(AFFINE + (N + n) * C + c, mask=within, other=0.0)
        z = x * scale[None, :] + offset[None, :]
        s = tl.sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    weight = tl.load(WEIGHT + c, mask=within, other=0.0).to(tl.float32)
    rstd = tl.load(AFFINE + (2 * N + n) * C + c, mask=within, other=0.0)
    offset = tl.load(AFFINE + (3 * N + n) * C + c, mask=within, other=0.0)
    return dy * weight[None, :], x * rstd[None, :] + offset[None, :]


@triton.jit(do_not_specialize=["N", "R", "parts", "part_rows"])
def _backward_sums(
    DY, X, AFFINE, WEIGHT, SUMS, N, R, C, parts, part_rows,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """SUMS [2, N, parts, C]: the sum of d x_hat and of x_hat d x_hat over each part of the rows."""
    part, block, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    products = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, part_rows, ROWS):
        r = part * part_rows + first + tl.arange(0, ROWS)
        mask = (r < R)[:, None] & (c < C)[None, :]
        at = (n.to(tl.int64) * R + r[:, None]) * C + c[None, :]
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        d, x_hat = _normalised_gradient(dy, x, AFFINE, WEIGHT, n, N, c, C, SILU)
        total += tl.sum(d, 0)
        products += tl.sum(d * x_hat, 0)
    at = (n * parts + part) * C + c
    tl.store(SUMS + at, total, mask=c < C)
    tl.store(SUMS + N * parts * C + at, products, mask=c < C)


@triton.jit(do_not_specialize=["N", "R", "parts", "per_group"])
def _backward_means(
    SUMS, MEANS, N, R, C, parts, per_group, PARTS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """MEANS [2, N, groups]: the means of d x_hat and of x_hat d x_hat over each group."""
    n, group = tl.program_id(0), tl.program_id(1)
    i, part = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    mask = (part < parts)[:, None] & (i < per_group)[None, :]
    at = (n * parts + part[:, None]) * C + (group * per_group + i)[None, :]
    total = tl.sum(tl.sum(tl.load(SUMS + at, mask=mask, other=0.0), 0), 0)
    products = tl.sum(tl.sum(tl.load(SUMS + N * parts * C + at, mask=mask, other=0.0), 0), 0)
    at = n * tl.num_programs(1) + group
    tl.store(MEANS + at, total / (R * per_group))
    tl.store(MEANS + N * tl.num_programs(1) + at, products / (R * per_group))


@triton.jit(do_not_specialize=["N", "R", "groups", "per_group"])
def _backward_apply(
    DY, X, AFFINE, WEIGHT, MEANS, DX, N, R, C, groups, per_group,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = (d x_hat - mean(d x_hat) - x_hat mean(x_hat d x_hat)) / deviation."""
    block, n = tl.program_id(1), tl.program_id(2)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    within = c < C
    mask = (r < R)[:, None] & within[None, :]
    at = (n.to(tl.int64) * R + r[:, None]) * C + c[None, :]
    dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    d, x_hat = _normalised_gradient(dy, x, AFFINE, WEIGHT, n, N, c, C, SILU)
    group = n * groups + c // per_group
    mean = tl.load(MEANS + group, mask=within, other=0.0)
    product = tl.load(MEANS + N * groups + group, mask=within, other=0.0)
    rstd = tl.load(AFFINE + (2 * N + n) * C + c, mask=within, other=0.0)
    dx = (d - mean[None, :] - x_hat * product[None, :]) * rstd[None, :]
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _geglu(PROJECTED, Y, count, HIDDEN: tl.constexpr, ELEMENTS: tl.constexpr):
    """y = value GELU(gate), the value in the first half of a row and the gate in the second."""
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = i < count
    at = PROJECTED + i + i // HIDDEN * HIDDEN
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(at + HIDDEN, mask=mask, other=0.0).to(tl.float32)
    y = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(Y + i, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _geglu_backward(DY, PROJECTED, DPROJECTED, count, HIDDEN: tl.constexpr, ELEMENTS: tl.constexpr):
    """The gradients of both halves: GELU'(g) = Phi(g) + g phi(g), with the normal distribution Phi, density phi."""
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = i < count
    at = i + i // HIDDEN * HIDDEN
    dy = tl.load(DY + i, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(PROJECTED + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(PROJECTED + at + HIDDEN, mask=mask, other=0.0).to(tl.float32)
    distribution = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    element = DPROJECTED.dtype.element_ty
    tl.store(DPROJECTED + at, (dy * gate * distribution).to(element), mask=mask)
    tl.store(DPROJECTED + at + HIDDEN, (dy * value * (distribution + gate * density)).to(element), mask=mask)
