"""The ground floor: arguments, paths, atomic files, and what `import nlutils` may cost."""

import os
import subprocess
import sys

import pytest

from nlutils import paths
from nlutils.arguments import one_of, positive_integer


def test_one_of_names_argument_value_and_choices():
    assert one_of("kernel", "dot", ("dot", "rbf")) == "dot"
    with pytest.raises(ValueError, match=r"kernel='cosine' is not known; use one of 'dot', 'rbf'"):
        one_of("kernel", "cosine", ("dot", "rbf"))


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True])
def test_positive_integer_refuses(value):
    with pytest.raises(ValueError, match=r"groups=.* must be a whole number, 1 or more"):
        positive_integer("groups", value)


def test_positive_integer_accepts_numpy_integers():
    numpy = pytest.importorskip("numpy")
    assert positive_integer("groups", numpy.int64(4)) == 4


def test_relative_data_folder_starts_at_the_project_root(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "project_root", lambda: tmp_path / "project")
    (tmp_path / "project").mkdir()
    (tmp_path / "clips").mkdir()
    monkeypatch.setenv("NLUTILS_DATA", "../clips")
    monkeypatch.chdir("/")
    assert paths.data_root() == tmp_path / "clips"


def test_missing_data_folder_is_an_error_that_names_it(monkeypatch, tmp_path):
    monkeypatch.setenv("NLUTILS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"NLUTILS_DATA=.*nowhere.*unset the variable"):
        paths.data_root()


@pytest.mark.parametrize("value", ["", "  "])
def test_empty_data_variable_means_the_projects_own_folder(monkeypatch, value):
    monkeypatch.setenv("NLUTILS_DATA", value)
    assert paths.data_root() == paths.project_root() / "data" / "downloads"


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "folder" / "result.json"
    with paths.atomic_path(target) as temporary:
        temporary.write_text("whole")

    def fail():
        with paths.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["result.json"]


def test_atomic_path_leaves_a_readable_file(tmp_path):
    with paths.atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "file").stat().st_mode & 0o044, "others must be able to read what mkstemp made private"


# What each room may not bring along: PyTorch users never import TensorFlow, and so on.
FRAMEWORKS = ("torch", "tensorflow", "keras", "jax")
SLOW = ("av", "cv2", "matplotlib", "papermill", "pandas", "skimage", "sklearn", "numpy")


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import nlutils", FRAMEWORKS + SLOW),
        ("import nlutils.reference", (*FRAMEWORKS, "av", "cv2", "matplotlib")),
        ("import nlutils.exchange", FRAMEWORKS),
        ("import nlutils.torch; nlutils.torch.NonLocalBlock", ("tensorflow", "keras", "jax", "av", "cv2")),
        ("import nlutils.keras; nlutils.keras.NonLocalBlock", ("torch", "av")),  # Keras itself imports cv2
        ("import nlutils.architectures.resnet", (*FRAMEWORKS, "av", "cv2", "matplotlib")),
        (
            "import nlutils.keras; nlutils.keras.create_model('c2d', 2, depth=(1, 1, 1, 1), width=4)",
            ("torch", "av"),
        ),
        ("import nlutils.video", FRAMEWORKS),
        ("import nlutils.course", (*FRAMEWORKS, "papermill")),
        ("import nlutils.cli", FRAMEWORKS + SLOW),
    ],
)
def test_a_room_brings_nothing_it_does_not_need(statement, forbidden):
    code = f"import sys; {statement}; print([name for name in {forbidden!r} if name in sys.modules])"
    environment = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    assert found.stdout.strip() == "[]"


def test_an_unknown_room_is_an_attribute_error():
    import nlutils

    with pytest.raises(AttributeError, match="no attribute 'kitchen'"):
        _ = nlutils.kitchen
