"""Where a network's first weights come from, as `Recipe.init` says.

| init         | the weights                                                                               |
|--------------|-------------------------------------------------------------------------------------------|
| ""           | are drawn                                                                                 |
| "procedural" | were learnt on procedural clips by the same recipe, see `nlutils.study.pretraining`        |
| "inflated"   | were learnt by `frame_average` on the same training clips, by the same recipe, and        |
|              | inflated: for `c3d_small` and its relatives                                               |
| a file       | of `keep_weights`: of this network, or of one whose inflation it is (Carreira and         |
|              | Zisserman, CVPR 2017, section 2.4): `frame_average` into `c3d_small`, `c2d` into `i3d`    |
|              | published, of `c2d`, `i3d` or `i3d_inception`: what `nlutils.exchange.load_checkpoint`    |
|              | reads, but for TensorFlow's; kernels of one frame are inflated                            |
|              | a ResNet of images by the names of torchvision and timm, into `c2d` or inflated into `i3d`|

A file's path starts at the project's root, and `{fold}` and `{seed}` in it become those of the run:
"data/results/core8/weights/frame_average-fold{fold}-seed{seed}.pt". A classifier of other classes is left as
drawn, and so are blocks that a file lacks as a whole; whatever else is missing or too much is an error, and
so is a block of another kind. Layers that a block has moved, as in `c3d_small_non_local`, are found.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nlutils.exchange.checkpoints import (
    SCHEMES,
    find_scheme,
    load_checkpoint,
    published_name,
    read_checkpoint,
)
from nlutils.exchange.checkpoints.reading import numbers
from nlutils.paths import project_root
from nlutils.study import distributed
from nlutils.study.inputs import Inputs
from nlutils.study.pretraining import FLAT, OWN_CLIPS, check_other_clips, pretrain, pretrain_flat
from nlutils.study.recipe import Recipe
from nlutils.study.train import BLOCKS
from nlutils.study.weights import read_kept
from nlutils.torch.inflation import inflate_kernel, inflate_weights, resnet_names
from nlutils.torch.models import create_model, model_options
from nlutils.torch.models.resnet import C2D
from nlutils.torch.models.small import C3DSmall
from nlutils.video.cache import file_digest

__all__ = ["Start", "begin", "check_start", "start_digest", "start_path"]

PROCEDURAL, INFLATED = "procedural", "inflated"


@dataclass(frozen=True)
class Start:
    """What a run started from: `record` is `Run.start`; `seen` are labelled clips that the weights know.

    record  {} for drawn weights; else its "kind", what identifies the weights ("digest", or "file" and
            "sha256"), and "drawn", the modules that were left as drawn
    seen    (data set, clip, group) of each
    """

    record: dict
    seen: tuple[tuple[str, str, str], ...] = ()


def start_path(recipe: Recipe, fold) -> Path | None:
    """The file that a run of `recipe` on `fold` starts from; None when it is none. It need not exist."""
    if recipe.init in ("", PROCEDURAL, INFLATED):
        return None
    folds = "+".join(map(str, [fold] if isinstance(fold, int) else fold))
    named = recipe.init.replace("{fold}", folds).replace("{seed}", str(recipe.seed))
    return (project_root() / Path(named).expanduser()).resolve()


def start_digest(recipe: Recipe, fold) -> str:
    """The SHA-256 of the file that a run starts from: what `Recipe.settings` do not tell.

    "" when no file is named: other weights follow from the settings and the code. Raises
    FileNotFoundError when the file is not there.
    """
    path = start_path(recipe, fold)
    return "" if path is None else file_digest(_existing(path, recipe))


def check_start(model, name: str, recipe: Recipe, inputs: Inputs | None = None) -> None:
    """ValueError for first weights that the network `name` has no use for, or that know `inputs`.

    That is a network that is only fitted, one that inflates none, and the procedural clips of the seed of
    `pretraining`. Files are read by `begin`.
    """
    if recipe.init and not model.trains:
        raise ValueError(
            f"init={recipe.init!r}: {name} is fitted to all training clips at once, and has no first "
            "weights; leave init out"
        )
    if recipe.init == INFLATED and not isinstance(model, C3DSmall):
        raise ValueError(
            f"init={recipe.init!r}: {name} does not inflate {FLAT}; c3d_small and its relatives do, "
            "and others take a file"
        )
    if recipe.init == PROCEDURAL and inputs is not None:
        check_other_clips(inputs)


def begin(
    model, name: str, options: Mapping, recipe: Recipe, inputs: Inputs, fold, *, progress=False
) -> Start:
    """Write the first weights into `model`, the drawn network `name` for the classes of `inputs`, in place.

    Raises FileNotFoundError when `recipe.init` names no file; ValueError for a file that no weights are read
    from or whose weights do not fit, naming those that are missing or too much, and for weights that were
    trained on clips, or on sources of clips, that are tested in `fold`; and as `check_start` does.
    """
    check_start(model, name, recipe, inputs)
    if recipe.init == "":
        return Start({})
    changing, device = _classifier(name, options), next(model.parameters()).device
    if recipe.init == INFLATED:
        flat = {key: value for key, value in options.items() if key in model_options(FLAT)}
        weights, record = pretrain_flat(flat, recipe, inputs, fold, device, progress)
        done = inflate_weights(weights, model, rename=model.place_of, report=None)
        drawn = _left_as_drawn(model, _read_as(INFLATED, done, {}), changing)
        return Start({**record, "inflated": len(done.inflated), "drawn": drawn})
    if recipe.init == PROCEDURAL:
        weights, record = pretrain(name, dict(options), recipe, device, progress)
        _write(model, {key: value for key, value in weights.items() if key not in changing})
        return Start({**record, "drawn": _modules(changing)}, (OWN_CLIPS,))
    path = start_path(recipe, fold)
    sha256 = file_digest(_existing(path, recipe))
    distributed.agree(f"bytes in {path.name}", sha256)
    try:
        read = _read_file(path, model, changing, inputs, fold)
        drawn = _left_as_drawn(model, read, changing)
        _check_finite(model)
    except ValueError as error:
        # What `inflate_weights` advises, behind the semicolon, are arguments that it alone has.
        cause = re.sub(r"; (skip|\.\.; rename)=.*", "", str(error))
        raise ValueError(f"init={recipe.init!r}: {path.name} cannot start {name}: {cause}") from error
    record = {"kind": read.kind, "file": path.name, "sha256": sha256, **read.facts, "drawn": drawn}
    return Start(record, read.seen)


@dataclass(frozen=True)
class _Read:
    """What was done with a file: names of the model that it lacks, names that it has too much."""

    kind: str
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    skipped: tuple[str, ...]
    facts: dict
    seen: tuple = ()


def _existing(path, recipe) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"init={recipe.init!r} is none of '', {PROCEDURAL!r} and {INFLATED!r}, and there is no file "
            f"{path}; relative paths start at the project's root"
        )
    return path


def _read_file(path, model, changing, inputs, fold) -> _Read:
    kept = read_kept(path)
    if kept is not None:
        return _read_kept(kept, model, changing, inputs, fold)
    weights = read_checkpoint(path).weights
    images = _resnet_of_images(weights)
    if images is not None:
        return _read_images(images, model, changing)
    return _read_published(weights, model, changing)


def _read_kept(kept, model, changing, inputs, fold) -> _Read:
    """Weights that the study kept, of the same network or of one that the network inflates."""
    if kept.get("seen") is None:
        raise ValueError("it does not say which clips its weights were trained on; keep them anew")
    seen = tuple(map(tuple, kept["seen"]))
    _check_unseen(seen, inputs, fold)
    given = {name: value for name, value in kept["weights"].items() if torch.is_tensor(value)}
    same_classes = list(kept["classes"]) == list(inputs.classes)
    done = inflate_weights(
        given,
        model,
        rename=_renaming(kept, model),
        skip=() if same_classes else changing,
        report=None,
    )
    facts = {key: kept[key] for key in ("study", "run", "model", "options")}
    return _read_as("kept", done, facts, seen)


def _renaming(kept, model):
    """The model's name of a weight of the network that was kept; ValueError where their blocks differ.

    `C3DSmall` says where the layers of `FrameAverage` are in it. In a sequence with blocks, layers are told
    by their number without the blocks, and a block by that of the layer before it.
    """
    moved, here = {}, dict(model.named_modules())

    def move(name):
        head = next((part for part in _parents(name) if part in moved), "")
        return moved.get(head, "") + name[len(head) :]

    for path, theirs in _network_of(kept).named_modules():
        place = move(f"{path}.").removesuffix(".")
        ours = here.get(place)
        if isinstance(theirs, BLOCKS):
            _check_same_kind(path, theirs, ours)
        if isinstance(theirs, nn.Sequential) and isinstance(ours, nn.Sequential):
            places = {key: number for number, key in _keys(ours)}
            for number, key in _keys(theirs):
                moved[f"{path}.{number}"] = f"{place}.{places.get(key, number)}"
    place_of = getattr(model, "place_of", move)
    return lambda name: move(name) if move(name) != name else place_of(name)


def _check_same_kind(path, theirs, ours):
    kind = type(theirs).__name__
    if not isinstance(ours, BLOCKS):
        raise ValueError(f"it has too much: {path}, a {kind}; give the network such a block")
    if type(theirs) is not type(ours):
        raise ValueError(f"its {path} is a {kind}, that of the network a {type(ours).__name__}")


def _network_of(kept):
    """The network that was kept, without numbers."""
    try:
        with torch.device("meta"):
            return create_model(kept["model"], len(kept["classes"]), **kept["options"])
    except TypeError as error:
        raise ValueError(f"its network cannot be made: {error}") from error


def _keys(sequence):
    """(place, key) of each layer: how many layers without the blocks are before it, and whether it is one."""
    count = 0
    for place, layer in enumerate(sequence):
        block = isinstance(layer, BLOCKS)
        yield place, (count, block)
        count += not block


def _parents(name):
    """ "a.b.c" of "a.b.c.d", then "a.b", then "a"."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _read_images(weights, model, changing) -> _Read:
    """ImageNet weights by torchvision's names; on flow the first kernels get the mean over the colours."""
    if not isinstance(model, C2D):
        raise ValueError(
            f"it holds a ResNet of images, which goes into c2d and i3d, not into a {type(model).__name__}"
        )
    fits = _has_size(weights.get("fc.bias"), model.classifier.bias)
    done = inflate_weights(
        weights,
        model,
        rename=resnet_names,
        skip=() if fits else changing,
        mean_inputs=["stem.conv"],
        report=None,
    )
    return _read_as("images", done, {"averaged": list(done.averaged)})


def _read_as(kind, done, facts, seen=()) -> _Read:
    facts = {**facts, "inflated": len(done.inflated)}
    return _Read(kind, done.missing, done.unused, done.skipped, facts, seen)


def _read_published(weights, model, changing) -> _Read:
    scheme, prefix = find_scheme(weights)
    ours = model.state_dict()
    fits = all(
        _has_size(weights.get(f"{prefix}{published_name(name, scheme)}"), ours[name])
        for name in changing
        if name.endswith("bias")
    )
    inflated = _inflated(weights, model, scheme, prefix)
    done = load_checkpoint({**weights, **inflated}, model, scheme=scheme, classifier=fits, report=None)
    facts = {"scheme": scheme, "notes": list(done.notes), "inflated": len(inflated)}
    return _Read("published", done.missing, done.unexpected, done.skipped, facts)


def _inflated(weights, model, scheme, prefix) -> dict:
    """The kernels of one frame, by the file's names, that have more frames in the model."""
    if SCHEMES[scheme].network != "resnet":
        return {}
    made = {}
    for name, ours in model.state_dict().items():
        key = f"{prefix}{published_name(name, scheme)}"
        if key not in weights or ours.ndim != 5 or ours.shape[2] == 1:
            continue
        kernel = torch.tensor(numbers(weights[key], key))
        if kernel.ndim == 4 or kernel.shape[2] == 1:
            made[key] = inflate_kernel(kernel, ours.shape[2])
    return made


def _resnet_of_images(weights) -> dict | None:
    """The weights by torchvision's names, without what wrappers put before them; None: others."""
    first = "layer1.0.conv1.weight"
    for key in weights:
        prefix = key.removesuffix(first)
        if key.endswith(first) and f"{prefix}conv1.weight" in weights:
            return {
                name.removeprefix(prefix): torch.tensor(numbers(value, name))
                for name, value in weights.items()
            }
    return None


def _has_size(bias, ours) -> bool:
    return bias is not None and tuple(bias.shape) == tuple(ours.shape)


def _classifier(name, options) -> tuple[str, ...]:
    """The names of the weights whose shape follows the number of classes."""
    with torch.device("meta"):
        two, three = (create_model(name, classes, **options).state_dict() for classes in (2, 3))
    return tuple(
        key for key, value in two.items() if torch.is_tensor(value) and value.shape != three[key].shape
    )


def _left_as_drawn(model, read, changing) -> list[str]:
    """The modules that the file has no weights for, and need none; ValueError names what it should have."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, BLOCKS)]
    weights = [name for name, _ in model.named_parameters()]
    absent = [
        block
        for block in blocks
        if all(name in read.missing for name in weights if name.startswith(f"{block}."))
    ]
    # The classifier may be skipped, or the file may end before it; a second stage is fitted anew.
    left = (*(f"{block}." for block in absent), *changing)
    missing = [
        name for name in read.missing if not name.startswith(left) and not name.endswith("_extra_state")
    ]
    faults = [
        f"{what}: {', '.join(names)}"
        for what, names in (("it lacks", missing), ("it has too much", read.unused))
        if names
    ]
    if faults:
        raise ValueError("; ".join(faults))
    drawn = [name for name in changing if name in (*read.skipped, *read.missing)]
    return [*_modules(drawn), *absent]


def _modules(names) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _check_unseen(seen, inputs, fold):
    """ValueError when a clip that is tested, or one of its source, was trained on."""
    if OWN_CLIPS in seen:
        check_other_clips(inputs)
    _, test_on = inputs.split(fold)
    test_on = test_on.tolist()
    names = {inputs.names[i] for i in test_on} & {name for _, name, _ in seen}
    groups = {(inputs.name, inputs.groups[i]) for i in test_on} & {(data, group) for data, _, group in seen}
    if names or groups:
        shared = sorted(names) or sorted(group for _, group in groups)
        raise ValueError(
            f"it was trained on {shared[0]!r} and {len(shared) - 1} more that fold {fold} of {inputs.name} "
            "tests; take the file of a run that left this fold out, by {fold} in init"
        )


def _check_finite(model):
    for name, value in model.state_dict().items():
        if torch.is_tensor(value) and not torch.isfinite(value).all():
            raise ValueError(f"its numbers for {name} are not finite")


@torch.no_grad()
def _write(model, weights):
    state = model.state_dict()
    for name, value in weights.items():
        state[name].copy_(value)
