"""Parameters, sizes of the map and multiply-adds of a block, against the papers' architecture.

Sources: the layer tables of Wang et al., CVPR 2018 (table 1 and section 4) and the released code
(facebookresearch/video-nonlocal-net: pool1 unpadded, phi and g of the pooled input); for the compact
generalized block and the non-local block beside it, KaiyuYue/cgnl-network.pytorch, model/resnet.py.
Multiply-adds count one for a multiplication with its addition; norm, ReLU and pooling are left out.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import torch

import nlutils.keras
import nlutils.torch
from nlutils.exchange import to_published

# Input 32 x 224 x 224: what leaves res3 and res4 of the ResNet-50, (channels, T, H, W).
RES3, RES4 = (512, 4, 28, 28), (1024, 4, 14, 14)


def parameters(block):
    return sum(parameter.numel() for parameter in block.parameters())


@pytest.mark.parametrize(
    ("channels", "expected"), [(256, 132_224), (512, 526_592), (1024, 2_101_760), (2048, 8_397_824)]
)
@pytest.mark.parametrize("subsample", [None, "before", "after"])
def test_parameters_of_a_block(channels, expected, subsample):
    with torch.device("meta"):
        assert parameters(nlutils.torch.NonLocalBlock(channels, subsample=subsample)) == expected


@pytest.mark.parametrize(("channels", "expected"), [(256, 132_224), (512, 526_592), (1024, 2_101_760)])
def test_parameters_of_a_keras_block(channels, expected):
    block = nlutils.keras.NonLocalBlock(channels)
    block.build((None, 4, 4, 4, channels))
    assert sum(weight.shape.num_elements() for weight in map(_value, block.trainable_weights)) == expected


def _value(variable):
    return variable.value


@pytest.mark.parametrize(
    ("instantiation", "expected"),
    # From 526,592: without theta and phi; as it is; as it is; with w_f, one number for each of 2 d.
    [
        ("gaussian", 526_592 - 2 * (512 * 256 + 256)),
        ("embedded_gaussian", 526_592),
        ("dot_product", 526_592),
        ("concatenation", 526_592 + 512),
    ],
)
def test_parameters_of_each_instantiation(instantiation, expected):
    with torch.device("meta"):
        assert parameters(nlutils.torch.NonLocalBlock(512, instantiation=instantiation)) == expected


def test_parameters_of_five_and_ten_blocks():
    # ResNet-50: 2 and 4 of them in res3, 3 and 6 in res4. C2D has 24,327,632 parameters; with blocks
    # 31,686,096 and 39,044,560.
    with torch.device("meta"):
        res3, res4 = (parameters(nlutils.torch.NonLocalBlock(channels)) for channels in (512, 1024))
    assert 24_327_632 + 2 * res3 + 3 * res4 == 31_686_096
    assert 24_327_632 + 4 * res3 + 6 * res4 == 39_044_560


@pytest.mark.parametrize(
    ("layout", "options", "expected"),
    [
        ("mmcv", {}, 2_100_736),  # no bias in conv_out
        ("cgnl", {"ndim": 2}, 2_099_200),  # no bias at all
    ],
)
def test_parameters_of_the_published_formats(layout, options, expected):
    arrays = to_published(nlutils.torch.NonLocalBlock(1024, **options), layout)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(array.size for name, array in arrays.items() if not name.endswith(statistics)) == expected


def test_parameters_of_a_compact_generalized_block():
    block = nlutils.torch.CompactGeneralizedNonLocalBlock(1024, ndim=2, groups=8)
    assert parameters(block) == 1_640_448
    keras_block = nlutils.keras.CompactGeneralizedNonLocalBlock(1024, ndim=2, groups=8)
    keras_block.build((None, 4, 4, 1024))
    assert keras_block.count_params() == 1_640_448


def count(shape, **options):
    """((N, M), multiply-adds) of a block at feature maps of `shape`, from what its layers really get."""
    channels, *size = shape
    block = nlutils.torch.NonLocalBlock(channels, scale=True, **options).eval()
    positions, products = {}, []

    def look(name):
        def hook(layer, inputs, output):
            positions[name] = output[0, 0].numel()
            products.append(layer.in_channels * output.numel())

        return hook

    for name in ("theta", "phi", "g", "w_z"):
        getattr(block, name).register_forward_hook(look(name))
    with torch.inference_mode():
        block(torch.zeros(1, channels, *size))
    assert len(products) == 4
    assert positions["phi"] == positions["g"]
    return (positions["theta"], positions["phi"]), sum(products)


def pairwise_products(size, width):
    """theta phi^T and the sum over j: N M products for each of the 2 d channels."""
    return 2 * size[0] * size[1] * width


@pytest.mark.parametrize(("shape", "size", "giga"), [(RES3, (3136, 784), 2.286), (RES4, (784, 196), 1.185)])
def test_size_of_the_map_and_multiply_adds(shape, size, giga):
    found, convolutions = count(shape, subsample="before")
    assert found == size
    assert round((convolutions + pairwise_products(size, shape[0] // 2)) / 1e9, 3) == pytest.approx(
        giga, abs=1e-3
    )


def test_multiply_adds_of_five_blocks():
    """What 2 blocks in res3 and 3 in res4 add to a ResNet, in units of 1e9: 8.127 (released code)."""

    def five(**options):
        total = 0
        for shape, blocks in ((RES3, 2), (RES4, 3)):
            (n, m), convolutions = count(shape, **options)
            if options.get("subsample") == "after":
                m //= 4  # pooled behind phi and g, where the layers do not see it
            total += blocks * (convolutions + pairwise_products((n, m), shape[0] // 2))
        return total / 1e9

    # ResNet-50 / 101 with five blocks minus without, 32 x 224 x 224: 28.361 - 20.234, 31.444 - 20.234,
    # 40.413 - 20.234. Only pooling before phi and g gives the paper's table 2e, 1.2 times the ResNet-101.
    before, after, none = five(subsample="before"), five(subsample="after"), five()
    assert before == pytest.approx(8.127, abs=2e-3)
    assert after == pytest.approx(11.210, abs=2e-3)
    assert none == pytest.approx(20.179, abs=2e-3)
    resnet_101 = 35.083
    assert [round((resnet_101 + extra) / resnet_101, 1) for extra in (before, after)] == [1.2, 1.3]


def test_multiply_adds_of_the_pairwise_term():
    # KaiyuYue/cgnl-network.pytorch: 1024 channels, 28 x 28 positions without sub-sampling.
    size, _ = count((1024, 28, 28), ndim=2)
    assert pairwise_products(size, 512) == 629_407_744
