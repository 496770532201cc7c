"""Compact generalized non-local, in PyTorch and Keras: against the sum over all pairs of entries."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nlutils.keras
import nlutils.torch
from nlutils import reference
from nlutils.exchange import from_arrays, keras_to_torch, to_arrays, torch_to_keras
from nlutils.kernels import BETA, GAMMA, KERNELS
from nlutils.torch import CompactGeneralizedNonLocalBlock, compact_generalized

SIZES = {1: (5,), 2: (3, 2), 3: (2, 1, 3)}


def entries(*shape, scale=1.0, seed=0):
    """theta, phi, g of this shape, float64 from N(0, 1) times scale."""
    return scale * np.random.default_rng(seed).standard_normal((3, *shape))


def expected_and_bound(theta, phi, g, **options):
    """The reference for a batch, and how far a computation in float64 may be from it.

    y_ic sums N C / groups * (order + 1) products of at most 2 order + 6 factors. Each way of computing it
    rounds a term at most (number of terms + factors) times, by 2^-53 of it; the terms' sizes add up to the
    reference of the absolute values. Two ways: twice that.
    """
    samples = list(zip(theta, phi, g, strict=True))
    y = np.stack([reference.compact_generalized(*sample, **options) for sample in samples])
    sizes = np.stack([reference.compact_generalized(*np.abs(sample), **options) for sample in samples])
    order = options.get("order", 3)
    roundings = theta.shape[1] * theta.shape[2] // options["groups"] * (order + 1) + 2 * order + 6
    return y, 2 * roundings * 2.0**-53 * sizes


def numbers(tensor):
    return tensor.detach().numpy() if isinstance(tensor, torch.Tensor) else keras.ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_reference_is_the_product_of_the_flattened_matrices(kernel):
    theta, phi, g = entries(4, 6, scale=30)
    y = reference.compact_generalized(theta, phi, g, groups=2, kernel=kernel, order=4)
    for run in (slice(0, 3), slice(3, 6)):
        pairs = np.outer(theta[:, run].ravel(), phi[:, run].ravel())
        if kernel == "rbf":
            x = 2 * GAMMA * pairs
            pairs = BETA * (1 + x + x**2 / 2 + x**3 / 6 + x**4 / 24)
        np.testing.assert_allclose(y[:, run].ravel(), pairs @ g[:, run].ravel(), rtol=1e-12)


def test_the_taylor_sum_of_the_reference_approaches_the_exponential():
    theta, phi, g = entries(3, 2, scale=50)
    limit = BETA * np.exp(2 * GAMMA * np.outer(theta.ravel(), phi.ravel())) @ g.ravel()
    errors = [
        np.abs(
            reference.compact_generalized(theta, phi, g, groups=1, kernel="rbf", order=order).ravel() - limit
        ).max()
        for order in (1, 2, 4, 16)
    ]
    assert errors[0] > 10 * errors[2] > 1e4 * errors[3]
    assert errors[3] < 1e-12 * np.abs(limit).max()


cases = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 3)),
        "groups": st.integers(1, 3),
        "kernel": st.sampled_from(KERNELS),
        "order": st.integers(1, 12),
        "scale": st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
        "seed": st.integers(0, 2**16),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases)
def test_both_frameworks_equal_the_reference(case):
    (batch, positions, width), groups = case["shape"], case["groups"]
    operands = entries(batch, positions, width * groups, scale=case["scale"], seed=case["seed"])
    options = {name: case[name] for name in ("groups", "kernel", "order")}
    y, bound = expected_and_bound(*operands, **options)
    ours = {
        "torch": compact_generalized(*map(torch.tensor, operands), **options),
        "keras": nlutils.keras.compact_generalized(*map(tf.constant, operands), **options),
    }
    for name, result in ours.items():
        assert result.shape == y.shape
        assert (np.abs(numbers(result) - y) <= bound).all(), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients(kernel):
    operands = [torch.tensor(each, requires_grad=True) for each in entries(2, 3, 4, scale=20)]

    def operation(*operands):
        return compact_generalized(*operands, groups=2, kernel=kernel, order=4) / 1e3

    assert torch.autograd.gradcheck(operation, operands)
    assert torch.autograd.gradgradcheck(operation, operands)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_of_the_block(kernel):
    block = random_block(4, 2, ndim=2, groups=2, kernel=kernel)
    x = torch.tensor(entries(2, 4, 3, 2)[0], requires_grad=True)
    assert torch.autograd.gradcheck(block, x)


@pytest.mark.parametrize("kernel", KERNELS)
def test_views_give_what_copies_give(kernel):
    theta, phi, g = (torch.tensor(each) for each in entries(2, 12, 7))  # (B, C, N)
    views = [each.transpose(1, 2) for each in (theta, phi, g)]
    y = compact_generalized(*views, groups=4, kernel=kernel)
    torch.testing.assert_close(
        y, compact_generalized(*(view.contiguous() for view in views), groups=4, kernel=kernel)
    )
    wide = torch.tensor(entries(2, 7, 24)[0])
    torch.testing.assert_close(
        compact_generalized(wide[..., ::2], wide[..., 1::2], wide[..., 12:], groups=4, kernel=kernel),
        compact_generalized(
            *(part.contiguous() for part in (wide[..., ::2], wide[..., 1::2], wide[..., 12:])),
            groups=4,
            kernel=kernel,
        ),
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_summed_in_float32(kernel, dtype):
    # Feature rms 10 at C = 1024. All positive, so that nothing cancels: the sum passes float16's 65504.
    operands = 10 * np.abs(np.random.default_rng(0).standard_normal((3, 1, 100, 1024)))
    halves = [torch.tensor(each).to(getattr(torch, dtype)) for each in operands]
    exact = compact_generalized(*(half.double() for half in halves), kernel=kernel)
    assert exact.max() > 65504
    y = compact_generalized(*halves, kernel=kernel)
    y_keras = nlutils.keras.compact_generalized(
        *(keras.ops.cast(half.float().numpy(), dtype) for half in halves), kernel=kernel
    )
    assert y.dtype == torch.float32
    assert keras.backend.standardize_dtype(y_keras.dtype) == "float32"
    for result in (numbers(y), numbers(y_keras)):
        np.testing.assert_allclose(result, exact.numpy(), rtol=1e-5)


def test_a_map_whose_pairs_no_machine_holds():
    theta, phi, g = torch.randn(3, 1, 25088, 64, generator=torch.Generator().manual_seed(0))
    y = compact_generalized(theta, phi, g, groups=8)  # the pairs: 8 maps of 200,704 x 200,704, 1.2 TiB
    one = (phi[..., :8].double() * g[..., :8].double()).sum()
    torch.testing.assert_close(y[..., :8].double(), theta[..., :8].double() * one, rtol=1e-4, atol=1e-2)


# The block.


def random_block(*arguments, **options):
    """A PyTorch block in float64, all weights far from their start."""
    block = CompactGeneralizedNonLocalBlock(*arguments, **options).double()
    draw = np.random.default_rng(1)
    from_arrays(block, {name: draw.standard_normal(array.shape) for name, array in to_arrays(block).items()})
    return block


def keras_twin(block, dtype="float64"):
    """The Keras block with the options and weights of a PyTorch block."""
    twin = nlutils.keras.CompactGeneralizedNonLocalBlock(
        block.in_channels,
        block.inner_channels,
        ndim=block.ndim,
        groups=block.groups,
        kernel=block.kernel,
        order=block.order,
        dtype=dtype,
    )
    twin.build((None, *[None] * block.ndim, block.in_channels))
    torch_to_keras(block, twin)
    return twin


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_both_blocks_equal_the_reference_block(kernel, ndim):
    block = random_block(8, 4, ndim=ndim, groups=2, kernel=kernel, order=2)
    x = entries(2, 8, *SIZES[ndim])[0]
    options = {"groups": 2, "kernel": kernel, "order": 2}
    expected = np.stack([reference.compact_generalized_block(one, to_arrays(block), **options) for one in x])
    np.testing.assert_allclose(numbers(block(torch.tensor(x))), expected, rtol=0, atol=1e-11)
    z = keras_twin(block)(np.moveaxis(x, 1, -1))
    np.testing.assert_allclose(np.moveaxis(numbers(z), -1, 1), expected, rtol=0, atol=1e-11)
    assert np.abs(expected - x).max() > 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_both_blocks_start_as_the_identity(kernel):
    x = entries(2, 16, 2, 3, 3)[0].astype("float32")
    assert np.array_equal(numbers(CompactGeneralizedNonLocalBlock(16, kernel=kernel)(torch.tensor(x))), x)
    x = np.moveaxis(x, 1, -1)
    assert np.array_equal(numbers(nlutils.keras.CompactGeneralizedNonLocalBlock(kernel=kernel)(x)), x)


def test_number_and_start_of_the_weights():
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    block = CompactGeneralizedNonLocalBlock(1024, ndim=2)
    twin = nlutils.keras.CompactGeneralizedNonLocalBlock(ndim=2)
    twin.build((None, 14, 14, 1024))
    assert sum(parameter.numel() for parameter in block.parameters()) == 1_640_448
    assert sum(int(np.prod(variable.shape)) for variable in twin.trainable_variables) == 1_640_448
    for arrays in (to_arrays(block), to_arrays(twin)):
        shapes = {name: array.shape for name, array in arrays.items()}
        assert shapes == {
            "theta.weight": (512, 1024, 1, 1),
            "phi.weight": (512, 1024, 1, 1),
            "g.weight": (512, 1024, 1, 1),
            "w_z.weight": (1024, 64, 1, 1),
            "norm.weight": (1024,),
            "norm.bias": (1024,),
        }
        for name, array in arrays.items():
            if name.startswith("norm"):
                assert not array.any()
            else:
                assert array.std() == pytest.approx(0.01, rel=0.03)
    assert block.norm.eps == twin.norm.epsilon == 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_do_not_see_their_batch_mates(kernel):
    block = random_block(8, ndim=2, groups=2, kernel=kernel)
    x = torch.tensor(entries(3, 8, 3, 4)[0])
    for training in (True, False):
        torch.testing.assert_close(block.train(training)(x)[1:2], block(x[1:2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_empty_batch_and_a_single_position(kernel):
    block = random_block(8, groups=2, kernel=kernel)
    twin = keras_twin(block)
    assert block(torch.zeros(0, 8, 2, 3, 3, dtype=torch.float64)).shape == (0, 8, 2, 3, 3)
    assert twin(np.zeros((0, 2, 3, 3, 8))).shape == (0, 2, 3, 3, 8)
    x = entries(1, 8, 1, 1, 1)[0]
    expected = reference.compact_generalized_block(x[0], to_arrays(block), groups=2, kernel=kernel)
    np.testing.assert_allclose(numbers(block(torch.tensor(x)))[0], expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(
        numbers(twin(np.moveaxis(x, 1, -1)))[0], np.moveaxis(expected, 0, -1), atol=1e-11
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_blocks_stay_finite_and_close(kernel):
    torch.manual_seed(0)
    block = CompactGeneralizedNonLocalBlock(1024, ndim=2, kernel=kernel)
    torch.nn.init.ones_(block.norm.weight)
    x = torch.tensor(10 * entries(1, 1024, 8, 8)[0], dtype=torch.float32)
    exact = block(x).detach()
    for dtype, rounding in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        with torch.autocast("cpu", dtype):
            results = [block(x).detach()]
        results.append(block.to(dtype)(x.to(dtype)).detach())
        block.float()
        torch_to_keras(block, twin := keras_twin(block, dtype="mixed_" + str(dtype).removeprefix("torch.")))
        z = keras.ops.cast(twin(np.moveaxis(x.numpy(), 1, -1)), "float32")
        results.append(torch.tensor(np.moveaxis(numbers(z), -1, 1)))
        for z in results:
            assert z.isfinite().all()
            # The convolutions and the sum with x round; ten roundings are far more than they share.
            assert 0 < (z.float() - exact).norm() / exact.norm() < 10 * rounding


def test_under_autocast_the_sums_the_projection_and_the_norm_are_float32():
    block = CompactGeneralizedNonLocalBlock(16, ndim=1)
    seen = {}
    for name in ("theta", "w_z", "norm"):
        layer = getattr(block, name)
        layer.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(2, 16, 5)).dtype == torch.float32
    assert seen == {"theta": torch.bfloat16, "w_z": torch.float32, "norm": torch.float32}


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_and_exported_with_open_sizes(kernel):
    block = random_block(8, groups=2, kernel=kernel)
    x = torch.tensor(entries(2, 8, 3, 4, 5)[0])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))
    axes = {axis: torch.export.Dim(f"size{axis}") for axis in (0, 2, 3, 4)}
    exported = torch.export.export(block, (x,), dynamic_shapes=(axes,)).module()
    for size in ((1, 8, 1, 1, 1), (3, 8, 2, 6, 1)):
        x = torch.tensor(entries(*size)[0])
        torch.testing.assert_close(exported(x), block(x))


def test_channels_last_in_memory():
    block = random_block(8, ndim=2, groups=2)
    x = torch.tensor(entries(2, 8, 3, 4)[0])
    torch.testing.assert_close(block(x.to(memory_format=torch.channels_last)), block(x))


def test_what_the_norm_leaves_of_the_dot_kernel():
    """One sign a group: phi 1000 times as large changes next to nothing, -phi turns the update round."""
    block = random_block(8, 4, ndim=2, groups=2)
    block.norm.bias.data.zero_()
    x = torch.tensor(entries(2, 8, 6, 6)[0])
    update = block(x) - x
    block.phi.weight.data *= 1000
    torch.testing.assert_close(block(x) - x, update, rtol=1e-4, atol=1e-4)
    block.phi.weight.data *= -1
    torch.testing.assert_close(block(x) - x, -update, rtol=1e-4, atol=1e-4)
    block.kernel = "rbf"  # powers 0 to 3 weigh against each other, and that the norm leaves
    update = block(x) - x
    block.phi.weight.data *= 0.5
    assert (block(x) - x - update).abs().max() > 0.01


# The two frameworks.


def test_weights_there_and_back():
    block = random_block(8, 4, groups=2, kernel="rbf")
    twin = keras_twin(block)
    assert numbers(twin.w_z.kernel).shape == (1, 1, 1, 2, 8)
    back = CompactGeneralizedNonLocalBlock(8, 4, groups=2, kernel="rbf").double()
    keras_to_torch(twin, back)
    for name, array in to_arrays(block).items():
        np.testing.assert_array_equal(to_arrays(back)[name], array)
    with pytest.raises(ValueError, match=r"w_z\.weight has shape \(8, 2, 1, 1, 1\)"):
        torch_to_keras(block, keras_twin(random_block(8, 4, groups=4)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_same_gradients_and_five_training_steps(kernel):
    block = random_block(8, 4, ndim=2, groups=2, kernel=kernel)
    twin = keras_twin(block)
    x, target = entries(2, 8, 4, 3)[:2]
    torch_sgd = torch.optim.SGD(block.parameters(), lr=0.125)
    keras_sgd = keras.optimizers.SGD(0.125)
    x_last, target_last = (tf.constant(np.moveaxis(each, 1, -1)) for each in (x, target))
    losses = []
    for _ in range(5):
        torch_sgd.zero_grad()
        torch_loss = (block(torch.tensor(x)) - torch.tensor(target)).square().mean()
        torch_loss.backward()
        torch_sgd.step()
        with tf.GradientTape() as tape:
            keras_loss = keras.ops.mean((twin(x_last) - target_last) ** 2)
        variables = twin.trainable_variables
        keras_sgd.apply(tape.gradient(keras_loss, [variable.value for variable in variables]), variables)
        losses.append(torch_loss.item())
        assert losses[-1] == pytest.approx(float(keras_loss), rel=1e-10)
    for name, array in to_arrays(block).items():
        np.testing.assert_allclose(to_arrays(twin)[name], array, rtol=0, atol=1e-9, err_msg=name)
    assert losses[4] < losses[0]


def test_keras_file_round_trip(tmp_path):
    options = {"ndim": 2, "groups": 2, "kernel": "rbf", "order": 5}
    made = nlutils.keras.CompactGeneralizedNonLocalBlock(8, 6, **options, name="entries")
    model = keras.Sequential([keras.Input((None, None, 8)), made])
    draw = np.random.default_rng(0)
    for variable in made.weights:
        variable.assign(draw.standard_normal(variable.shape))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = entries(2, 3, 4, 8)[0].astype("float32")
    np.testing.assert_array_equal(numbers(loaded(x)), numbers(model(x)))
    assert not np.array_equal(numbers(model(x)), x)
    assert loaded.layers[0].get_config() == made.get_config()
    assert made.get_config().items() >= {**options, "in_channels": 8, "inner_channels": 6}.items()


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_keras_graph_that_leaves_all_sizes_open(kernel, jit):
    block = random_block(8, groups=2, kernel=kernel)
    twin = keras_twin(block)
    inputs = keras.Input((None, None, None, 8), dtype="float64")
    model = keras.Model(inputs, twin(inputs))
    assert model.output_shape == (None, None, None, None, 8)
    signature = [tf.TensorSpec((None, None, None, None, 8), tf.float64)]
    graph = tf.function(model, input_signature=signature, jit_compile=jit)
    for size in ((3, 5, 4), (1, 1, 1)):
        x = entries(2, *size, 8)[0]
        np.testing.assert_allclose(numbers(graph(x)), numbers(twin(x)), rtol=0, atol=1e-11)


OTHER_BACKEND = """
import sys
import keras, numpy as np
from nlutils import reference
from nlutils.exchange import to_arrays
from nlutils.keras import CompactGeneralizedNonLocalBlock, compact_generalized

assert "tensorflow" not in sys.modules
rng = np.random.default_rng(0)
theta, phi, g = rng.normal(size=(3, 1, 6, 8)).astype("float32")
x = rng.normal(size=(1, 2, 3, 4, 16)).astype("float32")
largest = 0
for kernel in ("dot", "rbf"):
    y = compact_generalized(theta, phi, g, groups=2, kernel=kernel)
    expected = reference.compact_generalized(theta[0], phi[0], g[0], groups=2, kernel=kernel)
    largest = max(largest, np.abs(keras.ops.convert_to_numpy(y)[0] - expected).max())
    block = CompactGeneralizedNonLocalBlock(16, 8, groups=2, kernel=kernel)
    block.build(x.shape)
    for variable in block.weights:
        variable.assign(rng.normal(size=variable.shape))
    z = np.moveaxis(keras.ops.convert_to_numpy(block(x))[0], -1, 0)
    sample = np.moveaxis(x[0], -1, 0)
    expected = reference.compact_generalized_block(sample, to_arrays(block), groups=2, kernel=kernel)
    largest = max(largest, np.abs(z - expected).max())
    assert block(x[:0]).shape == (0, *x.shape[1:])
    inputs = keras.Input((None, 4, 16))
    z = CompactGeneralizedNonLocalBlock(ndim=2, groups=2, kernel=kernel)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling2D()(z)))
    for jit in (False, True):
        if jit and keras.backend.backend() == "torch":
            continue  # there jit_compile means torch.compile, minutes of work for a C++ compiler
        model.compile("sgd", "mse", jit_compile=jit)
        model.fit(rng.normal(size=(2, 3, 4, 16)), np.ones((2, 1)), verbose=0)
print(keras.backend.backend(), largest < 1e-5, largest)
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_other_backends(backend):
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", OTHER_BACKEND]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.startswith(f"{backend} True"), result.stdout + result.stderr


# Errors.


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 8),) * 3, {"kernel": "gauss"}, "kernel='gauss' is not known; use one of 'dot', 'rbf'"),
        (((2, 3, 8),) * 3, {"order": 0}, "order=0 must be a whole number, 1 or more"),
        (
            ((2, 3, 8),) * 3,
            {"groups": 3},
            "groups=3 must divide the channels, and theta of shape",
        ),
        (((2, 3, 8),) * 3, {"groups": 2.0}, "groups=2.0 must be a whole number"),
        (((3, 8),) * 3, {}, r"theta of shape \(3, 8\) must have the axes \(B, N, C\)"),
        (((2, 3, 8), (2, 4, 8), (2, 4, 8)), {}, r"theta of shape \(2, 3, 8\) and phi of shape \(2, 4, 8\)"),
        (((2, 3, 8), (2, 3, 8), (2, 3, 4)), {}, r"theta of shape \(2, 3, 8\) and g of shape \(2, 3, 4\)"),
    ],
)
def test_bad_arguments_are_named(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        compact_generalized(*map(torch.zeros, shapes), **options)
    with pytest.raises(ValueError, match=message):
        nlutils.keras.compact_generalized(*map(np.zeros, shapes), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 12}, "groups=8 must divide the channels, and in_channels=12"),
        ({"in_channels": 8}, "and inner_channels is half of in_channels=8, 4"),
        ({"in_channels": 16, "inner_channels": 6, "groups": 4}, "and inner_channels=6"),
        ({"in_channels": 0}, "in_channels=0 must be a whole number, 1 or more"),
        ({"in_channels": 16, "ndim": 4}, "ndim=4 is not known; use one of 1, 2, 3"),
        ({"in_channels": 16, "kernel": "rbf", "order": -1}, "order=-1 must be a whole number"),
    ],
)
def test_bad_options_are_named(options, message):
    for kind in (nlutils.torch, nlutils.keras):
        with pytest.raises(ValueError, match=message):
            kind.CompactGeneralizedNonLocalBlock(**options)


def test_bad_maps_are_named():
    with pytest.raises(ValueError, match=r"\(2, 8, 3, 3\) must have the axes \(B, C, T, H, W\)"):
        CompactGeneralizedNonLocalBlock(16)(torch.zeros(2, 8, 3, 3))
    with pytest.raises(ValueError, match=r"has 8 channels; the block has in_channels=16"):
        CompactGeneralizedNonLocalBlock(16, ndim=2)(torch.zeros(2, 8, 3, 3))
    with pytest.raises(ValueError, match="groups=8 must divide the channels, and in_channels=12"):
        nlutils.keras.CompactGeneralizedNonLocalBlock(ndim=1)(np.zeros((2, 3, 12)))
    with pytest.raises(ValueError, match="must have a known number of channels"):
        nlutils.keras.CompactGeneralizedNonLocalBlock(ndim=1)(keras.Input((4, None)))
