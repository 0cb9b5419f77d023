"""A video file as frames with the times at which they are shown; nothing but this one file is ever opened."""

import os
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
import numpy as np
import torch
from av.container import InputContainer
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.stream import VideoStream
from torch import Tensor

from minimti.io.colour import to_rgb
from minimti.io.deinterlace import deinterlaced
from minimti.io.files import InputError, reason

# Containers and raw streams that hold their own pictures. Playlists, scripts, numbered pictures, devices and text make
# FFmpeg open or show other files, so they are not among them. Sound and single pictures are, for better messages.
DEMUXERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,obu,ivf,flv,asf,ogg,gif,apng,mjpeg,mxf,nut,dv,"
    "yuv4mpegpipe,png_pipe,jpeg_pipe,wav,mp3"
)
MAX_PIXELS = 50_000_000  # bound of a frame; 8K has 33 million. A decoder keeps several frames of four bytes a pixel.
LIMIT = f"{MAX_PIXELS // 10**6} megapixels a frame"
MAX_PIPE_BYTES = 4 * 2**30  # a pipe is first copied to a temporary file
STILLS = Disposition.attached_pic | Disposition.timed_thumbnails
HELD = ("gif", "apng")  # containers in which every frame says how long it is shown
UNTIMED = ("avi",)  # containers that give the order of decoding alone; raw streams give no times at all
# Titles and the like need not be UTF-8; from PyAV 19 on that is no error.
UNDECODABLE_TEXTS: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
# What FFmpeg, PyAV and the file itself raise; OverflowError where a damaged header points beyond its end.
FAULTS = (av.FFmpegError, OSError, ValueError, OverflowError)
LIBVPX = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # decoders, by the names of FFmpeg's own
JOINED = 1.0  # seconds: where times fall by more, another recording begins, and its times follow the first one's
SAME_TIME = 1e-6  # seconds: times are fractions in the file and are compared as floats


class VideoFile:
    """The best video stream of a file. Use it as a context.

    Raises InputError where the file holds no video that can be decoded, or its frames are too large.
    """

    def __init__(self, path: Path):
        self.path = path
        self.damaged = 0  # packets that could not be decoded, of the last pass
        self.held = 0.0
        self._file = _seekable(path)
        try:
            self._read_first_frame()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read_first_frame(self) -> None:
        with self._opened() as (container, stream):
            base = stream.time_base or Fraction(1, av.time_base)
            self.tolerance = min(float(base) / 2, 5e-4) + SAME_TIME  # times are rounded to the file's ticks
            length = float((stream.duration or 0) * base)
            if not length and len(container.streams) == 1:  # else it may be that of the sound
                length = (container.duration or 0) / av.time_base
            self.duration = length if length > 0 else None  # seconds, of the header
            self._origin, self.rate = 0.0, 25.0
            time, first = next(self._decoded(container, stream), (0.0, None))
            if first is None:
                raise InputError(f"{self.path}: has no picture that can be decoded: damaged, or larger than {LIMIT}")
            self._origin = time
            rates = [stream.average_rate, stream.guessed_rate]
            if self._untimed(container) or first.pts is None:
                rates.reverse()  # an average over times that the file does not give
            self.rate = float(rates[0] or rates[1] or self.rate)  # frames per second, of the header
            self._shape = (first.width, first.height)
            aspect = float(stream.sample_aspect_ratio or 1)
            aspect = aspect if 1 / 8 <= aspect <= 8 else 1.0  # others are damage
            self._matrix = _display_matrix(first)  # once: side data and its frame keep each other in memory
            turned = _is_turned(self._matrix)
            self.size = self._shape[::-1] if turned else self._shape  # width, height of the upright frames
            self.pixel_aspect = 1 / aspect if turned else aspect

    def frames(self, start: float) -> Generator[tuple[float, av.VideoFrame], None, None]:
        """All frames in the order of their times, in seconds since the first frame of the file.

        Begins at or before `start`, or at the first frame.
        """
        if start > 0:
            with self._opened() as (container, stream):
                if not self._untimed(container):
                    timed = self._sought(container, stream, start)
                    first = next(timed, None)
                    if first and first[0] <= start:  # else the seek went too far, as in transport streams
                        yield first
                        yield from timed
                        return
        with self._opened() as (container, stream):
            yield from deinterlaced(self._decoded(container, stream))

    def pixels(self, frame: av.VideoFrame) -> Tensor:
        """uint8 [3, H, W], upright.

        Raises InputError where the size differs from the first frame's, and for colours that FFmpeg cannot convert.
        """
        if (frame.width, frame.height) != self._shape:
            raise InputError(f"{self.path}: its frames change their size; cut it to a part of one size")
        with self._failures():
            upright = np.ascontiguousarray(_upright(to_rgb(frame), self._matrix))
        return torch.from_numpy(upright).permute(2, 0, 1)  # [3, H, W]

    def notes(self) -> list[str]:
        """Notes on the last pass, for the user."""
        packets = "1 damaged packet was" if self.damaged == 1 else f"{self.damaged} damaged packets were"
        return [f"{packets} skipped"] * (self.damaged > 0)

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """The file and its stream, from the start. Failures of FFmpeg in the block, too, become an InputError."""
        self._file.seek(0)
        limit = {"max_pixels": str(MAX_PIXELS)}  # for decoders, which begin to work before the size is known here
        options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "none", **limit}
        with (
            self._failures(),
            av.open(self._file, "r", options=options, **UNDECODABLE_TEXTS) as container,
        ):
            # Threads as PyAV sets them. With one for each frame (AUTO) PyAV 17.0 deadlocks now and then where a file is
            # closed before its end: they need the interpreter that waits for them.
            stream = self._best(container)
            stream.codec_context.options = limit
            yield container, stream

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Makes an InputError of what FFmpeg and PyAV raise in the block."""
        try:
            yield
        except av.ArgumentError as error:  # above all for a format that is not in DEMUXERS
            formats = "mp4, mov, mkv, webm, avi, ts, gif and the like"
            raise InputError(f"{self.path}: cannot be read as a video; these can: {formats}") from error
        except FAULTS as error:
            raise InputError(
                f"{self.path}: cannot be read as a video ({reason(error)}); name one, or a folder of pictures"
            ) from error

    def _best(self, container: InputContainer) -> VideoStream:
        """The stream that a player would show: no picture (a cover, an AVIF's still), marked as default, large."""
        streams = [s for s in container.streams.video if s.codec_context and not s.disposition & STILLS]
        if not streams:
            raise InputError(f"{self.path}: has no video stream")
        best = max(
            streams, key=lambda s: (s.frames != 1, bool(s.disposition & Disposition.default), s.width * s.height)
        )
        check_frame(self.path, best.width, best.height)
        return best

    def _untimed(self, container: InputContainer) -> bool:
        return container.format.name in UNTIMED

    def _sought(
        self, container: InputContainer, stream: VideoStream, start: float
    ) -> Iterator[tuple[float, av.VideoFrame]]:
        """The frames after a seek; none where the file cannot be sought."""
        base = stream.time_base or Fraction(1, av.time_base)
        try:
            container.seek(int((self._origin + start) / base), stream=stream)
        except FAULTS:
            return
        yield from deinterlaced(self._decoded(container, stream, need_times=True))

    def _decoded(
        self, container: InputContainer, stream: VideoStream, need_times: bool = False
    ) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames and their times, which never fall. Packets that cannot be decoded are counted and left out.

        Where a container has no presentation times, a frame takes the next decoding time. One without either takes the
        last time plus one frame; with `need_times` (after a seek) it ends the iteration instead.
        """
        base = stream.time_base or Fraction(1, av.time_base)
        untimed = self._untimed(container)
        self.damaged = 0
        waiting: deque[int] = deque()  # times of decoding, of packets whose frames have not come yet
        previous, shift = None, 0.0
        decode = _decoder(stream)
        for packet in _until_damage(container.demux(stream)):
            if untimed and packet.dts is not None:
                waiting.append(packet.dts)
            try:
                frames = decode(packet)
            except FAULTS:
                self.damaged += 1
                frames = []
                if waiting:
                    waiting.pop()
            for frame in frames:
                assert isinstance(frame, av.VideoFrame)
                if untimed:
                    time = float(waiting.popleft() * base) - self._origin if waiting else None
                else:
                    time = None if frame.time is None else frame.time - self._origin
                if time is None and need_times:
                    return
                following = 0.0 if previous is None else previous + 1 / self.rate
                time = following if time is None else time + shift
                if previous is not None and time < previous - JOINED:
                    shift += following - time
                    time = following
                previous = time if previous is None else max(previous, time)
                if container.format.name in HELD:
                    self.held = float((frame.duration or 0) * base)
                yield previous, frame


def check_frame(path: Path, width: int, height: int) -> None:
    """Raises InputError where the frames of a file have more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise InputError(f"{path}: {width}x{height} is larger than {LIMIT}; scale it down")


def _decoder(stream: VideoStream) -> Callable[[av.Packet], Sequence[Any]]:
    """Decodes the packets of a stream. FFmpeg's own decoders of VP8 and VP9 leave out alpha; those of libvpx do not."""
    name = LIBVPX.get(stream.codec_context.name, "")
    has_alpha = {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") == "1"
    if has_alpha and name in av.codecs_available:
        context = cast(av.VideoCodecContext, av.CodecContext.create(name, "r"))
        context.options = stream.codec_context.options
        return context.decode
    return av.Packet.decode


def _until_damage(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """A file that is cut off or damaged ends there; a fault before the first packet is raised."""
    count = 0
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except FAULTS:
            if not count:
                raise
            return
        count += 1
        yield packet


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of x' = a x + c y, y' = b x + d y, with y pointing down: how the frame is turned and mirrored."""
    side_data = cast(SideDataContainer, frame.side_data)  # PyAV's stubs name another type
    try:
        a, b, _, c, d, *_ = np.frombuffer(bytes(side_data[SideData.DISPLAYMATRIX]), np.int32).tolist()
    except (KeyError, ValueError):
        return 1, 0, 0, 1
    return a, b, c, d


def _is_turned(matrix: tuple[int, int, int, int]) -> bool:
    a, b, c, d = matrix
    return abs(a) + abs(d) < abs(b) + abs(c)


def _upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """[H, W, 3] as it is to be shown: quarter turns and mirrors; a phone stores the frames of its sensor."""
    a, b, c, d = matrix
    if _is_turned(matrix):
        pixels, a, d = pixels.swapaxes(0, 1), c, b  # x' follows y, and y' follows x
    if a < 0:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if d < 0 else pixels


def _seekable(path: Path) -> BinaryIO:
    """The open file; a pipe, which can be read once only, as a copy. Raises InputError where it cannot be opened."""
    try:
        file = open(path, "rb")
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISREG(mode):
            return file
        with file:
            if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                raise InputError(f"{path}: is neither a file nor a pipe")
            return _copied(path, file)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error


def _copied(path: Path, pipe: BinaryIO) -> BinaryIO:
    """What comes through a pipe, as a temporary file. Raises InputError where it is too much or cannot be written."""
    try:
        copy = tempfile.TemporaryFile()
        try:
            while copy.tell() < MAX_PIPE_BYTES and (chunk := pipe.read(2**20)):
                copy.write(chunk)
            if copy.tell() >= MAX_PIPE_BYTES:
                raise InputError(f"{path}: has more than {MAX_PIPE_BYTES >> 30} GiB; cut it to what is learned")
            copy.flush()
        except BaseException:
            with suppress(OSError):  # it writes again what had no room
                copy.close()
            raise
        return copy
    except OSError as error:
        folder = tempfile.tempdir or "a temporary folder"
        advice = "make room there, set TMPDIR to another folder, or name a file"
        raise InputError(f"{path}: a pipe, cannot be copied to {folder} ({reason(error)}); {advice}") from error
