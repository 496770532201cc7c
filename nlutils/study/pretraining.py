"""Weights learnt before a run, kept in the cache: on procedural clips, or by a 2D network to be inflated."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nlutils.paths import atomic_path, cache_root
from nlutils.study import distributed
from nlutils.study.inputs import Inputs, prepare
from nlutils.study.provenance import provenance
from nlutils.study.recipe import Recipe
from nlutils.study.stopwatch import Stopwatch
from nlutils.study.train import seeded, train
from nlutils.torch.models import create_model
from nlutils.video.catalogue import open_clips

__all__ = ["OWN_CLIPS", "check_other_clips", "pretrain", "pretrain_flat", "pretraining_recipe"]

# 1,200 clips with their flow take 70 s of one core the first time, 35 s with the flow from the cache, which
# holds 100 MB of it. Six epochs are 450 steps, about as many as the 24 epochs on core8 that follow.
CLIPS, EPOCHS = 1200, 6
# Seconds after which a process that waits for another one listens to signals.
ATTENTION = 0.5
# In epochs of five times as many steps as those on core8.
MOST_WARMUP = 1
# The 2D network that small 3D networks inflate.
FLAT = "frame_average"
# Other clips than those of the seed 0, on which procedural studies test.
SEED = 1
# What weights that were trained on them say that they have seen: (data set, clip, group).
OWN_CLIPS = (f"all procedural clips of seed {SEED}", "", "")


def pretraining_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the training on procedural clips that precedes `recipe`.

    It is the same but for the number of epochs, a warmup of one epoch at most, and what is of the test.
    """
    return recipe.replace(init="", epochs=EPOCHS, warmup=min(recipe.warmup, MOST_WARMUP), test_flip=False)


def check_other_clips(inputs: Inputs) -> None:
    """ValueError where `inputs` are of the actions and the seed that `pretrain` trains on.

    They are told by name and seed: in another size they are other pixels of the same scenes.
    """
    own = open_clips("procedural", count=CLIPS, seed=SEED)
    # Both sources end with their seed.
    if (inputs.name, _last_word(inputs.source)) == (own.name, _last_word(own.source)):
        raise ValueError(
            f"weights learnt on procedural clips know the clips that are tested: {inputs.source!r} has the "
            f"seed of that training, {SEED}; open the clips with another seed"
        )


def _last_word(source):
    return source.rpartition(", ")[2]


@dataclass(frozen=True)
class _Lesson:
    """A training whose weights are kept under the digest of all that they depend on, the code included.

    told   what tells its clips from others
    clips  makes them: inputs, and the indices of those that are trained on
    facts  what is recorded of it, besides what all trainings record
    """

    name: str
    options: dict
    recipe: Recipe
    told: list
    clips: Callable[[], tuple[Inputs, torch.Tensor]]
    facts: dict


def pretrain(name: str, options: dict, recipe: Recipe, device, progress: bool = False) -> tuple[dict, dict]:
    """(weights by name, what is recorded of them) of the network `name` trained on procedural clips.

    The clips are `CLIPS` of the six actions of `nlutils.video.procedural`, as many frames of the size that
    `recipe` says, their flow estimated as that of real clips. Nothing of it depends on a fold: the weights
    are made once and kept in the cache.

    Several processes may ask for the same: one makes it, the others wait. A killed one leaves a checkpoint
    after its last full epoch, and the next goes on there. Processes that train together
    (`nlutils.study.distributed`) make it together.
    """
    recipe = pretraining_recipe(recipe)
    own = open_clips("procedural", count=CLIPS, frames=recipe.frames + 1, size=recipe.resize, seed=SEED)

    def clips():
        with torch.device("meta"):
            kinds = create_model(name, 2, **options).input
        with distributed.machine_first():
            inputs = prepare(own, recipe.frames, recipe.resize, flow="flow" in kinds)
        return inputs, torch.arange(len(inputs))

    facts = {"kind": "procedural", "source": own.source}
    return _learnt(_Lesson(name, options, recipe, [CLIPS, SEED], clips, facts), device, progress)


def pretrain_flat(
    options: dict, recipe: Recipe, inputs: Inputs, fold, device, progress: bool = False
) -> tuple[dict, dict]:
    """(weights by name, what is recorded of them) of `frame_average`, trained on all folds but `fold`.

    The recipe is that of the run which they are for, without what is of the test. Kept in the cache as the
    weights of `pretrain` are.
    """
    recipe = recipe.replace(init="", test_flip=False)
    lesson = _Lesson(
        FLAT,
        options,
        recipe,
        [inputs.digest, fold],
        lambda: (inputs, inputs.split(fold)[0]),
        {"kind": "inflated", "source": inputs.source},
    )
    return _learnt(lesson, device, progress)


def _learnt(lesson: _Lesson, device, progress) -> tuple[dict, dict]:
    digest = distributed.from_first(lambda: _digest(lesson, torch.device(device)))
    path = cache_root() / "starts" / f"{lesson.name}-{digest[:12]}.pt"
    kept = distributed.from_first(lambda: _read(path, digest))
    if kept is None:
        with _one_at_a_time(path.with_suffix(".lock")):
            # Another may have made it while this one waited.
            kept = distributed.from_first(lambda: _read(path, digest))
            kept = kept or _make(path, digest, lesson, device, progress)
    return kept["weights"], kept["record"]


def _make(path, digest, lesson, device, progress) -> dict:
    inputs, train_on = lesson.clips()
    with seeded(lesson.recipe.seed):
        model = create_model(lesson.name, len(inputs.classes), **lesson.options).to(device)
    inputs, checkpoint = inputs.to(device), path.with_suffix(".checkpoint")
    watch = Stopwatch()
    losses = train(
        model, inputs, train_on, lesson.recipe, checkpoint=checkpoint, progress=progress, watch=watch
    )
    seconds, processor = watch.read()
    record = {
        **lesson.facts,
        "digest": digest,
        "clips": len(train_on),
        "epochs": lesson.recipe.epochs,
        "losses": [round(loss, 4) for loss in losses],
        "seconds": {
            "train": round(seconds, 1),
            "train_processor": round(processor, 1),
        },
    }
    weights = {key: value.cpu() for key, value in model.state_dict().items() if torch.is_tensor(value)}
    kept = {"digest": digest, "weights": weights, "record": record}
    if distributed.first():
        with atomic_path(path) as temporary:
            torch.save(kept, temporary)
        checkpoint.unlink(missing_ok=True)
    return kept


def _digest(lesson, device) -> str:
    where = provenance(device)
    told = [lesson.name, lesson.options, lesson.recipe.settings(), *lesson.told, distributed.count()]
    told += [where[key] for key in ("code", "versions", "machine")]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _read(path, digest) -> dict | None:
    """What is kept at `path`; None when there is nothing, or a damaged file, which is made anew."""
    if not path.is_file():
        return None
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of many kinds, for broken files
        return None
    return kept if isinstance(kept, dict) and kept.get("digest") == digest else None


@contextmanager
def _one_at_a_time(path: Path):
    """Inside the block this process is alone with `path`; others that come here wait, days if need be.

    A database without content is the lock of the standard library that all systems have, and that a killed
    process gives back. Of processes that train together the first holds it for all.
    """
    if not distributed.first():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=ATTENTION, isolation_level=None)) as lock:
        while not _locked(lock):
            pass
        yield


def _locked(lock) -> bool:
    """Whether `lock` is ours now. SQLite's own waiting is short: Ctrl-C is only heard behind it."""
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
        return False
    return True
