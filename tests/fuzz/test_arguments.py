"""Any list of arguments ends in exit code 0, or in 2 with one line on stderr; and no input is ever an output.

pytest -m fuzz tests/fuzz/test_arguments.py -s, for MINIMTI_FUZZ_SECONDS (30). A case is remade from its number.
"""

import argparse
import os
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from official import write_official
from PIL import Image
from torch import nn

import sample
import train
from minimti import attention_maps, cli, pipeline
from minimti.config import MODELS, MicroConditioning
from minimti.io.write import write_clip
from minimti.motion import Motion
from minimti.networks.unet import UNet

pytestmark = pytest.mark.fuzz
SECONDS = float(os.environ.get("MINIMTI_FUZZ_SECONDS", 30))
SEED = int(os.environ.get("MINIMTI_FUZZ_SEED", 0))
ODD = ["", " ", "-", "--", "-1", "0", "1", "3", "7.5", "1e9", "-1e400", "nan", "inf", "٣", "1_0", "9" * 5000, "0x10"]
ODD += ["auto", "cpu", "cuda", "cuda:99", "meta", "float32", "bfloat16", "low", "balanced", "euler", "paper", "muon"]
ODD += ["64x64", "64X128", "0x0", "-64x64", "100x64", "64x", "x", "1x1x1", "999999x64", "shared", "frames"]
ODD += ["a\nb", "\x1b[31m", "\u2028", "日本.png", os.fsdecode(b"\xff\xfe"), "%s%n", "{}", "@file", "~", "*.png"]
ODD += ["x" * 300, "x/" * 3000]
IMAGES = ["img.png", "img_m.mp4", "b.jpg", os.fsdecode(b"\xff\xfe.png"), "a\nb.png", "-.png", "x" * 250 + ".png"]


def make_files(folder: Path) -> list[str]:
    """Fills a folder with inputs of all kinds. Returns their names, and those of some that are not there."""
    write_official(folder / "small.safetensors")
    write_clip(folder / "ref.mp4", torch.randint(0, 256, (20, 3, 64, 96), dtype=torch.uint8), 10)
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in (
        "img.png",
        "img_m.mp4",
        "b.jpg",
        os.fsdecode(b"\xff\xfe.png"),
        "a\nb.png",
        "-.png",
        "x" * 250 + ".png",
    ):
        Image.fromarray(noise).save(folder / name, "PNG")
    tiny = MODELS["tiny"]
    micro = MicroConditioning(*vars(tiny.micro).values())
    for name in ("m.pt", "emb.mp4"):
        tokens = torch.zeros(tiny.num_frames + 1, 2, tiny.unet.context_dim)
        Motion(tokens, tiny.num_frames, "tiny", micro, tiny.size, 3, 0).save(folder / f"{name}.pt")
        (folder / f"{name}.pt").rename(folder / name)
    (folder / "text.txt").write_text("text")
    (folder / "folder").mkdir()
    (folder / "x.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    for link, target in (("soft.mp4", "img.png"), ("loop.mp4", "loop.mp4"), ("gone.mp4", "nowhere.mp4"), ("here", ".")):
        (folder / link).symlink_to(target)
    os.link(folder / "img.png", folder / "hard.mp4")
    there = [name for name in os.listdir(folder) if name != "pipe.mp4"]  # reading from it may wait for ever
    nowhere = ["/dev/null", "no.png", "no/m.pt", "out/new.mp4", "new", "img.png/a"]
    return [*there, "here/img.png", "folder/../m.pt", *nowhere]


def files(folder: Path) -> dict[str, tuple]:
    """The regular files in a folder, and what changes with their contents."""
    found = {path.name: path.lstat() for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    return {name: (about.st_ino, about.st_size, about.st_mtime_ns) for name, about in found.items()}


def restore(folder: Path, before: dict[str, bytes]) -> None:
    """Makes the files as they were."""
    for name, content in before.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    (folder / "hard.mp4").unlink()
    os.link(folder / "img.png", folder / "hard.mp4")


def inputs(module: ModuleType) -> list[Path]:
    """The files that the arguments name to be read."""
    args = module.parse()
    named = [
        *getattr(args, "images", []),
        *getattr(args, "clips", []),
        *getattr(args, "emb", []),
        getattr(args, "swap", None),
        args.model,
    ]
    return [Path(name) for name in named if name and os.path.isfile(name)]


def arguments(rng: random.Random, options: list[str], names: list[str]) -> list[str]:
    """Some options with values that are mostly of their kind or names of files, and some names."""
    values = [*ODD, *names]
    argv = []
    for option in rng.choices(options, k=rng.choice((0, 1, 2, 3, 6))):
        option = option[: rng.randrange(3, len(option) + 1)] if rng.random() < 0.1 else option
        if rng.random() < 0.2:
            argv += [f"{option}={rng.choice(values)}"]
        else:
            argv += [option, *rng.choices(values, k=rng.choice((0, 1, 1, 1, 2)))]
    place = rng.randrange(len(argv) + 1)
    weights = [1] * len(ODD) + [4] * len(names)
    return argv[:place] + rng.choices(values, weights, k=rng.choice((0, 1, 1, 2, 3))) + argv[place:]


def likely(rng: random.Random, program: str, names: list[str]) -> list[str]:
    """Arguments that are right, or are but for one, so that they are looked at closely."""
    argv = ["--out", rng.choice(("new", "new.mp4", "here", rng.choice(names)))]
    if program == "train.py":
        argv += ["ref.mp4", "--model", "tiny"]
    else:
        argv += [*rng.sample(IMAGES, rng.choice((1, 1, 2))), "--emb", rng.choice(("m.pt", "emb.mp4"))]
    if rng.random() < 0.4:
        argv[rng.randrange(len(argv))] = rng.choice(ODD + names)
    return argv


class StandIn:
    """What sample.py asks of a model."""

    def __init__(self) -> None:
        self.config, self.dtype, self.device = MODELS["tiny"], torch.float32, None
        self.unet = UNet(self.config.unet)
        self.vae = self.image_encoder = nn.Linear(8, 8)

    def release(self, name: str) -> None:
        pass

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), self.config.unet.context_dim)


def animated(svd: object, motion: object, image: torch.Tensor, **options: object) -> torch.Tensor:
    return torch.zeros(2, 3, *image.shape[-2:], dtype=torch.uint8)


def test_any_arguments_end_in_one_line(tmp_path, monkeypatch, capfd):
    names, counts = make_files(tmp_path), Counter()
    known = files(tmp_path)
    pristine = {name: (tmp_path / name).read_bytes() for name in known}
    monkeypatch.chdir(tmp_path)
    # A model is neither loaded nor run: sample.py writes black videos, train.py ends where it would begin to learn.
    monkeypatch.setattr(pipeline, "animate", animated)
    monkeypatch.setattr(attention_maps.AttentionMaps, "mean", lambda maps: None)
    monkeypatch.setattr(attention_maps, "write_attention", lambda path, *_: path.touch())
    model = StandIn()
    programs: dict[str, ModuleType] = {"train.py": train, "sample.py": sample}
    loaded = {"train.py": lambda *_, **__: sys.exit(0), "sample.py": lambda *_, **__: model}
    options = {name: parsed_options(monkeypatch, module) for name, module in programs.items()}
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        case = counts.total()
        rng = random.Random(f"{SEED} {case}")
        program = rng.choice(list(programs))
        argv = likely(rng, program, names) if rng.random() < 0.5 else arguments(rng, options[program], names)
        about = f"case {case}: {program} {argv}"[:2000]
        monkeypatch.setattr(cli, "load_model", loaded[program])
        monkeypatch.setattr(sys, "argv", [program, *argv])
        read: dict[Path, bytes] = {}
        with suppress(SystemExit):
            read = {path: path.read_bytes() for path in inputs(programs[program])}
        capfd.readouterr()
        try:
            cli.run(programs[program].main)
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            raise AssertionError(f"{about}: {error!r}") from error
        _, error = capfd.readouterr()
        assert code in (0, 2), f"{about}: exit code {code}, {error}"
        if code == 2:
            lines = [line for line in error.split("\n") if not line.startswith(f"{program}: warning: ")]
            assert len(lines) == 2 and lines[0].startswith(f"{program}: error: ") and not lines[1], f"{about}: {error}"
            assert lines[0].isprintable(), f"{about}: {error!r}"
        assert all(path.read_bytes() == content for path, content in read.items()), f"{about}: changed an input"
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")], f"{about}: left a temporary file"
        if known.items() - files(tmp_path).items():
            restore(tmp_path, pristine)
            known = {name: about for name, about in files(tmp_path).items() if name in known}
        counts[f"{program} {code}"] += 1
    assert len(counts) == 4
    with capfd.disabled():
        print(f"\n{counts.total()} argument lists: {dict(counts)}")


def parsed_options(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[str]:
    """The options of a program, apart from those that only print."""
    found: list[str] = []

    def note(parser: argparse.ArgumentParser, *_: object) -> argparse.Namespace:
        found.extend(option for action in parser._actions for option in action.option_strings)
        return argparse.Namespace()

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", note)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", note)
        module.parse()
    return [option for option in found if option.startswith("--")]
