"""The VAE of Stable Video Diffusion: Stable Diffusion's image encoder, and a decoder with layers over time.

Pixels are in [-1,1]. A raw latent is the mode of the encoder's posterior; a scaled latent is raw * scale_factor. The
UNet denoises scaled latents and is conditioned on a raw one. The 8 in shapes is 2^(levels - 1), with four levels.

Sources, in Stability's generative-models: Encoder in sgm/modules/diffusionmodules/model.py, VideoDecoder in
sgm/modules/autoencoding/temporal_ae.py.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimti.config import VAEConfig
from minimti.networks.layers import (
    Conv3x3,
    ConvOverTime,
    GroupNorm,
    Norm,
    ResBlock,
    Upsample,
    VideoResBlock,
    clips_of,
    frames_of,
    module_list,
)

EPS = 1e-6
TEMPORAL_EPS = 1e-5  # in the decoder's res blocks over time; they also blend the other way round (layers.Blend)


def group_norm(config: VAEConfig, eps: float = EPS) -> Norm:
    """The group norm of all layers of the VAE."""
    return partial(GroupNorm, config.norm_groups, eps=eps)


class Attention(nn.Module):
    """Single-head self-attention among the positions of an image."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.group_norm = norm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, C, H, W] -> the same shape; the layer is residual."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [batch, (H W), C]
        out = self.to_out(F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + out.transpose(1, 2).unflatten(2, x.shape[-2:])  # [batch, C, H, W]


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, C, H, W] -> [batch, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # only right and bottom, as in the official code


class EncoderBlock(nn.Module):
    """A level of the encoder."""

    def __init__(self, config: VAEConfig, c_in: int, c_out: int, downsamples: bool):
        super().__init__()
        norm = group_norm(config)
        self.resnets = module_list(
            ResBlock(c_in if i == 0 else c_out, c_out, None, norm, Conv3x3) for i in range(config.num_res_blocks)
        )
        self.downsamplers = module_list([Downsample(c_out)] if downsamples else [])

    def forward(self, x: Tensor) -> Tensor:
        """[batch, C, H, W] -> [batch, C', H/2, W/2], or at the last level [batch, C', H, W]."""
        for resnet in self.resnets:
            x = resnet(x, None)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class EncoderMidBlock(nn.Module):
    """The coarsest level of the encoder."""

    def __init__(self, config: VAEConfig, channels: int):
        super().__init__()
        norm = group_norm(config)
        self.resnets = module_list(ResBlock(channels, channels, None, norm, Conv3x3) for _ in range(2))
        self.attentions = module_list([Attention(channels, norm)])

    def forward(self, x: Tensor) -> Tensor:
        """[batch, C, H, W] -> the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, None)), None)


class Encoder(nn.Module):
    """From images to the moments of their posterior, before `quant_conv`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = Conv3x3(3, config.ch)
        self.down_blocks = module_list(
            EncoderBlock(config, c_in, c_out, downsamples=level < len(widths) - 1)
            for level, (c_in, c_out) in enumerate(zip([config.ch, *widths], widths))
        )
        self.mid_block = EncoderMidBlock(config, widths[-1])
        self.conv_norm_out = group_norm(config)(widths[-1])
        self.conv_out = Conv3x3(widths[-1], 2 * config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, H, W] in [-1,1] -> [batch, 2 z, H/8, W/8]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


def _video_res_block(config: VAEConfig, c_in: int, c_out: int) -> VideoResBlock:
    return VideoResBlock(c_in, c_out, None, group_norm(config), group_norm(config, TEMPORAL_EPS), weighs_temporal=True)


class DecoderBlock(nn.Module):
    """A level of the decoder."""

    def __init__(self, config: VAEConfig, c_in: int, c_out: int, upsamples: bool):
        super().__init__()
        self.resnets = module_list(
            _video_res_block(config, c_in if i == 0 else c_out, c_out) for i in range(config.num_res_blocks + 1)
        )
        self.upsamplers = module_list([Upsample(c_out)] if upsamples else [])

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """[(B F), C, H, W] -> [(B F), C', 2 H, 2 W], or at the last level [(B F), C', H, W]."""
        for resnet in self.resnets:
            x = resnet(x, None, num_frames)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class DecoderMidBlock(nn.Module):
    """The coarsest level of the decoder."""

    def __init__(self, config: VAEConfig, channels: int):
        super().__init__()
        self.resnets = module_list(_video_res_block(config, channels, channels) for _ in range(2))
        self.attentions = module_list([Attention(channels, group_norm(config))])

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """[(B F), C, H, W] -> the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, None, num_frames)), None, num_frames)


class Decoder(nn.Module):
    """From the raw latents of clips to pixels. networks/lowmem_decode.py computes the same in less memory."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * mult for mult in reversed(config.ch_mult)]  # coarsest first
        self.conv_in = Conv3x3(config.z_channels, widths[0])
        self.mid_block = DecoderMidBlock(config, widths[0])
        self.up_blocks = module_list(
            DecoderBlock(config, c_in, c_out, upsamples=level < len(widths) - 1)
            for level, (c_in, c_out) in enumerate(zip([widths[0], *widths], widths))
        )
        self.conv_norm_out = group_norm(config)(config.ch)
        self.conv_out = Conv3x3(config.ch, 3)
        self.time_conv_out = ConvOverTime(3, 3)

    def forward(self, z: Tensor, num_frames: int) -> Tensor:
        """Raw latents [(B F), z, h, w] -> pixels [(B F), 3, 8 h, 8 w], about [-1,1]."""
        x = self.mid_block(self.conv_in(z), num_frames)
        for block in self.up_blocks:
            x = block(x, num_frames)
        x = self.conv_out(self.conv_norm_out(x, silu=True))
        return frames_of(self.time_conv_out(clips_of(x, num_frames)), x.shape[2])  # [(B F), 3, 8 h, 8 w]


class VAE(nn.Module):
    """Encoder and decoder. Unlike in image models, no convolution comes between the latents and the decoder."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, kernel_size=1)
        self.decoder = Decoder(config)

    def moments(self, pixels: Tensor) -> Tensor:
        """[batch, 3, H, W] in [-1,1] -> [batch, 2 z, H/8, W/8]: mean and log-variance of the posterior."""
        return self.quant_conv(self.encoder(pixels))

    def encode(self, pixels: Tensor, images_per_call: int = 1) -> Tensor:
        """[batch, 3, H, W] in [-1,1] -> raw latents [batch, z, H/8, W/8], the posterior's mode, in the dtype of pixels.

        The encoder has no layers over time, so images can go one at a time: a clip would take 20 GiB at 1024x576.
        """
        images = pixels.to(self.quant_conv.weight.dtype).split(images_per_call)
        return torch.cat([self.moments(image).chunk(2, dim=1)[0] for image in images]).to(pixels.dtype)
