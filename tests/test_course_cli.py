"""The command line: what it passes on, and one line for bad input. And the Makefile's set-up."""

import os
import shutil
import subprocess

import pytest

from nlutils import cli
from nlutils.course import runner
from nlutils.paths import project_root


def test_run_passes_its_options_on(monkeypatch):
    seen = {}
    monkeypatch.setattr(runner, "run_all", lambda names, **options: seen.update(names=names, **options) or 7)
    words = "run 04 05 --profile full -p epochs=3 -p rate=0.5 -p name=core8 --output there --jobs 1"
    assert cli.main(words.split()) == 7
    assert seen == {
        "names": ["04", "05"],
        "profile": "full",
        "parameters": {"epochs": 3, "rate": 0.5, "name": "core8"},
        "output": "there",
        "jobs": 1,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run 99", "'99' is not a notebook"),
        ("run --profile fast", "profile='fast' is not known; use one of 'quick', 'full', 'gpu'"),
        ("run -p epochs", "'epochs' is not of the form NAME=VALUE"),
        ("data fetch nothing --yes", "'nothing'"),
        ("notebooks build 99", "'99' is not a notebook"),
        ("study run test --set epoch=3", "epoch"),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, words, message):
    assert cli.main(words.split()) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("nlutils: ")
    assert message in line
    assert printed.out == ""


def test_a_traceback_can_be_asked_for():
    with pytest.raises(ValueError, match="'99' is not a notebook"):
        cli.main(["--traceback", "run", "99"])


def test_a_missing_data_folder_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("NLUTILS_DATA", "no/such/folder")
    assert cli.main(["data", "list"]) == 2
    assert "NLUTILS_DATA='no/such/folder' means" in capsys.readouterr().err


def test_faults_of_a_folder_are_listed(tmp_path, capsys):
    (tmp_path / "walk").mkdir()
    (tmp_path / "walk" / "a.mp4").write_bytes(b"")
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    assert "a.mp4" in capsys.readouterr().out


def test_ctrl_c_ends_without_a_traceback(capsys, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_all", stopped)
    assert cli.main(["run"]) == 130


@pytest.fixture
def checkout(tmp_path):
    """The files that the Makefile's set-up depends on, in an empty folder."""
    if shutil.which("make") is None:
        pytest.skip("there is no make on this machine")
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(project_root() / name, tmp_path)
    return tmp_path


def make(folder, *words):
    # `make test` runs these tests: the inner make must not take itself for a part of it.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, env=env)


def test_make_says_in_one_line_that_python_is_too_old(checkout):
    old = checkout / "oldpython"
    old.write_text('#!/bin/sh\ntest "$1" = --version && echo Python 3.9.7\n')
    old.chmod(0o755)
    done = make(checkout, "run", f"PYTHON={old}")
    assert done.returncode != 0
    assert done.stdout.strip() == (
        f"Python 3.11, 3.12 or 3.13 is needed, and '{old}' is Python 3.9.7. Try: make PYTHON=python3.11"
    )
    assert not (checkout / ".venv").exists()


def test_make_installs_again_only_after_a_change(checkout):
    stamp = checkout / ".venv" / ".installed"
    stamp.parent.mkdir()
    assert make(checkout, "-q", ".venv/.installed").returncode == 1
    stamp.touch()
    assert make(checkout, "-q", ".venv/.installed").returncode == 0
