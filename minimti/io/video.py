"""Clips: frames of a video, chosen by time, as the networks take them."""

import math
import os
import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minimti.config import SVDConfig
from minimti.io.decode import VideoFile
from minimti.io.files import InputError
from minimti.io.frames import Choice, choose
from minimti.io.pictures import AnimatedWebP, Pictures, find_pictures, is_webp
from minimti.io.pixels import check_size, fit, oriented, place

VISIBLE = 8 / 127.5  # in [-1,1] units: a pixel that changes by less, noise may have changed
COMPLETE = 0.9  # share of the length in a file's header; a file that ends earlier lacks a part
FEW = 1 / 3  # share of a clip's frames; where fewer frames of the file make up a clip, it jerks
MOVING = 1e-3  # share of the pixels; where fewer change, nothing moves


@dataclass(frozen=True)
class Clip:
    """Frames of a video at a model's size, and where they come from."""

    frames: Tensor  # fp32 [F, 3, H, W] in [-1,1]
    fps: float  # rate at which they were taken; the file's own may be higher
    times: tuple[float, ...]  # seconds after the file's first frame that were asked for; with a stride the frames' own
    source: str  # path of the file, the folder or the pattern
    source_size: tuple[int, int]  # width, height of the upright frames in the file, in pixels
    source_fps: float | None = None  # rate of the file's frames there; None where only one was read
    duration: float | None = None  # seconds, of the file, where it is given
    kept: tuple[float, float] = (1.0, 1.0)  # share of the width and height of the file's frames
    notes: tuple[str, ...] = ()  # what differs from what was to be expected, a sentence each

    def about(self) -> str:
        """Times, rate and the part of the picture, as a line."""
        parts = [f"{self.times[0]:.2f} to {self.times[-1]:.2f} s"]
        if self.duration:
            parts[0] += f" of {self.duration:.1f} s"
        if self.source_fps:
            parts += [f"{self.source_fps:.4g} fps", _every(self.source_fps / self.fps)]
        width, height = self.kept
        return ", ".join(parts) + f"; keeps {width:.0%} of the width, {height:.0%} of the height".replace("%", " %")


def read_clip(
    path: str | Path,
    config: SVDConfig,
    *,
    num_frames: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    sample_fps: float | None = None,
    stride: int | None = None,
    size: tuple[int, int] | None = None,
    how: str = "crop",
    center: tuple[float, float] = (0.5, 0.5),
) -> Clip:
    """F frames of a video file, a pipe, a folder or a pattern of pictures ("walk/*.png"), fitted to a size.

    Each is the frame shown at its time: the last one at or before it. By default the times begin at `start` and follow
    each other at the model's rate (micro.fps_id + 1); where the file ends earlier, they are spread evenly over all that
    follows `start`, and a note says so. Pictures without times follow each other at `sample_fps`, else at the model's
    rate.

    num_frames   F, at least 1; by default the model's
    start, end   seconds from the first frame of the file, at least 0; with `end`, the times are spread over
                 [start, end], both included
    sample_fps   times follow each other at this rate
    stride       every stride-th frame from the one shown at `start`, whatever its time
    size         (width, height) in pixels; by default the model's, its sides exchanged for a portrait clip
    how, center  as `place` takes them

    Warns where much of the picture is cut off, where nothing moves, and where few frames are there. Raises InputError
    where the file is missing, holds no video, has frames of several sizes or ends too early, for a size that the
    networks cannot halve often enough, and where more than one of `end`, `sample_fps` and `stride` is given or `end` is
    not after `start`; ValueError for numbers outside of these ranges.
    """
    path = Path(path)
    num_frames = config.num_frames if num_frames is None else num_frames
    choice = Choice(num_frames, start, end, sample_fps, stride, config.micro.fps_id + 1)
    with _open(path, choice.rate) as source:
        target = check_size(size or oriented(config.size, source.size[0] * source.pixel_aspect, source.size[1]), config)
        placement = place(source.size, target, how, center, source.pixel_aspect)

        def fitted(frame: Any) -> Tensor:
            return fit(source.pixels(frame)[None], target, placement)[0]  # [3, height, width]

        taken, notes = choose(path, source, choice, fitted)
        if source.duration and taken.end < COMPLETE * source.duration:
            notes.append(f"its pictures end at {taken.end:.2f} s of {source.duration:.2f}: cut off, or damaged")
        notes += source.notes()
        duration = taken.end if taken.end < math.inf else source.duration
    motion = ""
    if not _moves(taken.frames):
        motion = "nothing moves in these frames"
    elif taken.different < FEW * num_frames:
        motion = f"only {taken.different} frames of the file make up these {num_frames}"
    for problem in filter(None, (placement.note(), motion)):
        warnings.warn(f"{path}: {problem}", stacklevel=2)
    span = taken.times[-1] - taken.times[0]
    return Clip(
        frames=taken.frames,
        fps=(num_frames - 1) / span if span > 0 else source.rate,
        times=tuple(taken.times),
        source=str(path),
        source_size=source.size,
        source_fps=taken.rate,
        duration=duration,
        kept=placement.kept,
        notes=tuple(notes),
    )


def check_source(path: str | Path) -> None:
    """Raises InputError where there is no such file, folder or picture of a pattern. Opens no pipe."""
    if re.match(r"[a-z]+://", str(path)):
        raise InputError(f"{path}: is an address; download it, and name the file")
    if find_pictures(Path(path)) is None and not os.path.exists(path):
        raise InputError(f"{path}: no such file" + "; a pipe is /dev/stdin" * (str(path) == "-"))


def _open(path: Path, rate: float) -> Any:
    """The source that a path names, as a context; pictures follow each other at `rate`."""
    pictures = find_pictures(path)
    if pictures is not None:
        return nullcontext(Pictures(pictures, rate))
    return nullcontext(AnimatedWebP(path)) if is_webp(path) else VideoFile(path)


def _moves(frames: Tensor) -> bool:
    """Whether enough pixels of [F, 3, H, W] in [-1,1] change between the first frame and any other; True for F = 1."""
    changed = [((frame - frames[0]).abs().amax(dim=0) > VISIBLE).float().mean().item() for frame in frames[1:]]
    return not changed or max(changed) > MOVING


def _every(ratio: float) -> str:
    """How many frames of the file go on one that is taken: "every frame", "every 4.3rd frame"."""
    if ratio < 0.95:
        return f"each frame {1 / ratio:.1f} times"
    number = f"{ratio:.0f}" if abs(ratio - round(ratio)) < 0.05 else f"{ratio:.1f}"
    if number == "1":
        return "every frame"
    ending = "th" if number[-2:] in ("11", "12", "13") else {"1": "st", "2": "nd", "3": "rd"}.get(number[-1], "th")
    return f"every {number}{ending} frame"
