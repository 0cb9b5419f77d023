"""The settings of a pre-training, the state of a run, and its checkpoint, which may come from elsewhere."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimti import hardware, pipeline
from minimti.checkpoint.load import open_checkpoint
from minimti.config import SVDConfig, printable, to_json
from minimti.io.files import InputError, atomic_write, check_writable, make_folder, require_file
from minimti.muon import Muon, is_matrix
from minimti.pretrain.card import Record, Row, rows
from minimti.pretrain.stages import STAGES, PretrainModel, Stage
from minimti.world import captions
from minimti.world.clips import check_sizes

STATE = ("stage", "step", "history", "ema", "optimisers")  # fields of Run in its checkpoint
OPTIMISER_STATES = (
    {"momentum"},
    {"step", "exp_avg", "exp_avg_sq"},
)  # names for a parameter, in `make_optimisers`' order
OTHER_FILES = ("words.safetensors", "card.md")  # files of a model, beside its weights
COLUMNS = {"command", "stage", "steps", "batch", "minutes", "loss", "held-out PSNR", "on"}  # names in a row of the card
CPU = torch.device("cpu")


@dataclass(frozen=True)
class PretrainSettings:
    """The constants of a pre-training."""

    stages: tuple[Stage, ...]
    lr: float
    weight_decay: float
    warm_up: int  # steps over which the learning rate rises, at most a quarter of a stage
    clip_norm: float  # largest norm of the gradient of all parameters
    ema: float  # decay of the averaged weights
    save_seconds: float  # between checkpoints
    chunk: int  # scenes encoded at once; each gives two clips
    num_chunks: Mapping[str, int]  # by kind of clips
    measured: int  # held-out clips whose reconstruction is measured
    normalised: int  # held-out clips from which the latents' scale is computed
    shown: int  # held-out clips in a picture; at most `measured`
    shown_guidance: tuple[float, float]  # at the first and the last frame

    @property
    def batch(self) -> int:
        """The clips in a step of the last stage."""
        return self.stages[-1].batch


DEFAULT = PretrainSettings(
    stages=STAGES,
    lr=1e-3,
    weight_decay=0.01,
    warm_up=100,
    clip_norm=1.0,
    ema=0.999,
    save_seconds=120,
    chunk=16,
    num_chunks={"captions": 250, "habits": 80},
    measured=16,
    normalised=64,
    shown=4,
    shown_guidance=(2.0, 2.0),
)


def with_batch(settings: PretrainSettings, batch: int) -> PretrainSettings:
    """The same with `batch` clips in a step of the UNet's stages; the number of encoded clips grows in proportion."""
    stages = tuple(replace(stage, batch=batch) if stage.clips else stage for stage in settings.stages)
    chunk = max(1, round(settings.chunk * batch / settings.batch))
    return replace(settings, stages=stages, chunk=chunk)


def faster_dtype(device: torch.device) -> torch.dtype:
    """bf16 if the device multiplies matrices faster in it, else fp32."""
    faster = device.type == "cuda" or (device.type == "cpu" and hardware.bf16_speedup() > 1.3)
    return torch.bfloat16 if faster else torch.float32


def make_optimisers(trainable: dict[str, nn.Parameter], settings: PretrainSettings) -> list[torch.optim.Optimizer]:
    """Muon for matrices; AdamW for all else: biases, norms, embeddings, layers to and from few channels."""
    matrices = [p for name, p in trainable.items() if is_matrix(name, p)]
    others = [p for name, p in trainable.items() if not is_matrix(name, p)]
    adam = torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay)
    return [Muon(matrices, lr=settings.lr, weight_decay=settings.weight_decay), adam]


# ---------------------------------------------------------------------------------------------- the state of a run


@dataclass
class Run:
    """The state of a pre-training. Step, averaged weights and optimisers are those of the current stage."""

    config: SVDConfig
    settings: PretrainSettings
    folder: Path  # holds its checkpoint, its encoded clips and its pictures
    out: Path  # where the model goes
    seed: int
    scale: float  # multiplies the steps of all stages
    model: PretrainModel
    device: torch.device
    dtype: torch.dtype
    stages: tuple[Stage, ...]  # those that the run goes through
    jobs: int = 1  # processes that draw clips
    stage: int = 0
    step: int = 0
    history: list[Row] = field(default_factory=list)  # the card's rows of earlier runs
    ema: dict[str, Tensor] = field(default_factory=dict)
    optimisers: list[dict[str, Any]] = field(default_factory=list)  # their states
    records: list[Record] = field(default_factory=list)  # one per stage so far
    encoding_seconds: dict[str, float] = field(default_factory=dict)  # by kind of clips

    @property
    def path(self) -> Path:
        """Where the checkpoint is."""
        return self.folder / "checkpoint.pt"

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed."""
        names = " ".join(stage.name for stage in self.stages)
        numbers = {"seed": self.seed, "scale": self.scale, "lr": self.settings.lr, "batch": self.settings.batch}
        return {"config": to_json(self.config), "stages": names, **numbers}

    @property
    def command(self) -> str:
        """The command line that makes this run."""
        options = f"--seed {self.seed} --scale {self.scale:g}"
        if self.settings.lr != DEFAULT.lr:
            options += f" --lr {self.settings.lr:g}"
        if self.settings.batch != DEFAULT.batch:
            options += f" --batch {self.settings.batch}"
        if len(self.stages) < len(self.settings.stages):
            options += f" --stages {self.identity['stages']}"
        return f"python -m minimti.pretrain {options}"

    @property
    def rows(self) -> list[Row]:
        """The card's rows of all stages so far, in this run and in earlier ones."""
        return self.history + rows(self.command, self.stages, self.records, self.encoding_seconds)

    def steps(self, stage: Stage) -> int:
        """The number of steps of a stage in this run."""
        return max(2, round(self.scale * stage.steps))

    def autocast(self) -> torch.autocast:
        """The context of all passes through the networks."""
        # A graph cannot record the use of cached copies of the weights.
        return torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16, cache_enabled=False)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of the current stage, by name; all others are frozen."""
        self.model.requires_grad_(False)
        for name in self.stages[self.stage].modules:
            self.model.get_submodule(name).requires_grad_(True)
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self) -> None:
        """Write the checkpoint."""
        state = {key: getattr(self, key) for key in STATE}
        records = [asdict(record) for record in self.records]
        state["computed"] = self.device.type, str(self.dtype).removeprefix("torch.")
        with atomic_write(self.path) as part, open(part, "wb") as file:
            torch.save({**self.identity, **state, "records": records, "model": self.model.state_dict()}, file)


def begin(
    config: SVDConfig,
    folder: Path,
    out: Path,
    seed: int,
    scale: float,
    names: Sequence[str] | None = None,
    settings: PretrainSettings = DEFAULT,
    device: torch.device = CPU,
    jobs: int = 1,
) -> Run:
    """The run in `folder` as it was saved on any device, or a new one through the stages `names` (default: all).

    A new run starts from the model in `out` if `names` lacks the first stage. Raises InputError if the sizes are
    impossible, a folder cannot be written to, `folder` holds another run, or `out` no model of these sizes.
    """
    check_sizes(config)
    for place, files in ((folder, ["checkpoint.pt"]), (out, [f"{config.name}.safetensors", *OTHER_FILES])):
        make_folder(place)
        for file in files:
            check_writable(place / file)
    torch.manual_seed(seed)
    stages = tuple(stage for stage in settings.stages if names is None or stage.name in names)
    model = PretrainModel(config).to(device)
    run = Run(config, settings, folder, out, seed, scale, model, device, faster_dtype(device), stages, jobs)
    if not run.path.exists():
        if stages[0] != settings.stages[0]:
            take_up(run)
        return run
    try:
        saved = torch.load(require_file(run.path), map_location="cpu", weights_only=True)
        found = {key: saved[key] for key in run.identity}
        if found == run.identity:
            restore(run, saved)
        numbers = {key: found[key] for key in ("seed", "scale", "lr", "batch")}
        require(all(type(value) in (int, float) for value in numbers.values()), "numbers")
        require(all(type(found[key]) is str for key in ("config", "stages")), "texts")
        options = " ".join(f"--{key} {value}" for key, value in numbers.items())
        other = printable(f"{options} --stages {found['stages']}", 200)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise InputError(f"{run.path}: not a checkpoint of minimti.pretrain; name another --run") from error
    if found != run.identity:
        raise InputError(f"{folder}: holds a run of {other}, or of other sizes; name another --run")
    return run


def take_up(run: Run) -> None:
    """Start a run from the model in its `out`. Raises InputError if there is none, or it has other sizes."""
    path = run.out / f"{run.config.name}.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; name the model's folder as --out, or train from the first stage")
    checkpoint = open_checkpoint(str(path))
    if checkpoint.config != run.config:
        raise InputError(f"{checkpoint.path}: of other sizes; train it from its first stage")
    svd = pipeline.load(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    run.model.svd.load_state_dict(svd.state_dict())
    words = captions.load(run.out / "words.safetensors")
    try:
        run.model.words.load_state_dict(words.state_dict())
        run.history = json.loads(checkpoint.tensors.metadata["stages"])
        check_history(run.history)
    except Exception as error:  # the file is damaged, or another program wrote it
        raise InputError(f"{run.out}: no model that minimti.pretrain wrote; train it from its first stage") from error


# ---------------------------------------------------------------------------------------------- damaged files


def restore(run: Run, saved: dict[str, Any]) -> None:
    """The state of a checkpoint becomes that of the run.

    The tensors of the optimisers are taken; their constants come from the settings. On a device of the same type the
    precision stays. Raises ValueError, or what a wrong type raises, where it is no state that a run can have.
    """
    device, dtype = saved.get("computed", ("", ""))  # a run of 0.5.0 has none
    require(dtype in ("", "float32", "bfloat16"), "dtype")
    if device == run.device.type:
        run.dtype = getattr(torch, dtype)
    run.model.load_state_dict(saved["model"])
    run.records = [Record(**record) for record in saved["records"]]
    for key in STATE:
        setattr(run, key, saved[key])
    require(type(run.stage) is int and 0 <= run.stage <= len(run.stages), "stage")
    planned = [run.steps(stage) for stage in run.stages]
    steps = planned[run.stage] if run.stage < len(planned) else 0
    require(type(run.step) is int and 0 <= run.step <= steps, "step")
    require(all(tensor.isfinite().all() for tensor in run.model.state_dict().values()), "model")
    check_history(run.history)
    begun = len(run.records) - run.stage  # 0 or 1; a stage that is stopped before its first step has a record too
    require(begun == 1 or (begun == 0 and run.step == 0), "records")
    for record, length in zip(run.records, [*planned[: run.stage], run.step]):
        numbers = [*record.losses, record.seconds, 0.0 if record.psnr is None else record.psnr]
        require(type(record.losses) is list and len(record.losses) == length, "losses")
        require(all(type(number) is float and math.isfinite(number) for number in numbers), "record")
        require(type(record.hardware) is list and all(type(name) is str for name in record.hardware), "hardware")
    if run.step == 0:  # averages and optimisers begin with the stage
        return
    trainable = run.trainable()
    run.ema = {name: dense(run.ema[name], p.shape).to(p.device) for name, p in trainable.items()}
    optimisers = make_optimisers(trainable, run.settings)
    require(len(run.optimisers) == len(optimisers), "optimisers")
    for optimiser, kept, names in zip(optimisers, run.optimisers, OPTIMISER_STATES):
        params, state = optimiser.param_groups[0]["params"], kept["state"]
        for index, tensors in state.items():
            require(type(index) is int and 0 <= index < len(params) and tensors.keys() == names, "optimiser")
            for name, tensor in tensors.items():
                tensors[name] = dense(tensor, torch.Size() if name == "step" else params[index].shape)
        kept["param_groups"] = optimiser.state_dict()["param_groups"]


def check_history(history: Any) -> None:
    """Raises ValueError, or what a wrong type raises, for anything but rows of the card."""
    require(type(history) is list, "history")
    for row in history:
        require(row.keys() == COLUMNS and all(type(value) in (str, int, float) for value in row.values()), "row")
        require(type(row["minutes"]) in (int, float), "minutes")


def dense(tensor: Any, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy of a tensor. Raises ValueError where its kind, shape or dtype is another, or it is not finite."""
    require(type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_meta, "a dense tensor")
    require(tensor.shape == shape and tensor.dtype == dtype and bool(tensor.isfinite().all()), f"{dtype} {list(shape)}")
    return tensor.clone()


def require(condition: bool, what: str) -> None:
    """Raises ValueError with `what` where the condition is not met."""
    if not condition:
        raise ValueError(what)
