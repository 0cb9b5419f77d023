"""The shapes of sprites, as signed distance functions in body coordinates.

u runs along the heading and v towards the back. A body is about one unit long, from its tail at u = -0.5 to its nose at
u = 0.5. Distances are in body lengths, negative inside. Every shape has two layers, a hull and details painted over it,
and is symmetric neither in u nor in v: a picture of it determines which way it faces and which way is up.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]

REACH = 0.65  # body lengths from the origin, within which every body lies
GRID = 161  # samples per axis of a distance table


def polygon(*points: tuple[float, float]) -> Distance:
    """Exact signed distance to a simple polygon with corners (u, v)."""
    corners = np.array(points)

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        nearest, inside = np.full(u.shape, np.inf), np.zeros(u.shape, bool)
        for (u0, v0), (u1, v1) in zip(corners, np.roll(corners, -1, axis=0)):
            du, dv = u1 - u0, v1 - v0
            along = np.clip(((u - u0) * du + (v - v0) * dv) / (du * du + dv * dv), 0, 1)
            nearest = np.minimum(nearest, np.hypot(u - u0 - along * du, v - v0 - along * dv))
            if dv:
                inside ^= ((v0 <= v) != (v1 <= v)) & (u < u0 + (v - v0) * du / dv)
        return np.where(inside, -nearest, nearest)

    return distance


def ellipse(u0: float, v0: float, radius_u: float, radius_v: float) -> Distance:
    """Signed distance to an ellipse, accurate to first order near its outline."""

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        a, b = (u - u0) / radius_u, (v - v0) / radius_v
        return np.hypot(a, b) * (np.hypot(a, b) - 1) / np.maximum(np.hypot(a / radius_u, b / radius_v), 1e-9)

    return distance


def disc(u0: float, v0: float, radius: float) -> Distance:
    """Exact signed distance to a disc."""
    return lambda u, v: np.hypot(u - u0, v - v0) - radius


def union(*parts: Distance) -> Distance:
    """The points in any of the parts."""
    return lambda u, v: np.minimum.reduce([part(u, v) for part in parts])


def intersection(a: Distance, b: Distance) -> Distance:
    """The points in both a and b."""
    return lambda u, v: np.maximum(a(u, v), b(u, v))


def complement(part: Distance) -> Distance:
    """The points outside a part."""
    return lambda u, v: -part(u, v)


WHALE = union(ellipse(0.12, -0.02, 0.38, 0.24), polygon((0, 0.2), (-0.32, 0.06), (-0.3, -0.12), (0, -0.24)))

# Shape -> hull, details.
BODIES: dict[str, tuple[Distance, Distance]] = {
    "arrow": (
        polygon((0.5, 0), (0.06, 0.34), (0.06, 0.15), (-0.5, 0.15), (-0.5, -0.15), (0.06, -0.15), (0.06, -0.34)),
        polygon((-0.42, 0.0), (-0.42, 0.09), (0.13, 0.09), (0.13, 0.19), (0.35, 0.02), (0.3, 0.0)),
    ),
    "fish": (
        union(
            ellipse(0.1, 0, 0.4, 0.23),
            polygon((-0.15, 0), (-0.5, 0.25), (-0.4, 0), (-0.5, -0.25)),
            polygon((0.2, 0.18), (-0.1, 0.38), (-0.18, 0.1)),
        ),
        union(
            disc(0.32, 0.07, 0.07), polygon((0.1, 0.18), (0.17, 0.17), (0.1, 0), (0.15, -0.18), (0.06, -0.18), (0, 0))
        ),
    ),
    "car": (
        polygon(
            (-0.5, -0.18), (-0.5, 0.06), (-0.4, 0.08), (-0.3, 0.28), (0.04, 0.28), (0.2, 0.08), (0.5, 0.0), (0.5, -0.18)
        ),
        union(
            disc(-0.28, -0.18, 0.13),
            disc(0.28, -0.18, 0.13),
            polygon((-0.14, 0.22), (0.01, 0.22), (0.12, 0.07), (-0.14, 0.07)),
        ),
    ),
    "bird": (
        union(
            ellipse(0, -0.06, 0.3, 0.17),
            disc(0.27, 0.08, 0.14),
            polygon((-0.15, 0.04), (-0.5, 0.1), (-0.47, -0.1), (-0.15, -0.14)),
        ),
        union(
            polygon((0.37, 0.16), (0.52, 0.06), (0.37, 0.01)),
            polygon((0.12, -0.02), (-0.08, 0.42), (-0.3, 0.4), (-0.17, -0.04)),
        ),
    ),
    "snail": (
        union(
            polygon((-0.52, -0.32), (-0.3, -0.12), (0.4, -0.12), (0.48, -0.32)),
            ellipse(0.38, -0.1, 0.13, 0.19),
            polygon((0.36, 0), (0.42, 0.22), (0.5, 0.22), (0.44, -0.05)),
        ),
        intersection(
            disc(-0.08, 0.06, 0.28),
            complement(intersection(disc(-0.05, 0.05, 0.16), complement(disc(-0.05, 0.05, 0.08)))),
        ),
    ),
    "rocket": (
        union(
            polygon((0.5, 0), (0.3, 0.15), (-0.32, 0.17), (-0.32, -0.17), (0.3, -0.15)),
            polygon((0, 0.15), (-0.44, 0.38), (-0.32, 0.1)),
        ),
        union(disc(0.14, 0.02, 0.09), polygon((-0.32, 0.12), (-0.52, -0.02), (-0.32, -0.14), (-0.2, 0))),
    ),
    "mouse": (
        union(
            ellipse(-0.04, -0.06, 0.3, 0.21),
            polygon((0.05, 0.14), (0.5, -0.14), (0.1, -0.25)),
            polygon((-0.2, -0.1), (-0.5, 0.14), (-0.44, 0.2), (-0.2, 0.04)),
        ),
        union(disc(0.08, 0.17, 0.14), disc(0.3, -0.06, 0.055)),
    ),
    "boat": (
        union(
            polygon((-0.46, -0.06), (0.5, -0.02), (0.3, -0.3), (-0.36, -0.3)),
            polygon((0.12, 0.02), (0.42, 0.02), (0.12, 0.32)),
        ),
        polygon((-0.38, 0.0), (0.06, 0.0), (0.06, 0.46)),
    ),
    "airship": (
        union(ellipse(0.03, 0.05, 0.47, 0.23), polygon((-0.25, 0.15), (-0.5, 0.34), (-0.5, 0.1))),
        union(
            polygon((-0.02, -0.15), (0.28, -0.15), (0.2, -0.33), (0.04, -0.33)),
            polygon((0.3, 0.24), (0.5, 0.05), (0.3, -0.12)),
        ),
    ),
    "whale": (
        union(WHALE, polygon((-0.2, 0.06), (-0.4, 0.36), (-0.42, 0.18), (-0.54, 0.14), (-0.3, -0.1))),
        union(intersection(WHALE, lambda u, v: v + 0.1 + 0 * u), disc(0.3, 0.06, 0.055)),
    ),
}

SHAPES = tuple(BODIES)


@cache
def distance_table(shape: str) -> np.ndarray:
    """Distances float32 [2, GRID * GRID] to the opaque body (hull and details) and to the details alone.

    Rows are v and columns u, each from -REACH to REACH.
    """
    v, u = np.meshgrid(*[np.linspace(-REACH, REACH, GRID)] * 2, indexing="ij")
    hull, details = BODIES[shape]
    both = np.stack([np.minimum(hull(u, v), details(u, v)), details(u, v)])  # [2, GRID, GRID]
    return both.reshape(2, -1).astype(np.float32)  # [2, GRID * GRID]


def distances(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distances [2, N] to the opaque body and to its details at u, v [N], |u|, |v| <= REACH; bilinear interpolation."""
    cells = distance_table(shape)
    column, row = ((w + REACH) * ((GRID - 1) / (2 * REACH)) for w in (u, v))
    i, j = (np.clip(w.astype(np.int32), 0, GRID - 2) for w in (row, column))
    down, right, corner = row - i, column - j, i * GRID + j
    a, b, c, d = (cells.take(corner + step, axis=1) for step in (0, 1, GRID, GRID + 1))
    above, below = a + right * (b - a), c + right * (d - c)
    return above + down * (below - above)
