"""Results beside their clips: the grid, and the page as a browser plays it."""

import json
import re
import shutil
import subprocess
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from minimti import compare
from minimti.compare import (
    Cell,
    bar,
    check_comparison,
    clip_cell,
    grid,
    page,
    result_cell,
    small,
    without_bars,
    write_comparison,
)
from minimti.config import MODELS
from minimti.io.files import InputError
from minimti.io.pixels import to_uint8
from minimti.io.video import read_clip
from minimti.io.write import write_clip, write_frames, write_video
from minimti.motion import Motion
from minimti.results import Job, write_record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TINY = MODELS["tiny"]


def rising(count: int, height: int = 64, width: int = 64) -> torch.Tensor:
    """Frames of one grey each, from black to white."""
    greys = torch.linspace(0, 255, count).byte()
    return greys[:, None, None, None].expand(-1, 3, height, width).contiguous()


def test_a_grid_shows_every_video_at_the_time_of_its_own_frames():
    """At 14 and 7 fps, of 1 s and 2 s: the first rests on its last frame."""
    whole, fps = grid([[Cell("fast", rising(14), 14.0)], [Cell("slow", rising(14), 7.0)]])
    assert fps == 14 and whole.shape[0] == 28
    fast, slow = whole[:, 0, 24 + 32, 32], whole[:, 0, 92 + 24 + 32, 32]
    assert torch.equal(fast, torch.cat([rising(14), rising(14)[-1:].expand(14, -1, -1, -1)])[:, 0, 0, 0])
    assert torch.equal(slow, rising(14).repeat_interleave(2, dim=0)[:, 0, 0, 0])


def test_a_grid_at_the_rate_of_a_video_shows_each_of_its_frames_once():
    whole, fps = grid([[Cell("a", rising(20), 6.67)]])
    assert fps == 6.67 and torch.equal(whole[:, 0, 24 + 32, 32], rising(20)[:, 0, 0, 0])


def test_a_grid_takes_videos_of_several_shapes_and_its_labels_are_above_them():
    tall, wide = Cell("tall", rising(2, 96, 64), 7), Cell("wide " * 30, rising(2, 64, 96), 7)
    whole, _ = grid([[tall, wide]])
    assert whole.shape == (2, 3, 124, 200)
    assert (whole[1, :, 24:120, 16:80] == 255).all() and (whole[0, :, 24:120, 16:80] == 0).all()
    assert (whole[0, :, 24:120, :16] == 255).all()  # white around
    assert (whole[0, :, 40:104, 100:196] == 0).all()
    for left in (0, 100):
        assert (whole[0, :, :24, left : left + 96] < 100).any()  # text
    assert (whole[0, :, :24, 96:100] == 255).all() and (whole[0, :, :24, 196:] == 255).all()  # cut where it is too long


def test_a_long_row_goes_on_below_in_lines_of_equal_length():
    whole, _ = grid([[Cell(str(index), rising(1), 7) for index in range(8)]])
    assert whole.shape == (1, 3, 2 * 92, 4 * 68)


def test_a_grid_of_many_videos_stays_small_enough_to_be_played():
    whole, _ = grid([[Cell("a", rising(1, 384, 384), 7)] for _ in range(20)])
    assert max(whole.shape) <= 3840 and whole.shape[2] % 2 == 0


def test_cells_are_neither_large_nor_tiny():
    assert small(torch.zeros(3, 576, 1024, dtype=torch.uint8)).shape == (3, 216, 384)
    assert small(torch.zeros(3, 64, 64, dtype=torch.uint8)).shape == (3, 256, 256)
    assert small(torch.zeros(3, 301, 1001, dtype=torch.uint8)).shape == (3, 114, 384)
    assert small(torch.zeros(3, 128, 228, dtype=torch.uint8)).shape == (3, 216, 384)


def embedding(**fields) -> Motion:
    return Motion(torch.zeros(15, 1, 64), 14, "tiny", TINY.micro, (64, 64), 1, 0, **fields)


def test_a_clip_is_read_again_where_its_run_folder_is_gone(tmp_path):
    noise = torch.randint(0, 256, (30, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_clip(tmp_path / "ref.mp4", noise, 10)
    facts = {"clip": str(tmp_path / "ref.mp4"), "times": "0.50 to 1.80 s of 3.0 s, 10 fps"}
    for fit, options in (({}, {}), ({"fit": "crop at 1.000 0.250"}, {"center": (1.0, 0.25)})):
        cell = clip_cell(str(tmp_path / "m.pt"), embedding(settings=facts | fit, fps=10.0), TINY, "m")
        clip = read_clip(tmp_path / "ref.mp4", TINY, start=0.5, end=1.8, **options)
        assert torch.equal(cell.video[:, :, ::4, ::4], to_uint8(clip.frames)) and cell.fps == 10 and cell.is_clip
    (tmp_path / "ref.mp4").unlink()
    with pytest.raises(InputError, match="neither .*m.run/frames nor .*ref.mp4 is there"):
        clip_cell(str(tmp_path / "m.pt"), embedding(settings=facts), TINY, "m")
    with pytest.raises(InputError, match="neither .*m.run/frames nor its clip is there"):
        clip_cell(str(tmp_path / "m.pt"), embedding(), TINY, "m")
    facts["clip"] = ", ".join(f"walk{k}.mp4" for k in range(40))  # as --together writes it: longer than a name may be
    with pytest.raises(InputError, match="nor walk0.mp4, .* is there"):
        clip_cell(str(tmp_path / "m.pt"), embedding(settings=facts), TINY, "m")


def test_the_bars_of_a_padded_clip_are_cut_off(tmp_path):
    frames = torch.full((14, 3, 64, 64), -1.0)
    frames[:, :, :, 20:44] = torch.linspace(0.0, 1.0, 14)[:, None, None, None]
    frames[0, :, :, 20:22] = -1.0  # black in one frame only
    (tmp_path / "m.run").mkdir()
    write_frames(tmp_path / "m.run" / "frames", to_uint8(frames))
    cell = clip_cell(str(tmp_path / "m.pt"), embedding(), TINY, "m")
    assert cell.video.shape == (14, 3, 256, 96) and (cell.video[1:] > 0).all()
    night = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert torch.equal(without_bars(night), night)
    night[0, :, 2:5, 3:7] = 1  # in the dark on all sides: no bars
    assert torch.equal(without_bars(night), night)
    assert without_bars(torch.nn.functional.pad(night[..., 2:5, 3:7], (0, 0, 2, 1))).shape == (2, 3, 3, 4)


def test_labels_have_more_letters_than_english_has():
    shown = [bar(letter, 60) for letter in ["é", "è", "ß", "ж", "Ω", "a", "a\nb"]]
    assert all(not torch.equal(a, b) for i, a in enumerate(shown) for b in shown[:i])


@pytest.mark.parametrize("name, fps", [("a.mp4", 7), ("a.gif", 7), ("a.gif", 75), ("a.gif", 150), ("a", 7)])
def test_a_result_is_read_back_as_it_was_written(tmp_path, name, fps):
    """Two frames that are alike are one in a GIF."""
    video, job = rising(6, 256, 256)[[0, 1, 1, 2, 3, 5, 5]], Job(tmp_path / name, None, 0, 0, "a")
    write_video(job.path, video, fps)
    write_record(job, {"frames": 7, "fps": fps}, {})
    read = result_cell(job)
    assert read.video.shape == video.shape and (read.video.int() - video.int()).abs().max() <= 2


def test_a_page_is_whole_in_itself_and_escapes_names(tmp_path):
    text = page([[Cell("<script>alert(1)</script>", rising(3), 7)]])
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    addresses = re.findall(r"(?:src|href)=[\"']([^\"']{0,20})", text)
    assert len(addresses) == 2 and all(address.startswith("data:") for address in addresses)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)


def test_nobodys_page_is_replaced(tmp_path):
    rows, jobs = [[Cell("a", rising(3), 7)]], [Job(tmp_path / "a.mp4", None, 0, 0, "a")]
    write_comparison(tmp_path, ".mp4", rows)
    check_comparison(jobs)  # its own
    (tmp_path / "grid.mp4.json").write_text("{}")
    with pytest.raises(InputError, match="grid.mp4: is there, and not by --compare"):
        check_comparison(jobs)  # a result by its own command
    (tmp_path / "grid.mp4.json").unlink()
    (tmp_path / "index.html").write_text("<html>mine</html>")
    with pytest.raises(InputError, match="index.html: is there, and not by --compare"):
        check_comparison(jobs)
    (tmp_path / "index.html").unlink()
    with pytest.raises(InputError, match="grid.mp4: is there, and not by --compare"):
        check_comparison(jobs)


def test_a_comparison_that_was_cut_short_is_made_again(tmp_path, monkeypatch):
    def cut_short(path, *_):
        path.write_bytes(b"half a grid")
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(compare, "write_video", cut_short)
        write_comparison(tmp_path, ".mp4", [[Cell("a", rising(3), 7)]])
    check_comparison([Job(tmp_path / "a.mp4", None, 0, 0, "a")])


def test_a_name_that_is_no_text_is_written_with_backslashes(tmp_path):
    write_comparison(tmp_path, ".mp4", [[Cell("a\udcff", rising(3), 7)]])
    assert "a\\udcff" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_grid_has_bounds(tmp_path, monkeypatch):
    """Of its rows and of its memory: a slow clip beside a fast one would have thousands of frames."""
    jobs = [Job(tmp_path / f"{k}.mp4", k, 0, 0, "a") for k in range(61)]
    check_comparison(jobs[:60])
    with pytest.raises(InputError, match="--compare: 61 results are too many for one picture"):
        check_comparison(jobs)
    full = [Job(tmp_path / f"{k}.mp4", k // 6, 0, 0, "a") for k in range(6 * 31)]  # with its clip each takes two lines
    check_comparison(full[: 6 * 30])
    with pytest.raises(InputError, match="--compare: 186 results are too many"):
        check_comparison(full)
    rows = [[Cell("slow", rising(4), 0.01), Cell("fast", rising(4), 7)]]
    monkeypatch.setattr(compare, "GRID_BYTES", 50 * 3 * (64 + 28) * 2 * 68)
    whole, fps = grid(rows)
    assert len(whole) == 50 and fps == pytest.approx(50 / 400)


# Collects where the videos stand while they play, and after a step; the page's clock is `time`.
PROBE = """<script>
const found = {playing: [], paused: 0, errors: 0};
window.onerror = () => { found.errors += 1; };
const frames = () => videos.map((video) => Math.floor(video.currentTime * FPS + 0.01));
function probe(count) {
  if (count < 60) {
    if (time > 0.3 && time < SECONDS - 0.2) {
      found.playing.push(frames());
      found.paused += videos.filter((video) => video.paused && !video.ended).length;
    }
    return setTimeout(probe, 50, count + 1);
  }
  time = 1.0;
  step(1);
  setTimeout(() => {
    found.stepped = frames();
    found.shown = element("shown").value;
    fetch("/found", {method: "POST", body: JSON.stringify(found)});
  }, 800);
}
probe(0);
</script></body>"""


class Server(BaseHTTPRequestHandler):
    """Gives a page to a browser, and takes what the page has found."""

    page, found, asked = b"", b"", []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.page)

    def do_POST(self):
        type(self).found = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
def test_a_browser_plays_all_videos_in_step(tmp_path, monkeypatch):
    """Within a frame of each other while they play; on the same frame when stepped. The short one rests at its end."""
    rows = [[Cell("a", rising(14), 7.0), Cell("b", rising(14), 7.0)], [Cell("short", rising(5), 7.0)]]
    monkeypatch.setattr(Server, "page", page(rows).replace("</body>", PROBE).encode())
    monkeypatch.setattr(Server, "asked", [])
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
    options += [f"--user-data-dir={tmp_path}", "--remote-debugging-port=0"]
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        server.timeout = 1
        command = [str(CHROMIUM), *options, f"http://127.0.0.1:{server.server_port}/"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            end = time.monotonic() + 40
            while not Server.found and time.monotonic() < end:
                server.handle_request()
            browser.terminate()
    found = json.loads(Server.found)
    assert Server.asked == ["/"]  # all else is in the page
    assert found["errors"] == 0 and found["paused"] == 0  # they play by themselves, which is smoother than seeking
    assert found["stepped"] == [8, 8, 4] and found["shown"].startswith("1.21 s of 2.00")
    assert len(found["playing"]) > 5 and len({first for first, _, _ in found["playing"]}) > 5
    assert all(abs(first - second) <= 1 for first, second, _ in found["playing"])
