"""The program `python -m minimti.evaluate`."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from official import SMALLER as SMALL
from official import write_official

from minimti import cli
from minimti.evaluate import __main__
from minimti.evaluate.results import HEADER
from minimti.world import captions

ROOT = Path(__file__).resolve().parents[2]
FEW = ("--motions", "1", "--targets", "2", "--steps", "3")


@pytest.fixture
def call(small_folder, tmp_path, monkeypatch, capfd):
    """Runs the program on the small model in an empty folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(small_folder / "tiny.safetensors"), *args])
        with pytest.raises(SystemExit) as stop:
            cli.run(__main__.main)
        return stop.value.code, *capfd.readouterr()

    return call


def test_a_run_prints_a_table_and_a_second_one_continues_it(call, tmp_path):
    code, out, error = call(*FEW, "--only", "caption", "flip", "--json", "found.json")
    assert code == 0, error
    lines = out.strip().splitlines()
    assert lines[:2] == HEADER.splitlines()
    assert [line.split(":")[0] for line in lines[2:]] == ["| caption", "| caption", "| flip"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["seeds"]) == ["0"] and list(found["seeds"]["0"]) == ["caption", "flip"]
    assert (tmp_path / "runs" / "evaluate" / "seed0" / "flip.png").exists()

    code, out, error = call(*FEW, "--only", "caption", "--seeds", "0", "5", "--json", "found.json")
    assert code == 0, error
    again = json.loads((tmp_path / "found.json").read_text())["seeds"]
    assert again["0"] == found["seeds"]["0"], "an experiment that was done ran again"  # its seconds would differ
    first, second = ([*seed["caption"]["rows"]["true caption"]["error"]["values"]] for seed in again.values())
    assert first != second, "both seeds have the same motions"
    assert " | 4 |" in out.splitlines()[2]
    code, out, error = call(*FEW, "--only", "caption", "--seeds", "0", "0", "--json", "found.json")
    assert code == 0 and " | 2 |" in out.splitlines()[2], "a seed that is named twice counts twice"
    code, out, error = call(*FEW, "--only", "caption", "--dtype", "bfloat16", "--json", "found.json")
    assert code == 2 and not out and "dtype torch.float32, not torch.bfloat16" in error


def test_the_same_seed_gives_the_same_numbers(call, tmp_path):
    for name in ("a.json", "b.json"):
        code, _, error = call(*FEW, "--only", "caption", "--seeds", "7", "--json", name)
        assert code == 0, error
    rows = [json.loads((tmp_path / name).read_text())["seeds"]["7"]["caption"]["rows"] for name in ("a.json", "b.json")]
    assert rows[0] == rows[1]


@pytest.mark.full
def test_two_processes_find_what_one_does(small_folder, tmp_path):
    """As a program of its own: what its processes import is not what pytest has imported."""
    program = [sys.executable, "-m", "minimti.evaluate", "--model", str(small_folder / "tiny.safetensors"), *FEW]
    for jobs in ("1", "2"):
        args = ["--only", "caption", "transfer", "--seeds", "7", "8", "--json", f"{jobs}.json", "--jobs", jobs]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
        done = subprocess.run(
            [*program, *args, "--out", jobs], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 6, done.stderr
    one, two = (json.loads((tmp_path / name).read_text())["seeds"] for name in ("1.json", "2.json"))
    for seed in ("7", "8"):
        for name in ("caption", "transfer"):
            assert one[seed][name]["rows"] == two[seed][name]["rows"]


@pytest.mark.parametrize(
    "args, said",
    [
        (("--only", "everything"), "invalid choice: 'everything'"),
        (("--model", "nothing"), "nothing: no such file"),
        (("--targets", "1"), "1 is not in 2..1000"),
        (("--seeds", "-1"), "-1 is not in 0.."),
        (("--json", "no/where.json"), "cannot be written"),
    ],
)
def test_bad_input_is_one_line(call, args, said):
    code, _, error = call(*args)
    assert code == 2 and said in error and error.count("\n") == 1


def test_models_of_impossible_sizes_are_refused(call, tmp_path):
    write_official(tmp_path / "low.safetensors", replace(SMALL, size=(32, 32)))
    code, _, error = call("--model", "low.safetensors")
    assert code == 2 and "32x32 is lower than 48" in error


def test_words_of_another_width_are_refused(call, small_folder, tmp_path):
    shutil.copy(small_folder / "tiny.safetensors", tmp_path)
    captions.save(captions.CaptionEmbedding(8), tmp_path / "words.safetensors")
    code, _, error = call("--model", "tiny.safetensors")
    assert code == 2 and error.count("\n") == 1 and "does not fit words.safetensors in its folder" in error


def test_a_results_file_of_other_settings_is_refused(call, tmp_path):
    (tmp_path / "found.json").write_text('{"settings": {"motions": 99}, "fingerprint": {}, "seeds": {}}')
    code, _, error = call(*FEW, "--only", "caption", "--json", "found.json")
    assert code == 2 and "motions 99, not 1" in error and error.count("\n") == 1
