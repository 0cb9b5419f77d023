"""Seconds of whole train.py and sample.py processes, cold and warm, on a full-size weight file of random numbers."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import minimti
from minimti.bench.measure import free
from minimti.bench.report import NotMeasurable
from minimti.checkpoint.key_maps import official_source
from minimti.checkpoint.load import sources
from minimti.config import RECIPES, SVDConfig, to_json
from minimti.invert import FETCH_EVERY, make_recipe
from minimti.io.files import InputError
from minimti.io.pixels import to_uint8
from minimti.io.write import write_clip, write_strip
from minimti.svd import SVD

ROOT = Path(minimti.__file__).resolve().parents[1]  # the checkout: a wheel has neither program
BAR = re.compile(r"([^\r\n:|]+):\s+(?:\d+%\|[^|\r\n]*\|\s+)?(\d+)/(\d+) \[")  # a bar, or a line of a log


def check_programs() -> None:
    """Raises InputError where the two programs are not beside the package."""
    if not ((ROOT / "train.py").is_file() and (ROOT / "sample.py").is_file()):
        raise InputError(f"--processes needs train.py and sample.py, which are not in {ROOT}: run it in a checkout")


# ---------------------------------------------------------------------------------------------- inputs


def write_weights(path: Path, config: SVDConfig, device: str) -> None:
    """A file in the official layout with random numbers in half precision: 4.5 GB for svd.

    Activations neither vanish nor explode under them. `device` makes the numbers.
    """
    with torch.device("meta"):
        wanted = sources(SVD(config), official_source, config)
    generator = torch.Generator(device).manual_seed(0)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        r = torch.randn(shape, generator=generator, device=device)
        if len(shape) > 1:
            r /= torch.Size(shape[1:]).numel() ** 0.5
        elif not name.endswith("mix_factor"):
            r = 0.1 * r + name.endswith("weight")  # a norm's around 1, a bias around 0
        return r.half().cpu()

    tensors = {name: weight(name, source.shape) for source in wanted.values() for name in source.names}
    save_file(tensors, path, {"config": to_json(config)})


def write_inputs(clip: Path, images: Sequence[Path], config: SVDConfig) -> None:
    """A clip of noise that moves, and pictures of noise, in the model's size."""
    generator, (width, height) = torch.Generator().manual_seed(0), config.size
    coarse = torch.rand(len(images), 3, height // 8, width // 8, generator=generator) * 2 - 1
    pictures = F.interpolate(coarse, size=(height, width), mode="bilinear")  # [images, 3, H, W] in [-1,1]
    frames = torch.stack([pictures[0].roll(8 * i, dims=-1) for i in range(config.num_frames)])  # [F, 3, H, W]
    write_clip(clip, to_uint8(frames), fps=7)
    for path, picture in zip(images, pictures):
        write_strip(path, picture[None, None])


def evict(path: Path) -> None:
    """Drops a file from the system's cache, so that the next process reads it from the disk (Linux)."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file, suppress(OSError):
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------------------------------------- running


class Event(NamedTuple):
    """A line or a state of a progress bar that a process printed."""

    seconds: float  # after its start
    label: str  # the bar's, or the first word of the line
    step: int = 0  # a bar's
    steps: int = 0


def watch(command: list[str], environment: Mapping[str, str]) -> tuple[float, list[Event]]:
    """Runs a process to its end: its seconds and what it printed. Raises RuntimeError where it fails.

    An exception on the way, such as the end of the budget, ends the process too.
    """
    shown = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1"}  # every step, when it is done
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**environment, **shown}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert process.stdout is not None
        events, last = [], ""
        for text in _pieces(process.stdout.fileno()):
            seconds = time.monotonic() - began
            last = text.strip() or last
            if bar := BAR.search(text):
                events.append(Event(seconds, bar[1].strip(), int(bar[2]), int(bar[3])))
            elif words := text.split():
                events.append(Event(seconds, words[0]))
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    seconds = time.monotonic() - began
    if code:
        raise RuntimeError(f"{Path(command[1]).name} ended with {code}: {last}")
    return seconds, events


def _pieces(descriptor: int) -> Iterator[str]:
    """What comes through a pipe: lines, and states of bars, each as soon as it is there.

    A state of a bar begins with a carriage return and ends with a bracket. The next return may be a step away.
    """
    rest = b""
    while chunk := os.read(descriptor, 2**16):
        *pieces, rest = re.split(rb"[\r\n]", rest + chunk)
        if rest.rstrip().endswith(b"]"):
            pieces, rest = [*pieces, rest], b""
        for piece in pieces:
            yield piece.decode(errors="replace")
    yield rest.decode(errors="replace")


# ---------------------------------------------------------------------------------------------- the two programs


class Programs:
    """Runs the two programs on one set of inputs in a folder, with compilers' caches of its own.

    The order is train_cold, sample_cold, train_warm, sample_warm; samples take the embedding that training wrote.
    """

    def __init__(self, folder: Path, config: SVDConfig, device: str, steps: int = 40, views: int = 8, images: int = 2):
        self.folder, self.config, self.device = folder, config, device
        self.steps, self.views = steps, views
        self.weights, self.embedding = folder / "svd.safetensors", folder / "m.pt"
        self.clip, self.images = folder / "clip.mp4", [folder / f"image{index}.png" for index in range(images)]
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "cache"}
        self.environment = {**os.environ, **{name: str(folder / path) for name, path in caches.items()}}

    def write(self) -> dict[str, float]:
        """Writes what the programs read. Returns the seconds, and the size of the weights in GB."""
        began = time.monotonic()
        write_weights(self.weights, self.config, self.device)
        free(self.device)  # for the programs
        write_inputs(self.clip, self.images, self.config)
        return {"wall": time.monotonic() - began, "GB": self.weights.stat().st_size / 1e9}

    def train(self, cold: bool) -> dict[str, float]:
        """Seconds of train.py with its defaults but for few steps and views.

        The first step, and whole inversions by each recipe, are computed from the seconds of a step and of a view.
        Raises NotMeasurable where `write` has not written what it reads.
        """
        options = ["--steps", str(self.steps), "--cache", str(self.views), "--out", str(self.embedding)]
        wall, events = self._run(cold, "train.py", str(self.clip), *options)
        times = {(event.label, event.step): event.seconds for event in reversed(events)}
        known = min(FETCH_EVERY, self.steps - 1)  # on a GPU earlier steps appear together with this one
        step = (times["inversion", self.steps] - times["inversion", known]) / (self.steps - known)
        view = (times["encoding", self.views] - times["encoding", 1]) / (self.views - 1)
        first = times["inversion", known] - (known - 1) * step - (self.views - 1) * view
        found = {"wall": wall, "loaded": times["model", 0], "view": view, "step": step}
        found["first step with one view (computed)"] = first
        for name in RECIPES:
            recipe = make_recipe(self.config, name)
            more = (recipe.steps - self.steps) * step + (recipe.num_cached_views - self.views) * view
            found[f"inversion by {name} (computed)"] = wall + more
        return found

    def sample(self, cold: bool) -> dict[str, float]:
        """Seconds of sample.py with its defaults on all pictures: until the first video, and for each further one.

        Raises NotMeasurable where `write` or `train` has not written what it reads.
        """
        if not self.embedding.is_file():
            raise NotMeasurable("needs 'write', then 'train_cold' or 'train_warm', first")
        out = str(self.folder / "videos")
        wall, events = self._run(cold, "sample.py", "--emb", str(self.embedding), *map(str, self.images), "--out", out)
        videos = [event.seconds for event in events if event.label == "video"]
        return {"wall": wall, "first video": videos[0], "next video": (videos[-1] - videos[0]) / (len(videos) - 1)}

    def _run(self, cold: bool, program: str, *arguments: str) -> tuple[float, list[Event]]:
        if not self.images[-1].is_file():  # the last file that `write` writes
            raise NotMeasurable("needs 'write' first")
        if cold:
            evict(self.weights)
        common = ["--model", str(self.weights), "--device", self.device]
        return watch([sys.executable, str(ROOT / program), *arguments, *common], self.environment)
