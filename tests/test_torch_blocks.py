"""The PyTorch block: against the block in NumPy, its start as the identity, its gradients, its layers, its
options. Under torch.compile and torch.export: test_torch_compiled.py; its memory: test_torch_memory.py.
"""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_cases import normal, random_block, way, ways

from nlutils import reference
from nlutils.exchange import to_arrays
from nlutils.instantiations import INSTANTIATIONS, SOFTMAX_FORMS
from nlutils.torch import NonLocalBlock, non_local

SIZES = {1: (7,), 2: (5, 4), 3: (2, 5, 3)}


def features(*shape):
    return normal(*shape, seed=2)


@pytest.mark.parametrize("subsample", [None, "before", "after"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_equals_the_reference_block(instantiation, ndim, subsample):
    for norm in (True, False):
        block = random_block(6, 4, ndim=ndim, instantiation=instantiation, subsample=subsample, norm=norm)
        x = features(2, 6, *SIZES[ndim])
        weights = to_arrays(block)
        expected = [
            reference.non_local_block(sample, weights, instantiation, subsample=subsample) for sample in x
        ]
        for context in ways(instantiation).values():
            with context:
                z = block(x).detach().numpy()
            np.testing.assert_allclose(z, np.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("instantiation", SOFTMAX_FORMS)
def test_scale_is_the_root_of_the_width_of_theta(instantiation):
    block = random_block(6, 4, ndim=2, instantiation=instantiation, scale=True)
    x = features(1, 6, 3, 4)
    expected = reference.non_local_block(x[0], to_arrays(block), instantiation, scale=True)
    np.testing.assert_allclose(block(x)[0].detach().numpy(), expected, rtol=0, atol=1e-12)
    block.scale = False
    assert not np.allclose(block(x)[0].detach().numpy(), expected)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_starts_as_the_identity(instantiation, ndim, norm):
    block = NonLocalBlock(6, ndim=ndim, instantiation=instantiation, norm=norm)
    x = torch.randn(2, 6, *SIZES[ndim])
    assert torch.equal(block(x), x)
    assert not torch.equal(NonLocalBlock(6, ndim=ndim, zero_init=False, norm=norm)(x), x)


def test_start_of_the_weights():
    torch.manual_seed(0)
    block = NonLocalBlock(256, 128, instantiation="concatenation", zero_init=False)
    for name in ("theta", "phi", "g", "w_z"):
        layer = getattr(block, name)
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.03)  # 32768 draws: 0.4 % is one sigma
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))
    assert block.w_f.shape == (256,)
    assert block.w_f.std().item() == pytest.approx(0.01, rel=0.2)
    assert torch.equal(block.norm.weight, torch.ones(256))
    assert (block.norm.eps, block.norm.momentum) == (1e-5, 0.1)


@pytest.mark.parametrize(("channels", "count"), [(256, 132_224), (512, 526_592), (1024, 2_101_760)])
def test_parameter_counts_of_the_released_code(channels, count):
    assert sum(parameter.numel() for parameter in NonLocalBlock(channels).parameters()) == count


def test_gaussian_has_no_weights_for_theta_and_phi():
    names = dict(NonLocalBlock(4, instantiation="gaussian").named_parameters())
    assert sorted(names) == ["g.bias", "g.weight", "norm.bias", "norm.weight", "w_z.bias", "w_z.weight"]


def gradient_names(block, x):
    """Names of the parameters that a generic loss moves: gradient above what rounding leaves."""
    block(x).mul(features(*x.shape)).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    return {name for name, parameter in block.named_parameters() if parameter.grad.abs().max() > 1e-10}


@pytest.mark.parametrize("subsample", [None, "before", "after"])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_every_parameter_learns(instantiation, subsample):
    block = random_block(6, 4, ndim=2, instantiation=instantiation, subsample=subsample)
    expected = {name for name, _ in block.named_parameters()}
    if instantiation == "embedded_gaussian":
        # phi's bias adds theta_i . b to all logits of row i, and a softmax does not see a common shift.
        expected -= {"phi.bias"}
    assert gradient_names(block, features(2, 6, 5, 4)) == expected


def test_what_learns_first_from_the_zero_start():
    x = features(2, 6, 5, 4)
    with_norm = NonLocalBlock(6, ndim=2).double()
    assert gradient_names(with_norm, x) == {"norm.weight", "norm.bias"}
    assert gradient_names(NonLocalBlock(6, ndim=2, norm=False).double(), x) == {"w_z.weight", "w_z.bias"}
    # One step later the gain is no longer 0, and the convolutions learn too.
    torch.optim.SGD(with_norm.parameters(), lr=0.1).step()
    with_norm.zero_grad()
    assert {"theta.weight", "phi.weight", "g.weight", "w_z.weight"} <= gradient_names(with_norm, x)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_gradient_of_the_block(instantiation):
    block = random_block(2, 2, instantiation=instantiation, subsample="after")
    x = features(1, 2, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(block, x)


def test_the_two_orders_of_pooling():
    x = features(1, 4, 1, 6, 6)
    before, after = random_block(4, 4, subsample="before"), random_block(4, 4, subsample="after")
    assert not torch.allclose(before(x), after(x))
    # They agree when phi and g are copies: a maximum commutes with those.
    for block in (before, after):
        for layer in (block.phi, block.g):
            torch.nn.init.dirac_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    torch.testing.assert_close(before(x), after(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("subsample", ["before", "after"])
def test_pooling_leaves_out_odd_ends_and_keeps_single_places(subsample):
    block = random_block(4, subsample=subsample, instantiation="dot_product")
    x = features(1, 4, 2, 5, 1)
    changed = x.clone()
    changed[:, :, :, 4] += 1  # the fifth row is in no window: nobody else notices
    torch.testing.assert_close(block(x)[:, :, :, :4], block(changed)[:, :, :, :4], rtol=0, atol=0)
    plain = random_block(4, instantiation="dot_product")
    single = features(1, 4, 3, 1, 1)
    torch.testing.assert_close(block(single), plain(single), rtol=0, atol=0)


def test_attention_over_space_is_a_loop_over_frames():
    for subsample in (None, "before", "after"):
        space = random_block(4, attention="space", subsample=subsample)
        everywhere = random_block(4, subsample=subsample)
        x = features(2, 4, 3, 4, 5)
        expected = torch.cat([everywhere(x[:, :, t : t + 1]) for t in range(3)], dim=2)
        torch.testing.assert_close(space(x), expected, rtol=0, atol=1e-13)
        assert not torch.allclose(everywhere(x), expected)


@pytest.mark.parametrize("frames_per_group", [None, 2])
def test_attention_over_time_is_a_loop_over_places(frames_per_group):
    time = random_block(4, attention="time", frames_per_group=frames_per_group)
    everywhere = random_block(4)
    x = features(2, 4, 6, 2, 3)
    expected = torch.empty_like(x)
    step = frames_per_group or 6
    for t in range(0, 6, step):
        for h in range(2):
            for w in range(3):
                here = (slice(None), slice(None), slice(t, t + step), slice(h, h + 1), slice(w, w + 1))
                expected[here] = everywhere(x[here])
    torch.testing.assert_close(time(x), expected, rtol=0, atol=1e-13)


def test_groups_of_frames_are_a_loop_over_groups():
    groups = random_block(4, frames_per_group=2, subsample="before")
    everywhere = random_block(4, subsample="before")
    x = features(2, 4, 6, 4, 5)
    expected = torch.cat([everywhere(x[:, :, t : t + 2]) for t in (0, 2, 4)], dim=2)
    torch.testing.assert_close(groups(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("attention", ["spacetime", "space", "time"])
def test_other_memory_layouts_give_the_same_numbers(attention):
    block = random_block(4, attention=attention)
    x = features(2, 4, 3, 4, 5)
    expected = block(x)
    torch.testing.assert_close(
        block(x.to(memory_format=torch.channels_last_3d)), expected, rtol=0, atol=1e-13
    )
    torch.testing.assert_close(
        block(x.transpose(3, 4).contiguous().transpose(3, 4)), expected, rtol=0, atol=1e-13
    )


# ------------------------------------------------------------------------------------------- its layers


@pytest.mark.parametrize("subsample", [None, "before", "after"])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_every_layer_is_called_once_when_hooked(instantiation, subsample):
    block = random_block(4, ndim=2, instantiation=instantiation, subsample=subsample)
    x = features(2, 4, 5, 4)
    expected = block(x)
    calls = []
    for name in ("theta", "phi", "g", "w_z", "norm"):
        layer = getattr(block, name)
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    assert sorted(calls) == ["g", "norm", "phi", "theta", "w_z"]


@pytest.mark.parametrize("name", ["theta", "phi", "g", "w_z"])
@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "concatenation"])
def test_every_kind_of_hook_fires(instantiation, name):
    for kind in ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"):
        block = random_block(4, ndim=1, instantiation=instantiation)
        calls = []
        handle = getattr(getattr(block, name), f"register_{kind}")(lambda *_: calls.append(1))  # noqa: B023
        x = features(1, 4, 5).requires_grad_()
        block(x).sum().backward()
        assert calls == [1], kind
        handle.remove()
        block(x).sum().backward()
        assert calls == [1], kind


@pytest.mark.parametrize("name", ["theta", "phi", "g", "w_z"])
@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "dot_product", "concatenation"])
def test_what_a_hook_returns_counts(instantiation, name):
    block = random_block(4, ndim=1, instantiation=instantiation)
    x = features(1, 4, 5)
    getattr(block, name).register_forward_hook(lambda _, __, output: 2 * output)
    hooked = block(x)
    getattr(block, name)._forward_hooks.clear()
    for parameter in getattr(block, name).parameters():
        parameter.data *= 2
    torch.testing.assert_close(hooked, block(x), rtol=0, atol=1e-12)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["theta", "phi", "g", "w_z"])
@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "concatenation"])
def test_a_replaced_layer_is_used(instantiation, name):
    """By one of size 3, by several, by a subclass, by another forward; the layers that stay, stay."""
    x = features(2, 4, 5, 4)
    plain = random_block(4, 4, ndim=2, instantiation=instantiation, norm=False)

    def maps(block):
        """theta, phi, g and w_z, each called."""
        theta, phi, g = block.theta(x), block.phi(x), block.g(x)
        rows = [part.flatten(2).mT for part in (theta, phi, g)]
        y = non_local(*rows, instantiation, w_f=block.w_f)
        return x + block.w_z(y.mT.unflatten(2, (5, 4)))

    torch.manual_seed(0)
    doubled = Doubled(4, 4, 1)
    replacements = [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 1, bias=False),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 1, padding="same"),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
        nn.Identity(),
        doubled,
    ]
    for layer in replacements:
        block = copy.deepcopy(plain)
        setattr(block, name, layer.double())
        torch.testing.assert_close(block(x), maps(block), rtol=0, atol=1e-12)
        assert not torch.allclose(block(x), plain(x)), layer
    block = copy.deepcopy(plain)
    layer = getattr(block, name)
    layer.forward = lambda x: 3 * nn.Conv2d.forward(layer, x)
    torch.testing.assert_close(block(x), maps(block), rtol=0, atol=1e-12)
    assert not torch.allclose(block(x), plain(x))


@pytest.mark.parametrize("normalise", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "concatenation"])
def test_normalised_weights(instantiation, normalise):
    block = random_block(4, ndim=2, instantiation=instantiation, norm=False)
    x = features(2, 4, 5, 4)
    plain = block(x)
    for name in ("theta", "g"):
        normalise(getattr(block, name))
    if normalise is nn.utils.parametrizations.weight_norm:
        torch.testing.assert_close(block(x), plain, rtol=0, atol=1e-12)
        block.theta.parametrizations.weight.original0.data *= 2  # the norms of the rows
    block(x).square().sum().backward()
    gradients = {key: value.grad for key, value in block.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values()), gradients
    assert not torch.allclose(block(x), plain)


@pytest.mark.parametrize("subsample", [None, "before"])
@pytest.mark.parametrize("options", [{}, {"attention": "space"}, {"frames_per_group": 2}], ids=str)
def test_the_folded_concatenation_equals_the_unfolded(subsample, options):
    block = random_block(6, 4, instantiation="concatenation", subsample=subsample, **options)
    unfolded = copy.deepcopy(block)
    unfolded.theta.register_forward_hook(lambda *_: None)
    assert block._folds
    assert not unfolded._folds
    x = features(2, 6, 4, 5, 3)
    results = []
    for one in (block, unfolded):
        leaf = x.clone().requires_grad_()
        z = one(leaf)
        (z * features(*x.shape).cos()).sum().backward()
        results.append([z, leaf.grad, *(parameter.grad for parameter in one.parameters())])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_gaussian_with_scale_and_one_tensor_for_both():
    """x is theta and phi: its gradient is the sum of both parts, in every way of computing."""
    block = random_block(4, ndim=1, instantiation="gaussian", scale=True)
    assert block.logit_scale == 0.5
    x = features(2, 4, 7).requires_grad_()
    rows = x.mT
    weights = torch.softmax(rows @ rows.mT / 2, 2)
    expected = x + block.norm(block.w_z((weights @ block.g(x).mT).mT))
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for context in ways("gaussian").values():
        with context:
            z = block(x)
            torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)
            (ours,) = torch.autograd.grad(z.square().sum(), x)
            torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-10)


class Called(TorchDispatchMode):
    """Records the names of the operators of this package that run inside `with`."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "nlutils":
            self.names.append(operation._opname)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "symmetric_softmax_rows"),
        ({"attention": "space"}, "symmetric_softmax_rows"),
        ({"subsample": "before"}, "softmax_rows"),
    ],
)
def test_gaussian_is_known_to_be_symmetric(options, name):
    """Without sub-sampling theta and phi are one tensor, and the backward pass does half the work."""
    block = random_block(4, instantiation="gaussian", **options)
    with way("tiles"), Called() as called:
        block(features(1, 4, 2, 4, 4).requires_grad_()).sum().backward()
    assert called.names == [name, f"{name}_backward"]


# ------------------------------------------------------------------------------------------ odd inputs


@pytest.mark.parametrize("subsample", [None, "before", "after"])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_no_sample_and_one_place(instantiation, subsample):
    block = random_block(4, instantiation=instantiation, subsample=subsample)
    for context in ways(instantiation).values():
        with context:
            x = torch.zeros(0, 4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
            block(x).sum().backward()
            assert x.grad.shape == x.shape
            x = features(1, 4, 1, 1, 1)
            expected = reference.non_local_block(x[0], to_arrays(block), instantiation)
            torch.testing.assert_close(block(x)[0], torch.from_numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("subsample", [None, "before", "after"])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_gradients_do_not_depend_on_the_layout(instantiation, subsample):
    block = random_block(4, instantiation=instantiation, subsample=subsample)
    x = features(2, 4, 3, 4, 5)
    results = []
    for layout in (
        x,
        x.to(memory_format=torch.channels_last_3d),
        x.transpose(3, 4).contiguous().transpose(3, 4),
        x.repeat_interleave(2, 4)[..., ::2],
        torch.cat([x, x], 1)[:, :4],
    ):
        leaf = layout.detach().requires_grad_()
        block.zero_grad()
        z = block(leaf)
        (z * features(*x.shape).cos()).sum().backward()
        results.append([z.detach(), leaf.grad, *(parameter.grad for parameter in block.parameters())])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-11, atol=1e-11)


# --------------------------------------------------------------------------------------- half precision


def difference(ours, exact):
    assert torch.isfinite(ours).all()
    return ((ours.double() - exact).norm() / exact.norm()).item()


def half_precision(block, x, how):
    """Output, the gradient for x and for the weights: computed in half precision, and in float64."""
    direction = features(*x.shape)
    results = []
    for wide in (False, True):
        one = copy.deepcopy(block).double() if wide else block
        leaf = x.detach().double().requires_grad_() if wide else x.detach().requires_grad_()
        with contextlib.nullcontext() if wide or how == "cast" else torch.autocast("cpu", dtype=how):
            z = one(leaf)
        (z.double() * direction).sum().backward()
        results.append([z.detach(), leaf.grad, *(parameter.grad for parameter in one.parameters())])
    return zip(*results, strict=True)


@pytest.mark.parametrize("how", ["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_half_precision_at_large_features(instantiation, dtype, how):
    """Features of rms 10, C = 1024. Gaussian has x_i . x_i = 100,000, where float16 ends at 65,504.

    Without a scale the logits of the embedded form reach 200, and its gradients differ by 200 roundings.
    """
    torch.manual_seed(0)
    options = {"scale": instantiation == "embedded_gaussian", "zero_init": False, "norm": False}
    block = NonLocalBlock(1024, 32, ndim=2, instantiation=instantiation, **options)
    x = 10 * normal(1, 1024, 8, 8, dtype=torch.float32)
    if how == "cast":
        block, x = block.to(dtype), x.to(dtype)
    (z, exact), *gradients = half_precision(block, x, how if how == "cast" else dtype)
    unit = torch.finfo(dtype).eps
    assert z.dtype == x.dtype
    update, exact_update = z.double() - x.double(), exact - x.double()
    assert difference(z, exact) < unit
    if how == "autocast":  # else the sum with x rounds it away
        assert difference(update, exact_update) < 8 * unit
    for (gradient, value), name in zip(gradients, ["x", *dict(block.named_parameters())], strict=True):
        assert torch.isfinite(gradient).all(), name
        # phi's bias does not count in a softmax: its exact gradient is 0.
        if name != "phi.bias" or instantiation == "concatenation":
            assert difference(gradient, value) < 16 * unit, name


def test_print_names_the_options():
    text = repr(NonLocalBlock(8, ndim=2, instantiation="dot_product", subsample="after"))
    assert "8, inner_channels=4, ndim=2, instantiation='dot_product', subsample='after'" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels=0 must be a whole number, 1 or more"),
        ({"inner_channels": 2.5}, "inner_channels=2.5 must be a whole number"),
        ({"inner_channels": 0}, "inner_channels=0 must be a whole number"),
        ({"ndim": 4}, "ndim=4 is not known; use one of 1, 2, 3"),
        ({"instantiation": "concat"}, "instantiation='concat' is not known; use one of 'gaussian'"),
        ({"subsample": True}, "subsample=True is not known; use one of None, 'before', 'after'"),
        ({"scale": 0.5}, "scale=0.5 is not known; use one of True, False"),
        (
            {"scale": True, "instantiation": "dot_product"},
            "scale=True does not apply to instantiation='dot_product'",
        ),
        ({"norm": "batch"}, "norm='batch' is not known"),
        (
            {"attention": "temporal"},
            "attention='temporal' is not known; use one of 'spacetime', 'space', 'time'",
        ),
        ({"attention": "space", "ndim": 2}, "attention='space' needs ndim=3, and ndim=2"),
        ({"attention": "time", "subsample": "after"}, "subsample='after' pools over space"),
        ({"frames_per_group": 0}, "frames_per_group=0 must be a whole number"),
        ({"frames_per_group": 2, "ndim": 2}, "frames_per_group=2 needs ndim=3"),
        (
            {"frames_per_group": 2, "attention": "space"},
            "frames_per_group=2 needs ndim=3 and attention='spacetime' or",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock(**({"in_channels": 8} | options))


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 8, 4, 4), r"x of shape \(2, 8, 4, 4\) must have the axes \(B, C, T, H, W\), because ndim=3"),
        ({"ndim": 2}, (8, 4, 4), r"x of shape \(8, 4, 4\) must have the axes \(B, C, H, W\), because ndim=2"),
        ({}, (2, 4, 4, 4, 8), r"x of shape \(2, 4, 4, 4, 8\) has 4 channels; the block has in_channels=8"),
        ({"frames_per_group": 4}, (2, 8, 6, 4, 4), "has 6 frames; frames_per_group=4 must divide them"),
        ({}, (2, 8, 0, 4, 4), r"x of shape \(2, 8, 0, 4, 4\) has no position"),
    ],
)
def test_bad_maps_are_named(options, shape, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock(8, **options)(torch.zeros(shape))
