"""Motion-textual inversion on a from-scratch Stable Video Diffusion; README.md has the map."""

__version__ = "0.1.0"
