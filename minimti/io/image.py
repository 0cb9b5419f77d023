"""Images: `read_image` gives what the networks take, `decode_image` the pixels of the file."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minimti.config import SVDConfig
from minimti.io.files import InputError, require_file
from minimti.io.pixels import check_size, fit


def read_image(path: str | Path, config: SVDConfig, *, size: tuple[int, int] | None = None) -> Tensor:
    """fp32 [1, 3, H, W] in [-1,1], fitted to `size` = (width, height), by default the model's.

    Raises InputError as `decode_image` does, and for a size that the networks cannot halve often enough.
    """
    return fit(decode_image(path), check_size(size or config.size, config))


def decode_image(path: str | Path) -> Tensor:
    """uint8 [1, 3, H, W], upright; transparency is laid over white.

    Raises InputError where the file is missing, is not an image, or has more than 8 bits per channel.
    """
    path = require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and odd metadata
            with Image.open(path) as image:
                if image.mode[0] in "IF":  # more than 8 bits, in a range that the file does not give
                    raise InputError(f"{path}: is an image of mode {image.mode}; convert it to 8 bits per channel")
                upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from error
    white = Image.new("RGBA", upright.size, "white")
    pixels = np.array(Image.alpha_composite(white, upright).convert("RGB"))  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]  # [1, 3, H, W]
