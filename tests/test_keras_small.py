"""The study's C3D-style network in Keras: PyTorch's numbers, options, counts, files."""

import numpy as np
import pytest
import torch

from nlutils.course import import_keras

keras = import_keras("tensorflow")

from keras_cases import as_torch, noise, numbers  # noqa: E402

import nlutils.keras.models  # noqa: E402
import nlutils.torch.models  # noqa: E402
from nlutils.exchange import keras_to_torch, to_arrays, torch_to_keras  # noqa: E402

torch.set_num_threads(1)
NAMES = ("c3d_small", "c3d_small_non_local")
SMALL = {"widths": (4, 4, 8, 8), "dropout": 0.0}
CLIP = [(5, 33, 36, 3)]  # sides of which strides and pools leave a rest


def both(name, **options):
    """PyTorch's network and Keras', with the same weights, at which every clip has scores of its own."""
    theirs = nlutils.torch.models.create_model(name, 3, **SMALL | options).double()
    draw = torch.Generator().manual_seed(1)
    for key, tensor in theirs.state_dict().items():
        if tensor.ndim > 1:
            noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
            tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
        elif tensor.is_floating_point():
            low = 0.5 if key.endswith(("running_var", ".weight")) else -0.2
            tensor.copy_(low + 0.5 * torch.rand(tensor.shape, generator=draw, dtype=torch.float64))
    ours = nlutils.keras.models.create_model(name, 3, **SMALL | options)
    torch_to_keras(theirs, ours)
    return theirs, ours


CASES = [
    ("c3d_small", {}),
    ("c3d_small", {"input": "flow", "widths": (4, 6, 8, 5)}),
    ("c3d_small", {"non_local": [1, 4], "block": {"inner_channels": 3, "attention": "time", "scale": True}}),
    ("c3d_small", {"non_local": [3], "kind": "compact_generalized", "block": {"groups": 2}}),
    ("c3d_small_non_local", {}),
    ("c3d_small_non_local", {"non_local": (1, 2, 3, 4), "instantiation": "concatenation", "subsample": None}),
    ("c3d_small_non_local", {"instantiation": "dot_product", "subsample": "after"}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.usefixtures("float64")
def test_same_weights_same_scores(name, options):
    theirs, ours = both(name, **options)
    clips = noise([(5, 33, 36, 2)] if options.get("input") == "flow" else CLIP)
    expected = theirs.eval()(as_torch(clips)).detach().numpy()
    assert np.ptp(expected, axis=0).max() > 1e-2  # the clips are told apart
    np.testing.assert_allclose(numbers(ours(clips)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("float64")
def test_same_step_of_training(name):
    rate = 2.0**-6  # Keras keeps it in float32
    theirs, ours = both(name)
    clips, labels = noise(CLIP, batch=3), np.array([0, 2, 1])
    start = to_arrays(theirs)
    loss = theirs.train().loss(as_torch(clips), torch.from_numpy(labels))
    loss.backward()
    torch.optim.SGD(theirs.parameters(), rate).step()
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ours.compile(keras.optimizers.SGD(rate), cross_entropy, jit_compile=False)
    found = ours.train_on_batch(clips, labels, return_dict=True)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)  # Keras' mean is in float32
    wanted, trained = to_arrays(theirs), to_arrays(ours)
    assert trained.keys() == wanted.keys()
    for array, expected in wanted.items():
        if array.endswith("running_var"):  # PyTorch keeps n / (n - 1) of the variance that Keras keeps
            stage = [key for key in wanted if key.endswith("running_var")].index(array)
            count = 3 * numbers_of_map(name)[stage]
            expected = 0.9 * start[array] + (expected - 0.9 * start[array]) * (count - 1) / count
        np.testing.assert_allclose(trained[array], expected, rtol=0, atol=1e-10, err_msg=array)
    moved = [key for key in wanted if not np.allclose(start[key], wanted[key], atol=1e-7)]
    blind = ("w_z.bias", "g.bias", "phi.bias")  # softmax and normalisation take these constants away
    assert [key for key in wanted if key not in moved] == [key for key in wanted if key.endswith(blind)]
    keras_to_torch(ours, theirs)  # what Keras trained runs in PyTorch
    scores = theirs.eval()(as_torch(clips)).detach().numpy()
    np.testing.assert_allclose(numbers(ours(clips)), scores, rtol=0, atol=1e-10)


def numbers_of_map(name):
    """The positions of each map that is normalised, in the order of the layers."""
    first, second, third, last = 5 * 17 * 18, 5 * 17 * 18, 2 * 8 * 9, 1 * 4 * 4
    if name == "c3d_small":
        return [first, second, third, last]
    return [first, second, third, third, last, last]


@pytest.mark.parametrize("name", NAMES)
def test_options_weights_and_start_are_those_of_pytorch(name):
    assert nlutils.keras.models.model_options(name) == nlutils.torch.models.model_options(name)
    keras.utils.set_random_seed(0)
    torch.manual_seed(0)
    ours = to_arrays(nlutils.keras.models.create_model(name, 8))
    wanted = to_arrays(nlutils.torch.models.create_model(name, 8))
    assert {key: array.shape for key, array in ours.items()} == {
        key: array.shape for key, array in wanted.items()
    }
    for key, array in wanted.items():
        if array.ndim > 1:
            spread = 5 / (2 * array.size) ** 0.5  # five standard deviations of a spread
            assert ours[key].std() == pytest.approx(array.std(), rel=max(2 * spread, 0.02)), key
        elif key != "classifier.bias":  # drawn in PyTorch, 0 in Keras
            np.testing.assert_array_equal(ours[key], array, err_msg=key)


def test_fresh_blocks_change_nothing():
    plain = nlutils.keras.models.create_model("c3d_small", 3, **SMALL)
    grown = nlutils.keras.models.create_model("c3d_small_non_local", 3, **SMALL)
    own = [
        variable
        for layer in grown.layers
        if not hasattr(layer, "inner_channels")
        for variable in layer.weights
    ]
    for mine, other in zip(plain.weights, own, strict=True):
        mine.assign(other)
    clips = noise(CLIP)
    np.testing.assert_array_equal(numbers(plain(clips)), numbers(grown(clips)))


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model, clips = nlutils.keras.models.create_model("c3d_small_non_local", 3, **SMALL), noise(CLIP)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numbers(again(clips)), numbers(model(clips)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input": "sound"}, "input='sound' is not known"),
        ({"widths": (8, 16)}, r"widths=\(8, 16\) has 2 numbers; give 4"),
        ({"widths": (8, 16, 0, 4)}, "widths=0 must be a whole number"),
        ({"dropout": 2}, "dropout=2 must be"),
        ({"non_local": (5,)}, "non_local=5 is not known"),
        ({"kind": "uniform"}, "kind='uniform' is not known"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        nlutils.keras.models.create_model("c3d_small", 3, **options)
