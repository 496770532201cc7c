"""Every network says what clips it takes and what it was made for, refuses others, and stays exportable."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from nlutils.arguments import truth_value
from nlutils.study import Recipe, seeded
from nlutils.torch import create_model, list_models
from nlutils.torch.models import INPUT_CHANNELS, VideoClassifier
from nlutils.torch.models.common import STUDY_CLIP, check_clip, check_pair, mean_probability, vote_loss
from nlutils.torch.models.layers import ConvNorm, middle_frames, response_norm
from nlutils.torch.models.two_stream import CNNM2048

torch.set_num_threads(1)
# Small networks of every family: options, frames, (height, width).
SMALL = {
    "frame_average": ({}, 8, (24, 24)),
    "cnn_rnn": ({"hidden": 8}, 8, (24, 24)),
    "c3d_small": ({"widths": (4, 4, 4, 4)}, 8, (24, 24)),
    "c3d_small_non_local": ({"widths": (4, 4, 4, 4)}, 8, (24, 24)),
    "two_stream_small": ({"widths": (4, 4, 4, 4)}, 8, (24, 24)),
    "c2d_small": ({"widths": (4, 4, 4, 4)}, 8, (24, 24)),
    "pooling_small": ({"widths": (4, 4, 4, 4)}, 8, (24, 24)),
    "two_stream_3d_small": ({"widths": (4, 4, 4, 4), "inputs": ("rgb", "flow")}, 8, (24, 24)),
    "fused_two_stream_small": ({"widths": (4, 4, 4, 4), "fused": 4}, 8, (24, 24)),
    "st_resnet_small": ({"widths": (4, 4, 4, 4)}, 8, (24, 24)),
    "ji_2010": ({"features": 4}, 7, (60, 40)),
    "c3d": ({"width": 2, "fc": 4, "frames": 8, "size": (32, 32)}, 8, (32, 32)),
    "c3d_bn": ({"width": 2, "fc": 4, "frames": 8, "size": (32, 32)}, 8, (32, 32)),
    "lrcn": ({"width": 4, "fc6": 4, "hidden": 4, "size": 67}, 8, (67, 67)),
    "beyond_short_snippets": ({"width": 4, "fc": (4,), "size": 67, "frames": 8}, 8, (67, 67)),
    "two_stream": ({"width": 3, "size": (41, 41), "stack": 2}, 8, (41, 41)),
    "st_resnet": ({"width": 4, "depth": (2, 2, 2, 2), "stack": 2}, 8, (32, 32)),
    "inception_lstm": ({"width": 4, "hidden": 4}, 8, (32, 32)),
    "two_stream_inception": ({"width": 4, "stack": 4}, 8, (32, 32)),
    "fused_two_stream": ({"width": 4, "stack": 4, "fused": 4}, 8, (32, 32)),
    "i3d_inception": ({"width": 4}, 8, (32, 32)),
    "two_stream_i3d": ({"width": 4}, 8, (32, 32)),
}
# With their own checks and tests: the residual networks, trajectories, the interaction network.
ELSEWHERE = {"c2d", "i3d", "idt", "tdd", "visual_interaction_network"}
PAIRS = [name for name in SMALL if create_model(name, 2, **SMALL[name][0]).input == ("rgb", "flow")]
SINGLE = [name for name in SMALL if name not in PAIRS]


def made(name, batch=2):
    """A small network and a clip for it."""
    options, frames, size = SMALL[name]
    with seeded(0):
        model = create_model(name, 3, **options).eval()
        kinds = (model.input,) if isinstance(model.input, str) else model.input
        x = tuple(torch.randn(batch, INPUT_CHANNELS[kind], frames, *size) for kind in kinds)
    return model, x if name in PAIRS else x[0]


def refused(model, x, message):
    labels = torch.tensor([0, 1])
    for ask in (model, lambda x: model.loss(x, labels)):
        with pytest.raises(ValueError, match=message):
            ask(x)


def test_all_networks_are_looked_at():
    assert set(SMALL) | ELSEWHERE == set(list_models())


# Clips


@pytest.mark.parametrize("name", SINGLE)
def test_other_things_than_a_clip_are_refused(name):
    model, x = made(name)
    needed = r"must be (one tensor )?\(B, 3, T, H, W\), because it is rgb"
    refused(model, x[0], r"x of shape \(3, 8, \d+, \d+\) " + needed)
    refused(model, x[:, :2], r"x of shape \(2, 2, .*\) " + needed)
    refused(model, (x,), "x is a tuple of 1; it " + needed)
    refused(model, x.numpy(), "x is a ndarray; it " + needed)
    refused(model, (255 * x.sigmoid()).byte(), r"x of torch.uint8 must hold floating-point .* x.float\(\)")
    refused(model, x[:, :, :0], r"x of shape \(2, 3, 0, .* is empty")
    refused(model, x[:0], r"x of shape \(0, 3, .* is empty")


@pytest.mark.parametrize("name", PAIRS)
def test_other_things_than_a_pair_are_refused(name):
    model, (rgb, flow) = made(name)
    refused(model, rgb, r"x is one tensor of shape \(2, 3, .*\); it must be a pair of tensors, \(rgb, flow\)")
    refused(model, (rgb, flow, flow), r"x is a tuple of 3; it must be a pair")
    refused(model, (flow, rgb), r"rgb of shape \(2, 2, .*\) must be \(B, 3, T, H, W\), because it is rgb")
    refused(model, (rgb, rgb), r"flow of shape \(2, 3, .*\) must be \(B, 2, T, H, W\), because it is flow")
    refused(model, (rgb[0], flow[0]), r"rgb of shape \(3, .*\) must be \(B, 3, T, H, W\)")
    refused(model, (rgb.byte(), flow), r"rgb of torch.uint8 must hold floating-point .* rgb.float\(\)")
    refused(model, (rgb, flow[:, :, :0]), r"flow of shape \(2, 2, 0, .* is empty")
    refused(model, (rgb, flow[:1]), r"rgb \(2, .*\) and flow \(1, .*\) must agree in batch")
    refused(model, (rgb[..., :-1], flow), "must agree in batch, (frames, )?height and width")
    model([rgb, flow])  # as a DataLoader puts them together


def test_the_streams_of_i3d_must_agree_in_frames_too():
    model, (rgb, flow) = made("two_stream_i3d")
    refused(model, (rgb, flow[:, :, :4]), "must agree in batch, frames, height and width")
    assert check_pair((rgb, flow[:, :, :4]))[1].shape[2] == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type_is_a_clip(dtype):
    x = torch.zeros(1, 2, 1, 4, 4, dtype=dtype)
    assert check_clip(x, "flow") is x


@pytest.mark.parametrize("name", SMALL)
def test_clips_on_the_meta_device(name):
    options, _, _ = SMALL[name]
    with torch.device("meta"):
        model = create_model(name, 3, **options).eval()
    shapes = zip((model.input,) if name in SINGLE else model.input, model.clip_shapes(), strict=True)
    x = tuple(torch.empty(2, INPUT_CHANNELS[kind], *shape, device="meta") for kind, shape in shapes)
    assert model(x if name in PAIRS else x[0]).shape == (2, 3)


@pytest.mark.parametrize("name", ["frame_average", "c3d", "two_stream", "beyond_short_snippets"])
def test_compiled_without_a_break(name):
    """One graph, checks included."""
    torch._dynamo.reset()
    model, x = made(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("name", ["two_stream_small", "c3d", "lrcn", "two_stream", "beyond_short_snippets"])
def test_exported_for_batches_of_any_size(name):
    model, x = made(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    sizes = (({0: batch}, {0: batch}),) if name in PAIRS else ({0: batch},)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The tensor attributes .*_flat_weights")
        exported = torch.export.export(model, (x,), dynamic_shapes=sizes).module()
    _, more = made(name, batch=5)
    torch.testing.assert_close(exported(more), model(more), rtol=1e-4, atol=1e-5)


# What they were made for


@pytest.mark.parametrize(
    ("name", "options", "shapes"),
    [
        ("frame_average", {}, [(16, 40, 56)]),
        ("two_stream_small", {}, [(16, 40, 56)] * 2),
        ("two_stream_small", {"stack": 20}, [(20, 40, 56)] * 2),
        ("pooling_small", {"frames": 20}, [(20, 40, 56)]),
        ("fused_two_stream_small", {"stack": 20}, [(20, 40, 56)] * 2),
        ("st_resnet_small", {}, [(16, 40, 56)] * 2),
        ("ji_2010", {"frames": 9}, [(9, 60, 40), (8, 60, 40)]),
        ("c3d", {"frames": 8, "width": 8}, [(8, 112, 112)]),
        ("c3d_bn", {"input": "flow"}, [(16, 112, 112)]),
        ("lrcn", {"size": 67}, [(16, 67, 67)]),
        ("beyond_short_snippets", {"size": (90, 112), "frames": 16}, [(16, 90, 112)]),
        ("two_stream", {"size": (64, 73), "stack": 5}, [(1, 64, 73), (5, 64, 73)]),
        ("st_resnet", {"stack": 5}, [(11, 224, 224), (55, 224, 224)]),
        ("inception_lstm", {"width": 8}, [(25, 224, 224)]),
        ("two_stream_inception", {"stack": 5}, [(1, 224, 224), (5, 224, 224)]),
        ("fused_two_stream", {"stack": 5}, [(5, 224, 224), (25, 224, 224)]),
        ("i3d_inception", {"input": "differences"}, [(64, 224, 224)]),
        ("two_stream_i3d", {"width": 8}, [(64, 224, 224)] * 2),
        ("i3d", {"clip": "8x8"}, [(8, 224, 224)]),  # by its recipe facts
    ],
)
def test_clip_shapes(name, options, shapes):
    with torch.device("meta"):
        model = create_model(name, 3, **options)
    assert list(model.clip_shapes()) == shapes


def test_clip_shapes_of_a_network_that_says_nothing_are_the_studys():
    recipe = Recipe()
    assert (recipe.frames, *recipe.size) == STUDY_CLIP
    model = VideoClassifier()
    model.input = ("rgb", "flow")
    assert model.clip_shapes() == (STUDY_CLIP, STUDY_CLIP)
    small = create_model("i3d", 5, clip="128x1", layout="released", depth=(1, 1, 1, 1), width=4)
    assert small.expects is None
    assert small.clip_shapes() == ((128, 224, 224),)


# Options


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("st_resnet", "injection"),
        ("st_resnet", "temporal"),
        *[
            (name, "norm_gain")
            for name in ("i3d_inception", "two_stream_i3d", "inception_lstm", "fused_two_stream")
        ],
        ("beyond_short_snippets", "peepholes"),
    ],
)
@pytest.mark.parametrize("value", ["no", 0, None])
def test_what_is_neither_true_nor_false_is_refused(name, option, value):
    options = SMALL[name][0] | ({"pooling": "lstm"} if option == "peepholes" else {})
    with pytest.raises(ValueError, match=f"{option}={value!r} must be True or False"):
        create_model(name, 3, **options, **{option: value})
    assert truth_value(option, False) is False


def test_the_second_norm_of_cnn_m_is_there_or_not():
    with pytest.raises(ValueError, match="second_norm='no' must be True or False"):
        CNNM2048(3, 2, width=3, size=(41, 41), second_norm="no")


@pytest.mark.parametrize("name", [name for name in SMALL if name != "ji_2010"])
@pytest.mark.parametrize("value", [True, 1.5, -0.1, "half", None])
def test_dropout_is_a_probability(name, value):
    options = SMALL[name][0]
    for option in ("dropout", "fc6_dropout") if name == "lrcn" else ("dropout",):
        with pytest.raises(ValueError, match=f"{option}={value!r} must be a number from 0 to 1"):
            create_model(name, 3, **options, **{option: value})


# What they share


def test_vote_loss_is_the_mean_over_clips_and_votes():
    votes, labels = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([4, 0, 2])
    expected = sum(F.cross_entropy(votes[:, s], labels) for s in range(4)) / 4
    torch.testing.assert_close(vote_loss(votes, labels), expected)


@pytest.mark.parametrize("T", [1, 4, 9, 50])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_middle_frames_lie_in_the_middle_of_equal_parts(T, count):
    clip = torch.arange(float(T)).view(1, 1, T, 1, 1)
    expected = [int((part + 0.5) * T / count) for part in range(count)]
    assert middle_frames(clip, count).flatten().tolist() == expected


def test_nothing_is_made_on_the_cpu_when_a_clip_is_elsewhere():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type == "cpu":
                seen.append(str(function))
            return result

    with torch.device("meta"):
        networks = {name: create_model(name, 3, **SMALL[name][0]).eval() for name in SMALL}
    for name, model in networks.items():
        kinds = (model.input,) if name in SINGLE else model.input
        x = tuple(
            torch.empty(2, INPUT_CHANNELS[kind], *shape, device="meta")
            for kind, shape in zip(kinds, model.clip_shapes(), strict=True)
        )
        with Watch():
            model(x if name in PAIRS else x[0])
        assert not seen, name


def test_mean_probability_of_one_vote_is_its_log_softmax():
    logits = torch.tensor([[[1.0, 3.0, -2.0]]])
    torch.testing.assert_close(mean_probability(logits, 1), logits[:, 0].log_softmax(-1))


def test_response_norm_states_its_numbers():
    norm = response_norm(5e-4, k=2.0)
    assert (norm.size, norm.alpha, norm.beta, norm.k) == (5, 5e-4, 0.75, 2.0)


def test_a_convolution_with_its_norm():
    with seeded(0):
        plain, repeated = ConvNorm(4, 64, (3, 3, 3)), ConvNorm(4, 64, (3, 3, 3), (1, 2, 2), repeated=True)
    weight = repeated.conv.weight
    assert torch.equal(weight[:, :, 0], weight[:, :, 2])
    assert not torch.equal(plain.conv.weight[:, :, 0], plain.conv.weight[:, :, 2])
    # He et al. 2015 from the outputs: variance 2 / (64 * 27), and of the 2D kernel 2 / (64 * 9).
    assert 0.95 < plain.conv.weight.std() * (64 * 27 / 2) ** 0.5 < 1.05
    assert 0.95 < weight.sum(dim=2).std() * (64 * 9 / 2) ** 0.5 < 1.05
    x = torch.randn(2, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    y = repeated(x)
    assert y.shape == (2, 64, 3, 3, 3)
    assert y.min() == 0
    assert ConvNorm(4, 8, (1, 1, 1), relu=False)(x).min() < 0
    assert list(plain.state_dict())[:2] == ["conv.weight", "norm.weight"]
