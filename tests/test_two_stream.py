"""Two streams: the paper's layers and counts, what each stream sees, both fusions, small ones learn."""

import numpy as np
import pytest
import torch
from torch import nn

from nlutils.study import multiply_adds, seeded
from nlutils.torch.models.two_stream import (
    CNNM2048,
    SVMFusion,
    TwoStream,
    frames_and_stacks,
    stacked_scores,
)
from nlutils.video.flow_stacks import as_channels, as_clip

torch.set_num_threads(1)


def parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def on_meta(kind, *args, **options):
    with torch.device("meta"):
        return kind(*args, **options).eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(num_classes=3, **options):
    with seeded(0):
        return TwoStream(num_classes, **{"width": 6, "size": (41, 48), "stack": 2, "dropout": 0.0} | options)


# The paper


def test_parameters():
    """By arithmetic: 90.6 M for the 101 classes of UCF101; 92,469,864 for ImageNet's 1000."""
    model = on_meta(TwoStream, 101)
    layers = [(3, 96, 49), (96, 256, 25), (256, 512, 9), (512, 512, 9), (512, 512, 9)]
    layers += [(512 * 6 * 6, 4096, 1), (4096, 2048, 1), (2048, 101, 1)]
    by_hand = sum(inputs * outputs * places + outputs for inputs, outputs, places in layers)
    assert parameters(model.spatial) == by_hand == 90_627_813
    assert parameters(model.temporal) == by_hand + 17 * 96 * 49 == 90_707_781
    assert parameters(on_meta(CNNM2048, 3, 1000)) == 92_469_864


def test_layer_table():
    """Figure 1 with the pools of section 5 (3x3, stride 2) at 224 x 224: 109, 54, 26, 13, 13, 6 a side."""
    expected = {
        "conv1": (96, 109),
        "pool1": (96, 54),
        "conv2": (256, 26),
        "pool2": (256, 13),
        "conv3": (512, 13),
        "conv4": (512, 13),
        "conv5": (512, 13),
        "pool5": (512, 6),
    }
    model = on_meta(TwoStream, 101)
    for stream, channels in ((model.spatial, 3), (model.temporal, 20)):
        x, shapes, kinds = torch.empty(1, channels, 224, 224, device="meta"), {}, {}
        for name, layer in stream.layers():
            x = layer(x.flatten(1) if name == "fc6" else x)
            shapes[name], kinds[name] = tuple(x.shape[1:]), layer
        assert {name: shapes[name] for name in expected} == {
            name: (maps, side, side) for name, (maps, side) in expected.items()
        }
        assert [shapes[name] for name in ("fc6", "fc7", "classifier")] == [(4096,), (2048,), (101,)]
        convolutions = [layer for layer in kinds.values() if isinstance(layer, nn.Conv2d)]
        kernels = [(layer.kernel_size[0], layer.stride[0]) for layer in convolutions]
        assert kernels == [(7, 2), (5, 2), (3, 1), (3, 1), (3, 1)]
        pools = [layer for layer in kinds.values() if isinstance(layer, nn.MaxPool2d)]
        assert [(pool.kernel_size, pool.stride) for pool in pools] == 3 * [(3, 2)]
    # "We removed the second normalisation layer from the latter", section 5.
    norms = [
        [name for name, layer in stream.layers() if isinstance(layer, nn.LocalResponseNorm)]
        for stream in (model.spatial, model.temporal)
    ]
    assert norms == [["norm1", "norm2"], ["norm1"]]


@pytest.mark.parametrize(("channels", "gmacs"), [(3, 1.664), (20, 2.614)])
def test_multiply_adds(channels, gmacs):
    """1.664 G multiply-adds of a frame, 2.614 G of a stack; 101 classes."""
    model = on_meta(CNNM2048, channels, 101)
    x = torch.empty(1, channels, 224, 224, device="meta")
    assert round(multiply_adds(model, x) / 1e9, 3) == gmacs


def test_response_normalisation_is_krizhevskys():
    """b = a / (2 + 1e-4 * (sum of a^2 over five neighbouring maps))^0.75."""
    layer = dict(on_meta(CNNM2048, 3, 2).layers())["norm1"]
    a = 100 * noise(1, 8, 2, 2)
    b = torch.empty_like(a)
    for i in range(8):
        neighbours = a[:, max(0, i - 2) : i + 3]
        b[:, i] = a[:, i] / (2 + 1e-4 * (neighbours**2).sum(dim=1)) ** 0.75
    torch.testing.assert_close(layer(a), b)


def test_weights_start_as_in_he_et_al():
    """N(0, 2 / fan-in) in front of a ReLU, N(0, 1 / fan-in) in the classifier, biases 0."""
    with seeded(0):
        model = CNNM2048(3, 50, width=24, size=(64, 64))
    layers = [(name, layer) for name, layer in model.layers() if hasattr(layer, "bias")]
    assert len(layers) == 8
    for name, layer in layers:
        gain = 1 if name == "classifier" else 2
        scaled = layer.weight * (layer.weight[0].numel() / gain) ** 0.5
        assert abs(scaled.std().item() - 1) < 0.03, name
        assert abs(scaled.mean().item()) < 0.03, name
        assert scaled.abs().max() > 3, name  # a Gaussian, not a uniform distribution
        assert not layer.bias.any(), name


@pytest.mark.parametrize(
    "options", [{"width": 48}, {"size": (64, 64)}, {"stack": 5}, {"width": 48, "size": (64, 64)}]
)
def test_recipe_facts_are_of_the_published_size_and_width_alone(options):
    assert on_meta(TwoStream, 101, **options).expects is None


def test_recipe_facts():
    rgb, flow = on_meta(TwoStream, 101).expects
    assert (rgb.frames, flow.frames, rgb.size, flow.size) == (1, 10, (224, 224), (224, 224))
    assert (flow.mean, flow.std) == ((0, 0), (1, 1))
    assert "mean vector of each field subtracted" in flow.source
    assert small().expects is None


# What the streams see


def test_the_temporal_stream_gets_the_papers_channels():
    stacks = noise(2, 3, 4, 5, 2).numpy()  # S = 2, L = 3
    flow = torch.from_numpy(as_clip(stacks))[None]
    frames, cut = frames_and_stacks(noise(1, 3, 2, 4, 5), flow, 3)
    assert frames.shape == (1, 3, 2, 4, 5)
    assert cut.shape == (1, 6, 2, 4, 5)
    for s in range(2):
        assert np.array_equal(cut[0, :, s].numpy(), as_channels(stacks[s]))


def test_forward_is_the_mean_of_the_streams_mean_probabilities():
    model = small().eval()
    rgb, flow = noise(2, 3, 8, 41, 48), noise(2, 2, 4, 41, 48, seed=1)
    spatial = [model.spatial(rgb[:, :, t]).softmax(1) for t in (2, 6)]
    temporal = []
    for start in (0, 2):
        channels = [flow[:, part, start + k] for k in range(2) for part in range(2)]  # dx, dy, dx, dy
        temporal.append(model.temporal(torch.stack(channels, dim=1)).softmax(1))
    spatial, temporal = sum(spatial) / 2, sum(temporal) / 2
    torch.testing.assert_close(model((rgb, flow)).exp(), (spatial + temporal) / 2)
    for ours, expected in zip(model.probabilities((rgb, flow)), (spatial, temporal), strict=True):
        torch.testing.assert_close(ours, expected)


def test_each_stream_has_its_own_loss_and_no_gradient_from_the_other():
    model = small()
    x, labels = (noise(2, 3, 1, 41, 48), noise(2, 2, 2, 41, 48)), torch.tensor([0, 2])
    spatial, temporal = model.losses(x, labels)
    torch.testing.assert_close(model.loss(x, labels), spatial + temporal)
    frame = nn.functional.cross_entropy(model.spatial(x[0][:, :, 0]), labels)
    torch.testing.assert_close(spatial, frame)
    spatial.backward()
    assert all(weight.grad is None for weight in model.temporal.parameters())
    assert all(weight.grad is not None for weight in model.spatial.parameters())


def test_dropout_is_one_number_or_one_a_stream():
    published = on_meta(TwoStream, 2)
    assert (published.spatial.dropout.p, published.temporal.dropout.p) == (0.5, 0.9)
    assert small(dropout=0.25).temporal.dropout.p == 0.25
    assert small(dropout=(0.0, 0.5)).spatial.dropout.p == 0.0


@pytest.mark.parametrize("size", [(41, 41), (48, 64), (57, 90), (100, 41)])
def test_other_sizes_work_when_the_network_is_made_for_them(size):
    model = small(size=size).eval()
    assert model((noise(1, 3, 2, *size), noise(1, 2, 4, *size))).shape == (1, 3)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="width=16 must be a multiple of 3"):
        TwoStream(3, width=16)
    with pytest.raises(ValueError, match=r"size=\(40, 64\) is too small.*41"):
        small(size=(40, 64))
    with pytest.raises(ValueError, match="size=64 must be a pair"):
        small(size=64)
    with pytest.raises(ValueError, match="stack=0"):
        small(stack=0)
    with pytest.raises(ValueError, match="dropout='much'"):
        small(dropout="much")
    with pytest.raises(ValueError, match=r"dropout=\(0.5,\) must be a number, or two"):
        small(dropout=(0.5,))
    with pytest.raises(ValueError, match="dropout=True must be a number from 0 to 1"):
        small(dropout=(0.5, True))
    with pytest.raises(ValueError, match=r"x of shape \(1, 2, 41, 48\) must be \(B, 3, 41, 48\)"):
        small().spatial(noise(1, 2, 41, 48))
    with pytest.raises(ValueError, match=r"must be \(B, 3, 41, 48\).*size=\(H, W\)"):
        small()((noise(1, 3, 2, 48, 48), noise(1, 2, 4, 48, 48)))
    with pytest.raises(ValueError, match="flow has 1 fields; stack=2"):
        small()((noise(1, 3, 2, 41, 48), noise(1, 2, 1, 41, 48)))


def test_a_small_one_learns_eight_clips_by_heart():
    model = small(2)
    x, labels = (noise(8, 3, 2, 41, 48), noise(8, 2, 4, 41, 48, seed=1)), torch.arange(8) % 2
    with seeded(0):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            model.loss(x, labels).backward()
            optimizer.step()
    model.eval()
    for probabilities in (*model.probabilities(x), model(x).exp()):
        assert (probabilities.argmax(1) == labels).all()
    assert model.loss(x, labels) < 0.1


# Fusion by an SVM


def test_stacked_scores_are_unit_vectors_side_by_side():
    stacked = stacked_scores([[[0.6, 0.8], [1.0, 0.0]], torch.tensor([[0.5, 0.5], [0.0, 1.0]])])
    half = 0.5**0.5
    np.testing.assert_allclose(stacked, [[0.6, 0.8, half, half], [1, 0, 0, 1]])
    with pytest.raises(ValueError, match=r"streams of shapes \[\(1, 2\), \(1, 3\)\]"):
        stacked_scores([np.ones((1, 2)), np.ones((1, 3))])


def votes(labels, num_classes, sure, rng):
    """Class probabilities that are right for a share `sure` of the clips, and peaked all the same."""
    said = np.where(rng.random(len(labels)) < sure, labels, rng.integers(num_classes, size=len(labels)))
    scores = rng.random((len(labels), num_classes))
    scores[np.arange(len(labels)), said] += 4
    return scores / scores.sum(axis=1, keepdims=True)


def test_the_svm_trusts_the_stream_that_is_right():
    """Averaging listens to a stream of noise as much as to a good one; the SVM finds out."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=400)
    good, bad = votes(labels, 4, 0.9, rng), votes(labels, 4, 0.0, rng)
    fusion = SVMFusion().fit([bad[:200], good[:200]], labels[:200])
    scores = fusion.scores([bad[200:], good[200:]])
    assert scores.shape == (200, 4)
    right = {
        "average": ((good + bad)[200:].argmax(1) == labels[200:]).mean(),
        "svm": (scores.argmax(1) == labels[200:]).mean(),
        "good": (good[200:].argmax(1) == labels[200:]).mean(),
    }
    assert right["svm"] > right["average"] + 0.1
    assert right["svm"] > right["good"] - 0.02


def test_the_svm_is_crammer_and_singers():
    """Its margins obey the definition: at the optimum no small change of the weights lowers the cost."""
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=60)
    streams = [votes(labels, 3, 0.6, rng), votes(labels, 3, 0.5, rng)]
    svm = SVMFusion(cost=0.5).fit(streams, labels)
    features = np.hstack([stacked_scores(streams), np.ones((60, 1))])
    weights = np.hstack([svm._svm.coef_, svm._svm.intercept_[:, None]])
    np.testing.assert_allclose(svm.scores(streams), features @ weights.T)

    def cost(weights):
        scores = features @ weights.T
        own = scores[np.arange(60), labels][:, None]
        margins = scores - own + (np.arange(3) != labels[:, None])
        return (weights**2).sum() / 2 + 0.5 * margins.max(axis=1).sum()

    least = cost(weights)
    for _ in range(200):
        assert cost(weights + 1e-2 * rng.standard_normal(weights.shape)) > least - 1e-3


def test_two_classes_and_classes_never_seen():
    rng = np.random.default_rng(2)
    labels = rng.integers(2, size=80)
    streams = [votes(labels, 2, 0.9, rng), votes(labels, 2, 0.9, rng)]
    scores = SVMFusion().fit(streams, labels).scores(streams)
    assert scores.shape == (80, 2)
    assert (scores.argmax(1) == labels).mean() > 0.85
    three = [np.hstack([stream, np.zeros((80, 1))]) for stream in streams]
    scores = SVMFusion().fit(three, labels + (labels == 1)).scores(three)  # classes 0 and 2
    assert np.isneginf(scores[:, 1]).all()
    assert set(scores.argmax(1)) == {0, 2}


def test_wrong_use_of_the_svm_is_named():
    streams = [np.full((4, 2), 0.5)] * 2
    with pytest.raises(RuntimeError, match="call fit first"):
        SVMFusion().scores(streams)
    for labels, message in (
        ([1, 1, 1, 1], r"labels hold \[1\]; they must hold two or more of 0 to 1"),
        ([0, 1], r"labels have shape \(2,\); they must be \(4,\), one a clip"),
        ([0, 1, -1, 0], r"labels hold \[-1, 0, 1\]"),
        ([0, 1, 9, 0], r"labels hold \[0, 1, 9\]"),
        ([0.0, 1.0, 0.0, 1.0], "labels are float64; they must be whole numbers, 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SVMFusion().fit(streams, labels)
    with pytest.raises(ValueError, match="cost=-1 must be a finite number above 0"):
        SVMFusion(cost=-1)
    assert SVMFusion().cost == 1.0


@pytest.mark.parametrize("wrong", [0.0, np.nan, np.inf])
def test_rows_without_a_length_are_named(wrong):
    good, bad = np.full((4, 2), 0.5), np.full((4, 2), 0.5)
    bad[2] = wrong
    message = rf"streams\[1\]\[2\]=\[{wrong}, {wrong}\] must be class probabilities"
    with pytest.raises(ValueError, match=message):
        SVMFusion().fit([good, bad], [0, 1, 0, 1])
    fusion = SVMFusion().fit([good, good], [0, 1, 0, 1])
    with pytest.raises(ValueError, match=message):
        fusion.scores([good, bad])
