"""The other implementations from the package index, with our weights in them.

mmcv-lite 2.2.0, pytorchvideo 0.1.5 and timm 1.0.31 live in an environment of their own (README.md). None of
them needs torchvision for its non-local block, but timm imports it on the way: `load_timm` puts an empty
stand-in there.
"""

import importlib
import importlib.util
import sys
import types

import torch

__all__ = ["PEERS", "load_mmcv", "load_pytorchvideo", "load_timm", "peer_block"]


def load_mmcv():
    """mmcv.cnn, with NonLocal1d, NonLocal2d and NonLocal3d."""
    return _import("mmcv.cnn", "mmcv-lite")


def load_pytorchvideo():
    """pytorchvideo.layers.nonlocal_net, with create_nonlocal."""
    return _import("pytorchvideo.layers.nonlocal_net", "pytorchvideo")


def load_timm():
    """timm.layers.non_local_attn, with NonLocalAttn; neither timm's networks nor torchvision are imported."""
    if "timm" not in sys.modules:
        _stand_in_for_torchvision()
        found = importlib.util.find_spec("timm")
        if found is not None:
            # timm/__init__.py would import every network; an empty package with the same path does not.
            package = types.ModuleType("timm")
            package.__path__ = list(found.submodule_search_locations)
            sys.modules["timm"] = package
    return _import("timm.layers.non_local_attn", "timm")


def _import(module: str, distribution: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{distribution} cannot be imported ({error}); "
            "benchmarks/README.md says how to make the environment that has it"
        ) from error


def _stand_in_for_torchvision() -> None:
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    # timm's layers ask whether a layer is one of these; none is.
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (torch.nn.Module,), {})


def _mmcv(ours):
    kind = getattr(load_mmcv(), f"NonLocal{ours.ndim}d")
    block = kind(
        ours.in_channels,
        reduction=ours.in_channels // ours.inner_channels,
        use_scale=ours.scale,
        norm_cfg={"type": f"BN{ours.ndim}d"},
        mode=ours.instantiation,
    )
    layers = {"g": block.g.conv, "w_z": block.conv_out.conv, "norm": block.conv_out.norm}
    if ours.instantiation != "gaussian":
        layers |= {"theta": block.theta.conv, "phi": block.phi.conv}
    if ours.instantiation == "concatenation":
        block.concat_project.conv.weight.data.copy_(ours.w_f.detach()[None, :, None, None])
    return block, layers


def _pytorchvideo(ours):
    if ours.instantiation == "embedded_gaussian" and not ours.scale:
        raise ValueError("pytorchvideo always scales the logits; compare it with scale=True")
    block = load_pytorchvideo().create_nonlocal(
        dim_in=ours.in_channels,
        dim_inner=ours.inner_channels,
        instantiation={"embedded_gaussian": "softmax", "dot_product": "dot_product"}[ours.instantiation],
    )
    layers = {"theta": block.conv_theta, "phi": block.conv_phi, "g": block.conv_g}
    return block, layers | {"w_z": block.conv_out, "norm": block.norm}


def _timm(ours):
    block = load_timm().NonLocalAttn(ours.in_channels, rd_channels=ours.inner_channels)
    # timm scales by (number of input channels)^(-1/2); with the paper's width the product costs the same.
    block.scale = ours.inner_channels**-0.5 if ours.scale else 1.0
    return block, {"theta": block.t, "phi": block.p, "g": block.g, "w_z": block.z, "norm": block.norm}


PEERS = {"mmcv": _mmcv, "pytorchvideo": _pytorchvideo, "timm": _timm}


@torch.no_grad()
def peer_block(name: str, ours):
    """The block of the peer `name` that computes what `ours`, a nlutils.torch.NonLocalBlock, computes.

    W_z has no bias in mmcv; `ours` must have a zero there. Raises ModuleNotFoundError, with the cure, when
    the peer is not installed.
    """
    block, layers = PEERS[name](ours)
    for part, layer in layers.items():
        source = getattr(ours, part)
        if layer.bias is None and source.bias.any():
            raise ValueError(f"{name} has no bias in {part}, and ours is not zero there")
        layer.weight.copy_(source.weight)
        if layer.bias is not None:
            layer.bias.copy_(source.bias)
    return block
