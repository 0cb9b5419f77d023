"""The paper's experiments on the embedded model, measured:  python -m minimti.evaluate --out FOLDER

Motions are known programs of the procedural world. An error is 0 where a clip moves as it should and 1 where it is as
wrong as one that stands still (`tracker.motion_error`).
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minimti import cli, figures, motion, video, weights, words
from minimti.attention import TransformerBlock
from minimti.config import SVDConfig
from minimti.files import InputError, check_writable, make_folder, whole_file
from minimti.invert import invert, view
from minimti.pretrain import check_sizes
from minimti.stages import first_frame, habitual_scene, pixels
from minimti.svd import SVD
from minimti.tracker import motion_error, search, track
from minimti.world import CAMERA_WORDS, SHAPES, Scene, Trajectory, Wave, flip, paint, random_scene, render, trajectory

Tokens = tuple[Tensor, Tensor]  # spatial [1, F, N, d], temporal [1, N, d]; the first axis may also be that of clips

NUM_TOKENS = 5
LR = 1e-2
VIEWS = 25
GUIDANCE = (1.0, 3.0)
ALONE = (1.0, 3.0)  # guidance without an image
DIFFERENT = 0.5  # the motion error of one motion against another, from which a clip can tell which it follows
ABLATED = 3  # motions in the experiments that invert them over and over
SEEDS = 2
FORMS = ((1, 1), (1, 15), (15, 1), (15, 5), (15, 15))  # (F', N) of figure 9, for 14 frames
CURVE = (0, 0.05, 0.1, 0.2, 0.4, 0.7, 1)  # of the steps
MILESTONES = (0, 0.25, 0.5, 1)
SHIFT = 1.8  # from SVD's training to the paper's inversion P_mean rises from 1.0 to 2.8
GAITS = (Wave(0.2, 4), Wave(0.2, 8))


# ---------------------------------------------------------------------------------------------- what is transferred


@dataclass(frozen=True)
class Case:
    """A motion: a reference, and targets that shall move as it does."""

    reference: Scene
    targets: tuple[Scene, ...]


def random_case(rng: np.random.Generator, config: SVDConfig, num_targets: int, **properties) -> Case:
    """Targets of other shapes, colours and places; every other one faces the other way than the reference.

    properties: of `random_scene`.
    """
    size = config.size[::-1]
    reference = random_scene(rng, size, config.num_frames, **properties)
    properties["program"] = reference.program
    properties["shapes"] = tuple(shape for shape in SHAPES if shape not in [s.shape for s in reference.sprites])
    targets = []
    for i in range(num_targets):
        scene = random_scene(rng, size, config.num_frames, **properties)
        opposite = scene.sprites[0].facing != reference.sprites[0].facing
        targets.append(flip(scene) if opposite == bool(i % 2) else scene)
    return Case(reference, tuple(targets))


@dataclass
class OneSet(motion.Motion):
    """F' = 1: tokens [1, N, d], the same for every frame and over time."""

    frames: int = 0

    @property
    def sets(self) -> Tokens:
        return self.tokens[None].expand(-1, self.frames, -1, -1), self.tokens


# ---------------------------------------------------------------------------------------------- what is measured


def motion_errors(clips: np.ndarray, scenes: list[Scene]) -> list[float]:
    """Of each clip uint8 [F, 3, H, W] against its scene; of two sprites the mean."""
    return [
        float(np.mean([motion_error(track(clip, scene, i), path) for i, path in enumerate(trajectory(scene))]))
        for clip, scene in zip(clips, scenes)
    ]


def follows(clip: np.ndarray, scene: Scene, wanted: Trajectory, other: Trajectory) -> bool | None:
    """Whether the sprite of a clip moves rather as wanted than otherwise; None where the two are too much alike."""
    if motion_error(other, wanted) < DIFFERENT:
        return None
    tracked = track(clip, scene)
    return motion_error(tracked, wanted) < motion_error(tracked, other)


def mirrored_motion(path: Trajectory, scene: Scene) -> Trajectory:
    """Where the scene's sprite would go if it moved as the path of its mirror image does in the picture."""
    own = trajectory(scene)[0]
    return replace(own, x=own.x[0] + path.x - path.x[0], angle=own.angle[0] - (path.angle - path.angle[0]))


def colour(clip: np.ndarray, scene: Scene) -> np.ndarray:
    """RGB in [0,1] of the sprite's body in a clip, mean over its frames."""
    sprite = replace(scene.sprites[0], colour=(1.0, 1.0, 1.0))  # whatever is painted white is body, not detail
    canvas = np.zeros(clip.shape, np.float32)
    paint(canvas, sprite, track(clip, scene))
    body = canvas.min(axis=1) > 0.99  # [F, H, W]
    return np.array([clip[:, channel][body].mean() for channel in range(3)]) / 255 if body.any() else np.zeros(3)


def summary(errors: list[list[float]]) -> dict:
    """Of errors by motion and target: their mean, and the deviation of the motions' means."""
    means = [float(np.mean(of_motion)) for of_motion in errors]
    return {"error": float(np.mean(means)), "deviation": float(np.std(means)), "motions": means}


def rate(answers: list[bool | None]) -> dict:
    told = [answer for answer in answers if answer is not None]
    return {"rate": float(np.mean(told)) if told else None, "pairs": len(told)}


# ---------------------------------------------------------------------------------------------- the laboratory


def first_frames(scenes: Sequence[Scene]) -> Tensor:
    """[B, 3, H, W] in [-1,1]."""
    return pixels(np.stack([first_frame(scene) for scene in scenes]))


class Lab:
    """The model and the motions, and what several experiments ask of them."""

    def __init__(self, svd: SVD, table: words.Words, seed: int, motions: int, targets: int, steps: int, folder: Path):
        self.svd, self.table, self.config = svd, table, svd.config
        self.seed, self.num_targets, self.steps, self.folder = seed, targets, steps, folder
        self.cases = [random_case(self.rng(0, i), self.config, targets) for i in range(motions)]
        self.learned = cache(self._learned)

    def rng(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *numbers))

    def caption(self, scene: Scene) -> Tokens:
        return words.caption_tokens(self.table, [scene.program], self.config.num_frames)

    @torch.no_grad()
    def own(self, scenes: Sequence[Scene]) -> Tokens:
        """The tokens of plain image-to-video, of as many clips as scenes."""
        return self.svd.tokens_of(first_frames(scenes), self.config.num_frames)

    @torch.no_grad()
    def embeddings(self, reference: Scene) -> Tensor:
        """CLIP embeddings of all its frames, [F, d]."""
        return self.svd.embed(pixels(render(reference)))

    def inversion(
        self, reference: Scene, form: tuple[int, int], seed: int, p_mean: float | None = None
    ) -> Iterator[Tokens]:
        """The tokens of the form (F', N) before the first step and after every one."""
        config, svd = self.config, self.svd
        clip, noise = pixels(render(reference)), torch.Generator().manual_seed(seed)
        tokens = motion.initialise(self.embeddings(reference), form[1], noise)
        about = {"model": config.name, "micro": config.micro, "size": config.size, "steps": 0, "seed": seed}
        if form[0] == 1:
            learned = OneSet(tokens[-1:].clone(), frames=config.num_frames, **about)
        else:
            learned = motion.Motion(tokens, **about)
        cached = [view(svd, clip, learned, True, k) for k in range(VIEWS)]
        p_mean = config.p_mean if p_mean is None else p_mean
        settings = {"steps": self.steps, "lr": LR, "p_mean": p_mean, "p_std": config.p_std}
        yield tuple(t.detach().clone() for t in learned.sets)
        for _ in invert(svd, lambda step: cached[step % len(cached)], learned, **settings):
            yield tuple(t.detach().clone() for t in learned.sets)

    def _learned(self, case: Case, form: tuple[int, int] = (15, NUM_TOKENS), seed: int = 0) -> Tokens:
        """The motion of a case as an embedding; remembered."""
        *_, last = self.inversion(case.reference, form, seed)
        return last

    @torch.no_grad()
    def generate(self, scenes: Sequence[Scene], tokens: Tokens, image: bool = True) -> np.ndarray:
        """uint8 [B, F, 3, H, W]: the first frames of scenes under the tokens of one clip or of as many.

        Without `image`, the motion alone.
        """
        config, noise = self.config, torch.Generator().manual_seed(self.seed)
        images = first_frames(scenes)
        spatial, temporal = (t.expand(len(scenes), *t.shape[1:]) for t in tokens)
        cond = self.svd.prepare(images, (spatial, temporal), config.micro, noise)
        n = torch.randn(cond.concat.shape, generator=noise)
        cond, guidance = (cond, GUIDANCE) if image else (cond.without_image(), ALONE)
        *_, x = self.svd.sample(cond, n, config.num_steps, guidance)
        return video.to_bytes(self.svd.decode(x)).numpy()

    def transferred(self, case: Case, tokens: Tokens) -> list[float]:
        """The errors of a case's targets under tokens."""
        return motion_errors(self.generate(case.targets, tokens), list(case.targets))


# ---------------------------------------------------------------------------------------------- the experiments


def caption(lab: Lab) -> dict:
    """The true caption: what the model can do at best."""
    return summary([lab.transferred(case, lab.caption(case.reference)) for case in lab.cases])


def transfer(lab: Lab) -> dict:
    """Figures 1, 7, 8: motion-textual inversion, 14 + 1 sets of five tokens."""
    errors, rows = [], []
    for i, case in enumerate(lab.cases):
        clips = lab.generate(case.targets, lab.learned(case))
        errors.append(motion_errors(clips, list(case.targets)))
        if i < figures.ROWS:
            rows += [render(case.reference), *clips[:2]]
    figures.write_rows(lab.folder / "transfer.png", rows)
    return summary(errors)


def baselines(lab: Lab) -> dict:
    """The target's own embedding, as in SVD; and the embeddings of the reference's frames, nothing optimised."""
    found = {"image": [], "frames": []}
    for case in lab.cases:
        frames = lab.embeddings(case.reference)
        found["image"].append(lab.transferred(case, lab.own(case.targets)))
        found["frames"].append(lab.transferred(case, (frames[None, :, None], frames.mean(0)[None, None])))
    summaries = {name: summary(errors) for name, errors in found.items()}
    return {"error": min(s["error"] for s in summaries.values()), **summaries}


def ablation(lab: Lab) -> dict:
    """Figure 9: how many sets, and how many tokens in each."""
    found = {}
    for form in FORMS:
        by_seed = []
        for seed in range(SEEDS):
            errors = [lab.transferred(case, lab.learned(case, form, seed)) for case in lab.cases[:ABLATED]]
            by_seed.append(float(np.mean(errors)))
        found[f"{form[0]}x{form[1]}"] = {"error": float(np.mean(by_seed)), "seeds": by_seed}
    return {"error": found[f"15x{NUM_TOKENS}"]["error"], **found}


def flipped(lab: Lab) -> dict:
    """Figure 13: a mirrored target moves the other way."""
    answers, rows = [], []
    for i, case in enumerate(lab.cases):
        scenes = [flip(scene) for scene in case.targets]
        clips = lab.generate(scenes, lab.learned(case))
        for clip, scene, before in zip(clips, scenes, case.targets):
            other = mirrored_motion(trajectory(before)[0], scene)
            answers.append(follows(clip, scene, trajectory(scene)[0], other))
        if i < figures.ROWS:
            rows += [*lab.generate(case.targets[:1], lab.learned(case)), clips[0]]
    figures.write_rows(lab.folder / "flip.png", rows)
    return rate(answers)


def swap(lab: Lab) -> dict:
    """Figure 3: the embeddings of two images are exchanged; each moves as the other one would by habit."""
    rng, answers, rows = lab.rng(1), [], []
    for i in range(2 * len(lab.cases)):
        pair = [habitual_scene(rng, lab.config) for _ in range(2)]
        spatial, temporal = lab.own(pair)
        clips = lab.generate(pair, (spatial.flip(0), temporal.flip(0)))
        for clip, scene, other in zip(clips, pair, pair[::-1]):
            (sprite,), theirs = scene.sprites, other.sprites[0]
            wanted = replace(scene, program=other.program, sprites=(replace(sprite, wave=theirs.wave),))
            answers.append(follows(clip, scene, trajectory(wanted)[0], trajectory(scene)[0]))
        if i < figures.ROWS:
            rows += [*clips]
    figures.write_rows(lab.folder / "swap.png", rows)
    return rate(answers)


def appearance(lab: Lab) -> dict:
    """Section 3.2.1: colour and shape stay the target's, none of the reference's comes along.

    Colours differ by at most sqrt(3). Plain: sampled with the target's own embedding.
    """
    found = {"plain": [], "transfer": []}
    own_colour, own_shape = [], []
    for case in lab.cases:
        reference = case.reference.sprites[0]
        for name, tokens in (("plain", lab.own(case.targets)), ("transfer", lab.learned(case))):
            for clip, scene in zip(lab.generate(case.targets, tokens), case.targets):
                seen = colour(clip, scene)
                error = float(np.linalg.norm(seen - scene.sprites[0].colour))
                found[name].append(error)
                if name == "transfer":
                    own_colour.append(error < np.linalg.norm(seen - reference.colour))
                    disguised = replace(scene, sprites=(replace(scene.sprites[0], shape=reference.shape),))
                    unlike = [search(clip.astype(np.float32) / 255, s)[1].mean() for s in (scene, disguised)]
                    own_shape.append(bool(unlike[0] < unlike[1]))
    return {
        "error": float(np.mean(found["transfer"])),
        "plain": float(np.mean(found["plain"])),
        "own colour": float(np.mean(own_colour)),
        "own shape": float(np.mean(own_shape)),
    }


def kinds(lab: Lab) -> dict:
    """Figures 8 and 12: two sprites, camera motion, and gaits that differ in rhythm only."""
    found = {}
    properties = {
        "two sprites": [{"num_sprites": 2}] * 2,
        "camera": [{"program": (word,) * words.NUM_SLOTS} for word in CAMERA_WORDS],
        "gait": [{"program": ("forward",) * words.NUM_SLOTS, "wave": wave} for wave in GAITS],
    }
    for i, (name, variants) in enumerate(properties.items()):
        cases = [random_case(lab.rng(2, i, k), lab.config, 2, **v) for k, v in enumerate(variants)]
        found[name] = summary([lab.transferred(case, lab.learned(case)) for case in cases])
    return {"error": float(np.mean([s["error"] for s in found.values()])), **found}


def unconditional(lab: Lab) -> dict:
    """Figure 6: the motion seen without an image, as the inversion goes on."""
    case, steps = lab.cases[0], sorted({round(share * lab.steps) for share in MILESTONES})
    kept = snapshots(lab.inversion(case.reference, (15, NUM_TOKENS), 0), steps)
    clips = [lab.generate(case.targets[:1], tokens, image=False)[0] for tokens in kept]
    figures.write_rows(lab.folder / "unconditional.png", [render(case.reference), *clips])
    return {"steps": steps}


def attention(lab: Lab) -> dict:
    """Figure 5: which places of each frame ask which token, with one token and with five."""
    case, rows, spread = lab.cases[0], [], {}
    for num_tokens in (1, NUM_TOKENS):
        tokens, maps = lab.learned(case, (15, num_tokens)), []

        def keep(block: torch.nn.Module, inputs: tuple[Tensor, ...], _, n=num_tokens, kept=maps) -> None:
            x, keys, _ = inputs
            weights = (x[-len(keys) :] @ keys).unflatten(-1, (-1, n)).softmax(-1) if n > 1 else x.new_ones(1, 1, 1, 1)
            weights = weights.mean(2).expand(lab.config.num_frames, x.shape[1], n)  # over the heads: [F, L, N]
            kept.append(weights)

        hooks = [b.attn2.register_forward_hook(keep) for b in finest_blocks(lab.svd)]
        clip = lab.generate(case.targets[:1], tokens)[0]
        for hook in hooks:
            hook.remove()
        mean = torch.stack(maps).mean(0)  # over layers and steps
        spread[str(num_tokens)] = float(mean.std(1).mean())
        rows += [clip, *figures.heat(mean, lab.config)]
    figures.write_rows(lab.folder / "attention.png", rows)
    return {"deviation among places": spread}


def iterations(lab: Lab) -> dict:
    """B.2: the error against the steps, with the model's noise levels and with as much more as in the paper."""
    steps, curves = sorted({round(share * lab.steps) for share in CURVE}), {}
    for p_mean in (lab.config.p_mean, lab.config.p_mean + SHIFT):
        errors = [
            [
                float(np.mean(lab.transferred(case, tokens)))
                for tokens in snapshots(lab.inversion(case.reference, (15, NUM_TOKENS), 0, p_mean), steps)
            ]
            for case in lab.cases[:ABLATED]
        ]
        curves[f"P_mean {p_mean:.1f}"] = np.mean(errors, axis=0).tolist()
    figures.write_curves(lab.folder / "iterations.png", steps, curves)
    return {"error": min(curve[-1] for curve in curves.values()), "steps": steps, "curves": curves}


def snapshots(inversion: Iterator[Tokens], steps: list[int]) -> list[Tokens]:
    """The tokens after each of the steps, which rise; step 0 comes before the first."""
    last, kept = -1, []
    for step in steps:
        kept.append(next(islice(inversion, step - last - 1, None)))
        last = step
    return kept


def finest_blocks(svd: SVD) -> list[TransformerBlock]:
    """The spatial transformer blocks of the last, finest level."""
    return [transformer.transformer_blocks[0] for transformer in svd.unet.up_blocks[-1].attentions]


EXPERIMENTS: dict[str, Callable[[Lab], dict]] = {
    "caption": caption,
    "transfer": transfer,
    "baselines": baselines,
    "flip": flipped,
    "swap": swap,
    "appearance": appearance,
    "kinds": kinds,
    "ablation": ablation,
    "iterations": iterations,
    "unconditional": unconditional,
    "attention": attention,
}


# ---------------------------------------------------------------------------------------------- command line


def lines(name: str, result: dict) -> list[str]:
    """The rows of a table: what was measured, its main figure, and its spread."""
    rows = []
    for label, part in ((name, result), *((f"{name}: {key}", value) for key, value in result.items())):
        if not isinstance(part, dict):
            continue
        for figure in ("error", "rate"):
            if part.get(figure) is not None:
                more = [
                    f"{key} {part[key]:.2f}" for key in ("deviation", "plain", "own colour", "own shape") if key in part
                ]
                more += [f"seeds {', '.join(f'{e:.2f}' for e in part['seeds'])}"] if "seeds" in part else []
                more += [f"of {part['pairs']} pairs"] if "pairs" in part else []
                rows.append(f"| {label} | {figure} | {part[figure]:.2f} | {'; '.join(more)} |")
    return rows


def parse():
    parser = cli.Parser(prog="python -m minimti.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="tiny", metavar="NAME|PATH", help="a model made by minimti.pretrain (default: %(default)s)")
    add("--out", default="runs/evaluate", metavar="FOLDER", help="of the pictures (default: %(default)s)")
    add("--json", metavar="FILE", help="the figures, by experiment")
    add("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=f"of {', '.join(EXPERIMENTS)} (default: all)")
    add("--motions", type=cli.integer(1, 1000), default=8, help="reference clips (default: %(default)s)")
    add("--targets", type=cli.integer(2, 1000), default=4, help="of each motion (default: %(default)s)")
    add("--steps", type=cli.integer(1, 10**6), help="of an inversion (default: the model's)")
    add("--seed", type=cli.integer(0, 2**32 - 1), default=0, help="of every random number (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.json:
        check_writable(args.json)
    checkpoint = weights.find(args.model)
    check_sizes(checkpoint.config)
    table = words.load(checkpoint.path.with_name("words.safetensors"))
    if table.word.weight.shape[1] != checkpoint.config.unet.context_dim:
        raise InputError(f"{checkpoint.path}: its words are not those of words.safetensors beside it")
    make_folder(args.out)
    svd = weights.load(checkpoint, torch.device("cpu"), torch.float32).requires_grad_(False)
    steps = args.steps or svd.config.num_iterations
    lab = Lab(svd, table, args.seed, args.motions, args.targets, steps, Path(args.out))
    results = {}
    print("| experiment | figure | mean | spread |\n|---|---|---|---|")
    for name in args.only or EXPERIMENTS:
        began = time.perf_counter()
        results[name] = EXPERIMENTS[name](lab)
        results[name]["seconds"] = time.perf_counter() - began
        print(*lines(name, results[name]), sep="\n", flush=True)
        if args.json:
            with whole_file(args.json) as part:
                part.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
