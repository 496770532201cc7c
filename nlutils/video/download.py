"""Fetching a data set: size and terms first, then with progress, resumable, checked, safely unpacked."""

import errno
import hashlib
import http.client
import os
import shutil
import stat
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from nlutils.paths import data_root
from nlutils.video.catalogue import DataSet, data_set

__all__ = ["DownloadError", "fetch", "unpack"]

# Seconds without a byte before a connection counts as dead, tries without progress, seconds between them.
TIMEOUT, TRIES, PAUSE = 30, 4, 2.0

# An archive that unpacks to more than this, or to this many times its own size, is not the one we asked for.
LARGEST_UNPACKED, LARGEST_RATIO, MOST_MEMBERS = 20 * 2**30, 100, 100_000

_CHUNK = 2**18


class DownloadError(RuntimeError):
    """A data set could not be fetched; the message says what failed and what to do."""


def fetch(
    name: str = "jhmdb21",
    root=None,
    url: str | None = None,
    *,
    md5: str | None = None,
    yes: bool = False,
    progress: bool = True,
    ask: Callable[[str], str] = input,
) -> Path:
    """Download a data set of the catalogue, check it and unpack it; returns its folder.

    Shows title, terms, address and size, and asks before it fetches (`yes=True` does not ask). The archive
    goes to `root`, by default nlutils.paths.data_root(). What is there already is not fetched again; a
    download that was cut goes on where it stopped; the folder appears only when all of it is there; the
    archive is deleted then.

    `url` and `md5` replace the catalogue's. Raises DownloadError (declined, refused, cut, wrong checksum,
    unsafe archive, no space, no permission) and ValueError for an unknown name.
    """
    entry = data_set(name)
    root = Path(root) if root is not None else data_root()
    url = url or entry.address
    folder = root / entry.folder
    if (root / entry.prepared).is_file():
        print(f"A prepared copy of {entry.name} is in {root} already; nothing to fetch.")
        return (root / entry.prepared).parent
    if (folder / entry.contents).is_dir():
        print(f"{entry.name} is in {folder} already; nothing to fetch.")
        return folder
    if folder.exists():
        raise DownloadError(
            f"{folder} exists and does not hold {entry.contents}; move it away and fetch again"
        )
    size = _size(url)
    _show(entry, url, size, root)
    if not yes:
        _confirm(ask)
    _prepare(root, size)
    archive = root / f"{PurePosixPath(urllib.parse.urlsplit(url).path).name or entry.name}.part"
    _download(url, archive, size, progress)
    _check_md5(archive, md5 or entry.md5)
    unpack(archive, folder, entry.contents)
    archive.unlink()
    print(f"{entry.name} is in {folder}.")
    return folder


def unpack(archive, folder, contents: str = "") -> None:
    """Unpack a zip archive into the new `folder`, whole or not at all.

    Refused with DownloadError, before anything is written: names that leave the folder, links and special
    files, encrypted members, a name that is there twice, more data than LARGEST_UNPACKED or LARGEST_RATIO
    times the archive, too little space on the disk, no `contents` in it. A member whose checksum is wrong is
    refused while it is read.
    """
    archive, folder = Path(archive), Path(folder)
    temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = bundle.infolist()
            _check_members(archive, members, shutil.disk_usage(temporary).free)
            (temporary / "all").mkdir()
            for member in members:
                _extract(bundle, member, temporary / "all")
        if not (temporary / "all" / contents).is_dir():
            raise DownloadError(
                f"{archive} holds no folder {contents}; it is not the archive that was expected"
            )
        os.replace(temporary / "all", folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise DownloadError(f"{archive} is not a whole zip archive: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _show(entry: DataSet, url: str, size: int | None, root: Path) -> None:
    print(f"{entry.title}\n  from   {url}\n  size   {_readable(size)}\n  to     {root}")
    print(f"  page   {entry.page}\n  terms  {entry.terms}\n  cite   {entry.citation}")


def _confirm(ask) -> None:
    try:
        answer = ask("Fetch it? [y/N] ")
    except EOFError:
        raise DownloadError(
            "not fetched: there is nobody to answer; give --yes to fetch without asking"
        ) from None
    if answer.strip().lower() not in ("y", "yes"):
        raise DownloadError("not fetched, as you answered")


def _readable(size: int | None) -> str:
    return "unknown: the server does not say" if size is None else f"{size / 1e6:.1f} MB"


def _prepare(root: Path, size: int | None) -> None:
    """Make the folder; see that it can be written and has room for the archive and as much unpacked."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        cure = "set NLUTILS_DATA to a folder that can be, or unset it"
        raise DownloadError(f"{root} cannot be written ({error.strerror}); {cure}") from error
    free, needed = shutil.disk_usage(root).free, 2 * (size or 0)
    if free < needed:
        raise DownloadError(
            f"{root} has {_readable(free)} free, and {_readable(needed)} are needed; make room"
        )


def _request(url: str, method: str = "GET", start: int = 0):
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"url={url!r} must begin with http:// or https://")
    # No compression on the way: ranges and sizes must be those of the file.
    headers = {"User-Agent": "nlutils", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return urllib.request.urlopen(
        urllib.request.Request(url, headers=headers, method=method), timeout=TIMEOUT
    )


def _size(url: str) -> int | None:
    """What the server says the file's size is; None when it does not say."""
    try:
        with _request(url, "HEAD") as answer:
            length = answer.headers.get("Content-Length")
            return int(length) if length and length.isdecimal() else None
    except urllib.error.HTTPError as error:
        if error.code in (403, 405, 501):  # a server that knows GET only
            return None
        raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
    except OSError as error:
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: OSError) -> DownloadError:
    cause = getattr(error, "reason", None) or error
    return DownloadError(f"{url} cannot be reached ({cause}); look at the network and try again")


def _download(url: str, archive: Path, size: int | None, progress: bool) -> None:
    """Bring `archive` to its full size, from wherever it stands, in as many answers as it takes."""
    from tqdm import tqdm

    tries = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc=archive.stem, disable=not progress) as bar:
        while True:
            before = _length(archive)
            if size is not None and before == size:
                return
            cause = _attempt(url, archive, before, bar)
            if cause is None:
                return
            tries = 0 if _length(archive) > before else tries + 1
            if tries >= TRIES:
                have = f"{_readable(_length(archive))} of {_readable(size)} are here"
                raise DownloadError(f"{url}: {cause}; {have}, run again to go on from there")
            time.sleep(PAUSE)


def _length(archive: Path) -> int:
    return archive.stat().st_size if archive.exists() else 0


def _attempt(url: str, archive: Path, start: int, bar) -> str | None:
    """Ask for what is missing; None when all of it came, else why a second try is worth it."""
    try:
        whole = _receive(url, archive, start, bar)
        return None if whole else "the connection was cut"
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what is here is no part of what the server has
            archive.unlink()
        elif error.code < 500:
            raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
        return f"the server answers {error.code} {error.reason}"
    except urllib.error.URLError as error:
        raise _unreachable(url, error) from error
    except http.client.HTTPException:
        return "the connection was cut"
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DownloadError(f"{archive} cannot be written: {error.strerror}; make room") from error
        return f"the connection failed ({error})"


def _receive(url: str, archive: Path, start: int, bar) -> bool:
    """Receive one answer, appending to `archive`; True when the answer was whole."""
    with _request(url, start=start) as answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {start}-"
        )
        if start and not resumed:
            start = 0  # the server sends all of it: begin again
        bar.n = start
        bar.refresh()
        length = answer.headers.get("Content-Length")
        received = 0
        with open(archive, "ab" if resumed else "wb") as file:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    return length is None or received == int(length)


def _check_md5(archive: Path, expected: str) -> None:
    with open(archive, "rb") as file:
        seen = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if seen != expected:
        archive.unlink()
        cause = f"its MD5 is {seen}, and should be {expected}"
        raise DownloadError(
            f"{archive.stem} is not the published file: {cause}; it was deleted, fetch it again"
        )


def _check_members(archive: Path, members: list[zipfile.ZipInfo], free: int) -> None:
    files, folders = set(), set()
    for member in members:
        cause = _unsafe(member, files)
        if cause:
            raise DownloadError(f"{archive} is unsafe: {member.filename!r} {cause}")
        path = PurePosixPath(member.filename)
        (folders if member.is_dir() else files).add(path)
        folders.update(path.parents)
    if files & folders:
        raise DownloadError(f"{archive} is unsafe: {str(min(files & folders))!r} is both a file and a folder")
    total = sum(member.file_size for member in members)
    largest = min(LARGEST_UNPACKED, LARGEST_RATIO * archive.stat().st_size)
    if total > largest or len(members) > MOST_MEMBERS:
        raise DownloadError(f"{archive} is unsafe: {len(members)} files that unpack to {_readable(total)}")
    if total > free:
        raise DownloadError(
            f"{archive} unpacks to {_readable(total)}, and {_readable(free)} are free; make room"
        )


def _unsafe(member: zipfile.ZipInfo, files: set[PurePosixPath]) -> str | None:
    """Why a member must not be unpacked; None when it may."""
    path = PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in member.filename:
        return "leaves its folder"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    if member.flag_bits & 1:
        return "is encrypted"
    return "is in it twice" if path in files else None


def _extract(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    target = folder / member.filename
    if member.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # zipfile gives no more bytes than the member's size, which was counted, and checks its CRC.
    with bundle.open(member) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)
