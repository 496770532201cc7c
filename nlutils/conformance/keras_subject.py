"""A Keras layer, channels last, as the checks see it: NumPy arrays in, NumPy arrays out, channels first."""

import keras
import numpy as np
from keras import ops

from nlutils.conformance.subject import ROLES, NotRunnable, Subject, one_line
from nlutils.exchange.frameworks import _TORCH_NAME, _to_keras_layout, _to_torch_layout

__all__ = ["KerasSubject"]


class KerasSubject(Subject):
    """A copy of a `keras.layers.Layer` in float64, made from its config.

    Where that cannot be, the layer itself in its own precision, which gets its weights back (`release`).
    """

    channels_last = True

    def __init__(self, block, example):
        self.original, self._listed = block, None
        self.framework = f"Keras on {keras.backend.backend()}"
        self.take_example(np.asarray(ops.convert_to_numpy(example)))
        self.layer, self.copied = self._working_copy(), True
        if self.layer is None:
            if not block.built:
                raise ValueError(
                    f"{type(block).__name__} has no weights yet and cannot be copied from its config; "
                    "call it once on an input"
                )
            self.layer, self.copied = block, False
        floats = {str(v.dtype) for v in self.layer.weights if "float" in str(v.dtype)}
        self.dtype = "float64" if self.copied and floats == {"float64"} else "float32"
        self._as_given = {key: self.get(key) for key in self._variables()}
        try:
            self.forward(self.random_input())
        except Exception as error:
            self.broken = f"raises {type(error).__name__}: {one_line(error)}"
        self.reset()

    def _working_copy(self):
        """A copy that runs, in float64 if it can; None when there is none."""
        # JAX has no float64 unless it is switched on for the whole process.
        for dtype in ("float64", "float32")[keras.backend.backend() == "jax" :]:
            copy = self._clone(dtype)
            if copy is not None:
                try:
                    copy(self._tensor(self.random_input(), dtype))
                    return copy
                except Exception:  # a layer that mixes precisions: the next one
                    continue
        return None

    def _clone(self, dtype):
        """A layer with the same weights and another dtype; None when the config does not allow it."""
        policy = keras.config.dtype_policy()
        try:
            keras.config.set_dtype_policy(dtype)  # layers inside the layer take the global one
            config = dict(self.original.get_config())
            if "dtype" in config:
                config["dtype"] = dtype
            clone = type(self.original).from_config(config)
            clone(self._tensor(self.random_input(), dtype))
        except Exception:
            return None
        finally:
            keras.config.set_dtype_policy(policy)
        if self.original.built:
            if [tuple(v.shape) for v in clone.weights] != [tuple(v.shape) for v in self.original.weights]:
                return None
            for variable, given in zip(clone.weights, self.original.weights, strict=True):
                variable.assign(ops.convert_to_numpy(given))
        return clone

    @property
    def precision(self):
        # On the PyTorch and JAX backends Keras computes parts of a float64 layer in float32.
        exact = self.dtype == "float64" and keras.backend.backend() == "tensorflow"
        return "float64" if exact else "float32"

    def release(self):
        if not self.copied:
            self.reset()

    def reset(self):
        self.set(self._as_given)

    def _variables(self):
        if self._listed is None or self._listed[0] is not self.layer:
            found = {}
            for variable in self.layer.weights:
                if "float" in str(variable.dtype):
                    key = variable.path.split("/", 1)[-1]
                    found[key if key not in found else f"{key}#{len(found)}"] = variable
            self._listed = self.layer, found
        return self._listed[1]

    def _key(self, variable):
        return next(key for key, known in self._variables().items() if known is variable)

    def parameters(self):
        trained = {id(v) for v in self.layer.trainable_variables}
        return [key for key, variable in self._variables().items() if id(variable) in trained]

    def frozen(self):
        trained = {id(v) for v in self.layer.trainable_variables}
        statistics = {self.variance_of(key) for key in self.running_means()} | set(self.running_means())
        return [k for k, v in self._variables().items() if id(v) not in trained and k not in statistics]

    def running_means(self):
        return [key for key in self._variables() if key.rpartition("/")[2] == "moving_mean"]

    def variance_of(self, key):
        return key.removesuffix("mean") + "variance"

    def get(self, key):
        array = np.asarray(ops.convert_to_numpy(self._variables()[key].value), dtype=np.float64)
        return _to_torch_layout(array).copy()

    def set(self, arrays):
        variables = self._variables()
        for key, array in arrays.items():
            variables[key].assign(_to_keras_layout(np.asarray(array)))

    def forward(self, x, training=False):
        return self._out(self._call(self._tensor(x, self.dtype), training))

    def alters_input(self, x):
        given = self._tensor(x, self.dtype)
        before = np.array(ops.convert_to_numpy(given))
        self._call(given, False)
        return not np.array_equal(before, ops.convert_to_numpy(given))

    def _call(self, x, training):
        z = self.layer(x, training=training) if _takes_training(self.layer) else self.layer(x)
        if isinstance(z, list | tuple | dict):
            raise TypeError(f"the block returns {type(z).__name__}, not one tensor")
        return z

    def vjp(self, x, direction, training=False):
        keys = self.parameters()
        variables = [self._variables()[key] for key in keys]
        x, direction = (self._tensor(maps, self.dtype) for maps in (x, direction))
        gradient = {"tensorflow": self._tf_vjp, "torch": self._torch_vjp, "jax": self._jax_vjp}
        dx, slopes = gradient[keras.backend.backend()](x, direction, variables, training)
        dx = np.zeros(x.shape) if dx is None else np.asarray(ops.convert_to_numpy(dx), dtype=np.float64)
        arrays = {}
        for key, slope in zip(keys, slopes, strict=True):
            if slope is not None:
                slope = np.asarray(ops.convert_to_numpy(ops.convert_to_tensor(slope)), dtype=np.float64)
                slope = _to_torch_layout(slope)
            arrays[key] = slope
        return np.moveaxis(dx, -1, 1), arrays

    def _tf_vjp(self, x, direction, variables, training):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            total = ops.sum(ops.cast(self._call(x, training), self.dtype) * direction)
        dx, *slopes = tape.gradient(total, [x, *(v.value for v in variables)])
        return dx, slopes

    def _torch_vjp(self, x, direction, variables, training):
        import torch

        x.requires_grad_()
        total = ops.sum(ops.cast(self._call(x, training), self.dtype) * direction)
        dx, *slopes = torch.autograd.grad(total, [x, *(v.value for v in variables)], allow_unused=True)
        return dx, slopes

    def _jax_vjp(self, x, direction, variables, training):
        import jax

        options = {"training": training} if _takes_training(self.layer) else {}
        state = [v.value for v in self.layer.non_trainable_variables]

        def total(values, x):
            z, _ = self.layer.stateless_call(values, state, x, **options)
            return ops.sum(z * direction)

        every = self.layer.trainable_variables
        slopes, dx = jax.grad(total, argnums=(0, 1))([v.value for v in every], x)
        by_variable = {id(variable): slope for variable, slope in zip(every, slopes, strict=True)}
        return dx, [by_variable[id(variable)] for variable in variables]

    def half(self, x):
        layer = self._clone("float16")
        if layer is None:
            raise NotRunnable("the layer cannot be made anew in float16, or has no kernels for it here")
        double, self.layer = self.layer, layer
        try:
            return self._out(self._call(self._tensor(x, "float16"), False))
        except Exception as error:
            if "Could not find device" in str(error) or "not implemented for" in str(error):
                raise NotRunnable(f"{self.framework} cannot run it in float16 here") from error
            raise
        finally:
            self.layer = double

    def _tensor(self, x, dtype):
        return ops.convert_to_tensor(np.ascontiguousarray(np.moveaxis(x, 1, -1)), dtype=dtype)

    def _out(self, z):
        z = ops.convert_to_numpy(z).astype(np.float64)
        return np.moveaxis(z, -1, 1)

    def norm_epsilon(self, role):
        return getattr(self._part(role), "epsilon", None)

    def call_norm(self, maps):
        return self._out(self._part("norm")(self._tensor(maps, self.dtype)))

    def _part(self, role):
        return self._walk(self.layer, self.places[role])

    # Where theta, phi, g, W_z are -----------------------------------------------------------------------

    def _walk(self, part, path):
        for word in path.split("."):
            if hasattr(part, word):
                part = getattr(part, word)
            elif isinstance(part, list | tuple) and word.isdigit() and int(word) < len(part):
                part = part[int(word)]
            else:
                part = part.get_layer(word)  # a model inside; AttributeError or ValueError for others
        return part

    def keys_of(self, role, value):
        if not isinstance(value, str):
            value = self._path(role, value)
        try:
            part = self._walk(self.layer, value)
        except (AttributeError, ValueError):
            known = [name for name in vars(self.layer) if not name.startswith("_")]
            raise self.no_such_place(role, value, known) from None
        if isinstance(part, keras.Variable):
            return value, {"weight": self._key(part)}
        if not isinstance(part, keras.layers.Layer):
            return value, {}
        names = [v.name for v in part.weights]
        if len(set(names)) < len(names):
            raise ValueError(f"weights[{role!r}]={value!r} holds several layers; name one of them")
        return value, {_TORCH_NAME[v.name]: self._key(v) for v in part.weights if v.name in _TORCH_NAME}

    def _path(self, role, value):
        for name, part in vars(self.original).items():
            if part is value:
                return name
        if isinstance(self.original, keras.Model) and value in self.original.layers:
            return value.name
        raise ValueError(
            f"weights[{role!r}] is a {type(value).__name__} that is not an attribute of the block; "
            "give its dotted path"
        )

    def own_places(self):
        return {role: role for role in ROLES if getattr(self.layer, role, None) is not None}


def _takes_training(layer):
    return getattr(layer, "_call_has_training_arg", False) or isinstance(layer, keras.Model)
