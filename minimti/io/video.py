"""Clips: frames of a video, chosen by time, as the networks take them."""

import math
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minimti.config import SVDConfig
from minimti.io.decode import VideoFile
from minimti.io.files import InputError
from minimti.io.pictures import AnimatedWebP, Pictures, find_pictures, is_webp
from minimti.io.pixels import check_size, fit, oriented, place

VISIBLE = 8 / 127.5  # in [-1,1] units: a pixel that changes by less, noise may have changed
COMPLETE = 0.9  # share of the length in a file's header; a file that ends earlier lacks a part
MOVING = 1e-3  # share of the pixels; where fewer change, nothing moves


class Source(Protocol):
    """Where pictures come from: a video file, a folder."""

    size: tuple[int, int]  # width, height of the upright pictures
    pixel_aspect: float  # width of a pixel over its height
    rate: float  # pictures per second, as far as it is given
    tolerance: float  # seconds: how much earlier a picture may be due than its rounded time says
    duration: float | None  # seconds, where it is given

    def frames(self, start: float) -> Generator[tuple[float, Any], None, None]:
        """Pictures in the order of their times, in seconds since the first; begins at or before `start`."""

    def pixels(self, frame: Any) -> Tensor:
        """One of them as uint8 [3, H, W]."""

    def notes(self) -> list[str]:
        """What a person should be told of the last pass."""


@dataclass(frozen=True)
class Clip:
    """Frames of a video at a model's size, and where they come from."""

    frames: Tensor  # fp32 [F, 3, H, W] in [-1,1]
    fps: float  # rate at which they were taken; the file's own may be higher
    times: tuple[float, ...]  # of the F frames, in seconds since the file's first frame
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

    Warns where much of the picture is cut off, and where nothing moves. Raises InputError where the file is missing,
    holds no video, has frames of several sizes or ends too early, for a size that the networks cannot halve often
    enough, and where more than one of `end`, `sample_fps` and `stride` is given or `end` is not after `start`.
    """
    path = Path(path)
    num_frames = config.num_frames if num_frames is None else num_frames
    choice = _Choice(num_frames, start, end, sample_fps, stride, config.micro.fps_id + 1)
    with _open(path, choice.rate) as source:
        target = check_size(size or oriented(config.size, source.size[0] * source.pixel_aspect, source.size[1]), config)
        placement = place(source.size, target, how, center, source.pixel_aspect)

        def fitted(frame: Any) -> Tensor:
            return fit(source.pixels(frame)[None], target, placement)[0]  # [3, height, width]

        taken, notes = _choose(path, source, choice, fitted)
        if source.duration and taken.end < COMPLETE * source.duration:
            notes.append(f"its pictures end at {taken.end:.2f} s of {source.duration:.2f}: cut off, or damaged")
        notes += source.notes()
        duration = taken.end if taken.end < math.inf else source.duration
    for problem in (placement.note(), "" if _moves(taken.frames) else "nothing moves in these frames"):
        if problem:
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
    path = Path(path)
    if find_pictures(path) is None and not path.exists():
        raise InputError(f"{path}: no such file")


def _open(path: Path, rate: float) -> Any:
    """The source that a path names, as a context; pictures follow each other at `rate`."""
    pictures = find_pictures(path)
    if pictures is not None:
        return Pictures(pictures, rate)
    return AnimatedWebP(path) if is_webp(path) else VideoFile(path)


@dataclass(frozen=True)
class _Choice:
    """Which frames are to be taken. Raises InputError where that is no choice."""

    num_frames: int
    start: float
    end: float | None
    sample_fps: float | None
    stride: int | None
    model_fps: float

    def __post_init__(self) -> None:
        given = {"--end": self.end, "--sample-fps": self.sample_fps, "--stride": self.stride}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise InputError(f"{' and '.join(names)}: each of them says which frames to take; leave all but one out")
        if self.end is not None and self.end <= self.start:
            raise InputError(f"--end {self.end:g}: must be later than the start, {self.start:g} s")

    @property
    def rate(self) -> float:
        return self.sample_fps or self.model_fps

    def spread(self, end: float) -> list[float]:
        """Times from the start to `end`."""
        return [self.start + (end - self.start) * k / max(self.num_frames - 1, 1) for k in range(self.num_frames)]

    def at_rate(self) -> list[float]:
        """Times from the start on."""
        return [self.start + k / self.rate for k in range(self.num_frames)]


def _choose(path: Path, source: Source, choice: _Choice, fitted: Callable[[Any], Tensor]) -> "tuple[_Taken, list[str]]":
    """The frames of a choice, and notes on it. Raises InputError where the file ends too early."""
    if choice.stride is not None:
        return _strided(path, source, choice.num_frames, choice.start, choice.stride, fitted), []
    if choice.end is not None:
        taken = _taken(source, choice.spread(choice.end), fitted)
        if choice.end > taken.end + source.tolerance:
            raise InputError(f"{path}: ends at {taken.end:.3f} s, before --end {choice.end:g}; choose an earlier end")
        return taken, []
    taken = _taken(source, choice.at_rate(), fitted)
    if choice.start > taken.end + source.tolerance:
        raise InputError(f"{path}: ends at {taken.end:.3f} s, before --start {choice.start:g}; start earlier")
    if taken.times[-1] <= taken.end + source.tolerance:
        return taken, []
    need = f"{choice.num_frames} frames at {choice.rate:g} fps from {choice.start:g} s end at {taken.times[-1]:.2f} s"
    if choice.sample_fps is not None:
        raise InputError(f"{path}: {need}, but the file at {taken.end:.2f} s; raise --sample-fps or lower --frames")
    if taken.last <= choice.start:
        raise InputError(f"{path}: only one frame is there from {choice.start:g} s on; a clip needs at least two")
    fps = (choice.num_frames - 1) / (taken.last - choice.start)
    note = f"{need}, but the file at {taken.end:.2f} s: spread over its whole length, at {fps:.3g} fps"
    return _taken(source, choice.spread(taken.last), fitted), [note]


@dataclass
class _Taken:
    """Frames, and what was seen of the file on the way to them."""

    frames: Tensor  # [F, 3, height, width]
    times: list[float]  # wanted, or with a stride the frames' own
    rate: float | None  # of the file's frames, from the first one that was taken to the last
    last: float  # time of the last frame that was read
    end: float  # of the file, where it was reached, else infinite


class _Frames:
    """[count, ...] that is filled one tensor [...] at a time; stacking a list would hold everything twice."""

    def __init__(self, count: int):
        self.all = torch.empty(count)
        self._filled = 0

    def append(self, frame: Tensor) -> None:
        if not self._filled:
            self.all = frame.new_empty((len(self.all), *frame.shape))
        self.all[self._filled] = frame
        self._filled += 1


def _taken(source: Source, times: list[float], fitted: Callable[[Any], Tensor]) -> _Taken:
    """The frame shown at each of the times. After the end of the file it is the last one."""
    remaining = deque(times)
    frames = _Frames(len(times))
    own: list[tuple[int, float]] = []  # number and time of the frames that were taken
    shown: Any = None
    ended, number, last, gap = True, -1, 0.0, 1 / source.rate

    def take() -> None:
        remaining.popleft()
        repeated = own and own[-1][0] == number
        frames.append(frames.all[len(own) - 1] if repeated else fitted(shown))
        own.append((number, last))

    with closing(source.frames(times[0])) as timed:
        for time, frame in timed:
            while number >= 0 and remaining and remaining[0] < time - source.tolerance:
                take()
            if not remaining:
                ended = False
                break
            gap = time - last if number >= 0 and time > last else gap
            shown, last, number = frame, time, number + 1
    while remaining:
        take()
    (first_number, first), (last_number, final) = own[0], own[-1]
    rate = (last_number - first_number) / (final - first) if final > first else None
    return _Taken(frames.all, times, rate, last, last + gap if ended else math.inf)


def _strided(
    path: Path, source: Source, num_frames: int, start: float, stride: int, fitted: Callable[[Any], Tensor]
) -> _Taken:
    """Every stride-th frame from the one shown at `start`. Raises InputError where there are too few."""
    needed = (num_frames - 1) * stride + 1
    frames, times, available = _Frames(num_frames), [], 0
    with closing(source.frames(start)) as timed:
        for time, frame in islice(_from_shown(timed, start + source.tolerance), needed):
            if available % stride == 0:
                frames.append(fitted(frame))
                times.append(time)
            available += 1
    if available < needed:
        raise InputError(
            f"{path}: {num_frames} frames at stride {stride} from {start:g} s need {needed} frames,"
            f" but only {available} are there; start earlier, or lower --stride or --frames"
        )
    rate = (needed - 1) / (times[-1] - times[0]) if times[-1] > times[0] else None
    return _Taken(frames.all, times, rate, times[-1], math.inf)


def _from_shown(timed: Iterator[tuple[float, Any]], start: float) -> Iterator[tuple[float, Any]]:
    """All frames from the one that is shown at `start`; none where the file ends before."""
    shown: tuple[float, Any] | None = None
    for time, frame in timed:
        if shown and time > start:
            yield shown
        shown = (time, frame)
    if shown:
        yield shown


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
