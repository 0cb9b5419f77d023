"""The spatiotemporal UNet of Stable Video Diffusion (sgm's VideoUNet), with a set of tokens for every frame."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from minimti.config import UNetConfig
from minimti.networks.attention import Context, SpatioTemporalTransformer
from minimti.networks.layers import Conv3x3, Norm, TimestepEmbedding, Upsample, VideoResBlock, silu, sinusoid
from minimti.networks.recompute import Checkpointed

# The official code has 1e-5 in every res block; diffusers differs in 72 places, by 1.6e-5 of the output.
EPS = 1e-5


def group_norm(config: UNetConfig) -> Norm:
    return partial(nn.GroupNorm, config.norm_groups, eps=EPS)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Block(Checkpointed):
    """Res blocks, each followed by a transformer on the levels that attend: the common part of all blocks."""

    def __init__(self, config: UNetConfig, widths: list[tuple[int, int]], num_attentions: int):
        super().__init__()
        norm = group_norm(config)
        self.resnets = nn.ModuleList(
            VideoResBlock(c_in, c_out, 4 * config.model_channels, norm, norm, weighs_temporal=False)
            for c_in, c_out in widths
        )
        self.attentions = nn.ModuleList(
            SpatioTemporalTransformer(c_out, config) for _, c_out in widths[:num_attentions]
        )


class DownBlock(Block):
    def __init__(self, config: UNetConfig, c_in: int, c_out: int, attends: bool, downsamples: bool):
        n = config.num_res_blocks
        super().__init__(config, [(c_in if i == 0 else c_out, c_out) for i in range(n)], n if attends else 0)
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if downsamples else [])

    def forward(self, x: Tensor, embedding: Tensor, num_frames: int, contexts: Iterator[Context]) -> list[Tensor]:
        """Returns every feature map that a skip connection carries; the last one goes down."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self.checkpointed(resnet, x, embedding, num_frames)
            if self.attentions:
                x = self.checkpointed(self.attentions[i], x, num_frames, next(contexts))
            skips.append(x)
        for downsample in self.downsamplers:
            skips.append(self.checkpointed(downsample, x))
        return skips


class MidBlock(Block):
    def __init__(self, config: UNetConfig, channels: int):
        super().__init__(config, [(channels, channels)] * 2, num_attentions=1)

    def forward(self, x: Tensor, embedding: Tensor, num_frames: int, contexts: Iterator[Context]) -> Tensor:
        x = self.checkpointed(self.resnets[0], x, embedding, num_frames)
        x = self.checkpointed(self.attentions[0], x, num_frames, next(contexts))
        return self.checkpointed(self.resnets[1], x, embedding, num_frames)


class UpBlock(Block):
    def __init__(self, config: UNetConfig, c_in: int, c_skips: list[int], c_out: int, attends: bool, upsamples: bool):
        widths = [((c_in if i == 0 else c_out) + c_skip, c_out) for i, c_skip in enumerate(c_skips)]
        super().__init__(config, widths, len(widths) if attends else 0)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsamples else [])

    def forward(self, skips: list[Tensor], embedding: Tensor, num_frames: int, contexts: Iterator[Context]) -> Tensor:
        """Takes its input from the end of `skips`, then one skip connection per res block."""
        x = skips.pop()
        for i in range(len(self.resnets)):
            x = self.checkpointed(self._join, i, x, skips.pop(), embedding, num_frames)
            if self.attentions:
                x = self.checkpointed(self.attentions[i], x, num_frames, next(contexts))
        for upsample in self.upsamplers:
            x = self.checkpointed(upsample, x)
        return x

    def _join(self, i: int, x: Tensor, skip: Tensor, embedding: Tensor, num_frames: int) -> Tensor:
        return self.resnets[i](torch.cat([x, skip], dim=1), embedding, num_frames)


class UNet(nn.Module):
    """F_theta of the paper's equation 2."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        c = config.model_channels
        widths = [c * mult for mult in config.channel_mult]
        attends = [2**level in config.attention_resolutions for level in range(len(widths))]
        last = len(widths) - 1

        self.time_embedding = TimestepEmbedding(c, 4 * c, 4 * c)
        self.add_embedding = TimestepEmbedding(config.adm_in_channels, 4 * c, 4 * c)
        self.conv_in = Conv3x3(config.in_channels, c)

        self.down_blocks = nn.ModuleList()
        c_skips = [c]  # widths of the skip connections, in the order in which the way down makes them
        for level, width in enumerate(widths):
            self.down_blocks.append(DownBlock(config, c_skips[-1], width, attends[level], downsamples=level < last))
            c_skips += [width] * (config.num_res_blocks + (level < last))

        self.mid_block = MidBlock(config, widths[-1])

        self.up_blocks = nn.ModuleList()
        c_in = widths[-1]
        for level in reversed(range(len(widths))):
            taken = [c_skips.pop() for _ in range(config.num_res_blocks + 1)]
            self.up_blocks.append(UpBlock(config, c_in, taken, widths[level], attends[level], upsamples=level > 0))
            c_in = widths[level]

        self.conv_norm_out = group_norm(config)(c)
        self.conv_out = Conv3x3(c, config.out_channels)

    def absorb(self, spatial: Tensor, temporal: Tensor) -> list[Context]:
        """What the transformers take from the tokens of T clips, one after the other; no noise level changes it.

        spatial   [T, F, N, d]: tokens that the positions of each frame attend to
        temporal  [T, N, d]: tokens that every position attends to over time

        Raises ValueError where these are not of as many clips.
        """
        if len(spatial) != len(temporal):
            raise ValueError(f"spatial tokens of {len(spatial)} clips, temporal tokens of {len(temporal)}")
        spatial, temporal = spatial.to(self.conv_in.weight.dtype), temporal.to(self.conv_in.weight.dtype)
        transformers = (module for module in self.modules() if isinstance(module, SpatioTemporalTransformer))
        return [transformer.absorb(spatial, temporal) for transformer in transformers]

    def forward(self, x: Tensor, c_noise: Tensor, micro: Tensor, contexts: list[Context]) -> Tensor:
        """One evaluation of the network, in the dtype of its weights; the result has the dtype of x.

        x         [B, F, in_channels, H, W]: c_in * noisy scaled latent, then the raw latent of the conditioning image
        c_noise   [B]: ln(sigma) / 4
        micro     [B, 3]: fps id, motion bucket id, noise augmentation
        contexts  of `absorb`, for the last T <= B clips; those before attend to no token, as to zeros
        returns   [B, F, out_channels, H, W]

        Raises ValueError where these shapes do not fit together.
        """
        batch, num_frames, _, height, width = x.shape
        if (sets := len(contexts[0].spatial_keys)) % num_frames or sets > batch * num_frames:
            raise ValueError(f"{sets} sets of spatial tokens do not fit {batch} clips of {num_frames} frames")
        if height % (cell := 2 ** (len(self.down_blocks) - 1)) or width % cell:
            raise ValueError(f"latents of {width}x{height} cannot be halved {len(self.down_blocks) - 1} times")

        out_dtype, dtype = x.dtype, self.conv_in.weight.dtype
        embedding = self.time_embedding(sinusoid(c_noise, self.config.model_channels).to(dtype))
        vector = sinusoid(micro, self.config.adm_in_channels // micro.shape[1]).flatten(1)
        embedding = embedding + self.add_embedding(vector.to(dtype))  # [B, 4 c]

        remaining = iter(contexts)
        x = self.conv_in(x.to(dtype).flatten(0, 1))  # [(B F), c, H, W]
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], embedding, num_frames, remaining)
        skips.append(self.mid_block(skips[-1], embedding, num_frames, remaining))
        for block in self.up_blocks:  # results on the stack: a name here would keep them alive
            skips.append(block(skips, embedding, num_frames, remaining))
        x = self.conv_out(silu(self.conv_norm_out(skips.pop())))
        return x.unflatten(0, (batch, num_frames)).to(out_dtype)
