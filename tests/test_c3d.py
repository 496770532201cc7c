"""C3D, its variant with batch normalisation, the network of 2010: published counts and shapes, learning."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nlutils.study import seeded
from nlutils.study.cost import multiply_adds, parameters
from nlutils.torch.models.c3d import C3D, C3DBN, CHANNELS_2010, Ji2010, hardwired

torch.set_num_threads(1)
SMALL = {"width": 4, "fc": 32, "frames": 8, "size": (32, 32)}


def on_meta(network, *args, **options):
    with torch.device("meta"):
        return network(*args, **options).eval()


def meta(*shape):
    return torch.empty(shape, device="meta")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shapes(model, x):
    """C x T x H x W behind every layer, by name."""
    seen = {}

    def note(name):
        def hook(layer, inputs, output):
            seen[name] = tuple(output.shape[1:])

        return hook

    for name, layer in model.named_modules():
        layer.register_forward_hook(note(name))
    model(x)
    return seen


# C3D: facebookarchive/C3D, prototxt files of c3d_feature_extraction and c3d_finetuning; counts by arithmetic

CONVOLUTIONS = {
    "conv1a": (5_248, (64, 16, 112, 112)),
    "conv2a": (221_312, (128, 16, 56, 56)),
    "conv3a": (884_992, (256, 8, 28, 28)),
    "conv3b": (1_769_728, (256, 8, 28, 28)),
    "conv4a": (3_539_456, (512, 4, 14, 14)),
    "conv4b": (7_078_400, (512, 4, 14, 14)),
    "conv5a": (7_078_400, (512, 2, 7, 7)),
    "conv5b": (7_078_400, (512, 2, 7, 7)),
}
LAYERS = {
    **CONVOLUTIONS,
    "pool5": (0, (512, 1, 4, 4)),
    "fc6": (33_558_528, (4096,)),
    "fc7": (16_781_312, (4096,)),
}


def test_c3d_has_the_published_layers():
    model = on_meta(C3D, 101)
    seen = shapes(model, meta(1, 3, 16, 112, 112))
    for name, (count, shape) in LAYERS.items():
        assert parameters(getattr(model, name)) == count, name
        assert seen[name] == shape, name
    assert seen["classifier"] == (101,)
    assert not any("norm" in name for name in model.state_dict())


@pytest.mark.parametrize(("classes", "count"), [(101, 78_409_573), (487, 79_991_015), (400, 79_634_576)])
def test_c3d_has_the_published_number_of_parameters(classes, count):
    """78.4 M in mmaction2's list, for 101 classes."""
    assert parameters(on_meta(C3D, classes)) == count


def test_c3d_costs_the_published_multiply_adds():
    """38.5 G in mmaction2's list; 38.497 of the convolutions and 38.549 with 487 classes by arithmetic."""
    clip = meta(1, 3, 16, 112, 112)
    assert round(multiply_adds(on_meta(C3D, 101), clip) / 1e9, 2) == 38.55
    assert round(multiply_adds(on_meta(C3D, 487), clip) / 1e9, 3) == 38.549
    convolutions = sum(
        27 * inputs * shape[0] * shape[1] * shape[2] * shape[3]
        for inputs, (_, shape) in zip(
            (3, 64, 128, 256, 256, 512, 512, 512), CONVOLUTIONS.values(), strict=True
        )
    )
    linear = 8192 * 4096 + 4096 * 4096 + 4096 * 101
    assert round(convolutions / 1e9, 3) == 38.497
    assert multiply_adds(on_meta(C3D, 101), clip) == convolutions + linear


def test_pool5_keeps_what_is_left_over_as_caffe_does():
    """A loop over windows that are cut at the border, as in pool3d_layer.cpp."""
    pool5 = C3D(2, width=1, fc=2).pool5
    x = noise(1, 3, 2, 7, 7)
    expected = torch.empty(1, 3, 1, 4, 4)
    for row in range(4):
        for column in range(4):
            window = x[:, :, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected[:, :, 0, row, column] = window.amax(dim=(2, 3, 4))
    assert torch.equal(pool5(x), expected)


def test_mmaction2_has_another_pool5_of_the_same_shape():
    ours, theirs = (C3D(2, width=1, fc=2, layout=layout) for layout in ("paper", "mmaction2"))
    assert ours.pooled == theirs.pooled == (1, 4, 4)
    x = noise(1, 1, 2, 7, 7)
    by_hand = F.max_pool2d(F.pad(x.amax(dim=2), (1, 0, 1, 0), value=-torch.inf), 2)  # windows begin at -1
    assert torch.equal(theirs.pool5(x)[:, :, 0], by_hand)
    assert not torch.equal(theirs.pool5(x), ours.pool5(x))
    theirs.load_state_dict(ours.state_dict())  # the same names and shapes: a file does not tell them apart


def test_state_dict_names():
    layers = [*CONVOLUTIONS, "fc6", "fc7", "classifier"]
    assert list(C3D(2, **SMALL).state_dict()) == [
        f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")
    ]


# The variant of Quo vadis


def test_c3d_bn_is_c3d_with_two_changes():
    """Section 2.2 and Table 1 of the paper: batch normalisation, stride 2 in pool1, 79 M parameters."""
    plain, model = on_meta(C3D, 400), on_meta(C3DBN, 400)
    # Each bias is replaced by a gain and a bias.
    outputs = sum(w.numel() for name, w in plain.named_parameters() if name.endswith(".bias")) - 400
    assert parameters(model) == parameters(plain) + outputs == 79_645_520
    assert parameters(model) // 10**6 == 79

    seen = shapes(model, meta(1, 3, 16, 112, 112))
    frames = {"conv1a": 16, "pool1": 8, "pool2": 4, "pool3": 2, "pool4": 1, "pool5": 1}
    assert {name: seen[name][1] for name in frames} == frames
    assert seen["pool5"] == LAYERS["pool5"][1]
    for name in ("conv1a", "conv5b", "fc6", "fc7"):
        assert isinstance(getattr(model, name).norm, nn.BatchNorm3d | nn.BatchNorm1d)
    assert not hasattr(model.classifier, "norm")


# Ji et al. 2010: the layer table of the paper, from a secondary source; the counts follow from it

TABLE_2010 = {"c2": 1_480, "s3": 92, "c4": 3_810, "s5": 156, "c6": 289_536, "classifier": 384}


def test_ji_2010_has_the_published_number_of_parameters():
    model = on_meta(Ji2010, 3)
    assert {name: parameters(getattr(model, name)) for name in TABLE_2010} == TABLE_2010
    assert parameters(model) == sum(TABLE_2010.values()) == 295_458


def test_ji_2010_has_the_published_shapes():
    model = on_meta(Ji2010, 3)
    rgb, flow = meta(1, 3, 7, 60, 40), meta(1, 2, 6, 60, 40)
    seen = shapes(model, (rgb, flow))
    assert seen["classifier"] == (3,)

    maps = [tuple(x.shape[1:]) for x in hardwired(rgb, flow).values()]
    assert maps == 3 * [(1, 7, 60, 40)] + 2 * [(1, 6, 60, 40)]
    assert sum(T for _, T, _, _ in maps) == 33
    expected = {
        "c2": (2, 23, (54, 34)),
        "s3": (2, 23, (27, 17)),
        "c4": (6, 13, (21, 12)),
        "s5": (6, 13, (7, 4)),
    }
    for layer, (sets, steps, size) in expected.items():
        each = [seen[f"{layer}.{name}"] for name in CHANNELS_2010]
        assert {(C, H, W) for C, _, H, W in each} == {(sets, *size)}, layer
        assert sum(T for _, T, _, _ in each) == steps, layer
    assert model.c6.weight.shape == (128, 6 * 13, 7, 4)
    assert seen["c6"] == (128,)


def test_hardwired_computes_gradients_and_hands_the_flow_on():
    """A plane of grey: the derivatives are its slopes, everywhere; one colour counts by its weight."""
    rows, columns = torch.arange(60.0).view(-1, 1), torch.arange(40.0)
    plane = (2 * columns - 3 * rows).expand(1, 3, 7, 60, 40)
    flow = noise(1, 2, 6, 60, 40)
    made = hardwired(plane, flow)
    assert torch.allclose(made["gray"], plane[:, :1], atol=1e-4)
    assert torch.allclose(made["gradient_x"], torch.tensor(2.0), atol=1e-4)
    assert torch.allclose(made["gradient_y"], torch.tensor(-3.0), atol=1e-4)
    assert torch.equal(torch.cat([made["flow_x"], made["flow_y"]], dim=1), flow)
    red = plane.clone()
    red[:, 1:] = 0
    assert torch.allclose(hardwired(red, flow)["gray"], 0.299 * plane[:, :1], atol=1e-4)
    assert not any(x.requires_grad for x in made.values())


def test_ji_2010_is_the_sum_that_the_paper_writes():
    """One feature of C6 computed map by map from C2 on, for a channel of frames and one of flow."""
    model = Ji2010(3, features=5).double()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    rgb, flow = noise(1, 3, 7, 60, 40).double(), noise(1, 2, 6, 60, 40).double()
    total = torch.zeros(5, dtype=torch.float64)
    number = 0
    for name, x in hardwired(rgb, flow).items():
        for j in range(6):  # kernel j of C4 belongs to set j // 3
            weight, bias = model.c2[name].weight[j // 3, 0], model.c2[name].bias[j // 3]
            for t in range(x.shape[2] - 4):
                s3 = []
                for u in range(t, t + 3):
                    c2 = sum(F.conv2d(x[:, :, u + k], weight[k][None, None]) for k in range(3)) + bias
                    pooled = F.avg_pool2d(c2.tanh(), 2) * model.s3[name].scale[j // 3, u]
                    s3.append((pooled + model.s3[name].bias[j // 3, u]).tanh())
                c4 = sum(F.conv2d(s3[k], model.c4[name].weight[j, :, k][None]) for k in range(3))
                c4 = (c4 + model.c4[name].bias[j]).tanh()
                s5 = (F.avg_pool2d(c4, 3) * model.s5[name].scale[j, t] + model.s5[name].bias[j, t]).tanh()
                total += (model.c6.weight[:, number] * s5[0]).sum(dim=(1, 2)) + model.c6.bias[:, number]
                number += 1
    assert number == 78
    assert torch.allclose(model((rgb, flow))[0], model.classifier.weight @ total.tanh(), atol=1e-10)


def test_biases_of_one_feature_act_as_one():
    model = Ji2010(2, features=3)
    model.loss((noise(2, 3, 7, 60, 40), noise(2, 2, 6, 60, 40)), torch.tensor([0, 1])).backward()
    gradient = model.c6.bias.grad
    assert gradient.abs().min() > 0
    assert torch.equal(gradient, gradient[:, :1].expand(3, 78))


def test_a_field_more_is_left_aside():
    model = Ji2010(3)
    rgb, flow = noise(2, 3, 7, 60, 40), noise(2, 2, 7, 60, 40)
    assert torch.equal(model((rgb, flow)), model((rgb, flow[:, :, :6])))


# Sizes, options, what travels with the model


@pytest.mark.parametrize("network", [C3D, C3DBN])
@pytest.mark.parametrize("frames", [1, 5, 8, 16, 20])
@pytest.mark.parametrize("size", [(1, 1), (32, 40), (45, 60), (112, 56)])
def test_other_clips_are_taken_where_they_are_announced(network, frames, size):
    model = network(2, width=1, fc=3, frames=frames, size=size).eval()
    x = torch.zeros(2, 3, frames, *size)
    assert tuple(model.features(x).shape[2:]) == model.pooled
    assert model(x).shape == (2, 2)


def test_a_clip_passes_where_the_poolings_leave_as_much():
    model = C3D(2, width=1, fc=3, frames=16, size=(32, 32)).eval()
    assert model(torch.zeros(1, 3, 10, 30, 31)).shape == (1, 2)
    with pytest.raises(
        ValueError, match=r"8 x 64 x 64 is 1 x 2 x 2 .* 1 x 1 x 1; .* frames=8, size=\(64, 64\)"
    ):
        model(torch.zeros(1, 3, 8, 64, 64))
    narrow = C3D(2, width=1, fc=3, layout="mmaction2")
    with pytest.raises(ValueError, match="8 x 112 x 112 is 0 x 4 x 4"):
        narrow(torch.zeros(1, 3, 8, 112, 112))


def test_ji_2010_takes_the_smallest_clip():
    model = Ji2010(2, sets=1, kernels=2, features=3, frames=6, size=(24, 22))
    assert model((torch.zeros(1, 3, 6, 24, 22), torch.zeros(1, 2, 5, 24, 22))).shape == (1, 2)
    for smaller in ({"frames": 5}, {"size": (23, 40)}, {"size": (60, 21)}):
        with pytest.raises(ValueError, match=r"leave nothing for C6; .* 6 x 24 x 22 or more"):
            Ji2010(2, **smaller)
    with pytest.raises(ValueError, match=r"must be \(B, 3, 6, 24, 22\) and \(B, 2, 5, 24, 22\)"):
        model((torch.zeros(1, 3, 6, 24, 22), torch.zeros(1, 2, 4, 24, 22)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "released"}, "layout='released' is not known; use one of 'paper', 'mmaction2'"),
        ({"input": "sound"}, "input='sound' is not known"),
        ({"width": 0}, "width=0"),
        ({"fc": 2.5}, "fc=2.5"),
        ({"frames": 0}, "frames=0"),
        ({"size": 112}, "size=112 must be a pair"),
        ({"size": (112, -1)}, "size=-1"),
        ({"layout": "mmaction2", "frames": 8}, r"frames=8, size=\(112, 112\): the poolings leave 0 x 4 x 4"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        C3D(2, **{"width": 1, "fc": 2, **options})


def test_what_was_published_travels_with_the_model():
    facts = on_meta(C3D, 2).expects
    assert (facts.frames, facts.size, facts.colour) == (16, (112, 112), "BGR")
    assert [round(mean * 255) for mean in facts.mean] == [104, 117, 128]  # mmaction2's; on values to 255
    assert facts.std == (1 / 255,) * 3
    assert on_meta(C3D, 2, layout="mmaction2").expects.colour == "RGB"
    assert on_meta(C3DBN, 2).expects.mean == (0.5, 0.5, 0.5)
    assert [facts.frames for facts in Ji2010(2).expects] == [7, 6]


@pytest.mark.parametrize(
    ("network", "options"),
    [
        *[(network, {"width": 8}) for network in (C3D, C3DBN)],
        *[(network, {"input": "flow"}) for network in (C3D, C3DBN)],
        *[(network, {"size": (112, 96)}) for network in (C3D, C3DBN)],
        *[(network, {"frames": 8}) for network in (C3D, C3DBN)],
        (Ji2010, {"size": (48, 40)}),
        (Ji2010, {"frames": 9}),
        (Ji2010, {"sets": 1}),
        (Ji2010, {"kernels": 2}),
    ],
)
def test_recipe_facts_are_of_the_published_input_size_and_width_alone(network, options):
    assert on_meta(network, 2, **options).expects is None


# Learning


def train(model, x, labels, steps, lr):
    """The classes found after `steps` steps of Adam on all clips at once."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(x, labels).backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval()(x).argmax(dim=1)


LABELS = torch.arange(8) % 4


@pytest.mark.parametrize("network", [C3D, C3DBN])
def test_c3d_overfits_eight_clips(network):
    with seeded(0):
        model = network(4, **SMALL, dropout=0.0)
        assert torch.equal(train(model, noise(8, 3, 8, 32, 32), LABELS, 40, 3e-3), LABELS)


def test_ji_2010_overfits_eight_clips():
    with seeded(0):
        model = Ji2010(4, features=16, size=(36, 30))
        x = noise(8, 3, 7, 36, 30), noise(8, 2, 6, 36, 30)
        assert torch.equal(train(model, x, LABELS, 40, 3e-3), LABELS)


@pytest.mark.parametrize("network", [C3D, C3DBN])
def test_dropout_acts_in_training_only(network):
    with seeded(0):
        model = network(4, **SMALL, dropout=0.5)
        x = noise(4, 3, 8, 32, 32)
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
