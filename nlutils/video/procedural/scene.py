"""What surrounds the figures: the camera, the background, and the picture that they are painted on."""

import numpy as np

from nlutils.video.procedural.figure import Canvas
from nlutils.video.procedural.texture import Texture

__all__ = ["RATE", "Camera", "develop", "new_canvas", "project", "random_background", "times", "valid_flow"]

RATE = 15.0  # frames a second


def times(length: int) -> np.ndarray:
    """The seconds at which frames are taken; 0 is the middle of the clip."""
    return (np.arange(length) - (length - 1) / 2) / RATE


def project(movement, side):
    """Points in the picture plane, (T, P, 2) in body heights with y down, and their depth (T, P).

    Parallel projection. A person who faces the left is one who faces the right, turned about the vertical.
    """
    view = movement.view if side == "right" else -movement.view
    x, y, z = np.moveaxis(movement.points, -1, 0)
    z = z + movement.way[:, None]
    across = x * np.cos(view) + z * np.sin(view)
    depth = z * np.cos(view) - x * np.sin(view)
    return np.stack([across, 0.5 - y], axis=-1), depth - movement.way[:, None] * np.cos(view)


class Camera:
    """Where the camera looks: `centre` (T, 2) in body heights, `scale` (T,) in pixels a body height."""

    def __init__(self, centre, zoom, size, stature):
        self.centre, self.zoom = centre, zoom
        self.scale = stature * zoom
        self.size, self.stature = size, stature
        self.middle = np.array([(size[1] - 1) / 2, (size[0] - 1) / 2])

    @classmethod
    def random(cls, rng, seconds, size, stature):
        """A slow pan and zoom, and the shake of a hand: two slow waves along each axis."""
        shake = np.zeros((len(seconds), 2))
        for _ in range(2):
            frequency, phase = rng.uniform(0.3, 2.0, 2), rng.uniform(0, 2 * np.pi, 2)
            shake += rng.uniform(0, 0.015, 2) * np.sin(2 * np.pi * np.outer(seconds, frequency) + phase)
        pan = np.outer(seconds, rng.uniform(-1, 1, 2) * (0.20, 0.02))
        # The zoom swings, so that it stays within bounds in a clip of any length.
        zoom = np.exp(0.05 * np.sin(rng.uniform(0, 2 * np.pi) + 2 * np.pi * rng.uniform(0, 0.3) * seconds))
        centre = shake + pan + (0, rng.uniform(-0.04, 0.04))
        centre[:, 1] = np.clip(centre[:, 1], -0.1, 0.1)
        return cls(centre, zoom, size, stature)

    def follow(self, way, room, rng, follows):
        """Turn after the person at `way` (T,), or only when they would be further than `room` away."""
        travel = np.ptp(way) / 2
        place = rng.uniform(-1, 1)
        if follows:
            self.centre[:, 0] += way - place * room
        else:
            self.centre[:, 0] += (way.max() + way.min()) / 2 - place * max(room - travel, 0.25 * room)
        self.centre[:, 0] = np.clip(self.centre[:, 0], way - room, way + room)

    def see(self, points):
        """Points of the world (T, P, 2) in body heights, as pixels."""
        return self.middle + self.scale[:, None, None] * (points - self.centre[:, None])

    def ground(self, x, y):
        """The background plane, in pixels at zoom 1, at picture columns `x` and rows `y`: (T, W), (T, H)."""
        centre = self.centre * self.stature
        zoom = self.zoom[:, None]
        return centre[:, :1] + (x - self.middle[0]) / zoom, centre[:, 1:] + (y - self.middle[1]) / zoom

    def flow(self, x, y):
        """The background's flow, float32 (T-1, H, W, 2)."""
        plane_x, plane_y = self.ground(x, y)
        centre, zoom = self.centre[1:] * self.stature, self.zoom[1:, None]
        dx = self.middle[0] + zoom * (plane_x[:-1] - centre[:, :1]) - x
        dy = self.middle[1] + zoom * (plane_y[:-1] - centre[:, 1:]) - y
        return np.stack(np.broadcast_arrays(dx[:, None, :], dy[:, :, None]), axis=-1).astype(np.float32)


def random_background(rng, size, *performers) -> Texture:
    """A texture whose mean is, of a few tries, the one least like the performers' clothes and skin."""
    tries = rng.uniform(50, 205, 8)
    clothes = np.array([level for performer in performers for level in performer.brightness])
    level = tries[np.abs(tries[:, None] - clothes).min(axis=1).argmax()]
    mean = np.clip(level + rng.uniform(-20, 20, 3), 0, 255)
    return Texture.random(rng, mean, rng.uniform(12, 26), longest=1.2 * min(size), shortest=0.14 * min(size))


def new_canvas(background, camera, with_flow) -> Canvas:
    """The background as the camera sees it, ready to be painted on."""
    height, width = camera.size
    x, y = np.arange(width), np.arange(height)
    shape = (len(camera.centre), height, width)
    return Canvas(
        frames=np.clip(background.look(*camera.ground(x, y)), 0, 255),
        flow=camera.flow(x, y) if with_flow else None,
        part=np.zeros(shape, np.int16),
        mixed=np.zeros(shape, bool),
        firm=np.ones(shape, bool),
    )


def develop(canvas, rng, noise) -> np.ndarray:
    """Add the camera's noise and round: uint8 (T, H, W, 3)."""
    frames = canvas.frames
    if noise:
        frames = frames + noise * rng.standard_normal(frames.shape, dtype=np.float32)
    return np.rint(np.clip(frames, 0, 255)).astype(np.uint8)


def valid_flow(canvas) -> np.ndarray:
    """Where the flow joins the same surface in both frames; bool (T-1, H, W).

    That is: no edge runs through the pixel, and the four pixels around the place that it moves to lie in the
    picture and show the same part, without an edge.
    """
    _, height, width = canvas.part.shape
    target_x = np.arange(width) + canvas.flow[..., 0]
    target_y = np.arange(height)[:, None] + canvas.flow[..., 1]
    left, top = np.floor(target_x).astype(int), np.floor(target_y).astype(int)
    valid = canvas.firm[:-1] & ~canvas.mixed[:-1]
    valid &= (left >= 0) & (top >= 0) & (left < width - 1) & (top < height - 1)
    left, top = np.clip(left, 0, width - 2), np.clip(top, 0, height - 2)
    time = np.arange(1, len(canvas.part))[:, None, None]
    for row in (top, top + 1):
        for column in (left, left + 1):
            valid &= (canvas.part[time, row, column] == canvas.part[:-1]) & ~canvas.mixed[time, row, column]
    return valid
