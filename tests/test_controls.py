"""Control blocks: what each of them computes, and that they have the weights that they should."""

import itertools

import pytest
import torch

from nlutils.torch import CompactGeneralizedNonLocalBlock, NonLocalBlock, create_model
from nlutils.torch.controls import ConstantBlock, ConvolutionBlock, UniformBlock, WindowBlock

torch.set_num_threads(1)
OPEN = {"zero_init": False}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(block, *arguments, **options):
    torch.manual_seed(0)
    block = block(*arguments, **options).double()
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return block.eval()


def count(module):
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("block", [UniformBlock, WindowBlock, ConvolutionBlock, ConstantBlock])
def test_a_fresh_control_is_the_identity(block):
    x = noise(2, 16, 3, 4, 5).float()
    assert torch.equal(block(16)(x), x)


@pytest.mark.parametrize("options", [{}, {"subsample": "before"}, {"ndim": 2}, {"instantiation": "gaussian"}])
def test_the_uniform_block_is_a_block_whose_map_says_nothing(options):
    uniform = made(UniformBlock, 6, **OPEN, **options)
    x = noise(2, 6, *(3, 4, 6)[: options.get("ndim", 3)])
    _, _, g = uniform.embed(x)
    mean = g.flatten(2).mean(dim=2)
    y = mean.reshape(*mean.shape, *[1] * uniform.ndim).expand(-1, -1, *x.shape[2:])
    torch.testing.assert_close(uniform(x), x + uniform.norm(uniform.w_z(y)))
    if "instantiation" not in options:
        block = NonLocalBlock(6, **OPEN, **options).double().eval()
        block.load_state_dict(uniform.state_dict())
        assert (block(x) - uniform(x)).abs().max() > 1e-3
        for layer in (block.theta, block.phi):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        torch.testing.assert_close(block(x), uniform(x))
    assert count(uniform) == count(NonLocalBlock(6, **options))
    trained = {name for name, weight in uniform.named_parameters() if weight.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"g", "w_z", "norm"}


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_constant_block_is_a_block_whose_every_number_is_one(ndim):
    constant = made(ConstantBlock, 8, ndim=ndim, groups=2)
    x = noise(2, 8, *(3, 4, 5)[:ndim])
    update = constant.w_z(constant.theta(x))
    torch.testing.assert_close(constant(x), x + constant.norm(update))
    block = CompactGeneralizedNonLocalBlock(8, ndim=ndim, groups=2).double()
    block.load_state_dict(constant.state_dict())
    # As large as the norm makes it, the block's number says no more than plus or minus (notebook 10).
    phi, g = (layer(x).unflatten(1, (2, -1)).flatten(2) for layer in (block.phi, block.g))
    sign = (phi * g).sum(dim=2).sign().repeat_interleave(4, dim=1).reshape(2, 8, *[1] * ndim)
    gain, bias = (weight.reshape(1, 8, *[1] * ndim) for weight in (block.norm.weight, block.norm.bias))
    normalised = (constant.norm(update) - bias) / gain
    torch.testing.assert_close(block(x), x + sign * normalised * gain + bias, rtol=1e-3, atol=1e-3)
    assert (sign < 0).any()
    assert (sign > 0).any()
    trained = {name for name, weight in constant.named_parameters() if weight.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"theta", "w_z", "norm"}


@pytest.mark.parametrize("scale", [False, True])
def test_a_window_over_the_whole_map_is_the_block(scale):
    window = made(WindowBlock, 6, window=(5, 7, 9), scale=scale, **OPEN)
    block = NonLocalBlock(6, scale=scale, **OPEN).double().eval()
    block.load_state_dict(window.state_dict())
    x = noise(2, 6, 3, 4, 5)
    torch.testing.assert_close(window(x), block(x))


def test_a_window_by_hand():
    block = made(WindowBlock, 4, 3, ndim=2, window=(3, 1), **OPEN)
    x = noise(1, 4, 3, 2)
    theta, phi, g = block.embed(x)
    y = torch.zeros_like(g)
    for row, column in itertools.product(range(3), range(2)):
        near = [j for j in (row - 1, row, row + 1) if 0 <= j < 3]
        logits = torch.stack([theta[0, :, row, column] @ phi[0, :, j, column] for j in near])
        weights = logits.exp() / logits.exp().sum()
        y[0, :, row, column] = sum(w * g[0, :, j, column] for w, j in zip(weights, near, strict=True))
    torch.testing.assert_close(block(x), x + block.norm(block.w_z(y)))


@pytest.mark.parametrize(("block", "reach"), [(WindowBlock, 1), (ConvolutionBlock, 1), (UniformBlock, 6)])
def test_how_far_a_control_sees(block, reach):
    x = noise(1, 64, 7, 7, 7).requires_grad_()  # narrower, the ReLUs of the convolutions let little through
    y = made(block, 64)(x)
    (gradient,) = torch.autograd.grad(y[0, :, 0, 0, 0].sum(), x)
    seen = gradient[0].abs().sum(dim=0) > 0
    assert seen[: reach + 1, : reach + 1, : reach + 1].all()
    assert int(seen.sum()) == (reach + 1) ** 3


@pytest.mark.parametrize(("channels", "inner"), [(32, None), (64, None), (64, 16), (512, None)])
def test_the_convolutions_spend_what_the_block_has(channels, inner):
    spent, budget = count(ConvolutionBlock(channels, inner)), count(NonLocalBlock(channels, inner))
    width = ConvolutionBlock(channels, inner).layers[0].out_channels
    one_more = spent + 27 * (2 * width + 1) + 2 * channels + 2
    assert spent <= budget < one_more


def test_a_still_pictures_convolution_spends_its_weights_in_space():
    flat = ConvolutionBlock(64, kernel=(1, 3, 3))
    assert flat.layers[2].kernel_size == (1, 3, 3)
    assert 0.9 * count(NonLocalBlock(64)) < count(flat) <= count(NonLocalBlock(64))
    assert flat.layers[0].out_channels > 1.5 * ConvolutionBlock(64).layers[0].out_channels
    torch.nn.init.ones_(flat.norm.weight)
    picture = noise(2, 64, 1, 5, 6).float()
    flat(picture).square().mean().backward()
    assert (flat.layers[2].weight.grad.abs().amax(dim=(0, 1)) > 0).all()  # each tap, in some channel


@pytest.mark.parametrize("block", [UniformBlock, WindowBlock, ConvolutionBlock])
def test_all_weights_are_trained_but_those_of_a_map_that_says_nothing(block):
    network = made(block, 64).train()
    target = noise(4, 64, 3, 4, 4, seed=1)
    (network(noise(4, 64, 3, 4, 4)) - target).square().mean().backward()
    still = {name for name, w in network.named_parameters() if w.grad is None or w.grad.abs().max() < 1e-12}
    # What adds the same to all positions of all clips, the batch normalisation takes off again; and phi's
    # bias adds the same to all logits of a position.
    silent = {"layers.4.bias"} if block is ConvolutionBlock else {"w_z.bias", "g.bias", "phi.bias"}
    unused = {"theta.weight", "theta.bias", "phi.weight"} if block is UniformBlock else set()
    assert still == silent | unused


@pytest.mark.parametrize("kind", ["uniform", "window", "convolution", "constant"])
def test_controls_stand_in_the_studys_network_where_the_blocks_do(kind):
    x = noise(2, 3, 8, 24, 24).float()
    counts = {}
    for name in ("compact_generalized" if kind == "constant" else "non_local", kind):
        model = create_model("c3d_small", 4, non_local=(2, 3), kind=name)
        assert model(x).shape == (2, 4)
        counts[name] = count(model)
    *_, whole = (n for name, n in counts.items() if name != kind)
    assert 0.98 * whole < counts[kind] <= whole
    with pytest.raises(ValueError, match="kind='local' is not known"):
        create_model("c3d_small", 4, kind="local")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformBlock(8, attention="time"), "attention='time'.*UniformBlock has 'spacetime'"),
        (lambda: WindowBlock(8, frames_per_group=4), "frames_per_group=4.*WindowBlock"),
        (lambda: WindowBlock(8, window=(3, 3)), r"window=\(3, 3\) must be 3 odd numbers"),
        (lambda: WindowBlock(8, window=(3, 2, 3)), r"window=\(3, 2, 3\) must be 3 odd numbers"),
        (lambda: WindowBlock(8, subsample="before"), "subsample='before': a window has"),
        (lambda: WindowBlock(8, instantiation="dot_product"), "instantiation='dot_product'"),
        (lambda: ConstantBlock(16, kernel="rbf"), "kernel='rbf': a ConstantBlock has 'dot'"),
        (lambda: ConvolutionBlock(64, kernel=(3, 3)), r"kernel=\(3, 3\) must be 3 odd numbers"),
        (lambda: ConvolutionBlock(1), "in_channels=1 gives a block of 10 weights: too few"),
    ],
)
def test_what_controls_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
