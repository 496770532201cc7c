"""C2D and I3D in small: equal to frame averaging where they must be, blocks of every kind between frames."""

import pytest
import torch
from torch import nn

from nlutils.study import seeded
from nlutils.torch import CompactGeneralizedNonLocalBlock, create_model, inflate_weights
from nlutils.torch.models import model_options
from nlutils.torch.models.small.c3d import KINDS

torch.set_num_threads(1)


def clip(frames=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, frames, 24, 32, generator=draw).double()


def trained(name="frame_average", **options):
    """A network in float64 whose norms and blocks are as after training: none is the identity."""
    with seeded(1):
        model = create_model(name, 4, **options)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.2)
            if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
                nn.init.uniform_(layer.running_var, 0.5, 1.5)
                nn.init.normal_(layer.running_mean, std=0.2)
    return model.double().eval()


def inflated(name, flat, mode="mean", **options):
    model = create_model(name, 4, **options).double().eval()
    report = inflate_weights(flat.state_dict(), model, mode=mode, rename=model.place_of, report=None)
    assert report.unused == ()
    return model


def test_c2d_without_blocks_is_frame_averaging():
    flat = trained()
    model = inflated("c2d_small", flat)
    torch.testing.assert_close(model(clip()), flat(clip()), rtol=1e-12, atol=1e-12)
    labels, gradients = torch.tensor([3, 0]), []
    for network in (flat.train(), model.train()):
        network.dropout.p = 0.0
        network.loss(clip(), labels).backward()
        gradients.append([weight.grad.flatten() for weight in network.parameters()])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_c2d_starts_from_the_weights_of_frame_averaging():
    with seeded(2):
        flat = create_model("frame_average", 4)
    with seeded(2):
        model = create_model("c2d_small", 4)
    for mine, other in zip(model.state_dict().values(), flat.state_dict().values(), strict=True):
        assert torch.equal(mine.flatten(), other.flatten())


def test_c2d_has_the_options_of_c3d():
    assert model_options("c2d_small") == model_options("c3d_small")


@pytest.mark.parametrize(
    ("kind", "sees_order"),
    [
        ("non_local", False),
        ("compact_generalized", False),
        ("uniform", False),
        ("window", True),
        ("convolution", True),
        ("constant", False),
    ],
)
def test_blocks_bring_frames_together_and_some_know_their_order(kind, sees_order):
    model = trained("c2d_small", non_local=(2, 3), kind=kind)
    x = clip()
    torn = x[:, :, [5, 2, 7, 0, 3, 6, 1, 4]]
    assert torch.allclose(model(x), model(torn), rtol=0, atol=1e-10) is not sees_order
    # Maps of the first frame change with the last one only through blocks.
    other = x.clone()
    other[:, :, -1] += 1
    reached = (model.features(x) - model.features(other))[:, :, 0].abs().max()
    assert (reached > 1e-6) == (kind not in ("window", "convolution"))


@pytest.mark.parametrize("name", ["c2d_small", "c3d_small"])
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_blocks_of_any_kind_change_nothing(name, kind):
    """Their weights also come in by the same names, wherever the blocks stand."""
    flat = trained()
    plain = inflated(name, flat)
    model = inflated(name, flat, non_local=(1, 3, 4), kind=kind)
    assert [place for place, layer in enumerate(model.features) if type(layer) is KINDS[kind]] == [3, 12, 16]
    torch.testing.assert_close(model(clip()), plain(clip()), rtol=1e-12, atol=1e-12)


def test_compact_generalized_blocks_take_their_options():
    model = create_model(
        "c3d_small", 4, non_local=(2,), kind="compact_generalized", block={"kernel": "rbf", "order": 2}
    )
    (block,) = (layer for layer in model.modules() if isinstance(layer, CompactGeneralizedNonLocalBlock))
    assert (block.kernel, block.order, block.groups, block.in_channels) == ("rbf", 2, 8, 32)
    with pytest.raises(ValueError, match=r"groups=5"):
        create_model("c3d_small", 4, non_local=(2,), kind="compact_generalized", block={"groups": 5})
    with pytest.raises(ValueError, match=r"kind='cgnl'.*'compact_generalized'"):
        create_model("c3d_small", 4, kind="cgnl")


# Inflation: the small I3D


@pytest.mark.parametrize("frames", [4, 16])
@pytest.mark.parametrize("non_local", [(), (2, 3)])
def test_inflated_in_the_centre_a_still_clip_gives_what_the_2d_network_gives(frames, non_local):
    flat = trained()
    model = inflated("c3d_small", flat, "centre", non_local=non_local)
    frame = clip(1)
    still = frame.expand(-1, -1, frames, -1, -1)
    torch.testing.assert_close(model(still), flat(frame), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_inflated_by_the_mean_maps_that_see_no_end_of_the_clip_are_the_2d_networks():
    flat = trained()
    model = inflated("c3d_small", flat)
    frame = clip(1)
    expected = flat.encoder(frame[:, :, 0])
    for frames, untouched in ((16, []), (20, [2]), (32, [2, 3, 4, 5])):
        maps = model.features(frame.expand(-1, -1, frames, -1, -1)).mean(dim=(3, 4))  # (B, D, T / 4)
        errors = (maps - expected[:, :, None]).abs().amax(dim=(0, 1))
        assert torch.nonzero(errors < 1e-12).flatten().tolist() == untouched
        # The zeros beyond the ends count as frames.
        assert errors[0] > 1e-3


def test_a_trained_classifier_of_other_classes_stays_out():
    flat, model = trained(), create_model("c3d_small", 6).double()
    before = model.classifier.weight.clone()
    report = inflate_weights(
        flat.state_dict(), model, rename=model.place_of, skip=["classifier"], report=None
    )
    assert report.skipped == ("classifier.weight", "classifier.bias")
    assert torch.equal(model.classifier.weight, before)
    assert set(report.inflated.values()) == {3}
    assert len(report.inflated) == 4
    assert report.missing == ()
