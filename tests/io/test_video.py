"""Clips and images, written and read back."""

import warnings
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from footage import encode, gradients, pictures, shown
from hypothesis import given, settings
from hypothesis import strategies as st

from minimti.config import MODELS
from minimti.io import pixels, video, write
from minimti.io.decode import VideoFile
from minimti.io.files import InputError

TINY = MODELS["tiny"]


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
    back = pictures(tmp_path / "a.mp4")
    error = (back.float() - clip.float()).abs().mean().item()
    assert back.dtype == torch.uint8 and error < 2.5
    with VideoFile(tmp_path / "a.mp4") as source:
        assert [time for time, _ in source.frames(0)] == pytest.approx([i / 7 for i in range(14)])


def test_a_clip_is_read_at_the_size_and_length_of_the_model(tmp_path):
    path = tmp_path / "a.mp4"
    write.write_clip(path, gradients(20), 10)
    clip = video.read_clip(path, TINY)
    assert clip.frames.shape == (14, 3, 64, 64) and clip.frames.dtype == torch.float32
    wanted = pictures(path)[[10 * k // 7 for k in range(14)]]
    assert torch.equal(clip.frames, pixels.fit(wanted, (64, 64)))
    assert (clip.source, clip.source_size) == (str(path), (96, 64))
    clip = video.read_clip(path, TINY, num_frames=3, start=0.45, stride=4, size=(128, 64))
    assert clip.frames.shape == (3, 3, 64, 128) and shown(clip.frames, 20) == [4, 8, 12]
    assert clip.times == pytest.approx([0.4, 0.8, 1.2]) and clip.fps == pytest.approx(2.5)
    clip = video.read_clip(path, TINY, num_frames=2, start=0.5, end=1.5)
    assert shown(clip.frames, 20) == [5, 15] and clip.times == (0.5, 1.5) and clip.fps == 1


@pytest.mark.parametrize("rate", [7, 10, 24, 30, 60])
def test_a_clip_plays_at_the_models_rate_whatever_its_own(tmp_path, rate):
    """Two seconds of any video are learnt, as 14 frames that are 1/7 s apart."""
    encode(tmp_path / "a.mp4", gradients(5 * rate // 2), rate)
    clip = video.read_clip(tmp_path / "a.mp4", TINY, start=0.3)
    assert clip.times == pytest.approx([0.3 + k / 7 for k in range(14)]) and clip.fps == pytest.approx(7)
    assert torch.equal(
        clip.frames, pixels.fit(pictures(tmp_path / "a.mp4")[[int((0.3 + k / 7) * rate) for k in range(14)]], (64, 64))
    )
    assert clip.source_fps == pytest.approx(rate, rel=0.05) and clip.notes == ()


def test_the_rate_follows_the_models_fps_id(tmp_path):
    encode(tmp_path / "a.mp4", gradients(20), 10)
    config = replace(TINY, micro=replace(TINY.micro, fps_id=4))
    assert shown(video.read_clip(tmp_path / "a.mp4", config, num_frames=5).frames, 20) == [0, 2, 4, 6, 8]
    clip = video.read_clip(tmp_path / "a.mp4", config, num_frames=5, sample_fps=2.5)
    assert shown(clip.frames, 20) == [0, 4, 8, 12, 16] and clip.fps == pytest.approx(2.5)


def test_a_shorter_clip_is_spread_over_its_whole_length_and_this_is_said(tmp_path):
    encode(tmp_path / "a.mp4", gradients(10), 10)
    clip = video.read_clip(tmp_path / "a.mp4", TINY, num_frames=10, start=0.1)
    assert clip.times == pytest.approx(np.linspace(0.1, 0.9, 10)) and clip.fps == pytest.approx(9 / 0.8)
    assert shown(clip.frames, 10) == [1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    (note,) = clip.notes
    assert "10 frames at 7 fps from 0.1 s end at 1.39 s, but the file at 1.00 s: spread evenly until there" in note


def test_a_clip_of_few_frames_is_warned_of(tmp_path):
    encode(tmp_path / "a.mp4", gradients(20), 10)
    with pytest.warns(UserWarning, match=r"a\.mp4: only 3 frames of the file make up these 10"):
        video.read_clip(tmp_path / "a.mp4", TINY, num_frames=10, start=1.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video.read_clip(tmp_path / "a.mp4", TINY, num_frames=10, start=1.6)


@pytest.mark.parametrize("options", [{"num_frames": 0}, {"start": -1}, {"stride": 0}, {"sample_fps": 0}], ids=str)
def test_numbers_that_no_clip_has_are_refused(tmp_path, options):
    encode(tmp_path / "a.mp4", gradients(3), 10)
    with pytest.raises(ValueError, match="frames, rate and stride must be above 0, and the start at least 0"):
        video.read_clip(tmp_path / "a.mp4", TINY, **options)


def test_the_whole_of_the_last_frame_counts(tmp_path):
    """14 frames at 7 per second are exactly as long as the model takes: nothing is spread."""
    encode(tmp_path / "a.mp4", gradients(14), 7)
    clip = video.read_clip(tmp_path / "a.mp4", TINY)
    assert shown(clip.frames, 14) == list(range(14)) and clip.notes == ()
    assert clip.fps == pytest.approx(7) and clip.duration == pytest.approx(2)


@pytest.mark.parametrize("name, rate", [("a.mp4", 24), ("a.mp4", 30), ("a.mkv", 24), ("a.mkv", 60)])
def test_an_end_may_be_that_of_the_file(tmp_path, name, rate):
    """Matroska counts milliseconds: the last of 48 frames at 24 per second is at 1.958, after 1.917."""
    encode(tmp_path / name, gradients(2 * rate), rate)
    clip = video.read_clip(tmp_path / name, TINY, num_frames=4, end=2)
    last = pixels.fit(pictures(tmp_path / name)[-1:], (64, 64))
    assert clip.times[-1] == 2 and torch.equal(clip.frames[-1:], last)


def test_times_that_a_file_rounds_are_still_those_of_its_frames(tmp_path):
    """Matroska counts milliseconds: frame 1 of 7 per second is shown at 0.143, after 1/7."""
    encode(tmp_path / "a.mkv", gradients(14), 7)
    assert shown(video.read_clip(tmp_path / "a.mkv", TINY).frames, 14) == list(range(14))


@given(times=st.lists(st.integers(0, 40), min_size=3, max_size=12, unique=True), start=st.integers(0, 20))
@settings(max_examples=10)
def test_each_sample_is_the_frame_shown_at_its_time(tmp_path_factory, times, start):
    """Variable rates: the last frame at or before the time, before the first one the first."""
    times = [time - min(times) for time in sorted(times)]
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    encode(path, gradients(len(times)), 10, times=times)
    wanted = [start / 10 + k * 0.25 for k in range(4)]
    if wanted[-1] <= times[-1] / 10:
        clip = video.read_clip(path, TINY, num_frames=4, start=start / 10, sample_fps=4)
        expected = [max(i for i, time in enumerate(times) if time / 10 <= t + 1e-6) for t in wanted]
        assert shown(clip.frames, len(times)) == expected and clip.times == pytest.approx(wanted)


def test_the_rate_of_a_single_frame_is_the_average_of_its_file(tmp_path):
    write.write_clip(tmp_path / "a.mp4", gradients(4), 12)
    clip = video.read_clip(tmp_path / "a.mp4", TINY, num_frames=1, start=0.1)
    assert clip.fps == 12 and clip.times == (0.1,) and shown(clip.frames, 4) == [1]


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing moves
            clip = video.read_clip(path, TINY, num_frames=num_frames, start=start, end=end)
        assert shown(clip.frames, 14) == expected
        assert clip.times == pytest.approx(np.linspace(start, end, num_frames))
        assert clip.fps == pytest.approx((num_frames - 1) / (end - start) if num_frames > 1 else 7)


def test_times_that_cannot_be_are_refused(tmp_path):
    path = tmp_path / "a.mp4"
    write.write_clip(path, gradients(14), 7)
    for options, message in (
        ({"end": 2.1}, "ends at 2.000 s, before --end 2.1"),
        ({"start": 5, "end": 6}, "ends at 2.000 s, before --end 6"),
        ({"start": 1, "end": 1}, "--end 1: must be later than the start, 1 s"),
        ({"start": 1, "end": 0.5}, "--end 0.5: must be later"),
        ({"end": 1, "stride": 2}, "--end and --stride: each of them says which frames to take"),
        ({"end": 1, "sample_fps": 2}, "--end and --sample-fps: each of them"),
        ({"start": 2.5}, "ends at 2.000 s, before --start 2.5; start earlier"),
        ({"start": 1.9}, "only one frame is there from 1.9 s on; a clip needs at least two"),
        ({"sample_fps": 2}, "14 frames at 2 fps from 0 s end at 6.50 s, but the file at 2.00 s; raise --sample-fps"),
        (
            {"stride": 2},
            "14 frames at stride 2 from 0 s need 27 frames, but only 14 are there; start earlier, or lower",
        ),
    ):
        with pytest.raises(InputError, match=message):
            video.read_clip(path, TINY, **options)


def test_a_line_says_what_was_taken(tmp_path):
    encode(tmp_path / "a.mp4", gradients(75, 160, 90), 30)
    with pytest.warns(UserWarning, match="a.mp4: only 32% of the picture is used; --fit pad uses all of it"):
        clip = video.read_clip(tmp_path / "a.mp4", MODELS["svd"], size=(1024, 576))
    about = "0.00 to 1.86 s of 2.5 s, 30 fps, every 4.3rd frame; keeps 100 % of the width, 32 % of the height"
    assert clip.about() == about


@pytest.mark.parametrize(
    "ratio, words",
    [
        (1, "every frame"),
        (1.04, "every frame"),
        (2, "every 2nd frame"),
        (3.02, "every 3rd frame"),
        (4.29, "every 4.3rd frame"),
        (11, "every 11th frame"),
        (13, "every 13th frame"),
        (13.1, "every 13.1st frame"),
        (0.5, "each frame 2.0 times"),
    ],
)
def test_how_many_frames_go_on_one(ratio, words):
    assert video._every(ratio) == words


def test_a_portrait_clip_is_learnt_in_portrait(tmp_path):
    encode(tmp_path / "a.mp4", gradients(14, 160, 90), 7)
    clip = video.read_clip(tmp_path / "a.mp4", MODELS["svd"])
    assert clip.frames.shape == (14, 3, 1024, 576) and min(clip.kept) > 0.97
    clip = video.read_clip(tmp_path / "a.mp4", MODELS["svd"], num_frames=2, size=(128, 64), how="pad")
    assert clip.frames.shape == (2, 3, 64, 128) and clip.kept == (1, 1)
    assert (clip.frames[..., :40] == -1).all() and (clip.frames[..., 50:78] > -1).float().mean() > 0.9


def test_a_clip_in_which_nothing_moves_is_warned_of(tmp_path):
    encode(tmp_path / "a.mp4", gradients(1).expand(14, -1, -1, -1), 7)
    with pytest.warns(UserWarning, match="nothing moves in these frames"):
        video.read_clip(tmp_path / "a.mp4", TINY)
    moving = gradients(1).repeat(14, 1, 1, 1)
    for k, frame in enumerate(moving):
        frame[:, 30:36, 20 + 2 * k : 26 + 2 * k] = 255  # a small thing is enough
    encode(tmp_path / "b.mp4", moving, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video.read_clip(tmp_path / "b.mp4", TINY)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_what_moves_in_one_colour_alone_moves(channel):
    frames = torch.zeros(3, 3, 64, 64)
    frames[1, channel] = 20 / 127.5
    assert video._moves(frames)


def test_times_are_counted_from_the_first_frame_of_the_file(tmp_path):
    """A transport stream begins at an arbitrary time; a raw stream has no times, and its rate counts them."""
    for name in ("a.ts", "a.h264"):
        encode(tmp_path / name, gradients(6), 25)
        clip = video.read_clip(tmp_path / name, TINY, num_frames=3, stride=2)
        assert shown(clip.frames, 6) == [0, 2, 4] and clip.fps == pytest.approx(12.5)
        assert clip.times == pytest.approx([0, 0.08, 0.16])
        assert shown(video.read_clip(tmp_path / name, TINY, num_frames=3, end=0.2).frames, 6) == [0, 2, 5]
