"""The motion-text embedding m of the paper, and its file."""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from minimti import __version__
from minimti.config import MicroConditioning, SVDConfig, checked
from minimti.io.files import InputError, atomic_write, require_file

NUM_TOKENS = 5  # N of the paper, tokens per set
INIT_NOISE = 0.1  # the N(0, 0.1) of paper B.2, read as a standard deviation


@dataclass
class Motion:
    """(F + 1) x N x d tokens, and what sampling needs to know of how they were made."""

    tokens: Tensor  # [F + 1, N, d]: a set for every frame, then the temporal set
    model: str
    micro: MicroConditioning
    size: tuple[int, int]  # width, height in pixels
    steps: int
    seed: int

    @property
    def num_frames(self) -> int:
        return self.tokens.shape[0] - 1

    @property
    def sets(self) -> tuple[Tensor, Tensor]:
        """The tokens as `SVD.prepare` takes them, for a batch of one: spatial [1, F, N, d], temporal [1, N, d]."""
        return self.tokens[None, :-1], self.tokens[-1:]

    def check_fits(self, config: SVDConfig) -> None:
        """Raises InputError if the embedding was optimised on another model than `config` describes."""
        if self.model != config.name or self.tokens.shape[-1] != config.unet.context_dim:
            raise InputError(
                f"the embedding is for model {self.model!r} (token width {self.tokens.shape[-1]}), not for"
                f" {config.name!r} ({config.unet.context_dim}); pass the model it was made with as --model"
            )


def initialise(clip_embeddings: Tensor, num_tokens: int, generator: torch.Generator, paper: bool = False) -> Tensor:
    """CLIP embeddings of the frames [F, d] -> tokens [F + 1, N, d].

    Their mean N times over and noise to tell the copies apart, the same for every set. With `paper` as in B.2: each
    frame's own embedding N times over, the mean for the temporal set alone, and for every set a noise of its own.
    """
    sets = clip_embeddings.mean(dim=0, keepdim=True)
    if paper:
        sets = torch.cat([clip_embeddings, sets])  # [F + 1, d]
    tokens = sets[:, None].repeat(1, num_tokens, 1)
    tokens += INIT_NOISE * torch.randn(tokens.shape, generator=generator).to(tokens)
    return tokens if paper else tokens.repeat(len(clip_embeddings) + 1, 1, 1)


def save(motion: Motion, path: str | Path) -> None:
    """Writes the file that `load` reads."""
    tokens = motion.tokens.detach().cpu()
    with atomic_write(path) as part:
        torch.save({**vars(motion), "tokens": tokens, "micro": asdict(motion.micro), "version": __version__}, part)


def load(path: str | Path) -> Motion:
    """Reads a file of `save`, tokens on the CPU. Raises InputError where it is anything else."""
    path = require_file(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of other kinds of file; the answer below says it
            fields = torch.load(path, map_location="cpu", weights_only=True)
        del fields["version"]
        motion = Motion(**{**fields, "micro": checked(MicroConditioning(**fields["micro"]))})
        num_sets, num_tokens, width = motion.tokens.shape
        width_and_height = [int(length) for length in motion.size]
        usable = motion.tokens.dtype == torch.float32 and num_sets > 1 and num_tokens > 0 and len(width_and_height) == 2
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise InputError(f"{path}: not a motion-text embedding written by train.py") from error
    if not usable or not motion.tokens.isfinite().all():
        raise InputError(f"{path}: an embedding of odd shape, or of numbers that are not finite; train it again")
    return motion
