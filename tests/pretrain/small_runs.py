"""A pre-training that takes seconds: smaller networks, two steps of each stage, small batches."""

from dataclasses import replace

from minimti.pretrain.state import DEFAULT

FEW = 1e-6  # scale: two steps of each stage, one chunk of each kind of clips
SHORT = replace(
    DEFAULT,
    chunk=2,
    measured=2,
    normalised=2,
    shown=2,
    stages=tuple(replace(stage, batch=min(stage.batch, 4)) for stage in DEFAULT.stages),
)
