"""Trajectory-pooled deep descriptors: normalisation, pooling by hand, layer sizes, learning eight clips."""

import numpy as np
import pytest
import torch

from nlutils.torch.models import trajectory
from nlutils.torch.models.trajectory import TDD, ConvolutionalStream, normalise_maps, pool_tracks
from nlutils.video.flow import optical_flow
from nlutils.video.procedural import Actions
from nlutils.video.tracks import Limits, Tracks

torch.set_num_threads(1)
SMALL = {
    "width": 6,
    "sizes": (2.0, 1.0),
    "components": 8,
    "gaussians": 3,
    "step": 4,
    "median": 3,
    "limits": Limits(least_spread=0, least_motion=0),
    "dropout": 0.0,
}


def tracks_of(positions, start):
    """Tracks over `positions` (count, L+1, 2)."""
    positions = np.float32(positions)
    motion = np.diff(positions, axis=1)
    return Tracks(positions, motion, np.array(start, np.int64), np.ones(len(positions), np.float32))


@pytest.fixture(scope="module")
def eight():
    """Eight clips as networks see them, and their labels."""
    actions = Actions(12, frames=17, size=(45, 60), seed=1)
    clips = [actions[index] for index in range(8)]
    rgb = np.stack([clip.frames[:16].transpose(3, 0, 1, 2) for clip in clips])
    flow = [optical_flow(clip.frames, subtract_median=True).transpose(3, 0, 1, 2) for clip in clips]
    x = (torch.from_numpy(rgb).float() / 255 - 0.45) / 0.225, torch.from_numpy(np.stack(flow))
    return x, torch.tensor([clip.label for clip in clips])


def test_maps_are_normalised_by_hand():
    maps = torch.tensor(
        [[[[1.0, 2.0]], [[0.0, 8.0]]], [[[4.0, 0.0]], [[2.0, 0.0]]]]
    )  # (T, C, h, w) = 2, 2, 1, 2
    over_space_and_time = torch.tensor([[[[0.25, 0.5]], [[0.0, 1.0]]], [[[1.0, 0.0]], [[0.25, 0.0]]]])
    over_channels = torch.tensor([[[[1.0, 0.25]], [[0.0, 1.0]]], [[[1.0, 0.0]], [[0.5, 0.0]]]])
    assert torch.equal(normalise_maps(maps, "spatiotemporal"), over_space_and_time)
    assert torch.equal(normalise_maps(maps, "channel"), over_channels)
    with pytest.raises(ValueError, match="kind='layer' is not known; use one of 'spatiotemporal', 'channel'"):
        normalise_maps(maps, "layer")


def test_maps_are_summed_along_tracks_by_hand():
    # Channel 0 tells where it is: 100 t + 10 y + x; channel 1 counts.
    t, y, x = np.meshgrid(np.arange(3), np.arange(2), np.arange(3), indexing="ij")
    maps = torch.from_numpy(np.stack([100 * t + 10 * y + x, np.ones_like(t)], axis=1)).float()
    positions = [
        [[0, 0], [7.9, 3], [8, 5]],  # r = 16, 8: columns 0 and 0 (0.49), rows 0 and 0 (0.375)
        [[8, 4], [24, 12], [0, 0]],  # 0.5 is rounded up: (1, 1); 1.5 and 1.5: (2, 2), row 1 is the last
        [[47, 15], [47, 15], [0, 0]],  # 2.94: 3, column 2 is the last; 1.9: row 1
    ]
    pooled = pool_tracks(maps, tracks_of(positions, [0, 1, 1]), (16, 8))
    expected = [[0 + 100, 2], [(100 + 10 + 1) + (200 + 10 + 2), 2], [(100 + 10 + 2) + (200 + 10 + 2), 2]]
    assert torch.equal(pooled, torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(
        pool_tracks(maps, tracks_of(positions, [0, 0, 0]), 8.0)[0], torch.tensor([0 + 101.0, 2])
    )
    assert pool_tracks(maps, tracks_of(np.zeros((0, 3, 2)), []), 8).shape == (0, 2)
    with pytest.raises(ValueError, match="there are maps of 3 frames; the tracks need 4"):
        pool_tracks(maps, tracks_of(positions, [0, 1, 2]), 8)


def test_streams_have_the_released_layers():
    # wanglimin/TDD, model_proto/spatial_net_scale_3.prototxt and temporal_net_scale_3.prototxt
    with torch.device("meta"):
        model = TDD(101)
        picture = torch.zeros(1, 3, 240, 320)
        flow = torch.zeros(1, 20, 240, 320)
    expected = {
        "conv1": (96, 120, 160),
        "conv2": (256, 30, 40),
        "conv3": (512, 15, 20),
        "conv4": (512, 15, 20),
        "conv5": (512, 15, 20),
    }
    assert {name: tuple(maps.shape[1:]) for name, maps in model.spatial.maps(picture).items()} == expected
    assert {name: tuple(maps.shape[1:]) for name, maps in model.temporal.maps(flow).items()} == expected

    def convolutions(stream):
        return sum(w.numel() for name, w in stream.named_parameters() if name.startswith("conv"))

    # 7 7 C 96 + 96, 5 5 96 256 + 256, 3 3 256 512 + 512 and twice 3 3 512 512 + 512
    assert convolutions(model.spatial) == 14_208 + 614_656 + 1_180_160 + 2 * 2_359_808 == 6_528_640
    assert convolutions(model.temporal) == 94_176 + 614_656 + 1_180_160 + 2 * 2_359_808 == 6_608_608


@pytest.mark.parametrize(
    ("size", "released"),
    # x and y, of the five sizes of the picture (wanglimin/TDD, script_demo.m); the last y is printed there
    # as 34.2587, which is no 240 / 7
    [
        ((480, 640), (8, 8)),
        ((340, 454), (11.4286, 11.4286)),
        ((240, 320), (16, 16)),
        ((170, 227), (22.8571, 24)),
        ((120, 160), (32, 34.2857)),
    ],
)
def test_ratios_of_clip_and_maps_are_the_released(size, released):
    with torch.device("meta"):
        height, width = ConvolutionalStream(3, 2).maps(torch.zeros(1, 3, *size))["conv5"].shape[-2:]
    assert (320 / width, 240 / height) == pytest.approx(released, abs=1e-4)


def test_stacks_of_flow_interleave_x_and_y_and_repeat_the_last():
    model = TDD(2, **SMALL, stack=3)
    flow = torch.arange(8.0).reshape(1, 2, 4, 1, 1)  # dx: 0 1 2 3, dy: 4 5 6 7
    stacks = model._stacks(flow)[0, :, :, 0, 0].T.tolist()
    assert stacks == [[0, 4, 1, 5, 2, 6], [1, 5, 2, 6, 3, 7], [2, 6, 3, 7, 3, 7], [3, 7, 3, 7, 3, 7]]


def test_descriptors_have_a_row_a_track_and_size(eight):
    x, _ = eight
    model = TDD(6, **SMALL)
    described = model.describe(x)
    assert len(described) == 8
    for clip, rgb in zip(described, x[0], strict=True):
        tracks = model.tracks(rgb)
        assert len(tracks) > 10
        assert list(clip) == [
            f"{layer}.{kind}"
            for layer in ("spatial.conv4", "spatial.conv5", "temporal.conv3", "temporal.conv4")
            for kind in ("spatiotemporal", "channel")
        ]
        for name, values in clip.items():
            assert values.shape == (2 * len(tracks), 32)
            assert values.min() >= 0
            # sums of 15 values up to 1, and the square root
            assert values.max() <= 15**0.5 + 1e-4, name


def test_tracks_do_not_depend_on_mean_and_scale_of_the_input(eight):
    x, _ = eight
    model = TDD(6, **SMALL)
    first, second = model.tracks(x[0][0]), model.tracks(x[0][0] * 57.375 + 114.75)
    assert np.array_equal(first.positions, second.positions)


def test_eight_clips_are_learnt(eight, tmp_path):
    x, labels = eight
    torch.manual_seed(0)
    model = TDD(6, **SMALL)
    with pytest.raises(RuntimeError, match="tdd knows no Fisher vectors yet; call fit"):
        model(x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss = model.loss(x, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())
    halves = [((x[0][:4], x[1][:4]), labels[:4]), ((x[0][4:], x[1][4:]), labels[4:])]
    model.fit(halves)
    assert model.training
    scores = model(x)
    assert scores.shape == (8, 6)
    assert scores.argmax(dim=1).tolist() == labels.tolist()
    # The second stage travels with the weights.
    torch.save(model.state_dict(), tmp_path / "tdd.pt")
    copy = TDD(6, **SMALL)
    copy.load_state_dict(torch.load(tmp_path / "tdd.pt", weights_only=True))
    assert torch.equal(copy((x[0][:2], x[1][:2])), scores[:2])


def test_the_streams_alone_are_a_two_stream_network(eight):
    x, labels = eight
    model = TDD(6, **SMALL).eval()
    spatial, temporal = model.streams(x)
    assert spatial.shape == temporal.shape == (8, 16, 6)
    mean = (spatial.softmax(-1).mean(1) + temporal.softmax(-1).mean(1)) / 2
    assert torch.allclose(model.two_stream(x).exp(), mean, atol=1e-6)
    votes = torch.stack([spatial, temporal]).log_softmax(-1).mean(2)
    assert torch.allclose(model.loss(x, labels), -votes[:, torch.arange(8), labels].mean(1).sum(), atol=1e-5)


def test_the_loss_looks_at_some_pictures_of_a_clip(eight):
    x, labels = eight
    whole, some = (TDD(6, **SMALL, pictures=pictures).eval() for pictures in (None, 16))
    some.load_state_dict(whole.state_dict())
    assert torch.allclose(some.loss(x, labels), whole.loss(x, labels), atol=1e-5)
    # Distinct times, the same ones of both streams, drawn from PyTorch's generator.
    some.pictures = 3
    torch.manual_seed(5)
    loss = some.loss(x, labels)
    torch.manual_seed(5)
    times = torch.randperm(16)[:3]
    votes = [votes[:, times].log_softmax(-1).mean(1) for votes in whole.streams(x)]
    assert torch.allclose(loss, -sum(vote[torch.arange(8), labels].mean() for vote in votes), atol=1e-5)
    assert not torch.allclose(some.loss(x, labels), loss, atol=1e-5)
    some.pictures = 17
    with pytest.raises(ValueError, match="pictures=17 cannot be drawn from clips of 16 frames"):
        some.loss(x, labels)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="spatial_layers='fc6' is not known; use one of 'conv1'"):
        TDD(2, spatial_layers=("fc6",))
    with pytest.raises(ValueError, match="normalisations='none' is not known"):
        TDD(2, normalisations=("none",))
    for options, message in (
        ({"width": 0}, "width=0 must be a whole number"),
        ({"length": -1}, "length=-1 must be a whole number"),
        ({"step": 0}, "step=0 must be a whole number"),
        ({"median": 2}, "median=2 is not known; use one of 1, 3, 5"),
        ({"sizes": ()}, r"sizes=\(\) is empty; give one or more"),
        ({"sizes": (-1,)}, "sizes=-1 must be a finite number above 0"),
        ({"sizes": (1.0, 1)}, r"sizes=\(1.0, 1.0\) has a value twice"),
        ({"cost": -1}, "cost=-1 must be a finite number above 0"),
        ({"components": 0}, "components=0"),
        ({"pictures": 0}, "pictures=0 must be a whole number"),
        ({"samples": 0}, "samples=0 must be a whole number"),
        ({"gaussians": 1.5}, "gaussians=1.5"),
        ({"dropout": 2}, "dropout=2 must be a number from 0 to 1"),
        ({"limits": {"most": 1}}, "limits='most' is not known"),
        ({"limits": 3}, "limits=3 must be a Limits"),
        ({"normalisations": ()}, r"normalisations=\(\) is empty"),
        ({"spatial_layers": ("conv4", "conv4")}, r"spatial_layers=\('conv4', 'conv4'\) has a value twice"),
        ({"spatial_layers": (), "temporal_layers": ()}, r"temporal_layers=\(\) leave no map"),
    ):
        with pytest.raises(ValueError, match=message):
            TDD(2, **{"width": 3} | options)


def test_constants():
    """Layers, sizes and K as released; the normalisation as in networks of that time; C is our choice."""
    norm = ConvolutionalStream(3, 2, width=3).norm
    assert (norm.size, norm.alpha, norm.beta, norm.k) == (5, 5e-4, 0.75, 1)
    assert trajectory.EPSILON == 2.0**-52
    with torch.device("meta"):
        model = TDD(101)
    assert model.spatial_layers == ("conv4", "conv5")
    assert model.temporal_layers == ("conv3", "conv4")
    assert [round(240 * size) for size in model.sizes] == [480, 339, 240, 170, 120]
    assert (model.step, model.length, model.stack) == (5, 15, 10)
    assert (model.encoding.components, model.encoding.gaussians, model.encoding.cost) == (64, 256, 100)
    assert model.limits == Limits()


def test_recipe_facts():
    with torch.device("meta"):
        rgb, flow = TDD(101).expects
        assert TDD(101, width=48).expects is None
        assert TDD(101, stack=5).expects is None
    assert (rgb.frames, flow.frames, rgb.size, flow.size) == (1, 10, (240, 320), (240, 320))
    assert "16 frames or more" in rgb.source
    assert "not known here: mean, scale and order of the colours" in rgb.source
    assert "TV-L1 flow; not known here: its mean and scale" in flow.source


@pytest.mark.parametrize("kind", ["spatiotemporal", "channel"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_maps_of_zeros_stay_zeros_in_any_precision(kind, dtype):
    values = normalise_maps(torch.zeros(2, 3, 4, 4, dtype=dtype), kind)
    assert torch.equal(values, torch.zeros(2, 3, 4, 4, dtype=values.dtype))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_descriptors_of_half_precision_are_float32(eight):
    x, _ = eight
    model = TDD(6, **SMALL)
    one = x[0][:1], x[1][:1]
    exact = model.describe(one)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert model.spatial.maps(x[0][0].transpose(0, 1), ("conv4",))["conv4"].dtype == torch.bfloat16
        rough = model.describe(one)[0]
    for name, values in rough.items():
        assert values.dtype == np.float32
        assert np.abs(values - exact[name]).mean() < 0.05 * exact[name].mean(), name
    first, second = model.tracks(x[0][0].half()), model.tracks(x[0][0].half().float())
    assert np.array_equal(first.positions, second.positions)


def test_a_few_pictures_at_a_time_give_the_same_descriptors(eight, monkeypatch):
    x, _ = eight
    model = TDD(6, **SMALL)
    one = x[0][:1], x[1][:1]
    whole, seen = model.describe(one)[0], []

    def watched(module, arguments):
        seen.append(arguments[0].shape)

    for stream in (model.spatial, model.temporal):
        stream.conv1.register_forward_pre_hook(watched)
    monkeypatch.setattr(trajectory, "TOGETHER", 3 * 90 * 120)
    parts = model.describe(one)[0]
    assert list(parts) == list(whole)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-5)
    # 16 frames, three at a time at twice the size; twelve at a time at the clip's own.
    expected = [(n, c, 90, 120) for c in (3, 20) for n in (3, 3, 3, 3, 3, 1)]
    expected += [(n, c, 45, 60) for c in (3, 20) for n in (12, 4)]
    assert sorted(seen) == sorted(expected)


def test_only_the_wanted_layers_are_computed():
    stream = ConvolutionalStream(3, 2, width=6)
    x = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    every = stream.maps(x)
    stream.conv5.register_forward_pre_hook(lambda *_: pytest.fail("conv5 is not wanted"))
    some = stream.maps(x, ("conv4", "conv3"))
    assert list(some) == ["conv3", "conv4"]
    assert all(torch.equal(some[name], every[name]) for name in some)
    with pytest.raises(ValueError, match="layers='fc6' is not known"):
        stream.maps(x, ("fc6",))


def test_one_stream_may_be_left_out(eight):
    x, _ = eight
    model = TDD(6, **SMALL, spatial_layers=(), temporal_layers=("conv3",))
    described = model.describe((x[0][:1], x[1][:1]))[0]
    assert list(described) == ["temporal.conv3.spatiotemporal", "temporal.conv3.channel"]


@pytest.fixture(scope="module")
def fitted(eight):
    x, labels = eight
    return TDD(6, **SMALL, spatial_layers=("conv5",), temporal_layers=()).fit([(x, labels)])


@pytest.mark.parametrize(
    "other",
    [
        {"sizes": (1.0,)},
        {"spatial_layers": ("conv4",)},
        {"temporal_layers": ("conv4",)},
        {"normalisations": ("channel",)},
        {"step": 5},
        {"length": 10},
        {"median": 5},
        {"components": 4},
        {"gaussians": 2},
        {"limits": {"least_spread": 0.5}},
    ],
)
def test_a_fitted_state_is_not_taken_for_other_options(fitted, other):
    options = {**SMALL, "spatial_layers": ("conv5",), "temporal_layers": ()}
    copy = TDD(6, **options | other)
    before = copy.spatial.conv1.weight.clone()
    (name,) = other
    with pytest.raises(ValueError, match=rf"{name}=.* but this state was fitted with {name}="):
        copy.load_state_dict(fitted.state_dict())
    assert torch.equal(copy.spatial.conv1.weight, before)
    # Streams that were trained alone go into any second stage.
    copy.load_state_dict(TDD(6, **options).state_dict())
    TDD(6, **options | {"cost": 1.0}).load_state_dict(fitted.state_dict())


def test_options_travel_through_a_file_as_plain_values(fitted, tmp_path):
    torch.save(fitted.state_dict(), tmp_path / "tdd.pt")
    state = torch.load(tmp_path / "tdd.pt", weights_only=True)
    assert state["_extra_state"]["options"]["sizes"] == (2.0, 1.0)
    limits = {"least_spread": np.float64(0), "least_motion": 0}
    copy = TDD(6, **SMALL | {"limits": limits, "sizes": [2, 1]}, spatial_layers=["conv5"], temporal_layers=[])
    copy.load_state_dict(state)
    torch.save(copy.state_dict(), tmp_path / "again.pt")
    assert (
        torch.load(tmp_path / "again.pt", weights_only=True)["_extra_state"]["options"]
        == (state["_extra_state"]["options"])
    )
