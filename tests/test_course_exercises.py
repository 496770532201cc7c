"""What check, difference and settings print and refuse."""

import subprocess
import sys

import numpy as np
import pytest

from nlutils.course import check, difference, settings


def printed(capsys):
    return capsys.readouterr().out.rstrip("\n")


EIGHT = np.arange(8.0).reshape(2, 4)


@pytest.mark.parametrize(
    ("answer", "expected", "words"),
    [
        (None, 3, "not yet"),
        ((1, None), (1, 2), "not yet"),
        (3, 3, "right (exact)"),
        (3.0, 3, "right (exact)"),
        ("abc", "abc", "right (exact)"),
        (True, True, "right (exact)"),
        ((1, "a"), (1, "a"), "right (exact)"),
        ([1, 2], (1, 2), "right (exact)"),
        (EIGHT.tolist(), EIGHT, "right (exact)"),
        (EIGHT * (1 + 1e-14), EIGHT, "right (approximate, largest difference below 1e-12)"),
        (EIGHT.astype(np.float32) + 1e-5, EIGHT, "right (approximate, largest difference below 1e-04)"),
        (np.array([np.nan, 1]), np.array([np.nan, 1]), "right (exact)"),
        (np.array([np.inf, 1]), np.array([np.inf, 1]), "right (exact)"),
        (4, 3, "not right: you return 4, which is 1 away"),
        (3 + 1e-6, 3.0, "not right: you return 3, which is 1e-06 away"),
        (EIGHT.T, EIGHT, "not right: the shape is (4, 2), and (2, 4) is expected"),
        (EIGHT + np.eye(2, 4) / 2, EIGHT, "not right: the largest difference is 0.5, at (0, 0)"),
        (np.array([1, np.nan]), np.array([1.0, 2]), "not right: NaN at (1,)"),
        ("abd", "abc", "not right: 'abd' is not what is expected"),
        ("3", 3, "not right: a number is expected, and you return a string"),
        ((1, 3), (1, 2), "not right: part 2: you return 3, which is 1 away"),
        ((1, 2, 3), (1, 2), "not right: a tuple of 2 parts is expected, and you return 3 parts"),
        (7, (1, 2), "not right: a tuple of 2 parts is expected, and you return one int"),
        (["a", "c"], ["a", "b"], "not right: 1 of 2 values differ, first at (1,)"),
        (8.0, 2.0, "not right: you forgot the root"),
        (np.uint8(255), np.uint8(1), "not right: you return 255, which is 254 away"),
    ],
)
def test_check_prints_one_line(capsys, answer, expected, words):
    mistakes = {"you forgot the root": 8.0} if np.ndim(expected) == 0 and expected == 2.0 else None
    check("Exercise 1", lambda: answer, expected, mistakes)
    assert printed(capsys) == f"Exercise 1: {words}"


def test_check_names_a_mistake_of_another_shape(capsys):
    check("Exercise 2", lambda: EIGHT.T, EIGHT, mistakes={"rows and columns are swapped": EIGHT.T})
    assert printed(capsys) == "Exercise 2: not right: rows and columns are swapped"


def test_check_prints_an_exception_and_does_not_raise(capsys):
    check("Exercise 1", lambda: np.ones(2) @ np.ones(3), 2)
    assert printed(capsys).startswith("Exercise 1: not right: your code raised ValueError: ")
    check("Exercise 1", lambda: object(), 2)
    assert printed(capsys).startswith("Exercise 1: not right: what you return cannot be read as numbers")


def test_check_obeys_the_tolerance(capsys):
    check("Exercise 1", lambda: 1.02, 1.0, tolerance=0.05)
    check("Exercise 1", lambda: 1.02, 1.0, tolerance=0.01)
    right, wrong = printed(capsys).splitlines()
    assert right == "Exercise 1: right (approximate, largest difference below 1e-01)"
    assert wrong == "Exercise 1: not right: you return 1.02, which is 0.02 away"


def test_check_refuses_a_mistake_that_is_none_and_an_answer_that_is_no_function():
    with pytest.raises(ValueError, match="the mistake 'a sum' leads to the expected value"):
        check("Exercise 1", lambda: 4, 4, mistakes={"a sum": 2 + 2})
    with pytest.raises(TypeError, match="must be a function"):
        check("Exercise 1", 4, 4)


def test_check_accepts_tensors(capsys):
    torch = pytest.importorskip("torch")
    check("Exercise 1", lambda: torch.ones(2, requires_grad=True), np.ones(2))
    check("Exercise 2", lambda: torch.ones(2, dtype=torch.bfloat16), torch.ones(2))
    check("Exercise 3", lambda: np.ones(2), torch.ones(3))
    assert printed(capsys).splitlines() == [
        "Exercise 1: right (exact)",
        "Exercise 2: right (exact)",
        "Exercise 3: not right: the shape is (2,), and (3,) is expected",
    ]


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (EIGHT, EIGHT, "exact"),
        ("a", "a", "exact"),
        (["a", "b"], ["a", "c"], "different in 1 of 2 places"),
        (EIGHT, EIGHT + 1e-14, "approximate, largest difference below 1e-12"),
        (EIGHT, EIGHT + 3e-6, "approximate, largest difference below 1e-05"),
        (EIGHT, EIGHT + 1, "different, largest difference below 1e+01"),
        (EIGHT * 1e-9, EIGHT * 2e-9, "different, largest difference below 1e-08"),
        (np.zeros(3), np.zeros(3), "exact"),
    ],
)
def test_difference_prints_one_line(capsys, a, b, words):
    difference(a, b, "loop and matrix")
    difference(a, b)
    assert printed(capsys) == f"loop and matrix: {words}\n{words}"


def test_difference_states_a_given_bound_and_holds_it(capsys):
    difference(EIGHT, EIGHT, "same", below=1e-6)
    assert printed(capsys) == "same: approximate, largest difference below 1e-06"
    with pytest.raises(AssertionError, match="the largest difference is 1, not below 1e-06"):
        difference(EIGHT, EIGHT + 1, "same", below=1e-6)


def test_difference_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"the shapes \(2, 4\) and \(4, 2\) differ"):
        difference(EIGHT, EIGHT.T, "y")
    with pytest.raises(ValueError, match=r"y: there is NaN at \(1,\)"):
        difference([1.0, 2.0], [1.0, np.nan], "y")


def test_settings_of_a_profile():
    every = {"quick": {"steps": 2, "size": 8}, "full": {"steps": 40}}
    assert vars(settings("quick", **every)) == {"profile": "quick", "steps": 2, "size": 8}
    assert vars(settings("full", **every)) == {"profile": "full", "steps": 40, "size": 8}
    assert vars(settings("gpu", **every)) == {"profile": "gpu", "steps": 2, "size": 8}
    assert vars(settings("quick")) == {"profile": "quick"}
    with pytest.raises(ValueError, match="profile='fast' is not known; use one of 'quick', 'full', 'gpu'"):
        settings("fast", **every)
    with pytest.raises(ValueError, match="full has the setting 'stpes', which quick does not have"):
        settings("quick", quick={"steps": 1}, full={"stpes": 2})


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_importing_the_course_is_light():
    heavy = "torch tensorflow keras jax papermill nbformat jupytext matplotlib pandas av cv2"
    python(
        "import nlutils.course, nlutils.cli, sys; "
        f"found = set(sys.modules) & set({heavy.split()}); assert not found, found"
    )


def test_keras_is_imported_without_a_word_on_standard_error():
    done = python(
        "from nlutils.course import import_keras\n"
        "keras = import_keras('tensorflow')\n"
        "assert import_keras() is keras\n"
        "try:\n    import_keras('torch')\n"
        "except RuntimeError as error:\n    print(error)\n"
        "try:\n    import_keras('theano')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    assert done.stderr == ""
    changed, unknown = done.stdout.splitlines()
    assert "already imported with the backend 'tensorflow'" in changed
    assert unknown.startswith("backend='theano' is not known")


def test_a_failing_import_of_keras_is_raised_with_what_it_wrote():
    done = python(
        "import os, sys, traceback\n"
        "from nlutils.course.frameworks import _quiet_standard_error\n"
        "try:\n"
        "    with _quiet_standard_error():\n"
        "        os.write(2, b'a library says why')\n"
        "        raise ImportError('no')\n"
        "except ImportError as error:\n"
        "    print(error.__notes__[0])\n"
        "print('heard again', file=sys.stderr)\n"
    )
    assert "a library says why" in done.stdout
    assert done.stderr == "heard again\n"
