"""Files of all kinds: what they hold is read, in the right order and upright, and nothing else is opened."""

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from disks import files_of_at_most
from footage import encode, gradients, pictures, shown
from PIL import Image, features

from minimti.config import MODELS
from minimti.io import video, write
from minimti.io.decode import VideoFile
from minimti.io.files import InputError

TINY = MODELS["tiny"]


@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mkv", "libx264", "yuv420p"),
        ("a.mov", "mpeg4", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.ts", "mpeg2video", "yuv420p"),
        ("a.mpg", "mpeg1video", "yuv420p"),
        ("a.flv", "flv", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
        ("a.apng", "apng", "rgb24"),
        ("a.nut", "ffv1", "yuv444p10le"),
        ("a.mjpeg", "mjpeg", "yuvj420p"),
    ],
)
def test_what_people_have_is_read(tmp_path, name, codec, pix_fmt):
    rate = 25 if name != "a.gif" else 20  # MPEG allows few rates, GIF counts hundredths
    encode(tmp_path / name, gradients(20), rate, codec, pix_fmt)
    clip = video.read_clip(tmp_path / name, TINY, num_frames=5, start=0.4, stride=2)
    first = round(0.4 * rate)
    assert shown(clip.frames, 20) == [first + 2 * k for k in range(5)]
    assert clip.times == pytest.approx([0.4 + 2 * k / rate for k in range(5)], abs=1e-3)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_clips_filmed_sideways_stand_upright(tmp_path, quarter_turns):
    """A phone stores the frames of its sensor and a matrix with its orientation."""
    write.write_clip(tmp_path / "a.mp4", gradients(2), 7)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter_turns]  # clockwise on the screen, whose y points down
    matrix = struct.pack(">9i", *(round(v * 2**16) for v in (cos, sin, 0, -sin, cos, 0, 0, 0)), 2**30)
    at = content.index(b"tkhd") + 4 + 40  # version 0: forty bytes of other fields come first
    content[at : at + 36] = matrix
    (tmp_path / "b.mp4").write_bytes(content)
    stored = pictures(tmp_path / "a.mp4")
    assert torch.equal(pictures(tmp_path / "b.mp4"), torch.rot90(stored, -quarter_turns, dims=(2, 3)))
    size = (96, 64) if quarter_turns == 2 else (64, 96)
    assert video.read_clip(tmp_path / "b.mp4", TINY, num_frames=2).source_size == size


def test_recordings_that_were_joined_go_on(tmp_path):
    """Two transport streams, one after the other, as cameras cut them: the times begin again in the middle."""
    clip = gradients(30)
    for name, part in (("a.ts", clip[:15]), ("b.ts", clip[15:])):
        encode(tmp_path / name, part, 10)
    (tmp_path / "c.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    with VideoFile(tmp_path / "c.ts") as source:
        assert [time for time, _ in source.frames(0)] == pytest.approx([k / 10 for k in range(30)], abs=0.05)
    numbers = shown(pictures(tmp_path / "c.ts"), 30)
    assert all(abs(number - k) <= 1 for k, number in enumerate(numbers))  # neighbours look alike


def test_recordings_that_were_joined_keep_their_holes(tmp_path):
    times = [*range(8), *range(20, 27)]
    encode(tmp_path / "a.ts", gradients(15), 10, times=times)
    (tmp_path / "b.ts").write_bytes(3 * (tmp_path / "a.ts").read_bytes())
    with VideoFile(tmp_path / "b.ts") as source:
        expected = [(27 * part + time) / 10 for part in range(3) for time in times]
        assert [time for time, _ in source.frames(0)] == pytest.approx(expected, abs=0.05)


def retimed(path: Path, times: list[int]) -> None:
    """A Matroska file whose frames, in this order, have these times in tenths of a second."""
    encode(path.with_suffix(".mjpeg"), gradients(len(times)), 10, "mjpeg", "yuvj420p")
    with av.open(str(path.with_suffix(".mjpeg"))) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for dts, time, packet in zip(range(-len(times), 0), times, source.demux(video=0)):
            packet.stream, packet.time_base, packet.duration = stream, Fraction(1, 10), 1
            packet.pts, packet.dts = time, dts
            container.mux(packet)


def test_times_never_fall(tmp_path):
    retimed(tmp_path / "a.mkv", [5, 6, 7, 2, 3, 8])
    with VideoFile(tmp_path / "a.mkv") as source:
        assert [time for time, _ in source.frames(0)] == pytest.approx([0, 0.1, 0.2, 0.2, 0.2, 0.3])


def test_the_last_frame_is_shown_as_long_as_others_where_two_have_its_time(tmp_path):
    retimed(tmp_path / "a.mkv", [*range(19), 18])
    clip = video.read_clip(tmp_path / "a.mkv", TINY)
    assert clip.notes == () and clip.times[-1] == pytest.approx(13 / 7)


def test_empty_packets_hold_the_frame_before(tmp_path):
    """An AVI has no other way to say that nothing new is shown."""
    encode(tmp_path / "a.avi", gradients(6), 10, "mpeg4", times=[0, 1, 2, 8, 9, 10])
    with VideoFile(tmp_path / "a.avi") as source:
        assert [time for time, _ in source.frames(0)] == pytest.approx([0, 0.1, 0.2, 0.8, 0.9, 1.0])
    assert shown(video.read_clip(tmp_path / "a.avi", TINY, num_frames=6, end=1).frames, 6) == [0, 2, 2, 2, 3, 5]


def test_a_change_of_size_is_refused_where_it_matters(tmp_path):
    encode(tmp_path / "a.ts", gradients(6), 10, "mpeg2video")
    encode(tmp_path / "b.ts", gradients(6, 96, 128), 10, "mpeg2video")
    (tmp_path / "c.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    with pytest.raises(InputError, match="its frames change their size; cut it to a part of one size"):
        video.read_clip(tmp_path / "c.ts", TINY, num_frames=10, stride=1)
    assert video.read_clip(tmp_path / "c.ts", TINY, num_frames=4, stride=1).source_size == (96, 64)


def test_of_several_films_the_default_is_taken_else_the_largest(tmp_path):
    for default in (None, 0):
        with av.open(str(tmp_path / "a.mkv"), "w") as container:
            for index, (height, width) in enumerate([(32, 48), (64, 96), (48, 64)]):
                stream = container.add_stream("mpeg4", rate=7)
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                stream.disposition = Disposition.default if index == default else 0
            for packets in range(3):
                for stream in container.streams.video:
                    picture = np.full((stream.height, stream.width, 3), 80 * packets, np.uint8)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            for stream in container.streams.video:
                container.mux(stream.encode())
        with VideoFile(tmp_path / "a.mkv") as source:
            assert source.size == ((96, 64) if default is None else (48, 32))


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_one_picture_is_not_the_film_even_by_default(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as container:
        for height, width in ((64, 96), (32, 48)):
            stream = container.add_stream("mpeg4", rate=7)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        picture, film = container.streams.video
        picture.disposition, film.disposition = Disposition.default, 0
        for stream in (picture, film, film, film):
            frame = np.zeros((stream.height, stream.width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux([*picture.encode(), *film.encode()])
    with VideoFile(tmp_path / name) as source:
        assert source.size == (48, 32)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.avi"])
@pytest.mark.parametrize("aspect", ["10/1", "1/10"])
def test_a_shape_that_no_pixel_has_is_taken_for_a_square(tmp_path, name, aspect):
    encode(tmp_path / name, gradients(2), 7, "mpeg4", aspect=aspect)
    assert video.read_clip(tmp_path / name, TINY, num_frames=2, stride=1).kept == pytest.approx((2 / 3, 1))


def test_the_still_of_an_animated_avif_is_not_the_film(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    frames = [Image.fromarray(np.full((64, 96, 3), 20 * k, np.uint8)) for k in range(10)]
    frames[0].save(tmp_path / "a.avif", save_all=True, append_images=frames[1:], duration=100)
    clip = video.read_clip(tmp_path / "a.avif", TINY, num_frames=5, sample_fps=5)
    greys = clip.frames.mean(dim=(1, 2, 3)) * 127.5 + 127.5
    assert greys.tolist() == pytest.approx([0, 40, 80, 120, 160], abs=3)


def test_titles_need_not_be_text(tmp_path):
    encode(tmp_path / "a.mkv", gradients(14), 7, title="a title")
    content = (tmp_path / "a.mkv").read_bytes()
    assert content.count(b"a title") == 1
    (tmp_path / "a.mkv").write_bytes(content.replace(b"a title", b"\xff\xfe\x80tle\xc3"))
    assert shown(video.read_clip(tmp_path / "a.mkv", TINY).frames, 14) == list(range(14))


def test_a_pipe_is_opened_once(tmp_path):
    """As `train.py <(...)` does; an mp4 must be sought in, which a pipe cannot be."""
    encode(tmp_path / "a.mp4", gradients(14), 7)
    content, opened = (tmp_path / "a.mp4").read_bytes(), []
    os.mkfifo(tmp_path / "pipe")

    def feed() -> None:
        with open(tmp_path / "pipe", "wb") as pipe:
            opened.append(1)
            pipe.write(content)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    video.check_source(tmp_path / "pipe")
    clip = video.read_clip(tmp_path / "pipe", TINY)
    thread.join(timeout=10)
    assert shown(clip.frames, 14) == list(range(14)) and opened == [1] and not thread.is_alive()


@pytest.mark.parametrize("size", [5_000, 3_000_000])  # the first is in a buffer until the end
def test_a_pipe_for_whose_copy_there_is_no_room_is_told_apart(size):
    read, write = os.pipe()
    thread = threading.Thread(target=feed, args=(write, bytes(size)))
    thread.start()
    with files_of_at_most(1000), pytest.raises(InputError) as info:
        video.read_clip(f"/dev/fd/{read}", TINY)
    os.close(read)
    thread.join()
    assert f"cannot be copied to {tempfile.gettempdir()} (File too large); make room there" in str(info.value)


def feed(descriptor: int, content: bytes) -> None:
    with suppress(BrokenPipeError), open(descriptor, "wb") as pipe:
        pipe.write(content)


def test_a_device_is_no_clip():
    with pytest.raises(InputError, match="/dev/zero: is neither a file nor a pipe"):
        video.read_clip("/dev/zero", TINY)


@pytest.fixture
def listener():
    """A local server -> its port, and the connections that it got."""
    server, heard = socket.create_server(("127.0.0.1", 0)), []
    server.settimeout(0.05)
    done = threading.Event()

    def listen() -> None:
        while not done.is_set():
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            heard.append(connection.recv(1000))
            connection.close()

    thread = threading.Thread(target=listen)
    thread.start()
    yield server.getsockname()[1], heard
    done.set()
    thread.join()
    server.close()


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile {file}\n",
    "ffconcat of a network": "ffconcat version 1.0\nfile {url}\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n",
    "m3u8 of a network": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{url}\n#EXT-X-ENDLIST\n",
    "m3u8 with a key": '#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n#EXTINF:9,\n{path}\n',
    "m3u8 of data": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\ndata:video/mp4;base64,AAAA\n#EXT-X-ENDLIST\n",
    "m3u8 of a part": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsubfile,,start,0,end,0,,:{path}\n#EXT-X-ENDLIST\n",
    "m3u8 of several": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nconcat:{path}|{path}\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
    'bandwidth="1"><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n",
    "rtsp": "[Reference]\nRef1={url}\n",
    "text": "a text of some length, which a terminal could show\n" * 40,
    "subtitles": "1\n00:00:00,000 --> 00:00:02,000\ntext\n",
}


@pytest.mark.parametrize("content", PLAYLISTS.values(), ids=PLAYLISTS)
def test_a_file_that_names_others_opens_none(tmp_path, listener, content):
    port, heard = listener
    encode(tmp_path / "secret.ts", gradients(14), 7)
    names = {"file": "secret.ts", "path": tmp_path / "secret.ts", "url": f"http://127.0.0.1:{port}/a.mp4", "port": port}
    for name in ("a.mp4", "a.m3u8", "a.txt", "a.mpd", "a.ffconcat", "a.sdp", "a.srt"):
        (tmp_path / name).write_text(content.format(**names))
        with pytest.raises(InputError, match="cannot be read as a video"):
            video.read_clip(tmp_path / name, TINY)
    assert heard == []


def with_reference(content: bytes, path: Path, parents: str = "moov trak mdia minf dinf dref") -> bytes:
    """An mp4 whose header says that the pictures are in another file: another entry of `dref`, longer boxes around."""
    name, _, rest = parents.partition(" ")
    at = content.index(name.encode()) - 4
    end = at + int.from_bytes(content[at : at + 4], "big")
    if rest:
        inner = with_reference(content[at + 8 : end], path, rest)
    else:  # an alias of QuickTime: volume, name, levels of folders from here and to there, path with colons
        text = b"vol" + str(path).replace("/", ":").encode()
        entry = b"alis" + struct.pack(">14xB27s12xB63s16xHH16x", 3, b"vol", len(path.name), path.name.encode(), 1, 1)
        entry += struct.pack(f">HH{len(text) + len(text) % 2}sHH", 2, len(text), text, 0xFFFF, 0)
        inner = bytes(4) + (1).to_bytes(4, "big") + (4 + len(entry)).to_bytes(4, "big") + entry
    return content[:at] + (8 + len(inner)).to_bytes(4, "big") + name.encode() + inner + content[end:]


def test_pictures_that_are_in_another_file_are_not_there(tmp_path):
    encode(tmp_path / "secret.mp4", gradients(14), 7)
    (tmp_path / "a.mp4").write_bytes(with_reference((tmp_path / "secret.mp4").read_bytes(), tmp_path / "secret.mp4"))
    with pytest.raises(InputError, match="a.mp4: has no picture that can be decoded"):
        video.read_clip(tmp_path / "a.mp4", TINY)


def test_a_name_is_no_address(tmp_path, listener, monkeypatch):
    port, heard = listener
    monkeypatch.chdir(tmp_path)
    encode("a.ts", gradients(14), 7)
    for name in (
        f"http://127.0.0.1:{port}/a.mp4",
        f"tcp://127.0.0.1:{port}",
        "concat:a.ts|a.ts",
        "subfile,,start,0,end,0,,:a.ts",
        "file:a.ts",
        "data:video/mp4;base64,AAAA",
        "a%d.ts",
        "pipe:0",
    ):
        for read in (video.check_source, lambda path: video.read_clip(path, TINY)):
            with pytest.raises(InputError, match="no such file|is an address"):
                read(name)
    assert heard == []
    shutil.copy("a.ts", "a%d.ts")
    shutil.copy("a.ts", "12:30.ts")
    for name in ("a%d.ts", "12:30.ts"):  # files may have such names
        assert shown(video.read_clip(name, TINY).frames, 14) == list(range(14))


def test_unreadable_videos_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    (tmp_path / "none").mkdir()
    for name, message in (
        ("nothing.mp4", "no such file"),
        ("none", "is a folder without pictures"),
        ("text.mp4", "cannot be read as a video"),
        ("empty.mp4", "cannot be read as a video"),
        ("sound.wav", "has no video stream"),
    ):
        with pytest.raises(InputError, match=message):
            video.read_clip(tmp_path / name, TINY)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a/" + "x" * 300 + ".mp4", "\0", "x" * 300 + "*.png"])
def test_a_name_that_no_file_can_have_is_no_file(name):
    for read in (video.check_source, lambda name: video.read_clip(name, TINY)):
        with pytest.raises(InputError, match="no such file|no file has such a name|cannot be read"):
            read(name)


def test_a_song_with_a_cover_is_no_clip(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        sound, cover = container.add_stream("aac", rate=8000, layout="mono"), container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux([*cover.encode(picture), *cover.encode()])
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*sound.encode(frame), *sound.encode()])
    with pytest.raises(InputError, match="has no video stream"):
        video.read_clip(tmp_path / "a.mp4", TINY)


def test_a_film_that_is_cut_off_is_read_to_there_with_a_note(tmp_path):
    write.write_clip(tmp_path / "a.mp4", gradients(40), 10)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    clip = video.read_clip(tmp_path / "a.mp4", TINY, num_frames=40)
    assert shown(clip.frames[:1], 40) == [0] and 0.5 < clip.times[-1] < 3
    assert "spread evenly until there" in clip.notes[0] and "of 4.00: cut off, or damaged" in clip.notes[1]


def test_sound_may_be_longer_than_the_pictures(tmp_path):
    """Matroska gives one length for all: this is no damage, and not the length of the film."""
    for name, seconds in (("a.mkv", 10), ("b.mkv", 0)):
        encode(tmp_path / name, gradients(20), 10, sound=seconds)
        clip = video.read_clip(tmp_path / name, TINY, num_frames=20)
        assert len(clip.notes) == 1 and "spread evenly until there" in clip.notes[0]
        with VideoFile(tmp_path / name) as source:
            assert source.duration == (None if seconds else pytest.approx(2))


MEASURE = """
import resource, sys
from minimti.config import MODELS
from minimti.io.video import read_clip
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
before = peak()
read_clip(sys.argv[1], MODELS["tiny"], num_frames=8)
print(peak() - before)
"""


@pytest.mark.full
def test_large_frames_take_the_memory_of_a_few(tmp_path):
    """8 frames of 4K: 0.2 GB as bytes, 0.8 GB as floats."""
    encode(tmp_path / "a.mp4", gradients(2, 2160, 3840)[[0, 1] * 4], 7, preset="ultrafast")
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path / "a.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 300  # MiB


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_alpha_of_vp8_and_vp9_is_laid_over_white(tmp_path, codec):
    """As in transparent WebM files; FFmpeg's own decoders leave it out."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[16:48, 16:48] = 200, 0, 0, 255
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"auto-alt-ref": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.metadata["alpha_mode"] = 64, 64, "yuva420p", "1"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="yuva420p")))
        container.mux(stream.encode())
    with VideoFile(tmp_path / "a.webm") as source:
        shown = [(time, source.pixels(frame)) for time, frame in source.frames(0.2)]
    assert [time for time, _ in shown][-1] == pytest.approx(0.3)
    _, last = shown[-1]
    assert last[:, 4, 4].tolist() == [255, 255, 255] and (last[:, 32, 32] - torch.tensor([200, 0, 0])).abs().max() < 8
