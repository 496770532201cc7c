"""Weights of a 2D network put into its inflated 3D network.

Carreira, Zisserman: Quo Vadis, Action Recognition?, CVPR 2017, section 2.4, https://arxiv.org/abs/1705.07750,
where it is called bootstrapping; Wang et al.: Non-local Neural Networks, CVPR 2018, section 4.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nlutils.arguments import one_of, positive_integer

__all__ = ["Inflation", "inflate_kernel", "inflate_weights", "resnet_names"]

MODES = ("mean", "centre")
# How many batches a normalisation has seen: no weight, and many files do not have it.
_COUNT = "num_batches_tracked"


@dataclass(frozen=True)
class Inflation:
    """What `inflate_weights` did with each name; printed, a few lines.

    copied    were taken as they are, or gained a time axis of one frame
    inflated  gained a longer time axis: name, number of frames
    missing   are in the model but not in the file, and were left as they were
    unused    are in the file but not in the model
    skipped   were left as they were because `skip` said so
    averaged  got another number of input channels, as `mean_inputs` said; they are copied or inflated, too
    """

    copied: tuple[str, ...]
    inflated: dict[str, int]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()

    def __str__(self) -> str:
        frames = sorted(set(self.inflated.values()))
        over = f" over {' or '.join(map(str, frames))} frames" if frames else ""
        lines = [f"{len(self.copied)} weights copied, {len(self.inflated)} inflated{over}"]
        for what, names in (
            ("with the mean of their input channels, repeated", self.averaged),
            ("skipped, left as they were", self.skipped),
            ("not in the file, left as they were", self.missing),
            ("in the file, but not in the model", self.unused),
        ):
            lines += [f"{len(names)} {what}: {', '.join(names)}"] if names else []
        return "\n".join(lines)


def inflate_kernel(kernel: Tensor, frames: int, mode: str = "mean") -> Tensor:
    """A kernel (out, in, H, W), or (out, in, 1, H, W), as one of (out, in, frames, H, W).

    mode  "mean": the kernel in every frame, divided by their number; "centre": in the middle one, `frames`
          // 2, and zeros in the others

    On frames that are all the same both compute what the 2D kernel computes, except that "mean" computes less
    where the kernel reaches over the end of the clip into zeros. "centre" computes it on any frames.
    """
    one_of("mode", mode, MODES)
    frames = positive_integer("frames", frames)
    if kernel.ndim == 4:
        kernel = kernel.unsqueeze(2)
    if kernel.ndim != 5 or kernel.shape[2] != 1:
        raise ValueError(
            f"kernel of shape {tuple(kernel.shape)} must be (out, in, H, W) or (out, in, 1, H, W)"
        )
    inflated = kernel.repeat(1, 1, frames, 1, 1)
    if mode == "mean":
        return inflated / frames
    others = [frame for frame in range(frames) if frame != frames // 2]
    inflated[:, :, others] = 0
    return inflated


@torch.no_grad()
def inflate_weights(
    state_2d: Mapping[str, Tensor],
    model: nn.Module,
    *,
    mode: str = "mean",
    rename: Callable[[str], str] | None = None,
    skip: Iterable[str] = (),
    mean_inputs: Iterable[str] = (),
    report: Callable[[str], object] | None = print,
) -> Inflation:
    """Write the weights of a 2D network into a 3D network whose layers have the same names, in place.

    state_2d  its state_dict: kernels (out, in, H, W) or (out, in, 1, H, W); vectors and linear layers as in
              the model
    mode      as in `inflate_kernel`
    rename    makes the model's name of a name in `state_2d`: `resnet_names` for the ResNets of images
    skip      beginnings of names that are left as they are in the model: ["classifier"], where the classes
              are others
    mean_inputs
              beginnings of names of kernels that may have another number of input channels in the model: each
              of these gets the mean over the file's. ["stem.conv"] brings what was learnt on colours to
              stacks of flow (Feichtenhofer, Pinz, Wildes: Spatiotemporal Residual Networks, NIPS 2016)
    report    is called with the result as text; None: nobody is told

    Returns an `Inflation`, which lists the names that the file lacks and those that it has too many of.
    Counts of batches (`num_batches_tracked`) are taken where they are, and not listed where they are not.
    Raises ValueError for shapes that do not fit, for two names that become one, and when no name of the file
    is in the model; then nothing was written.
    """
    one_of("mode", mode, MODES)
    given, ours = _renamed(state_2d, rename), model.state_dict()
    skip = _prefixes("skip", skip, ours)
    given, averaged = _with_inputs(given, ours, _prefixes("mean_inputs", mean_inputs, ours))
    names = [name for name in ours if not name.startswith(skip)]
    found = [name for name in names if name in given]
    if not found:
        raise ValueError(
            f"state_2d has none of the model's names; it has {', '.join(list(given)[:3])}, .., "
            f"the model {', '.join(names[:3])}, ..; rename= translates"
        )
    values = {name: _fitted(given[name], ours[name].shape, mode) for name in found}
    _check_fit({name: (given[name], ours[name]) for name in found if values[name] is None})
    for name, value in values.items():
        ours[name].copy_(value)
    inflated = {name: ours[name].shape[2] for name in found if _gains_frames(given[name], ours[name])}
    result = Inflation(
        copied=tuple(name for name in found if name not in inflated),
        inflated=inflated,
        missing=tuple(name for name in names if name not in given and not name.endswith(_COUNT)),
        unused=tuple(name for name in given if name not in ours),
        skipped=tuple(name for name in ours if name.startswith(skip)),
        averaged=tuple(name for name in averaged if name in found),
    )
    if report is not None:
        report(str(result))
    return result


def resnet_names(name: str) -> str:
    """Our name of a weight that torchvision and timm have in their ResNets of images; others stay.

    Theirs have the stride in the 3x3, as `C2D` and `I3D` unless told.

    >>> resnet_names("layer3.5.conv2.weight")
    'stages.2.5.b.conv.weight'
    """
    for pattern, ours in _RESNET.items():
        if match := re.match(pattern, name):
            return ours(*match.groups()) + name[match.end() :]
    return name


_KINDS = {"conv": "conv", "bn": "norm", "0": "conv", "1": "norm"}
_RESNET = {
    r"(conv|bn)1\.": lambda kind: f"stem.{_KINDS[kind]}.",
    r"fc\.": lambda: "classifier.",
    r"layer([1-4])\.(\d+)\.(conv|bn)([1-3])\.": lambda stage, index, kind, layer: (
        f"stages.{int(stage) - 1}.{index}.{'abc'[int(layer) - 1]}.{_KINDS[kind]}."
    ),
    r"layer([1-4])\.(\d+)\.downsample\.([01])\.": lambda stage, index, kind: (
        f"stages.{int(stage) - 1}.{index}.shortcut.{_KINDS[kind]}."
    ),
}


def _renamed(state, rename):
    renamed = {}
    for name, value in state.items():
        other = rename(name) if rename else name
        if other in renamed:
            raise ValueError(f"rename makes {other!r} of two names; {name!r} is the second")
        renamed[other] = torch.as_tensor(value)
    return renamed


def _prefixes(option, starts, ours):
    starts = (starts,) if isinstance(starts, str) else tuple(starts)
    for start in starts:
        if not any(name.startswith(start) for name in ours):
            raise ValueError(f"{option}: no name of the model begins with {start!r}; see model.state_dict()")
    return starts


def _with_inputs(given, ours, starts):
    """`given`, where the kernels named so have as many input channels as in `ours`; and their names."""
    changed = {}
    for name, value in given.items():
        if not name.startswith(starts) or name not in ours or value.ndim < 4:
            continue
        if value.shape[1] != (inputs := ours[name].shape[1]):
            changed[name] = value.mean(dim=1, keepdim=True).expand(-1, inputs, *value.shape[2:])
    return {**given, **changed}, tuple(changed)


def _check_fit(wrong):
    if not wrong:
        return
    layers = sorted({name.rpartition(".")[0] for name in wrong})
    raise ValueError(
        "; ".join(
            f"{name} has shape {tuple(value.shape)}, the model needs {tuple(ours.shape)}"
            for name, (value, ours) in wrong.items()
        )
        + f"; skip={layers} leaves the model's as they are"
    )


def _gains_frames(value, ours):
    return value.shape != ours.shape and ours.ndim == 5 and ours.shape[2] > 1


def _fitted(value, shape, mode):
    """`value` in the shape of the model; None where it does not fit."""
    if value.shape == shape:
        return value
    if len(shape) != 5 or value.ndim not in (4, 5) or value.shape[2:-2] not in ((), (1,)):
        return None
    inflated = inflate_kernel(value, shape[2], mode)
    return inflated if inflated.shape == shape else None
