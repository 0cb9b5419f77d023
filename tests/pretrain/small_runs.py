"""A pre-training that takes seconds: smaller networks, two steps of each stage, small batches."""

from dataclasses import replace

from minimti.config import MODELS
from minimti.pretrain.run import DEFAULT

TINY = MODELS["tiny"]
SMALLER = replace(
    TINY,
    size=(48, 48),
    num_frames=8,
    num_steps=2,
    unet=replace(TINY.unet, model_channels=16, num_head_channels=16),
    vae=replace(TINY.vae, ch=8),
    image_encoder=replace(TINY.image_encoder, image_size=48, patch_size=16, width=32, layers=1),
)
FEW = 1e-6  # scale: two steps of each stage, one chunk of each kind of clips
SHORT = replace(
    DEFAULT,
    chunk=2,
    measured=2,
    normalised=2,
    shown=2,
    stages=tuple(replace(stage, batch=min(stage.batch, 4)) for stage in DEFAULT.stages),
)
