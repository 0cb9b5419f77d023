"""The two ways through the model, `learn` and `animate`, for command lines, notebooks and experiments alike."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from minimti import edm
from minimti.budget import Budget, plan, seconds_of_step
from minimti.checkpoint.find import automatic
from minimti.checkpoint.fingerprint import differs, fingerprint
from minimti.checkpoint.load import Checkpoint, load_into, open_checkpoint
from minimti.config import MODELS, NUM_TOKENS, SCHEDULES, MicroConditioning, SVDConfig, printable
from minimti.hardware import available_memory, default_device
from minimti.invert import Recipe, State, TokenOptimizer, View, invert, make_optimizer, make_recipe, view
from minimti.io.files import InputError
from minimti.io.pixels import to_uint8
from minimti.io.video import Clip
from minimti.motion import Motion, frames_start, zero_start
from minimti.networks.attention import SpatioTemporalTransformer
from minimti.networks.recompute import compile_parts
from minimti.networks.unet import UNet
from minimti.ranks import ALONE, Ranks
from minimti.svd import GUIDANCE, SVD

UNCONDITIONAL_GUIDANCE = (1.0, 10.0)  # for the motion alone, as in figure 6


@dataclass(frozen=True)
class Progress:
    """How far `learn` or `animate` has come."""

    stage: str  # "encode" (views of the clip), "learn" or "sample"
    step: int  # steps done; "learn" starts before the first, with 0 or the steps of the run that is resumed
    steps: int
    loss: float | None = None  # in "learn": that of the step
    motion: Motion | None = None  # in "learn"; changes in place, and on a GPU may be some steps ahead: motion.steps
    state: Callable[[], State] | None = None  # in "learn": a copy of where motion.steps stands, for `resume`

    @property
    def is_settled(self) -> bool:
        """Whether the tokens, if there are any yet, are those of `step`, and no further."""
        return self.motion is None or self.motion.steps == self.step


def load(
    model: str | Checkpoint = "auto",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    vae_dtype: torch.dtype = torch.float32,
    image_encoder: bool = True,
) -> SVD:
    """A model with frozen weights.

    model          a name ("svd", "svd-xt", "svd-xt-1-1", "tiny"), a .safetensors file, a diffusers folder, or "auto":
                   official weights where they are on this machine or cuda is, else tiny
    device         default: cuda or mps where there is one, else cpu
    dtype          precision of UNet and image encoder; default: bfloat16 on cuda, else float32
    vae_dtype      precision of the autoencoder
    image_encoder  False: this network is left out, 28 % of SVD's weights; with a Motion, `animate` does not need it

    Raises InputError where there is no such model or device, or the files do not hold exactly the model's tensors.
    """
    device = check_device(device or default_device())
    dtype = dtype or default_dtype(device)
    name = automatic(device) if model == "auto" else model
    checkpoint = open_checkpoint(name) if isinstance(name, str) else name
    try:
        with torch.device("meta"):
            svd = SVD(checkpoint.config, with_image_encoder=image_encoder)
    except Exception as error:  # from whichever layer the numbers do not suit
        reason = printable(str(error), 200)
        message = f"{checkpoint.path}: the configuration in its metadata describes no network ({reason})"
        raise InputError(message) from error
    load_into(svd, checkpoint, device, dtype, vae_dtype)
    svd.device = device
    return svd


def default_dtype(device: torch.device) -> torch.dtype:
    """The precision of UNet and image encoder on a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def compile_unet(unet: UNet) -> None:
    """torch.compile for the UNet's transformers, in place. Most of a minute before the first step of every shape."""
    compile_parts(unet, SpatioTemporalTransformer)


def check_device(device: str | torch.device) -> torch.device:
    """The device, with its index. Raises InputError where it does not exist here."""
    try:
        probe = torch.zeros(1, device=device)
        probe.cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # NotImplementedError is one: meta cannot compute
        raise InputError(f"device {device} is not available here; cpu always is") from error
    return probe.device


def make_budget(
    svd: SVD, num_frames: int, size: tuple[int, int], memory: str | Budget = "auto", *, training: bool
) -> Budget:
    """How `learn` (training) or `animate` will use the memory of the model's device. Raises as `budget.plan` does.

    size    (width, height) in pixels
    memory  "auto", or one of config.MEMORY_MODES; a Budget stays as it is
    """
    if isinstance(memory, Budget):
        return memory
    device = svd.device or next(svd.parameters()).device
    free, kind = available_memory(device), device.type
    return plan(svd, svd.config, num_frames, size, training=training, memory=memory, available=free, device=kind)


def budget_of_learning(svd: SVD, clip: Clip, memory: str = "auto") -> Budget:
    """How `learn` will use the memory for a clip, or for several of its size. Raises as `budget.plan` does."""
    return make_budget(svd, len(clip.frames), (clip.frames.shape[-1], clip.frames.shape[-2]), memory, training=True)


def describe_learning(
    config: SVDConfig,
    clip: Clip,
    steps: int,
    device: torch.device,
    dtype: torch.dtype | None,
    vae_dtype: torch.dtype,
    memory: str,
) -> Iterator[tuple[str, str]]:
    """("memory", what a step of `learn` needs) and ("time", what all steps take), in words; no weights are read.

    There is no time for small models, which take minutes anywhere. Raises as `budget.plan` does.
    """
    dtype = dtype or default_dtype(device)
    with torch.device("meta"):
        svd = SVD(config)
    svd.unet.to(dtype), svd.image_encoder.to(dtype), svd.vae.to(vae_dtype)
    svd.device = device
    budget = budget_of_learning(svd, clip, memory)
    yield "memory", budget.describe()
    official = MODELS["svd"]
    if config.unet == official.unet:
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        shape = len(clip.frames), *sorted(clip.frames.shape[-2:])
        as_measured = shape == (official.num_frames, *sorted(official.size))
        seconds = seconds_of_step(card, budget.memory) if as_measured and dtype == torch.bfloat16 else None
        if seconds is None:
            yield "time", f"not measured on {card} at this size, precision and memory mode"
        else:
            yield "time", f"about {seconds * steps / 60:.0f} minutes for {steps} steps, besides loading and encoding"


def learn(
    svd: SVD,
    clip: Clip | Sequence[Clip],
    *,
    recipe: Recipe | str | None = None,
    steps: int | None = None,
    num_tokens: int = NUM_TOKENS,
    shared: bool = False,
    flip: bool = True,
    seed: int = 0,
    memory: str | Budget = "auto",
    progress: Callable[[Progress], None] = lambda _: None,
    resume: State | None = None,
    ranks: Ranks = ALONE,
    fetch_every: int | None = None,
) -> Motion:
    """The motion of a clip as an embedding: motion-textual inversion (paper 3.3, B.2).

    Several clips of one motion by different subjects give one embedding: their augmented views take turns. They have
    the same number of frames and the same size; the embedding plays at the rate of the first.

    recipe      how tokens are optimised: a Recipe, or the name of one ("paper", "muon"); default: the model's own
    steps       optimisation steps; default: the recipe's
    num_tokens  N, tokens per set
    shared      learn one set for all frames and the layers over time (F' = 1) instead of F + 1 sets
    flip        allow mirrored views; not for motions with a left and a right, such as a camera pan
    seed        for all random draws
    memory      how much memory to take, which changes the time alone: "auto", the fastest way that fits what is free,
                "max", "fast", "balanced" or "low", or a Budget that `make_budget` returned
    progress    called as the work goes on. An exception that it raises ends the work; Progress.motion has the tokens.
    resume      go on from here, with the same clips and settings. `steps` counts all steps, those done before too. For
                more steps than that run had, set State.begun to the steps done: the added ones get their own schedule
    ranks       joined processes that learn together: a step takes other noise in each of them, and the mean gradient
    fetch_every steps between two fetches of losses: only then are the tokens those of Progress.step; default: 10, on a
                CPU 1

    The tokens are on the device of the model. Raises FloatingPointError after a loss or gradient that is not finite,
    InputError where memory does not suffice or the embedding could not be saved, ValueError for an unknown recipe or
    clips that do not fit together, RuntimeError where a network has been released.
    """
    together = [clip] if isinstance(clip, Clip) else [*clip]
    if len({c.frames.shape for c in together}) != 1:
        raise ValueError("the clips must have the same number of frames and the same size, and be one at least")
    recipe = make_recipe(svd.config, recipe) if recipe is None or isinstance(recipe, str) else recipe
    recipe = replace(recipe, steps=recipe.steps if steps is None else steps)
    if 0 < recipe.num_views < len(together):
        raise ValueError(f"{len(together)} clips cannot take turns in {recipe.num_views} views: too few views or steps")
    clips = torch.stack([c.frames for c in together])  # [clips, F, 3, H, W], on the CPU: a GPU holds a view of one
    num_frames, size = clips.shape[1], (clips.shape[-1], clips.shape[-2])
    svd.use(make_budget(svd, num_frames, size, memory, training=True))
    if resume is None:
        generator = torch.Generator().manual_seed(seed)
        if recipe.shared_start:
            tokens = zero_start(num_frames + 1, num_tokens, svd.config.unet.context_dim, generator).to(svd.device)
        else:
            with torch.no_grad():
                embeddings = torch.stack([svd.embed(frames.to(svd.device)) for frames in clips]).mean(0)  # [F, d]
            tokens = frames_start(embeddings, num_tokens, generator)
        tokens = tokens[-1:].clone() if shared else tokens  # the temporal set
    else:
        tokens = resume.tokens.to(svd.device, copy=True)
    svd.park("image_encoder")

    motion = Motion(
        tokens=tokens,
        num_frames=num_frames,
        model=svd.config.name,
        micro=svd.config.micro,
        size=size,
        steps=resume.steps if resume else 0,
        seed=seed,
        fingerprint=fingerprint(svd.unet),
        total_steps=recipe.steps,
        fps=together[0].fps,
    )
    motion.check()  # what could not be saved is refused before hours of work

    views: Callable[[int], View] = partial(view, svd, clips, motion, flip, recipe.crop)
    cached: list[View] = list(resume.views) if resume else []
    if recipe.num_cached_views and recipe.steps:
        views = _cached(views, cached, recipe.num_views, progress)
        svd.park("vae")

    optimizer = make_optimizer(motion, recipe, resume)
    state = partial(_state, motion, optimizer, cached, resume.begun if resume else 0)
    progress(Progress("learn", motion.steps, recipe.steps, motion=motion, state=state))
    losses = invert(svd, views, motion, recipe, fetch_every=fetch_every, optimizer=optimizer, ranks=ranks)
    for step, loss in enumerate(losses, start=motion.steps + 1):
        progress(Progress("learn", step, recipe.steps, loss, motion, state))
    return motion


def _cached(
    views: Callable[[int], View], cached: list[View], count: int, progress: Callable[[Progress], None]
) -> Callable[[int], View]:
    """The first `count` views; the steps take them in turn. Those that `cached` lacks are made now, and added to it."""
    for index in range(len(cached), count):
        cached.append(views(index))
        progress(Progress("encode", index + 1, count))
    return lambda step: cached[step % count]


def _state(motion: Motion, optimizer: TokenOptimizer, views: list[View], begun: int) -> State:
    state = deepcopy(optimizer.torch_optimizer.state_dict()["state"])
    return State(motion.tokens.clone(), state, motion.steps, views, begun)


@torch.no_grad()
def animate(
    svd: SVD,
    motion: Motion | None,
    image: Tensor,
    *,
    steps: int | None = None,
    guidance: tuple[float, float] | None = None,
    solver: str = "euler",
    schedule: str = "karras",
    seed: int = 0,
    micro: MicroConditioning | None = None,
    unconditional: bool = False,
    memory: str | Budget = "auto",
    progress: Callable[[Progress], None] = lambda _: None,
) -> Tensor:
    """An image [1, 3, H, W] in [-1,1], moving as an embedding describes: a video, uint8 [F, 3, H, W] on the CPU.

    motion         None: plain image-to-video, with the image's own CLIP embedding
    steps          steps of the solver; default: the model's
    guidance       scales for the first and the last frame; default: GUIDANCE, for `unconditional` (1, 10)
    solver         "euler", "heun" or "dpmpp-2m" (edm.SOLVERS)
    schedule       noise levels: "karras", the model's own, or "ays" (edm.ays_sigmas), for models whose noise begins at
                   700 as SVD's does
    seed           for all random draws
    micro          default: the motion's, without one the model's
    unconditional  the motion alone (figure 6): only the size of the image matters, unless there is no motion
    memory         how much memory to take, as for `learn`
    progress       called after each step of the solver

    Raises InputError where the motion was learned on another model or memory does not suffice, ValueError for an image
    of another shape, an unknown solver, schedule or memory mode, a schedule that does not suit the model, or no steps,
    FloatingPointError where a sample is not finite, RuntimeError where a network has been released.
    Warns where the motion was learned on other weights of the same model.
    """
    config = svd.config
    if image.shape[:2] != (1, 3) or image.ndim != 4 or not image.is_floating_point():
        raise ValueError(f"the image must be floating-point [1, 3, H, W], not {image.dtype} {list(image.shape)}")
    if solver not in edm.SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: {', '.join(edm.SOLVERS)}")
    if schedule not in SCHEDULES or (schedule == "ays" and config.sigma_max != edm.AYS_SIGMAS[0]):
        raise ValueError(f"{config.name} has no schedule {schedule!r}")
    steps = config.num_steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"a sample takes at least one step, not {steps}")
    image = image.to(svd.device)
    num_frames, size = config.num_frames if motion is None else motion.num_frames, (image.shape[-1], image.shape[-2])
    budget = make_budget(svd, num_frames, size, memory, training=False)
    if motion is not None:
        motion.check_fits(config)
        if differs(motion.fingerprint, fingerprint(svd.unet)):
            warnings.warn(f"the embedding was learned on other weights of {config.name} than these", stacklevel=3)
    with svd.using(budget):
        if motion is None:
            tokens, own = svd.tokens_of(image, config.num_frames), config.micro
        else:
            spatial, temporal = motion.sets
            tokens, own = (spatial.to(svd.device), temporal.to(svd.device)), motion.micro
        svd.park("image_encoder")

        generator = torch.Generator().manual_seed(seed)
        cond = svd.prepare(image, tokens, micro or own, generator)
        svd.park("vae")
        if unconditional:
            cond = cond.without_image()
        guidance = guidance or (UNCONDITIONAL_GUIDANCE if unconditional else GUIDANCE)
        n = torch.randn(cond.concat.shape, generator=generator).to(image)
        xs = svd.sample(cond, n, steps, guidance, edm.SOLVERS[solver], schedule)
        latents = n
        for step, x in enumerate(xs, start=1):
            latents = x
            progress(Progress("sample", step, steps))
        svd.park("unet")
        pixels = svd.decode(latents)[0]
    if not pixels.isfinite().all():
        raise FloatingPointError(
            "the decoded frames hold numbers that are not finite: try --vae-dtype float32; if they stay, the weights"
            " are damaged"
        )
    return to_uint8(pixels)
