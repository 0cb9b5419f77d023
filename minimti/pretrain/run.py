"""Pre-trains the embedded model on the procedural world:  python -m minimti.pretrain

It goes through the stages in which SVD was made (stages.py). Whenever it is stopped, the same command goes on where it
was: what a step sees depends on seed, stage and step alone, so the result is that of a run never stopped, to the last
bit where PyTorch has as many threads. With --stages a run trains a finished model further, in some stages only.
"""

import json
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minimti import __version__, cli, pipeline
from minimti.checkpoint.key_maps import official_source
from minimti.checkpoint.load import open_checkpoint, sources
from minimti.config import SVDConfig, to_json
from minimti.io import video
from minimti.io.files import InputError, atomic_write, check_writable, make_folder, require_file
from minimti.muon import Muon, is_matrix
from minimti.pretrain.stages import (
    CHUNK,
    CHUNKS,
    STAGES,
    Library,
    PretrainModel,
    Stage,
    encoded,
    gaussian,
    normalise_latents,
)
from minimti.world import captions
from minimti.world.clips import SCENES, check_sizes, pixels
from minimti.world.scene import render

NAMES = [stage.name for stage in STAGES]
STATE = ("stage", "step", "history", "ema", "optimisers")

LR = 1e-3
WEIGHT_DECAY = 0.01
WARM_UP = 100  # steps
CLIP_NORM = 1.0
EMA = 0.999
SAVE_SECONDS = 120
ENCODED, HELD_OUT = 10**6, 2 * 10**6  # in place of a stage's number, where a generator is not for its steps
MEASURED, NORMALISED = 16, 64  # held-out clips: those whose reconstruction counts, those for the latents' scale
SHOWN = 4  # of the measured, in a strip
SHOWN_GUIDANCE = (2.0, 2.0)


def generator(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(numbers)


# ---------------------------------------------------------------------------------------------- what can be trained


def faster_dtype() -> torch.dtype:
    """bf16 where this machine multiplies matrices faster in it, else fp32: without AMX or AVX-512 it is far slower."""
    return torch.bfloat16 if cli.bf16_speedup() > 1.3 else torch.float32


def hardware(dtype: torch.dtype) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another operating system, or a processor that does not tell
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, {str(dtype).removeprefix('torch.')}"


# ---------------------------------------------------------------------------------------------- the state of a run


@dataclass
class Record:
    """What the card says of a stage."""

    losses: list[float] = field(default_factory=list)  # of every step
    seconds: float = 0.0
    hardware: list[str] = field(default_factory=list)
    psnr: float | None = None  # dB, of held-out frames


@dataclass
class Run:
    """A pre-training as far as it has come; step, averaged weights and optimisers are the current stage's."""

    config: SVDConfig
    folder: Path
    seed: int
    scale: float
    model: PretrainModel
    dtype: torch.dtype
    stages: tuple[Stage, ...]  # to go through
    stage: int = 0
    step: int = 0
    history: list[dict] = field(default_factory=list)  # rows of the card from the runs before
    ema: dict[str, Tensor] = field(default_factory=dict)
    optimisers: list[dict] = field(default_factory=list)  # their states
    records: list[Record] = field(default_factory=list)  # of the stages so far
    encoding: dict[str, float] = field(default_factory=dict)  # seconds by library, of those in use

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def identity(self) -> dict:
        names = " ".join(stage.name for stage in self.stages)
        return {"config": to_json(self.config), "seed": self.seed, "scale": self.scale, "stages": names}

    @property
    def options(self) -> str:
        """What of the command line makes the run what it is."""
        every = len(self.stages) == len(STAGES)
        return f"--seed {self.seed} --scale {self.scale:g}" + ("" if every else f" --stages {self.identity['stages']}")

    def steps(self, stage: Stage) -> int:
        return max(2, round(self.scale * stage.steps))

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def learning(self) -> dict[str, nn.Parameter]:
        """The parameters of the current stage, by name; all others are frozen."""
        self.model.requires_grad_(False)
        for name in self.stages[self.stage].learns:
            self.model.get_submodule(name).requires_grad_(True)
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self) -> None:
        state = {key: getattr(self, key) for key in STATE}
        records = [asdict(record) for record in self.records]
        with atomic_write(self.path) as part:
            torch.save({**self.identity, **state, "records": records, "model": self.model.state_dict()}, part)


def begin(config: SVDConfig, folder: Path, out: Path, seed: int, scale: float, names: Sequence[str]) -> Run:
    """The run in a folder, as it was saved, or a new one, on the model in `out` unless the first stage is among its.

    Raises InputError where another run lives there, or no model of such sizes in `out`.
    """
    torch.manual_seed(seed)
    stages = tuple(stage for stage in STAGES if stage.name in names)
    run = Run(config, folder, seed, scale, PretrainModel(config), faster_dtype(), stages)
    if not run.path.exists():
        if stages[0] != STAGES[0]:
            take_up(run, out)
        return run
    try:
        saved = torch.load(require_file(run.path), map_location="cpu", weights_only=True)
        theirs = {key: saved[key] for key in run.identity}
        if theirs == run.identity:
            run.model.load_state_dict(saved["model"])
            run.records = [Record(**record) for record in saved["records"]]
            for key in STATE:
                setattr(run, key, saved[key])
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise InputError(f"{run.path}: not a checkpoint of minimti.pretrain; name another --run") from error
    if theirs != run.identity:
        raise InputError(
            f"{folder}: holds a run of --seed {theirs['seed']} --scale {theirs['scale']:g}"
            f" --stages {theirs['stages']}, or of other sizes; name another --run"
        )
    return run


def take_up(run: Run, out: Path) -> None:
    """Fills a run with the model that another one left in `out`."""
    checkpoint = open_checkpoint(str(out / f"{run.config.name}.safetensors"))
    if checkpoint.config != run.config:
        raise InputError(f"{checkpoint.path}: of other sizes; train it from its first stage")
    run.model.svd.load_state_dict(pipeline.load(checkpoint, torch.device("cpu"), torch.float32).state_dict())
    run.model.words.load_state_dict(captions.load(out / "words.safetensors").state_dict())
    with safe_open(checkpoint.path, framework="pt") as file:
        run.history = json.loads(file.metadata()["stages"])


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C and the like wait: the callable raises KeyboardInterrupt if one has come."""
    asked = []

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    with cli.on_stop(lambda *_: asked.append(True), signal.SIGINT):
        yield check


# ---------------------------------------------------------------------------------------------- training


def learning_rate(step: int, steps: int, settles: bool) -> float:
    """LR after a warm-up; falling linearly over the second half where the stage settles."""
    warm_up = min(WARM_UP, steps // 4 + 1)
    return LR * min(1, (step + 1) / warm_up, 2 * (1 - step / steps) if settles else 1)


def optimisers_of(learning: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for matrices; AdamW for what is left: biases, norms, embeddings, layers to and from few channels."""
    matrices = [p for name, p in learning.items() if is_matrix(name, p)]
    others = [p for name, p in learning.items() if not is_matrix(name, p)]
    adam = torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    return [Muon(matrices, lr=LR, weight_decay=WEIGHT_DECAY), adam]


def library(run: Run, kind: str, check: Callable[[], None]) -> Library:
    """The encoded clips of a kind, from the run's folder; what is not there yet is encoded first."""
    parts, count = [], max(1, round(run.scale * CHUNKS[kind]))
    make_folder(run.folder / "encoded")
    run.encoding[kind] = 0.0
    for i in tqdm(range(count), desc=f"encode {kind}", mininterval=1):
        path = run.folder / "encoded" / f"{kind}-{i:04}.pt"
        if not path.exists():
            check()
            start = time.perf_counter()
            with run.autocast():
                chunk = encoded(run.model, kind, generator(run.seed, ENCODED + list(SCENES).index(kind), i), CHUNK)
            with atomic_write(path) as part:
                torch.save({"seconds": time.perf_counter() - start, "tensors": vars(chunk)}, part)
        saved = torch.load(path, weights_only=True)
        run.encoding[kind] += saved["seconds"]
        parts.append(saved["tensors"].values())
    return Library(*(torch.cat(tensors) for tensors in zip(*parts)))


def train(run: Run, check: Callable[[], None]) -> None:
    """The current stage from its current step to its end; leaves the averaged weights in the model.

    Raises FloatingPointError where the loss is not finite.
    """
    stage = run.stages[run.stage]
    if len(run.records) == run.stage:
        run.records.append(Record())
    record = run.records[run.stage]
    number, steps, learning = NAMES.index(stage.name), run.steps(stage), run.learning()
    if (place := hardware(run.dtype)) not in record.hardware:
        record.hardware.append(place)
    libraries = {kind: library(run, kind, check) for kind in stage.needs}
    optimisers = optimisers_of(learning)
    if run.step:
        for optimiser, state in zip(optimisers, run.optimisers):
            optimiser.load_state_dict(state)
    else:
        run.ema = {name: p.detach().clone() for name, p in learning.items()}

    def save() -> None:
        run.optimisers = [optimiser.state_dict() for optimiser in optimisers]
        run.save()

    started = saved = time.perf_counter()
    progress = tqdm(total=steps, initial=run.step, desc=stage.name, mininterval=1)
    try:
        while run.step < steps:
            check()
            with run.autocast():
                loss = stage.loss(run.model, libraries, generator(run.seed, number, run.step), stage.batch)
            if not loss.isfinite():
                raise FloatingPointError(f"stage {stage.name}: the loss of step {run.step + 1} is not finite")
            loss.backward()
            nn.utils.clip_grad_norm_(learning.values(), CLIP_NORM)
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(run.step, steps, stage.settles)
                optimiser.step()
                optimiser.zero_grad()
            with torch.no_grad():
                decay = min(EMA, (1 + run.step) / (10 + run.step))
                torch._foreach_lerp_(list(run.ema.values()), list(learning.values()), 1 - decay)
            run.step += 1
            record.losses.append(loss.item())
            progress.update()
            progress.set_postfix(loss=f"{np.mean(record.losses[-50:]):.4f}", refresh=False)
            now = time.perf_counter()
            record.seconds, started = record.seconds + now - started, now
            if now - saved > SAVE_SECONDS:
                save()
                saved = now
    except KeyboardInterrupt:
        save()
        raise
    finally:
        progress.close()
    save()
    with torch.no_grad():
        for name, p in learning.items():
            p.copy_(run.ema[name])


# ---------------------------------------------------------------------------------------------- what a stage leaves


def held_out(run: Run, kind: str, count: int) -> list:
    return [SCENES[kind](generator(run.seed, HELD_OUT, i), run.config) for i in range(count)]


@torch.no_grad()
def finish_autoencoder(run: Run) -> None:
    """Measures the reconstruction of held-out clips, and shows some."""
    svd, name = run.model.svd, run.stages[run.stage].name
    clips = torch.stack([pixels(render(scene)) for scene in held_out(run, "captions", MEASURED + NORMALISED)])
    if name == "frames":
        with run.autocast():
            normalise_latents(svd.vae, clips[MEASURED:, ::4].flatten(0, 1))
    clips = clips[:MEASURED]
    with run.autocast():
        out = torch.cat([svd.decode(svd.encode(clip[None])) for clip in clips]).float().clamp(-1, 1)
    run.records[run.stage].psnr = -10 * ((out - clips) / 2).square().mean().log10().item()
    rows = torch.stack([clips[:SHOWN], out[:SHOWN]], dim=1).flatten(0, 1)
    video.write_strip(run.folder / f"{name}.png", rows)


@torch.no_grad()
def show_samples(run: Run) -> None:
    """Held-out clips, each above what the model makes of its first frame and its caption or habit."""
    svd, config, name = run.model.svd, run.config, run.stages[run.stage].name
    scenes = held_out(run, "habits" if name == "images" else "captions", SHOWN)
    clips = torch.stack([pixels(render(scene)) for scene in scenes])
    noise = torch.Generator().manual_seed(run.seed)
    with run.autocast():
        if name == "images":
            tokens = svd.tokens_of(clips[:, 0], config.num_frames)
        else:
            tokens = captions.caption_tokens(run.model.words, [s.program for s in scenes], config.num_frames)
        cond = svd.prepare(clips[:, 0], tokens, config.micro, noise)
        n = gaussian(generator(run.seed, HELD_OUT), tuple(cond.concat.shape))
        *_, x = svd.sample(cond, n, config.num_steps, SHOWN_GUIDANCE)
        out = svd.decode(x)
    video.write_strip(run.folder / f"{name}.png", torch.stack([clips, out], dim=1).flatten(0, 1))


def write_model(run: Run, out: Path) -> None:
    """The inference files, in half precision: the model in the official layout, its words, and the card."""
    make_folder(out)
    svd, tensors = run.model.svd, {}
    values = svd.state_dict()
    for key, source in sources(svd, official_source, run.config).items():
        (name,) = source.names
        tensors[name] = values[key].reshape(source.shape).half().contiguous()
    with atomic_write(out / f"{run.config.name}.safetensors") as part:
        save_file(tensors, part, {"config": to_json(run.config), "stages": json.dumps(rows(run))})
    captions.save(run.model.words, out / "words.safetensors")
    with atomic_write(out / "README.md") as part:
        part.write_text(card(run))


def rows(run: Run) -> list[dict]:
    """What the card says of every stage done so far, in this run and in those it took up."""
    done, encoding = [], dict(run.encoding)
    for stage, record in zip(run.stages, run.records):
        share = max(1, len(record.losses) // 20)
        seconds = record.seconds + sum(encoding.pop(kind, 0.0) for kind in stage.needs)
        first, last = np.mean(record.losses[:share]), np.mean(record.losses[-share:])
        done.append(
            {
                "command": f"python -m minimti.pretrain {run.options}",
                "stage": f"{stage.name}: {stage.teaches}",
                "steps": len(record.losses),
                "batch": stage.batch,
                "minutes": round(seconds / 60, 1),
                "loss": f"{first:.4f} to {last:.4f}",
                "held-out PSNR": "" if record.psnr is None else f"{record.psnr:.1f} dB",
                "on": "; ".join(record.hardware),
            }
        )
    return run.history + done


def card(run: Run) -> str:
    svd, table = run.model.svd, rows(run)
    commands = dict.fromkeys(f"`{row['command']}`" for row in table)
    millions = {
        part: sum(p.numel() for p in getattr(svd, part).parameters()) / 1e6 for part in ("unet", "vae", "image_encoder")
    }
    shown = [key for key in table[0] if key != "command"]
    (width, height), vae = run.config.size, run.config.vae
    cell = 2 ** (len(vae.ch_mult) - 1)
    return "\n".join(
        [
            f"# The embedded model `{run.config.name}`",
            "",
            "Stable Video Diffusion's networks at small sizes, pre-trained from nothing on the procedural world"
            " (`minimti/world.py`). It knows ten sprites and twelve words, and no photograph.",
            "",
            f"- made with: {', then '.join(commands)} (minimti {__version__}, PyTorch {torch.__version__})",
            f"- time: {sum(row['minutes'] for row in table) / 60:.2f} hours, encoding clips ahead included",
            f"- clips: {run.config.num_frames} frames of {width}x{height}; latents of {vae.z_channels} channels in"
            f" cells of {cell}x{cell} pixels (SVD's: 4 in cells of 8x8)",
            f"- parameters: UNet {millions['unet']:.2f} M, autoencoder {millions['vae']:.2f} M, image tower"
            f" {millions['image_encoder']:.2f} M; averaged over training, stored in fp16",
            "- files: the model in the layout of Stability's `svd.safetensors`, and `words.safetensors`, the table of"
            " words that captions are made of",
            "",
            "Losses are means over the first and the last twentieth of the steps.",
            "",
            f"| {' | '.join(shown)} |",
            f"|{'---|' * len(shown)}",
            *(f"| {' | '.join(str(row[key]) for key in shown)} |" for row in table),
            "",
        ]
    )


FINISH = {
    "frames": finish_autoencoder,
    "clips": finish_autoencoder,
    "captions": show_samples,
    "images": show_samples,
}


def pretrain(config: SVDConfig, folder: Path, out: Path, seed: int, scale: float, names: Sequence[str] = NAMES) -> Run:
    """The stages `names` that a run in `folder` has not yet done. After each, `out` holds the model as it then is.

    Raises InputError where the sizes are impossible, the folder holds another run or `out` no model to start on,
    KeyboardInterrupt when asked to stop, after saving.
    """
    check_sizes(config)
    for place in (folder, out):
        make_folder(place)
        check_writable(place / "checkpoint.pt")
    run = begin(config, folder, out, seed, scale, names)
    with deferred_interrupts() as check:
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
