"""Both command lines as a user runs them: subprocesses, a weight file of reduced size, real videos."""

import argparse
import fcntl
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import termios
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from official import SMALL as SMALL_SVD
from official import write_official
from PIL import Image

import minimti
import sample
import train
from minimti import augment as augmentation
from minimti import cli, pipeline, signals, threads
from minimti.checkpoint import load as loading
from minimti.config import MODELS
from minimti.invert import make_recipe
from minimti.io.files import InputError
from minimti.io.pixels import to_uint8
from minimti.io.video import Clip, read_clip
from minimti.io.write import write_clip
from minimti.motion import Motion, frames_start
from minimti.ranks import ALONE as ONE_PROCESS
from minimti.ranks import Ranks
from minimti.run import Run

SMALL = replace(  # all levels of SVD, so that sizes are as of SVD; it is loaded a hundred times
    SMALL_SVD, unet=replace(SMALL_SVD.unet, num_res_blocks=1), vae=replace(SMALL_SVD.vae, num_res_blocks=1)
)
ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with weights, a reference, a target, and an embedding of few steps."""
    work = tmp_path_factory.mktemp("work")
    write_official(work / "small.safetensors", SMALL)
    write_official(work / "other.safetensors", replace(SMALL, name="other"))
    y, x = torch.meshgrid(torch.linspace(-1, 1, 72), torch.linspace(-1, 1, 128), indexing="ij")
    frames = [torch.stack([(x - t).sin(), (y + t).cos(), x * y]) for t in torch.linspace(0, 3, 20)]
    write_clip(work / "ref.mp4", ((torch.stack(frames) + 1) * 127.5).byte(), 10)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)).save(work / "img.png")
    done = run(work, "train.py", "ref.mp4", "--model", "small.safetensors", "--steps", "3", "--tokens", "2")
    assert done.returncode == 0, done.stderr
    return work


def run(folder: Path, program: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / program), *args], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def call(work, monkeypatch, capfd):
    """The same without a process of its own, which would spend seconds on imports: -> exit code, stdout, stderr.

    Without the score at the end of training, two samples that test_score.py is for, and without the curve, which takes
    longer than the steps.
    """
    monkeypatch.chdir(work)
    monkeypatch.setattr("minimti.score.describe", lambda *_: "score")
    monkeypatch.setattr("minimti.run.draw_losses", lambda path, *_: path.touch())

    def call(program: str, *args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program, *args])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run({"train.py": train, "sample.py": sample}[program].main)
        return stop.value.code, *capfd.readouterr()

    return call


def properties(path: Path) -> tuple:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        return context.name, context.pix_fmt, stream.frames, context.width, context.height, stream.average_rate


SMALL_FILE = ("--model", "small.safetensors")


@pytest.mark.full
def test_a_sample_is_the_video_asked_for(work):
    """Twice by the same command, which is in the file's metadata."""
    for name in ("a.mp4", "b.mp4"):
        done = run(work, "sample.py", "--emb", "m.pt", "img.png", "--out", "new.mp4", *SMALL_FILE)
        assert done.returncode == 0, done.stderr
        (work / "new.mp4").rename(work / name)
    assert properties(work / "a.mp4") == ("h264", "yuv420p", 4, 256, 128, 7)
    assert (work / "a.mp4").read_bytes() == (work / "b.mp4").read_bytes()
    assert read_clip(work / "a.mp4", SMALL).frames.std() > 0.01  # neither black nor flat


def test_training_reports_and_saves(work, call):
    motion = Motion.load(work / "m.pt")
    assert motion.tokens.shape == (SMALL.num_frames + 1, 2, SMALL.unet.context_dim)
    assert (motion.model, motion.steps, motion.size, motion.micro) == ("small", 3, SMALL.size, SMALL.micro)
    args = ("ref.mp4", *SMALL_FILE, "--steps", "2", "--out", "n.pt", "--frames", "3", "--seed", "4", "--cache", "1")
    args += ("--start", "0.5", "--stride", "2", "--size", "64x64", "--no-flip", "--lr", "0.1")
    code, out, error = call("train.py", *args)
    assert code == 0, error
    assert "reference  ref.mp4: 3 frames, 128x72 fitted to 64x64" in out
    assert "0.50 to 0.90 s of 2.0 s, 10 fps, every 2nd frame; keeps 56 % of the width, 100 % of the height" in out
    assert "train.py: warning: ref.mp4: only 56% of the picture is used; --fit pad uses all of it" in error
    assert "n.pt: 4x5x48 tokens after 2 steps" in out
    for shown in ("encoding", "inversion", "loss=", "s/it", "2/2"):
        assert shown in error
    motion = Motion.load(work / "n.pt")
    assert (motion.num_frames, motion.size, motion.seed) == (3, (64, 64), 4)
    args = ("ref.mp4", *SMALL_FILE, "--steps", "1", "--cache", "1", "--sets", "shared", "--out", "one.safetensors")
    code, out, error = call("train.py", *args, "--end", "1.5")
    assert code == 0 and "0.00 to 1.50 s of 2.0 s" in out and "one.safetensors: 1x5x48 tokens" in out, error
    assert Motion.load(work / "one.safetensors").shared
    code, _, error = call("sample.py", "--emb", "one.safetensors", "img.png", "--out", "one.mp4", *SMALL_FILE)
    assert code == 0 and properties(work / "one.mp4")[2] == 4, error


def test_a_dry_run_draws_the_frames_and_learns_nothing(work, call, monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    args = ("ref.mp4", "--dry-run", "--out", "dry.pt", "--frames", "3")
    code, out, error = call("train.py", *args, "--model", "tiny")
    assert code == 0 and "0.00 to 0.29 s of 2.0 s, 10 fps" in out and "dry-strip.png" in out, error
    assert "memory     max, about " in out
    assert not (work / "dry.pt").exists()
    drawn = torch.from_numpy(np.array(Image.open(work / "dry-strip.png"))).permute(2, 0, 1)  # [3, H, W]
    assert drawn.shape == (3, 4 * 64, 3 * 64)
    plain, *augmented = drawn.unflatten(1, (4, 64)).unbind(dim=1)
    frames = read_clip("ref.mp4", MODELS["tiny"], num_frames=3).frames
    assert torch.equal(plain, torch.cat(list(to_uint8(frames)), dim=2))
    assert all(not torch.equal(plain, other) for other in augmented)
    flips, augment = [], augmentation.augment
    monkeypatch.setattr(augmentation, "augment", lambda *args: flips.append(args[2]) or augment(*args))
    for more in ([], ["--no-flip"]):
        assert call("train.py", *args, "--model", "tiny", *more)[0] == 0
    assert flips == [True] * 3 + [False] * 3
    assert call("train.py", *args, "--model", "svd")[0] == 0  # without its weights
    assert Image.open(work / "dry-strip.png").size == (3 * 284, 4 * 160)


@pytest.mark.parametrize(
    "text, seconds", [("3.5", 3.5), ("0:03.5", 3.5), ("1:02:03.5", 3723.5), ("90", 90), (".5", 0.5), ("2:00", 120)]
)
def test_times_are_seconds_or_hours_minutes_and_seconds(text, seconds):
    assert cli.seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", ":", "1:", "1:2:3:4", "-1", "1e3", "inf", "nan", "1:-2", "a", "1000001", "1.5:00"]
)
def test_other_times_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        cli.seconds(text)


def test_a_portrait_image_is_animated_upright_and_padding_is_cut_off(work, call):
    Image.new("RGB", (60, 120), (200, 40, 40)).save(work / "portrait.png")
    args = ("--emb", "m.pt", "portrait.png", *SMALL_FILE, "--steps", "1")
    assert call("sample.py", *args, "--out", "tall.mp4")[0] == 0
    assert properties(work / "tall.mp4")[3:5] == (128, 256)
    code, out, error = call("sample.py", *args, "--out", "padded.mp4", "--size", "128x64", "--fit", "pad")
    assert code == 0 and properties(work / "padded.mp4")[3:5] == (128, 256) and "128x256" in out
    code, out, error = call("sample.py", *args, "--out", "cropped.mp4", "--size", "128x64")
    assert code == 0 and properties(work / "cropped.mp4")[3:5] == (256, 128)
    assert "sample.py: warning: portrait.png: only 25% of the picture is used; --fit pad uses all of it" in error


def test_the_part_that_is_named_is_animated(work, call, reached):
    picture = np.zeros((64, 256, 3), np.uint8)
    picture[:, 192:] = 255
    Image.fromarray(picture).save(work / "wide.png")
    args = ("--emb", "m.pt", "wide.png", *SMALL_FILE, "--out", "none.mp4", "--size", "64x64")
    for center, value in (("1", 1), ("0", -1)):
        call("sample.py", *args, "--crop-center", center, "0.5")
        assert (reached["args"][2] == value).all()
    call("sample.py", *args, "--fit", "stretch")
    # torch 2.6 rounds weights of a resize that sum to 1
    assert (reached["args"][2][..., 56:] > 1 - 1e-6).all() and (reached["args"][2][..., :40] < 1e-6 - 1).all()


def test_a_video_plays_at_the_rate_that_was_sampled(work, call, monkeypatch):
    """The model stays conditioned on the rate that it was trained with."""
    motion = Motion.load(work / "m.pt")
    motion.fps = 12.5
    monkeypatch.setattr(Motion, "load", lambda path: motion)
    seen, animate = {}, pipeline.animate
    monkeypatch.setattr(pipeline, "animate", lambda *args, **options: seen.update(options) or animate(*args, **options))
    args = ("--emb", "m.pt", "img.png", *SMALL_FILE, "--steps", "1", "--out", "rate.mp4")
    code, out, _ = call("sample.py", *args)
    assert code == 0 and properties(work / "rate.mp4")[5] == 12.5 and "12.5 fps" in out
    assert seen["micro"].fps_id == 6
    assert call("sample.py", *args, "--fps", "24")[0] == 0 and properties(work / "rate.mp4")[5] == 24


@pytest.fixture
def reached(monkeypatch):
    """What a program hands to `learn` or `animate`, instead of the work: name -> argument."""
    seen = {}

    def stop(*args, **options):
        seen.update(options, args=args)
        raise InputError("reached")

    monkeypatch.setattr("minimti.run.animate", stop)  # imported before it is replaced in its own module
    for name in ("learn", "animate"):
        monkeypatch.setattr(pipeline, name, stop)
    return seen


def test_the_defaults_of_training_are_the_models_recipe(work, call, reached):
    assert "reached" in call("train.py", "ref.mp4", *SMALL_FILE, "--out", "none.pt")[2]
    assert reached["recipe"] == make_recipe(MODELS["svd"], "paper")
    assert (
        reached["num_tokens"] == 5 and reached["flip"] and not reached["shared"] and reached["memory"].memory == "max"
    )
    assert reached["seed"] == 0
    call("train.py", "ref.mp4", "--model", "tiny", "--out", "none.pt")
    assert reached["recipe"] == make_recipe(MODELS["tiny"], "muon")


def test_every_option_of_training_reaches_the_pipeline(work, call, reached):
    args = "--recipe muon --steps 7 --lr 0.3 --p-mean 1 --p-std 2 --cache 3 --tokens 2 --sets shared --no-flip".split()
    call("train.py", "ref.mp4", *SMALL_FILE, *args, "--memory", "low", "--seed", "9", "--out", "none.pt")
    recipe = make_recipe(MODELS["svd"], "muon")
    assert reached["recipe"] == replace(recipe, steps=7, lr=0.3, p_mean=1.0, p_std=2.0, num_cached_views=3)
    assert reached["num_tokens"] == 2 and reached["shared"] and not reached["flip"]
    assert reached["memory"].memory == "low" and reached["seed"] == 9


def test_every_option_of_sampling_reaches_the_pipeline(work, call, reached):
    args = ["--emb", "m.pt", "img.png", *SMALL_FILE, "--out", "none.mp4"]
    call("sample.py", *args)
    assert reached["steps"] == SMALL.num_steps and reached["guidance"] == (1, 3) and reached["solver"] == "euler"
    assert reached["seed"] == 0 and not reached["unconditional"] and reached["memory"] == "auto"
    assert reached["micro"] == SMALL.micro
    more = "--steps 9 --guidance 2 4 --solver heun --seed 3 --unconditional --memory low --fps 12 --motion-bucket 30"
    call("sample.py", *args, *more.split(), "--noise-aug", "0.1", "--size", "64x128")
    assert reached["steps"] == 9 and reached["guidance"] == (2, 4) and reached["solver"] == "heun"
    assert reached["seed"] == 3 and reached["unconditional"] and reached["memory"] == "low"
    assert vars(reached["micro"]) == {"fps_id": 11, "motion_bucket_id": 30, "cond_aug": 0.1}
    assert reached["args"][2].shape == (1, 3, 128, 64)


def test_size_and_micro_conditioning_of_a_sample_are_the_embeddings(work, call, reached):
    motion = Motion.load(work / "m.pt")
    motion.size, motion.micro = (64, 64), replace(motion.micro, fps_id=11, motion_bucket_id=30)
    motion.save(work / "own.pt")
    call("sample.py", "--emb", "own.pt", "img.png", "--out", "own.mp4", *SMALL_FILE)
    assert reached["micro"] == motion.micro and reached["args"][2].shape == (1, 3, 64, 64)
    call("sample.py", "--emb", "own.pt", "--unconditional", "--out", "own.mp4", *SMALL_FILE)
    assert reached["args"][2].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("program, args", [("train.py", ["ref.mp4"]), ("sample.py", ["img.png"])])
@pytest.mark.parametrize("more", [[], ["--model", "auto"]])
def test_the_model_suits_the_machine_by_default(work, call, monkeypatch, program, args, more):
    seen = []
    monkeypatch.setattr(pipeline, "automatic", lambda device: f"what suits {device}")
    monkeypatch.setattr(loading, "open_checkpoint", lambda model, revision: seen.append(model) or sys.exit(0))
    assert call(program, *args, *more, "--device", "cpu")[0] == 0 and seen == ["what suits cpu"]


@pytest.mark.parametrize("compiled", [True, False])
def test_the_unet_is_compiled_where_it_is_asked_for(work, call, monkeypatch, reached, compiled):
    calls = []
    monkeypatch.setattr(pipeline, "compile_unet", calls.append)
    call("train.py", "ref.mp4", *SMALL_FILE, "--out", "none.pt", *["--compile"] * compiled)
    assert [type(unet).__name__ for unet in calls] == ["UNet"] * compiled


def test_the_embedded_model_says_what_it_was_trained_on(work, call):
    """Any video will do; the sizes and the number of steps are its own."""
    args = ("ref.mp4", "--model", "tiny", "--steps", "1", "--cache", "1", "--out", "tiny.pt")
    code, out, error = call("train.py", *args)
    assert code == 0, error
    assert MODELS["tiny"].note in out and "fitted to 64x64" in out
    code, out, error = call("sample.py", "img.png", "--emb", "tiny.pt", "--steps", "1", "--out", "tiny.mp4")
    assert code == 0, error
    assert MODELS["tiny"].note in out and "14 frames, 256x256" in out


def test_tokens_begin_from_the_frames_that_were_named(work, call):
    svd = minimti.load("small.safetensors", device="cpu")
    with torch.no_grad():
        embeddings = svd.embed(read_clip("ref.mp4", SMALL, stride=3).frames)
    assert call("train.py", "ref.mp4", *SMALL_FILE, "--steps", "0", "--out", "zero.pt", "--stride", "3")[0] == 0
    tokens = Motion.load("zero.pt").tokens
    expected = frames_start(embeddings, 5, torch.Generator().manual_seed(0))
    assert tokens.shape == (5, 5, 48) and torch.allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_help_is_there_at_once(program):
    """Neither PyTorch nor PyAV is imported for it, nor for the version."""
    block = "import sys; sys.modules['torch'] = sys.modules['av'] = sys.modules['numpy'] = None; "
    for option in ("--help", "--version"):
        code = f"{block}sys.argv = [{program!r}, {option!r}]; import {program[:-3]} as p; p.parse()"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if option == "--help":
            for group in ("model and machine:", "output:", "advanced:"):
                assert group in done.stdout
        else:
            assert done.stdout == f"minimti {minimti.__version__}\n"


@pytest.mark.full
def test_every_setting_of_training_reaches_the_tokens(work, call):
    """Also guards against a learning rate that never reaches the optimiser."""
    tokens = set()
    changes = ["--lr 0.1", "--p-mean 0", "--p-std 0", "--seed 1", "--start 1", "--recipe muon"]
    settings = [*changes, "--cache 0 --steps 3", "--steps 3", ""]
    for setting in settings:
        args = ("--steps", "2", "--cache", "2", "--out", "set.pt", *setting.split())
        code, _, error = call("train.py", "ref.mp4", *SMALL_FILE, *args)
        assert code == 0, error
        tokens.add(Motion.load(work / "set.pt").tokens.sum().item())
    assert len(tokens) == len(settings)


@pytest.mark.full
def test_precision_reaches_the_video(work, call):
    contents = set()
    for setting in ("--dtype bfloat16", "--vae-dtype bfloat16", "--seed 1", ""):
        args = ("--emb", "m.pt", "img.png", "--out", "set.mp4", *SMALL_FILE, *setting.split())
        code, _, error = call("sample.py", *args)
        assert code == 0, error
        contents.add((work / "set.mp4").read_bytes())
    assert len(contents) == 4
    args = ("--out", "set.mp4", *SMALL_FILE, "--fps", "12", "--size", "64x128")
    assert call("sample.py", "--emb", "m.pt", "img.png", *args)[0] == 0
    assert properties(work / "set.mp4") == ("h264", "yuv420p", 4, 128, 256, 12)


def test_an_embedding_of_other_weights_is_warned_of(work, call):
    motion = Motion.load(work / "m.pt")
    motion.fingerprint = {name: [number + 1 for number in numbers] for name, numbers in motion.fingerprint.items()}
    motion.save(work / "tuned.pt")
    args = ("--emb", "tuned.pt", "img.png", "--out", "tuned.mp4", "--steps", "1", *SMALL_FILE)
    code, _, error = call("sample.py", *args)
    assert code == 0 and "sample.py: warning: the embedding was learned on other weights of small" in error


def test_each_video_is_written_when_it_is_done(work, call, monkeypatch):
    """A failure in the second image leaves the first one's video."""
    Image.open(work / "img.png").rotate(90).save(work / "third.png")
    done, animate = [], pipeline.animate

    def failing(svd, motion, image, **options):
        if done:
            raise FloatingPointError("step 1 of 3 gave numbers that are not finite")
        done.append(1)
        return animate(svd, motion, image, **options)

    monkeypatch.setattr(pipeline, "animate", failing)
    code, out, error = call("sample.py", "--emb", "m.pt", "img.png", "third.png", "--out", "late", *SMALL_FILE)
    assert code == 1 and "error: step 1 of 3" in error
    assert sorted(path.name for path in (work / "late").iterdir()) == ["img_m.mp4", "img_m.mp4.json"]


def test_a_fault_in_training_keeps_the_last_good_step(work, call, monkeypatch):
    from minimti import invert

    calls, gradient = [], invert.loss_and_gradient

    def failing(*args):
        loss, grad = gradient(*args)
        calls.append(1)
        return loss, grad * (torch.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(invert, "loss_and_gradient", failing)
    args = ("--steps", "5", "--cache", "1", "--out", "fault.pt")
    code, out, error = call("train.py", "ref.mp4", *SMALL_FILE, *args)
    assert code == 1 and "fault.pt: 5x5x48 tokens after 2 of 5 steps" in out
    assert "train.py: error: the loss or gradient of step 3 (sigma" in error
    assert Motion.load(work / "fault.pt").steps == 2 and Motion.load(work / "fault.pt").tokens.isfinite().all()


def test_many_images_into_a_folder_without_an_embedding(work, call):
    Image.open(work / "img.png").rotate(180).save(work / "second.png")
    code, _, error = call("sample.py", "img.png", "second.png", "--out", "videos", *SMALL_FILE)
    assert code == 0, error
    assert sorted(p.name for p in (work / "videos").glob("*.mp4")) == ["img_small.mp4", "second_small.mp4"]
    assert properties(work / "videos" / "img_small.mp4")[2:5] == (4, 256, 128)


def test_unconditional_shows_the_motion_without_an_image(work, call):
    code, _, error = call("sample.py", "--emb", "m.pt", "--unconditional", *SMALL_FILE)
    assert code == 0, error
    assert properties(work / "m_unconditional.mp4")[2:5] == (4, 256, 128)
    more = ["--fit", "pad", "--size", "64x128", "--out", "high.mp4"]  # there is no picture to be padded
    code, _, error = call("sample.py", "--emb", "m.pt", "--unconditional", *more, *SMALL_FILE)
    assert code == 0 and properties(work / "high.mp4")[3:5] == (128, 256), error


@pytest.mark.full
@pytest.mark.parametrize("path", sorted(REAL.glob("*.mp4")), ids=lambda path: path.stem)
def test_real_videos(work, path):
    target = sorted(REAL.glob("*.png"))[0]
    done = run(work, "train.py", str(path), *SMALL_FILE, "--steps", "2", "--out", "real.pt")
    assert done.returncode == 0, done.stderr
    assert "1024x576 fitted to 128x64" in done.stdout and "0.00 to 0.43 s of" in done.stdout
    done = run(work, "sample.py", "--emb", "real.pt", str(target), *SMALL_FILE)
    assert done.returncode == 0, done.stderr
    assert properties(work / f"{target.stem}_real.mp4") == ("h264", "yuv420p", 4, 256, 128, 7)


TRAIN = [
    (["nothing.mp4"], "nothing.mp4: no such file"),
    (["sound.wav", *SMALL_FILE], "sound.wav: has no video stream"),
    (["img.png", *SMALL_FILE], "img.png: only one frame is there from 0 s on; a clip needs at least two"),
    (["ref.mp4", *SMALL_FILE, "--start", "1.9"], "only one frame is there from 1.9 s on"),
    (["ref.mp4", *SMALL_FILE, "--frames", "21", "--stride", "1"], "but only 20 are there"),
    (["ref.mp4", *SMALL_FILE, "--start", "0:02.5"], "ends at 2.000 s, before --start 2.5; start earlier"),
    (["ref.mp4", *SMALL_FILE, "--sample-fps", "1"], "but the file at 2.00 s; raise --sample-fps or lower --frames"),
    (["ref.mp4", *SMALL_FILE, "--end", "1", "--stride", "2"], "--end and --stride: each of them says which frames"),
    (["ref.mp4", "--start", "1:2:3:4"], "argument --start: '1:2:3:4' is not a time such as 3.5, 0:03.5 or 1:02:03.5"),
    (["ref.mp4", "--start", "-1"], "argument --start: '-1' is not a time"),
    (["ref.mp4", "--end", "nan"], "argument --end: 'nan' is not a time"),
    (["ref.mp4", "--crop-center", "0.5", "2"], "argument --crop-center: 2 is not in 0..1"),
    (["ref.mp4", "--fit", "fill"], "argument --fit: invalid choice: 'fill'"),
    (["ref.mp4", "*.png", "--dry-run"], "--out ref.pt: the strip would become a picture of *.png; name another folder"),
    (["ref.mp4", ""], "argument CLIP: a name is empty"),
    (["ref.mp4", "--dry-run", "--out", "no/m.pt"], "no/m.pt: cannot be written (No such file or directory)"),
    (["none*.png", *SMALL_FILE], "none*.png: no file has such a name"),
    (["ref.mp4", "nothing.mp4"], "nothing.mp4: no such file"),
    (["ref.mp4", "img.png", *SMALL_FILE], "img.png: only one frame is there from 0 s on; a clip needs at least two"),
    (["ref.mp4", "img.png", "--together", *SMALL_FILE], "img.png: only one frame is there"),
    (["ref.mp4", "copy/ref.mp4"], "2 clips would all become ref.pt; learn them apart, with an --out each"),
    (["ref.mp4", "up.mp4", "--out", "x.pt"], "x.pt: one file cannot hold 2 embeddings; name a folder, or learn one"),
    (["ref.mp4", "up.mp4", "--out", "x.mp4"], "x.mp4: one file cannot hold 2 embeddings; name a folder"),
    (["ref.mp4", "up.mp4", "--out", "ref.txt"], "ref.txt: one file cannot hold 2 embeddings; name a folder"),
    (["ref.mp4", "up.mp4", "--out", "img.png/new"], "img.png/new: cannot be made a folder (Not a directory)"),
    (["ref.mp4", "up.mp4", "--out", "copy", "--model", "copy/up.pt"], "copy/up.pt: is an input; name another file"),
    (["ref.mp4", "up.mp4", "--together", "--out", "copy"], "copy: is a folder, not a file"),
    (["ref.mp4", "ref.mp4", "--together", "--cache", "1", *SMALL_FILE], "2 clips cannot take turns in 1 views; give"),
    (["ref.mp4", "ref.mp4", "--together", "--cache", "0", "--steps", "1", *SMALL_FILE], "2 clips cannot take turns in"),
    (["ref.mp4", "ref.mp4", "--together", "--cache", "1", "--dry-run", *SMALL_FILE], "2 clips cannot take turns in 1"),
    (["ref.mp4", "--model", "img.png"], "img.png: not a complete safetensors file"),
    (["ref.mp4", "--model", "nothing"], "--model nothing: no such file; name one of svd, svd-xt"),
    (["ref.mp4", "--model", "svd", "--size", "65x64"], "width and height must be multiples of 64"),
    (["ref.mp4", "--model", "svd", "--start", "9"], "before --start 9; start earlier"),
    (
        ["ref.mp4", "--model", "svd", "--resume"],
        "m.run: was begun with --model small; to go on with it: python",
    ),
    (["ref.mp4", "--frames", "1"], "argument --frames: 1 is not in 2..1000"),
    (["ref.mp4", "--together", "--out", "new/"], "--out new/: name the embedding, a file that ends in .pt"),
    (["ref.mp4", "--out", "new.mp4"], "--out new.mp4: name the embedding, a file that ends in .pt or .safetensors"),
    (["http://127.0.0.1/watch?v=1"], "http://127.0.0.1/watch?v=1: is an address; download it, and name the file"),
    (["-"], "-: no such file; a pipe is /dev/stdin"),
    (["ref.mp4", "--model", "svd"], "svd: the download from https://huggingface.co failed (OfflineModeIsEnabled"),
    (["ref.mp4", *SMALL_FILE, "--size", "100x64"], "width and height must be multiples of 64"),
    (["ref.mp4", "--size", "big"], "argument --size: invalid"),
    (["ref.mp4", "--out", "no/m.pt"], "no/m.pt: cannot be written (No such file or directory)"),
    (["ref.mp4", "--out", "img.png/m.pt"], "img.png/m.pt: cannot be written (Not a directory)"),
    (["ref.mp4", "--out", "x" * 300], "cannot be written (the name is too long)"),
    (["ref.mp4", "--out", "ref.mp4"], "ref.mp4: is an input; name another file"),
    (["ref.mp4", *SMALL_FILE, "--out", "small.safetensors"], "small.safetensors: is an input"),
    (["ref.mp4", "--p-mean", "nan"], "argument --p-mean: nan is not in -10..10"),
    (["ref.mp4", "--device", "meta"], "device meta is not available here"),
    (["ref.mp4", "--tokens", "0"], "argument --tokens: 0 is not in 1..1000"),
    (["ref.mp4", "--device", "cuda:99"], "device cuda:99 is not available here"),
    (["ref.mp4", "--device", "toaster"], "device toaster is not available here"),
    ([], "the following arguments are required: CLIP"),
]
SAMPLE = [
    (["--emb", "m.pt", "nothing.png"], "nothing.png: no such file"),
    (["--emb", "m.pt", "ref.mp4"], "ref.mp4: cannot be read as an image"),
    (["--emb", "m.pt"], "name an IMAGE to move"),
    (["--emb", "m.pt", ""], "argument IMAGE: a name is empty"),
    (["--emb", "m.pt", "--", "-r.png"], "-r.png: no such file"),
    (["--unconditional"], "name an IMAGE to move"),
    (["--emb", "m.pt", "img.png", "second.png", "--unconditional"], "the same video without any of the images"),
    (["--emb", "img.png", "img.png"], "img.png: not a motion-text embedding written by train.py"),
    (["--emb", "code.pt", "img.png"], "code.pt: not a motion-text embedding"),
    (["--emb", "odd.pt", "img.png"], "odd.pt: not a motion-text embedding written by train.py: tokens must be finite"),
    (["--emb", "", "img.png"], "is a folder, not a file"),
    (["--emb", "m.pt", "deep.tif"], "deep.tif: is an image of mode I"),
    (["--emb", "m.pt", "img.png", "--model", "other.safetensors"], "the embedding is for model 'small'"),
    (["--emb", "m.pt", "img.png"], "m.pt: made with a model called 'small'; pass its file or folder as --model"),
    (["--emb", "m.pt", "img.png", "copy/img.png", *SMALL_FILE], "2 images of the same name would all become img_m.mp4"),
    (["--emb", "m.pt", "img.png", "second.png", "--out", "x.mp4", *SMALL_FILE], "one file cannot hold 2 videos"),
    (["img.png", "--out", "ref.txt", *SMALL_FILE], "ref.txt: name a folder, or a file that ends in .mp4"),
    (["img.png", "--out", "new.mov", *SMALL_FILE], "name a folder, or a file that ends in .mp4"),
    (["img.png", "--out", "img.png", *SMALL_FILE], "name a folder, or a file that ends in .mp4"),
    (["img.png", "--guidance", "1"], "argument --guidance: expected 2 arguments"),
    (["img.png", "--guidance", "nan", "1"], "argument --guidance: nan is not in"),
    (["img.png", "--out", "img.png/videos", *SMALL_FILE], "img.png/videos: cannot be made a folder"),
]


@pytest.fixture
def oddities(work):
    """Files that are something else than they are taken for."""
    with av.open(str(work / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    (work / "copy").mkdir(exist_ok=True)
    for copy in (work / "copy" / "img.png", work / "second.png"):
        Image.open(work / "img.png").save(copy)
    for copy in (work / "copy" / "ref.mp4", work / "up.mp4"):
        copy.write_bytes((work / "ref.mp4").read_bytes())
    (work / "copy" / "up.pt").touch()
    (work / "ref.txt").touch()
    Image.fromarray(np.zeros((64, 64), np.int32)).save(work / "deep.tif")
    fields = torch.load(work / "m.pt", weights_only=True)
    torch.save(fields | {"tokens": torch.full((1, 2, 48), torch.nan)}, work / "odd.pt")
    (work / "code.pt").write_bytes(pickle.dumps(print))


@pytest.mark.parametrize(
    "program, args, message", [("train.py", *case) for case in TRAIN] + [("sample.py", *case) for case in SAMPLE]
)
def test_bad_input_is_one_line(work, call, oddities, program, args, message):
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    code, _, error = call(program, *args)
    assert code == 2
    assert error.startswith(f"{program}: error: ") and error.count("\n") == 1 and message in error
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before


@pytest.mark.full
def test_bad_input_is_one_line_of_the_process_too(work):
    done = run(work, "sample.py", "--emb", "img.png", "img.png")
    assert done.returncode == 2
    assert done.stderr == "sample.py: error: img.png: not a motion-text embedding written by train.py\n"


STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def test_a_program_leaves_signals_as_they_were(call):
    before = [signal.getsignal(number) for number in STOPS]
    assert call("sample.py", "--seed", "-1", "img.png")[0] == 2
    assert [signal.getsignal(number) for number in STOPS] == before


def test_what_is_ignored_stays_ignored():
    """As nohup does, before it starts a program."""
    asked, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled(lambda number, _: asked.append(number)):
            for number in STOPS:
                os.kill(os.getpid(), number)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert asked == [signal.SIGINT, signal.SIGTERM]


def test_held_signals_wait_for_the_check_or_for_the_end():
    came = []
    with signals.handled(lambda number, _: came.append(number)):
        with signals.held() as check:
            check()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert not came
            with pytest.raises(signals.Interrupted) as stop:
                check()
        assert stop.value.number == signal.SIGTERM and came == [signal.SIGTERM, signal.SIGINT]
        with pytest.raises(ValueError), signals.held():  # its own error ends the program
            os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError
    assert came == [signal.SIGTERM, signal.SIGINT]


# ------------------------------------------------------------------------------------------------------------- watching


@contextmanager
def started(work: Path, *args: str, seen: bytes = b"", heed: tuple = ()):
    """A program in the background, from the moment on at which its stderr contains `seen`: process, stderr so far."""
    # A test run in the background of a script has SIGINT ignored, under nohup SIGHUP, and hands that down.
    default = partial(lambda numbers: [signal.signal(number, signal.SIG_DFL) for number in numbers], heed)
    command = [sys.executable, str(ROOT / args[0]), *args[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=work, preexec_fn=default, **pipes) as process:
        error = b""
        while seen not in error:
            assert (more := process.stderr.read1()), error  # it must not end by itself
            error += more
        yield process


LONG = ("ref.mp4", *SMALL_FILE, "--cache", "2", "--steps", "20", "--save-every", "4", "--tokens", "2")


ALONE, HANGUPS = (pytest.param(numbers, marks=pytest.mark.full) for numbers in ([signal.SIGINT], [signal.SIGHUP] * 3))


@pytest.mark.parametrize("numbers", [ALONE, [signal.SIGTERM, signal.SIGINT], HANGUPS])
def test_interrupted_training_keeps_its_steps(work, call, numbers):
    """Ctrl-C, a kill or a lost terminal, and more of them while it saves: the embedding says how many, and goes on."""
    with started(work, "train.py", *LONG, "--out", "cut.pt", seen=b"inversion: 2/20", heed=STOPS) as process:
        for number in numbers:
            process.send_signal(number)
        out, error = process.communicate(timeout=60)
    assert process.returncode in [128 + number for number in numbers], error  # those that wait come in any order
    assert error.splitlines()[-1] == b"train.py: error: interrupted" and b"Traceback" not in error
    assert error.count(b"interrupted") == 1
    motion = Motion.load(work / "cut.pt")
    assert 2 <= motion.steps < 20 and f"after {motion.steps} of 20 steps" in out.decode()
    line = next(line for line in out.decode().splitlines() if line.startswith("next"))
    assert line.split()[1:2] == ["python"] and line.endswith(f"train.py {' '.join(LONG)} --out cut.pt --resume")


def test_a_command_that_is_printed_can_be_typed(monkeypatch):
    """Where a name begins with a hyphen, and where the program is not in this folder."""
    monkeypatch.setattr(sys, "argv", ["../train.py", "--steps", "2", "--", "-a.mp4", "b.mp4"])
    args = train.parse()
    assert args.clips == ["./-a.mp4", "b.mp4"]
    line = train.command(ONE_PROCESS)
    assert line == "python ../train.py --steps 2 ./-a.mp4 b.mp4"
    monkeypatch.setattr(sys, "argv", [*line.split()[1:], "--resume"])
    assert train.parse() == argparse.Namespace(**vars(args) | {"resume": True})
    jobs = [train.Job([], Run(f"{name}.pt", 1), {}) for name in ("-a", "b")]
    for job in jobs:
        job.run.legs, job.run.done = [2], 2
    line = "python ../sample.py --emb ./-a.pt --emb b.pt img.png"
    assert train.following(args, jobs, ONE_PROCESS) == line
    args.model, args.revision = "svd", "v1"
    assert train.following(args, jobs, ONE_PROCESS) == f"{line} --revision v1"


def test_options_of_training_stand_anywhere(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "a.mp4", "--seed", "1", "b.mp4"])
    args = train.parse()
    assert args.clips == ["a.mp4", "b.mp4"] and args.seed == 1


@pytest.mark.full
def test_a_killed_run_is_resumed_by_its_command(work, call):
    """Killed outright in the middle; the tokens are those of a run never stopped."""
    torch.set_num_threads(1)  # as the program that is killed: on some processors the last bits depend on it
    args = ("train.py", *LONG, "--out", "killed.pt")
    with started(work, *args, seen=b"inversion: 10/20") as process:
        process.kill()
    assert not (work / "killed.pt").exists()
    code, out, error = call(*args, "--resume")
    assert code == 0 and "killed.run: goes on after 8 steps" in out, error
    assert "killed.pt: 5x2x48 tokens after 20 steps" in out and "next       python sample.py --emb killed.pt" in out
    assert call("train.py", *LONG, "--out", "whole.pt")[0] == 0
    assert torch.equal(Motion.load(work / "killed.pt").tokens, Motion.load(work / "whole.pt").tokens)
    code, _, error = call(*args, "--resume", "--seed", "1")
    assert code == 2 and "killed.run: was begun with --seed 0; to go on with it: python" in error
    assert error.endswith(f"train.py {' '.join(LONG)} --out killed.pt --resume\n")


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_a_program_with_one_line_from_its_first_import_on(work, program, number):
    code = (
        f"import os, runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = [{program!r}, 'x']\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'argparse': os.kill(os.getpid(), {int(number)})\n"
        "sys.modules.pop('argparse', None); sys.meta_path.insert(0, Stop())\n"
        f"runpy.run_path({str(ROOT / program)!r}, run_name='__main__')"
    )
    heed = partial(signal.signal, number, signal.SIG_DFL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=work, preexec_fn=heed)
    assert (done.returncode, done.stderr) == (128 + number, f"{program}: error: interrupted\n")


def test_a_rerun_renames_what_stands_there_and_says_so(work, call):
    for expected in ([], ["renamed    re.pt, which stood there, to re-1.pt", "renamed    re.run, which stood"]):
        code, out, error = call("train.py", "ref.mp4", *SMALL_FILE, "--steps", "1", "--cache", "1", "--out", "re.pt")
        assert code == 0 and all(line in out for line in expected), error
    assert (work / "re-1.pt").exists() and (work / "re-1.run" / "settings.json").exists()


def test_steps_that_were_added_are_in_the_command_of_the_embedding(work, call):
    args = ("train.py", "ref.mp4", *SMALL_FILE, "--cache", "1", "--out", "longer.pt")
    assert call(*args, "--steps", "2")[0] == 0
    assert not Motion.load("longer.pt").settings["command"].endswith("--resume")
    assert call(*args, "--steps", "3", "--resume")[0] == 0
    settings = Motion.load("longer.pt").settings
    assert settings["steps"] == "2 + 1" and settings["command"].endswith("--steps 3 --resume")
    assert settings["minimti"] == minimti.__version__


def test_names_move_no_cursor(work, call):
    """But in the command to be typed next, which has them as they are."""
    (work / "a\x1b[31m\nb.mp4").write_bytes((work / "ref.mp4").read_bytes())
    args = ("train.py", "a\x1b[31m\nb.mp4", *SMALL_FILE, "--steps", "0", "--cache", "1", "--out", "odd\x1b.pt")
    for _ in range(2):
        code, out, error = call(*args)
        assert code == 0 and "\x1b" not in error + out.partition("\nnext ")[0]
    assert "renamed    odd\\x1b.pt" in out and "reference  a\\x1b[31m\\nb.mp4" in out


def test_a_run_of_version_0_4_0_keeps_its_cropped_views(work, call, monkeypatch):
    """Its settings do not name them; the recipe has none by now."""
    args = ("train.py", "ref.mp4", *SMALL_FILE, "--recipe", "muon", "--cache", "0", "--out", "old.pt", "--steps")
    assert call(*args, "1")[0] == 0
    path, crops, view = work / "old.run" / "settings.json", [], pipeline.view
    found = json.loads(path.read_text())
    assert found["settings"].pop("crop") is False
    path.write_text(json.dumps(found))
    monkeypatch.setattr(pipeline, "view", lambda *args: crops.append(args[4]) or view(*args))
    assert call(*args, "2", "--resume")[0] == 0 and crops == [True]


def test_a_preview_shows_the_clip_beside_its_reconstruction_and_changes_no_token(work, call, monkeypatch):
    args = ("train.py", "ref.mp4", *SMALL_FILE, "--steps", "3", "--cache", "2")
    assert call(*args, "--out", "plain.pt")[0] == 0
    code, _, error = call(*args, "--out", "shown.pt", "--preview", "2")
    assert code == 0, error
    assert [path.name for path in (work / "shown.run").glob("*.mp4")] == ["preview-00002.mp4"]
    path = work / "shown.run" / "preview-00002.mp4"
    assert properties(path)[2:5] == (4, 512, 128)  # enlarged, as results are
    frames = (read_clip(path, SMALL, size=(256, 64)).frames + 1) * 127.5
    clip = (read_clip(work / "ref.mp4", SMALL).frames + 1) * 127.5
    assert (frames[..., :128] - clip).abs().mean() < 4 < (frames[..., 128:] - clip).abs().mean()
    assert torch.equal(Motion.load(work / "plain.pt").tokens, Motion.load(work / "shown.pt").tokens)

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("minimti.run.animate", too_large)
    code, _, error = call(*args, "--out", "unseen.pt", "--preview", "2")
    assert code == 0 and "train.py: warning: no preview after 2 steps: CUDA out of memory" in error
    monkeypatch.setattr("minimti.run.animate", lambda *_, **__: torch.zeros(4, 3, 64, 128, dtype=torch.uint8))
    (work / "full.run" / "preview-00002.mp4").mkdir(parents=True)
    code, _, error = call(*args, "--out", "full.pt", "--preview", "2")
    assert code == 0 and "no preview after 2 steps: full.run/preview-00002.mp4: " in error


# ----------------------------------------------------------------------------------------------------- several clips


SHORT = (*SMALL_FILE, "--tokens", "2", "--steps", "2", "--cache", "2")


@pytest.fixture
def clips(work) -> list[str]:
    """The names of two clips, of which the second is portrait."""
    frames = read_clip(work / "ref.mp4", SMALL, num_frames=12, stride=1, size=(64, 128), how="stretch").frames
    write_clip(work / "up.mp4", to_uint8(frames.flip(0)), 10)
    return ["ref.mp4", "up.mp4"]


def test_several_clips_give_an_embedding_each_with_one_model(work, call, clips, monkeypatch):
    """The same as one by one. After a gradient that is not finite the next clip is learned; a full disk ends all.

    --resume keeps what is finished, and goes on with no run of an earlier command.
    """
    loads, load, learned, learn = [], pipeline.load, [], pipeline.learn
    faults = {2: FloatingPointError("step 1 is not finite"), 4: OSError("no space")}

    def failing(svd, given, **options):
        learned.append(given[0].source)
        if fault := faults.pop(len(learned), None):
            raise fault
        return learn(svd, given, **options)

    for name in ("more.mp4", "last.mp4"):
        (work / name).write_bytes((work / "ref.mp4").read_bytes())
    monkeypatch.setattr(pipeline, "load", lambda *args, **options: loads.append(1) or load(*args, **options))
    monkeypatch.setattr(pipeline, "learn", failing)
    options = (*SMALL_FILE, "--steps", "1", "--cache", "1", "--out")
    assert call("train.py", "last.mp4", *options, "each/of/", "--seed", "1")[0] == 0
    args = ("train.py", "more.mp4", *clips[::-1], "last.mp4", *options, "each/of")
    code, out, error = call(*args)
    assert code == 1 and len(loads) == 2 and error.endswith("train.py: error: no space\n")
    assert "learning   3 of 4  each/of/ref.pt" in out and out.endswith("--out each/of --resume\n")
    names = [path.name for path in (work / "each/of").iterdir()]
    runs = ["last-1.run", "last.run", "more.run", "ref.run", "up.run"]
    assert sorted(names) == sorted([*runs, "last-1.pt", "up.pt"])
    before = (work / "each/of/up.pt").read_bytes()
    faults[5] = FloatingPointError("step 1 is not finite")
    code, out, error = call(*args, "--resume")
    assert code == 1 and error.endswith("train.py: error: each/of/more.pt: step 1 is not finite\n")
    assert "kept       each/of/up.run: has taken its 1 steps" in out
    code, out, error = call(*args, "--resume")
    assert code == 0, error
    embeddings = "--emb each/of/more.pt --emb each/of/up.pt --emb each/of/ref.pt --emb each/of/last.pt"
    assert f"\nnext       python sample.py {embeddings} img.png" in out
    assert learned == ["last.mp4", "more.mp4", "up.mp4", "ref.mp4", "more.mp4", "ref.mp4", "last.mp4", "more.mp4"]
    shutil.rmtree(work / "each/of/up.run")
    assert call(*args, "--resume")[0] == 2  # nothing is left
    assert (work / "each/of/up.pt").read_bytes() == before
    assert call("train.py", "up.mp4", *options, "each")[0] == 0  # a folder by now
    assert call("train.py", "up.mp4", *options, "fresh/")[0] == 0 and (work / "fresh/up.pt").is_file()
    alone, among = Motion.load(work / "each/up.pt"), Motion.load(work / "each/of/up.pt")
    assert torch.equal(alone.tokens, among.tokens) and among.size == (64, 128)
    assert among.settings["clip"] == "up.mp4"


@pytest.mark.parametrize("kind", [FloatingPointError, torch.OutOfMemoryError])
def test_an_embedding_without_a_score_is_one_all_the_same(work, call, clips, monkeypatch, kind):
    """And the next clip is learned too."""

    def describe(*_):
        raise kind("the sample is not finite:\ntry --dtype bfloat16")

    monkeypatch.setattr("minimti.score.describe", describe)
    folder = f"unscored_{kind.__name__}"
    code, out, error = call("train.py", *clips, *SMALL_FILE, "--steps", "1", "--cache", "1", "--out", folder)
    assert code == 0 and out.count("\nnote       without a score: the sample is not finite:\n") == 2, error
    assert out.endswith("img.png --model small.safetensors\n")
    assert sorted(path.name for path in (work / folder).glob("*.pt")) == ["ref.pt", "up.pt"]


def test_a_signal_ends_a_score(mini_svd, monkeypatch):
    def check():
        raise signals.Interrupted(signal.SIGINT)

    def describe(svd, motion, frames, memory, watch):
        watch(pipeline.Progress("sample", 1, 2))

    monkeypatch.setattr("minimti.score.describe", describe)
    clip = Clip(torch.zeros(2, 3, 8, 8), 7.0, (0.0, 0.1), "ref.mp4", (8, 8))
    with pytest.raises(signals.Interrupted):
        train.judged(argparse.Namespace(memory="auto"), mini_svd, None, clip, check)


def test_clips_are_learned_together(work, call, clips):
    """As `learn` does; at the size of the first, and with the first as the preview."""
    args = ("train.py", *clips, "--together", *SHORT, "--out", "both.pt")
    code, out, error = call(*args, "--preview", "2")
    assert code == 0 and "both.pt: 5x2x48 tokens after 2 steps" in out, error
    assert out.count("note ") == 1 and "up.mp4 is portrait, unlike ref.mp4, at whose size it is read" in out
    assert "train.py: warning: up.mp4: only 25% of the picture is used" in error
    motion = Motion.load(work / "both.pt")
    assert (motion.settings["clip"], motion.settings["together with"]) == ("ref.mp4", "up.mp4")
    assert motion.size == SMALL.size
    assert Image.open(work / "both.run" / "clip.png").size == (4 * 128, 2 * 64)
    sized = call("train.py", *clips, "--together", "--size", "64x64", "--dry-run", "--model", "tiny", "--out", "s.pt")
    assert sized[0] == 0 and "at whose size" not in sized[1]
    read = [read_clip(name, SMALL, size=SMALL.size) for name in clips]
    shown = read_clip("both.run/preview-00002.mp4", SMALL, size=(256, 64)).frames[..., :128]
    assert (shown - read[0].frames).abs().mean() < 0.03 < (shown - read[1].frames).abs().mean()
    recipe = replace(make_recipe(SMALL), steps=2, num_cached_views=2)
    svd = minimti.load("small.safetensors", device="cpu")
    assert torch.equal(motion.tokens, pipeline.learn(svd, read, recipe=recipe, num_tokens=2).tokens)
    code, _, error = call("train.py", *clips[::-1], "--together", *SHORT, "--out", "both.pt", "--resume")
    assert code == 2 and "both.run: was begun with another clip, or other times" in error
    code, _, error = call(*args, "--vae-dtype", "bfloat16", "--resume")
    assert code == 2 and "both.run: was begun with --vae-dtype float32; to go on with it" in error
    code, out, _ = call(*args, "--dry-run")
    assert code == 0 and "both-strip.png: the frames of each clip" in out
    assert Image.open(work / "both-strip.png").size == (4 * 128, 2 * 4 * 64)


@pytest.mark.parametrize(
    "clip, name",
    [("walk.mp4", "walk"), ("a/b.c.mov", "b.c"), ("v1.2", "v1.2"), ("v1.2/", "v1.2"), ("v1.2/*.png", "v1.2")],
)
def test_an_embedding_is_called_after_its_clip(tmp_path, monkeypatch, clip, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v1.2").mkdir()
    (tmp_path / "a").mkdir()
    for file in ("walk.mp4", "a/b.c.mov"):
        (tmp_path / file).touch()
    assert train.name_of(clip) == name


def test_the_second_process_of_torchrun_prints_and_writes_nothing(work, call, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    met = []
    monkeypatch.setattr(Ranks, "joined", lambda self: nullcontext())
    monkeypatch.setattr(Ranks, "any", lambda self, flag: bool(met.append(flag)))
    monkeypatch.setattr(Ranks, "mean", lambda self, *tensors: tensors)
    monkeypatch.setattr("minimti.score.describe", None)  # not called
    before = set(work.rglob("*"))
    args = ("train.py", "ref.mp4", *SHORT, "--size", "64x64", "--frames", "2", "--preview", "2", "--out", "second.pt")
    code, out, error = call(*args)
    assert (code, out, error) == (0, "", "") and set(work.rglob("*")) == before
    # before anything is written, after each view, before the first step and after each, in each step of the preview,
    # and where the first process alone has made the score
    assert len(met) == 1 + 2 + 1 + 2 + SMALL.num_steps + 1


def test_a_log_of_fast_steps_has_no_more_than_a_line_in_two_seconds(capfd, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(cli.time, "perf_counter", lambda: next(clock) / 4)
    bars = cli.Bars("img_m")
    for step in range(1, 13):
        bars(pipeline.Progress("sample", step, 12))
    bars.close()
    lines = capfd.readouterr().err.splitlines()
    assert 1 < len(lines) < 6 and lines[-1].startswith("img_m: 12/12 [")


def test_the_first_step_takes_time_too(capfd, monkeypatch):
    """The bar begins when the first step is done; its seconds count from where the work before it ended."""
    now = [10.0]
    monkeypatch.setattr(cli.time, "perf_counter", lambda: now[0])
    bars = cli.Bars("img_m")
    for stage, step in (("encode", 1), ("encode", 2), ("sample", 1)):
        now[0] += 4
        bars(pipeline.Progress(stage, step, 2))
    bars.close()
    assert capfd.readouterr().err.count(" 4.00s/it") == 3


def test_a_log_gets_a_line_every_few_percent(capfd):
    """With the mean of the last losses, and the peak of the memory in the right unit."""
    bars = cli.Bars()
    for step in range(1001):
        bars(pipeline.Progress("learn", step, 1000, loss=step % 2 / 2 if step else None))
    bars.close()
    error = capfd.readouterr().err
    assert "\r" not in error and error.count("\n") == cli.Bars.LINES
    last = error.splitlines()[-1]
    assert last.startswith("inversion: 1000/1000 [") and "s/it, loss=0.2500, peak " in last and last.endswith(" GiB]")
    assert 2**27 < cli.peak_memory() < 2**40


@pytest.mark.parametrize("rows, columns", [(24, 100), (0, 0)])
def test_a_terminal_gets_one_bar(monkeypatch, rows, columns):
    """The bar of encoding goes when it is done; that of a resumed run starts where the run does."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        bars = cli.Bars()
        for stage, first, steps in (("encode", 1, 2), ("learn", 312, 500)):
            for step in range(first, steps + 1):
                bars(pipeline.Progress(stage, step, steps, loss=0.5 if stage == "learn" and step > first else None))
        bars.close()
    text = ""
    with open(master, "rb", buffering=0) as screen, suppress(OSError):  # Linux ends it with an error
        while more := screen.read(1 << 12):
            text += more.decode()
    assert "312/500" in text and "loss=0.5000, peak" in text and "500/500" in text
    screen = [line.split("\r")[-1] for line in text.split("\r\n")]
    assert sum("encoding" in line for line in screen) == 0 and sum("inversion" in line for line in screen) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("passive", str(threads.SPINS))),
        ({"GOMP_SPINCOUNT": "7"}, ("passive", "7")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
    ],
)
@pytest.mark.parametrize("program", [None, "train.py", "sample.py", "minimti/score.py"])
def test_threads_of_the_programs_wait_briefly(program, given, expected):
    """Unless the user has said otherwise; importing the package changes nothing."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    code = "import json, os, runpy, sys\n"
    if program is None:
        code += "import minimti, minimti.cli, minimti.score, train, sample\n"
        expected = tuple(given.get(name) for name in names)
    else:
        code += "sys.argv[1:] = ['--version']\n"
        code += f"try: runpy.run_path({str(ROOT / program)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    # Read where libgomp reads: PyTorch must not have been imported before.
    code += f"print(json.dumps(['torch' in sys.modules, *(os.environ.get(name) for name in {names})]))"
    environment = {key: value for key, value in os.environ.items() if key not in names} | given
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [False, *expected], done.stderr


def test_programs_start_where_there_are_only_the_signals_and_modules_of_windows():
    """No SIGHUP, no flock, no count of memory."""
    take = "import signal, sys; del signal.SIGHUP; sys.modules['fcntl'] = sys.modules['resource'] = None; "
    use = "from minimti import cli, signals; print(len(signals.STOPS), cli.peak_memory()); cli.run(lambda: None)"
    done = subprocess.run([sys.executable, "-c", take + use], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 None\n", "")
