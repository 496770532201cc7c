"""ST-ResNet: the paper's counts and shapes, where motion enters, kernels over time, small ones learn."""

import pytest
import torch

from nlutils.study import seeded
from nlutils.torch.inflation import inflate_weights
from nlutils.torch.models.st_resnet import STResNet

torch.set_num_threads(1)


def parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def on_meta(**options):
    with torch.device("meta"):
        return STResNet(101, **options).eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(num_classes=3, **options):
    with seeded(0):
        return STResNet(num_classes, **{"depth": (2, 2, 2, 2), "width": 8, "stack": 2} | options)


def clip(batch=2, places=5, stack=2, size=(32, 32), seed=0):
    return noise(batch, 3, places, *size, seed=seed), noise(batch, 2, places * stack, *size, seed=seed + 1)


# The paper


def test_parameters():
    """Arithmetic from STResNet_stage1.m: 47,483,274 plain, 58,624,394 with kernels over time; 101 classes."""
    resnet50 = 23_508_032  # without its classifier
    plain = 2 * (resnet50 + 2049 * 101) + 17 * 64 * 49
    assert parameters(on_meta(temporal=False)) == plain == 47_483_274
    # Two more frames in the first and last 1x1 of one unit in each of four stages, in both streams.
    longer = 2 * sum(2 * 2 * (4 * width) * width for width in (64, 128, 256, 512))
    assert parameters(on_meta()) == plain + longer == 58_624_394
    assert parameters(on_meta(injection=False)) == 58_624_394  # an addition has no weights


def test_shapes_at_the_papers_size():
    """Eleven frames, ten fields each: 7 x 7 maps; windows of 5 at stride 2 leave four votes a stream."""
    model = on_meta()
    x = torch.empty(1, 3, 11, 224, 224, device="meta"), torch.empty(1, 2, 110, 224, 224, device="meta")
    assert [maps.shape for maps in model.maps(x)] == 2 * [(1, 2048, 11, 7, 7)]
    assert [votes.shape for votes in model.votes(x)] == 2 * [(1, 4, 101)]
    assert model(x).shape == (1, 101)
    rgb, flow = model.expects
    assert (rgb.frames, flow.frames) == (11, 110)
    assert on_meta(depth=(3, 4, 6, 3)).expects == model.expects  # the same network
    for options in ({"width": 32}, {"stack": 5}, {"depth": 101}):
        assert on_meta(**options).expects is None


def test_temporal_kernels_are_where_the_released_code_has_them():
    names = {n for n, w in on_meta().named_parameters() if w.ndim == 5 and w.shape[2] == 3}
    assert names == {
        f"{stream}.stages.{stage}.1.{layer}.conv.weight"
        for stream in ("appearance", "motion")
        for stage in range(4)
        for layer in "ac"
    }


def test_state_dict_names_are_those_of_our_resnets():
    names = set(on_meta().appearance.state_dict())
    unit = ("conv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    unit += ("norm.num_batches_tracked",)
    expected = {f"stem.{part}" for part in unit} | {"classifier.weight", "classifier.bias"}
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            layers = ("a", "b", "c", "shortcut") if index == 0 else ("a", "b", "c")
            expected |= {f"stages.{stage}.{index}.{layer}.{part}" for layer in layers for part in unit}
    assert names == expected
    assert set(on_meta().motion.state_dict()) == expected


# Injection


def test_motion_enters_the_residual_branch_and_not_the_skip_path():
    unit = small().appearance.stages[1][1].eval()
    x, m = noise(2, 64, 3, 4, 4), noise(2, 64, 3, 4, 4, seed=1)
    y = unit(x, m.relu())
    torch.testing.assert_close(y - x.relu(), unit.branch(x + m.relu()))
    assert not torch.allclose(unit(x), y, atol=1e-3)
    torch.testing.assert_close(unit(x) - x.relu(), unit.branch(x.relu()))  # without motion: He et al.


def test_without_its_branch_a_unit_lets_no_motion_through():
    """Gains and biases of 0 shut the branches of the second units: the skip path is left, to the bit."""
    model = small(temporal=False).eval()
    rgb, flow = clip()
    one, other = (model.votes((rgb, f))[0] for f in (flow, 10 * flow.flip(1)))
    assert not torch.allclose(one, other, atol=1e-3)
    with torch.no_grad():
        for stage in model.appearance.stages:
            stage[1].c.norm.weight.zero_()
            stage[1].c.norm.bias.zero_()
    one, other = (model.votes((rgb, f))[0] for f in (flow, 10 * flow.flip(1)))
    assert torch.equal(one, other)


def test_nothing_goes_from_appearance_to_motion():
    model = small().eval()
    rgb, flow = clip()
    votes = [model.votes((frames, flow)) for frames in (rgb, rgb.flip(0))]
    assert torch.equal(votes[0][1], votes[1][1])
    assert not torch.allclose(votes[0][0], votes[1][0], atol=1e-3)
    # Backward it is the other way round: the loss of appearance teaches motion, too.
    appearance, motion = model.losses((rgb, flow), torch.tensor([0, 1]))
    motion.backward(retain_graph=True)
    assert all(weight.grad is None for weight in model.appearance.parameters())
    model.zero_grad()
    appearance.backward()
    assert model.motion.stem.conv.weight.grad.abs().max() > 0
    assert model.motion.classifier.weight.grad is None


def test_without_injection_the_streams_are_two_networks():
    model = small(injection=False).eval()
    rgb, flow = clip()
    assert torch.equal(model.votes((rgb, flow))[0], model.votes((rgb, 2 * flow))[0])


def test_the_stages_by_hand():
    """Of one stage of two units: x_1 = F_0 + shortcut, then x_2 = ReLU(x_1) + F_1(x_1 + ReLU(m_1))."""
    model = small().eval()
    rgb, flow = clip()
    a = model.appearance.begin(rgb)
    stacks = torch.stack([flow[:, c, k::2] for k in range(2) for c in range(2)], dim=1)  # dx, dy, dx, dy
    m = model.motion.begin(stacks)
    for (a0, a1), (m0, m1) in zip(model.appearance.stages, model.motion.stages, strict=True):
        a, m = a0.branch(a.relu()) + a0.shortcut(a.relu()), m0.branch(m.relu()) + m0.shortcut(m.relu())
        a, m = a.relu() + a1.branch(a + m.relu()), m.relu() + m1.branch(m.relu())
    for ours, expected in zip(model.maps((rgb, flow)), (a.relu(), m.relu()), strict=True):
        torch.testing.assert_close(ours, expected)


# Time


def test_temporal_kernels_start_as_thirds_of_a_2d_kernel():
    for name, weight in small().named_parameters():
        if weight.ndim == 5 and weight.shape[2] == 3:
            assert torch.equal(weight[:, :, 0], weight[:, :, 1]), name
            assert torch.equal(weight[:, :, 0], weight[:, :, 2]), name
            flat = weight.sum(dim=2)
            assert 0.8 < flat.std() * (weight.shape[0] / 2) ** 0.5 < 1.2, name  # He et al., fan out


def test_weights_of_2d_networks_can_be_put_in_and_say_the_same_of_a_repeated_frame():
    """Where no zeros from beyond the ends reach: eight kernels of three frames see eight to each side."""
    flat, deep = small(temporal=False).eval(), small().eval()
    done = inflate_weights(flat.state_dict(), deep, report=None)
    assert len(done.inflated) == 16
    assert not done.missing
    assert not done.unused
    rgb, flow = noise(1, 3, 1, 32, 32), noise(1, 2, 2, 32, 32, seed=1)
    expected = flat.maps((rgb, flow))
    repeated = deep.maps((rgb.repeat(1, 1, 19, 1, 1), flow.repeat(1, 1, 19, 1, 1)))
    for one, many in zip(expected, repeated, strict=True):
        torch.testing.assert_close(many[:, :, 8:11], one.repeat(1, 1, 3, 1, 1), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(many[:, :, :1], one, atol=1e-3)


def test_plain_streams_see_each_frame_alone_and_temporal_ones_do_not():
    rgb, flow = clip(1)
    for temporal in (False, True):
        model = small(temporal=temporal).eval()
        together = model.maps((rgb, flow))[0]
        alone = [model.maps((rgb[:, :, [t]], flow[:, :, 2 * t : 2 * t + 2]))[0] for t in range(5)]
        assert torch.allclose(together, torch.cat(alone, dim=2), atol=1e-4) == (not temporal)


def test_the_maximum_over_time_is_taken_in_windows():
    model = small(pool=(3, 2)).eval()
    x = clip()
    a, m = model.maps(x)
    for votes, maps, stream in zip(model.votes(x), (a, m), (model.appearance, model.motion), strict=True):
        windows = [maps[:, :, s : s + 3].amax(dim=2).mean(dim=(2, 3)) for s in (0, 2)]
        torch.testing.assert_close(votes, stream.classifier(torch.stack(windows, dim=1)))
    assert small(pool=(1, 1)).votes(x)[0].shape == (2, 5, 3)
    assert small(pool=(5, 2)).votes(clip(places=3))[0].shape == (2, 1, 3)  # a shorter clip is one window


def test_forward_and_losses():
    model = small(pool=(1, 1)).eval()
    x, labels = clip(), torch.tensor([2, 0])
    a, m = model.votes(x)
    mean = (a.softmax(2).mean(1) + m.softmax(2).mean(1)) / 2
    torch.testing.assert_close(model(x).exp(), mean)
    expected = -sum(votes.log_softmax(2)[torch.arange(2), :, labels].mean() for votes in (a, m))
    torch.testing.assert_close(model.loss(x, labels), expected)


# Use


@pytest.mark.parametrize("size", [(24, 40), (33, 33), (64, 32)])
def test_any_size_and_number_of_frames(size):
    assert small().eval()(clip(1, places=1, size=size)).shape == (1, 3)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"depth=\(2, 1, 2, 2\): each stage needs two"):
        small(depth=(2, 1, 2, 2))
    with pytest.raises(ValueError, match="depth=34"):
        small(depth=34)
    with pytest.raises(ValueError, match="stack=0"):
        small(stack=0)
    with pytest.raises(ValueError, match="width=0"):
        small(width=0)
    with pytest.raises(ValueError, match="pool=5 must be"):
        small(pool=5)


def test_a_small_one_learns_eight_clips_by_heart():
    model = small(2)
    x, labels = clip(8, places=3), torch.arange(8) % 2
    with seeded(0):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            model.loss(x, labels).backward()
            optimizer.step()
    with torch.no_grad():
        assert (model.eval()(x).argmax(1) == labels).all()
        for votes in model.votes(x):
            assert (votes.mean(1).argmax(1) == labels).all()
