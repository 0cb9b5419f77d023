"""Clips and images, read and written."""

import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from minimti.io.files import InputError, atomic_write, require_file


def read_clip(path: str | Path, num_frames: int, start: float, stride: int) -> Tensor:
    """The first frame at or after `start` seconds and every stride-th one from there: uint8 [num_frames, 3, H, W].

    Raises InputError where the file is missing, holds no video, or ends too early.
    """
    path = require_file(path)
    frames, decoded = [], 0
    try:
        with av.open(f"file:{path}") as container:  # a colon in a bare name would be a protocol
            if not container.streams.video:
                raise InputError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            origin = float((stream.start_time or 0) * stream.time_base)
            if start > 0:
                container.seek(int((origin + start) / stream.time_base), stream=stream)  # to the key frame before
            for frame in container.decode(stream):
                if frame.time is not None and frame.time - origin < start - 1e-6:
                    continue
                if decoded % stride == 0:
                    upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # phones film sideways
                    frames.append(torch.from_numpy(upright.copy()).permute(2, 0, 1))
                    if frames[-1].shape != frames[0].shape:
                        raise InputError(f"{path}: its frames change their size; cut it to a part of one size")
                decoded += 1
                if len(frames) == num_frames:
                    return torch.stack(frames)
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: cannot be read as a video ({error})") from error
    raise InputError(
        f"{path}: {num_frames} frames at stride {stride} from {start:g} s need {(num_frames - 1) * stride + 1} frames,"
        f" but only {decoded} are there; start earlier, or lower --stride or --frames"
    )


def read_image(path: str | Path) -> Tensor:
    """uint8 [1, 3, H, W], upright; transparency is laid over white. Raises InputError where it is not an image."""
    path = require_file(path)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # of large images, of odd metadata
            if image.mode[0] in "IF":  # more than 8 bits, in a range that the file does not tell
                raise InputError(f"{path}: is an image of mode {image.mode}; convert it to 8 bits per channel")
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from error
    white = Image.new("RGBA", image.size, "white")
    pixels = np.array(Image.alpha_composite(white, image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def fit(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [F, 3, H, W] -> fp32 [F, 3, height, width] in [-1,1] for size = (width, height).

    The largest central part of the wanted shape, resized: one rule for references and targets.
    """
    width, height = size
    have_h, have_w = frames.shape[-2:]
    scale = min(have_w / width, have_h / height)
    crop = T.center_crop(frames, [max(1, round(height * scale)), max(1, round(width * scale))])
    pixels = T.resize(crop.float(), [height, width], interpolation=T.InterpolationMode.BICUBIC, antialias=True)
    return pixels.clamp(0, 255) / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """[-1,1] (clamped), of any shape -> uint8 on the CPU."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def write_clip(path: str | Path, clip: Tensor, fps: float) -> None:
    """[F, 3, H, W] in [-1,1] (clamped) -> an H.264 mp4 that browsers play: yuv420p, BT.709, near-lossless, index first.

    The same clip gives the same bytes. Width and height must be even.
    """
    frames = to_bytes(clip).permute(0, 2, 3, 1).numpy()
    with atomic_write(path) as part, av.open(f"file:{part}", "w", options={"movflags": "+faststart"}) as container:
        # x264's macroblock tree reads memory it never wrote at some widths, and then the bytes vary from run to run.
        options = {"crf": "12", "mbtree": "0"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.color_primaries = stream.color_trc = stream.colorspace = 1  # BT.709
        stream.color_range = ColorRange.MPEG
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def strip(clips: Tensor) -> Tensor:
    """Clips [R, F, 3, H, W] in [-1,1] (clamped) -> one picture, uint8 [R H, F W, 3]: a row each, time to the right."""
    rows, frames, channels, height, width = clips.shape
    return to_bytes(clips).permute(0, 3, 1, 4, 2).reshape(rows * height, frames * width, channels)


def write_strip(path: str | Path, clips: Tensor) -> None:
    """The picture of `strip` as a PNG."""
    with atomic_write(path) as part:
        Image.fromarray(strip(clips).numpy()).save(part)
