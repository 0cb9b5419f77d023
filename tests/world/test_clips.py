"""The distributions of clips."""

from dataclasses import replace

import numpy as np
import torch

from minimti.config import MODELS
from minimti.world.clips import captioned_scene, first_frame, habitual_scene, pixels
from minimti.world.scene import CAMERA_WORDS, Scene, Wave, render
from minimti.world.shapes import SHAPES

TINY = replace(MODELS["tiny"], size=(96, 64), num_frames=16)


def drawn(scene_of, count: int) -> list[Scene]:
    rng = np.random.default_rng(0)
    return [scene_of(rng, TINY) for _ in range(count)]


def test_some_captioned_scenes_have_two_sprites_and_some_a_moving_camera():
    scenes = drawn(captioned_scene, 1000)
    assert {(scene.size, scene.num_frames, len(scene.program)) for scene in scenes} == {((64, 96), 16, 7)}
    assert 0.16 < np.mean([len(scene.sprites) == 2 for scene in scenes]) < 0.24
    # 30 % may have camera words, and few of those programs have none.
    assert 0.22 < np.mean([bool(set(scene.program) & set(CAMERA_WORDS)) for scene in scenes]) < 0.32
    assert {scene.sprites[0].shape for scene in scenes} == set(SHAPES)


def test_the_shape_of_a_habitual_scene_determines_its_motion():
    scenes = drawn(habitual_scene, 100)
    motions = {scene.sprites[0].shape: (scene.program, scene.sprites[0].wave) for scene in scenes}
    assert all(motions[scene.sprites[0].shape] == (scene.program, scene.sprites[0].wave) for scene in scenes)
    assert motions.keys() == set(SHAPES) and {len(scene.sprites) for scene in scenes} == {1}
    assert motions["fish"] == (("forward",) * 7, Wave(0.12, 6))
    assert motions["car"] == (("forward",) * 4 + ("still",) * 2 + ("backward",), None)


def test_the_first_frame_is_that_of_the_clip():
    for scene in drawn(captioned_scene, 40) + drawn(habitual_scene, 20):
        assert np.array_equal(first_frame(scene), render(scene)[0])


def test_pixels_of_0_and_255_are_the_bounds_of_the_domain():
    values = pixels(np.array([[0, 51, 255]], np.uint8))
    assert torch.allclose(values, torch.tensor([[-1.0, -0.6, 1.0]])) and values.dtype == torch.float32
