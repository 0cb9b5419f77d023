"""Files of embeddings with anything in them: a valid embedding or one line, in bounded time and memory."""

import io
import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hostile import fuzz, mutated, nested, odd_value, shared_parts, with_odd_parts
from official import SMALL
from safetensors import safe_open
from safetensors.torch import save_file

from minimti.io.files import InputError
from minimti.motion import Motion

pytestmark = pytest.mark.fuzz
F, N, D = SMALL.num_frames, 2, SMALL.unet.context_dim
OLD = Path(__file__).parents[1] / "fixtures" / "embedding-0.1.0.pt"


def corpus(folder: Path) -> list[Path]:
    """Embeddings of all forms."""
    facts = {"command": "train.py clip.mp4", "version": "0.2.0"}
    fingerprint = {"unet.conv_in.weight": [0.5, -1.0, 0.0, 2.0]}
    full = Motion(torch.randn(F + 1, N, D), F, "small", SMALL.micro, SMALL.size, 7, 3, fingerprint, 30.0, facts, 9)
    paths = [folder / name for name in ("a.pt", "b.pt", "a.safetensors")]
    for path, motion in zip(paths, (full, replace(full, tokens=full.tokens[:1], settings={}), full)):
        motion.save(path)
    return [*paths, OLD]


def odd_tensor(rng: random.Random) -> object:
    """Tensors of every kind that torch.save writes, some of them huge by their shape alone."""
    plain = torch.zeros(F + 1, N, D)
    return rng.choice(
        (
            lambda: torch.empty(F + 1, N, D, device="meta"),
            lambda: torch.empty(F + 1, 10**12, D, device="meta"),
            lambda: plain.to_sparse(),
            lambda: torch.zeros(F + 1, 10**9, D, layout=torch.sparse_coo),
            lambda: torch.zeros(4, 4).to_sparse_csr(),
            lambda: plain[:, :1].expand(-1, 10**9, -1),
            lambda: plain[:, :1].expand(-1, N, -1),
            lambda: torch.zeros(N, F + 1, D).transpose(0, 1),
            lambda: torch.zeros(F + 1, N, 2 * D)[..., ::2],
            lambda: plain.to(rng.choice((torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool))),
            lambda: plain.to(torch.complex64),
            lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
            lambda: torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)]),
            lambda: torch.nn.Parameter(plain),
            lambda: plain.requires_grad_(),
            lambda: torch.full_like(plain, rng.choice((float("nan"), float("inf"), 3e38))),
            lambda: torch.zeros(rng.choice(((), (0,), (0, N, D), (F + 1, 0, D), (1, 1, 1), (F, N, D), (F + 1, N * D)))),
            lambda: torch.zeros(rng.randint(1, 6), rng.randint(1, 3), rng.randint(1, 64)),
            lambda: [[1.0]],
            lambda: torch.Size((1, 2)),
            lambda: torch.float32,
        )
    )()


def odd_object(rng: random.Random) -> object:
    """A value that a pickle can hold."""
    return rng.choice(
        (
            odd_value,
            odd_value,
            odd_tensor,
            lambda rng: (64, 64),
            lambda rng: shared_parts(rng.choice((1, 3, 64))),
            lambda rng: {shared_parts(20): 1},
            lambda rng: nested(200),
            lambda rng: {(1, 2): 3},
            lambda rng: bytes(3),
            lambda rng: bytearray(3),
            lambda rng: {1, 2},
            lambda rng: 1 + 2j,
            lambda rng: Path("x"),
            lambda rng: print,
        )
    )(rng)


def with_odd_fields(rng: random.Random, path: Path) -> bytes:
    """An archive of fields of which some are others."""
    fields = torch.load(path, weights_only=True)
    tokens = fields.pop("tokens")
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.3:
            tokens = odd_tensor(rng)
        else:
            changed = with_odd_parts(rng, fields, odd_object)
            fields = changed if isinstance(changed, dict) else {"x": changed}
    buffer = io.BytesIO()
    try:
        torch.save({"tokens": tokens, **fields} if rng.random() < 0.97 else fields, buffer)
    except Exception:  # not everything can be pickled
        buffer = io.BytesIO(path.read_bytes())
    return buffer.getvalue()


def rewritten(rng: random.Random, path: Path) -> bytes:
    """The archive in order, but with another data.pkl, or entries of other names, kinds and sizes."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [name for name in contents if name.endswith("data.pkl")]
    if rng.random() < 0.7:
        contents[pickled] = mutated(rng, contents[pickled])
    else:
        name = rng.choice(list(contents))
        content = contents.pop(name)
        if rng.random() < 0.8:
            name = rng.choice((name, name.upper(), f"../{name}", f"/{name}", "data.pkl", name + "\x00", "x/data/0"))
            contents[name] = mutated(rng, content or b"0")
    if rng.random() < 0.1:
        contents |= {f"archive/{index}": b"" for index in range(rng.choice((1, 40, 70, 1000)))}
    if rng.random() < 0.1:
        contents["archive/data/0"] = bytes(rng.choice((10**8, 2 * 10**8)))
    buffer = io.BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(buffer, "w", kind, compresslevel=1) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def with_odd_metadata(rng: random.Random, path: Path, to: Path) -> None:
    """A safetensors file whose metadata or header is another."""
    with safe_open(path, "pt") as file:
        tokens, about = file.get_tensor("tokens"), json.loads(file.metadata()["motion"])
    if rng.random() < 0.7:
        text = json.dumps(with_odd_parts(rng, about))
        text = text if rng.random() < 0.8 else mutated(rng, text.encode()).decode("utf-8", "replace")
        kind = rng.choice((torch.float32,) * 8 + (torch.float16, torch.float64, torch.int32))
        save_file({"tokens": tokens.to(kind)}, to, {"motion": text})
        return
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(with_odd_parts(rng, json.loads(data[8 : 8 + length]))).encode()
    length = rng.choice((len(header),) * 8 + (0, 1, 2**20, 2**40, 2**64 - 1))
    to.write_bytes(length.to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :])


def test_an_embedding_is_valid_or_refused_in_one_line(tmp_path):
    paths = corpus(tmp_path)

    def case(rng: random.Random) -> None:
        path = rng.choice(paths)
        to = tmp_path / f"case{path.suffix}"
        if path.suffix == ".safetensors" and rng.random() < 0.7:
            with_odd_metadata(rng, path, to)
        elif path.suffix == ".pt" and rng.random() < 0.8:
            to.write_bytes(rng.choice((with_odd_fields, rewritten))(rng, path))
        else:
            to.write_bytes(mutated(rng, path.read_bytes()))
        motion = Motion.load(to)
        motion.check()
        assert motion.tokens.is_contiguous() and motion.tokens.device.type == "cpu"
        spatial, temporal = motion.sets
        assert spatial.shape[1] == motion.num_frames and temporal.shape[1:] == spatial.shape[2:]
        motion.save(tmp_path / "again.pt")
        assert Motion.load(tmp_path / "again.pt").settings == motion.settings
        try:
            motion.check_fits(SMALL)
        except InputError:
            pass

    fuzz(case)
