"""Notebooks broken on purpose: the run goes on, and says which notebook, which cell, and why."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from nlutils.course import contract, execution, runner, solutions, sources

# What each notebook does in place of printing the sum.
DEFECTS = {
    "01_tiny": 'print("the sum is", x.sum())',
    "02_raises": '"""A cell that fails."""\nx.sum() / undefined',
    "03_leaves": "raise SystemExit",
    "04_dies": "os._exit(3)",
    "05_killed": "import signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "06_sleeps": "import time\ntime.sleep(100)",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A good notebook, built, and run beside the broken ones: their folder and the outcomes by name."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("course") / "notebooks"
    (folder / "src").mkdir(parents=True)
    for stem, line in DEFECTS.items():
        text = TINY.replace("# # 01", f"# # {stem[:2]}").replace('print("the sum is", x.sum())', line)
        (folder / "src" / f"{stem}.py").write_text(text)
    assert sources.build(["01"], folder=folder) == 0
    sources.build([stem for stem in DEFECTS if stem != "01_tiny"], execute=False, folder=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(execution.BUDGETS, "06", 2)
        paths = [folder / f"{stem}.ipynb" for stem in DEFECTS]
        tasks = [execution.Task.of(path, output=folder / "out") for path in paths]
        outcomes = execution.run_tasks(tasks, {"NLUTILS_PROFILE": "quick"}, jobs=2)
    return folder, {outcome.task.name: outcome for outcome in outcomes}


def identity(folder, stem, number):
    return nbformat.read(folder / f"{stem}.ipynb", as_version=4).cells[number - 1].id


def test_a_built_notebook_keeps_the_contract_and_agrees_with_its_source(ran):
    folder, _ = ran
    assert contract.violations(folder / "01_tiny.ipynb") == []
    assert sources.disagreements(folder / "01_tiny.ipynb") == []


def test_a_built_notebook_holds_nothing_that_changes_between_two_runs(ran):
    notebook = nbformat.read(ran[0] / "01_tiny.ipynb", as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert {key for cell in notebook.cells for key in cell.metadata} == {"tags"}


def test_a_good_notebook_runs_beside_broken_ones(ran):
    outcome = ran[1]["01_tiny"]
    assert outcome.failure is None
    assert outcome.ran == outcome.cells == 6
    assert "the sum is 5" in outcome.task.log.read_text()


@pytest.mark.parametrize(
    ("stem", "why"),
    [
        ("02_raises", "NameError: name 'undefined' is not defined"),
        ("04_dies", "the kernel died (out of memory, or a crash)"),
        ("06_sleeps", "stopped after the 6 s that the notebook may take"),
    ],
)
def test_a_failure_names_the_cell_and_the_reason(ran, stem, why):
    folder, outcomes = ran
    place = f"cell 5 (id {identity(folder, stem, 5)}, `{DEFECTS[stem].splitlines()[0]}`)"
    assert outcomes[stem].failure == f"{place}: {why}"


def test_a_notebook_that_ends_early_fails(ran):
    folder, outcomes = ran
    failure = outcomes["03_leaves"].failure
    assert failure.startswith(f"cell 7 (id {identity(folder, '03_leaves', 7)}")
    assert failure.endswith("3 of 6 code cells did not")


def test_a_killed_process_is_reported(ran):
    assert "its process ended with code -9" in ran[1]["05_killed"].failure


def test_the_log_holds_the_traceback_of_the_broken_cell(ran):
    log = ran[1]["02_raises"].task.log.read_text()
    assert "x.sum() / undefined" in log
    assert "\x1b" not in log


def test_the_command_says_at_its_end_which_cell_failed(ran, tmp_path, monkeypatch, capsys):
    folder, _ = ran
    monkeypatch.setattr(runner, "notebooks_folder", lambda: folder)
    monkeypatch.setenv("NLUTILS_CLIPS", "procedural")
    code = runner.run_all(["01", "raises"], output=tmp_path / "run")
    printed = capsys.readouterr().out
    assert code == 1
    assert "procedural" in printed.splitlines()[0]
    assert re.search(r"^01_tiny +\d+\.\d s$", printed, flags=re.MULTILINE)
    last = printed.strip().splitlines()[-2:]
    assert last[0].strip().startswith(f"02_raises: cell 5 (id {identity(folder, '02_raises', 5)}")
    assert last[0].endswith("NameError: name 'undefined' is not defined")
    assert last[1].strip().startswith("log: ")
    assert (tmp_path / "run" / "01_tiny.ipynb").is_file()


def test_parameters_reach_the_notebook_and_the_table_is_printed_last(ran, tmp_path, monkeypatch, capsys):
    folder, _ = ran
    monkeypatch.setenv("NLUTILS_CLIPS", "procedural")
    source = (folder / "src" / "01_tiny.py").read_text()
    (tmp_path / "src").mkdir()
    writes = 'open(os.environ["NLUTILS_OUTPUT"] + "/comparison.md", "w").write(f"|{s}|")\nassert s'
    (tmp_path / "src" / "07_table.py").write_text(source.replace("assert s", writes))
    sources.build(execute=False, folder=tmp_path)
    output = tmp_path / "run"
    output.mkdir()
    (output / "comparison.md").write_text("| of an earlier run |")
    code = runner.run_all([str(tmp_path / "07_table.ipynb")], parameters={"first": 40}, output=output)
    printed = capsys.readouterr().out
    assert code == 0
    assert "the sum is 43" in (output / "logs" / "07_table.log").read_text()
    assert printed.strip().splitlines()[-1] == "|43|"


def test_unknown_names_are_refused_before_anything_runs(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "notebooks_folder", lambda: ran[0])
    output = tmp_path / "run"
    with pytest.raises(ValueError, match="01_tiny has no parameter 'frist'; it has: profile, first"):
        runner.run_all(["01"], parameters={"frist": 3}, output=output)
    with pytest.raises(ValueError, match="profile='fast' is not known; use one of 'quick', 'full', 'gpu'"):
        runner.run_all(["01"], profile="fast", output=output)
    with pytest.raises(ValueError, match="profile='fast'"):
        runner.run_all(["01"], parameters={"profile": "fast"}, output=output)
    monkeypatch.setenv("NLUTILS_PROFILE", "fast")
    with pytest.raises(ValueError, match="profile='fast'"):
        runner.run_all(["01"], output=output)
    with pytest.raises(ValueError, match="'09' is not a notebook; there are: 01_tiny, 02_raises"):
        runner.run_all(["09"], profile="quick", output=output)
    assert not output.exists()


def test_the_folder_of_a_notebook_is_no_output_folder(tmp_path):
    notebook = tmp_path / "01_mine.ipynb"
    notebook.write_text("{}")
    with pytest.raises(ValueError, match=r"is the folder of 01_mine\.ipynb itself; name another"):
        execution.Task.of(notebook, output=tmp_path)
    assert notebook.is_file()


def test_solutions_are_run_and_wrong_ones_named(ran, tmp_path, monkeypatch, capsys):
    folder, _ = ran
    assert solutions.build(["01"], folder=folder, output=tmp_path / "a") == 0
    assert "Every check that ran is right" in capsys.readouterr().out
    source = (folder / "src" / "01_tiny.py").read_text()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "08_wrong.py").write_text(source.replace("return x[0] * x[1]", "return x[0] + x[1]"))
    assert solutions.build(folder=tmp_path, output=tmp_path / "b") == 1
    assert re.search(
        r"08_wrong: cell 11 \(id \w+\): Exercise 1: not right: you added", capsys.readouterr().out
    )


def test_nbval_passes_the_notebook_and_fails_a_changed_number_with_its_cell(ran, tmp_path):
    good = tmp_path / "01_tiny.ipynb"
    shutil.copy(ran[0] / "01_tiny.ipynb", good)
    notebook = nbformat.read(good, as_version=4)
    notebook.cells[4].outputs[0].text = "the sum is 6\n"
    nbformat.write(notebook, tmp_path / "02_changed.ipynb")
    config = Path(__file__).parent / "nbval.cfg"
    words = "-n 2 --dist loadfile -p no:cacheprovider --rootdir . --nbval --nbval-current-env"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words.split(), "--nbval-sanitize-with", str(config), "."],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    )
    assert done.returncode == 1, done.stdout
    assert re.search(r"FAILED .*02_changed.ipynb::Cell 2", done.stdout)
    assert "the sum is 6" in done.stdout
    assert "1 failed, 11 passed" in done.stdout
