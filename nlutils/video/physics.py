"""Discs that move by known laws, and pictures of them: what an interaction network is asked to predict.

Made for "Visual Interaction Networks" (Watters et al., NIPS 2017); systems and constants are our own choice.
Units: the box is the square from -1 to 1 in x and y (y points down, as in a picture), time counts frames,
every disc has mass 1. A state is (x, y, vx, vy).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nlutils.arguments import all_finite, one_of, positive_integer, whole_number
from nlutils.video.procedural.texture import Texture

__all__ = [
    "COLOURS",
    "RADIUS",
    "SYSTEMS",
    "Simulation",
    "Simulations",
    "energy",
    "momentum",
    "render",
    "simulate",
]

SYSTEMS = ("springs", "billiards", "gravity", "drift")
RADIUS = 0.16  # of a disc; two and a half pixels of 32

STIFFNESS, REST = 0.016, 0.8  # a spring pulls with STIFFNESS * (distance - REST)
GRAVITY, SOFTENING = 0.006, 0.3  # two discs attract each other with GRAVITY * d / (d^2 + SOFTENING^2)^(3/2)
# Standard deviation of each velocity component at the start, box units a frame.
SPEED = {"springs": 0.035, "billiards": 0.05, "gravity": 0.06, "drift": 0.007}

# Grey levels; a disc keeps its colour, so that an encoder can tell the discs apart.
COLOURS = np.array(
    [(230, 30, 30), (40, 210, 50), (50, 80, 255), (250, 220, 30), (230, 60, 230), (40, 220, 230)], np.float64
)


# So many starts of a simulation are tried at most, and so many at a time, of all simulations together.
DRAWS, TOGETHER = 1000, 1024


@dataclass(frozen=True)
class Simulation:
    """N discs over T frames."""

    states: np.ndarray  # float64 (T, N, 4): x, y, vx, vy
    frames: np.ndarray  # uint8 (T, H, W, 3)


class Simulations:
    """`count` simulations of `discs` discs over `frames` frames; each depends on `seed` and its number alone.

    `system` is one of

    - "springs": each pair of discs is joined by an invisible spring of rest length 0.8
    - "billiards": discs bounce elastically off the walls and off each other
    - "gravity": each pair attracts each other, softened below a distance of 0.3
    - "drift": nothing acts on anything

    Only billiards has walls. In the others a start from which a disc would leave the box within `frames`
    frames is drawn again, up to 1000 times: the starts of longer simulations differ from those of shorter
    ones. Springs and gravity have a total momentum of 0. `size` is the side of a picture, 16 pixels at
    least; its background is a smooth random texture. `Simulations(...)[i]` is a `Simulation`; `states()`
    gives the states of all, without pictures. Raises ValueError for a wrong argument, and when 1000 starts of
    a simulation did not stay in the box; IndexError for a simulation that there is not.
    """

    def __init__(
        self, system: str, count: int, *, discs: int = 3, frames: int = 64, size: int = 32, seed: int = 0
    ):
        self.system = one_of("system", system, SYSTEMS)
        self.count = positive_integer("count", count)
        self.discs = positive_integer("discs", discs)
        if self.discs > len(COLOURS):
            raise ValueError(
                f"discs={discs!r}: there are colours for {len(COLOURS)} discs; use 1 to {len(COLOURS)}"
            )
        self.frames = positive_integer("frames", frames)
        self.size = _side(size)
        self.seed = whole_number("seed", seed)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Simulation:
        states = self.states([index])[0]
        return Simulation(states, render(states, self.size, background=self.background(index)))

    def states(self, indices: Iterable[int] | None = None) -> np.ndarray:
        """The states of the simulations `indices`, by default all: float64 (count, T, N, 4)."""
        indices = range(self.count) if indices is None else [self._check(index) for index in indices]
        draws = [self._generator(index, 1) for index in indices]
        result = np.empty((len(draws), self.frames, self.discs, 4))
        tried = np.zeros(len(draws), int)
        to_do = np.arange(len(draws))
        while len(to_do):
            before = tried[to_do[0]]
            if before == DRAWS:
                raise ValueError(
                    f"system={self.system!r}, discs={self.discs}, frames={self.frames}: of {DRAWS} starts of "
                    f"simulation {indices[to_do[0]]} a disc left the box each time; use fewer discs or frames"
                )
            # 1, then 2, 4, ...: the first start that stays is taken, however many are looked at together.
            count = min(before + 1, DRAWS - before)
            now = to_do[tried[to_do] == before][: TOGETHER // count]
            starts = [[_start(self.system, self.discs, draws[place]) for _ in range(count)] for place in now]
            found, first = _first_that_stays(self.system, np.array(starts), self.frames)
            result[now[found]] = first
            tried[now] += count
            to_do = np.setdiff1d(to_do, now[found])
        return result

    def background(self, index: int) -> np.ndarray:
        """The background of simulation `index`, float64 (size, size, 3) in grey levels."""
        rng = self._generator(self._check(index), 2)
        texture = Texture.random(
            rng, rng.uniform(60, 190, 3), rng.uniform(10, 25), 1.2 * self.size, 0.2 * self.size
        )
        pixels = np.arange(self.size, dtype=float)[None]
        return np.clip(texture.look(pixels, pixels)[0].astype(np.float64), 0, 255)

    def _check(self, index) -> int:
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise ValueError(f"index={index!r} must be a whole number, 0 to {self.count - 1}")
        if not 0 <= index < self.count:
            raise IndexError(f"index={index!r}: there are {self.count} simulations, 0 to {self.count - 1}")
        return int(index)

    def _generator(self, index, stream):
        """Random numbers of one simulation; `stream` keeps the motion apart from the background."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, index], spawn_key=(stream,)))


def simulate(system: str, start, frames: int, *, substeps: int = 16) -> np.ndarray:
    """Follow discs from their states `start` (..., N, 4): float64 (..., T, N, 4), `start` being frame 0.

    Each frame is `substeps` steps. Forces: velocity Verlet, whose error in the energy falls with the square
    of the step. Billiards: free flight; a disc that overlaps another or a wall after a step is taken back to
    the moment of contact, so the kinetic energy stays as it was. A simulation's digits do not depend on what
    else is in the batch.
    """
    one_of("system", system, SYSTEMS)
    start = _states("start", start)
    frames, substeps = positive_integer("frames", frames), positive_integer("substeps", substeps)
    batch = start.reshape(-1, *start.shape[-2:])
    x, v = batch[..., :2].copy(), batch[..., 2:].copy()
    step = _free_flight if system in ("billiards", "drift") else _verlet
    result = np.empty((len(batch), frames, *batch.shape[1:]))
    for frame in range(frames):
        result[:, frame, :, :2], result[:, frame, :, 2:] = x, v
        for _ in range(substeps if frame < frames - 1 else 0):
            x, v = step(system, x, v, 1 / substeps)
    return result.reshape(*start.shape[:-2], *result.shape[1:])


def energy(system: str, states) -> np.ndarray:
    """Kinetic and potential energy of all discs together, from states (..., N, 4): (...)."""
    one_of("system", system, SYSTEMS)
    states = _states("states", states)
    total = (states[..., 2:] ** 2).sum(axis=(-2, -1)) / 2
    first, second = np.triu_indices(states.shape[-2], k=1)
    squared = ((states[..., first, :2] - states[..., second, :2]) ** 2).sum(axis=-1)
    if system == "springs":
        total = total + STIFFNESS / 2 * ((np.sqrt(squared) - REST) ** 2).sum(axis=-1)
    if system == "gravity":
        total = total - GRAVITY * (1 / np.sqrt(squared + SOFTENING**2)).sum(axis=-1)
    return total


def momentum(states) -> np.ndarray:
    """The sum of all discs' velocities (every mass is 1), from states (..., N, 4): (..., 2)."""
    return _states("states", states)[..., 2:].sum(axis=-2)


def render(states, size: int = 32, *, background=None) -> np.ndarray:
    """Pictures of states (T, N, 4): uint8 (T, size, size, 3), disc n in colour `COLOURS[n]`.

    The middle of pixel (row r, column c) lies at x = (2 c + 1) / size - 1, y = (2 r + 1) / size - 1. Edges
    are anti-aliased; where discs overlap, the one with the higher number is in front. `background` is
    (size, size, 3) in grey levels, by default black.
    """
    states, size = _states("states", states), _side(size)
    if states.ndim != 3 or states.shape[1] > len(COLOURS):
        raise ValueError(f"states has shape {states.shape}; use (T, N, 4) with N up to {len(COLOURS)}")
    picture = np.zeros((size, size, 3)) if background is None else np.asarray(background, np.float64)
    if picture.shape != (size, size, 3):
        raise ValueError(f"background has shape {picture.shape}; it must be {(size, size, 3)}")
    middle = (2 * np.arange(size) + 1) / size - 1
    frames = np.repeat(picture[None], len(states), axis=0)
    for disc in range(states.shape[1]):
        x, y = states[:, disc, 0, None, None], states[:, disc, 1, None, None]
        distance = np.hypot(middle[None, None, :] - x, middle[None, :, None] - y)
        cover = np.clip((RADIUS - distance) * size / 2 + 0.5, 0, 1)[..., None]
        frames += cover * (COLOURS[disc] - frames)
    return np.rint(frames).astype(np.uint8)


def _states(name, values) -> np.ndarray:
    states = np.asarray(values, np.float64)
    if states.ndim < 2 or states.shape[-1] != 4:
        raise ValueError(
            f"{name} has shape {states.shape}; its last two axes must be discs and x, y, vx, vy: (..., N, 4)"
        )
    return all_finite(name, states)


def _side(size) -> int:
    if positive_integer("size", size) < 16:
        raise ValueError(f"size={size!r} is too small to tell discs apart; use 16 pixels or more")
    return int(size)


def _start(system, discs, rng) -> np.ndarray:
    """Random places in the box that do not touch, and random velocities: (N, 4)."""
    places = []
    while len(places) < discs:
        place = rng.uniform(-1 + RADIUS, 1 - RADIUS, 2)
        if all(np.hypot(*(place - other)) > 2.2 * RADIUS for other in places):
            places.append(place)
    velocities = SPEED[system] * rng.standard_normal((discs, 2))
    if system in ("springs", "gravity"):
        # Nothing outside acts on them, so their centre stays where it starts: near the middle of the box.
        places += rng.uniform(-0.2, 0.2, 2) - np.mean(places, axis=0)
        velocities -= velocities.mean(axis=0)
    return np.concatenate([places, velocities], axis=1)


def _first_that_stays(system, starts, frames):
    """Of starts (B, tries, N, 4), for each of B the first from which all discs stay in the box.

    Returns which of B have one, and its states, (found, T, N, 4).
    """
    flat = starts.reshape(-1, *starts.shape[2:])
    staying = np.arange(len(flat))
    # Most that leave do so early, so a sixteenth of the time sorts out what need not be followed further.
    for share in (16, 4, 1):
        states = simulate(system, flat[staying], -(-frames // share))
        inside = (np.abs(states[..., :2]) <= 1 - RADIUS + 1e-9).all(axis=(1, 2, 3))
        staying, states = staying[inside], states[inside]
    found, first = np.unique(staying // starts.shape[1], return_index=True)
    return found, states[first]


def _acceleration(system, x) -> np.ndarray:
    """What acts on each disc of (B, N, 2), all others added up; mass 1."""
    apart = x[:, None, :, :] - x[:, :, None, :]  # [b, i, j]: from i to j
    squared = (apart**2).sum(axis=-1, keepdims=True)
    if system == "springs":
        distance = np.sqrt(squared)
        # (distance - REST) along apart / distance. A disc and itself are 0 apart: 0 times a finite number.
        pull = STIFFNESS * (1 - REST / np.maximum(distance, 1e-12)) * apart
    else:
        pull = GRAVITY * apart / (squared + SOFTENING**2) ** 1.5
    return pull.sum(axis=2)


def _verlet(system, x, v, dt):
    """One step of velocity Verlet."""
    before = _acceleration(system, x)
    x = x + dt * v + dt**2 / 2 * before
    return x, v + dt / 2 * (before + _acceleration(system, x))


def _free_flight(system, x, v, dt):
    """One step along straight lines; in billiards with the collisions that happened on the way."""
    x = x + dt * v
    if system == "billiards":
        v = v.copy()
        for i in range(x.shape[1]):
            for j in range(i):
                _collide(x, v, i, j, dt)
        wall = 1 - RADIUS
        beyond = (np.abs(x) > wall) & (x * v > 0)
        x = np.where(beyond, 2 * np.copysign(wall, x) - x, x)  # as far inside as it came outside
        v = np.where(beyond, -v, v)
    return x, v


def _collide(x, v, i, j, dt):
    """Where discs i and j overlap and approach: back to contact, bounce, and on. Changes x and v."""
    apart, speed = x[:, i] - x[:, j], v[:, i] - v[:, j]
    closing = (apart * speed).sum(axis=-1)
    overlap = (apart**2).sum(axis=-1) - (2 * RADIUS) ** 2
    hit = np.flatnonzero((overlap < 0) & (closing < 0))
    if not len(hit):
        return
    apart, speed, closing, overlap = apart[hit], speed[hit], closing[hit], overlap[hit]
    squared = (speed**2).sum(axis=-1)
    # |apart + t speed| = 2 RADIUS has one root t < 0; no further back than this step began.
    t = np.maximum((-closing - np.sqrt(closing**2 - squared * overlap)) / squared, -dt)[:, None]
    contact = apart + t * speed
    normal = contact / np.sqrt((contact**2).sum(axis=-1, keepdims=True))
    # Equal masses exchange what they have along the line between their centres.
    exchanged = (speed * normal).sum(axis=-1, keepdims=True) * normal
    x[hit, i] += t * exchanged
    x[hit, j] -= t * exchanged
    v[hit, i] -= exchanged
    v[hit, j] += exchanged
