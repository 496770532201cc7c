"""A body in the picture: parts drawn as anti-aliased capsules, with the true motion of their pixels."""

from dataclasses import dataclass

import numpy as np

from nlutils.video.procedural.motion import JOINTS, POINTS, Body

__all__ = ["Actor", "Canvas", "Performer", "paint"]

_AT = {name: index for index, name in enumerate(POINTS)}
_SIDES = ("left", "right")


@dataclass(frozen=True)
class Coat:
    """The colour of a part: `upper` up to the fraction `border` of its length, then `lower`; with stripes."""

    upper: np.ndarray
    lower: np.ndarray
    border: float = 1.0
    stripes: float = 0.0
    count: float = 0.0

    def colours(self, along, across, length):
        """`along` 0 to 1 from end to end, `across` -1 to 1 from edge to edge; (P,) each. Returns (P, 3)."""
        lower = _within((along - self.border) * length + 0.5, 0, 1)[:, None] if self.border < 1 else 0.0
        light = (1 + self.stripes * np.sin(2 * np.pi * self.count * along)) * (1 - 0.3 * across**2)
        return (self.upper + lower * (self.lower - self.upper)) * light[:, None]


@dataclass(frozen=True)
class Part:
    """A capsule between two points of the body; `radius` in body heights."""

    start: int
    end: int
    radius: float
    coat: Coat
    nearer: float = 0.0  # added to the depth when parts are put in order


@dataclass(frozen=True)
class Performer:
    """What the clips of one group share: the body, its clothes, and a little of its tempo."""

    body: Body
    parts: tuple[Part, ...]
    tempo: float
    brightness: tuple[float, ...]  # of the clothes, for choosing a background that they stand out from

    @classmethod
    def random(cls, rng):
        body = Body.random(rng)
        skin = np.array([1.0, 0.78, 0.64]) * rng.uniform(80, 225)
        hair = np.array([1.0, 0.85, 0.7]) * rng.uniform(15, 120)
        shirt, trousers = rng.uniform(20, 235, 3), rng.uniform(20, 200, 3)
        shoes = np.full(3, rng.uniform(20, 230))
        stripes, count = rng.uniform(0, 0.35), rng.uniform(1.0, 2.5)
        sleeve, leg = (
            rng.choice([0.5, 1.0, 2.0]),
            rng.choice([1.0, 2.0]),
        )  # short or long; 1 is down to the joint
        stout = rng.uniform(0.9, 1.15)

        def limb(upper, lower, reach):
            return Coat(upper if reach > 0 else lower, lower, border=float(np.clip(reach, 0, 1)))

        trunk = Coat(shirt, shirt, stripes=stripes, count=count)
        face = Coat(skin, hair, border=0.62)
        parts = [
            Part(_AT["pelvis"], _AT["neck"], 0.078 * stout, trunk),
            Part(_AT["neck"], _AT["head"], 0.058, face, 0.02),
        ]
        for side in _SIDES:
            at = {
                name: _AT[f"{side} {name}"]
                for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle", "toe")
            }
            parts += [
                Part(at["hip"], at["knee"], 0.050 * stout, limb(trousers, skin, leg)),
                Part(at["knee"], at["ankle"], 0.040 * stout, limb(trousers, skin, leg - 1)),
                Part(at["ankle"], at["toe"], 0.030, Coat(shoes, shoes)),
                Part(at["shoulder"], at["elbow"], 0.037 * stout, limb(shirt, skin, sleeve), 0.03),
                Part(at["elbow"], at["wrist"], 0.031 * stout, limb(shirt, skin, sleeve - 1), 0.03),
                Part(at["wrist"], at["wrist"], 0.038, Coat(skin, skin), 0.03),
            ]
        tempo = rng.uniform(0.94, 1.06)
        return cls(
            body, tuple(parts), tempo, (float(shirt.mean()), float(trousers.mean()), float(skin.mean()))
        )


@dataclass(frozen=True)
class Actor:
    """A performer as the camera sees it."""

    performer: Performer
    points: np.ndarray  # (T, 17, 2), pixels (x, y)
    depth: np.ndarray  # (T, 17), body heights, larger is nearer to the camera
    scale: np.ndarray  # (T,), pixels a body height
    contrast: float  # 1: full colours; 0: the background's mean colour


@dataclass
class Canvas:
    """Pictures that are being painted, and what is known about each pixel."""

    frames: np.ndarray  # float32 (T, H, W, 3)
    flow: np.ndarray | None  # float32 (T-1, H, W, 2); None when nobody asked for it
    part: np.ndarray  # int16 (T, H, W), the number of the part that covers most of the pixel; 0: background
    mixed: np.ndarray  # bool (T, H, W), an edge runs through the pixel
    firm: np.ndarray  # bool (T, H, W), the motion of the pixel's part is well defined


def paint(canvas: Canvas, actor: Actor, mean_colour, first_part: int) -> None:
    """Draw `actor` over `canvas`; its parts get the numbers from `first_part` on.

    A pixel of a part moves with it: along the axis its place between the ends stays the same, across the axis
    its distance, measured in radii, stays the same, and beyond the ends the caps move rigidly.
    """
    for time in range(len(canvas.frames)):
        depth = actor.depth[time]
        parts = enumerate(actor.performer.parts, start=first_part)
        for number, part in sorted(
            parts, key=lambda item: (depth[item[1].start] + depth[item[1].end]) / 2 + item[1].nearer
        ):
            _paint_part(canvas, actor, mean_colour, time, number, part)


def _paint_part(canvas, actor, mean_colour, time, number, part):
    height, width = canvas.part.shape[1:]
    radius = part.radius * actor.scale[time]
    a, b = actor.points[time, part.start], actor.points[time, part.end]
    left, top = np.floor(np.minimum(a, b) - radius - 1).astype(int)
    right, bottom = np.ceil(np.maximum(a, b) + radius + 2).astype(int)
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if left >= right or top >= bottom:
        return
    x, y = np.arange(left, right) - a[0], np.arange(top, bottom)[:, None] - a[1]
    axis, length = _axis(a, b)
    along = x * axis[0] + y * axis[1]
    across = y * axis[0] - x * axis[1]
    beyond = along - _within(along, 0, length)
    cover = _within(radius - np.hypot(beyond, across) + 0.5, 0, 1)
    window = (time, slice(top, bottom), slice(left, right))

    seen = cover > 0
    weight = cover[seen][:, None]
    fraction = _within(along[seen] / max(length, 1e-6), 0, 1)
    colour = part.coat.colours(fraction, _within(across[seen] / radius, -1, 1), length)
    colour = mean_colour + actor.contrast * (colour - mean_colour)
    frame = canvas.frames[window]
    frame[seen] += weight * (colour - frame[seen])
    shown = cover >= 0.5
    canvas.part[window][shown] = number
    canvas.mixed[window][seen] = cover[seen] < 0.99

    if canvas.flow is None or time == len(canvas.flow):
        return
    a_next, b_next = actor.points[time + 1, part.start], actor.points[time + 1, part.end]
    next_axis, next_length = _axis(a_next, b_next)
    grow = actor.scale[time + 1] / actor.scale[time]
    ball = part.start == part.end
    # A part that points at the camera has no direction in the picture: its pixels get the mean of the
    # motion of its ends, and are not firm.
    firm = ball or min(length, next_length / grow) > 0.7 * radius
    if firm and not ball:
        along_next = (along - beyond) / length * next_length + beyond * grow
        across_next = across * grow
        moved_x = a_next[0] + along_next * next_axis[0] - across_next * next_axis[1]
        moved_y = a_next[1] + along_next * next_axis[1] + across_next * next_axis[0]
    else:
        centre, centre_next = (a + b) / 2 - a, (a_next + b_next) / 2
        moved_x = centre_next[0] + (x - centre[0]) * grow + 0 * y
        moved_y = centre_next[1] + (y - centre[1]) * grow + 0 * x
    motion = np.stack([moved_x - x - a[0], moved_y - y - a[1]], axis=-1)
    canvas.flow[window][shown] = motion[shown]
    canvas.firm[window][shown] = firm


def _within(values, low, high):
    """np.clip, at a third of its price for arrays as small as a limb."""
    return np.minimum(np.maximum(values, low), high)


def _axis(a, b):
    """The direction from `a` to `b` and their distance; along x when they coincide."""
    length = float(np.hypot(*(b - a)))
    return ((b - a) / length if length > 1e-6 else np.array([1.0, 0.0])), length


def joints_seen(canvas: Canvas, actor: Actor, first_part: int) -> np.ndarray:
    """bool (T, 15): the joint lies in the picture, and the part on top there is one that ends at it."""
    height, width = canvas.part.shape[1:]
    seen = np.zeros((len(canvas.part), len(JOINTS)), bool)
    for joint in range(len(JOINTS)):
        own = [first_part + i for i, part in enumerate(actor.performer.parts) if joint in _touches(part)]
        x, y = np.rint(actor.points[:, joint]).astype(int).T
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        shown = canvas.part[np.arange(len(x)), np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]
        seen[:, joint] = inside & np.isin(shown, own)
    return seen


# The trunk is one capsule from pelvis to neck, so it also covers what hangs on it.
_TRUNK = {_AT["pelvis"], _AT["neck"]}


def _touches(part):
    ends = {part.start, part.end}
    return ends | {_AT[f"{side} hip"] for side in _SIDES} if ends == _TRUNK else ends
