"""A pre-training run: the training loop, and the files that it leaves.

The run goes through the stages in which SVD was made (stages.py). If it is stopped, the same command resumes it from
its checkpoint (state.py). The data of a step depends only on seed, stage and step, so the result is bit-identical to
that of an uninterrupted run (on the same processor, with the same number of PyTorch threads). With `--stages`, a run
trains a finished model further in some stages only.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minimti import hardware, signals
from minimti.checkpoint.key_maps import official_source
from minimti.checkpoint.load import sources
from minimti.config import SVDConfig, to_json
from minimti.io import write
from minimti.io.files import InputError, atomic_write, make_folder, require_file
from minimti.jobs import in_processes
from minimti.networks.graph import Graphed
from minimti.pretrain.card import Record, card
from minimti.pretrain.stages import (
    Batch,
    DrawnClips,
    EncodedClips,
    draw_clips,
    encode_clips,
    gaussian,
    latent_shape,
    normalise_latents,
)
from minimti.pretrain.state import PretrainSettings, Run, dense, make_optimisers, require
from minimti.world import captions
from minimti.world.clips import SCENES, pixels
from minimti.world.scene import WORDS, Scene, render

FETCH_EVERY = 25  # steps between two fetches of losses from a GPU, which makes it wait
ENCODED, HELD_OUT = 10**6, 2 * 10**6  # take the place of a stage's number in the seeds of other generators


def generator(*numbers: int) -> np.random.Generator:
    """A random generator, seeded by a tuple of numbers."""
    return np.random.default_rng(numbers)


# ---------------------------------------------------------------------------------------------- training


def learning_rate(settings: PretrainSettings, step: int, steps: int, decays: bool) -> float:
    """The learning rate of a step: rising, then constant, or falling to 0 over the second half if it decays."""
    warm_up = min(settings.warm_up, steps // 4 + 1)
    return settings.lr * min(1, (step + 1) / warm_up, 2 * (1 - step / steps) if decays else 1)


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
    """Chunk i of a kind of clips, with i."""
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

    Raises FloatingPointError if the loss is not finite, KeyboardInterrupt if `check` does: encoded clips are kept in
    files, and steps are saved before.
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


def write_model(run: Run) -> None:
    """Write the files of a model, in half precision: the SVD in the official layout, the captions, and the card."""
    svd, out, tensors = run.model.svd, run.out, {}
    make_folder(out)
    values = svd.state_dict()
    for key, source in sources(svd, official_source, run.config).items():
        (name,) = source.names
        tensors[name] = values[key].reshape(source.shape).half().contiguous().cpu()
    with atomic_write(out / f"{run.config.name}.safetensors") as part:
        save_file(tensors, part, {"config": to_json(run.config), "stages": json.dumps(run.rows)})
    captions.save(run.model.words, out / "words.safetensors")
    with atomic_write(out / "card.md") as part:
        part.write_text(card(svd, run.rows))


def pretrain(run: Run) -> None:
    """Go through the stages that a run has not done yet, and write the model to its `out` at the end.

    Raises KeyboardInterrupt when stopped, after saving; FloatingPointError if a loss is not finite.
    """
    with signals.held() as check:
        if not run.path.exists():
            run.save()  # from here on the folder, and the clips that are encoded in it, are those of this run
        while run.stage < len(run.stages):
            name = run.stages[run.stage].name
            train(run, check)
            if name in FINISH:
                FINISH[name](run)
            run.stage, run.step, run.ema, run.optimisers = run.stage + 1, 0, {}, []
            run.save()
            record = run.records[run.stage - 1]
            psnr = "" if record.psnr is None else f", held-out PSNR {record.psnr:.1f} dB"
            tqdm.write(f"{name}: {len(record.losses)} steps, {record.seconds / 60:.1f} minutes{psnr}")
        write_model(run)
