"""The paper's experiments on the embedded model, measured:  python -m minimti.evaluate --out FOLDER"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from minimti.evaluate import figures
from minimti.evaluate.evaluation import (
    FORM,
    Case,
    Evaluation,
    Tokens,
    colour,
    follows,
    mirrored_motion,
    motion_errors,
    random_case,
    rate,
    summary,
)
from minimti.motion import NUM_TOKENS
from minimti.networks.attention import TransformerBlock
from minimti.svd import SVD
from minimti.world import captions
from minimti.world.clips import habitual_scene
from minimti.world.scene import CAMERA_WORDS, Wave, flip, render, trajectory
from minimti.world.tracker import search

ABLATED = 3  # motions in the experiments that invert them over and over
SEEDS = 2
FORMS = ((1, 1), (1, 15), (15, 1), FORM, (15, 15))  # of figure 9
CURVE = (0, 0.05, 0.15, 0.4, 1)  # of the steps
MILESTONES = (0, 0.25, 0.5, 1)
P_MEANS = (1.0, 2.8)  # of SVD's training, of the paper's inversion; the model's own comes beside them
GAITS = (Wave(0.2, 4), Wave(0.2, 8))


def judged(lab: Evaluation, tokens_of: Callable[[Case], Tokens]) -> dict:
    """The errors of all targets under the tokens of their case, and the loss on what they truly show."""
    errors = [lab.transferred(case, tokens_of(case)) for case in lab.cases]
    return summary(errors) | {"loss": float(np.mean([lab.loss(c.targets, tokens_of(c)) for c in lab.cases]))}


def caption(lab: Evaluation) -> dict:
    """The true caption: what the model can do at best."""
    return judged(lab, lambda case: lab.caption(case.reference))


def transfer(lab: Evaluation) -> dict:
    """Figures 1, 7, 8: motion-textual inversion, 14 + 1 sets of five tokens."""
    errors, rows = [], []
    for i, case in enumerate(lab.cases):
        clips = lab.moved(case)
        errors.append(motion_errors(clips, list(case.targets)))
        if i < figures.ROWS:
            rows += [render(case.reference), *clips[:2]]
    figures.write_rows(lab.folder / "transfer.png", rows)
    loss = np.mean([lab.loss(case.targets, lab.learned(case)) for case in lab.cases])
    return summary(errors) | {"loss": float(loss)}


def baselines(lab: Evaluation) -> dict:
    """The target's own embedding, as in SVD; and the embeddings of the reference's frames, nothing optimised."""

    def frames(case: Case) -> Tokens:
        embeddings = lab.embeddings(case.reference)
        return embeddings[None, :, None], embeddings.mean(0)[None, None]

    found = {"image": judged(lab, lambda case: lab.own(case.targets)), "frames": judged(lab, frames)}
    return {"error": min(part["error"] for part in found.values()), **found}


def ablation(lab: Evaluation) -> dict:
    """Figure 9: how many sets, and how many tokens in each."""
    found = {f"{form[0]}x{form[1]}": over_seeds(lab, form) for form in FORMS}
    return {"error": found[f"15x{NUM_TOKENS}"]["error"], **found}


def optimiser(lab: Evaluation) -> dict:
    """The recipe of train.py beside the paper's, which takes `invert.SAVING` times the steps."""
    found = {"ours": over_seeds(lab), "the paper's": over_seeds(lab, paper=True)}
    return {"error": found["ours"]["error"], **found}


def over_seeds(lab: Evaluation, form: tuple[int, int] = FORM, paper: bool = False) -> dict:
    """The error of some motions' transfer, for each seed of an inversion; and the loss on the targets' true clips."""
    by_seed, losses = [], []
    for seed in range(SEEDS):
        learned = [(case, lab.learned(case, form, seed, paper)) for case in lab.cases[:ABLATED]]
        by_seed.append(float(np.mean([lab.transferred(case, tokens) for case, tokens in learned])))
        losses.append(float(np.mean([lab.loss(case.targets, tokens) for case, tokens in learned])))
    return {"error": float(np.mean(by_seed)), "seeds": by_seed, "loss": float(np.mean(losses)), "losses": losses}


def flipped(lab: Evaluation) -> dict:
    """Figure 13: a mirrored target moves the other way."""
    answers, rows = [], []
    for i, case in enumerate(lab.cases):
        scenes = [flip(scene) for scene in case.targets]
        clips = lab.generate(scenes, lab.learned(case))
        for clip, scene, before in zip(clips, scenes, case.targets):
            other = mirrored_motion(trajectory(before)[0], scene)
            answers.append(follows(clip, scene, trajectory(scene)[0], other))
        if i < figures.ROWS:
            rows += [lab.moved(case)[0], clips[0]]
    figures.write_rows(lab.folder / "flip.png", rows)
    return rate(answers)


def swap(lab: Evaluation) -> dict:
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


def appearance(lab: Evaluation) -> dict:
    """Section 3.2.1: colour and shape stay the target's, none of the reference's comes along.

    Colours differ by at most sqrt(3). Plain: sampled with the target's own embedding.
    """
    found = {"plain": [], "transfer": []}
    own_colour, own_shape = [], []
    for case in lab.cases:
        reference = case.reference.sprites[0]
        plain = lab.generate(case.targets, lab.own(case.targets))
        for name, clips in (("plain", plain), ("transfer", lab.moved(case))):
            for clip, scene in zip(clips, case.targets):
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


def kinds(lab: Evaluation) -> dict:
    """Figures 8 and 12: two sprites, camera motion, and gaits that differ in rhythm only."""
    found = {}
    properties = {
        "two sprites": [{"num_sprites": 2}] * 2,
        "camera": [{"program": (word,) * captions.NUM_SLOTS} for word in CAMERA_WORDS],
        "gait": [{"program": ("forward",) * captions.NUM_SLOTS, "wave": wave} for wave in GAITS],
    }
    for i, (name, variants) in enumerate(properties.items()):
        cases = [random_case(lab.rng(2, i, k), lab.config, 2, **v) for k, v in enumerate(variants)]
        found[name] = summary([lab.transferred(case, lab.learned(case)) for case in cases])
    return {"error": float(np.mean([s["error"] for s in found.values()])), **found}


def unconditional(lab: Evaluation) -> dict:
    """Figure 6: the motion seen without an image, as the inversion goes on."""
    case, steps = lab.cases[0], sorted({round(share * lab.steps) for share in MILESTONES})
    kept = snapshots(lab.inversion(case.reference), steps)
    clips = [lab.generate(case.targets[:1], tokens, image=False)[0] for tokens in kept]
    figures.write_rows(lab.folder / "unconditional.png", [render(case.reference), *clips])
    return {"steps": steps}


def attention(lab: Evaluation) -> dict:
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


def iterations(lab: Evaluation) -> dict:
    """B.2: the error against the steps of the paper's recipe, for three means of ln sigma.

    At its constant rate a long inversion passes through the shorter ones.
    """
    steps, curves = sorted({round(share * lab.num_steps(paper=True)) for share in CURVE}), {}
    for p_mean in sorted({*P_MEANS, lab.config.p_mean}):
        errors = [
            [
                float(np.mean(lab.transferred(case, tokens)))
                for tokens in snapshots(lab.inversion(case.reference, p_mean=p_mean, paper=True), steps)
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
    """The spatial transformer blocks of the finest level that has any, on the way up."""
    *_, finest = (block.attentions for block in svd.unet.up_blocks if block.attentions)
    return [transformer.transformer_blocks[0] for transformer in finest]


EXPERIMENTS: dict[str, Callable[[Evaluation], dict]] = {
    "caption": caption,
    "transfer": transfer,
    "baselines": baselines,
    "flip": flipped,
    "swap": swap,
    "appearance": appearance,
    "kinds": kinds,
    "ablation": ablation,
    "optimiser": optimiser,
    "iterations": iterations,
    "unconditional": unconditional,
    "attention": attention,
}
