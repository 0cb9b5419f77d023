"""Colours of decoded frames: whatever a file holds becomes the 8-bit RGB of a screen."""

from collections.abc import Callable
from functools import cache

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from numpy.typing import NDArray

UNSPECIFIED = 2  # in every colour field of a file: H.273
HD_LINES = 720  # from here on, video without tags is BT.709, below it BT.601
WHITE = 203.0  # nits of diffuse white in HDR: ITU-R BT.2408
HLG_PEAK = 1000.0  # nits of the screen that HLG is graded for: ITU-R BT.2100
BAND_PIXELS = 2**20  # pixels that are converted at a time, which bounds the memory

LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
BT2020_TO_BT709 = np.array(  # linear light: ITU-R BT.2087
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
P3_TO_BT709 = np.array(  # linear light, from the primaries of SMPTE RP 431-2 with the white of BT.709 (Display P3)
    [[1.2249, -0.2249, 0], [-0.0421, 1.0421, 0], [-0.0196, -0.0786, 1.0983]], np.float32
)
WIDER: dict[int, NDArray[np.float32]] = {ColorPrimaries.BT2020: BT2020_TO_BT709, ColorPrimaries.SMPTE432: P3_TO_BT709}
HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ, HLG


def to_rgb(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """A frame as uint8 [H, W, 3], as stored (not turned).

    HDR (PQ, HLG) is tone-mapped to BT.709: diffuse white becomes white, and what is brighter keeps its hue. The wider
    colours of Display P3 and BT.2020 become those of BT.709. Alpha is laid over white, as for images. Without tags,
    video of 720 lines or more is BT.709.
    """
    untagged = frame.colorspace == UNSPECIFIED and frame.height >= HD_LINES
    matrix = Colorspace.ITU709 if untagged else None  # None: as the file says
    if frame.color_trc in HDR:
        return _in_bands(frame.to_ndarray(format="rgb48le", src_colorspace=matrix), _to_srgb(frame))
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        return _in_bands(frame.to_ndarray(format="rgba", src_colorspace=matrix), _over_white)
    if frame.color_primaries in WIDER:
        return _in_bands(frame.to_ndarray(format="rgb48le", src_colorspace=matrix), _to_srgb(frame))
    return frame.to_ndarray(format="rgb24", src_colorspace=matrix).astype(np.uint8, copy=False)


def _in_bands(pixels: NDArray, convert: Callable[[NDArray], NDArray]) -> NDArray[np.uint8]:
    """Converts [H, W, C] to uint8 [H, W, 3], some rows at a time."""
    height, width = pixels.shape[:2]
    rows = max(1, BAND_PIXELS // width)
    rgb = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        rgb[top : top + rows] = convert(pixels[top : top + rows])
    return rgb


def _over_white(rgba: NDArray[np.uint8]) -> NDArray:
    if rgba[..., 3].min() == 255:
        return rgba[..., :3]
    alpha = rgba[..., 3:].astype(np.uint16)
    return (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255


@cache
def _light(transfer: int) -> NDArray[np.float32]:
    """The linear light of every 16-bit signal, [65536]: 1 is white, for HLG that of the scene."""
    signal = np.arange(2**16, dtype=np.float64) / (2**16 - 1)
    if transfer == ColorTrc.ARIB_STD_B67:
        light = _hlg_scene(signal)
    elif transfer == ColorTrc.SMPTE2084:
        light = _pq_nits(signal) / WHITE
    else:  # the curve of BT.709 is close to that of sRGB, and the same curve leads back
        light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


def _to_srgb(frame: av.VideoFrame) -> Callable[[NDArray[np.uint16]], NDArray[np.uint8]]:
    """uint16 [h, W, 3] of a frame's transfer function and primaries -> uint8 sRGB."""
    light = _light(frame.color_trc)
    untagged = frame.color_trc in HDR and frame.color_primaries == UNSPECIFIED  # HDR is BT.2020
    matrix = BT2020_TO_BT709 if untagged else WIDER.get(frame.color_primaries)

    def convert(pixels: NDArray[np.uint16]) -> NDArray[np.uint8]:
        linear = light[pixels]  # [h, W, 3]
        if frame.color_trc == ColorTrc.ARIB_STD_B67:  # the OOTF, with the gamma of a screen of HLG_PEAK nits
            linear = linear * ((linear @ LUMA_2020)[..., None] ** np.float32(0.2)) * np.float32(HLG_PEAK / WHITE)
        if matrix is not None:
            linear = linear @ matrix.T
        linear = np.maximum(linear, 0)
        linear /= np.maximum(linear.max(axis=-1, keepdims=True), 1)
        encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** np.float32(1 / 2.4) - 0.055)
        return (encoded * 255).round().astype(np.uint8)

    return convert


def _pq_nits(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """The EOTF of SMPTE ST 2084: signal in 0..1 -> nits."""
    m1, m2, c1, c2, c3 = 2610 / 2**14, 2523 / 2**5, 3424 / 2**12, 2413 / 2**7, 2392 / 2**7
    power = signal ** (1 / m2)
    return 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def _hlg_scene(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse OETF of ARIB STD-B67: signal in 0..1 -> linear light of the scene in 0..1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
