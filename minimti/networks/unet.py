"""The spatiotemporal UNet of Stable Video Diffusion, with a set of tokens for every frame.

Source: VideoUNet in sgm/modules/diffusionmodules/video_model.py of Stability's generative-models. There all frames of
a clip share their tokens; motion-textual inversion gives each frame its own (the paper's 3.4.2).
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimti.config import UNetConfig
from minimti.networks.attention import Context, SpatioTemporalTransformer
from minimti.networks.layers import (
    Conv3x3,
    GroupNorm,
    Norm,
    TimestepEmbedding,
    Upsample,
    VideoResBlock,
    module_list,
    sinusoid,
)
from minimti.networks.recompute import Checkpointed

# As in all res blocks of the official code. Diffusers has 1e-6 in 72 places, which changes the output by 1.6e-5.
EPS = 1e-5


def group_norm(config: UNetConfig) -> Norm:
    """The group norm of all res blocks and of the output."""
    return partial(GroupNorm, config.norm_groups, eps=EPS)


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, C, H, W] -> [batch, C, H/2, W/2]."""
        return self.conv(x)


class Block(Checkpointed):
    """What all blocks have in common: res blocks, the first `num_attentions` of them followed by a transformer.

    `widths` are the channels in and out of each res block. The `forward` of a block takes

    embedding  [B, 4 model_channels], of the noise level and the micro-conditioning, after SiLU
    num_frames F
    contexts   the contexts of all transformers in the order in which they run; the block takes its own from the front
    """

    def __init__(self, config: UNetConfig, widths: list[tuple[int, int]], num_attentions: int):
        super().__init__()
        norm = group_norm(config)
        self.resnets = module_list(
            VideoResBlock(c_in, c_out, 4 * config.model_channels, norm, norm, weighs_temporal=False)
            for c_in, c_out in widths
        )
        self.attentions = module_list(SpatioTemporalTransformer(c_out, config) for _, c_out in widths[:num_attentions])


class DownBlock(Block):
    """A level of the way down."""

    def __init__(self, config: UNetConfig, c_in: int, c_out: int, attends: bool, downsamples: bool):
        n = config.num_res_blocks
        super().__init__(config, [(c_in if i == 0 else c_out, c_out) for i in range(n)], n if attends else 0)
        self.downsamplers = module_list([Downsample(c_out)] if downsamples else [])

    def forward(self, x: Tensor, embedding: Tensor, num_frames: int, contexts: Iterator[Context]) -> list[Tensor]:
        """x [(B F), C, H, W] -> the feature maps for the skip connections; the last one goes on to the next level."""
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
    """The coarsest level, between the way down and the way up."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__(config, [(channels, channels)] * 2, num_attentions=1)

    def forward(self, x: Tensor, embedding: Tensor, num_frames: int, contexts: Iterator[Context]) -> Tensor:
        """x [(B F), C, H, W] -> the same shape."""
        x = self.checkpointed(self.resnets[0], x, embedding, num_frames)
        x = self.checkpointed(self.attentions[0], x, num_frames, next(contexts))
        return self.checkpointed(self.resnets[1], x, embedding, num_frames)


class UpBlock(Block):
    """A level of the way up. Its i-th res block also takes a skip connection of c_skips[i] channels."""

    def __init__(self, config: UNetConfig, c_in: int, c_skips: list[int], c_out: int, attends: bool, upsamples: bool):
        widths = [((c_in if i == 0 else c_out) + c_skip, c_out) for i, c_skip in enumerate(c_skips)]
        super().__init__(config, widths, len(widths) if attends else 0)
        self.upsamplers = module_list([Upsample(c_out)] if upsamples else [])

    def forward(self, skips: list[Tensor], embedding: Tensor, num_frames: int, contexts: Iterator[Context]) -> Tensor:
        """Pops its input from the end of `skips`, then a skip connection for each res block -> [(B F), C', H', W']."""
        x = skips.pop()
        for i in range(len(self.resnets)):
            x = self.checkpointed(self._join, i, x, skips.pop(), embedding, num_frames)
            if self.attentions:
                x = self.checkpointed(self.attentions[i], x, num_frames, next(contexts))
        for upsample in self.upsamplers:
            x = self.checkpointed(upsample, x)
        return x

    def _join(self, i: int, x: Tensor, skip: Tensor, embedding: Tensor, num_frames: int) -> Tensor:
        """One function of both tensors, so that checkpointing keeps these and not their concatenation."""
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

        down_blocks = []
        c_skips = [c]  # channels of the skip connections, in the order in which the way down makes them
        for level, width in enumerate(widths):
            down_blocks.append(DownBlock(config, c_skips[-1], width, attends[level], downsamples=level < last))
            c_skips += [width] * (config.num_res_blocks + (level < last))
        self.down_blocks = module_list(down_blocks)

        self.mid_block = MidBlock(config, widths[-1])

        up_blocks = []
        c_in = widths[-1]
        for level in reversed(range(len(widths))):
            taken = [c_skips.pop() for _ in range(config.num_res_blocks + 1)]
            up_blocks.append(UpBlock(config, c_in, taken, widths[level], attends[level], upsamples=level > 0))
            c_in = widths[level]
        self.up_blocks = module_list(up_blocks)

        self.conv_norm_out = group_norm(config)(c)
        self.conv_out = Conv3x3(c, config.out_channels)

    def project_tokens(self, spatial: Tensor, temporal: Tensor) -> list[Context]:
        """K and V of every cross-attention, for `forward`. They do not depend on the noise level: once per sample.

        spatial   [B, F, N, d]: the tokens that the positions of each frame attend to
        temporal  [B, N, d]: the tokens that all positions of a clip attend to in the layers over time
        returns   the context of each transformer, in the order in which they run

        N = 0 means no tokens, which is the same as tokens that are all zero, and cheaper. Raises ValueError if the two
        are not for the same number of clips.
        """
        if len(spatial) != len(temporal):
            raise ValueError(f"spatial tokens are for {len(spatial)} clips, temporal tokens for {len(temporal)}")
        spatial, temporal = spatial.to(self.conv_in.weight.dtype), temporal.to(self.conv_in.weight.dtype)
        transformers = (module for module in self.modules() if isinstance(module, SpatioTemporalTransformer))
        return [transformer.project_tokens(spatial, temporal) for transformer in transformers]

    def forward(self, x: Tensor, c_noise: Tensor, micro: Tensor, contexts: list[Context]) -> Tensor:
        """One evaluation of the network, in the dtype of its weights; the result has the dtype of x.

        x         [B, F, in_channels, H, W]: c_in * noisy scaled latent, then the raw latent of the conditioning image
        c_noise   [B]: ln(sigma) / 4
        micro     [B, 3]: fps id, motion bucket id, noise augmentation
        contexts  the tokens of the same B clips, as `project_tokens` returns them
        returns   [B, F, out_channels, H, W]

        Raises ValueError if the contexts are not for as many clips and frames as x, or if H or W cannot be halved as
        often as the levels of the network require.
        """
        batch, num_frames, _, height, width = x.shape
        sets = len(contexts[0].spatial_keys), len(contexts[0].temporal_keys)
        if sets != (batch * num_frames, batch):
            found = f"{sets[0]} spatial and {sets[1]} temporal sets of tokens"
            raise ValueError(f"{found} do not fit {batch} clips of {num_frames} frames")
        if height % (cell := 2 ** (len(self.down_blocks) - 1)) or width % cell:
            raise ValueError(f"latents of {width}x{height} cannot be halved {len(self.down_blocks) - 1} times")

        out_dtype, dtype = x.dtype, self.conv_in.weight.dtype
        embedding = self.time_embedding(sinusoid(c_noise, self.config.model_channels).to(dtype))
        vector = sinusoid(micro, self.config.adm_in_channels // micro.shape[1]).flatten(1)  # [B, adm_in_channels]
        embedding = F.silu(embedding + self.add_embedding(vector.to(dtype)))  # [B, 4 c]; SiLU once for all res blocks

        remaining = iter(contexts)
        x = x.to(dtype).flatten(0, 1).contiguous(memory_format=torch.channels_last)  # [(B F), in_channels, H, W]
        x = self.conv_in(x)  # [(B F), c, H, W]
        skips = [x]
        for down_block in self.down_blocks:
            skips += down_block(skips[-1], embedding, num_frames, remaining)
        skips.append(self.mid_block(skips[-1], embedding, num_frames, remaining))
        for up_block in self.up_blocks:  # pops its input; a variable here would keep that in memory
            skips.append(up_block(skips, embedding, num_frames, remaining))
        x = self.conv_out(self.conv_norm_out(skips.pop(), silu=True))
        return x.unflatten(0, (batch, num_frames)).to(out_dtype)  # [B, F, out_channels, H, W]
