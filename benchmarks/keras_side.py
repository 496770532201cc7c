"""The Keras side, on TensorFlow: the operation beside its materialised form, the memory of the block.

A pass has two words, such as "training jit". graph: tf.function; jit: the same, compiled by XLA.
"""

import os
import time

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from benchmarks.cases import Case
from benchmarks.measure import CpuMeter, timed_in_turns
from nlutils.keras import NonLocalBlock, non_local

__all__ = ["measure_memory", "measure_time"]

AGREEMENT = 1e-3


def _one_thread():
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _draw(*shape, seed, scale=1.0):
    return tf.constant(scale * np.random.default_rng(seed).standard_normal(shape), tf.float32)


def materialised(theta, phi, g, instantiation, *, w_f=None):
    """The map as a matrix, in keras.ops: theta, phi (B, N, d), g (B, N, c) -> (B, N, c)."""
    count, width = phi.shape[1:]
    if instantiation == "dot_product":
        f = ops.matmul(theta, ops.transpose(phi, (0, 2, 1)))
    else:
        a, b = ops.matmul(theta, w_f[:width]), ops.matmul(phi, w_f[width:])
        f = ops.relu(a[:, :, None] + b[:, None, :])
    return ops.matmul(f / count, g)


def _passes(function, inputs, direction) -> dict:
    """{pass: call} of `function` of `inputs`; a training call returns the output and all gradients."""

    def forward(*values):
        return (function(*values),)

    def training(*values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            output = function(*values)
            loss = ops.sum(output * direction)
        # Variables (a block's weights) are watched by themselves.
        return (output, *tape.gradient(loss, [*values, *tape.watched_variables()]))

    calls = {}
    for word, python in (("forward", forward), ("training", training)):
        for mode, jit in (("graph", False), ("jit", True)):
            compiled = tf.function(python, jit_compile=jit)
            calls[f"{word} {mode}"] = lambda compiled=compiled: compiled(*inputs)[0]
    return calls


def measure_time(case: Case, device="cpu", dtype="float32") -> dict:
    """Time nlutils' operation and the materialised form in turns."""
    _one_thread()
    inputs = [_draw(1, case.positions, case.inner, seed=seed) for seed in range(3)]
    if case.instantiation == "concatenation":
        inputs.append(_draw(2 * case.inner, seed=3, scale=(2 * case.inner) ** -0.5))
    direction = _draw(1, case.positions, case.inner, seed=4)

    def with_options(operation):
        def function(theta, phi, g, w_f=None):
            return operation(theta, phi, g, case.instantiation, w_f=w_f)

        return function

    calls = {
        name: _passes(with_options(operation), inputs, direction)
        for name, operation in (("nlutils", non_local), ("materialised", materialised))
    }
    values, agreement = {name: {} for name in calls}, {}
    for passed in case.passes:
        both = {name: calls[name][passed] for name in calls}
        outputs = {name: call().numpy() for name, call in both.items()}  # compiles, too
        gap = np.abs(outputs["materialised"] - outputs["nlutils"]).max() / np.abs(outputs["nlutils"]).max()
        if gap > AGREEMENT:
            raise RuntimeError(f"the materialised form computes something else than nlutils: {gap}")
        agreement[passed] = float(f"{gap:.1e}")
        for name, seconds in timed_in_turns(both, case.repeats, CpuMeter()).items():
            values[name][passed] = seconds
    return {
        "values": values,
        "ours": {"materialised": "nlutils"},
        "agreement": {"materialised": agreement},
    }


def measure_memory(case: Case, variant: str, device="cpu", dtype="float32") -> dict:
    """The peak of one training step of the whole block: {pass: [MiB]}. The call before it has compiled it."""
    _one_thread()
    keras.utils.set_random_seed(0)
    scaled = case.instantiation == "embedded_gaussian"
    block = NonLocalBlock(case.channels, case.inner, instantiation=case.instantiation, scale=scaled)
    scale = 2 * case.channels**-0.5 if case.instantiation == "gaussian" else 1.0
    x = _draw(1, *case.size, case.channels, seed=1, scale=scale)
    direction = _draw(*x.shape, seed=2)
    block(x[:, :, :1, :1])  # builds the weights
    block.norm.gamma.assign(tf.ones_like(block.norm.gamma))
    calls = _passes(lambda x: block(x, training=True), [x], direction)
    values, start = {}, time.perf_counter()
    for passed in case.passes:
        output = calls[passed]()
        if not np.isfinite(output.numpy()).all():
            raise RuntimeError(f"{case.name}: the output is not finite")
        del output
        values[passed] = [round(CpuMeter().peak(calls[passed]), 1)]
    return {"values": values, "wall": round(time.perf_counter() - start, 1)}
