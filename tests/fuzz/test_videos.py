"""Damaged videos: every outcome is frames or one clear line, in bounded time and memory.

MINIMTI_FUZZ_SECONDS  how long (default: 30)
MINIMTI_FUZZ_SEED     which mutations (default: 0)
"""

import json
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from minimti.config import MODELS
from minimti.io.files import InputError
from minimti.io.video import read_clip

pytestmark = pytest.mark.fuzz

SECONDS = float(os.environ.get("MINIMTI_FUZZ_SECONDS", "30"))
SEED = int(os.environ.get("MINIMTI_FUZZ_SEED", "0"))
BATCH = 40  # files for one process
HANG = 20  # seconds for one file
MEMORY = 2**30  # bytes above those of the program itself
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 10**6, 65536]
FORMATS = {  # name: codec and pixels
    "a.mp4": ("libx264", "yuv420p"),
    "b.mp4": ("mpeg4", "yuv420p"),
    "a.ts": ("libx264", "yuv420p"),
    "b.ts": ("mpeg2video", "yuv420p"),
    "a.avi": ("mpeg4", "yuv420p"),
    "b.avi": ("libx264", "yuv420p"),
    "a.gif": ("gif", "rgb8"),
    "a.apng": ("apng", "rgba"),
    "a.webm": ("libvpx-vp9", "yuv420p"),
    "a.mkv": ("libx264", "yuv420p"),
    "a.h264": ("libx264", "yuv420p"),
    "a.flv": ("flv", "yuv420p"),
    "a.mjpeg": ("mjpeg", "yuvj420p"),
    "a.mpg": ("mpeg1video", "yuv420p"),
}
OPTIONS = [
    {},
    {"num_frames": 4, "start": 0.5},
    {"num_frames": 3, "stride": 2, "start": 0.3},
    {"num_frames": 3, "end": 1.0},
    {"num_frames": 5, "sample_fps": 10.0, "how": "pad"},
]


def corpus(folder: Path) -> dict[str, bytes]:
    """Small films that are whole, one of each kind, and an animated WebP."""
    from PIL import Image

    numbers = np.random.default_rng(SEED)
    noise = numbers.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pictures = [np.roll(noise, 3 * k, axis=1) for k in range(16)]
    files = {}
    for name, (codec, pixels) in FORMATS.items():
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=25 if name != "a.gif" else 20)
            stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        files[name] = (folder / name).read_bytes()
    frames = [Image.fromarray(picture) for picture in pictures]
    frames[0].save(folder / "a.webp", save_all=True, append_images=frames[1:], duration=40)
    return files | {"a.webp": (folder / "a.webp").read_bytes()}


def mutated(content: bytes, others: list[bytes], draw: random.Random) -> tuple[str, bytes]:
    """The kind of the mutation, and a damaged file."""
    data = bytearray(content)
    kind = draw.choice(["flip", "field", "cut", "drop", "mix", "header", "zero", "repeat"])
    at = draw.randrange(len(data))
    if kind == "flip":
        for _ in range(draw.choice([1, 2, 8, 64])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind in ("field", "header"):  # numbers of headers are in the first and the last part
        for _ in range(draw.choice([1, 1, 2, 4])):
            size, order = draw.choice([1, 2, 4]), draw.choice(["big", "little"])
            at = draw.randrange(min(len(data), 400)) if kind == "header" else draw.randrange(len(data))
            value = draw.choice([*INTERESTING, draw.randrange(2**32)]) % 256**size
            data[at : at + size] = value.to_bytes(size, order)
    elif kind == "cut":
        del data[at:]
    elif kind == "drop":
        del data[at : at + draw.choice([1, 4, 100, 1000])]
    elif kind == "mix":
        other = draw.choice(others)
        data[at:] = other[draw.randrange(len(other)) :]
    elif kind == "zero":
        data[at : at + draw.choice([8, 100, 1000])] = bytes(draw.choice([8, 100, 1000]))
    else:
        data[at:at] = data[at : at + draw.choice([4, 100, 1000])] * draw.choice([1, 3, 50])
    return kind, bytes(data)


def outcome(path: Path, options: dict) -> str:
    try:
        clip = read_clip(path, MODELS["tiny"], **options)
    except InputError as error:
        line = str(error)
        return "refused" if "\n" not in line and str(path) in line else f"not one line: {line!r}"
    good = clip.frames.isfinite().all() and clip.frames.abs().max() <= 1 and clip.fps > 0 and clip.about()
    return "frames" if good else "frames that are none"


Job = tuple[Path, dict]


def child(jobs: list[Job], report: int) -> None:
    """Reads files, and writes each one's outcome and the peak of memory so far to a pipe, a line each."""
    warnings.simplefilter("ignore")
    for path, options in jobs:
        try:
            text = outcome(path, options)
        except BaseException:
            text = traceback.format_exc()[-2000:]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(report, json.dumps([text, peak]).encode() + b"\n")
    os._exit(0)


def outcomes(jobs: list[Job]) -> list[tuple[str, int]]:
    """Outcomes and peaks of memory, from other processes: a crash or a hang ends one of those alone."""
    found: list[tuple[str, int]] = []
    while len(found) < len(jobs):
        receive, report = os.pipe()
        if (process := os.fork()) == 0:
            child(jobs[len(found) :], report)
        os.close(report)
        with open(receive, "rb", buffering=0) as pipe:
            while ready := select.select([pipe], [], [], HANG)[0]:
                if not (line := pipe.readline()):
                    break
                found.append(tuple(json.loads(line)))
        os.kill(process, signal.SIGKILL)  # it may have ended by itself
        os.waitpid(process, 0)
        if len(found) < len(jobs):
            found.append(("crash" if ready else "hang", 0))
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="files are read in processes of their own")
def test_damaged_videos_are_frames_or_one_line(tmp_path):
    files = corpus(tmp_path)
    for name in files:  # whole ones are read
        assert outcome(tmp_path / name, {}) == "frames", name
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = Path(os.environ.get("MINIMTI_FUZZ_KEEP", tmp_path / "kept"))
    kept.mkdir(exist_ok=True)
    draw, counts, faults = random.Random(SEED), Counter(), []
    began, number, largest = time.monotonic(), 0, 0
    while time.monotonic() - began < SECONDS:
        jobs, kinds = [], []
        for slot in range(BATCH):
            name = draw.choice(list(files))
            kind, content = mutated(files[name], list(files.values()), draw)
            path = tmp_path / f"{slot}{Path(name).suffix}"
            path.write_bytes(content)
            jobs.append((path, draw.choice(OPTIONS)))
            kinds.append(f"{kind}_{name}")
        for (path, options), kind, (text, peak) in zip(jobs, kinds, outcomes(jobs)):
            largest = max(largest, peak - base)
            if peak - base > MEMORY:
                text = f"{(peak - base) / 2**20:.0f} MiB"
            if text not in ("frames", "refused"):
                faults.append(f"{number} {kind} {options}: {text}")
                (kept / f"{SEED}_{number}_{kind}").write_bytes(path.read_bytes())
            counts[text if text in ("frames", "refused") else "fault"] += 1
            number += 1
    print(f"{number} files, seed {SEED}: {dict(counts)}, at most {largest / 2**20:.0f} MiB", file=sys.stderr)
    assert not faults, "\n".join(faults[:20])
    assert counts["frames"] > number / 20 and counts["refused"] > number / 20  # neither is trivial
