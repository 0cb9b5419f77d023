"""The image tower of CLIP that SVD is conditioned on, and the preprocessing it was trained behind."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimti.config import ImageEncoderConfig

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def build(config: ImageEncoderConfig) -> nn.Module:
    """open_clip's vision transformer: CLIP-normalised [B, 3, S, S] -> embedding [B, embed_dim], not normalised."""
    from open_clip.transformer import VisionTransformer  # slow to import, and only a full model needs it

    return VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.width,
        layers=config.layers,
        heads=config.width // config.head_width,
        mlp_ratio=4.0,
        output_dim=config.embed_dim,
    )


def preprocess(image: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] in [-1,1] -> [B, 3, size, size], CLIP-normalised.

    The whole image is squashed to a square, as the official code has it (kornia's antialiased resize, then
    mean and deviation), without clamping or rounding to 8 bits.
    """
    image = F.interpolate(_blur(image, size), (size, size), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(v, dtype=image.dtype, device=image.device).view(3, 1, 1) for v in (MEAN, STD))
    return ((image + 1) / 2 - mean) / std


def _blur(image: Tensor, size: int) -> Tensor:
    """The Gaussian that keeps the resize to `size` from aliasing; none along an axis that does not shrink."""
    height, width = image.shape[-2:]
    kernel_y, kernel_x = (_gaussian(length / size).to(image) for length in (height, width))
    pad_y, pad_x = len(kernel_y) // 2, len(kernel_x) // 2
    image = F.pad(image, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    image = F.conv2d(image, kernel_y.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)
    return F.conv2d(image, kernel_x.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)


def _gaussian(factor: float) -> Tensor:
    """The normalised kernel for a reduction by `factor`."""
    sigma = max((factor - 1) / 2, 0.001)
    length = int(max(4 * sigma, 3)) // 2 * 2 + 1
    x = torch.arange(length) - length // 2
    weights = torch.exp(-(x**2) / (2 * sigma**2))
    return weights / weights.sum()
