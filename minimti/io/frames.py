"""Which pictures of a film are taken: by their times, never by their numbers, unless a stride is given."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minimti.io.files import InputError

ROUNDED = 3  # times that the end of a file follows from: the last frame's, and the two whose difference is its length


class Source(Protocol):
    """Where pictures come from: a video file, a folder."""

    size: tuple[int, int]  # width, height of the upright pictures
    pixel_aspect: float  # width of a pixel over its height
    rate: float  # pictures per second, as far as it is given
    tolerance: float  # seconds by which a rounded time may be too late
    held: float  # seconds for which the last picture of the last pass is shown, where the file says so; else 0
    duration: float | None  # seconds, where it is given

    def frames(self, start: float) -> Generator[tuple[float, Any], None, None]:
        """Pictures in the order of their times, in seconds since the first; begins at or before `start`."""

    def pixels(self, frame: Any) -> Tensor:
        """One of them as uint8 [3, H, W]."""

    def notes(self) -> list[str]:
        """Notes on the last pass, for the user."""


@dataclass(frozen=True)
class Choice:
    """Which frames to take. Raises InputError for options that contradict each other, ValueError for other numbers."""

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
        rates = [number for number in (self.sample_fps, self.stride) if number is not None]
        if self.num_frames < 1 or self.start < 0 or any(number <= 0 for number in rates):
            raise ValueError("frames, rate and stride must be above 0, and the start at least 0")
        if self.end is not None and self.end <= self.start:
            raise InputError(f"--end {self.end:g}: must be later than the start, {self.start:g} s")

    @property
    def rate(self) -> float:
        """Frames per second that are taken, where neither an end nor a stride is given."""
        return self.sample_fps or self.model_fps

    def spread(self, end: float) -> list[float]:
        """Times from the start to `end`."""
        return [self.start + (end - self.start) * k / max(self.num_frames - 1, 1) for k in range(self.num_frames)]

    def at_rate(self) -> list[float]:
        """Times from the start on."""
        return [self.start + k / self.rate for k in range(self.num_frames)]


@dataclass
class Taken:
    """Frames, and what was seen of the file on the way to them."""

    frames: Tensor  # [F, 3, height, width]
    times: list[float]  # wanted, or with a stride the frames' own
    different: int  # how many of the file's frames these are
    rate: float | None  # frames per second in the file, from the first one that was taken to the last
    last: float  # time of the last frame that was read
    until: float  # time of its last sample: that of the last frame, or later where it is held
    end: float  # where the file ends, one frame later, if that was reached, else infinite


def choose(path: Path, source: Source, choice: Choice, fitted: Callable[[Any], Tensor]) -> tuple[Taken, list[str]]:
    """The frames of a choice, and notes on it. Raises InputError where the file ends too early."""
    if choice.stride is not None:
        return _strided(path, source, choice.num_frames, choice.start, choice.stride, fitted), []
    tolerance = ROUNDED * source.tolerance
    if choice.end is not None:
        taken = _taken(source, choice.spread(choice.end), fitted)
        if choice.end > taken.end + tolerance:
            raise InputError(f"{path}: ends at {taken.end:.3f} s, before --end {choice.end:g}; choose an earlier end")
        return taken, []
    taken = _taken(source, choice.at_rate(), fitted)
    if choice.start > taken.end + tolerance:
        raise InputError(f"{path}: ends at {taken.end:.3f} s, before --start {choice.start:g}; start earlier")
    if taken.times[-1] <= taken.end + tolerance:
        return taken, []
    need = f"{choice.num_frames} frames at {choice.rate:g} fps from {choice.start:g} s end at {taken.times[-1]:.2f} s"
    if choice.sample_fps is not None:
        raise InputError(f"{path}: {need}, but the file at {taken.end:.2f} s; raise --sample-fps or lower --frames")
    if taken.last <= choice.start:
        raise InputError(f"{path}: only one frame is there from {choice.start:g} s on; a clip needs at least two")
    fps = (choice.num_frames - 1) / (taken.until - choice.start)
    note = f"{need}, but the file at {taken.end:.2f} s: spread evenly until there, at {fps:.3g} fps"
    return _taken(source, choice.spread(taken.until), fitted), [note]


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


def _taken(source: Source, times: list[float], fitted: Callable[[Any], Tensor]) -> Taken:
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
    until = last + max(0.0, source.held - gap)
    different = len({number for number, _ in own})
    return Taken(frames.all, times, different, rate, last, until, until + gap if ended else math.inf)


def _strided(
    path: Path, source: Source, num_frames: int, start: float, stride: int, fitted: Callable[[Any], Tensor]
) -> Taken:
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
    return Taken(frames.all, times, num_frames, rate, times[-1], times[-1], math.inf)


def _from_shown(timed: Iterator[tuple[float, Any]], start: float) -> Iterator[tuple[float, Any]]:
    """All frames from the one that is shown at `start`; none where the file ends before."""
    shown: tuple[float, Any] | None = None
    for time, frame in timed:
        if shown and time > start:
            yield shown
        shown = (time, frame)
    if shown:
        yield shown
