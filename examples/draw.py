"""Draws the clips and images of this folder:  python examples/draw.py"""

from pathlib import Path

import numpy as np
from PIL import Image

from minimti.io import video
from minimti.pretrain.stages import first_frame, pixels
from minimti.world.scene import random_scene, render

HERE = Path(__file__).parent
SIZE = 256
CLIPS = {
    "dive": ("fish", ("forward", "forward", "down", "down", "forward", "up", "up")),
    "wheelie": ("car", ("turn", "turn", "turn", "forward", "forward", "turn", "turn")),
    "breathe": ("airship", ("grow", "grow", "shrink", "shrink", "up", "up", "grow")),
}
IMAGES = ("rocket", "boat", "mouse")


def main() -> None:
    for seed, (name, (shape, program)) in enumerate(CLIPS.items()):
        scene = random_scene(np.random.default_rng(seed), SIZE, program=program, shapes=(shape,))
        video.write_clip(HERE / f"{name}.mp4", pixels(render(scene)), fps=7)
    for seed, shape in enumerate(IMAGES):
        # Room to move: placed as for the first clip's motion.
        _, program = CLIPS["dive"]
        scene = random_scene(np.random.default_rng(100 + seed), SIZE, program=program, shapes=(shape,))
        Image.fromarray(first_frame(scene).transpose(1, 2, 0)).save(HERE / f"{shape}.png")


if __name__ == "__main__":
    main()
