"""Weights of one block by the key names of published code and checkpoints, read and written.

| layout       | code                                | `prefix` of a block, for example |
|--------------|-------------------------------------|----------------------------------|
| caffe2       | facebookresearch/video-nonlocal-net | "nonlocal_conv3_1_"              |
| slowfast     | facebookresearch/SlowFast           | "s3.pathway0_nonlocal1."         |
| pytorchvideo | facebookresearch/pytorchvideo       | the block's name in the network  |
| mmcv         | open-mmlab/mmcv                     | the block's name in the network  |
| mmaction2    | open-mmlab/mmaction2                | "backbone.layer2.1."             |
| timm         | huggingface/pytorch-image-models    | the block's name in the network  |
| cgnl         | KaiyuYue/cgnl-network.pytorch       | "layer3.5."                      |

mmaction2's prefix is that of the residual unit: its block is the unit's child "non_local_block". Caffe2's
nets for long clips have a frozen scale and shift as norm, without statistics: see `from_published`.

A file of weights does not say how its numbers are used: whether phi and g are pooled before or after, whether
the logits are scaled. The options of the block say it. A block with options that the published code does not
have is refused, so that no weights pass from one function to another and then predict badly.
"""

from dataclasses import dataclass, field

import numpy as np

from nlutils.arguments import one_of
from nlutils.exchange.frameworks import as_array, from_arrays, to_arrays

__all__ = ["LAYOUTS", "fold_bias", "from_published", "scale_theta", "to_published"]

# What a format puts behind a layer's name for each of our arrays.
_PYTORCH = {name: f".{name}" for name in ("weight", "bias", "running_mean", "running_var")}
# "riv" holds the variance, in spite of its name.
_CAFFE2 = {"weight": "_w", "norm.weight": "_s", "bias": "_b", "running_mean": "_rm", "running_var": "_riv"}
_COUNT = "num_batches_tracked"


@dataclass(frozen=True)
class _Layout:
    """One published format: its names, and the options under which its code and our block agree."""

    layers: dict[str, str]  # our name of a layer: theirs
    options: dict[str, tuple]  # option of our block: the values that their code has; others may be anything
    pooled: dict[str, str] = field(default_factory=dict)  # names that change under sub-sampling
    without_bias: tuple[str, ...] = ()  # W_z has its bias after all where no norm follows
    suffixes: dict[str, str] = field(default_factory=lambda: _PYTORCH)
    no_weights: tuple[str, ...] = (_COUNT,)  # endings of keys that are passed over
    start: str = ""  # what stands between the prefix and every name
    frozen: bool = False  # the norm's statistics may be absent: mean 0, and sqrt(variance + epsilon) = 1


# "form" is the instantiation with `scale` as our block means it, the width of theta to the power -1/2.
_SOFTMAX, _SCALED_SOFTMAX = ("embedded_gaussian", False), ("embedded_gaussian", True)
_DOT = ("dot_product", False)
_EVERYWHERE = {"attention": ("spacetime",), "frames_per_group": (None,)}
_IMAGES = {"ndim": (2,), "subsample": (None,), "norm": (True,)}
_POOLED_BEFORE = {"ndim": (3,), "subsample": (None, "before"), "attention": ("spacetime",)}
_CONVS = {"theta": "conv_theta", "phi": "conv_phi", "g": "conv_g", "w_z": "conv_out"}
_LETTERS = {"theta": "t", "phi": "p", "g": "g", "w_z": "z"}


def _mmcv(ndim, start=""):
    layers = {"theta": "theta.conv", "phi": "phi.conv", "g": "g.conv", "w_z": "conv_out.conv"}
    layers |= {"norm": "conv_out.bn", "w_f": "concat_project.conv"}
    forms = (("gaussian", False), _SOFTMAX, _SCALED_SOFTMAX, _DOT, ("concatenation", False))
    return _Layout(
        layers,
        {"ndim": ndim, "form": forms, "subsample": (None, "after"), **_EVERYWHERE},
        pooled={"phi": "phi.0.conv", "g": "g.0.conv"},
        without_bias=("w_z",),
        start=start,
    )


_NON_LOCAL = {
    "caffe2": _Layout(
        {"theta": "theta", "phi": "phi", "g": "g", "w_z": "out", "norm": "bn"},
        {"form": (_SOFTMAX, _SCALED_SOFTMAX, _DOT), **_POOLED_BEFORE},
        suffixes=_CAFFE2,
        no_weights=("_momentum",),  # the optimiser's, beside each blob
        frozen=True,
    ),
    "slowfast": _Layout(
        {**_CONVS, "norm": "bn"}, {"form": (_SCALED_SOFTMAX, _DOT), **_POOLED_BEFORE, "norm": (True,)}
    ),
    "pytorchvideo": _Layout(
        {**_CONVS, "norm": "norm"}, {"form": (_SCALED_SOFTMAX, _DOT), **_POOLED_BEFORE, **_EVERYWHERE}
    ),
    "mmcv": _mmcv((1, 2, 3)),
    "mmaction2": _mmcv((3,), "non_local_block."),
    # timm scales by in_channels to the power -1/2, another number than ours: see scale_theta.
    "timm": _Layout({**_LETTERS, "norm": "norm"}, {"form": (_SOFTMAX,), **_IMAGES}),
    "cgnl": _Layout(
        {**_LETTERS, "norm": "bn"},
        {"form": (_SOFTMAX, _SCALED_SOFTMAX), **_IMAGES},
        without_bias=("theta", "phi", "g", "w_z"),
    ),
}
_COMPACT_GENERALIZED = {"cgnl": _Layout({**_LETTERS, "norm": "gn"}, {"ndim": (2,)})}

LAYOUTS = tuple(_NON_LOCAL)


def to_published(block, layout: str, prefix: str = "") -> dict[str, np.ndarray]:
    """The weights of a PyTorch or Keras block as new NumPy arrays by the names of a published format.

    layout  one of `LAYOUTS`; a compact generalized block has "cgnl" only
    prefix  put before every name, dots and underscores included: "s3.pathway0_nonlocal1."

    Weights in bfloat16 become float32. PyTorch's count of seen batches is written where the block has one;
    `load_state_dict` does without it.
    Raises ValueError that names what the format cannot hold: an option of the block that the published code
    does not have, or a bias that is not zero where the format has none (for that of W_z see `fold_bias`).
    """
    arrays = to_arrays(block)
    chosen = _layout(block, layout, arrays)
    names = _names(block, chosen, arrays)
    lost = [name for name in arrays if name not in names and arrays[name].any()]
    if lost:
        cure = "set it to zero"
        if lost == ["w_z.bias"]:
            cure = "nlutils.exchange.fold_bias(block) moves it into the norm's running mean"
        raise ValueError(f"layout={layout!r} has no place for {', '.join(lost)}, which is not zero; {cure}")
    prefix += chosen.start
    written = {prefix + theirs: _their_shape(ours, arrays[ours]) for ours, theirs in names.items()}
    count = getattr(getattr(block, "norm", None), _COUNT, None)
    if count is not None and _COUNT in chosen.no_weights:
        written[f"{prefix}{chosen.layers['norm']}.{_COUNT}"] = count.detach().cpu().numpy().copy()
    return written


def from_published(block, arrays: dict, layout: str, prefix: str = "") -> None:
    """Write the weights under `prefix` in `arrays`, named as in a published format, into a block.

    block   of PyTorch, or of Keras and built; its options say what the weights mean
    arrays  by name, NumPy arrays or PyTorch tensors; keys that do not begin with `prefix` are left alone
    layout, prefix: as in `to_published`

    A bias that the format does not have becomes zero. Where a Caffe2 file has neither "bn_rm" nor "bn_riv",
    its norm is a frozen scale and shift: the running mean becomes 0 and the variance 1 - epsilon, and the
    block computes the same in evaluation mode; keep its norm there when you train.

    Raises ValueError for options that the published code does not have, and one that lists every missing key,
    every key under `prefix` (in mmaction2, under its "non_local_block.") that is no weight of the block, and
    every wrong shape; then nothing was written.
    """
    ours = to_arrays(block)
    chosen = _layout(block, layout, ours)
    names = _names(block, chosen, ours)
    prefix += chosen.start
    found = {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}
    assumed = _frozen_statistics(block, chosen, names, ours, found)
    names = {name: theirs for name, theirs in names.items() if name not in assumed}
    shapes = {theirs: _their_shape(name, ours[name]).shape for name, theirs in names.items()}
    faults = [f"{prefix}{key} is missing" for key in shapes if key not in found]
    left = [key for key in found if key not in shapes and not key.endswith(chosen.no_weights)]
    faults += [f"{prefix}{key} is not a weight of this block" for key in left]
    faults += [
        f"{prefix}{key} has shape {tuple(found[key].shape)}, the block needs {shape}"
        for key, shape in shapes.items()
        if key in found and tuple(found[key].shape) != shape
    ]
    if faults:
        raise ValueError(
            f"these weights do not fit the block in the layout {layout!r}: {_shortened(faults)}"
            + _hint(left, chosen, block)
        )
    read = {name: np.zeros_like(array) for name, array in ours.items()}
    read |= assumed
    read |= {name: as_array(found[theirs]).reshape(ours[name].shape) for name, theirs in names.items()}
    from_arrays(block, read)
    count = f"{chosen.layers['norm']}.{_COUNT}"
    if count in found and hasattr(block.norm, _COUNT):
        getattr(block.norm, _COUNT).fill_(int(found[count]))


def fold_bias(block) -> None:
    """Move the bias of W_z into the running mean of the norm behind it, and set it to zero, in place.

    For formats in which W_z has no bias. The norm subtracts its mean, so the output stays the same, to
    rounding: in evaluation mode because mean - b takes off what b no longer adds, in training because the
    mean of the batch contains b anyway. What differs is training with the running statistics (a frozen norm),
    where the bias was a parameter that learns and now is none.

    Raises ValueError for a block without a batch normalisation.
    """
    arrays = to_arrays(block)
    if "norm.running_mean" not in arrays or "w_z.bias" not in arrays:
        raise ValueError(
            "fold_bias needs a W_z with a bias and a batch normalisation behind it; this block has "
            f"{', '.join(arrays)}"
        )
    arrays["norm.running_mean"] = arrays["norm.running_mean"] - arrays["w_z.bias"]
    arrays["w_z.bias"] = np.zeros_like(arrays["w_z.bias"])
    from_arrays(block, arrays)


def scale_theta(block, factor: float) -> None:
    """Multiply W_theta and its bias by `factor`, in place: every theta_i . phi_j is multiplied by it.

    Puts a published code's own scale into the weights, to rounding. timm multiplies the logits by
    in_channels ** -0.5 (`use_scale=True`): read its weights into a block with scale=False, then call
    scale_theta(block, in_channels ** -0.5); before writing, scale_theta(block, in_channels ** 0.5).

    Raises ValueError for a block without theta.
    """
    arrays = to_arrays(block)
    names = [name for name in arrays if name.startswith("theta.")]
    if not names:
        raise ValueError(
            f"scale_theta needs a block with theta; instantiation={block.instantiation!r} has none"
        )
    for name in names:
        # In float64, so that it is rounded once.
        arrays[name] = (arrays[name].astype(np.float64) * factor).astype(arrays[name].dtype)
    from_arrays(block, arrays)


def _layout(block, layout, arrays) -> _Layout:
    """The row of the table for this kind of block; raises ValueError when the block does not fit it."""
    one_of("layout", layout, LAYOUTS)
    table = _NON_LOCAL if hasattr(block, "instantiation") else _COMPACT_GENERALIZED
    if layout not in table:
        raise ValueError(
            f"layout={layout!r} has no {type(block).__name__}; use {', '.join(map(repr, table))}"
        )
    chosen = table[layout]
    faults = []
    for option, allowed in chosen.options.items():
        if option == "form":
            value = block.instantiation, bool(block.scale)
        else:
            value = _has_norm(arrays) if option == "norm" else getattr(block, option)
        if value not in allowed:
            has = " or ".join(_shown(option, other) for other in allowed)
            faults.append(f"{_shown(option, value)} (it has {has})")
    if faults:
        raise ValueError(f"the code behind layout={layout!r} does not have {', nor '.join(faults)}")
    return chosen


def _shown(option, value):
    if option != "form":
        return f"{option}={value!r}"
    instantiation, scale = value
    softmax = instantiation == "embedded_gaussian" or scale
    return f"instantiation={instantiation!r}" + (f" with scale={scale}" if softmax else "")


def _has_norm(arrays):
    return any(name.startswith("norm.") for name in arrays)


def _names(block, chosen, arrays):
    """Our name of every array that the format holds: theirs, without the prefix."""
    layers = dict(chosen.layers)
    if getattr(block, "subsample", None) is not None:
        layers |= chosen.pooled
    names = {}
    for name in arrays:
        layer, _, kind = name.partition(".")
        if kind == "bias" and layer in chosen.without_bias and (layer != "w_z" or _has_norm(arrays)):
            continue
        kind = kind or "weight"  # w_f is a vector of its own, for us
        names[name] = layers[layer] + chosen.suffixes.get(f"{layer}.{kind}", chosen.suffixes[kind])
    return names


def _their_shape(name, array):
    """Their w_f is a convolution of size 1 over (theta, phi), ours its vector."""
    return array.reshape(1, -1, 1, 1) if name == "w_f" else array


def _frozen_statistics(block, chosen, names, ours, found):
    """The running statistics under which a norm is a scale and a shift, where the file leaves both out."""
    statistics = [name for name in names if name in ("norm.running_mean", "norm.running_var")]
    if not (chosen.frozen and statistics) or any(names[name] in found for name in statistics):
        return {}
    epsilon = block.norm.eps if hasattr(block.norm, "eps") else block.norm.epsilon
    return {name: np.full_like(ours[name], 1 - epsilon if name.endswith("var") else 0) for name in statistics}


def _hint(left, chosen, block):
    """Formats that name layers by their pooling tell when the block has it otherwise."""
    if block_pools := getattr(block, "subsample", None):
        other, means = [chosen.layers[layer] for layer in chosen.pooled], None
    else:
        other, means = list(chosen.pooled.values()), "after"
    if any(key.startswith(tuple(f"{name}." for name in other)) for key in left):
        return f". They were written with subsample={means!r}, and the block has {block_pools!r}"
    return ""


def _shortened(faults, most=20):
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more
