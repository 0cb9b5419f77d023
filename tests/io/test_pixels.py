"""How pictures are put to a size, and their value domains."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as T

from minimti.io import pixels


@given(
    have=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    want=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    how=st.sampled_from(["crop", "pad", "stretch"]),
    center=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    aspect=st.floats(0.5, 2),
)
def test_fit_gives_the_requested_size(have, want, how, center, aspect):
    size = (64 * want[0], 64 * want[1])
    frames = torch.randint(0, 256, (2, 3, *have[::-1]), dtype=torch.uint8)
    placement = pixels.place(have, size, how, center, aspect)
    fitted = pixels.fit(frames, size, placement)
    assert fitted.shape == (2, 3, size[1], size[0]) and fitted.abs().max() <= 1
    for box, whole in ((placement.source, have), (placement.target, size)):
        assert 0 <= box[0] < box[2] <= whole[0] and 0 <= box[1] < box[3] <= whole[1]
    assert how == "crop" or placement.kept == (1, 1)
    assert how == "pad" or placement.target == (0, 0, *size)


@given(
    have=st.tuples(st.integers(20, 200), st.integers(20, 200)),
    want=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    aspect=st.floats(0.5, 2),
)
def test_crops_and_bars_keep_the_shape_of_things(have, want, aspect):
    size = (64 * want[0], 64 * want[1])
    for how in ("crop", "pad"):
        placement = pixels.place(have, size, how, pixel_aspect=aspect)
        (x0, y0, x1, y1), (u0, v0, u1, v1) = placement.source, placement.target
        scale_x, scale_y = (u1 - u0) / ((x1 - x0) * aspect), (v1 - v0) / (y1 - y0)
        assert scale_x == pytest.approx(scale_y, rel=0.15)  # within the rounding to whole pixels


def test_fit_is_a_central_crop_resized_with_bicubic_antialiasing():
    frames = torch.randint(0, 256, (2, 3, 131, 257), dtype=torch.uint8)
    crop = T.center_crop(frames, [128, 257]).float()
    want = (
        T.resize(crop, [64, 128], interpolation=T.InterpolationMode.BICUBIC, antialias=True).clamp(0, 255) / 127.5 - 1
    )
    assert torch.equal(pixels.fit(frames, (128, 64)), want)


def test_fit_keeps_the_part_that_is_named():
    frames = torch.zeros(1, 3, 64, 256, dtype=torch.uint8)
    frames[..., 64:192] = 255  # the central part of the shape 2:1
    assert (pixels.fit(frames, (128, 64)) == 1).all()
    frames = torch.arange(256, dtype=torch.uint8).expand(1, 3, 64, 256)  # grey is the column
    for x, first in ((0, 0), (0.25, 48), (0.5, 96), (1, 192)):
        placement = pixels.place((256, 64), (64, 64), center=(x, 0.9))
        assert placement.source == (first, 0, first + 64, 64)
        assert torch.allclose(
            pixels.fit(frames, (64, 64), placement)[0, 0, 0], torch.arange(first, first + 64) / 127.5 - 1
        )
    same = torch.randint(0, 256, (1, 3, 64, 128), dtype=torch.uint8)
    assert torch.allclose(pixels.fit(same, (128, 64)), same / 127.5 - 1)


def test_padding_is_black_and_cut_off_again():
    frames = torch.full((1, 3, 100, 50), 200, dtype=torch.uint8)
    placement = pixels.place((50, 100), (128, 64), "pad")
    assert placement.target == (48, 0, 80, 64) == pixels.place((50, 100), (128, 64), "pad", (0, 0)).target
    fitted = pixels.fit(frames, (128, 64), placement)
    assert (fitted[..., :48] == -1).all() and (fitted[..., 80:] == -1).all() and (fitted[..., 48:80] > 0).all()
    video = pixels.cut(pixels.to_uint8(fitted), placement)
    assert video.shape == (1, 3, 64, 32) and (video == 200).all()
    for have, cut in (((33, 64), (64, 32)), ((64, 33), (32, 64))):  # mp4 needs even sides
        odd = pixels.place(have, (64, 64), "pad")
        assert pixels.cut(torch.zeros(1, 3, 64, 64), odd).shape == (1, 3, *cut)
    assert pixels.cut(fitted, pixels.place((50, 100), (128, 64))).shape == fitted.shape


@pytest.mark.parametrize(
    "size, have, oriented",
    [
        ((1024, 576), (1080, 1920), (576, 1024)),
        ((1024, 576), (1920, 1080), (1024, 576)),
        ((576, 1024), (1920, 1080), (1024, 576)),
        ((1024, 576), (500, 500), (1024, 576)),
        ((576, 1024), (500, 500), (576, 1024)),
        ((64, 64), (1, 2), (64, 64)),
    ],
)
def test_a_picture_decides_whether_it_is_upright(size, have, oriented):
    assert pixels.oriented(size, *have) == oriented


def test_less_than_60_percent_of_a_picture_is_noted():
    assert pixels.place((100, 100), (128, 64)).note().startswith("only 50% of the picture is used")
    assert pixels.place((160, 100), (128, 64)).note() == "" == pixels.place((100, 100), (128, 64), "pad").note()


def test_another_fit_is_refused():
    with pytest.raises(ValueError, match="unknown fit 'fill': crop, pad, stretch"):
        pixels.place((1, 1), (64, 64), "fill")
    with pytest.raises(ValueError, match=r"from \(0, 0\) to \(1, 1\), not \(2, 0.5\)"):
        pixels.place((1, 1), (64, 64), center=(2, 0.5))


def test_a_strip_has_a_row_for_each_clip():
    clips = torch.stack([torch.full((3, 3, 4, 5), value) for value in (-2.0, 1.0)])
    clips[1, 2] = 0
    picture = pixels.strip(clips)
    assert picture.shape == (8, 15, 3) and picture.dtype == torch.uint8
    assert (picture[:4] == 0).all() and (picture[4:, :10] == 255).all() and (picture[4:, 10:] == 128).all()
