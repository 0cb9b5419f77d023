"""The processes of torchrun: two that learn together, over gloo, are one process that takes both of their draws."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from official import MINI, fill_by_name, write_official

from minimti import invert as module
from minimti import ranks as ranks_module
from minimti import signals
from minimti.invert import Recipe, draw, loss_and_gradient, make_optimizer, view
from minimti.io.files import InputError
from minimti.io.video import Clip
from minimti.io.write import write_clip
from minimti.motion import Motion
from minimti.pipeline import learn
from minimti.ranks import ALONE, Ranks, of_torchrun
from minimti.svd import SVD

ROOT = Path(__file__).resolve().parents[1]
ADAM = Recipe("adam", False, False, steps=3, lr=1e-2, p_mean=0.0, p_std=1.0, crop=True, num_cached_views=2)
MUON = replace(ADAM, optimizer="muon", shared_start=True, spread_sigmas=True, lr=0.2)


def clip() -> Clip:
    frames = torch.rand(4, 3, MINI.size[1], MINI.size[0], generator=torch.Generator().manual_seed(7)) * 2 - 1
    return Clip(frames, 10.0, (0.0, 0.1, 0.2, 0.3), "ref.mp4", MINI.size)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment(rank: int, port: str) -> dict[str, str]:
    """What torchrun sets in one of two processes."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def work(ranks: Ranks, svd: SVD) -> dict:
    """What each of two processes does; returns what it found."""
    found: dict = {}
    with ranks.joined():
        for name, recipe in (("adam", ADAM), ("muon", MUON)):
            losses: list = []
            seen = {"num_tokens": 2, "ranks": ranks, "progress": lambda p, losses=losses: losses.append(p.loss)}
            tokens = learn(svd, clip(), recipe=recipe, **seen).tokens
            found[name] = {"tokens": tokens, "losses": [loss for loss in losses if loss is not None]}
        found["fault"] = fault(ranks, svd)
        found["checks"] = 0
        with pytest.raises(signals.Interrupted), signals.held(ranks.any) as check:
            for step in range(3):
                if ranks.rank == 1 and step == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                check()
                found["checks"] += 1
        if ranks.is_first:
            with pytest.raises(OSError) as stop:
                ranks.wait()
            found["left"] = str(stop.value)
    return found


def fault(ranks: Ranks, svd: SVD) -> tuple[str, int, torch.Tensor]:
    """The second gradient of one process is not finite. -> message, steps, tokens."""
    exact, calls, states = module.loss_and_gradient, [], []

    def faulty(*given):
        loss, grad = exact(*given)
        calls.append(1)
        return loss, grad * (torch.nan if ranks.rank == 1 and len(calls) == 2 else 1)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError) as stop:
        patch.setattr(module, "loss_and_gradient", faulty)
        learn(svd, clip(), recipe=ADAM, num_tokens=2, ranks=ranks, progress=lambda p: states.append(p.motion))
    return str(stop.value), states[-1].steps, states[-1].tokens


def second(port: str, ready: Event, path: Path) -> None:
    """The second process."""
    os.environ.update(environment(1, port))
    torch.set_num_threads(1)
    with torch.device("meta"):
        svd = SVD(MINI)
    svd = fill_by_name(svd, MINI, "").requires_grad_(False)
    ready.set()
    torch.save(work(of_torchrun(os.environ), svd), path)


@pytest.fixture(scope="module")
def pair(mini_svd, tmp_path_factory) -> list[dict]:
    """What two processes found, this one and another."""
    path, port, context = tmp_path_factory.mktemp("ranks") / "1.pt", free_port(), multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=second, args=(port, ready, path), daemon=True)
    process.start()
    assert ready.wait(100)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(0, port).items():
            patch.setenv(name, value)
        found = work(of_torchrun(os.environ), mini_svd)
    process.join(100)
    return [found, torch.load(path)]


@pytest.mark.parametrize("name, recipe", [("adam", ADAM), ("muon", MUON)])
def test_two_processes_are_one_that_takes_both_draws(mini_svd, pair, name, recipe):
    """The tokens of both are the same, bit for bit; those of one differ by rounding."""
    one, two = (found[name] for found in pair)
    assert torch.equal(one["tokens"], two["tokens"]) and one["losses"] == two["losses"]

    motion = learn(mini_svd, clip(), recipe=replace(recipe, steps=0), num_tokens=2)
    optimizer, losses = make_optimizer(motion, recipe), []
    for step in range(recipe.steps):
        seen, pairs = view(mini_svd, clip().frames[None], motion, True, True, step % 2), []
        for rank in range(2):
            sigma, n = draw(recipe, MINI.sigma_max, motion.seed, 2 * step + rank, seen[0].shape)
            pairs.append(loss_and_gradient(mini_svd, motion, seen, sigma, n))
        (loss, grad), (other_loss, other_grad) = pairs
        optimizer.step((grad + other_grad) / 2)
        losses.append(((loss + other_loss) / 2).item())
    assert one["losses"] == pytest.approx(losses, rel=1e-5)
    assert torch.allclose(one["tokens"], motion.tokens, rtol=1e-5, atol=1e-5)
    alone = learn(mini_svd, clip(), recipe=recipe, num_tokens=2).tokens
    assert not torch.allclose(one["tokens"], alone, rtol=1e-5, atol=1e-3)


def test_a_fault_in_one_process_stops_both_with_the_same_line(mini_svd, pair):
    """The tokens are those of the last good step, and the line names the noise levels of both."""
    (line, steps, tokens), (other_line, other_steps, other_tokens) = (found["fault"] for found in pair)
    assert line == other_line and steps == other_steps == 1 and torch.equal(tokens, other_tokens)
    sigmas = [draw(ADAM, MINI.sigma_max, 0, index, torch.Size([1]))[0].item() for index in (2, 3)]
    assert "step 2 (sigma {:.3g}, {:.3g}, seed 0) is not finite".format(*sigmas) in line


def test_a_signal_to_one_process_stops_both_at_the_same_check(pair):
    assert [found["checks"] for found in pair] == [1, 1]


def test_a_process_that_is_left_alone_says_so_in_one_line(pair):
    assert pair[0]["left"] == "another process of torchrun has ended; its message gives the reason"


def test_without_torchrun_a_process_is_alone():
    loss, grad = torch.tensor(1.0), torch.ones(2, 3)
    assert of_torchrun({}) is ALONE and of_torchrun({"RANK": "1"}) is ALONE and ALONE.is_first
    with ALONE.joined(), ALONE.quiet():
        assert ALONE.mean(loss, grad) == (loss, grad) and ALONE.any(True) and not ALONE.any(False)
    assert ALONE.device(None) is None and ALONE.device("cuda") == "cuda"


@pytest.mark.parametrize("rank, size", [("2", "2"), ("x", "2"), ("-1", "2"), ("0", "0")])
def test_odd_ranks_are_refused(rank, size):
    with pytest.raises(InputError, match=f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK=0: are not those of torchrun"):
        of_torchrun({"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": "0"})


def test_every_process_has_its_own_gpu(monkeypatch):
    """Unless another device is asked for."""
    ranks = of_torchrun({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert ranks == Ranks(5, 8, 1) and not ranks.is_first
    for available, expected in ((True, "cuda:1"), (False, None)):
        monkeypatch.setattr(ranks_module.torch.cuda, "is_available", lambda available=available: available)
        assert ranks.device(None) == expected
    monkeypatch.setattr(ranks_module.torch.cuda, "is_available", lambda: True)
    assert ranks.device("cuda") == "cuda:1"
    assert ranks.device("cuda:0") == "cuda:0" and ranks.device("cpu") == "cpu"


@pytest.mark.full
def test_torchrun_learns_one_embedding(tmp_path):
    """The program under torchrun itself: rank 0 alone writes and prints, and the number of processes is a setting."""
    write_official(tmp_path / "w.safetensors", MINI)
    write_clip(tmp_path / "ref.mp4", torch.randint(0, 256, (20, 3, 32, 48), dtype=torch.uint8), 10)
    train = [str(ROOT / "train.py"), "ref.mp4", "--model", "w.safetensors", "--steps", "3", "--cache", "2"]
    options = ["--preview", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    settings = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run([*command, *train, *options], env=os.environ | {"PYTHONPATH": str(ROOT)}, **settings)
    assert done.returncode == 0, done.stderr
    for line in ("reference  ", "model      ", "embedding  m.pt: 5x5x48 tokens after 3 steps", "next       python "):
        assert done.stdout.count(line) == 1
    assert (tmp_path / "m.run" / "preview-00002.mp4").is_file() and Motion.load(tmp_path / "m.pt").steps == 3
    assert json.loads((tmp_path / "m.run" / "settings.json").read_text())["settings"]["ranks"] == 2
    alone = subprocess.run([sys.executable, *train, "--resume", "--steps", "5"], **settings)
    assert alone.returncode == 2 and "m.run: was begun in 2 processes; to go on with it: torchrun" in alone.stderr
