"""Arrays kept on disk between runs, keyed by what they were made from."""

import hashlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nlutils.paths import atomic_path, cache_root

__all__ = ["cached_array", "file_digest", "is_cached"]


def file_digest(path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_cached(kind: str, key: str) -> bool:
    """Whether an array was stored under `kind` and `key`. Its bytes are not looked at."""
    return _path(kind, key).is_file()


def cached_array(kind: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array that `make()` computes, from disk when it was computed before.

    `kind` names the folder, and `key` holds everything that the array depends on: the digest of the source's
    bytes and the settings. A damaged file is made anew. Several processes may ask for the same array: each
    reads or writes a whole file. Raises OSError, naming the cure, when the cache cannot be written.
    """
    path = _path(kind, key)
    array = _load(path)
    if array is None:
        array = make()
        _store(path, array)
    return array


def _path(kind: str, key: str) -> Path:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return cache_root() / kind / digest[:2] / f"{digest}.npy"


def _load(path: Path) -> np.ndarray | None:
    """The array in `path`; None when the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(content) < 5 or _checksum(memoryview(content)[:-4]) != content[-4:]:
        return None
    return np.load(io.BytesIO(content), allow_pickle=False)


def _store(path: Path, array: np.ndarray) -> None:
    """Write `array` as a .npy file with its CRC-32 behind it (np.load stops before the last four bytes)."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.write(_checksum(buffer.getbuffer()))
    except OSError as error:
        # Windows refuses to replace a file that another process has open; what lies there is the same array.
        if isinstance(error, PermissionError) and path.is_file():
            return
        cure = "set NLUTILS_CACHE to a folder that can be written"
        raise OSError(f"cannot write the cache in {cache_root()}: {error}; {cure}") from error


def _checksum(content) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")
