"""Value domains and sizes of pixels: what lies between the pictures of files and the inputs of networks."""

from torch import Tensor
from torchvision.transforms.v2 import functional as T

from minimti.config import SVDConfig
from minimti.io.files import InputError


def check_size(size: tuple[int, int], config: SVDConfig) -> tuple[int, int]:
    """(width, height) as it is. Raises InputError where the networks cannot halve such a picture often enough."""
    multiple = config.size_multiple
    if any(not 0 < length <= 8192 or length % multiple for length in size):
        raise InputError(f"--size {size[0]}x{size[1]}: width and height must be multiples of {multiple}")
    return size


def fit(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [F, 3, H, W] -> fp32 [F, 3, height, width] in [-1,1], for size = (width, height) in pixels.

    Crops to the largest central part of this aspect ratio, then resizes (bicubic, antialiased). References and
    images to animate go through the same function.
    """
    width, height = size
    have_h, have_w = frames.shape[-2:]
    scale = min(have_w / width, have_h / height)
    crop = T.center_crop(frames, [max(1, round(height * scale)), max(1, round(width * scale))])
    pixels = T.resize(crop.float(), [height, width], interpolation=T.InterpolationMode.BICUBIC, antialias=True)
    return pixels.clamp(0, 255) / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1,1] (clamped), of any shape, dtype and device -> uint8 0..255 of the same shape on the CPU."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def strip(clips: Tensor) -> Tensor:
    """Clips [R, F, 3, H, W] in [-1,1] (clamped) -> one picture, uint8 [R H, F W, 3]: a row each, time to the right."""
    rows, frames, channels, height, width = clips.shape
    return to_uint8(clips).permute(0, 3, 1, 4, 2).reshape(rows * height, frames * width, channels)  # [R H, F W, 3]
