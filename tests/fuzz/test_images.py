"""Damaged images: pixels or one line, never anything else.

pytest -m fuzz tests/fuzz/test_images.py -s, for MINIMTI_FUZZ_SECONDS (30). A case is remade from its number.
"""

import io
import os
import random
import struct
import time
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from minimti.io.files import InputError
from minimti.io.image import decode_image

pytestmark = pytest.mark.fuzz
SECONDS = float(os.environ.get("MINIMTI_FUZZ_SECONDS", 30))
SEED = int(os.environ.get("MINIMTI_FUZZ_SEED", 0))
NUMBERS = (0, 1, 2, 3, 7, 8, 15, 16, 32, 64, 127, 128, 255, *(2**k - 1 for k in (15, 16, 24, 31, 32)), 2**16, 2**31)


def corpus() -> list[bytes]:
    """Small images of every format and of most kinds of each."""
    colours = Image.effect_mandelbrot((48, 40), (-3, -2.5, 2, 2.5), 50).convert("RGB")
    ramp = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(np.uint16)
    images = [colours.convert(mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK")]
    images += [Image.fromarray(ramp), colours.resize((160, 120))]
    exif = Image.Exif()
    exif[0x0112], exif[0x0131], exif[0x011A] = 6, "fuzz", 72.5
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    about = {"exif": exif.tobytes(), "icc_profile": profile}
    several = {"save_all": True, "append_images": [colours, colours.rotate(90)]}
    compressions = (None, "tiff_lzw", "jpeg", "packbits", "group4", "tiff_adobe_deflate")
    ways: list[tuple[str, dict]] = [(name, {}) for name in ("BMP", "GIF", "PPM", "TGA", "JPEG2000")]
    ways += [("TGA", {"compression": "tga_rle"}), ("JPEG2000", {"irreversible": True})]
    ways += [
        ("JPEG", about),
        ("JPEG", {"progressive": True, "quality": 30}),
        ("PNG", about),
        ("PNG", {"optimize": True}),
    ]
    ways += [("TIFF", {"compression": compression} | about) for compression in compressions]
    ways += [("WEBP", about), ("WEBP", {"lossless": True})]
    ways += [(name, several) for name in ("GIF", "PNG", "WEBP", "TIFF", "MPO")]
    if features.check("avif"):
        ways += [("AVIF", about), ("AVIF", several)]
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
        ways += [("HEIF", about)]
    except ImportError:
        pass
    found = [b"P3 2 2 255\n1 2 3 4 5 6 7 8 9 10 11 12\n", b"P7\nWIDTH 2\n", bytes(4000)]
    for name, options in ways:
        for image in images:
            buffer = io.BytesIO()
            try:
                image.save(buffer, name, **options)
            except Exception:  # the format has no such mode
                continue
            found.append(buffer.getvalue())
    return found


def mutate(rng: random.Random, files: list[bytes]) -> bytes:
    """One of the files with a few faults."""
    content = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        # Headers are at the beginning, tags of TIFF at the end.
        end = rng.choice((32, 128, 600, len(content), len(content)))
        at = rng.randrange(max(1, min(end, len(content))))
        at = max(0, len(content) - 1 - at) if rng.random() < 0.2 else at
        kind = rng.randrange(8)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1 and content:
            content[at % len(content)] = rng.randrange(256)
        elif kind in (2, 3):
            layout = rng.choice(("<H", ">H", "<I", ">I"))
            number = struct.pack(layout, rng.choice(NUMBERS) % 256 ** struct.calcsize(layout))
            content[at : at + len(number)] = number
        elif kind == 4:
            del content[at : rng.choice((at + rng.randrange(1, 64), len(content)))]
        elif kind == 5:
            content[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 6:
            other = rng.choice(files)
            start = rng.randrange(len(other))
            content[at : at + 64] = other[start : start + rng.randrange(1, 256)]
        else:
            content[at : at + 16] = bytes([rng.choice((0, 255))]) * 16
    return with_checksums(bytes(content)) if rng.random() < 0.7 else bytes(content)


def with_checksums(content: bytes) -> bytes:
    """The chunks of a PNG with checksums that are right, so that their faults are not seen by these."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    out, at = bytearray(content[:8]), 8
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        chunk = content[at + 4 : at + 8 + length]
        out += content[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        at += 12 + length
    return bytes(out)


def test_a_damaged_image_gives_pixels_or_one_line(tmp_path, capfd):
    files, counts, path, slowest = corpus(), Counter(), tmp_path / "image", 0.0
    capfd.readouterr()  # libtiff comments on what it cannot write
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        case = counts.total()
        path.write_bytes(mutate(random.Random(f"{SEED} {case}"), files))
        begin = time.monotonic()
        try:
            pixels = decode_image(path)
            assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[:2] == (1, 3), f"case {case}"
            counts["pixels"] += 1
        except InputError as error:
            assert str(error).startswith(f"{path}: "), f"case {case}"
            counts["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"case {case}: {error!r}") from error
        slowest = max(slowest, time.monotonic() - begin)
        assert slowest < 30, f"case {case} took {slowest:.0f} s"
    assert capfd.readouterr() == ("", "")
    assert min(counts["pixels"], counts["refused"]) > 10
    with capfd.disabled():
        print(f"\n{counts.total()} images from {len(files)}: {dict(counts)}, slowest {slowest:.1f} s")
