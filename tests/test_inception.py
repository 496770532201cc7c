"""The systems of "Quo vadis": counts and shapes as published, "SAME" padding by hand, inflation, learning."""

import pytest
import torch
from torch import nn

from nlutils.study import seeded
from nlutils.study.cost import multiply_adds, parameters
from nlutils.torch.models.inception import (
    BatchNormLSTM,
    FusedTwoStream,
    I3DInception,
    InceptionLSTM,
    InceptionV1,
    TwoStreamI3D,
    TwoStreamInception,
    cut_snapshots,
    same_padding,
)
from nlutils.torch.models.inception_v1 import SameConv3d, SameMaxPool3d

torch.set_num_threads(1)
CHANNELS = {"rgb": 3, "flow": 2}


def on_meta(network, *args, **options):
    with torch.device("meta"):
        return network(*args, **options).eval()


def meta_clip(*shape):
    return torch.empty(shape, device="meta")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The paper's numbers


@pytest.mark.parametrize(
    ("input", "norm_gain", "count"),
    [
        # Counted in piergiaj/pytorch-i3d, which has gains.
        ("rgb", True, 12_697_264),
        ("flow", True, 12_675_312),
        # The released TensorFlow weights lack the 7,280 gains.
        ("rgb", False, 12_689_984),
        ("flow", False, 12_668_032),
    ],
)
def test_i3d_has_the_published_number_of_parameters(input, norm_gain, count):
    assert parameters(on_meta(I3DInception, 400, input=input, norm_gain=norm_gain)) == count


def test_i3d_costs_the_published_multiply_adds():
    """111.153 and 102.341 G for 64 frames of 224 x 224, counted in piergiaj/pytorch-i3d."""
    for input, giga in (("rgb", 111.153), ("flow", 102.341)):
        model = on_meta(I3DInception, 400, input=input)
        macs = multiply_adds(model, meta_clip(1, CHANNELS[input], 64, 224, 224))
        assert round(macs / 1e9, 3) == giga


def test_i3d_has_the_published_shapes():
    """Figure 3 of the paper; C x T x H x W at 3 x 64 x 224 x 224, from the authors' and piergiaj's code."""
    expected = {
        "Conv3d_1a_7x7": (64, 32, 112, 112),
        "MaxPool3d_2a_3x3": (64, 32, 56, 56),
        "Conv3d_2b_1x1": (64, 32, 56, 56),
        "Conv3d_2c_3x3": (192, 32, 56, 56),
        "MaxPool3d_3a_3x3": (192, 32, 28, 28),
        "Mixed_3b": (256, 32, 28, 28),
        "Mixed_3c": (480, 32, 28, 28),
        "MaxPool3d_4a_3x3": (480, 16, 14, 14),
        "Mixed_4b": (512, 16, 14, 14),
        "Mixed_4c": (512, 16, 14, 14),
        "Mixed_4d": (512, 16, 14, 14),
        "Mixed_4e": (528, 16, 14, 14),
        "Mixed_4f": (832, 16, 14, 14),
        "MaxPool3d_5a_2x2": (832, 8, 7, 7),
        "Mixed_5b": (832, 8, 7, 7),
        "Mixed_5c": (1024, 8, 7, 7),
    }
    model, x = on_meta(I3DInception, 400), meta_clip(1, 3, 64, 224, 224)
    assert model.windows(x).shape == (1, 400, 7, 1, 1)
    assert model(x).shape == (1, 400)
    shapes = {}
    for name, layer in model.features.named_children():
        x = layer(x)
        shapes[name] = tuple(x.shape[1:])
    assert shapes == expected
    assert list(shapes) == list(expected)


@pytest.mark.parametrize(
    ("network", "count", "paper"),
    [
        (InceptionLSTM, 8_958_000, 9),
        (TwoStreamInception, 12_073_120, 12),
        (TwoStreamI3D, 25_372_576, 25),
    ],
)
def test_table_1_of_the_paper(network, count, paper):
    assert parameters(on_meta(network, 400)) == count
    assert round(count / 1e6) == paper


def test_table_1_of_the_paper_where_it_does_not_round():
    """3D-Fused: 39 M in the paper. The described layers make 39.77: 39 when cut off, 40 when rounded."""
    model = on_meta(FusedTwoStream, 400)
    trunks = parameters(model.rgb) + parameters(model.flow)
    assert trunks == 2 * parameters(model.rgb) + 17 * 64 * 7 * 7  # flow: 20 channels in place of 3
    convolution = 27 * 2048 * 512 + 2 * 512  # and its normalisation
    assert parameters(model) == trunks + convolution + 513 * 400 == 39_770_896
    assert parameters(model) // 10**6 == 39


def test_lstm_counts():
    """Of the LSTM with batch normalisation, by its equations."""
    weights = 4 * 512 * (1024 + 512)
    vectors = 3 * 4 * 512 + 2 * 512  # bias and two gains of the gates; gain and bias of the cell
    assert parameters(on_meta(BatchNormLSTM, 1024, 512)) == weights + vectors
    trunk = parameters(on_meta(InceptionV1, 3, inflated=False))
    assert parameters(on_meta(InceptionLSTM, 400)) == trunk + weights + vectors + 513 * 400


def test_fused_stream_grids_are_5_by_7_by_7():
    """Section 2.3 of the paper: 5 RGB frames and 50 flow fields; the pooling's stride is ours."""
    model = on_meta(FusedTwoStream, 400)
    x = meta_clip(1, 3, 5, 224, 224), meta_clip(1, 2, 50, 224, 224)
    rgb, flow = model.features(x)
    assert rgb.shape == flow.shape == (1, 1024, 5, 7, 7)
    fused = model.fusion(torch.cat([rgb, flow], dim=1))
    assert fused.shape == (1, 512, 5, 7, 7)
    assert model.pool(fused).shape == (1, 512, 3, 4, 4)
    assert model(x).shape == (1, 400)


# "SAME" padding


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (224, 7, 2, (2, 3)),  # 112 windows, the last from 222 to 228 before the shift: 5 zeros
        (225, 7, 2, (3, 3)),  # 113 windows, the last from 224 to 230: 6 zeros
        (112, 3, 2, (0, 1)),
        (113, 3, 2, (1, 1)),
        (14, 2, 2, (0, 0)),
        (7, 2, 2, (0, 1)),
        (9, 3, 1, (1, 1)),
        (8, 3, 1, (1, 1)),
        (1, 7, 2, (3, 3)),
        (5, 1, 2, (0, 0)),
    ],
)
def test_same_padding_by_hand(size, kernel, stride, padding):
    assert same_padding(size, kernel, stride) == padding


def windows_by_hand(x, kernel, stride, outside):
    """TensorFlow's rule in words: ceil(n / stride) windows, the lacking places shared, the odd one behind."""
    n = len(x)
    count = (n + stride - 1) // stride
    lacking = max(kernel - stride, 0) if n % stride == 0 else max(kernel - n % stride, 0)
    first = -(lacking // 2)
    return [
        [x[i] if 0 <= i < n else outside for i in range(first + j * stride, first + j * stride + kernel)]
        for j in range(count)
    ]


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 8])
@pytest.mark.parametrize(("edge", "stride"), [(7, 2), (3, 2), (2, 2), (3, 1)])
def test_same_layers_see_tensorflows_windows(axis, size, edge, stride):
    shape, kernel, strides = [1] * 5, [1] * 3, [1] * 3
    shape[axis], kernel[axis - 2], strides[axis - 2] = size, edge, stride
    values = noise(size) - 5  # all negative: a zero from the padding would win
    x = values.reshape(shape)
    pool = SameMaxPool3d(tuple(kernel), tuple(strides))
    expected = [max(window) for window in windows_by_hand(values.tolist(), edge, stride, -float("inf"))]
    torch.testing.assert_close(pool(x).flatten(), torch.tensor(expected))
    conv = SameConv3d(1, 1, tuple(kernel), tuple(strides), bias=False)
    expected = torch.tensor(windows_by_hand(values.tolist(), edge, stride, 0.0)) @ conv.weight.flatten()
    torch.testing.assert_close(conv(x).flatten(), expected)


# The networks


def test_i3d_state_dict_names():
    names = set(on_meta(I3DInception, 5).state_dict())
    unit = ("conv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    units = ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"]
    for mixed in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"):
        branches = ("branch0", "branch1.0", "branch1.1", "branch2.0", "branch2.1", "branch3.1")
        units += [f"Mixed_{mixed}.{branch}" for branch in branches]
    expected = {f"features.{name}.{part}" for name in units for part in (*unit, "norm.num_batches_tracked")}
    assert names == expected | {"logits.weight", "logits.bias"}
    assert len(names) == 344  # as in the published PyTorch weights
    released = set(on_meta(I3DInception, 5, norm_gain=False).state_dict())
    assert released == {name for name in names if not name.endswith("norm.weight")}


def test_a_gain_of_one_is_no_gain():
    with seeded(0):
        gained, plain = I3DInception(3, width=8).eval(), I3DInception(3, width=8, norm_gain=False).eval()
    missing, unexpected = plain.load_state_dict(
        {k: v for k, v in gained.state_dict().items() if not k.endswith("norm.weight")}
    )
    assert not missing
    assert not unexpected
    x = noise(2, 3, 8, 32, 32)
    torch.testing.assert_close(gained(x), plain(x))


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 33, 47), (16, 64, 32)])
def test_i3d_takes_any_size(size):
    model = I3DInception(3, width=8).eval()
    assert model(noise(1, 3, *size)).shape == (1, 3)


def test_2d_inception_sees_every_frame_alone():
    model = InceptionV1(3, width=8, inflated=False).eval()
    x = noise(2, 3, 4, 48, 64)
    together = model(x)
    assert together.shape == (2, model.out_channels, 4, 2, 2)
    alone = torch.cat([model(x[:, :, [t]]) for t in range(4)], dim=2)
    torch.testing.assert_close(together, alone)


def test_inflated_inception_repeats_the_2d_answer_on_a_repeated_frame():
    """Section 2.4, the boring video: weights repeated in time and divided by their number.

    Of the 16 steps of Mixed_3c, 4 to 10 see no zeros from beyond the clip's ends; the first one does.
    """
    with seeded(0):
        flat, deep = InceptionV1(3, width=8, inflated=False).eval(), InceptionV1(3, width=8).eval()
        for layer in flat.modules():
            if isinstance(layer, nn.BatchNorm3d):  # so that padding with zeros is not the mean by chance
                nn.init.normal_(layer.running_mean, std=0.1)
    weights = {}
    for name, weight in deep.state_dict().items():
        known = flat.state_dict()[name]
        repeats = weight.shape[2] if weight.ndim == 5 else 1
        weights[name] = known.repeat(1, 1, repeats, 1, 1) / repeats if repeats > 1 else known
    deep.load_state_dict(weights)
    frame = noise(1, 3, 1, 32, 32)
    one, clip = frame, frame.repeat(1, 1, 32, 1, 1)
    for (name, layer), inflated in zip(flat.named_children(), deep.children(), strict=True):
        one, clip = layer(one), inflated(clip)
        if name == "Mixed_3c":
            break
    assert clip.shape[2] == 16
    torch.testing.assert_close(clip[:, :, 4:11], one.repeat(1, 1, 7, 1, 1))
    assert not torch.allclose(clip[:, :, :1], one, atol=1e-3)


def test_two_stream_i3d_sums_logits_or_averages_probabilities():
    with seeded(0):
        model = TwoStreamI3D(4, width=8).eval()
    x = noise(2, 3, 8, 32, 32), noise(2, 2, 8, 32, 32)
    rgb, flow = model.rgb(x[0]), model.flow(x[1])
    torch.testing.assert_close(model(x), rgb + flow)
    model.fusion = "probabilities"
    torch.testing.assert_close(model(x).exp(), (rgb.softmax(1) + flow.softmax(1)) / 2)
    labels = torch.tensor([0, 3])
    expected = nn.functional.cross_entropy(rgb, labels) + nn.functional.cross_entropy(flow, labels)
    torch.testing.assert_close(model.loss(x, labels), expected)


def test_lstm_loss_is_of_all_steps_and_the_answer_of_the_last():
    with seeded(0):
        model = InceptionLSTM(4, width=8, hidden=16).eval()
    x, labels = noise(2, 3, 6, 32, 32), torch.tensor([1, 2])
    logits = model.steps(x)
    assert logits.shape == (2, 6, 4)
    torch.testing.assert_close(model(x), logits[:, 5])
    steps = [nn.functional.cross_entropy(logits[:, t], labels) for t in range(6)]
    torch.testing.assert_close(model.loss(x, labels), sum(steps) / 6)
    # What is still to come changes no step.
    torch.testing.assert_close(model.steps(x[:, :, :3]), logits[:, :3])


def test_batch_norm_lstm_without_normalisation_is_an_lstm():
    """Statistics 0 and 1 and gains 1 normalise nothing; PyTorch's gates come as i, f, g, o."""
    with seeded(0):
        ours, theirs = BatchNormLSTM(5, 3, steps=4).eval(), nn.LSTM(5, 3, batch_first=True)
    order = [0, 1, 3, 2]
    with torch.no_grad():
        for gain in (ours.input_gain, ours.state_gain, ours.cell_gain):
            gain.fill_(1.0)
        for mine, other in (
            (ours.from_input.weight, theirs.weight_ih_l0),
            (ours.from_state.weight, theirs.weight_hh_l0),
            (ours.bias, theirs.bias_ih_l0 + theirs.bias_hh_l0),
        ):
            mine.copy_(torch.cat([other.chunk(4)[gate] for gate in order]))
    x = noise(2, 6, 5)
    torch.testing.assert_close(ours(x), theirs(x)[0], atol=1e-4, rtol=1e-4)  # eps = 1e-5 is left


def test_batch_norm_lstm_starts_with_gains_of_a_tenth():
    """Cooijmans et al., Recurrent Batch Normalization, section 4."""
    lstm = BatchNormLSTM(5, 3)
    for gain in (lstm.input_gain, lstm.state_gain, lstm.cell_gain):
        assert torch.equal(gain, torch.full_like(gain, 0.1))
    assert not lstm.bias.any()
    assert not lstm.cell_bias.any()


def test_batch_norm_lstm_keeps_statistics_a_step():
    with seeded(0):
        lstm = BatchNormLSTM(5, 3, steps=4)
    x = noise(64, 2, 5) + torch.tensor([0.0, 10.0])[None, :, None]  # the second step is elsewhere
    for _ in range(100):
        lstm(x)
    with torch.no_grad():
        expected = lstm.from_input(x).mean(0)
    torch.testing.assert_close(lstm.input_mean[:2], expected, atol=1e-3, rtol=1e-3)
    # Steps never trained use the last trained one.
    for name in ("input_mean", "input_var", "state_mean", "state_var", "cell_mean", "cell_var"):
        rows = getattr(lstm, name)
        torch.testing.assert_close(rows[2:], rows[1].expand(2, -1), rtol=0, atol=0)
    in_training = lstm(x)
    torch.testing.assert_close(lstm.eval()(x), in_training, atol=0.02, rtol=0.02)
    assert lstm(noise(2, 9, 5)).shape == (2, 9, 3)
    longer = lstm.train()(noise(8, 9, 5)).sum()
    longer.backward()  # more steps than rows, through rows written to more than once
    with pytest.raises(ValueError, match="a batch of 1 clip"):
        lstm(noise(1, 2, 5))


def test_snapshots_take_the_middle_frames_and_whole_stacks():
    rgb = torch.arange(50.0).reshape(1, 1, 50, 1, 1).expand(1, 3, 50, 2, 2)
    flow = torch.stack([torch.arange(50.0), torch.arange(50.0) + 100]).reshape(1, 2, 50, 1, 1)
    flow = flow.expand(1, 2, 50, 2, 2)
    frames, stacks = cut_snapshots(rgb, flow, 10)
    assert frames[0, 0, :, 0, 0].tolist() == [5, 15, 25, 35, 45]  # 10 apart
    assert stacks.shape == (1, 20, 5, 2, 2)
    assert stacks[0, :, 2, 0, 0].tolist() == [*range(20, 30), *range(120, 130)]
    five = rgb[:, :, :5]
    assert torch.equal(cut_snapshots(five, flow, 10)[0], five)
    with pytest.raises(ValueError, match="flow has 50 fields; stack=51"):
        cut_snapshots(rgb, flow, 51)
    with pytest.raises(ValueError, match="rgb has 4 frames for 5 stacks"):
        cut_snapshots(rgb[:, :, :4], flow, 10)
    with pytest.raises(ValueError, match="must agree in batch, height and width"):
        cut_snapshots(rgb[..., :1], flow, 10)


def test_two_stream_inception_averages_probabilities():
    with seeded(0):
        model = TwoStreamInception(3, width=8, stack=4).eval()
    rgb, flow = noise(2, 3, 8, 32, 32), noise(2, 2, 8, 32, 32)
    spatial = [model.rgb_classifier(model.rgb(rgb[:, :, [t]]).mean(dim=(2, 3, 4))) for t in (2, 6)]
    temporal = []
    for start in (0, 4):
        stack = flow[:, :, start : start + 4].flatten(1, 2)[:, :, None]
        temporal.append(model.flow_classifier(model.flow(stack).mean(dim=(2, 3, 4))))
    expected = torch.stack(spatial + temporal).softmax(-1).mean(0)
    torch.testing.assert_close(model((rgb, flow)).exp(), expected)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="input='sound'"):
        I3DInception(3, input="sound")
    with pytest.raises(ValueError, match="width=0"):
        I3DInception(3, width=0)
    with pytest.raises(ValueError, match="fusion='sum'"):
        TwoStreamI3D(3, width=8, fusion="sum")
    with pytest.raises(ValueError, match="hidden=0"):
        InceptionLSTM(3, width=8, hidden=0)
    with pytest.raises(ValueError, match="stack=0"):
        TwoStreamInception(3, width=8, stack=0)
    with pytest.raises(ValueError, match="fused=0"):
        FusedTwoStream(3, width=8, fused=0)


def test_recipe_facts_travel_with_the_models():
    """Table 1 of the paper; values in [-1, 1], flow clipped to 20 pixels: deepmind/kinetics-i3d."""
    rgb, flow = on_meta(I3DInception, 5).expects, on_meta(I3DInception, 5, input="flow").expects
    assert (rgb.frames, rgb.size, rgb.stride, rgb.colour) == (64, (224, 224), 1, "RGB")
    values = torch.tensor([0.0, 1.0])
    assert ((values - rgb.mean[0]) / rgb.std[0]).tolist() == [-1, 1]
    assert (flow.mean, flow.std) == ((0, 0), (20, 20))
    assert "clipped to [-20, 20]" in flow.source
    lstm = on_meta(InceptionLSTM, 5).expects
    assert (lstm.frames, lstm.stride) == (25, 5)
    streams = {TwoStreamI3D: (64, 64), TwoStreamInception: (1, 10), FusedTwoStream: (5, 50)}
    for network, frames in streams.items():
        assert tuple(stream.frames for stream in on_meta(network, 5).expects) == frames
    for network in (I3DInception, InceptionLSTM, *streams):
        assert on_meta(network, 5, width=8).expects is None  # of no published size


SMALL = {
    "i3d_inception": lambda: I3DInception(2, width=8, dropout=0.0),
    "i3d_inception, no gain": lambda: I3DInception(2, width=8, dropout=0.0, norm_gain=False),
    "two_stream_i3d": lambda: TwoStreamI3D(2, width=8, dropout=0.0),
    "inception_lstm": lambda: InceptionLSTM(2, width=8, hidden=64, dropout=0.0),
    "two_stream_inception": lambda: TwoStreamInception(2, width=8, stack=4, dropout=0.0),
    "fused_two_stream": lambda: FusedTwoStream(2, width=8, stack=4, fused=64, dropout=0.0),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_learn_eight_clips_by_heart(name):
    with seeded(0):
        model = SMALL[name]()
        x, labels = (noise(8, 3, 8, 32, 32), noise(8, 2, 8, 32, 32, seed=1)), torch.arange(8) % 2
        x = x[0] if isinstance(model.input, str) else x
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(20):
            optimizer.zero_grad()
            model.loss(x, labels).backward()
            optimizer.step()
    # Twenty steps are few for running statistics, layer upon layer: take those of one last pass.
    for layer in model.modules():
        if isinstance(layer, (nn.BatchNorm3d, BatchNormLSTM)):
            layer.momentum = 1.0
    with torch.no_grad():
        model(x)
        assert (model.eval()(x).argmax(1) == labels).all()
