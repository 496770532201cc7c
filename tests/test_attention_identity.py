"""The embedded Gaussian is one head of the attention layers that PyTorch and Keras bring along.

Vaswani et al.: Attention Is All You Need, NeurIPS 2017, section 3.2. Float64 throughout. With d = C / 2, the
paper's choice, PyTorch's layer of width C has two heads of width d: the first gets the block's weights, the
second nothing.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import max_pool3d, scaled_dot_product_attention

import nlutils.keras
import nlutils.torch
from nlutils.exchange import from_arrays, to_arrays

C, D = 8, 4  # Keras rounds d ** -0.5 to float32 even in a float64 layer; of 4 it is exact
SIZE = (2, 4, 3)  # T, H, W


def random_block(seed=0, **options):
    """A block in evaluation mode without any zero in it."""
    block = nlutils.torch.NonLocalBlock(C, D, **options).double().eval()
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -1.0
            tensor.copy_(low + 2 * torch.rand(tensor.shape, generator=draw, dtype=torch.float64))
    return block


def clip(seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(2, C, *SIZE)))


def rows(maps):
    return maps.flatten(2).transpose(1, 2)


def maps(rows, like):
    return rows.transpose(1, 2).unflatten(2, like.shape[2:])


def undo_scale(block):
    """What theta is multiplied by: attention layers always divide the logits by the root of the width."""
    return 1.0 if block.scale else D**0.5


def torch_attention(*blocks):
    """nn.MultiheadAttention of width C; head k computes block k, a head without a block nothing."""
    layer = nn.MultiheadAttention(C, C // D, batch_first=True).double().eval()
    for tensor in layer.parameters():
        nn.init.zeros_(tensor)
    for head, block in enumerate(blocks):
        own = slice(head * D, (head + 1) * D)
        for part, conv in enumerate((block.theta, block.phi, block.g)):
            factor = undo_scale(block) if part == 0 else 1.0
            layer.in_proj_weight.data.unflatten(0, (3, C))[part, own] = factor * conv.weight.flatten(1)
            layer.in_proj_bias.data.unflatten(0, (3, C))[part, own] = factor * conv.bias
        layer.out_proj.weight.data[:, own] = block.w_z.weight.flatten(1)
        layer.out_proj.bias.data += block.w_z.bias
    return layer


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("subsample", [None, "before"])
def test_one_head_of_torch(scale, subsample):
    block = random_block(scale=scale, subsample=subsample)
    layer = torch_attention(block)
    x, direction = clip().requires_grad_(), clip(1)
    z = block(x)
    z.backward(direction)
    gradient, x.grad = x.grad, None

    keys = max_pool3d(x, (1, 2, 2)) if subsample else x
    update, weights = layer(rows(x), rows(keys), rows(keys), average_attn_weights=False)
    ours = x + block.norm(maps(update, x))
    ours.backward(direction)
    torch.testing.assert_close(ours, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, gradient, rtol=0, atol=1e-11)
    assert (z - x).abs().max() > 0.5

    theta, phi = rows(block.theta(x)), rows(block.phi(keys))
    factor = D**-0.5 if scale else 1.0
    expected = nlutils.torch.pairwise(theta, phi, "embedded_gaussian", scale=factor)
    torch.testing.assert_close(weights[:, 0], expected, rtol=0, atol=1e-13)


def test_two_heads_are_two_blocks():
    first, second = random_block(0, norm=False, scale=True), random_block(1, norm=False, scale=True)
    x = clip()
    update, _ = torch_attention(first, second)(rows(x), rows(x), rows(x))
    both = (first(x) - x) + (second(x) - x)
    torch.testing.assert_close(maps(update, x), both, rtol=0, atol=1e-12)
    # Sums of y, not a mean or a chain of blocks.
    assert (second(first(x)) - x - both).abs().max() > 0.1


@pytest.mark.parametrize("scale", [False, True])
def test_the_operation_is_scaled_dot_product_attention(scale):
    theta, phi, g = (torch.from_numpy(np.random.default_rng(k).normal(size=(2, 7, D))) for k in range(3))
    factor = D**-0.5 if scale else 1.0
    y = nlutils.torch.non_local(theta, phi, g, "embedded_gaussian", scale=factor)
    expected = scaled_dot_product_attention(theta, phi, g, scale=factor)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    if scale:  # it is the default there
        torch.testing.assert_close(scaled_dot_product_attention(theta, phi, g), y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("subsample", [None, "before"])
def test_one_head_of_keras(scale, subsample):
    block = random_block(scale=scale, subsample=subsample)
    x = clip().movedim(1, -1).numpy()
    ours = nlutils.keras.NonLocalBlock(C, D, scale=scale, subsample=subsample, dtype="float64")
    ours.build(x.shape)
    from_arrays(ours, to_arrays(block))
    keys = max_pool3d(clip(), (1, 2, 2)).movedim(1, -1).numpy() if subsample else x

    # One layer for the whole clip: attention over the axes T, H, W, no flattening.
    layer = keras.layers.MultiHeadAttention(1, key_dim=D, attention_axes=(1, 2, 3), dtype="float64")
    layer.build(x.shape, keys.shape)
    weights = {
        name: array.reshape(array.shape[:2]) for name, array in to_arrays(block).items() if array.ndim > 2
    }
    biases = {name: array for name, array in to_arrays(block).items() if name.endswith(".bias")}
    factor = undo_scale(block)
    layer.set_weights(
        [
            factor * weights["theta.weight"].T.reshape(C, 1, D),
            factor * biases["theta.bias"].reshape(1, D),
            weights["phi.weight"].T.reshape(C, 1, D),
            biases["phi.bias"].reshape(1, D),
            weights["g.weight"].T.reshape(C, 1, D),
            biases["g.bias"].reshape(1, D),
            weights["w_z.weight"].T.reshape(1, D, C),
            biases["w_z.bias"],
        ]
    )
    z = x + ours.norm(layer(x, keys), training=False)
    z = keras.ops.convert_to_numpy(z)
    np.testing.assert_allclose(z, keras.ops.convert_to_numpy(ours(x)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(z, block(clip()).movedim(1, -1).detach().numpy(), rtol=0, atol=1e-12)
