"""Videos and pictures, written."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from torch import Tensor

from minimti.io.files import atomic_write
from minimti.io.pixels import strip


def write_clip(path: str | Path, video: Tensor, fps: float) -> None:
    """uint8 [F, 3, H, W] -> an mp4 that browsers play: H.264, yuv420p, BT.709, near-lossless, index first.

    H and W must be even. The same video gives the same bytes. Raises ValueError for any other tensor, InputError where
    the file cannot be written.
    """
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] != 3 or video.shape[2] % 2 or video.shape[3] % 2:
        raise ValueError(f"a video is uint8 [F, 3, H, W] with even H and W, not {video.dtype} {list(video.shape)}")
    frames = video.cpu().permute(0, 2, 3, 1).numpy()  # [F, H, W, 3]
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


def write_strip(path: str | Path, clips: Tensor) -> None:
    """The picture of `strip` as a PNG. Raises InputError where the file cannot be written."""
    with atomic_write(path) as part:
        Image.fromarray(strip(clips).numpy()).save(part)
