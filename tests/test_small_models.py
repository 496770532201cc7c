"""The study's networks: names and options, shapes, what they can and cannot see, that they learn."""

import pytest
import torch

from nlutils.study import seeded
from nlutils.torch import NonLocalBlock, create_model
from nlutils.torch.models import INPUT_CHANNELS, model_options, model_title
from nlutils.torch.models.common import STUDY_CLIP, mean_probability
from nlutils.torch.models.small import MORE_SMALL_MODELS, SMALL_MODELS

torch.set_num_threads(1)
ALL = SMALL_MODELS | MORE_SMALL_MODELS
SINGLE = [name for name in ALL if "input" in model_options(name)]
# Every network once, and the options that make another of it.
VARIANTS = [(name, {}) for name in ALL] + [
    ("cnn_rnn", {"cell": "gru"}),
    *[("pooling_small", {"pooling": pooling}) for pooling in ("late", "slow", "time_domain")],
    ("pooling_small", {"pooling": "local", "frames": 8}),
    ("c3d_small", {"non_local": (2, 3), "kind": "compact_generalized"}),
    ("c2d_small", {"non_local": (2, 3), "block": {"subsample": "before"}}),
    ("two_stream_3d_small", {"inputs": ("rgb", "flow")}),
    ("st_resnet_small", {"connection": "multiplicative"}),
]
# The network of 2010 has a size of its own: these options fit it to the study's clips and size class.
JI_2010 = {"frames": STUDY_CLIP[0], "size": STUDY_CLIP[1:], "features": 32}
SMALL_JI_2010 = "ji_2010", {"frames": 8, "size": (24, 32), "features": 32}


def example(model, batch=2, frames=8, size=(24, 32), seed=0):
    draw = torch.Generator().manual_seed(seed)
    kinds = (model.input,) if isinstance(model.input, str) else model.input
    x = tuple(torch.randn(batch, INPUT_CHANNELS[kind], frames, *size, generator=draw) for kind in kinds)
    return x[0] if isinstance(model.input, str) else x


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_scores_have_a_column_a_class(name, options):
    model = create_model(name, 5, **options).eval()
    assert model(example(model)).shape == (2, 5)
    assert model.loss(example(model), torch.tensor([0, 4])).shape == ()


@pytest.mark.parametrize(("name", "options"), [*VARIANTS, SMALL_JI_2010])
def test_labels_are_classes_or_their_probabilities(name, options):
    with seeded(0):
        model = create_model(name, 3, **options).eval()
    x, labels = example(model), torch.tensor([2, 0])
    sure = torch.nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(model.loss(x, sure), model.loss(x, labels))
    # The loss is linear in the probabilities.
    torn = 0.75 * model.loss(x, labels) + 0.25 * model.loss(x, labels.flip(0))
    torch.testing.assert_close(model.loss(x, 0.75 * sure + 0.25 * sure.flip(0)), torn)
    assert not torch.isclose(model.loss(x, labels), model.loss(x, labels.flip(0)))


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("input", list(INPUT_CHANNELS))
def test_one_stream_takes_any_input(name, input):
    model = create_model(name, 3, input=input).eval()
    assert model.input == input
    assert model(example(model)).shape == (2, 3)


def test_all_are_of_one_size_class():
    counts = {name: sum(w.numel() for w in create_model(name, 8).parameters()) for name in SMALL_MODELS}
    assert 90_000 < min(counts.values()) < max(counts.values()) < 310_000, counts


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("c2d_small", {}, 98_712),  # frame_average's
        ("pooling_small", {}, 98_712),
        ("pooling_small", {"pooling": "local"}, 98_712 + 6 * 128 * 8),
        ("pooling_small", {"pooling": "time_domain"}, 245_432),
        ("two_stream_3d_small", {}, 585_792),
        ("two_stream_3d_small", {"widths": (11, 22, 44, 88)}, 277_997),
        ("fused_two_stream_small", {}, 417_592),
        ("fused_two_stream_small", {"widths": (12, 24, 48, 96), "fused": 36}, 297_764),
        ("st_resnet_small", {}, 253_248),
        ("ji_2010", JI_2010, 218_098),
    ],
)
def test_numbers_of_weights(name, options, count):
    with torch.device("meta"):
        model = create_model(name, 8, **options)
    assert sum(weight.numel() for weight in model.parameters()) == count


def test_titles_differ():
    assert len({model_title(name) for name in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("name", "options"), [("c3d_small", {}), ("c3d_small_non_local", {"non_local": (2,)})]
)
def test_c3d_small_starts_as_it_always_has(name, options):
    """Recorded runs start from these weights, under these names: drawn layer by layer, in this order."""
    with seeded(5):
        model = create_model(name, 8, **options)
    with seeded(5):
        layers, channels = [], 3
        for stage, width in enumerate((16, 32, 64, 128), start=1):
            layers += [torch.nn.Conv3d(channels, width, 3, padding=1, bias=False)]
            layers += [torch.nn.BatchNorm3d(width), torch.nn.ReLU()]
            layers += [torch.nn.MaxPool3d(2)] * (stage in (2, 3))
            if stage in options.get("non_local", ()):
                layers.append(NonLocalBlock(width, subsample="before"))
            channels = width
        by_hand = torch.nn.Module()
        by_hand.features, by_hand.classifier = torch.nn.Sequential(*layers), torch.nn.Linear(128, 8)
    mine, theirs = model.state_dict(), by_hand.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_network_of_2010_takes_the_clips_of_the_study():
    """There both inputs have as many steps; the last field of flow, which leads out of the clip, is left."""
    with seeded(0):
        model = create_model("ji_2010", 8, **JI_2010)
    rgb, flow = example(model, frames=STUDY_CLIP[0], size=STUDY_CLIP[1:])
    assert model((rgb, flow)).shape == (2, 8)
    assert torch.equal(model((rgb, flow)), model((rgb, flow[:, :, :-1])))


def test_unknown_names_options_and_values_are_named():
    with pytest.raises(ValueError, match=r"name='c4d'.*'c3d_small'"):
        create_model("c4d", 8)
    with pytest.raises(TypeError, match=r"c3d_small has no option 'width'; it has input, widths"):
        create_model("c3d_small", 8, width=3)
    with pytest.raises(ValueError, match=r"num_classes=0"):
        create_model("c3d_small", 0)
    with pytest.raises(ValueError, match=r"input='sound'.*'rgb'"):
        create_model("c3d_small", 8, input="sound")
    with pytest.raises(ValueError, match=r"widths=\(8, 16\) has 2 numbers"):
        create_model("frame_average", 8, widths=(8, 16))
    with pytest.raises(ValueError, match=r"cell='rnn'"):
        create_model("cnn_rnn", 8, cell="rnn")
    with pytest.raises(ValueError, match=r"non_local=5"):
        create_model("c3d_small", 8, non_local=(5,))
    model = create_model("two_stream_small", 8, stack=16)
    with pytest.raises(ValueError, match=r"stack=16 needs"):
        model(example(model, frames=8))


def test_model_options_gives_names_and_defaults():
    assert model_options("two_stream_small") == {
        "widths": (16, 32, 64, 128),
        "stack": 8,
        "spatial_frames": 4,
        "dropout": 0.5,
    }


def test_non_local_network_is_c3d_with_two_blocks():
    def blocks(model):
        return [layer for layer in model.modules() if isinstance(layer, NonLocalBlock)]

    assert len(blocks(create_model("c3d_small", 8))) == 0
    assert [block.in_channels for block in blocks(create_model("c3d_small_non_local", 8))] == [32, 64]
    assert len(blocks(create_model("c3d_small_non_local", 8, non_local=(1, 2, 3, 4)))) == 4
    kinds = blocks(create_model("c3d_small_non_local", 8, instantiation="dot_product", subsample=None))
    assert {(block.instantiation, block.subsample) for block in kinds} == {("dot_product", None)}


def test_fresh_non_local_blocks_change_nothing():
    """Their residual branch starts at zero, so with the same other weights the two networks agree."""
    plain, with_blocks = create_model("c3d_small", 4).eval(), create_model("c3d_small_non_local", 4).eval()
    theirs = [w for k, w in with_blocks.state_dict().items() if not _inside_block(with_blocks, k)]
    with torch.no_grad():
        for mine, other in zip(plain.state_dict().values(), theirs, strict=True):
            mine.copy_(other)
    x = example(plain)
    torch.testing.assert_close(plain(x), with_blocks(x), rtol=0, atol=0)


def _inside_block(model, key):
    return any(
        key.startswith(f"{name}.")
        for name, layer in model.named_modules()
        if isinstance(layer, NonLocalBlock)
    )


def test_frame_average_cannot_tell_the_order_of_frames_and_the_others_can():
    for name in ("frame_average", "cnn_rnn", "c3d_small"):
        with seeded(0):
            model = create_model(name, 4).eval()
        x = example(model)
        same = torch.allclose(model(x), model(x.flip(2)), atol=1e-5)
        assert same == (name == "frame_average"), name


def test_two_stream_averages_the_probabilities_of_its_streams():
    model = create_model("two_stream_small", 4, stack=4).eval()
    rgb, flow = example(model)
    spatial = (
        model.spatial(rgb[:, :, [1, 3, 5, 7]].transpose(1, 2).flatten(0, 1)).softmax(1).view(2, 4, 4).mean(1)
    )
    stacks = []
    for start in (0, 4):
        # The paper's channel order may differ; a permutation of input channels changes no network's power.
        channels = torch.cat([flow[:, 0, start : start + 4], flow[:, 1, start : start + 4]], dim=1)
        stacks.append(model.temporal(channels).softmax(1))
    expected = (spatial + (stacks[0] + stacks[1]) / 2) / 2
    torch.testing.assert_close(model((rgb, flow)).exp(), expected)


def test_mean_probability_is_the_mean_of_softmaxes():
    votes = torch.tensor([[[0.0, 0.0], [100.0, 0.0]]])  # 1/2, 1/2 and 1, 0
    torch.testing.assert_close(mean_probability(votes, 1).exp(), torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize(("name", "options"), [*VARIANTS, SMALL_JI_2010])
def test_each_network_learns_eight_clips_by_heart(name, options):
    if "dropout" in model_options(name):
        options = {**options, "dropout": 0.0}
    with seeded(0):
        model = create_model(name, 2, **options)
        size = options.get("size", (16, 16))
        x, labels = example(model, batch=8, size=size), torch.arange(8) % 2
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(30):
            optimizer.zero_grad()
            model.loss(x, labels).backward()
            optimizer.step()
    assert (model.eval()(x).argmax(1) == labels).all()
