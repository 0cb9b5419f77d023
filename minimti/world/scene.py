"""Scenes of the procedural world: clips of sprites with exactly known motion, described by a short program of words.

A program is the caption of a clip. Its words divide the clip into equal slots of time. A word describes motion relative
to the sprite's own heading ("forward", not "right"), so a clip and its mirror image have the same caption.

Coordinates: x points right and y points down, in pixels; pixel (i, j) covers [j, j + 1] x [i, i + 1]. Lengths and
speeds scale with the picture's height. Angles are in radians; positive means nose up, whichever way the sprite faces.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from minimti.world.shapes import REACH, SHAPES, distances

SPEED = 0.055  # picture heights per frame
GROWTH = np.log(1.06)  # log scale per frame
TURN = np.radians(6)  # per frame
SCALES = (0.6, 1.6)  # bounds of a sprite's size in the picture, relative to its size in frame 0
REFERENCE_FRAMES = 14  # the rates hold for this clip length; other lengths cover the same path at another speed

# Columns: sprite forward, up, growth, turn; camera pan, zoom.
RATES = {
    "still": (0, 0, 0, 0, 0, 0),
    "forward": (SPEED, 0, 0, 0, 0, 0),
    "backward": (-SPEED, 0, 0, 0, 0, 0),
    "up": (0, SPEED, 0, 0, 0, 0),
    "down": (0, -SPEED, 0, 0, 0, 0),
    "grow": (0, 0, GROWTH, 0, 0, 0),
    "shrink": (0, 0, -GROWTH, 0, 0, 0),
    "turn": (0, 0, 0, TURN, 0, 0),
    "pan ahead": (0, 0, 0, 0, SPEED, 0),
    "pan back": (0, 0, 0, 0, -SPEED, 0),
    "zoom in": (0, 0, 0, 0, 0, GROWTH),
    "zoom out": (0, 0, 0, 0, 0, -GROWTH),
}
WORDS = tuple(RATES)  # the vocabulary; a word's index is its id
NUM_SLOTS = 7  # words in a caption
SPRITE_WORDS, CAMERA_WORDS = WORDS[:8], WORDS[8:]

MIN_SIDE = 48  # pixels
LENGTHS = {1: (0.36, 0.48), 2: (0.3, 0.38)}  # number of sprites -> range of their lengths, in picture heights
MAX_TILT = np.radians(15)  # in frame 0
TRIES = 16  # random candidates for a sprite's place or colour

Program = tuple[str, ...]


@dataclass(frozen=True)
class Wave:
    """A vertical sine added to the program's path. Amplitude in body lengths, period in frames."""

    amplitude: float
    period: float


@dataclass(frozen=True)
class Sprite:
    """A body in frame 0: centre and length in pixels, facing right (1) or left (-1), nose up by `tilt` radians."""

    shape: str
    colour: tuple[float, float, float]  # RGB in [0,1]
    x: float
    y: float
    length: float
    facing: int
    tilt: float
    wave: Wave | None = None

    @property
    def detail(self) -> tuple[float, float, float]:
        """RGB in [0,1] of eyes, wheels and windows: dark on a light body, light on a dark one."""
        light = float(np.dot(self.colour, (0.3, 0.6, 0.1))) > 0.4
        red, green, blue = (0.15 * c if light else 0.2 * c + 0.8 for c in self.colour)
        return red, green, blue


@dataclass(frozen=True)
class Background:
    """A random texture, determined by its seed."""

    seed: int
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """Everything a clip shows. All sprites follow the program; "pan ahead" is along the first sprite's facing.

    Raises ValueError for a picture that is too small or of an unsupported shape, a clip with fewer steps than words,
    an unknown word or shape, or no sprite.
    """

    size: tuple[int, int]  # height, width in pixels
    num_frames: int
    background: Background
    sprites: tuple[Sprite, ...]
    program: Program

    def __post_init__(self):
        height, width = self.size
        if height < MIN_SIDE:
            raise ValueError(f"a picture of {height} rows is too small for a sprite: at least {MIN_SIDE}")
        if not 1 <= width / height <= 1.8:
            raise ValueError(f"a picture of {width} x {height} pixels is neither square nor up to 16:9")
        if not self.program or self.num_frames - 1 < len(self.program):
            raise ValueError(f"{self.num_frames} frames have too few steps for {len(self.program)} slots")
        for word in self.program:
            if word not in RATES:
                raise ValueError(f"unknown word {word!r}: {', '.join(WORDS)}")
        if not self.sprites:
            raise ValueError("a scene needs a sprite")
        for sprite in self.sprites:
            if sprite.shape not in SHAPES:
                raise ValueError(f"unknown shape {sprite.shape!r}: {', '.join(SHAPES)}")


@dataclass(frozen=True)
class Trajectory:
    """A sprite's pose in every frame: x, y, length in pixels and angle in radians, each [F]; facing is 1 or -1."""

    x: np.ndarray
    y: np.ndarray
    length: np.ndarray
    angle: np.ndarray
    facing: int


@dataclass(frozen=True)
class Habit:
    """The motion that a shape makes by default."""

    program: Program
    wave: Wave | None = None


# The habit of each shape. Its words are stretched over the slots of a caption.
HABITS = {
    "arrow": Habit(("forward",)),
    "fish": Habit(("forward",), Wave(0.12, 6)),
    "car": Habit(("forward", "forward", "still", "backward")),
    "bird": Habit(("up", "forward", "up", "forward", "up", "forward", "up")),
    "snail": Habit(("forward", "still", "still", "forward", "still", "still", "forward")),
    "rocket": Habit(("turn", "turn", "turn", "forward", "forward", "forward", "forward")),
    "mouse": Habit(("forward", "still", "backward", "backward", "still", "forward", "forward")),
    "boat": Habit(("forward", "still", "forward", "still", "forward", "still", "forward"), Wave(0.15, 9)),
    "airship": Habit(("up",)),
    "whale": Habit(("down", "down", "forward", "forward", "up", "up", "up")),
}


def habit(shape: str, num_slots: int = NUM_SLOTS) -> Habit:
    """The habit of a shape, with its program stretched to `num_slots` words."""
    own = HABITS[shape]
    return replace(own, program=tuple(own.program[i * len(own.program) // num_slots] for i in range(num_slots)))


def random_program(
    rng: np.random.Generator, num_slots: int = NUM_SLOTS, words: tuple[str, ...] = SPRITE_WORDS
) -> Program:
    """A program of `num_slots` words: with probability 0.1 a single word throughout, else 3 to 6 runs of a word each.

    The runs have random lengths and neighbouring runs have different words. "still" has 0.3 of the weight of others.
    """
    weights = np.array([0.3 if word == "still" else 1.0 for word in words])
    if rng.random() < 0.1:
        return (str(rng.choice(words, p=weights / weights.sum())),) * num_slots
    num_runs = min(int(rng.integers(3, 7)), num_slots)
    starts = np.sort(rng.choice(np.arange(1, num_slots), num_runs - 1, replace=False))
    lengths = np.diff(np.concatenate([[0], starts, [num_slots]]))
    program: list[str] = []
    for length in lengths:
        repeats = np.array([bool(program) and word == program[-1] for word in words])
        chances = np.where(repeats, 0, weights)
        program += [str(rng.choice(words, p=chances / chances.sum()))] * length
    return tuple(program)


@lru_cache(maxsize=256)
def rates(program: Program, num_frames: int) -> np.ndarray:
    """[F - 1, 6], read-only: the columns of RATES from each frame to the next.

    Rates are smoothed over time with the weights 1/4, 1/2, 1/4. Growth and zoom stop where the sprite's size would
    leave SCALES.
    """
    slot = np.arange(num_frames - 1) * len(program) // (num_frames - 1)
    steps = np.array([RATES[word] for word in program], float)[slot] * (REFERENCE_FRAMES - 1) / (num_frames - 1)
    padded = np.pad(steps, ((1, 1), (0, 0)), mode="edge")
    steps = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    log_scale, (low, high) = 0.0, np.log(SCALES)
    for step in steps:
        wanted = step[2] + step[5]
        allowed = np.clip(log_scale + wanted, low, high) - log_scale
        if allowed != wanted:
            step[[2, 5]] *= allowed / wanted
        log_scale += allowed
    steps.setflags(write=False)  # the cache returns the same array to every caller
    return steps


def cumulative(steps: np.ndarray) -> np.ndarray:
    """[F - 1] steps -> [F] sums; 0 in frame 0."""
    return np.concatenate([[0.0], np.cumsum(steps)])


def camera(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The camera's horizontal position (world pixels, right is positive) and magnification, each [F]; 0 and 1 first."""
    steps = rates(scene.program, scene.num_frames)
    zoom = np.exp(cumulative(steps[:, 5]))
    pan = cumulative(steps[:, 4] / np.sqrt(zoom[1:] * zoom[:-1])) * scene.size[0] * scene.sprites[0].facing
    return pan, zoom


def trajectory(scene: Scene) -> tuple[Trajectory, ...]:
    """The exact paths of all sprites, in pixels of the picture."""
    (height, width), steps = scene.size, rates(scene.program, scene.num_frames)
    pan, zoom = camera(scene)
    forward, up, growth, turn = (height * steps[:, 0], height * steps[:, 1], steps[:, 2], steps[:, 3])
    paths = []
    for sprite in scene.sprites:
        angle = sprite.tilt + cumulative(turn)
        heading = (angle[1:] + angle[:-1]) / 2
        x = sprite.x + sprite.facing * cumulative(forward * np.cos(heading))
        y = sprite.y - cumulative(forward * np.sin(heading) + up)
        if sprite.wave:
            phase = 2 * np.pi * np.arange(scene.num_frames) / sprite.wave.period
            y = y - sprite.wave.amplitude * sprite.length * np.sin(phase)
        paths.append(
            Trajectory(
                x=width / 2 + zoom * (x - pan - width / 2),
                y=height / 2 + zoom * (y - height / 2),
                length=sprite.length * zoom * np.exp(cumulative(growth)),
                angle=angle,
                facing=sprite.facing,
            )
        )
    return tuple(paths)


def relative_motion(path: Trajectory) -> np.ndarray:
    """[F, 4]: the motion since frame 0 relative to the sprite's pose in frame 0, all in pixels.

    Columns: displacement along the heading of frame 0; displacement towards the back; growth and turn (nose up), each
    as the displacement of a point half a body length from the centre. A mirrored path has the same relative motion.
    """
    dx, dy = path.facing * (path.x - path.x[0]), path.y[0] - path.y
    cos, sin, half = np.cos(path.angle[0]), np.sin(path.angle[0]), path.length[0] / 2
    growth, turn = half * (path.length / path.length[0] - 1), half * (path.angle - path.angle[0])
    return np.stack([cos * dx + sin * dy, cos * dy - sin * dx, growth, turn], axis=1)


PERIOD = 3.0  # picture heights after which a background repeats
NUM_FREQUENCIES = 16


@lru_cache(maxsize=256)
def coefficients(seed: int) -> np.ndarray:
    """Fourier coefficients [3, y, x] of a background: broad dull patches of colour plus a fine grey texture."""
    rng = np.random.default_rng(seed)
    frequency = (np.arange(2 * NUM_FREQUENCIES - 1) + 1) // 2  # 0, then a cosine and a sine of each
    radius = np.hypot(frequency[:, None], frequency[None])
    patches = rng.normal(size=(3, *radius.shape)) * np.exp(-((radius / 3) ** 2))
    texture = rng.normal(size=radius.shape) * np.exp(-(((radius - 7) / 3) ** 2))
    patches[:, 0, 0] = texture[0, 0] = 0
    patches *= 0.13 / np.sqrt((patches**2).sum((1, 2), keepdims=True))
    texture *= 0.08 / np.sqrt((texture**2).sum())
    field = patches + texture
    field[:, 0, 0] = rng.uniform(0.3, 0.7) + rng.uniform(-0.12, 0.12, 3)
    return field.astype(np.float32)


def background_view(background: Background, size: tuple[int, int], pan: np.ndarray, zoom: np.ndarray) -> np.ndarray:
    """The background through a camera at pan (world pixels), zoom, each [F]: float32 [F, 3, H, W] in [0,1].

    The Fourier basis is separable, so a frame is a product of three small matrices.
    """
    height, width = size

    def basis(side: int, shift: np.ndarray, sign: int) -> np.ndarray:
        pixels = sign * ((np.arange(side) + 0.5 - side / 2) / zoom[:, None] + shift[:, None])  # [F, side], of the world
        phase = (2 * np.pi / (PERIOD * height) * pixels[..., None] * np.arange(NUM_FREQUENCIES)).astype(np.float32)
        both = np.stack([np.sin(phase), np.cos(phase)], axis=-1)  # [F, side, frequency, 2]
        return both.reshape(len(zoom), side, -1)[..., 1:]  # [F, side, 2 frequencies - 1]: no sine of frequency 0

    rows, columns = basis(height, 0 * pan, 1), basis(width, pan, -1 if background.mirrored else 1)
    columns = columns[:, None].transpose(0, 1, 3, 2)  # [F, 1, 2 frequencies - 1, W]
    return np.clip(rows[:, None] @ coefficients(background.seed) @ columns, 0, 1)


def paint(canvas: np.ndarray, sprite: Sprite, path: Trajectory) -> None:
    """Paint a sprite in place, anti-aliased, at the poses of `path` [F].

    canvas is contiguous float32 [F, 3, H, W] in [0,1].
    """
    height, width = canvas.shape[2:]
    cos, sin, length = (w.astype(np.float32)[:, None] for w in (np.cos(path.angle), np.sin(path.angle), path.length))
    dx = (path.facing * (np.arange(width) + 0.5 - path.x[:, None])).astype(np.float32) / length  # [F, W]
    dy = (np.arange(height) + 0.5 - path.y[:, None]).astype(np.float32) / length  # [F, H]
    # The nose points along facing * (cos, -sin), the back along (-facing * sin, -cos).
    u = ((cos * dx)[:, None, :] - (sin * dy)[:, :, None]).ravel()  # [(F H W)]
    v = -((sin * dx)[:, None, :] + (cos * dy)[:, :, None]).ravel()  # [(F H W)]
    near = np.flatnonzero(u * u + v * v < REACH * REACH)
    frame = near // (height * width)
    body, details = np.float32(0.5) - distances(sprite.shape, u[near], v[near]) * length[frame, 0]
    hit = np.flatnonzero(body > 0)
    body, details = np.minimum(body[hit], 1), np.clip(details[hit], 0, 1)
    values, red = canvas.reshape(-1), (near + 2 * height * width * frame)[hit]  # values: a view of [(F 3 H W)]
    for channel, (colour, detail) in enumerate(zip(sprite.colour, sprite.detail)):
        at = red + channel * height * width
        below = values[at]
        values[at] = below + body * (colour + details * (detail - colour) - below)


def to_uint8(clip: np.ndarray) -> np.ndarray:
    """Float in [0,1] -> uint8, rounded."""
    return np.rint(clip * 255).astype(np.uint8)


def background_frames(scene: Scene) -> np.ndarray:
    """The clip without its sprites: float32 [F, 3, H, W] in [0,1]. Drawn once if the camera does not move."""
    pan, zoom = camera(scene)
    if not set(scene.program) & set(CAMERA_WORDS):
        still = background_view(scene.background, scene.size, pan[:1], zoom[:1])
        return np.repeat(still, scene.num_frames, axis=0)
    return background_view(scene.background, scene.size, pan, zoom)


def render_background(scene: Scene) -> np.ndarray:
    """The clip without its sprites: uint8 [F, 3, H, W]."""
    return to_uint8(background_frames(scene))


def render(scene: Scene) -> np.ndarray:
    """The clip: uint8 [F, 3, H, W]. Later sprites cover earlier ones."""
    canvas = background_frames(scene)
    for sprite, path in zip(scene.sprites, trajectory(scene)):
        paint(canvas, sprite, path)
    return to_uint8(canvas)


def flip(scene: Scene) -> Scene:
    """The mirrored scene. Its caption is the same."""
    mirrored = tuple(replace(s, x=scene.size[1] - s.x, facing=-s.facing) for s in scene.sprites)
    background = replace(scene.background, mirrored=not scene.background.mirrored)
    return replace(scene, sprites=mirrored, background=background)


def random_colour(rng: np.random.Generator, avoid: np.ndarray) -> tuple[float, float, float]:
    """A saturated colour, RGB in [0,1], at a distance from all colours in `avoid` [N, 3].

    The first of TRIES candidates with a distance above 0.5, or the most distant one.
    """
    hue, saturation, value = rng.random((TRIES, 1)), rng.uniform(0.8, 1, (TRIES, 1)), rng.uniform(0.75, 1, (TRIES, 1))
    wheel = np.clip(np.abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    colours = value * (1 - saturation * (1 - wheel))
    gaps = np.linalg.norm(colours[:, None] - avoid[None], axis=2).min(axis=1)
    far = np.flatnonzero(gaps > 0.5)
    red, green, blue = colours[far[0] if len(far) else gaps.argmax()].tolist()
    return red, green, blue


def place_inside(scene: Scene, rng: np.random.Generator) -> tuple[Sprite, float]:
    """Move the scene's last sprite to a random start from which its path stays inside the picture.

    Inside means that its centre keeps half a body length from the border. A path too long for the picture is centred.
    Returns the sprite, and the pixels by which the path is too long (0 if it fits).
    """
    pan, zoom = camera(scene)
    sprite, path = scene.sprites[-1], trajectory(scene)[-1]
    place, excess = [], 0.0
    for start, now, side in ((sprite.x, path.x, scene.size[1]), (sprite.y, path.y, scene.size[0])):
        low = start + ((path.length / 2 - now) / zoom).max()
        high = start + ((side - path.length / 2 - now) / zoom).min()
        excess = max(excess, low - high)
        place.append(float(rng.uniform(low, high) if low < high else (low + high) / 2))
    return replace(sprite, x=place[0], y=place[1]), excess


def random_scene(
    rng: np.random.Generator,
    size: int | tuple[int, int] = 64,
    num_frames: int = REFERENCE_FRAMES,
    num_sprites: int = 1,
    program: Program | None = None,
    shapes: tuple[str, ...] = SHAPES,
    camera: bool = False,
    wave: Wave | None = None,
) -> Scene:
    """A random scene; `size` is the side of a square or (height, width) in pixels, `num_sprites` 1 or 2.

    Without a program a random one is drawn; `camera` adds camera words to its vocabulary. As far as the program leaves
    room, paths stay inside the picture and two sprites start apart. Raises ValueError as `Scene` does, and for another
    number of sprites.
    """
    if num_sprites not in LENGTHS:
        raise ValueError(f"a scene has one or two sprites, not {num_sprites}")
    height, width = (size, size) if isinstance(size, int) else size
    if program is None:
        program = random_program(rng, words=WORDS if camera else SPRITE_WORDS)
    program = tuple(program)
    background = Background(int(rng.integers(2**31)))
    view = background_view(background, (height, width), np.zeros(1), np.ones(1))[0]
    avoid = view[:, ::4, ::4].reshape(3, -1).T  # [pixels, 3]
    sprites: tuple[Sprite, ...] = ()
    for _ in range(num_sprites):
        colour, shape = random_colour(rng, avoid), str(rng.choice(shapes))
        avoid = np.concatenate([avoid, [colour]])
        candidates: list[tuple[float, Sprite]] = []  # with the pixels by which each one misses its constraints
        while len(candidates) < TRIES:
            sprite = Sprite(
                shape,
                colour,
                x=width / 2,
                y=height / 2,
                length=height * rng.uniform(*LENGTHS[num_sprites]),
                facing=int(rng.choice([-1, 1])),
                tilt=rng.uniform(-MAX_TILT, MAX_TILT),
                wave=wave,
            )
            scene = Scene((height, width), num_frames, background, (*sprites, sprite), program)
            sprite, excess = place_inside(scene, rng)
            crowding = max([sprite.length - np.hypot(sprite.x - o.x, sprite.y - o.y) for o in sprites], default=0.0)
            fault = max(excess, crowding, 0.0)
            candidates.append((fault, sprite))
            if fault == 0:
                break
        sprites = (*sprites, min(candidates, key=lambda candidate: candidate[0])[1])
    return Scene((height, width), num_frames, background, sprites, program)
