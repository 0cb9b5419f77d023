"""The procedural world: clips of sprites whose motion is known exactly, made from a few words.

A program is the caption of a clip: a word for each of its equal stretches of time. Words are relative to the sprite's
own heading (forward, not right), so a mirrored clip has the same caption.

Pictures are x to the right and y down, in pixels; pixel (i, j) covers [j, j + 1] x [i, i + 1]. Lengths and speeds
scale with the picture's height. Angles are in radians, nose up positive for either facing.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from minimti.world.shapes import REACH, SHAPES, distances

SPEED = 0.055  # of the picture's height, per frame
GROWTH = np.log(1.06)  # of the size, per frame
TURN = np.radians(6)  # per frame
SCALES = (0.6, 1.6)  # a sprite's size in the picture over its size at the start never leaves this range
USUAL_FRAMES = 14  # the speeds are for this many; a clip of another length runs the same path faster or slower

# forward, up, growth, turn; pan, zoom of the camera
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
WORDS = tuple(RATES)  # a word's index is its id
SPRITE_WORDS, CAMERA_WORDS = WORDS[:8], WORDS[8:]

MIN_SIDE = 48
LENGTHS = {1: (0.36, 0.48), 2: (0.3, 0.38)}  # of the picture's height, by the number of sprites
MAX_TILT = np.radians(15)
TRIES = 16

Program = tuple[str, ...]


@dataclass(frozen=True)
class Wave:
    """Bobbing up and down on top of the program: a gait. Amplitude in body lengths, period in frames."""

    amplitude: float
    period: float


@dataclass(frozen=True)
class Sprite:
    """A body in frame 0: its middle and length in pixels, facing right (1) or left (-1), nose up by `tilt`."""

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
        """The colour of eyes, wheels and windows: dark on a light body, light on a dark one."""
        light = float(np.dot(self.colour, (0.3, 0.6, 0.1))) > 0.4
        return tuple(0.15 * c if light else 0.2 * c + 0.8 for c in self.colour)


@dataclass(frozen=True)
class Background:
    seed: int
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """Everything a clip shows. All sprites follow the program; the camera's words are along the first one's facing.

    ValueError for a picture, a length of clip, a word or a shape that cannot be.
    """

    size: tuple[int, int]  # height, width
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
            raise ValueError(f"{self.num_frames} frames do not move often enough for {len(self.program)} slots")
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
    """Where a sprite is in every frame: x, y, length in pixels and angle in radians, each [F]; facing 1 or -1."""

    x: np.ndarray
    y: np.ndarray
    length: np.ndarray
    angle: np.ndarray
    facing: int


@dataclass(frozen=True)
class Habit:
    program: Program
    wave: Wave | None = None


# What a shape does when left alone. Its words are stretched over the slots, so that two words in turn make a slow gait.
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


def habit(shape: str, num_slots: int = 7) -> Habit:
    """The natural motion of a shape, as a program of num_slots words and perhaps a wave."""
    own = HABITS[shape]
    return replace(own, program=tuple(own.program[i * len(own.program) // num_slots] for i in range(num_slots)))


def random_program(rng: np.random.Generator, num_slots: int = 7, words: tuple[str, ...] = SPRITE_WORDS) -> Program:
    """One word all over (10 %), else 3 to 6 runs of a word each, of random lengths; standing still is rare."""
    weights = np.array([0.3 if word == "still" else 1.0 for word in words])
    if rng.random() < 0.1:
        return (str(rng.choice(words, p=weights / weights.sum())),) * num_slots
    num_runs = min(int(rng.integers(3, 7)), num_slots)
    starts = np.sort(rng.choice(np.arange(1, num_slots), num_runs - 1, replace=False))
    lengths = np.diff(np.concatenate([[0], starts, [num_slots]]))
    program: list[str] = []
    for length in lengths:
        others = np.array([bool(program) and word == program[-1] for word in words])
        chances = np.where(others, 0, weights)
        program += [str(rng.choice(words, p=chances / chances.sum()))] * length
    return tuple(program)


@lru_cache(maxsize=256)
def rates(program: Program, num_frames: int) -> np.ndarray:
    """[F - 1, 6]: the columns of RATES from each frame to the next, eased from word to word and within SCALES."""
    slot = np.arange(num_frames - 1) * len(program) // (num_frames - 1)
    steps = np.array([RATES[word] for word in program], float)[slot] * (USUAL_FRAMES - 1) / (num_frames - 1)
    padded = np.pad(steps, ((1, 1), (0, 0)), mode="edge")
    steps = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    log_scale, (low, high) = 0.0, np.log(SCALES)
    for step in steps:  # what would pass a bound of the scale stops there
        wanted = step[2] + step[5]
        allowed = np.clip(log_scale + wanted, low, high) - log_scale
        if allowed != wanted:
            step[[2, 5]] *= allowed / wanted
        log_scale += allowed
    steps.setflags(write=False)  # shared by all who ask
    return steps


def summed(steps: np.ndarray) -> np.ndarray:
    """[F - 1] steps -> [F] sums, 0 in frame 0."""
    return np.concatenate([[0.0], np.cumsum(steps)])


def camera(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Sideways place (pixels of the world, right positive) and magnification of the camera, each [F]; 0 and 1 first."""
    steps = rates(scene.program, scene.num_frames)
    zoom = np.exp(summed(steps[:, 5]))
    pan = summed(steps[:, 4] / np.sqrt(zoom[1:] * zoom[:-1])) * scene.size[0] * scene.sprites[0].facing
    return pan, zoom


def trajectory(scene: Scene) -> tuple[Trajectory, ...]:
    """Exact paths of all sprites, in the pixels of the picture."""
    (height, width), steps = scene.size, rates(scene.program, scene.num_frames)
    pan, zoom = camera(scene)
    forward, up, growth, turn = (height * steps[:, 0], height * steps[:, 1], steps[:, 2], steps[:, 3])
    paths = []
    for sprite in scene.sprites:
        angle = sprite.tilt + summed(turn)
        heading = (angle[1:] + angle[:-1]) / 2
        x = sprite.x + sprite.facing * summed(forward * np.cos(heading))
        y = sprite.y - summed(forward * np.sin(heading) + up)
        if sprite.wave:
            phase = 2 * np.pi * np.arange(scene.num_frames) / sprite.wave.period
            y = y - sprite.wave.amplitude * sprite.length * np.sin(phase)
        paths.append(
            Trajectory(
                x=width / 2 + zoom * (x - pan - width / 2),
                y=height / 2 + zoom * (y - height / 2),
                length=sprite.length * zoom * np.exp(summed(growth)),
                angle=angle,
                facing=sprite.facing,
            )
        )
    return tuple(paths)


def semantic(path: Trajectory) -> np.ndarray:
    """[F, 4]: what happened since frame 0, in the sprite's own terms and all in pixels at frame 0.

    Columns: the way along the heading of frame 0; the way towards the back of frame 0; growth and turn (nose up) as
    the way of a point half a body length from the middle.
    """
    dx, dy = path.facing * (path.x - path.x[0]), path.y[0] - path.y
    cos, sin, half = np.cos(path.angle[0]), np.sin(path.angle[0]), path.length[0] / 2
    growth, turn = half * (path.length / path.length[0] - 1), half * (path.angle - path.angle[0])
    return np.stack([cos * dx + sin * dy, cos * dy - sin * dx, growth, turn], axis=1)


PERIOD = 3.0  # picture heights after which a background repeats
NUM_FREQUENCIES = 16


@lru_cache(maxsize=256)
def coefficients(seed: int) -> np.ndarray:
    """Fourier coefficients [3, y, x] of a background: broad patches of dull colour, and a finer texture of light."""
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
    """The background as seen by a camera at pan, zoom [F]: float32 [F, 3, H, W] in [0,1].

    Each axis has its own waves, so that a frame is a product of three small matrices.
    """
    height, width = size

    def waves(side: int, place: np.ndarray, sign: int) -> np.ndarray:
        pixels = sign * ((np.arange(side) + 0.5 - side / 2) / zoom[:, None] + place[:, None])  # [F, side], the world's
        phase = (2 * np.pi / (PERIOD * height) * pixels[..., None] * np.arange(NUM_FREQUENCIES)).astype(np.float32)
        both = np.stack([np.sin(phase), np.cos(phase)], axis=-1)
        return both.reshape(len(zoom), side, -1)[..., 1:]  # without the sine of frequency 0

    rows, columns = waves(height, 0 * pan, 1), waves(width, pan, -1 if background.mirrored else 1)
    field = rows[:, None] @ coefficients(background.seed) @ columns[:, None].transpose(0, 1, 3, 2)
    return np.clip(field, 0, 1)


def paint(canvas: np.ndarray, sprite: Sprite, path: Trajectory) -> None:
    """Paint a sprite, anti-aliased, at the places of the path on canvas, contiguous float32 [F, 3, H, W] in [0,1]."""
    height, width = canvas.shape[2:]
    cos, sin, length = (w.astype(np.float32)[:, None] for w in (np.cos(path.angle), np.sin(path.angle), path.length))
    dx = (path.facing * (np.arange(width) + 0.5 - path.x[:, None])).astype(np.float32) / length
    dy = (np.arange(height) + 0.5 - path.y[:, None]).astype(np.float32) / length
    # The nose points along facing * (cos, -sin), the back along (-facing * sin, -cos).
    u = ((cos * dx)[:, None, :] - (sin * dy)[:, :, None]).ravel()
    v = -((sin * dx)[:, None, :] + (cos * dy)[:, :, None]).ravel()
    near = np.flatnonzero(u * u + v * v < REACH * REACH)
    frame = near // (height * width)
    body, details = np.float32(0.5) - distances(sprite.shape, u[near], v[near]) * length[frame, 0]
    hit = np.flatnonzero(body > 0)
    body, details = np.minimum(body[hit], 1), np.clip(details[hit], 0, 1)
    values, red = canvas.reshape(-1), (near + 2 * height * width * frame)[hit]
    for channel, (colour, detail) in enumerate(zip(sprite.colour, sprite.detail)):
        at = red + channel * height * width
        below = values[at]
        values[at] = below + body * (colour + details * (detail - colour) - below)


def to_bytes(clip: np.ndarray) -> np.ndarray:
    return np.rint(clip * 255).astype(np.uint8)


def backdrop(scene: Scene) -> np.ndarray:
    """float32 [F, 3, H, W] in [0,1]; drawn once where the camera stands still."""
    pan, zoom = camera(scene)
    if not set(scene.program) & set(CAMERA_WORDS):
        still = background_view(scene.background, scene.size, pan[:1], zoom[:1])
        return np.repeat(still, scene.num_frames, axis=0)
    return background_view(scene.background, scene.size, pan, zoom)


def render_background(scene: Scene) -> np.ndarray:
    """The clip without its sprites: uint8 [F, 3, H, W]."""
    return to_bytes(backdrop(scene))


def render(scene: Scene) -> np.ndarray:
    """uint8 [F, 3, H, W]. Later sprites cover earlier ones."""
    canvas = backdrop(scene)
    for sprite, path in zip(scene.sprites, trajectory(scene)):
        paint(canvas, sprite, path)
    return to_bytes(canvas)


def flip(scene: Scene) -> Scene:
    """The mirrored scene. Its caption is the same."""
    mirrored = tuple(replace(s, x=scene.size[1] - s.x, facing=-s.facing) for s in scene.sprites)
    background = replace(scene.background, mirrored=not scene.background.mirrored)
    return replace(scene, sprites=mirrored, background=background)


def random_colour(rng: np.random.Generator, avoid: np.ndarray) -> tuple[float, float, float]:
    """A saturated colour, of TRIES the furthest from all colours in avoid [N, 3]; RGB in [0,1]."""
    hue, saturation, value = rng.random((TRIES, 1)), rng.uniform(0.8, 1, (TRIES, 1)), rng.uniform(0.75, 1, (TRIES, 1))
    wheel = np.clip(np.abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    colours = value * (1 - saturation * (1 - wheel))
    gaps = np.linalg.norm(colours[:, None] - avoid[None], axis=2).min(axis=1)
    far = np.flatnonzero(gaps > 0.5)
    best = far[0] if len(far) else gaps.argmax()
    return tuple(colours[best].tolist())


def fitted(scene: Scene, rng: np.random.Generator) -> tuple[Sprite, float]:
    """The scene's last sprite moved to a random place from where its path stays inside, and by how much it does not.

    Inside is the middle half a length from the border. A path too long for the picture is centred.
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
    num_frames: int = USUAL_FRAMES,
    num_sprites: int = 1,
    program: Program | None = None,
    shapes: tuple[str, ...] = SHAPES,
    camera: bool = False,
    wave: Wave | None = None,
) -> Scene:
    """A scene at random; size is a square's side or (height, width), num_sprites 1 or 2.

    Without a program a random one is drawn, with camera words among them where `camera`. Places are chosen so that
    the paths stay inside, and two sprites start apart, as far as the program leaves room.
    """
    if num_sprites not in LENGTHS:
        raise ValueError(f"a scene has one or two sprites, not {num_sprites}")
    size = (size, size) if isinstance(size, int) else tuple(size)
    if program is None:
        program = random_program(rng, words=WORDS if camera else SPRITE_WORDS)
    background = Background(int(rng.integers(2**31)))
    view = background_view(background, size, np.zeros(1), np.ones(1))[0]
    avoid = view[:, ::4, ::4].reshape(3, -1).T
    sprites: tuple[Sprite, ...] = ()
    for _ in range(num_sprites):
        colour, shape = random_colour(rng, avoid), str(rng.choice(shapes))
        avoid = np.concatenate([avoid, [colour]])
        best, least = None, np.inf
        for _ in range(TRIES):
            sprite = Sprite(
                shape,
                colour,
                x=size[1] / 2,
                y=size[0] / 2,
                length=size[0] * rng.uniform(*LENGTHS[num_sprites]),
                facing=int(rng.choice([-1, 1])),
                tilt=rng.uniform(-MAX_TILT, MAX_TILT),
                wave=wave,
            )
            sprite, excess = fitted(Scene(size, num_frames, background, (*sprites, sprite), tuple(program)), rng)
            crowding = max([sprite.length - np.hypot(sprite.x - o.x, sprite.y - o.y) for o in sprites], default=0.0)
            fault = max(excess, crowding, 0.0)
            if fault < least:
                best, least = sprite, fault
            if fault == 0:
                break
        sprites = (*sprites, best)
    return Scene(size, num_frames, background, sprites, tuple(program))
