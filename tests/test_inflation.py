"""Inflation: kernels, names, and that a 3D network computes on a repeated frame what its 2D network does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nlutils.study import seeded
from nlutils.torch.inflation import inflate_kernel, inflate_weights, resnet_names
from nlutils.torch.models.resnet import C2D, I3D
from nlutils.torch.models.st_resnet import STResNet

torch.set_num_threads(1)
SMALL = {"depth": (1, 2, 2, 2), "width": 8, "clip": "8x8"}


def with_random_norms(model):
    """Gains that are not zero, and statistics as after training, so that every layer counts."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            for values in (layer.weight, layer.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (layer.bias, layer.running_mean):
                nn.init.normal_(values, std=0.2)
    if isinstance(model, C2D):  # std 0.01 would make all scores small
        nn.init.normal_(model.classifier.weight, std=0.3)
    return model.eval()


def as_2d(model):
    """The state_dict of a C2D as that of a network of images: kernels (out, in, H, W)."""
    return {name: w.squeeze(2) if w.ndim == 5 else w for name, w in model.state_dict().items()}


@torch.no_grad()
def scores_a_frame(model, clip):
    """(B, T', classes): what the network would answer if it saw one frame of res5."""
    for _, layer in model.layers():
        clip = layer(clip)
    return model.classifier(clip.mean(dim=(3, 4)).transpose(1, 2))


@pytest.fixture
def networks():
    """A 2D network, one frame of two clips, and the 2D network's scores of it."""
    with seeded(0):
        flat = with_random_norms(C2D(5, **SMALL)).double()
        frame = torch.randn(2, 3, 1, 48, 48).double()
    with torch.no_grad():
        return flat, frame, flat(frame)


def test_a_kernel_is_copied_and_divided_or_put_in_the_middle():
    kernel = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    mean = inflate_kernel(kernel, 3)
    assert mean.shape == (1, 1, 3, 2, 2)
    torch.testing.assert_close(mean, kernel.unsqueeze(2).expand(1, 1, 3, 2, 2) / 3)
    centre = inflate_kernel(kernel.unsqueeze(2), 5, "centre")
    assert centre[0, 0, :, 1, 1].tolist() == [0, 0, 6, 0, 0]
    torch.testing.assert_close(mean.sum(2), kernel)
    torch.testing.assert_close(centre.sum(2), kernel)


@pytest.mark.parametrize("inflate", ["3x1x1", "3x3x3"])
def test_a_repeated_frame_gives_the_2d_output_inside_a_clip_and_another_at_its_ends(networks, inflate):
    flat, frame, expected = networks
    deep = I3D(5, inflate=inflate, **SMALL).double().eval()
    inflate_weights(as_2d(flat), deep, report=None)
    clip = frame.expand(-1, -1, 32, -1, -1)
    scale = expected.abs().max()
    error = (scores_a_frame(deep, clip) - expected[:, None]).abs().amax(dim=(0, 2)) / scale
    # Frames that see beyond an end: 2 through conv1, 3 through res2, of half as many 2 behind pool2, then one
    # more for each of res3, res4 and res5, that have one inflated residual block each.
    assert error.shape == (16,)
    assert error[5:-5].max() < 1e-12
    # The zeros beyond the ends count as frames: conv1's first output has three fifths of its sum.
    assert min(error[:5].min(), error[-5:].min()) > 1e-5
    assert min(error[0], error[-1]) > 0.2
    # And so the mean over the clip is not the 2D network's output either.
    assert (deep(clip) - expected).abs().max() / scale > 0.02


def test_kernels_in_the_centre_see_one_frame_so_nothing_is_lost_at_the_ends(networks):
    flat, frame, expected = networks
    deep = I3D(5, **SMALL).double().eval()
    inflate_weights(as_2d(flat), deep, mode="centre", report=None)
    scores = scores_a_frame(deep, frame.expand(-1, -1, 32, -1, -1))
    torch.testing.assert_close(scores, expected[:, None].expand_as(scores))
    # Not on a repeated frame only: it is C2D, on any clip.
    clip = torch.randn(1, 3, 8, 48, 48).double()
    with torch.no_grad():
        torch.testing.assert_close(deep(clip), flat(clip))


def test_kernels_of_five_dimensions_inflate_too(networks):
    flat, _, _ = networks
    one, other = I3D(5, **SMALL), I3D(5, **SMALL)
    inflate_weights(as_2d(flat), one, report=None)
    inflate_weights(flat.state_dict(), other, report=None)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


class ImageResNet(nn.Module):
    """ResNet of images by the names of torchvision and timm, written without our network: the oracle."""

    def __init__(self, classes, counts, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        channels = width
        for stage, count in enumerate(counts):
            blocks, inner = [], width * 2**stage
            for index in range(count):
                blocks.append(Bottleneck(channels, inner, 2 if stage and not index else 1))
                channels = 4 * inner
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


class Bottleneck(nn.Module):
    def __init__(self, channels, inner, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner)
        if stride > 1 or channels != 4 * inner:
            conv = nn.Conv2d(channels, 4 * inner, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * inner))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


def test_somebody_elses_resnet_of_images_inflates_to_the_same_output():
    with seeded(1):
        images = with_random_norms(ImageResNet(7, (1, 2, 2, 2), 8))
        frame = torch.randn(2, 3, 1, 48, 48)
    deep = I3D(7, **SMALL).eval()
    result = inflate_weights(images.state_dict(), deep, rename=resnet_names, report=None)
    assert result.missing == result.unused == ()
    assert len(result.copied) + len(result.inflated) == len(deep.state_dict())
    scores = scores_a_frame(deep, frame.expand(-1, -1, 32, -1, -1))[:, 5:-5]
    expected = images(frame.squeeze(2))[:, None].expand_as(scores)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_what_is_missing_or_too_much_is_named(networks, capsys):
    flat, _, _ = networks
    deep = I3D(5, non_local={"res4": [0]}, **SMALL)
    before = {name: weight.clone() for name, weight in deep.state_dict().items()}
    state = {name: w for name, w in as_2d(flat).items() if name != "stages.1.0.b.norm.bias"}
    result = inflate_weights({**state, "head.weight": torch.zeros(2)}, deep, skip=["classifier"])
    block = [name for name in deep.state_dict() if "non_local" in name and "tracked" not in name]
    assert len(block) == 12
    assert set(result.missing) == {"stages.1.0.b.norm.bias", *block}
    assert result.unused == ("head.weight",)
    assert result.skipped == ("classifier.weight", "classifier.bias")
    # conv1 and, of the seven residual blocks, one in res2, res3, res4 and res5 each.
    assert result.inflated == {
        "stem.conv.weight": 5,
        **{f"stages.{stage}.a.conv.weight": 3 for stage in ("0.0", "1.0", "2.0", "3.1")},
    }
    for name in (*result.missing, *result.skipped):
        assert torch.equal(deep.state_dict()[name], before[name]), name
    printed = capsys.readouterr().out
    assert f"{len(result.copied)} weights copied, 5 inflated over 3 or 5 frames" in printed
    for name in (*result.missing, *result.unused, *result.skipped):
        assert name in printed


def test_what_does_not_fit_is_refused_and_nothing_is_written(networks):
    flat, _, _ = networks
    deep = I3D(6, **SMALL)
    before = {name: weight.clone() for name, weight in deep.state_dict().items()}
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(5, 256\).*skip=\['classifier'\]"):
        inflate_weights(as_2d(flat), deep)
    wide = {**as_2d(flat), "stem.conv.weight": torch.zeros(8, 3, 5, 5)}
    with pytest.raises(ValueError, match=r"stem.conv.weight has shape \(8, 3, 5, 5\).*\(8, 3, 5, 7, 7\)"):
        inflate_weights(wide, deep, skip=["classifier"])
    longer = {**as_2d(flat), "stages.0.0.a.conv.weight": torch.zeros(8, 8, 5, 1, 1)}
    with pytest.raises(ValueError, match=r"stages.0.0.a.conv.weight has shape"):
        inflate_weights(longer, deep, skip=["classifier"])
    with pytest.raises(ValueError, match=r"none of the model's names; it has conv1.weight.*rename="):
        inflate_weights({"conv1.weight": torch.zeros(8, 3, 7, 7)}, deep)
    with pytest.raises(ValueError, match=r"rename makes 'x' of two names"):
        inflate_weights(as_2d(flat), deep, rename=lambda name: "x")
    with pytest.raises(ValueError, match=r"skip: no name of the model begins with 'fc'"):
        inflate_weights(as_2d(flat), deep, skip=["fc"])
    with pytest.raises(ValueError, match=r"mode='median' is not known"):
        inflate_weights(as_2d(flat), deep, mode="median")
    with pytest.raises(ValueError, match=r"kernel of shape \(2, 2\)"):
        inflate_kernel(torch.zeros(2, 2), 3)
    for name, weight in deep.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("frames", [0, -1, 2.5, True, None])
def test_a_number_of_frames_that_is_none_is_refused(frames):
    with pytest.raises(ValueError, match=f"frames={frames} must be a whole number, 1 or more"):
        inflate_kernel(torch.zeros(1, 1, 3, 3), frames)


def test_kernels_on_colours_become_kernels_on_flow_by_their_mean(capsys):
    """Feichtenhofer et al., NIPS 2016: conv1 of the motion stream is the channel mean, replicated."""
    motion = STResNet(5, depth=(2, 2, 2, 2), width=8, stack=10).double().motion
    state = with_random_norms(C2D(5, depth=(2, 2, 2, 2), width=8, clip="8x8")).double().state_dict()
    with pytest.raises(
        ValueError, match=r"stem.conv.weight has shape \(8, 3, 1, 7, 7\), the model needs \(8, 20,"
    ):
        inflate_weights(state, motion)
    result = inflate_weights(state, motion, mean_inputs=["stem.conv"])
    assert result.averaged == ("stem.conv.weight",)
    assert "1 with the mean of their input channels, repeated: stem.conv.weight" in capsys.readouterr().out
    assert result.missing == result.unused == ()
    assert len(result.inflated) == 8
    colours = state["stem.conv.weight"]
    mean = (colours[:, 0] + colours[:, 1] + colours[:, 2]) / 3
    for channel in range(20):
        torch.testing.assert_close(motion.stem.conv.weight[:, channel], mean)
    # All else as without it; grey frames in the place of the flow give the 2D network's answer, scaled.
    assert torch.equal(motion.stages[0][0].b.conv.weight, state["stages.0.0.b.conv.weight"])
    grey = torch.randn(1, 1, 1, 32, 32).double()
    one = F.conv3d(grey.expand(-1, 3, -1, -1, -1), colours)
    torch.testing.assert_close(
        20 / 3 * one, F.conv3d(grey.expand(-1, 20, -1, -1, -1), motion.stem.conv.weight)
    )


def test_only_what_is_named_gets_the_mean_of_its_inputs(networks):
    flat, _, _ = networks
    flow = I3D(5, input="flow", **SMALL)
    narrow = {**as_2d(flat), "stages.0.0.a.conv.weight": torch.ones(8, 4, 1, 1)}
    with pytest.raises(ValueError, match=r"stages.0.0.a.conv.weight has shape"):
        inflate_weights(narrow, flow, mean_inputs=["stem"], report=None)
    result = inflate_weights(as_2d(flat), flow, mean_inputs="stem", report=None)
    assert result.averaged == ("stem.conv.weight",)
    assert result.inflated["stem.conv.weight"] == 5
    mean = flat.stem.conv.weight.mean(dim=1).float() / 5  # (8, 1, 7, 7)
    torch.testing.assert_close(flow.stem.conv.weight, mean[:, None].expand(-1, 2, 5, -1, -1))
    same = I3D(5, **SMALL)
    assert inflate_weights(as_2d(flat), same, mean_inputs=["stem"], report=None).averaged == ()
    torch.testing.assert_close(same.stem.conv.weight.sum(2), flat.stem.conv.weight[:, :, 0].float())
    with pytest.raises(ValueError, match="mean_inputs: no name of the model begins with 'conv1'"):
        inflate_weights(as_2d(flat), flow, mean_inputs=["conv1"])


def test_names_of_image_resnets():
    assert resnet_names("conv1.weight") == "stem.conv.weight"
    assert resnet_names("bn1.running_mean") == "stem.norm.running_mean"
    assert resnet_names("layer1.0.downsample.1.bias") == "stages.0.0.shortcut.norm.bias"
    assert resnet_names("layer4.2.bn3.weight") == "stages.3.2.c.norm.weight"
    assert resnet_names("fc.bias") == "classifier.bias"
    assert resnet_names("layer1.0.se.fc1.weight") == "layer1.0.se.fc1.weight"
