"""`nlutils lock`: pin what is installed, for pip (`requirements.lock`) and for conda (`environment.yml`).

`pyproject.toml` names the direct dependencies and their ranges. From the environment that it was installed
into, this module writes the versions of these and of everything they need in turn, on the systems that the
project supports; a package that only some of them need gets a marker.
"""

import itertools
import platform
import re
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nlutils.paths import atomic_path, project_root

__all__ = ["cuda_packages", "direct_requirements", "is_home", "lock_text", "pins", "write_lock"]

EXTRAS = ("torch", "keras", "notebooks", "site", "dev")

# Packages that the machine which writes the lock does not need and another system or Python does: version,
# needs.
ELSEWHERE = {
    "aiohappyeyeballs": ("2.7.1", []),
    "aiohttp": (
        "3.14.5",
        [
            "aiohappyeyeballs",
            "aiosignal",
            "attrs",
            "frozenlist",
            "multidict<8",
            "propcache",
            "yarl<2,>=1.25.1",
        ],
    ),
    "aiosignal": ("1.4.0", ["frozenlist"]),
    "appnope": ("1.0.0", []),
    "colorama": ("0.4.6", []),
    "frozenlist": ("1.8.0", []),
    "multidict": ("7.2.1", []),
    "propcache": ("0.5.4", []),
    "pywinpty": ("3.1.2", []),
    "yarl": ("1.25.1", ["idna", "multidict", "propcache"]),
}
# One package under two names: the lock gives both the same version.
TWINS = {"tensorflow": "tensorflow-cpu"}

_SYSTEMS = (
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "aarch64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
)
_PYTHONS = ("3.11", "3.12", "3.13")
_CUDA = re.compile(r"(nvidia-|cuda-|triton|pytorch-triton|jax-cuda)")


def is_home() -> bool:
    """Whether this is the system that the lock is written on: only `ELSEWHERE` is not needed here."""
    return (sys.platform, platform.machine(), sys.version_info[:2]) == ("linux", "x86_64", (3, 11))


def direct_requirements(root: Path | None = None) -> list[Requirement]:
    """What `pyproject.toml` asks for: its dependencies and those of the extras that the lock covers."""
    project = tomllib.loads((root or project_root()).joinpath("pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *itertools.chain.from_iterable(extras[name] for name in EXTRAS)]
    return [Requirement(text) for text in texts]


def cuda_packages() -> dict[str, str]:
    """The installed packages that only a machine with an NVIDIA GPU uses, and their versions."""
    found = {canonicalize_name(dist.metadata["Name"]): dist.version for dist in metadata.distributions()}
    return {name: version for name, version in sorted(found.items()) if _CUDA.match(name)}


def pins(root: Path | None = None) -> dict[str, tuple[str, str]]:
    """Every package that the project needs: its version and its marker ("" where it is needed everywhere).

    Raises RuntimeError for a package that is neither installed nor in `ELSEWHERE`, and for a version that
    does not satisfy a package that needs it.
    """
    needed: dict[str, set[tuple[int, str]]] = {}
    for system, python in itertools.product(range(len(_SYSTEMS)), _PYTHONS):
        environment = {
            **_SYSTEMS[system],
            "python_version": python,
            "python_full_version": f"{python}.0",
            "platform_python_implementation": "CPython",
            "implementation_name": "cpython",
        }
        for name in _closure(direct_requirements(root), environment):
            needed.setdefault(name, set()).add((system, python))
    return {name: (_version(name), _marker(places)) for name, places in sorted(needed.items())}


def _closure(requirements: list[Requirement], environment: dict[str, str]) -> set[str]:
    """The names of all packages that the requirements lead to on one system."""
    seen: set[tuple[str, str]] = set()
    waiting = [requirement for requirement in requirements if _applies(requirement, environment, "")]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if _CUDA.match(name):
            continue
        if not requirement.specifier.contains(_version(name), prereleases=True):
            raise RuntimeError(f"{requirement} is needed, and the lock would pin {name}=={_version(name)}")
        for extra in {"", *requirement.extras} - {extra for done, extra in seen if done == name}:
            seen.add((name, extra))
            waiting += [need for need in _requires(name) if _applies(need, environment, extra)]
    return {name for name, _ in seen}


def _applies(requirement: Requirement, environment: dict[str, str], extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})


@cache
def _requires(name: str) -> list[Requirement]:
    texts = ELSEWHERE[name][1] if name in ELSEWHERE else metadata.requires(TWINS.get(name, name))
    return [Requirement(text) for text in texts or []]


@cache
def _version(name: str) -> str:
    """The version without its local part: 2.13.0 for 2.13.0+cpu; any build of it satisfies the pin."""
    if name in ELSEWHERE:
        return ELSEWHERE[name][0]
    try:
        return metadata.version(TWINS.get(name, name)).split("+")[0]
    except metadata.PackageNotFoundError:
        raise RuntimeError(
            f"{name} is needed and not installed: install it, or add it to ELSEWHERE"
        ) from None


def _marker(needed: set[tuple[int, str]]) -> str:
    """The marker of a package that is needed on these pairs of a place in `_SYSTEMS` and a Python version."""
    systems, pythons = ({pair[part] for pair in needed} for part in (0, 1))
    parts = []
    if len(systems) < len(_SYSTEMS):
        parts.append("(" + " or ".join(_platforms(systems)) + ")")
    if len(pythons) < len(_PYTHONS):
        parts.append("(" + " or ".join(f"python_version == '{python}'" for python in sorted(pythons)) + ")")
    return " and ".join(parts)


def _platforms(systems: set[int]) -> list[str]:
    """A condition for each platform among these places in `_SYSTEMS`; the machine too where it matters."""
    conditions = []
    for system, places in itertools.groupby(range(len(_SYSTEMS)), lambda i: _SYSTEMS[i]["sys_platform"]):
        places = set(places)
        if places <= systems:
            conditions.append(f"sys_platform == '{system}'")
        else:
            conditions += [
                f"(sys_platform == '{system}' and platform_machine == '{_SYSTEMS[i]['platform_machine']}')"
                for i in sorted(places & systems)
            ]
    return conditions


def lock_text(pinned: dict[str, tuple[str, str]]) -> list[str]:
    """The lines of the lock file, without its head."""
    return [
        f"{name}=={version}" + (f" ; {marker}" if marker else "")
        for name, (version, marker) in pinned.items()
    ]


def write_lock(root: Path | None = None) -> None:
    """Write `requirements.lock` and `environment.yml` from the installed environment.

    Raises RuntimeError on a system that is not the home of the lock.
    """
    if not is_home():
        raise RuntimeError("the lock is written on Linux, x86_64, Python 3.11; this is another system")
    root = root or project_root()
    lines = lock_text(pins(root))
    head = "# Written by `nlutils lock` from pyproject.toml and the environment it was installed into.\n"
    with atomic_path(root / "requirements.lock") as path:
        path.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    conda = [
        head + "# conda env create --file environment.yml",
        "name: nlutils",
        "channels:",
        "  - conda-forge",
        "dependencies:",
        "  - python=3.11",
        "  - pip",
        "  - pip:",
        *(f'      - "{line}"' for line in lines),
    ]
    with atomic_path(root / "environment.yml") as path:
        path.write_text("\n".join(conda) + "\n", encoding="utf-8")
    print(f"{len(lines)} packages pinned in {root / 'requirements.lock'} and {root / 'environment.yml'}")
