"""The small files of tests/cases, each of which stands for a kind that was read wrongly once."""

from pathlib import Path

import pytest
import torch
from footage import counted

from minimti.config import MODELS
from minimti.io.files import InputError
from minimti.io.pixels import to_uint8
from minimti.io.video import read_clip

CASES = Path(__file__).parents[1] / "cases"
TINY = MODELS["tiny"]
RED, GREEN, YELLOW, BLUE = (220, 30, 30), (30, 200, 30), (230, 230, 40), (40, 40, 220)


def near(pixel: torch.Tensor, colour: tuple[int, int, int], tolerance: int = 6) -> bool:
    return max(abs(a - b) for a, b in zip(pixel.tolist(), colour)) <= tolerance


COUNTERS = ("counter_reference.mp4", "counter.ts", "counter_h264.avi", "counter.h264")


@pytest.mark.parametrize("name", COUNTERS)
def test_a_seek_lands_where_it_should_in_every_container(name):
    clip = read_clip(CASES / name, TINY, num_frames=3, start=1.5, sample_fps=10)
    assert counted(clip.frames) == [15, 16, 17] and clip.times == pytest.approx([1.5, 1.6, 1.7])
    clip = read_clip(CASES / name, TINY, num_frames=3, start=2, stride=4)
    assert counted(clip.frames) == [20, 24, 28] and clip.fps == pytest.approx(2.5)
    assert clip.source_fps == pytest.approx(10)
    assert counted(read_clip(CASES / name, TINY).frames) == [10 * k // 7 for k in range(14)]


def test_a_cover_picture_is_not_the_film():
    assert counted(read_clip(CASES / "cover_art_first.mp4", TINY, num_frames=3, sample_fps=10).frames) == [0, 1, 2]


def test_a_frame_is_held_over_a_hole():
    clip = read_clip(CASES / "vfr_hole.mp4", TINY, num_frames=8, start=0.8, sample_fps=5)
    assert counted(clip.frames) == [8, 9, 9, 9, 9, 9, 20, 22]


def test_a_damaged_packet_is_skipped_with_a_note():
    clip = read_clip(CASES / "zeroed_packet_h264.mp4", TINY, num_frames=8, start=1.2, sample_fps=10)
    assert counted(clip.frames) == [12, 13, 14, 15, 16, 17, 18, 19]
    clip = read_clip(CASES / "zeroed_packet_h264.mp4", TINY, num_frames=12, sample_fps=10)
    assert counted(clip.frames)[:5] == [0, 1, 2, 3, 4] and clip.notes == ("1 damaged packet was skipped",)
    with pytest.warns(UserWarning, match="only 39 frames of the file make up these 400"):  # it is read twice
        clip = read_clip(CASES / "zeroed_packet_h264.mp4", TINY, num_frames=400)
    assert len(clip.notes) == 2 and clip.notes[1] == "1 damaged packet was skipped"


@pytest.mark.parametrize(
    "name, corners",
    [("hflip", (GREEN, RED, YELLOW, BLUE)), ("vflip", (BLUE, YELLOW, RED, GREEN))],
)
def test_a_mirrored_clip_is_mirrored(name, corners):
    picture = to_uint8(read_clip(CASES / f"mirror_matrix_{name}.mp4", TINY, num_frames=1, size=(96, 64)).frames[0])
    at = [picture[:, y, x] for y in (4, 60) for x in (4, 92)]  # top left, top right, bottom left, bottom right
    assert all(near(pixel, corner, 12) for pixel, corner in zip(at, corners))


def test_pixels_that_are_not_square_keep_a_circle_round():
    frame = read_clip(CASES / "anamorphic_64x45.mp4", MODELS["svd"], num_frames=1).frames[0].mean(dim=0)  # [H, W]
    circle = (frame - frame[0, 0]).abs() > 0.5
    width, height = circle.any(dim=0).sum().item(), circle.any(dim=1).sum().item()
    assert width == pytest.approx(400, abs=3) and height == pytest.approx(400, abs=3)


@pytest.mark.parametrize(
    "name, patch", [("hdr_pq_colours.mp4", 32), ("untagged_1080p.mp4", 64), ("tagged_bt709.mp4", 64)]
)
def test_colours_are_those_that_were_filmed(name, patch):
    picture = to_uint8(read_clip(CASES / name, TINY, num_frames=1, size=(192, 128), how="stretch").frames[0])
    for index, colour in enumerate([(200, 40, 40), (40, 180, 60), (50, 70, 210)]):
        assert near(picture[:, 32, patch // 2 + patch * index], colour, 3)


def test_hdr_is_tone_mapped():
    picture = to_uint8(
        read_clip(CASES / "hdr_pq_ramp.mp4", TINY, num_frames=1, size=(384, 64), how="stretch").frames[0]
    )
    nits = {0: 0, 5: 43, 26: 100, 100: 185, 203: 255, 1000: 255}
    for index, grey in enumerate(nits.values()):
        assert near(picture[:, 32, 32 + 64 * index], (grey, grey, grey), 3)


def test_alpha_is_laid_over_white():
    picture = to_uint8(read_clip(CASES / "alpha_clean.apng", TINY).frames[0])
    assert near(picture[:, 2, 2], (255, 255, 255), 0) and near(picture[:, 32, 20], (200, 30, 30), 12)
    assert picture.amax(dim=0).min() > 150  # neither black nor a black edge


@pytest.mark.parametrize("start", [0, 0.4])
def test_interlaced_frames_are_deinterlaced_one_for_each(start):
    options = {"num_frames": 9, "start": start, "stride": 1, "size": (320, 256), "how": "stretch"}
    clip = read_clip(CASES / "interlaced_tff.mp4", TINY, **options)
    assert clip.times == pytest.approx([start + k / 25 for k in range(9)])
    for frame in clip.frames:
        edges = (frame[:, 20:236, 1:] - frame[:, 20:236, :-1]).abs().amax(dim=0) > 0.5  # [rows, W - 1]
        assert edges.any()
        assert (edges[::2] != edges[1::2]).sum() < 0.1 * edges.sum()  # combed, all rows of moving bars differ


def test_an_animated_webp_is_a_clip():
    clip = read_clip(CASES / "animated.webp", TINY, sample_fps=10)
    assert clip.frames.shape == (14, 3, 64, 64) and clip.duration == pytest.approx(1.4)
    assert len({frame.numpy().tobytes() for frame in clip.frames}) == 14


@pytest.mark.parametrize("name", ["bomb_gif8k_14frames.gif", "bomb_gif13k.gif"])
def test_a_bomb_is_refused_before_it_is_decoded(name):
    with pytest.raises(InputError, match="larger than 50 megapixels a frame"):
        read_clip(CASES / name, TINY)
