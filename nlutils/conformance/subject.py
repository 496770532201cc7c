"""What the checks ask of a block, whatever its framework. Maps are channels-first NumPy arrays here."""

import difflib
from abc import ABC, abstractmethod
from itertools import product
from math import prod

import numpy as np

__all__ = ["ROLES", "Disagreement", "NotRunnable", "Subject", "one_line"]

ROLES = ("theta", "phi", "g", "w_z", "norm", "w_f")
# Blocks of so many channels are checked on smaller maps: their convolutions take long.
WIDE = 512
# The largest relative difference that counts as rounding.
TOLERANCE = {"float64": 1e-9, "float32": 2e-4}


class NotRunnable(Exception):
    """A check cannot be run; the text says why."""


class Disagreement(Exception):
    """The suite contradicts itself: its fast formulas and `nlutils.reference` differ."""


def one_line(error) -> str:
    """The first line of an error that says something, cut to 160 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


class Subject(ABC):
    """A block under check.

    `places` says where theta, phi, g, w_z, norm and w_f are, `keys` which arrays they own.
    """

    places: dict
    keys: dict
    broken: str = ""  # what the first forward pass raised

    def release(self):  # noqa: B027, a copy has nothing to give back
        """Give back what was borrowed."""

    def take_example(self, example: np.ndarray):
        """Keep the axes of the example; its values are not used."""
        if example.ndim not in (3, 4, 5) or 0 in example.shape[1:]:
            axes = "(B, ..., C)" if self.channels_last else "(B, C, ...)"
            raise ValueError(
                f"example_input of shape {example.shape} must be maps {axes}, with 1 to 3 axes of positions"
            )
        shape = example.shape
        if self.channels_last:
            shape = (shape[0], shape[-1], *shape[1:-1])
        self.channels, full = shape[1], shape[2:]
        self.ndim, self.full_size = len(full), full
        self.size = tuple(min(pair) for pair in zip(full, self._largest(), strict=True))

    def _largest(self):
        """The map to check on, at most: small, because the definition is computed pair by pair.

        All frames stay, for `frames_per_group` must divide them; two windows of sub-sampling fit in.
        """
        wide = self.channels >= WIDE
        if self.ndim == 1:
            return (12,) if wide else (24,)
        if self.ndim == 2:
            return (4, 6) if wide else (6, 8)
        frames = self.full_size[0]
        return (frames, 2 if frames > 16 else 4, 4 if wide or frames > 8 else 6)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.precision]

    def random_input(self, batch=2, seed=0, scale=1.0, size=None) -> np.ndarray:
        """(B, C, *size), normal numbers; `size` None: the small map."""
        shape = (batch, self.channels, *(size or self.size))
        return scale * np.random.default_rng(seed).standard_normal(shape)

    def locate(self, weights) -> bool:
        """Fill `places` and `keys` from the mapping, or from nlutils' own names; False: neither is there."""
        self.places, self.keys = {}, {}
        if weights is not None:
            unknown = sorted(set(weights) - set(ROLES))
            if unknown:
                raise ValueError(f"weights names {unknown}; the names are {', '.join(ROLES)}")
        else:
            weights = self.own_places()
            if not {"g", "w_z"} <= weights.keys():
                return False
        for role, value in weights.items():
            if value is None:
                continue
            place, keys = self.keys_of(role, value)
            if keys or role == "norm":
                self.places[role], self.keys[role] = place, keys
        if "norm" in self.keys and not self.keys["norm"]:  # an Identity
            del self.keys["norm"], self.places["norm"]
        self._tell_counts_from_widths()
        return True

    def _tell_counts_from_widths(self):
        """Take the largest map on which no number of positions is a width, so that 1/d is not 1/M too."""
        told = [self.keys[role] for role in ("theta", "g") if "weight" in self.keys.get(role, {})]
        widths = {self.channels, *(len(self.get(keys["weight"])) for keys in told)}
        frames = self.size[:-2]  # () in 1D and 2D
        sides = (range(min(2, side), side + 1) for side in self.size[len(frames) :])
        places = sorted(product(*sides), key=prod)
        for place in reversed(places):
            whole, pooled = prod(place), prod(max(side // 2, 1) for side in place)
            parts = [n for n in range(1, frames[0] + 1) if frames[0] % n == 0] if frames else [1]
            if not widths & {n * keys for n in parts for keys in (whole, pooled)}:
                self.size = (*frames, *place)
                return

    def no_such_place(self, role, path, known):
        near = difflib.get_close_matches(path, known, n=3, cutoff=0.3) or known[:8]
        return ValueError(f"weights[{role!r}]={path!r} is not in the block; near it: {', '.join(near)}")

    def told(self) -> set:
        """The keys of all arrays that `weights` speaks of."""
        return {key for keys in self.keys.values() for key in keys.values()}

    @abstractmethod
    def reset(self):
        """Back to the weights and statistics that the block was given with."""

    @abstractmethod
    def get(self, key) -> np.ndarray:
        """One array in float64; kernels as (out, in, *size)."""

    @abstractmethod
    def set(self, arrays: dict):
        """Write arrays, laid out as `get` returns them."""

    @abstractmethod
    def parameters(self) -> list:
        """The keys of what is trained."""

    @abstractmethod
    def running_means(self) -> list:
        """The keys of running means."""

    @abstractmethod
    def forward(self, x, training=False) -> np.ndarray:
        """z of x."""

    @abstractmethod
    def vjp(self, x, direction, training=False) -> tuple[np.ndarray, dict]:
        """The gradient of sum(z * direction) for x and each parameter; None where it is not reached."""

    @abstractmethod
    def half(self, x) -> np.ndarray:
        """z in float16, with the weights as given; raises NotRunnable."""
