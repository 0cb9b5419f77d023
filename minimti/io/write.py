"""Videos and pictures, written."""

import os
import re
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from torch import Tensor

from minimti import signals
from minimti.io.files import InputError, atomic_write, reason, sync, unwritable
from minimti.io.pixels import strip

LEAST_SIDE = 256  # pixels of the longer side; players show smaller videos as stamps, or blur them


def write_clip(path: str | Path, video: Tensor, fps: float, comment: str = "") -> None:
    """uint8 [F, 3, H, W] -> an mp4 that browsers play: H.264, yuv420p, BT.709, near-lossless, index first.

    H and W must be even. `comment` goes into the file's metadata. The same video and comment give the same bytes.
    Raises ValueError for any other tensor, InputError where the file cannot be written.
    """
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] != 3 or video.shape[2] % 2 or video.shape[3] % 2:
        raise ValueError(f"a video is uint8 [F, 3, H, W] with even H and W, not {video.dtype} {list(video.shape)}")
    frames = video.cpu().permute(0, 2, 3, 1).numpy()  # [F, H, W, 3]
    with atomic_write(path) as part, av.open(f"file:{part}", "w", options={"movflags": "+faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        # x264's macroblock tree reads memory it never wrote at some widths, and then the bytes vary from run to run.
        options = {"crf": "12", "mbtree": "0"}
        rate = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))  # x264 takes no other rates
        stream = container.add_stream("libx264", rate=rate, options=options)
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


def gif_rate(fps: float) -> float:
    """Frames per second of a GIF that is written at `fps`: 1 to 100.

    It counts hundredths of a second. Frames that are alike become one, which lasts 655 seconds at most.
    """
    return min(max(fps, 1), 100)


def write_gif(path: str | Path, video: Tensor, fps: float) -> None:
    """uint8 [F, 3, H, W] -> a GIF that repeats for ever, each frame with the 256 colours that suit it best.

    It plays at `gif_rate(fps)`: where that does not divide hundredths of a second, durations differ by one hundredth.
    Raises InputError where the file cannot be written.
    """
    first, *others = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video.cpu()]  # [H, W, 3] each
    ends = [round(100 * (index + 1) / gif_rate(fps)) for index in range(len(video))]
    durations = [10 * (end - begin) for begin, end in zip([0, *ends], ends)]  # in milliseconds
    with atomic_write(path) as part:
        first.save(part, save_all=True, append_images=others, duration=durations, loop=0, optimize=False)


def write_frames(folder: str | Path, video: Tensor) -> None:
    """uint8 [F, 3, H, W] -> a folder of lossless pictures, 00000.png and so on, which appears as a whole.

    It takes the place of an earlier folder of frames, which stays where that fails. Raises InputError where `folder` is
    anything else, or cannot be written.
    """
    folder = Path(folder)
    check_frames(folder)
    with signals.held():
        private = old = None
        try:
            private = Path(tempfile.mkdtemp(prefix=".minimti-", dir=folder.parent))
            (part := private / "new").mkdir()  # with the permissions of any new folder
            for index, frame in enumerate(video.cpu()):
                picture = part / f"{index:05}.png"
                Image.fromarray(frame.permute(1, 2, 0).numpy()).save(picture)  # [H, W, 3]
                sync(picture)
            sync(part)
            if folder.exists():
                os.rename(folder, private / "old")
                old = private / "old"
            os.rename(part, folder)
            sync(folder.parent)
        except OSError as error:
            if old:
                os.rename(old, folder)
            raise unwritable(folder, error) from error
        finally:
            if private:
                shutil.rmtree(private, ignore_errors=True)


def check_frames(folder: str | Path, *inputs: str | Path) -> None:
    """Raises InputError where a folder of frames would take the place of something else, or holds an input."""
    folder = Path(folder)
    if any(Path(os.path.realpath(other)).is_relative_to(os.path.realpath(folder)) for other in inputs if str(other)):
        raise InputError(f"{folder}: holds an input; name another --out")
    try:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise InputError(f"{folder}: is there, and is no folder of frames; name another --out")
        names = os.listdir(folder) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({reason(error)}); name another --out") from error
    if not all(re.fullmatch(r"[0-9]{5}\.png", name) for name in names):
        raise InputError(f"{folder}: holds other files than frames; name another --out")


def write_video(path: str | Path, video: Tensor, fps: float, comment: str = "") -> None:
    """uint8 [F, 3, H, W] -> what the name stands for: an .mp4, a .gif, or a folder of frames.

    `comment` is for an mp4 alone. Raises as `write_clip`, `write_gif` and `write_frames` do.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".mp4":
        write_clip(path, video, fps, comment)
    elif suffix == ".gif":
        write_gif(path, video, fps)
    else:
        write_frames(path, video)


def enlarged(video: Tensor) -> Tensor:
    """[..., H, W] with every pixel repeated by the smallest whole number that gives the longer side LEAST_SIDE pixels.

    Nothing is interpolated. An mp4 stores one colour for 2x2 pixels, so from a factor of 2 on no colour is lost.
    """
    factor = -(-LEAST_SIDE // max(video.shape[-2:]))
    return video.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
