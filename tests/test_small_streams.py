"""Small networks of two streams: how the streams meet, and what reaches what."""

import pickle

import pytest
import torch

from nlutils.study import seeded
from nlutils.torch import NonLocalBlock, create_model
from nlutils.torch.models import INPUT_CHANNELS

torch.set_num_threads(1)
CONNECTIONS = ("additive", "multiplicative", "none")


def made(name, frames=8, **options):
    with seeded(0):
        model = create_model(name, 4, **options).eval()
        x = [torch.randn(2, INPUT_CHANNELS[kind], frames, 24, 32) for kind in model.input]
    return model, x


# Two streams in 3D


@pytest.mark.parametrize("inputs", [("differences", "flow"), ("rgb", "flow")])
def test_probabilities_of_the_3d_streams_are_averaged(inputs):
    model, (first, second) = made("two_stream_3d_small", inputs=inputs)
    assert model.input == inputs
    streams = model.networks[inputs[0]](first).softmax(1), model.networks[inputs[1]](second).softmax(1)
    torch.testing.assert_close(model((first, second)).exp(), (streams[0] + streams[1]) / 2)


def test_3d_streams_learn_apart():
    model, x = made("two_stream_3d_small")
    labels = torch.tensor([1, 3])
    model.loss(x, labels).backward()
    for kind, clip in zip(model.input, x, strict=True):
        alone = model.networks[kind]
        weights = list(alone.parameters())
        expected = torch.autograd.grad(alone.loss(clip, labels), weights)
        for weight, gradient in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient)


def test_3d_streams_get_the_options():
    model, _ = made(
        "two_stream_3d_small", widths=(4, 4, 8, 8), dropout=0.25, non_local=(3,), block={"scale": True}
    )
    for stream in model.networks.values():
        assert stream.dropout.p == 0.25
        (block,) = (layer for layer in stream.modules() if isinstance(layer, NonLocalBlock))
        assert (block.in_channels, block.scale) == (8, True)
    uniform, _ = made("two_stream_3d_small", non_local=(2,), kind="uniform")
    assert sum(type(layer).__name__ == "UniformBlock" for layer in uniform.modules()) == 2


@pytest.mark.parametrize(
    "inputs", ["flow", ("flow",), ("flow", "flow"), ("rgb", "differences", "flow"), None]
)
def test_other_than_two_inputs_are_refused(inputs):
    with pytest.raises(ValueError, match=r"inputs=.* must name two inputs that differ"):
        create_model("two_stream_3d_small", 4, inputs=inputs)


def test_3d_streams_refuse_what_they_do_not_take():
    with pytest.raises(ValueError, match="input='sound'"):
        create_model("two_stream_3d_small", 4, inputs=("rgb", "sound"))
    model, (differences, flow) = made("two_stream_3d_small")
    for x, said in (
        (flow, r"x is one tensor of shape .*; it must be a pair of tensors, \(differences, flow\)"),
        ((flow,), "x is a tuple of 1; it must be a pair"),
        (None, "x is a NoneType; it must be a pair"),
        ((flow, differences), r"differences of shape \(2, 2, .* must be \(B, 3, T, H, W\)"),
        ((differences, flow[:, :, 1:]), r"differences \(2, 3, 8.* and flow \(2, 2, 7.* must agree in batch"),
    ):
        with pytest.raises(ValueError, match=said):
            model(x)


# Fused by a convolution


def test_maps_of_both_streams_meet_in_one_convolution():
    model, (rgb, flow) = made("fused_two_stream_small")
    places = []
    for place, frame in enumerate((2, 6)):  # the middles of two halves, and the four fields of each
        fields = flow[:, :, 4 * place : 4 * place + 4]
        stack = torch.cat([fields[:, 0], fields[:, 1]], dim=1)  # dx of all, then dy
        places.append(torch.cat([model.rgb(rgb[:, :, frame]), model.flow(stack)], dim=1))
    fused = model.fusion(torch.stack(places, dim=2))
    assert fused.shape == (2, 32, 2, 3, 4)
    torch.testing.assert_close(model((rgb, flow)), model.classifier(fused.mean((2, 3, 4))))


def test_the_fusion_sees_both_streams_and_the_order_of_places():
    model, (rgb, flow) = made("fused_two_stream_small", stack=2)
    before = model((rgb, flow))
    assert not torch.allclose(before, model((rgb.flip(2), flow)), atol=1e-5)
    assert not torch.allclose(before, model((rgb, flow.roll(2, dims=2))), atol=1e-5)
    with torch.no_grad():
        model.fusion.conv.weight[:, 128:] = 0
    torch.testing.assert_close(model((rgb, flow)), model((rgb, -flow)))
    with pytest.raises(ValueError, match="flow has 8 fields; stack=9 needs"):
        made("fused_two_stream_small", stack=9)[0]((rgb, flow))


# Connected stage by stage


@pytest.mark.parametrize("connection", CONNECTIONS)
@torch.no_grad()
def test_the_residual_branch_of_appearance_sees_motion_and_its_skip_path_does_not(connection):
    model, (rgb, flow) = made("st_resnet_small", connection=connection)
    a = model.appearance.stem(rgb[:, :, [2, 6]])
    stacks = [flow[:, :, s : s + 4].transpose(1, 2).flatten(1, 2) for s in (0, 4)]  # dx, dy, dx, dy, ...
    m = model.motion.stem(torch.stack(stacks, dim=2))
    for place in range(3):
        seen = {"additive": a + m, "multiplicative": a * m, "none": a}[connection]
        mine, other = model.appearance.stages[place], model.motion.stages[place]
        a = (mine.shortcut(a) + mine.b(mine.a(seen))).relu()
        m = (other.shortcut(m) + other.b(other.a(m))).relu()
        if place < 2:
            a, m = (torch.nn.functional.max_pool3d(maps, (1, 2, 2)) for maps in (a, m))
    streams = [
        model.appearance.classifier(a.mean((2, 3, 4))).softmax(1),
        model.motion.classifier(m.mean((2, 3, 4))).softmax(1),
    ]
    torch.testing.assert_close(model((rgb, flow)).exp(), (streams[0] + streams[1]) / 2)


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_motion_reaches_appearance_and_nothing_goes_back(connection):
    model, (rgb, flow) = made("st_resnet_small", connection=connection)
    appearance, motion = model.streams((rgb, flow))
    apart = connection == "none"
    others = model.streams((rgb, -flow))[0], model.streams((-rgb, flow))[1]
    assert torch.allclose(appearance, others[0], atol=1e-5) is apart
    assert torch.equal(motion, others[1])
    weights = list(model.motion.stem.parameters())
    gradients = torch.autograd.grad(appearance.sum(), weights, allow_unused=True)
    assert all((gradient is None) is apart for gradient in gradients)


@pytest.mark.parametrize("temporal", [True, False])
def test_only_convolutions_over_time_know_the_order_of_places(temporal):
    model, (rgb, flow) = made("st_resnet_small", stack=2, temporal=temporal)
    torn = [2, 0, 3, 1]
    fields = [2 * place + step for place in torn for step in (0, 1)]
    frames = [2 * place + step for place in torn for step in (0, 1)]
    shuffled = model((rgb[:, :, frames], flow[:, :, fields]))
    assert torch.allclose(shuffled, model((rgb, flow)), atol=1e-5) is not temporal


def test_the_loss_of_connected_streams_is_their_sum():
    model, x = made("st_resnet_small")
    labels = torch.tensor([0, 2])
    each = [torch.nn.functional.cross_entropy(logits, labels) for logits in model.streams(x)]
    torch.testing.assert_close(model.loss(x, labels), each[0] + each[1])


def test_connections_are_named_and_networks_are_pickled():
    with pytest.raises(ValueError, match=r"connection='sum'.*'multiplicative'"):
        create_model("st_resnet_small", 4, connection="sum")
    with pytest.raises(ValueError, match="temporal='no' must be True or False"):
        create_model("st_resnet_small", 4, temporal="no")
    model, x = made("st_resnet_small")
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
