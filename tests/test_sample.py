"""sample.py: which results it makes of what, what it keeps, and what it writes beside them. The model is a stand-in."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import sample
from minimti import attention_maps, cli, edm, pipeline, results
from minimti.config import MODELS
from minimti.io.image import read_image
from minimti.io.pixels import to_uint8
from minimti.io.write import write_clip, write_frames
from minimti.motion import Motion
from minimti.svd import SVD

ROOT = Path(__file__).resolve().parents[1]
TINY = MODELS["tiny"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three images and two embeddings, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("a.png", "photos/b.jpg", "photos/c.png")):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (60 * index, 100, 200)).save(name)
    for index, name in enumerate(("m.pt", "n.pt")):
        motion_of(index).save(name)
    return tmp_path


def motion_of(seed: int) -> Motion:
    tokens = torch.randn(15, 2, 64, generator=torch.Generator().manual_seed(seed))
    facts = {
        "command": f"python train.py clip{seed}.mp4",
        "clip": f"clip{seed}.mp4",
        "times": "0.00 to 1.86 s of 2.0 s",
    }
    return Motion(tokens, 14, "tiny", TINY.micro, (64, 64), steps=5, seed=seed, settings=facts)


def frames_of(motion: Motion | None, image: torch.Tensor, seed: int) -> torch.Tensor:
    """A video that differs with all that it is made from."""
    level = image.mean().item() * 100 + seed * 10 + (motion.tokens.sum().item() if motion else 0)
    return torch.full((14, 3, *image.shape[-2:]), int(abs(level)) % 256, dtype=torch.uint8)


@pytest.fixture(scope="module")
def tiny() -> SVD:
    return pipeline.load("tiny", device="cpu")


@pytest.fixture
def made(monkeypatch, tiny) -> list[dict]:
    """The options of each call of `animate`, which a stand-in takes the place of."""
    calls: list[dict] = []

    def animate(svd, motion, image, *, progress, **options):
        calls.append(options | {"image": image, "motion": motion})
        return frames_of(motion, image, options["seed"])

    monkeypatch.setattr(pipeline, "animate", animate)
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: tiny)
    monkeypatch.setattr(SVD, "release", lambda svd, name: None)  # one model serves all calls
    return calls


@pytest.fixture
def call(monkeypatch, capfd):
    """Runs sample.py -> exit code, stdout, stderr."""

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", *args])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(sample.main)
        return stop.value.code, *capfd.readouterr()

    return call


def names(path: str | Path) -> list[str]:
    return sorted(file.name for file in Path(path).iterdir())


def videos(path: str | Path) -> list[str]:
    return [name for name in names(path) if name.endswith(".mp4")]


def test_every_embedding_moves_every_image_and_options_stand_anywhere(folder, made, call):
    code, out, error = call(
        "a.png", "--emb", "m.pt", "photos", "--out", "r", "--emb", "n.pt", "--seed", "3", "photos/*.png"
    )
    assert code == 0, error
    assert videos("r") == ["a_m.mp4", "a_n.mp4", "b_m.mp4", "b_n.mp4", "c_m.mp4", "c_n.mp4"]
    lines = out.splitlines()
    assert lines[1].startswith("model      tiny from ") and lines[2].startswith(
        "settings   12 steps of euler, guidance 1 to 3"
    )
    assert lines[5].startswith("video      3 of 6  r/c_m.mp4: 14 frames, 256x256, 7 fps, seed 3")
    assert [options["seed"] for options in made] == [3] * 6


def test_several_seeds_are_in_the_names_and_one_is_not(folder, made, call):
    assert call("--emb", "m.pt", "a.png", "--out", "r", "--seeds", "3", "--seed", "5")[0] == 0
    assert videos("r") == ["a_m_seed5.mp4", "a_m_seed6.mp4", "a_m_seed7.mp4"]
    assert [options["seed"] for options in made] == [5, 6, 7]
    assert call("--emb", "m.pt", "a.png", "--seed", "5")[0] == 0 and Path("a_m.mp4").is_file()


def test_seeds_that_follow_the_last_begin_at_0(folder, made, call):
    assert call("--emb", "m.pt", "a.png", "--seed", str(2**32 - 1), "--seeds", "2")[0] == 0
    assert videos(".") == ["a_m_seed0.mp4", f"a_m_seed{2**32 - 1}.mp4"]


def test_a_result_is_kept_only_where_all_that_it_is_made_from_is_the_same(folder, made, call):
    args = ["--emb", "m.pt", "a.png", "--out", "r"]
    assert call(*args)[0] == 0 and len(made) == 1
    code, out, _ = call(*args, "--memory", "low")  # changes the time alone
    assert code == 0 and len(made) == 1 and "1 of 1  r/a_m.mp4: is there, made from the same, and kept" in out

    def again(*more: str) -> bool:
        count = len(made)
        assert call(*args, *more)[0] == 0
        return len(made) > count

    for change in ("--steps 3", "--seed 1", "--guidance 1 2", "--solver heun", "--fps 9", "--noise-aug 0.1"):
        assert again(*change.split()) and not again(*change.split()), change
    for change in ("--size 64x96", "--fit stretch", "--fit pad", "--crop-center 0 0 --size 64x96", "--motion-bucket 3"):
        assert again(*change.split()) and not again(*change.split()), change
    assert again("--vae-dtype", "bfloat16") and again() and not again()
    motion_of(7).save("m.pt")
    assert again() and not again()
    Image.new("RGB", (64, 64), "red").save("a.png")
    assert again() and not again()
    Path("r/a_m.mp4").write_bytes(b"another")
    assert again() and not again()
    Path("r/a_m.mp4.json").write_text("{}")
    assert again() and not again()
    Path("r/a_m.mp4").unlink()
    assert again()


def test_other_weights_make_a_result_again(folder, made, call, monkeypatch):
    from minimti.checkpoint import fingerprint

    assert call("--emb", "m.pt", "a.png")[0] == 0
    found = fingerprint.fingerprint
    monkeypatch.setattr(
        fingerprint, "fingerprint", lambda net: {name: [n + 1 for n in v] for name, v in found(net).items()}
    )
    assert call("--emb", "m.pt", "a.png")[0] == 0 and len(made) == 2


def test_a_bad_image_among_good_ones_is_found_before_a_model_is_loaded(folder, made, call, monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    Path("photos/d.png").write_text("no picture")
    code, _, error = call("--emb", "m.pt", "photos", "--out", "r")
    assert code == 2 and "photos/d.png: cannot be read as an image" in error and not Path("r").exists()


@pytest.mark.parametrize("form", ["mp4", "gif", "png"])
def test_what_another_program_made_is_never_replaced(folder, made, call, form):
    result = Path("a_m" + {"mp4": ".mp4", "gif": ".gif", "png": ""}[form])
    args = ["--emb", "m.pt", "a.png", "--format", form]
    assert call(*args)[0] == 0 and call(*args, "--seed", "1")[0] == 0 and len(made) == 2  # its own it replaces
    Path(f"{result}.json").unlink()
    if form == "mp4":  # the record inside is enough
        assert call(*args)[0] == 0 and len(made) == 3
        write_clip(result, torch.zeros(3, 3, 64, 64, dtype=torch.uint8), 7)
        Path(f"{result}.json").unlink()
        assert call(*args)[0] == 2
        result.write_text("no video")
    before = results.digest(result)
    code, _, error = call(*args)
    assert code == 2 and f"{result}: was there before, and not made by sample.py; move it, or name" in error
    assert results.digest(result) == before


def test_the_record_is_beside_the_result_and_in_it(folder, made, call):
    assert call("--emb", "m.pt", "a.png", "--seed", "4")[0] == 0
    record = json.loads(Path("a_m.mp4.json").read_text())
    with av.open("a_m.mp4") as container:
        inside = json.loads(container.metadata["comment"])
    assert inside == {part: record[part] for part in ("made from", "about")}
    made_from, about = record["made from"], record["about"]
    assert made_from["seed"] == 4 and made_from["model"] == "tiny" and made_from["size"] == [64, 64]
    assert len(made_from["embedding"]) == len(made_from["image"]) == 32 and set(made_from["weights"]) == {"unet", "vae"}
    assert about["command"] == "python sample.py --emb m.pt a.png --seed 4" and about["image"] == "a.png"
    assert about["motion"]["clip"] == "clip0.mp4" and {"minimti", "torch", "model file"} <= set(about)


def test_every_format_holds_the_frames(folder, made, call):
    args = ["--emb", "m.pt", "a.png", "--out", "r"]
    for form in ("mp4", "gif", "png"):
        assert call(*args, "--format", form)[0] == 0
    assert names("r") == ["a_m", "a_m.gif", "a_m.gif.json", "a_m.json", "a_m.mp4", "a_m.mp4.json"]
    assert names("r/a_m") == [f"{index:05}.png" for index in range(14)]
    value = int(frames_of(made[0]["motion"], made[0]["image"], 0)[0, 0, 0, 0])
    assert (np.array(Image.open("r/a_m/00003.png")) == value).all() and Image.open("r/a_m/00003.png").size == (256, 256)
    with Image.open("r/a_m.gif") as gif:
        assert gif.size == (256, 256) and abs(np.array(gif.convert("RGB")).astype(int) - value).max() <= 1
    assert call("--emb", "m.pt", "a.png", "--out", "x.gif")[0] == 0 and Path("x.gif").is_file()
    calls = len(made)
    assert call(*args, "--format", "png")[0] == 0 and len(made) == calls  # kept
    assert call(*args, "--format", "png", "--seed", "1")[0] == 0 and len(names("r/a_m")) == 14
    assert [name for name in names("r") if name.startswith(".")] == []


def test_a_folder_with_other_files_is_never_replaced_by_frames(folder, made, call):
    Path("a_m").mkdir()
    Path("a_m/thesis.txt").write_text("years of work")
    code, _, error = call("--emb", "m.pt", "a.png", "--format", "png")
    assert code == 2 and "a_m: holds other files than frames" in error and Path("a_m/thesis.txt").is_file() and not made


def test_frames_never_replace_the_images_that_they_are_made_from(folder, made, call):
    Path("a_m").mkdir()
    Image.new("RGB", (64, 64), "red").save("a_m/00000.png")
    code, _, error = call("--emb", "m.pt", "a.png", "a_m", "--format", "png")
    assert code == 2 and "a_m: holds an input; name another --out" in error and not made


@pytest.mark.parametrize("form", ["gif", "png"])
def test_a_comparison_is_of_the_format_of_the_results(folder, made, call, form):
    args = ["--emb", "m.pt", "a.png", "photos", "--out", "r", "--compare", "--format", form]
    for _ in range(2):  # the second time over the first
        code, out, error = call(*args)
        assert code == 0 and f"comparison r/grid{'.gif' * (form == 'gif')}, and to be opened in a browser" in out, error
    assert len(made) == 3 and Path("r/index.html").read_text().count("<video") == 3


REFUSED = [
    (["--emb", "m.pt", "a.png", "a_m_attention.png", "--attention"], "a_m_attention.png: is an input; name another"),
    (["--emb", "m.pt", "--emb", "other.pt", "a.png"], "other.pt: is for the model 'svd', but m.pt is for 'tiny'"),
    (["--emb", "m.pt", "--emb", "copy/m.pt", "a.png"], "2 embeddings of the same name would all become a_m.mp4"),
    (["--emb", "m.pt", "photos", "--out", "photos"], "photos: the results would go among the images; name another"),
    (["--emb", "m.pt", "empty", "--out", "r"], "empty: is a folder without pictures"),
    (["--emb", "m.pt", "no*.png"], "no*.png: no file has such a name"),
    (["--emb", "m.pt", "--swap", "a.png", "a.png"], "--swap and --emb: each of them sets the motion; give one"),
    (["a.png", "--attention"], "--attention: needs --emb"),
    (["--emb", "m.pt", "a.png", "--attention", "--compile"], "--attention and --compile: compiled layers do not show"),
    (["--emb", "m.pt", "a.png", "--schedule", "ays"], "--schedule ays: is for SVD, whose noise begins at 700"),
    (["--emb", "m.pt", "a.png", "--format", "png", "--out", "x.mp4"], "x.mp4: does not fit --format png"),
    (["--emb", "m.pt", "a.png", "--format", "gif", "--out", "x.mp4"], "x.mp4: does not fit --format gif"),
    (["--emb", "m.pt", "a.png", "--compare", "--out", "site"], "site/index.html: is there, and not by --compare"),
    (["--emb", "m.pt", "a.png", "--compare", "--out", "grid.mp4"], "grid.mp4: is the name of the comparison"),
    (["--emb", "m.pt", "a.png", "--seeds", "0"], "argument --seeds: 0 is not in"),
    (["--emb", "m.pt", "a.png", "--format", "avi"], "argument --format: invalid choice: 'avi'"),
    (["--swap", "nothing.png", "a.png"], "nothing.png: no such file"),
    (["--model", "svd", "a.png", "--out", "x.mov"], "--out x.mov: name a folder, or a file that ends in .mp4 or .gif"),
    (["--model", "svd", "a.png", "--size", "65x64"], "--size 65x64: width and height must be multiples of 64"),
    (["--model", "svd", "--emb", "m.pt", "a.png"], "the embedding is for model 'tiny' (token width 64), not for 'svd'"),
]


@pytest.mark.parametrize("args, message", REFUSED)
def test_what_does_not_go_together_is_refused_before_the_work(folder, made, call, monkeypatch, args, message):
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    replace(motion_of(0), model="svd").save("other.pt")
    Image.new("RGB", (64, 64)).save("a_m_attention.png")
    for name in ("copy", "empty", "site"):
        Path(name).mkdir()
    motion_of(0).save("copy/m.pt")
    Path("site/index.html").write_text("<html>my own page</html>")
    code, _, error = call(*args)
    assert code == 2 and error.count("\n") == 1 and message in error


def test_pictures_of_attention_are_no_images_of_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a_m_attention.png", "b_m_attention.png", "c_attention.png"):
        Image.new("RGB", (64, 64)).save(name)
    for name in ("a_m.mp4.json", "b_m.json"):  # of a video, and of a folder of frames
        Path(name).write_text("{}")
    assert sample.find_images(["*.png"], "out") == ["a.png", "c_attention.png"]
    assert sample.find_images(["a_m_attention.png"], "out") == ["a_m_attention.png"]


def test_a_folder_of_frames_has_no_name_of_a_video():
    for name in ("walk.mp4", "walk.GIF"):
        (job,) = results.plan([name], ["a.png"], [0], ".", "png", learned=True)
        assert job.path.name == f"a_{name.replace('.', '_')}" and job.suffix == ""


@pytest.mark.parametrize(
    "learned, unconditional, label", [(True, True, "motion alone"), (False, True, "a"), (True, False, "a")]
)
def test_a_label_says_what_a_result_shows(learned, unconditional, label):
    (job,) = results.plan(["m"], ["a.png"], [0], ".", "mp4", learned=learned, unconditional=unconditional)
    assert job.label == label


def test_a_comparison_has_the_clip_before_the_results_of_each_motion(folder, made, call):
    frames = torch.stack([torch.full((3, 64, 64), index / 14) for index in range(14)])
    Path("m.run").mkdir()
    write_frames("m.run/frames", to_uint8(frames))
    code, out, error = call("--emb", "m.pt", "--emb", "n.pt", "a.png", "photos", "--out", "r", "--compare")
    assert code == 0 and "note       n.pt: neither n.run/frames nor clip1.mp4 is there; the comparison" in out, error
    with av.open("r/grid.mp4") as container:
        first, *_, last = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert first.shape == (2 * 284, 4 * 260, 3)
    assert abs(int(last[150, 128, 0]) - int(first[150, 128, 0]) - 127.5 * 13 / 14) < 6  # the clip alone changes
    assert abs(last[150, 388].astype(int) - first[150, 388]).max() <= 2
    page = Path("r/index.html").read_text()
    for label in ("m: the clip", "m: a", "m: b", "n: a", "n: c"):
        assert f"<figcaption>{label}</figcaption>" in page
    assert page.count("<video") == 7 and page.count("data:video/mp4;base64,") == 7
    calls = len(made)
    assert call("--emb", "m.pt", "--emb", "n.pt", "a.png", "photos", "--out", "r", "--compare")[0] == 0
    assert len(made) == calls  # the page is made again, the results are kept


def test_swap_conditions_on_the_embedding_of_another_image(folder, made, call, tiny):
    """Figure 3: the latent is that of the image, the tokens are those of the other."""
    assert call("--swap", "photos/b.jpg", "a.png")[0] == 0 and Path("a_b.mp4").is_file()
    wanted = tiny.embed(read_image("photos/b.jpg", TINY))
    assert torch.allclose(made[0]["motion"].tokens, wanted[:, None].cpu(), atol=1e-6)
    assert torch.equal(made[0]["image"], read_image("a.png", TINY)) and made[0]["motion"].num_frames == 14
    Image.new("RGB", (64, 64), "white").save("photos/b.jpg")
    assert call("--swap", "photos/b.jpg", "a.png")[0] == 0 and len(made) == 2  # another image: made again


def test_attention_is_drawn_beside_the_result(folder, call, monkeypatch):
    seen = []
    monkeypatch.setattr(attention_maps, "write_attention", lambda path, *given: seen.append(given) or path.touch())
    args = ["--emb", "m.pt", "a.png", "--steps", "2"]
    code, _, error = call(*args, "--attention")
    assert code == 0 and Path("a_m_attention.png").is_file(), error
    (video, weights), *_ = seen
    assert video.shape == (14, 3, 64, 64) and weights.shape == (14, 16 * 16, 2)
    assert torch.allclose(weights.sum(-1), torch.ones(14, 256), atol=1e-5)
    whole = Path("a_m.mp4.json").read_text()
    assert call(*args, "--attention")[0] == 0 and len(seen) == 1  # kept
    Path("a_m_attention.png").unlink()
    assert call(*args, "--attention")[0] == 0 and len(seen) == 2 and Path("a_m.mp4.json").read_text() == whole
    video_before = Path("a_m.mp4.json").read_bytes()
    assert call(*args)[0] == 0 and Path("a_m.mp4.json").read_bytes() == video_before  # looking changes nothing


def test_a_picture_of_attention_never_stands_beside_another_video(folder, made, call, monkeypatch):
    """It goes with the video that it was drawn with; a picture that no record names stays."""
    monkeypatch.setattr(attention_maps.AttentionMaps, "mean", lambda maps: len(made))
    monkeypatch.setattr(attention_maps, "write_attention", lambda path, video, drawn: path.write_text(str(drawn)))
    args, picture = ["--emb", "m.pt", "a.png"], Path("a_m_attention.png")
    assert call(*args, "--attention", "--steps", "4")[0] == 0 and picture.read_text() == "1"
    assert call(*args, "--steps", "4")[0] == 0 and picture.is_file() and len(made) == 1  # kept, both
    code, out, _ = call(*args, "--steps", "2")
    assert code == 0 and not picture.exists() and out.endswith("seed 0, in place of one that was made otherwise\n")
    code, out, _ = call(*args, "--steps", "2", "--attention")
    assert code == 0 and picture.read_text() == "3" and "in place of" not in out  # the video is made from the same
    picture.write_text("a drawing")
    assert call(*args, "--steps", "3")[0] == 0 and picture.read_text() == "a drawing"
    assert call(*args, "--steps", "3", "--attention")[0] == 0 and picture.read_text() == "5"


def test_names_tell_apart_what_differs_in_its_suffix_or_lacks_its_image(folder, made, call, monkeypatch):
    monkeypatch.setattr(attention_maps.AttentionMaps, "mean", lambda maps: len(made))
    monkeypatch.setattr(attention_maps, "write_attention", lambda path, video, drawn: path.write_text(str(drawn)))
    Image.new("RGB", (64, 64), "red").save("photos/b.png")
    assert call("--emb", "m.pt", "photos", "--out", "r")[0] == 0
    assert videos("r") == ["b_jpg_m.mp4", "b_png_m.mp4", "c_m.mp4"]
    Path("photos/b.png").rename("photos/b.v2.png")
    for _ in range(2):  # a folder of frames may have a dot in its name
        args = ("--emb", "m.pt", "photos", "--out", "s", "--format", "png", "--compare", "--attention")
        assert call(*args)[0] == 0 and Path("s/grid").is_dir()
    pictures = [f"{name}_m_attention.png" for name in ("b.v2", "b", "c")]
    assert [name for name in names("s") if name.endswith(".png")] == pictures
    for more in ([], ["--unconditional"]):  # the second needs another name
        code, out, error = call("--emb", "m.pt", "a.png", *more)
        assert code == 0 and "in place of" not in out, error
    assert videos(".") == ["a_m.mp4", "a_m_unconditional.mp4"]


def test_an_unfinished_embedding_is_noted(folder, made, call):
    replace(motion_of(0), total_steps=9).save("m.pt")
    code, out, _ = call("--emb", "m.pt", "--emb", "n.pt", "a.png")
    assert code == 0 and out.count("unfinished") == 1
    assert "note       m.pt: is unfinished, after 5 of 9 steps" in out


def test_the_schedule_reaches_the_sampler(folder, made, call, monkeypatch):
    """Refused for tiny; on a model with SVD's noise levels it is handed on."""
    from minimti.checkpoint import load as loading

    opened = loading.open_checkpoint

    def as_svd(model, revision=None):
        checkpoint = opened(model, revision)
        return replace(checkpoint, config=replace(checkpoint.config, sigma_max=700.0))

    monkeypatch.setattr(loading, "open_checkpoint", as_svd)
    assert call("--emb", "m.pt", "a.png", "--schedule", "ays", "--steps", "10")[0] == 0
    assert made[0]["schedule"] == "ays" and made[0]["steps"] == 10


def test_the_sampler_takes_the_noise_levels_of_the_schedule(mini_svd, monkeypatch):
    seen = []

    def solver(denoiser, n, sigmas):
        seen.append(sigmas)
        yield n

    monkeypatch.setitem(edm.SOLVERS, "euler", solver)
    for schedule in ("karras", "ays"):
        pipeline.animate(mini_svd, None, torch.zeros(1, 3, 32, 48), steps=10, schedule=schedule)
    config = mini_svd.config
    karras = edm.karras_sigmas(10, config.sigma_min, config.sigma_max, config.rho)
    assert torch.equal(seen[0], karras) and torch.equal(seen[1], edm.ays_sigmas(10))
    with pytest.raises(ValueError, match="mini has no schedule 'linear'"):
        pipeline.animate(mini_svd, None, torch.zeros(1, 3, 32, 48), schedule="linear")


@pytest.mark.full
def test_with_an_embedding_nothing_slow_is_imported(folder):
    """open_clip and torchvision, with all that they import, take twice as long as PyTorch alone."""
    arguments = ["sample.py", "--emb", "m.pt", "a.png", "--steps", "1", "--out", "o.mp4"]
    code = f"import runpy, sys\nsys.argv = {arguments}\n"
    code += f"try: runpy.run_path({str(ROOT / 'sample.py')!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print({'open_clip', 'torchvision', 'torch._dynamo'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert Path("o.mp4").is_file() and done.stdout.splitlines()[-1] == "set()", done.stdout + done.stderr


@pytest.mark.full
def test_two_ranks_make_each_result_once(folder):
    """As torchrun starts them. Together they make what one process makes, and then one of them the comparison."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("d.png", "e.png"):
        Image.new("RGB", (64, 64), "blue").save(f"photos/{name}")
    command = [
        sys.executable,
        str(ROOT / "sample.py"),
        "--emb",
        "m.pt",
        "photos",
        "--steps",
        "1",
        "--out",
        "r",
        "--compare",
    ]
    started = []
    for rank in ("0", "1"):
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        started.append(subprocess.Popen(command, env=os.environ | own, stdout=-1, stderr=-1, text=True))
    (first, error), (second, error_too) = (process.communicate(timeout=100) for process in started)
    assert [process.returncode for process in started] == [0, 0], error + error_too
    lines = sorted(line for line in (first + second).splitlines() if line.startswith("video"))
    assert [line.split(":")[0] for line in lines] == [
        f"video      {i + 1} of 4  r/{n}_m.mp4" for i, n in enumerate("bcde")
    ]
    assert first.count("video ") == second.count("video ") == 2 and "model  " in first and "model  " not in second
    assert videos("r") == ["b_m.mp4", "c_m.mp4", "d_m.mp4", "e_m.mp4", "grid.mp4"] and "comparison" in first


@pytest.mark.parametrize("rank, size", [("2", "2"), ("x", "2"), ("-1", "2"), ("0", "0")])
def test_odd_ranks_are_refused(folder, call, monkeypatch, rank, size):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    code, _, error = call("--emb", "m.pt", "a.png")
    assert code == 2 and f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK=0: are not those of torchrun" in error
