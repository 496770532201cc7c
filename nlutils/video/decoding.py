"""From a video file to an array of frames, or to one error that names the file and the cause.

What is trusted: the frames that come out of the decoder. What is not: the header's count, size and rate.
Frames are turned upright as the file's display matrix says, and come back in the order of showing. A file of
variable rate gives its frames as they are, none repeated or dropped; `decode_timed` says when each is shown.
A file of which any part is damaged is refused: half a clip, or frames that a decoder patched up, would be
silent errors in every result made from it. Pixels are taken as square, and transparency is dropped.
"""

from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from nlutils.arguments import positive_integer
from nlutils.video.cache import cached_array, file_digest, is_cached

__all__ = ["ClipError", "Decoded", "decode", "decode_timed", "ensure_cached", "read_cached"]

# A clip is held in memory whole; above this it is a film.
LARGEST = 2 * 2**30

# Part of the cache's key: count it up when the same file would decode to other pixels.
_RULES = "decode 1"

# Colours to the nearest whole number, on every processor. The library's own choice is quicker, half a grey
# level too dark, and wrong by up to 60 levels at coloured edges.
_EXACT = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
)


class ClipError(ValueError):
    """A video file that cannot be used: `path`, and the `cause` in one sentence."""

    def __init__(self, path, cause: str):
        super().__init__(f"{path}: {cause}")
        self.path = str(path)
        self.cause = cause

    def __reduce__(self):
        return type(self), (self.path, self.cause)


@dataclass(frozen=True)
class Decoded:
    """A clip's frames, uint8 (T, H, W, 3), RGB, and the second at which each is shown, float64 (T,).

    The seconds are NaN where the file has no time stamps. They can be wrong as a whole: the J-HMDB originals
    say 30 frames a second and were shot at 25.
    """

    frames: np.ndarray
    seconds: np.ndarray


def decode(path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode a video file: uint8 (T, H, W, 3), RGB, upright.

    `size` = (H, W) resizes each frame, averaging over areas (OpenCV's INTER_AREA); the aspect ratio is not
    kept. Raises ClipError, naming the file and the cause, when the file is missing, empty, no video, without
    a video track, damaged or cut short, or larger in memory than 2 GiB.
    """
    return decode_timed(path, size).frames


def decode_timed(path, size: tuple[int, int] | None = None) -> Decoded:
    """The same as `decode`, with the time of each frame. Raises ClipError."""
    size = _checked_size(size)
    path = Path(path).absolute()
    _look_at(path)
    frames, seconds = [], []
    # One for the whole clip: making a new one for each frame takes most of the time of a small clip.
    to_rgb = VideoReformatter()
    try:
        # The whitelist keeps a playlist that is named like a clip from opening addresses.
        with av.open(
            str(path), metadata_errors="replace", options={"protocol_whitelist": "file"}
        ) as container:
            for frame in _decoded(path, container):
                rgb = to_rgb.reformat(frame, format="rgb24", interpolation=_EXACT).to_ndarray()
                frames.append(_resized(_upright(path, rgb, frame), size))
                seconds.append(np.nan if frame.time is None else frame.time)
                _refuse_unfit(path, frames)
    except av.error.FFmpegError as error:
        raise ClipError(path, _cause(path, error, len(frames))) from error
    if not frames:
        raise ClipError(path, "its video track holds no frame that can be decoded")
    return Decoded(np.stack(frames), np.array(seconds, dtype=np.float64))


def read_cached(path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The same as `decode`, kept on disk: the second time the frames are read, not decoded.

    The key is the file's content, so a moved or renamed file is found and a changed one is decoded anew.
    """
    size = _checked_size(size)
    return cached_array("clips", _key(path, size), lambda: decode(path, size))


def ensure_cached(path, size: tuple[int, int] | None = None) -> str:
    """Decode a file into the cache unless it is there already; returns its SHA-256. Raises ClipError."""
    size = _checked_size(size)
    key = _key(path, size)
    if not is_cached("clips", key):
        cached_array("clips", key, lambda: decode(path, size))
    return key.split()[0]


def _key(path, size) -> str:
    path = Path(path)
    _look_at(path)
    return f"{file_digest(path)} {size} {_RULES}"


def _checked_size(size) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        height, width = size
    except (TypeError, ValueError):
        raise ValueError(f"size={size!r} must be (height, width) or None") from None
    return positive_integer("height", height), positive_integer("width", width)


def _look_at(path: Path) -> None:
    """The causes that need no decoder."""
    try:
        if path.is_dir():
            raise ClipError(path, "a folder, not a video file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise ClipError(path, "the file is empty (0 bytes)")
    except OSError as error:
        cause = (
            "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        )
        raise ClipError(path, cause) from error


def _decoded(path: Path, container):
    """Yield the frames of the video track, in the order of showing; raise ClipError at the first damage."""
    # A picture attached to a piece of music is a video stream to the library, and not a clip.
    attached = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
        raise ClipError(path, f"it holds no video track, only {' and '.join(kinds)}")
    stream = streams[0]
    if stream.codec_context is None:
        raise ClipError(path, "its video track is in a format that no decoder here knows")
    shown = 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise ClipError(path, f"damaged or cut short after {shown} frames")
        for frame in packet.decode():
            # The decoder patched this frame up and marked it.
            if frame.is_corrupt:
                raise ClipError(path, f"damaged: frame {shown} cannot be decoded whole")
            yield frame
            shown += 1


def _refuse_unfit(path: Path, frames: list[np.ndarray]) -> None:
    first, last, count = frames[0], frames[-1], len(frames)
    if last.shape != first.shape:
        sizes = "from {1} x {0} to {3} x {2}".format(*first.shape[:2], *last.shape[:2])
        raise ClipError(path, f"the frame size changes {sizes} at frame {count - 1}; decode it at one size")
    if count * first.nbytes > LARGEST:
        cause = f"more than 2 GiB in memory after {count} frames of {first.shape[1]} x {first.shape[0]}"
        raise ClipError(path, f"{cause}; cut it into clips, or decode it at a smaller size")


def _resized(picture: np.ndarray, size) -> np.ndarray:
    picture = np.ascontiguousarray(picture)
    if size is None or picture.shape[:2] == size:
        return picture
    return cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)


def _upright(path: Path, picture: np.ndarray, frame) -> np.ndarray:
    """Turn a picture as its display matrix says: quarter turns and mirror images, which phones write.

    The matrix (ISO/IEC 14496-12, tkhd) sends the stored point (x, y) to (ax + cy, bx + dy), and shifts it.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5] / 2**16
    if max(abs(b), abs(c)) < 0.01 * min(abs(a), abs(d)):
        across, down = a, d
    elif max(abs(a), abs(d)) < 0.01 * min(abs(b), abs(c)):
        picture = picture.swapaxes(0, 1)
        across, down = c, b
    else:
        raise ClipError(path, f"turned by {frame.rotation} degrees; only quarter turns are understood")
    return picture[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1]


def _cause(path: Path, error, shown: int) -> str:
    if shown:
        return f"damaged or cut short after {shown} frames ({error.strerror})"
    with open(path, "rb") as file:
        head = file.read(16)
    if head[4:8] == b"ftyp" and b"moov" not in path.read_bytes():
        return "an MP4 file that was cut short: its index (moov) is missing"
    return f"not a video that can be read ({error.strerror}); its first bytes are {head!r}"
