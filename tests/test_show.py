"""python -m minimti.show prints what train.py and sample.py have stored."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from minimti import cli, show
from minimti.config import MODELS
from minimti.io.write import write_video
from minimti.motion import Motion
from minimti.results import Job, write_record

TINY = MODELS["tiny"]
KNOWN = {"made from": {"seed": 3, "guidance": [1, 3]}, "about": {"image": "a.png", "motion": {"clip": "dance.mp4"}}}


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """Runs the program in a folder of its own -> exit code, what it prints by name, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(name: str) -> tuple[int, dict[str, str], str]:
        monkeypatch.setattr(sys, "argv", ["show", name])
        with pytest.raises(SystemExit) as stop:
            cli.run(show.main)
        out, error = capfd.readouterr()
        return stop.value.code, dict(re.split(" {2,}", line, maxsplit=1) for line in out.splitlines()), error

    return call


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_an_embedding_says_what_it_was_learned_from(call, name):
    facts = {"command": "python train.py dance.mp4", "clip": "dance.mp4", "steps": "312 of 500"}
    motion = Motion(torch.zeros(15, 5, 64), 14, "tiny", TINY.micro, (64, 64), 312, 9, total_steps=500, settings=facts)
    motion.save(name)
    code, found, error = call(name)
    assert code == 0, error
    assert found["embedding"] == "15 x 5 tokens of width 64, for each of 14 frames, 1 over time"
    assert found["model"] == "tiny" and found["seed"] == "9" and found["steps"] == "312 of 500: unfinished"
    assert found["command"] == "python train.py dance.mp4" and found["clip"] == "dance.mp4"
    assert found["fingerprint"] == "unknown" and "strip" not in found
    assert found["fps"] == "7"  # the model's: the clip's is not in it
    Path("m.run").mkdir()
    Image.new("RGB", (14 * 64, 64)).save("m.run/clip.png")
    assert call(name)[1]["strip"].startswith("m.run/clip.png")


def test_the_strip_of_a_name_with_dots_is_found(call):
    Motion(torch.zeros(15, 5, 64), 14, "tiny", TINY.micro, (64, 64), 500, 9).save("wave.v2")
    Path("wave.v2.run").mkdir()
    Image.new("RGB", (14 * 64, 64)).save("wave.v2.run/clip.png")
    assert call("wave.v2")[1]["strip"].startswith("wave.v2.run/clip.png")


def test_steps_that_were_added_are_told_apart(call):
    facts = {"steps": "500 + 200", "minimti": "0.4.0"}
    Motion(torch.zeros(15, 5, 64), 14, "tiny", TINY.micro, (64, 64), 700, 9, total_steps=700, settings=facts).save(
        "m.pt"
    )
    found = call("m.pt")[1]
    assert found["steps"] == "500 + 200" and found["minimti"] == "0.4.0"


@pytest.mark.parametrize("name", ["a.mp4", "A.MP4", "a.gif", "a", "a.mp4.json"])
def test_a_result_says_how_it_was_made(call, name):
    result = Path(name.removesuffix(".json"))
    write_video(result, torch.zeros(3, 3, 64, 64, dtype=torch.uint8), 7, json.dumps(KNOWN))
    write_record(Job(result, 0, 0, 3, "a"), KNOWN["made from"], KNOWN["about"])
    if name.lower() == "a.mp4":
        Path(f"{name}.json").unlink()  # its own metadata are enough
    code, found, error = call(name)
    assert code == 0, error
    assert found == {"seed": "3", "guidance": "1 3", "image": "a.png", "motion clip": "dance.mp4"}


def test_the_record_beside_a_video_serves_where_its_metadata_are_lost(call):
    write_video("a.mp4", torch.zeros(3, 3, 64, 64, dtype=torch.uint8), 7)
    assert call("a.mp4")[0] == 2
    write_record(Job(Path("a.mp4"), 0, 0, 3, "a"), KNOWN["made from"], KNOWN["about"])
    assert call("a.mp4")[0] == 0


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.pt", None, "none.pt: no such file"),
        ("none.mp4", None, "none.mp4: no such file"),
        ("m.pt", b"text", "m.pt: not a motion-text embedding written by train.py"),
        ("a.mp4", b"text", "a.mp4: cannot be read as a video"),
        ("a.gif", b"text", "a.gif: says nothing of how it was made, and no a.gif.json is beside it"),
        ("a.json", b"{}", "a.json: is no record of a result that sample.py made"),
        ("a.json", b"[" * 100_000, "a.json: is no record of a result that sample.py made"),
        ("a.json", b'{"made from": 1, "about": {}}', "a.json: is no record of a result"),
        (".", None, ".: is no result of sample.py"),
        ("", None, "argument FILE: a name is empty"),
    ],
)
def test_any_other_file_is_one_line(call, name, content, message):
    if content is not None:
        Path(name).write_bytes(content)
    code, found, error = call(name)
    assert code == 2 and not found and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("comment", ["2021", "[]", "[" * 100_000, "a day out", '{"made from": 1, "about": {}}'])
def test_the_comment_of_anyones_video_is_no_record(call, comment):
    write_video("a.mp4", torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 7, comment)
    code, found, error = call("a.mp4")
    assert code == 2 and not found and error.count("\n") == 1 and "no a.mp4.json is beside it" in error


def test_what_a_stranger_wrote_cannot_move_the_cursor(call):
    Path("a.json").write_text(json.dumps({"made from": {"a\x1b[2J": "b\nc"}, "about": {}}))
    code, found, _ = call("a.json")
    assert code == 0 and found == {r"a\x1b[2J": r"b\nc"}
