"""Blocks and networks of PyTorch and Keras on the same weights: output, gradient; weights there and back."""

import json
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import nlutils.keras
import nlutils.torch
from nlutils.exchange import (
    from_arrays,
    keras_to_torch,
    load_block,
    save_block,
    saved_options,
    to_arrays,
    torch_to_keras,
)
from nlutils.instantiations import INSTANTIATIONS

SIZES = {1: (7,), 2: (5, 4), 3: (2, 5, 3)}


def pair(shape, *arguments, **options):
    """A PyTorch block with random weights, and a Keras block, both in float64."""
    torch_block = nlutils.torch.NonLocalBlock(*arguments, **options).double()
    draw = torch.Generator().manual_seed(1)
    for name, tensor in torch_block.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -1.0
            tensor.copy_(low + 2 * torch.rand(tensor.shape, generator=draw, dtype=torch.float64))
    keras_block = nlutils.keras.NonLocalBlock(*arguments, **options, dtype="float64")
    keras_block.build(shape)
    return torch_block, keras_block


@pytest.mark.parametrize("subsample", ["before", "after"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
@pytest.mark.parametrize("training", [False, True])
def test_same_weights_same_output_and_gradient(instantiation, ndim, subsample, training):
    rng = np.random.default_rng(0)
    x, direction = rng.normal(size=(2, 2, *SIZES[ndim], 6))
    torch_block, keras_block = pair(
        x.shape, 6, 4, ndim=ndim, instantiation=instantiation, subsample=subsample
    )
    torch_to_keras(torch_block, keras_block)

    torch_x = torch.from_numpy(x).movedim(-1, 1).requires_grad_()
    torch_z = torch_block.train(training)(torch_x).movedim(1, -1)
    torch_z.backward(torch.from_numpy(direction))
    keras_x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(keras_x)
        keras_z = keras_block(keras_x, training=training)
    gradient = tape.gradient(keras_z, keras_x, tf.constant(direction))

    np.testing.assert_allclose(keras_z.numpy(), torch_z.detach().numpy(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(gradient.numpy(), torch_x.grad.movedim(1, -1).numpy(), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "options", [{}, {"norm": False}, {"instantiation": "gaussian"}, {"instantiation": "concatenation"}]
)
def test_there_and_back(options):
    torch_block, keras_block = pair((None, 2, 3, 3, 6), 6, 4, **options)
    torch_to_keras(torch_block, keras_block)
    empty = nlutils.torch.NonLocalBlock(6, 4, **options).double()
    keras_to_torch(keras_block, empty)
    expected, found = to_arrays(torch_block), to_arrays(empty)
    assert found.keys() == expected.keys() == to_arrays(keras_block).keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].dtype == np.float64


def test_running_statistics_after_a_training_step():
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 6))  # 2 * 5 * 4 = 40 positions
    torch_block, keras_block = pair(x.shape, 6, 4, ndim=2)
    torch_to_keras(torch_block, keras_block)
    start = to_arrays(torch_block)
    torch_block(torch.from_numpy(x).movedim(-1, 1))
    keras_block(x, training=True)
    after, keras_after = to_arrays(torch_block), to_arrays(keras_block)
    mean, variance = "norm.running_mean", "norm.running_var"
    np.testing.assert_allclose(keras_after[mean], after[mean], rtol=0, atol=1e-13)
    # The one difference between the two: PyTorch's variance of the batch is unbiased, Keras' is not.
    torch_step, keras_step = (
        after[variance] - 0.9 * start[variance],
        keras_after[variance] - 0.9 * start[variance],
    )
    np.testing.assert_allclose(torch_step, keras_step * 40 / 39, rtol=1e-12)


def test_kernels_are_transposed():
    torch_block, keras_block = pair((None, 4, 4, 6), 6, 4, ndim=2)
    torch_to_keras(torch_block, keras_block)
    kernel = keras.ops.convert_to_numpy(keras_block.theta.kernel)
    assert kernel.shape == (1, 1, 6, 4)
    np.testing.assert_array_equal(kernel[0, 0], torch_block.theta.weight.detach().numpy()[:, :, 0, 0].T)


def test_arrays_are_copies():
    for block in pair((None, 4, 6), 6, ndim=1):
        before = to_arrays(block)
        to_arrays(block)["g.bias"][:] = 9
        np.testing.assert_array_equal(to_arrays(block)["g.bias"], before["g.bias"])


def test_faults_are_all_named_and_nothing_is_written():
    torch_block = nlutils.torch.NonLocalBlock(6, 2, norm=False, instantiation="concatenation")
    keras_block = nlutils.keras.NonLocalBlock(6, 3, norm=False)
    keras_block.build((None, 2, 2, 2, 6))
    before = to_arrays(keras_block)
    with pytest.raises(ValueError, match="these weights do not fit the Keras block") as error:
        torch_to_keras(torch_block, keras_block)
    assert "w_f is not a weight of the Keras block" in str(error.value)
    assert "theta.weight has shape (2, 6, 1, 1, 1), the Keras block needs (3, 6, 1, 1, 1)" in str(error.value)
    for name, array in to_arrays(keras_block).items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(ValueError, match=r"do not fit the PyTorch block: w_f is missing; theta\.weight has"):
        keras_to_torch(keras_block, torch_block)


def test_a_missing_array_and_a_foreign_object():
    torch_block = nlutils.torch.NonLocalBlock(6)
    arrays = to_arrays(torch_block)
    del arrays["norm.running_var"]
    with pytest.raises(ValueError, match=r"do not fit the PyTorch block: norm\.running_var is missing$"):
        from_arrays(torch_block, arrays)
    with pytest.raises(ValueError, match="the Keras block has no weights yet; call it once"):
        torch_to_keras(torch_block, nlutils.keras.NonLocalBlock(6))
    with pytest.raises(
        TypeError, match=r"block is a list; it must be a NonLocalBlock or a .*, or a network, of"
    ):
        to_arrays([1])


@pytest.mark.parametrize("kind", ["torch", "keras"])
@pytest.mark.parametrize("values", [1j * np.ones(6), np.full(6, "a"), np.full(6, None), np.ones(6, bool)])
def test_arrays_of_other_than_real_numbers(kind, values):
    block = pair((None, 4, 6), 6, 6, ndim=1)[kind == "keras"]
    before = to_arrays(block)
    with pytest.raises(ValueError, match=r"theta\.bias is of \S+, the \w+ block needs real numbers$"):
        from_arrays(block, {name: array + 1 for name, array in before.items()} | {"theta.bias": values})
    for name, array in to_arrays(block).items():
        np.testing.assert_array_equal(array, before[name])


def test_a_shape_is_compared_before_the_numbers_are_read():
    """40 GB in float32, from two bytes."""
    block = nlutils.torch.NonLocalBlock(6, ndim=1)
    huge = torch.zeros((), dtype=torch.bfloat16).expand(100_000, 100_000)
    with pytest.raises(ValueError, match=r"theta\.bias has shape \(100000, 100000\), the PyTorch block"):
        from_arrays(block, to_arrays(block) | {"theta.bias": huge})
    with pytest.raises(TypeError, match="arrays is a list; it must be a dict of arrays by name"):
        from_arrays(block, [huge])


def test_frameworks_in_the_wrong_order():
    torch_block, keras_block = pair((None, 4, 6), 6, ndim=1)
    with pytest.raises(TypeError, match=r"torch_block is a NonLocalBlock of Keras, and must be of PyTorch"):
        torch_to_keras(keras_block, torch_block)
    with pytest.raises(TypeError, match=r"keras_block is a NonLocalBlock of PyTorch, and must be of Keras"):
        keras_to_torch(torch_block, torch_block)


def test_what_has_no_weights_to_exchange():
    with torch.device("meta"):
        block = nlutils.torch.NonLocalBlock(6)
    with pytest.raises(
        ValueError, match='the PyTorch block is on the device "meta", where it has no numbers'
    ):
        to_arrays(block)
    for thing, found in (
        (nlutils.torch.NonLocalBlock, "the class NonLocalBlock"),
        (nlutils.keras.NonLocalBlock, "the class NonLocalBlock"),
        (keras.optimizers.SGD(), "a SGD"),
    ):
        with pytest.raises(TypeError, match=f"block is {found}; it must be"):
            to_arrays(thing)


def test_a_compact_generalized_block_there_and_back():
    torch_block = nlutils.torch.CompactGeneralizedNonLocalBlock(8, groups=2, ndim=2).double()
    draw = torch.Generator().manual_seed(0)
    for tensor in torch_block.state_dict().values():
        torch.nn.init.normal_(tensor, generator=draw)
    keras_block = nlutils.keras.CompactGeneralizedNonLocalBlock(8, groups=2, ndim=2, dtype="float64")
    keras_block.build((None, 5, 4, 8))
    torch_to_keras(torch_block, keras_block)
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 8))
    z = torch_block(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).detach().numpy()
    np.testing.assert_allclose(keras.ops.convert_to_numpy(keras_block(x)), z, rtol=0, atol=1e-12)
    assert np.abs(z - x).max() > 0.1
    back = nlutils.torch.CompactGeneralizedNonLocalBlock(8, groups=2, ndim=2).double()
    keras_to_torch(keras_block, back)
    for name, tensor in torch_block.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def recurrent_pair():
    """A network with an LSTM in each framework, in float64; the layers have one name in both."""
    theirs = torch.nn.ModuleDict(
        {"head": torch.nn.ModuleDict({"lstm": torch.nn.LSTM(4, 3), "fc": torch.nn.Linear(3, 2)})}
    ).double()
    clip = keras.Input((None, 4), dtype="float64")
    states = keras.layers.LSTM(3, return_sequences=True, dtype="float64", name="head-lstm")(clip)
    return theirs, keras.Model(clip, keras.layers.Dense(2, dtype="float64", name="head-fc")(states))


def test_a_network_with_an_lstm_there_and_back():
    theirs, ours = recurrent_pair()
    torch_to_keras(theirs, ours)
    x = np.random.default_rng(0).normal(size=(2, 5, 4))
    states, _ = theirs["head"]["lstm"](torch.from_numpy(x).transpose(0, 1))
    expected = theirs["head"]["fc"](states).transpose(0, 1).detach().numpy()
    np.testing.assert_allclose(keras.ops.convert_to_numpy(ours(x)), expected, rtol=0, atol=1e-12)

    back, _ = recurrent_pair()
    keras_to_torch(ours, back)
    weights, found = to_arrays(theirs), to_arrays(back)
    assert weights.keys() == found.keys() == to_arrays(ours).keys()
    first, second = weights.pop("head.lstm.bias_ih_l0"), weights.pop("head.lstm.bias_hh_l0")
    np.testing.assert_array_equal(found.pop("head.lstm.bias_ih_l0"), first + second)
    assert np.abs(second).max() > 0
    assert not found.pop("head.lstm.bias_hh_l0").any()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_network_inside_a_network_is_a_part_of_the_path():
    features = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="fc6")], name="spatial-features"
    )
    clip = keras.Input((4,))
    model = keras.Model(clip, keras.layers.Dense(2, name="classifier")(features(clip)))
    names = [
        "spatial.features.fc6.weight",
        "spatial.features.fc6.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    assert list(to_arrays(model)) == names


def test_layers_that_have_no_counterpart_are_named():
    clip = keras.Input((None, 4))
    model = keras.Model(clip, keras.layers.GRU(3, name="gru")(clip))
    with pytest.raises(
        ValueError, match="layer 'gru', a GRU, has a weight 'recurrent_kernel' for which PyTorch"
    ):
        to_arrays(model)
    frames = keras.Sequential([keras.layers.Dense(3, name="a"), keras.layers.Dense(3, name="b")])
    model = keras.Model(clip, keras.layers.TimeDistributed(frames, name="frames")(clip))
    with pytest.raises(
        ValueError, match=r"has two weights called frames\.weight; give its layers other names"
    ):
        to_arrays(model)


@pytest.mark.parametrize("options", [{"scale": True}, {"instantiation": "concatenation", "norm": False}])
def test_one_file_for_both_frameworks(tmp_path, options):
    torch_block, keras_block = pair((None, 2, 3, 3, 6), 6, 4, subsample="before", **options)
    path = tmp_path / "block.npz"
    save_block(torch_block, path)
    load_block(keras_block, path)
    from_torch = to_arrays(keras_block)
    save_block(keras_block, path)
    rebuilt = nlutils.torch.NonLocalBlock(**saved_options(path)).double()
    load_block(rebuilt, path)
    for name, array in to_arrays(torch_block).items():
        np.testing.assert_array_equal(from_torch[name], array, err_msg=name)
        np.testing.assert_array_equal(to_arrays(rebuilt)[name], array, err_msg=name)
    assert [file.name for file in tmp_path.iterdir()] == ["block.npz"]


def test_a_saved_compact_generalized_block(tmp_path):
    block = nlutils.torch.CompactGeneralizedNonLocalBlock(8, groups=2, kernel="rbf", order=2)
    save_block(block, tmp_path / "block.npz")
    options = saved_options(tmp_path / "block.npz")
    expected = {"in_channels": 8, "inner_channels": 4, "ndim": 3, "groups": 2, "kernel": "rbf", "order": 2}
    assert options == expected
    keras_block = nlutils.keras.CompactGeneralizedNonLocalBlock(**options)
    keras_block.build((None, 2, 2, 2, 8))
    load_block(keras_block, tmp_path / "block.npz")
    np.testing.assert_array_equal(to_arrays(keras_block)["theta.weight"], block.theta.weight.detach().numpy())


def test_a_file_of_another_block_is_refused(tmp_path):
    path = tmp_path / "block.npz"
    save_block(nlutils.torch.NonLocalBlock(6, scale=True, norm=False), path)
    with pytest.raises(
        ValueError, match="other options: scale=True in the file and False in the block; norm="
    ):
        load_block(nlutils.torch.NonLocalBlock(6), path)
    load_block(nlutils.torch.NonLocalBlock(6, scale=True, norm=False, zero_init=False), path)
    with pytest.raises(ValueError, match="holds a NonLocalBlock, and the block is a CompactGeneralized"):
        load_block(nlutils.torch.CompactGeneralizedNonLocalBlock(16), path)
    with pytest.raises(ValueError, match=r"path='block\.pt' must end in \.npz"):
        save_block(nlutils.torch.NonLocalBlock(6), "block.pt")
    with pytest.raises(TypeError, match="block is a Linear; it must be one of NonLocalBlock, Compact"):
        save_block(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize("content", [b"", b"not a zip", "arrays without a header"])
def test_a_foreign_or_broken_file_is_named(tmp_path, content):
    path = tmp_path / "block.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, a=np.zeros(2))
    with pytest.raises(ValueError, match=r"block\.npz is not a file of save_block"):
        load_block(nlutils.torch.NonLocalBlock(6), path)
    with pytest.raises(FileNotFoundError):
        saved_options(tmp_path / "none.npz")


HEADER = {"version": 1, "block": "NonLocalBlock", "options": {"in_channels": 6}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": 1}, r"is not a file of save_block: its entry 'nlutils' must hold version, block and options"),
        ([1], "is not a file of save_block: its entry"),
        ("text", "is not a file of save_block: its entry"),
        ({**HEADER, "version": 2}, "has version 2 of the format, this nlutils reads 1"),
        ({**HEADER, "block": ["Dense"]}, r"holds a \['Dense'\]; known are NonLocalBlock, CompactGeneralized"),
        (HEADER, "has the options in_channels; a NonLocalBlock has in_channels, inner_channels, ndim"),
        ({**HEADER, "options": [1]}, "has the options 1; a NonLocalBlock has in_channels"),
        ({**HEADER, "options": 3}, "has the options 3; a NonLocalBlock has in_channels"),
    ],
)
def test_a_header_that_is_none_of_ours_is_named(tmp_path, header, message):
    path = tmp_path / "block.npz"
    np.savez(path, nlutils=np.array(json.dumps(header)))
    for read in (saved_options, lambda path: load_block(nlutils.torch.NonLocalBlock(6), path)):
        with pytest.raises(ValueError, match=r"block\.npz " + message):
            read(path)


def test_an_option_that_is_unknown_here_is_named(tmp_path):
    path = tmp_path / "block.npz"
    block = nlutils.torch.NonLocalBlock(6)
    save_block(block, path)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays.pop("nlutils")))
    header["options"]["heads"] = 4
    np.savez(path, nlutils=np.array(json.dumps(header)), **arrays)
    with pytest.raises(ValueError, match=r"has the options .*heads; a NonLocalBlock has in_channels"):
        load_block(block, path)


def test_bfloat16_is_written_as_float32_and_read_back_exactly(tmp_path):
    path = tmp_path / "block.npz"
    torch_block = pair((None, 2, 3, 3, 6), 6, 4)[0].bfloat16()
    keras_block = nlutils.keras.NonLocalBlock(6, 4, dtype="bfloat16")
    keras_block.build((None, 2, 3, 3, 6))
    torch_to_keras(torch_block, keras_block)
    expected = to_arrays(torch_block)
    for block, empty in (
        (torch_block, nlutils.torch.NonLocalBlock(6, 4).bfloat16()),
        (keras_block, nlutils.torch.NonLocalBlock(6, 4).bfloat16()),
    ):
        save_block(block, path)
        load_block(empty, path)
        found = to_arrays(empty)
        for name, array in expected.items():
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert np.abs(expected["theta.weight"]).max() > 0.5
