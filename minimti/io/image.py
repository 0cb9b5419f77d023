"""Images: `read_image` gives what the networks take, `decode_image` the pixels of the file."""

import io
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from minimti.config import SVDConfig
from minimti.io.files import InputError, require_file
from minimti.io.pixels import check_size, fit, oriented

# What people have. All others stay closed, whatever the name of the file: EPS, for one, is handed to a program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")

MAX_SIDE = 65_535  # pixels
MAX_PIXELS = 200e6
# Decoders that hold several copies of a picture: so many pixels take about 1 GB.
MAX_PIXELS_OF = {"AVIF": 100e6, "HEIF": 100e6, "WEBP": 60e6, "JPEG2000": 50e6}
KEPT_PIXELS = 2**25  # an 8K picture; one of more pixels than this is reduced while it is read
BAND = 64  # rows that are converted at a time

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value

PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of an ICC profile -> Pillow's mode


def read_image(path: str | Path, config: SVDConfig, *, size: tuple[int, int] | None = None) -> Tensor:
    """fp32 [1, 3, H, W] in [-1,1], fitted to `size` = (width, height).

    By default this is the model's size, its sides exchanged for a portrait picture.

    Raises InputError as `decode_image` does, and for a size that the networks cannot halve often enough.
    """
    pixels = decode_image(path)
    return fit(pixels, check_size(size or oriented(config.size, pixels.shape[-1], pixels.shape[-2]), config))


def decode_image(path: str | Path) -> Tensor:
    """uint8 [1, 3, H, W] in sRGB, upright; transparency is laid over white; of an animation the first frame.

    A picture of more than 33 megapixels is reduced by a whole number until it has no more. Raises InputError where the
    file is missing, is not an image of FORMATS or HEIC, is damaged, has more than 200 megapixels (fewer for formats
    whose decoders need much memory) or 65,535 pixels to a side, or has numbers whose range the file does not give.
    """
    path = require_file(path)
    try:
        with _shielded(), open(path, "rb") as file, Image.open(file, formats=_formats(path)) as image:
            pixels = _decode(path, image)  # [H, W, 3]
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: is of more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: cannot be read as an image; convert it to PNG or JPEG") from error
    except Exception as error:  # Pillow's readers of damaged files can raise anything
        raise InputError(f"{path}: cannot be read as an image ({str(error) or type(error).__name__})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]  # [1, 3, H, W]


def _formats(path: Path) -> tuple[str, ...]:
    """The formats that Pillow may take a file for. Raises InputError where what reads it is not installed."""
    known = tuple(name for name in FORMATS if name != "AVIF" or features.check("avif"))  # Pillow has it since 11.3
    with open(path, "rb") as file:
        head = file.read(64)
    if head[4:8] != b"ftyp":
        return known
    brands = [head[at : at + 4] for at in range(8, min(len(head), int.from_bytes(head[:4], "big")), 4)]
    if any(brand in AVIF_BRANDS for brand in brands):
        if "AVIF" not in known:
            raise InputError(f"{path}: is an AVIF picture; install a Pillow that reads it: pip install -U pillow")
    elif any(brand in HEIC_BRANDS for brand in brands):
        try:
            import pillow_heif
        except ImportError as error:
            message = "is a HEIC picture; install what reads it: pip install pillow-heif, or convert it to JPEG"
            raise InputError(f"{path}: {message}") from error
        pillow_heif.register_heif_opener()
        return ("HEIF",)
    return known


def _decode(path: Path, image: ImageFile.ImageFile) -> np.ndarray:
    """An opened file -> uint8 [H, W, 3]. Nothing is decoded before the size is checked."""
    limit = MAX_PIXELS_OF.get(image.format or "", MAX_PIXELS)
    if image.width * image.height > limit or max(image.size) > MAX_SIDE:
        most = f"{limit / 1e6:.0f} megapixels, and {MAX_SIDE} pixels to a side, are the most"
        raise InputError(f"{path}: is of {image.width}x{image.height} pixels; {most}; make it smaller")
    factor = _factor(image)
    image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))  # JPEG files alone
    image.load()  # a TIFF then stands upright and has lost its tag
    upright = UPRIGHT.get(_orientation(image))
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise InputError(f"{path}: is an image of mode {image.mode}; convert it to 8 or 16 bits per channel")
    ends, profile, factor = _range(image), _profile(image), _factor(image)
    picture = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, picture.height, BAND):  # the whole picture may be large
        bottom = min(image.height, (top + BAND) * factor)
        band = image.crop((0, top * factor, image.width, bottom))
        picture.paste(_convert(band, ends, profile).reduce(factor), (0, top))
    return np.array(picture if upright is None else picture.transpose(upright))


def _factor(image: Image.Image) -> int:
    """The whole number by which width and height are divided."""
    return math.ceil(math.sqrt(image.width * image.height / KEPT_PIXELS))


def _orientation(image: Image.Image) -> int:
    """The value of the EXIF tag; 1, which is upright, where it is missing or unreadable. No other tag is read."""
    with suppress(Exception):
        value = image.getexif().get(ORIENTATION)
        return value if isinstance(value, int) else 1
    return 1


def _range(image: ImageFile.ImageFile) -> tuple[int, int]:
    """The numbers that stand for black and white where they are not of 8 bits (modes I and I;16)."""
    if not (isinstance(image, TiffImageFile) and image.mode[0] == "I"):
        return 0, 65535
    white = 2 ** image.tag_v2[BITS_PER_SAMPLE][0] - 1
    return (white, 0) if image.tag_v2[PHOTOMETRIC] == WHITE_IS_ZERO else (0, white)


def _profile(image: Image.Image) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """The embedded ICC profile: the mode that it is for, and the transform to sRGB.

    None where there is none, it is broken or made for other colours than the image has: as in browsers, it is sRGB.
    """
    with suppress(Exception):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        mode = PROFILE_MODES[profile.profile.xcolor_space.strip()]
        grey = Image.getmodebase(image.mode) == "L"
        if (mode == "CMYK") == (image.mode == "CMYK") and (grey or mode != "L"):
            return mode, ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    return None


def _convert(
    band: Image.Image, ends: tuple[int, int], profile: tuple[str, ImageCms.ImageCmsTransform] | None
) -> Image.Image:
    """A part of an image, of any mode -> mode RGB, in sRGB over white."""
    if band.mode[0] == "I":
        band = _shallow(band, *ends)
    if profile is None:
        colours = band.convert("RGB")
    else:
        mode, transform = profile
        colours = transform.apply(band.convert(mode))
    if not band.has_transparency_data:
        return colours
    alpha = band.convert("RGBA").getchannel("A")
    return Image.composite(colours, Image.new("RGB", band.size, "white"), alpha)


def _shallow(band: Image.Image, black: int, white: int) -> Image.Image:
    """16 bits of grey -> mode L, or LA where one grey is transparent."""
    deep = np.asarray(band)
    grey = Image.fromarray(np.round((deep - float(black)) * (255 / (white - black))).astype(np.uint8))
    if "transparency" in band.info:
        grey.putalpha(Image.fromarray(np.where(deep == band.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


_one_at_a_time = threading.Lock()


@contextmanager
def _shielded() -> Iterator[None]:
    """Raises Pillow's limit to MAX_PIXELS, silences warnings and libtiff's lines on stderr.

    All three are global to the process, hence the lock.
    """
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large images and odd metadata
        limit = Image.MAX_IMAGE_PIXELS
        with _silent_libraries():
            try:
                Image.MAX_IMAGE_PIXELS = int(MAX_PIXELS / 2)  # it refuses twice as many
                yield
            finally:
                Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _silent_libraries() -> Iterator[None]:
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
