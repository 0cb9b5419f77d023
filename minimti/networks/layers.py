"""Layers that the UNet and the VAE share.

Attribute names throughout the networks are those of the diffusers weight files; layouts.py has the names of the
official single file. A clip travels through the networks as [(B F), C, H, W]; a layer over time unfolds it and folds
it back, so `num_frames` (F) accompanies it.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv3x3(nn.Conv2d):
    """With padding. On a CPU, fewer positions than channels become rows of a matrix product: there a convolution would
    spend most of its time on rearranging the weights, whose layout (weights.py) is already that of a matrix."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if x.device.type != "cpu" or batch * height * width >= channels:
            return super().forward(x)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        neighbours = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        rows = torch.cat(neighbours, dim=-1).flatten(0, 2)  # [positions, 9 C]
        out = F.linear(rows, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return out.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)


Norm = Callable[[int], nn.GroupNorm]  # of so many channels


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """[...] -> [..., dim]: cosines, then sines, of frequencies from 1 down to nearly 1e-4.

    Always fp32, and multiplied before divided, as the official `timestep_embedding` does: at 1e-10 it shows.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=positions.device) / half)
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """The two-layer MLP behind every sinusoid."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_hidden)
        self.linear_2 = nn.Linear(dim_hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Blend(nn.Module):
    """A learned mixture of a spatial and a temporal branch.

    In the UNet sigmoid(mix_factor) weighs the spatial branch. In the VAE's decoder it weighs the temporal one
    (`weighs_temporal`): the official decoder swaps the arguments.
    """

    def __init__(self, weighs_temporal: bool):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.empty(1))
        self.weighs_temporal = weighs_temporal

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        weight = self.mix_factor.sigmoid().to(spatial.dtype)
        return torch.lerp(spatial, temporal, weight) if self.weighs_temporal else torch.lerp(temporal, spatial, weight)


def silu(fresh: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else holds, in its place where no backward pass will ask for it."""
    return F.silu(fresh, inplace=not torch.is_grad_enabled())


def add_owned(fresh: Tensor, y: Tensor) -> Tensor:
    """The sum, in the place of a first term that nobody else holds, where no backward pass will ask for it."""
    return fresh + y if torch.is_grad_enabled() else fresh.add_(y)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + embedding))), over space or over time as `conv` chooses."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int | None, norm: Norm, conv: type[nn.Module]):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels)
        if embed_dim is not None:
            self.time_emb_proj = nn.Linear(embed_dim, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels)
        self.conv_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """x [(B F), C, H, W] or [B, C, F, (H W)], embedding [B, embed_dim] or None -> C' channels."""
        h = self.conv1(silu(self.norm1(x)))
        if embedding is not None:
            shift = self.time_emb_proj(F.silu(embedding))  # [B, C]
            h = add_owned(h, shift.repeat_interleave(len(h) // len(shift), dim=0)[:, :, None, None])
        h = self.conv2(silu(self.norm2(h)))
        return add_owned(h, self.conv_shortcut(x))


class ConvOverTime(nn.Conv3d):
    """The official (3,1,1) convolution. With the positions in a row it is one in two dimensions, which libraries do
    better, and without a copy where channels lie innermost."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, positions] -> [B, C', F, positions]."""
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=(1, 0))


def clips_of(x: Tensor, num_frames: int) -> Tensor:
    """[(B F), C, H, W] -> [B, C, F, (H W)], as layers over time want it; a view."""
    # In this order also a single clip gets the strides by which libraries tell that channels are innermost.
    return x.flatten(2).unflatten(0, (-1, num_frames)).transpose(1, 2)


def frames_of(clips: Tensor, height: int) -> Tensor:
    """[B, C, F, (H W)] -> [(B F), C, H, W]: the way back."""
    return clips.transpose(1, 2).flatten(0, 1).unflatten(2, (height, -1))


class VideoResBlock(nn.Module):
    """A spatial res block, then a temporal one on its output, blended."""

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
        clips = clips_of(x, num_frames)
        return frames_of(self.time_mixer(clips, self.temporal_res_block(clips, embedding)), x.shape[2])


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
