"""Non-local blocks in networks of others: the output stays, the keys stay, the blocks run."""

import copy
import io

import pytest
import torch
from torch import nn
from torch_cases import normal

from nlutils.insertions import Insertion
from nlutils.torch import NonLocalBlock, insert_non_local


class Residual(nn.Module):
    """Two convolutions around which the input goes, as in a ResNet."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.conv2(self.relu(self.conv1(x))))


class Network(nn.Module):
    """The parts that networks have: a container, a module that runs twice, a pair as output, dropout."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.layer1 = nn.Sequential(Residual(4), Residual(4))
        self.shared = Residual(4)
        self.pair = Pair()
        self.never = nn.Conv2d(4, 4, 1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.shared(self.shared(self.layer1(self.stem(x))))
        x, _ = self.pair(x)
        return self.head(self.dropout(x.mean((2, 3))))


class Pair(nn.Module):
    def forward(self, x):
        return x, x.mean()


def network():
    torch.manual_seed(0)
    return Network()


X = normal(2, 3, 8, 6, dtype=torch.float32)
NAMES = ["layer1.0", "layer1", "shared", "stem.2"]


def move_away(model):
    """Give the blocks something to do: zero gains become one, weights large."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NonLocalBlock):
                for parameter in module.parameters():
                    parameter.copy_(0.5 * normal(*parameter.shape, seed=parameter.numel()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_the_output_stays(training, norm):
    model, plain = network().train(training), network().train(training)
    with torch.random.fork_rng():
        insert_non_local(model, X, after=NAMES, norm=norm)
    torch.manual_seed(1)
    expected = plain(X)
    torch.manual_seed(1)  # dropout
    assert torch.equal(model(X), expected)
    for module in model.modules():
        assert module.training == training
    for name, tensor in plain.state_dict().items():  # running statistics too
        assert torch.equal(model.state_dict()[name], tensor), name
    move_away(model)
    torch.manual_seed(1)
    assert not torch.allclose(model(X), expected)


def test_old_keys_stay_and_new_ones_say_where():
    model, plain = network(), network()
    insert_non_local(model, X, after=NAMES, instantiation="gaussian", norm=False)
    old, new = plain.state_dict(), model.state_dict()
    blocks = {f"{name}.non_local.{part}" for name in NAMES for part in _GAUSSIAN_KEYS}
    assert {*new} == {*old} | blocks
    loaded = model.load_state_dict(old, strict=False)
    assert {*loaded.missing_keys} == blocks
    assert loaded.unexpected_keys == []
    again = network()
    insert_non_local(again, X, after=NAMES, instantiation="gaussian", norm=False)
    move_away(model)
    again.load_state_dict(new)
    assert torch.equal(again.eval()(X), model.eval()(X))


_GAUSSIAN_KEYS = ("g.weight", "g.bias", "w_z.weight", "w_z.bias")


def test_what_it_reports():
    inserted = insert_non_local(network(), X, after=["layer1", "stem.2"])
    count = (
        4 * (4 * 2) + 3 * 2 + 4 + 2 * 4
    )  # four convolutions between 4 and 2 channels, their biases, the norm
    assert inserted == (Insertion("layer1", 4, (8, 6), count), Insertion("stem.2", 4, (8, 6), count))
    assert str(inserted).splitlines() == [
        "after   channels   size  parameters",
        "layer1         4  8 x 6          50",
        "stem.2         4  8 x 6          50",
        "2 non-local blocks, 100 parameters",
    ]


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_blocks_fit_the_map(ndim):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim]
    model = nn.Sequential(conv(3, 6, 1), conv(6, 5, 1)).double()
    x = normal(2, 3, *(4, 5, 3)[:ndim])
    expected = model(x)
    inserted = insert_non_local(model, x, after=["0"], inner_channels=2, subsample="before")
    block = model[0].non_local
    assert (block.ndim, block.in_channels, block.inner_channels) == (ndim, 6, 2)
    assert inserted[0].size == (4, 5, 3)[:ndim]
    assert block.g.weight.dtype == torch.float64
    assert torch.equal(model(x), expected)


def calls(model, x):
    """How often each block runs."""
    counts = {}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
        for name, module in model.named_modules()
        if isinstance(module, NonLocalBlock)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return counts


def test_a_block_runs_as_often_as_its_module():
    model = network()
    insert_non_local(model, X, after=NAMES)
    expected = {f"{name}.non_local": 2 if name == "shared" else 1 for name in NAMES}
    assert calls(model, X) == expected


def test_the_block_sees_what_the_module_returns():
    model, plain = network().eval(), network().eval()
    insert_non_local(model, X, after=["layer1.0", "layer1"])
    move_away(model)
    with torch.no_grad():
        x = plain.layer1[0](plain.stem(X))
        x = model.layer1[0].non_local(x)
        x = model.layer1.non_local(plain.layer1[1](x))
        expected = plain.head(plain.shared(plain.shared(x)).mean((2, 3)))
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


class OwnForward(nn.Sequential):
    """A container with a forward of its own, which takes its children by their places."""

    def forward(self, x):
        return self[1](self[0](x))


def test_a_container_with_its_own_forward():
    model = nn.Sequential(OwnForward(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 2, 1))
    expected = model(X)
    insert_non_local(model, X, after=["0"])
    assert calls(model, X) == {"0.non_local": 1}
    assert torch.equal(model(X), expected)


class Dense(nn.ModuleDict):
    """Every child gets all that came before, as in a DenseNet: one more child would be called too."""

    def forward(self, x):
        found = [x]
        for layer in self.values():
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


class Halves(nn.Module):
    """Calls its children on other things than maps, and swallows what they return."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        for child in list(self.children())[1:]:
            child(x)
        return x


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Dense({"a": nn.Conv2d(3, 3, 1), "b": nn.Conv2d(6, 3, 1)}), "with its blocks the model does not run"),
        (Halves(), "'0' ran 1 times, but its block 2 times: Halves calls its children in its own way"),
    ],
)
def test_children_in_a_loop_are_an_error(part, message):
    model = nn.Sequential(part, nn.ReLU())
    before, expected = {*model.state_dict()}, model(X)
    with pytest.raises(ValueError, match=message):
        insert_non_local(model, X, after=["0"])
    assert {*model.state_dict()} == before
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("kind", ["deepcopy", "save and load"])
def test_copies_run_their_own_blocks(kind):
    model = network().eval()
    insert_non_local(model, X, after=NAMES)
    move_away(model)
    if kind == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    expected = model(X)
    assert torch.equal(other(X), expected)
    assert calls(other, X) == calls(model, X)
    with torch.no_grad():
        other.shared.non_local.w_z.weight.add_(1)
    assert not torch.allclose(other(X), expected)
    assert torch.equal(model(X), expected)


def test_compiled_with_its_blocks():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), OwnForward(nn.ReLU(), Residual(4)), nn.ReLU()).eval()
    insert_non_local(model, X, after=["0", "1"])
    move_away(model)
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(X), model(X), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_blocks():
    model = network()
    insert_non_local(model, X, after=NAMES, norm=False, instantiation="dot_product")
    move_away(model)
    model(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("never"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_block_of_a_removed_hook_does_nothing():
    """The hooks that look at the model are gone afterwards; one hook and one child a module stay."""
    model = network()
    insert_non_local(model, X, after=NAMES)
    hooked = [name for name, module in model.named_modules() if module._forward_hooks]
    assert sorted(hooked) == ["layer1.0", "shared", "stem.2"]
    assert list(dict(model.layer1.named_children())) == ["0", "1", "non_local"]


def test_several_arguments():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x, y, z=0):
            return self.conv(x + y) + z

    model = Sum()
    (one,) = insert_non_local(model, (X, X), after=["conv"])
    assert one.size == (8, 6)


@pytest.mark.parametrize(
    ("after", "options", "message"),
    [
        (["layer1.2"], {}, r"the model has no 'layer1.2'; did you mean 'layer1.[01]', 'layer1"),
        (["layer1", "steem"], {}, "the model has no 'steem'; did you mean 'stem'"),
        (["xyz"], {}, r"the model has no 'xyz'; see model.named_modules\(\)"),
        ([""], {}, "the model has no ''"),
        ([3], {}, "the model has no 3"),
        ([], {}, r"after=\[\] names nothing"),
        ("layer1", {}, r"after='layer1' must be a list of names: \['layer1'\]"),
        (["stem", "stem"], {}, "'stem' is named twice"),
        (["stem", "never"], {}, "'never' did not run when the model was given example_input"),
        (["stem", "pair"], {}, r"'pair' returns tuple; a block needs one map of the axes \(B, C, N\)"),
        (["stem", "head"], {}, r"'head' returns \(2, 5\); a block needs one map"),
        (["stem", "list"], {}, "'list' did not run"),
        (["stem"], {"ndim": 2}, "ndim is read off the map behind 'stem'; leave it out"),
        (["stem"], {"instantiation": "gauss"}, "instantiation='gauss' is not known"),
        (["stem", "alias"], {}, "two of these names are one shared module"),
        (["stem", "grows"], {}, r"'grows' runs 2 times, with maps \[\(2, 4, 8, 6\), \(2, 4, 48\)\]"),
    ],
)
def test_errors_insert_nothing(after, options, message):
    class Grows(nn.Module):
        def forward(self, x):
            return x

    class More(Network):
        def __init__(self):
            super().__init__()
            self.list = nn.ModuleList([nn.ReLU()])
            self.alias = self.stem
            self.grows = Grows()

        def forward(self, x):
            x = self.list[0](self.stem(x))
            self.grows(x), self.grows(x.flatten(2))
            return self.head(self.pair(self.layer1(x))[0].mean((2, 3)))

    model = More()
    before = copy.deepcopy(model).state_dict()
    with pytest.raises(ValueError, match=message):
        insert_non_local(model, X, after=after, **options)
    assert {*model.state_dict()} == {*before}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_a_second_block_behind_one_module_is_an_error():
    model = network()
    insert_non_local(model, X, after=["stem"])
    with pytest.raises(ValueError, match="'stem' has a child 'non_local' already; leave it out"):
        insert_non_local(model, X, after=["layer1", "stem"])
    assert not hasattr(model.layer1, "non_local")


def test_an_input_that_does_not_fit_leaves_the_model_alone():
    model = network()
    model.stem.eval()
    with pytest.raises(RuntimeError):
        insert_non_local(model, X[:, :2], after=["stem"])
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training
    assert not model.stem.training
    assert not model.stem[1].training


def test_a_module_known_by_two_names():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    model.append(model[0])
    expected = model(X)
    insert_non_local(model, X, after=["2"])
    assert calls(model, X) == {"0.non_local": 2}
    assert torch.equal(model(X), expected)
