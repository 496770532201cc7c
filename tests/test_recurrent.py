"""LRCN and Beyond Short Snippets: counts and shapes as published, each pooling by hand, order, learning."""

import math

import pytest
import torch
from torch import nn

from nlutils.architectures.frame_networks import CNNS
from nlutils.study import seeded
from nlutils.study.cost import parameters
from nlutils.torch.models.recurrent import (
    INFERENCE,
    LRCN,
    POOLINGS,
    BeyondShortSnippets,
    FrameCNN,
    PeepholeLSTM,
    rising_gain,
    window_maxima,
)
from nlutils.torch.models.recurrent.snippets import OPTIONS

torch.set_num_threads(1)


def on_meta(network, *args, **options):
    with torch.device("meta"):
        return network(*args, **options).eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shapes(network, x):
    """The shape after each layer of a sequential network, without the batch."""
    found = {}
    for name, layer in network.named_children():
        x = layer(x)
        found[name] = tuple(x.shape[1:])
    return found


# The papers' numbers


def test_lrcn_has_the_published_counts():
    """LisaAnne/lisa-caffe-public@lstm_video_deploy, train_test_lstm_RGB.prototxt, and arithmetic."""
    model = on_meta(LRCN, 101)
    assert parameters(model.encoder) == 4_310_656
    assert parameters(model.fc6) == 56_627_200
    assert parameters(model.lstm) == 4_458_496
    assert parameters(model.classifier) == 25_957
    caffe = parameters(model) - model.lstm.bias_hh_l0.numel()  # Caffe has one bias where PyTorch has two
    assert parameters(model.lstm) - model.lstm.bias_hh_l0.numel() == 4_457_472
    assert caffe == 65_421_285


def test_lrcn_has_the_published_shapes():
    model, x = on_meta(LRCN, 101), torch.empty(1, 3, 227, 227, device="meta")
    found = shapes(model.encoder, x)
    # Caffe rounds up when it pools: 13 and not 12 after pool2, 6 after pool5.
    expected = {
        "conv1": (96, 111, 111),
        "pool1": (96, 55, 55),
        "norm1": (96, 55, 55),
        "conv2": (384, 26, 26),
        "pool2": (384, 13, 13),
        "norm2": (384, 13, 13),
        "conv3": (512, 13, 13),
        "conv4": (512, 13, 13),
        "conv5": (384, 13, 13),
        "pool5": (384, 6, 6),
    }
    assert {name: shape for name, shape in found.items() if not name.startswith("relu")} == expected
    clip = torch.empty(2, 3, 16, 227, 227, device="meta")
    assert model.steps(clip).shape == (2, 16, 101)
    assert model(clip).shape == (2, 101)


def test_lrcn_layers_are_those_of_the_prototxt():
    layers = dict(on_meta(LRCN, 101).encoder.named_children())
    table = {
        name: (conv.kernel_size, conv.stride, conv.padding, conv.groups)
        for name, conv in layers.items()
        if isinstance(conv, nn.Conv2d)
    }
    assert table == {
        "conv1": ((7, 7), (2, 2), (0, 0), 1),
        "conv2": ((5, 5), (2, 2), (0, 0), 2),
        "conv3": ((3, 3), (1, 1), (1, 1), 1),
        "conv4": ((3, 3), (1, 1), (1, 1), 2),
        "conv5": ((3, 3), (1, 1), (1, 1), 2),
    }
    model = on_meta(LRCN, 101)
    assert (model.fc6_dropout.p, model.dropout.p) == (0.9, 0.5)


def test_alexnet_normalises_before_it_pools():
    """Krizhevsky et al. 2012: pooling follows response normalisation; in LRCN's network it precedes it."""
    names = {layers: list(dict(on_meta(FrameCNN, 3, layers=layers).named_children())) for layers in CNNS}
    first = ["conv1", "relu1", "norm1", "pool1", "conv2", "relu2", "norm2", "pool2", "conv3", "relu3"]
    assert names["alexnet"] == [*first, "conv4", "relu4", "conv5", "relu5", "pool5"]
    turned = ["conv1", "relu1", "pool1", "norm1", "conv2", "relu2", "pool2", "norm2", "conv3", "relu3"]
    assert names["lrcn"] == [*turned, "conv4", "relu4", "conv5", "relu5", "pool5"]
    for layers in CNNS:
        norms = [
            layer for layer in on_meta(FrameCNN, 3, layers=layers) if isinstance(layer, nn.LocalResponseNorm)
        ]
        assert {(norm.size, norm.alpha, norm.beta, norm.k) for norm in norms} == {(5, 1e-4, 0.75, 1.0)}


def test_alexnets_layers_are_the_papers():
    """Krizhevsky et al. 2012: channels, kernels and strides; conv2, conv4 and conv5 work in two groups."""
    convolutions = [layer for layer in on_meta(FrameCNN, 3, layers="alexnet") if isinstance(layer, nn.Conv2d)]
    table = [(conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.groups) for conv in convolutions]
    assert table == [(96, 11, 4, 1), (256, 5, 1, 2), (384, 3, 1, 1), (384, 3, 1, 2), (256, 3, 1, 2)]


def test_response_normalisation_is_caffes():
    """b_c = a_c / (1 + alpha / n * sum of a^2 over n = 5 channels)^beta, Caffe's documentation of LRN."""
    norm = dict(FrameCNN(3, width=8).named_children())["norm1"]
    a = 100 * noise(1, 8, 2, 2)
    by_hand = torch.empty_like(a)
    for c in range(8):
        squares = (a[:, max(0, c - 2) : c + 3] ** 2).sum(dim=1)
        by_hand[:, c] = a[:, c] / (1 + 1e-4 / 5 * squares) ** 0.75
    torch.testing.assert_close(norm(a), by_hand)
    assert not torch.allclose(by_hand, a, rtol=0.1)


@pytest.mark.parametrize(
    ("encoder", "inputs", "count"), [("alexnet", 4096, 17_846_272), ("inception", 1024, 11_554_816)]
)
def test_snippets_lstms_have_the_published_counts(encoder, inputs, count):
    """Five LSTMs of 512 on 4096 or 1024 features, two biases a gate: arithmetic."""
    model = on_meta(BeyondShortSnippets, 487, pooling="lstm", encoder=encoder)
    by_layer = [4 * 512 * (d + 512) + 2 * 4 * 512 for d in (inputs, 512, 512, 512, 512)]
    assert parameters(model.lstm) == sum(by_layer) == count
    assert parameters(model.classifier) == 513 * 487
    seeing = on_meta(BeyondShortSnippets, 487, pooling="lstm", encoder=encoder, peepholes=True)
    assert parameters(seeing.lstm) == count + 5 * 3 * 512
    clip = torch.empty(1, 3, 4, 220, 220, device="meta")
    assert model.steps(clip).shape == seeing.steps(clip).shape == (1, 4, 487)


def test_snippets_at_full_size():
    """120 frames of 220 x 220, windows of 10 at stride 5, 256 kernels of 10 x 3 x 3, fc of 4096."""
    clip = torch.empty(1, 3, 120, 220, 220, device="meta")
    networks = {name: on_meta(BeyondShortSnippets, 487, pooling=name) for name in POOLINGS}
    for network in networks.values():
        assert network(clip).shape == (1, 487)
    conv = networks["conv"]
    assert shapes(conv.encoder, clip[:, :, 0])["pool5"] == (256, 6, 6)
    fc = 4096 * (256 * 36 + 1) + 4096 * 4097
    assert parameters(conv.fc) == fc
    for name in ("late", "slow"):  # the order of the same layers
        assert parameters(networks[name]) == parameters(conv)
    assert networks["local"].classifier.in_features == 23 * 4096  # windows at 0, 5, ..., 110
    over_time = networks["time_domain"].over_time
    assert over_time.weight.shape == (256, 256, 10, 3, 3)
    assert over_time.stride == (5, 1, 1)


def test_recipe_facts_travel_with_the_models():
    rgb, flow = on_meta(LRCN, 3).expects, on_meta(LRCN, 3, input="flow").expects
    assert (rgb.frames, rgb.size, rgb.stride, rgb.colour) == (16, (227, 227), 1, "BGR")
    means = [255 * mean for mean in rgb.mean]
    assert means == pytest.approx([103.939, 116.779, 128.68])  # of bytes, blue first
    assert (1 - rgb.mean[0]) / rgb.std[0] == pytest.approx(255 - 103.939)
    assert (0.5 - flow.mean[0]) / flow.std[0] == 8  # half a pixel, times 16
    assert (flow.clip, flow.colour) == (8.0, "")
    assert on_meta(LRCN, 3, input="differences").expects is None
    for encoder in ("alexnet", "inception"):
        facts = on_meta(BeyondShortSnippets, 487, encoder=encoder).expects
        assert (facts.frames, facts.size, facts.stride) == (120, (220, 220), 30)


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (LRCN, {"size": 67}),
        (LRCN, {"width": 48}),
        (LRCN, {"input": "flow", "size": 67}),
        (BeyondShortSnippets, {"input": "flow"}),
        (BeyondShortSnippets, {"size": 112}),
        (BeyondShortSnippets, {"width": 64}),  # Inception's, of AlexNet
        (BeyondShortSnippets, {"frames": 16}),
    ],
)
def test_recipe_facts_are_of_the_published_input_size_and_width_alone(network, options):
    assert on_meta(network, 3, **options).expects is None


# What the parts compute


def small_lrcn(**options):
    return LRCN(3, width=8, fc6=16, hidden=8, size=64, **options)


def test_lrcn_by_hand():
    with seeded(0):
        model = small_lrcn().eval()
    x, labels = noise(2, 3, 5, 64, 64), torch.tensor([0, 2])
    steps = torch.empty(2, 5, 3)
    for b in range(2):
        h = c = torch.zeros(1, 8)
        cell = nn.LSTMCell(16, 8)
        cell.load_state_dict({name[:-3]: w for name, w in model.lstm.state_dict().items()})
        for t in range(5):
            feature = torch.relu(model.fc6(model.encoder(x[[b], :, t]).flatten(1)))
            h, c = cell(feature, (h, c))
            steps[b, t] = model.classifier(h)
    torch.testing.assert_close(model.steps(x), steps)
    torch.testing.assert_close(model(x).exp(), steps.softmax(2).mean(1))
    losses = [nn.functional.cross_entropy(steps[:, t], labels) for t in range(5)]
    torch.testing.assert_close(model.loss(x, labels), sum(losses) / 5)


def test_the_last_step_has_not_seen_what_is_to_come():
    with seeded(0):
        model = small_lrcn().eval()
    x = noise(1, 3, 6, 64, 64)
    torch.testing.assert_close(model.steps(x)[:, :4], model.steps(x[:, :, :4]))


def test_peephole_lstm_without_peepholes_is_the_lstm():
    with seeded(0):
        ours, theirs = PeepholeLSTM(5, 4, 3), nn.LSTM(5, 4, 3, batch_first=True)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert (missing, unexpected) == ([f"peephole_l{layer}" for layer in range(3)], [])
    x = noise(2, 7, 5)
    (y, state), (expected, expected_state) = ours(x), theirs(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, expected_state)


def test_peepholes_by_hand():
    with seeded(0):
        lstm = PeepholeLSTM(1, 1)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        nn.init.zeros_(getattr(lstm, name))
    lstm.bias_ih_l0.data[2] = 1.0  # g: what is written is tanh(1)
    lstm.peephole_l0.data[:, 0] = torch.tensor([0.5, -1.0, 2.0])

    def sigmoid(v):
        return 1 / (1 + math.exp(-v))

    c1 = 0.5 * math.tanh(1)  # the gates see c = 0
    c2 = sigmoid(-1.0 * c1) * c1 + sigmoid(0.5 * c1) * math.tanh(1)
    h1, h2 = (sigmoid(2.0 * c) * math.tanh(c) for c in (c1, c2))  # the output gate sees the new c
    y, (h, c) = lstm(torch.zeros(1, 2, 1))
    torch.testing.assert_close(y.flatten(), torch.tensor([h1, h2]))
    torch.testing.assert_close((h.item(), c.item()), (h2, c2))


@pytest.mark.parametrize(("T", "starts"), [(3, [0]), (4, [0]), (5, [0, 2]), (6, [0, 2]), (7, [0, 2, 4])])
def test_windows_lose_no_frame(T, starts):
    maps = noise(2, T, 3, 2, 2)
    windows = window_maxima(maps, 4, 2)
    expected = torch.stack([maps[:, start : start + 4].amax(1) for start in starts], dim=1)
    torch.testing.assert_close(windows, expected, rtol=0, atol=0)


def test_rising_gain():
    assert rising_gain(5, torch.zeros(1)).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert rising_gain(1, torch.zeros(1)).tolist() == [1]


class Halved(nn.Module):
    """An encoder that a reader can follow: the mean of 2 x 2 pixels, and its square."""

    def forward(self, x):
        small = nn.functional.avg_pool2d(x, 2)
        return torch.cat([small, small**2], dim=1)


def snippets(pooling, **options):
    """4 x 6 pixels of flow, maps of 4 x 2 x 3, 8 frames, windows of 4 at stride 2: three of them."""
    with seeded(0):
        return BeyondShortSnippets(
            3,
            input="flow",
            pooling=pooling,
            **{"encoder": Halved(), "size": (4, 6), "fc": (5, 6), "frames": 8}
            | own(pooling, window=4, stride=2, kernels=7, hidden=5, layers=2)
            | options,
        ).eval()


def own(pooling, **options):
    """Those of the options that `pooling` has."""
    return {name: value for name, value in options.items() if pooling in OPTIONS[name]}


def fc(model, number, v):
    return torch.relu(model.fc[number][0](v))


def by_hand(model, x):
    """Each pooling in loops, for one clip x (2, 8, 4, 6)."""
    maps = [Halved()(x[None, :, t])[0] for t in range(8)]  # 8 times (4, 2, 3)
    windows = [torch.stack(maps[start : start + 4]).amax(0) for start in (0, 2, 4)]
    if model.pooling == "conv":
        return fc(model, 2, fc(model, 1, torch.stack(maps).amax(0).flatten()))
    if model.pooling == "late":
        return torch.stack([fc(model, 2, fc(model, 1, one.flatten())) for one in maps]).amax(0)
    if model.pooling == "slow":
        return fc(model, 2, torch.stack([fc(model, 1, one.flatten()) for one in windows]).amax(0))
    if model.pooling == "local":
        return torch.cat([fc(model, 2, fc(model, 1, one.flatten())) for one in windows])
    weight, bias = model.over_time.weight, model.over_time.bias  # (7, 4, 4, 3, 3)
    padded = torch.stack([nn.functional.pad(one, (1, 1, 1, 1)) for one in maps], dim=1)  # (4, 8, 4, 5)
    places = torch.empty(3, 7, 2, 3)
    for number, start in enumerate((0, 2, 4)):
        for h in range(2):
            for w in range(3):
                seen = padded[:, start : start + 4, h : h + 3, w : w + 3]
                places[number, :, h, w] = torch.relu((weight * seen).sum(dim=(1, 2, 3, 4)) + bias)
    return fc(model, 2, fc(model, 1, places.amax(0).flatten()))


@pytest.mark.parametrize("pooling", [name for name in POOLINGS if name != "lstm"])
def test_each_pooling_by_hand(pooling):
    model, x = snippets(pooling), noise(2, 2, 8, 4, 6)
    expected = torch.stack([model.classifier(by_hand(model, clip)) for clip in x])
    torch.testing.assert_close(model(x), expected)
    labels = torch.tensor([1, 2])
    torch.testing.assert_close(model.loss(x, labels), nn.functional.cross_entropy(expected, labels))
    with pytest.raises(ValueError, match=rf"pooling='{pooling}' has no answer a frame"):
        model.steps(x)


@pytest.mark.parametrize("peepholes", [False, True])
def test_lstm_by_hand(peepholes):
    model, x, labels = snippets("lstm", peepholes=peepholes), noise(2, 2, 8, 4, 6), torch.tensor([1, 2])
    features = torch.stack(
        [
            torch.stack([fc(model, 2, fc(model, 1, Halved()(clip[None, :, t]).flatten())) for t in range(8)])
            for clip in x
        ]
    )
    steps = model.classifier(model.lstm(features)[0])
    torch.testing.assert_close(model.steps(x), steps)
    p, gain = steps.softmax(2), torch.arange(8) / 7
    losses = -(p[torch.arange(2), :, labels].log() * gain).sum(1) / gain.sum()
    torch.testing.assert_close(model.loss(x, labels), losses.mean())
    expected = {
        "last": p[:, -1],
        "max": p.amax(1) / p.amax(1).sum(1, keepdim=True),
        "sum": p.sum(1) / 8,
        "weighted": (p * gain[None, :, None]).sum(1) / gain.sum(),
    }
    for inference in INFERENCE:
        model.inference = inference
        torch.testing.assert_close(model(x).softmax(1), expected[inference])
    model.inference = "weighted"
    assert torch.isfinite(model(x[:, :, :1])).all()  # a single frame, whose gain is 1


def test_without_fc_maps_are_averaged_over_space():
    x = noise(2, 2, 8, 4, 6)
    for pooling in POOLINGS:
        assert snippets(pooling, fc=())(x).shape == (2, 3)
        assert snippets(pooling, fc=())(noise(2, 2, 8, 10, 6)).shape == (2, 3)  # any size then
    model = snippets("late", fc=())
    maps = torch.stack([Halved()(x[:, :, t]).mean(dim=(2, 3)) for t in range(8)], dim=1)
    torch.testing.assert_close(model(x), model.classifier(maps.amax(1)))


# Which of them know the order of frames

ORDERS = {
    "last first": list(range(7, -1, -1)),
    "shuffled": [3, 0, 6, 1, 7, 5, 2, 4],
    "exchanged in a window": [1, 0, 2, 3, 4, 5, 6, 7],  # both of window 0 alone
}
SAME = {
    "conv": {"last first", "shuffled", "exchanged in a window"},
    "late": {"last first", "shuffled", "exchanged in a window"},
    "slow": {"last first", "exchanged in a window"},  # a reversed clip has the same windows, reversed
    "local": {"exchanged in a window"},
    "time_domain": set(),
    "lstm": set(),
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_which_orders_a_network_cannot_tell(pooling):
    model, x = snippets(pooling), noise(2, 2, 8, 4, 6)
    answer = model(x)
    same = {name for name, o in ORDERS.items() if torch.allclose(model(x[:, :, o]), answer, atol=1e-6)}
    assert same == SAME[pooling]


# Options


@pytest.mark.parametrize("input", ["rgb", "flow", "differences"])
def test_any_input(input):
    channels = {"rgb": 3, "flow": 2, "differences": 3}[input]
    x = noise(1, channels, 6, 64, 64)
    assert small_lrcn(input=input).eval()(x).shape == (1, 3)
    options = {"width": 8, "fc": (8,), "size": 64, "frames": 6}
    for pooling in POOLINGS:
        options_of_it = own(pooling, window=4, stride=2, kernels=8, hidden=8)
        model = BeyondShortSnippets(3, input=input, pooling=pooling, **options, **options_of_it).eval()
        assert model.input == input
        assert model(x).shape == (1, 3)


def test_width_scales_the_first_convolution_and_the_rest():
    full, half = on_meta(FrameCNN, 3), on_meta(FrameCNN, 3, width=48)
    assert [layer.out_channels for layer in full if isinstance(layer, nn.Conv2d)] == [96, 384, 512, 512, 384]
    assert [layer.out_channels for layer in half if isinstance(layer, nn.Conv2d)] == [48, 192, 256, 256, 192]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="input='sound'"):
        LRCN(3, input="sound")
    with pytest.raises(ValueError, match="width=0"):
        LRCN(3, width=0)
    with pytest.raises(ValueError, match="hidden=0"):
        LRCN(3, width=8, size=64, fc6=8, hidden=0)
    with pytest.raises(ValueError, match=r"size=\(8, 8\) does not pass through the encoder"):
        LRCN(3, width=8, size=8)
    with pytest.raises(ValueError, match=r"size=\(1, 2, 3\) must be one number or a pair"):
        LRCN(3, width=8, size=(1, 2, 3))
    with pytest.raises(ValueError, match=r"clips of 48 x 64 pixels.*size=\(64, 64\).*size=\(48, 64\)"):
        small_lrcn()(noise(1, 3, 2, 48, 64))
    for option, value in (
        ("pooling", "mean"),
        ("inference", "mean"),
        ("encoder", "vgg"),
        ("kernels", 0),
        ("layers", 0),
        ("window", 0),
    ):
        pooling = OPTIONS.get(option, ["conv"])[0]
        with pytest.raises(ValueError, match=f"{option}={value!r} (must be|is not known)"):
            snippets(**{"pooling": pooling, option: value})
    with pytest.raises(ValueError, match="stride=5 must be at most window=4"):
        snippets("slow", stride=5)
    with pytest.raises(ValueError, match="width=8 belongs to 'alexnet'"):
        snippets("conv", width=8)
    with pytest.raises(ValueError, match=r"encoder=Flatten returns \(2, 48\)"):
        snippets("conv", encoder=nn.Flatten())
    with pytest.raises(ValueError, match=r"clips of 12 frames have 5 windows.*frames=8; build .* frames=12"):
        snippets("local")(noise(1, 2, 12, 4, 6))
    with pytest.raises(ValueError, match="clips of 3 frames are shorter than window=4"):
        snippets("time_domain")(noise(1, 2, 3, 4, 6))


@pytest.mark.parametrize(
    ("pooling", "option", "value", "where"),
    [
        ("conv", "hidden", -3, "'lstm'"),
        ("conv", "layers", "x", "'lstm'"),
        ("late", "inference", "max", "'lstm'"),
        ("conv", "peepholes", True, "'lstm'"),
        ("lstm", "kernels", 8, "'time_domain'"),
        ("conv", "window", 4, "'slow' and 'local' and 'time_domain'"),
        ("lstm", "stride", 2, "'slow' and 'local' and 'time_domain'"),
    ],
)
def test_options_of_other_poolings_are_refused(pooling, option, value, where):
    with pytest.raises(
        ValueError, match=f"{option}={value!r} is an option of {where}; pooling={pooling!r} has"
    ):
        snippets(pooling, **{option: value})


def test_every_option_of_a_pooling_is_known():
    defaults = BeyondShortSnippets.__init__.__kwdefaults__
    assert set(OPTIONS) < set(defaults)
    assert {pooling for poolings in OPTIONS.values() for pooling in poolings} < set(POOLINGS)
    assert set(defaults) - set(OPTIONS) == {
        *("input", "pooling", "encoder", "width", "fc", "size", "frames", "dropout")
    }


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("fc", 4, "fc=4 must hold the widths of the layers"),
        ("fc", "4096", "fc='4096' must hold the widths of the layers"),
        ("fc", (4, 2.5), "fc=2.5 must be a whole number"),
        ("size", 67.0, "size=67.0 must be one number or a pair"),
        ("size", None, "size=None must be one number or a pair"),
        ("size", "67", "size='67' must be one number or a pair"),
        ("size", True, "size=True must be a whole number"),
        ("frames", 0, "frames=0 must be a whole number"),
    ],
)
def test_values_of_another_kind_are_named(option, value, message):
    with pytest.raises(ValueError, match=message):
        snippets("conv", **{option: value})
    if option == "size":
        with pytest.raises(ValueError, match=message):
            LRCN(3, width=8, fc6=8, size=value)


def test_windows_that_would_lose_frames_are_refused():
    for window, stride in ((2, 4), (1, 2)):
        with pytest.raises(ValueError, match=f"stride={stride} must be at most window={window}"):
            window_maxima(noise(1, 8, 3, 2, 2), window, stride)
    with pytest.raises(ValueError, match="window=0 must be a whole number"):
        window_maxima(noise(1, 8, 3, 2, 2), 0, 1)
    with pytest.raises(ValueError, match="stride=0 must be a whole number"):
        window_maxima(noise(1, 8, 3, 2, 2), 1, 0)


def test_clips_too_short_for_the_convolution_over_time_are_refused_before_they_come():
    with pytest.raises(ValueError, match="clips of 3 frames are shorter than window=4"):
        snippets("time_domain", frames=3)


def test_clips_of_any_length_where_the_architecture_allows_it():
    for pooling in ("conv", "late", "slow", "time_domain", "lstm"):
        model = snippets(pooling)
        for T in (4, 5, 13):
            assert model(noise(2, 2, T, 4, 6)).shape == (2, 3)
    assert snippets("slow")(noise(2, 2, 1, 4, 6)).shape == (2, 3)


# Learning

BUILD = {"width": 8, "size": 64, "dropout": 0.0}
CLIP = {"frames": 6, "fc": (32, 32)}
SMALL = {
    "lrcn": lambda: LRCN(2, fc6=32, hidden=16, fc6_dropout=0.0, **BUILD),
    "inception, lstm": lambda: BeyondShortSnippets(
        2, pooling="lstm", encoder="inception", hidden=16, layers=2, **{**BUILD, "size": 32}
    ),
    **{
        pooling: lambda pooling=pooling: BeyondShortSnippets(
            2,
            pooling=pooling,
            **BUILD,
            **CLIP,
            **own(pooling, window=4, stride=2, kernels=16, hidden=16),
        )
        for pooling in POOLINGS
    },
    "peepholes": lambda: BeyondShortSnippets(
        2, pooling="lstm", hidden=16, layers=2, peepholes=True, **BUILD, **CLIP
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_learn_eight_clips_by_heart(name):
    with seeded(0):
        model = SMALL[name]()
        x, labels = noise(8, 3, 6, *model.size), torch.arange(8) % 2
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        least = 60 if "inception" in name else 0  # the running statistics of its normalisations lag behind
        for step in range(100):
            optimizer.zero_grad()
            loss = model.loss(x, labels)
            loss.backward()
            assert all(weight.grad is not None for weight in model.parameters())
            optimizer.step()
            if step >= least and loss < 0.05:
                break
    with torch.no_grad():
        assert (model.eval()(x).argmax(1) == labels).all()
