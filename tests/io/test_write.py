"""What is written: the same bytes for the same clip, at the exact rate, whole or not at all whatever writes it."""

import errno
import os
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from disks import files_of_at_most
from PIL import Image
from safetensors.torch import save_file

from minimti.config import MODELS
from minimti.io import video, write
from minimti.io.files import DiskFull, InputError, atomic_write

NOISE = torch.randint(0, 256, (8, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def save_tensor(path: str | Path) -> None:
    with atomic_write(path) as part, open(part, "wb") as file:  # by its name, torch 2.6 loses a full disk's last bytes
        torch.save({"tokens": NOISE}, file)


def save_safetensors(path: str | Path) -> None:
    with atomic_write(path) as part:
        save_file({"tokens": NOISE}, part)


def save_picture(path: str | Path) -> None:
    write.write_strip(path, NOISE[None] / 127.5 - 1)


def save_clip(path: str | Path) -> None:
    write.write_clip(path, NOISE, 7)


def save_gif(path: str | Path) -> None:
    write.write_gif(path, NOISE, 7)


WRITERS = {
    "a.gif": save_gif,
    "a.pt": save_tensor,
    "a.safetensors": save_safetensors,
    "a.png": save_picture,
    "a.mp4": save_clip,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_names_a_full_disk(tmp_path, name):
    """Full at once, later, and when but the end of the file is missing; the file that is there stays."""
    WRITERS[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for room in (0, 1000, len(whole) // 2, len(whole) - 1):
        with files_of_at_most(room), pytest.raises(InputError) as info:
            WRITERS[name](tmp_path / name)
        assert str(info.value).startswith(f"{tmp_path}/{name}: cannot be written (File too large); make room there")
        assert (tmp_path / name).read_bytes() == whole and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_takes_any_name(tmp_path, name):
    """Bytes that are no text, signs that mean something elsewhere, a name as long as can be: the same content."""
    suffix = Path(name).suffix
    odd = [b"\xff\xfe", "日本".encode(), b"a:b", b"-", b"%d", b"a\nb", b"x" * (255 - len(suffix))]
    for folder in (os.fsencode(tmp_path) + b"/plain", os.fsencode(tmp_path) + b"/\xff"):
        os.mkdir(folder)
        for stem in odd:
            WRITERS[name](os.fsdecode(folder + b"/" + stem + suffix.encode()))
        contents = {path.read_bytes() for path in Path(os.fsdecode(folder)).iterdir()}
        assert len(os.listdir(folder)) == len(odd) and len(contents) == 1


@pytest.mark.parametrize("name", WRITERS)
def test_a_name_says_which_format_is_meant_not_what_it_links_to(tmp_path, name):
    WRITERS[name](tmp_path / name)
    (tmp_path / f"link{Path(name).suffix}").symlink_to("target.txt")
    WRITERS[name](tmp_path / f"link{Path(name).suffix}")
    assert (tmp_path / "target.txt").read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_leaves_the_permissions_to_the_umask(tmp_path, name):
    (tmp_path / "new").touch()
    WRITERS[name](tmp_path / name)
    assert (tmp_path / name).stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_picture_is_that_of_its_strip(tmp_path):
    save_picture(tmp_path / "a.png")
    picture = np.array(Image.open(tmp_path / "a.png"))
    assert (picture == NOISE.permute(2, 0, 3, 1).reshape(64, 8 * 96, 3).numpy()).all()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 3, 64, 64),
        torch.zeros(1, 4, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(4, 1, 64, 64, dtype=torch.uint8),
        torch.zeros(4, 3, 63, 64, dtype=torch.uint8),
        torch.zeros(4, 3, 64, 63, dtype=torch.uint8),
    ],
)
def test_only_uint8_frames_are_written(tmp_path, tensor):
    with pytest.raises(ValueError, match=re.escape(f"not {tensor.dtype} {list(tensor.shape)}")):
        write.write_clip(tmp_path / "a.mp4", tensor, 7)
    assert list(tmp_path.iterdir()) == []


def test_the_same_clip_gives_the_same_bytes(tmp_path):
    """Reading in between fills the heap with other values: an encoder that looks at memory it never wrote shows."""
    y, x, t = torch.meshgrid(torch.linspace(0, 255, 64), torch.linspace(0, 255, 96), torch.arange(14.0), indexing="ij")
    clip = torch.stack([x, y, 18 * t]).permute(3, 0, 1, 2).byte()  # [14, 3, 64, 96]
    contents = set()
    for _ in range(20):
        write.write_clip(tmp_path / "a.mp4", clip, 7)
        contents.add((tmp_path / "a.mp4").read_bytes())
        video.read_clip(tmp_path / "a.mp4", MODELS["tiny"])
    assert len(contents) == 1


@pytest.mark.parametrize("fps, rate", [(7, 7), (24, 24), (25.0, 25), (29.97002997, Fraction(30000, 1001))])
def test_the_rate_is_exact(tmp_path, fps, rate):
    write.write_clip(tmp_path / "a.mp4", NOISE[:4], fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == rate


def test_the_slowest_clips_are_written_too(tmp_path):
    """A frame in ten minutes and in a day; as a GIF a frame a second."""
    for fps in (1 / 600, 1 / 86_400):
        write.write_clip(tmp_path / "a.mp4", NOISE[:2], fps)
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert container.streams.video[0].average_rate < 0.0017
        write.write_gif(tmp_path / "a.gif", NOISE[[0, 0, 1]], fps)
        with Image.open(tmp_path / "a.gif") as gif:
            assert gif.n_frames == 2 and gif.info["duration"] == 2000


def test_a_gif_keeps_the_rate_over_its_length(tmp_path):
    """7 frames a second are 14.29 hundredths each."""
    write.write_gif(tmp_path / "a.gif", NOISE[[0, 1, 2, 3, 4, 5, 6]], 7)
    durations = []
    with Image.open(tmp_path / "a.gif") as gif:
        for index in range(gif.n_frames):
            gif.seek(index)
            durations.append(gif.info["duration"])
    assert len(durations) == 7 and sum(durations) == 1000 and set(durations) == {140, 150}


def test_a_gif_shows_a_frame_for_a_hundredth_of_a_second_at_least(tmp_path):
    write.write_gif(tmp_path / "a.gif", NOISE[:4], 200)
    with Image.open(tmp_path / "a.gif") as gif:
        assert [gif.seek(index) or gif.info["duration"] for index in range(gif.n_frames)] == [10, 10, 10, 10]


def test_frames_are_lossless_and_take_the_place_of_earlier_ones(tmp_path):
    write.write_frames(tmp_path / "a", NOISE)
    write.write_frames(tmp_path / "a", NOISE[:3])
    assert sorted(os.listdir(tmp_path / "a")) == ["00000.png", "00001.png", "00002.png"] and os.listdir(tmp_path) == [
        "a"
    ]
    assert (np.array(Image.open(tmp_path / "a" / "00002.png")) == NOISE[2].permute(1, 2, 0).numpy()).all()
    (tmp_path / "new").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_frames_replace_nothing_else(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "00000.png").touch()
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "to_empty").symlink_to("empty")
    for name in ("a", "file", "link", "to_empty"):
        with pytest.raises(InputError, match="name another --out"):
            write.write_frames(tmp_path / name, NOISE)
    assert sorted(os.listdir(tmp_path)) == ["a", "empty", "file", "link", "to_empty"]
    assert len(os.listdir(tmp_path / "a")) == 2


def test_frames_appear_whole_or_not_at_all(tmp_path):
    write.write_frames(tmp_path / "a", NOISE[:2])
    with files_of_at_most(1000), pytest.raises(DiskFull, match="a: cannot be written .*; make room there"):
        write.write_frames(tmp_path / "a", NOISE)
    assert os.listdir(tmp_path) == ["a"] and len(os.listdir(tmp_path / "a")) == 2


def test_earlier_frames_stay_where_the_new_ones_cannot_take_their_place(tmp_path, monkeypatch):
    write.write_frames(tmp_path / "a", NOISE[:2])
    rename = os.rename

    def refuse(source, target):
        if source.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(InputError, match=r"a: cannot be written \(Input/output error\)"):
        write.write_frames(tmp_path / "a", NOISE)
    assert os.listdir(tmp_path) == ["a"] and len(os.listdir(tmp_path / "a")) == 2


def test_frames_are_on_the_disk_before_they_take_their_name(tmp_path, monkeypatch):
    calls = []

    def note(function, name):
        def noting(first, *rest):
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            calls.append((name, "." if path == str(tmp_path) else os.path.basename(path)))
            return function(first, *rest)

        monkeypatch.setattr(os, name, noting)

    note(os.fsync, "fsync")
    note(os.rename, "rename")
    write.write_frames(tmp_path / "a", NOISE[:2])
    synced = [("fsync", name) for name in ("00000.png", "00001.png", "new")]
    assert calls == [*synced, ("rename", "new"), ("fsync", ".")]


def test_a_folder_of_frames_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    for name, message in (("", "Permission denied"), ("x" * 300, "File name too long")):
        with pytest.raises(InputError, match=rf"cannot be read \({message}\); name another --out"):
            write.check_frames(tmp_path / name)


@pytest.mark.parametrize(
    "size, factor", [((64, 64), 4), ((96, 192), 2), ((255, 1), 2), ((256, 10), 1), ((576, 1024), 1)]
)
def test_small_videos_are_enlarged_by_the_least_whole_number(size, factor):
    video = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    large = write.enlarged(video)
    assert large.shape[-2:] == (factor * size[0], factor * size[1])
    assert all(torch.equal(large[..., y::factor, x::factor], video) for y in range(factor) for x in range(factor))


def test_a_comment_is_in_the_metadata_of_an_mp4(tmp_path):
    text = '{"image": "日本 <&>", "many": "' + "x" * 10_000 + '"}'
    write.write_clip(tmp_path / "a.mp4", NOISE, 7, comment=text)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == text
