"""Smooth random texture as a sum of plane waves, which any camera can look at without interpolation."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Texture"]


@dataclass(frozen=True)
class Texture:
    """Colour as a function of the plane: mean + sum over k of Re(amplitude_k exp(i wave_k . (x, y))).

    Because it is a formula and not a picture, a moved or zoomed camera sees exactly the moved texture: the
    optical flow of the camera is then true to the last digit, and the plane has no border.
    """

    mean: np.ndarray  # (3,), grey levels 0 to 255
    waves: np.ndarray  # (K, 2), radians a pixel along x and y
    amplitudes: np.ndarray  # (K, 3), complex grey levels

    @classmethod
    def random(cls, rng, mean, contrast: float, longest: float, shortest: float, count: int = 40):
        """`count` waves with lengths from `shortest` to `longest` pixels and random directions.

        Longer waves are stronger, as in pictures of real places. `contrast` is the standard deviation in grey
        levels; most of it is common to the three colours.
        """
        length = np.exp(rng.uniform(np.log(shortest), np.log(longest), count))
        angle = rng.uniform(0, 2 * np.pi, count)
        waves = 2 * np.pi / length[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        grey = rng.standard_normal((count, 1)) + 1j * rng.standard_normal((count, 1))
        colour = rng.standard_normal((count, 3)) + 1j * rng.standard_normal((count, 3))
        amplitudes = (grey + 0.35 * colour) * np.sqrt(length)[:, None]
        amplitudes *= contrast / np.sqrt((np.abs(amplitudes) ** 2).sum() / 3 / 2)
        return cls(np.asarray(mean, float), waves, amplitudes)

    def look(self, x, y) -> np.ndarray:
        """Colours at the grid of `x` (T, W) by `y` (T, H), in pixels of the plane: float32 (T, H, W, 3)."""
        # exp(i (kx x + ky y)) is a product of a factor of x and a factor of y, so the sum over waves is a
        # matrix product.
        along_x = np.exp(1j * np.multiply.outer(x, self.waves[:, 0])).astype(np.complex64)
        along_y = np.exp(1j * np.multiply.outer(y, self.waves[:, 1])).astype(np.complex64)
        weighted = along_y[:, None] * self.amplitudes.T.astype(np.complex64)[None, :, None]  # (T, 3, H, K)
        sums = weighted @ along_x.transpose(0, 2, 1)[:, None]  # (T, 3, H, W)
        return self.mean.astype(np.float32) + np.moveaxis(sums.real, 1, -1)
