"""One random spatial and colour change for all frames of a clip (paper B.2)."""

import math

import torch
from torch import Tensor

# The paper names the kinds of change; their strengths are ours.
AREA = (0.7, 1.0)  # share of the picture that a crop keeps
CONTRAST = (0.8, 1.2)
BRIGHTNESS = (-0.15, 0.15)  # added, in [-1,1] units
SATURATION = (0.8, 1.2)
HUE = (-0.05, 0.05)  # in full turns


def augment(clip: Tensor, generator: torch.Generator, flip: bool, crop: bool) -> Tensor:
    """[F, 3, H, W] in [-1,1] -> the same shape and domain.

    Every frame gets the same crop, mirroring, contrast, brightness, saturation and hue. `flip` allows mirroring: half
    of the results are then mirrored. It must be off for a motion with a left and a right, such as a camera pan.
    `crop` allows crops. They enlarge a motion and move its course.
    """
    from torchvision.transforms.v2 import functional as T  # here because it is slow to import

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    height, width = clip.shape[-2:]
    side = math.sqrt(uniform(*AREA)) if crop else 1.0
    h, w = round(side * height), round(side * width)
    top, left = round(uniform(0, height - h)), round(uniform(0, width - w))
    mirror = uniform(0, 1) < 0.5

    clip = T.resized_crop(clip, top, left, h, w, [height, width])
    if flip and mirror:
        clip = T.horizontal_flip(clip)
    # Contrast about mid-grey. torchvision's adjust_contrast takes each frame's own mean, which would flicker.
    clip = (clip * uniform(*CONTRAST) + uniform(*BRIGHTNESS)).clamp(-1, 1)
    clip = T.adjust_saturation((clip + 1) / 2, uniform(*SATURATION))  # torchvision's domain is [0,1]
    clip = T.adjust_hue(clip, uniform(*HUE))
    return clip * 2 - 1
