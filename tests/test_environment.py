"""The lock file, the conda environment and what is installed agree with pyproject.toml."""

import os
import re

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nlutils.course import environment
from nlutils.paths import project_root


def locked() -> dict[str, Requirement]:
    lines = (project_root() / "requirements.lock").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in requirements}


def version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not pinned"
    return specifier.version


def test_conda_installs_the_same_pins():
    conda = yaml.safe_load((project_root() / "environment.yml").read_text())
    *plain, pip = conda["dependencies"]
    assert plain == ["python=3.11", "pip"]
    lines = (project_root() / "requirements.lock").read_text().splitlines()
    assert pip["pip"] == [line for line in lines if not line.startswith("#")]


def test_every_direct_dependency_is_pinned_in_its_range():
    pins = locked()
    for requirement in environment.direct_requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in requirements.lock: run `nlutils lock`"
        assert requirement.specifier.contains(version(pins[name])), (
            f"{pins[name]} does not satisfy {requirement}"
        )


@pytest.mark.skipif(not environment.is_home(), reason="the lock is written on another system")
def test_the_lock_is_what_the_installed_environment_gives():
    lines = (project_root() / "requirements.lock").read_text().splitlines()[1:]
    assert lines == environment.lock_text(environment.pins()), "run `nlutils lock` in a fresh environment"


def test_torch_is_pinned_without_a_local_version_and_nothing_of_cuda_is():
    pins = locked()
    assert version(pins["torch"]) == "2.13.0"
    assert not [name for name in pins if re.match("nvidia|cuda|triton|torchvision|torchaudio", name)]
    assert all("+" not in version(pin) for pin in pins.values())


@pytest.mark.parametrize(
    ("system", "machine", "tensorflow"),
    [
        ("linux", "x86_64", "tensorflow-cpu"),
        ("linux", "aarch64", "tensorflow"),
        ("darwin", "arm64", "tensorflow"),
        ("win32", "AMD64", "tensorflow-cpu"),
    ],
)
def test_each_system_gets_one_tensorflow_and_its_own_packages(system, machine, tensorflow):
    where = {"sys_platform": system, "platform_machine": machine, "python_version": "3.11"}
    wanted = {name for name, pin in locked().items() if pin.marker is None or pin.marker.evaluate(where)}
    assert {"tensorflow", "tensorflow-cpu"} & wanted == {tensorflow}
    assert ("colorama" in wanted) == ("pywinpty" in wanted) == (system == "win32")
    assert ("pexpect" in wanted) == (system != "win32")
    assert ("appnope" in wanted) == (system == "darwin")


@pytest.mark.skipif("CI" not in os.environ, reason="elsewhere `nlutils doctor` reports CUDA packages")
def test_no_cuda_package_slipped_into_the_environment():
    assert environment.cuda_packages() == {}


def test_a_missing_package_and_a_pin_outside_its_range_stop_the_lock(tmp_path):
    text = (project_root() / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace('"av>=18.1"', '"no-such-package>=1"'))
    with pytest.raises(RuntimeError, match="no-such-package is needed and not installed"):
        environment.pins(tmp_path)
    (tmp_path / "pyproject.toml").write_text(text.replace('"av>=18.1"', '"av>=99"'))
    with pytest.raises(RuntimeError, match="av>=99 is needed, and the lock would pin av=="):
        environment.pins(tmp_path)
