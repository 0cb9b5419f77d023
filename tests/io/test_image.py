"""Images: what a file says about its colours and its position is heeded; what cannot be read is one line."""

import struct
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, features

from minimti.config import MODELS
from minimti.io import pixels
from minimti.io.files import InputError
from minimti.io.image import decode_image, read_image

CASES = Path(__file__).resolve().parents[1] / "cases" / "images"
TINY = MODELS["tiny"]
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")


def decoded(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return decode_image(path)[0].permute(1, 2, 0).numpy()


def saved(path: Path, array: np.ndarray, **options) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def test_an_image_is_read_as_its_file_has_it(tmp_path):
    path = saved(tmp_path / "a.png", NOISE)
    read = decode_image(path)
    assert read.dtype == torch.uint8 and read.shape == (1, 3, 20, 30) and (decoded(path) == NOISE).all()
    fitted = read_image(path, TINY)
    assert fitted.dtype == torch.float32 and torch.equal(fitted, pixels.fit(read, (64, 64)))
    assert read_image(path, TINY, size=(128, 64)).shape == (1, 3, 64, 128)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.tga", "a.ppm", "a.webp", "a.jp2"])
def test_every_lossless_format_gives_the_same(tmp_path, name):
    options = {"a.webp": {"lossless": True}, "a.jp2": {"irreversible": False}}.get(name, {})
    assert (decoded(saved(tmp_path / name, NOISE, **options)) == NOISE).all()


# ---------------------------------------------------------------------------------------------- the small inputs


@pytest.mark.parametrize("name", ["icc_display_p3.png", "icc_channels_permuted.png"])
def test_colours_of_an_embedded_profile_are_those_of_srgb(name):
    shown = decoded(CASES / name)[10, [10, 30, 50, 90]].astype(int)
    assert abs(shown - [[200, 40, 40], [40, 180, 60], [50, 70, 210], [128, 128, 128]]).max() <= 1


@pytest.mark.parametrize(
    "name, size, at, colour",
    [
        ("grey16.png", (40, 30), (5, 5), [156, 156, 156]),  # 40000 of 65535
        ("exif_bad_rational_turned.jpg", (30, 40), (5, 5), [201, 60, 40]),
        ("../alpha_clean.apng", (64, 64), (32, 20), [200, 30, 30]),
        ("../alpha_clean.apng", (64, 64), (32, 60), [255, 255, 255]),
        ("../animated.webp", (64, 64), (32, 32), [1, 200, 40]),
    ],
)
def test_an_odd_image_is_read_right(name, size, at, colour):
    picture = decoded(CASES / name)
    assert picture.shape == (size[1], size[0], 3) and picture[at].tolist() == colour


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "bomb_png_wide.png",
            "is of 178000000x1 pixels; 200 megapixels, and 65535 pixels to a side, are the most",
        ),
        ("bomb_webp16k.webp", "is of 16383x10900 pixels; 60 megapixels, and 65535 pixels to a side, are the most"),
        ("image_a5de6d_2_496_flip_anim.webp", "is of 64x2097200 pixels; 60 megapixels"),
        ("eps_runs_gs.png", "cannot be read as an image; convert it to PNG or JPEG"),
        ("image_3b4572_1_1098_flip_a.blp", "cannot be read as an image; convert it to PNG or JPEG"),
        ("image_940757_2_79_mix_a.dds", "cannot be read as an image; convert it to PNG or JPEG"),
        pytest.param("damaged.avif", "cannot be read as an image", marks=AVIF),
        pytest.param("image_0561fe_2_1027_flip_a.avif", "cannot be read as an image", marks=AVIF),
        pytest.param("image_c758d6_2_655_int_a.avif", "cannot be read as an image", marks=AVIF),
    ],
)
def test_a_hostile_image_is_refused_at_once(name, message, peak):
    with pytest.raises(InputError, match=message):
        decode_image(CASES / name)
    assert peak() < 100e6


@pytest.mark.parametrize("name, size", [("bomb_g4.tiff", (4434, 4434)), ("../bomb_gif13k.gif", (21845, 900))])
def test_a_large_image_is_read_within_bounds(name, size, peak):
    picture = decode_image(CASES / name)
    assert picture.shape == (1, 3, size[1], size[0]) and peak() < 1e9
    pixels.fit(picture, (1024, 576))
    assert peak() < 1e9


@pytest.fixture
def peak():
    """The most memory that was resident since the test began, beyond what was then, in bytes."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux measures it")

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = status("VmRSS")
    return lambda: status("VmHWM") - before


def test_no_program_is_run_for_an_image(tmp_path, monkeypatch):
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("a.png", "a.eps", "a.jpg"):
        (tmp_path / name).write_bytes((CASES / "eps_runs_gs.png").read_bytes())
        with pytest.raises(InputError):
            decode_image(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_libraries_write_nothing_to_the_terminal(capfd):
    assert decode_image(CASES / "noise_ok_jpg.tiff").shape == (1, 3, 48, 64)
    print("back", file=sys.stderr)
    assert capfd.readouterr() == ("", "back\n")


# ---------------------------------------------------------------------------------------------- position and colours


@pytest.mark.parametrize("name", ["a.png", "a.tif", "lzw.tif", "a.webp"])
def test_an_image_stands_upright(tmp_path, name):
    """The eight orientations of EXIF: where the first row and the first column of the file are seen."""
    options = {"a.webp": {"lossless": True}, "lzw.tif": {"compression": "tiff_lzw"}}.get(name, {})
    turned = NOISE.transpose(1, 0, 2)
    upright = [NOISE, NOISE[:, ::-1], NOISE[::-1, ::-1], NOISE[::-1]]
    upright += [turned, turned[:, ::-1], turned[::-1, ::-1], turned[::-1]]
    for orientation, expected in enumerate(upright, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        shown = decoded(saved(tmp_path / name, NOISE, exif=exif, **options))
        assert shown.shape == expected.shape and (shown == expected).all(), orientation


def tags(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF, or the head of a TIFF: tags of number, type, count and four bytes of value."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


@pytest.mark.parametrize(
    "kind, count, value",
    [
        (3, 1, b"\0"),
        (3, 1, b"\x09"),
        (2, 2, b"6"),
        (1, 2, b"\6"),
        (5, 1, b"\xff" * 4),
        (99, 1, b"\6"),
    ],
)
def test_an_orientation_that_is_none_is_upright(tmp_path, kind, count, value):
    exif = b"Exif\0\0" + tags((0x0112, kind, count, value))
    assert (decoded(saved(tmp_path / "a.webp", NOISE, exif=exif, lossless=True)) == NOISE).all()


@pytest.mark.parametrize("tag", [(0x0112, 3, 1, b"\6"), (0x0112, 4, 1, b"\6")])
def test_tags_beside_the_orientation_may_be_broken(tmp_path, tag):
    for other in (
        (0x011A, 5, 1, b"\xff" * 4),
        (0x0131, 2, 10**9, b"\0"),
        (0x8769, 4, 1, b"\xff" * 4),
        (0x9999, 77, 1, b"\0"),
    ):
        exif = b"Exif\0\0" + tags(tag, other)
        shown = decoded(saved(tmp_path / "a.webp", NOISE, exif=exif, lossless=True))
        assert shown.shape == (30, 20, 3) and (shown == np.rot90(NOISE, -1)).all(), other


@pytest.mark.parametrize(
    "junk", [b"", b"Exif", b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_broken_tags_are_none(tmp_path, junk):
    assert (decoded(saved(tmp_path / "a.webp", NOISE, exif=junk, lossless=True)) == NOISE).all()


def test_a_broken_tag_of_a_tiff_is_no_error(tmp_path):
    """Pillow turns a TIFF itself, and reads other tags while it does."""
    for number, (tag, value) in enumerate(((0x8769, 2**31), (0x8825, 2**31), (0x011A, 1e-30), (0x0131, "name"))):
        path = saved(tmp_path / f"{number}.tif", NOISE, tiffinfo={0x0112: 6, tag: value})
        assert (decoded(path) == np.rot90(NOISE, -1)).all()
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<HHI", 0x0131, 2, 5)) + 8
    content[at : at + 4] = b"\xff" * 4  # beyond the end of the file
    path.write_bytes(content)
    assert (decoded(path) == np.rot90(NOISE, -1)).all()


def test_transparency_is_laid_over_white(tmp_path):
    alpha = np.full((20, 30), 51, np.uint8)  # a fifth
    expected = 255 - (255 - NOISE.astype(float)) / 5
    for name in ("a.png", "a.webp", "a.tif", "a.tga"):
        options = {"a.webp": {"lossless": True, "exact": True}}.get(name, {})
        shown = decoded(saved(tmp_path / name, np.dstack([NOISE, alpha]), **options))
        assert abs(shown - expected).max() <= 1
    for mode, clear in (("L", 7), ("P", 1), ("RGB", (7, 7, 7))):
        image = Image.new(mode, (3, 2), clear)
        if mode == "P":
            image.putpalette([0, 0, 0, 200, 0, 0])
        image.putpixel((1, 1), 0 if mode != "RGB" else (0, 0, 0))
        image.save(tmp_path / "key.png", transparency=clear)
        shown = decoded(tmp_path / "key.png")
        assert (shown[0] == 255).all() and (shown[1, 1] == 0).all()


def test_greys_of_16_bits_are_read_in_their_range(tmp_path):
    deep = np.array([[0, 257, 40000, 65535]], np.uint16)
    shallow = [0, 1, 156, 255]
    for name in ("a.png", "a.tif", "a.jp2"):
        assert decoded(saved(tmp_path / name, deep))[0, :, 1].tolist() == shallow
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + deep.astype(">u2").tobytes())
    assert decoded(tmp_path / "a.pgm")[0, :, 0].tolist() == shallow
    (tmp_path / "b.pgm").write_bytes(b"P5 2 1 1023\n" + np.array([512, 1023], ">u2").tobytes())
    assert decoded(tmp_path / "b.pgm")[0, :, 0].tolist() == [128, 255]
    saved(tmp_path / "white_is_zero.tif", deep, tiffinfo={262: 0})
    content = bytearray((tmp_path / "white_is_zero.tif").read_bytes())
    at = content.index(struct.pack("<HHI", 262, 3, 1)) + 8
    content[at : at + 2] = struct.pack("<H", 0)
    (tmp_path / "white_is_zero.tif").write_bytes(content)
    assert decoded(tmp_path / "white_is_zero.tif")[0, :, 2].tolist() == [255, 254, 99, 0]
    rgb = png(2, 1, 16, 2, struct.pack(">6H", 0, 40000, 65535, 257, 514, 771))
    (tmp_path / "rgb.png").write_bytes(rgb)
    assert abs(decoded(tmp_path / "rgb.png")[0].astype(int) - [[0, 156, 255], [1, 2, 3]]).max() <= 1


def test_one_grey_of_16_bits_can_be_transparent(tmp_path):
    chunks = png(3, 1, 16, 0, struct.pack(">3H", 5, 6, 65535), chunk(b"tRNS", struct.pack(">H", 5)))
    (tmp_path / "a.png").write_bytes(chunks)
    assert decoded(tmp_path / "a.png")[0, :, 0].tolist() == [255, 0, 255]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, kind: int, samples: bytes, more: bytes = b"") -> bytes:
    """A PNG of one row of samples, or of a size that its content does not have."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    content = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(b"\0" + samples)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def grey_profile(gamma: float) -> bytes:
    """A minimal ICC profile of version 2: greys of a gamma."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    start = 128 + 4 + 2 * 12
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", start, len(white), b"kTRC", start + len(white), len(curve) - 2)
    header = struct.pack(
        ">I4sI4s4s4s12x4s", start + len(white) + len(curve), b"", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp"
    )
    header = header.ljust(68, b"\0") + white[8:]
    return header.ljust(128, b"\0") + tags + white + curve


def test_a_profile_of_greys_is_heeded(tmp_path):
    linear = grey_profile(1.0)
    grey = np.full((4, 4), 128, np.uint8)
    deep = np.full((4, 4), 128 * 257, np.uint16)
    for array in (grey, deep):
        assert abs(int(decoded(saved(tmp_path / "a.png", array, icc_profile=linear))[0, 0, 0]) - 188) <= 1
    clear = np.dstack([grey, np.array([[0, 255, 255, 255]] * 4, np.uint8)])
    shown = decoded(saved(tmp_path / "b.png", clear, icc_profile=linear))
    assert (shown[:, 0] == 255).all() and abs(shown[:, 1:].astype(int) - 188).max() <= 1
    assert (decoded(saved(tmp_path / "c.png", NOISE, icc_profile=linear)) == NOISE).all()  # made for other colours


def test_a_profile_goes_with_transparency_and_palettes(tmp_path):
    profile = Image.open(CASES / "icc_channels_permuted.png").info["icc_profile"]  # stored G R B, shown R G B
    image = Image.new("RGBA", (4, 4), (40, 200, 60, 255))
    image.putpixel((0, 0), (40, 200, 60, 0))
    image.save(tmp_path / "a.png", icc_profile=profile)
    image.convert("RGB").quantize(2).save(tmp_path / "b.png", icc_profile=profile)
    plain = Image.new("RGB", (4, 4), (40, 200, 60))
    plain.save(tmp_path / "c.png", icc_profile=profile)
    expected = decoded(tmp_path / "c.png")
    assert abs(expected[0, 0].astype(int) - [200, 60, 40]).max() <= 1
    shown = decoded(tmp_path / "a.png")
    assert (shown[0, 0] == 255).all() and (shown[1:] == expected[1:]).all()
    assert (decoded(tmp_path / "b.png") == expected).all()


@pytest.mark.parametrize("profile", [b"", b"junk", bytes(200), grey_profile(1.0)[:140]])
def test_a_broken_profile_is_none(tmp_path, profile):
    assert (decoded(saved(tmp_path / "a.webp", NOISE, lossless=True, icc_profile=profile)) == NOISE).all()


def test_srgb_stays_as_it_is(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    shown = decoded(saved(tmp_path / "a.png", NOISE, icc_profile=profile))
    assert abs(shown.astype(int) - NOISE).max() <= 1


def test_four_inks_are_read(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert abs(decoded(tmp_path / "a.jpg")[8, 8].astype(int) - [255, 0, 0]).max() <= 3


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if name == "a.webp" else {})
        )
        assert decoded(tmp_path / name)[4, 4].tolist() == [255, 0, 0]


# ---------------------------------------------------------------------------------------------- bounds and refusals


def test_a_large_image_is_reduced_as_it_is_read(tmp_path):
    """The same picture at the size of a network, whether it is reduced before or not; a JPEG by its decoder."""
    x = np.add.outer(np.arange(60), np.arange(60)) % 2 * 128 + np.arange(60)  # squares on a ramp
    large = np.kron(x.astype(np.uint8), np.ones((100, 100), np.uint8))  # 6000 x 6000
    expected = pixels.fit(torch.from_numpy(large).expand(1, 3, -1, -1), (128, 128))
    for name, options in (("a.jpg", {"quality": 95}), ("a.png", {"compress_level": 1})):
        picture = decode_image(saved(tmp_path / name, large, **options))
        assert picture.shape == (1, 3, 3000, 3000)
        assert (pixels.fit(picture, (128, 128)) - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    "size, message", [((14_143, 14_143), "is of more than 200 megapixels"), ((14_142, 14_142), r"read as an image \(")]
)
def test_pixels_are_counted_before_they_are_decoded(tmp_path, size, message):
    (tmp_path / "a.png").write_bytes(png(*size, 8, 0, b""))
    with pytest.raises(InputError, match=message):
        decode_image(tmp_path / "a.png")


def test_numbers_without_a_range_are_refused(tmp_path):
    for dtype, mode in ((np.int32, "I"), (np.float32, "F")):
        path = saved(tmp_path / "deep.tif", np.zeros((4, 4), dtype))
        with pytest.raises(InputError, match=f"is an image of mode {mode}; convert it to 8 or 16 bits per channel"):
            read_image(path, TINY)


def test_what_is_no_image_is_named(tmp_path):
    whole = saved(tmp_path / "a.png", NOISE).read_bytes()
    for name, content in (
        ("text.png", b"no image"),
        ("cut.png", whole[:200]),
        ("empty.png", b""),
        ("ftyp.png", b"\0\0\0\x18ftyp"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: cannot be read as an image"):
            read_image(tmp_path / name, TINY)


def test_an_error_without_words_is_named_by_its_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: (_ for _ in ()).throw(ValueError()))
    with pytest.raises(InputError, match=r"a.png: cannot be read as an image \(ValueError\)"):
        read_image(saved(tmp_path / "a.png", NOISE), TINY)


def test_heic_without_its_library_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(InputError, match="a HEIC picture; install what reads it: pip install pillow-heif, or convert"):
        decode_image(tmp_path / "a.jpg")


def test_heic_is_read_with_its_library(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 48), (200, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    pillow_heif.from_pillow(image).save(tmp_path / "a.jpg", quality=-1, exif=exif.tobytes())
    shown = decoded(tmp_path / "a.jpg")
    assert shown.shape == (64, 48, 3) and abs(shown[30, 20].astype(int) - [200, 40, 60]).max() <= 3
    (tmp_path / "cut.heic").write_bytes((tmp_path / "a.jpg").read_bytes()[:-20])
    with pytest.raises(InputError, match="cut.heic: cannot be read as an image"):
        decode_image(tmp_path / "cut.heic")


def test_avif_without_its_library_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(100))
    with pytest.raises(InputError, match="is an AVIF picture; install a Pillow that reads it: pip install -U pillow"):
        decode_image(tmp_path / "a.jpg")


def test_threads_read_images_side_by_side(tmp_path, capfd):
    """What belongs to the whole process (Pillow's limit, stderr) is given back although they overlap."""
    large = np.tile(NOISE, (20, 20, 1))  # 600 x 400: long enough for another thread to begin
    path, limit, right = saved(tmp_path / "a.png", large), Image.MAX_IMAGE_PIXELS, []

    def read():
        right.extend((decoded(path) == large).all() for _ in range(5))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("still there", file=sys.stderr)
    assert len(right) == 40 and all(right) and Image.MAX_IMAGE_PIXELS == limit
    assert capfd.readouterr().err == "still there\n"
