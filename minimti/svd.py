"""The three networks together, and the one conditioning that training and sampling share."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minimti import edm
from minimti.config import MicroConditioning, SVDConfig
from minimti.networks import image_encoder
from minimti.networks.lowmem_decode import decode
from minimti.networks.unet import UNet
from minimti.networks.vae import VAE

GUIDANCE = (1.0, 3.0)  # of the first frame and of the last


@dataclass(frozen=True)
class Conditioning:
    """Everything the UNet is told besides the noisy latent and its noise level."""

    concat: Tensor  # [B, F, z, h, w], raw latent of the conditioning image, the same for every frame
    micro: Tensor  # [B, 3]: fps id, motion bucket id, noise augmentation
    spatial: Tensor  # [B, F, N, d]; N = 0 means no tokens
    temporal: Tensor  # [B, N, d]

    def without_image(self) -> "Conditioning":
        """The motion alone: the paper's visualisation of an embedding (4.2)."""
        return replace(self, concat=torch.zeros_like(self.concat))

    def negative(self) -> "Conditioning":
        """The other branch of guidance: no image, zeroed tokens, the same micro-conditioning."""
        zeroed = replace(self, spatial=torch.zeros_like(self.spatial), temporal=torch.zeros_like(self.temporal))
        return zeroed.without_image()

    def without_tokens(self) -> "Conditioning":
        """The same as with zeroed tokens, and cheaper (CrossAttention.forward)."""
        return replace(self, spatial=self.spatial[:, :, :0], temporal=self.temporal[:, :0])

    def beside(self, other: "Conditioning") -> "Conditioning":
        """The batch of both."""
        return Conditioning(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(other).values())))


class SVD(nn.Module):
    """Stable Video Diffusion. Its networks may be of any precision; what goes in and comes out is fp32."""

    def __init__(self, config: SVDConfig):
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.vae = VAE(config.vae)
        self.image_encoder = image_encoder.build(config.image_encoder)

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1,1] -> CLIP embeddings [B, d] in fp32."""
        pixels = image_encoder.preprocess(images, self.config.image_encoder.image_size)
        return self.image_encoder(pixels.to(self.image_encoder.conv1.weight.dtype)).to(images.dtype)

    def encode(self, clip: Tensor) -> Tensor:
        """Clip [B, F, 3, H, W] in [-1,1] -> scaled latents [B, F, z, h, w]."""
        raw = self.vae.encode(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])
        return raw * self.config.vae.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, F, z, h, w] -> clips [B, F, 3, H, W], about [-1,1].

        All frames see each other: a decode in chunks of frames is another function, and flickers at the seams.
        """
        raw = (latents / self.config.vae.scale_factor).to(self.vae.quant_conv.weight.dtype)
        return torch.stack([decode(self.vae.decoder, clip) for clip in raw]).to(latents.dtype)

    def tokens_of(self, image: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """Image [B, 3, H, W] in [-1,1] -> tokens of plain image-to-video: its CLIP embedding, alone in every set.

        Returns spatial [B, F, 1, d] and temporal [B, 1, d].
        """
        embedding = self.embed(image)[:, None]
        return embedding[:, None].expand(-1, num_frames, -1, -1), embedding

    def prepare(
        self, image: Tensor, tokens: tuple[Tensor, Tensor], micro: MicroConditioning, generator: torch.Generator
    ) -> Conditioning:
        """The conditioning on an image [B, 3, H, W] in [-1,1] and on tokens (spatial [B, F, N, d], temporal [B, N, d]).

        Noise of deviation `micro.cond_aug` is added to the pixels before they are encoded; it is drawn on the CPU
        from `generator`, so that a seed means the same on every device.
        """
        spatial, temporal = tokens
        noise = torch.randn(image.shape, generator=generator).to(image)
        with torch.no_grad():
            latent = self.vae.encode(image + micro.cond_aug * noise)
        numbers = torch.tensor([micro.fps_id, micro.motion_bucket_id, micro.cond_aug], device=image.device)
        return Conditioning(
            concat=latent[:, None].expand(-1, spatial.shape[1], -1, -1, -1),
            micro=numbers.expand(image.shape[0], -1),
            spatial=spatial,
            temporal=temporal,
        )

    def network(self, cond: Conditioning) -> edm.Network:
        """F_theta of equation 2, given its conditioning."""
        contexts = self.unet.project_tokens(cond.spatial, cond.temporal)

        def F_theta(x: Tensor, c_noise: Tensor) -> Tensor:
            return self.unet(torch.cat([x, cond.concat], dim=2), c_noise, cond.micro, contexts)

        return F_theta

    def sample(
        self,
        cond: Conditioning,
        n: Tensor,
        num_steps: int,
        guidance: tuple[float, float],
        solver: edm.Solver = edm.euler,
        in_turn: bool = False,
    ) -> Iterator[Tensor]:
        """Unit noise n [B, F, z, h, w] -> scaled latents, yielded after each of the solver's steps.

        Guidance is a scale for the first frame and one for the last; its two branches are one batch, or, for less
        memory, evaluated in turn. Raises FloatingPointError at the end if a step went wrong, naming it: checking as it
        goes would make the device wait.
        """
        branches = [cond.negative().without_tokens(), cond] if in_turn else [cond.negative().beside(cond)]
        networks = [self.network(branch) for branch in branches]
        scale = edm.guidance_scale(*guidance, num_frames=n.shape[1]).to(n)

        def D(x: Tensor, sigma: Tensor) -> Tensor:
            copies = 2 // len(networks)
            xs, sigmas = x.repeat(copies, 1, 1, 1, 1), sigma.repeat(copies)
            estimates = torch.cat([edm.denoise(network, xs, sigmas) for network in networks])
            return edm.guide(*estimates.chunk(2), scale)

        config = self.config
        sigmas = edm.karras_sigmas(num_steps, config.sigma_min, config.sigma_max, config.rho)
        finite = []
        for x in solver(D, n, sigmas.to(n)):
            finite.append(x.isfinite().all())
            yield x
        if not (ok := torch.stack(finite).cpu()).all():
            step = int(ok.int().argmin())
            raise FloatingPointError(
                f"step {step + 1} of {num_steps} (sigma {sigmas[step]:.3g}) gave numbers that are not finite"
            )
