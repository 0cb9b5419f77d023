"""Frames of a video: `read_clip` gives what the networks take, `decode_clip` chooses and decodes the frames."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.stream import VideoStream
from torch import Tensor

from minimti.config import SVDConfig
from minimti.io.files import InputError, require_file
from minimti.io.pixels import check_size, fit

TimedFrame = tuple[float, av.VideoFrame]  # seconds since the file's first frame, and the frame
SAME_TIME = 1e-6  # seconds: times are fractions in the file and are compared as floats


@dataclass(frozen=True)
class Clip:
    """Frames of a video at a model's size, and where they come from."""

    frames: Tensor  # fp32 [F, 3, H, W] in [-1,1]
    fps: float  # rate of these frames, lower than the file's where frames between them are left out
    times: tuple[float, ...]  # at which the F frames are shown, in seconds since the file's first frame
    source: str  # path of the file
    source_size: tuple[int, int]  # width, height of the upright frames in the file, in pixels


def read_clip(
    path: str | Path,
    config: SVDConfig,
    *,
    num_frames: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    stride: int = 1,
    size: tuple[int, int] | None = None,
) -> Clip:
    """The frames that `decode_clip` chooses, fitted to `size`.

    num_frames   F, at least 1; by default the model's
    start, end   seconds from the first frame of the file, at least 0
    stride       at least 1
    size         (width, height) in pixels; by default the model's

    Raises InputError as `decode_clip` does, and for a size that the networks cannot halve often enough.
    """
    size = check_size(size or config.size, config)
    frames, times, fps = decode_clip(path, config.num_frames if num_frames is None else num_frames, start, end, stride)
    source_size = (frames.shape[-1], frames.shape[-2])
    return Clip(fit(frames, size), fps, times, str(path), source_size)


def decode_clip(
    path: str | Path, num_frames: int, start: float, end: float | None, stride: int
) -> tuple[Tensor, tuple[float, ...], float]:
    """Chooses F = num_frames frames of a video.

    Without `end`, these are the first frame at or after `start` seconds and every stride-th one from there. With `end`,
    F times are spread evenly over [start, end], both included, and each gives the frame shown then: the last one at or
    before it. Where the file has fewer frames in this interval, some of them repeat. Returns

    frames   uint8 [F, 3, H, W], upright, at the size of the file
    times    of the F frames, in seconds since the file's first frame; with `end`, the evenly spread ones
    fps      (F - 1) / (times[-1] - times[0]); for a single frame the file's average rate

    Raises InputError where the file is missing, holds no video, has frames of several sizes or ends too early, and
    where `end` is not after `start` or is combined with a stride other than 1.
    """
    path = require_file(path)
    if end is not None and stride != 1:
        raise InputError(f"--stride {stride}: with --end, the frames are spread evenly over the time; leave one out")
    if end is not None and end <= start:
        raise InputError(f"--end {end:g}: must be later than the start, {start:g} s")
    frames: list[Tensor] = []
    times: list[float] = []
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 1)  # some files give no average, a few give neither
        timed = _timed_frames(container, stream, start, rate)
        if end is None:
            chosen = _strided(path, timed, num_frames, start, stride)
        else:
            chosen = _spread(path, timed, num_frames, start, end, rate)
        for time, frame in chosen:
            upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # phones film sideways
            frames.append(torch.from_numpy(upright.copy()).permute(2, 0, 1))  # [3, H, W]
            times.append(time)
            if frames[-1].shape != frames[0].shape:
                raise InputError(f"{path}: its frames change their size; cut it to a part of one size")
    span = times[-1] - times[0]
    return torch.stack(frames), tuple(times), (num_frames - 1) / span if span > 0 else rate


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its first video stream. Failures of decoding in the block, too, become an InputError."""
    try:
        with av.open(f"file:{path}") as container:  # a colon in a bare name would be a protocol
            if not container.streams.video:
                raise InputError(f"{path}: has no video stream")
            # Threads as PyAV sets them. With one for each frame (AUTO) PyAV 17.0 deadlocks now and then where a file is
            # closed before its end: they need the interpreter that waits for them.
            stream = container.streams.video[0]
            yield container, stream
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: cannot be read as a video ({error})") from error


def _timed_frames(container: InputContainer, stream: VideoStream, start: float, rate: float) -> Iterator[TimedFrame]:
    """All frames from the last key frame before `start` to the end of the file.

    A raw stream has no times: its frames are counted from `start`, at `rate` per second.
    """
    time_base = stream.time_base or Fraction(1, av.time_base)
    origin = float((stream.start_time or 0) * time_base)
    if start > 0:
        container.seek(int((origin + start) / time_base), stream=stream)
    for index, frame in enumerate(container.decode(stream)):
        yield start + index / rate if frame.time is None else frame.time - origin, frame


def _strided(
    path: Path, timed: Iterator[TimedFrame], num_frames: int, start: float, stride: int
) -> Iterator[TimedFrame]:
    """From the first frame at or after `start`, every stride-th one. Raises InputError where there are too few."""
    needed = (num_frames - 1) * stride + 1
    available = 0
    for time, frame in timed:
        if time < start - SAME_TIME:
            continue
        if available % stride == 0:
            yield time, frame
        available += 1
        if available == needed:
            return
    raise InputError(
        f"{path}: {num_frames} frames at stride {stride} from {start:g} s need {needed} frames,"
        f" but only {available} are there; start earlier, or lower --stride or --frames"
    )


def _spread(
    path: Path, timed: Iterator[TimedFrame], num_frames: int, start: float, end: float, rate: float
) -> Iterator[TimedFrame]:
    """The frames shown at evenly spread times, with these times. Raises InputError where the file ends before `end`."""
    times = deque(start + (end - start) * i / max(num_frames - 1, 1) for i in range(num_frames))
    shown: av.VideoFrame | None = None
    until = 0.0  # the end of the last frame so far
    for time, frame in timed:
        while shown and times and times[0] < time - SAME_TIME:
            yield times.popleft(), shown
        if not times:
            return
        shown, until = frame, time + 1 / rate
    if shown is None or end > until + SAME_TIME:
        raise InputError(f"{path}: ends at {until:.3f} s, before --end {end:g}; choose an earlier end")
    for time in times:
        yield time, shown
