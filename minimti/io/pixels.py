"""Value domains and sizes of pixels: what lies between the pictures of files and the inputs of networks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minimti.config import FITS, MAX_PIXELS, MAX_SIDE, SVDConfig
from minimti.io.files import InputError

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom lie outside

ENOUGH = 0.6  # share of a picture's area; below it, what is cut off may be the subject


def check_size(size: tuple[int, int], config: SVDConfig) -> tuple[int, int]:
    """(width, height) as it is. Raises InputError if it is too large or cannot be halved often enough."""
    multiple = config.size_multiple
    if max(size) > MAX_SIDE or size[0] * size[1] > MAX_PIXELS:
        raise InputError(f"--size {size[0]}x{size[1]}: at most {MAX_SIDE} a side and {MAX_PIXELS:,} pixels in all")
    if any(length <= 0 or length % multiple for length in size):
        raise InputError(f"--size {size[0]}x{size[1]}: width and height must be multiples of {multiple}")
    return size


def oriented(size: tuple[int, int], width: float, height: float) -> tuple[int, int]:
    """`size` = (width, height), its sides exchanged where that suits a picture of `width` x `height` better."""
    if width == height:
        return size
    shorter, longer = min(size), max(size)
    return (shorter, longer) if width < height else (longer, shorter)


@dataclass(frozen=True)
class Placement:
    """Which part of a picture is used, and which part of the target it fills."""

    source: Box  # in the picture
    target: Box  # in the target; the rest is padding
    have: tuple[int, int]  # width, height of the picture
    size: tuple[int, int]  # width, height of the target

    @property
    def kept(self) -> tuple[float, float]:
        """Share of the picture's width and of its height that is used."""
        left, top, right, bottom = self.source
        return (right - left) / self.have[0], (bottom - top) / self.have[1]

    def note(self) -> str:
        """A sentence about what is cut off where that is much, else ""."""
        area = self.kept[0] * self.kept[1]
        if area >= ENOUGH:
            return ""
        return f"only {area:.0%} of the picture is used; --fit pad uses all of it, --crop-center X Y another part"


def place(
    have: tuple[int, int],
    size: tuple[int, int],
    how: str = "crop",
    center: tuple[float, float] = (0.5, 0.5),
    pixel_aspect: float = 1.0,
) -> Placement:
    """Where a picture of `have` = (width, height) pixels goes in a target of `size`; one rule for clips and images.

    how           "crop": the largest part with the target's shape. "pad": all of it, with bars around it.
                  "stretch": all of it, in another shape.
    center        which part a crop takes, from (0, 0), the top left, to (1, 1), the bottom right
    pixel_aspect  width of a pixel of the picture over its height

    Raises ValueError for another `how` or `center`.
    """
    if how not in FITS:
        raise ValueError(f"unknown fit {how!r}: {', '.join(FITS)}")
    if not all(0 <= share <= 1 for share in center):
        raise ValueError(f"the centre of a crop is from (0, 0) to (1, 1), not {center}")
    (have_w, have_h), (width, height) = have, size
    source, target = (0, 0, have_w, have_h), (0, 0, width, height)
    if how == "crop":
        scale = min(have_w * pixel_aspect / width, have_h / height)
        source = _part(have, (width * scale / pixel_aspect, height * scale), center)
    elif how == "pad":
        scale = min(width / (have_w * pixel_aspect), height / have_h)
        target = _part(size, (have_w * pixel_aspect * scale, have_h * scale), (0.5, 0.5))
    return Placement(source, target, have, size)


def _part(whole: tuple[int, int], part: tuple[float, float], center: tuple[float, float]) -> Box:
    w, h = (min(length, max(1, round(side))) for length, side in zip(whole, part))
    left, top = round((whole[0] - w) * center[0]), round((whole[1] - h) * center[1])
    return left, top, left + w, top + h


def fit(frames: Tensor, size: tuple[int, int], placement: Placement | None = None) -> Tensor:
    """uint8 [F, 3, H, W] -> fp32 [F, 3, height, width] in [-1,1], for size = (width, height) in pixels.

    Takes the part that `placement` names (default: a central crop) and resizes it (bicubic, antialiased); padding is
    black. One channel of one frame at a time: a large picture needs only four more bytes a pixel.
    """
    width, height = size
    placement = placement or place((frames.shape[-1], frames.shape[-2]), size)
    left, top, right, bottom = placement.source
    x0, y0, x1, y1 = placement.target
    fitted = torch.full((*frames.shape[:2], height, width), -1.0)
    for index, frame in enumerate(frames[..., top:bottom, left:right]):
        for channel, plane in enumerate(frame):
            pixels = plane.float().contiguous()[None, None]  # [1, 1, h, w]
            resized = F.interpolate(pixels, (y1 - y0, x1 - x0), mode="bicubic", antialias=True)
            fitted[index, channel, y0:y1, x0:x1] = resized[0, 0].clamp(0, 255) / 127.5 - 1
    return fitted


def cut(video: Tensor, placement: Placement) -> Tensor:
    """A video [..., H, W] without the padding of the image that it was made from, both sides even as mp4 needs them."""
    left, top, right, bottom = placement.target
    if placement.target == (0, 0, *placement.size):
        return video
    return video[..., top : bottom - (bottom - top) % 2, left : right - (right - left) % 2]


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1,1] (clamped), of any shape, dtype and device -> uint8 0..255 of the same shape on the CPU."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8, of any shape -> fp32 in [-1,1] on the same device."""
    return pixels.float() / 127.5 - 1


def strip(clips: Tensor) -> Tensor:
    """Clips [R, F, 3, H, W] in [-1,1] (clamped) -> one picture, uint8 [R H, F W, 3]: a row each, time to the right."""
    rows, frames, channels, height, width = clips.shape
    return to_uint8(clips).permute(0, 3, 1, 4, 2).reshape(rows * height, frames * width, channels)  # [R H, F W, 3]
