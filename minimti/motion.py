"""The motion-text embedding m of the paper, and its file."""

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from minimti import __version__
from minimti.config import MicroConditioning, SVDConfig
from minimti.files import InputError, existing, whole_file

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

    def spatial(self, batch: int) -> Tensor:
        """[B, F, N, d]"""
        return self.tokens[:-1].expand(batch, -1, -1, -1)

    def temporal(self, batch: int) -> Tensor:
        """[B, N, d]"""
        return self.tokens[-1].expand(batch, -1, -1)

    def check_fits(self, config: SVDConfig) -> None:
        """Raises InputError if the embedding was optimised on another model than `config` describes."""
        if self.model != config.name or self.tokens.shape[-1] != config.unet.context_dim:
            raise InputError(
                f"the embedding is for model {self.model!r} (token width {self.tokens.shape[-1]}), not for"
                f" {config.name!r} ({config.unet.context_dim}); pass the model it was made with as --model"
            )


def initialise(clip_embeddings: Tensor, num_tokens: int, generator: torch.Generator) -> Tensor:
    """CLIP embeddings of the frames [F, d] -> tokens [F + 1, N, d], paper B.2.

    Each frame's embedding N times over, their mean for the temporal set, and noise to tell the copies apart.
    """
    sets = torch.cat([clip_embeddings, clip_embeddings.mean(dim=0, keepdim=True)])  # [F + 1, d]
    tokens = sets[:, None].repeat(1, num_tokens, 1)
    return tokens + INIT_NOISE * torch.randn(tokens.shape, generator=generator).to(tokens)


def save(motion: Motion, path: str | Path) -> None:
    """Writes the file that `load` reads."""
    tokens = motion.tokens.detach().cpu()
    with whole_file(path) as part:
        torch.save({**vars(motion), "tokens": tokens, "micro": asdict(motion.micro), "version": __version__}, part)


def load(path: str | Path) -> Motion:
    """Reads a file of `save`, tokens on the CPU. Raises InputError where it is anything else."""
    path = existing(path)
    try:
        fields = torch.load(path, map_location="cpu", weights_only=True)
        del fields["version"]
        motion = Motion(**{**fields, "micro": MicroConditioning(**fields["micro"])})
        _, _, _ = motion.tokens.shape
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a motion-text embedding written by train.py") from error
    if not motion.tokens.isfinite().all():
        raise InputError(f"{path}: the embedding holds numbers that are not finite; train it again")
    return motion
