"""`nlutils models`: every network counted, recipe facts whole, published files read by their names alone."""

import pickle

import pytest
import torch

from nlutils.cli import main
from nlutils.exchange.checkpoints import PUBLISHED, to_checkpoint
from nlutils.study.listing import load_published, model_facts, model_page, models_table
from nlutils.torch import create_model, list_models
from nlutils.torch.models import INPUT_CHANNELS, model_classes, model_options, model_title
from nlutils.torch.models.small import MORE_SMALL_MODELS, SMALL_MODELS

# papers.md: counts of the reading list at the published size, each with its own number of classes.
COUNTS = {
    "ji_2010": 295_458,
    "c3d": 78_409_573,
    "st_resnet": 58_624_394,
    "c2d": 24_327_632,
    "i3d": 28_043_472,
    "i3d_inception": 12_697_264,
    "two_stream_i3d": 12_697_264 + 12_675_312,
}


@pytest.fixture(scope="module")
def facts():
    return {name: model_facts(name) for name in list_models()}


def test_every_network_is_listed_with_its_counts(facts):
    assert {name: facts[name].parameters for name in COUNTS} == COUNTS
    assert round(facts["c3d"].multiply_adds / 1e9, 1) == 38.5
    assert round(facts["i3d_inception"].multiply_adds / 1e9, 2) == 111.15
    assert [name for name, one in facts.items() if one.multiply_adds is None] == ["idt", "tdd"]
    assert len({one.title for one in facts.values()}) == len(list_models())


def test_recipe_facts_are_whole(facts):
    """One set for each input of every network of a paper; the study's own have none."""
    for name, one in facts.items():
        if name in SMALL_MODELS | MORE_SMALL_MODELS or name == "idt" or (name == "tdd" and not one.expects):
            assert one.expects == (), name
            continue
        for kind, expected in zip(one.inputs, one.expects, strict=True):
            channels = INPUT_CHANNELS[kind]
            assert len(expected.mean) == len(expected.std) == channels, name
            assert expected.colour in (("",) if kind == "flow" else ("RGB", "BGR")), name
            assert expected.source, name
            assert one.inputs[kind] == (channels, expected.frames, *expected.size), name


@pytest.mark.parametrize(
    ("name", "options", "inputs"),
    [
        ("lrcn", {"size": 67}, {"rgb": (3, 16, 67, 67)}),
        ("c3d", {"frames": 8}, {"rgb": (3, 8, 112, 112)}),
        ("c3d", {"input": "flow"}, {"flow": (2, 16, 112, 112)}),
        ("c3d", {"width": 32}, {"rgb": (3, 16, 112, 112)}),
        ("two_stream", {"size": (64, 64)}, {"rgb": (3, 1, 64, 64), "flow": (2, 10, 64, 64)}),
        ("two_stream", {"stack": 5}, {"rgb": (3, 1, 224, 224), "flow": (2, 5, 224, 224)}),
        ("two_stream", {"width": 48}, {"rgb": (3, 1, 224, 224), "flow": (2, 10, 224, 224)}),
        ("two_stream_small", {"stack": 20}, {"rgb": (3, 20, 40, 56), "flow": (2, 20, 40, 56)}),
        ("ji_2010", {"frames": 9}, {"rgb": (3, 9, 60, 40), "flow": (2, 8, 60, 40)}),
        ("beyond_short_snippets", {"size": 112}, {"rgb": (3, 120, 112, 112)}),
        ("beyond_short_snippets", {"input": "flow"}, {"flow": (2, 120, 220, 220)}),
        ("beyond_short_snippets", {"pooling": "local", "frames": 16}, {"rgb": (3, 16, 220, 220)}),
        ("st_resnet", {"width": 32}, {"rgb": (3, 11, 224, 224), "flow": (2, 110, 224, 224)}),
        ("i3d", {"width": 32}, {"rgb": (3, 32, 224, 224)}),
        ("i3d", {"clip": "8x8", "input": "flow"}, {"flow": (2, 8, 224, 224)}),
        ("c2d", {"width": 16, "clip": "32x4"}, {"rgb": (3, 32, 224, 224)}),
        ("i3d_inception", {"width": 8}, {"rgb": (3, 64, 224, 224)}),
        ("visual_interaction_network", {"offsets": (1, 2)}, {"rgb": (3, 6, 32, 32)}),
        ("visual_interaction_network", {"offsets": (1, 8), "width": 16}, {"rgb": (3, 10, 32, 32)}),
        ("visual_interaction_network", {"input": "states"}, {"states": (4, 3, 4)}),
    ],
)
def test_a_network_with_options_is_counted_at_the_clip_that_it_is_made_for(name, options, inputs):
    one = model_facts(name, **options)
    assert one.inputs == inputs
    assert one.multiply_adds > 0
    for expected, shape in zip(one.expects, inputs.values(), strict=bool(one.expects)):
        assert (expected.frames, *expected.size) == shape[1:]
    page = model_page(name, **options)
    assert all(" x ".join(map(str, shape)) in page for shape in inputs.values())


def test_every_published_file_has_a_network_that_is_listed(facts):
    assert sum(len(one.files) for one in facts.values()) == len(PUBLISHED) > 0
    for file in PUBLISHED:
        assert set(file.options) <= set(model_options(file.network))


def test_a_line_a_network():
    lines = models_table(["c3d", "c2d"]).splitlines()
    assert lines[0].split() == ["name", "what", "classes", "weights", "multiply-adds", "clip", "files"]
    assert "78,409,573" in lines[1]
    assert lines[1].endswith("rgb 3 x 16 x 112 x 112")
    assert lines[2].endswith(f"  {sum(file.network == 'c2d' for file in PUBLISHED)}")


def test_the_command_lists_and_describes(capsys):
    assert main(["models", "i3d", "--set", "non_local=5"]) == 0
    page = capsys.readouterr().out
    assert "35,401,936 weights with 400 classes" in page
    assert "I3D_NLN_8x8_R50.pkl" in page
    assert "32 frames, 2 apart; 224 x 224; RGB; mean 0.45" in page
    assert main(["models", "c3d", "--classes", "487", "--set", "width=8"]) == 0
    assert "with 487 classes" in capsys.readouterr().out


def test_the_command_refuses_what_it_does_not_know(capsys):
    for arguments, said in (
        (["c4d"], "name='c4d'"),
        (["c3d", "--set", "depth=3"], "c3d has no option 'depth'"),
        (["--set", "depth=3"], "need the NAME of a network"),
        (["--load", "some.pkl"], "some.pkl is the name of no published file"),
    ):
        assert main(["models", *arguments]) == 2
        assert said in capsys.readouterr().err


SMALL = {"depth": 50, "width": 4, "layout": "slowfast", "clip": "8x8", "non_local": 5}


def written(path, model, drop=(), more=()):
    """A file as SlowFast's zoo has it: a pickled dict of arrays under "blobs"."""
    blobs = {key: value for key, value in to_checkpoint(model, "caffe2").items() if key not in drop}
    blobs |= dict.fromkeys(more, blobs["conv1_w"])
    path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    return path


def test_a_file_is_read_by_its_name_alone(tmp_path):
    torch.manual_seed(0)
    model = create_model("i3d", 400, **SMALL)
    path = written(tmp_path / "I3D_NLN_8x8_R50.pkl", model)
    report = load_published(path, options={"width": 4})
    assert (report.missing, report.unexpected) == ((), ())
    assert len(report.loaded) + len(report.assumed) == sum("num_batches" not in k for k in model.state_dict())


def test_what_a_file_lacks_is_printed_and_is_no_success(tmp_path, capsys):
    torch.manual_seed(0)
    path = written(
        tmp_path / "mine.pkl", create_model("i3d", 7, **SMALL), drop=["pred_b"], more=["momentum_like"]
    )
    told = [f"{key}={value}" for key, value in SMALL.items()]
    arguments = ["models", "i3d", "--classes", "7", "--load", str(path)]
    assert main(arguments + [part for option in told for part in ("--set", option)]) == 1
    said = capsys.readouterr().out
    assert "1 in the model but not in the file, left as they were: classifier.bias" in said
    assert "1 in the file but not in the model: momentum_like" in said


def test_titles_and_classes_of_unknown_names():
    for ask in (model_title, model_classes):
        with pytest.raises(ValueError, match="name='c4d'"):
            ask("c4d")
