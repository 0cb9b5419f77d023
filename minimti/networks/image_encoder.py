"""SVD's image encoder: the image tower of CLIP (ViT-H/14), and the preprocessing of the official code.

The UNet, the VAE and the sampler of minimti are written from scratch. The image tower is not: `build` returns
open_clip's own class. Its embedding of an image is the token of plain image-to-video, and where the paper's
inversion starts from.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minimti.config import ImageEncoderConfig

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

# Mean and deviation of RGB values in [0,1], by which CLIP normalises.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def build(config: ImageEncoderConfig) -> "VisionTransformer":
    """open_clip's VisionTransformer: CLIP-normalised [B, 3, S, S] -> embeddings [B, embed_dim], not of unit length."""
    # The import is here because it is slow. It runs PyTorch's compiler once, which PyTorch 2.6 cannot do on "meta".
    with torch.device("cpu"):
        from open_clip.transformer import VisionTransformer

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

    As in the official code (FrozenOpenCLIPImageEmbedder of sgm, which calls kornia's antialiased resize), the whole
    image is squashed to a square, whatever its aspect, and neither clamped nor rounded to 8 bits.
    """
    image = F.interpolate(_blur(image, size), (size, size), mode="bicubic", align_corners=True)
    # Filled on the device: a copy from the CPU cannot be recorded as a CUDA graph.
    mean, std = (torch.stack([image.new_full((1, 1), value) for value in values]) for values in (MEAN, STD))
    return ((image + 1) / 2 - mean) / std  # mean, std [3, 1, 1]


def _blur(image: Tensor, size: int) -> Tensor:
    """The Gaussian blur that keeps the resize from aliasing, [B, 3, H, W] -> the same; none along an axis that grows.

    Source: kornia.geometry.transform.resize with antialias=True.
    """
    height, width = image.shape[-2:]
    kernel_y, kernel_x = (_gaussian(length / size, image.device).to(image.dtype) for length in (height, width))
    pad_y, pad_x = len(kernel_y) // 2, len(kernel_x) // 2
    image = F.pad(image, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    image = F.conv2d(image, kernel_y.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)  # weight [3, 1, length, 1]
    return F.conv2d(image, kernel_x.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)  # weight [3, 1, 1, length]


def _gaussian(factor: float, device: torch.device) -> Tensor:
    """The kernel [length] for a reduction by `factor`; its sum is 1, its length odd."""
    sigma = max((factor - 1) / 2, 0.001)
    length = int(max(4 * sigma, 3)) // 2 * 2 + 1
    x = torch.arange(length, device=device) - length // 2
    weights = torch.exp(-(x**2) / (2 * sigma**2))
    return weights / weights.sum()
