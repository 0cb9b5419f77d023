"""A pre-training run: the training loop, its state on disk, and the files that it leaves.

The run goes through the stages in which SVD was made (stages.py). If it is stopped, the same command resumes it. The
data of a step depends only on seed, stage and step, so the result is bit-identical to that of an uninterrupted run
(given the same number of PyTorch threads). With `--stages`, a run trains a finished model further in some stages only.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minimti import hardware, pipeline, signals
from minimti.checkpoint.key_maps import official_source
from minimti.checkpoint.load import open_checkpoint, sources
from minimti.config import SVDConfig, printable, to_json
from minimti.io import write
from minimti.io.files import InputError, atomic_write, check_writable, make_folder, require_file
from minimti.jobs import in_processes
from minimti.muon import Muon, is_matrix
from minimti.networks.graph import Graphed
from minimti.pretrain.card import Record, Row, card, rows
from minimti.pretrain.stages import (
    STAGES,
    Batch,
    DrawnClips,
    EncodedClips,
    PretrainModel,
    Stage,
    draw_clips,
    encode_clips,
    gaussian,
    latent_shape,
    normalise_latents,
)
from minimti.world import captions
from minimti.world.clips import SCENES, check_sizes, pixels
from minimti.world.scene import WORDS, Scene, render

STATE = ("stage", "step", "history", "ema", "optimisers")  # fields of Run in its checkpoint
OPTIMISER_STATES = (
    {"momentum"},
    {"step", "exp_avg", "exp_avg_sq"},
)  # names for a parameter, in `make_optimisers`' order
COLUMNS = {"command", "stage", "steps", "batch", "minutes", "loss", "held-out PSNR", "on"}  # names in a row of the card
CPU = torch.device("cpu")
FETCH_EVERY = 25  # steps between two fetches of losses from a GPU, which makes it wait
ENCODED, HELD_OUT = 10**6, 2 * 10**6  # take the place of a stage's number in the seeds of other generators


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


def generator(*numbers: int) -> np.random.Generator:
    """A random generator, seeded by a tuple of numbers."""
    return np.random.default_rng(numbers)


def faster_dtype(device: torch.device) -> torch.dtype:
    """bf16 if the device multiplies matrices faster in it, else fp32."""
    faster = device.type == "cuda" or (device.type == "cpu" and hardware.bf16_speedup() > 1.3)
    return torch.bfloat16 if faster else torch.float32


# ---------------------------------------------------------------------------------------------- the state of a run


@dataclass
class Run:
    """The state of a pre-training. Step, averaged weights and optimisers are those of the current stage."""

    config: SVDConfig
    settings: PretrainSettings
    folder: Path
    seed: int
    scale: float
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
    """The run in `folder` as it was saved on any device, or a new one.

    A new run starts from the model in `out` if `names` lacks the first stage. Raises InputError if `folder` holds
    another run, or `out` no model of these sizes.
    """
    torch.manual_seed(seed)
    stages = tuple(stage for stage in settings.stages if names is None or stage.name in names)
    model = PretrainModel(config).to(device)
    run = Run(config, settings, folder, seed, scale, model, device, faster_dtype(device), stages, jobs)
    if not run.path.exists():
        if stages[0] != settings.stages[0]:
            take_up(run, out)
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


def take_up(run: Run, out: Path) -> None:
    """Start a run from the model in `out`. Raises InputError if there is none, or it has other sizes."""
    checkpoint = open_checkpoint(str(out / f"{run.config.name}.safetensors"))
    if checkpoint.config != run.config:
        raise InputError(f"{checkpoint.path}: of other sizes; train it from its first stage")
    svd = pipeline.load(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    run.model.svd.load_state_dict(svd.state_dict())
    words = captions.load(out / "words.safetensors")
    try:
        run.model.words.load_state_dict(words.state_dict())
        run.history = json.loads(checkpoint.tensors.metadata["stages"])
        check_history(run.history)
    except Exception as error:  # the file is damaged, or another program wrote it
        raise InputError(f"{out}: no model that minimti.pretrain wrote; train it from its first stage") from error


# ---------------------------------------------------------------------------------------------- damaged files


def restore(run: Run, saved: dict[str, Any]) -> None:
    """The state of a checkpoint becomes that of the run.

    Of the optimisers the tensors are taken; their constants are those of the settings. Raises ValueError, or what a
    wrong type raises, where it is no state that a run can have.
    """
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


# ---------------------------------------------------------------------------------------------- training


def learning_rate(settings: PretrainSettings, step: int, steps: int, decays: bool) -> float:
    """The learning rate of a step: rising, then constant, or falling to 0 over the second half if it decays."""
    warm_up = min(settings.warm_up, steps // 4 + 1)
    return settings.lr * min(1, (step + 1) / warm_up, 2 * (1 - step / steps) if decays else 1)


def make_optimisers(trainable: dict[str, nn.Parameter], settings: PretrainSettings) -> list[torch.optim.Optimizer]:
    """Muon for matrices; AdamW for all else: biases, norms, embeddings, layers to and from few channels."""
    matrices = [p for name, p in trainable.items() if is_matrix(name, p)]
    others = [p for name, p in trainable.items() if not is_matrix(name, p)]
    adam = torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay)
    return [Muon(matrices, lr=settings.lr, weight_decay=settings.weight_decay), adam]


def encoded_clips(run: Run, kind: str, check: Callable[[], None]) -> EncodedClips:
    """All encoded clips of a kind, from files in the run's folder; missing files are made first."""
    count = max(1, round(run.scale * run.settings.num_chunks[kind]))
    make_folder(run.folder / "encoded")
    paths = [run.folder / "encoded" / f"{kind}-{i:04}.pt" for i in range(count)]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    arguments = [(run.config, kind, run.seed, i, run.settings.chunk) for i in missing]
    before = time.perf_counter()
    with closing(in_processes(draw_chunk, arguments, run.jobs)) as drawings:
        for i, drawn in tqdm(drawings, f"encode {kind}", len(missing), mininterval=1):
            check()
            with run.autocast():
                chunk = encode_clips(run.model, drawn)
            now = time.perf_counter()
            with atomic_write(paths[i]) as part, open(part, "wb") as file:
                torch.save({"seconds": now - before, "tensors": vars(chunk)}, file)
            before = now
    seconds, parts = zip(*(read_encoded(run, path) for path in paths))
    run.encoding_seconds[kind] = sum(seconds)
    return EncodedClips(*(torch.cat(tensors) for tensors in zip(*parts)))


def draw_chunk(config: SVDConfig, kind: str, seed: int, i: int, num_scenes: int) -> tuple[int, DrawnClips]:
    """The clips number i of a kind, with i."""
    return i, draw_clips(config, kind, generator(seed, ENCODED + list(SCENES).index(kind), i), num_scenes)


def read_encoded(run: Run, path: Path) -> tuple[float, list[Tensor]]:
    """The seconds that encoding took, and the tensors of an EncodedClips. Raises InputError for a damaged file."""
    config, n = run.config, 2 * run.settings.chunk
    latent = latent_shape(config)
    shapes = {
        "latents": (n, config.num_frames, *latent),
        "image": (n, *latent),
        "embedding": (n, config.image_encoder.embed_dim),
        "words": (n, captions.NUM_SLOTS),
    }
    try:
        saved = torch.load(require_file(path), map_location="cpu", weights_only=True)
        seconds, tensors = saved["seconds"], saved["tensors"]
        require(type(seconds) is float and math.isfinite(seconds) and tensors.keys() == shapes.keys(), "fields")
        dtypes = {name: torch.int64 if name == "words" else torch.float16 for name in shapes}
        found = [dense(tensors[name], torch.Size(shape), dtypes[name]) for name, shape in shapes.items()]
        require(0 <= int(found[-1].min()) and int(found[-1].max()) < len(WORDS), "words")
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise InputError(f"{path}: no encoded clips of this run; delete it, and it is made again") from error
    return seconds, found


class Gradients:
    """The loss of a stage, and its gradients. On CUDA they are recorded, once for each kind of batch."""

    def __init__(self, run: Run, params: Sequence[nn.Parameter]):
        self.run, self.params = run, params
        self.functions: dict[tuple[torch.Size, ...], Callable[..., tuple[Tensor, ...]]] = {}  # by shapes of the batch
        self.used: dict[tuple[torch.Size, ...], list[nn.Parameter]] = {}  # the parameters that get a gradient

    def __call__(self, batch: Batch) -> Tensor:
        """The loss; the gradients are those of the parameters, None where the batch has no use for one."""
        device, shapes = self.run.device, tuple(tensor.shape for tensor in batch)
        if shapes not in self.functions:
            self.functions[shapes] = Graphed(self.compute) if device.type == "cuda" else self.compute
        if device.type == "cuda":  # a copy from pinned memory does not wait for the steps before
            batch = tuple(tensor.pin_memory() for tensor in batch)
        loss, *grads = self.functions[shapes](*(tensor.to(device, non_blocking=True) for tensor in batch))
        for p, grad in zip(self.used[shapes], grads):
            p.grad = grad
        return loss

    def compute(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """The loss and the gradients of the parameters that the batch uses."""
        with self.run.autocast():
            loss = self.run.stages[self.run.stage].loss(self.run.model, *batch)
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        found = [(p, grad) for p, grad in zip(self.params, grads) if grad is not None]
        self.used[tuple(tensor.shape for tensor in batch)] = [p for p, _ in found]
        return loss.detach(), *(grad for _, grad in found)


def train(run: Run, check: Callable[[], None]) -> None:
    """Train the current stage from its current step to its end; leaves the averaged weights in the model.

    Raises FloatingPointError if the loss is not finite, KeyboardInterrupt if `check` does, after saving.
    """
    settings, stage = run.settings, run.stages[run.stage]
    if len(run.records) == run.stage:
        run.records.append(Record())
    record = run.records[run.stage]
    number, steps, trainable = settings.stages.index(stage), run.steps(stage), run.trainable()
    if (machine := hardware.describe(run.dtype, run.device)) not in record.hardware:
        record.hardware.append(machine)
    clips = {kind: encoded_clips(run, kind, check) for kind in stage.clips}
    optimisers = make_optimisers(trainable, settings)
    if run.step:
        for optimiser, state in zip(optimisers, run.optimisers):
            optimiser.load_state_dict(state)
    else:
        run.ema = {name: p.detach().clone() for name, p in trainable.items()}

    gradients = Gradients(run, [*trainable.values()])
    unfetched: list[Tensor] = []
    fetch_every = 1 if run.device.type == "cpu" else FETCH_EVERY

    def fetch() -> None:
        losses = torch.stack(unfetched).tolist() if unfetched else []
        unfetched.clear()
        for loss in losses:
            if not math.isfinite(loss):
                raise FloatingPointError(f"stage {stage.name}: the loss of step {len(record.losses) + 1} is not finite")
            record.losses.append(loss)

    def save() -> None:
        fetch()
        run.optimisers = [optimiser.state_dict() for optimiser in optimisers]
        run.save()

    started = saved = time.perf_counter()
    progress = tqdm(total=steps, initial=run.step, desc=stage.name, mininterval=1)
    try:
        while run.step < steps:
            check()
            batch = stage.draw(run.config, clips, generator(run.seed, number, run.step), stage.batch)
            unfetched.append(gradients(batch))
            if len(unfetched) == fetch_every:
                fetch()
            nn.utils.clip_grad_norm_(trainable.values(), settings.clip_norm)
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(settings, run.step, steps, stage.decays)
                optimiser.step()
                optimiser.zero_grad()
            with torch.no_grad():
                decay = min(settings.ema, (1 + run.step) / (10 + run.step))  # short averages at first
                torch._foreach_lerp_(list(run.ema.values()), list(trainable.values()), 1 - decay)
            run.step += 1
            progress.update()
            progress.set_postfix(loss=f"{np.mean(record.losses[-50:] or [math.nan]):.4f}", refresh=False)
            now = time.perf_counter()
            record.seconds, started = record.seconds + now - started, now
            if now - saved > settings.save_seconds:
                save()
                saved = now
        save()
    except KeyboardInterrupt:
        save()
        raise
    finally:
        progress.close()
        gradients.functions.clear()  # the memory of their graphs
    with torch.no_grad():
        for name, p in trainable.items():
            p.copy_(run.ema[name])


# ---------------------------------------------------------------------------------------------- after a stage


def held_out(run: Run, kind: str, count: int) -> list[Scene]:
    """Scenes of a kind that no stage is trained on."""
    return [SCENES[kind](generator(run.seed, HELD_OUT, i), run.config) for i in range(count)]


@torch.no_grad()
def finish_autoencoder(run: Run) -> None:
    """Measure the reconstruction of held-out clips and draw some; first, after "frames", normalise the latents."""
    svd, name, settings = run.model.svd, run.stages[run.stage].name, run.settings
    scenes = held_out(run, "captions", settings.measured + settings.normalised)
    clips = torch.stack([pixels(render(scene)) for scene in scenes]).to(run.device)  # [n, F, 3, H, W]
    if name == "frames":
        with run.autocast():
            frames = clips[settings.measured :, ::4].flatten(0, 1)  # [(clips F/4), 3, H, W]
            normalise_latents(svd.vae, frames)
    clips = clips[: settings.measured]
    with run.autocast():
        out = torch.cat([svd.decode(svd.encode(clip[None])) for clip in clips]).float().clamp(-1, 1)
    run.records[run.stage].psnr = -10 * ((out - clips) / 2).square().mean().log10().item()
    pairs = torch.stack([clips[: settings.shown], out[: settings.shown]], dim=1)
    write.write_strip(run.folder / f"{name}.png", pairs.flatten(0, 1))  # [2 shown, F, 3, H, W]


@torch.no_grad()
def show_samples(run: Run) -> None:
    """Draw held-out clips, each above a sample that is given its first frame and its caption (or its embedding)."""
    svd, config, name = run.model.svd, run.config, run.stages[run.stage].name
    scenes = held_out(run, "habits" if name == "images" else "captions", run.settings.shown)
    clips = torch.stack([pixels(render(scene)) for scene in scenes]).to(run.device)  # [n, F, 3, H, W]
    noise = torch.Generator().manual_seed(run.seed)
    with run.autocast():
        if name == "images":
            tokens = svd.tokens_of(clips[:, 0], config.num_frames)
        else:
            tokens = captions.caption_tokens(run.model.words, [s.program for s in scenes], config.num_frames)
        cond = svd.prepare(clips[:, 0], tokens, config.micro, noise)
        n = gaussian(generator(run.seed, HELD_OUT), *cond.concat.shape).to(run.device)
        *_, x = svd.sample(cond, n, config.num_steps, run.settings.shown_guidance)
        out = svd.decode(x)
    pairs = torch.stack([clips, out], dim=1)
    write.write_strip(run.folder / f"{name}.png", pairs.flatten(0, 1))  # [2 shown, F, 3, H, W]


FINISH = {
    "frames": finish_autoencoder,
    "clips": finish_autoencoder,
    "captions": show_samples,
    "images": show_samples,
}


def write_model(run: Run, out: Path) -> None:
    """Write the files of a model, in half precision: the SVD in the official layout, the captions, and the card."""
    make_folder(out)
    svd, tensors = run.model.svd, {}
    values = svd.state_dict()
    for key, source in sources(svd, official_source, run.config).items():
        (name,) = source.names
        tensors[name] = values[key].reshape(source.shape).half().contiguous().cpu()
    with atomic_write(out / f"{run.config.name}.safetensors") as part:
        save_file(tensors, part, {"config": to_json(run.config), "stages": json.dumps(run.rows)})
    captions.save(run.model.words, out / "words.safetensors")
    with atomic_write(out / "card.md") as part:
        part.write_text(card(svd, run.rows))


def pretrain(
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
    """Go through the stages `names` (default: all) that the run in `folder` has not done; write the model to `out`.

    `scale` multiplies the steps of all stages; `jobs` processes draw clips. The model is written after every stage.
    Raises InputError if the sizes are impossible, `folder` holds another run, or `out` lacks the model to start from;
    KeyboardInterrupt when stopped, after saving; FloatingPointError if a loss is not finite.
    """
    check_sizes(config)
    for place in (folder, out):
        make_folder(place)
        check_writable(place / "checkpoint.pt")
    run = begin(config, folder, out, seed, scale, names, settings, device, jobs)
    with signals.held() as check:
        while run.stage < len(run.stages):
            name = run.stages[run.stage].name
            train(run, check)
            if name in FINISH:
                FINISH[name](run)
            write_model(run, out)
            run.stage, run.step, run.ema, run.optimisers = run.stage + 1, 0, {}, []
            run.save()
            record = run.records[run.stage - 1]
            psnr = "" if record.psnr is None else f", held-out PSNR {record.psnr:.1f} dB"
            tqdm.write(f"{name}: {len(record.losses)} steps, {record.seconds / 60:.1f} minutes{psnr}")
    return run
