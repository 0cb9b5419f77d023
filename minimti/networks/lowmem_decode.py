"""The VAE's decoder with little memory: all frames layer by layer, instead of all layers chunk by chunk.

A layer over space takes one frame at a time. A temporal res block mixes frames but not positions, so it takes a few
rows of all frames at a time; its group norms, which average over all positions, get their statistics in passes of their
own. At full size, memory holds the widest layer of one frame and one narrower copy of the clip, instead of several wide
copies of the clip. The pixels are those of `Decoder.forward` but for rounding.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimti.networks.layers import ResBlock, VideoResBlock, clips_of, frames_of
from minimti.networks.vae import Decoder

ROWS_BYTES = 2**26  # input of a temporal layer that is processed at once


def decode(decoder: Decoder, z: Tensor, rows_bytes: int = ROWS_BYTES, keep: bool = False) -> Tensor:
    """Raw latents of one clip [F, z, h, w] -> pixels [F, 3, 8 h, 8 w], about [-1,1].

    A temporal layer takes as many rows of all frames at once as `rows_bytes` hold, and at least one. With `keep`, the
    input of its second norm is kept between the two passes over it, a copy of the clip, and not computed twice. The
    layers write over the frames, so this is only for use without gradients.
    """
    frames = list(z.split(1))  # F times [1, C, H, W]

    def each(layer: Callable[[Tensor], Tensor]) -> None:
        for _ in range(len(frames)):  # pop: the list must not keep a frame whose successor is being made
            frames.append(layer(frames.pop(0)))

    def video(block: VideoResBlock, before: nn.Module | None = None) -> None:
        each(lambda frame: block.spatial_res_block(frame if before is None else before(frame), None))
        _blend_over_time(block, frames, rows_bytes, keep)

    each(decoder.conv_in)
    video(decoder.mid_block.resnets[0])
    each(decoder.mid_block.attentions[0])
    video(decoder.mid_block.resnets[1])
    upsample = None
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            video(resnet, before=upsample)  # frame by frame with its res block: not all frames are large at once
            upsample = None
        upsample = nn.Sequential(*block.upsamplers)
    each(lambda frame: decoder.conv_out(decoder.conv_norm_out(frame, silu=True)))
    clip = torch.cat(frames)  # [F, 3, H, W]
    return frames_of(decoder.time_conv_out(clips_of(clip, len(clip))), clip.shape[2])


def _blend_over_time(block: VideoResBlock, frames: list[Tensor], rows_bytes: int, keep: bool) -> None:
    """The temporal half of VideoResBlock.forward, in place; frames are F tensors [1, C, H, W]."""
    over_time = block.temporal_res_block
    first = _Statistics(over_time.norm1)
    for frame in frames:
        first.add(frame)
    second = _Statistics(over_time.norm2)
    kept = []
    for _, clip in _rows(frames, rows_bytes):
        h = _first_half(over_time, clip, first)
        second.add(h)
        if keep:
            kept.append(h)
    for rows, clip in _rows(frames, rows_bytes):
        h = kept.pop(0) if keep else _first_half(over_time, clip, first)
        mixed = block.time_mixer(clip, clip + over_time.conv2(F.silu(second.normalise(h), inplace=True)))
        for frame, part in zip(frames, frames_of(mixed, rows.stop - rows.start)):
            frame[0, :, rows] = part  # [C, rows, W]


def _first_half(block: ResBlock, clip: Tensor, statistics: "_Statistics") -> Tensor:
    return block.conv1(F.silu(statistics.normalise(clip), inplace=True))


def _rows(frames: list[Tensor], rows_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """The clip in bands of rows: which rows, and a copy of them [1, C, F, (rows W)]."""
    height = frames[0].shape[2]
    step = max(1, rows_bytes * height // (len(frames) * frames[0].nbytes))
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        yield rows, clips_of(torch.cat([frame[:, :, rows] for frame in frames]), len(frames))


class _Statistics:
    """A group norm whose input [1, C, ..., ...] comes in parts: first `add` all of them, then `normalise` each."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        dtype = torch.promote_types(norm.weight.dtype, torch.float32)  # as in PyTorch's own group norm
        self.count = 0
        self.mean = norm.weight.new_zeros(norm.num_groups, dtype=dtype)
        self.squares = torch.zeros_like(self.mean)  # sum of squared distances from the mean

    def add(self, part: Tensor) -> None:
        """Merges the statistics of one more part into those so far (Chan, Golub and LeVeque 1979)."""
        groups = part[0].unflatten(0, (self.norm.num_groups, -1)).to(self.mean.dtype)  # [groups, C/groups, ..., ...]
        count = groups[0].numel()
        variance, mean = torch.var_mean(groups, dim=(1, 2, 3), correction=0)
        total, delta = self.count + count, mean - self.mean
        self.squares = self.squares + variance * count + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def normalise(self, part: Tensor) -> Tensor:
        """The norm of a part by the statistics of all, in a new tensor."""
        scale = (self.squares / self.count + self.norm.eps).rsqrt()
        per_group = self.norm.num_channels // self.norm.num_groups
        scale = scale.repeat_interleave(per_group) * self.norm.weight  # [C]
        shift = self.norm.bias - self.mean.repeat_interleave(per_group) * scale  # [C]
        return (part * scale[:, None, None] + shift[:, None, None]).to(part.dtype)
