"""Signals and SIGKILL at random moments of training. `pytest -m fuzz`, for MINIMTI_FUZZ_SECONDS (default 60) each."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from official import write_official
from PIL import Image

from minimti.motion import Motion

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "--model small.safetensors --cache 2 --steps 12 --save-every 4 --tokens 2 --recipe muon".split()
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
BUDGET = float(os.environ.get("MINIMTI_FUZZ_SECONDS", 60))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Weights, a clip, and whole.pt: the tokens of a run never stopped."""
    from minimti.io.write import write_clip

    work = tmp_path_factory.mktemp("signals")
    write_official(work / "small.safetensors")
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 128), indexing="ij")
    frames = [torch.stack([(x - t).sin(), (y + t).cos(), x * y]) for t in torch.linspace(0, 3, 20)]
    write_clip(work / "ref.mp4", ((torch.stack(frames) + 1) * 127.5).byte(), 10)
    Image.new("RGB", (128, 64), "red").save(work / "img.png")
    began = time.perf_counter()
    assert start(work, "whole.pt").wait() == 0
    (work / "seconds").write_text(str(time.perf_counter() - began))
    return work


def start(work: Path, out: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), "ref.mp4", *TRAIN, "--out", out, *more]
    heed = lambda: [signal.signal(number, signal.SIG_DFL) for number in STOPS]  # noqa: E731
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=work, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed)


def finish(work: Path, out: str) -> None:
    """Resumes until the end, which is that of whole.pt, bit for bit."""
    if not (work / out).exists() or Motion.load(work / out).steps < 12:
        more = ["--resume"] if (work / out).with_suffix(".run").exists() else []
        process = start(work, out, *more)
        said, error = process.communicate()
        if more and "no run to resume" in error:  # stopped before the run had begun
            process = start(work, out)
            said, error = process.communicate()
        assert process.returncode == 0, (said, error)
    assert torch.equal(Motion.load(work / out).tokens, Motion.load(work / "whole.pt").tokens)


def moments(rng: random.Random, work: Path, count: int | None):
    """Random delays over a run; `count` of them, or for as long as the budget lasts."""
    began, length = time.perf_counter(), float((work / "seconds").read_text())
    k = 0
    while (k < count) if count else (time.perf_counter() - began < BUDGET):
        yield k, rng.uniform(0.05, 1.05 * length)  # in the first 0.05 s the interpreter starts
        k += 1


def signalled(work: Path, count: int | None) -> None:
    rng = random.Random(0)
    for k, delay in moments(rng, work, count):
        out, numbers = f"s{k}-{count}.pt", rng.choices(STOPS, k=rng.choice([1, 2, 2]))
        process = start(work, out)
        time.sleep(delay)
        for number in numbers:
            process.send_signal(number)
            time.sleep(rng.choice([0, 0.01, 0.1]))
        said, error = process.communicate(timeout=120)
        about = (delay, numbers, process.returncode, said, error)
        assert "Traceback" not in error and process.returncode in (0, *(128 + number for number in numbers)), about
        ended = [line for line in error.splitlines() if line.startswith("train.py: ")]
        assert ended == (["train.py: error: interrupted"] if process.returncode else []), about
        if "embedding" in said:  # what was said to be there is there
            assert f"after {Motion.load(work / out).steps} " in said, about
        assert not list(work.rglob(".*")), about
        finish(work, out)
        print(f"\r{k + 1} moments", end="")


def killed(work: Path, count: int) -> None:
    for k, delay in moments(random.Random(1), work, count):
        process = start(work, f"k{k}-{count}.pt")
        time.sleep(delay)
        process.kill()
        process.communicate()
        finish(work, f"k{k}-{count}.pt")
        print(f"\r{k + 1} killed", end="")


@pytest.mark.full
def test_one_or_two_signals_at_a_random_moment_lose_nothing(work):
    signalled(work, 1)


@pytest.mark.fuzz
def test_one_or_two_signals_at_any_moment_lose_nothing(work):
    signalled(work, None)


@pytest.mark.fuzz
def test_runs_killed_at_random_moments_are_resumed_bit_for_bit(work):
    killed(work, 20)
