"""Motion-textual inversion on a from-scratch Stable Video Diffusion. README.md maps the paper to the code.

    svd = minimti.load("tiny")
    clip = minimti.read_clip("ref.mp4", svd.config)
    motion = minimti.learn(svd, clip)
    video = minimti.animate(svd, motion, minimti.read_image("img.png", svd.config))
    minimti.write_clip("img.mp4", video, fps=7)

Names are resolved when they are first used (PEP 562), so that `import minimti` alone imports no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimti.invert import Recipe, make_recipe
    from minimti.io.files import InputError
    from minimti.io.image import read_image
    from minimti.io.video import Clip, read_clip
    from minimti.io.write import write_clip
    from minimti.motion import Motion
    from minimti.pipeline import Progress, animate, learn, load

__version__ = "0.5.1"

_HOMES = {
    "Clip": "io.video",
    "InputError": "io.files",
    "Motion": "motion",
    "Progress": "pipeline",
    "Recipe": "invert",
    "animate": "pipeline",
    "learn": "pipeline",
    "load": "pipeline",
    "make_recipe": "invert",
    "read_clip": "io.video",
    "read_image": "io.image",
    "write_clip": "io.write",
}
__all__ = [
    "Clip",
    "InputError",
    "Motion",
    "Progress",
    "Recipe",
    "animate",
    "learn",
    "load",
    "make_recipe",
    "read_clip",
    "read_image",
    "write_clip",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minimti' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minimti.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
