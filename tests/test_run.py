"""The folder of a run: stopped and resumed runs, what stands there already, one process at a time, a full disk."""

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from official import MINI
from PIL import Image

from minimti.budget import Budget
from minimti.invert import Recipe
from minimti.io.files import InputError
from minimti.io.pixels import to_uint8
from minimti.io.video import Clip, read_clip
from minimti.io.write import write_clip, write_frames
from minimti.motion import Motion, how_read
from minimti.pipeline import Progress, learn
from minimti.ranks import Ranks
from minimti.run import Previews, Run, digest, draw_losses, frames_digest, read_learned
from minimti.svd import SVD

ADAM = Recipe("adam", False, False, steps=5, lr=1e-2, p_mean=0.0, p_std=1.0, crop=True, num_cached_views=2)
MUON = replace(ADAM, optimizer="muon", shared_start=True, spread_sigmas=True, lr=0.2)
CPU, WEIGHTS = torch.device("cpu"), {"w": [0.5, -1.0]}


@pytest.fixture
def drawn():
    """For a test of the curve, which is not drawn otherwise: it takes longer than the steps."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("minimti.run.draw_losses", lambda path, *_: path.touch())


@pytest.fixture(scope="module")
def clip() -> Clip:
    frames = torch.rand(4, 3, MINI.size[1], MINI.size[0], generator=torch.Generator().manual_seed(7)) * 2 - 1
    return Clip(frames, 10.0, (0.0, 0.1, 0.2, 0.3), "ref.mp4", MINI.size)


@contextmanager
def begun(out, steps=5, save_every=2, settings=None):
    with Run(out, save_every) as run:
        run.make_way()
        run.begin(settings or {"seed": 0}, WEIGHTS, steps, "python train.py ref.mp4")
        yield run


@contextmanager
def resumed(out, steps=None, save_every=2, settings=None, weights=WEIGHTS):
    """-> the run, and the state that it goes on from."""
    with Run(out, save_every) as run:
        state = run.find(settings or {"seed": 0}, steps, CPU)
        run.resume(state, weights)
        yield run, state


def train(svd, clip, run, recipe=ADAM, stop=None, state=None) -> Motion | None:
    """`learn` with the run's saves, interrupted after step `stop`, which is finished as the program does."""

    def watch(progress):
        run(progress)
        if progress.stage == "learn" and progress.step == stop:
            raise KeyboardInterrupt

    try:
        motion = learn(svd, clip, recipe=recipe, progress=watch, num_tokens=2, resume=state)
    except KeyboardInterrupt:
        motion = run.last.motion
    run.finish(motion)
    assert run.last is None  # the views are free
    return motion


@pytest.fixture(scope="module")
def unstopped(mini_svd, clip):
    return {recipe: learn(mini_svd, clip, recipe=recipe, num_tokens=2).tokens for recipe in (ADAM, MUON)}


def test_a_preview_leaves_budget_and_memory_of_the_training(mini_svd, clip, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    motion = learn(mini_svd, clip, recipe=replace(ADAM, steps=1), num_tokens=2)
    monkeypatch.setattr(mini_svd, "budget", Budget(memory="fast"))
    with begun(tmp_path / "m.pt") as run:
        previews, parked = Previews(run, mini_svd, clip, 1, lambda: None), []
        monkeypatch.setattr(SVD, "park", lambda self, name: parked.append(name))
        previews(Progress("learn", 0, 2, motion=replace(motion, steps=0)))
        previews(Progress("learn", 1, 2, loss=1.0, motion=motion))
        assert parked[-3:] == ["unet", "image_encoder", "vae"]
        monkeypatch.setattr(SVD, "sample", fail)
        second = Progress("learn", 2, 2, loss=1.0, motion=replace(motion, steps=2))
        with pytest.warns(UserWarning, match="no preview after 2 steps: CUDA out of memory"):
            previews(second)
        of_two = Previews(run, mini_svd, clip, 1, lambda: None, Ranks(1, 2))
        with pytest.raises(torch.OutOfMemoryError):  # the other process waits for this one
            of_two(second)
    assert mini_svd.budget == Budget(memory="fast") and mini_svd.unet.mid_block.mode == "fast"
    mini_svd.use(Budget())


def test_a_preview_takes_little_memory_and_comes_when_it_is_due(mini_svd, clip, tmp_path, monkeypatch):
    """A run that is resumed after 250 steps has its next one, of every 100, after 300."""
    motion = learn(mini_svd, clip, recipe=replace(ADAM, steps=1), num_tokens=2)
    taken, video = [], torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    monkeypatch.setattr("minimti.run.animate", lambda *_, **options: taken.append(options["memory"]) or video)
    monkeypatch.setattr("minimti.run.write_clip", lambda path, *_: path.touch())
    monkeypatch.setattr("minimti.run.enlarged", lambda part: video)
    with begun(tmp_path / "m.pt") as run:
        for memory in ("max", "balanced", "low"):
            mini_svd.use(Budget(memory=memory))
            previews = Previews(run, mini_svd, clip, 100, lambda: None)
            for step in (250, 251, 299, 300, 301):
                at = replace(motion, steps=step)
                previews(Progress("learn", step, 500, loss=None if step == 250 else 1.0, motion=at))
        mini_svd.use(Budget())
        assert taken == ["balanced", "balanced", "low"]
        assert [path.name for path in run.folder.glob("*.mp4")] == ["preview-00300.mp4"]


# ------------------------------------------------------------------------------------------------------------ resuming


def test_an_embedding_is_not_learned_again_because_its_state_is_lost(mini_svd, clip, tmp_path):
    with begun(tmp_path / "m.pt") as run:
        train(mini_svd, clip, run)
    (tmp_path / "m.run" / "state.pt").unlink()
    for steps in (None, 7):
        with pytest.raises(InputError, match=r"m\.run: its state\.pt is missing; leave --resume out to begin again"):
            with resumed(tmp_path / "m.pt", steps):
                pass


@pytest.mark.parametrize("recipe", [ADAM, MUON], ids=["adam", "muon"])
@pytest.mark.parametrize("stops", [[1], [2, 4], [0, 3]])
def test_a_resumed_run_ends_with_the_tokens_of_one_never_stopped(mini_svd, clip, unstopped, tmp_path, recipe, stops):
    with begun(tmp_path / "m.pt") as run:
        train(mini_svd, clip, run, recipe, stop=stops[0])
    for stop in [*stops[1:], None]:
        with resumed(tmp_path / "m.pt") as (run, state):
            motion = train(mini_svd, clip, run, recipe, stop, state)
    assert motion.steps == 5 and torch.equal(motion.tokens, unstopped[recipe])
    assert torch.equal(Motion.load(tmp_path / "m.pt").tokens, unstopped[recipe])
    entries = [json.loads(line) for line in (tmp_path / "m.run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5]
    seconds = [entry["seconds"] for entry in entries]
    assert seconds == sorted(seconds) and all(entry["loss"] > 0 for entry in entries)


@pytest.mark.parametrize("recipe", [ADAM, MUON], ids=["adam", "muon"])
def test_a_killed_run_goes_on_from_its_last_save(mini_svd, clip, unstopped, tmp_path, recipe):
    """Killed after step 3 with a save every 2 steps, amid a line of the log: one step is taken again."""
    with begun(tmp_path / "m.pt") as run:

        def killed(progress):
            run(progress)
            if progress.step == 3 and progress.stage == "learn":
                raise ZeroDivisionError  # nothing is saved after it

        with pytest.raises(ZeroDivisionError):
            learn(mini_svd, clip, recipe=recipe, progress=killed, num_tokens=2)
    with open(tmp_path / "m.run" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "loss": 0.1, "seconds": 1}\n{"step": 4, "lo')
    with resumed(tmp_path / "m.pt") as (run, state):
        assert state.steps == 2 and len(state.views) == 2
        motion = train(mini_svd, clip, run, recipe, state=state)
    assert torch.equal(motion.tokens, unstopped[recipe])
    assert len((tmp_path / "m.run" / "log.jsonl").read_text().splitlines()) == 5


def test_views_are_encoded_once_for_a_run_and_its_resumption(mini_svd, clip, tmp_path):
    stages = []
    with begun(tmp_path / "m.pt") as run:
        train(mini_svd, clip, run, stop=1)
    with resumed(tmp_path / "m.pt") as (_, state):
        motion = learn(mini_svd, clip, recipe=ADAM, resume=state, progress=lambda p: stages.append(p.stage))
    assert set(stages) == {"learn"} and motion.steps == 5


def test_views_that_added_steps_need_are_kept_too(mini_svd, clip, tmp_path):
    """One step takes one view, three take two."""
    with begun(tmp_path / "m.pt", steps=1) as run:
        train(mini_svd, clip, run, replace(ADAM, steps=1))
    with resumed(tmp_path / "m.pt", steps=3) as (run, state):
        assert len(state.views) == 1
        train(mini_svd, clip, run, replace(ADAM, steps=3), stop=2, state=state)
    with resumed(tmp_path / "m.pt") as (_, state):
        assert len(state.views) == 2


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_killed_at_its_end_is_finished(mini_svd, clip, unstopped, tmp_path, monkeypatch, moment):
    """Killed while it saves, before or after the embedding is there."""
    save = Motion.save

    def killed(motion, path):
        if moment == "after":
            save(motion, path)
        raise ZeroDivisionError

    with begun(tmp_path / "m.pt", save_every=5) as run:
        monkeypatch.setattr(Motion, "save", killed)
        with pytest.raises(ZeroDivisionError):
            train(mini_svd, clip, run)
        monkeypatch.undo()
    with resumed(tmp_path / "m.pt") as (run, state):
        train(mini_svd, clip, run, state=state)
    assert torch.equal(Motion.load(tmp_path / "m.pt").tokens, unstopped[ADAM])
    (tmp_path / "m.pt").unlink()
    with resumed(tmp_path / "m.pt") as (run, state):
        train(mini_svd, clip, run, state=state)
    assert torch.equal(Motion.load(tmp_path / "m.pt").tokens, unstopped[ADAM])


def test_a_run_killed_while_views_are_encoded_begins_again(mini_svd, clip, unstopped, tmp_path):
    with begun(tmp_path / "m.pt"):
        pass
    with resumed(tmp_path / "m.pt") as (run, state):
        assert state is None and run.steps == 5
        assert torch.equal(train(mini_svd, clip, run).tokens, unstopped[ADAM])


def test_a_state_is_a_copy(mini_svd, clip):
    """Neither the steps after it nor those that start from it change it."""
    states = []
    learn(mini_svd, clip, recipe=MUON, num_tokens=2, progress=lambda p: p.state and states.append(p.state()))
    one, before = states[2], [t.clone() for s in states[2].optimizer.values() for t in s.values()]
    first, second = (learn(mini_svd, clip, recipe=MUON, num_tokens=2, resume=one).tokens for _ in range(2))
    assert one.steps == 2 and torch.equal(first, second) and torch.equal(first, states[-1].tokens)
    assert all(torch.equal(t, old) for t, old in zip((t for s in one.optimizer.values() for t in s.values()), before))


def test_steps_that_are_added_to_the_papers_recipe_are_those_of_a_longer_run(mini_svd, clip, tmp_path):
    """Its rate is constant."""
    with begun(tmp_path / "m.pt", steps=3) as run:
        train(mini_svd, clip, run, replace(ADAM, steps=3))
    with resumed(tmp_path / "m.pt", steps=5) as (run, state):
        motion = train(mini_svd, clip, run, ADAM, state=state)
        assert run.text(5) == "3 + 2" and run.text(4) == "4 of 3 + 2"
    assert torch.equal(motion.tokens, learn(mini_svd, clip, recipe=ADAM, num_tokens=2).tokens)
    assert Motion.load(tmp_path / "m-1.pt").steps == 3 and Motion.load(tmp_path / "m.pt").steps == 5


@pytest.mark.full
def test_steps_that_are_added_to_ours_begin_another_cosine(mini_svd, clip, tmp_path):
    """Stopped amid the added ones too, the tokens are the same; the rate starts high again."""
    results = []
    for name, stop in (("a", None), ("b", 6)):
        with begun(tmp_path / f"{name}.pt") as run:
            motion = train(mini_svd, clip, run, MUON)
        with resumed(tmp_path / f"{name}.pt", steps=8) as (run, state):
            motion = train(mini_svd, clip, run, replace(MUON, steps=8), stop, state)
        if stop:
            with resumed(tmp_path / f"{name}.pt") as (run, state):
                assert (state.steps, state.begun, run.text(6)) == (6, 5, "6 of 5 + 3")
                motion = train(mini_svd, clip, run, replace(MUON, steps=8), state=state)
        results.append(motion.tokens)
    assert torch.equal(*results)
    with resumed(tmp_path / "a.pt", steps=10) as (_, state):
        moved = [state.tokens.clone()]
        steps = replace(MUON, steps=10)
        learn(mini_svd, clip, recipe=steps, resume=state, progress=lambda p: moved.append(p.motion.tokens.clone()))
    assert (moved[2] - moved[1]).norm() > 1.5 * (moved[3] - moved[2]).norm()  # cosine at 0 and at 1/2


# --------------------------------------------------------------------------------------------------- what stands there


def test_what_stands_there_is_renamed_and_named(mini_svd, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        with Run("m.pt", 2) as run:
            said = run.make_way()
            run.begin({"seed": seed}, WEIGHTS, 1, "python train.py ref.mp4")
            train(mini_svd, clip, run, replace(ADAM, steps=1))
        assert (said != []) == (seed > 0)
    moves = [("m.pt", "m-2.pt"), ("m.run", "m-2.run")]
    assert said == [f"renamed    {old}, which stood there, to {new}" for old, new in moves]
    seeds = {
        name: json.loads((tmp_path / name / "settings.json").read_text())["settings"]["seed"]
        for name in ("m-1.run", "m-2.run", "m.run")
    }
    assert seeds == {"m-1.run": 0, "m-2.run": 1, "m.run": 2}
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["m-1.pt", "m-2.pt", "m.pt"]


def test_an_embedding_without_a_run_is_renamed_too(tmp_path):
    (tmp_path / "m.safetensors").write_text("another's")
    with begun(tmp_path / "m.safetensors"):
        pass
    assert (tmp_path / "m-1.safetensors").read_text() == "another's" and not (tmp_path / "m.safetensors").exists()
    assert (tmp_path / "m.run" / "settings.json").exists() and not (tmp_path / "m-1.run").exists()


def test_the_second_of_two_processes_that_begin_at_once_is_refused(tmp_path):
    """Neither finds a run when it starts."""
    with Run(tmp_path / "m.pt", 2) as first, Run(tmp_path / "m.pt", 2) as second:
        first.make_way()
        first.begin({"seed": 0}, WEIGHTS, 1, "python train.py ref.mp4")
        with pytest.raises(InputError, match="m.run: another process is training there"):
            second.make_way()
    assert [path.name for path in tmp_path.iterdir()] == ["m.run"]


READINGS = [
    {},
    {"start": 0.035},
    {"end": 1.01},
    {"sample_fps": 14.0},
    {"stride": 3, "start": 0.1},
    {"how": "pad"},
    {"center": (1.0, 0.25)},
]


@pytest.mark.parametrize("options", READINGS, ids=str)
@pytest.mark.parametrize("source", ["film.mp4", "walk", "walk/*.png"])
def test_a_clip_is_read_again_as_training_read_it(tmp_path, monkeypatch, source, options):
    """Where the folder of the run is gone. Another film of the same name is noticed."""
    monkeypatch.chdir(tmp_path)
    config = replace(MINI, size=(32, 32))
    for k in range(2):
        shades = torch.randint(0, 256, (40, 3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
        film = shades.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)  # [F, 3, 48, 64]
        if source.startswith("walk"):
            write_frames("walk", film)
        else:
            write_clip("film.mp4", film, 30000 / 1001)
        if k == 0:
            clip = read_clip(source, config, **options)
            given = {"start": 0.0, "end": None, "sample_fps": None, "stride": None, "how": "crop", "center": (0.5, 0.5)}
            facts = {"clip": source, "frames": frames_digest(clip), **how_read(**given | options)}
            motion = Motion(
                torch.zeros(1, 1, 48), MINI.num_frames, "mini", MINI.micro, (32, 32), 1, 0, settings=facts, fps=clip.fps
            )
            assert torch.equal(read_learned("m.pt", motion, config).frames, clip.frames)
    with pytest.raises(InputError, match="m.pt: was learned from another clip than "):
        read_learned("m.pt", motion, config)
    assert not torch.equal(read_learned("m.pt", motion, config, source).frames, clip.frames)  # it was named


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "m.run").touch()
    with pytest.raises(InputError, match="its run needs a folder called .*m.run; name it otherwise"):
        Run(tmp_path / "m.pt", 2).__enter__()


@pytest.mark.parametrize("name", ["x" * 250 + ".png", "x" * 252 + ".pt", "ä" * 125, "x" * 246 + ".pt"])
def test_a_name_too_long_for_its_run_or_for_being_renamed_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"cannot be written \(the name is too long for that of its run"):
        Run(tmp_path / name, 2).__enter__()
    for _ in range(3):
        with begun(tmp_path / ("x" * 240 + ".pt")):
            (tmp_path / ("x" * 240 + ".pt")).touch()


@pytest.mark.parametrize(
    "out, folder", [("m.pt", "m.run"), ("m.safetensors", "m.run"), ("v1.2", "v1.2.run"), ("m", "m.run")]
)
def test_the_folder_is_called_after_the_embedding(out, folder):
    assert Run(out, 1).folder.name == folder


def test_an_unfinished_run_goes_on_with_the_settings_that_it_was_begun_with(mini_svd, clip, tmp_path):
    settings = {"clip": digest([clip]), "seed": 0, "lr": 0.01, "flip": True}
    settings |= {"dtype": None, "optimizer": "muon", "model": "tiny"}
    with begun(tmp_path / "m.pt", settings=settings) as run:
        train(mini_svd, clip, run, stop=2)
    for other, message in (
        ({"seed": 1}, "with --seed 0"),
        ({"lr": 0.02}, "with --lr 0.01"),
        ({"flip": False}, "without --no-flip"),
        ({"dtype": "float16"}, "without --dtype"),
        ({"optimizer": "adam", "lr": 0.02}, "with --recipe muon"),
        (
            {"clip": digest([replace(clip, frames=clip.frames + 0.01)])},
            "with another clip, or other times or another p",
        ),
        ({"clip": digest([clip, clip])}, "with another clip, or other times or another part of it"),
    ):
        begun_with = f"m.run: was begun {message}.*; to go on with it: python train.py ref.mp4 --resume$"
        with pytest.raises(InputError, match=begun_with), resumed(tmp_path / "m.pt", settings=settings | other):
            pass
    chosen = "was begun with --model tiny; to go on with it: python train.py ref.mp4 --model tiny --resume$"
    with pytest.raises(InputError, match=chosen):  # and svd has another recipe
        with resumed(tmp_path / "m.pt", settings=settings | {"optimizer": "adam", "model": "svd"}):
            pass
    with pytest.raises(InputError, match="made with other weights"):
        with resumed(tmp_path / "m.pt", settings=settings, weights={"w": [0.5, 1.0]}):
            pass
    with pytest.raises(InputError, match="is at 2 of 5 steps; finish them first, without --steps"):
        with resumed(tmp_path / "m.pt", steps=9, settings=settings):
            pass
    with resumed(tmp_path / "m.pt", steps=5, settings=settings) as (run, state):
        train(mini_svd, clip, run, state=state)
    for steps in (None, 5, 4):
        with pytest.raises(InputError, match="has taken its 5 steps; --steps 7, say, takes more"):
            with resumed(tmp_path / "m.pt", steps=steps, settings=settings):
                pass


def test_a_state_of_tokens_that_are_not_finite_is_damaged(mini_svd, clip, tmp_path):
    with begun(tmp_path / "m.pt") as run:
        train(mini_svd, clip, run, stop=1)
    state = torch.load(run.path("state.pt"))
    state["tokens"][0, 0, 0] = torch.nan
    torch.save(state, run.path("state.pt"))
    with pytest.raises(InputError, match="m.run: its files are damaged"), resumed(tmp_path / "m.pt"):
        pass


def test_an_error_names_no_checkpoint_before_there_is_one(tmp_path):
    with (
        pytest.raises(OSError, match=r"m\.run: cannot be written \(no space\)$"),
        Run(tmp_path / "m.pt", 1)._explained(),
    ):
        raise OSError("no space")


@pytest.mark.parametrize("name", ["settings.json", "state.pt", "views.pt"])
@pytest.mark.parametrize(
    "content", [b"", b'{"steps": [5], "settings": {"seed": 0}, "weights": {"w": 1}}', b"\x80\x04K\x01."]
)
def test_a_damaged_run_is_refused_in_one_line(mini_svd, clip, tmp_path, name, content):
    with begun(tmp_path / "m.pt") as run:
        train(mini_svd, clip, run, stop=1)
    (tmp_path / "m.run" / name).write_bytes(content)
    with pytest.raises(InputError, match="m.run: its files are damaged; delete this folder to begin again"):
        with resumed(tmp_path / "m.pt"):
            pass


def test_a_run_of_version_0_3_0_goes_on_in_one_process(mini_svd, clip, tmp_path):
    """Its settings do not say how many processes it has, nor whether its views are cropped."""
    with begun(tmp_path / "m.pt", settings={"seed": 0}) as run:
        train(mini_svd, clip, run, stop=2)
    for crop in (True, False):
        with resumed(tmp_path / "m.pt", settings={"seed": 0, "ranks": 1, "crop": crop}) as (run, state):
            assert run.crop
            assert state.steps == 2
    with pytest.raises(InputError, match="was begun in 1 process; to go on with it"):
        with resumed(tmp_path / "m.pt", settings={"seed": 0, "ranks": 2}):
            pass


def test_without_a_run_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(InputError, match="m.run: no run to resume; leave --resume out to begin one"):
        with resumed(tmp_path / "m.pt"):
            pass
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------- lock


def test_a_second_process_is_refused_until_the_first_one_has_died(tmp_path):
    """The lock dies with its process, however that ends."""
    code = "import sys; from minimti.run import Run; r = Run(sys.argv[1], 1); r._lock(); print(1, flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "m.pt")]
    with begun(tmp_path / "m.pt"):
        pass
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(InputError, match="m.run: another process is training there; name another --out"):
            Run(tmp_path / "m.pt", 1).__enter__()
        process.send_signal(signal.SIGKILL)
    with begun(tmp_path / "m.pt"):
        pass


def test_two_runs_of_one_folder_exclude_each_other_from_its_making_on(tmp_path):
    """Also where the folder was renamed after the first one had locked it."""
    with begun(tmp_path / "m.pt"):
        for _ in range(2):
            with pytest.raises(InputError, match="another process is training there"):
                Run(tmp_path / "m.pt", 1).__enter__()
    with begun(tmp_path / "m.pt"):  # renames the first
        assert (tmp_path / "m-1.run").exists()
        with pytest.raises(InputError, match="another process is training there"):
            Run(tmp_path / "m.pt", 1).__enter__()
    with begun(tmp_path / "other.pt"), begun(tmp_path / "m.pt"):
        pass


def test_a_folder_that_is_renamed_while_its_lock_is_taken_is_not_the_one_that_is_held(tmp_path, monkeypatch):
    import fcntl

    flock, run = fcntl.flock, Run(tmp_path / "m.pt", 1)

    def renamed(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        os.rename(tmp_path / "m.run", tmp_path / "m-1.run")
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", renamed)
    run._lock()
    with pytest.raises(InputError, match="another process"):
        Run(tmp_path / "m.pt", 1).__enter__()


def test_where_there_are_no_locks_a_run_does_without(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with begun(tmp_path / "m.pt"), Run(tmp_path / "m.pt", 1):
        assert (tmp_path / "m.run" / "settings.json").exists()


# ----------------------------------------------------------------------------------------------------------- full disk


@contextmanager
def full_disk():
    """Files cannot grow past a few bytes: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_on_a_full_disk_the_last_checkpoint_stays_and_is_named(mini_svd, clip, unstopped, tmp_path):
    def filling(progress):
        with full_disk() if progress.step > 2 else nothing():
            run(progress)

    @contextmanager
    def nothing():
        yield

    message = r"cannot be written \(File too large\); .*; step 2 is in .*m.run/state.pt, from which --resume goes on$"
    with begun(tmp_path / "m.pt") as run:
        with pytest.raises(OSError, match=message):
            learn(mini_svd, clip, recipe=ADAM, progress=filling, num_tokens=2)
        with full_disk(), pytest.raises(OSError, match="step 2 is in .*m.run/state.pt, from which --resume goes on$"):
            run.finish(run.last.motion)
    assert not (tmp_path / "m.pt").exists() and not list(tmp_path.rglob(".*"))
    with resumed(tmp_path / "m.pt") as (run, state):
        assert torch.equal(train(mini_svd, clip, run, state=state).tokens, unstopped[ADAM])


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_pictures_show_the_clip_and_the_losses(mini_svd, clip, tmp_path, drawn):
    with begun(tmp_path / "m.pt") as run:
        run.show_clips([clip])
        train(mini_svd, clip, run)
    strip, curve = (Image.open(tmp_path / "m.run" / f"{name}.png").convert("RGB") for name in ("clip", "loss"))
    assert strip.size == (4 * MINI.size[0], MINI.size[1]) and curve.size == (800, 400)
    kept = read_clip(tmp_path / "m.run" / "frames", MINI, num_frames=4, size=MINI.size, stride=1)
    assert torch.equal(to_uint8(kept.frames), to_uint8(clip.frames))
    assert len(curve.getcolors(1 << 20)) > 20
    with Run(tmp_path / "n.pt", 1) as run:
        run._lock()
        run.show_clips([replace(clip, frames=torch.zeros(2, 3, 256, 512))] * 3)
    assert Image.open(tmp_path / "n.run" / "clip.png").size == (2 * 256, 3 * 128)


def test_the_curve_is_called_after_its_run(mini_svd, clip, tmp_path, drawn, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: titles.append(figure.axes[0]))
    monkeypatch.setattr("minimti.io.files._permit", lambda part: part.touch())
    with begun(tmp_path / "m.pt") as run:
        train(mini_svd, clip, run)
    assert [axes.get_title() for axes in titles] == ["m.run"]


def test_a_curve_has_a_line_where_steps_were_added(tmp_path):
    log = [{"step": step, "loss": 1 / step, "seconds": step} for step in range(1, 9)]
    for name, legs in (("one", [8]), ("two", [4, 4])):
        draw_losses(tmp_path / name, log, legs, "$m_$1\udcff.run")  # any name
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_a_gpu_that_is_ahead_of_its_losses_saves_the_step_of_its_tokens(mini_svd, clip, unstopped, tmp_path):
    """Losses arrive every third step; what is saved is where the tokens are."""
    from functools import partial

    from minimti import pipeline

    with pytest.MonkeyPatch.context() as patch, begun(tmp_path / "m.pt", save_every=1) as run:
        patch.setattr(pipeline, "invert", partial(pipeline.invert, fetch_every=3))
        with pytest.raises(KeyboardInterrupt):

            def stopped(progress):
                run(progress)
                if progress.step == 3 and progress.stage == "learn":
                    raise KeyboardInterrupt

            learn(mini_svd, clip, recipe=ADAM, progress=stopped, num_tokens=2)
    with resumed(tmp_path / "m.pt") as (run, state):
        assert state.steps == 3 and len(run.log) == 3
        assert torch.equal(train(mini_svd, clip, run, state=state).tokens, unstopped[ADAM])
