"""The three networks together, and the one conditioning that training and sampling share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from minimti import edm
from minimti.budget import Budget
from minimti.config import MicroConditioning, SVDConfig
from minimti.networks import image_encoder, lowmem_decode
from minimti.networks.recompute import set_mode
from minimti.networks.unet import UNet
from minimti.networks.vae import VAE

GUIDANCE = (1.0, 3.0)  # for the first frame and for the last
Tokens = tuple[Tensor, Tensor]  # spatial [B, F, N, d], temporal [B, N, d]


@dataclass(frozen=True)
class Conditioning:
    """Every input of the UNet but the noisy latent and its noise level."""

    concat: Tensor  # [B, F, z, h, w], raw latent of the conditioning image, the same for every frame
    micro: Tensor  # [B, 3]: fps id, motion bucket id, noise augmentation
    spatial: Tensor  # [B, F, N, d]
    temporal: Tensor  # [B, N, d]

    def without_image(self) -> "Conditioning":
        """The motion alone: the paper's visualisation of an embedding (4.2)."""
        return replace(self, concat=torch.zeros_like(self.concat))

    def without_tokens(self) -> "Conditioning":
        """N = 0: the same result as zeroed tokens, cheaper (CrossAttention)."""
        return replace(self, spatial=self.spatial[:, :, :0], temporal=self.temporal[:, :0])

    def negative(self) -> "Conditioning":
        """The other branch of guidance: image and tokens are zeros, the micro-conditioning is the same."""
        zeros = {name: torch.zeros_like(getattr(self, name)) for name in ("concat", "spatial", "temporal")}
        return replace(self, **zeros)

    def batched_with(self, other: "Conditioning") -> "Conditioning":
        """One batch of both: [2 B, ...], this one first."""
        return Conditioning(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(other).values())))


class SVD(nn.Module):
    """Stable Video Diffusion. Its networks may be of any precision; inputs and outputs are fp32.

    A network can be parked on the CPU while others need the memory: the methods here fetch it when they use it. Without
    its image encoder, a model cannot `embed`.
    """

    def __init__(self, config: SVDConfig, with_image_encoder: bool = True):
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.vae = VAE(config.vae)
        self.image_encoder = (
            image_encoder.build(config.image_encoder) if with_image_encoder else _Released("image_encoder")
        )
        self.budget = Budget()
        self.fetches = 0  # how often a parked network has come back: CUDA graphs from before are then invalid
        self.device: torch.device | None = None  # where networks compute; None: where their weights are, never parked

    @property
    def has_image_encoder(self) -> bool:
        """Whether the image encoder is there, be it parked."""
        return not isinstance(self.image_encoder, _Released)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the UNet."""
        return next(self.unet.parameters()).dtype

    def use(self, budget: Budget) -> None:
        """Sets how much memory the methods here may take. Results are the same but for rounding."""
        self.budget = budget
        if not isinstance(self.unet, _Released):
            set_mode(self.unet, None if budget.memory == "max" else budget.memory, budget.slice_bytes)

    @contextmanager
    def using(self, budget: Budget) -> Iterator[None]:
        """Another budget within the block. It stays after an exception, which may be that memory ran out under it."""
        before = self.budget
        self.use(budget)
        yield
        self.use(before)

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1,1] -> CLIP embeddings [B, d] in fp32."""
        self.fetch("image_encoder")
        pixels = image_encoder.preprocess(images, self.config.image_encoder.image_size)
        dtype = next(self.image_encoder.parameters()).dtype
        return self.image_encoder(pixels.to(dtype)).to(images.dtype)

    def encode(self, clip: Tensor) -> Tensor:
        """Clip [B, F, 3, H, W] in [-1,1] -> scaled latents [B, F, z, h, w]."""
        self.fetch("vae")
        raw = self.vae.encode(clip.flatten(0, 1), self.budget.images_per_call)  # [(B F), z, h, w]
        return raw.unflatten(0, clip.shape[:2]) * self.config.vae.scale_factor  # [B, F, z, h, w]

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, F, z, h, w] -> clips [B, F, 3, H, W], about [-1,1]. Without gradients.

        All frames of a clip are decoded together: the decoder's layers over time mix them, so decoding in chunks of
        frames is another function, with visible seams.
        """
        self.fetch("vae")
        raw = (latents / self.config.vae.scale_factor).to(self.vae.quant_conv.weight.dtype)
        with torch.no_grad():
            return torch.stack([self._decode(clip) for clip in raw]).to(latents.dtype)

    def _decode(self, raw: Tensor) -> Tensor:
        """[F, z, h, w] -> [F, 3, H, W]."""
        if self.budget.decoder == "whole":
            return self.vae.decoder(raw, len(raw))
        return lowmem_decode.decode(self.vae.decoder, raw, keep=self.budget.decoder == "keep")

    def tokens_of(self, image: Tensor, num_frames: int) -> Tokens:
        """Image [B, 3, H, W] in [-1,1] -> tokens of plain image-to-video: its CLIP embedding as the only one, N = 1."""
        embedding = self.embed(image)[:, None]  # [B, 1, d]
        return embedding[:, None].expand(-1, num_frames, -1, -1), embedding  # [B, F, 1, d], [B, 1, d]

    def prepare(
        self, image: Tensor, tokens: Tokens, micro: MicroConditioning, generator: torch.Generator
    ) -> Conditioning:
        """The conditioning on an image [B, 3, H, W] in [-1,1] and on tokens.

        Noise of deviation `micro.cond_aug` is added to the pixels before they are encoded. It is drawn on the CPU from
        `generator`, so that a seed means the same on every device.
        """
        self.fetch("vae")
        spatial, temporal = tokens
        noise = torch.randn(image.shape, generator=generator).to(image)
        with torch.no_grad():
            latent = self.vae.encode(image + micro.cond_aug * noise)
        numbers = torch.tensor([micro.fps_id, micro.motion_bucket_id, micro.cond_aug], device=image.device)
        return Conditioning(
            concat=latent[:, None].expand(-1, spatial.shape[1], -1, -1, -1),  # [B, F, z, h, w]
            micro=numbers.expand(image.shape[0], -1),  # [B, 3]
            spatial=spatial,
            temporal=temporal,
        )

    def network(self, cond: Conditioning) -> edm.Network:
        """F_theta of equation 2 under a conditioning. Its tokens are projected to keys and values here, once."""
        self.fetch("unet")
        contexts = self.unet.project_tokens(cond.spatial, cond.temporal)

        def F_theta(x: Tensor, c_noise: Tensor) -> Tensor:
            return self.unet(torch.cat([x, cond.concat], dim=2), c_noise, cond.micro, contexts)

        return F_theta

    def denoiser(self, cond: Conditioning, guidance: tuple[float, float]) -> edm.Denoiser:
        """D(x; sigma) with classifier-free guidance, a scale for the first frame and one for the last.

        The two branches are one batch or, where the budget says so, evaluated in turn for less memory.
        """
        scale = edm.guidance_scale(*guidance, num_frames=cond.concat.shape[1]).to(cond.concat)
        if self.budget.in_turn:
            networks = self.network(cond.negative().without_tokens()), self.network(cond)

            def D(x: Tensor, sigma: Tensor) -> Tensor:
                negative, positive = (edm.denoise(network, x, sigma) for network in networks)
                return edm.guide(negative, positive, scale)
        else:
            both = self.network(cond.negative().batched_with(cond))

            def D(x: Tensor, sigma: Tensor) -> Tensor:
                estimates = edm.denoise(both, torch.cat([x, x]), torch.cat([sigma, sigma]))  # [2 B, F, z, h, w]
                negative, positive = estimates.chunk(2)
                return edm.guide(negative, positive, scale)

        return D

    def sample(
        self,
        cond: Conditioning,
        n: Tensor,
        num_steps: int,
        guidance: tuple[float, float],
        solver: edm.Solver = edm.euler,
        schedule: str = "karras",
    ) -> Iterator[Tensor]:
        """Unit noise n [B, F, z, h, w] -> scaled latents, yielded after each of the solver's steps.

        The noise levels are those of `edm.karras_sigmas` or, for the schedule "ays", of `edm.ays_sigmas`. Raises
        FloatingPointError after the last step if a step gave numbers that are not finite, and names the first. A check
        in every step would make the device wait.
        """
        config, D = self.config, self.denoiser(cond, guidance)
        if schedule == "ays":
            sigmas = edm.ays_sigmas(num_steps)
        else:
            sigmas = edm.karras_sigmas(num_steps, config.sigma_min, config.sigma_max, config.rho)
        finite = []
        for x in solver(D, n, sigmas.to(n)):
            finite.append(x.isfinite().all())
            yield x
        if not (ok := torch.stack(finite).cpu()).all():
            step = int(ok.int().argmin())
            other = "bfloat16" if self.dtype == torch.float16 else "float32"
            raise FloatingPointError(
                f"step {step + 1} of {num_steps} (sigma {sigmas[step]:.3g}) gave numbers that are not finite;"
                f" try --dtype {other}"
            )

    def park(self, name: str) -> None:
        """Moves a network ("unet", "vae", "image_encoder") to the CPU until it is used again, if the budget says so."""
        if self.device is not None and self.budget.park:
            getattr(self, name).to("cpu")

    def release(self, name: str) -> None:
        """Frees a network for good. Using it afterwards raises ReleasedError, a RuntimeError."""
        setattr(self, name, _Released(name))

    def fetch(self, name: str) -> None:
        """Moves a parked network back. Raises ReleasedError."""
        network: nn.Module = getattr(self, name)
        if isinstance(network, _Released):
            raise ReleasedError(name)
        if self.device is not None and next(network.parameters()).device != self.device:
            network.to(self.device)
            self.fetches += 1


class ReleasedError(RuntimeError, AttributeError):
    """A network was used after it had been released."""

    def __init__(self, name: str):
        super().__init__(f"{name} was released to free its memory; load the model again to use it")


class _Released(nn.Module):
    """Takes the place of a network that was released."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, *_: Tensor) -> NoReturn:
        raise ReleasedError(self.name)

    def __getattr__(self, name: str) -> NoReturn:
        raise ReleasedError(self.name)
