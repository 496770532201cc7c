"""A folder of tiny clips for the tests of the study's commands: a square that moves to the left or right."""

from pathlib import Path

import numpy as np
from video_files import write_video

# Settings that make a run a matter of a second.
TINY = ["epochs=2", "batch=4", "frames=8", "resize=(27,36)", "size=(24,32)"]


def moving_square(kind: str, seed: int, frames: int = 9) -> np.ndarray:
    """uint8 (frames, 36, 48, 3): 8 x 8 bright pixels on noise, 3 to the side a frame."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(60, 90, (36, 48, 1), dtype=np.uint8)
    clip = np.repeat(noise, 3, axis=2)[None].repeat(frames, axis=0)
    top = int(rng.integers(4, 24))
    for t in range(frames):
        left = 6 + 3 * t if kind == "right" else 34 - 3 * t
        clip[t, top : top + 8, left : left + 8] = 230
    return clip


def write_folder(root: Path, groups: int = 4, kinds=("left", "right")) -> Path:
    """`root/<kind>/<group>.mp4`, as many clips of each kind as groups."""
    for kind in kinds:
        (root / kind).mkdir(parents=True, exist_ok=True)
        for number in range(groups):
            seed = 2 * number + (kind == "right")
            write_video(root / kind / f"take{number}.mp4", moving_square(kind, seed))
    return root


def settings(*more: str) -> list[str]:
    """The words of a command line that say `TINY` and `more`."""
    return [word for setting in (*TINY, *more) for word in ("--set", setting)]
