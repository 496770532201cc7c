"""Peak memory of the Keras operations, forward and backward, in a process of its own for each backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc"
)

# 6,272 positions: one map in float32 has 150 MiB, and a plain backward pass holds three of them.
MEASURE = """
import sys
import keras, numpy as np
from nlutils.keras import non_local

BACKEND, MODE = keras.backend.backend(), sys.argv[1]
rng = np.random.default_rng(0)

def draw(positions):
    return [keras.ops.convert_to_tensor(rng.normal(size=(1, positions, 128)).astype("float32") / 4)
            for _ in range(3)]

def training_step(instantiation):
    w_f = np.full(256, 0.1, "float32") if instantiation == "concatenation" else None
    def function(theta, phi, g):
        # The Gaussian form has wider theta and phi than g, so that no fused attention can help.
        g = g[:, :, :64] if instantiation == "gaussian" else g
        return non_local(theta, phi, g, instantiation, w_f=w_f)
    if BACKEND == "torch":
        def step(*inputs):
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            function(*inputs).sum().backward()
            return [tensor.grad for tensor in inputs]
    elif BACKEND == "jax":
        import jax
        step = jax.jit(jax.grad(lambda *inputs: function(*inputs).sum(), argnums=(0, 1, 2)))
    else:
        import tensorflow as tf
        def step(*inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                y = tf.reduce_sum(function(*inputs))
            return tape.gradient(y, inputs)
        if MODE == "graph":
            step = tf.function(step)
    return step

def memory(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1]) / 1024

for instantiation in ("gaussian", "embedded_gaussian", "dot_product", "concatenation"):
    step = training_step(instantiation)
    [np.asarray(gradient) for gradient in step(*draw(3000))]  # loads the libraries
    inputs = draw(6272)
    open("/proc/self/clear_refs", "w").write("5")
    start = memory("VmRSS")
    [np.asarray(gradient) for gradient in step(*inputs)]
    print(instantiation, round(memory("VmHWM") - start))
"""


@pytest.mark.parametrize("run", ["tensorflow eager", "tensorflow graph", "torch eager", "jax jit"])
def test_no_map_is_built(run):
    backend, mode = run.split()
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MEASURE, mode]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    peaks = dict(line.split() for line in result.stdout.splitlines())
    assert len(peaks) == 4, result.stderr
    assert max(map(int, peaks.values())) < 200, peaks
