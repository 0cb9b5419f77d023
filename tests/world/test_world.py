"""The procedural world: each word has its motion, scenes stay in the picture, and the tracker recovers motions."""

from dataclasses import replace

import numpy as np
import pytest

from minimti.world import tracker
from minimti.world.scene import (
    CAMERA_WORDS,
    SCALES,
    SPRITE_WORDS,
    WORDS,
    Scene,
    Wave,
    camera,
    flip,
    habit,
    random_colour,
    random_program,
    random_scene,
    relative_motion,
    render,
    render_background,
    trajectory,
)
from minimti.world.shapes import SHAPES

STILL = ("still",) * 7


def scenes(count: int, seed: int = 0, **options) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, **options) for _ in range(count)]


def one(seed: int = 0, **options) -> Scene:
    return scenes(1, seed, **options)[0]


def with_sprite(scene: Scene, **changes) -> Scene:
    return replace(scene, sprites=(replace(scene.sprites[0], **changes),))


def softened(clip: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian over rows and columns of [F, 3, H, W]."""
    gap = np.arange(clip.shape[-1])
    weight = np.exp(-((gap[:, None] - gap) ** 2) / (2 * sigma**2))
    weight /= weight.sum(1, keepdims=True)
    return weight @ clip.astype(float) @ weight.T


def coarse(clip: np.ndarray, step: float) -> np.ndarray:
    """JPEG's loss: the cosines of every 8 x 8 block, rounded to multiples that grow with the frequency."""
    k = np.arange(8)
    basis = np.cos(np.pi * k[:, None] * (k + 0.5) / 8) * np.where(k == 0, 0.5**0.5, 1)[:, None] / 2
    f, c, h, w = clip.shape
    blocks = clip.reshape(f, c, h // 8, 8, w // 8, 8).transpose(0, 1, 2, 4, 3, 5)
    steps = step * (1 + k[:, None] + k)
    blocks = basis.T @ (np.rint(basis @ blocks @ basis.T / steps) * steps) @ basis
    return np.clip(np.rint(blocks.transpose(0, 1, 2, 4, 3, 5).reshape(clip.shape)), 0, 255).astype(np.uint8)


def misses(tracked, truth) -> tuple[float, float, float]:
    """The largest errors over the frames: place (pixels), size (share), angle (degrees)."""
    place = np.hypot(tracked.x - truth.x, tracked.y - truth.y).max()
    size = np.abs(tracked.length / truth.length - 1).max()
    return place, size, np.degrees(np.abs(tracked.angle - truth.angle)).max()


# The world


@pytest.mark.parametrize("size", [48, 64, (64, 112), (72, 128)])
def test_a_clip_has_the_requested_shape(size):
    clip = render(one(size=size, num_frames=16, num_sprites=2))
    height, width = (size, size) if isinstance(size, int) else size
    assert clip.shape == (16, 3, height, width) and clip.dtype == np.uint8


@pytest.mark.parametrize("options", [{}, {"num_sprites": 2}, {"camera": True}, {"size": (72, 128), "num_frames": 20}])
def test_the_same_seed_gives_the_same_bytes(options):
    (a, b), (c, d) = scenes(2, 5, **options), scenes(2, 5, **options)
    assert (a, b) == (c, d) and a != b
    assert np.array_equal(render(a), render(c))


def test_impossible_scenes_are_refused():
    scene = one()
    for change, reason in [
        ({"size": (40, 40)}, "at least 48"),
        ({"size": (64, 48)}, "neither square nor"),
        ({"size": (64, 200)}, "neither square nor"),
        ({"num_frames": 7}, "7 frames .* 7 slots"),
        ({"program": ("left",) * 7}, "unknown word 'left'"),
        ({"program": ()}, "0 slots"),
        ({"sprites": ()}, "needs a sprite"),
        ({"sprites": (replace(scene.sprites[0], shape="ghost"),)}, "unknown shape 'ghost'"),
    ]:
        with pytest.raises(ValueError, match=reason):
            replace(scene, **change)
    with pytest.raises(ValueError, match="one or two sprites, not 3"):
        one(num_sprites=3)


@pytest.mark.parametrize("facing", [1, -1])
@pytest.mark.parametrize("word", SPRITE_WORDS)
def test_a_word_moves_the_sprite_in_its_direction_only(word, facing):
    scene = with_sprite(one(program=(word,) * 7), facing=facing, tilt=0.0)
    column, sign = {
        "forward": (0, 1),
        "backward": (0, -1),
        "up": (1, 1),
        "down": (1, -1),
        "grow": (2, 1),
        "shrink": (2, -1),
        "turn": (3, 1),
        "still": (0, 0),
    }[word]
    happened = relative_motion(trajectory(scene)[0])
    assert np.allclose(np.delete(happened, column, axis=1), 0)
    assert np.all(np.diff(happened[:6, column]) * sign > 0) if sign else np.allclose(happened, 0)


@pytest.mark.parametrize("facing", [1, -1])
def test_forward_follows_the_nose(facing):
    scene = with_sprite(one(program=("forward",) * 7), facing=facing, tilt=0.4)
    path = trajectory(scene)[0]
    moved = relative_motion(path)
    assert np.allclose(moved[:, 1], 0) and moved[-1, 0] == pytest.approx(13 * 0.055 * 64)
    assert np.sign(path.x[-1] - path.x[0]) == facing and path.y[-1] < path.y[0]  # nose up is upwards
    turned = trajectory(replace(scene, program=("turn",) * 4 + ("forward",) * 3))[0]
    steps = np.stack([facing * np.diff(turned.x), -np.diff(turned.y)])[:, -3:]
    assert np.allclose(np.arctan2(steps[1], steps[0]), turned.angle[-1])


@pytest.mark.parametrize("word", CAMERA_WORDS)
@pytest.mark.parametrize("facing", [1, -1])
def test_the_camera_moves_sprite_and_background_together(word, facing):
    scene = with_sprite(one(program=(word,) * 7), facing=facing)
    path, (pan, zoom) = trajectory(scene)[0], camera(scene)
    ahead, closer = {"pan ahead": (1, 0), "pan back": (-1, 0), "zoom in": (0, 1), "zoom out": (0, -1)}[word]
    assert np.sign(facing * pan[-1]) == ahead and np.sign(round(np.log(zoom[-1]), 9)) == closer
    assert np.allclose(path.length, path.length[0] * zoom)
    assert np.allclose(path.x - 32, zoom * (path.x[0] - 32 - pan))
    seen = render_background(scene).astype(int)
    assert np.abs(seen[-1] - seen[0]).mean() > 3
    if ahead:  # by whole pixels, a pan is a shift
        frame = int(np.argmin(np.abs(pan[1:] - np.rint(pan[1:])))) + 1
        shift = round(pan[frame])
        rolled, kept = np.roll(seen[0], -shift, axis=-1), np.s_[..., max(-shift, 0) : 64 - max(shift, 0)]
        assert np.abs(rolled - seen[frame])[kept].mean() < 3


def test_words_take_effect_in_their_slots():
    early = one(program=("forward",) * 2 + ("still",) * 5)
    late = replace(early, program=("still",) * 5 + ("forward",) * 2)
    early, late = (relative_motion(trajectory(s)[0])[:, 0] for s in (early, late))
    assert early[4] > 10 and np.allclose(early[6:], early[-1])
    assert np.allclose(late[:9], 0) and late[-1] > 8


def test_another_number_of_frames_runs_the_same_path():
    short = one(program=("up",) * 7)
    long = replace(short, num_frames=27)
    assert trajectory(long)[0].y[-1] == pytest.approx(trajectory(short)[0].y[-1])
    assert trajectory(long)[0].y[2] == pytest.approx(trajectory(short)[0].y[1])


def test_a_wave_bobs_on_top_of_the_program():
    smooth = one(program=("forward",) * 7)
    waved = trajectory(with_sprite(smooth, wave=Wave(0.2, 4)))[0]
    smooth, length = trajectory(smooth)[0], smooth.sprites[0].length
    assert np.allclose(waved.x, smooth.x)
    assert np.allclose((smooth.y - waved.y)[:5], 0.2 * length * np.array([0, 1, 0, -1, 0]))


@pytest.mark.parametrize("options", [{}, {"camera": True, "num_sprites": 2}, {"size": (64, 112), "wave": Wave(0.1, 5)}])
def test_a_flip_mirrors_the_clip_and_keeps_the_caption(options):
    for scene in scenes(4, **options):
        mirrored = flip(scene)
        assert mirrored.program == scene.program and flip(mirrored).background == scene.background
        assert np.abs(render(mirrored).astype(int) - render(scene)[..., ::-1]).max() <= 1
        for a, b in zip(trajectory(mirrored), trajectory(scene)):
            assert np.allclose(relative_motion(a), relative_motion(b))


def test_random_programs_have_runs():
    rng = np.random.default_rng(0)
    programs = [random_program(rng) for _ in range(500)]
    runs = np.array([1 + sum(a != b for a, b in zip(p, p[1:])) for p in programs])
    assert all(len(p) == 7 and set(p) <= set(SPRITE_WORDS) for p in programs)
    assert set(runs) == {1, 3, 4, 5, 6} and 0.06 < (runs == 1).mean() < 0.14
    assert sum(p == STILL for p in programs) < 5
    assert {w for p in programs for w in p} == set(SPRITE_WORDS)
    assert {w for _ in range(100) for w in random_program(rng, words=WORDS)} == set(WORDS)
    assert len(random_program(rng, num_slots=4)) == 4


@pytest.mark.parametrize("options", [{}, {"num_sprites": 2}, {"camera": True}, {"size": (64, 112)}])
def test_most_scenes_stay_inside_the_picture(options):
    margins = []
    for scene in scenes(60, **options):
        for path in trajectory(scene):
            height, width = scene.size
            border = np.minimum.reduce([path.x, width - path.x, path.y, height - path.y])
            margins.append((border / path.length).min())
            assert np.all(path.length / path.length[0] < SCALES[1] + 1e-6)
            assert np.all(path.length / path.length[0] > SCALES[0] - 1e-6)
    assert np.mean(np.array(margins) > 0.4) > 0.9 and min(margins) > 0.2


def test_two_sprites_start_apart():
    apart = [
        np.hypot(a.x - b.x, a.y - b.y) / ((a.length + b.length) / 2)
        for a, b in (scene.sprites for scene in scenes(60, num_sprites=2))
    ]
    assert np.mean(np.array(apart) > 0.9) > 0.9


def test_scenes_move_by_several_pixels():
    far = [np.linalg.norm(relative_motion(trajectory(scene)[0])[4:], axis=1).mean() for scene in scenes(100)]
    assert np.mean(far) > 6


def test_backgrounds_differ_and_sprites_stand_out():
    drawn = scenes(30)
    backgrounds = [render_background(scene)[0].astype(int) for scene in drawn]
    assert min(np.abs(a - b).mean() for a, b in zip(backgrounds, backgrounds[1:])) > 10
    for scene, background in zip(drawn, backgrounds):
        colour = 255 * np.array(scene.sprites[0].colour)[:, None, None]
        assert np.linalg.norm(background - colour, axis=0).min() > 80
        changed = np.abs(render(scene)[0].astype(int) - background).max(0) > 20
        assert changed.sum() > 0.15 * scene.sprites[0].length ** 2


@pytest.mark.parametrize("shape", SHAPES)
def test_the_picture_of_a_shape_determines_its_facing(shape):
    """No turn makes a body look like its mirror image."""
    scene = with_sprite(one(shapes=(shape,), program=STILL), x=32.0, y=32.0, length=30.0, tilt=0.0)
    turns = [with_sprite(scene, facing=-scene.sprites[0].facing, tilt=t) for t in np.linspace(-np.pi, np.pi, 24)]
    own, bare = render(scene)[0].astype(int), render_background(scene)[0].astype(int)
    nearest = min(np.square(render(turned)[0].astype(int) - own).sum() for turned in turns)
    assert nearest > 0.2 * np.square(own - bare).sum()


def test_every_shape_has_a_habit():
    for shape in SHAPES:
        for num_slots in (4, 7):
            own = habit(shape, num_slots)
            assert len(own.program) == num_slots and set(own.program) <= set(SPRITE_WORDS)
    assert len({habit(shape) for shape in SHAPES}) == len(SHAPES)


# The tracker


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tracker_finds_every_shape_under_every_word(shape):
    """The tracker is given a scene that stands still, so it cannot use the program."""
    for word in SPRITE_WORDS:
        scene = one(seed=len(word), shapes=(shape,), program=(word,) * 7)
        tracked = tracker.track(render(scene), replace(scene, program=STILL))
        place, size, angle = misses(tracked, trajectory(scene)[0])
        assert place < 0.3 and size < 0.02 and angle < 2, word
        assert tracker.motion_error(tracked, trajectory(scene)[0]) < 0.05


@pytest.mark.parametrize("loss", ["blur and noise", "jpeg"])
def test_the_tracker_tolerates_blur_noise_and_compression(loss):
    rng = np.random.default_rng(0)
    for scene in scenes(12, 7):
        clip = render(scene)
        if loss == "jpeg":
            clip = coarse(clip, 5.0)
        else:
            clip = np.clip(softened(clip, 1.0) + rng.normal(0, 6, clip.shape), 0, 255).astype(np.uint8)
        place, size, angle = misses(tracker.track(clip, replace(scene, program=STILL)), trajectory(scene)[0])
        assert place < 0.5 and size < 0.04 and angle < 4


@pytest.mark.parametrize("word", CAMERA_WORDS)
def test_the_tracker_follows_the_camera(word):
    """The tracker is given another motion of the camera than the clip has."""
    scene = one(program=(word,) * 4 + ("forward",) * 3)
    other = replace(scene, program=CAMERA_WORDS[:1] * 7)
    place, size, angle = misses(tracker.track(render(scene), other), trajectory(scene)[0])
    assert place < 0.3 and size < 0.02 and angle < 2


@pytest.mark.parametrize("seed, place, size, angle", [(0, 0.1, 0.01, 0.5), (7, 0.3, 0.02, 2)])
def test_the_tracker_separates_two_sprites(seed, place, size, angle):
    """Side by side, and where one covers a part of the other."""
    scene = one(seed=seed, num_sprites=2, program=("up",) * 3 + ("turn",) * 4)
    paths = trajectory(scene)
    nearest = np.hypot(paths[0].x - paths[1].x, paths[0].y - paths[1].y).min()
    assert (nearest < max(paths[0].length.max(), paths[1].length.max())) == (seed == 7)
    for which, truth in enumerate(paths):
        missed = misses(tracker.track(render(scene), scene, which), truth)
        assert missed[0] < place and missed[1] < size and missed[2] < angle


def test_where_no_colour_is_free_a_sprite_has_the_most_distant():
    """All colours are taken but those around red, green and blue."""
    levels = np.linspace(0, 1, 11)
    taken = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    taken = taken[np.linalg.norm(taken[:, None] - np.eye(3), axis=2).min(1) > 0.45]
    for seed in range(10):
        colour = random_colour(np.random.default_rng(seed), taken)
        assert 0.1 < np.linalg.norm(taken - colour, axis=1).min() < 0.5


def test_an_absent_sprite_keeps_its_last_pose():
    scene = one(program=("up",) * 7)
    clip, truth = render(scene), trajectory(scene)[0]
    clip[5:8] = render_background(scene)[5:8]
    tracked = tracker.track(clip, scene)
    assert np.all(tracked.y[5:8] == tracked.y[4]) and abs(tracked.y[4] - truth.y[4]) < 0.3
    assert np.isfinite(tracker.motion_error(tracker.track(np.zeros_like(clip), scene), truth))


def test_the_tracker_detects_which_way_a_sprite_faces():
    for scene in scenes(4, 2):
        turned = with_sprite(scene, facing=-scene.sprites[0].facing)
        assert tracker.facing(render(scene), scene) > 0.9
        assert tracker.facing(render(turned), scene) < -0.9


def test_motion_error_is_0_for_the_truth_and_1_for_stillness():
    for scene in scenes(5):
        truth, still = trajectory(scene)[0], trajectory(replace(scene, program=STILL))[0]
        assert tracker.motion_error(truth, truth) == 0
        assert tracker.motion_error(still, truth) == pytest.approx(1)
    assert tracker.motion_error(truth, still) > 1
    assert tracker.motion_error(still, still) == 0
