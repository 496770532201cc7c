"""The networks that notebook 17 builds compute what the library's `C2D` and `I3D` compute."""

import pytest
import torch
from torch import nn

from nlutils.course.sources import lift
from nlutils.exchange.checkpoints import published_name
from nlutils.study import multiply_adds, parameters
from nlutils.torch import NonLocalBlock
from nlutils.torch.inflation import inflate_weights
from nlutils.torch.models.resnet import C2D, I3D

torch.set_num_threads(1)
COUNT = "num_batches_tracked"


def taught(name):
    return lift("non_local_networks", name)


def randomise(model, seed=0):
    """Random gains, biases and statistics, so that every layer counts."""
    draw = torch.Generator().manual_seed(seed)
    for name, values in model.state_dict().items():
        if ".norm." in name and values.is_floating_point():
            low = -0.3 if name.endswith(("bias", "mean")) else 0.5
            values.copy_(low + torch.rand(values.shape, generator=draw))


def pair(blocks=(1, 2, 3, 2), inflate=None, non_local=False):
    """The library's network, and the taught one with the same weights; a block behind res3.1 if asked."""
    kind = I3D if inflate else C2D
    where = {"res3": [1]} if non_local else 0
    torch.manual_seed(0)
    library = kind(5, depth=blocks, width=4, dropout=0.0, inflate=inflate, non_local=where).double()
    built = taught("SmallC2D")(5, blocks, 4, inflate)
    if non_local:
        built.stages[1][1].non_local = NonLocalBlock(32, subsample="before")
    randomise(library)
    built.double().load_state_dict(library.state_dict())  # strict: the same names and shapes
    return library, built


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("inflate", "non_local"),
    [(None, False), (None, True), ("3x1x1", False), ("3x1x1", True), ("3x3x3", False)],
)
def test_same_output_and_gradients(inflate, non_local, training):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 12, 40, 33, generator=draw, dtype=torch.float64)
    direction = torch.randn(2, 5, generator=draw, dtype=torch.float64)
    results = []
    for model in pair(inflate=inflate, non_local=non_local):
        given = x.clone().requires_grad_()
        scores = model.train(training)(given)
        scores.backward(direction)
        found = {"scores": scores, "x": given.grad}
        found |= {name: weight.grad for name, weight in model.named_parameters()}
        results.append(found | {n: b for n, b in model.named_buffers() if b.is_floating_point()})
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    assert ours["x"].abs().max() > 0
    for name, values in ours.items():
        bound = 1e-9 * max(1.0, values.detach().abs().max().item())
        assert (theirs[name] - values).abs().max() < bound, name


def test_rows_have_the_same_names_and_maps():
    library, built = (model.eval() for model in pair(inflate="3x1x1"))
    ours = theirs = torch.randn(1, 3, 16, 32, 32, dtype=torch.float64)
    rows = built.layers()
    assert [name for name, _ in library.layers()] == list(rows)
    with torch.no_grad():
        for name, layer in library.layers():
            ours, theirs = layer(ours), rows[name](theirs)
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < 1e-10 * ours.abs().max(), name


@pytest.mark.parametrize("inflate", [None, "3x1x1", "3x3x3"])
def test_full_size(inflate):
    with torch.device("meta"):
        built = taught("SmallC2D")(400, (3, 4, 6, 3), 64, inflate)
    assert parameters(built) == {None: 24_327_632, "3x1x1": 28_043_472, "3x3x3": 33_433_808}[inflate]


def test_both_start_with_gains_of_zero_behind_each_residual_branch():
    built = taught("SmallC2D")(5)
    bottleneck = taught("Bottleneck").__name__
    blocks = [layer for layer in built.modules() if type(layer).__name__ == bottleneck]
    assert len(blocks) == 6
    for block in blocks:
        assert not block.c.norm.weight.any()
        assert isinstance(block.non_local, nn.Identity)


@pytest.mark.parametrize("options", [{}, {"depth": 101, "inflate": "3x3x3"}])
def test_solution_names_every_weight_as_the_authors_do(options):
    with torch.device("meta"):
        names = [name for name in C2D(400, **options).state_dict() if not name.endswith(COUNT)]
    assert len(names) == {50: 267, 101: 522}[options.get("depth", 50)]
    caffe2 = taught("caffe2")
    assert [caffe2(name) for name in names] == [published_name(name, "caffe2") for name in names]


# The billions of res3 and res4 are those of `test_resnets.py`: C2D with 1 block less C2D, and so on.
@pytest.mark.parametrize(
    ("size", "billions"),
    [
        ((256, 8, 56, 56), 42.337),
        ((512, 4, 28, 28), 2.286),
        ((1024, 4, 14, 14), 1.185),
        ((2048, 4, 7, 7), 0.988),
    ],
)
def test_solution_prices_a_block_as_it_is_counted(size, billions):
    queries, keys, products = taught("price")(*size)
    with torch.device("meta"):
        block, x = NonLocalBlock(size[0], subsample="before"), torch.empty(1, *size)
    theta, phi, _ = block.embed(x)
    assert (queries, keys) == (theta[0, 0].numel(), phi[0, 0].numel())
    assert products == multiply_adds(block, x)
    assert round(products / 1e9, 3) == billions


def test_solution_adds_up_the_parameters_of_blocks():
    total = taught("total")
    for depth, count, in_res3, in_res4 in ((50, 5, 2, 3), (50, 10, 4, 6), (101, 5, 2, 3)):
        with torch.device("meta"):
            plain, with_blocks = C2D(400, depth=depth), C2D(400, depth=depth, non_local=count)
        assert total(parameters(plain), in_res3, in_res4) == parameters(with_blocks)


@pytest.mark.parametrize("mode", ["mean", "centre"])
def test_frames_of_a_still_film_with_the_2d_answer(mode):
    """As section 3 prints them; the taught helpers on networks of another seed."""
    scores_a_frame, wake, small = (
        taught("scores_a_frame"),
        taught("wake"),
        {"depth": (1, 2, 2, 1), "width": 4},
    )
    flat, deep = (kind(6, clip="8x8", **small).double() for kind in (C2D, I3D))
    wake(flat, seed=3)
    inflate_weights(flat.state_dict(), deep, mode=mode, report=None)
    frame = torch.randn(1, 3, 1, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        scores = scores_a_frame(deep.eval(), frame.expand(-1, -1, 32, -1, -1))[0]
        gap = (scores - flat(frame)).abs().amax(dim=1) / flat(frame).abs().max()
    right = range(4, 12) if mode == "mean" else range(16)
    assert (gap < 1e-10).nonzero()[:, 0].tolist() == list(right)
    assert all(gap[t] > 1e-6 for t in range(16) if t not in right)
