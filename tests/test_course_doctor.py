"""The doctor names each fault with its cure, and its exit code says whether there is one."""

import sys
from types import SimpleNamespace

import pytest

from nlutils.course import doctor, environment


@pytest.fixture(autouse=True)
def frameworks(monkeypatch):
    """No framework is imported here; their own tests do that."""
    monkeypatch.setattr(doctor, "_ask", lambda code: (True, "a version"))


def faults():
    return {finding.subject: finding for finding in doctor.findings() if finding.is_fault}


def test_this_machine_is_looked_at_from_python_to_folders(capsys):
    code = doctor.main()
    printed = capsys.readouterr().out
    for subject in (
        "Python",
        "packages",
        "machine",
        "disk",
        "PyTorch",
        "Keras",
        "CUDA",
        "video",
        "data",
        "cache",
    ):
        assert subject in printed
    assert code == ("FAULT" in printed)
    assert "H.264 written and read again" in printed


def break_framework(patch):
    patch.setattr(doctor, "_ask", lambda code: ("torch" not in code, "ImportError: libtorch.so"))


def break_version(patch):
    patch.setattr(sys, "version_info", (3, 9, 1, "final", 0))


def break_memory(patch):
    import psutil

    patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2 * 2**30, available=2**30))


def break_disk(patch):
    patch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))


def break_packages(patch):
    patch.setattr(doctor.metadata, "version", lambda name: "0.1")


def break_video(patch):
    patch.setattr(doctor, "_decoded_again", lambda picture, count: [picture] * 4)


def break_data(patch):
    patch.setenv("NLUTILS_DATA", "no/such/folder")


def break_cache(patch):
    patch.setenv("NLUTILS_CACHE", "/proc/no-folder")


@pytest.mark.parametrize(
    ("damage", "subject", "found", "cure"),
    [
        (break_framework, "PyTorch", "ImportError: libtorch.so", "pip install -r requirements.lock"),
        (break_version, "Python", "3.9.1", "install Python 3.11, 3.12 or 3.13"),
        (break_memory, "machine", "1.0 GiB of it free", "--jobs 1"),
        (break_disk, "disk", "0 GiB free", "make clean"),
        (break_packages, "packages", "av is 0.1, wanted >=18.1", "pip install -r requirements.lock"),
        (break_video, "video", "wrote 5 frames, read 4", "--force-reinstall"),
        (break_data, "data", "no/such/folder", "unset NLUTILS_DATA"),
        (break_cache, "cache", "/proc/no-folder", "NLUTILS_CACHE"),
    ],
)
def test_a_fault_comes_with_its_cure(monkeypatch, capsys, damage, subject, found, cure):
    damage(monkeypatch)
    fault = faults()[subject]
    assert found in fault.found
    assert cure in fault.cure
    assert doctor.main() == 1
    assert f"what to do:        {fault.cure}" in capsys.readouterr().out


def test_cuda_packages_are_reported_and_are_no_fault(monkeypatch):
    monkeypatch.setattr(doctor, "cuda_packages", lambda: {"numpy": "1"})
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = next(finding for finding in doctor.findings() if finding.subject == "CUDA packages")
    assert "no NVIDIA driver was found" in finding.found
    assert not finding.is_fault


def test_names_of_cuda_packages():
    names = ("nvidia-cublas-cu12", "triton", "cuda-bindings", "jax-cuda12-plugin")
    assert all(environment._CUDA.match(name) for name in names)
    assert not any(environment._CUDA.match(name) for name in ("torch", "numpy", "tensorflow-cpu"))
