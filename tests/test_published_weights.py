"""Weights by the key names of published code: names and shapes, round trips, what a format cannot hold."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
import re

import keras
import numpy as np
import pytest
import torch

import nlutils.keras
import nlutils.torch
from nlutils.exchange import (
    LAYOUTS,
    fold_bias,
    from_arrays,
    from_published,
    scale_theta,
    to_arrays,
    to_published,
)
from nlutils.paths import results_root

# Names and shapes of the first block of the released I3D-NL ResNet-50 (res3, C = 512): Caffe2 file and
# SlowFast's model of it; the same block of mmaction2's I3D-NL ResNet-50.
INNER, OUTER, WIDE = (256, 512, 1, 1, 1), (512, 256, 1, 1, 1), (512,)
CAFFE2 = {
    "nonlocal_conv3_1_theta_w": INNER,
    "nonlocal_conv3_1_theta_b": (256,),
    "nonlocal_conv3_1_phi_w": INNER,
    "nonlocal_conv3_1_phi_b": (256,),
    "nonlocal_conv3_1_g_w": INNER,
    "nonlocal_conv3_1_g_b": (256,),
    "nonlocal_conv3_1_out_w": OUTER,
    "nonlocal_conv3_1_out_b": WIDE,
    "nonlocal_conv3_1_bn_s": WIDE,
    "nonlocal_conv3_1_bn_b": WIDE,
    "nonlocal_conv3_1_bn_rm": WIDE,
    "nonlocal_conv3_1_bn_riv": WIDE,
}
SLOWFAST = {
    "s3.pathway0_nonlocal1.conv_theta.weight": INNER,
    "s3.pathway0_nonlocal1.conv_theta.bias": (256,),
    "s3.pathway0_nonlocal1.conv_phi.weight": INNER,
    "s3.pathway0_nonlocal1.conv_phi.bias": (256,),
    "s3.pathway0_nonlocal1.conv_g.weight": INNER,
    "s3.pathway0_nonlocal1.conv_g.bias": (256,),
    "s3.pathway0_nonlocal1.conv_out.weight": OUTER,
    "s3.pathway0_nonlocal1.conv_out.bias": WIDE,
    "s3.pathway0_nonlocal1.bn.weight": WIDE,
    "s3.pathway0_nonlocal1.bn.bias": WIDE,
    "s3.pathway0_nonlocal1.bn.running_mean": WIDE,
    "s3.pathway0_nonlocal1.bn.running_var": WIDE,
    "s3.pathway0_nonlocal1.bn.num_batches_tracked": (),
}
MMACTION2 = {
    "backbone.layer2.1.non_local_block.theta.conv.weight": INNER,
    "backbone.layer2.1.non_local_block.theta.conv.bias": (256,),
    "backbone.layer2.1.non_local_block.phi.0.conv.weight": INNER,
    "backbone.layer2.1.non_local_block.phi.0.conv.bias": (256,),
    "backbone.layer2.1.non_local_block.g.0.conv.weight": INNER,
    "backbone.layer2.1.non_local_block.g.0.conv.bias": (256,),
    "backbone.layer2.1.non_local_block.conv_out.conv.weight": OUTER,
    "backbone.layer2.1.non_local_block.conv_out.bn.weight": WIDE,
    "backbone.layer2.1.non_local_block.conv_out.bn.bias": WIDE,
    "backbone.layer2.1.non_local_block.conv_out.bn.running_mean": WIDE,
    "backbone.layer2.1.non_local_block.conv_out.bn.running_var": WIDE,
    "backbone.layer2.1.non_local_block.conv_out.bn.num_batches_tracked": (),
}
CHECKPOINTS = {
    "caffe2": ("nonlocal_conv3_1_", CAFFE2, {"scale": True, "subsample": "before"}),
    "slowfast": ("s3.pathway0_nonlocal1.", SLOWFAST, {"scale": True, "subsample": "before"}),
    "mmaction2": ("backbone.layer2.1.", MMACTION2, {"subsample": "after"}),
}

NORM = {f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
BIASED = {f"{layer}.{name}" for layer in "tpgz" for name in ("weight", "bias")}
# The names of a block by itself, as the installed mmcv 2.2.0, pytorchvideo 0.1.5 and timm 1.0.31 have them,
# and as model/resnet.py of cgnl-network.pytorch has them.
CONV = ("weight", "bias")
NAMES = {
    "pytorchvideo": (
        {"scale": True},
        {f"conv_{layer}.{name}" for layer in ("theta", "phi", "g", "out") for name in CONV} | NORM,
    ),
    "pytorchvideo, no norm": (
        {"instantiation": "dot_product", "norm": False},
        {f"conv_{layer}.{name}" for layer in ("theta", "phi", "g", "out") for name in CONV},
    ),
    "timm": ({"ndim": 2}, BIASED | NORM),
    "cgnl": (
        {"ndim": 2, "scale": True},
        {f"{layer}.weight" for layer in "tpgz"} | {name.replace("norm", "bn") for name in NORM},
    ),
    "mmcv": (
        {"ndim": 1, "instantiation": "concatenation", "subsample": "after"},
        {f"{layer}.conv.{name}" for layer in ("theta", "phi.0", "g.0") for name in CONV}
        | {"concat_project.conv.weight", "conv_out.conv.weight"}
        | {name.replace("norm", "conv_out.bn") for name in NORM},
    ),
    "mmcv, no norm": (
        {"ndim": 2, "instantiation": "gaussian", "norm": False},
        {f"{layer}.conv.{name}" for layer in ("g", "conv_out") for name in CONV},
    ),
}


def torch_block(*arguments, compact=False, seed=1, **options):
    """A PyTorch block whose every number is random, float32."""
    kind = nlutils.torch.CompactGeneralizedNonLocalBlock if compact else nlutils.torch.NonLocalBlock
    block = kind(*arguments, **options)
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -1.0
            tensor.copy_(low + 2 * torch.rand(tensor.shape, generator=draw))
    if getattr(block, "norm", None) is not None and hasattr(block.norm, "num_batches_tracked"):
        block.norm.num_batches_tracked.fill_(7)
    return block


def keras_block(*arguments, compact=False, **options):
    kind = nlutils.keras.CompactGeneralizedNonLocalBlock if compact else nlutils.keras.NonLocalBlock
    block = kind(*arguments, **options)
    block.build((None, *(4,) * options.get("ndim", 3), arguments[0]))
    return block


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_names_and_shapes_of_the_published_files(layout):
    prefix, expected, options = CHECKPOINTS[layout]
    written = to_published(nlutils.torch.NonLocalBlock(512, **options), layout, prefix)
    assert {name: array.shape for name, array in written.items()} == expected


@pytest.mark.parametrize("case", NAMES)
def test_names_of_the_published_code(case):
    options, expected = NAMES[case]
    written = to_published(nlutils.torch.NonLocalBlock(6, 4, **options), case.split(",")[0])
    assert set(written) == expected


# Every form that a published code has: (layout, options of our block).
FORMS = [
    (layout, {"instantiation": instantiation, "scale": scale, "subsample": subsample, "norm": norm})
    for layout, subsamples, norms, forms in (
        ("caffe2", (None, "before"), (True, False), (("embedded_gaussian", False), ("dot_product", False))),
        ("slowfast", (None, "before"), (True,), (("embedded_gaussian", True), ("dot_product", False))),
        ("pytorchvideo", (None, "before"), (True, False), (("embedded_gaussian", True),)),
        ("mmaction2", (None, "after"), (True,), (("embedded_gaussian", False), ("gaussian", False))),
        (
            "mmcv",
            (None, "after"),
            (True, False),
            (
                ("gaussian", False),
                ("embedded_gaussian", True),
                ("dot_product", False),
                ("concatenation", False),
            ),
        ),
    )
    for subsample in subsamples
    for norm in norms
    for instantiation, scale in forms
]
FORMS += [("mmcv", {"ndim": ndim, "instantiation": "concatenation"}) for ndim in (1, 2)]
FORMS += [
    ("timm", {"ndim": 2}),
    ("cgnl", {"ndim": 2, "scale": True}),
    ("cgnl", {"ndim": 2, "groups": 2, "compact": True}),
]


@pytest.mark.parametrize(
    ("layout", "options"),
    FORMS,
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_peer_to_ours_to_peer_is_exact(layout, options):
    source = torch_block(8, 4, **options)
    if layout in ("mmcv", "mmaction2") and options.get("norm", True):
        source.w_z.bias.data.zero_()
    if layout == "cgnl" and not options.get("compact"):
        for layer in (source.theta, source.phi, source.g, source.w_z):
            layer.bias.data.zero_()
    published = to_published(source, layout, "a.b_")
    assert len(published) >= 4
    others = {"c.theta": np.ones(3)}  # another layer's, outside the prefix

    into_torch = torch_block(8, 4, seed=2, **options)
    from_published(into_torch, {**published, **others}, layout, "a.b_")
    same(to_published(into_torch, layout, "a.b_"), published)
    for name, tensor in source.state_dict().items():
        # caffe2 has no count of batches; everything else came over.
        if not (layout == "caffe2" and name.endswith("num_batches_tracked")):
            assert torch.equal(tensor, into_torch.state_dict()[name]), name

    into_keras = keras_block(8, 4, **options)
    from_published(into_keras, {**published, **others}, layout, "a.b_")
    counted = {key: array for key, array in published.items() if not key.endswith("num_batches_tracked")}
    same(to_published(into_keras, layout, "a.b_"), counted)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_every_layout_has_a_round_trip():
    assert {layout for layout, _ in FORMS} == set(LAYOUTS)


def test_tensors_are_read_and_what_is_written_is_a_copy():
    source = torch_block(8, 4, scale=True)
    state = {
        f"nl.{name}": torch.from_numpy(array) for name, array in to_published(source, "slowfast").items()
    }
    target = torch_block(8, 4, seed=2, scale=True)
    from_published(target, state, "slowfast", "nl.")
    assert torch.equal(target.w_z.weight, source.w_z.weight)
    for array in to_published(target, "slowfast").values():
        array[...] = 0
    assert torch.equal(target.w_z.weight, source.w_z.weight)
    assert target.norm.num_batches_tracked == 7


def test_the_variance_of_caffe2_is_no_inverse_and_its_optimiser_is_passed_over():
    block = torch_block(8, 4)
    published = to_published(block, "caffe2", "nonlocal_conv4_5_")
    np.testing.assert_array_equal(published["nonlocal_conv4_5_bn_riv"], block.norm.running_var.numpy())
    momenta = {f"{name}_momentum": np.zeros(1) for name in published}
    from_published(block, {**published, **momenta, "lr": np.zeros(1)}, "caffe2", "nonlocal_conv4_5_")


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_frozen_scale_and_shift_of_caffe2_is_read(framework):
    source = torch_block(8, 4, frames_per_group=4).eval()
    published = to_published(source, "caffe2", "nonlocal_conv3_1_")
    for name in ("rm", "riv"):
        del published[f"nonlocal_conv3_1_bn_{name}"]
    options = {"frames_per_group": 4}
    target = keras_block(8, 4, **options) if framework == "keras" else torch_block(8, 4, seed=2, **options)
    from_published(target, published, "caffe2", "nonlocal_conv3_1_")

    x = np.random.default_rng(0).normal(size=(1, 4, 3, 3, 8)).astype(np.float32)
    maps = torch.from_numpy(x).movedim(-1, 1)
    update = []
    with torch.no_grad():
        hook = source.w_z.register_forward_hook(lambda *words: update.append(words[2]))
        source(maps)
        hook.remove()
        wanted = maps + update[0] * source.norm.weight.view(-1, 1, 1, 1) + source.norm.bias.view(-1, 1, 1, 1)
        if framework == "keras":
            found = torch.from_numpy(keras.ops.convert_to_numpy(target(x)).copy()).movedim(-1, 1)
        else:
            found = target.eval()(maps)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)

    # One of the two absent is a broken file.
    published["nonlocal_conv3_1_bn_rm"] = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match=r": nonlocal_conv3_1_bn_riv is missing$"):
        from_published(target, published, "caffe2", "nonlocal_conv3_1_")


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("caffe2", {"instantiation": "gaussian"}, "'caffe2' does not have instantiation='gaussian' (it has"),
        ("slowfast", {"instantiation": "concatenation"}, "does not have instantiation='concatenation'"),
        ("slowfast", {}, "instantiation='embedded_gaussian' with scale=False (it has"),
        ("slowfast", {"scale": True, "norm": False}, "does not have norm=False (it has norm=True)"),
        ("slowfast", {"scale": True, "ndim": 2}, "does not have ndim=2 (it has ndim=3)"),
        ("pytorchvideo", {"scale": True, "subsample": "after"}, "does not have subsample='after'"),
        ("pytorchvideo", {"scale": True, "frames_per_group": 2}, "does not have frames_per_group=2"),
        ("mmcv", {"subsample": "before"}, "subsample='before' (it has subsample=None or subsample='after')"),
        ("mmcv", {"instantiation": "gaussian", "scale": True}, "instantiation='gaussian' with scale=True"),
        ("mmcv", {"attention": "space"}, "does not have attention='space'"),
        ("timm", {}, "'timm' does not have ndim=3 (it has ndim=2)"),
        ("timm", {"ndim": 2, "scale": True}, "with scale=True (it has"),
        ("timm", {"ndim": 2, "norm": False}, "does not have norm=False"),
        ("cgnl", {"instantiation": "dot_product", "ndim": 2}, "does not have instantiation='dot_product'"),
        ("caffe", {}, "layout='caffe' is not known; use one of 'caffe2', 'slowfast'"),
        ("mmcv", {"compact": True, "groups": 2}, "layout='mmcv' has no CompactGeneralizedNonLocalBlock; use"),
    ],
)
def test_what_a_published_code_does_not_compute_is_refused(layout, options, message):
    block = torch_block(8, 4, **options)
    before = to_arrays(block)
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is looked at below
        to_published(block, layout)
    assert message in str(error.value)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        from_published(block, {}, layout)
    assert message in str(error.value)
    same(to_arrays(block), before)


def test_a_bias_without_a_place_is_named_with_its_cure():
    block = torch_block(8, 4)
    with pytest.raises(ValueError, match=r"no place for w_z\.bias, which is not zero; .*fold_bias\(block\)"):
        to_published(block, "mmcv")
    fold_bias(block)
    assert "conv_out.conv.bias" not in to_published(block, "mmcv")
    image = torch_block(8, 4, ndim=2)
    image.w_z.bias.data.zero_()
    with pytest.raises(
        ValueError, match=r"no place for theta\.bias, phi\.bias, g\.bias, which is not .*; set"
    ):
        to_published(image, "cgnl")


def test_missing_left_over_and_misshapen_are_all_listed_and_nothing_is_written():
    source, target = torch_block(8, 4, scale=True), torch_block(8, 4, seed=2, scale=True)
    published = to_published(source, "slowfast", "nl.")
    del published["nl.conv_g.bias"]
    published["nl.extra"] = np.zeros(1)
    published["nl.conv_out.weight"] = np.zeros((4, 8, 1, 1, 1), np.float32)
    before = to_arrays(target)
    with pytest.raises(ValueError, match="do not fit the block in the layout 'slowfast'") as error:
        from_published(target, published, "slowfast", "nl.")
    assert str(error.value).endswith(
        "nl.conv_g.bias is missing; nl.extra is not a weight of this block; "
        "nl.conv_out.weight has shape (4, 8, 1, 1, 1), the block needs (8, 4, 1, 1, 1)"
    )
    same(to_arrays(target), before)
    with pytest.raises(ValueError, match=r"conv_theta\.weight is missing.*s3\.x is not a weight"):
        from_published(target, {"s3.x": np.zeros(1)}, "slowfast")


CONVOLUTIONS = [f"conv{number}.{name}" for number in (1, 2, 3) for name in ("conv.weight", "bn.weight")]
UNIT = [f"backbone.layer2.1.{name}" for name in (*CONVOLUTIONS, "downsample.conv.weight")]
# Published networks around a block: (options, prefix, names that stand beside it).
NETWORKS = {
    "caffe2": (
        {"scale": True},
        "nonlocal_conv3_1_",
        ["nonlocal_conv3_3_theta_w", "res3_1_branch2a_w", "res3_1_branch2a_bn_rm", "pred_w"],
    ),
    "slowfast": (
        {"scale": True},
        "s3.pathway0_nonlocal1.",
        ["s3.pathway0_nonlocal11.conv_theta.weight", "s3.pathway0_res1.branch2.a.weight"],
    ),
    "mmaction2": (
        {},
        "backbone.layer2.1.",
        [*UNIT, "backbone.layer2.11.non_local_block.g.conv.weight", "cls_head.fc_cls.weight"],
    ),
    "timm": ({"ndim": 2}, "layer3.5.se.", ["layer3.5.conv1.weight", "layer3.50.se.t.weight", "fc.bias"]),
    "cgnl": (
        {"ndim": 2, "groups": 2, "compact": True},
        "layer3.5.",
        ["layer3.50.t.weight", "layer3.4.conv1.weight", "layer3.6.bn1.num_batches_tracked", "fc.weight"],
    ),
}


@pytest.mark.parametrize("layout", NETWORKS)
def test_a_block_is_read_out_of_a_whole_network(layout):
    options, prefix, neighbours = NETWORKS[layout]
    source, target = torch_block(8, 4, **options), torch_block(8, 4, seed=2, **options)
    if layout == "mmaction2":
        source.w_z.bias.data.zero_()
    block = to_published(source, layout, prefix)
    network = {**{name: np.full(5, 3.0) for name in neighbours}, **block}
    from_published(target, network, layout, prefix)
    same(to_arrays(target), to_arrays(source))
    # What is under the block's own names, and no weight of it, is told.
    strange = next(iter(block)) + "_x"
    with pytest.raises(ValueError, match=f"layout '{layout}': {re.escape(strange)} is not a weight of"):
        from_published(target, {**network, strange: np.zeros(1)}, layout, prefix)


def test_bfloat16_goes_out_as_float32_and_comes_back_exactly():
    source = torch_block(8, 4, scale=True).bfloat16()
    published = to_published(source, "slowfast", "nl.")
    assert published["nl.conv_g.weight"].dtype == np.float32
    state = {f"nl.{name}": tensor for name, tensor in slowfast_state(source).items()}
    for arrays in (published, state):
        target = torch_block(8, 4, seed=2, scale=True).bfloat16()
        from_published(target, arrays, "slowfast", "nl.")
        assert target.w_z.weight.dtype == torch.bfloat16
        same(to_arrays(target), to_arrays(source))


def slowfast_state(block):
    """A state_dict as SlowFast would have it, of PyTorch tensors."""
    names = {"theta": "conv_theta", "phi": "conv_phi", "g": "conv_g", "w_z": "conv_out", "norm": "bn"}
    split = ((key.partition("."), tensor) for key, tensor in block.state_dict().items())
    return {f"{names[layer]}.{kind}": tensor for (layer, _, kind), tensor in split}


def test_names_that_tell_of_another_pooling_say_so():
    pooled, plain = torch_block(8, 4, subsample="after", norm=False), torch_block(8, 4, norm=False)
    with pytest.raises(ValueError, match=r"written with subsample='after', and the block has None$"):
        from_published(plain, to_published(pooled, "mmcv"), "mmcv")
    with pytest.raises(ValueError, match=r"written with subsample=None, and the block has 'after'$"):
        from_published(pooled, to_published(plain, "mmcv"), "mmcv")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_folded_bias_leaves_the_output_as_it_was(framework, training):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 8))
    source = torch_block(8, 4).double()
    if framework == "torch":
        block = source.train(training)

        def run():
            return block(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).detach().numpy()
    else:
        block = keras_block(8, 4, dtype="float64")
        from_arrays(block, to_arrays(source))

        def run():
            return keras.ops.convert_to_numpy(block(x, training=training))

    weights = to_arrays(block)
    before = run()
    bias, mean = weights["w_z.bias"], to_arrays(block)["norm.running_mean"]
    from_arrays(block, weights)  # the run moved the running statistics
    fold_bias(block)
    np.testing.assert_allclose(run(), before, rtol=0, atol=1e-13)
    assert not to_arrays(block)["w_z.bias"].any()
    # Also after the step: the two running means stay one bias apart.
    np.testing.assert_allclose(to_arrays(block)["norm.running_mean"] + bias, mean, rtol=0, atol=1e-13)


def test_a_frozen_norm_trains_the_bias_that_folding_takes_away():
    block = torch_block(8, 4).double().eval()
    block(torch.ones(1, 8, 2, 2, 2, dtype=torch.float64)).sum().backward()
    assert block.w_z.bias.grad.abs().min() > 1e-3
    block = torch_block(8, 4).double().train()
    x = torch.randn(2, 8, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (block(x) ** 2).sum().backward()
    assert block.w_z.bias.grad.abs().max() < 1e-12


def test_folding_and_scaling_need_what_they_change():
    with pytest.raises(ValueError, match="fold_bias needs a W_z with a bias and a batch normalisation"):
        fold_bias(torch_block(8, 4, norm=False))
    with pytest.raises(ValueError, match="instantiation='gaussian' has none"):
        scale_theta(torch_block(8, 4, instantiation="gaussian"), 2)


def test_scale_theta_is_the_option_scale():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 8, 2, 3, 3)))
    scaled, plain = torch_block(8, 4, scale=True).double().eval(), torch_block(8, 4).double().eval()
    assert (scaled(x) - plain(x)).abs().max() > 1e-3
    scale_theta(plain, 4**-0.5)
    torch.testing.assert_close(plain(x), scaled(x), rtol=0, atol=1e-14)


def test_the_installed_peers_gave_the_same_output():
    """What benchmarks/peers_weights.py recorded, with the peers installed; see benchmarks/README.md."""
    record = json.loads((results_root() / "peers" / "weights.json").read_text(encoding="utf-8"))
    found = {(case["peer"], case["form"]) for case in record["cases"]}
    assert len(found) == len(record["cases"])
    mmcv = {
        (f"mmcv.NonLocal{ndim}d", f"{mode}, sub_sample={sub_sample}, norm={norm}")
        for ndim in (1, 2, 3)
        for mode in ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
        for sub_sample in (False, True)
        for norm in (False, True)
    }
    pytorchvideo = {
        ("pytorchvideo.NonLocal", f"{mode}, pool={pool}, norm={norm}")
        for mode in ("softmax", "dot_product")
        for pool in (False, True)
        for norm in (False, True)
    }
    timm = {
        ("timm.NonLocalAttn", f"use_scale={scale}, rd_ratio={ratio}")
        for scale in (False, True)
        for ratio in ("1/8", "1/2")
    }
    assert found == mmcv | pytorchvideo | timm
    for case in record["cases"]:
        # Outputs are of size 1; float64 throughout. What is compared is not zero everywhere.
        assert case["largest_update"] > 0.1, case
        assert case["difference"] < 1e-12, case
        assert case["back"] == "exact", case
