"""Clips, written and read back."""

import struct

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimti.config import MODELS
from minimti.io import pixels, video, write
from minimti.io.files import InputError

TINY = MODELS["tiny"]


def gradients(num_frames: int, height: int = 64, width: int = 96) -> torch.Tensor:
    """uint8 [F, 3, H, W]: red grows to the right, green downwards, blue with time."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    frames = [torch.stack([x, y, torch.full_like(x, blue)]) for blue in blues(num_frames)]
    return pixels.to_uint8(torch.stack(frames))


def blues(num_frames: int) -> torch.Tensor:
    return torch.linspace(-0.8, 0.8, num_frames)


def shown(frames: torch.Tensor, num_frames: int) -> list[int]:
    """The numbers of frames, uint8 or in [-1,1], of a clip of `gradients(num_frames)`."""
    blue = frames[:, 2].float().mean(dim=(1, 2))  # [F]
    blue = blue / 127.5 - 1 if frames.dtype == torch.uint8 else blue
    distances = (blue[:, None] - blues(num_frames)).abs()  # [F, num_frames]
    assert distances.min(dim=1).values.max() < 0.03
    return distances.argmin(dim=1).tolist()


def test_a_clip_survives_its_file(tmp_path):
    clip = gradients(14)
    write.write_clip(tmp_path / "a.mp4", clip, 7)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, stream.frames, stream.average_rate) == ("h264", "yuv420p", 14, 7)
        assert (context.width, context.height) == (96, 64)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # a browser can start before it has the whole file
    back, times, fps = video.decode_clip(tmp_path / "a.mp4", 14, 0, None, 1)
    error = (back.float() - clip.float()).abs().mean().item()
    assert back.dtype == torch.uint8 and error < 2.5
    assert times == pytest.approx([i / 7 for i in range(14)]) and fps == pytest.approx(7)


def test_a_clip_is_read_at_the_size_and_length_of_the_model(tmp_path):
    path = tmp_path / "a.mp4"
    write.write_clip(path, gradients(20), 10)
    clip = video.read_clip(path, TINY)
    assert clip.frames.shape == (14, 3, 64, 64) and clip.frames.dtype == torch.float32
    assert torch.equal(clip.frames, pixels.fit(video.decode_clip(path, 14, 0, None, 1)[0], (64, 64)))
    assert (clip.source, clip.source_size) == (str(path), (96, 64)) and clip.fps == pytest.approx(10)
    clip = video.read_clip(path, TINY, num_frames=3, start=0.45, stride=4, size=(128, 64))
    assert clip.frames.shape == (3, 3, 64, 128) and shown(clip.frames, 20) == [5, 9, 13]
    assert clip.times == pytest.approx([0.5, 0.9, 1.3]) and clip.fps == pytest.approx(2.5)
    clip = video.read_clip(path, TINY, num_frames=2, start=0.5, end=1.5)
    assert shown(clip.frames, 20) == [5, 15] and clip.times == (0.5, 1.5) and clip.fps == 1


def test_the_rate_of_a_single_frame_is_the_average_of_its_file(tmp_path):
    write.write_clip(tmp_path / "a.mp4", gradients(4), 12)
    clip = video.read_clip(tmp_path / "a.mp4", TINY, num_frames=1, start=0.1)
    assert clip.fps == 12 and clip.times == pytest.approx([2 / 12])


def test_an_end_spreads_the_frames_evenly_over_the_time(tmp_path):
    """14 frames at 7 per second: frame k is shown from k/7 to (k + 1)/7, the last one until 2 s."""
    path = tmp_path / "a.mp4"
    write.write_clip(path, gradients(14), 7)
    for num_frames, start, end, expected in (
        (14, 0, 13 / 7, list(range(14))),
        (14, 0, 2, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]),
        (3, 0.2, 1.0, [1, 4, 7]),  # shown at 0.2, 0.6 and 1.0
        (5, 0.3, 0.5, [2, 2, 2, 3, 3]),  # more than the file has there
        (2, 3 / 7, 4 / 7, [3, 4]),
        (1, 1.5, 2.0, [10]),
        (2, 1.9, 2.0, [13, 13]),
    ):
        frames, times, fps = video.decode_clip(path, num_frames, start, end, 1)
        assert shown(frames, 14) == expected
        assert times == pytest.approx(np.linspace(start, end, num_frames))
        assert fps == pytest.approx((num_frames - 1) / (end - start) if num_frames > 1 else 7)


def test_an_end_that_cannot_be_is_refused(tmp_path):
    path = tmp_path / "a.mp4"
    write.write_clip(path, gradients(14), 7)
    for start, end, stride, message in (
        (0, 2.1, 1, "ends at 2.000 s, before --end 2.1"),
        (5, 6, 1, "ends at 2.000 s, before --end 6"),
        (1, 1, 1, "--end 1: must be later than the start, 1 s"),
        (1, 0.5, 1, "--end 0.5: must be later"),
        (0, 1, 2, "--stride 2: with --end"),
    ):
        with pytest.raises(InputError, match=message):
            video.read_clip(path, TINY, start=start, end=end, stride=stride)


def test_times_are_counted_from_the_first_frame_of_the_file(tmp_path):
    """A transport stream begins at an arbitrary time; a raw stream has no times, and its rate counts them."""
    for name in ("a.ts", "a.h264"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
            for pixels in gradients(6).permute(0, 2, 3, 1).numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
            container.mux(stream.encode())
        frames, times, fps = video.decode_clip(tmp_path / name, 3, 0, None, 2)
        assert shown(frames, 6) == [0, 2, 4] and times == pytest.approx([0, 0.08, 0.16]) and fps == pytest.approx(12.5)
        assert shown(video.decode_clip(tmp_path / name, 3, 0, 0.2, 1)[0], 6) == [0, 2, 5]


@given(num_frames=st.integers(1, 4), start=st.integers(0, 12), stride=st.integers(1, 4))
def test_frames_are_chosen_by_time_and_stride(tmp_path_factory, num_frames, start, stride):
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    write.write_clip(path, gradients(12), 7)
    wanted = [start + i * stride for i in range(num_frames)]
    if wanted[-1] < 12:
        frames, times, fps = video.decode_clip(path, num_frames, start / 7, None, stride)
        assert shown(frames, 12) == wanted and times == pytest.approx([k / 7 for k in wanted])
        assert fps == pytest.approx(7 / stride if num_frames > 1 else 7)
    else:
        with pytest.raises(InputError, match=f"but only {12 - start} are there; start earlier, or lower --stride"):
            video.decode_clip(path, num_frames, start / 7, None, stride)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_clips_filmed_sideways_stand_upright(tmp_path, quarter_turns):
    """A phone stores the frames of its sensor and a matrix with its orientation."""
    clip = gradients(2)
    write.write_clip(tmp_path / "a.mp4", clip, 7)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter_turns]  # clockwise on the screen, whose y points down
    matrix = struct.pack(">9i", *(round(v * 2**16) for v in (cos, sin, 0, -sin, cos, 0, 0, 0)), 2**30)
    at = content.index(b"tkhd") + 4 + 40  # version 0: forty bytes of other fields come first
    content[at : at + 36] = matrix
    (tmp_path / "b.mp4").write_bytes(content)
    upright, *_ = video.decode_clip(tmp_path / "b.mp4", 2, 0, None, 1)
    stored, *_ = video.decode_clip(tmp_path / "a.mp4", 2, 0, None, 1)
    assert torch.equal(upright, torch.rot90(stored, -quarter_turns, dims=(2, 3)))
    size = (96, 64) if quarter_turns == 2 else (64, 96)
    assert video.read_clip(tmp_path / "b.mp4", TINY, num_frames=2).source_size == size


def test_unreadable_videos_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    write.write_clip(tmp_path / "cut.mp4", gradients(14), 7)
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
            video.read_clip(tmp_path / name, TINY)


@given(
    have=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    want=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_fit_gives_the_requested_size(have, want):
    size = (64 * want[0], 64 * want[1])
    frames = torch.randint(0, 256, (2, 3, *have), dtype=torch.uint8)
    fitted = pixels.fit(frames, size)
    assert fitted.shape == (2, 3, size[1], size[0]) and fitted.abs().max() <= 1


def test_fit_keeps_the_centre():
    frames = torch.zeros(1, 3, 64, 256, dtype=torch.uint8)
    frames[..., 64:192] = 255  # the central part of the shape 2:1
    assert (pixels.fit(frames, (128, 64)) == 1).all()
    same = torch.randint(0, 256, (1, 3, 64, 128), dtype=torch.uint8)
    assert torch.allclose(pixels.fit(same, (128, 64)), same / 127.5 - 1)


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write.write_clip("12:30.mp4", gradients(2), 7)
    assert video.read_clip("12:30.mp4", TINY, num_frames=2).frames.shape == (2, 3, 64, 64)


def test_a_strip_has_a_row_for_each_clip():
    clips = torch.stack([torch.full((3, 3, 4, 5), value) for value in (-2.0, 1.0)])
    clips[1, 2] = 0
    picture = pixels.strip(clips)
    assert picture.shape == (8, 15, 3) and picture.dtype == torch.uint8
    assert (picture[:4] == 0).all() and (picture[4:, :10] == 255).all() and (picture[4:, 10:] == 128).all()
