"""python -m minimti.score, and the score at the end of training."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from official import MINI, SMALL, write_official

import train
from minimti import animate, cli, learn, load, pipeline, read_clip, score
from minimti.io.pixels import from_uint8
from minimti.io.write import write_clip, write_frames, write_gif
from minimti.motion import Motion
from minimti.score import Figures, Score, agreement, constancy, measure, rhythm

ROOT = Path(__file__).resolve().parent.parent
FRAMES, SIZE = MINI.num_frames, MINI.size


def moving(frames: int = FRAMES, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """A bright square that goes to the right: uint8 [F, 3, H, W]."""
    video = torch.full((frames, 3, size[1], size[0]), 40, dtype=torch.uint8)
    for t in range(frames):
        video[t, :, 8:24, 4 + 8 * t : 20 + 8 * t] = 220
    return video


def embedding(seed: int = 0, **changes) -> Motion:
    tokens = torch.randn(FRAMES + 1, 2, MINI.unet.context_dim, generator=torch.Generator().manual_seed(seed))
    fields = {"tokens": tokens, "num_frames": FRAMES, "model": MINI.name, "micro": MINI.micro, "size": SIZE}
    return Motion(**{**fields, "steps": 3, "seed": 5, **changes})


# ----------------------------------------------------------------------------------------------------------- figures


def test_the_figure_of_motion_is_the_cosine_of_all_differences_between_frames():
    clip, video = torch.randn(5, 4, 6, 6), torch.randn(5, 4, 6, 6)
    video = video + clip
    pairs = [(s, t) for s in range(5) for t in range(s)]
    differences = [torch.stack([latents[s] - latents[t] for s, t in pairs]).flatten() for latents in (video, clip)]
    cosine = torch.cosine_similarity(*differences, dim=0).item()
    assert agreement(video, clip) == pytest.approx(cosine, abs=1e-5) and 0.5 < cosine < 0.9
    assert agreement(3 * clip + torch.randn(4, 6, 6), clip) == pytest.approx(1)  # whatever strength, whatever stays
    assert agreement(-clip, clip) == pytest.approx(-1)
    assert agreement(torch.randn(5, 4, 6, 6), clip) == pytest.approx(0, abs=0.15)


def test_where_nothing_moves_there_is_no_agreement():
    clip, still = torch.randn(5, 4, 6, 6), torch.randn(4, 6, 6).expand(5, -1, -1, -1)
    for one, other in ((still, clip), (clip, still), (clip[:1], clip[:1])):
        assert agreement(one, other) == pytest.approx(0, abs=1e-5)
        assert rhythm(one, other) == 0


def test_rhythm_is_that_of_any_subject_anywhere():
    amounts = torch.tensor([0.0, 1, 3, 1, 0, 2])
    clip = amounts.cumsum(0)[:, None, None, None] * torch.randn(4, 6, 6)
    other = 7 - 0.5 * amounts.cumsum(0)[:, None, None, None] * torch.randn(4, 9, 3)
    assert rhythm(other, clip) == pytest.approx(1)
    backwards = torch.corrcoef(torch.stack([amounts[1:], amounts[1:].flip(0)]))[0, 1].item()
    assert rhythm(clip.flip(0), clip) == pytest.approx(backwards, abs=1e-5)
    even = torch.arange(6.0)[:, None, None, None].expand(-1, 4, 6, 6)
    assert rhythm(even, clip) == 0 and rhythm(clip[:2], clip[:2]) == 0


def test_constancy_is_the_likeness_of_the_first_frame_to_the_others():
    embeddings = torch.tensor([[1.0, 0], [2, 0], [0, 3], [1, 1]])
    assert constancy(embeddings) == pytest.approx((1 + 0 + 0.5**0.5) / 3) and constancy(embeddings[:1]) == 1


def test_each_figure_is_that_of_its_video(mini_svd):
    """The embedding's own, that of plain image-to-video, and that of the clip after the autoencoder.

    The clip counts as the frames that a run keeps, in eight bits.
    """
    frames, motion = from_uint8(moving()), embedding()
    before = mini_svd.budget
    found = measure(mini_svd, motion, frames + 0.003 * (2 * torch.rand_like(frames) - 1))
    assert mini_svd.budget is before
    latents, wanted = mini_svd.encode(frames[None]), mini_svd.embed(frames)
    videos = {
        "learned": animate(mini_svd, motion, frames[:1], seed=5),
        "plain": animate(mini_svd, replace(motion, tokens=wanted[:1, None]), frames[:1], seed=5),
        "clip": ((mini_svd.decode(latents)[0].clamp(-1, 1) + 1) * 127.5).round().byte(),
    }
    # An embedding of one frame alone rounds otherwise than among others.
    assert (animate(mini_svd, None, frames[:1], seed=5).int() - videos["plain"].int()).abs().max() <= 1
    for name, video in videos.items():
        again = from_uint8(video)
        alike = torch.cosine_similarity(mini_svd.embed(again), wanted).mean().item()
        expected = agreement(mini_svd.encode(again[None])[0], latents[0]), alike
        assert tuple(vars(getattr(found, name)).values()) == pytest.approx(expected, abs=1e-5), name
    assert found.learned != found.plain != found.clip


def test_a_clip_of_another_length_and_size_is_measured_at_its_own(mini_svd):
    tokens = torch.randn(1, 2, MINI.unet.context_dim)  # one set for all frames
    frames = from_uint8(moving(6, (32, 48)))
    found = measure(mini_svd, embedding(tokens=tokens, num_frames=6, size=(32, 48)), frames)
    assert all(-1 <= value <= 1 for figures in (found.learned, found.plain) for value in vars(figures).values())


def test_progress_goes_through_both_samples(mini_svd):
    seen = []
    measure(mini_svd, embedding(), from_uint8(moving()), progress=lambda p: seen.append((p.stage, p.step, p.steps)))
    assert seen == [("sample", step, 2 * MINI.num_steps) for step in range(1, 2 * MINI.num_steps + 1)]


@pytest.mark.full
def test_less_memory_measures_the_same(mini_svd, monkeypatch):
    expected = measure(mini_svd, embedding(), from_uint8(moving()))
    monkeypatch.setattr(mini_svd, "device", torch.device("cpu"))
    found = measure(mini_svd, embedding(), from_uint8(moving()), memory="low")
    for name in ("learned", "plain", "clip"):
        values = (tuple(vars(getattr(one, name)).values()) for one in (found, expected))
        assert next(values) == pytest.approx(next(values), abs=0.01)


def test_the_sentence_follows_from_the_figure_of_motion_on_models_that_were_measured():
    expected, doubtful = score.THRESHOLDS["tiny"]
    assert 0 < doubtful < expected < 1

    def verdict(motion: float, model: str = "tiny") -> str:
        return Score(model, Figures(motion, 0.5), Figures(0, 0.4), Figures(0.98, 0.97)).verdict

    assert verdict(expected) == "transfer can be expected"
    assert verdict(expected - 0.001) == verdict(doubtful) == "transfer is doubtful"
    assert verdict(doubtful - 0.001) == verdict(-1) == "transfer is not to be expected"
    assert verdict(1, "svd") == "thresholds not verified for this model, svd: compare the three"


# --------------------------------------------------------------------------------------------------------- programs


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with weights, a clip, and an embedding with the frames of its run."""
    work = tmp_path_factory.mktemp("work")
    write_official(work / "mini.safetensors", MINI)
    write_clip(work / "ref.mp4", moving(), 7)
    embedding().save(work / "m.pt")
    (work / "m.run").mkdir()
    write_frames(work / "m.run" / "frames", moving())
    return work


@pytest.fixture
def call(work, monkeypatch, capfd):
    """Runs a program in the folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(work)

    def call(program, *args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program.__name__, *args])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(program.main)
        return stop.value.code, *capfd.readouterr()

    return call


MODEL = ("--model", "mini.safetensors")
TRAIN = ("ref.mp4", *MODEL, "--steps", "2", "--cache", "1")


def lines(out: str) -> list[str]:
    """What is said of the score."""
    first = next(i for i, line in enumerate(out.splitlines()) if line.startswith("score "))
    return out.splitlines()[first : first + 2]


def test_training_ends_with_the_score_that_the_command_repeats(call):
    code, out, error = call(train, *TRAIN, "--out", "n.pt")
    assert code == 0 and "score: 6/6" in error, error
    said = lines(out)
    assert "\n".join(said) in out and said[1].strip().startswith("thresholds not verified")
    code, out, error = call(score, "n.pt", *MODEL)
    assert code == 0 and lines(out) == said, error
    motion, frames = Motion.load("n.pt"), read_clip("ref.mp4", MINI).frames
    found = measure(load("mini.safetensors"), motion, frames)
    assert f"motion {found.learned.motion:.2f} (plain image-to-video {found.plain.motion:.2f}" in said[0]
    assert f"appearance {found.learned.appearance:.2f} ({found.plain.appearance:.2f}" in said[0]


def test_training_that_is_stopped_says_no_score(call, monkeypatch):
    monkeypatch.setattr(score, "measure", lambda *_, **__: pytest.fail("measured"))
    begun = pipeline.learn

    def stopped(*args, progress, **options):
        def stop(one):
            progress(one)
            if one.stage == "learn" and one.step == 1:
                raise KeyboardInterrupt

        return begun(*args, progress=stop, **options)

    monkeypatch.setattr(pipeline, "learn", stopped)
    monkeypatch.setattr("minimti.signals.end", lambda *_: sys.exit(130))
    code, out, _ = call(train, *TRAIN, "--out", "stopped.pt")
    assert code == 130 and "1 of 2 steps" in out and "--resume" in out


def test_without_its_run_an_embedding_needs_the_clip(call):
    embedding().save("alone.pt")
    code, out, error = call(score, "alone.pt", *MODEL)
    assert code == 2 and not out and error.count("\n") == 1
    assert "alone.pt: neither alone.run/frames nor its clip is there; name the clip as --clip" in error
    assert lines(call(score, "alone.pt", "--clip", "m.run/frames", *MODEL)[1]) == lines(call(score, "m.pt", *MODEL)[1])


def test_a_clip_is_read_where_the_embedding_was_learned(call, monkeypatch):
    """At the times that it names, in the size that it has; without times, from the start as train.py does."""
    write_clip("long.mp4", torch.cat([torch.zeros_like(moving()), moving().flip(0)]), 7)
    seen = {}
    monkeypatch.setattr(score, "describe", lambda svd, motion, frames, *_: seen.update(frames=frames) or "")
    for times, black in (("0.57 to 1.00 s of 1.1 s, 7 fps", False), ("", True)):
        embedding(settings={"times": times} if times else {}, size=(32, 48)).save("later.pt")
        assert call(score, "later.pt", "--clip", "long.mp4", *MODEL)[0] == 0
        assert seen["frames"].shape == (FRAMES, 3, 48, 32) and (seen["frames"].max() < -0.9) == black


def test_results_have_a_rhythm_and_a_constancy_beside_those_of_the_clip(call, mini_svd):
    """A still one, and one of another shape that is the clip turned by a quarter."""
    write_clip("still.mp4", moving()[:1].expand(FRAMES, -1, -1, -1), 7)
    write_frames("turned", (turned := moving().transpose(2, 3)))
    code, out, error = call(score, "m.pt", *MODEL, "still.mp4", "turned")
    assert code == 0, error
    first, second, note = out.splitlines()[-3:]
    frames = {"clip": from_uint8(moving()), "turned": from_uint8(turned)}
    constant = {name: constancy(mini_svd.embed(video)) for name, video in frames.items()}
    same = rhythm(*(mini_svd.encode(frames[name][None])[0] for name in ("turned", "clip")))
    assert re.match(rf"result     still.mp4: rhythm .* appearance 1.00 \({constant['clip']:.2f}\)", first), first
    assert second == (
        f"result     turned: rhythm {same:.2f} (the clip 1), appearance {constant['turned']:.2f}"
        f" ({constant['clip']:.2f})"
    )
    assert "no figure tells" in note and "--compare" in note


def test_a_wide_result_is_read_in_the_size_of_the_clip_without_advice_that_score_has_no_option_for(call, monkeypatch):
    seen = []
    monkeypatch.setattr(score, "describe", lambda *_: "")
    monkeypatch.setattr(score, "describe_result", lambda svd, *videos: seen.extend(videos) or "")
    write_clip("wide.mp4", moving().repeat(1, 1, 1, 4), 7)
    embedding(size=(64, 32)).save("wide.pt")
    code, _, error = call(score, "wide.pt", "--clip", "m.run/frames", *MODEL, "wide.mp4")
    assert code == 0 and [video.shape for video in seen] == 2 * [(FRAMES, 3, 32, 64)]
    assert "wide.mp4" not in error


def test_a_gif_with_frames_at_rest_is_the_same_result(call):
    """It holds frames that are alike only once."""
    rests = moving()[[0, 0, 1, 1]]
    write_gif("rests.gif", rests, 7)
    write_frames("rests", rests)
    code, out, error = call(score, "m.pt", *MODEL, "rests.gif", "rests")
    assert code == 0, error
    gif, folder = (line.partition(": ")[2] for line in out.splitlines()[-3:-1])
    numbers = [[float(number) for number in re.findall(r"\d\.\d\d", text)] for text in (gif, folder)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.03)  # 256 colours


@pytest.mark.parametrize("fps", [75, 150])
def test_a_fast_gif_is_read_frame_by_frame(tmp_path, fps):
    write_gif(tmp_path / "a.gif", moving(), fps)
    read = score.read_result(str(tmp_path / "a.gif"), MINI, embedding(fps=fps))
    assert (read - from_uint8(moving())).abs().max() < 0.05


@pytest.mark.parametrize(
    "args, message",
    [
        (["none.pt"], "none.pt: no such file"),
        (["ref.mp4"], "ref.mp4: not a motion-text embedding written by train.py"),
        (["m.pt"], "m.pt: made with a model called 'mini'; pass its file or folder as --model"),
        (["m.pt", "--model", "small.safetensors"], "the embedding is for model 'mini'"),
        (["m.pt", "--model", "none.safetensors"], "none.safetensors"),
        (["m.pt", *MODEL, "--clip", "none.mp4"], "none.mp4: no such file\n"),  # no advice to name it
        (["m.pt", *MODEL, "--clip", "short.mp4"], "short.mp4: "),
        (["m.pt", *MODEL, "none.mp4"], "none.mp4: no such file"),
        (["m.pt", *MODEL, "m.pt"], "m.pt: "),
        (["broken.pt", *MODEL], "broken.run/frames"),
        (["m.pt", "--memory", "all"], "argument --memory"),
        ([], "the following arguments are required: FILE"),
    ],
)
def test_unusable_input_is_one_line(call, monkeypatch, args, message):
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    write_official(Path("small.safetensors"), replace(SMALL, name="small"))
    write_clip("short.mp4", moving(1), 7)
    embedding().save("broken.pt")
    Path("broken.run/frames").mkdir(parents=True, exist_ok=True)
    Path("broken.run/frames/00000.png").write_bytes(b"none")
    code, out, error = call(score, *args)
    assert code == 2 and not out and error.count("\n") == 1 and message in error, error


# ------------------------------------------------------------------------------------------------------------- tiny


@pytest.mark.full
def test_on_tiny_a_learned_motion_is_expected_to_transfer_and_an_untrained_one_is_not():
    svd = load("tiny", device="cpu")
    clip = read_clip(ROOT / "examples" / "dive.mp4", svd.config)
    verdicts = [measure(svd, learn(svd, clip, **options), clip.frames).verdict for options in ({}, {"steps": 0})]
    assert verdicts == ["transfer can be expected", "transfer is not to be expected"]
