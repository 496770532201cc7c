"""C2D and I3D against the numbers of their paper, and that what is asked for is really there and runs.

Paper: Wang et al., Non-local Neural Networks, CVPR 2018, tables 1 and 2. Counts that the paper does not print
were computed from the released architecture (facebookresearch/video-nonlocal-net, lib/models) or are those of
the model zoos. Multiply-adds count one for a multiplication with its addition, of convolutions and matrix
products; norm, ReLU and pooling are left out.
"""

import inspect
import re
from functools import cache

import pytest
import torch

from nlutils.study import seeded
from nlutils.study.cost import multiply_adds
from nlutils.torch import CompactGeneralizedNonLocalBlock, NonLocalBlock
from nlutils.torch.models.resnet import C2D, I3D

torch.set_num_threads(1)
CLIP = (1, 3, 32, 224, 224)
SMALL = {"depth": (1, 1, 1, 1), "width": 8}


BUILT = {}


def on_meta(network, **options):
    """The network for 400 classes, without memory for its weights; built once."""
    key = network, repr(sorted(options.items()))
    if key not in BUILT:
        with torch.device("meta"):
            BUILT[key] = network(400, **options).eval()
    return BUILT[key]


def parameters(model):
    return sum(weight.numel() for weight in model.parameters())


@cache
def cost(network, shape=CLIP, **options):
    """Parameters and multiply-adds of one clip."""
    model = on_meta(network, **options)
    return parameters(model), multiply_adds(model, torch.empty(shape, device="meta"))


def billions(*arguments, **options):
    return cost(*arguments, **options)[1] / 1e9


def maps(model, shape=CLIP):
    """(channels, T, H, W) that each row of Table 1 gives."""
    x, found = torch.empty(shape, device="meta"), {}
    with torch.no_grad():
        for name, layer in model.layers():
            x = layer(x)
            found[name] = tuple(x.shape[1:])
    return found


def followers(model, kind=NonLocalBlock):
    """The blocks by the name of the residual block that they follow: {"res4.4": block}."""
    return {
        f"res{int(name.split('.')[1]) + 2}.{name.split('.')[2]}": block
        for name, block in model.named_modules()
        if isinstance(block, kind)
    }


@pytest.mark.parametrize(
    ("network", "options", "expected"),
    [
        (C2D, {}, 24_327_632),
        (I3D, {}, 28_043_472),
        (I3D, {"inflate": "3x3x3"}, 33_433_808),
        (C2D, {"non_local": 1}, 26_429_392),
        (C2D, {"non_local": 5}, 31_686_096),
        (C2D, {"non_local": 5, "attention": "space"}, 31_686_096),
        (C2D, {"non_local": 5, "attention": "time"}, 31_686_096),
        (C2D, {"non_local": 10}, 39_044_560),
        (I3D, {"non_local": 5}, 35_401_936),
        (C2D, {"depth": 101}, 43_319_760),
        (C2D, {"depth": 101, "non_local": 1}, 45_421_520),
        (C2D, {"depth": 101, "non_local": 5}, 50_678_224),
        (I3D, {"depth": 101, "non_local": 5}, 59_112_656),
    ],
)
def test_parameters(network, options, expected):
    """Of the released architecture; SlowFast's and pytorchvideo's networks have the same."""
    assert parameters(on_meta(network, **options)) == expected


def test_the_paper_counts_parameters_without_those_of_the_normalisations():
    # Table 2e's caption: 43.2 M for C2D ResNet-101.
    model = on_meta(C2D, depth=101)
    without = sum(weight.numel() for name, weight in model.named_parameters() if ".norm." not in name)
    assert without == 43_214_416
    assert round(without / 1e6, 1) == 43.2


# Table 1.
TABLE_1 = {
    "conv1": (64, 16, 112, 112),
    "pool1": (64, 8, 56, 56),
    "res2": (256, 8, 56, 56),
    "pool2": (256, 4, 56, 56),
    "res3": (512, 4, 28, 28),
    "res4": (1024, 4, 14, 14),
    "res5": (2048, 4, 7, 7),
}
SMALLER = {"pool1": (64, 8, 55, 55), "res2": (256, 8, 55, 55), "pool2": (256, 4, 55, 55)}


@pytest.mark.parametrize("network", [C2D, I3D])
@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
def test_shapes_of_table_1(network, stride_in):
    assert maps(on_meta(network, stride_in=stride_in)) == TABLE_1
    assert maps(on_meta(network, stride_in=stride_in, layout="released")) == TABLE_1 | SMALLER


@pytest.mark.parametrize("clip", ["8x8", "32x4", "128x1"])
@pytest.mark.parametrize("layout", ["paper", "released"])
def test_other_clips_give_the_same_shapes_from_pool1_on(clip, layout):
    """8 or 32 frames reach res2, whatever the clip (README.md of the released code)."""
    frames = int(clip.split("x")[0])
    found = maps(on_meta(I3D, clip=clip, layout=layout), (1, 3, frames, 224, 224))
    expected = TABLE_1 | (SMALLER if layout == "released" else {})
    times = 1 if clip == "8x8" else 4
    for name, (channels, steps, *space) in list(expected.items())[1:]:
        assert found[name] == (channels, times * steps, *space), name
    assert found["conv1"][1] == (frames if clip in ("8x8", "32x4") else frames // 2)


# Parameters and multiply-adds over those of C2D, ResNet-101, as printed.
TABLE_2E = [
    (I3D, {"inflate": "3x3x3"}, 1.5, 1.8),
    (I3D, {"inflate": "3x1x1"}, 1.2, 1.5),
    (C2D, {"non_local": 5}, 1.2, 1.2),
]


@pytest.mark.parametrize("layout", ["paper", "released"])
def test_ratios_of_table_2e(layout):
    base = cost(C2D, depth=101, layout=layout)
    for network, options, parameters_printed, multiply_adds_printed in TABLE_2E:
        mine = cost(network, depth=101, layout=layout, **options)
        assert round(mine[0] / base[0], 1) == parameters_printed, options
        assert round(mine[1] / base[1], 1) == multiply_adds_printed, options


def test_table_2e_decides_what_the_paper_leaves_open():
    """Pooling what phi and g return, or none, or the stride in the first 1x1: each misses a printed ratio."""
    base = cost(C2D, depth=101)[1]
    assert round(cost(C2D, depth=101, non_local=5, subsample="after")[1] / base, 1) == 1.3
    assert round(cost(C2D, depth=101, non_local=5, subsample=None)[1] / base, 1) == 1.6
    first = {"depth": 101, "stride_in": "1x1"}
    assert round(cost(I3D, **first)[1] / cost(C2D, **first)[1], 1) == 1.4
    # And yet the caption's 34.2 billion have the stride there, and 55 x 55 positions in res2.
    assert round(billions(C2D, layout="released", **first), 3) == 34.172
    assert round(billions(C2D, **first), 3) == 34.361


@pytest.mark.parametrize(
    ("network", "options", "expected"),
    [
        (C2D, {}, 20.234),
        (C2D, {"non_local": 1}, 21.419),
        (C2D, {"non_local": 5}, 28.361),
        (C2D, {"non_local": 10}, 36.489),
        (C2D, {"non_local": 5, "attention": "space"}, 26.119),
        (C2D, {"non_local": 5, "subsample": None}, 40.413),
        (C2D, {"non_local": 5, "subsample": "after"}, 31.444),
        (I3D, {}, 32.830),
        (I3D, {"inflate": "3x3x3"}, 38.688),
        (I3D, {"non_local": 5}, 40.958),
        (C2D, {"depth": 101}, 35.083),
        (C2D, {"depth": 101, "non_local": 1}, 36.267),
        (I3D, {"depth": 101, "non_local": 5}, 59.506),
        (C2D, {"layout": "paper"}, 20.437),
        (C2D, {"layout": "paper", "depth": 101}, 35.286),
    ],
)
def test_multiply_adds_of_32_frames(network, options, expected):
    """Billions, computed from the released architecture; the last two with a padded pool1."""
    assert round(billions(network, **{"layout": "released", **options}), 3) == expected


@pytest.mark.parametrize(
    ("network", "options", "size", "expected"),
    [
        (C2D, {"layout": "released"}, 224, 19.290),
        (C2D, {"layout": "slowfast"}, 224, 19.493),
        (C2D, {"layout": "released", "non_local": 5}, 224, 27.417),
        (C2D, {"layout": "slowfast", "non_local": 5}, 224, 27.621),
        (I3D, {"layout": "released"}, 224, 28.109),
        (I3D, {"layout": "slowfast"}, 256, 37.104),
        (I3D, {"layout": "released", "non_local": 5}, 256, 48.574),
        (I3D, {"layout": "slowfast", "non_local": 5}, 224, 36.535),
    ],
)
def test_multiply_adds_of_8_frames(network, options, size, expected):
    """Billions, computed from the released architecture (pool1 without padding) and the zoo's (with)."""
    assert round(billions(network, (1, 3, 8, size, size), clip="8x8", **options), 3) == expected


@pytest.mark.parametrize(
    ("options", "parameters_published", "expected"),
    # From mmaction2's list, at 256 x 256 although it says 224; its five blocks have no bias in W_z: 2 x 512 +
    # 3 x 1024 parameters fewer. The list counts the normalisations, 1 % of it.
    [
        ({}, 28_043_472, 43.5),
        ({"non_local": 5}, 35_397_840, 59.3),
        ({"non_local": 5, "instantiation": "gaussian"}, 31_723_728, 56.5),
    ],
)
def test_cost_of_the_networks_of_mmaction2(options, parameters_published, expected):
    count, products = cost(I3D, (1, 3, 32, 256, 256), layout="mmaction2", **options)
    biases = 2 * 512 + 3 * 1024 if options else 0
    assert count == parameters_published + biases
    assert 0.985 * expected < products / 1e9 < expected


def test_dot_products_cost_less_than_the_published_map():
    """(theta phi^T) g is theta (phi^T g), and ours takes the order that is cheaper."""
    softmax, dot = (
        cost(I3D, layout="mmaction2", non_local=5, instantiation=form)
        for form in ("embedded_gaussian", "dot_product")
    )
    assert softmax[0] == dot[0]
    # res3: 3136 queries, 784 keys, two products of width 256, against 256 x 256; res4: 784, 196, 512.
    saved = 2 * 3136 * 256 * (2 * 784) - 2 * 256 * 256 * (3136 + 784)
    saved += 3 * 784 * 512 * (2 * 196) - 3 * min(512 * 512 * (784 + 196), 784 * 512 * 2 * 196)
    assert softmax[1] - dot[1] == saved


def test_five_blocks_on_resnet_50_against_resnet_101():
    """Section 5.1: about 70 % of the parameters and 80 % of the multiply-adds of the ResNet-101 baseline."""
    small, large = cost(C2D, layout="released", non_local=5), cost(C2D, layout="released", depth=101)
    assert round(100 * small[0] / large[0], 1) == 73.1
    assert round(100 * small[1] / large[1], 1) == 80.8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"non_local": 1}, ["res4.4"]),
        ({"non_local": 5}, ["res3.1", "res3.3", "res4.1", "res4.3", "res4.5"]),
        ({"non_local": 10}, [*(f"res3.{i}" for i in range(4)), *(f"res4.{i}" for i in range(6))]),
        ({"depth": 101, "non_local": 1}, ["res4.21"]),
        ({"depth": 101, "non_local": 5}, ["res3.1", "res3.3", "res4.6", "res4.13", "res4.20"]),
        # Table 2b: one block in each stage, before its last residual block.
        ({"non_local": {"res2": [-2]}}, ["res2.1"]),
        ({"non_local": {"res5": [1], "res3": (2,)}}, ["res3.2", "res5.1"]),
    ],
)
def test_non_local_blocks_are_where_the_paper_has_them(options, expected):
    assert list(followers(on_meta(C2D, **options))) == expected


def test_ten_blocks_of_resnet_101_are_ten():
    found = followers(on_meta(I3D, depth=101, non_local=10))
    assert [name.split(".")[0] for name in found] == ["res3"] * 4 + ["res4"] * 6


@pytest.mark.parametrize("depth", [50, 101])
def test_inflated_residual_blocks_are_those_of_the_released_networks(depth):
    res4 = [3, 1] * 3 if depth == 50 else [*[3, 1] * 11, 3]
    expected = [[3, 3, 3], [3, 1, 3, 1], res4, [1, 3, 1]]
    models = {inflate: on_meta(C2D, depth=depth, inflate=inflate) for inflate in (None, "3x1x1", "3x3x3")}
    for inflate, layer in ((None, ""), ("3x1x1", "a"), ("3x3x3", "b")):
        for stage, frames in zip(models[inflate].stages, expected, strict=True):
            for block, wanted in zip(stage, frames, strict=True):
                kernels = {name: getattr(block, name).conv.kernel_size[0] for name in "abc"}
                assert kernels == {"a": 1, "b": 1, "c": 1} | ({layer: wanted} if layer else {})
        assert models[inflate].stem.conv.kernel_size == (5 if inflate else 1, 7, 7)


def test_options_reach_the_blocks():
    def settings(**options):
        found = followers(on_meta(C2D, **{"non_local": {"res3": [0], "res4": [0]}, **options}))
        names = ("instantiation", "subsample", "scale", "attention", "frames_per_group")
        return [tuple(getattr(block, name) for name in names) for block in found.values()]

    assert settings() == 2 * [("embedded_gaussian", "before", False, "spacetime", None)]
    assert settings(layout="released") == 2 * [("embedded_gaussian", "before", True, "spacetime", None)]
    assert settings(layout="mmaction2") == 2 * [("embedded_gaussian", "after", False, "spacetime", None)]
    # The scale is of the softmax forms; what looks along time only has no neighbours to pool.
    assert settings(layout="released", instantiation="dot_product")[0][:3] == ("dot_product", "before", False)
    assert settings(attention="time")[0] == ("embedded_gaussian", None, False, "time", None)
    assert settings(subsample=None, scale=True, attention="space", instantiation="gaussian") == (
        2 * [("gaussian", None, True, "space", None)]
    )
    # In the released networks for long clips the blocks of res3 look at groups of four frames.
    assert [row[-1] for row in settings(layout="released", clip="128x1")] == [4, None]
    assert [row[-1] for row in settings(layout="released", clip="32x4")] == [4, None]
    assert [row[-1] for row in settings(layout="released", clip="128x1", attention="space")] == [None, None]
    assert [row[-1] for row in settings(layout="released", clip="128x1", frames_per_group=None)] == [None] * 2
    assert [row[-1] for row in settings(clip="128x1")] == [None, None]
    assert [row[-1] for row in settings(frames_per_group=2)] == [2, 2]
    assert [row[-1] for row in settings(frames_per_group={"res4": 2})] == [None, 2]


def test_compact_generalized_blocks():
    # C = 1024: 1,640,448 parameters, before the last residual block of res4 (KaiyuYue/cgnl-network.pytorch,
    # model/resnet.py).
    for depth, place in ((50, "res4.4"), (101, "res4.21")):
        model = on_meta(C2D, depth=depth, cgnl=1)
        assert list(followers(model, CompactGeneralizedNonLocalBlock)) == [place]
        assert parameters(model) - parameters(on_meta(C2D, depth=depth)) == 1_640_448
    model = on_meta(I3D, cgnl={"res3": [1]}, non_local={"res4": [1]}, groups=4, kernel="rbf", order=2)
    (block,) = followers(model, CompactGeneralizedNonLocalBlock).values()
    assert (block.in_channels, block.groups, block.kernel, block.order) == (512, 4, "rbf", 2)
    assert list(followers(model)) == ["res4.1"]
    assert len(followers(on_meta(C2D, cgnl=5), CompactGeneralizedNonLocalBlock)) == 5
    # The products with W_theta, W_phi, W_g and the grouped W_z: what is between is sums, no map of positions.
    channels, inner, positions = 1024, 512, 4 * 14 * 14
    layers = positions * (3 * channels * inner + inner * channels // 8)
    extra = cost(C2D, cgnl=1)[1] - cost(C2D)[1]
    assert extra == layers


def with_blocks(seed=0, **options):
    with seeded(seed):
        return C2D(4, non_local={"res3": [0]}, cgnl={"res4": [0]}, **SMALL, **options)


def test_fresh_blocks_change_nothing_and_trained_ones_do():
    """Four published networks "with non-local blocks" had none, or some that never ran."""
    model, x = with_blocks(), torch.randn(2, 3, 8, 32, 32)
    plain = C2D(4, **SMALL)
    weights = {name: weight for name, weight in model.state_dict().items() if name in plain.state_dict()}
    assert len(weights) == len(plain.state_dict())
    plain.load_state_dict(weights)
    plain.eval()
    blocks = [*followers(model).values(), *followers(model, CompactGeneralizedNonLocalBlock).values()]
    assert len(blocks) == 2
    runs = []
    for block in blocks:
        block.register_forward_hook(lambda block, *_: runs.append(block))
    with torch.no_grad():
        for network in (model.eval(), plain):
            for stage in network.stages:
                stage[0].c.norm.weight.fill_(1)
        assert torch.equal(model(x), plain(x))
        assert runs == blocks
        before = model(x)
        for block in blocks:
            block.norm.weight.fill_(1)
            after = model(x)
            assert (after - before).abs().max() > 1e-4 * before.abs().max(), block
            before = after


def test_every_weight_of_the_blocks_is_trained():
    model = with_blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: weight.clone() for name, weight in model.state_dict().items() if "non_local" in name}
    with seeded(1):
        for _ in range(3):  # the gains start as 0: first they move, then what is behind them
            optimizer.zero_grad()
            model.loss(torch.randn(2, 3, 8, 32, 32), torch.tensor([0, 1])).backward()
            optimizer.step()
    for name, weight in before.items():
        # A bias of phi adds the same to all logits of a row; one of g or W_z is taken off by the norm.
        if not re.search(r"(phi|g|w_z)\.bias", name):
            assert not torch.equal(model.state_dict()[name], weight), name


def test_last_gain_of_each_residual_branch_starts_as_zero():
    model = with_blocks()
    gains = {name: weight for name, weight in model.named_parameters() if name.endswith("norm.weight")}
    for name, gain in gains.items():
        assert gain.unique().item() == (0 if re.search(r"\.c\.|non_local|cgnl", name) else 1), name


def test_names_of_weights():
    """320 of the I3D ResNet-50 and 65 of its five blocks, as many as the published files hold."""
    plain, model = on_meta(I3D), on_meta(I3D, non_local=5)
    assert (len(plain.state_dict()), len(model.state_dict())) == (320, 385)
    layer = r"(conv\.weight|norm\.(weight|bias|running_mean|running_var|num_batches_tracked))"
    pattern = (
        rf"stem\.{layer}|stages\.[0-3]\.\d+\.([abc]|shortcut)\.{layer}|classifier\.(weight|bias)|"
        r"stages\.[12]\.\d+\.non_local\.((theta|phi|g|w_z)\.(weight|bias)|norm\.\w+)"
    )
    for name in model.state_dict():
        assert re.fullmatch(pattern, name), name
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert shapes["stem.conv.weight"] == (64, 3, 5, 7, 7)
    assert shapes["stages.1.0.a.conv.weight"] == (128, 256, 3, 1, 1)
    assert shapes["stages.0.0.shortcut.conv.weight"] == (256, 64, 1, 1, 1)
    assert shapes["stages.1.1.non_local.theta.weight"] == (256, 512, 1, 1, 1)
    assert shapes["classifier.weight"] == (400, 2048)


@pytest.mark.parametrize(
    ("options", "frames", "stride"),
    [
        ({}, 32, 2),
        ({"clip": "8x8"}, 8, 8),
        ({"clip": "128x1", "layout": "released"}, 128, 1),
        ({"clip": "32x4", "depth": 101}, 32, 4),
    ],
)
def test_recipe_facts_travel_with_the_network(options, frames, stride):
    # (x / 255 - 0.45) / 0.225, RGB: the released code subtracts 114.75 and divides by 57.375.
    expects = on_meta(I3D, **options).expects
    assert (expects.frames, expects.stride, expects.size, expects.colour) == (
        frames,
        stride,
        (224, 224),
        "RGB",
    )
    assert [round(255 * value, 3) for value in (*expects.mean, *expects.std)] == [114.75] * 3 + [57.375] * 3
    assert expects.source


def test_networks_of_no_published_size_expect_nothing():
    assert C2D(3, **SMALL).expects is None
    assert on_meta(C2D, input="flow").expects is None
    assert on_meta(I3D, layout="mmaction2").expects.mean == (0.485, 0.456, 0.406)


def test_a_long_clip_runs():
    x = torch.empty(1, 3, 128, 224, 224, device="meta")
    model = on_meta(I3D, layout="released", clip="128x1", non_local=5)
    assert model(x).shape == (1, 400)


@pytest.mark.parametrize("shape", [(1, 3, 1, 17, 5), (2, 3, 5, 33, 48), (1, 3, 16, 64, 64)])
def test_other_sizes_of_clips_work(shape):
    model = C2D(4, non_local={"res4": [0]}, **SMALL).eval()
    assert model(torch.randn(shape)).shape == (shape[0], 4)
    assert C2D(4, input="flow", **SMALL)(torch.randn(2, 2, 8, 32, 32)).shape == (2, 4)


def test_clips_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2, 8, 32, 32\) must be \(B, 3, T, H, W\).*because it is rgb"):
        C2D(4, **SMALL)(torch.zeros(2, 2, 8, 32, 32))
    released = C2D(4, layout="released", **SMALL).eval()
    with pytest.raises(ValueError, match=r"layout='released' T, H and W must be at least 7, 5, 5"):
        released(torch.zeros(1, 3, 6, 32, 32))
    with pytest.raises(ValueError, match=r"at least 2, 5, 5"):
        I3D(4, layout="released", clip="8x8", **SMALL)(torch.zeros(1, 3, 8, 32, 4))
    assert released(torch.zeros(1, 3, 7, 5, 5)).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames_per_group": {"res2": 4}, "non_local": {"res3": [0]}}, r"frames_per_group.*res2"),
        ({"depth": 34}, r"depth=34 is not known; use 50, 101, or the number of residual blocks"),
        ({"depth": (3, 4, 6)}, r"depth=\(3, 4, 6\)"),
        ({"depth": (3, 4, 0, 3)}, r"depth=0 must be a whole number"),
        ({"width": 0}, r"width=0"),
        ({"input": "sound"}, r"input='sound'"),
        ({"clip": "16x4"}, r"clip='16x4'.*'32x2'"),
        ({"layout": "caffe"}, r"layout='caffe'.*'released'"),
        ({"layout": "slowfast"}, r"clip='32x2' does not go with layout='slowfast'; use '8x8'"),
        ({"stride_in": "1x3"}, r"stride_in='1x3'"),
        ({"inflate": "3x3"}, r"inflate='3x3'.*'3x1x1'"),
        ({"non_local": 3}, r"non_local=3 is not known; use 0, 1, 5, 10, or say where"),
        ({"non_local": True}, r"non_local=True is not known"),
        ({"non_local": 5}, r"res3 has 1 residual blocks, too few.*say where: non_local=\{'res3': \[0\]\}"),
        ({"non_local": 1}, r"non_local: res4 has 1 residual blocks, too few"),
        ({"non_local": {"res6": [0]}}, r"non_local='res6' is not known"),
        ({"non_local": {"res4": [1]}}, r"res4 has 1 residual blocks, but no 1"),
        ({"non_local": {"res4": 0}}, r"must hold lists of indices: \{'res4': \[0\]\}"),
        ({"non_local": {"res4": []}}, r"names no place, so no block would be there; use 0"),
        ({"non_local": {"res4": [0, -1]}}, r"names a place twice"),
        ({"non_local": {"res4": [0]}, "cgnl": {"res4": [0]}}, r"both name a residual block of res4"),
        ({"cgnl": {"res4": [0]}, "groups": 7}, r"groups=7 must divide"),
        ({"instantiation": "dot_product"}, r"instantiation='dot_product' is for blocks, and non_local=0 has"),
        ({"attention": "time"}, r"attention='time' is for blocks"),
        ({"kernel": "rbf"}, r"kernel='rbf' is for blocks, and cgnl=0 has none"),
        ({"non_local": {"res4": [0]}, "frames_per_group": {"res1": 4}}, r"frames_per_group='res1'"),
        ({"non_local": {"res4": [0]}, "attention": "axis"}, r"attention='axis'"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        C2D(4, **{**SMALL, **options})


def test_both_networks_tell_their_options():
    for network, inflate in ((C2D, None), (I3D, "3x1x1")):
        known = inspect.signature(network).parameters
        assert known["inflate"].default == inflate
        assert {"depth", "non_local", "cgnl", "layout", "clip", "dropout"} < set(known)
        assert all(one.kind is one.KEYWORD_ONLY for name, one in known.items() if name != "num_classes")


@pytest.mark.parametrize(("network", "options"), [(C2D, {}), (I3D, {"non_local": {"res3": [0]}})])
def test_a_small_one_learns_eight_clips_by_heart(network, options):
    with seeded(0):
        model = network(8, dropout=0.0, **SMALL, **options)
        x, labels = torch.randn(8, 3, 8, 32, 32), torch.arange(8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            model.loss(x, labels).backward()
            optimizer.step()
    assert (model.eval()(x).argmax(1) == labels).all()
