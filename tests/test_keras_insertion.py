"""Blocks put into Keras models that somebody else wrote."""

import numpy as np
import pytest

from nlutils.course import import_keras

keras = import_keras("tensorflow")

from nlutils.keras import NonLocalBlock, insert_non_local  # noqa: E402


@pytest.fixture
def model():
    layers = keras.layers
    frames = keras.Input((3, 6, 6, 2), name="clip")
    first = layers.Conv3D(4, 3, padding="same", name="first")(frames)
    second = layers.ReLU(name="second")(first)
    joined = layers.Add(name="joined")([first, second])
    return keras.Model(frames, layers.GlobalAveragePooling3D(name="pool")(joined))


@pytest.fixture
def clips():
    return np.random.default_rng(0).standard_normal((2, 3, 6, 6, 2)).astype("float32")


def numbers(model, x):
    return keras.ops.convert_to_numpy(model(x))


def test_output_is_unchanged_at_first_and_the_blocks_are_there(model, clips):
    grown, inserted = insert_non_local(model, ["first", "joined"], subsample="before")
    assert np.array_equal(numbers(grown, clips), numbers(model, clips))
    blocks = [layer for layer in grown.layers if isinstance(layer, NonLocalBlock)]
    assert [block.name for block in blocks] == ["first_non_local", "joined_non_local"]
    assert all(block.subsample == "before" for block in blocks)
    assert [one.name for one in inserted] == ["first", "joined"]
    assert inserted[0].in_channels == 4
    assert inserted[0].size == (3, 6, 6)
    assert inserted[0].parameters == blocks[0].count_params() == 3 * (4 * 2 + 2) + (2 * 4 + 4) + 4 * 4
    added = grown.count_params() - model.count_params()
    assert added == sum(one.parameters for one in inserted)
    assert "2 non-local blocks, 116 parameters" in str(inserted)


def test_each_block_stands_between_its_layer_and_all_that_follow(model, clips):
    grown, _ = insert_non_local(model, ["first"])
    block = grown.get_layer("first_non_local")
    block.norm.gamma.assign(np.full(4, 1e4, "float32"))
    first = block(model.get_layer("first")(clips))
    expected = keras.ops.mean(first + keras.ops.relu(first), axis=(1, 2, 3))
    assert np.allclose(numbers(grown, clips), keras.ops.convert_to_numpy(expected), rtol=1e-4, atol=1e-4)
    assert not np.allclose(numbers(grown, clips), numbers(model, clips), atol=1e-2)


def test_the_other_layers_are_shared(model, clips):
    grown, _ = insert_non_local(model, ["second"])
    assert grown.get_layer("first") is model.get_layer("first")
    assert [layer.name for layer in model.layers] == ["clip", "first", "second", "joined", "pool"]


def test_sequential_trains_and_is_saved(tmp_path, clips):
    model = keras.Sequential(
        [
            keras.Input((None, 6, 6, 2)),
            keras.layers.Conv3D(4, 1, name="conv"),
            keras.layers.GlobalAveragePooling3D(),
        ]
    )
    before = numbers(model, clips)
    grown, inserted = insert_non_local(model, ["conv"])
    assert inserted[0].size == (None, 6, 6)
    assert "? x 6 x 6" in str(inserted)
    assert np.array_equal(numbers(grown, clips), before)
    grown.compile(keras.optimizers.SGD(0.1), "mse")
    block = grown.get_layer("conv_non_local")
    gain = keras.ops.convert_to_numpy(block.norm.gamma).copy()
    grown.fit(clips, np.ones((2, 4), "float32"), epochs=2, verbose=0)
    assert not np.array_equal(keras.ops.convert_to_numpy(block.norm.gamma), gain)
    grown.save(tmp_path / "grown.keras")
    loaded = keras.models.load_model(tmp_path / "grown.keras")
    assert np.array_equal(numbers(loaded, clips), numbers(grown, clips))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (["frist"], "'frist'.*did you mean 'first'"),
        (["first", "first"], "named twice"),
        ([], "names nothing"),
        ("first", r"\['first'\]"),
        (["clip"], "the model has no 'clip'"),
        (["pool"], r"'pool' returns \(None, 4\)"),
    ],
)
def test_wrong_names(model, after, message):
    with pytest.raises(ValueError, match=message):
        insert_non_local(model, after)


def test_wrong_options(model):
    with pytest.raises(ValueError, match="ndim is set for the layer 'first'"):
        insert_non_local(model, ["first"], ndim=2)
    with pytest.raises(ValueError, match="instantiation='cosine'"):
        insert_non_local(model, ["first"], instantiation="cosine")


def test_a_class_has_no_graph():
    class Model(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="without a graph of layers"):
        insert_non_local(Model(), ["first"])
    with pytest.raises(ValueError, match="does not know its input"):
        insert_non_local(keras.Sequential([keras.layers.Conv3D(4, 1, name="conv")]), ["conv"])
