"""The conformance suite names seeded faults, passes our own blocks, and leaves what it checks as it was."""

import copy
import itertools

import keras
import numpy as np
import pytest
import torch
from keras import ops
from torch import nn
from torch.nn import functional

import nlutils.keras
import nlutils.torch
from nlutils.conformance import Report, check, code_digest, read_recorded, write_record
from nlutils.conformance.formulas import FAULTS, Formula, Oracle, literal
from nlutils.exchange import to_arrays
from nlutils.instantiations import INSTANTIATIONS, SOFTMAX_FORMS

C, D = 8, 4
MAPS = {1: (2, C, 12), 2: (2, C, 4, 6), 3: (2, C, 4, 4, 6)}


def example(ndim, channels_last=False):
    x = np.zeros(MAPS[ndim])
    return np.moveaxis(x, 1, -1) if channels_last else x


# Our own blocks -----------------------------------------------------------------------------------

OPTIONS = [
    {"instantiation": instantiation, "scale": scale, "subsample": subsample, "norm": norm}
    for instantiation, scale, subsample, norm in itertools.product(
        INSTANTIATIONS, (False, True), (None, "before", "after"), (True, False)
    )
    if not scale or instantiation in SOFTMAX_FORMS
]
ATTENDING = [
    {"attention": "space", "subsample": "before"},
    {"attention": "time", "instantiation": "dot_product"},
    {"attention": "time", "frames_per_group": 2},
    {"frames_per_group": 2, "subsample": "after"},
]


def says_what_it_is(report, options):
    assert report.faults == []
    assert report.passed
    for name, value in options.items():
        if name == "norm":
            assert report.options["norm"] == ("batch" if value else None)
        else:
            assert report.options[name] == value, name
    assert (report.options["in_channels"], report.options["inner_channels"]) == (C, D)
    assert [line.split(":")[0] for line in report.not_run] == ["half precision"]  # 8 channels are too few


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_combination_of_ours_in_pytorch_passes(ndim):
    torch.manual_seed(0)
    for options in OPTIONS:
        block = nlutils.torch.NonLocalBlock(C, ndim=ndim, **options)
        says_what_it_is(check(block, example(ndim)), {"ndim": ndim, **options})


@pytest.mark.parametrize("options", ATTENDING, ids=str)
def test_attention_over_parts_of_the_clip_is_recognised(options):
    says_what_it_is(check(nlutils.torch.NonLocalBlock(C, **options), example(3)), options)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_ours_in_keras_passes(instantiation):
    scaled = instantiation in SOFTMAX_FORMS
    for subsample, norm in ((None, True), ("before", False), ("after", True)):
        options = {
            "instantiation": instantiation,
            "subsample": subsample,
            "norm": norm,
            "scale": scaled and norm,
        }
        block = nlutils.keras.NonLocalBlock(C, **options)
        says_what_it_is(check(block, example(3, channels_last=True)), options)


@pytest.mark.parametrize(
    ("ndim", "options"),
    [(1, {"norm": False}), (2, {"subsample": "after"}), *((3, o) for o in ATTENDING)],
    ids=str,
)
def test_further_options_of_ours_in_keras_pass(ndim, options):
    block = nlutils.keras.NonLocalBlock(C, ndim=ndim, **options)
    says_what_it_is(check(block, example(ndim, channels_last=True)), options)


def test_the_only_fault_without_zero_init_is_the_start():
    report = check(nlutils.torch.NonLocalBlock(C, zero_init=False), example(3))
    assert [fault.split(":")[0] for fault in report.faults] == ["identity at the start"]
    assert not report.passed


# A stranger's block, right; and one for each mistake ----------------------------------------------


class Block(nn.Module):
    """An embedded Gaussian block in 2D, scaled, pooled after phi and g; each step may be got wrong."""

    softmax = True

    def __init__(self, channels=C, inner=D):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.w_z, self.norm = nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        maps = self.theta(x), self.pool(self.phi(x)), self.pool(self.g(x))
        theta, phi, g = (m.flatten(2).transpose(1, 2) for m in maps)
        f = theta @ phi.transpose(1, 2)
        y = self.normalised(f * self.scale(x, theta) if self.softmax else f) @ g
        return self.finish(x, y.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))

    def pool(self, maps):
        return functional.max_pool2d(maps, 2)

    def scale(self, x, theta):
        return theta.shape[2] ** -0.5

    def normalised(self, f):
        return f.softmax(2)

    def finish(self, x, y):
        return x + self.norm(self.w_z(y))


class OverTheBatch(Block):
    def normalised(self, f):
        return f.softmax(0)


class PooledFlat(Block):
    def pool(self, maps):
        return functional.max_pool1d(maps.flatten(2), 2)


class InvertedScale(Block):
    def scale(self, x, theta):
        return 1 / theta.shape[2] ** -0.5


class Unused(Block):
    def __init__(self):
        super().__init__(inner=C)

    def finish(self, x, y):
        return x + self.norm(y)


class TwoMistakes(InvertedScale):
    def finish(self, x, y):
        return self.norm(self.w_z(y))


class Detached(Block):
    def normalised(self, f):
        return f.detach().softmax(2)


class InPlace(Block):
    softmax = False

    def normalised(self, f):
        f = torch.relu(f)
        f /= f.shape[2]
        return f


class WrongMomentum(Block):
    def __init__(self):
        super().__init__()
        self.norm.momentum = 0.9


class NotIdentity(Block):
    def __init__(self):
        super().__init__()
        nn.init.ones_(self.norm.weight)


class NeverCalled(Block):
    def __init__(self):
        super().__init__()
        self.further = nn.Conv2d(C, C, 1)


class NoisyInEvaluation(Block):
    def finish(self, x, y):
        return x + self.norm(self.w_z(functional.dropout(y, 0.5)))


class BuiltAnew(nn.Module):
    def forward(self, x):
        block = Block(x.shape[1])
        nn.init.ones_(block.norm.weight)
        return block.to(x.dtype)(x)


class ChangesItsInput(Block):
    def finish(self, x, y):
        x += self.norm(self.w_z(y))
        return x


class PositionsMatter(Block):
    def forward(self, x):
        return super().forward(x) + 0.01 * torch.arange(x.shape[3], dtype=x.dtype)


class AverageOfTheBatch(Block):
    def finish(self, x, y):
        return x + self.norm(self.w_z(y - y.mean(0, keepdim=True)))


class NotFinite(nn.Module):
    """A Gaussian block: x_i . x_i leaves float16 at 1,024 channels."""

    def __init__(self):
        super().__init__()
        self.g, self.w_z = nn.Conv1d(1024, 2, 1), nn.Conv1d(2, 1024, 1)
        nn.init.zeros_(self.w_z.weight)
        nn.init.zeros_(self.w_z.bias)

    def forward(self, x):
        y = (x.transpose(1, 2) @ x).softmax(2) @ self.g(x).transpose(1, 2)
        return x + self.w_z(y.transpose(1, 2))


MISTAKES = [
    (OverTheBatch, "batch mates", "changes by"),
    (Unused, "every parameter", "w_z.weight"),
    (TwoMistakes, "residual and W_z", "no residual"),
    (TwoMistakes, "scale", "scale inverted"),
    (Detached, "gradients", "d/d x along one direction"),
    (Detached, "every parameter", "theta.weight"),
    (InPlace, "trainable", "in-place operation"),
    (InPlace, "gradients", "in-place operation"),
    (WrongMomentum, "statistics", "momentum 0.9 in PyTorch's convention"),
    (NotIdentity, "identity at the start", "is not the identity"),
    (NeverCalled, "every parameter", "further.weight"),
    (NoisyInEvaluation, "repeatable", "draws random numbers in evaluation mode"),
    (BuiltAnew, "repeatable", "built anew at each call"),
    (BuiltAnew, "trainable", "no parameter to train"),
    (ChangesItsInput, "runs", "works in place on its input"),
    (PositionsMatter, "position order", "depends on the order of the positions"),
    (AverageOfTheBatch, "batch mates", "changes by"),
]


def test_the_block_without_a_mistake_passes():
    report = check(Block(), example(2))
    assert report.passed, report.faults
    assert report.options["instantiation"] == "embedded_gaussian"
    assert report.options["scale"] is True
    assert report.options["subsample"] == "after"


@pytest.mark.parametrize(
    ("block", "name", "text"), MISTAKES, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_seeded_fault_is_named(block, name, text):
    torch.manual_seed(0)
    report = check(block(), example(2))
    assert report[name].result == "wrong", report
    assert text in report[name].diagnosis
    assert not report.passed


# Each known fault, in one more stranger's block ----------------------------------------------------

# The instantiation that a fault is seeded into; the embedded Gaussian for all others.
SEEDED_INTO = {
    "softmax of the concatenation": "concatenation",
    "no ReLU in f": "concatenation",
    "no 1/M": "dot_product",
    "1/N": "dot_product",
    "1/d": "dot_product",
    "linear form scaled": "dot_product",
}


class Seeded(nn.Module):
    """A block in 3D, pooled after phi and g, scaled where it has a softmax, with one fault or none."""

    def __init__(self, fault, instantiation):
        super().__init__()
        self.fault, self.linear = fault, instantiation != "embedded_gaussian"
        inner = C if fault == "W_z not applied" else D
        self.theta, self.phi, self.g = (nn.Conv3d(C, inner, 1) for _ in range(3))
        self.w_z, self.norm = nn.Conv3d(inner, C, 1), nn.BatchNorm3d(C)
        self.w_f = nn.Parameter(torch.randn(2 * inner)) if instantiation == "concatenation" else None
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        fault = self.fault
        first, second = (
            (self.phi, self.theta) if fault == "theta and phi exchanged" else (self.theta, self.phi)
        )
        maps = {"theta": first(x), "phi": self.pool(second(x)), "g": self.pool(self.g(x))}
        theta, phi, g = (
            m.reshape(len(x), -1, m.shape[1])
            if fault in (f"{name} scrambled", "theta, phi and g scrambled")
            else m.flatten(2).transpose(1, 2)
            for name, m in maps.items()
        )
        y = self.weights(theta, phi) @ g
        if fault == "y scrambled":
            y = y.reshape(len(x), -1, *x.shape[2:])
        elif fault == "positions of y reversed":
            y = y.transpose(1, 2).reshape(len(x), -1, *x.shape[:1:-1]).permute(0, 1, 4, 3, 2)
        else:
            y = y.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])
        update = y if fault == "W_z not applied" else self.w_z(y)
        update = update if fault == "norm not applied" else self.norm(update)
        if fault == "ReLU before the sum":
            update = update.relu()
        if fault == "no residual":
            return update
        z = x + 0 * update if fault == "update not added" else x + update
        return z.relu() if fault == "ReLU after the sum" else z

    def pool(self, maps):
        if self.fault == "pooled along the flattened axis":
            return functional.max_pool1d(maps.flatten(2), 2)
        if self.fault == "averages pooled":
            return functional.avg_pool3d(maps, (1, 2, 2))
        return functional.max_pool3d(maps, 2 if self.fault == "time pooled" else (1, 2, 2))

    def weights(self, theta, phi):
        d = theta.shape[2]
        if self.w_f is None:
            f = theta @ phi.transpose(1, 2)
        else:
            f = (theta @ self.w_f[:d])[:, :, None] + (phi @ self.w_f[d:])[:, None]
            f = f if self.fault == "no ReLU in f" else f.relu()
        if self.linear and self.fault != "softmax of the concatenation":
            factor = {"no 1/M": 1, "1/N": 1 / f.shape[1], "1/d": 1 / d}.get(self.fault, 1 / f.shape[2])
            return f * factor * (d**-0.5 if self.fault == "linear form scaled" else 1)
        if not self.linear:
            scales = {
                "scale inverted": d**0.5,
                "scale from in_channels": C**-0.5,
                "scale without the root": 1 / d,
            }
            f = f * scales.get(self.fault, d**-0.5)
        if self.fault == "softmax over all pairs":
            return f.flatten(1).softmax(1).reshape(f.shape)
        return f.softmax({"softmax over i": 1, "softmax over the batch": 0}.get(self.fault, 2))


@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "dot_product", "concatenation"])
def test_the_block_to_seed_has_no_fault_of_its_own(instantiation):
    report = check(Seeded(None, instantiation), np.zeros((2, C, 3, 4, 6)))
    says_what_it_is(report, {"instantiation": instantiation, "subsample": "after", "norm": True})


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_that_has_a_name_is_found(fault):
    torch.manual_seed(0)
    block = Seeded(fault, SEEDED_INTO.get(fault, "embedded_gaussian"))
    report = check(block, np.zeros((2, C, 3, 4, 6)))
    assert report.options["faults"] == [fault], report
    assert report[FAULTS[fault].check].result == "wrong"
    assert FAULTS[fault].text in report[FAULTS[fault].check].diagnosis


# Small maps, many frames, trained blocks -----------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "moved"),
    [
        ((2, 16, 4, 3, 3), "frames and the windows of sub-sampling"),
        ((2, 512, 4, 7, 7), "frames and the windows of sub-sampling"),
        ((2, 16, 1, 3, 3), None),
    ],
)
def test_position_order_moves_what_the_map_has(shape, moved):
    found = check(nlutils.torch.NonLocalBlock(shape[1], subsample="before"), np.zeros(shape))[
        "position order"
    ]
    expected = ("ok", f"the output follows when these are moved: {moved}")
    small = ("not run", "the map is too small to tell; give a larger example_input")
    assert (found.result, found.diagnosis) == (expected if moved else small)


def test_one_key_leaves_theta_and_phi_untold_and_nothing_else():
    options = {"ndim": 2, "subsample": "before"}
    x = np.zeros((2, C, 3, 3))
    report = check(nlutils.torch.NonLocalBlock(C, **options), x)
    assert report.passed, report
    assert "one key" in report["every parameter"].diagnosis
    linear = check(nlutils.torch.NonLocalBlock(C, instantiation="dot_product", **options), x)
    assert linear["every parameter"].result == "ok"
    assert "further.weight" in check(NeverCalled(), x)["every parameter"].diagnosis


@pytest.mark.parametrize("group", [8, 16])
def test_groups_of_many_frames_are_recognised(group):
    report = check(nlutils.torch.NonLocalBlock(C, frames_per_group=group), np.zeros((2, C, 16, 8, 8)))
    assert report.faults == []
    assert report.options["frames_per_group"] == (group if group < 16 else None)


class DividedByWidth(nlutils.torch.NonLocalBlock):
    def forward(self, x):
        theta, phi, g = (layer(x).flatten(2).transpose(1, 2) for layer in (self.theta, self.phi, self.g))
        y = theta @ phi.transpose(1, 2) / theta.shape[2] @ g
        return x + self.norm(self.w_z(y.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])))


@pytest.mark.parametrize("size", [(6, 8), (2, 4, 6)])
def test_the_width_is_told_from_the_number_of_keys_where_they_are_equal(size):
    block = DividedByWidth(96, ndim=len(size), instantiation="dot_product")
    assert "divided by the width d" in check(block, np.zeros((2, 96, *size)))["normalisation"].diagnosis


def test_a_fault_that_the_map_cannot_show_is_mentioned():
    block = nlutils.torch.NonLocalBlock(C, 1, ndim=1, instantiation="dot_product")
    found = check(block, np.zeros((2, C, 1)))["definition"]
    assert found.result == "ok"
    assert "this map cannot tell it from dot_product" in found.diagnosis
    assert "1/M is missing" in found.diagnosis


def test_a_kink_of_the_maxima_is_no_wrong_gradient():
    # Here two values in a window are so close that differences at the first point go across.
    block = nlutils.torch.NonLocalBlock(96, ndim=2, subsample="after")
    assert check(block, np.zeros((2, 96, 6, 7)))["gradients"].result == "ok"


def test_a_trained_block_need_not_be_the_identity():
    block = nlutils.torch.NonLocalBlock(C, ndim=2, zero_init=False)
    assert check(block, example(2))["identity at the start"].result == "wrong"
    block.train()(torch.randn(2, C, 4, 6))
    found = check(block, example(2))["identity at the start"]
    assert (found.result, found.diagnosis) == (
        "not run",
        "the block has been trained: its running mean is not 0",
    )


@pytest.mark.parametrize(
    ("block", "only"),
    [
        (InvertedScale, {"definition", "scale"}),
        (PooledFlat, {"definition", "pooling"}),
        (WrongMomentum, {"statistics"}),
        (NotIdentity, {"identity at the start"}),
        (InPlace, {"definition", "gradients", "trainable"}),
        (NeverCalled, {"every parameter"}),
    ],
)
def test_a_fault_is_named_and_nothing_else(block, only):
    report = check(block(), example(2))
    assert {r.check for r in report.results if r.result == "wrong"} == only, report


def test_an_in_place_fault_has_the_right_formula_where_it_is_right():
    class Concatenated(nn.Module):
        """The 1/M of a concatenation block, divided in place: forward is right, backward raises."""

        def __init__(self):
            super().__init__()
            self.theta, self.phi, self.g = (nn.Conv1d(C, D, 1) for _ in range(3))
            self.w_f, self.w_z = nn.Parameter(torch.randn(2 * D)), nn.Conv1d(D, C, 1)
            nn.init.zeros_(self.w_z.weight)
            nn.init.zeros_(self.w_z.bias)

        def forward(self, x):
            a = self.w_f[:D] @ self.theta(x)
            b = self.w_f[D:] @ self.phi(x)
            f = torch.relu(a[:, :, None] + b[:, None, :])
            f /= x.shape[2]
            return x + self.w_z(self.g(x) @ f.transpose(1, 2))

    report = check(Concatenated(), example(1))
    assert report["definition"].result == "ok"
    assert report.options["instantiation"] == "concatenation"
    assert {r.check for r in report.results if r.result == "wrong"} == {"gradients", "trainable"}


@pytest.mark.parametrize(
    ("window", "text"),
    [((2, 2, 2), "time is halved too"), (None, "neighbours in the flattened map")],
)
def test_pooling_along_the_wrong_axis_is_named_in_3d(window, text):
    class Pooled(nlutils.torch.NonLocalBlock):
        def forward(self, x):
            keys = (
                functional.max_pool3d(x, window)
                if window
                else functional.max_pool1d(x.flatten(2), 2)[..., None, None]
            )
            theta, phi, g = (
                maps.flatten(2).transpose(1, 2) for maps in (self.theta(x), self.phi(keys), self.g(keys))
            )
            y = nlutils.torch.non_local(theta, phi, g, self.instantiation)
            return x + self.norm(self.w_z(y.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])))

    report = check(Pooled(C), example(3))
    assert text in report["pooling"].diagnosis


def test_nan_in_half_precision_is_named_and_ours_has_none():
    x = np.zeros((1, 1024, 4))
    assert "NaN or infinity" in check(NotFinite(), x)["half precision"].diagnosis
    ours = nlutils.torch.NonLocalBlock(1024, 2, ndim=1, instantiation="gaussian", norm=False)
    assert check(ours, x)["half precision"].result == "ok"


def test_a_formula_nobody_knows_is_wrong_and_the_rest_says_it_was_not_run():
    class Squared(Block):
        def normalised(self, f):
            f = f**2
            return f / f.sum(2, keepdim=True)

    report = check(Squared(), example(2))
    assert "no formula gives this output" in report["definition"].diagnosis
    assert report["scale"].result == "not run"
    assert report.options == {}


def test_a_block_that_does_not_run_is_reported():
    class Raises(nn.Module):
        def forward(self, x):
            raise AttributeError("no non_local_type")

    report = check(Raises(), example(2))
    assert report["runs"].diagnosis == "raises AttributeError: no non_local_type"
    assert {r.result for r in report.results[1:]} == {"not run"}


# Where the weights are ----------------------------------------------------------------------------


class Stranger(nn.Module):
    """Ours inside, under other names, one level down, without a bias in W_z."""

    def __init__(self):
        super().__init__()
        ours = nlutils.torch.NonLocalBlock(C, ndim=2, norm=False)
        ours.w_z.bias = None
        self.inside = ours
        self.parts = nn.ModuleDict({"query": ours.theta, "key": nn.Sequential(ours.phi)})

    def forward(self, x):
        return self.inside(x)


def test_places_may_be_paths_layers_or_parameters():
    block = Stranger()
    paths = {"theta": "inside.theta", "phi": "parts.key", "g": "inside.g", "w_z": "inside.w_z"}
    layers = {"theta": block.inside.theta, "phi": "inside.phi", "g": block.inside.g, "w_z": block.inside.w_z}
    for weights in (paths, layers, {**layers, "w_z": block.inside.w_z.weight}):
        report = check(block, example(2), weights)
        assert report.passed, report.faults
        assert report.options["instantiation"] == "embedded_gaussian"


def test_without_places_the_other_checks_still_run():
    report = check(Stranger(), example(2))
    assert not report.passed
    assert report.faults == []
    assert report["definition"].result == "not run"
    assert "`weights`" in report["definition"].diagnosis
    for name in ("repeatable", "gradients", "position order", "batch mates", "every parameter", "trainable"):
        assert report[name].result == "ok", name


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"query": "theta"}, "weights names"),
        ({"theta": "thata"}, "weights\\['theta'\\]='thata' is not in the block; near it: theta"),
        ({"theta": nn.Conv2d(C, D, 1)}, "is a Conv2d that is not in the block"),
    ],
)
def test_a_wrong_place_is_an_error_that_names_it(weights, message):
    with pytest.raises(ValueError, match=message):
        check(Block(), example(2), weights)


def test_wrong_arguments_are_errors():
    with pytest.raises(TypeError, match="block is a function"):
        check(lambda x: x, example(2))
    with pytest.raises(ValueError, match="example_input of shape"):
        check(Block(), np.zeros((2, C)))


def test_an_unmapped_weight_that_matters_is_mentioned():
    class Gated(Block):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.full((1,), 0.3))

        def finish(self, x, y):
            return x + self.gate * self.norm(self.w_z(y))

    assert "gate" in check(Gated(), example(2))["definition"].diagnosis


# What was checked stays as it was -----------------------------------------------------------------


def test_a_pytorch_block_and_the_random_state_are_left_alone():
    block = Block().train()
    before, generator = copy.deepcopy(block.state_dict()), torch.get_rng_state()
    check(block, example(2))
    assert block.training
    assert all(torch.equal(value, block.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in block.parameters())
    assert torch.equal(generator, torch.get_rng_state())


# Keras layers -------------------------------------------------------------------------------------


class KerasBlock(keras.layers.Layer):
    """An embedded Gaussian in 2D without a config: it is checked in its own float32."""

    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault
        self.theta, self.phi, self.g = (keras.layers.Conv2D(D, 1) for _ in range(3))
        self.w_z = keras.layers.Conv2D(C, 1, kernel_initializer="zeros")

    def build(self, shape):
        for layer in (self.theta, self.phi, self.g):
            layer.build(shape)
        self.w_z.build((*shape[:-1], D))

    def call(self, x):
        batch, height, width, _ = x.shape
        theta, phi, g = (ops.reshape(layer(x), (batch, -1, D)) for layer in (self.theta, self.phi, self.g))
        if self.fault == "pooled flat":
            phi, g = (ops.max_pool(rows, 2, 2) for rows in (phi, g))
        if self.fault == "scrambled":
            f = ops.matmul(theta, ops.reshape(phi, (batch, D, -1)))
        else:
            f = ops.matmul(theta, ops.transpose(phi, (0, 2, 1)))
        y = ops.matmul(ops.softmax(f, axis=1 if self.fault == "wrong axis" else 2), g)
        return x + self.w_z(ops.reshape(y, (batch, height, width, D)))


class KerasBuiltAnew(keras.layers.Layer):
    def call(self, x):
        y = keras.layers.Conv2D(4, 1)(x)
        return x + keras.layers.Conv2D(x.shape[-1], 1)(y)


def keras_block(fault=None):
    block = KerasBlock(fault)
    block(example(2, channels_last=True))
    return block


def test_a_keras_layer_without_a_config_is_checked_itself_and_gets_its_weights_back():
    block = keras_block()
    before = [ops.convert_to_numpy(weight) for weight in block.weights]
    report = check(block, example(2, channels_last=True))
    assert report.passed, report
    assert "float32" in report["runs"].diagnosis
    after = [ops.convert_to_numpy(weight) for weight in block.weights]
    assert all(np.array_equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("fault", "name", "text"),
    [
        ("wrong axis", "softmax axis", "softmax over i"),
        ("pooled flat", "pooling", "neighbours in the flattened map"),
        ("scrambled", "channel order", "phi reshaped without a transpose"),
    ],
)
def test_a_seeded_fault_in_keras_is_named(fault, name, text):
    report = check(keras_block(fault), example(2, channels_last=True))
    assert text in report[name].diagnosis, report


def test_a_keras_layer_built_anew_at_each_call_is_named():
    report = check(KerasBuiltAnew(), example(2, channels_last=True))
    assert "built anew at each call" in report["repeatable"].diagnosis


def test_keras_momentum_in_pytorchs_convention_is_named():
    block = nlutils.keras.NonLocalBlock(C, ndim=2)
    block.build((None, 4, 6, C))
    original = type(block)._batch_norm

    class Wrong(nlutils.keras.NonLocalBlock):
        def _batch_norm(self, input_shape):
            norm = original(self, input_shape)
            norm.momentum = 0.1
            return norm

    report = check(Wrong(C, ndim=2), example(2, channels_last=True))
    assert "keeps only 0.1 of its old value" in report["statistics"].diagnosis


def test_our_keras_block_is_left_alone():
    block = nlutils.keras.NonLocalBlock(C, ndim=2)
    block.build((None, 4, 6, C))
    before = to_arrays(block)
    check(block, example(2, channels_last=True))
    assert all(np.array_equal(array, before[name]) for name, array in to_arrays(block).items())
    assert keras.config.dtype_policy().name == "float32"


# The oracle and the record ------------------------------------------------------------------------


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
@pytest.mark.parametrize("subsample", [None, "before", "after"])
def test_the_oracle_is_the_literal_sum(instantiation, subsample):
    rng = np.random.default_rng(0)
    shapes = {"theta": (D, C), "phi": (D, C), "g": (3, C), "w_z": (C, 3)}
    if instantiation == "gaussian":
        del shapes["theta"], shapes["phi"]
    weights = {f"{name}.weight": rng.standard_normal(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": rng.standard_normal(shape[0]) for name, shape in shapes.items()}
    if instantiation == "concatenation":
        weights |= {"w_f": rng.standard_normal(2 * D), "w_f.bias": 0.3}
    x = rng.standard_normal((2, C, 4, 3, 5)) / C
    oracle = Oracle(x, weights)
    for attention, frames in (("spacetime", None), ("space", None), ("time", 2), ("spacetime", 2)):
        if attention == "time" and subsample:
            continue
        formula = Formula(instantiation, False, subsample, attention, frames)
        np.testing.assert_allclose(oracle(formula), literal(formula, x, weights, None), atol=1e-12)


def test_a_report_reads_back_and_prints():
    report = check(InvertedScale(), example(2))
    assert Report.from_json(report.to_json()) == report
    with pytest.raises(ValueError, match="not a conformance report"):
        Report.from_json('{"block": 1}')
    with pytest.raises(KeyError, match="no check is called"):
        report["scaling"]
    text = str(report)
    assert "scale                  wrong    scale inverted" in text
    assert len(text.splitlines()) == len(report.results) + 5


def records(library):
    return [record for record in read_recorded() if record.library == library]


def test_records_are_read_back_and_a_broken_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="conformance_of_peers"):
        read_recorded(tmp_path)
    (record, *_) = records("timm")
    write_record(record, tmp_path)
    assert read_recorded(tmp_path) == [record]
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json is not a recorded"):
        read_recorded(tmp_path)


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_what_is_recorded_of_ours_agrees_with_a_fresh_run(framework):
    module, found = f"nlutils.{framework}.NonLocalBlock", 0
    for record in records("nlutils"):
        # Of the wide ones, which take seconds each, one; in Keras three blocks in all.
        if record.module != module or (record.name.endswith("-wide") and "dot_product" not in record.name):
            continue
        if framework == "keras" and "dot_product" not in record.name:
            continue
        kind = {"torch": nlutils.torch, "keras": nlutils.keras}[framework].NonLocalBlock
        fresh = check(kind(**record.arguments), np.zeros(record.maps))
        assert fresh.results == record.report.results, record.name
        assert fresh.computes == record.report.computes
        found += 1
    assert found == {"torch": 9, "keras": 3}[framework]


def test_the_records_were_made_by_these_checks():
    old = [record.name for record in read_recorded() if record.provenance.get("code") != code_digest()]
    assert old == [], "record again: benchmarks/conformance_of_peers.py, with and without --ours"


def test_the_record_of_the_peers_holds_what_is_known_of_them():
    faults = {record.name: " ".join(record.report.faults) for record in read_recorded()}
    assert "in_channels^(-1/2) instead of d^(-1/2)" in faults["timm-NonLocalAttn"]
    for ndim in (1, 2, 3):
        assert "in-place operation" in faults[f"mmcv-NonLocal{ndim}d-concatenation"]
        assert faults[f"mmcv-NonLocal{ndim}d-embedded_gaussian-subsampled"] == ""
    assert "not the identity" in faults["pytorchvideo-NonLocal-softmax"]
    assert all(record.report.options for record in read_recorded())
