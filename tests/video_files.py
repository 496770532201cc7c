"""Small video files for the tests: written here, so that the tests need no data."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def grey_steps(count: int, height: int = 32, width: int = 48, offset: int = 0) -> np.ndarray:
    """Frames whose number is their brightness: frame t is grey 20 + 5 t, its left half white."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (20 + 5 * np.arange(count) + offset)[:, None, None, None]
    frames[:, :, : width // 2] = 235
    return frames


def write_video(
    path, frames, *, codec="mpeg4", pixels="yuv420p", rate=25, times=None, rotation=0, options=None
) -> Path:
    """Encode `frames`, uint8 (T, H, W, 3); `times` in milliseconds make the rate variable."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.bit_rate = 2_000_000
        stream.codec_context.time_base = Fraction(1, 1000) if times else Fraction(1, rate)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = times[number] if times else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def write_sound(path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return Path(path)
