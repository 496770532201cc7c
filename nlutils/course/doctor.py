"""`nlutils doctor`: is this machine ready for the notebooks, and what to do about each fault."""

import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from nlutils.course.environment import cuda_packages, direct_requirements
from nlutils.course.execution import cores
from nlutils.paths import cache_root, data_root, project_root, shown

__all__ = ["Finding", "findings", "main"]

MEMORY, DISK = 4, 2  # GiB that the notebooks need, two at a time
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found and, for a fault, what to do about it."""

    subject: str
    found: str
    cure: str = ""

    @property
    def is_fault(self) -> bool:
        return bool(self.cure)


def findings() -> Iterator[Finding]:
    """Look at the machine, one thing after the other."""
    for look in (
        _python,
        _packages,
        _machine,
        _disk,
        _pytorch,
        _keras,
        _cuda,
        _kernel,
        _video,
        _data,
        _folders,
    ):
        yield from look()


def main() -> int:
    """Print the findings. Returns 0 when none is a fault, else 1."""
    faults = 0
    for finding in findings():
        print(f"{'FAULT' if finding.is_fault else 'ok':<6} {finding.subject:<18} {finding.found}", flush=True)
        if finding.is_fault:
            print(f"       what to do:        {finding.cure}", flush=True)
            faults += 1
    print("\nThis machine is ready." if faults == 0 else f"\n{faults} faults found.")
    return int(faults > 0)


def _python():
    version = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    cure = "" if supported else "install Python 3.11, 3.12 or 3.13, then run: make PYTHON=python3.11"
    yield Finding("Python", f"{version}, {sys.executable}", cure)


def _packages():
    faults = []
    needed = [item for item in direct_requirements() if item.marker is None or item.marker.evaluate()]
    for requirement in needed:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            faults.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            faults.append(f"{requirement.name} is {version}, wanted {requirement.specifier}")
    cure = "pip install -r requirements.lock" if faults else ""
    yield Finding("packages", "; ".join(faults) or f"{len(needed)} direct dependencies, as wanted", cure)


def _machine():
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total / _GIB, memory.available / _GIB
    found = f"{cores()} cores, {total:.0f} GiB memory, {free:.1f} GiB of it free"
    cure = (
        "close other programs, or run one notebook at a time: nlutils run --jobs 1" if free < MEMORY else ""
    )
    yield Finding("machine", found, cure)


def _disk():
    free = shutil.disk_usage(project_root()).free / _GIB
    cure = f"free {DISK} GiB: `make clean` and deleting {cache_root()} are safe" if free < DISK else ""
    yield Finding("disk", f"{free:.0f} GiB free", cure)


def _ask(code: str) -> tuple[bool, str]:
    """Run Python code in a process of its own: whether it succeeded, and the last line it printed."""
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=project_root())
    except subprocess.TimeoutExpired:
        return False, "it took more than 300 seconds"
    text = done.stdout if done.returncode == 0 else done.stderr or f"it ended with code {done.returncode}"
    return done.returncode == 0, (text.strip().splitlines() or [""])[-1]


def _pytorch():
    works, said = _ask(
        "import torch; assert (torch.ones(2) + 1).sum() == 4; "
        "gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ''; "
        "gpu = gpu or ('Apple GPU' if torch.backends.mps.is_available() else 'none'); "
        "print(torch.__version__, '· GPU:', gpu)"
    )
    yield Finding("PyTorch", said, "" if works else "pip install -r requirements.lock")


def _keras():
    works, said = _ask(
        "from nlutils.course import import_keras; keras = import_keras(); "
        "print(keras.__version__, '· backend:', keras.backend.backend())"
    )
    cure = "unset KERAS_BACKEND, then: pip install -r requirements.lock"
    yield Finding("Keras", said, "" if works else cure)


def _cuda():
    found = cuda_packages()
    if not found:
        yield Finding("CUDA packages", "none: the CPU builds are installed")
        return
    size = sum(_size(name) for name in found) / _GIB
    gpu = (
        "there is an NVIDIA driver"
        if shutil.which("nvidia-smi")
        else ("no NVIDIA driver was found: they only take space, and the README names the CPU build")
    )
    yield Finding("CUDA packages", f"{len(found)}, {size:.1f} GiB; {gpu}")


def _size(distribution: str) -> int:
    return sum(file.size or 0 for file in metadata.files(distribution) or [])


def _kernel():
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        argv = KernelSpecManager().get_kernel_spec("python3").argv
    except NoSuchKernel:
        yield Finding("notebook kernel", "there is no kernel 'python3'", "pip install -r requirements.lock")
        return
    own = argv[0] in ("python", "python3", Path(sys.executable).name)
    own = own or Path(argv[0]).absolute() == Path(sys.executable).absolute()
    cure = f"{sys.executable} -m ipykernel install --sys-prefix" if not own else ""
    yield Finding("notebook kernel", "python3: this Python" if own else f"python3 starts {argv[0]}", cure)


def _video():
    cure = "pip install --force-reinstall --no-deps av"
    try:
        frames = _decoded_again(np.full((32, 48, 3), 200, np.uint8), count=5)
    except Exception as error:
        yield Finding("video", f"{type(error).__name__}: {error}", cure)
        return
    right = len(frames) == 5 and all(abs(float(frame.mean()) - 200) < 5 for frame in frames)
    found = (
        "H.264 written and read again" if right else f"wrote 5 frames, read {len(frames)} with other values"
    )
    yield Finding("video", found, "" if right else "pip install --force-reinstall --no-deps av")


def _decoded_again(picture: np.ndarray, count: int) -> list[np.ndarray]:
    """Encode a picture `count` times as H.264 in memory, and decode what was written."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=25)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuv420p"
        for _ in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _data():
    from nlutils.video.catalogue import describe_source

    try:
        yield Finding("data", f"{data_root()}: {describe_source()}")
    except (OSError, ValueError) as error:
        yield Finding("data", str(error), "correct or unset NLUTILS_DATA and NLUTILS_CLIPS")


def _folders():
    for subject, folder in (("cache", cache_root()), ("build folder", project_root() / "build")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                yield Finding(subject, f"{shown(folder)} can be written")
        except OSError as error:
            cure = "make it writable; NLUTILS_CACHE names another folder for the cache"
            yield Finding(subject, f"{folder}: {error.strerror}", cure)
