"""The Keras side, on TensorFlow: the operation beside its materialised form, the memory of the block.

A pass has two words, such as "training jit". graph: tf.function; jit: the same, compiled by XLA.
"""

import functools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

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
# A map that is too small to cost anything, to load kernels with before memory is measured.
TINY = (2, 4, 4)


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


def _compiled(function, passed: str):
    """`function` of tensors as a pass: call(direction, *inputs) -> (output, in training all gradients)."""
    word, mode = passed.split()

    def forward(direction, *values):
        return (function(*values),)

    def training(direction, *values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            output = function(*values)
            loss = ops.sum(output * direction)
        # Variables (a block's weights) are watched by themselves.
        return (output, *tape.gradient(loss, [*values, *tape.watched_variables()]))

    return tf.function({"forward": forward, "training": training}[word], jit_compile=mode == "jit")


def _operation(case, name):
    operation = {"nlutils": non_local, "materialised": materialised}[name]

    def function(theta, phi, g, w_f=None):
        return operation(theta, phi, g, case.instantiation, w_f=w_f)

    return function


def _operands(case, size):
    """The direction of the gradient, then theta, phi, g, and w_f where the instantiation has it."""
    count = size[0] * size[1] * size[2]
    inputs = [_draw(1, count, case.inner, seed=seed) for seed in range(3)]
    if case.instantiation == "concatenation":
        inputs.append(_draw(2 * case.inner, seed=3, scale=(2 * case.inner) ** -0.5))
    return [_draw(1, count, case.inner, seed=4), *inputs]


def measure_time(case: Case, device="cpu", dtype="float32") -> dict:
    """Time nlutils' operation and the materialised form in turns."""
    _one_thread()
    operands = _operands(case, case.size)
    values, agreement = {"nlutils": {}, "materialised": {}}, {}
    for passed in case.passes:
        calls = {
            name: functools.partial(_compiled(_operation(case, name), passed), *operands) for name in values
        }
        agreement[passed] = agree(*(calls[name]() for name in ("materialised", "nlutils")))  # compiles, too
        for name, seconds in timed_in_turns(calls, case.repeats, CpuMeter()).items():
            values[name][passed] = seconds
    return {
        "values": values,
        "ours": {"materialised": "nlutils"},
        "agreement": {"materialised": agreement},
    }


def agree(theirs, ours) -> float:
    """How far two results (output, *gradients) are apart, in the root mean square; the worst of them.

    Not in the largest entry: where a_i + b_j is 0 to rounding, one side may count the pair and the other not.
    Raises RuntimeError, naming output and gradients, when they are further apart than rounding.
    """
    names = ["output", *(f"gradient of {name}" for name in ("theta", "phi", "g", "w_f"))][: len(ours)]
    gaps = {
        name: float(np.linalg.norm(a.numpy() - b.numpy()) / np.linalg.norm(b.numpy()))
        for name, a, b in zip(names, theirs, ours, strict=True)
    }
    if not max(gaps.values()) <= AGREEMENT:
        raise RuntimeError(f"the materialised form computes something else than nlutils: {gaps}")
    return float(f"{max(gaps.values()):.1e}")


def measure_memory(case: Case, variant: str, device="cpu", dtype="float32") -> dict:
    """The peak of the first call of each pass: {pass: [MiB]}, and the seconds on the wall.

    Each pass has a process of its own: TensorFlow keeps what it was given, and a second call would show
    nothing. With XLA, the first call compiles, and the memory of the compiler is in the number.
    """
    start = time.perf_counter()
    values = {}
    for passed in case.passes:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            values[passed] = [pool.submit(_peak, case, variant, passed).result()]
    return {"values": values, "wall": round(time.perf_counter() - start, 1)}


def _peak(case, variant, passed):
    """MiB of one pass, in this process, which has run nothing of that size before."""
    _one_thread()
    if case.level == "operation":
        function = _operation(case, variant)
        small, operands = _operands(case, TINY), _operands(case, case.size)
    else:
        function, small, operands = _block(case)
    compiled = _compiled(function, passed)
    compiled(*small)
    compiled.get_concrete_function(*operands)  # traces, and runs nothing
    results = []
    peak = CpuMeter().peak(lambda: results.extend(compiled(*operands)))
    if not all(np.isfinite(result.numpy()).all() for result in results):
        raise RuntimeError(f"{case.name}: the output or a gradient is not finite")
    return round(peak, 1)


def _block(case):
    """The block in training mode as a function, and twice its direction and input: tiny, and in full."""
    keras.utils.set_random_seed(0)
    scaled = case.instantiation == "embedded_gaussian"
    block = NonLocalBlock(case.channels, case.inner, instantiation=case.instantiation, scale=scaled)
    scale = 2 * case.channels**-0.5 if case.instantiation == "gaussian" else 1.0

    def operands(size):
        shape = (1, *size, case.channels)
        return [_draw(*shape, seed=2), _draw(*shape, seed=1, scale=scale)]

    small = operands(TINY)
    block(small[1])  # builds the weights
    block.norm.gamma.assign(tf.ones_like(block.norm.gamma))
    return lambda x: block(x, training=True), small, operands(case.size)
