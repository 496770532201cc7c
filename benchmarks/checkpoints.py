"""Weights of pytorchvideo's networks, with its own or mmcv's non-local blocks in them, read into ours.

    python -m benchmarks.checkpoints

in the environment that benchmarks/README.md describes. Writes data/results/peers/checkpoints.json: for each
network and each published format the largest difference between its output and ours on the same random
weights, which went through a file of that format, in float64 and evaluation mode; whether what ours writes
equals, bit by bit, what it read; and, as controls, what another layout's pools change with the same weights,
and what the network's non-local blocks do.

The networks are narrow, all else is as published: pytorchvideo's hub says how its c2d_r50 and i3d_r50 are
made, and with other strides, pools and blocks its network computes what video-nonlocal-net, SlowFast and
mmaction2 have. mmaction2's C2D has the same kernels without the time axis.
"""

import importlib
import importlib.util
import pickle
import re
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.peers import load_mmcv, load_pytorchvideo
from benchmarks.records import provenance, write_cases
from nlutils.exchange.checkpoints import load_checkpoint, published_name, to_checkpoint
from nlutils.origin import digest
from nlutils.paths import project_root
from nlutils.torch.models.resnet import C2D, I3D

CLASSES, WIDTH, SIDE = 10, 8, 64
# What the record depends on.
SOURCES = (
    "nlutils/architectures",
    "nlutils/exchange",
    "nlutils/torch/models/resnet",
    "nlutils/torch/blocks",
    "nlutils/torch/operations",
)
# The kernels of the first 1x1 of each stage's residual blocks, in turn.
FLAT, LONG = (1, 1, 1), (3, 1, 1)
INFLATED = (LONG, [LONG, FLAT], [LONG, FLAT], [FLAT, LONG])
# Where five non-local blocks are in a ResNet-50: index of pytorchvideo's block, of the residual block.
FIVE = [(3, 1), (3, 3), (4, 1), (4, 3), (4, 5)]


@dataclass(frozen=True)
class Case:
    """One network of theirs and how ours is made.

    blocks  whose non-local blocks are in it, "pytorchvideo" or "mmcv"; None: there are none
    pool1   its window and padding, where it is not pytorchvideo's
    """

    scheme: str
    network: type
    layout: str
    clip: str = "8x8"
    depth: int = 50
    blocks: str | None = None
    instantiation: str = "embedded_gaussian"
    pool1: tuple | None = None

    def options(self) -> dict:
        """Of our network."""
        options = {"depth": self.depth, "width": WIDTH, "layout": self.layout, "clip": self.clip}
        if self.blocks:
            options |= {"non_local": 5, "instantiation": self.instantiation}
        return options

    def name(self) -> str:
        """In words."""
        blocks = f", five blocks of {self.blocks}, {self.instantiation}" if self.blocks else ""
        return f"{self.network.__name__} ResNet-{self.depth} {self.clip}{blocks}"


RELEASED = {"layout": "released", "blocks": "pytorchvideo"}
MMACTION2 = {"layout": "mmaction2", "clip": "32x2", "pool1": ((1, 3, 3), (0, 1, 1))}
CASES = (
    Case("pytorchvideo", C2D, "slowfast"),
    Case("pytorchvideo", I3D, "slowfast"),
    Case("pytorchvideo", I3D, "slowfast", depth=101),
    Case("slowfast", I3D, "slowfast", blocks="pytorchvideo"),
    Case("slowfast", I3D, "slowfast", blocks="pytorchvideo", instantiation="dot_product"),
    Case("caffe2", C2D, **RELEASED, pool1=((1, 3, 3), 0)),
    Case("caffe2", I3D, **RELEASED, pool1=((1, 3, 3), 0)),
    Case("caffe2", I3D, **RELEASED, clip="32x2", pool1=((2, 3, 3), 0)),
    Case("mmaction2", C2D, "released", pool1=((1, 3, 3), 0)),
    Case("mmaction2", I3D, **MMACTION2),
    Case("mmaction2", I3D, **MMACTION2, blocks="mmcv"),
    Case("mmaction2", I3D, **MMACTION2, blocks="mmcv", instantiation="dot_product"),
    Case("mmaction2", I3D, **MMACTION2, blocks="mmcv", instantiation="gaussian"),
)


def load_networks():
    """pytorchvideo.models.resnet, without its other networks and what these need.

    Of torchvision and fvcore it takes one name each for what is not used here or is overwritten: a layer for
    detection, and how weights start.
    """
    load_pytorchvideo()
    _stand_in("torchvision.ops", RoIAlign=nn.Module)
    _stand_in("fvcore.nn.weight_init", c2_msra_fill=lambda layer: None, c2_xavier_fill=lambda layer: None)
    if "pytorchvideo.models" not in sys.modules:
        package = types.ModuleType("pytorchvideo.models")
        package.__path__ = [str(Path(sys.modules["pytorchvideo"].__path__[0]) / "models")]
        sys.modules["pytorchvideo.models"] = package
    return importlib.import_module("pytorchvideo.models.resnet")


def _stand_in(module, **names):
    """An empty module of this name with these names in it, and its packages."""
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        made = types.ModuleType(".".join(parts[:count]))
        made.__path__ = []
        sys.modules[made.__name__] = made
    vars(sys.modules[module]).update(names)


def theirs(case: Case) -> nn.Module:
    """pytorchvideo's network with the strides and pools of the published one, and blocks in it."""
    stride = 2 if case.clip == "32x2" else 1
    inflated = case.network is I3D
    network = load_networks().create_resnet(
        model_depth=case.depth,
        model_num_class=CLASSES,
        stem_dim_out=WIDTH,
        stem_conv_kernel_size=(5 if inflated else 1, 7, 7),
        stem_conv_stride=(stride, 2, 2),
        stage1_pool=nn.MaxPool3d,
        stage_conv_a_kernel_size=INFLATED if inflated else (FLAT,) * 4,
        head_pool_kernel_size=(4, SIDE // 32, SIDE // 32),
    )
    if case.pool1:
        window, padding = case.pool1
        network.blocks[0].pool = nn.MaxPool3d(window, (stride, 2, 2), padding)
    for block, index in FIVE if case.blocks else ():
        places = network.blocks[block].res_blocks
        channels = WIDTH * 2 ** (block - 1) * 4 // 2
        places[index] = nn.Sequential(places[index], non_local(case, channels))
    return network


def non_local(case: Case, channels: int) -> nn.Module:
    """A block as the published network has it."""
    if case.blocks == "mmcv":
        return load_mmcv().NonLocal3d(
            channels, sub_sample=True, use_scale=False, norm_cfg={"type": "BN3d"}, mode=case.instantiation
        )
    return load_pytorchvideo().create_nonlocal(
        dim_in=channels,
        dim_inner=channels // 2,
        pool_size=(1, 2, 2),
        instantiation="softmax" if case.instantiation == "embedded_gaussian" else case.instantiation,
    )


def published(case: Case, state: dict, ours: nn.Module) -> dict[str, np.ndarray]:
    """The weights of their network by the names of the case's format."""
    trunk = {
        published_name(name, "pytorchvideo"): published_name(name, case.scheme)
        for name in ours.state_dict()
        if ".non_local." not in name
    }
    found = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"blocks\.(\d)\.res_blocks\.(\d+)\.1\.(.+)", name)
        if block:
            key = block_key(case.scheme, int(block[1]), block[2], block[3])
        else:
            key = trunk[re.sub(r"(res_blocks\.\d+)\.0\.", r"\1.", name)]
        array = tensor.numpy().copy()
        if case.scheme == "mmaction2" and case.network is C2D and array.ndim == 5:
            array = array[:, :, 0]
        if key is not None:
            found[key] = array
    return found


def block_key(scheme, block, index, name):
    """The key of a non-local block's weight in a format: of mmcv its own, of the others by their words."""
    if scheme == "mmaction2":
        return f"backbone.layer{block - 1}.{index}.non_local_block.{name}"
    name = name.replace("norm.", "bn.")
    if scheme == "slowfast":
        return f"s{block}.pathway0_nonlocal{index}.{name}"
    layer, kind = name.removeprefix("conv_").rsplit(".", 1)
    words = {"weight": "s" if layer == "bn" else "w", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    return f"nonlocal_conv{block}_{index}_{layer}_{words[kind]}" if kind in words else None


def write(case: Case, arrays: dict, folder: Path) -> Path:
    """A file in the format that the published ones have."""
    if case.scheme == "caffe2":
        path = folder / "net.pkl"
        momentum = {f"{name}_momentum": np.zeros_like(array) for name, array in arrays.items()}
        path.write_bytes(pickle.dumps({"blobs": {"model_iter": 1, "lr": 0.1} | momentum | arrays}, 2))
        return path
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    path = folder / "net.pyth"
    entry = "state_dict" if case.scheme == "mmaction2" else "model_state"
    torch.save({entry: state, "epoch": 100}, path)
    return path


def randomise(case: Case, network, seed: int) -> None:
    """Random weights under which the features stay of size 1 through all residual and non-local blocks."""
    draw = torch.Generator().manual_seed(seed)
    # The sum over theta, phi and g grows with the third power of what it sees.
    cubic = r"\.1\.(conv_)?(theta|phi|g)\." if case.instantiation == "dot_product" else "$."
    for name, tensor in network.state_dict().items():
        added = ".norm_c." in name or re.search(r"res_blocks\.\d+\.1\.(norm|conv_out\.bn)\.", name)
        if not tensor.is_floating_point():
            tensor.fill_(seed)
        elif tensor.ndim > 1:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=draw)
            tensor.mul_(0.2 if re.search(cubic, name) else 1)
        elif name.endswith("running_var") or (name.endswith("weight") and not added):
            tensor.uniform_(0.5, 1.5, generator=draw)
        else:
            tensor.uniform_(-0.3, 0.3, generator=draw)


@torch.no_grad()
def compare(case: Case, seed: int, folder: Path) -> dict:
    """One line of the record."""
    peer = theirs(case).double().eval()
    randomise(case, peer, seed)
    ours = case.network(CLASSES, **case.options()).double().eval()
    arrays = published(case, peer.state_dict(), ours)
    path = write(case, arrays, folder)
    report = load_checkpoint(path, ours, report=None)
    written = to_checkpoint(ours, case.scheme)
    same = (np.array_equal(written[name], array) for name, array in arrays.items())
    back = written.keys() == arrays.keys() and all(same)

    frames = int(case.clip.split("x")[0])
    x = torch.randn((2, 3, frames, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).double()
    z = peer(x)
    difference = float((ours(x) - z).abs().max())
    other = other_pools(ours, case)
    other_difference = float((ours(x) - z).abs().max())
    return {
        "scheme": case.scheme,
        "network": case.name(),
        "layout": case.layout,
        "loaded": len(report.loaded),
        "missing": len(report.missing),
        "unexpected": len(report.unexpected),
        "difference": difference,
        "largest_output": float(z.abs().max()),
        "back": "exact" if back else "not exact",
        "other_layout": other,
        "difference_other_layout": other_difference,
        "difference_without_blocks": without_blocks(peer, x, z) if case.blocks else None,
    }


def other_pools(network, case: Case) -> str:
    """Put the pools of another layout for the same clip into the network; returns its name."""
    name = "paper" if case.clip == "32x2" else "released" if case.layout == "slowfast" else "slowfast"
    other = case.network(CLASSES, **case.options() | {"layout": name})
    network.pool1, network.pool2 = other.pool1, other.pool2
    return name


def without_blocks(network, x, z) -> float:
    """How far the output is from `z` when the non-local blocks are taken out."""
    for block, index in FIVE:
        places = network.blocks[block].res_blocks
        places[index] = places[index][0]
    return float((network(x) - z).abs().max())


def main():
    """Run all cases, print and write the record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, case in enumerate(CASES, start=1):
            found.append(line := compare(case, seed, Path(folder)))
            print(f"{line['scheme']:12} {line['network']:67} {line['difference']:.1e}, back {line['back']}")
    source = provenance("torch")
    root = project_root()
    source["code"] = digest((file for folder in SOURCES for file in (root / folder).rglob("*.py")), root)
    write_cases("checkpoints", source, found)


if __name__ == "__main__":
    main()
