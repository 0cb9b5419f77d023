"""The embedding: how it starts, its two forms, its file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from official import SMALL
from safetensors.torch import save_file

from minimti import motion as module
from minimti.config import MODELS
from minimti.io.files import InputError
from minimti.motion import Motion, initialise

F, N, D = SMALL.num_frames, 5, SMALL.unet.context_dim
FIXTURES = Path(__file__).parent / "fixtures"


def make(sets: int = F + 1) -> Motion:
    fingerprint = {"unet.conv_in.weight": [0.5, -1.0, 0.0, 2.0]}
    return Motion(torch.randn(sets, N, D), F, SMALL.name, SMALL.micro, SMALL.size, 7, 3, fingerprint)


def test_the_papers_start_is_each_frames_own_embedding():
    embeddings = 10 * torch.randn(14, 16384)  # wide enough to estimate the noise of a single set closely
    tokens = initialise(embeddings, 5, torch.Generator().manual_seed(0), shared_start=False)
    assert tokens.shape == (15, 5, 16384)
    noise = tokens - torch.cat([embeddings, embeddings.mean(0, keepdim=True)])[:, None]
    assert noise.std(dim=(1, 2)).tolist() == pytest.approx([0.1] * 15, rel=0.02) and noise.mean().abs() < 1e-3
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    assert not torch.equal(tokens[0, 0], tokens[0, 1])  # equal tokens would stay equal for ever


def test_the_shared_start_is_the_mean_embedding_in_every_set():
    embeddings = 10 * torch.randn(14, 16384)
    tokens = initialise(embeddings, 5, torch.Generator().manual_seed(0), shared_start=True)
    assert tokens.shape == (15, 5, 16384) and all(torch.equal(tokens[0], other) for other in tokens[1:])
    noise = tokens[0] - embeddings.mean(0)
    assert noise.std().item() == pytest.approx(0.1, rel=0.02) and not torch.equal(tokens[0, 0], tokens[0, 1])


@pytest.mark.parametrize("shared_start", [False, True])
def test_the_noise_of_a_start_is_that_of_its_generator(shared_start):
    generator, again = (torch.Generator().manual_seed(3) for _ in range(2))
    tokens = initialise(torch.zeros(F, D), N, generator, shared_start=shared_start)
    noise = torch.randn(1 if shared_start else F + 1, N, D, generator=again)
    assert torch.equal(tokens, (0.1 * noise).expand(F + 1, -1, -1))


def test_set_f_is_that_of_frame_f():
    motion = make()
    spatial, temporal = motion.sets
    assert spatial.shape == (1, F, N, D) and temporal.shape == (1, N, D) and not motion.shared
    assert torch.equal(spatial[0], motion.tokens[:F]) and torch.equal(temporal[0], motion.tokens[F])


def test_a_shared_set_serves_all_frames_and_time():
    motion = make(sets=1)
    spatial, temporal = motion.sets
    assert spatial.shape == (1, F, N, D) and temporal.shape == (1, N, D) and motion.shared
    assert all(torch.equal(spatial[0, f], motion.tokens[0]) for f in range(F)) and torch.equal(temporal, motion.tokens)


@pytest.mark.parametrize("sets", [1, F + 1])
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_an_embedding_survives_its_file(tmp_path, name, sets):
    motion = make(sets)
    motion.save(tmp_path / name)
    back = Motion.load(tmp_path / name)
    assert torch.equal(back.tokens, motion.tokens) and not back.tokens.requires_grad
    assert vars(back) | {"tokens": None} == vars(motion) | {"tokens": None}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_smallest_embedding_survives_its_file(tmp_path):
    motion = Motion(torch.zeros(2, 1, 1), 1, SMALL.name, SMALL.micro, size=(1, 8192), steps=0, seed=0)
    motion.save(tmp_path / "m.pt")
    assert vars(Motion.load(tmp_path / "m.pt")) | {"tokens": None} == vars(motion) | {"tokens": None}


def test_files_of_version_0_1_0_load():
    motion = Motion.load(FIXTURES / "embedding-0.1.0.pt")
    assert (motion.tokens.shape, motion.num_frames, motion.model) == ((15, 2, 64), 14, "tiny")
    assert (motion.steps, motion.seed, motion.size, motion.fingerprint) == (6, 0, (64, 64), {})
    assert motion.micro == MODELS["tiny"].micro
    motion.check_fits(MODELS["tiny"])


@pytest.mark.parametrize("change", [{"name": "other"}, {"unet": replace(SMALL.unet, context_dim=64)}])
def test_an_embedding_fits_its_own_model_only(change):
    make().check_fits(SMALL)
    with pytest.raises(InputError, match="the embedding is for model 'small'"):
        make().check_fits(replace(SMALL, **change))


def saved_with(path: Path, **changes) -> Path:
    """A file of `save` in which some fields are others; None takes one away."""
    make().save(path)
    fields = torch.load(path, weights_only=True) | changes
    torch.save({key: value for key, value in fields.items() if value is not None}, path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"size": ("64", "64")},
        {"size": (64,)},
        {"size": (64, 64, 64)},
        {"size": (64, 0)},
        {"size": (8193, 64)},
        {"size": (64.0, 64)},
        {"size": 64},
        {"steps": "7"},
        {"steps": True},
        {"steps": -1},
        {"seed": -1},
        {"num_frames": 0},
        {"num_frames": 4.0},
        {"model": 3},
        {"model": {}},
        {"micro": {"fps_id": "6", "motion_bucket_id": 127, "cond_aug": 0.02}},
        {"micro": None},
        {"micro": {}},
        {"tokens": torch.randn(F + 1, N, D).half()},
        {"tokens": torch.randn(F + 1, N * D)},
        {"tokens": [[1.0]]},
        {"fingerprint": {"a": ["b"]}},
        {"fingerprint": {"a": [float("nan")]}},
        {"tokens": torch.randn(F + 1, N, D).to_sparse()},
        {"fingerprint": [1.0]},
        {"version": None},
        {"version": 1},
        {"version": "new"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_fields_of_another_kind_are_refused(tmp_path, changes):
    with pytest.raises(InputError, match="m.pt: not a motion-text embedding written by train.py"):
        Motion.load(saved_with(tmp_path / "m.pt", **changes))


@pytest.mark.parametrize(
    "tokens",
    [torch.randn(F, N, D), torch.randn(F + 1, 0, D), torch.full((F + 1, N, D), torch.nan)],
    ids=["too few sets", "no tokens", "nan"],
)
def test_tokens_of_an_odd_shape_or_value_are_refused(tmp_path, tokens):
    with pytest.raises(InputError, match="odd shape, or of numbers that are not finite"):
        Motion.load(saved_with(tmp_path / "m.pt", tokens=tokens))


def test_a_file_of_a_newer_version_names_it(tmp_path):
    with pytest.raises(InputError, match=r"written by a newer minimti \(99\.0\.0\); upgrade this one"):
        Motion.load(saved_with(tmp_path / "m.pt", version="99.0.0"))
    assert Motion.load(saved_with(tmp_path / "m.pt", version=module.__version__)).steps == 7


class Intruder:
    """What a pickle runs when it is loaded as ordinary pickles are."""

    def __reduce__(self):
        return Path.touch, (Path("intruded"),)


def test_no_code_in_a_file_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not a motion-text embedding"):
        Motion.load(saved_with(tmp_path / "m.pt", model=Intruder()))
    assert not Path("intruded").exists()


def test_a_newer_file_is_named_whatever_it_holds(tmp_path):
    with pytest.raises(InputError, match="written by a newer minimti"):
        Motion.load(saved_with(tmp_path / "m.pt", version="99.0.0", schedule="cosine", micro=None))


def test_tokens_are_loaded_without_a_graph(tmp_path):
    tokens = torch.randn(F + 1, N, D, requires_grad=True)
    assert not Motion.load(saved_with(tmp_path / "m.pt", tokens=tokens)).tokens.requires_grad


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no embedding")
    (tmp_path / "text.safetensors").write_text("no embedding")
    save_file({"tokens": torch.randn(2, 3, 4)}, tmp_path / "bare.safetensors")
    save_file({"tokens": torch.randn(2, 3, 4)}, tmp_path / "list.safetensors", {"motion": json.dumps([])})
    for name in ("text.pt", "text.safetensors", "bare.safetensors", "list.safetensors"):
        with pytest.raises(InputError, match=f"{name}: not a motion-text embedding"):
            Motion.load(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        Motion.load(tmp_path / "nothing.pt")
