"""Pictures of the experiments."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from minimti.io import write
from minimti.io.files import atomic_write
from minimti.world.clips import pixels

MOTIONS = 3  # in a picture of clips


def write_rows(path: Path, clips: Sequence[np.ndarray]) -> None:
    """Writes clips uint8 [F, 3, H, W] as one PNG: a row for each clip, time to the right."""
    write.write_strip(path, torch.stack([pixels(clip) for clip in clips]))


def write_curves(path: Path, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
    """Writes a plot of motion errors against steps as a PNG, a line for each named curve."""
    from matplotlib.figure import Figure  # slow to import, and only this picture needs it

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for name, errors in curves.items():
        axes.plot(steps, errors, marker="o", label=name)
    axes.axhline(1, color="grey", linestyle=":", label="standing still")
    axes.set(xlabel="steps of the inversion", ylabel="motion error", ylim=(0, None))
    axes.legend(frameon=False)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150)
