"""Captions: the words of the procedural world as tokens of the embedded model."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minimti.io.files import InputError, atomic_write, require_file
from minimti.world.scene import WORDS, Program

NUM_SLOTS = 7  # words of a caption


class Words(nn.Module):
    """A caption is NUM_SLOTS tokens: what happens, add_owned when."""

    def __init__(self, dim: int):
        super().__init__()
        self.word = nn.Embedding(len(WORDS), dim)
        self.slot = nn.Embedding(NUM_SLOTS, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Indices into WORDS [B, NUM_SLOTS] -> tokens [B, NUM_SLOTS, d]."""
        return self.word(ids) + self.slot.weight


def word_ids(programs: Sequence[Program]) -> Tensor:
    """[B, NUM_SLOTS] indices into WORDS. Raises ValueError where a program is longer, shorter or of other words."""
    ids = torch.tensor([[WORDS.index(word) for word in program] for program in programs])
    if ids.shape[1:] != (NUM_SLOTS,):
        raise ValueError(f"a caption has {NUM_SLOTS} words")
    return ids


def caption_tokens(words: Words, programs: Sequence[Program], num_frames: int) -> tuple[Tensor, Tensor]:
    """Captions as `SVD.prepare` takes tokens: spatial [B, F, NUM_SLOTS, d], temporal [B, NUM_SLOTS, d]; all alike."""
    temporal = words(word_ids(programs))
    return temporal[:, None].expand(-1, num_frames, -1, -1), temporal


def save(words: Words, path: Path) -> None:
    with atomic_write(path) as part:
        save_file(words.state_dict(), part, {"words": json.dumps(WORDS)})


def load(path: Path) -> Words:
    """Reads a file of `save`, frozen. Raises InputError where it is none, or its words are not those of the world."""
    try:
        with safe_open(require_file(path), framework="pt") as file:
            known = tuple(json.loads(file.metadata()["words"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        words = Words(tensors["word.weight"].shape[1])
        words.load_state_dict(tensors)
    except InputError:
        raise
    except Exception as error:  # whatever another file holds
        raise InputError(f"{path}: holds no words written by minimti.pretrain") from error
    if known != WORDS:
        raise InputError(f"{path}: its words are not those of the world: {', '.join(known)}")
    return words.requires_grad_(False)
