"""Layers that the UNet and the VAE share.

Attributes of all networks have the names of the diffusers weight files; checkpoint/key_maps.py translates those of the
official single file. A clip passes through the networks as [(B F), C, H, W]. Layers over time unfold that and fold it
back, so they take `num_frames` (F) too.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimti.networks import fused

Norm = Callable[[int], "GroupNorm"]  # makes the group norm for a number of channels
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def module_list(modules: Iterable[AnyModule]) -> Sequence[AnyModule]:
    """nn.ModuleList, with the type of its elements (it declares them as plain modules)."""
    return cast(Sequence[AnyModule], nn.ModuleList(modules))


def add_owned(owned: Tensor, y: Tensor) -> Tensor:
    """The sum owned + y, in the memory of `owned` when gradients are off; y broadcasts to the shape of `owned`.

    The caller must hold the only reference to `owned` and must not use it afterwards: a result that was just computed,
    not an input. With gradients on, autograd may need `owned` in the backward pass, and a new tensor is returned.
    """
    return owned + y if torch.is_grad_enabled() else owned.add_(y)


def repeated(t: Tensor, times: int) -> Tensor:
    """[n, ...] -> [n * times, ...], every entry so often in a row; `t` itself where that is once."""
    return t if times == 1 else t.repeat_interleave(times, dim=0)


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding, [...] -> [..., dim] in fp32: cosines, then sines, of frequencies from 1 to nearly 1e-4.

    As the official `timestep_embedding`: always in fp32, and the exponent is multiplied before it is divided. The order
    changes results by 1e-10.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=positions.device) / half)
    angles = positions.float()[..., None] * frequencies  # [..., dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """The two-layer MLP that follows every sinusoid, [..., dim_in] -> [..., dim_out]."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_hidden)
        self.linear_2 = nn.Linear(dim_hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim_in] -> [..., dim_out]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class Blend(nn.Module):
    """A learned mixture of a spatial and a temporal branch.

    In the UNet sigmoid(mix_factor) is the weight of the spatial branch. In the VAE's decoder it is the weight of the
    temporal one (`weighs_temporal`), because the official decoder swaps the arguments.
    """

    def __init__(self, weighs_temporal: bool):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.empty(1))
        self.weighs_temporal = weighs_temporal

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        """Two tensors of one shape -> the same shape."""
        weight = self.mix_factor.sigmoid().to(spatial.dtype)
        return torch.lerp(spatial, temporal, weight) if self.weighs_temporal else torch.lerp(temporal, spatial, weight)


class GroupNorm(nn.GroupNorm):
    """PyTorch's group norm, with what comes before and after it in a res block."""

    def forward(self, x: Tensor, shift: Tensor | None = None, silu: bool = False) -> Tensor:
        """norm(x + shift), then SiLU if asked for. x [N, C, ..., ...], shift [N, C] -> the shape of x.

        The rule of `add_owned` holds for an x that is shifted: the caller must not use it afterwards.
        """
        if fused.applies(x, self.weight):
            return fused.group_norm(x, self, shift, silu)
        if shift is not None:
            x = add_owned(x, shift[:, :, None, None])  # [N, C, 1, 1]
        x = super().forward(x)
        return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding.

    On a CPU, an image with fewer positions than channels goes as a matrix product over the 9 C neighbours of each
    position. A convolution would spend most of its time there on rearranging the weights, which checkpoint/load.py
    (`memory_format`) has stored in the order of that matrix.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, C, H, W] -> [batch, C', H, W]."""
        batch, channels, height, width = x.shape
        if not fused.on_cpu(x) or batch * height * width >= channels:
            return super().forward(x)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # [batch, H + 2, W + 2, C]
        neighbours = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        rows = torch.cat(neighbours, dim=-1).flatten(0, 2)  # [(batch H W), (3 3 C)]
        out = F.linear(rows, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)  # weight [C', (3 3 C)]
        return out.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)  # [batch, C', H, W]


class ConvOverTime(nn.Conv3d):
    """The official convolution of size (3, 1, 1) over frames, computed in two dimensions.

    With all positions of a frame along one axis it is a 3x1 convolution. Libraries compute that faster than one in
    three dimensions, and without a copy where channels are innermost in memory.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, (H W)] -> [B, C', F, (H W)]."""
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=(1, 0))  # weight [C', C, 3, 1]


def clips_of(x: Tensor, num_frames: int) -> Tensor:
    """[(B F), C, H, W] -> [B, C, F, (H W)], the shape for layers over time; a view."""
    # Unflattened before it is transposed, a single clip too has the strides that libraries recognise as channels-last.
    return x.flatten(2).unflatten(0, (-1, num_frames)).transpose(1, 2)


def frames_of(clips: Tensor, height: int) -> Tensor:
    """[B, C, F, (H W)] -> [(B F), C, H, W], the inverse of `clips_of`."""
    return clips.transpose(1, 2).flatten(0, 1).unflatten(2, (height, -1))


class ResBlock(nn.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x))) + linear(embedding)))), over space or time.

    `conv` is Conv3x3 for the first, ConvOverTime for the second.
    """

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int | None, norm: Norm, conv: type[nn.Module]):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels)
        if embed_dim is not None:
            self.time_emb_proj = nn.Linear(embed_dim, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels)
        self.conv_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """x [(B F), C, H, W] or [B, C, F, (H W)], embedding [B, embed_dim] or None -> x's shape with C' channels."""
        h = self.conv1(self.norm1(x, silu=True))
        shift = None
        if embedding is not None:
            shift = self.time_emb_proj(embedding)  # [B, C']
            shift = repeated(shift, len(h) // len(shift))  # [(B F) or B, C']
        h = self.conv2(self.norm2(h, shift, silu=True))
        return add_owned(h, self.conv_shortcut(x))


class VideoResBlock(nn.Module):
    """A spatial res block, then a temporal one on its output, blended (sgm's VideoResBlock)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_dim: int | None,
        spatial_norm: Norm,
        temporal_norm: Norm,
        weighs_temporal: bool,
    ):
        super().__init__()
        self.spatial_res_block = ResBlock(in_channels, out_channels, embed_dim, spatial_norm, Conv3x3)
        self.temporal_res_block = ResBlock(out_channels, out_channels, embed_dim, temporal_norm, ConvOverTime)
        self.time_mixer = Blend(weighs_temporal)

    def forward(self, x: Tensor, embedding: Tensor | None, num_frames: int) -> Tensor:
        """x [(B F), C, H, W], embedding [B, embed_dim] or None -> [(B F), C', H, W]."""
        x = self.spatial_res_block(x, embedding)
        clips = clips_of(x, num_frames)  # [B, C', F, (H W)]
        return frames_of(self.time_mixer(clips, self.temporal_res_block(clips, embedding)), x.shape[2])


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, C, H, W] -> [batch, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
