"""Draws the clips and images of this folder:  python examples/draw.py"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minimti.io import write
from minimti.world.clips import first_frame
from minimti.world.scene import random_scene, render

HERE = Path(__file__).parent
SIZE = 256  # pixels
CLIPS = {
    "dive": ("fish", ("forward", "forward", "down", "down", "forward", "up", "up")),
    "wheelie": ("car", ("turn", "turn", "turn", "forward", "forward", "turn", "turn")),
    "breathe": ("airship", ("grow", "grow", "shrink", "shrink", "up", "up", "grow")),
}
IMAGES = ("rocket", "boat", "mouse")


def main() -> None:
    """Draw all of them."""
    for seed, (name, (shape, program)) in enumerate(CLIPS.items()):
        scene = random_scene(np.random.default_rng(seed), SIZE, program=program, shapes=(shape,))
        write.write_clip(HERE / f"{name}.mp4", torch.from_numpy(render(scene)), fps=7)
    for seed, shape in enumerate(IMAGES):
        # Sprites start where the motion of the first clip stays inside the picture.
        _, program = CLIPS["dive"]
        scene = random_scene(np.random.default_rng(100 + seed), SIZE, program=program, shapes=(shape,))
        Image.fromarray(first_frame(scene).transpose(1, 2, 0)).save(HERE / f"{shape}.png")


if __name__ == "__main__":
    main()
