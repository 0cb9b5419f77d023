"""The motion-text embedding m of the paper (3.3), and its file."""

import io
import json
import math
import pickletools
import re
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimti import __version__
from minimti.config import MAX_PIXELS, MAX_SIDE, MicroConditioning, SVDConfig, checked, is_word, printable
from minimti.io.files import InputError, atomic_write, require_file

INIT_NOISE = 0.1  # the N(0, 0.1) of paper B.2, read as a standard deviation

# What a file may hold. The first bound admits 25 frames with 1000 tokens each of width 1024 (svd-xt, the most that
# --tokens admits) and keeps reading within 1 GB of memory.
MAX_NUMBERS = 2**25  # elements of the tokens, 128 MiB
MAX_ABOUT = 2**20  # bytes of everything but the tokens: data.pkl, or the header of safetensors
MAX_ENTRIES = 64  # entries in a dict
MAX_NAME, MAX_TEXT = 256, 2000  # characters of its keys and of its texts; all together less than MAX_ABOUT


@dataclass
class Motion:
    """Learned tokens, and what sampling needs of how they were learned."""

    tokens: Tensor  # fp32 [F + 1, N, d]: a set for every frame, then the temporal set; or [1, N, d]: one for all
    num_frames: int  # F
    model: str  # name in the configuration of the model
    micro: MicroConditioning
    size: tuple[int, int]  # width, height in pixels
    steps: int  # optimisation steps done
    seed: int
    fingerprint: dict[str, list[float]] = field(default_factory=dict)  # the UNet's weights in a few numbers; or empty
    fps: float | None = None  # frames per second at which the clip was sampled; None: play at micro.fps_id + 1
    settings: dict[str, str] = field(default_factory=dict)  # facts for people to read: command, clip, versions, ...
    total_steps: int | None = None  # planned steps; a file with fewer `steps` is an unfinished run

    @property
    def shared(self) -> bool:
        """Whether one set serves all frames and the layers over time: F' = 1 in the paper's ablation (figure 9)."""
        return len(self.tokens) == 1

    @property
    def playback_fps(self) -> float:
        """Frames per second at which results play: as fast as the clip was taken, else as the model was trained."""
        return self.fps or self.micro.fps_id + 1

    @property
    def sets(self) -> tuple[Tensor, Tensor]:
        """The tokens as `SVD.prepare` takes them, for a batch of one: spatial [1, F, N, d], temporal [1, N, d]."""
        if self.shared:
            return self.tokens[None].expand(-1, self.num_frames, -1, -1), self.tokens
        return self.tokens[None, :-1], self.tokens[-1:]

    @property
    def unfinished(self) -> str:
        """How far its run has come, as "312 of 500"; "" where it has taken all of its steps."""
        return f"{self.steps} of {self.total_steps}" if self.steps < (self.total_steps or 0) else ""

    @property
    def span(self) -> tuple[float, float] | None:
        """When its clip begins and ends in the file, in seconds; None where the settings do not say."""
        times = re.match(r"(\d+\.\d+) to (\d+\.\d+) s", self.settings.get("times", ""), re.ASCII)
        return (float(times[1]), float(times[2])) if times else None

    @property
    def reading(self) -> dict[str, Any]:
        """The options of `read_clip` by which its clip was read, as far as the settings say (see `how_read`)."""
        options: dict[str, Any] = {}
        n, text = r"(\d{1,7}\.\d{1,12})", self.settings.get("sampling", "")
        if found := re.fullmatch(rf"from {n} s(?: to {n} s| at {n} fps| every (\d{{1,7}}))?", text, re.ASCII):
            start, end, fps, stride = found.groups()
            options = {"start": float(start), "end": end and float(end)}
            options |= {"sample_fps": float(fps or 0) or None, "stride": int(stride or 0) or None}
        elif self.span:  # up to version 0.5.0
            options = dict(zip(("start", "end"), self.span))
        if found := re.fullmatch(rf"(crop|pad|stretch) at {n} {n}", self.settings.get("fit", ""), re.ASCII):
            how, *center = found.groups()
            options |= {"how": how, "center": tuple(min(float(place), 1.0) for place in center)}
        return options

    def check_fits(self, config: SVDConfig) -> None:
        """Raises InputError if the embedding was learned on another model than `config` describes."""
        width = self.tokens.shape[-1]
        if self.model != config.name or width != config.unet.context_dim:
            raise InputError(
                f"the embedding is for model {self.model!r} (token width {width}), not for"
                f" {config.name!r} ({config.unet.context_dim}); pass the model it was made with as --model"
            )

    def check(self) -> None:
        """Raises InputError, naming the field, where the embedding is none that `save` would write and `load` read."""
        if fault := _fault(self):
            raise InputError(f"the embedding cannot be saved: {fault}")

    def save(self, path: str | Path) -> None:
        """Writes the file that `load` reads: safetensors if the name ends so, else PyTorch's format.

        Its bytes depend on the content alone. In the texts of `settings`, characters that are not printable are
        escaped, and those after MAX_TEXT are left out. Raises InputError as `check` does, and where the file cannot be
        written.
        """
        motion = replace(self, settings={key: printable(text, MAX_TEXT) for key, text in self.settings.items()})
        motion.check()
        about = {**vars(motion), "micro": asdict(self.micro), "version": __version__}
        del about["tokens"]
        text = json.dumps(about, ensure_ascii=False)
        tokens = self.tokens.detach().cpu().contiguous()
        with atomic_write(path) as part:
            if Path(path).suffix == ".safetensors":
                save_file({"tokens": tokens}, part, {"motion": text})
            else:
                # A pickle differs where equal strings are one object or two, and an archive carries the name of its
                # file: so the fields come from their text, and a buffer has no name.
                buffer = io.BytesIO()
                torch.save({"tokens": tokens, **json.loads(text)}, buffer)
                with open(part, "wb") as file:  # on an error `write_bytes` keeps a view, and Python 3.13 says so
                    file.write(buffer.getbuffer())

    @classmethod
    def load(cls, path: str | Path) -> "Motion":
        """Reads a file of `save`, of this version or an earlier one; tokens are dense, contiguous, on the CPU.

        Nothing in the file is run, followed as a path or fetched, and what it may hold is bounded (_fault), before
        memory is allocated for it. Raises InputError where it is anything else.
        """
        path = require_file(path)
        refusal = f"{path}: not a motion-text embedding written by train.py"
        try:
            if path.stat().st_size > 4 * MAX_NUMBERS + 2 * MAX_ABOUT:
                raise ValueError("too large")
            fields = _read_safetensors(path) if path.suffix == ".safetensors" else _read_archive(path)
            version = _version(fields.pop("version"))
            motion = None if version > _version(__version__) else _from_fields(fields)
        except Exception as error:  # a damaged file can make the readers raise anything
            raise InputError(refusal) from error
        if motion is None:
            raise InputError(f"{path}: written by a newer minimti ({'.'.join(map(str, version))}); upgrade this one")
        if fault := _fault(motion):
            raise InputError(f"{refusal}: {fault}")
        return motion


def frames_start(frame_embeddings: Tensor, num_tokens: int, generator: torch.Generator) -> Tensor:
    """CLIP embeddings of the frames [F, d] -> tokens [F + 1, N, d], the start of B.2.

    Each frame's embedding is repeated N times, the mean serves as the temporal set, and every element gets noise of
    deviation INIT_NOISE.
    """
    sets = torch.cat([frame_embeddings, frame_embeddings.mean(dim=0, keepdim=True)])  # [F + 1, d]
    tokens = sets[:, None].repeat(1, num_tokens, 1)  # [F + 1, N, d]
    return tokens + INIT_NOISE * torch.randn(tokens.shape, generator=generator).to(tokens)


def zero_start(num_sets: int, num_tokens: int, dim: int, generator: torch.Generator) -> Tensor:
    """Tokens [num_sets, N, d] on the CPU, all sets alike: zeros with noise of deviation INIT_NOISE.

    Zeros stand for "no condition" in guidance. The frames' embeddings also hold how the clip looks, and some of that
    stays in the tokens.
    """
    return (INIT_NOISE * torch.randn(1, num_tokens, dim, generator=generator)).repeat(num_sets, 1, 1)


# ---------------------------------------------------------------------------------------------- what a file may hold


def _fault(motion: Motion) -> str:
    """The first field that is outside of what an embedding may hold, and what that is; "" where there is none.

    Types come first, and no value is printed, compared or hashed before its type is known: nested tuples of a file can
    share their parts, and then take 2^n steps to walk. Bounds are those of the options of train.py and sample.py.
    """
    tokens, size, fingerprint, settings = motion.tokens, motion.size, motion.fingerprint, motion.settings
    if type(tokens) is not Tensor or tokens.layout != torch.strided or tokens.is_meta or tokens.ndim != 3:
        return "tokens must be a dense tensor [sets, N, d]"
    if tokens.dtype != torch.float32 or not 0 < tokens.numel() <= MAX_NUMBERS:
        return f"tokens must be 1 to {MAX_NUMBERS} numbers in float32"
    if not _is_whole(motion.num_frames, 1, 1000) or len(tokens) not in (1, motion.num_frames + 1):
        return "num_frames must be 1 to 1000, and tokens F + 1 sets or one for all"
    if not tokens.isfinite().all():
        return "tokens must be finite; train it again"
    if not is_word(motion.model):
        return "model must be a name of up to 64 letters, digits, '.', '_' and '-'"
    try:
        checked(motion.micro)
    except TypeError as error:
        return f"micro: {error}"
    if type(size) is not tuple or len(size) != 2 or not all(_is_whole(side, 1, MAX_SIDE) for side in size):
        return f"size must be a width and a height of 1 to {MAX_SIDE} pixels"
    if size[0] * size[1] > MAX_PIXELS:
        return f"size must be at most {MAX_PIXELS} pixels"
    if not _is_whole(motion.steps, 0, 10**6):
        return "steps must be 0 to 1000000"
    if motion.total_steps is not None and not _is_whole(motion.total_steps, motion.steps, 10**6):
        return "total_steps must be from the steps done to 1000000"
    if not _is_whole(motion.seed, 0, 2**32 - 1):
        return "seed must be 0 to 4294967295"
    if motion.fps is not None and not (type(motion.fps) in (int, float) and 1e-6 <= motion.fps <= 1e6):
        return "fps must be 0.000001 to 1000000"
    if type(fingerprint) is not dict or len(fingerprint) > MAX_ENTRIES:
        return f"fingerprint must be at most {MAX_ENTRIES} names of weights"
    for name, numbers in fingerprint.items():
        numbers_fit = type(numbers) is list and len(numbers) <= 64 and all(type(n) is float for n in numbers)
        if not _is_text(name, MAX_NAME) or not numbers_fit or not all(map(math.isfinite, numbers)):
            return "fingerprint must be at most 64 finite numbers for each name of a weight"
    if type(settings) is not dict or len(settings) > MAX_ENTRIES:
        return f"settings must be at most {MAX_ENTRIES} texts"
    if not all(_is_text(name, MAX_NAME) and _is_text(text, MAX_TEXT) for name, text in settings.items()):
        return f"settings must be printable texts of up to {MAX_TEXT} characters"
    return ""


def _is_whole(value: Any, minimum: int, maximum: int) -> bool:
    return type(value) is int and minimum <= value <= maximum


def _is_text(value: Any, most: int) -> bool:
    return type(value) is str and len(value) <= most and value.isprintable()


def how_read(
    start: float,
    end: float | None,
    sample_fps: float | None,
    stride: int | None,
    how: str,
    center: tuple[float, float],
) -> dict[str, str]:
    """Options of `read_clip` as entries of the settings, from which `Motion.reading` has them again."""
    written = partial(np.format_float_positional, precision=9, trim="0")  # 0.5, 29.97
    sampling = f"from {written(start)} s"
    if end is not None:
        sampling += f" to {written(end)} s"
    elif sample_fps is not None:
        sampling += f" at {written(sample_fps)} fps"
    elif stride is not None:
        sampling += f" every {stride}"
    return {"sampling": sampling, "fit": f"{how} at {written(center[0])} {written(center[1])}"}


# ---------------------------------------------------------------------------------------------- reading files


def _version(text: Any) -> tuple[int, ...]:
    if type(text) is not str or not re.fullmatch(r"\d{1,6}(\.\d{1,6}){1,3}", text):
        raise ValueError("it names no version")
    return tuple(int(part) for part in text.split("."))


def _from_fields(fields: dict[str, Any]) -> Motion:
    """Raises an exception of some kind where a field is missing or unknown. `_fault` checks their values."""
    tokens, size = fields["tokens"], fields["size"]
    if "num_frames" not in fields:  # version 0.1.0, which had a set for every frame and no fingerprint
        fields["num_frames"] = len(tokens) - 1
    fields["micro"] = MicroConditioning(**fields["micro"])
    fields["size"] = tuple(size) if type(size) is list else size  # JSON has no tuples
    motion = Motion(**fields)
    if not tokens.is_contiguous():
        raise ValueError("its tokens are not contiguous")
    motion.tokens = tokens.detach()
    return motion


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The fields of a file in the format of safetensors, not yet checked."""
    with open(path, "rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_ABOUT:
            raise ValueError("its header is too long")
    with safe_open(path, framework="pt") as file:
        (name,) = file.keys()
        return {name: file.get_tensor(name).clone(), **json.loads(file.metadata()["motion"])}


def _read_archive(path: Path) -> dict[str, Any]:
    """The fields of a file of torch.save, not yet checked.

    PyTorch unpickles an archive that is made here of the entries that were checked: so it reads them as they were
    checked, and nothing else.
    """
    if path.read_bytes().count(b"PK\x01\x02") > 64:  # each begins an entry of the archive's directory
        raise ValueError("too many entries")
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as known:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        for name in ("data.pkl", "byteorder", "data/0", "version"):
            entry = entries[name]
            most = 4 * MAX_NUMBERS if name == "data/0" else MAX_ABOUT
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
                raise ValueError(f"{name} is compressed or too large")
            content = archive.read(entry)
            if name == "data.pkl":
                _check_pickle(content)
            known.writestr(f"archive/{name}", content)
    copy.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other kinds of file; the InputError of `load` is enough
        return torch.load(copy, map_location="cpu", weights_only=True)


# What torch.save writes for a dict of texts, numbers, lists, dicts and one tensor.
OPCODES = set(
    "PROTO STOP MARK GLOBAL REDUCE BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1"
    " BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT"
    " SETITEM SETITEMS".split()
)
GLOBALS = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}


def _check_pickle(content: bytes) -> None:
    """Raises ValueError for a pickle that is no dict of plain values and one fp32 tensor.

    `weights_only` admits more: calls that allocate any amount of memory, and parts used twice, by which nested tuples
    become exponentially large to hash. Here two calls are left (the tensor, its empty OrderedDict), and only texts and
    the three globals are used twice.
    """
    shareable: set[Any] = set()
    previous, calls = "", 0
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        calls += name == "REDUCE"
        if name not in OPCODES or calls > 2 or (name == "GLOBAL" and argument not in GLOBALS):
            raise ValueError(f"{name} in data.pkl")
        if name in ("BINPUT", "LONG_BINPUT"):
            (shareable.add if previous in ("BINUNICODE", "GLOBAL") else shareable.discard)(argument)
        if name in ("BINGET", "LONG_BINGET") and argument not in shareable:
            raise ValueError("a shared part in data.pkl")
        previous = name
