"""PyTorch's block and Keras' on the same weights, on each Keras backend: output, gradients, training.

One thing differs, and only in training: PyTorch's batch normalisation puts the unbiased variance of a batch
into its running variance, n / (n - 1) times that of Keras. After training the blocks therefore differ in
evaluation mode, until the variance is converted.
"""

import os
import subprocess
import sys

import pytest

TRAIN = """
import sys
import keras, numpy as np, torch
import nlutils.keras, nlutils.torch
from nlutils.exchange import from_arrays, to_arrays, torch_to_keras

STEPS, RATE = 5, 2**-4  # a rate that float32 holds, because Keras keeps it in float32
BACKEND = keras.backend.backend()
# Keras' convolutions compute in float32 on PyTorch and JAX.
DTYPE = "float64" if BACKEND == "tensorflow" else "float32"
DIGITS = 1e-9 if DTYPE == "float64" else 2e-4
keras.config.set_floatx(DTYPE)  # of the loss

def error(found, wanted):
    return np.abs(np.asarray(found, "float64") - wanted).max() / max(1.0, np.abs(wanted).max())

def close(found, wanted):
    return error(found, wanted) <= DIGITS

def gradient(block, x, direction):
    "dL/dx of L = sum of direction * block(x), in training mode."
    if BACKEND == "torch":
        x = torch.tensor(x, requires_grad=True)
        (block(x, training=True) * torch.tensor(direction)).sum().backward()
        return x.grad.numpy()
    if BACKEND == "jax":
        import jax
        loss = lambda x: (block(x, training=True) * direction).sum()
        return np.asarray(jax.grad(loss)(jax.numpy.asarray(x)))
    import tensorflow as tf
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(block(x, training=True) * direction)
    return tape.gradient(loss, x).numpy()

def check(ndim, options):
    rng = np.random.default_rng(0)
    x, target, direction = rng.normal(size=(3, 2, *{2: (5, 4), 3: (2, 4, 3)}[ndim], 6))
    theirs = nlutils.torch.NonLocalBlock(6, 4, ndim=ndim, **options).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.copy_(torch.rand(tensor.shape, generator=draw, dtype=torch.float64) - 0.5)
    ours = nlutils.keras.NonLocalBlock(6, 4, ndim=ndim, dtype=DTYPE, **options)
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=DTYPE), ours])
    torch_to_keras(theirs, ours)
    torch_x, torch_target = (torch.from_numpy(array).movedim(-1, 1) for array in (x, target))
    found = {}

    def same_output(name):
        wanted = theirs.eval()(torch_x).movedim(1, -1).detach().numpy()
        found[name] = close(keras.ops.convert_to_numpy(model(x.astype(DTYPE), training=False)), wanted)

    same_output("output")
    leaf = torch_x.clone().requires_grad_()
    (theirs.train()(leaf) * torch.from_numpy(direction).movedim(-1, 1)).sum().backward()
    wanted = leaf.grad.movedim(1, -1).numpy()
    found["gradient"] = close(gradient(ours, x.astype(DTYPE), direction.astype(DTYPE)), wanted)

    # The gradients above moved the statistics, by one step each: begin again.
    start = to_arrays(theirs)
    if "norm.running_var" in start:
        start["norm.running_mean"][:], start["norm.running_var"][:] = 0, 1
    from_arrays(theirs, start), from_arrays(ours, start)
    optimiser = torch.optim.SGD(theirs.parameters(), RATE)
    model.compile(keras.optimizers.SGD(RATE), "mse")
    for step in range(STEPS):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(theirs.train()(torch_x), torch_target).backward()
        optimiser.step()
        model.train_on_batch(x.astype(DTYPE), target.astype(DTYPE))
    wanted, trained = to_arrays(theirs), to_arrays(ours)
    learned = [name for name in wanted if not name.startswith("norm.running")]
    found["trained"] = all(close(trained[name], wanted[name]) for name in learned)
    found["moved"] = all(not np.allclose(start[name], wanted[name], atol=1e-6) for name in learned
                         if name.endswith(".weight"))
    if "norm.running_var" in wanted:
        found["mean"] = close(trained["norm.running_mean"], wanted["norm.running_mean"])
        count, kept = x.size // 6, 0.9**STEPS
        unbiased = kept + (trained["norm.running_var"] - kept) * count / (count - 1)
        variance = wanted["norm.running_var"]
        found["variance"] = close(unbiased, variance)
        found["biased"] = error(trained["norm.running_var"], variance) > 10 * error(unbiased, variance)
        from_arrays(ours, {**trained, "norm.running_var": unbiased.astype(DTYPE)})
    same_output("evaluation")
    return found

for number, (ndim, options) in enumerate([
    (3, {"instantiation": "gaussian", "subsample": "before"}),
    (2, {"instantiation": "embedded_gaussian", "scale": True}),
    (3, {"instantiation": "dot_product", "subsample": "after"}),
    (2, {"instantiation": "concatenation", "subsample": "before"}),
    (3, {"instantiation": "concatenation", "subsample": "after", "norm": False, "zero_init": False}),
]):
    found = check(ndim, options)
    print(number, "same" if all(found.values()) else [name for name in found if not found[name]], flush=True)
"""


@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax"])
def test_same_output_gradient_and_training(backend):
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TRAIN]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.split("\n") == [*(f"{number} same" for number in range(5)), ""], (
        result.stdout + result.stderr[-3000:]
    )
