"""The embedded model can do what weights/tiny/README.md says."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimti.checkpoint.find import WEIGHTS
from minimti.evaluate.evaluation import Evaluation, Settings, clip_error
from minimti.io.pixels import to_uint8
from minimti.world import captions
from minimti.world.clips import first_frame, pixels
from minimti.world.scene import random_scene, render
from minimti.world.tracker import facing


@pytest.mark.full
def test_a_motion_is_transferred_by_the_embedded_weights(tiny, tmp_path):
    """A long way up, one of the motions that these weights transfer well."""
    words = captions.load(WEIGHTS / "tiny" / "words.safetensors")
    evaluation = Evaluation(tiny, words, 0, Settings(motions=6), tmp_path)
    upwards = [*evaluation.cases.values()][5]
    errors = evaluation.errors(upwards, evaluation.learn(upwards))
    print(*(f"{error:.2f}" for error in errors))
    assert np.mean(errors) < 0.5


@torch.no_grad()
def test_the_embedded_autoencoder_keeps_motion_and_heading(tiny):
    """What is tracked in a clip that went through it is what was drawn."""
    for seed in range(4):
        scene = random_scene(np.random.default_rng(seed))
        clip = pixels(render(scene))[None]
        out = tiny.decode(tiny.encode(clip)).clamp(-1, 1)
        again = to_uint8(out[0]).numpy()
        assert clip_error(again, scene) < 0.1
        assert facing(again, scene) > 0.9
        assert -10 * ((out - clip) / 2).square().mean().log10() > 26  # dB


@torch.no_grad()
def test_the_embedded_latents_move_as_pictures_do(tiny):
    """By half a cell: of what changes, all but a small part is a shift."""
    scenes = [random_scene(np.random.default_rng(seed)) for seed in range(16)]
    frames = pixels(np.stack([first_frame(scene) for scene in scenes]))
    before, after = (tiny.encode(x[:, None])[:, 0] for x in (frames, shifted(frames).clamp(-1, 1)))
    inside = slice(2, -2)
    other, all_of_it = ((after - x)[..., inside, inside].square().mean() for x in (shifted(before), before))
    assert other < 0.15 * all_of_it


def shifted(pictures: Tensor) -> Tensor:
    """[B, C, H, W] moved sideways by 1/32 of the width: half a latent cell, two pixels."""
    half_a_cell = torch.tensor([[1, 0, 2 / 32], [0, 1, 0.0]]).expand(len(pictures), -1, -1)
    grid = F.affine_grid(half_a_cell, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, "bicubic", padding_mode="reflection", align_corners=False)
