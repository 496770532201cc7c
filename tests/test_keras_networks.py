"""C3D, LRCN and the two-stream network in Keras: PyTorch's numbers, training, files, counts."""

import numpy as np
import pytest
import torch

from nlutils.course import import_keras

keras = import_keras("tensorflow")

from keras_cases import as_torch, noise, numbers  # noqa: E402

import nlutils.keras.models  # noqa: E402
import nlutils.torch.models  # noqa: E402
from nlutils.exchange import to_arrays, torch_to_keras  # noqa: E402
from nlutils.keras import insert_non_local  # noqa: E402
from nlutils.keras.models.layers import ResponseNorm  # noqa: E402

torch.set_num_threads(1)
CLASSES = 3
NAMES = ("c3d", "lrcn", "two_stream")
# Without dropout, so that a step of training can be compared.
SMALL = {
    "c3d": {"width": 4, "fc": 16, "frames": 8, "size": (32, 32), "dropout": 0.0},
    "lrcn": {"width": 8, "fc6": 16, "hidden": 8, "size": (49, 60), "fc6_dropout": 0.0, "dropout": 0.0},
    "two_stream": {"width": 6, "size": (41, 48), "stack": 2, "dropout": 0.0},
}
SHAPES = {
    "c3d": [(8, 32, 32, 3)],
    "lrcn": [(4, 49, 60, 3)],
    "two_stream": [(5, 41, 48, 3), (4, 41, 48, 2)],
}


@pytest.fixture
def no_memory():
    """Networks in full size: their variables have shapes, but no numbers."""
    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.utils.clear_session()  # which forgets that they wait for their numbers


def small(name, num_classes=CLASSES, **options):
    return nlutils.keras.models.create_model(name, num_classes, **SMALL[name] | options)


def theirs(name, **options):
    """PyTorch's network in float64, with weights and biases at which every clip has scores of its own."""
    model = nlutils.torch.models.create_model(name, CLASSES, **SMALL[name] | options).double()
    draw = torch.Generator().manual_seed(1)
    for parameter in model.state_dict().values():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        inputs = parameter[0].numel() if parameter.ndim > 1 else 8
        parameter.copy_(noise * (2 / inputs) ** 0.5)
    return model


def both(name, **options):
    """PyTorch's network and Keras', with the same weights, in float64."""
    one, other = theirs(name, **options), small(name, **options)
    torch_to_keras(one, other)
    return one, other


# The same numbers as in PyTorch

CASES = [
    ("c3d", {}, None),
    # sides of which every pooling keeps a rest: 6, 3, 2, 1, 1 and 20, 10, 5, 3, 2, 1 and 27, 14, 7, 4, 2, 1
    ("c3d", {"input": "flow", "frames": 6, "size": (20, 27)}, [(6, 20, 27, 2)]),
    ("c3d", {"frames": 2, "size": (48, 33)}, [(2, 48, 33, 3)]),  # fc6 sees 1 x 2 x 2
    ("c3d", {"layout": "mmaction2", "frames": 16, "size": (24, 56)}, [(16, 24, 56, 3)]),
    ("lrcn", {}, None),
    ("lrcn", {"input": "flow", "size": 83, "width": 9}, [(1, 83, 83, 2)]),  # fc6 sees 2 x 2
    ("two_stream", {}, None),
    ("two_stream", {"stack": 3, "size": (64, 73)}, [(3, 64, 73, 3), (11, 64, 73, 2)]),
]


@pytest.mark.parametrize(("name", "options", "shapes"), CASES)
@pytest.mark.usefixtures("float64")
def test_same_weights_same_scores(name, options, shapes):
    one, other = both(name, **options)
    clips = noise(shapes or SHAPES[name])
    expected = one.eval()(as_torch(clips)).detach().numpy()
    assert np.ptp(expected, axis=0).min() > 1e-3  # the clips are told apart
    np.testing.assert_allclose(numbers(other(clips)), expected, rtol=0, atol=1e-10)


def training_model(name, model):
    """What the docstrings compile: the model, or one that ends at the logits of every step or place."""
    ends = {"lrcn": ["classifier"], "two_stream": ["spatial-votes", "temporal-votes"]}
    if name not in ends:
        return model
    outputs = [model.get_layer(end).output for end in ends[name]]
    return keras.Model(model.inputs, outputs if len(outputs) > 1 else outputs[0])


def targets(name, labels):
    """One label a clip, a step (LRCN: 4) or a stream and place (two streams: 2)."""
    repeated = {"c3d": labels, "lrcn": np.repeat(labels[:, None], 4, axis=1)}
    return repeated.get(name, 2 * [np.repeat(labels[:, None], 2, axis=1)])


def cross_entropy(name):
    one = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return [one, one] if name == "two_stream" else one


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("float64")
def test_same_step_of_training(name):
    rate = 2.0**-6  # Keras keeps it in float32
    one, other = both(name)
    clips, labels = noise(SHAPES[name], batch=3), np.array([0, 2, 1])
    start = to_arrays(one)
    loss = one.train().loss(as_torch(clips), torch.from_numpy(labels))
    loss.backward()
    torch.optim.SGD(one.parameters(), rate).step()

    model = training_model(name, other)
    model.compile(keras.optimizers.SGD(rate), cross_entropy(name), jit_compile=False)
    found = model.train_on_batch(clips, targets(name, labels), return_dict=True)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)  # Keras' mean is in float32
    wanted, trained = to_arrays(one), to_arrays(other)
    if name == "lrcn":  # two biases in PyTorch, each of which takes the step of Keras' one
        first, second = "lstm.bias_ih_l0", "lstm.bias_hh_l0"
        wanted[first] = start[second] + wanted[first]
        wanted[second] = np.zeros_like(wanted[second])
        np.testing.assert_array_equal(trained[second], 0)
    assert trained.keys() == wanted.keys()
    for array, expected in trained.items():
        np.testing.assert_allclose(expected, wanted[array], rtol=0, atol=1e-10, err_msg=array)
        if not array.startswith("lstm.bias"):
            assert not np.allclose(start[array], wanted[array], atol=1e-7), array


# Counts and shapes in full size


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("no_memory")
def test_parameters(name):
    """As PyTorch's; LRCN's LSTM has one bias, as in Caffe, where PyTorch's has two: 1,024 fewer."""
    published = {"c3d": 78_409_573, "lrcn": 65_421_285, "two_stream": 90_627_813 + 90_707_781}
    ours = nlutils.keras.models.create_model(name, 101)
    assert ours.count_params() == published[name]
    with torch.device("meta"):
        model = nlutils.torch.models.create_model(name, 101)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    assert ours.count_params() == wanted - (1024 if name == "lrcn" else 0)


@pytest.mark.usefixtures("no_memory")
def test_shapes():
    """Caffe's: facebookarchive/C3D, lisa-caffe-public; CNN-M's maps of 54, 26, 13, 13 and 6 a side."""
    models = {name: nlutils.keras.models.create_model(name, 101) for name in NAMES}
    expected = {
        "c3d": {
            "conv1a": (16, 112, 112, 64),
            "conv2a": (16, 56, 56, 128),
            "conv3b": (8, 28, 28, 256),
            "conv4b": (4, 14, 14, 512),
            "conv5b": (2, 7, 7, 512),
            "pool5": (1, 4, 4, 512),
            "fc6": (4096,),
        },
        "lrcn": {
            "encoder-conv1": (111, 111, 96),
            "encoder-pool1": (55, 55, 96),
            "encoder-conv2": (26, 26, 384),
            "encoder-pool2": (13, 13, 384),
            "encoder-conv4": (13, 13, 512),
            "encoder-pool5": (6, 6, 384),
            "lstm": (None, 256),
            "classifier": (None, 101),
        },
        "two_stream": {
            f"{stream}-{layer}": shape
            for stream in ("spatial", "temporal")
            for layer, shape in {
                "features-conv1": (109, 109, 96),
                "features-pool1": (54, 54, 96),
                "features-conv2": (26, 26, 256),
                "features-pool2": (13, 13, 256),
                "features-conv5": (13, 13, 512),
                "features-pool5": (6, 6, 512),
                "fc6": (4096,),
                "fc7": (2048,),
                "votes": (None, 101),
            }.items()
        },
    }
    for name, layers in expected.items():
        found = {layer: models[name].get_layer(layer).output.shape[1:] for layer in layers}
        assert found == layers
    norms = [layer.name for layer in models["two_stream"].layers if isinstance(layer, ResponseNorm)]
    # "We removed the second normalisation layer from the latter", section 5.
    assert norms == ["spatial-features-norm1", "temporal-features-norm1", "spatial-features-norm2"]


@pytest.mark.parametrize("name", NAMES)
def test_options_are_those_of_pytorch(name):
    ours, wanted = (room.models.model_options(name) for room in (nlutils.keras, nlutils.torch))
    assert ours == wanted


@pytest.mark.parametrize("name", NAMES)
def test_weights_start_as_wide_as_in_pytorch(name):
    keras.utils.set_random_seed(0)
    torch.manual_seed(0)
    options = {"c3d": {"width": 16, "fc": 128}, "lrcn": {"width": 32, "fc6": 64, "hidden": 64}}
    options = options.get(name, {"width": 12})
    ours = to_arrays(small(name, **options))
    wanted = to_arrays(nlutils.torch.models.create_model(name, CLASSES, **SMALL[name] | options))
    for key, array in wanted.items():
        if "bias" in key:
            assert not ours[key].any(), key
            continue
        spread = 5 / (2 * array.size) ** 0.5  # five standard deviations of a spread, but for the tails
        assert ours[key].std() == pytest.approx(array.std(), rel=max(2 * spread, 0.02)), key
        assert abs(ours[key].mean()) < 5 * array.std() / array.size**0.5, key


# Use


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model, clips = small(name), noise(SHAPES[name])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert [layer.name for layer in again.layers] == [layer.name for layer in model.layers]
    np.testing.assert_array_equal(numbers(again(clips)), numbers(model(clips)))


@pytest.mark.parametrize(
    ("name", "layer"),
    [("c3d", "conv3b-relu"), ("lrcn", "encoder-pool2"), ("two_stream", "temporal-features-pool2")],
)
def test_a_non_local_block_goes_in(name, layer):
    model, clips = small(name), noise(SHAPES[name])
    grown, inserted = insert_non_local(model, [layer])
    assert [one.name for one in inserted] == [layer]
    np.testing.assert_array_equal(numbers(grown(clips)), numbers(model(clips)))
    block = grown.get_layer(f"{layer}_non_local")
    block.norm.gamma.assign(np.full(block.norm.gamma.shape, 1e3))
    block.norm.beta.assign(np.linspace(-1, 1, block.norm.beta.shape[0]))
    assert not np.allclose(numbers(grown(clips)), numbers(model(clips)), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_eight_clips_are_learnt_by_heart(name):
    keras.utils.set_random_seed(0)
    clips, labels = noise(SHAPES[name], batch=8), np.arange(8) % CLASSES
    options, rate, steps = {
        "c3d": ({"width": 8, "fc": 64}, 1e-3, 24),
        "lrcn": ({"fc6": 32, "hidden": 32}, 1e-2, 50),
        "two_stream": ({}, 5e-3, 20),
    }[name]
    model = small(name, **options)
    trained = training_model(name, model)
    trained.compile(keras.optimizers.Adam(rate), cross_entropy(name), jit_compile=False)
    assert np.any(numbers(model(clips)).argmax(axis=1) != labels)
    goals = targets(name, labels)
    for _ in range(steps):
        loss = trained.train_on_batch(clips, goals, return_dict=True)["loss"]
    assert loss < 0.1
    assert np.all(numbers(model(clips)).argmax(axis=1) == labels)


@pytest.mark.parametrize("name", ["lrcn", "two_stream"])
def test_any_number_of_frames(name):
    """In predict, whose graph leaves the batch open, and in a graph that leaves the frames open, too."""
    import tensorflow as tf

    model = small(name)

    @tf.function(
        input_signature=[
            [tf.TensorSpec((None, None, *shape[1:]), "float32") for shape in SHAPES[name]],
        ]
    )
    def open_graph(clips):
        return model(clips if len(clips) > 1 else clips[0])

    for more in (0, 4):
        shapes = [(frames + more, *rest) for frames, *rest in SHAPES[name]]
        clips = noise(shapes, batch=3)
        clips = [array.astype("float32") for array in (clips if isinstance(clips, list) else [clips])]
        eager = numbers(model(clips if len(clips) > 1 else clips[0]))
        np.testing.assert_allclose(np.exp(eager).sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(open_graph(clips).numpy(), eager, atol=1e-5)
    predicted = model.predict(clips if len(clips) > 1 else clips[0], verbose=0, batch_size=2)
    np.testing.assert_allclose(predicted, eager, atol=1e-5)


def test_a_clip_of_another_size_is_refused():
    with pytest.raises(ValueError, match="8, 32, 32, 3"):
        small("c3d")(np.zeros((1, 8, 32, 48, 3), "float32"))
    with pytest.raises(ValueError, match="49, 60, 3"):
        small("lrcn")(np.zeros((1, 8, 49, 61, 3), "float32"))
    model = small("two_stream")
    clips = [np.zeros((1, 4, side, 48, c), "float32") for side, c in ((41, 3), (42, 2))]
    with pytest.raises(ValueError, match="41, 48, 2"):
        model(clips)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("c3d", {"input": "sound"}, "input='sound' is not known"),
        ("c3d", {"layout": "caffe"}, "layout='caffe' is not known"),
        ("c3d", {"width": 0}, "width=0 must be a whole number"),
        ("c3d", {"fc": -1}, "fc=-1 must be a whole number"),
        ("c3d", {"size": 32}, "size=32 must be a pair"),
        ("c3d", {"layout": "mmaction2", "frames": 15}, "give 16 x 16 x 16 or more"),
        ("lrcn", {"size": (48, 60)}, "give 49 or more pixels a side"),
        ("lrcn", {"size": (49, 60, 3)}, "must be one number or a pair"),
        ("lrcn", {"hidden": 1.5}, "hidden=1.5 must be a whole number"),
        ("two_stream", {"width": 8}, "width=8 must be a multiple of 3"),
        ("two_stream", {"size": (40, 48)}, "use 41 or more"),
        ("two_stream", {"stack": 0}, "stack=0 must be a whole number"),
        ("two_stream", {"dropout": (0.5,)}, r"must be a number, or two: \(spatial, temporal\)"),
    ],
)
def test_options_that_do_not_fit(name, options, words):
    with pytest.raises(ValueError, match=words):
        small(name, **options)


def test_the_smallest_frames_are_those_of_pytorch():
    for name, size in (("lrcn", 49), ("two_stream", 41)):
        small(name, size=(size, size))
        with pytest.raises(ValueError, match=str(size - 1)):
            nlutils.torch.models.create_model(name, 2, **SMALL[name] | {"size": (size - 1, size - 1)})
    small("c3d", layout="mmaction2", frames=16, size=(16, 16))
