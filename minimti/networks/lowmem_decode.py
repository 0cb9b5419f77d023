"""The decoder with little memory, and nothing else changed: layer by layer instead of chunk by chunk.

A layer over space takes one frame at a time. A temporal res block mixes frames but not positions, so it takes a few
rows of all frames at a time; its norms, which do look at all positions, get their statistics in a pass of their own. At
full size the widest layer of one frame and one narrower copy of the clip are in memory, not several wide clips.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from minimti.networks.layers import ResBlock, VideoResBlock, clips_of, frames_of, silu
from minimti.networks.vae import Decoder

ROWS_BYTES = 2**26  # of the rows that a temporal layer takes at once


def decode(decoder: Decoder, z: Tensor) -> Tensor:
    """Raw latents of one clip [F, z, h, w] -> pixels [F, 3, 8 h, 8 w], equal to decoder(z, F) but for rounding."""
    frames = list(z.split(1))

    def each(layer: Callable[[Tensor], Tensor]) -> None:
        for i, frame in enumerate(frames):
            frames[i] = None  # so that the list does not hold it while its successor is made
            frames[i] = layer(frame)
            del frame

    def video(block: VideoResBlock, before: nn.Module | None = None) -> None:
        each(lambda frame: block.spatial_res_block(frame if before is None else before(frame), None))
        _blend_over_time(block, frames)

    each(decoder.conv_in)
    video(decoder.mid_block.resnets[0])
    each(decoder.mid_block.attentions[0])
    video(decoder.mid_block.resnets[1])
    upsample = None
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            video(resnet, before=upsample)  # a frame grows only when its turn comes
            upsample = None
        upsample = nn.Sequential(*block.upsamplers)
    each(lambda frame: decoder.conv_out(silu(decoder.conv_norm_out(frame))))
    clip = torch.cat(frames)
    return frames_of(decoder.time_conv_out(clips_of(clip, len(clip))), clip.shape[2])


def _blend_over_time(block: VideoResBlock, frames: list[Tensor]) -> None:
    """What VideoResBlock does after its spatial part, in place; frames are F tensors [1, C, H, W]."""
    over_time = block.temporal_res_block
    first = _Statistics(over_time.norm1)
    for frame in frames:
        first.add(frame)
    second = _Statistics(over_time.norm2)
    for _, clip in _rows(frames):
        second.add(_first_half(over_time, clip, first))
    for rows, clip in _rows(frames):
        h = _first_half(over_time, clip, first)
        mixed = block.time_mixer(clip, clip + over_time.conv2(silu(second.normalise(h))))
        for frame, part in zip(frames, frames_of(mixed, rows.stop - rows.start)):
            frame[0, :, rows] = part


def _first_half(block: ResBlock, clip: Tensor, statistics: "_Statistics") -> Tensor:
    return block.conv1(silu(statistics.normalise(clip)))


def _rows(frames: list[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of all frames at a time: where they are, and their copy [1, C, F, (rows W)]."""
    height = frames[0].shape[2]
    step = max(1, ROWS_BYTES * height // (len(frames) * frames[0].nbytes))
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        yield rows, clips_of(torch.cat([frame[:, :, rows] for frame in frames]), len(frames))


class _Statistics:
    """A group norm whose input comes in parts [1, C, ..., ...]."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: sum of squared distances from the mean

    def add(self, part: Tensor) -> None:
        """Merges the statistics of one more part into those so far (Chan, Golub and LeVeque 1979)."""
        groups = part[0].unflatten(0, (self.norm.num_groups, -1))
        groups = groups.float() if groups.dtype in (torch.bfloat16, torch.float16) else groups
        count = groups[0].numel()
        variance, mean = torch.var_mean(groups, dim=(1, 2, 3), correction=0)
        total, delta = self.count + count, mean - self.mean
        self.squares = self.squares + variance * count + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def normalise(self, part: Tensor) -> Tensor:
        scale = (self.squares / self.count + self.norm.eps).rsqrt().to(self.mean.dtype)
        per_channel = self.norm.num_channels // self.norm.num_groups
        scale = scale.repeat_interleave(per_channel) * self.norm.weight
        shift = self.norm.bias - self.mean.repeat_interleave(per_channel) * scale
        return (part * scale[:, None, None] + shift[:, None, None]).to(part.dtype)
