"""Pictures as a clip: a folder, a glob, or an animated WebP, which FFmpeg cannot read."""

import glob
import os
import re
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minimti.io.decode import SAME_TIME, check_frame
from minimti.io.files import InputError, reason
from minimti.io.image import decode_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")


class Pictures:
    """Files in their natural order (2 before 10), shown at `rate` per second."""

    pixel_aspect = 1.0
    tolerance = SAME_TIME
    held = 0.0

    def __init__(self, paths: list[Path], rate: float):
        self.paths, self.rate = paths, rate
        self.duration = len(paths) / rate
        first = decode_image(paths[0])
        self.size = (first.shape[-1], first.shape[-2])

    def frames(self, start: float) -> Generator[tuple[float, Path], None, None]:
        """All pictures with the times at which they are shown, in seconds."""
        yield from ((index / self.rate, path) for index, path in enumerate(self.paths))

    def pixels(self, path: Path) -> Tensor:
        """uint8 [3, H, W]. Raises InputError where the size differs from the first picture's."""
        pixels = decode_image(path)[0]
        if (pixels.shape[-1], pixels.shape[-2]) != self.size:
            raise InputError(f"{path}: has another size than {self.paths[0]}; a clip is of one size")
        return pixels

    def notes(self) -> list[str]:
        """An empty list."""
        return []


class AnimatedWebP:
    """The frames of an animated WebP, read by Pillow. Raises InputError where it is damaged or too large."""

    pixel_aspect = 1.0
    tolerance = SAME_TIME
    held = 0.0

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            header = file.read(30)
        if header[12:16] == b"VP8X":  # Pillow makes room for the whole picture as soon as it opens the file
            width, height = (1 + int.from_bytes(header[at : at + 3], "little") for at in (24, 27))
            check_frame(path, width, height)
        first = next(self.frames(0), None)
        assert first is not None
        self.size = first[1].size
        self.duration: float | None = None
        self.rate = 10.0  # where a file gives no durations

    def frames(self, start: float) -> Generator[tuple[float, Image.Image], None, None]:
        """All frames with the times at which they are shown, in seconds."""
        time = 0.0
        try:
            with Image.open(self.path, formats=["WEBP"]) as image:
                for index in range(getattr(image, "n_frames", 1)):
                    image.seek(index)
                    image.load()
                    self.held = (image.info.get("duration") or 100) / 1000
                    yield time, image.convert("RGBA")
                    time += self.held
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.path}: cannot be read as an animated WebP ({error}); convert it to mp4") from error

    def pixels(self, picture: Image.Image) -> Tensor:
        """uint8 [3, H, W]; transparency is laid over white."""
        white = Image.new("RGBA", picture.size, "white")
        pixels = np.array(Image.alpha_composite(white, picture).convert("RGB"))  # [H, W, 3]
        return torch.from_numpy(pixels).permute(2, 0, 1)  # [3, H, W]

    def notes(self) -> list[str]:
        """An empty list."""
        return []


def is_webp(path: Path) -> bool:
    """Whether a regular file begins as a WebP does."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            header = file.read(12)
    except OSError:
        return False  # whoever reads it next names the reason
    return header[:4] == b"RIFF" and header[8:] == b"WEBP"


def find_pictures(path: Path) -> list[Path] | None:
    """The pictures of a folder, or the files of a glob, in their natural order; None for any other path.

    Of a folder only files with one of SUFFIXES are taken, and no hidden ones. Raises InputError for a folder that has
    none or cannot be read, and for a pattern without files.
    """
    if os.path.isdir(path):  # unlike Path.is_dir it takes any name, one that is too long too
        try:
            found = [
                file
                for file in path.iterdir()
                if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
            ]
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({reason(error)})") from error
        if not found:
            raise InputError(f"{path}: is a folder without pictures ({', '.join(SUFFIXES)})")
    elif glob.has_magic(str(path)) and not os.path.exists(path):
        found = [Path(name) for name in glob.glob(str(path)) if Path(name).is_file()]
        if not found:
            raise InputError(f"{path}: no file has such a name")
    else:
        return None
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key under which 2 comes before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", str(path))]
