"""Pictures of the experiments."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimti.config import SVDConfig
from minimti.io import video
from minimti.io.files import atomic_write
from minimti.pretrain.stages import pixels

ROWS = 3  # motions in a picture of clips


def write_rows(path: Path, clips: Sequence[np.ndarray]) -> None:
    """Clips uint8 [F, 3, H, W], a row each."""
    video.write_strip(path, torch.stack([pixels(clip) for clip in clips]))


def heat(maps: Tensor, config: SVDConfig) -> np.ndarray:
    """Attention of the places of each frame to each token [F, L, N] -> clips uint8 [N, F, 3, H, W], light for much."""
    width, height = config.size
    cell = math.isqrt(width * height // maps.shape[1])
    grid = maps.permute(2, 0, 1).unflatten(-1, (height // cell, width // cell))
    grid = F.interpolate(grid, (height, width), mode="bilinear")
    return (255 * grid).byte().numpy()[:, :, None].repeat(3, axis=2)


def write_curves(path: Path, steps: Sequence[int], curves: dict[str, Sequence[float]]) -> None:
    """Errors against steps."""
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
