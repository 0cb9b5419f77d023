"""The two ways through the model, as a notebook takes them."""

import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from official import MINI, fill_by_name, write_folder, write_official

import minimti
from minimti import edm, pipeline
from minimti import invert as invert_module
from minimti.budget import Budget
from minimti.checkpoint.fingerprint import fingerprint
from minimti.config import MEMORY_MODES, MODELS
from minimti.invert import make_recipe
from minimti.io.files import InputError
from minimti.io.video import Clip
from minimti.motion import frames_start, zero_start
from minimti.pipeline import Progress, animate, learn
from minimti.svd import SVD

ROOT = Path(__file__).resolve().parents[1]
F = MINI.num_frames
CONFIG = MINI
RECIPE = replace(make_recipe(CONFIG), steps=3, num_cached_views=2)


def build() -> SVD:
    with torch.device("meta"):
        svd = SVD(CONFIG)
    return fill_by_name(svd, CONFIG, "").requires_grad_(False)


@pytest.fixture(scope="module")
def svd() -> SVD:
    """Tests must leave it as it is."""
    return build()


@pytest.fixture(scope="module")
def clip() -> Clip:
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(F, 3, MINI.size[1], MINI.size[0], generator=generator) * 2 - 1
    return Clip(frames, fps=7.0, times=tuple(i / 7 for i in range(F)), source="random", source_size=MINI.size)


@pytest.fixture(scope="module")
def motion(svd, clip) -> minimti.Motion:
    return learn(svd, clip, recipe=RECIPE, num_tokens=2)


def image(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, MINI.size[1], MINI.size[0], generator=generator) * 2 - 1


# ------------------------------------------------------------------------------------------------------ the Python API


def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch):
    """As they stand there, but with two steps and one of the sampler, and in another folder."""
    (block,) = re.findall(r"```python\n(import minimti\n.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert block.count("\n") <= 10
    code = block.replace("examples/", f"{ROOT}/examples/").replace("learn(svd, clip)", "learn(svd, clip, steps=2)")
    code = code.replace("animate(svd, motion, image)", "animate(svd, motion, image, steps=1)")
    assert code.count("steps=2") == code.count("steps=1") == 1
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "rocket.mp4"]
    assert minimti.Motion.load(tmp_path / "m.pt").steps == 2
    frames = minimti.read_clip(tmp_path / "rocket.mp4", MODELS["tiny"]).frames
    assert frames.shape == (14, 3, 64, 64) and frames.std() > 0.01


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_importing_minimti_imports_no_pytorch():
    code = "import sys, minimti; dir(minimti); sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=_environment()).returncode == 0


def test_every_public_name_resolves():
    for name in minimti.__all__:
        assert getattr(minimti, name).__name__ == name and name in dir(minimti)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = minimti.nothing


def test_load_takes_a_name_a_path_and_what_suits_the_machine(tmp_path):
    svd = minimti.load("tiny", device="cpu")
    assert svd.config == MODELS["tiny"] and svd.device == torch.device("cpu") and svd.dtype == torch.float32
    path = write_official(tmp_path / "mini.safetensors", MINI)
    half = minimti.load(str(path), device="cpu", dtype=torch.bfloat16)
    assert half.config == MINI and half.dtype == torch.bfloat16
    assert next(half.vae.parameters()).dtype == torch.float32
    for device in ("cuda:99", "toaster", "meta"):
        with pytest.raises(InputError, match=f"device {device} is not available here; cpu always is"):
            minimti.load("tiny", device=device)


def test_a_dry_run_names_the_time_where_it_has_been_measured(monkeypatch):
    """Not for another length, in another precision, on another card. The memory is that of the real run."""
    svd, frames, card = MODELS["svd"], torch.empty(14, 3, 576, 1024, device="meta"), "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(pipeline, "SVD", cache(SVD))  # built once
    monkeypatch.setattr(pipeline, "available_memory", lambda device: 80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    cuda, cpu, half, whole = torch.device("cuda"), torch.device("cpu"), torch.bfloat16, torch.float32
    clip = Clip(frames, 7.0, (0.0,) * 14, "ref.mp4", (1024, 576))
    upright, short = replace(clip, frames=frames.transpose(2, 3)), replace(clip, frames=frames[:13])
    for described, expected in (
        ((svd, clip, 1000, cuda, None, "auto"), "about 5 minutes for 1000 steps, besides loading and encoding"),
        ((svd, upright, 500, cuda, half, "balanced"), "about 3 minutes for 500 steps, besides loading and encoding"),
        ((svd, clip, 1000, cuda, half, "fast"), "about 6 minutes for 1000 steps, besides loading and encoding"),
        ((svd, clip, 1000, cuda, half, "low"), f"not measured on {card} at this size, precision and memory mode"),
        ((svd, short, 1000, cuda, half, "max"), f"not measured on {card} at this size, precision and memory mode"),
        ((svd, clip, 1000, cuda, whole, "max"), f"not measured on {card} at this size, precision and memory"),
    ):
        *others, memory = described
        lines = dict(pipeline.describe_learning(*others, whole, memory))
        assert lines["memory"].endswith(" of 80.0 GiB") and lines["time"].startswith(expected)
    for card in ("NVIDIA A100", "NVIDIA H100 PCIe"):
        lines = dict(pipeline.describe_learning(svd, clip, 1000, cuda, None, half, "max"))
        assert lines["time"].startswith(f"not measured on {card}")
    loaded = pipeline.SVD(svd)  # with the precisions that load_into gives it
    loaded.unet.to(half), loaded.image_encoder.to(half), loaded.vae.to(half)
    assert lines["memory"] == pipeline.budget_of_learning(loaded, clip, "max").describe()
    assert "time" not in dict(pipeline.describe_learning(MODELS["tiny"], clip, 150, cpu, None, whole, "auto"))


# --------------------------------------------------------------------------------------------------------------- learn


def test_learning_gives_an_embedding_that_names_how_it_was_made(svd, clip, motion):
    assert motion.tokens.shape == (F + 1, 2, MINI.unet.context_dim) and not motion.tokens.requires_grad
    assert (motion.num_frames, motion.model, motion.size) == (F, "mini", MINI.size)
    assert (motion.steps, motion.seed, motion.micro) == (3, 0, MINI.micro)
    assert motion.fingerprint == fingerprint(svd.unet) != {}


@pytest.mark.parametrize("name", ["paper", "muon"])
def test_tokens_start_from_the_embeddings_of_the_frames_or_from_zero(svd, clip, name):
    generator = torch.Generator().manual_seed(4)
    if name == "paper":
        with torch.no_grad():
            expected = frames_start(svd.embed(clip.frames), 5, generator)
    else:
        expected = zero_start(F + 1, 5, MINI.unet.context_dim, generator)
    motion = learn(svd, clip, recipe=name, steps=0, seed=4)
    assert motion.steps == 0 and torch.equal(motion.tokens, expected)
    shared = learn(svd, clip, recipe=name, steps=0, seed=4, shared=True)
    assert torch.equal(shared.tokens, expected[-1:]) and shared.num_frames == F


def test_one_shared_set_is_learned(svd, clip):
    start, motion = (learn(svd, clip, recipe="muon", steps=steps, shared=True) for steps in (0, 2))
    assert motion.tokens.shape == (1, 5, MINI.unet.context_dim)
    assert ((motion.tokens - start.tokens).abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize("cached, expected", [(2, [0, 1]), (5, [0, 1, 2]), (0, [0, 1, 2])])
def test_views_are_made_once_and_taken_in_turn(svd, clip, monkeypatch, cached, expected):
    """As many as there are steps at most; without a cache one for every step."""
    made, used, view, invert = [], [], pipeline.view, pipeline.invert

    def recorded(svd, clip, motion, flip, crop, index):
        made.append(index)
        return view(svd, clip, motion, flip, crop, index)

    def spied(svd, views, motion, recipe, **options):
        return invert(svd, lambda step: used.append(views(step)[0]) or views(step), motion, recipe, **options)

    monkeypatch.setattr(pipeline, "view", recorded)
    monkeypatch.setattr(pipeline, "invert", spied if cached else invert)
    learn(svd, clip, recipe=replace(RECIPE, num_cached_views=cached))
    assert made == expected
    if cached:
        assert torch.equal(used[0], used[2]) is (cached == 2) and not torch.equal(used[0], used[1])


def test_one_motion_is_learned_from_several_clips_in_turn(svd, clip, monkeypatch):
    other = replace(clip, frames=-clip.frames, fps=5.0)
    encoded, encode = [], svd.encode
    monkeypatch.setattr(pipeline.SVD, "encode", lambda self, frames: encoded.append(frames) or encode(frames))
    monkeypatch.setattr("minimti.invert.augment", lambda frames, generator, flip, crop: frames)
    learn(svd, [clip, other], recipe=replace(RECIPE, num_cached_views=3))
    assert all(torch.equal(*pair) for pair in zip(encoded, [c.frames[None] for c in (clip, other, clip)], strict=True))


def test_several_clips_start_from_the_mean_of_their_embeddings(svd, clip):
    other = replace(clip, frames=-clip.frames, fps=5.0)
    with torch.no_grad():
        embeddings = (svd.embed(clip.frames) + svd.embed(other.frames)) / 2
    expected = frames_start(embeddings, 5, torch.Generator().manual_seed(0))
    motion = learn(svd, [clip, other], recipe="paper", steps=0)
    assert torch.allclose(motion.tokens, expected, atol=1e-6) and motion.fps == clip.fps
    assert torch.equal(
        learn(svd, [clip], recipe="paper", steps=0).tokens, learn(svd, clip, recipe="paper", steps=0).tokens
    )


def test_clips_of_different_shapes_are_refused(svd, clip):
    for clips in ([], [clip, replace(clip, frames=clip.frames[1:])]):
        with pytest.raises(ValueError, match="same number of frames"):
            learn(svd, clips)


def test_every_clip_has_a_turn(svd, clip):
    for recipe in (replace(RECIPE, num_cached_views=1), replace(RECIPE, num_cached_views=0, steps=1)):
        with pytest.raises(ValueError, match="2 clips cannot take turns in 1 views"):
            learn(svd, [clip, clip], recipe=recipe)


@pytest.mark.parametrize("fetch_every, settled", [(1, [0, 1, 2, 3]), (3, [0, 3])])
def test_losses_can_be_had_after_every_step(svd, clip, fetch_every, settled):
    """On a GPU they come ten at a time by default, with the tokens of the last."""
    seen: list[int] = []

    def watch(progress: Progress) -> None:
        if progress.stage == "learn" and progress.is_settled:
            seen.append(progress.step)

    learn(svd, clip, recipe=RECIPE, fetch_every=fetch_every, progress=watch)
    assert seen == settled


def test_flip_and_the_recipes_crop_reach_the_views(svd, clip, monkeypatch):
    allowed, view = [], pipeline.view
    monkeypatch.setattr(pipeline, "view", lambda *args: allowed.append(args[3:5]) or view(*args))
    for flip in (True, False):
        learn(svd, clip, recipe=replace(RECIPE, crop=not flip), steps=1, flip=flip)
    assert allowed == [(True, False), (False, True)]


def test_progress_is_reported_step_by_step(svd, clip):
    events: list[Progress] = []
    motion = learn(svd, clip, recipe=RECIPE, progress=events.append)
    assert [(e.stage, e.step, e.steps) for e in events] == [
        ("encode", 1, 2),
        ("encode", 2, 2),
        *(("learn", step, 3) for step in range(4)),
    ]
    assert events[2].loss is None and all(e.loss > 0 for e in events[3:]) and events[2].motion is motion


def test_an_interrupted_inversion_leaves_the_tokens_of_its_last_step(svd, clip):
    seen = []

    def stop(progress: Progress) -> None:
        if progress.stage == "learn":
            seen.append(progress.motion)
            if progress.step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(svd, clip, recipe=RECIPE, progress=stop)
    halves = []
    learn(
        svd,
        clip,
        recipe=RECIPE,
        progress=lambda p: p.step == 2 and p.motion is not None and halves.append(p.motion.tokens.clone()),
    )
    assert seen[-1].steps == 2 and torch.equal(seen[-1].tokens, halves[0])


# ------------------------------------------------------------------------------------------------------------- animate


def test_a_video_is_the_sample_of_the_embedding(svd, motion):
    """The solver run by hand on the conditioning of the image and the tokens gives the same pixels."""
    video = animate(svd, motion, image(), seed=5)
    assert video.shape == (F, 3, MINI.size[1], MINI.size[0]) and video.dtype == torch.uint8
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        cond = svd.prepare(image(), motion.sets, motion.micro, generator)
        n = torch.randn(cond.concat.shape, generator=generator)
        *_, x = svd.sample(cond, n, MINI.num_steps, (1.0, 3.0))
        pixels = svd.decode(x)[0]
    assert torch.equal(video, ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte())


@pytest.mark.full
def test_every_argument_reaches_the_video(svd, motion):
    variants = [
        {},
        {"steps": 2},
        {"guidance": (1.0, 1.0)},
        {"solver": "heun"},
        {"solver": "dpmpp-2m"},
        {"seed": 1},
        {"micro": replace(MINI.micro, motion_bucket_id=0)},
        {"unconditional": True},
        {"unconditional": True, "guidance": (1.0, 3.0)},
    ]
    videos = [animate(svd, motion, image(), **variant) for variant in variants]
    videos += [animate(svd, motion, image(2)), animate(svd, None, image())]
    for i in range(len(videos)):
        assert not any(torch.equal(videos[i], videos[j]) for j in range(i)), i
    assert torch.equal(videos[0], animate(svd, motion, image()))
    assert (animate(svd, motion, image(), memory="low").int() - videos[0].int()).abs().max() <= 1


def test_unconditional_guidance_is_that_of_figure_6(svd, motion):
    default = animate(svd, motion, image(), unconditional=True)
    assert torch.equal(default, animate(svd, motion, image(), unconditional=True, guidance=(1.0, 10.0)))
    other = replace(motion, micro=replace(motion.micro, cond_aug=0.0))
    quiet = animate(svd, other, image(), unconditional=True)
    assert torch.equal(quiet, animate(svd, other, image(2), unconditional=True))  # the image itself plays no part


def test_the_micro_conditioning_is_the_embeddings_own(svd, motion):
    micro = replace(MINI.micro, fps_id=11, motion_bucket_id=30)
    own = animate(svd, replace(motion, micro=micro), image())
    assert torch.equal(own, animate(svd, motion, image(), micro=micro))
    assert not torch.equal(own, animate(svd, motion, image()))


def test_without_an_embedding_the_image_moves_by_its_own(svd):
    events = []
    with torch.inference_mode():
        spatial, temporal = svd.tokens_of(image(), F)
    own = minimti.Motion(temporal, F, "mini", MINI.micro, MINI.size, 0, 0)
    plain = animate(svd, None, image(), progress=events.append)
    assert torch.equal(plain, animate(svd, own, image()))
    assert [(e.stage, e.step, e.steps) for e in events] == [("sample", step, 3) for step in (1, 2, 3)]


def test_an_embedding_of_another_model_is_refused_and_one_of_other_weights_warned_of(svd, motion):
    with pytest.raises(InputError, match="the embedding is for model 'other'"):
        animate(svd, replace(motion, model="other"), image())
    tuned = {name: [number + 0.5 for number in numbers] for name, numbers in motion.fingerprint.items()}
    with pytest.warns(UserWarning, match="learned on other weights of mini") as warned:
        animate(svd, replace(motion, fingerprint=tuned), image(), steps=1)
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        animate(svd, motion, image(), steps=1)
        animate(svd, replace(motion, fingerprint={}), image(), steps=1)  # as version 0.1.0 leaves it


# ------------------------------------------------------------------------------------------------------------ together


def test_learning_and_animating_follow_each_other_in_any_order(clip):
    svd = build()
    first, plain = learn(svd, clip, recipe=RECIPE), animate(svd, None, image())
    video = animate(svd, first, image())
    again = learn(svd, clip, recipe=RECIPE)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(video, animate(svd, again, image()))
    assert torch.equal(plain, animate(svd, None, image()))


def test_released_networks_are_named_when_they_are_used(clip):
    svd = build()
    motion = learn(svd, clip, recipe=RECIPE)
    for name in ("image_encoder", "vae"):
        svd.release(name)
    with pytest.raises(RuntimeError, match="image_encoder was released"):
        learn(svd, clip, recipe=RECIPE)
    with pytest.raises(RuntimeError, match="vae was released"):
        animate(svd, motion, image())


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_model_without_its_image_encoder_animates_the_same(tmp_path, layout):
    """The other networks are checked as strictly."""
    path = write_official(tmp_path / "mini.safetensors", MINI)
    if layout == "folder":
        path = write_folder(tmp_path / "folder", pipeline.load(str(path)))
    whole, without = (pipeline.load(str(path), image_encoder=on) for on in (True, False))
    tokens = torch.ones(1, 2, MINI.unet.context_dim)
    motion = minimti.Motion(tokens, F, "mini", MINI.micro, MINI.size, steps=0, seed=0)
    assert torch.equal(animate(without, motion, image()), animate(whole, motion, image()))
    with pytest.raises(RuntimeError, match="image_encoder was released"):
        animate(without, None, image())
    checkpoint = pipeline.open_checkpoint(str(path))
    del checkpoint.tensors.shapes[next(name for name in checkpoint.tensors.shapes if name.endswith("conv_out.bias"))]
    with pytest.raises(InputError, match="lacks"):
        pipeline.load(checkpoint, image_encoder=False)


@pytest.mark.parametrize("step", ["learn", "animate"])
def test_networks_that_a_step_does_not_need_are_parked(clip, motion, monkeypatch, step):
    """The image encoder after the embeddings, the VAE after the views or the image, the UNet before decoding."""
    svd, parked = build(), []
    monkeypatch.setattr(svd, "park", parked.append)
    if step == "learn":
        learn(svd, clip, recipe=RECIPE)
        assert parked == ["image_encoder", "vae"]
    else:
        animate(svd, motion, image())
        assert parked == ["image_encoder", "vae", "unet"]


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_memory_modes_learn_the_same(svd, clip, motion, memory):
    other = learn(svd, clip, recipe=RECIPE, num_tokens=2, memory=memory)
    assert torch.allclose(other.tokens, motion.tokens, atol=1e-4)


@pytest.mark.parametrize("free, mode", [(None, "balanced"), (2**50, "max")])
def test_the_fastest_mode_that_fits_is_taken_unless_one_is_named(svd, clip, monkeypatch, free, mode):
    monkeypatch.setattr(pipeline, "available_memory", lambda device: free)
    for memory, expected in (("auto", mode), ("low", "low"), (Budget(memory="fast"), "fast")):
        learn(svd, clip, recipe=RECIPE, steps=0, memory=memory)
        assert svd.budget.memory == expected
        assert svd.unet.mid_block.mode == (None if expected == "max" else expected)


def test_a_video_made_while_learning_leaves_the_budget_as_it_was(svd, motion):
    svd.use(Budget(memory="low"))
    animate(svd, motion, image(), steps=1, memory="max")
    assert svd.budget == Budget(memory="low") and svd.unet.mid_block.mode == "low"


@pytest.mark.parametrize("options, batches", [({}, [2]), ({"memory": "low"}, [1, 1])], ids=str)
def test_low_memory_samples_the_branches_in_turn(svd, motion, monkeypatch, options, batches):
    seen, forward = [], svd.unet.forward
    monkeypatch.setattr(svd.unet, "forward", lambda *args: seen.append(len(args[0])) or forward(*args))
    animate(svd, motion, image(), steps=2, **options)
    assert seen == 2 * batches


def test_training_and_sampling_condition_alike(svd, clip, monkeypatch, tmp_path):
    """The inputs of the UNet in a training step, but noise, are those of sampling for the same image and draws."""
    seen, states, forward, prepare = [], [], svd.unet.forward, svd.prepare
    monkeypatch.setattr(svd.unet, "forward", lambda *args: seen.append(args) or forward(*args))
    monkeypatch.setattr(invert_module, "augment", lambda clip, generator, flip, crop: clip)
    starts = []

    def recorded(image, tokens, micro, generator):
        states.append(generator.get_state())
        return prepare(image, tokens, micro, generator)

    monkeypatch.setattr(svd, "prepare", recorded)

    def keep(progress: Progress) -> None:
        if progress.stage == "learn":
            starts.append(replace(progress.motion, tokens=progress.motion.tokens.clone()))

    learn(svd, clip, recipe=replace(RECIPE, steps=1), progress=keep)
    starts[0].save(tmp_path / "m.pt")
    start = minimti.Motion.load(tmp_path / "m.pt")
    generator = torch.Generator()
    generator.set_state(states[0])
    with torch.inference_mode():
        cond = prepare(clip.frames[:1], start.sets, start.micro, generator)
        list(svd.sample(cond, torch.randn(cond.concat.shape), 1, (1.0, 3.0)))
    (x, _, micro, contexts), (both, _, both_micro, both_contexts) = seen
    z = MINI.vae.z_channels
    assert torch.equal(x[:, :, z:], both[1:, :, z:]) and (both[:1, :, z:] == 0).all()
    assert torch.equal(both_micro, micro.expand(2, -1))
    for training, sampling in zip(contexts, both_contexts):
        assert torch.equal(training.frame_embedding, sampling.frame_embedding)
        for ours, theirs in zip(training[:4], sampling[:4]):  # keys and values: the negative branch comes first
            assert torch.allclose(ours, theirs[len(ours) :], atol=1e-6) and not theirs[: len(ours)].any()


def test_no_solver_is_missing_on_the_command_line():
    from minimti.config import MEMORY_MODES, RECIPES, SOLVERS
    from minimti.networks.recompute import MODES

    assert tuple(edm.SOLVERS) == tuple(SOLVERS) and ("max", *MODES) == MEMORY_MODES
    assert all(make_recipe(MINI, name) for name in RECIPES)


def test_a_video_is_an_ordinary_tensor(svd, motion):
    video = animate(svd, motion, image(), steps=1)
    assert not video.is_inference() and not video.requires_grad
    video[0] = 255


def test_an_interrupted_sample_leaves_a_model_that_learns(clip, motion):
    svd = build()

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        animate(svd, motion, image(), progress=stop)
    assert learn(svd, clip, recipe=RECIPE, steps=1).steps == 1


@pytest.mark.parametrize(
    "picture, options, message",
    [
        (torch.zeros(2, 3, 32, 48), {}, r"must be floating-point \[1, 3, H, W\], not torch.float32 \[2"),
        (torch.zeros(3, 32, 48), {}, r"must be floating-point \[1, 3, H, W\], not torch.float32 \[3, 32, 48\]"),
        (torch.zeros(1, 3, 32, 48, dtype=torch.uint8), {}, r"must be floating-point \[1, 3, H, W\], not torch.uint8"),
        (torch.zeros(1, 3, 32, 48), {"solver": "ddim"}, "unknown solver 'ddim': euler, heun, dpmpp-2m"),
        (torch.zeros(1, 3, 32, 48), {"memory": "all"}, "unknown memory mode 'all': auto, max, fast, balanced, low"),
        (torch.zeros(1, 3, 32, 48), {"steps": 0}, "at least one step, not 0"),
    ],
)
def test_what_cannot_be_animated_is_named(svd, motion, picture, options, message):
    with pytest.raises(ValueError, match=message):
        animate(svd, motion, picture, **options)
