"""Decoded clips on disk: found again, made anew when damaged, safe between processes."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from video_files import grey_steps, write_video

from nlutils.paths import cache_root
from nlutils.video import cache, decoding
from nlutils.video.cache import cached_array, file_digest, is_cached


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "cache"))


def _stored():
    return [path for path in cache_root().rglob("*") if path.is_file()]


def test_made_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return np.arange(6.0).reshape(2, 3)

    assert not is_cached("things", "key")
    for _ in range(2):
        np.testing.assert_array_equal(cached_array("things", "key", make), [[0, 1, 2], [3, 4, 5]])
    assert is_cached("things", "key")
    cached_array("things", "other key", make)
    assert len(calls) == 2
    np.testing.assert_array_equal(np.load(_stored()[0]), make())  # others can read the file too


@pytest.mark.parametrize("damage", ["empty", "half", "a flipped bit", "zeros", "text"])
def test_damaged_entry_is_made_anew(damage):
    array = np.arange(1000, dtype=np.uint8)
    cached_array("things", "key", lambda: array)
    (path,) = _stored()
    content = bytearray(path.read_bytes())
    flipped = content.copy()
    flipped[len(content) // 2] ^= 1
    new = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "a flipped bit": flipped,
        "zeros": bytes(4),
        "text": b"not an array",
    }[damage]
    path.write_bytes(new)
    np.testing.assert_array_equal(cached_array("things", "key", lambda: array), array)
    assert path.read_bytes() == content


def test_failure_stores_nothing():
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached_array("things", "key", fail)
    assert not _stored()


def test_unwritable_cache_names_the_cure(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write the cache in .*NLUTILS_CACHE"):
        cached_array("things", "key", lambda: np.zeros(1))


def test_file_that_another_process_holds_open(monkeypatch):
    """Windows refuses to replace it; what lies there is the same array."""
    cached_array("things", "key", lambda: np.zeros(3))
    monkeypatch.setattr(cache, "_load", lambda path: None)

    def refuse(*_):
        raise PermissionError(13, "in use")

    monkeypatch.setattr(os, "replace", refuse)
    np.testing.assert_array_equal(cached_array("things", "key", lambda: np.zeros(3)), np.zeros(3))
    with pytest.raises(OSError, match="cannot write"):
        cached_array("things", "another key", lambda: np.zeros(3))


def _write_and_read(seed):
    array = np.random.default_rng(0).integers(0, 255, 300_000, dtype=np.uint8)
    for turn in range(5):
        np.testing.assert_array_equal(cached_array("things", f"key {turn}", lambda: array), array)
    return seed


def test_processes_may_write_the_same_entry():
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(_write_and_read, range(8))) == list(range(8))
    assert len(_stored()) == 5  # and no temporary file is left


def test_clips_are_keyed_by_content_and_size(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", grey_steps(4))
    first = decoding.read_cached(path, (16, 24))
    np.testing.assert_array_equal(first, decoding.decode(path, (16, 24)))
    moved = path.rename(tmp_path / "b.mp4")
    assert len(_stored()) == 1

    def fail(*_):
        raise AssertionError("decoded a second time")

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", fail)
        np.testing.assert_array_equal(decoding.read_cached(moved, (16, 24)), first)
        assert decoding.ensure_cached(moved, (16, 24)) == file_digest(moved)
    assert decoding.read_cached(moved).shape == (4, 32, 48, 3)  # another size is another entry
    write_video(moved, grey_steps(4, offset=60))
    assert decoding.read_cached(moved, (16, 24))[0, 8, 20, 0] > first[0, 8, 20, 0] + 50
    assert len(_stored()) == 3
