"""Makes the README's picture:  python examples/transfer.py

Learns the motion of each clip in this folder and applies it to each image, with the embedded model.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import minimti
from minimti.io.pixels import to_uint8

HERE = Path(__file__).parent
CLIPS = ("dive", "wheelie", "breathe")
IMAGES = ("rocket", "boat", "mouse")
SIDE, GAP = 144, 6  # pixels of a video in the picture, and between two


def enlarged(video: torch.Tensor) -> torch.Tensor:
    """uint8 [F, 3, H, W] -> uint8 [F, 3, SIDE + GAP, SIDE + GAP] with a white margin at right and bottom."""
    large = F.interpolate(video.float(), (SIDE, SIDE), mode="bicubic").clamp(0, 255)
    return F.pad(large, (0, GAP, 0, GAP), value=255).byte()


def main() -> None:
    svd = minimti.load("tiny")
    images = [minimti.read_image(HERE / f"{name}.png", svd.config) for name in IMAGES]
    rows = []
    for name in CLIPS:
        clip = minimti.read_clip(HERE / f"{name}.mp4", svd.config)
        motion = minimti.learn(svd, clip)
        videos = [to_uint8(clip.frames), *(minimti.animate(svd, motion, image) for image in images)]
        rows.append(torch.cat([enlarged(video) for video in videos], dim=3))
    frames = torch.cat(rows, dim=2).permute(0, 2, 3, 1).numpy()  # [F, height, width, 3]
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(HERE / "transfer.gif", save_all=True, append_images=others, duration=1000 // 7, loop=0)


if __name__ == "__main__":
    main()
