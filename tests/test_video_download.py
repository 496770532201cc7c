"""Fetching from a server on this machine: whole, resumed, refused; and archives that must not be unpacked."""

import hashlib
import shutil
import stat
import threading
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from video_files import grey_steps, write_video

from nlutils.video import download
from nlutils.video.decoding import decode
from nlutils.video.download import DownloadError, fetch, unpack

CLIP = "ReCompress_Videos/clap/Some_Film_clap_u_nm_np1_fr_med_0.avi"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An archive of J-HMDB's layout, a few clips in two classes."""
    folder = tmp_path_factory.mktemp("archive")
    with zipfile.ZipFile(folder / "JHMDB_video.zip", "w") as bundle:
        bundle.mkdir("ReCompress_Videos")
        for number, kind in enumerate(["clap", "clap", "walk"]):
            path = write_video(folder / "clip.avi", grey_steps(4 + number, 48, 64))
            name = CLIP if number == 0 else f"ReCompress_Videos/{kind}/Some_Film_{number}.avi"
            bundle.write(path, name)
    return (folder / "JHMDB_video.zip").read_bytes()


@pytest.fixture
def server(archive):
    """Serves `content`; `requests` lists (method, Range). `cut` bytes end an answer early, `cuts` times."""
    state = SimpleNamespace(
        content=archive, requests=[], cut=None, cuts=0, ranges=True, status=None, head=True, length=True
    )

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            if not state.head:
                self.send_error(501)
                return
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            wanted = self.headers.get("Range")
            state.requests.append((self.command, wanted))
            if state.status:
                self.send_error(state.status)
                return
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
            if start and start >= len(state.content):
                self.send_error(416)
                return
            content = state.content[start:]
            self.send_response(206 if start else 200)
            if start:
                end = len(state.content)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
            if state.length:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body and state.cuts and state.cut < len(content):
                state.cuts -= 1
                content = content[: state.cut]
            if body:
                self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        state.url = f"http://127.0.0.1:{running.server_port}/jhmdb/JHMDB_video.zip"
        yield state
        running.shutdown()


def _fetch(server, root, **options):
    options = {"yes": True, "progress": False, "md5": hashlib.md5(server.content).hexdigest()} | options
    return fetch("jhmdb21", root, server.url, **options)


def _left_over(root):
    return sorted(path.name for path in root.iterdir())


def _gets(server):
    return [wanted for method, wanted in server.requests if method == "GET"]


def test_whole(server, tmp_path, capsys):
    asked = []
    root = tmp_path / "downloads"
    folder = _fetch(server, root, yes=False, ask=lambda question: asked.append(question) or "y")
    assert folder == root / "JHMDB_video"
    assert decode(folder / CLIP).shape == (4, 48, 64, 3)
    assert len(list(folder.rglob("*.avi"))) == 3
    assert _left_over(root) == ["JHMDB_video"]
    assert len(asked) == 1
    shown = capsys.readouterr().out
    assert f"{len(server.content) / 1e6:.1f} MB" in shown
    for part in (server.url, "research", "http://jhmdb.is.tue.mpg.de", "ICCV 2013", str(root)):
        assert part in shown
    number = len(server.requests)
    assert _fetch(server, root) == folder  # nothing is fetched twice
    assert len(server.requests) == number


def test_progress_is_shown(server, tmp_path, capsys):
    _fetch(server, tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "JHMDB_video.zip: 100%" in shown


@pytest.mark.parametrize("answer", ["n", "", "no thanks", None])
def test_nothing_is_fetched_unasked(server, tmp_path, answer):
    def ask(_):
        if answer is None:
            raise EOFError
        return answer

    with pytest.raises(DownloadError, match="not fetched"):
        _fetch(server, tmp_path, yes=False, ask=ask)
    assert not _gets(server)
    assert not _left_over(tmp_path)


def test_cut_connection_is_resumed(server, tmp_path):
    server.cut, server.cuts = 1000, 3
    folder = _fetch(server, tmp_path)
    assert _gets(server) == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]
    assert (folder / CLIP).is_file()


def test_resumed_by_a_second_run(server, tmp_path):
    server.cut, server.cuts = 0, 100
    (tmp_path / "JHMDB_video.zip.part").write_bytes(server.content[:1234])
    with pytest.raises(DownloadError, match=r"cut; .* run again to go on"):
        _fetch(server, tmp_path)
    assert (tmp_path / "JHMDB_video.zip.part").stat().st_size == 1234
    server.cuts, server.requests = 0, []
    assert (_fetch(server, tmp_path) / CLIP).is_file()
    assert _gets(server) == ["bytes=1234-"]


def test_complete_part_is_not_fetched_again(server, tmp_path):
    (tmp_path / "JHMDB_video.zip.part").write_bytes(server.content)
    assert (_fetch(server, tmp_path) / CLIP).is_file()
    assert not _gets(server)


@pytest.mark.parametrize("head", [True, False])
def test_part_that_is_too_long_is_begun_anew(server, tmp_path, head):
    server.head = head
    (tmp_path / "JHMDB_video.zip.part").write_bytes(server.content + b"more")
    assert (_fetch(server, tmp_path) / CLIP).is_file()
    assert _gets(server)[-1] is None


def test_server_without_ranges(server, tmp_path):
    server.ranges, server.cut, server.cuts = False, 1000, 1
    assert (_fetch(server, tmp_path) / CLIP).is_file()
    assert _gets(server) == [None, "bytes=1000-"]


def test_server_that_tells_no_size(server, tmp_path, capsys):
    server.head = server.length = False
    assert (_fetch(server, tmp_path) / CLIP).is_file()
    assert "size   unknown" in capsys.readouterr().out


def test_wrong_checksum(server, tmp_path):
    with pytest.raises(
        DownloadError, match=r"JHMDB_video.zip is not the published file: its MD5 is .* 0{32}"
    ):
        _fetch(server, tmp_path, md5="0" * 32)
    assert not _left_over(tmp_path)


def test_stale_part_is_caught_by_the_checksum_and_removed(server, tmp_path):
    (tmp_path / "JHMDB_video.zip.part").write_bytes(b"something else")
    with pytest.raises(DownloadError, match="MD5"):
        _fetch(server, tmp_path)
    assert (_fetch(server, tmp_path) / CLIP).is_file()


@pytest.mark.parametrize("status", [404, 403, 410])
def test_refused(server, tmp_path, status):
    server.status = status
    with pytest.raises(DownloadError, match=f"JHMDB_video.zip: the server answers {status}"):
        _fetch(server, tmp_path)
    assert not _left_over(tmp_path)


def test_broken_server_is_tried_again_and_then_named(server, tmp_path):
    server.head, server.status = False, 503
    with pytest.raises(DownloadError, match="the server answers 503"):
        _fetch(server, tmp_path)
    assert len(_gets(server)) == download.TRIES


def test_no_server(tmp_path):
    with pytest.raises(DownloadError, match=r"127.0.0.1:9/x.zip cannot be reached .*; look at the network"):
        fetch("jhmdb21", tmp_path, "http://127.0.0.1:9/x.zip", yes=True, progress=False)
    with pytest.raises(DownloadError, match="url='file:///etc/passwd' must begin with http"):
        fetch("jhmdb21", tmp_path, "file:///etc/passwd", yes=True, progress=False)
    with pytest.raises(ValueError, match="name='ucf101'"):
        fetch("ucf101", tmp_path)


def test_too_little_space(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match=r"0.0 MB free, and 0.0 MB are needed; make room"):
        _fetch(server, tmp_path)
    assert not _gets(server)


def test_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match=r"file cannot be written .*set NLUTILS_DATA"):
        _fetch(server, tmp_path / "file")


def test_what_is_there_is_kept(server, tmp_path):
    (tmp_path / "JHMDB_video").mkdir()
    with pytest.raises(DownloadError, match="exists and does not hold ReCompress_Videos; move it away"):
        _fetch(server, tmp_path)
    (tmp_path / "jhmdb21").mkdir()
    (tmp_path / "jhmdb21" / "labels.csv").write_text("path,class\n")
    assert _fetch(server, tmp_path) == tmp_path / "jhmdb21"
    assert not server.requests


# ---- archives ----


def _member(name, kind=stat.S_IFREG):
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # past the class's own cleaning
    info.external_attr = (kind | 0o644) << 16
    return info


def _zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        bundle.writestr("ReCompress_Videos/good.avi", b"good" * 100)
        for name, content in members:
            bundle.writestr(name, content)
    return path


UNSAFE = {
    "above": ([(_member("../evil"), b"x")], "'../evil' leaves its folder"),
    "hidden above": ([(_member("ReCompress_Videos/../../evil"), b"x")], "leaves its folder"),
    "absolute": ([(_member("/tmp/nlutils-evil"), b"x")], "leaves its folder"),
    "windows drive": ([(_member("C:evil"), b"x")], "leaves its folder"),
    "backslash": ([(_member("..\\evil"), b"x")], "leaves its folder"),
    "symbolic link": ([(_member("ReCompress_Videos/link", stat.S_IFLNK), b"/etc")], "a link or a special"),
    "pipe": ([(_member("ReCompress_Videos/pipe", stat.S_IFIFO), b"")], "a link or a special"),
    "bomb": ([("ReCompress_Videos/bomb", bytes(2_000_000))], "unsafe: 2 files that unpack to 2.0 MB"),
    "many": ([(f"ReCompress_Videos/{n}", b"") for n in range(60)], "unsafe: 61 files"),
    "twice": ([("ReCompress_Videos/good.avi", b"other")], "twice"),
    "file as folder": ([("ReCompress_Videos/good.avi/x", b"other")], "both a file and a folder"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_archive_is_refused_whole(tmp_path, monkeypatch, case):
    monkeypatch.setattr(download, "MOST_MEMBERS", 50)
    members, message = UNSAFE[case]
    path = _zip(tmp_path / "a.zip", members)
    with pytest.raises(DownloadError, match=f"a.zip.*{message}"):
        unpack(path, tmp_path / "out", "ReCompress_Videos")
    assert _left_over(tmp_path) == ["a.zip"]


def test_unsafe_archive_from_a_server(server, tmp_path):
    path = _zip(tmp_path / "a.zip", UNSAFE["above"][0])
    server.content = path.read_bytes()
    with pytest.raises(DownloadError, match="leaves its folder"):
        _fetch(server, tmp_path / "root")
    assert not (tmp_path / "evil").exists()
    assert _left_over(tmp_path / "root") == ["JHMDB_video.zip.part"]


def test_archive_that_is_damaged_or_another_one(tmp_path, archive, monkeypatch):
    path = tmp_path / "a.zip"
    for content in (b"", b"no archive", archive[:3000]):
        path.write_bytes(content)
        with pytest.raises(DownloadError, match=r"a.zip is not a whole zip archive"):
            unpack(path, tmp_path / "out", "ReCompress_Videos")
    damaged = bytearray(archive)
    damaged[2000] ^= 255  # in the middle of a stored clip: its CRC tells
    path.write_bytes(damaged)
    with pytest.raises(DownloadError, match=r"a.zip is not a whole zip archive.*CRC"):
        unpack(path, tmp_path / "out", "ReCompress_Videos")
    path.write_bytes(archive)
    with pytest.raises(DownloadError, match="holds no folder Videos"):
        unpack(path, tmp_path / "out", "Videos")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(DownloadError, match=r"are free; make room"):
            unpack(path, tmp_path / "out", "ReCompress_Videos")
    assert _left_over(tmp_path) == ["a.zip"]
    unpack(path, tmp_path / "out", "ReCompress_Videos")
    assert (tmp_path / "out" / CLIP).is_file()
    assert (tmp_path / "out").stat().st_mode & 0o700 == 0o700
