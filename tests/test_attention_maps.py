"""Where tokens are attended to, and its picture. What is recorded is tested in evaluate/test_experiments.py."""

import numpy as np
import torch
from PIL import Image

from minimti.attention_maps import AttentionMaps, heat_maps, write_attention
from minimti.motion import Motion
from minimti.pipeline import animate


def test_heat_maps_are_light_where_a_token_is_attended_to():
    weights = torch.zeros(3, 2 * 4, 2)  # frames, 2 rows of 4 positions, tokens
    weights[:, 3, 1] = 1  # the upper right position, the second token
    maps = heat_maps(weights, (64, 32))
    assert maps.shape == (2, 3, 32, 64) and maps[0].max() == 0
    assert (maps[1, :, :4, -4:] == 1).all() and maps[1, :, 24:].max() == 0 and maps[1, ..., :32].max() == 0


def test_the_branches_of_guidance_in_turn_give_the_same_attention(mini_svd):
    config = mini_svd.config
    tokens = torch.randn(config.num_frames + 1, 3, config.unet.context_dim)
    motion = Motion(tokens, config.num_frames, config.name, config.micro, config.size, steps=0, seed=0)
    found = []
    for memory in ("max", "low"):
        with AttentionMaps(mini_svd, config.num_frames) as maps:
            animate(mini_svd, motion, torch.zeros(1, 3, 32, 48), steps=1, memory=memory)
        found.append(maps.mean())
    assert torch.allclose(*found, atol=1e-5) and found[0].std() > 1e-3


def test_the_picture_has_a_row_for_the_video_and_one_for_each_token(tmp_path):
    """A token that the left half of the frame attends to is light on the left, and the other one on the right."""
    weights = torch.zeros(2, 64, 2)  # frames, 8 x 8 positions, tokens
    weights.view(2, 8, 8, 2)[:, :, :4, 0] = 1
    weights[..., 1] = 1 - weights[..., 0]
    write_attention(tmp_path / "a.png", torch.full((2, 3, 64, 64), 128, dtype=torch.uint8), weights)
    picture = np.array(Image.open(tmp_path / "a.png").convert("L")).astype(int)
    height, width = picture.shape
    assert height > 3 * 160 and width > 2 * 160
    assert abs(picture[40:180, [100, 270]] - 128).max() < 3  # the video itself
    for row, (left, right) in ((1, (True, False)), (2, (False, True))):
        y = 30 + row * 166 + 80
        assert (picture[y, 80 + 30] > 128) == left and (picture[y, 80 + 130] > 128) == right


def test_the_frame_is_seen_under_each_map(tmp_path):
    video = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    video[..., 32:] = 255
    write_attention(tmp_path / "a.png", video, torch.ones(1, 64, 1))
    picture = np.array(Image.open(tmp_path / "a.png").convert("L")).astype(int)
    dark, light = picture[30 + 166 + 80, [80 + 30, 80 + 130]]
    assert light - dark > 40
