"""The training loop in Keras: the same batches, steps and rates as `nlutils.study.train`."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow reads it when it is imported

import keras
import numpy as np
import torch
from keras import ops

from nlutils.keras.blocks import CompactGeneralizedNonLocalBlock, NonLocalBlock
from nlutils.paths import atomic_path
from nlutils.study.inputs import Inputs
from nlutils.study.recipe import Recipe
from nlutils.study.stopwatch import Stopwatch
from nlutils.study.train import epoch_batches, loss_targets, shown_epochs
from nlutils.torch.models.common import mean_probability

__all__ = ["AdamW", "StepRates", "channels_last", "check_recipe", "evaluate", "train"]

# What `Recipe.block_lr` is about.
BLOCKS = NonLocalBlock, CompactGeneralizedNonLocalBlock


@keras.saving.register_keras_serializable(package="nlutils")
class StepRates(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of each step, from a list."""

    def __init__(self, rates):
        self.rates = [float(rate) for rate in rates]

    def __call__(self, step):
        return ops.take(ops.convert_to_tensor(self.rates, keras.config.floatx()), ops.cast(step, "int32"))

    def get_config(self) -> dict:
        """The arguments that make this schedule again."""
        return {"rates": self.rates}


class AdamW(keras.optimizers.Optimizer):
    """AdamW as PyTorch computes it: Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019.

        w <- w - rate decay w
        w <- w - rate m^ / (sqrt(v^) + epsilon),   m^ = m / (1 - beta_1^t),  v^ = v / (1 - beta_2^t)

    Keras' own adds epsilon to sqrt(v), so that it weighs 30 times as much in the first step, and has one rate
    for all weights. Here `factors`, {id(variable): factor}, multiplies that of some of them.
    """

    def __init__(self, learning_rate, decay, factors, *, beta_1=0.9, beta_2=0.999, epsilon=1e-8):
        super().__init__(learning_rate)
        self.decay, self.factors = decay, factors
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def build(self, variables) -> None:
        """Make m and v, of zeros."""
        if not self.built:
            super().build(variables)
            self.m, self.v = self.add_optimizer_variables(variables, ["m", "v"])
            self._factor = [self.factors.get(id(variable), 1.0) for variable in variables]

    def update_step(self, gradient, variable, learning_rate) -> None:
        """One step of one variable."""
        place, dtype = self._get_variable_index(variable), variable.dtype
        m, v = self.m[place], self.v[place]
        rate = self._factor[place] * ops.cast(learning_rate, dtype)
        step = ops.cast(self.iterations + 1, dtype)
        self.assign_add(m, (gradient - m) * (1 - self.beta_1))
        self.assign_add(v, (ops.square(gradient) - v) * (1 - self.beta_2))
        root = ops.sqrt(v / (1 - self.beta_2**step)) + self.epsilon
        self.assign_sub(variable, rate * self.decay * variable)
        self.assign_sub(variable, rate / (1 - self.beta_1**step) * m / root)


def train(
    model: keras.Model,
    kind: str,
    inputs: Inputs,
    indices: torch.Tensor,
    recipe: Recipe,
    *,
    checkpoint=None,
    progress: bool = False,
    after_epoch: Callable[[int, float], None] | None = None,
    watch: Stopwatch | None = None,
) -> list[float]:
    """Train `model` in place on the clips `indices`, which it sees as `kind`; returns each epoch's mean loss.

    The model is a functional one whose class scores have no softmax; the loss is their cross-entropy. When it
    starts with the weights of PyTorch's network, it sees the same batches in the same order as that one in
    `nlutils.study.train`, and takes the same steps, to rounding. Two things differ: which numbers dropout
    takes, and the moving variance (see `nlutils.keras.models.common.batch_norm`).

    All else is as in `nlutils.study.train`: epochs, `checkpoint`, `after_epoch`, `watch` and errors. Raises
    ValueError for `recipe.precision` and `recipe.compile` that are PyTorch's. (TensorFlow's compiler, XLA,
    takes many times as long on a CPU for these convolutions.)
    """
    check_recipe(recipe)
    steps = len(epoch_batches(indices, recipe.batch, torch.Generator()))
    rates = [recipe.rate(epoch + step / steps) for epoch in range(recipe.epochs) for step in range(steps)]
    optimizer = AdamW(StepRates(rates), recipe.weight_decay, _factors(model, recipe))
    optimizer.build(model.trainable_variables)
    # Rows of probabilities also where nothing is smoothed: one loss for both.
    loss_of = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss_of, jit_compile=False)
    targets = loss_targets(inputs, recipe)
    if targets.ndim == 1:
        targets = torch.nn.functional.one_hot(targets, len(inputs.classes)).float()
    watch = watch or Stopwatch()
    losses = _resume(checkpoint, model, recipe, watch)
    for epoch in shown_epochs(len(losses), recipe.epochs, progress):
        seed = 1_000_003 * recipe.seed + epoch
        draw = torch.Generator().manual_seed(seed)
        _seed_dropout(model, seed)
        total = 0.0
        for batch in epoch_batches(indices, recipe.batch, draw):
            x = inputs.batch(kind, batch, recipe.size, generator=draw, flip=recipe.flip, time=recipe.time)
            loss = model.train_on_batch(channels_last(x), targets[batch].numpy(), return_dict=True)["loss"]
            total += float(loss) * len(batch)
        losses.append(total / len(indices))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} in epoch {epoch}; lower lr={recipe.lr}")
        if checkpoint is not None:
            _save(checkpoint, model, recipe, losses, watch)
        if after_epoch is not None:
            after_epoch(epoch, losses[-1])
    return losses


def check_recipe(recipe: Recipe) -> None:
    """ValueError for settings that are PyTorch's."""
    for setting, value in {"precision": "float32", "compile": False}.items():
        if getattr(recipe, setting) != value:
            raise ValueError(f"{setting}={getattr(recipe, setting)!r} is PyTorch's; in Keras use {value!r}")


def evaluate(
    model: keras.Model,
    kind: str,
    inputs: Inputs,
    indices: torch.Tensor,
    recipe: Recipe,
    time: str | None = None,
) -> torch.Tensor:
    """The class scores of the clips `indices`, (clips, num_classes): as `nlutils.study.evaluate` has them."""
    return torch.cat(
        [
            _scores(model, kind, inputs, batch, recipe, time or recipe.time)
            for batch in indices.split(recipe.batch)
        ]
    )


def _scores(model, kind, inputs, batch, recipe, time):
    sides = []
    for mirrored in (False, True) if recipe.test_flip else (False,):
        x = inputs.batch(kind, batch, recipe.size, time=time, mirrored=mirrored)
        sides.append(torch.from_numpy(model.predict_on_batch(channels_last(x))))
    return sides[0] if len(sides) == 1 else mean_probability(torch.stack(sides, dim=1), dim=1)


def channels_last(x: torch.Tensor) -> np.ndarray:
    """PyTorch's clips (B, C, T, H, W) as Keras sees them: an array (B, T, H, W, C)."""
    return x.movedim(1, -1).contiguous().numpy()


def _factors(model, recipe) -> dict[int, float]:
    blocks = [layer for layer in model.layers if isinstance(layer, BLOCKS)]
    return {id(weight): recipe.block_lr for block in blocks for weight in block.trainable_variables}


def _seed_dropout(model, seed):
    """Every epoch draws anew from its own seed, so that a resumed run draws what the whole run draws."""
    generators = [layer.seed_generator for layer in model.layers if getattr(layer, "seed_generator", None)]
    for number, generator in enumerate(generators):
        generator.state.assign(np.random.SeedSequence((seed, number)).generate_state(2))


def _save(path, model, recipe, losses, watch):
    state = {
        "settings": recipe.settings(),
        "losses": losses,
        "seconds": watch.read(),
        "variables": [torch.from_numpy(np.array(variable)) for variable in _variables(model)],
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _variables(model):
    """All that training changes: weights, statistics, the optimizer's state."""
    return [*model.weights, *model.optimizer.variables]


def _resume(path, model, recipe, watch) -> list[float]:
    """Load the checkpoint at `path` when there is one; returns the losses of the epochs behind it."""
    if path is None or not Path(path).is_file():
        return []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings, losses, stored = state["settings"], state["losses"], state["variables"]
    except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{os.fspath(path)} is not a checkpoint of Keras ({error}); delete it") from error
    variables = _variables(model)
    if settings != recipe.settings():
        raise ValueError(
            f"{os.fspath(path)} is a checkpoint of another recipe, {settings}; delete it or name another"
        )
    if [tuple(one.shape) for one in stored] != [tuple(variable.shape) for variable in variables]:
        raise ValueError(f"{os.fspath(path)} is not a checkpoint of this network; delete it")
    for variable, values in zip(variables, stored, strict=True):
        variable.assign(values.numpy())
    watch.add(state["seconds"])
    return losses
