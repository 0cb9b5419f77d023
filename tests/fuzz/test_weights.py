"""Weight files with anything in them: a valid model or one line, in bounded time and memory."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hostile import fuzz, mutated, odd_value, with_odd_parts
from official import SMALL, write_official
from safetensors.torch import load_file, save_file

from minimti import pipeline
from minimti.checkpoint.load import open_checkpoint
from minimti.config import checked, is_word, to_json

pytestmark = pytest.mark.fuzz
SMALLEST = replace(
    SMALL,
    name="smallest",
    unet=replace(
        SMALL.unet,
        model_channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        num_head_channels=8,
        context_dim=16,
        adm_in_channels=24,
        norm_groups=4,
    ),
    vae=replace(SMALL.vae, ch=8, ch_mult=(1,), num_res_blocks=1, norm_groups=4),
    image_encoder=replace(SMALL.image_encoder, image_size=28, width=16, layers=1, head_width=8, embed_dim=16),
)


def configuration(rng: random.Random) -> str:
    """The text of a configuration that is odd in one or two places."""
    entries: object = json.loads(to_json(SMALLEST))
    for _ in range(rng.randint(1, 2)):
        entries = with_odd_parts(rng, entries, rng.choice((odd_value, lambda rng: rng.randint(0, 2000))))
    text = json.dumps(entries)
    if rng.random() < 0.1:
        text = mutated(rng, text.encode()).decode("utf-8", "replace")
    return "[" * 10**5 if rng.random() < 0.02 else text


def with_odd_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some tensors are gone, renamed, of another shape or type, or hold other numbers."""
    tensors = dict(tensors)
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(list(tensors))
        tensor = tensors.pop(name)
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
        chance = rng.randrange(6)
        if chance == 1:
            name += rng.choice((".x", "\x00", "ä", "\n"))
        tensors |= {} if chance == 0 else {name: tensor}
        if chance == 2:
            tensors[name] = tensor.to(rng.choice((*kinds, torch.float8_e4m3fn)))
        elif chance == 3:
            tensors[name] = torch.zeros(rng.choice(((), (0,), (1,), (*tensor.shape, 1), tensor.shape[::-1])))
        elif chance == 4:
            tensors[name] = torch.full_like(tensor, rng.choice((float("nan"), float("inf"), 1e38, 0.0)))
    return tensors


def with_odd_header(rng: random.Random, data: bytes) -> bytes:
    """Another header before the same numbers."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    name = rng.choice(list(header))
    header[name] = with_odd_parts(rng, header[name])
    text = json.dumps(header).encode()
    length = rng.choice((len(text),) * 8 + (0, 1, 2**24 + 1, 2**40, 2**64 - 1))
    return length.to_bytes(8, "little") + text + data[end:]


def test_a_weight_file_is_a_model_or_refused_in_one_line(tmp_path):
    whole = write_official(tmp_path / "whole.safetensors", SMALLEST)
    data, tensors = whole.read_bytes(), load_file(whole)
    header = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / "case.safetensors"

    def case(rng: random.Random) -> None:
        chance = rng.random()
        if chance < 0.5:
            save_file(tensors, path, {"config": configuration(rng)})
        elif chance < 0.7:
            save_file(with_odd_tensors(rng, tensors), path, {"config": to_json(SMALLEST)})
        elif chance < 0.85:
            path.write_bytes(with_odd_header(rng, data))
        elif chance < 0.95:
            path.write_bytes(mutated(rng, data[:header]) + data[header:])
        else:
            path.write_bytes(mutated(rng, data))
        svd = pipeline.load(open_checkpoint(str(path)), device="cpu", dtype=torch.float32)
        assert is_word(svd.config.name) and checked(svd.config) is svd.config
        assert not any(parameter.is_meta for parameter in svd.parameters())

    fuzz(case)


def test_configurations_alone_are_read_or_refused_in_one_line(tmp_path: Path):
    """Many more of them: the networks are described, and no tensor fits."""
    path = tmp_path / "case.safetensors"

    def case(rng: random.Random) -> None:
        save_file({"x": torch.zeros(1)}, path, {"config": configuration(rng)})
        checkpoint = open_checkpoint(str(path))
        assert is_word(checkpoint.config.name)

    fuzz(case)
