"""Results beside the clips that their motions were learned from: one labelled video, and a page that plays all in step.

A row for each motion: the clip, then its results. All are shown at the times of their own frames.
"""

import base64
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from minimti.config import SVDConfig, printable
from minimti.io.decode import VideoFile
from minimti.io.files import InputError, atomic_write, check_target
from minimti.io.pictures import Pictures, find_pictures
from minimti.io.pixels import to_uint8
from minimti.io.write import check_frames, enlarged, gif_rate, write_clip, write_video
from minimti.motion import Motion
from minimti.page import FIGURE, MARK, PAGE
from minimti.results import Job, read_record, record_of
from minimti.run import read_learned

CELL_SIDE = 384  # pixels: the longer side of a video in a comparison, at most
COLUMNS = 6  # most videos in a row of the grid: longer rows go on below
GRID_SIDE = 3840  # pixels: the sides of the grid, at most
GRID_BYTES = 2**30  # bytes of its frames in memory, at most
MAX_LINES = 60  # rows of the grid, at most: cells are then 36 pixels high
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # Pillow's own has English letters only
BAR, GAP = 24, 4  # height of a label, and pixels between two videos


@dataclass(frozen=True)
class Cell:
    """A video of a comparison."""

    label: str
    video: Tensor  # uint8 [F, 3, h, w]
    fps: float
    is_clip: bool = False  # not a result but what it was learned from


def check_comparison(jobs: Sequence[Job], *inputs: str) -> None:
    """Raises InputError where the grid or the page would replace anything but those of an earlier comparison.

    Also where the grid would have more than MAX_LINES rows.
    """
    folder, suffix = jobs[0].path.parent, jobs[0].suffix
    path, page = folder / f"grid{suffix}", folder / "index.html"
    if path in [job.path for job in jobs]:
        raise InputError(f"{path}: is the name of the comparison; name the result otherwise as --out")
    (check_target if suffix else check_frames)(path, *inputs)
    check_target(page, *inputs)
    ours = page.is_file() and MARK in page.read_text(errors="replace")[:1000]
    for file, is_ours in ((page, ours), (path, ours and not record_of(path).exists())):
        if file.exists() and not is_ours:
            raise InputError(f"{file}: is there, and not by --compare; name another folder as --out")
    lines = sum(-(-(count + 1) // COLUMNS) for count in Counter(job.motion for job in jobs).values())  # with the clips
    if lines > MAX_LINES:
        raise InputError(f"--compare: {len(jobs)} results are too many for one picture; compare fewer at a time")


def write_comparison(folder: Path, suffix: str, rows: Sequence[Sequence[Cell]]) -> list[Path]:
    """Writes the grid, a video whose name ends in `suffix`, and index.html. Returns their paths.

    Raises InputError where they cannot be written.
    """
    paths = [folder / f"grid{suffix}", folder / "index.html"]
    with atomic_write(paths[1]) as part:  # first: a grid beside such a page is ours
        part.write_text(page(rows), encoding="utf-8", errors="backslashreplace")
    write_video(paths[0], *grid(rows))
    return paths


def result_cell(job: Job) -> Cell:
    """A result, read from its file or folder, small enough for a comparison."""
    made_from = read_record(job.record)["made from"]
    count, fps = made_from["frames"], made_from["fps"]
    pictures = find_pictures(job.path)
    opened: Any = nullcontext(Pictures(pictures, fps)) if pictures else VideoFile(job.path)
    shown: list[tuple[float, Tensor]] = []
    with opened as source:
        shown += ((time, small(source.pixels(frame))) for time, frame in source.frames(0.0))
    # A GIF has frames that are alike only once, and counts in hundredths of a second.
    rate = gif_rate(fps) if job.suffix == ".gif" else fps
    last = [sum(time <= (index + 0.5) / rate for time, _ in shown) - 1 for index in range(count)]
    return Cell(job.label, torch.stack([shown[index][1] for index in last]), fps)


def clip_cell(emb: str, motion: Motion, config: SVDConfig, name: str) -> Cell:
    """The clip that an embedding was learned from; `name` is that of the embedding in the label.

    Raises InputError as `read_learned` does.
    """
    frames = without_bars(to_uint8(read_learned(emb, motion, config).frames))
    fps = motion.playback_fps
    return Cell(f"{name}: the clip", torch.stack([small(frame) for frame in frames]), fps, is_clip=True)


def without_bars(frames: Tensor) -> Tensor:
    """[F, 3, H, W] without the bars of --fit pad: rows or columns that are black in all frames, equal on both sides."""
    bright = frames.amax(dim=(0, 1)) > 0  # [H, W]
    rows, columns = (bright.any(dim).nonzero()[:, 0].tolist() for dim in (1, 0))
    if not rows:
        return frames
    top, bottom = rows[0], frames.shape[-2] - 1 - rows[-1]
    left, right = columns[0], frames.shape[-1] - 1 - columns[-1]
    if left == right == 0 and abs(top - bottom) <= 1:
        return frames[..., top : frames.shape[-2] - bottom, :]
    if top == bottom == 0 and abs(left - right) <= 1:
        return frames[..., left : frames.shape[-1] - right]
    return frames


def small(frame: Tensor) -> Tensor:
    """uint8 [3, H, W], enlarged as a result is -> at most CELL_SIDE pixels long, both sides even."""
    frame = enlarged(frame)
    scale = CELL_SIDE / max(frame.shape[-2:])
    if scale < 1:
        frame = T.resize(frame, [max(2, round(scale * side)) for side in frame.shape[-2:]], antialias=True)
    return frame[:, : frame.shape[1] // 2 * 2, : frame.shape[2] // 2 * 2]


def grid(rows: Sequence[Sequence[Cell]]) -> tuple[Tensor, float]:
    """All cells as one video, uint8 [F, 3, H, W] with even sides, and its rate: that of the fastest, over the longest.

    Shorter videos rest on their last frame. Rows of more than COLUMNS cells go on below, in lines of equal length. The
    rate is lower where the whole would have more than GRID_BYTES.
    """
    lines = []
    for row in rows:
        length = -(-len(row) // -(-len(row) // COLUMNS))
        lines += [row[at : at + length] for at in range(0, len(row), length)]
    cells = [cell for line in lines for cell in line]
    fps, seconds = max(cell.fps for cell in cells), max(len(cell.video) / cell.fps for cell in cells)
    width, height = max(cell.video.shape[-1] for cell in cells), max(cell.video.shape[-2] for cell in cells)
    columns = max(map(len, lines))
    scale = min(1.0, (GRID_SIDE / columns - GAP) / width, (GRID_SIDE / len(lines) - GAP - BAR) / height)
    width, height = round(scale * width), round(scale * height)
    across, down = width + GAP, height + BAR + GAP
    shape = [3, (down * len(lines) + 1) // 2 * 2, (across * columns + 1) // 2 * 2]
    most = GRID_BYTES // math.prod(shape)
    if round(seconds * fps) > most:
        fps = most / seconds
    count = round(seconds * fps)
    whole = torch.full([count, *shape], 255, dtype=torch.uint8)
    for y, line in enumerate(lines):
        for x, cell in enumerate(line):
            index = [min(int(i / fps * cell.fps + 1e-6), len(cell.video) - 1) for i in range(count)]
            sides = [round(scale * side) for side in cell.video.shape[-2:]]
            video = cell.video if scale == 1 else T.resize(cell.video, sides)
            left = x * across + (width - video.shape[-1]) // 2
            top = y * down + BAR + (height - video.shape[-2]) // 2
            whole[:, :, top : top + video.shape[-2], left : left + video.shape[-1]] = video[index]
            whole[:, :, y * down : y * down + BAR, x * across : x * across + width] = bar(cell.label, width)
    return whole, fps


def bar(text: str, width: int) -> Tensor:
    """uint8 [3, BAR, width]: a line of text on white, cut short with dots where it is too long."""
    text = printable(text)
    image = Image.new("RGB", (width, BAR), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(FONT, 14)
    shown, length = text, len(text)
    while length > 1 and draw.textlength(shown, font=font) > width - 4:
        length -= 1
        shown = text[:length] + "..."
    draw.text((width / 2, BAR / 2), shown, fill="black", font=font, anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, BAR, width]


def page(rows: Sequence[Sequence[Cell]]) -> str:
    """A web page that plays all cells in step. The videos are in it: it needs no other file and no network."""
    sections = []
    for row in rows:
        figures = "\n".join(
            FIGURE.format(kind="clip" if cell.is_clip else "result", video=_mp4(cell), label=escape(cell.label))
            for cell in row
        )
        sections.append(f"<section>\n{figures}\n</section>")
    cells = [cell for row in rows for cell in row]
    seconds, fps = max(len(cell.video) / cell.fps for cell in cells), max(cell.fps for cell in cells)
    return PAGE.format(mark=MARK, sections="\n".join(sections), seconds=repr(seconds), fps=repr(float(fps)))


def _mp4(cell: Cell) -> str:
    """An mp4 in base64."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cell.mp4"
        write_clip(path, cell.video, cell.fps)
        return base64.b64encode(path.read_bytes()).decode()
