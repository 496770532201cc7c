"""The PyTorch operations against the reference sums, whichever way they are computed, and their errors."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_cases import WAYS, normal, way, ways

from nlutils import reference
from nlutils.instantiations import INSTANTIATIONS, SOFTMAX_FORMS
from nlutils.torch import non_local, pairwise
from nlutils.torch.operations.concatenation import rectified_sum

HALF = (torch.float16, torch.bfloat16)
examples = settings(max_examples=50, deadline=None, derandomize=True)


# ---------------------------------------------------------------------------------------------- problems


@st.composite
def tensors(draw, *, integers=False):
    """A function that makes a tensor of a given shape; what it makes depends on the example alone."""
    kind = draw(st.sampled_from(["integers", "repeated", "normal"][: 1 if integers else 3]))
    magnitude = draw(st.sampled_from([1.0, 1e-3, 20.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def make(*shape):
        if kind == "integers":  # ties, and logits without any rounding
            return magnitude * torch.randint(-3, 4, shape, generator=generator).double()
        rows = torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind == "repeated" and len(rows):
            rows = rows[:, torch.randint(0, shape[1], shape[1:2], generator=generator)]
        return magnitude * rows

    return make


@st.composite
def problems(draw, instantiation):
    """theta, phi, g, w_f, scale for one instantiation. Half of the Gaussian ones have one tensor for both."""
    batch, queries, keys = draw(st.integers(0, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    width, channels = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    make = draw(tensors())
    theta = make(batch, queries, width)
    phi = make(batch, keys, width)
    if instantiation == "gaussian" and draw(st.booleans()):
        phi = theta
    g = draw(tensors())(batch, phi.shape[1], channels)
    w_f = draw(tensors())(1, 2 * width)[0] if instantiation == "concatenation" else None
    scale = draw(st.sampled_from([1.0, width**-0.5, -2.0])) if instantiation in SOFTMAX_FORMS else 1.0
    return theta, phi, g, w_f, scale


def largest_logit(theta, phi, scale):
    """Of absolute values throughout: the roundings of a logit are in proportion to this."""
    products = theta.abs() @ phi.abs().mT
    return abs(scale) * products.max().item() if products.numel() else 0.0


def shifted_softmax(theta, phi, g, scale):
    """Equations 2 and 3 for one sample, after exp(s) / sum exp(s) = exp(s - m) / sum exp(s - m)."""
    theta, phi, g = theta.tolist(), phi.tolist(), g.tolist()
    y = []
    for row in theta:
        logits = [scale * math.fsum(map(math.prod, zip(row, other, strict=True))) for other in phi]
        f = [math.exp(logit - max(logits)) for logit in logits]
        columns = zip(*g, strict=True)
        y.append(
            [math.fsum(map(math.prod, zip(f, column, strict=True))) / math.fsum(f) for column in columns]
        )
    return np.array(y)


def oracle(theta, phi, g, instantiation, w_f, scale):
    """The reference for each sample; where its exponentials overflow, the same sum shifted."""
    overflows = instantiation in SOFTMAX_FORMS and largest_logit(theta, phi, scale) > 300
    y = np.zeros((len(theta), theta.shape[1], g.shape[2]))
    for sample, operands in enumerate(zip(theta, phi, g, strict=True)):
        if overflows:
            y[sample] = shifted_softmax(*operands, scale)
        else:
            y[sample] = reference.non_local(*operands, instantiation, w_f=w_f, scale=scale)
    return torch.from_numpy(y)


def bound(theta, phi, g, instantiation, w_f, scale):
    """How far from the oracle the roundings of float64 may lead."""
    if instantiation in SOFTMAX_FORMS:
        return 1e-14 * (1 + largest_logit(theta, phi, scale)) * (g.abs().max() if g.numel() else 0)
    theta, phi, g = theta.abs(), phi.abs(), g.abs()
    if instantiation == "dot_product":
        return 1e-14 * theta @ phi.mT @ g / phi.shape[1]
    a, b = theta @ w_f.abs().chunk(2)[0], phi @ w_f.abs().chunk(2)[1]
    return 1e-12 * (a[:, :, None] + b[:, None]) @ g / phi.shape[1]


def assert_within(actual, expected, limit, what=""):
    """|actual - expected| <= limit, entry by entry."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all(), what
    excess = ((actual - expected).abs() - limit).max() if actual.numel() else 0
    assert excess <= 0, f"{what}: {excess} above the bound"


# ------------------------------------------------------------------------------------ against the oracle


def test_the_shifted_softmax_is_the_reference():
    theta, phi, g = normal(7, 3), normal(5, 3, seed=1), normal(5, 4, seed=2)
    expected = reference.non_local(theta, phi, g, "embedded_gaussian", scale=2.0)
    np.testing.assert_allclose(shifted_softmax(theta, phi, g, 2.0), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_equals_the_reference_whichever_way(instantiation):
    @examples
    @given(problems(instantiation))
    def check(problem):
        theta, phi, g, w_f, scale = problem
        expected = oracle(theta, phi, g, instantiation, w_f, scale)
        limit = bound(theta, phi, g, instantiation, w_f, scale)
        for name, context in ways(instantiation).items():
            with context:
                y = non_local(theta, phi, g, instantiation, w_f=w_f, scale=scale)
            assert_within(y, expected, limit, name)

    check()


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_equals_the_reference_at_a_size_of_many_tiles(instantiation):
    theta, phi, g = normal(1, 13, 3), normal(1, 17, 3, seed=1), normal(1, 17, 5, seed=2)
    w_f = normal(6) if instantiation == "concatenation" else None
    expected = oracle(theta, phi, g, instantiation, w_f, 1.0)
    limit = bound(theta, phi, g, instantiation, w_f, 1.0)
    for name, context in ways(instantiation).items():
        with context:
            assert_within(non_local(theta, phi, g, instantiation, w_f=w_f), expected, limit, name)


@st.composite
def rectified(draw):
    """a, b, g with many b_j exactly -a_i, equal b_j, and an offset that a and b share."""
    batch, queries, keys = draw(st.integers(0, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    make = draw(tensors())
    a, b = make(batch, queries), make(batch, keys)
    opposite = draw(st.lists(st.integers(0, 7), max_size=4))
    for place in opposite:
        b[:, place % keys] = -a[:, place % queries]
    offset = draw(st.sampled_from([0.0, 1.0, 1e4]))
    g = draw(tensors())(batch, keys, draw(st.integers(1, 4)))
    return a + offset, b - offset, g, make(batch, queries, g.shape[2])


@examples
@given(rectified())
def test_sorting_computes_the_rectified_sum_and_its_gradients(problem):
    a, b, g, grad_y = problem
    a, b, g = (operand.requires_grad_() for operand in (a, b, g))
    keys = b.shape[1]
    expected = torch.relu(a[:, :, None] + b[:, None]) @ g / keys
    gradients = torch.autograd.grad(expected, (a, b, g), grad_y)
    size_a, size_b, size_g, size_y = (operand.detach().abs() for operand in (a, b, g, grad_y))
    # What is summed, in absolute values: y, dL/da, dL/db, dL/dg.
    pairs = size_a[:, :, None] + size_b[:, None]
    meetings = size_y @ size_g.mT
    sums = [pairs @ size_g, meetings.sum(2), meetings.sum(1), pairs.mT @ size_y]
    for name, context in ways("concatenation").items():
        with context:
            y = rectified_sum(a, b, g)
            ours = torch.autograd.grad(y, (a, b, g), grad_y)
        for result, value, size in zip((y, *ours), (expected, *gradients), sums, strict=True):
            assert_within(result, value, 1e-12 * size / keys, name)
    for sample in range(len(a)):  # equation 5 with theta_i = a_i, phi_j = b_j, w_f = (1, 1)
        rows = [operand[sample].detach() for operand in (a[..., None], b[..., None], g)]
        literal = torch.from_numpy(reference.non_local(*rows, "concatenation", w_f=[1.0, 1.0]))
        assert_within(y[sample].detach(), literal, 1e-12 * sums[0][sample] / keys)


def test_a_pair_that_sums_to_zero_has_no_gradient():
    a, b = torch.tensor([[3.0, -1.0]]), torch.tensor([[-3.0, 1.0, 2.0]])
    a, b, g = (operand.double().requires_grad_() for operand in (a, b, torch.ones(1, 3, 1)))
    y = rectified_sum(a, b, g)
    y.sum().backward()
    torch.testing.assert_close(3 * y[0, :, 0].detach(), torch.tensor([9.0, 1.0]).double(), rtol=0, atol=1e-15)
    assert (3 * a.grad).round(decimals=12).tolist() == [[2, 1]]
    assert (3 * b.grad).round(decimals=12).tolist() == [[0, 1, 2]]


# ------------------------------------------------------------------------------------------- gradients


def materialised(theta, phi, g, instantiation, w_f, scale):
    return pairwise(theta, phi, instantiation, w_f=w_f, scale=scale) @ g


def gradient_bounds(theta, phi, g, grad_y, instantiation, w_f, scale):
    """How far from each other two ways to the gradients for theta, phi, g (and w_f) may come by rounding."""
    queries, keys, channels = theta.shape[1], phi.shape[1], g.shape[2]
    size = [operand.abs().max().item() if operand.numel() else 0.0 for operand in (theta, phi, g, grad_y)]
    size_theta, size_phi, size_g, size_y = size
    if instantiation in SOFTMAX_FORMS:
        # dL/ds_ij = p_ij (dL/dp_ij - mean): |dL/dp_ij| <= c |g| |dL/dy|, and the p_ij of a row sum to 1.
        of_logits = 2 * channels * size_g * size_y * abs(scale)
        rounding = 2e-14 * (1 + largest_logit(theta, phi, scale))
        limits = [of_logits * size_phi, queries * of_logits * size_theta, queries * size_y]
        if phi is theta:
            limits = [limits[0] + limits[1], limits[2]]
        return [rounding * limit for limit in limits]
    of_pairs = channels * size_g * size_y
    if instantiation == "dot_product":
        width = theta.shape[2]
        limits = [of_pairs * size_phi, of_pairs * size_theta, width * size_theta * size_phi * size_y]
        return [1e-14 * (queries + keys) * limit for limit in limits]
    size_w = w_f.abs().max().item()
    scores = theta.shape[2] * size_w * (size_theta + size_phi)
    limits = [of_pairs * size_w] * 2 + [scores * size_y, queries * of_pairs * (size_theta + size_phi)]
    return [1e-12 * queries * limit for limit in limits]


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_gradients_equal_those_of_the_materialised_map(instantiation):
    @examples
    @given(problems(instantiation), tensors())
    def check(problem, make):
        theta, phi, g, w_f, scale = problem
        grad_y = make(*theta.shape[:2], g.shape[2])
        limits = gradient_bounds(theta, phi, g, grad_y, instantiation, w_f, scale)
        leaves = [theta] if phi is theta else [theta, phi]
        leaves = [leaf.requires_grad_() for leaf in (*leaves, g, w_f) if leaf is not None]
        expected = torch.autograd.grad(materialised(theta, phi, g, instantiation, w_f, scale), leaves, grad_y)
        for name, context in ways(instantiation).items():
            with context:
                y = non_local(theta, phi, g, instantiation, w_f=w_f, scale=scale)
                gradients = torch.autograd.grad(y, leaves, grad_y)
            for gradient, value, limit in zip(gradients, expected, limits, strict=True):
                assert_within(gradient, value, limit, name)

    check()


def operands(instantiation, channels=3, **options):
    """theta, phi, g and, for concatenation, w_f: B = 3, N = 5, M = 3, d = 3."""
    theta, phi, g = normal(3, 5, 3), normal(3, 3, 3, seed=1), normal(3, 3, channels, seed=2)
    named = {"theta": theta, "phi": phi, "g": g}
    if instantiation == "concatenation":
        named["w_f"] = normal(6, seed=3)
    return named


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_gradcheck(instantiation):
    named = {name: operand[-2:] for name, operand in operands(instantiation).items() if name != "w_f"}
    named |= {"w_f": normal(6, seed=3)} if instantiation == "concatenation" else {}
    inputs = [operand.requires_grad_() for operand in named.values()]

    def output(*inputs):
        return non_local(**dict(zip(named, inputs, strict=True)), instantiation=instantiation)

    for context in ways(instantiation).values():
        with context:
            assert torch.autograd.gradcheck(output, inputs)


def test_gradcheck_of_one_tensor_for_theta_and_phi():
    x, g = normal(2, 5, 2).requires_grad_(), normal(2, 5, 3).requires_grad_()
    for name in WAYS:
        with way(name):
            assert torch.autograd.gradcheck(lambda x, g: non_local(x, x, g, "gaussian", scale=0.7), (x, g))


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_any_subset_of_the_operands_may_need_a_gradient(instantiation):
    named = operands(instantiation)
    for context in ways(instantiation).values():
        with context:
            leaves = {name: operand.clone().requires_grad_() for name, operand in named.items()}
            non_local(**leaves, instantiation=instantiation).sin().sum().backward()
            every = {name: leaf.grad for name, leaf in leaves.items()}
            sizes = range(1, len(named))
            for chosen in itertools.chain.from_iterable(itertools.combinations(named, k) for k in sizes):
                leaves = {name: operand.clone() for name, operand in named.items()}
                for name in chosen:
                    leaves[name].requires_grad_()
                non_local(**leaves, instantiation=instantiation).sin().sum().backward()
                for name, leaf in leaves.items():
                    if name in chosen:
                        torch.testing.assert_close(leaf.grad, every[name], rtol=0, atol=1e-14)
                    else:
                        assert leaf.grad is None


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_a_gradient_that_is_spread_out_in_memory(instantiation):
    """What .sum() and a following transposition hand back: no strides, or those of another order."""
    for context in ways(instantiation).values():
        with context:
            results = []
            for read in (lambda y: y.sum(), lambda y: (y * torch.ones_like(y)).sum(), lambda y: y.mT.sum()):
                leaves = {name: leaf.requires_grad_() for name, leaf in operands(instantiation).items()}
                read(non_local(**leaves, instantiation=instantiation)).backward()
                results.append([leaf.grad for leaf in leaves.values()])
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("instantiation", [*SOFTMAX_FORMS, "dot_product"])
def test_second_derivatives_of_small_maps(instantiation):
    inputs = [normal(1, 3, 2).requires_grad_(), normal(1, 2, 2, seed=1).requires_grad_()]
    inputs += [normal(1, 2, 2, seed=2).requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda *inputs: non_local(*inputs, instantiation), inputs)


@pytest.mark.parametrize(
    ("instantiation", "name"),
    [
        ("gaussian", "fused where it applies"),
        ("gaussian", "tiles"),
        ("embedded_gaussian", "tiles"),
        ("concatenation", "map"),
    ],
)
def test_second_derivatives_elsewhere_are_an_error(instantiation, name):
    leaves = {name: leaf.requires_grad_() for name, leaf in operands(instantiation).items()}
    if instantiation == "gaussian":
        leaves["theta"] = leaves["phi"]
    with way(name):
        y = non_local(**leaves, instantiation=instantiation)
        (first,) = torch.autograd.grad(y.square().sum(), leaves["phi"], create_graph=True)
    message = "not implemented" if "fused" in name else "is a gradient, and has none itself. What can be"
    with pytest.raises(RuntimeError, match=message):
        first.square().sum().backward()


def test_function_transforms():
    theta, phi, g = operands("dot_product").values()
    for instantiation in ("embedded_gaussian", "dot_product"):
        leaf = theta.clone().requires_grad_()
        non_local(leaf, phi, g, instantiation).square().sum().backward()
        gradient = torch.func.grad(lambda x: non_local(x, phi, g, instantiation).square().sum())(theta)  # noqa: B023
        torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------- layouts and sizes


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_any_layout_in_memory(instantiation):
    named = operands(instantiation)
    for context in ways(instantiation).values():
        with context:
            results = []
            for change in (
                lambda rows: rows,
                lambda rows: rows.mT.contiguous().mT,  # channels first, as behind a convolution
                lambda rows: rows.transpose(0, 1).contiguous().transpose(0, 1),
                lambda rows: rows.repeat_interleave(2, 2)[:, :, ::2],
                lambda rows: torch.cat([rows, rows], 1)[:, : rows.shape[1]],
            ):
                leaves = {
                    name: (change(rows) if rows.ndim == 3 else rows).detach().requires_grad_()
                    for name, rows in named.items()
                }
                y = non_local(**leaves, instantiation=instantiation)
                y.square().sum().backward()
                results.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_no_sample_and_no_query(instantiation):
    w_f = normal(6).requires_grad_() if instantiation == "concatenation" else None
    for batch, queries in ((0, 4), (2, 0), (0, 0)):
        for context in ways(instantiation).values():
            theta, phi = torch.zeros(batch, queries, 3), torch.zeros(batch, 5, 3)
            leaves = [leaf.double().requires_grad_() for leaf in (theta, phi, torch.ones(batch, 5, 2))]
            with context:
                y = non_local(*leaves, instantiation, w_f=w_f)
                y.sum().backward()
            assert y.shape == (batch, queries, 2)
            assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_order_of_positions_and_of_samples(instantiation):
    named = operands(instantiation)
    w_f = named.pop("w_f", None)
    y = non_local(**named, instantiation=instantiation, w_f=w_f)
    queries, keys, batch = torch.tensor([3, 0, 1, 4, 2]), torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    shuffled = {name: rows[batch][:, queries if name == "theta" else keys] for name, rows in named.items()}
    for context in ways(instantiation).values():
        with context:
            result = non_local(**shuffled, instantiation=instantiation, w_f=w_f)
        torch.testing.assert_close(result, y[batch][:, queries], rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------ the map itself


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_the_map_times_g_is_the_output(instantiation):
    named = operands(instantiation)
    g, w_f = named.pop("g"), named.pop("w_f", None)
    weights = pairwise(**named, instantiation=instantiation, w_f=w_f)
    assert weights.shape == (3, 5, 3)
    y = non_local(**named, g=g, instantiation=instantiation, w_f=w_f)
    torch.testing.assert_close(weights @ g, y, rtol=0, atol=1e-13)
    if instantiation in SOFTMAX_FORMS:
        torch.testing.assert_close(weights.sum(2), torch.ones(3, 5, dtype=torch.float64), rtol=0, atol=1e-14)
    leaves = [leaf.requires_grad_() for leaf in (*named.values(), *([] if w_f is None else [w_f]))]
    assert torch.autograd.gradcheck(
        lambda theta, phi, w_f=None: pairwise(theta, phi, instantiation, w_f=w_f), leaves
    )


def test_first_half_of_w_f_is_for_theta():
    theta, phi, _, w_f = operands("concatenation").values()
    only_theta = torch.cat([w_f[:3], torch.zeros(3, dtype=torch.float64)])
    expected = torch.relu(theta @ w_f[:3]) / 3
    weights = pairwise(theta, phi, "concatenation", w_f=only_theta)
    torch.testing.assert_close(weights, expected[:, :, None].expand(3, 5, 3), rtol=0, atol=1e-15)


# --------------------------------------------------------------------------------- float32, half, autocast


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_float32_stays_float32_and_close(instantiation):
    theta, phi, g = normal(2, 40, 8), normal(2, 30, 8, seed=1), normal(2, 30, 5, seed=2)
    w_f = normal(16) if instantiation == "concatenation" else None
    exact = non_local(theta, phi, g, instantiation, w_f=w_f)
    single = [None if operand is None else operand.float() for operand in (theta, phi, g, w_f)]
    for context in ways(instantiation).values():
        with context:
            y = non_local(*single[:3], instantiation, w_f=single[3])
        assert y.dtype == torch.float32
        # 2^-24 a rounding; the softmax magnifies those of the logits, which reach 20 here.
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)


def relative(ours, exact):
    assert torch.isfinite(ours).all()
    return ((ours.double() - exact).norm() / exact.norm()).item()


def uncentred(a, b, g):
    """The concatenation form by sorting, with b as it is."""
    b, order = torch.sort(b, dim=1, descending=True)
    g = g.gather(1, order[:, :, None].expand_as(g))
    active = torch.searchsorted(-b, a)[:, :, None].expand(-1, -1, g.shape[2])
    sums, weighted = (torch.cumsum(part, 1) for part in (g, b[:, :, None] * g))
    sums, weighted = (torch.cat([torch.zeros_like(part[:, :1]), part], 1) for part in (sums, weighted))
    return (a[:, :, None] * sums.gather(1, active) + weighted.gather(1, active)) / b.shape[1]


def test_concatenation_keeps_its_digits_under_a_common_offset():
    a, b, g = normal(1, 300), normal(1, 300, seed=1), normal(1, 300, 4, seed=2)
    a, b, g = (a + 1e4).float(), (b - 1e4).float(), g.float()
    grad_y = normal(1, 300, 4, seed=3).float()

    def error(function):
        leaves = [leaf.clone().requires_grad_() for leaf in (a, b, g)]
        y = function(*leaves)
        results = [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]
        wide = [leaf.double().requires_grad_() for leaf in (a, b, g)]
        y = torch.relu(wide[0][:, :, None] + wide[1][:, None]) @ wide[2] / 300
        expected = [y.detach(), *torch.autograd.grad(y, wide, grad_y.double())]
        return [
            ((ours - exact).norm() / exact.norm()).item()
            for ours, exact in zip(results, expected, strict=True)
        ]

    assert max(error(rectified_sum)) < 1e-5
    assert error(uncentred)[0] > 1e-4


def test_softmax_of_large_logits():
    theta = torch.tensor([[[1e4]], [[-1e4]]])
    phi, g = torch.tensor([[[1.0], [2.0]]] * 2), torch.tensor([[[5.0], [7.0]]] * 2)
    for name in WAYS:
        with way(name):
            torch.testing.assert_close(non_local(theta, phi, g), torch.tensor([[[7.0]], [[5.0]]]))


def test_a_larger_logit_in_a_later_tile():
    """The running maximum rises, and falls far behind: exp(-2000) is 0, and nothing overflows."""
    theta = torch.ones(1, 1, 1, dtype=torch.float64)
    phi = torch.tensor([-1000.0, -999, -998, 0, 1, 2, 1000, 1001, 1002, 3]).double()[None, :, None]
    g = torch.arange(10.0).double()[None, :, None]
    weights = torch.softmax(phi[0, :, 0], 0)
    for order in (torch.arange(10), torch.arange(9, -1, -1), torch.tensor([6, 0, 7, 1, 2, 8, 3, 4, 5, 9])):
        with way("tiles"):
            y = non_local(theta, phi[:, order], g[:, order])
        assert y.item() == pytest.approx((weights @ g[0]).item(), rel=1e-14)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("one_tensor", [False, True])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_half_precision_of_large_features(instantiation, one_tensor, dtype):
    """Features of rms 10, C = 1024: x_i . x_i is 100,000, and float16 ends at 65,504."""
    theta, phi = 10 * normal(1, 128, 1024), 10 * normal(1, 128, 1024, seed=1)
    w_f = normal(2048, seed=3, dtype=dtype) if instantiation == "concatenation" else None
    unit = torch.finfo(dtype).eps
    gentle = 3e-5 if one_tensor else 1e-3  # logits of 0 to 3: many positions count
    for channels, scale in itertools.product((1024, 64), (1.0, gentle)):
        if scale != 1 and instantiation not in SOFTMAX_FORMS:
            continue
        g = 10 * normal(1, 128, channels, seed=4).to(dtype)
        grad_y = normal(1, 128, channels, seed=5).to(dtype)
        leaves = [theta.to(dtype)] if one_tensor else [theta.to(dtype), phi.to(dtype)]
        leaves = [leaf.requires_grad_() for leaf in (*leaves, g)]
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        results = []
        for first, *rest in (leaves, wide):
            other = first if one_tensor else rest[0]
            w = None if w_f is None else w_f.to(first.dtype)
            y = non_local(first, other, rest[-1], instantiation, w_f=w, scale=scale)
            gradients = torch.autograd.grad(y, (first, *rest), grad_y.to(first.dtype))
            results.append((y.detach(), *gradients))
        (y, *gradients), (exact, *exact_gradients) = results
        assert y.dtype == dtype
        assert relative(y, exact) < 2 * unit
        assert relative(gradients[-1], exact_gradients[-1]) < 8 * unit
        for gradient, value in zip(gradients[:-1], exact_gradients[:-1], strict=True):
            assert torch.isfinite(gradient).all()
            # With scale = 1 a row looks at one position only, and the exact gradient is next to nothing.
            if scale != 1 or instantiation not in SOFTMAX_FORMS:
                assert relative(gradient, value) < 8 * unit


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_autocast_leaves_the_operations_their_digits(instantiation, dtype):
    x = 10 * normal(1, 20, 1024, dtype=torch.float32)
    w_f = normal(2048, seed=3, dtype=torch.float32) if instantiation == "concatenation" else None
    for context in ways(instantiation).values():
        with context:
            leaf = x.clone().requires_grad_()
            expected = non_local(leaf, leaf, leaf, instantiation, w_f=w_f)
            (gradient,) = torch.autograd.grad(expected.sum(), leaf)
            with torch.autocast("cpu", dtype=dtype):
                y = non_local(leaf, leaf, leaf, instantiation, w_f=w_f)
                weights = pairwise(leaf, leaf, instantiation, w_f=w_f)
            assert y.dtype == torch.float32
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
            torch.testing.assert_close(torch.autograd.grad(y.sum(), leaf)[0], gradient, rtol=0, atol=0)
            if instantiation != "dot_product":
                assert torch.isfinite(weights).all()


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_operands_of_several_precisions(instantiation):
    """Under autocast a layer of one's own may return float32, and the others half precision."""
    theta, phi, g = (
        normal(1, 5, 4).half(),
        normal(1, 3, 4, seed=1).float(),
        normal(1, 3, 4, seed=2).bfloat16(),
    )
    w_f = normal(8).float() if instantiation == "concatenation" else None
    y = non_local(theta, phi, g, instantiation, w_f=w_f)
    exact = non_local(
        *(operand.double() for operand in (theta, phi, g)),
        instantiation,
        w_f=None if w_f is None else w_f.double(),
    )
    assert y.dtype == g.dtype
    assert relative(y, exact) < 2**-8


def test_dot_product_divides_before_it_rounds():
    # theta_i . phi_j = 64 * 64 * 128 = 524288 is beyond float16's 65504; the quotient by M = 256 is not.
    features = torch.full((1, 256, 128), 64.0, dtype=torch.float16)
    y = non_local(features, features, torch.full((1, 256, 1), 2**-8, dtype=torch.float16), "dot_product")
    torch.testing.assert_close(y, torch.full_like(y, 2048.0))


# -------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"instantiation": "embedded"},
            "instantiation='embedded' is not known; use one of 'gaussian', 'embedded_gaussian'",
        ),
        ({"instantiation": "concatenation"}, "w_f=None, but instantiation='concatenation' needs it"),
        (
            {"instantiation": "gaussian", "w_f": torch.ones(6)},
            "w_f was given, but instantiation='gaussian' has none",
        ),
        ({"scale": "d"}, "scale='d' must be a finite number"),
        ({"scale": math.inf}, "scale=inf must be a finite number"),
        (
            {"instantiation": "dot_product", "scale": 0.5},
            "scale=0.5 does not apply to instantiation='dot_product'",
        ),
        (
            {"theta": torch.ones(2, 4, 5)},
            r"theta of shape \(2, 4, 5\) and phi of shape \(2, 6, 3\) do not fit: the width d",
        ),
        (
            {"theta": torch.ones(1, 4, 3)},
            r"theta of shape \(1, 4, 3\).* do not fit: the batch size B .* 1 and 2",
        ),
        ({"theta": torch.ones(4, 3)}, r"theta of shape \(4, 3\) must have the axes \(B, N, d\)"),
        (
            {"g": torch.ones(2, 5, 2)},
            r"g of shape \(2, 5, 2\) do not fit: the number of positions M .* 6 and 5",
        ),
        ({"g": torch.ones(3, 6, 2)}, r"g of shape \(3, 6, 2\) do not fit: the batch size B"),
        (
            {"phi": torch.ones(2, 0, 3), "g": torch.ones(2, 0, 2)},
            r"phi of shape \(2, 0, 3\) has no position to attend to",
        ),
        (
            {"instantiation": "concatenation", "w_f": torch.ones(1, 6)},
            r"w_f of shape \(1, 6\) .* must be \(6,\)",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"theta": torch.ones(2, 4, 3), "phi": torch.ones(2, 6, 3), "g": torch.ones(2, 6, 2)}
    with pytest.raises(ValueError, match=message):
        non_local(**(arguments | change))


def test_pairwise_names_bad_input_too():
    with pytest.raises(ValueError, match="instantiation='cosine' is not known"):
        pairwise(torch.ones(1, 2, 3), torch.ones(1, 2, 3), "cosine")
    with pytest.raises(ValueError, match=r"phi of shape \(1, 2, 4\) do not fit: the width d"):
        pairwise(torch.ones(1, 2, 3), torch.ones(1, 2, 4), "dot_product")
