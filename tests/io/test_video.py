"""Clips and images, written and read back."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minimti.io import video
from minimti.io.files import InputError, atomic_write


def gradients(num_frames: int, height: int = 64, width: int = 96) -> torch.Tensor:
    """[F, 3, H, W] in [-1,1]: red grows to the right, green downwards, blue with time."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([torch.stack([x, y, torch.full_like(x, t)]) for t in torch.linspace(-0.8, 0.8, num_frames)])


def test_a_clip_survives_its_file(tmp_path):
    clip = gradients(14)
    video.write_clip(tmp_path / "a.mp4", clip, 7)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, stream.frames, stream.average_rate) == ("h264", "yuv420p", 14, 7)
        assert (context.width, context.height) == (96, 64)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # a browser can start before it has the whole file
    back = video.fit(video.read_clip(tmp_path / "a.mp4", 14, start=0, stride=1), (96, 64))
    assert (back - clip).abs().mean() < 0.02


def test_the_same_clip_gives_the_same_bytes(tmp_path):
    """Reading in between fills the heap with other values: an encoder that looks at memory it never wrote shows."""
    contents = set()
    for _ in range(20):
        video.write_clip(tmp_path / "a.mp4", gradients(14), 7)
        contents.add((tmp_path / "a.mp4").read_bytes())
        video.read_clip(tmp_path / "a.mp4", 14, 0, 1)
    assert len(contents) == 1


@pytest.mark.parametrize("fps", [7, 24, 29.97])
def test_the_rate_is_exact(tmp_path, fps):
    video.write_clip(tmp_path / "a.mp4", gradients(4), fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(fps).limit_denominator(1001)


@given(num_frames=st.integers(1, 4), start=st.integers(0, 12), stride=st.integers(1, 4))
def test_frames_are_chosen_by_time_and_stride(tmp_path_factory, num_frames, start, stride):
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    video.write_clip(path, gradients(12), 7)
    wanted = [start + i * stride for i in range(num_frames)]
    if wanted[-1] < 12:
        frames = video.read_clip(path, num_frames, start / 7, stride)
        blue = torch.linspace(-0.8, 0.8, 12)[wanted]
        assert torch.allclose(frames[:, 2].float().mean(dim=(1, 2)) / 127.5 - 1, blue, atol=0.03)
    else:
        with pytest.raises(InputError, match=f"but only {12 - start} are there; start earlier, or lower --stride"):
            video.read_clip(path, num_frames, start / 7, stride)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_clips_filmed_sideways_stand_upright(tmp_path, quarter_turns):
    """A phone stores what its sensor saw and a matrix that says how it was held."""
    clip = gradients(2)
    video.write_clip(tmp_path / "a.mp4", clip, 7)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter_turns]  # clockwise on the screen, whose y points down
    matrix = struct.pack(">9i", *(round(v * 2**16) for v in (cos, sin, 0, -sin, cos, 0, 0, 0)), 2**30)
    at = content.index(b"tkhd") + 4 + 40  # version 0: forty bytes of other fields come first
    content[at : at + 36] = matrix
    (tmp_path / "b.mp4").write_bytes(content)
    upright = video.read_clip(tmp_path / "b.mp4", 2, 0, 1)
    stored = video.read_clip(tmp_path / "a.mp4", 2, 0, 1)
    assert torch.equal(upright, torch.rot90(stored, -quarter_turns, dims=(2, 3)))


def test_unreadable_videos_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    video.write_clip(tmp_path / "cut.mp4", gradients(14), 7)
    whole = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    for name, message in (
        ("nothing.mp4", "no such file"),
        ("", "is a folder"),
        ("text.mp4", "cannot be read as a video"),
        ("empty.mp4", "cannot be read as a video"),
        ("sound.wav", "has no video stream"),
        ("cut.mp4", "cannot be read as a video|only [0-9]+ are there"),
    ):
        with pytest.raises(InputError, match=message):
            video.read_clip(tmp_path / name, 14, 0, 1)


def test_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = video.read_image(tmp_path / "a.png")
    assert read.dtype == torch.uint8 and torch.equal(read[0].permute(1, 2, 0), torch.from_numpy(pixels))

    Image.fromarray(np.dstack([pixels, np.zeros((20, 30), np.uint8)])).save(tmp_path / "clear.png")
    assert (video.read_image(tmp_path / "clear.png") == 255).all()

    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise to be upright
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(video.read_image(tmp_path / "turned.png"), torch.rot90(read, -1, dims=(2, 3)))

    for name, content in (("text.png", b"no image"), ("cut.png", (tmp_path / "a.png").read_bytes()[:200])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as an image"):
            video.read_image(tmp_path / name)


@given(
    have=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    want=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_fit_gives_the_size_asked_for(have, want):
    size = (64 * want[0], 64 * want[1])
    frames = torch.randint(0, 256, (2, 3, *have), dtype=torch.uint8)
    fitted = video.fit(frames, size)
    assert fitted.shape == (2, 3, size[1], size[0]) and fitted.abs().max() <= 1


def test_fit_keeps_the_centre():
    frames = torch.zeros(1, 3, 64, 256, dtype=torch.uint8)
    frames[..., 64:192] = 255  # the central part of the shape 2:1
    assert (video.fit(frames, (128, 64)) == 1).all()
    same = torch.randint(0, 256, (1, 3, 64, 128), dtype=torch.uint8)
    assert torch.allclose(video.fit(same, (128, 64)), same / 127.5 - 1)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as part:
        part.write_text("first")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    for bad, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.txt", "cannot be written")):
        with pytest.raises(InputError, match=message), atomic_write(bad):
            pass


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video.write_clip("12:30.mp4", gradients(2), 7)
    assert video.read_clip("12:30.mp4", 2, 0, 1).shape == (2, 3, 64, 96)
