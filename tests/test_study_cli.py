"""`nlutils study`: a folder of clips gives the table; bad input is found before clips are decoded."""

import pytest
import torch
from study_clips import settings, write_folder
from test_study_results import a_run
from video_files import grey_steps, write_video

from nlutils import cli
from nlutils.cli_study import with_action
from nlutils.paths import project_root
from nlutils.study import PARTS, STUDIES, Entry, Recipe, Study, command, read_runs, write_run
from nlutils.torch.models.small import SMALL_MODELS
from nlutils.video import catalogue


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NLUTILS_CLIPS", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "my clips!")


def run(*words):
    return cli.main([str(word) for word in words])


def test_a_folder_gives_the_table_and_goes_on_where_it_was_stopped(folder, tmp_path, capsys):
    words = ["study", "--data", folder, "--root", tmp_path / "results", *settings()]
    words += ["--model", "frame_average", "--model", "c3d_small", "--fold", 2]
    assert run(*words[:-2], "--fold", 0, "--keep-weights") == 0
    printed = capsys.readouterr().out
    assert "my_clips: folder my clips!, 8 clips, 160 x 120; 2 runs" in printed
    assert "4 folds, not 5" in printed
    assert "| frame averaging, 2D `frame_average` | flow |" in printed
    assert f"recorded in {command.shown(tmp_path / 'results' / 'my_clips')}" in printed
    kept = sorted(path.name for path in (tmp_path / "results" / "my_clips" / "weights").iterdir())
    assert kept == ["c3d_small-fold0-seed0.pt", "frame_average-fold0-seed0.pt"]
    runs = read_runs("my_clips", tmp_path / "results")
    assert [run.run for run in runs] == ["c3d_small-fold0-seed0", "frame_average-fold0-seed0"]
    assert runs[0].classes == ["left", "right"]
    assert (runs[0].recipe["epochs"], runs[0].recipe["size"]) == (2, [24, 32])

    assert run(*words, "--fold", 0) == 0
    printed = capsys.readouterr().out
    assert printed.count("(recorded before)") == 2
    assert len(read_runs("my_clips", tmp_path / "results")) == 4
    assert run("study", "table", "my_clips", "--root", tmp_path / "results") == 0
    assert capsys.readouterr().out.splitlines() == printed.splitlines()[-5:-1]


@pytest.fixture
def passed(monkeypatch):
    """What the commands pass on to `run_study`, which does nothing."""
    seen = {}

    def stand_in(study, rows, folds, seeds, clips, recipe, **options):
        seen.update(study=study, rows=list(rows), folds=folds, seeds=seeds, recipe=recipe, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_study", stand_in)
    return seen


def test_a_folder_alone_means_all_small_networks_and_all_folds(folder, passed):
    assert run("study", "--data", folder) == 130
    assert (passed["study"], passed["rows"]) == ("my_clips", list(SMALL_MODELS))
    assert (passed["folds"], passed["seeds"], passed["recipe"]) == (None, [0], Recipe())
    assert passed["root"] == project_root() / "build" / "results"


def test_every_option_is_passed_on_in_both_ways(folder, tmp_path, passed):
    words = ["--data", folder, "--model", "cnn_rnn", "--fold", 3, "--fold", 1, "--seed", 7, "--seed", 2]
    words += ["--set", "epochs=3", "--init", "procedural", "--threads", 3, "--cluster", "local"]
    words += ["--jobs", 1, "--keep-weights", "--root", tmp_path, "--device", "cpu"]
    expected = {"rows": ["cnn_rnn"], "folds": [1, 3], "seeds": [2, 7], "jobs": 1, "threads": 3}
    expected |= {"cluster": "local", "keep_weights": True, "root": tmp_path, "device": "cpu"}
    expected |= {"recipe": Recipe(epochs=3, init="procedural")}
    for name, start in (
        ("mine", ["study", *words, "--name", "mine"]),
        ("ours", ["study", "run", "ours", *words]),
    ):
        assert run(*start) == 130
        assert passed == {"study": name, **expected}
        passed.clear()


def test_a_study_of_a_name_goes_where_the_committed_records_are(folder, passed):
    assert run("study", "run", "test", "--data", folder) == 130
    assert passed["root"] == project_root() / "data" / "results"


def test_rows_bring_their_options_and_parts_their_seeds(folder, monkeypatch):
    calls = []

    def stand_in(study, rows, folds, seeds, clips, recipe, **options):
        calls.append((rows, seeds))
        return []

    monkeypatch.setattr(command, "run_study", stand_in)
    monkeypatch.setattr(command, "summarise", lambda runs: [])
    monkeypatch.setattr(command, "markdown_table", lambda rows: "")
    words = ["--row", "c3d_small-one_step", "--model", "cnn_rnn", "--part", "controls"]
    assert run("study", "run", "test", "--data", folder, *words) == 0
    (rows, seeds), (part, three) = calls
    assert (list(rows), seeds) == (["cnn_rnn", "c3d_small-one_step"], [0])
    assert rows["c3d_small-one_step"].recipe == {"time": "one_step"}
    assert (list(part), three) == (list(PARTS["controls"].rows), [0, 1, 2])
    calls.clear()
    assert run("study", "run", "test", "--data", folder, "--part", "controls", "--seed", 5) == 0
    assert calls[0][1] == [5]
    calls.clear()
    assert run("study", "run", "test", "--data", folder, "--part", "controls", "--set", "seed=3") == 0
    assert calls[0][1] == [3]


def test_a_planned_study_brings_its_clips_settings_and_parts(folder, monkeypatch, capsys):
    calls, opened = [], []

    def stand_in(study, rows, folds, seeds, clips, recipe, **options):
        calls.append((list(rows), seeds, recipe))
        return []

    def clips(name=None, **options):
        opened.append((name, options))
        return one

    one = catalogue.open_clips(folder)
    monkeypatch.setattr(command, "run_study", stand_in)
    monkeypatch.setattr(command, "summarise", lambda runs: [])
    monkeypatch.setattr(command, "markdown_table", lambda rows: "")
    monkeypatch.setattr(catalogue, "open_clips", clips)
    planned = Study("procedural", ("relations", "controls"), {"count": 40}, {"epochs": 3, "batch": 8})
    monkeypatch.setitem(STUDIES, "test", planned)
    assert run("study", "run", "test", "--set", "batch=4") == 0
    recipe = Recipe(epochs=3, batch=4)
    assert calls == [
        (list(PARTS["relations"].rows), [0], recipe),
        (list(PARTS["controls"].rows), [0, 1, 2], recipe),
    ]
    assert opened == [("procedural", {"count": 40})]
    count = 5 * (len(PARTS["relations"].rows) + 3 * len(PARTS["controls"].rows))
    assert f"; {count} runs" in capsys.readouterr().out
    calls.clear()
    assert run("study", "run", "test", "--row", "idt") == 0
    assert calls == [(["idt"], [0], Recipe(epochs=3, batch=8))]
    calls.clear()
    assert run("study", "run", "test", "--data", folder) == 0  # other clips: nothing of it is planned
    assert calls == [(list(SMALL_MODELS), [0], Recipe())]
    assert opened[-1] == (str(folder), {})
    capsys.readouterr()
    assert run("study", "plan", "test") == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if line[:1].strip()] == list(planned.parts)


def test_the_planned_studies_are_of_clips_and_parts_that_exist():
    for name, study in STUDIES.items():
        assert command.catalogue.chosen_clips(study.clips) == study.clips, name
        assert set(study.parts) <= set(PARTS), name
        assert Recipe().replace(**study.recipe), name


def test_a_run_of_two_parts_counts_once(folder, monkeypatch, capsys):
    shown = []

    def stand_in(study, rows, folds, seeds, clips, recipe, **options):
        return [a_run([True], row=row, seed=seed) for row in rows for seed in seeds]

    monkeypatch.setattr(command, "run_study", stand_in)
    monkeypatch.setattr(command, "summarise", lambda runs: shown.extend(run.run for run in runs))
    monkeypatch.setattr(command, "markdown_table", lambda rows: "")
    words = ["--part", "controls", "--part", "time", "--fold", 0, "--seed", 0]
    assert run("study", "run", "test", "--data", folder, *words) == 0
    rows = {*PARTS["controls"].rows, *PARTS["time"].rows}
    assert f"; {len(rows)} runs" in capsys.readouterr().out
    assert sorted(shown) == sorted(f"{row}-fold0-seed0" for row in rows)


def test_the_plan_says_what_is_recorded(tmp_path, capsys):
    assert run("study", "plan", "core8", "--root", tmp_path) == 0
    assert "  c3d_small                          0 of 15 runs" in capsys.readouterr().out
    write_run(a_run([True]), tmp_path)
    assert run("study", "plan", "trial", "--root", tmp_path) == 0
    assert "  c3d_small                          1 of 15 runs" in capsys.readouterr().out
    write_run(a_run([True], seed=1), tmp_path)
    assert run("study", "plan", "trial", "--root", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted({line[37:49] for line in lines if line.startswith("  c3d_small  ")}) == [
        "1 of  5 runs",  # of the parts with one seed
        "2 of 15 runs",
    ]


def test_each_fold_chooses_among_the_candidates(folder, tmp_path, capsys, monkeypatch):
    """Trained for real, one epoch on pairs of folds; then nothing is trained again."""
    tiny = {"widths": [4, 4, 8, 8]}
    recipe = {"epochs": 1, "warmup": 0, "size": (16, 16)}
    candidates = {"z": Entry("frame_average", tiny, recipe), "b": Entry("c3d_small", tiny, recipe)}
    monkeypatch.setattr(command, "CANDIDATES", {"small": candidates})
    words = ["study", "choose", "test", "--data", folder, "--root", tmp_path]
    assert run(*words) == 0
    table = capsys.readouterr().out
    lines = [line.split(" ")[1] for line in table.splitlines() if line.startswith("| small")]
    assert lines == ["small-z", "small-b"]  # as the candidates come: of equal ones the first is chosen
    folds = len({clip.fold for clip in catalogue.open_clips(folder).clips})
    assert len(list((tmp_path / "test-choice").glob("small-z-*.json"))) == folds * (folds - 1) // 2
    assert table.count("**") == 2 * folds
    assert run(*words) == 0
    assert capsys.readouterr().out.count("recorded before") == folds * (folds - 1)
    monkeypatch.setattr(catalogue, "open_clips", lambda name: pytest.fail("clips were opened"))
    two = write_folder(tmp_path / "two", 2)
    assert run("study", "choose", "test", "--data", two, "--root", tmp_path) == 2
    assert "folds=[0, 1]: to choose settings inside the training folds needs" in capsys.readouterr().err
    assert run("study", "choose", "../test", "--data", folder, "--root", tmp_path) == 2
    assert "study='../test' names files" in capsys.readouterr().err
    assert run(*words, "--family", "large") == 2
    assert "family='large' is not known; use one of 'small'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "full"),
    [
        ("study --data x", "study clips --data x"),
        ("--traceback study --data x run", "--traceback study clips --data x run"),
        ("study", "study clips"),
        ("study run x", "study run x"),
        ("study --help", "study --help"),
        ("run study", "run study"),
        ("", ""),
    ],
)
def test_the_action_that_nobody_names(words, full):
    assert with_action(words.split()) == full.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "c3d_smal"], "name='c3d_smal' is not known"),
        (["--fold", "4"], "fold=4 is not a fold of"),
        (["--set", "epoch=3"], "--set: a recipe has no setting 'epoch'; it has epochs"),
        (["--set", "epochs=0"], "epochs=0 must be"),
        (["--set", "precision=bfloat16", "--device", "cpu"], "precision='bfloat16' needs a GPU"),
        (["--seed", "-1"], "seed=-1 must be"),
        (["--init", "a.pt", "--set", "init=b.pt"], "--init a.pt and --set init=b.pt are one setting"),
        (["--init", "no/such/file.pt"], "file.pt"),
        (["--name", "a/b"], "study='a/b' names files"),
        (["--row", "idt", "--init", "procedural"], "init='procedural': idt is fitted to all training clips"),
        (["--seed", "0", "--set", "seed=3"], "--seed 0 and --set seed=3 are one setting"),
        (["--device", "cuda"], "device='cuda': PyTorch finds no GPU here"),
        (["--device", "foo"], "device='foo' is not known; use 'cpu', 'cuda' or 'cuda:N'"),
        (["--device", "meta"], "device='meta' is not known"),
        (["--cluster", "local", "--jobs", "2"], "jobs=2 and cluster='local'"),
        (["--model", "c3d"], "row 'c3d' cannot be trained: a clip of 16 x 40 x 56"),
        (["--init", "procedural", "--row", "tdd", "--set", "size=(4,4)"], "row 'tdd' cannot be trained"),
        (["--model", "visual_interaction_network"], "row 'visual_interaction_network' cannot be trained"),
        (["--model", "c3d_small", "--set", "size=(4,4)"], "row 'c3d_small' cannot be trained"),
        (["--row", "c4d"], "row='c4d' is not known"),
        (["--part", "all"], "part='all' is not known"),
    ],
)
def test_wrong_options_are_one_line_before_clips_are_decoded(folder, monkeypatch, capsys, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(catalogue, "open_clips", lambda name: pytest.fail("clips were opened"))
    assert run("study", "--data", folder, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nlutils: ")
    assert message in line


def test_folders_that_no_study_can_use(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(catalogue, "open_clips", lambda name: pytest.fail("clips were opened"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "left").mkdir(parents=True)
    (tmp_path / "hollow" / "right").mkdir()
    write_folder(tmp_path / "alone", 2, kinds=("left",))
    write_folder(tmp_path / "take", 1)
    for name, cause in (
        ("empty", "no classes: clips must lie in sub-folders"),
        ("hollow", "no file in it is a video"),
        ("alone", "one class only, 'left'"),
        ("take", "clips in one fold only"),
        ("nowhere", "no such folder exists"),
    ):
        assert run("study", "--data", tmp_path / name) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert cause in line
        assert name in line
    assert run("study") == 2
    assert "--data FOLDER" in capsys.readouterr().err


def test_what_weak_folders_mean_is_said(tmp_path, capsys, passed):
    root = write_folder(tmp_path / "weak", 2)
    (root / "left" / "broken.mp4").write_bytes(b"no video")
    (root / "once").mkdir()
    write_video(root / "once" / "take0.mp4", grey_steps(4))
    (root / "gone").mkdir()
    (root / "gone" / "take1.mp4").write_bytes(b"")
    assert run("study", "--data", root) == 130
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "weak: folder weak, 5 clips (2 left out), 160 x 120; 15 runs"
    assert sorted(line.split(":")[0] for line in printed[1:3]) == ["left out", "left out"]
    assert printed[3:] == [
        "class gone: the class has no clips",
        "class once: all its clips lie in fold 0, so it is tested only by networks that never saw it; "
        "it needs clips of another group",
        "2 folds, not 5: each network is trained on fewer of the clips",
    ]


def test_runs_recorded_without_weights_are_not_passed_over(folder, tmp_path, capsys):
    (tmp_path / "my_clips").mkdir()
    (tmp_path / "my_clips" / "c3d_small-fold1-seed0.json").write_text("{}")
    assert run("study", "--data", folder, "--model", "c3d_small", "--keep-weights", "--root", tmp_path) == 2
    line = capsys.readouterr().err
    assert "without weights: c3d_small-fold1-seed0." in line
    assert "--root build/with_weights" in line


def test_a_name_is_made_of_any_folder_name():
    assert command._name_of("/a/Straße 5/..Clips (2024)") == "Clips_2024"
    assert command._name_of("/") == "clips"


def test_pages_are_written_beside_the_runs_of_the_plan(tmp_path, capsys):
    for study in ("core8", "mine"):
        write_run(a_run([True, False], study=study), tmp_path)
    assert run("study", "pages", "--root", tmp_path) == 0
    page = tmp_path / "core8" / "README.md"
    assert capsys.readouterr().out == f"written: {command.shown(page)}\n"
    assert "`c3d_small` | flow | 1 | 50 %" in page.read_text(encoding="utf-8")
