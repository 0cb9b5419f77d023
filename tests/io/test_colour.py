"""Colours of frames that are made here."""

import av
import numpy as np
import pytest

from minimti.io import colour


def grey(signal: float, **tags: int) -> av.VideoFrame:
    """A frame of 16 bits without colour, of one signal in 0..1."""
    planes = np.full((16, 16, 3), 128 << 8, np.uint16)
    planes[..., 0] = round((16 + 219 * signal) * 256)
    frame = av.VideoFrame.from_ndarray(planes, format="yuv444p16le")
    for name, value in tags.items():
        setattr(frame, name, value)
    return frame


@pytest.mark.parametrize("signal, nits", [(0, 0), (0.25, 8.95), (0.5, 50.7), (0.75, 203), (1, 1000)])
def test_hlg_is_shown_as_on_a_screen_of_1000_nits(signal, nits):
    """The figures of ITU-R BT.2408 for 50 and 75 %; the others follow from BT.2100."""
    frame = grey(signal, color_trc=18, color_primaries=9, colorspace=9, color_range=1)
    linear = min(1, nits / 203)
    expected = 255 * (12.92 * linear if linear < 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055)
    rgb = colour.to_rgb(frame)
    assert rgb.shape == (16, 16, 3) and rgb.dtype == np.uint8
    assert np.abs(rgb.astype(float) - expected).max() <= 2


def test_what_is_brighter_than_white_keeps_its_hue():
    linear = np.array([[[4.0, 1.0, 0.0]]])
    signal = np.round(65535 * _pq(linear * 203)).astype(np.uint16)
    frame = grey(0, color_trc=16, color_primaries=1, colorspace=1)
    red, green, blue = colour._to_srgb(frame)(signal)[0, 0]
    assert (red, blue) == (255, 0) and abs(int(green) - 137) <= 1  # a quarter of the light of red


def _pq(nits: np.ndarray) -> np.ndarray:
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = (nits / 10_000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


@pytest.mark.parametrize(
    "primaries, red, blue",
    [(1, (200, 40, 40), (50, 70, 210)), (12, (184, 56, 49), (54, 69, 202)), (9, (164, 69, 49), (74, 73, 201))],
)
def test_wider_primaries_become_those_of_a_screen(primaries, red, blue):
    """BT.709, Display P3 (screen recordings of a Mac) and BT.2020. A red beyond BT.709 becomes its purest red."""
    pixels = np.array([[red, blue, (128, 128, 128), (255, 0, 0)]], np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    frame.color_primaries = primaries
    expected = [(200, 40, 40), (50, 70, 210), (128, 128, 128), (255, 0, 0)]
    assert np.abs(colour.to_rgb(frame)[0, ::4].astype(int) - expected).max() <= 2


def test_alpha_is_laid_over_white():
    pixels = np.zeros((4, 5, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, 128
    pixels[0, 0, 3], pixels[1, 1, 3] = 0, 255
    rgb = colour.to_rgb(av.VideoFrame.from_ndarray(pixels, format="rgba"))
    assert rgb[0, 0].tolist() == [255, 255, 255] and rgb[1, 1].tolist() == [200, 0, 0]
    assert rgb[2, 2].tolist() == [227, 127, 127]


@pytest.mark.parametrize("height, red", [(64, 186), (719, 186), (720, 198), (1080, 198)])
def test_without_tags_hd_is_bt709_and_less_bt601(height, red):
    """Y = 91, Cr = 190: R = 1.1644 (Y - 16) + 1.596 (Cr - 128), or 1.7927 in BT.709."""
    planes = np.stack([np.full((height, 64), code, np.uint8) for code in (91, 104, 190)])
    rgb = colour.to_rgb(av.VideoFrame.from_ndarray(planes, format="yuv444p"))
    assert abs(int(rgb[5, 5, 0]) - red) <= 2


def test_large_pictures_are_converted_in_bands():
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1000, 4), dtype=np.uint8)  # more than one band
    frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
    whole = colour._over_white(pixels)
    assert (colour.to_rgb(frame) == whole).all() and pixels.shape[0] * pixels.shape[1] > colour.BAND_PIXELS
