"""What moved in a clip of the world, by drawing it: the tracker looks for the poses that make the scene look like it.

The colours, the shapes and the background are known, the motion is not: a clip may come from a model that was asked
for something else than the scene's own program.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np

from minimti.world.scene import CAMERA_WORDS, Scene, Trajectory, background_view, paint, semantic

STEP = 0.3  # pixels: the difference quotients of the search
LEAP = 3.0  # pixels: one step of the search is not longer
ROUNDS = 6
SETTLED = 0.03  # pixels: a shorter step ends the search
ENOUGH = 0.003  # a smaller relative gain ends the search too
BLUR = 1.5  # pixels
VANISHED = 0.8  # a sprite is there if drawing it leaves less than this share of the squared error without it
STILL = 1.0  # pixels: the least by which a motion error is divided

Residuals = Callable[[np.ndarray], np.ndarray]


def gauss_newton(residuals: Residuals, start: np.ndarray) -> tuple[np.ndarray, float]:
    """Minimise the sum of squares from start [P]; returns where and how much.

    residuals takes points [K, P], scaled so that STEP suits every parameter, and returns [K, M].
    """
    best, least = start, np.inf
    point = start
    for _ in range(ROUNDS):
        values = residuals(np.concatenate([point[None], point + STEP * np.eye(len(point))]))
        error = float((values[0] ** 2).sum())
        if error >= least:
            point = (point + best) / 2  # too far
            if np.linalg.norm(point - best) < SETTLED:
                break
            continue
        gained, best, least = least - error, point, error
        if gained < ENOUGH * error:
            break
        slopes = (values[1:] - values[0]) / STEP
        normal = slopes @ slopes.T
        normal += 0.02 * np.trace(normal) / len(normal) * np.eye(len(normal)) + 1e-9 * np.eye(len(normal))
        move = -np.linalg.solve(normal, slopes @ values[0])
        length = float(np.linalg.norm(move))
        if length < SETTLED:
            break
        point = point + move * min(1, LEAP / length)
    return best, least


def placed(points: np.ndarray, length: float, facing: int, left: int = 0, top: int = 0) -> Trajectory:
    """Poses [K, 4] as the search sees them, all in pixels: place, and half a body of growth (log) and of turn."""
    return Trajectory(
        x=points[:, 0] - left,
        y=points[:, 1] - top,
        length=length * np.exp(points[:, 2] / (length / 2)),
        angle=points[:, 3] / (length / 2),
        facing=facing,
    )


@cache
def blur(side: int) -> np.ndarray:
    """[side // 2, side]: a Gaussian around every second pixel. What a model's clip lacks in sharpness matters less."""
    gap = np.arange(side) - 2 * np.arange(side // 2)[:, None] - 0.5
    weight = np.exp(-(gap**2) / (2 * BLUR**2))
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def soft_mask(clip: np.ndarray, background: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """[F, 3, H, W] twice -> [F, H, W] in [0,1]: how far each pixel is on the way from background to sprite."""
    way = np.array(colour, np.float32)[:, None, None] - background
    return np.clip(((clip - background) * way).sum(1) / np.maximum((way**2).sum(1), 1e-3), 0, 1)


def centroid(mask: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    """The middle (x, y) of a mask [H, W] near a place; the place itself where the mask is empty."""
    columns, rows = np.arange(mask.shape[1]) + 0.5, np.arange(mask.shape[0]) + 0.5
    weight = mask * np.exp(-((rows - y) ** 2)[:, None] / (2 * radius**2) - (columns - x) ** 2 / (2 * radius**2))
    total = weight.sum()
    if total < 1:
        return np.array([x, y])
    return np.array([(weight.sum(0) * columns).sum(), (weight.sum(1) * rows).sum()]) / total


def find_background(clip: np.ndarray, scene: Scene) -> np.ndarray:
    """The background of each frame, [F, 3, H, W] in [0,1].

    Without camera words it is that of frame 0. With them, the camera's pan and zoom are searched from frame to frame,
    by least squares that let large errors, the sprites, count little.
    """
    here = background_view(scene.background, scene.size, np.zeros(1), np.ones(1))
    if not set(scene.program) & set(CAMERA_WORDS):
        return np.repeat(here, len(clip), axis=0)
    lever = scene.size[0] / 4  # pixels that a zoom moves a typical point by, over its logarithm
    views, point, velocity = [], np.zeros(2), np.zeros(2)

    def view(points: np.ndarray) -> np.ndarray:
        return background_view(scene.background, scene.size, points[:, 0], np.exp(points[:, 1] / lever))

    def against(frame: np.ndarray) -> Residuals:
        def residuals(points: np.ndarray) -> np.ndarray:
            error = view(points) - frame
            return (error / np.sqrt(1 + (error / 0.1) ** 2)).reshape(len(points), -1)  # a sprite counts little

        return residuals

    for frame in clip:
        best = gauss_newton(against(frame), point + velocity)[0]
        point, velocity = best, best - point
        views.append(view(point[None])[0])
    return np.stack(views)


def drawn(
    scene: Scene, poses: np.ndarray, which: int, behind: np.ndarray, seen: np.ndarray, left: int, top: int
) -> Residuals:
    """What a frame's cut-out seen [3, h, w] at left, top lacks when the sprite `which` is drawn over what is behind.

    The others are drawn at their poses [S, 4].
    """
    rows, columns = blur(seen.shape[1]), blur(seen.shape[2])

    def residuals(points: np.ndarray) -> np.ndarray:
        canvas = np.repeat(behind[None], len(points), axis=0)
        for i, sprite in enumerate(scene.sprites):
            where = points if i == which else np.repeat(poses[i : i + 1], len(points), axis=0)
            paint(canvas, sprite, placed(where, sprite.length, sprite.facing, left, top))
        return (rows @ (canvas - seen) @ columns.T).reshape(len(points), -1)

    return residuals


def search(clip: np.ndarray, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Poses [S, F, 4] (see `placed`) of all sprites, and [S, F] the squared error around each, per pixel of its body.

    clip [F, 3, H, W] in [0,1]. In each frame every sprite is searched from where it was and where it was heading, the
    others drawn where they were last seen. A sprite that explains nothing has vanished and keeps its last pose.
    """
    height, width = scene.size
    background = find_background(clip, scene)
    masks = [soft_mask(clip, background, sprite.colour) for sprite in scene.sprites]
    now = np.array([[s.x, s.y, 0, s.tilt * s.length / 2] for s in scene.sprites])
    velocity = np.zeros_like(now)
    poses, errors = np.empty((len(now), len(clip), 4)), np.empty((len(now), len(clip)))
    for t in range(len(clip)):
        for i, sprite in enumerate(scene.sprites):
            length = float(placed(now[i : i + 1], sprite.length, 1).length[0])
            reach = 0.65 * length + 0.08 * height
            left, top = (int(np.clip(now[i, k] - reach, 0, (width, height)[k] - 8)) for k in (0, 1))
            box = np.s_[:, top : max(int(now[i, 1] + reach), top + 8), left : max(int(now[i, 0] + reach), left + 8)]
            residuals = drawn(scene, now, i, background[t][box], clip[t][box], left, top)
            starts = [now[i], now[i] + velocity[i]]
            if t:
                x, y = now[i, :2]
                shift = centroid(masks[i][t], x, y, length / 2) - centroid(masks[i][t - 1], x, y, length / 2)
                starts.append(now[i] + np.append(shift, [0, 0]))
            starts += [starts[1] + [0, 0, 0, turn * sprite.length / 2] for turn in (-0.25, 0.25)]
            guesses = np.stack([now[i] + [1e6, 0, 0, 0], *starts])  # first, that there is no sprite
            nothing, *others = (residuals(guesses) ** 2).sum(1)
            best, error = gauss_newton(residuals, starts[np.argmin(others)])
            if error > VANISHED * nothing:
                best = now[i]
            velocity[i] = best - now[i] if t else 0
            now[i], poses[i, t], errors[i, t] = best, best, error / length**2
    return poses, errors


def track(clip: np.ndarray, scene: Scene, which: int = 0) -> Trajectory:
    """Where the scene's sprite `which` is in a clip uint8 [F, 3, H, W] that starts as the scene does."""
    poses, _ = search(clip.astype(np.float32) / 255, scene)
    return placed(poses[which], scene.sprites[which].length, scene.sprites[which].facing)


def facing(clip: np.ndarray, scene: Scene, which: int = 0) -> float:
    """From 1 (in every frame the sprite faces as the scene says) to -1 (in every frame it is mirrored)."""
    clip = clip.astype(np.float32) / 255
    sprite = scene.sprites[which]
    turned = replace(sprite, facing=-sprite.facing, tilt=-sprite.tilt)
    mirrored = replace(scene, sprites=(*scene.sprites[:which], turned, *scene.sprites[which + 1 :]))
    as_said, against = (search(clip, s)[1][which] for s in (scene, mirrored))
    return float(np.sign(against - as_said).mean())


def motion_error(tracked: Trajectory, truth: Trajectory) -> float:
    """How wrong a motion is: 0 where it is the truth's, 1 where it is no better than not moving.

    The mean over frames 1 .. F-1 of the euclidean distance between the two rows of `semantic`, over the same for a
    sprite that stands still (at least STILL).
    """
    wanted = semantic(truth)[1:]
    missed = np.linalg.norm(semantic(tracked)[1:] - wanted, axis=1).mean()
    return float(missed / max(np.linalg.norm(wanted, axis=1).mean(), STILL))
