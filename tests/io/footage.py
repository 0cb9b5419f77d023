"""Clips that tests make and recognise."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from minimti.io.decode import VideoFile
from minimti.io.pixels import to_uint8


def gradients(num_frames: int, height: int = 64, width: int = 96) -> torch.Tensor:
    """uint8 [F, 3, H, W]: red grows to the right, green downwards, blue with time."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    frames = [torch.stack([x, y, torch.full_like(x, blue)]) for blue in blues(num_frames)]
    return to_uint8(torch.stack(frames))


def blues(num_frames: int) -> torch.Tensor:
    return torch.linspace(-0.8, 0.8, num_frames)


def shown(frames: torch.Tensor, num_frames: int) -> list[int]:
    """The numbers of frames, uint8 or in [-1,1], of a clip of `gradients(num_frames)`."""
    blue = frames[:, 2].float().mean(dim=(1, 2))  # [F]
    blue = blue / 127.5 - 1 if frames.dtype == torch.uint8 else blue
    distances = (blue[:, None] - blues(num_frames)).abs()  # [F, num_frames]
    assert distances.min(dim=1).values.max() < 0.03
    return distances.argmin(dim=1).tolist()


def counted(frames: torch.Tensor) -> list[int]:
    """The numbers of frames in [-1,1] of the counter of tests/cases: frame i has luma 20 + 5 i."""
    luma = (frames.mean(dim=(1, 2, 3)) + 1) / 2 * 219 + 16
    return [round(number) for number in ((luma - 20) / 5).tolist()]


def encode(path: Path, frames: torch.Tensor, rate: int = 10, codec: str = "libx264", pix_fmt: str = "yuv420p", **more):
    """uint8 [F, 3, H, W] as any kind of file.

    more: options of the encoder; times, whole numbers of 1 / rate; title; sound, in seconds.
    """
    times, title, sound = more.pop("times", range(len(frames))), more.pop("title", ""), more.pop("sound", 0)
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=rate, options=more)
        if codec != "libx264":
            stream.bit_rate = 8_000_000
        stream.height, stream.width, stream.pix_fmt = *frames.shape[2:], pix_fmt
        silence = container.add_stream("pcm_s16le", rate=8000, layout="mono") if sound else None
        for time, pixels in zip(times, frames.permute(0, 2, 3, 1).numpy()):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if silence:
            audio = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * sound), np.int16), format="s16", layout="mono")
            audio.sample_rate = 8000
            container.mux(silence.encode(audio))


def pictures(path: Path) -> torch.Tensor:
    """All frames of a file as they are to be shown, uint8 [F, 3, H, W]."""
    with VideoFile(path) as source:
        return torch.stack([source.pixels(frame) for _, frame in source.frames(0)])
