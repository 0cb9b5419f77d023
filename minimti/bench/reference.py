"""The networks of diffusers at the sizes of ours, behind the methods of our SVD: what the benchmark compares with.

diffusers is imported where it is used: it takes seconds, and only the extra `test` installs it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minimti import edm
from minimti.config import SVDConfig, UNetConfig, VAEConfig
from minimti.svd import Conditioning

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

REPEATED_BLOCKS = ("BasicTransformerBlock", "TemporalBasicTransformerBlock", "SpatioTemporalResBlock")


def diffusers_unet(config: UNetConfig) -> "UNetSpatioTemporalConditionModel":
    """The UNet of diffusers, whose tensors have the names and shapes of our UNet with the same configuration."""
    from diffusers.models import UNetSpatioTemporalConditionModel

    attends = [2**level in config.attention_resolutions for level in range(len(config.channel_mult))]
    widths = [config.model_channels * mult for mult in config.channel_mult]
    return UNetSpatioTemporalConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=widths,
        down_block_types=[f"{'CrossAttn' * a}DownBlockSpatioTemporal" for a in attends],
        up_block_types=[f"{'CrossAttn' * a}UpBlockSpatioTemporal" for a in reversed(attends)],
        layers_per_block=config.num_res_blocks,
        cross_attention_dim=config.context_dim,
        num_attention_heads=[width // config.num_head_channels for width in widths],
        addition_time_embed_dim=config.adm_in_channels // 3,
        projection_class_embeddings_input_dim=config.adm_in_channels,
    )


def diffusers_vae(config: VAEConfig) -> "AutoencoderKLTemporalDecoder":
    """The VAE of diffusers, whose tensors have the names and shapes of our VAE with the same configuration."""
    from diffusers.models import AutoencoderKLTemporalDecoder

    return AutoencoderKLTemporalDecoder(
        down_block_types=["DownEncoderBlock2D"] * len(config.ch_mult),
        block_out_channels=[config.ch * mult for mult in config.ch_mult],
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        scaling_factor=config.scale_factor,
    )


class Diffusers(nn.Module):
    """The UNet and the VAE of diffusers with those methods of `SVD` that the benchmark calls, and the same results.

    `checkpointing` switches on diffusers' gradient checkpointing of the UNet.
    """

    def __init__(self, config: SVDConfig, checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.unet, self.vae = diffusers_unet(config.unet), diffusers_vae(config.vae)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()

    def network(self, cond: Conditioning) -> edm.Network:
        """F_theta of equation 2. diffusers takes one token set per clip: the temporal one, also for every frame."""

        def F_theta(x: Tensor, c_noise: Tensor) -> Tensor:
            noisy = torch.cat([x, cond.concat], dim=2).to(self.unet.dtype)  # [B, F, 2 z, h, w]
            return self.unet(noisy, c_noise, cond.temporal.to(self.unet.dtype), cond.micro).sample.to(x.dtype)

        return F_theta

    def denoiser(self, cond: Conditioning, guidance: tuple[float, float]) -> edm.Denoiser:
        """D(x; sigma) by the arithmetic of `SVD.denoiser`, with both branches of guidance in one batch."""
        both = self.network(cond.negative().batched_with(cond))
        scale = edm.guidance_scale(*guidance, num_frames=cond.concat.shape[1]).to(cond.concat)

        def D(x: Tensor, sigma: Tensor) -> Tensor:
            estimates = edm.denoise(both, torch.cat([x, x]), torch.cat([sigma, sigma]))  # [2 B, F, z, h, w]
            negative, positive = estimates.chunk(2)  # [B, F, z, h, w] each
            return edm.guide(negative, positive, scale)

        return D

    def encode(self, clip: Tensor) -> Tensor:
        """A clip [1, F, 3, H, W] in [-1,1] -> scaled latents [1, F, z, h, w], all frames in one call."""
        raw = self.vae.encode(clip[0].to(self.vae.dtype)).latent_dist.mode()
        return raw[None].to(clip.dtype) * self.config.vae.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [1, F, z, h, w] -> a clip [1, F, 3, H, W], all frames in one call."""
        raw = (latents[0] / self.config.vae.scale_factor).to(self.vae.dtype)
        return self.vae.decode(raw, num_frames=len(raw)).sample[None].to(latents.dtype)

    def speed_up(self, compiled: bool) -> None:
        """What diffusers advises for speed: channels-last convolutions and, if `compiled`, regional compilation.

        In place. Its own `compile_repeated_blocks` refuses this UNet (diffusers 0.42), which names no repeated blocks;
        those compiled here are its transformer blocks and res blocks.
        """
        for weight in self.parameters():
            if weight.ndim == 4:  # its own `to(memory_format=...)` fails on the convolutions over time
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        if compiled:
            from torch import _dynamo

            _dynamo.config.recompile_limit = 64  # blocks of four widths, each with and without gradients
            for module in self.unet.modules():
                if type(module).__name__ in REPEATED_BLOCKS:
                    module.compile(fullgraph=True)

    def release(self, name: str) -> None:
        """Frees a network for good."""
        delattr(self, name)
