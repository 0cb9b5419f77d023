"""Captions of the procedural world as tokens: a learned embedding of the words of a program."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minimti.io.files import InputError, atomic_write, require_file
from minimti.world.scene import NUM_SLOTS, WORDS, Program


class CaptionEmbedding(nn.Module):
    """Embeds a caption as NUM_SLOTS tokens of width d: each is the embedding of its word plus that of its slot."""

    def __init__(self, dim: int):
        super().__init__()
        self.word = nn.Embedding(len(WORDS), dim)
        self.slot = nn.Embedding(NUM_SLOTS, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Indices into WORDS, int64 [B, NUM_SLOTS] -> tokens [B, NUM_SLOTS, d]."""
        return self.word(ids) + self.slot.weight


def word_ids(programs: Sequence[Program]) -> Tensor:
    """Programs -> indices into WORDS, int64 [B, NUM_SLOTS].

    Raises ValueError for a program that does not have NUM_SLOTS words, or an unknown word.
    """
    ids = torch.tensor([[WORDS.index(word) for word in program] for program in programs])
    if ids.shape[1:] != (NUM_SLOTS,):
        raise ValueError(f"a caption has {NUM_SLOTS} words")
    return ids


def caption_tokens(words: CaptionEmbedding, programs: Sequence[Program], num_frames: int) -> tuple[Tensor, Tensor]:
    """Captions as the tokens that `SVD.prepare` takes: spatial [B, F, NUM_SLOTS, d], temporal [B, NUM_SLOTS, d].

    Every frame has the same tokens, and so has the temporal set. Raises ValueError as `word_ids` does.
    """
    temporal = words(word_ids(programs).to(words.word.weight.device))
    return temporal[:, None].expand(-1, num_frames, -1, -1), temporal


def save(words: CaptionEmbedding, path: Path) -> None:
    """Write a safetensors file with the vocabulary in its metadata. Raises InputError if it cannot be written."""
    with atomic_write(path) as part:
        save_file(words.state_dict(), part, {"words": json.dumps(WORDS)})


def load(path: Path) -> CaptionEmbedding:
    """Read a file written by `save`; the module is frozen.

    Raises InputError if the file is missing, is of another kind, or has another vocabulary than WORDS.
    """
    try:
        with safe_open(require_file(path), framework="pt") as file:
            vocabulary = tuple(json.loads(file.metadata()["words"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        words = CaptionEmbedding(tensors["word.weight"].shape[1])
        words.load_state_dict(tensors)
    except InputError:
        raise
    except Exception as error:  # a file of another kind can raise anything
        raise InputError(f"{path}: holds no words written by minimti.pretrain") from error
    if vocabulary != WORDS:
        raise InputError(f"{path}: its words are not those of the world: {', '.join(vocabulary)}")
    return words.requires_grad_(False)
