"""Pre-training runs: every stage trains, a resumed run equals an uninterrupted one, and the files can be used."""

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from official import SMALLER, TINY
from safetensors.torch import load_file, save_file
from small_runs import FEW, SHORT

from minimti import pipeline
from minimti.checkpoint.find import WEIGHTS
from minimti.checkpoint.load import open_checkpoint
from minimti.config import MODELS
from minimti.io.files import InputError
from minimti.pretrain import __main__ as command
from minimti.pretrain import state
from minimti.pretrain.card import Record, card
from minimti.pretrain.run import pretrain
from minimti.pretrain.stages import STAGES, PretrainModel
from minimti.pretrain.state import DEFAULT, begin
from minimti.svd import SVD
from minimti.world import captions
from minimti.world.clips import check_sizes
from minimti.world.scene import WORDS


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_stage_trains_its_modules(finished):
    run, _ = finished
    assert run.stage == len(STAGES)
    assert [len(record.losses) for record in run.records] == [2] * len(STAGES)
    torch.manual_seed(0)
    before, after = PretrainModel(SMALLER).state_dict(), run.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    for stage in STAGES:
        for part in stage.modules:
            assert any(key.startswith(part) for key in changed), (stage.name, part)


def test_the_files_of_a_run_can_be_used(finished):
    run, folder = finished
    checkpoint = open_checkpoint(str(folder / "out" / "tiny.safetensors"))
    assert checkpoint.config == SMALLER
    svd = pipeline.load(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    ours = run.model.svd.state_dict()
    for key, tensor in svd.state_dict().items():
        assert torch.equal(tensor, ours[key].half().float()), key
    table = captions.load(folder / "out" / "words.safetensors")
    assert torch.equal(table.word.weight, run.model.words.word.weight)
    spatial, temporal = captions.caption_tokens(table, [WORDS[:7], WORDS[-7:]], 5)
    assert spatial.shape == (2, 5, 7, 64) and temporal.shape == (2, 7, 64)
    assert torch.equal(spatial[:, 3], temporal)
    card = (folder / "out" / "card.md").read_text()
    for text in ("python -m minimti.pretrain --seed 0", "hours", "1 thread, ", "captions: text to video", " dB"):
        assert text in card
    for name in ("frames", "clips", "captions", "images"):
        assert (folder / f"{name}.png").is_file()


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    """Stopped by a signal in one stage, killed in two others: in its second step, and before its first checkpoint.

    Its precision stays, whatever is faster by now. The model appears at the end.
    """
    run, folder = finished
    calls = []

    def stopping(stage):
        def loss(model, *batch):
            value = stage.loss(model, *batch)
            calls.append(stage.name)
            if calls == ["frames"]:
                os.kill(os.getpid(), signal.SIGTERM)
            if (stage.name, calls.count(stage.name)) in (("tower", 2), ("images", 1)):
                raise RuntimeError("killed")
            return value

        return replace(stage, loss=loss)

    settings = replace(SHORT, stages=tuple(map(stopping, SHORT.stages)), save_seconds=0)
    for stopped in (KeyboardInterrupt, RuntimeError, RuntimeError):
        with pytest.raises(stopped):
            pretrain(begin(SMALLER, tmp_path, tmp_path / "out", 0, FEW, settings=settings))
    assert not list((tmp_path / "out").iterdir())
    other = torch.bfloat16 if run.dtype == torch.float32 else torch.float32
    monkeypatch.setattr(state, "faster_dtype", lambda device: other)
    again = begin(SMALLER, tmp_path, tmp_path / "out", 0, FEW, settings=settings)
    pretrain(again)
    assert calls.count("frames") == 2 and calls.count("tower") == 3 and calls.count("images") == 3
    for record, other in zip(again.records, run.records):
        assert record.losses == other.losses
    for name in ("tiny", "words"):
        one, two = (load_file(f / "out" / f"{name}.safetensors") for f in (folder, tmp_path))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_finished_model_is_trained_further(finished, tmp_path):
    run, folder = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    further = begin(SMALLER, tmp_path / "run", tmp_path / "out", 3, FEW, ["captions", "images"], SHORT)
    pretrain(further)
    assert [len(record.losses) for record in further.records] == [2, 2]
    before, after = (load_file(f / "out" / "tiny.safetensors") for f in (folder, tmp_path))
    for key in before:
        learns = key.startswith("model.diffusion_model.")
        assert torch.equal(before[key], after[key]) or learns, key
    assert any(not torch.equal(before[key], after[key]) for key in before)
    card = (tmp_path / "out" / "card.md").read_text()
    assert "--seed 0 --scale 1e-06`, then `" in card and "--seed 3 --scale 1e-06 --stages captions images`" in card
    for stage, times in zip(STAGES, (1, 1, 1, 2, 2)):
        assert card.count(f"| {stage.name}: ") == times
    with pytest.raises(InputError, match="of other sizes; train it from its first stage"):
        begin(TINY, tmp_path / "other", tmp_path / "out", 0, FEW, ["captions"])
    with pytest.raises(
        InputError, match="holds a run of --seed 3 --scale 1e-06 --lr 0.001 --batch 4 --stages captions images"
    ):
        begin(SMALLER, tmp_path / "run", tmp_path / "out", 3, FEW, ["images"])


def test_a_damaged_model_is_not_trained_further(finished, tmp_path):
    _, folder = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    path = tmp_path / "out" / "tiny.safetensors"
    tensors = load_file(path)
    about = open_checkpoint(str(path)).tensors.metadata
    for stages in (None, "no JSON", "[1]", '[{"minutes": 1}]', "{}"):
        metadata = {"config": about["config"]} | ({} if stages is None else {"stages": stages})
        save_file(tensors, path, metadata)
        with pytest.raises(InputError, match="no model that minimti.pretrain wrote; train it from its first stage"):
            begin(SMALLER, tmp_path / "run", tmp_path / "out", 0, FEW, ["images"])
    path.unlink()
    with pytest.raises(InputError, match="tiny.safetensors: no such file; name the model's folder as --out"):
        begin(SMALLER, tmp_path / "run", tmp_path / "out", 0, FEW, ["images"])


def test_the_embedded_model_can_be_trained_further(tmp_path):
    """A new row is appended to the card's rows of earlier runs."""
    run = begin(TINY, tmp_path, WEIGHTS / "tiny", 0, 1, ["captions"])
    run.records = [Record([1.0])]
    *_, last, _ = card(run.model.svd, run.rows).split("\n")
    assert last.startswith("| captions: text to video | 1 | 4 |") and len(run.history) > 0


def test_a_folder_belongs_to_one_run(finished, tmp_path):
    _, folder = finished
    with pytest.raises(InputError, match="holds a run of --seed 0 --scale 1e-06"):
        begin(SMALLER, folder, folder / "out", 1, FEW)
    (tmp_path / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(InputError, match="not a checkpoint of minimti.pretrain"):
        begin(SMALLER, tmp_path, tmp_path / "out", 0, FEW)


def test_clips_that_were_encoded_before_the_first_checkpoint_are_those_of_the_run(tmp_path, monkeypatch):
    def killed(run, check):
        raise RuntimeError("killed")

    monkeypatch.setattr("minimti.pretrain.run.train", killed)
    with pytest.raises(RuntimeError):
        pretrain(begin(SMALLER, tmp_path, tmp_path / "out", 0, FEW))
    with pytest.raises(InputError, match="holds a run of --seed 0"):
        begin(SMALLER, tmp_path, tmp_path / "out", 1, FEW)


@pytest.mark.parametrize(
    "config, reason",
    [
        (replace(SMALLER, size=(60, 48)), "60x48 is not a multiple of 16"),
        (replace(SMALLER, size=(32, 32)), "32x32 is lower than 48"),
        (replace(SMALLER, size=(96, 48)), "96x48 is neither square nor up to 16:9"),
        (replace(SMALLER, num_frames=7), "7 frames have too few steps for the 7 words"),
        (replace(SMALLER, vae=replace(TINY.vae, z_channels=4)), "does not fit latents of 4"),
        (
            replace(SMALLER, image_encoder=replace(TINY.image_encoder, embed_dim=32)),
            "image encoder's embedding has 32 elements, a token 64",
        ),
        (replace(SMALLER, unet=replace(TINY.unet, num_head_channels=48)), "do not divide into heads of 48"),
        (
            replace(SMALLER, vae=replace(TINY.vae, ch=48, norm_groups=32)),
            "16 and 48 do not divide into 4 and 32",
        ),
        (
            replace(SMALLER, image_encoder=replace(TINY.image_encoder, image_size=50)),
            "50 pixels do not divide into patches of 8",
        ),
    ],
)
def test_impossible_sizes_are_refused_with_the_reason(config, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        begin(config, tmp_path / "run", tmp_path / "out", 0, FEW)
    assert not list(tmp_path.iterdir())


def test_the_embedded_model_is_small():
    """The files take less than 30 MB in fp16."""
    check_sizes(TINY)
    with torch.device("meta"):
        svd = SVD(TINY)
    assert parameters(svd) < 14_500_000


def test_the_command_passes_its_options_on(monkeypatch, tmp_path):
    """A larger batch of the UNet's stages draws from as many more clips."""
    calls = []
    monkeypatch.setattr(command, "begin", lambda *args: calls.append(args))
    monkeypatch.setattr(command, "pretrain", lambda run: None)
    folder, out = str(tmp_path / "run"), str(tmp_path / "out")
    options = "--seed 3 --scale 0.5 --stages captions --device cpu --batch 16 --lr 2e-4 --jobs 3".split()
    monkeypatch.setattr(sys, "argv", ["pretrain", "--run", folder, "--out", out, *options])
    command.main()
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    command.main()
    (*args, settings, device, jobs), (*defaults, default_settings, _, _) = calls
    assert args == [MODELS["tiny"], Path(folder), Path(out), 3, 0.5, ["captions"]]
    assert (device, jobs, settings.lr) == (torch.device("cpu"), 3, 2e-4)
    assert [stage.batch for stage in settings.stages] == [8, 2, 48, 16, 16]
    assert (settings.chunk, settings.num_chunks) == (4 * DEFAULT.chunk, DEFAULT.num_chunks)
    assert defaults == [MODELS["tiny"], Path("runs/tiny"), WEIGHTS / "tiny", 0, 1.0, command.NAMES]
    assert default_settings == DEFAULT
