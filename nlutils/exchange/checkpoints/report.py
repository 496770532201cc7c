"""What became of the weights of a checkpoint, in words."""

from collections import Counter
from dataclasses import dataclass

from nlutils.exchange.checkpoints.key_schemes import SCHEMES, block_names
from nlutils.exchange.checkpoints.zoo import find_file

__all__ = ["CheckpointReport", "notes"]

# What mmaction2's C2D has beside its names, which are those of mmaction2's I3D.
_MMACTION2_C2D = (
    'kernels are 2D, as of mmaction2\'s C2D: made for clips of 8x8 or 16x4, clip="8x8", and frames with '
    "mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)"
)


@dataclass(frozen=True)
class CheckpointReport:
    """What `load_checkpoint` did with each name; printed, a few lines.

    scheme      whose names the file has, one of `SCHEMES`
    source      the file's name, or "a dict"
    loaded      our names of the weights that were read
    assumed     our names of those that the published code does not have, and what follows from that was
                written: a gain 1, a bias 0, statistics under which a norm is a scale and a shift
    missing     are in the model but not in the file, and were left as they were
    unexpected  are in the file but not in the model, by the file's names
    ignored     are no weights: momentum, the number of the iteration, settings
    skipped     are of the last layer, and were left as they were because of classifier=False
    notes       what the weights do not tell: which `layout` they are for
    """

    scheme: str
    source: str
    loaded: tuple[str, ...]
    assumed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {len(self.loaded)} weights loaded, by the names of {self.scheme}",
            *self.notes,
        ]
        for what, names in (
            ("that the published code does not have, set so that they change nothing", self.assumed),
            ("in the model but not in the file, left as they were", self.missing),
            ("in the file but not in the model", self.unexpected),
            ("of the last layer, left as they were", self.skipped),
        ):
            lines += [f"{len(names)} {what}: {', '.join(_together(names))}"] if names else []
        if self.ignored:
            lines.append(f"{len(self.ignored)} are no weights: {', '.join(_counted(self.ignored))}")
        return "\n".join(lines)


def notes(scheme: str, source: str, found: dict, model, *, frozen: bool) -> tuple[str, ...]:
    """What a reader must know of this file, and where the model is another network with the same weights.

    found   the file's weights by name; frozen: its norms have no statistics
    """
    file, layouts, said = find_file(source), SCHEMES[scheme].layouts, []
    if scheme == "mmaction2" and len(found[SCHEMES[scheme].first].shape) == 4:
        layouts = ("released",)
        said.append(_MMACTION2_C2D)
    if file is not None:
        layouts = (file.options["layout"],) if "layout" in file.options else ()
        said.append(f"made for {file.call()}")
    elif layouts:
        said.append(f"made for {_either(layouts)}")
    said += _differences(layouts, file, model)
    if frozen:
        said.append(
            "its norms are frozen, a scale and a shift: keep them in evaluation mode. Networks of this kind, "
            "for 128x1 and 32x4, look at groups of four frames in the blocks of res3"
        )
        said += [
            f'the model\'s {name} looks at {block.frames_per_group or "all"} frames; clip="32x4" or "128x1" '
            "makes groups of four"
            for name, (stage, _) in block_names(model.state_dict()).items()
            if stage == 1 and (block := model.get_submodule(name)).frames_per_group != 4
        ]
    return tuple(said)


def _differences(layouts, file, model):
    """Where the model computes something else with these weights, though all of them fit."""
    said, layout = [], getattr(model, "layout", None)
    if layouts and layout is not None and layout not in layouts:
        said.append(
            f'the model has layout="{layout}", other pools than the network that was trained: its features '
            f"are shifted. Make it with {_either(layouts)}"
        )
    clip = file.options.get("clip") if file is not None else None
    if clip is not None:
        stride = 2 if clip in ("32x2", "128x1") else 1
        if model.stem.conv.stride[0] != stride:
            said.append(
                f"the model's conv1 has stride {model.stem.conv.stride[0]} over time, that of the network "
                f'that was trained {stride}. Make it with clip="{clip}"'
            )
    return said


def _either(layouts):
    return " or ".join(f'layout="{layout}"' for layout in layouts)


def _together(names):
    """Names that differ in their last part only, as one: "classifier.{weight, bias}", "pred_{w, b}"."""
    layers = {}
    for name in names:
        parts = name.rpartition("." if "." in name else "/" if "/" in name else "_")
        layers.setdefault("".join(parts[:2]), []).append(parts[2])
    for layer, kinds in layers.items():
        yield layer + (kinds[0] if len(kinds) == 1 else f"{{{', '.join(kinds)}}}")


def _counted(names):
    """Names of which there are many with one ending, as a number of them."""
    endings = [ending for keys in SCHEMES.values() for ending in keys.ending]
    counts = Counter(next((f"*{end}" for end in endings if name.endswith(end)), name) for name in names)
    return [name if count == 1 and name[0] != "*" else f"{count} {name}" for name, count in counts.items()]
