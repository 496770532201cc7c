"""`nlutils predict`: the study's own scores for a clip, the block's own weights, and a picture of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from study_clips import TINY, moving_square, settings, write_folder
from video_files import write_video

from nlutils import cli
from nlutils.cli_words import pairs
from nlutils.plots import AttentionMap, attention_picture
from nlutils.study import Entry, Recipe, read_runs, run_study, weights
from nlutils.study.predict import Attention, _described, draw_prediction, predict
from nlutils.study.weights import find_kept, kept_weights, weights_path
from nlutils.video import ClipError, open_clips

RUN = "mine/c3d_small_non_local-fold0-seed0"


@pytest.fixture(scope="module", autouse=True)
def study(tmp_path_factory):
    """A folder of clips, and what a study of it records and keeps."""
    root = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLUTILS_CACHE", str(root / "cache"))
        patch.setattr(weights, "results_root", lambda: root / "results")
        patch.setattr(weights, "own_results_root", lambda: root / "own")
        folder = write_folder(root / "mine", 2)
        words = ["study", "--data", folder, "--fold", "0", "--keep-weights", "--root", root / "results"]
        words += ["--model", "c3d_small_non_local", "--model", "frame_average", *settings("test_flip=True")]
        assert cli.main([str(word) for word in words]) == 0
        yield root


@pytest.fixture(scope="module")
def prediction(study):
    return predict(RUN, study / "mine" / "left" / "take0.mp4")


def test_scores_are_those_that_the_study_recorded(study):
    run = next(run for run in read_runs("mine", study / "results") if run.row == "c3d_small_non_local")
    assert len(run.names) == 2
    for name, logits in zip(run.names, run.logits, strict=True):
        said = predict(RUN, study / "mine" / name)
        np.testing.assert_allclose(said.probabilities, torch.tensor(logits).double().softmax(0), atol=1e-4)
        assert (said.run, said.clip, said.classes) == (RUN, name.split("/")[1], ("left", "right"))
        (best, probability), _ = said.ranked()
        assert best == run.classes[int(np.argmax(logits))]
        assert probability == said.probabilities.max()


def test_clips_and_frames_do_as_well_as_files(study, prediction):
    clip = next(clip for clip in open_clips(study / "mine").clips if clip.name == "left/take0.mp4")
    for form in (clip, clip.frames(), str(study / "mine" / clip.name)):
        np.testing.assert_array_equal(predict(RUN, form).probabilities, prediction.probabilities)


def test_rows_are_the_softmax_of_the_block(study):
    said = predict(RUN, study / "mine" / "left" / "take0.mp4", queries=[(2, 5, 6), (-1, -1, -1)])
    assert said.queries == ((2, 5, 6), (7, 23, 31))
    assert [one.block for one in said.attention] == ["features.7", "features.12"]
    assert [one.size for one in said.attention] == [(4, 6, 8), (2, 3, 4)]
    assert [one.cells for one in said.attention] == [((1, 1, 1), (3, 5, 7)), ((0, 0, 0), (1, 2, 3))]
    assert said.attention[1].rows.shape == (2, 2, 1, 2)  # 3 x 4 cells pooled by 2
    network, _ = kept_weights(weights_path(*RUN.split("/")))
    block, inputs = network.features[12], []
    block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        network(_flow_of(study / "mine" / "left" / "take0.mp4"))
        theta, phi, _ = block.embed(inputs[0])
        logits = theta[0, :, 1, 2, 3] @ phi[0].flatten(1)
    np.testing.assert_allclose(said.attention[1].rows[1].ravel(), logits.softmax(0), rtol=1e-4)


def _flow_of(path):
    """What the network of the tests sees of a file, cut by hand."""
    from nlutils.study import prepare
    from nlutils.video.clips import Clip, ClipSet
    from nlutils.video.decoding import decode

    clips = ClipSet("one", ("a",), (Clip("one", 0, "g", 0, lambda: decode(path, (120, 160))),), "one")
    flow = prepare(clips, 8, (27, 36)).flow[:, :, :, 1:25, 2:34]
    return flow.float() / 16


def test_the_default_query_moves_and_lies_in_the_middle(study, prediction):
    ((step, row, column),) = prediction.queries
    assert step == 4
    assert prediction.frames.shape == (8, 24, 32, 3)
    near = prediction.frames[step, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
    assert near.max() > 180  # the square is 230, the noise around it 90 at most
    still = predict(RUN, np.full((4, 120, 160, 3), 90, np.uint8))
    assert still.queries == ((4, 12, 16),)


def test_a_pooled_map_of_odd_sides_does_not_reach_the_edge():
    rows = np.arange(2 * 2, dtype=np.float32).reshape(1, 1, 2, 2) / 6
    attention = Attention("b", "embedded_gaussian", (1, 5, 4), (1, 2, 2), ((0, 0, 0),), rows)
    weights = attention.on_frames(2, 10, 8)
    assert weights.shape == (1, 2, 10, 8)
    np.testing.assert_allclose(weights[0, 1, [0, 3, 4, 7], 0], np.array([0, 0, 2, 2]) * 4 / 6)
    np.testing.assert_allclose(weights[0, 0, 0, [3, 4]], np.array([0, 1]) * 4 / 6)
    assert np.isnan(weights[0, :, 8:]).all()
    assert np.isfinite(weights[0, :, :8]).all()


def test_all_frames_of_the_querys_step_are_its_own():
    """A map of 2 steps under 4 frames: all weight lies on step 1, frames 2 and 3, in one column."""
    weights = np.zeros((4, 2, 2))
    weights[2:, :, 0] = 1
    attention = Attention("b", "embedded_gaussian", (2, 2, 2), (2, 2, 2), ((1, 0, 0),), np.ones((1, 1)))
    said = _described(attention, (3, 0, 0), weights * 2)
    assert said.endswith("its own step of the map gets 100 % of the attention.")


def test_the_picture_shows_shares_query_and_what_has_no_key(prediction):
    fig, alt = draw_prediction(prediction)
    grid = np.reshape(fig.axes[: 3 * 9], (3, 9))
    assert [ax.get_title() for ax in grid[0, :8]] == [f"step {step}" for step in range(8)]
    for row in grid[1:]:
        shares = [int(ax.get_title().strip(" %\n")) for ax in row[:8]]
        assert abs(sum(shares) - 100) <= 4  # eight roundings
        assert [len(ax.patches) for ax in row[:8]] == [0, 0, 0, 0, 2, 0, 0, 0]
        assert len(row[0].images) == 2
    assert [len(row[0].collections) for row in grid[1:]] == [0, 1]  # 3 rows of cells, 2 of them pooled
    assert alt.startswith(f"take0.mp4: {prediction.ranked()[0][0]}, ")
    assert "Block features.12 looks from step 4" in alt


def test_the_picture_of_weights_that_are_no_shares():
    weights = np.linspace(-1, 3, 2 * 4 * 6).reshape(2, 4, 6)
    one = AttentionMap("dot", weights, (1, 0, 0, 2, 2), shares=False)
    fig = attention_picture(np.zeros((2, 4, 6, 3), np.uint8), [one])
    _, _, _, first, _, bar = fig.axes
    assert first.get_title().strip() == ""
    assert first.images[1].get_clim() == (-1, 3)
    assert bar.get_ylabel() == "f"
    with pytest.raises(ValueError, match=r"weights of 'dot' have shape \(2, 4, 6\)"):
        attention_picture(np.zeros((3, 4, 6, 3), np.uint8), [one])
    with pytest.raises(ValueError, match="frames has shape"):
        attention_picture(np.zeros((3, 4, 6), np.uint8), [])


def test_the_command_prints_classes_and_writes_a_picture_with_alt_text(study, tmp_path, capsys):
    output = tmp_path / "new" / "look.png"
    words = ["predict", RUN, str(study / "mine" / "right" / "take1.mp4"), "--output", str(output)]
    assert cli.main([*words, "--query=-1,3,4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"take1.mp4 by {RUN} (c3d_small_non_local)"
    first, second = (float(line.split(" %")[0]) for line in lines[1:3])
    assert first >= second
    assert abs(first + second - 100) < 0.2
    with Image.open(output) as picture:
        assert picture.text["Description"] == lines[-1]
        assert picture.width > 1000
    assert lines[-1].count("looks from step 7, row 3, column 4") == 2  # one for each block
    assert [path.name for path in output.parent.iterdir()] == ["look.png"]


def test_a_file_of_weights_and_a_network_without_blocks(study, tmp_path, capsys):
    path = weights_path("mine", "frame_average-fold0-seed0")
    words = ["predict", str(path), str(study / "mine" / "right" / "take1.mp4")]
    assert cli.main([*words, "--output", str(tmp_path / "no.png")]) == 0
    assert "frame_average has no block with a map" in capsys.readouterr().out
    assert not (tmp_path / "no.png").exists()
    said = predict(path, study / "mine" / "right" / "take1.mp4")
    assert said.attention == ()
    with pytest.raises(ValueError, match="frame_average has no block with a map"):
        draw_prediction(said)


def test_the_order_of_steps_is_the_network_s_and_controls_show_no_map(study):
    """One run: the film backwards, through a block that looks everywhere alike and chooses nothing."""
    entry = Entry("c3d_small", {"non_local": [2], "kind": "uniform", "widths": [4, 4, 8, 8]})
    recipe = Recipe(**pairs(TINY), time="reversed")
    folder, root = study / "mine", study / "results"
    run_study("back", {"row": entry}, [0], (0,), open_clips(folder), recipe, root=root, keep_weights=True)
    clip = moving_square("right", 0)
    forward, backward = predict(RUN, clip), predict("back/row-fold0-seed0", clip)
    assert backward.attention == ()
    # The last step forward is the last frame but one: the ninth frame is there for the last motion.
    np.testing.assert_array_equal(backward.frames[1:], forward.frames[:0:-1])


@pytest.mark.parametrize(
    ("model", "clip", "options", "message"),
    [
        ("mine/c3d-fold0-seed0", "left/take0.mp4", [], "nlutils study run mine --keep-weights"),
        ("other/c3d-fold0-seed0", "left/take0.mp4", [], "none of other are"),
        ("other/c3d-fold0-seed0", "left/take0.mp4", [], "results/other/weights nor in "),
        ("c3d", "left/take0.mp4", [], "model='c3d' must be STUDY/RUN"),
        ("nowhere.pt", "left/take0.mp4", [], "nowhere.pt does not exist"),
        (RUN, "left/take9.mp4", [], "take9.mp4: there is no such file"),
        (RUN, "left", [], "left: a folder, not a video file"),
        (RUN, "left/take0.mp4", ["--query", "8,0,0"], "(8, 0, 0) is not a position"),
        (RUN, "left/take0.mp4", ["--output", "look.svg"], "a name that ends in .png"),
    ],
)
def test_bad_input_is_one_line(study, capsys, monkeypatch, tmp_path, model, clip, options, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", model, str(study / "mine" / clip), *options]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert message in line
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_weights_of_a_name_are_looked_for_in_both_folders_of_results(study, tmp_path, monkeypatch):
    path = weights_path(*RUN.split("/"))
    assert find_kept(RUN) == path == study / "results" / "mine" / "weights" / f"{RUN.split('/')[1]}.pt"
    monkeypatch.setattr(weights, "own_results_root", lambda: study / "results")
    monkeypatch.setattr(weights, "results_root", lambda: tmp_path)
    assert find_kept(RUN) == path


def test_clips_that_are_none(tmp_path):
    write_video(tmp_path / "one.mp4", moving_square("left", 0)[:1])
    (tmp_path / "text.mp4").write_text(json.dumps("text"))
    with pytest.raises(ValueError, match=r"one.mp4: 1 frame is a picture"):
        predict(RUN, tmp_path / "one.mp4")
    with pytest.raises(ClipError, match=r"text.mp4: not a video"):
        predict(RUN, tmp_path / "text.mp4")
    with pytest.raises(ValueError, match=r"float64 and shape \(4, 8, 8, 3\)"):
        predict(RUN, np.zeros((4, 8, 8, 3)))


def test_a_place_is_three_whole_numbers(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", RUN, "clip.mp4", "--query", "1,2"])
    assert "'1,2' is not STEP,ROW,COLUMN" in capsys.readouterr().err
