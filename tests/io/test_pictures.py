"""Pictures as a clip."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from footage import gradients, shown
from PIL import Image

from minimti.config import MODELS
from minimti.io import pictures, video
from minimti.io.files import InputError

TINY = MODELS["tiny"]


@pytest.fixture
def folder(tmp_path):
    """12 pictures, 0.png to 11.png, and what else lies about."""
    for number, picture in enumerate(gradients(12).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    return tmp_path


def test_a_folder_or_a_pattern_is_a_clip(folder):
    for path in (folder, folder / "*.png", str(folder / "*.p?g")):
        video.check_source(path)
        clip = video.read_clip(path, TINY, num_frames=12)
        assert shown(clip.frames, 12) == list(range(12))  # 2 before 10
        assert clip.fps == pytest.approx(7) and clip.source == str(path) and clip.source_size == (96, 64)
        assert clip.duration == pytest.approx(12 / 7)
    clip = video.read_clip(folder, TINY, num_frames=4, sample_fps=5, start=0.4)
    assert shown(clip.frames, 12) == [2, 3, 4, 5] and clip.fps == pytest.approx(5)
    clip = video.read_clip(folder / "1*.png", TINY, num_frames=3, stride=1)
    assert shown(clip.frames, 12) == [1, 10, 11]


def test_pictures_that_make_no_clip_are_named(folder):
    Image.new("RGB", (50, 50)).save(folder / "5.png")
    with pytest.raises(InputError, match="5.png: has another size than .*0.png; a clip is of one size"):
        video.read_clip(folder, TINY, num_frames=12)
    for read in (video.check_source, lambda path: video.read_clip(path, TINY)):
        with pytest.raises(InputError, match="no file has such a name"):
            read(folder / "*.jpg")
    (folder / "3.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match="3.png: cannot be read as an image"):
        video.read_clip(folder, TINY, num_frames=12)


def test_one_picture_is_no_clip(folder):
    for path in (folder / "1.png", folder / "[1].png"):
        with pytest.raises(InputError, match="only one frame is there from 0 s on; a clip needs at least two"):
            video.read_clip(path, TINY)


def test_a_name_may_look_like_a_pattern(folder):
    (folder / "[1]").mkdir()
    Image.new("RGB", (50, 50)).save(folder / "[1]" / "a.png")
    assert pictures.find_pictures(folder / "[1]") == [folder / "[1]" / "a.png"]


def test_digits_that_are_no_decimal_number_are_letters(folder):
    (folder / "1²2.png").touch()
    (folder / "1²10.png").touch()
    names = [path.name for path in pictures.find_pictures(folder / "1²*")]
    assert names == ["1²2.png", "1²10.png"]


def test_a_folder_in_a_folder_is_no_picture(folder):
    (folder / "6.5.png").mkdir()
    assert len(pictures.find_pictures(folder)) == 12
    assert len(pictures.find_pictures(folder / "*")) == 13  # with the text, and neither the folder nor what is hidden


def test_a_folder_that_cannot_be_read_is_one_line(folder, monkeypatch):
    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    for read in (video.check_source, lambda path: video.read_clip(path, TINY)):
        with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
            read(folder)


def animation(path, durations):
    frames = [Image.fromarray(picture) for picture in gradients(len(durations)).permute(0, 2, 3, 1).numpy()]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, lossless=True)


def test_the_times_of_an_animated_webp_are_its_own(tmp_path):
    animation(tmp_path / "a.webp", [100, 300, 100, 500])
    source = pictures.AnimatedWebP(tmp_path / "a.webp")
    assert [time for time, _ in source.frames(0)] == pytest.approx([0, 0.1, 0.4, 0.5])
    clip = video.read_clip(tmp_path / "a.webp", TINY, num_frames=5, end=0.5)
    assert shown(clip.frames, 4) == [0, 1, 1, 1, 3] and clip.source_size == (96, 64)


def test_an_animated_webp_without_times_has_ten_frames_a_second(tmp_path):
    animation(tmp_path / "a.webp", [0] * 4)
    source = pictures.AnimatedWebP(tmp_path / "a.webp")
    assert [time for time, _ in source.frames(0)] == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.apng"])
def test_a_last_frame_that_is_held_counts(tmp_path, name):
    """Frames at 0, 0.1, 0.2 and 0.3 s, the last one until 1.2 s."""
    frames = [Image.new("RGB", (64, 64), (60 * k, 0, 0)) for k in range(4)]
    form = {"save_all": True, "lossless": True} | ({"format": "PNG"} if name == "a.apng" else {})
    frames[0].save(tmp_path / name, append_images=frames[1:], duration=[100, 100, 100, 900], **form)
    clip = video.read_clip(tmp_path / name, TINY, num_frames=12)
    assert clip.times[-1] == pytest.approx(1.1) and clip.duration == pytest.approx(1.2)
    assert "spread evenly" in clip.notes[0]
    shades = ((clip.frames[:, 0, 0, 0] + 1) * 127.5 / 60).round().tolist()
    assert shades == [0, 1, 2] + [3] * 9


def test_a_damaged_webp_is_refused(tmp_path):
    animation(tmp_path / "a.webp", [100] * 4)
    content = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "cut.webp").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cut.webp: cannot be read as an animated WebP .*; convert it to mp4"):
        video.read_clip(tmp_path / "cut.webp", TINY)
    large = content[:24] + (16382).to_bytes(3, "little") * 2 + content[30:]
    (tmp_path / "large.webp").write_bytes(large)
    with pytest.raises(InputError, match="16383x16383 is larger than 50 megapixels a frame"):
        video.read_clip(tmp_path / "large.webp", TINY)


def test_transparency_is_laid_over_white(tmp_path):
    clear = [Image.fromarray(np.full((64, 64, 4), (200, 0, 0, alpha), np.uint8)) for alpha in (0, 255)]
    clear[0].save(tmp_path / "a.webp", save_all=True, append_images=clear[1:], duration=100, lossless=True)
    frames = video.read_clip(tmp_path / "a.webp", TINY, num_frames=2, stride=1).frames
    assert (frames[0] == 1).all() and torch.allclose(frames[1, 0], torch.tensor(200 / 127.5 - 1), atol=0.01)
