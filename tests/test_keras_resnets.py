"""C2D and I3D in Keras: on the same weights the same scores and gradients as in PyTorch."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras_cases import as_torch, numbers

import nlutils.keras
import nlutils.torch
from nlutils.architectures.resnet import find_layout
from nlutils.exchange import keras_to_torch, to_arrays, torch_to_keras
from nlutils.keras.models.common import MaxPool, clips, convolution, max_pool
from nlutils.torch.models import model_options

torch.set_num_threads(1)
SMALL = {"depth": (1, 1, 1, 1), "width": 4}


def randomise(network):
    """All weights and statistics far from their start."""
    draw = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -0.5
            tensor.copy_(low + torch.rand(tensor.shape, generator=draw, dtype=torch.float64))
    return network


def pair(name, **options):
    """The PyTorch and the Keras network for 5 classes, in float64, with the same weights."""
    theirs = randomise(nlutils.torch.create_model(name, 5, **options).double())
    ours = nlutils.keras.create_model(name, 5, **options)
    torch_to_keras(theirs, ours)
    return theirs, ours


def trainable(model):
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_variables)


CASES = [
    ("c2d", {**SMALL, "non_local": {"res3": [0]}}, (7, 33, 30)),
    ("c2d", {**SMALL, "input": "flow", "clip": "8x8", "layout": "slowfast", "stride_in": "1x1"}, (4, 32, 32)),
    ("c2d", {**SMALL, "non_local": {"res4": [0]}, "attention": "time", "cgnl": {"res3": [0]}}, (8, 24, 24)),
    ("i3d", {**SMALL, "depth": (1, 2, 2, 2), "layout": "released", "non_local": {"res4": [-1]}}, (8, 16, 24)),
    ("i3d", {**SMALL, "inflate": "3x3x3", "layout": "mmaction2", "non_local": {"res2": [0]}}, (6, 24, 24)),
    (
        "i3d",
        {
            **SMALL,
            "clip": "128x1",
            "layout": "released",
            "non_local": {"res3": [0]},
            "instantiation": "concatenation",
        },
        (64, 16, 16),
    ),
    ("i3d", {**SMALL, "cgnl": {"res5": [0]}, "groups": 2, "kernel": "rbf", "order": 2}, (8, 16, 16)),
]


@pytest.mark.parametrize(("name", "options", "size"), CASES, ids=range(len(CASES)))
def test_same_weights_same_scores_and_gradients(float64, name, options, size):
    theirs, ours = pair(name, dropout=0.0, **options)
    assert ours.name == name
    channels = 2 if options.get("input") == "flow" else 3
    x, labels = np.random.default_rng(0).normal(size=(3, *size, channels)), np.array([0, 3, 1])
    with torch.no_grad():
        scores = theirs.eval()(as_torch(x)).numpy()
    assert np.ptp(scores) > 0.1
    np.testing.assert_allclose(numbers(ours(x)), scores, rtol=0, atol=1e-10)

    before = to_arrays(theirs)
    theirs.train().loss(as_torch(x), torch.from_numpy(labels)).backward()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with tf.GradientTape() as tape:
        value = loss(labels, ours(x, training=True))
    gradients = tape.gradient(value, ours.trainable_variables)
    wanted = {parameter: weight.grad for parameter, weight in theirs.named_parameters()}
    # The gradients become the weights of the Keras network, so that they get PyTorch's names and layouts.
    statistics = to_arrays(ours)
    for variable, gradient in zip(ours.trainable_variables, gradients, strict=True):
        variable.assign(gradient)
    found = to_arrays(ours)
    for parameter, gradient in wanted.items():
        scale = max(1.0, gradient.abs().max().item())
        np.testing.assert_allclose(
            found[parameter], gradient.numpy(), rtol=0, atol=1e-9 * scale, err_msg=parameter
        )
    moved = [key for key in before if key.endswith("running_mean")]
    for key in moved:
        mean = theirs.state_dict()[key].numpy()
        assert not np.array_equal(mean, before[key]), key
        np.testing.assert_allclose(statistics[key], mean, rtol=0, atol=1e-10, err_msg=key)


def test_names_and_options_are_those_of_pytorch():
    assert nlutils.keras.list_models() == [
        "c2d",
        "i3d",
        "c3d",
        "lrcn",
        "two_stream",
        "c3d_small",
        "c3d_small_non_local",
    ]
    assert set(nlutils.keras.list_models()) <= set(nlutils.torch.list_models())
    for name in ("c2d", "i3d"):
        assert nlutils.keras.model_options(name) == model_options(name)
    assert nlutils.keras.model_options("i3d")["inflate"] == "3x1x1"
    with pytest.raises(ValueError, match="name='c4d' is not known; use one of 'c2d', 'i3d'"):
        nlutils.keras.create_model("c4d", 5)
    with pytest.raises(TypeError, match="c2d has no option 'deep'; it has depth, width, input"):
        nlutils.keras.create_model("c2d", 5, deep=3)
    with pytest.raises(ValueError, match="num_classes=0 must be a whole number"):
        nlutils.keras.create_model("c2d", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 34}, "depth=34 is not known; use 50, 101"),
        ({"width": 0}, "width=0 must be a whole number"),
        ({"input": "depth"}, "input='depth' is not known"),
        ({"layout": "slowfast"}, "clip='32x2' does not go with layout='slowfast'; use '8x8'"),
        ({"inflate": "3x3"}, "inflate='3x3' is not known; use one of None, '3x1x1', '3x3x3'"),
        ({"non_local": 3}, "non_local=3 is not known; use 0, 1, 5, 10"),
        ({"instantiation": "gaussian"}, "instantiation='gaussian' is for blocks, and non_local=0 has none"),
        ({"non_local": {"res4": [0]}, "cgnl": {"res4": [0]}}, "both name a residual block of res4"),
        ({"cgnl": {"res2": [0]}, "groups": 3}, "groups=3"),
        ({"non_local": [4]}, r"non_local=\[4\] is not known; use 0, 1, 5, 10, or say where"),
        (
            {"non_local": {"res4": [0]}, "cgnl": {"res2": [0]}, "frames_per_group": {"res2": 2}},
            r"frames_per_group=\{'res2': 2\}: res2 has no non-local block",
        ),
        ({"dropout": 1.5}, "dropout=1.5 must be a number from 0 to 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        nlutils.keras.create_model("c2d", 5, **{**SMALL, **options})


def test_the_network_of_the_paper():
    """As many parameters as the released architecture has, and Table 1's maps, for 32 x 224 x 224."""
    model = nlutils.keras.create_model("i3d", 400, non_local=5)
    assert trainable(model) == 35_401_936
    assert model.expects == find_layout("paper", "32x2").expects("32x2")
    sizes, shape = {}, (None, 32, 224, 224, 3)
    for layer in model.layers[1:]:
        if "shortcut" not in layer.name and not layer.name.endswith("add"):
            shape = layer.compute_output_shape(shape)
            sizes[layer.name] = shape[1:]
    assert sizes["stem-relu"] == (16, 112, 112, 64)
    assert sizes["pool1"] == (8, 56, 56, 64)
    assert sizes["pool2"] == (4, 56, 56, 256)
    assert sizes["stages-1-3-non_local"] == (4, 28, 28, 512)
    assert sizes["stages-2-5-non_local"] == (4, 14, 14, 1024)
    assert sizes["stages-3-2-relu"] == (4, 7, 7, 2048)
    kernel = numbers(model.get_layer("stages-3-0-b-conv").kernel)
    assert kernel.std() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)  # from the outputs
    assert not numbers(model.get_layer("stages-3-0-c-norm").gamma).any()


def test_weights_there_and_back_and_faults(float64):
    options = {**SMALL, "non_local": {"res3": [0]}}
    theirs, ours = pair("i3d", **options)
    empty = nlutils.torch.create_model("i3d", 5, **options).double()
    keras_to_torch(ours, empty)
    expected, found = to_arrays(theirs), to_arrays(empty)
    assert expected.keys() == to_arrays(ours).keys()
    assert "stages.1.0.non_local.theta.weight" in expected
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    before = to_arrays(ours)
    other = nlutils.torch.create_model("c2d", 6, **SMALL)
    with pytest.raises(ValueError, match="these weights do not fit the Keras network") as error:
        torch_to_keras(other, ours)
    assert "stages.1.0.non_local.theta.weight is missing" in str(error.value)
    assert "classifier.weight has shape (6, 128), the Keras network needs (5, 128)" in str(error.value)
    assert "stem.conv.weight has shape (4, 3, 1, 7, 7), the Keras network needs (4, 3, 5, 7, 7)" in str(
        error.value
    )
    for name, array in to_arrays(ours).items():
        np.testing.assert_array_equal(array, before[name])


def test_a_saved_network_computes_the_same(tmp_path):
    options = {**SMALL, "non_local": {"res3": [0]}, "cgnl": {"res4": [0]}}
    model = nlutils.keras.create_model("i3d", 5, **options)
    for layer in model.layers:
        for variable in layer.weights:
            variable.assign(0.5 + 0.1 * np.random.default_rng(len(variable.shape)).random(variable.shape))
    assert model.expects is None
    model.expects = find_layout("paper", "8x8").expects("8x8")  # of a published size
    model.save(tmp_path / "i3d.keras")
    loaded = keras.models.load_model(tmp_path / "i3d.keras")
    x = np.random.default_rng(0).random((2, 8, 32, 32, 3), np.float32)
    np.testing.assert_array_equal(numbers(loaded(x)), numbers(model(x)))
    assert to_arrays(loaded).keys() == to_arrays(model).keys()
    model.save_weights(tmp_path / "i3d.weights.h5")
    fresh = nlutils.keras.create_model("i3d", 5, **options)
    fresh.load_weights(tmp_path / "i3d.weights.h5")
    np.testing.assert_array_equal(numbers(fresh(x)), numbers(model(x)))


@pytest.mark.parametrize("name", ["c2d", "i3d"])
def test_a_block_can_be_inserted(name):
    model = nlutils.keras.create_model(name, 5, **SMALL)
    wider, insertions = nlutils.keras.insert_non_local(model, ["stages-1-0-relu", "pool2"])
    assert [one.in_channels for one in insertions] == [32, 16]
    x = np.random.default_rng(0).random((2, 4, 24, 24, 3), np.float32)
    np.testing.assert_allclose(numbers(wider(x)), numbers(model(x)), rtol=0, atol=1e-6)
    assert wider.count_params() == model.count_params() + sum(one.parameters for one in insertions)


def test_sizes_that_a_graph_leaves_open():
    model = nlutils.keras.create_model("i3d", 5, **SMALL, non_local={"res3": [0]}, cgnl={"res4": [0]})
    graph = tf.function(model, input_signature=[tf.TensorSpec((None, None, None, None, 3))])
    for size in ((8, 24, 24), (9, 30, 17)):
        x = np.random.default_rng(0).random((2, *size, 3), np.float32)
        np.testing.assert_allclose(graph(x).numpy(), numbers(model(x)), rtol=0, atol=1e-5)


def test_half_precision():
    """Weights in float32, layers in float16: the same scores but for rounding, and the loss falls."""
    policy, options = keras.config.dtype_policy(), {**SMALL, "non_local": {"res3": [0]}, "dropout": 0.0}
    full = nlutils.keras.create_model("i3d", 5, **options)
    try:
        keras.config.set_dtype_policy("mixed_float16")
        mixed = nlutils.keras.create_model("i3d", 5, **options)
    finally:
        keras.config.set_dtype_policy(policy)
    randomised = randomise(nlutils.torch.create_model("i3d", 5, **options).double())
    for model in (full, mixed):
        torch_to_keras(randomised, model)
    x = np.random.default_rng(0).normal(size=(2, 8, 24, 24, 3)).astype("float32")
    found, expected = numbers(mixed(x)), numbers(full(x))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.01 * np.abs(expected).max())


def test_eight_clips_are_learnt():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(8, 4, 16, 16, 3)).astype("float32"), np.arange(8) % 4
    options = {**SMALL, "width": 8, "clip": "8x8", "non_local": {"res3": [0]}, "cgnl": {"res4": [0]}}
    model = nlutils.keras.create_model("i3d", 4, dropout=0.0, **options)
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        run_eagerly=True,  # eight steps take less time than making their graph
    )
    history = model.fit(x, labels, batch_size=8, epochs=8, verbose=0).history
    assert history["loss"][0] > 1.0
    assert history["loss"][-1] < 0.1
    assert history["accuracy"][-1] == 1


def test_too_small_and_foreign_clips_are_named():
    model = nlutils.keras.create_model("c2d", 5, **SMALL, layout="released")
    for shape in ((2, 32, 32), (6, 5, 5), (7, 4, 5), (7, 5, 4)):
        with pytest.raises(ValueError, match=r"too small: T, H and W must be at least 7, 5, 5"):
            model(np.zeros((1, *shape, 3)))
    assert model(np.zeros((1, 7, 5, 5, 3))).shape == (1, 5)  # the least that PyTorch's takes, too
    with pytest.raises(ValueError, match=r"incompatible with the layer: expected shape=.*3\), found shape="):
        model(np.zeros((1, 8, 32, 32, 2)))


@pytest.mark.parametrize("size", [(4, 9, 8), (5, 8, 9), (3, 3, 4)])
@pytest.mark.parametrize(
    ("window", "stride", "padding", "ceil"),
    [
        ((2, 3, 3), (2, 2, 2), (0, 1, 1), False),
        ((3, 3, 3), (2, 2, 2), 0, True),
        ((1, 2, 2), None, 0, True),
        ((3, 2), (2, 1), (1, 0), True),
    ],
)
def test_pooling_is_that_of_pytorch(window, stride, padding, ceil, size):
    size = size[-len(window) :]
    x = np.random.default_rng(0).normal(size=(2, *size, 3)) - 5  # zeros of a padding would win
    layer = MaxPool(window, stride, padding, ceil, dtype="float64")
    pool = {2: torch.nn.functional.max_pool2d, 3: torch.nn.functional.max_pool3d}[len(window)]
    expected = pool(as_torch(x), window, stride, padding, ceil_mode=ceil).movedim(1, -1).numpy()
    np.testing.assert_array_equal(numbers(layer(x)), expected)
    assert layer.compute_output_shape((None, *size, 3)) == (None, *expected.shape[1:])
    assert layer.compute_output_shape((None, *(None for _ in size), 3))[1:-1] == (None,) * len(size)


def test_a_pool_copies_no_map_that_it_divides(monkeypatch):
    layer, x = MaxPool((1, 2, 2), ceil=True), np.arange(32.0, dtype="float32").reshape(1, 2, 4, 4, 1)
    pads = []
    pad = keras.ops.pad
    monkeypatch.setattr(keras.ops, "pad", lambda *args, **options: pads.append(args) or pad(*args, **options))
    assert layer(x).shape == (1, 2, 2, 2, 1)
    assert not pads
    assert layer(x[:, :, 1:]).shape == (1, 2, 2, 2, 1)
    assert [widths for _, widths in pads] == [((0, 0), (0, 0), (0, 1), (0, 0), (0, 0))]


def test_a_pool_of_padding_alone_is_refused():
    with pytest.raises(ValueError, match=r"stride=\(3, 3\) must be at most window=\(2, 2\) with ceil=True"):
        MaxPool((2, 2), 3, ceil=True)
    with pytest.raises(ValueError, match=r"window=\(2,\) must have two numbers"):
        MaxPool((2,))
    with pytest.raises(ValueError, match=r"maps of shape \(1, 1, 8, 3\) are too small for small, which"):
        MaxPool((2, 2), name="small")(np.zeros((1, 1, 8, 3)))
    with pytest.raises(ValueError, match="expected ndim=5, found ndim=4"):
        MaxPool((1, 2, 2))(np.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"padding=\(1, 1\) is too much for .* use \(0, 0\) at most"):
        max_pool(clips(3)[:, 0], (2, 2), name="pool", padding=1, ceil=True)


@pytest.mark.parametrize("side", [6, 7])
def test_a_strided_convolution_is_padded_as_in_pytorch(float64, side):
    inputs = clips(2)
    outputs = convolution(inputs, 3, (1, 3, 3), name="a.b", stride=(1, 2, 2), padding=(0, 1, 1))
    model = keras.Model(inputs, outputs)
    assert [layer.name for layer in model.layers][1:] == ["a-b-padding", "a-b"]
    theirs = torch.nn.Sequential(torch.nn.Conv3d(2, 3, (1, 3, 3), (1, 2, 2), (0, 1, 1))).double()
    weights = to_arrays(model)
    theirs.load_state_dict({f"0.{key[4:]}": torch.from_numpy(array) for key, array in weights.items()})
    x = np.random.default_rng(0).normal(size=(2, 3, side, side, 2))
    expected = theirs(as_torch(x)).movedim(1, -1).detach().numpy()
    np.testing.assert_allclose(numbers(model(x)), expected, rtol=0, atol=1e-12)
