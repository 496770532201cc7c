"""The key names of whole networks in published code, by rule from our own.

| scheme       | code                                | network      | a key                               |
|--------------|-------------------------------------|--------------|-------------------------------------|
| caffe2       | facebookresearch/video-nonlocal-net | C2D, I3D     | res3_0_branch2a_w                   |
| slowfast     | facebookresearch/SlowFast           | C2D, I3D     | s3.pathway0_res0.branch2.a.weight   |
| pytorchvideo | facebookresearch/pytorchvideo       | C2D, I3D     | blocks.0.norm.running_mean          |
| mmaction2    | open-mmlab/mmaction2                | C2D, I3D     | backbone.layer2.0.conv1.conv.weight |
| i3d_pytorch  | piergiaj/pytorch-i3d                | I3DInception | Mixed_3b.b1a.conv3d.weight          |
| i3d_tf       | deepmind/kinetics-i3d               | I3DInception | Conv3d_1a_7x7/batch_norm/beta       |

The names of non-local blocks are those of `nlutils.exchange.published`; here stands what precedes them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from nlutils.arguments import one_of

__all__ = ["SCHEMES", "KeyScheme", "find_scheme", "published_name"]

_RESIDUAL = re.compile(r"stages\.(\d+)\.(\d+)\.(a|b|c|shortcut)\.(conv|norm)")
_NON_LOCAL = re.compile(r"(stages\.(\d+)\.(\d+)\.non_local)\.")
_INCEPTION = re.compile(r"features\.(\w+)(?:\.(branch\d(?:\.\d)?))?\.(conv|norm)")

# What follows a layer's name; ours of a normalisation are told from a convolution's by "norm.".
_PYTORCH = {"weight": ".weight", "bias": ".bias"}
_PYTORCH |= {
    f"norm.{kind}": f".{kind}"
    for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}
# "riv" holds the variance, in spite of its name.
_CAFFE2 = {"weight": "_w", "bias": "_b", "norm.weight": "_s", "norm.bias": "_b"}
_CAFFE2 |= {"norm.running_mean": "_rm", "norm.running_var": "_riv"}
# No gains: the released network has none.
_TENSORFLOW = {"weight": "/w", "bias": "/b", "norm.bias": "/beta"}
_TENSORFLOW |= {"norm.running_mean": "/moving_mean", "norm.running_var": "/moving_variance"}


@dataclass(frozen=True)
class KeyScheme:
    """How one published code names the weights of a network.

    network   "resnet" or "inception"
    first     the key of the first convolution's kernel, by which a file is known
    layers    for "resnet", by what our names begin with: templates of a convolution's name and of its norm's
    units     for "inception", by our name of a branch: theirs
    parts     there: their names of "conv" and "norm"
    head      the classifier's name
    suffixes  what stands for weight, bias and statistics
    block     what precedes the names of a non-local block: the `prefix` of `from_published`, and what this
              puts behind it; None: the code has networks without such blocks only
    no_weights, ending
              names, and endings of names, that hold something else than weights
    layouts   the `layout` that our network must have to compute what theirs does
    """

    network: str
    first: str
    head: str
    layers: dict[str, tuple[str, str]] | None = None
    units: dict[str, str] | None = None
    parts: tuple[str, str] = ("", "")
    suffixes: dict[str, str] | None = None
    block: tuple[str, str] | None = None
    no_weights: tuple[str, ...] = ()
    ending: tuple[str, ...] = (".num_batches_tracked",)
    layouts: tuple[str, ...] = ()


SCHEMES = {
    "caffe2": KeyScheme(
        "resnet",
        first="conv1_w",
        layers={
            "stem": ("conv1", "res_conv1_bn"),
            "shortcut": ("res{res}_{index}_branch1", "res{res}_{index}_branch1_bn"),
            "abc": ("res{res}_{index}_branch2{letter}", "res{res}_{index}_branch2{letter}_bn"),
        },
        head="pred",
        suffixes=_CAFFE2,
        block=("nonlocal_conv{res}_{index}_", ""),
        no_weights=("lr", "model_iter"),
        ending=("_momentum",),
        # SlowFast's zoo has files of Caffe2 too, of networks with other pools.
        layouts=("released", "slowfast"),
    ),
    "slowfast": KeyScheme(
        "resnet",
        first="s1.pathway0_stem.conv.weight",
        layers={
            "stem": ("s1.pathway0_stem.conv", "s1.pathway0_stem.bn"),
            "shortcut": ("s{res}.pathway0_res{index}.branch1", "s{res}.pathway0_res{index}.branch1_bn"),
            "abc": (
                "s{res}.pathway0_res{index}.branch2.{letter}",
                "s{res}.pathway0_res{index}.branch2.{letter}_bn",
            ),
        },
        head="head.projection",
        suffixes=_PYTORCH,
        block=("s{res}.pathway0_nonlocal{index}.", ""),
        layouts=("slowfast",),
    ),
    "pytorchvideo": KeyScheme(
        "resnet",
        first="blocks.0.conv.weight",
        layers={
            "stem": ("blocks.0.conv", "blocks.0.norm"),
            "shortcut": (
                "blocks.{block}.res_blocks.{index}.branch1_conv",
                "blocks.{block}.res_blocks.{index}.branch1_norm",
            ),
            "abc": (
                "blocks.{block}.res_blocks.{index}.branch2.conv_{letter}",
                "blocks.{block}.res_blocks.{index}.branch2.norm_{letter}",
            ),
        },
        head="blocks.6.proj",
        suffixes=_PYTORCH,
        layouts=("slowfast",),
    ),
    "mmaction2": KeyScheme(
        "resnet",
        first="backbone.conv1.conv.weight",
        layers={
            "stem": ("backbone.conv1.conv", "backbone.conv1.bn"),
            "shortcut": (
                "backbone.layer{layer}.{index}.downsample.conv",
                "backbone.layer{layer}.{index}.downsample.bn",
            ),
            "abc": (
                "backbone.layer{layer}.{index}.conv{number}.conv",
                "backbone.layer{layer}.{index}.conv{number}.bn",
            ),
        },
        head="cls_head.fc_cls",
        suffixes=_PYTORCH,
        block=("backbone.layer{layer}.{index}.", "non_local_block."),
        no_weights=("data_preprocessor.mean", "data_preprocessor.std"),
        layouts=("mmaction2",),
    ),
    "i3d_pytorch": KeyScheme(
        "inception",
        first="Conv3d_1a_7x7.conv3d.weight",
        units={
            "branch0": ".b0",
            "branch1.0": ".b1a",
            "branch1.1": ".b1b",
            "branch2.0": ".b2a",
            "branch2.1": ".b2b",
            "branch3.1": ".b3b",
        },
        parts=(".conv3d", ".bn"),
        head="logits.conv3d",
        suffixes=_PYTORCH,
    ),
    "i3d_tf": KeyScheme(
        "inception",
        first="Conv3d_1a_7x7/conv_3d/w",
        units={
            "branch0": "/Branch_0/Conv3d_0a_1x1",
            "branch1.0": "/Branch_1/Conv3d_0a_1x1",
            "branch1.1": "/Branch_1/Conv3d_0b_3x3",
            "branch2.0": "/Branch_2/Conv3d_0a_1x1",
            "branch2.1": "/Branch_2/Conv3d_0b_3x3",
            "branch3.1": "/Branch_3/Conv3d_0b_1x1",
        },
        parts=("/conv_3d", "/batch_norm"),
        head="Logits/Conv3d_0c_1x1/conv_3d",
        suffixes=_TENSORFLOW,
    ),
}
# One unit of the authors' network has another's name, as in its code.
_TF_MISNAMED = {"Mixed_5b/Branch_2/Conv3d_0b_3x3": "Mixed_5b/Branch_2/Conv3d_0a_3x3"}


def published_name(name: str, scheme: str) -> str | None:
    """The key that a published code has for a weight of ours; None where it has no place for it.

    name    of our `C2D`, `I3D` or `I3DInception`, as in its state_dict, but of no non-local block: theirs
            depend on the block's options, see `nlutils.exchange.to_published`
    scheme  one of `SCHEMES`; ValueError otherwise

    >>> published_name("stages.1.0.a.norm.running_var", "caffe2")
    'res3_0_branch2a_bn_riv'
    """
    keys = SCHEMES[one_of("scheme", scheme, SCHEMES)]
    layer, _, kind = name.rpartition(".")
    theirs = _resnet_layer(layer, keys) if keys.network == "resnet" else _inception_layer(layer, keys)
    suffix = keys.suffixes.get(f"norm.{kind}" if layer.endswith(".norm") else kind)
    if theirs is None or suffix is None:
        return None
    if scheme == "i3d_tf":
        for ours, released in _TF_MISNAMED.items():
            theirs = theirs.replace(ours, released)
    return theirs + suffix


def find_scheme(keys: Iterable[str], scheme: str | None = None) -> tuple[str, str]:
    """The scheme of these keys, and what stands before all its names ("module.", "RGB/inception_i3d/", "").

    `scheme` is the one that it must be; None: any. Raises ValueError when there is none.
    """
    allowed = SCHEMES if scheme is None else (one_of("scheme", scheme, SCHEMES),)
    keys = list(keys)
    for name in allowed:
        first = SCHEMES[name].first
        for key in keys:
            prefix = key.removesuffix(first)
            if key.endswith(first) and (not prefix or prefix[-1] in "./"):
                return name, prefix
    known = ", ".join(f"{SCHEMES[name].first} ({name})" for name in allowed)
    raise ValueError(
        f"none of the keys is that of a first convolution: {known}. There are {len(keys)} keys"
        + (f", such as {', '.join(keys[:3])}" if keys else "")
        + ". A state_dict of this package's own networks goes to model.load_state_dict"
    )


def block_names(state: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Our non-local blocks in the names of a state_dict: {"stages.1.3.non_local": (1, 3)}."""
    matches = filter(None, map(_NON_LOCAL.match, state))
    return {match[1]: (int(match[2]), int(match[3])) for match in matches}


def block_prefix(scheme: str, place: tuple[int, int]) -> tuple[str, str] | None:
    """The `prefix` of `from_published` for the block at this place, and what it adds; None: no blocks."""
    block = SCHEMES[scheme].block
    return block and (block[0].format(**_numbers(*place)), block[1])


def _numbers(stage, index):
    """The numbers that the codes give to a stage and its residual block; ours count from 0."""
    # In pytorchvideo, blocks.2 is the pooling behind res2.
    block = 1 if stage == 0 else stage + 2
    return {"res": stage + 2, "layer": stage + 1, "block": block, "index": index}


def _resnet_layer(layer, keys):
    if layer == "classifier":
        return keys.head
    if layer in ("stem.conv", "stem.norm"):
        return keys.layers["stem"][layer == "stem.norm"]
    match = _RESIDUAL.fullmatch(layer)
    if not match:
        return None
    stage, index, letter, part = match.groups()
    template = keys.layers["shortcut" if letter == "shortcut" else "abc"][part == "norm"]
    number = "abc".find(letter) + 1
    return template.format(**_numbers(int(stage), int(index)), letter=letter, number=number)


def _inception_layer(layer, keys):
    if layer == "logits":
        return keys.head
    match = _INCEPTION.fullmatch(layer)
    if not match:
        return None
    name, branch, part = match.groups()
    return name + (keys.units[branch] if branch else "") + keys.parts[part == "norm"]
