"""Measures the motion in a clip of the world by analysis through synthesis.

For each frame, the tracker searches the poses of the sprites for which the rendered scene matches the clip best. It is
given the scene's colours, shapes, background and first frame. It does not use the scene's program (except for whether
the camera may move at all), because a clip may come from a model that was conditioned on another motion.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np

from minimti.world.scene import CAMERA_WORDS, Scene, Trajectory, background_view, paint, relative_motion

# The search. Its parameters are scaled to pixels.
DIFFERENCE = 0.3  # step of the difference quotients
MAX_STEP = 3.0
MIN_STEP = 0.03  # a shorter step ends the search
MIN_GAIN = 0.003  # a smaller relative decrease of the error ends the search
MAX_EVALUATIONS = 6
DAMPING = 0.02  # added to the diagonal of the normal equations, relative to its mean

BLUR_SIGMA = 1.5  # pixels
MAX_RESIDUAL = 0.8  # a sprite is absent if drawing it leaves more than this share of the squared error
MIN_MOTION = 1.0  # pixels; the smallest denominator of a motion error

Residuals = Callable[[np.ndarray], np.ndarray]  # points [K, P] -> [K, M]


def gauss_newton(residuals: Residuals, start: np.ndarray) -> tuple[np.ndarray, float]:
    """Minimise the sum of squared residuals from `start` [P] by damped Gauss-Newton steps with numerical derivatives.

    Returns the best point [P] and its sum of squares. All parameters must be scaled so that DIFFERENCE suits them.
    """
    best, least = start, np.inf
    point = start
    for _ in range(MAX_EVALUATIONS):
        values = residuals(np.concatenate([point[None], point + DIFFERENCE * np.eye(len(point))]))
        error = float((values[0] ** 2).sum())
        if error >= least:
            point = (point + best) / 2  # the step was too long
            if np.linalg.norm(point - best) < MIN_STEP:
                break
            continue
        gain, best, least = least - error, point, error
        if gain < MIN_GAIN * error:
            break
        slopes = (values[1:] - values[0]) / DIFFERENCE  # [P, M]
        normal = slopes @ slopes.T
        normal += DAMPING * np.trace(normal) / len(normal) * np.eye(len(normal)) + 1e-9 * np.eye(len(normal))
        move = -np.linalg.solve(normal, slopes @ values[0])
        length = float(np.linalg.norm(move))
        if length < MIN_STEP:
            break
        point = point + move * min(1, MAX_STEP / length)
    return best, least


def to_trajectory(poses: np.ndarray, length: float, facing: int, left: int = 0, top: int = 0) -> Trajectory:
    """Poses [K, 4] of the search -> a trajectory of K frames, in a cut-out of the picture at (left, top).

    Columns of a pose, in pixels: x, y, and the displacement of a point half a body length from the centre by growth
    (log scale) and by turn. `length` is the sprite's length in frame 0.
    """
    return Trajectory(
        x=poses[:, 0] - left,
        y=poses[:, 1] - top,
        length=length * np.exp(poses[:, 2] / (length / 2)),
        angle=poses[:, 3] / (length / 2),
        facing=facing,
    )


@cache
def blur_matrix(side: int) -> np.ndarray:
    """[side // 2, side]: a Gaussian blur sampled at every second pixel, so that sharpness has little influence."""
    gap = np.arange(side) - 2 * np.arange(side // 2)[:, None] - 0.5
    weight = np.exp(-(gap**2) / (2 * BLUR_SIGMA**2))
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def soft_mask(clip: np.ndarray, background: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """[F, 3, H, W] in [0,1] twice -> [F, H, W] in [0,1]: the weight of `colour` against the background."""
    direction = np.array(colour, np.float32)[:, None, None] - background
    return np.clip(((clip - background) * direction).sum(1) / np.maximum((direction**2).sum(1), 1e-3), 0, 1)


def centroid(mask: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    """The centre (x, y) of a mask [H, W] under a Gaussian window of `radius` at x, y; (x, y) if the mask is empty."""
    columns, rows = np.arange(mask.shape[1]) + 0.5, np.arange(mask.shape[0]) + 0.5
    weight = mask * np.exp(-((rows - y) ** 2)[:, None] / (2 * radius**2) - (columns - x) ** 2 / (2 * radius**2))
    total = weight.sum()
    if total < 1:
        return np.array([x, y])
    return np.array([(weight.sum(0) * columns).sum(), (weight.sum(1) * rows).sum()]) / total


def track_background(clip: np.ndarray, scene: Scene) -> np.ndarray:
    """The background of each frame of a clip [F, 3, H, W] in [0,1]; same shape and domain.

    If the scene's program has no camera word, it is that of frame 0. Otherwise the camera's pan and zoom are tracked
    from frame to frame with a robust error, which limits the influence of the sprites.
    """
    first = background_view(scene.background, scene.size, np.zeros(1), np.ones(1))
    if not set(scene.program) & set(CAMERA_WORDS):
        return np.repeat(first, len(clip), axis=0)
    lever = scene.size[0] / 4  # pixels by which a zoom moves a typical point, over the zoom's logarithm
    views, point, velocity = [], np.zeros(2), np.zeros(2)

    def view(points: np.ndarray) -> np.ndarray:
        return background_view(scene.background, scene.size, points[:, 0], np.exp(points[:, 1] / lever))

    def residuals_against(frame: np.ndarray) -> Residuals:
        def residuals(points: np.ndarray) -> np.ndarray:
            error = view(points) - frame
            robust = error / np.sqrt(1 + (error / 0.1) ** 2)
            return robust.reshape(len(points), -1)  # [K, (3 H W)]

        return residuals

    for frame in clip:
        best = gauss_newton(residuals_against(frame), point + velocity)[0]
        point, velocity = best, best - point
        views.append(view(point[None])[0])
    return np.stack(views)


def sprite_residuals(
    scene: Scene, poses: np.ndarray, which: int, background: np.ndarray, frame: np.ndarray, left: int, top: int
) -> Residuals:
    """The difference between a drawn scene and a frame, as a function of the pose [K, 4] of sprite `which`.

    background and frame are cut-outs [3, h, w] at (left, top). The other sprites are drawn at their `poses` [S, 4].
    """
    rows, columns = blur_matrix(frame.shape[1]), blur_matrix(frame.shape[2])

    def residuals(points: np.ndarray) -> np.ndarray:
        canvas = np.repeat(background[None], len(points), axis=0)
        for i, sprite in enumerate(scene.sprites):
            at = points if i == which else np.repeat(poses[i : i + 1], len(points), axis=0)
            paint(canvas, sprite, to_trajectory(at, sprite.length, sprite.facing, left, top))
        return (rows @ (canvas - frame) @ columns.T).reshape(len(points), -1)  # [K, (3 h/2 w/2)]

    return residuals


def search(clip: np.ndarray, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Track all sprites of a scene in a clip [F, 3, H, W] in [0,1].

    Returns poses [S, F, 4] (columns: see `to_trajectory`) and squared errors [S, F] around each sprite, divided by the
    square of its length.

    In each frame, the search of a sprite starts from the best of several guesses: its last pose, that pose moved on
    by its last velocity (and turned either way), and that pose moved with its colour. Other sprites are drawn at their
    latest poses. A sprite that is absent from a frame keeps its last pose.
    """
    height, width = scene.size
    background = track_background(clip, scene)
    masks = [soft_mask(clip, background, sprite.colour) for sprite in scene.sprites]
    now = np.array([[s.x, s.y, 0, s.tilt * s.length / 2] for s in scene.sprites])
    velocity = np.zeros_like(now)
    poses, errors = np.empty((len(now), len(clip), 4)), np.empty((len(now), len(clip)))
    for t in range(len(clip)):
        for i, sprite in enumerate(scene.sprites):
            length = float(to_trajectory(now[i : i + 1], sprite.length, 1).length[0])
            reach = 0.65 * length + 0.08 * height
            left, top = (int(np.clip(now[i, k] - reach, 0, (width, height)[k] - 8)) for k in (0, 1))
            box = np.s_[:, top : max(int(now[i, 1] + reach), top + 8), left : max(int(now[i, 0] + reach), left + 8)]
            residuals = sprite_residuals(scene, now, i, background[t][box], clip[t][box], left, top)
            starts = [now[i], now[i] + velocity[i]]
            if t:
                x, y = now[i, :2]
                shift = centroid(masks[i][t], x, y, length / 2) - centroid(masks[i][t - 1], x, y, length / 2)
                starts.append(now[i] + np.append(shift, [0, 0]))
            starts += [starts[1] + [0, 0, 0, turn * sprite.length / 2] for turn in (-0.25, 0.25)]
            outside = now[i] + [1e6, 0, 0, 0]  # the error without the sprite
            without, *others = (residuals(np.stack([outside, *starts])) ** 2).sum(1)
            best, error = gauss_newton(residuals, starts[np.argmin(others)])
            if error > MAX_RESIDUAL * without:
                best = now[i]
            velocity[i] = best - now[i] if t else 0
            now[i], poses[i, t], errors[i, t] = best, best, error / length**2
    return poses, errors


def track(clip: np.ndarray, scene: Scene, which: int = 0) -> Trajectory:
    """The path of the scene's sprite `which` in a clip, uint8 [F, 3, H, W], whose first frame is the scene's."""
    poses, _ = search(clip.astype(np.float32) / 255, scene)
    return to_trajectory(poses[which], scene.sprites[which].length, scene.sprites[which].facing)


def facing(clip: np.ndarray, scene: Scene, which: int = 0) -> float:
    """Whether sprite `which` of a clip, uint8 [F, 3, H, W], faces as in the scene.

    1 if it does so in every frame, -1 if it is mirrored in every frame; else the mean over the frames.
    """
    frames = clip.astype(np.float32) / 255
    sprite = scene.sprites[which]
    turned = replace(sprite, facing=-sprite.facing, tilt=-sprite.tilt)
    mirrored = replace(scene, sprites=(*scene.sprites[:which], turned, *scene.sprites[which + 1 :]))
    error, error_mirrored = (search(frames, s)[1][which] for s in (scene, mirrored))
    return float(np.sign(error_mirrored - error).mean())


def motion_error(tracked: Trajectory, truth: Trajectory) -> float:
    """The error of a motion relative to no motion: 0 for the true motion, 1 for a sprite that stands still.

    The mean over frames 1 .. F-1 of the euclidean distance between the rows of `relative_motion`, divided by the same
    mean for a sprite that stands still (at least MIN_MOTION).
    """
    wanted = relative_motion(truth)[1:]
    distance = np.linalg.norm(relative_motion(tracked)[1:] - wanted, axis=1).mean()
    return float(distance / max(np.linalg.norm(wanted, axis=1).mean(), MIN_MOTION))
