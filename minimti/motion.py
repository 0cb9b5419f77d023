"""The motion-text embedding m of the paper (3.3), and its file."""

import json
import math
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimti import __version__
from minimti.config import MicroConditioning, SVDConfig, checked
from minimti.io.files import InputError, atomic_write, require_file

INIT_NOISE = 0.1  # the N(0, 0.1) of paper B.2, read as a standard deviation


@dataclass
class Motion:
    """Learned tokens, and what sampling needs of how they were learned."""

    tokens: Tensor  # fp32 [F + 1, N, d]: a set for every frame, then the temporal set; or [1, N, d]: one for all
    num_frames: int  # F
    model: str  # name in the configuration of the model
    micro: MicroConditioning
    size: tuple[int, int]  # width, height in pixels
    steps: int
    seed: int
    fingerprint: dict[str, list[float]] = field(default_factory=dict)  # the UNet's weights in a few numbers; or empty

    @property
    def shared(self) -> bool:
        """Whether one set serves all frames and the layers over time: F' = 1 in the paper's ablation (figure 9)."""
        return len(self.tokens) == 1

    @property
    def sets(self) -> tuple[Tensor, Tensor]:
        """The tokens as `SVD.prepare` takes them, for a batch of one: spatial [1, F, N, d], temporal [1, N, d]."""
        if self.shared:
            return self.tokens[None].expand(-1, self.num_frames, -1, -1), self.tokens
        return self.tokens[None, :-1], self.tokens[-1:]

    def check_fits(self, config: SVDConfig) -> None:
        """Raises InputError if the embedding was learned on another model than `config` describes."""
        width = self.tokens.shape[-1]
        if self.model != config.name or width != config.unet.context_dim:
            raise InputError(
                f"the embedding is for model {self.model!r} (token width {width}), not for"
                f" {config.name!r} ({config.unet.context_dim}); pass the model it was made with as --model"
            )

    def save(self, path: str | Path) -> None:
        """Writes the file that `load` reads: safetensors if the name ends so, else PyTorch's format.

        Raises InputError where it cannot be written.
        """
        tokens = self.tokens.detach().cpu().contiguous()
        about = {key: value for key, value in vars(self).items() if key != "tokens"}
        about |= {"micro": asdict(self.micro), "version": __version__}
        with atomic_write(path) as part:
            if Path(path).suffix == ".safetensors":
                save_file({"tokens": tokens}, part, {"motion": json.dumps(about)})
            else:
                torch.save({"tokens": tokens, **about}, part)

    @classmethod
    def load(cls, path: str | Path) -> "Motion":
        """Reads a file of `save`, of this version or an earlier one; tokens are on the CPU.

        Raises InputError where it is anything else.
        """
        path = require_file(path)
        try:
            fields = _read(path)
            version = tuple(int(part) for part in fields.pop("version").split("."))
            newer = version > tuple(int(part) for part in __version__.split("."))
            motion = None if newer else _from_fields(fields)
        except Exception as error:  # a damaged file can make the unpickler raise anything
            raise InputError(f"{path}: not a motion-text embedding written by train.py") from error
        if motion is None:
            raise InputError(f"{path}: written by a newer minimti ({'.'.join(map(str, version))}); upgrade this one")
        sets_fit = len(motion.tokens) in (1, motion.num_frames + 1)
        if not sets_fit or motion.tokens.numel() == 0 or not motion.tokens.isfinite().all():
            raise InputError(f"{path}: an embedding of odd shape, or of numbers that are not finite; train it again")
        return motion


def initialise(frame_embeddings: Tensor, num_tokens: int, generator: torch.Generator, *, shared_start: bool) -> Tensor:
    """CLIP embeddings of the frames [F, d] -> tokens [F + 1, N, d].

    As in B.2 each frame's embedding is repeated N times, the mean serves as the temporal set, and every element gets
    noise of deviation INIT_NOISE. With `shared_start` all sets are equal: the mean embedding, N times, with one noise.
    """
    sets = frame_embeddings.mean(dim=0, keepdim=True)  # [1, d]
    if not shared_start:
        sets = torch.cat([frame_embeddings, sets])  # [F + 1, d]
    tokens = sets[:, None].repeat(1, num_tokens, 1)  # [1 or F + 1, N, d]
    tokens += INIT_NOISE * torch.randn(tokens.shape, generator=generator).to(tokens)
    return tokens.repeat(len(frame_embeddings) + 1, 1, 1) if shared_start else tokens


def _read(path: Path) -> dict:
    """The fields of a file, not yet checked."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {"tokens": file.get_tensor("tokens"), **json.loads(file.metadata()["motion"])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other kinds of file; the InputError of `load` is enough
        return torch.load(path, map_location="cpu", weights_only=True)


def _from_fields(fields: dict) -> Motion:
    """Raises an exception of some kind where a field is missing, unknown, of another type or out of range."""
    if "num_frames" not in fields:  # version 0.1.0, which had a set for every frame and no fingerprint
        fields["num_frames"] = len(fields["tokens"]) - 1
    micro = checked(MicroConditioning(**fields["micro"]))
    motion = Motion(**{**fields, "size": tuple(fields["size"]), "micro": micro})
    kinds = {"tokens": Tensor, "model": str, "size": tuple, "num_frames": int, "steps": int, "seed": int}
    for name, kind in kinds.items():
        if type(value := getattr(motion, name)) is not kind:
            raise TypeError(f"{name} is {value!r}")
    if len(motion.size) != 2 or not all(type(length) is int and 0 < length <= 8192 for length in motion.size):
        raise ValueError(f"size is {motion.size!r}")
    if min(motion.num_frames - 1, motion.steps, motion.seed) < 0:
        raise ValueError(f"{motion.num_frames} frames, {motion.steps} steps, seed {motion.seed}")
    tokens = motion.tokens = motion.tokens.detach()
    if (tokens.dtype, tokens.layout, tokens.device.type, tokens.ndim) != (torch.float32, torch.strided, "cpu", 3):
        raise ValueError(f"tokens are {tokens.dtype} {tokens.layout} of {tokens.ndim} dimensions on {tokens.device}")
    for name, numbers in motion.fingerprint.items():
        if not isinstance(name, str) or not all(type(n) is float and math.isfinite(n) for n in numbers):
            raise TypeError(f"fingerprint {name!r} is {numbers!r}")
    return motion
