"""Every network that `create_model` knows: its size, its cost, the published files that it reads."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nlutils.exchange.checkpoints import PUBLISHED, CheckpointReport, PublishedFile, load_checkpoint
from nlutils.exchange.checkpoints.zoo import find_file
from nlutils.study.cost import multiply_adds, parameters
from nlutils.torch.models import (
    INPUT_CHANNELS,
    VideoClassifier,
    create_model,
    list_models,
    model_classes,
    model_options,
    model_title,
)

__all__ = ["ModelFacts", "load_published", "model_facts", "model_page", "models_table"]


@dataclass(frozen=True)
class ModelFacts:
    """What one network is and costs, and what can be loaded into it.

    classes        the classes, or objects, that it was counted with
    inputs         {kind: shape (C, T, H, W)} of a clip that the network was made for, as published where it
                   can be; of states, (T, objects, numbers)
    parameters     trained numbers
    multiply_adds  of one forward pass of that clip, convolutions and matrix products only; None where the
                   second stage of training has to come first
    expects        the recipe facts that travel with the network, one a kind of input, if there are any
    files          published checkpoints that it reads, each with the options of the network
    """

    name: str
    title: str
    classes: int
    inputs: dict[str, tuple[int, ...]]
    parameters: int
    multiply_adds: int | None
    expects: tuple
    files: tuple[PublishedFile, ...]


def model_facts(name: str, num_classes: int | None = None, **options) -> ModelFacts:
    """The facts of the network `create_model(name, num_classes, **options)`, counted without its memory.

    `num_classes` is `model_classes(name)` unless given. Errors as from `create_model`.
    """
    classes = model_classes(name) if num_classes is None else num_classes
    with torch.device("meta"):
        model = create_model(name, classes, **options)
    inputs = _inputs(model)
    x = tuple(torch.empty(1, *shape, device="meta") for shape in inputs.values())
    is_whole = not getattr(model, "second_stage", False)
    return ModelFacts(
        name=name,
        title=model_title(name),
        classes=classes,
        inputs=inputs,
        parameters=parameters(model),
        multiply_adds=multiply_adds(model, x[0] if len(x) == 1 else x) if is_whole else None,
        expects=_as_tuple(model.expects),
        files=tuple(file for file in PUBLISHED if file.network == name),
    )


def _inputs(model):
    """{kind: shape of one clip that the network is made for}."""
    if isinstance(model, VideoClassifier):
        kinds, shapes = _as_tuple(model.input), model.clip_shapes()
        return {kind: (INPUT_CHANNELS[kind], *shape) for kind, shape in zip(kinds, shapes, strict=True)}
    # The interaction network, no classifier: its dynamics look as many codes back as the largest offset, that
    # is 4 as published. Fewer would do for smaller ones.
    codes = max(4, *model.dynamics.offsets)
    if model.input == "states":
        return {"states": (codes, model.num_objects, model.encoder.in_features)}
    return {"rgb": (model.encoder.in_channels, codes + 2, 32, 32)}  # a code takes three frames


def _as_tuple(value):
    return value if isinstance(value, tuple) else () if value is None else (value,)


def models_table(names=None) -> str:
    """A line a network: name, what it is, weights, multiply-adds of one clip, that clip, published files."""
    rows = [("name", "what", "classes", "weights", "multiply-adds", "clip", "files")]
    for facts in map(model_facts, list_models() if names is None else names):
        counts = str(facts.classes), f"{facts.parameters:,}", _giga(facts)
        rows.append((facts.name, facts.title, *counts, _clip(facts), str(len(facts.files) or "")))
    return _columns(rows, right=(2, 3, 4, 6))


def model_page(name: str, num_classes: int | None = None, **options) -> str:
    """All that is known of one network: cost, recipe facts, options, and the files that it reads."""
    facts = model_facts(name, num_classes, **options)
    counts = f"{facts.parameters:,} weights with {facts.classes} classes; {_giga(facts)} multiply-adds"
    lines = [f"{name}: {facts.title}", f"  {counts} for {_clip(facts)}"]
    for kind, expected in zip(facts.inputs, facts.expects, strict=bool(facts.expects)):
        lines += [f"  {kind}: {_recipe_facts(expected)}", f"    {expected.source}"]
    chosen = model_options(name) | options
    listed = "options: " + ", ".join(f"{key}={value!r}" for key, value in chosen.items())
    lines += textwrap.wrap(listed, 100, initial_indent="  ", subsequent_indent="    ")
    if facts.files:
        lines.append(f"  published files that it reads ({len(facts.files)}):")
        lines += [f"    {file.address}\n      {file.call()}" for file in facts.files]
    else:
        lines.append("  no published file of it can be read")
    return "\n".join(lines)


def load_published(
    path, name: str | None = None, num_classes: int | None = None, options: Mapping | None = None
) -> CheckpointReport:
    """Load a published file into a new network; the report lists every name that either of them lacks.

    Without `name` the file's own name says which network with which options, if it is one of `PUBLISHED`;
    what is given here comes before that. Raises ValueError for a file of an unknown name without `name`, and
    as `nlutils.exchange.load_checkpoint` does.
    """
    file = find_file(Path(path).name)
    if file is None and name is None:
        raise ValueError(
            f"{Path(path).name} is the name of no published file, or of several; say which network it is "
            f"for: nlutils models NAME --load {path}"
        )
    told = dict(file.options) if file is not None and name in (None, file.network) else {}
    told |= dict(options or {})
    known = file.num_classes if file is not None else 400
    return load_checkpoint(
        path, create_model(name or file.network, num_classes or known, **told), report=None
    )


def _giga(facts):
    return "after fit" if facts.multiply_adds is None else f"{facts.multiply_adds / 1e9:.3f} G"


def _clip(facts):
    return " + ".join(f"{kind} {' x '.join(map(str, shape))}" for kind, shape in facts.inputs.items())


def _recipe_facts(expected):
    height, width = expected.size
    frames = "1 frame" if expected.frames == 1 else f"{expected.frames} frames, {_every(expected.stride)}"
    said = [frames, f"{height} x {width}", expected.colour or None]
    said += [f"mean {_numbers(expected.mean)}", f"std {_numbers(expected.std)}"]
    said.append(None if expected.clip is None else f"cut off at {expected.clip:g} pixels first")
    return "; ".join(part for part in said if part)


def _every(stride):
    return "one after the other" if stride == 1 else f"{stride} apart"


def _numbers(values):
    values = values if len(set(values)) > 1 else values[:1]
    return ", ".join(f"{value:.4g}" for value in values)


def _columns(rows, right):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
