"""The embedding: how it starts, its two forms, its file."""

import json
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from official import SMALL
from safetensors import safe_open
from safetensors.torch import save_file

from minimti import motion as module
from minimti.config import MODELS
from minimti.io.files import InputError
from minimti.io.video import Clip
from minimti.motion import Motion, frames_start, zero_start
from minimti.pipeline import learn

F, N, D = SMALL.num_frames, 5, SMALL.unet.context_dim
FIXTURES = Path(__file__).parent / "fixtures"


def make(sets: int = F + 1) -> Motion:
    fingerprint = {"unet.conv_in.weight": [0.5, -1.0, 0.0, 2.0]}
    return Motion(torch.randn(sets, N, D), F, SMALL.name, SMALL.micro, SMALL.size, 7, 3, fingerprint)


def test_the_papers_start_is_each_frames_own_embedding():
    embeddings = 10 * torch.randn(14, 16384)  # wide enough to estimate the noise of a single set closely
    tokens = frames_start(embeddings, 5, torch.Generator().manual_seed(0))
    assert tokens.shape == (15, 5, 16384)
    noise = tokens - torch.cat([embeddings, embeddings.mean(0, keepdim=True)])[:, None]
    assert noise.std(dim=(1, 2)).tolist() == pytest.approx([0.1] * 15, rel=0.02) and noise.mean().abs() < 1e-3
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    assert not torch.equal(tokens[0, 0], tokens[0, 1])  # equal tokens would stay equal for ever


def test_the_start_at_zero_is_noise_alone_and_the_same_in_every_set():
    tokens = zero_start(15, 5, 16384, torch.Generator().manual_seed(0))
    assert tokens.shape == (15, 5, 16384) and all(torch.equal(tokens[0], other) for other in tokens[1:])
    assert tokens[0].std().item() == pytest.approx(0.1, rel=0.02) and abs(tokens.mean()) < 1e-3
    assert not torch.equal(tokens[0, 0], tokens[0, 1])


def test_the_noise_of_a_start_is_that_of_its_generator():
    start, again = (torch.Generator().manual_seed(3) for _ in range(2))
    tokens = frames_start(torch.zeros(F, D), N, start)
    assert torch.equal(tokens, 0.1 * torch.randn(F + 1, N, D, generator=again))
    tokens = zero_start(F + 1, N, D, start)
    assert torch.equal(tokens, (0.1 * torch.randn(1, N, D, generator=again)).expand(F + 1, -1, -1))


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
    motion = Motion(torch.zeros(2, 1, 1), 1, SMALL.name, SMALL.micro, size=(1, 4096), steps=0, seed=0)
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
        {"size": (4097, 64)},
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
        {"tokens": torch.ones(F + 1, N, D).half()},
        {"tokens": torch.ones(F + 1, N * D)},
        {"tokens": [[1.0]]},
        {"fingerprint": {"a": ["b"]}},
        {"fingerprint": {"a": [float("nan")]}},
        {"tokens": torch.ones(F + 1, N, D).to_sparse()},
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
    "tokens, rule",
    [
        (torch.randn(F, N, D), "num_frames must be 1 to 1000, and tokens F [+] 1 sets or one for all"),
        (torch.randn(F + 1, 0, D), "tokens must be 1 to 33554432 numbers in float32"),
        (torch.full((F + 1, N, D), torch.nan), "tokens must be finite; train it again"),
        (torch.tensor([[[torch.inf]]]), "tokens must be finite; train it again"),
    ],
    ids=["too few sets", "no tokens", "nan", "inf"],
)
def test_tokens_of_an_odd_shape_or_value_are_refused(tmp_path, tokens, rule):
    with pytest.raises(InputError, match=rule):
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


# ------------------------------------------------------------------------------------------------ files of strangers


def shared_parts(depth: int) -> tuple:
    """A tuple of 2^depth leaves in depth objects: to walk, compare or hash it takes for ever."""
    part: tuple = (0, 0)
    for _ in range(depth):
        part = (part, part)
    return part


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ["tiny"]},
        {"model": {"tiny": 1}},
        {"model": shared_parts(64)},
        {"settings": {"a": shared_parts(64)}},
        {"size": ("64", "64")},
        {"size": "66"},
        {"size": torch.tensor([64, 64])},
        {"size": {0: 64, 1: 64}},
        {"size": (8192, 16)},
        {"size": (4096, 2048)},
        {"micro": {"fps_id": 10**30, "motion_bucket_id": 127, "cond_aug": 0.02}},
        {"micro": {"fps_id": 6, "motion_bucket_id": 127, "cond_aug": 10**400}},
        {"tokens": torch.empty(F + 1, N, D, device="meta")},
        {"tokens": torch.empty(F + 1, 10**12, D, device="meta")},
        {"tokens": torch.zeros(F + 1, 10**6, D, dtype=torch.float32, layout=torch.sparse_coo)},
        {"tokens": torch.zeros(F + 1, 1, D).expand(-1, 10**8, -1)},
        {"tokens": torch.randn(N, F + 1, D).transpose(0, 1)},
        {"tokens": torch.nn.Parameter(torch.randn(F + 1, N, D))},
        {"seed": 2**32},
        {"steps": 10**7},
        {"num_frames": 1001},
        {"total_steps": 6},  # fewer than the 7 steps done
        {"total_steps": 7.0},
        {"fps": 0.0},
        {"fps": -7.0},
        {"fps": float("nan")},
        {"fps": 10**400},
        {"fps": "7"},
        {"settings": {"a": 1}},
        {"settings": {1: "a"}},
        {"settings": {"a": "\x1b[2J"}},
        {"settings": {"a": "a" * 2001}},
        {"settings": {str(i): "" for i in range(65)}},
        {"settings": ["a"]},
        {"fingerprint": {"a": [0.0] * 65}},
        {"fingerprint": {str(i): [0.0] for i in range(65)}},
        {"fingerprint": {"a": "b"}},
        {"fingerprint": {"a" * 257: [0.0]}},
        {"settings": {"a" * 257: "a"}},
        {"model": "../x"},
        {"model": "/x"},
        {"model": ""},
        {"model": "a" * 65},
        {"model": "a\n"},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_odd_content_is_refused_at_once(tmp_path, changes):
    path = saved_with(tmp_path / "m.pt", **changes)
    began = time.perf_counter()
    with pytest.raises(InputError, match="m.pt: not a motion-text embedding") as caught:
        Motion.load(path)
    assert time.perf_counter() - began < 2 and len(str(caught.value)) < 400


def rewritten(path: Path, change, compression: int = zipfile.ZIP_STORED) -> Path:
    """An embedding's archive whose data.pkl went through `change`."""
    make().save(path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents["archive/data.pkl"] = change(contents["archive/data.pkl"])
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def with_step(pickled: bytes, value: bytes) -> bytes:
    """The pickle with opcodes `value` where the number of steps, 7, was."""
    before, _, after = pickled.partition(b"stepsq")
    assert after[1:3] == b"K\x07"
    return before + b"stepsq" + after[:1] + value + after[3:]


@pytest.mark.parametrize(
    "value",
    [
        b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R",  # 64 GB, which weights_only allocates
        b"ccollections\nOrderedDict\n)R",
        b"ccollections\nOrderedDict\n)\x81",
        b"cposix\nsystem\nX\x01\x00\x00\x00a\x85R",
        b"ctorch\nTensor\n",
        b"K\x07\x85q\xffh\xff\x86",  # a tuple twice
        b"K\x07\x85r\xff\xff\xff\x00j\xff\xff\xff\x00\x86",
        b"X\x01\x00\x00\x00aq\xff\x85q\xffh\xff\x86",  # a text, then a tuple in its place
        b"K\x070",
    ],
    ids=["bytearray", "call", "new", "system", "class", "shared", "shared far", "shared in place of a text", "pop"],
)
def test_a_pickle_of_anything_else_is_not_unpickled(tmp_path, value, monkeypatch):
    path = tmp_path / "m.pt"
    assert Motion.load(rewritten(path, lambda pickled: with_step(pickled, b"K\x08"))).steps == 8
    rewritten(path, lambda pickled: with_step(pickled, value))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(InputError, match="not a motion-text embedding"):
        Motion.load(path)


def test_an_archive_is_read_only_as_far_as_it_is_an_embeddings(tmp_path):
    """Compressed or long entries are refused before they are read, and entries of other names are not read."""
    path = tmp_path / "m.pt"
    for more, compression in ((0, zipfile.ZIP_DEFLATED), (2**20, zipfile.ZIP_STORED)):
        rewritten(path, lambda pickled, more=more: pickled + bytes(more), compression)
        with pytest.raises(InputError, match="not a motion-text embedding"):
            Motion.load(path)
    with zipfile.ZipFile(rewritten(path, lambda pickled: pickled), "a") as archive:
        archive.writestr("archive/DATA.PKL", b"other")
    assert Motion.load(path).steps == 7
    with zipfile.ZipFile(path, "a") as archive:
        for index in range(100):
            archive.writestr(f"archive/{index}", b"")
    with pytest.raises(InputError, match="not a motion-text embedding"):
        Motion.load(path)


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_a_file_larger_than_any_embedding_is_not_read(tmp_path, name, monkeypatch):
    path = tmp_path / name
    make().save(path)
    with open(path, "ab") as file:
        file.truncate(2**28)  # a sparse file: the added bytes take no room
    for reader in ("_read_archive", "_read_safetensors"):
        monkeypatch.setattr(module, reader, lambda _: pytest.fail("read"))
    with pytest.raises(InputError, match="not a motion-text embedding"):
        Motion.load(path)


def test_safetensors_are_held_to_the_same(tmp_path):
    path = tmp_path / "m.safetensors"
    make().save(path)
    with safe_open(path, "pt") as file:
        # safetensors 0.4 maps the file, which is overwritten below: a copy
        tokens, about = file.get_tensor("tokens").clone(), json.loads(file.metadata()["motion"])

    def write(tensors=None, more="", **changes) -> Path:
        text = json.dumps(about | changes) + more
        save_file({"tokens": tokens} if tensors is None else tensors, path, {"motion": text})
        return path

    assert Motion.load(write()).steps == 7
    for refused in (
        {"size": [8192, 16]},
        {"model": "../x"},
        {"model": ["a"]},
        {"seed": 1e400},
        {"steps": 7.0},
        {"tensors": {"tokens": tokens.half()}},
        {"tensors": {"tokens": tokens, "more": tokens.clone()}},
        {"tensors": {}},
        {"more": " " * 2**20},
        {"more": "[" * 10**5},
    ):
        with pytest.raises(InputError, match="m.safetensors: not a motion-text embedding"):
            Motion.load(write(**refused))


# ------------------------------------------------------------------------------------------------------------ saving


def test_saving_refuses_what_loading_would(tmp_path):
    for changes in (
        {"tokens": torch.full((F + 1, N, D), torch.nan)},
        {"tokens": torch.randn(F, N, D)},
        {"tokens": torch.randn(F + 1, N, D).double()},
        {"size": (64, 0)},
        {"seed": -1},
        {"seed": 2**32},
        {"model": "a/b"},
        {"steps": 8, "total_steps": 7},
        {"fps": float("inf")},
        {"settings": {str(i): "" for i in range(65)}},
    ):
        for name in ("m.pt", "m.safetensors"):
            with pytest.raises(InputError, match="the embedding cannot be saved: "):
                replace(make(), **changes).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_rate_plan_and_settings_are_kept(tmp_path, name):
    facts = {"command": "train.py größe.mp4 --lr 0.1", "steps": "7"}
    motion = replace(make(), fps=29.97, settings=facts, total_steps=1000)
    motion.save(tmp_path / name)
    back = Motion.load(tmp_path / name)
    assert (back.fps, back.settings, back.total_steps) == (29.97, facts, 1000)
    older = Motion.load(FIXTURES / "embedding-0.1.0.pt")
    assert (older.fps, older.settings, older.total_steps) == (None, {}, None)


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
@pytest.mark.parametrize("character", ["\N{GRINNING FACE}", "\\", '"', "a"])
def test_whatever_is_saved_can_be_loaded(tmp_path, name, character):
    """All texts at their longest, of the characters that take most bytes."""
    keys = [f"{i:02}" + 254 * character for i in range(64)]
    fingerprint = {key: [-1.2345678901234567e-300] * 64 for key in keys}
    motion = replace(make(), settings={key: 2000 * character for key in keys}, fingerprint=fingerprint)
    motion.save(tmp_path / name)
    back = Motion.load(tmp_path / name)
    assert back.settings == motion.settings and back.fingerprint == motion.fingerprint


def test_settings_are_plain_text_whatever_they_were(tmp_path):
    """Undecodable names, control characters and endless texts lose no embedding, and reach no terminal."""
    facts = {"clip": "a\udc80\x1b[2J\n.mp4", "command": "x" * 10**5}
    replace(make(), settings=facts).save(tmp_path / "m.pt")
    back = Motion.load(tmp_path / "m.pt").settings
    assert back == {"clip": r"a\udc80\x1b[2J\n.mp4", "command": "x" * 2000}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_the_bytes_of_a_file_depend_on_its_content_alone(tmp_path, ending):
    """Not on its name, nor on which of its equal texts are one object."""
    one, two = tmp_path / f"one.{ending}", tmp_path / f"another.{ending}"
    text = "a text"
    motion = make()
    motion = replace(motion, settings={motion.model: text, "b": text})
    motion.save(one)
    again = motion.model[:2] + motion.model[2:]
    assert again is not motion.model
    other = replace(motion, settings={again: text[:2] + text[2:], "b": text})
    replace(other, tokens=motion.tokens.clone().requires_grad_()).save(two)
    assert one.read_bytes() == two.read_bytes()
    Motion.load(one).save(two)
    assert one.read_bytes() == two.read_bytes()


def test_one_seed_gives_one_file(tmp_path, mini_svd):
    frames = torch.rand(4, 3, 32, 48) * 2 - 1
    clip = Clip(frames, 7.0, (0.0, 1.0, 2.0, 3.0), "clip", (48, 32))
    for name in ("a.pt", "b.pt"):
        learn(mini_svd, clip, steps=2, num_tokens=2, seed=5).save(tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_the_model_of_an_embedding_is_never_followed(tmp_path, monkeypatch):
    """It is data: the name of a file here, a path or an address is neither opened nor fetched."""
    import sample

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minimti.cli.find_model", lambda *_: pytest.fail("a model was looked for"))
    Path("here.safetensors").touch()
    monkeypatch.setattr("sys.argv", ["sample.py", "--emb", "m.pt", "--unconditional"])
    for model, message in (
        ("here.safetensors", "m.pt: made with a model called 'here.safetensors'; pass its file or folder as --model"),
        (str(tmp_path / "here.safetensors"), "model must be a name"),
        ("http://127.0.0.1:9/model", "model must be a name"),
        ("stabilityai/stable-video-diffusion-img2vid", "model must be a name"),
    ):
        saved_with(Path("m.pt"), model=model)
        with pytest.raises(InputError, match=message):
            sample.main()


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
