"""Augmentation: which changes there are, how strong they are, and that all frames get the same."""

import colorsys
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimti.augment import augment

SEEDS = range(60)


def augmented(clip: torch.Tensor, seed: int, flip: bool = False, crop: bool = True) -> torch.Tensor:
    return augment(clip, torch.Generator().manual_seed(seed), flip, crop)


def plain(*rgb: float) -> torch.Tensor:
    """A clip of one frame in one colour, [1, 3, 32, 48]."""
    return torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, 32, 48).contiguous()


@given(seed=st.integers(0, 1000), flip=st.booleans())
def test_it_is_the_same_for_every_frame(seed, flip):
    """Frames that are equal stay equal, whatever the other frames of the clip show."""
    image, other = torch.rand(2, 3, 32, 48) * 2 - 1
    out = augmented(torch.stack([image, other, image]), seed, flip)
    assert out.shape == (3, 3, 32, 48) and out.abs().max() <= 1
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])
    assert torch.equal(augmented(image[None], seed, flip)[0], out[0])


def test_it_mirrors_half_of_the_clips_where_it_may():
    ramp = torch.linspace(-0.5, 0.5, 48).expand(1, 3, 32, 48)  # brighter to the right

    def mirrored(flip: bool) -> int:
        outs = [augmented(ramp, seed, flip) for seed in SEEDS]
        return sum((out[..., -1].mean() < out[..., 0].mean()).item() for out in outs)

    assert mirrored(flip=False) == 0
    assert 20 <= mirrored(flip=True) <= 40


def crop(seed: int) -> tuple[float, float, float, float]:
    """Left, width, top, height of the part of a picture of 48 x 32 pixels that a seed keeps.

    Grey levels code the place of a pixel. Two plain frames give the change of contrast and brightness.
    """
    low, high = (augmented(plain(v, v, v), seed)[0, 0, 0, 0] for v in (0.0, 0.4))
    edges = []
    for size, axis in ((48, -1), (32, -2)):
        ramp = torch.arange(size) * 0.4 / size
        image = ramp.view((1, size) if axis == -1 else (size, 1)).expand(1, 3, 32, 48)
        line = augmented(image, seed)[0, 0].mean(-1 if axis == -2 else 0)
        places = (line - low) / (high - low) * size
        length = (places[size - 8] - places[8]) / (size - 16) * size
        edges += [(places[8] + 0.5 - 8.5 * length / size).item(), length.item()]
    return tuple(edges)


def test_it_crops_a_random_part_of_the_picture():
    """70 to 100 % of its area, of its own shape, anywhere in it."""
    left, width, top, height = torch.tensor([crop(seed) for seed in SEEDS]).T
    share = width * height / (48 * 32)
    assert 0.68 < share.min() < 0.73 and 0.97 < share.max() < 1.01
    assert (width / 48 - height / 32).abs().max() < 1 / 32  # whole pixels
    for start, room in ((left, 48 - width), (top, 32 - height)):
        place = start[room > 2.5] / room[room > 2.5]
        assert -0.05 < place.min() < 0.1 and 0.9 < place.max() < 1.05 and place.std() > 0.2  # uniform: 0.29


def test_it_keeps_the_whole_picture_where_it_may_not_crop():
    grey = torch.rand(1, 1, 32, 48).expand(1, 3, 32, 48) - 0.5  # contrast and brightness alone change it
    for seed in SEEDS:
        spans = [(x - x.min()) / (x.max() - x.min()) for x in (grey, augmented(grey, seed, crop=False))]
        assert torch.allclose(*spans, atol=1e-5)


@functools.cache
def colour_changes() -> dict[str, torch.Tensor]:
    """Contrast, brightness, saturation and hue of every seed, read from frames of one colour."""
    found = {name: [] for name in ("contrast", "brightness", "saturation", "hue")}
    for seed in SEEDS:
        low, high = (augmented(plain(v, v, v), seed)[0, 0, 0, 0].item() for v in (-0.3, 0.3))
        contrast = (high - low) / 0.6
        found["contrast"].append(contrast)
        found["brightness"].append((high + low) / 2)
        before, after = (0.2, -0.1, -0.2), augmented(plain(0.2, -0.1, -0.2), seed)[0, :, 0, 0].tolist()
        hues, chroma = [], []
        for rgb in (before, after):
            rgb = [(v + 1) / 2 for v in rgb]
            hues.append(colorsys.rgb_to_hsv(*rgb)[0])
            chroma.append(max(rgb) - min(rgb))
        found["hue"].append((hues[1] - hues[0] + 0.5) % 1 - 0.5)
        found["saturation"].append(chroma[1] / chroma[0] / contrast)
    return {name: torch.tensor(values) for name, values in found.items()}


@pytest.mark.parametrize(
    "change, low, high",
    [("contrast", 0.8, 1.2), ("brightness", -0.15, 0.15), ("saturation", 0.8, 1.2), ("hue", -0.05, 0.05)],
)
def test_every_change_of_colour_fills_its_range(change, low, high):
    values, margin = colour_changes()[change], 0.15 * (high - low)
    assert low - 0.01 < values.min() < low + margin and high - margin < values.max() < high + 0.01
    assert values.std() > 0.2 * (high - low)  # uniform: 0.29


def test_colours_are_clipped_before_saturation_and_hue_change():
    """Two reds that contrast and brightness carry beyond the domain, or two greens below it, end as one colour."""
    changes, compared = colour_changes(), 0
    for seed, contrast, brightness in zip(SEEDS, changes["contrast"], changes["brightness"]):
        for inner, outer in (((0.9, -0.2, 0.1), (1.0, -0.2, 0.1)), ((-0.9, 0.2, -0.1), (-1.0, 0.2, -0.1))):
            if abs(inner[0] * contrast + brightness) > 1:
                assert torch.allclose(augmented(plain(*inner), seed), augmented(plain(*outer), seed), atol=1e-6)
                compared += 1
    assert compared > 20
