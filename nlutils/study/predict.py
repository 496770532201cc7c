"""One clip, one trained network: class probabilities, and what its non-local blocks look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from nlutils.instantiations import POOL_WINDOW, SOFTMAX_FORMS
from nlutils.positions import check_queries
from nlutils.study.arithmetic import autocast
from nlutils.study.evaluate import evaluate
from nlutils.study.fold import best_device
from nlutils.study.inputs import RGB_MEAN, RGB_STD, Inputs, prepare
from nlutils.study.recipe import Recipe
from nlutils.study.weights import find_kept, kept_weights
from nlutils.torch.attention import attention_rows
from nlutils.torch.blocks import NonLocalBlock
from nlutils.torch.controls import UniformBlock, WindowBlock
from nlutils.video.clips import Clip, ClipSet
from nlutils.video.decoding import read_cached
from nlutils.video.labels import SIZE

__all__ = ["Attention", "Prediction", "draw_prediction", "predict"]

ONE = torch.tensor([0])  # the only clip of the inputs
EVEN = 1.05  # below this largest weight, in units of the even share, no place is worth naming


@dataclass(frozen=True)
class Attention:
    """What one non-local block looks at from Q places.

    block          its name in the network, such as "features.7"
    instantiation  its form; with the two softmax forms a row's weights sum to 1
    size           (T', H', W') of the map that it sees
    window         (1, 2, 2) cells of that map to a key where it sub-samples, else (1, 1, 1)
    cells          the Q places that look, as (t, h, w) in the map
    rows           float32 (Q, T', H'', W''): f(x_i, x_j) / C on the grid of the keys
    """

    block: str
    instantiation: str
    size: tuple[int, int, int]
    window: tuple[int, int, int]
    cells: tuple[tuple[int, int, int], ...]
    rows: np.ndarray

    def on_frames(self, steps: int, height: int, width: int) -> np.ndarray:
        """The rows on the grid of the clip, float32 (Q, steps, height, width), times the number of keys.

        1 is then the even share. A pixel has the weight of the key that its cell is pooled into; NaN where it
        is pooled into none, which happens at the lower and right edge of a map of odd sides.
        """
        keys = self.rows.shape[1:]
        weights, inside = self.rows * np.prod(keys), np.ones((), bool)
        for axis, (pixels, cells, window) in enumerate(
            zip((steps, height, width), self.size, self.window, strict=True)
        ):
            key = np.arange(pixels) * cells // pixels // window
            inside = inside[..., None] & (key < keys[axis])
            weights = weights.take(np.minimum(key, keys[axis] - 1), axis=axis + 1)
        return np.where(inside, weights, np.nan).astype(np.float32)


@dataclass(frozen=True)
class Prediction:
    """What a trained network says of one clip.

    model          the network's name; `run` is the recorded run that trained it, STUDY/RUN
    clip           the clip's name
    probabilities  float64, one for each of `classes`, in their order
    frames         uint8 (T, H, W, 3): the crop and the steps that the network sees
    queries        Q places (step, row, column) in `frames`
    attention      one record a non-local block, in the order in which the clip passes them
    """

    model: str
    run: str
    clip: str
    classes: tuple[str, ...]
    probabilities: np.ndarray
    frames: np.ndarray
    queries: tuple[tuple[int, int, int], ...]
    attention: tuple[Attention, ...]

    def ranked(self) -> list[tuple[str, float]]:
        """(class, probability), the most probable first."""
        order = np.argsort(-self.probabilities, kind="stable")
        return [(self.classes[i], float(self.probabilities[i])) for i in order]


def predict(model, clip, *, queries: Sequence[Sequence[int]] | None = None, device=None) -> Prediction:
    """Classify one clip with trained weights, prepared as the study that trained them prepares its clips.

    model    "STUDY/RUN", a run whose weights were kept, or the path of such a file (see `kept_weights`)
    clip     the path of a video file; or frames, uint8 (T, H, W, 3); or a `nlutils.video.Clip`
    queries  places (step, row, column) in the frames that the network sees, negative ones from the end;
             by default the place that moves most in the middle step, optical flow averaged over 5 x 5 pixels
             (the centre where nothing moves). A block looks from the cell of its map that holds the place
    device   the GPU when there is one, by default

    On a CPU the sums are done in float32, whatever the training's precision. Blocks whose maps are shown are
    `NonLocalBlock`s over time, height and width; controls in their place have no map. Raises
    FileNotFoundError for weights that were not kept, ClipError for a file that cannot be decoded, ValueError
    for anything else that cannot be used: a clip of one frame, a query outside the frames.
    """
    network, kept = kept_weights(find_kept(model))
    recipe = Recipe(**kept["recipe"])
    device = torch.device(device) if device is not None else best_device()
    if device.type == "cpu":
        recipe = recipe.replace(precision="float32")
    if queries is not None:
        queries = check_queries(queries, (recipe.frames, *recipe.size))
    clip = _opened(clip)
    one = ClipSet(clip.name, tuple(kept["classes"]), (clip,), clip.name)
    inputs = prepare(one, recipe.frames, recipe.resize).to(device)
    network = network.to(device)
    scores = evaluate(network, inputs, ONE, recipe)[0]
    if queries is None:
        queries = [_most_motion(inputs, recipe)]
    return Prediction(
        model=kept["model"],
        run=f"{kept['study']}/{kept['run']}",
        clip=clip.name,
        classes=one.classes,
        probabilities=scores.double().softmax(0).numpy(),
        frames=_seen(inputs, recipe),
        queries=tuple(queries),
        attention=tuple(_attention(network, inputs, recipe, queries)),
    )


def _opened(clip) -> Clip:
    """The clip with its frames read, once; ValueError where they are no clip."""
    if isinstance(clip, np.ndarray):
        name, frames = "clip", clip
    elif isinstance(clip, Clip):
        name, frames = clip.name, clip.frames()
    else:
        name, frames = Path(clip).name, read_cached(clip, SIZE)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(
            f"{name}: frames of {frames.dtype} and shape {frames.shape}; they must be uint8 (T, H, W, 3)"
        )
    if len(frames) < 2:
        raise ValueError(f"{name}: {len(frames)} frame is a picture, no clip; motion needs two or more")
    return Clip(name, 0, "", 0, lambda: frames)


def _most_motion(inputs: Inputs, recipe: Recipe) -> tuple[int, int, int]:
    """The place in the middle step whose surroundings move fastest; the centre where nothing moves."""
    step = recipe.frames // 2
    flow = inputs.batch("flow", ONE, recipe.size, time=recipe.time)[0, :, step].cpu().numpy()
    speed = cv2.blur(np.hypot(*flow), (5, 5))
    if speed.max() == 0:
        return (step, recipe.size[0] // 2, recipe.size[1] // 2)
    return (step, *map(int, np.unravel_index(speed.argmax(), speed.shape)))


def _seen(inputs: Inputs, recipe: Recipe) -> np.ndarray:
    """The frames as the network gets them, uint8 (T, H, W, 3)."""
    x = inputs.batch("rgb", ONE, recipe.size, time=recipe.time)[0].cpu()
    return ((x * RGB_STD + RGB_MEAN) * 255).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


@torch.no_grad()
def _attention(network, inputs, recipe, queries):
    """A record for each block that has a map of the clip, in the order in which the clip passes them."""
    names = {
        block: name
        for name, block in network.named_modules()
        if isinstance(block, NonLocalBlock) and not isinstance(block, UniformBlock | WindowBlock)
    }
    seen = {}

    def remember(block, arguments):
        seen[block] = arguments[0].float()

    hooks = [block.register_forward_pre_hook(remember) for block in names if block.ndim == 3]
    try:
        with autocast(recipe, inputs.frames.device):
            network(inputs.batch(network.input, ONE, recipe.size, time=recipe.time))
    finally:
        for hook in hooks:
            hook.remove()
    clip = np.array([recipe.frames, *recipe.size])
    for block, x in seen.items():
        size = tuple(x.shape[2:])
        cells = tuple(tuple((np.array(query) * size // clip).tolist()) for query in queries)
        pooled = POOL_WINDOW[3] if block.subsample else (1, 1, 1)
        yield Attention(
            block=names[block],
            instantiation=block.instantiation,
            size=size,
            window=tuple(map(min, pooled, size)),
            cells=cells,
            rows=attention_rows(block, x, cells)[0].cpu().numpy(),
        )


def draw_prediction(prediction: Prediction):
    """(figure, alternative text): the frames, and a row for each block and query with what it looks at.

    Raises ValueError for a network without a block that has a map.
    """
    from nlutils.plots import AttentionMap, attention_picture

    if not prediction.attention:
        raise ValueError(f"{prediction.model} has no block with a map of pairs of places to draw")
    clip = prediction.frames.shape[:3]
    maps, said = [], []
    for attention in prediction.attention:
        weights = attention.on_frames(*clip)
        for query, cell, row in zip(prediction.queries, attention.cells, weights, strict=True):
            shares = attention.instantiation in SOFTMAX_FORMS
            place = _box(attention, cell, query, clip)
            maps.append(AttentionMap(_title(attention, query), row, place, shares))
            said.append(_described(attention, query, row))
    best, probability = prediction.ranked()[0]
    title = f"{prediction.clip}: {best}, {100 * probability:.0f} %, by {prediction.run}"
    return attention_picture(prediction.frames, maps, title=title), f"{title}. {' '.join(said)}"


def _title(attention, query):
    size = " x ".join(map(str, attention.size))
    step, row, column = query
    said = f"block {attention.block} ({size}): what step {step}, row {row}, column {column} looks at"
    return f"{said}, in % of its attention" if attention.instantiation in SOFTMAX_FORMS else said


def _box(attention, cell, query, clip):
    """(step, top, left, height, width) of the query's cell, in pixels."""
    height, width = (side / cells for side, cells in zip(clip[1:], attention.size[1:], strict=True))
    return query[0], cell[1] * height, cell[2] * width, height, width


def _described(attention, query, weights):
    step, row, column = np.unravel_index(np.nanargmax(weights), weights.shape)
    largest = weights[step, row, column]
    said = (
        f"Block {attention.block} looks from step {query[0]}, row {query[1]}, column {query[2]} most at "
        f"step {step}, row {row}, column {column}, "
    )
    if attention.instantiation not in SOFTMAX_FORMS:
        return f"{said}where f is {largest:.2g}."
    if largest < EVEN:
        return (
            f"Block {attention.block} looks from step {query[0]}, row {query[1]}, column {query[2]} at all "
            f"places alike, at none with more than {largest:.2f} times the even share."
        )
    of_map = np.arange(len(weights)) * attention.size[0] // len(weights)  # a frame's step in the map
    own = np.nansum(weights[of_map == of_map[query[0]]]) / np.nansum(weights)
    return (
        f"{said}{largest:.1f} times the even share; its own step of the map gets {100 * own:.0f} % of the "
        "attention."
    )
