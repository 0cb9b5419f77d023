"""Pre-training: every stage learns, a stopped run is as good as one never stopped, and what it leaves can be used."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minimti import pipeline
from minimti.checkpoint.find import WEIGHTS
from minimti.checkpoint.load import open_checkpoint
from minimti.config import MODELS
from minimti.io.files import InputError
from minimti.io.video import strip
from minimti.networks.vae import VAE
from minimti.pretrain import run as run_module
from minimti.pretrain import stages
from minimti.pretrain.stages import STAGES, PretrainModel
from minimti.svd import SVD
from minimti.world import captions
from minimti.world.clips import check_sizes
from minimti.world.scene import WORDS

TINY = MODELS["tiny"]
SMALLER = replace(
    TINY,
    size=(48, 48),
    num_frames=8,
    num_steps=2,
    unet=replace(TINY.unet, model_channels=16, num_head_channels=16),
    vae=replace(TINY.vae, ch=8),
    image_encoder=replace(TINY.image_encoder, image_size=48, patch_size=16, width=32, layers=1),
)
FEW = 1e-6  # two steps of each stage, one chunk of each library


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module", autouse=True)
def short():
    """Smaller chunks and batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "CHUNK", 2)
        for name in ("MEASURED", "NORMALISED", "SHOWN"):
            patch.setattr(run_module, name, 2)
        patch.setattr(run_module, "STAGES", tuple(replace(s, batch=min(s.batch, 4)) for s in STAGES))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[run_module.Run, Path]:
    folder = tmp_path_factory.mktemp("run")
    return run_module.pretrain(SMALLER, folder, folder / "out", 0, FEW), folder


def test_every_stage_teaches_its_part_and_only_that(finished):
    run, _ = finished
    assert run.stage == len(STAGES)
    assert [len(record.losses) for record in run.records] == [2] * len(STAGES)
    torch.manual_seed(0)
    before, after = PretrainModel(SMALLER).state_dict(), run.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    for stage in STAGES:
        for part in stage.learns:
            assert any(key.startswith(part) for key in changed), (stage.name, part)


def test_what_is_left_can_be_used(finished):
    run, folder = finished
    checkpoint = open_checkpoint(str(folder / "out" / "tiny.safetensors"))
    assert checkpoint.config == SMALLER
    svd = pipeline.load(checkpoint, torch.device("cpu"), torch.float32)
    ours = run.model.svd.state_dict()
    for key, tensor in svd.state_dict().items():
        assert torch.equal(tensor, ours[key].half().float()), key
    table = captions.load(folder / "out" / "words.safetensors")
    assert torch.equal(table.word.weight, run.model.words.word.weight)
    spatial, temporal = captions.caption_tokens(table, [WORDS[:7], WORDS[-7:]], 5)
    assert spatial.shape == (2, 5, 7, 64) and temporal.shape == (2, 7, 64)
    assert torch.equal(spatial[:, 3], temporal)
    card = (folder / "out" / "README.md").read_text()
    for text in ("python -m minimti.pretrain --seed 0", "hours", "1 thread, ", "captions: text to video", " dB"):
        assert text in card
    for name in ("frames", "clips", "captions", "images"):
        assert (folder / f"{name}.png").is_file()


def test_a_stopped_run_equals_one_never_stopped(finished, tmp_path, monkeypatch):
    """Asked to stop in one stage, killed in two others: in its second step, and before any checkpoint of its own."""
    run, folder = finished
    calls = []

    def stopping(stage):
        def loss(model, libraries, rng, batch):
            value = stage.loss(model, libraries, rng, batch)
            calls.append(stage.name)
            if calls == ["frames"]:
                os.kill(os.getpid(), signal.SIGTERM)
            if (stage.name, calls.count(stage.name)) in (("tower", 2), ("images", 1)):
                raise RuntimeError("killed")
            return value

        return replace(stage, loss=loss)

    monkeypatch.setattr(run_module, "STAGES", tuple(map(stopping, run_module.STAGES)))
    monkeypatch.setattr(run_module, "SAVE_SECONDS", 0)
    for stopped in (KeyboardInterrupt, RuntimeError, RuntimeError):
        with pytest.raises(stopped):
            run_module.pretrain(SMALLER, tmp_path, tmp_path / "out", 0, FEW)
    again = run_module.pretrain(SMALLER, tmp_path, tmp_path / "out", 0, FEW)
    assert calls.count("frames") == 2 and calls.count("tower") == 3 and calls.count("images") == 3
    for record, other in zip(again.records, run.records):
        assert record.losses == other.losses
    for name in ("tiny", "words"):
        one, two = (load_file(f / "out" / f"{name}.safetensors") for f in (folder, tmp_path))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_finished_model_is_trained_further(finished, tmp_path):
    run, folder = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    further = run_module.pretrain(SMALLER, tmp_path / "run", tmp_path / "out", 3, FEW, ["captions", "images"])
    assert [len(record.losses) for record in further.records] == [2, 2]
    before, after = (load_file(f / "out" / "tiny.safetensors") for f in (folder, tmp_path))
    for key in before:
        learns = key.startswith("model.diffusion_model.")
        assert torch.equal(before[key], after[key]) or learns, key
    assert any(not torch.equal(before[key], after[key]) for key in before)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--seed 0 --scale 1e-06`, then `" in card and "--seed 3 --scale 1e-06 --stages captions images`" in card
    for stage, times in zip(STAGES, (1, 1, 1, 2, 2)):
        assert card.count(f"| {stage.name}: ") == times
    with pytest.raises(InputError, match="of other sizes; train it from its first stage"):
        run_module.pretrain(TINY, tmp_path / "other", tmp_path / "out", 0, FEW, ["captions"])
    with pytest.raises(InputError, match="holds a run of --seed 3 --scale 1e-06 --stages captions images"):
        run_module.pretrain(SMALLER, tmp_path / "run", tmp_path / "out", 3, FEW, ["images"])


def test_the_embedded_model_can_be_trained_further(tmp_path):
    """Its card goes on where it ends."""
    run = run_module.begin(TINY, tmp_path, WEIGHTS / "tiny", 0, 1, ["captions"])
    run.records = [run_module.Record([1.0])]
    *_, last, _ = run_module.card(run).split("\n")
    assert last.startswith("| captions: text to video | 1 | 4 |") and len(run.history) > 0


def test_a_folder_belongs_to_one_run(finished, tmp_path):
    _, folder = finished
    with pytest.raises(InputError, match="holds a run of --seed 0 --scale 1e-06"):
        run_module.pretrain(SMALLER, folder, folder / "out", 1, FEW)
    (tmp_path / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(InputError, match="not a checkpoint of minimti.pretrain"):
        run_module.pretrain(SMALLER, tmp_path, tmp_path / "out", 0, FEW)


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
            "embedding has 32 elements, a token 64",
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
        run_module.pretrain(config, tmp_path / "run", tmp_path / "out", 0, FEW)
    assert not list(tmp_path.iterdir())


def test_the_embedded_model_is_small():
    """30 MB in fp16, its words and the file's header included."""
    check_sizes(TINY)
    with torch.device("meta"):
        svd = SVD(TINY)
    assert parameters(svd) < 14_500_000


def test_maps_move_latents_as_they_move_pictures():
    """A blob of 4x4 pixels lands on the cell under it: in the middle of the same place at either resolution."""
    maps = stages.random_maps(np.random.default_rng(0), 8)
    coarse = torch.zeros(8, 1, 16, 16)
    coarse[:, :, 6:10, 7:9] = 1
    fine = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    moved = stages.mapped(coarse, maps), stages.mapped(fine, maps)
    middles = []
    for pictures in moved:
        y, x = (torch.linspace(-1, 1, 2 * n + 1)[1::2] for n in pictures.shape[2:])
        mass = pictures.sum((1, 2, 3))
        middles.append(torch.stack([(pictures.sum((1, 2)) * x).sum(1), (pictures.sum((1, 3)) * y).sum(1)]) / mass)
    assert torch.allclose(*middles, atol=0.02)
    assert middles[0].std(1).min() > 0.05


def test_normalised_latents_have_unit_variance_and_decode_as_before():
    torch.manual_seed(0)
    vae = VAE(SMALLER.vae)
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.05)
    frames = torch.rand(32, 3, 48, 48) * 2 - 1
    with torch.no_grad():
        raw = vae.moments(frames).chunk(2, dim=1)[0]
        before = vae.decoder.conv_in(raw)
        stages.normalise_latents(vae, frames)
        mean, log_variance = vae.moments(frames).chunk(2, dim=1)
        after = vae.decoder.conv_in(mean)
    scaled = mean * vae.config.scale_factor
    assert torch.allclose(scaled.std((0, 2, 3)), torch.ones(SMALLER.vae.z_channels), atol=1e-3)
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(SMALLER.vae.z_channels), atol=1e-3)
    assert torch.allclose(before[..., 1:-1, 1:-1], after[..., 1:-1, 1:-1], atol=1e-4)


def test_layers_over_time_start_as_identities():
    torch.manual_seed(0)
    svd = PretrainModel(SMALLER).svd
    z = torch.randn(4, SMALLER.vae.z_channels, 6, 6)
    with torch.no_grad():
        assert torch.allclose(svd.vae.decoder(z, 4), stages.decode_frames(svd.vae.decoder, z), atol=1e-5)


def test_bf16_joins_what_it_must():
    """With the instructions for bf16 all tests here run in it; without, it is slow, and nobody else would notice."""
    torch.manual_seed(0)
    model, rng = PretrainModel(SMALLER), np.random.default_rng(0)
    with torch.autocast("cpu", torch.bfloat16):
        library = stages.encoded(model, "habits", rng, 1)
        for loss in (stages.tower_loss, stages.captions_loss, stages.images_loss):
            assert loss(model, {"captions": library, "habits": library}, rng, 2).isfinite()
    assert {tensor.dtype for tensor in vars(library).values()} == {torch.float16, torch.int64}


def test_words_of_another_world_are_refused(tmp_path, monkeypatch):
    table = captions.CaptionEmbedding(8)
    with monkeypatch.context() as other:
        other.setattr(captions, "WORDS", WORDS[:-1] + ("jump",))
        captions.save(table, tmp_path / "words.safetensors")
    with pytest.raises(InputError, match="its words are not those of the world: .*jump"):
        captions.load(tmp_path / "words.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="holds no words"):
        captions.load(tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match="has 7 words"):
        captions.caption_tokens(table, [("up",)], 8)


def test_a_strip_has_a_row_for_each_clip():
    clips = torch.stack([torch.full((3, 3, 4, 5), value) for value in (-2.0, 1.0)])
    clips[1, 2] = 0
    picture = strip(clips)
    assert picture.shape == (8, 15, 3) and picture.dtype == torch.uint8
    assert (picture[:4] == 0).all() and (picture[4:, :10] == 255).all() and (picture[4:, 10:] == 128).all()
