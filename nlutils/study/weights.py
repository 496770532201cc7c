"""Trained weights of recorded runs: kept in the cache, with what is needed to use them again."""

from collections.abc import Iterable
from pathlib import Path

import torch

from nlutils.paths import atomic_path, cache_root
from nlutils.study.results import Run
from nlutils.torch.models import create_model

__all__ = ["keep_weights", "kept_weights", "read_kept", "weights_path"]


def weights_path(study: str, run: str) -> Path:
    """Where the weights of a run are kept: `<cache>/weights/<study>/<run>.pt`."""
    return cache_root() / "weights" / study / f"{run}.pt"


def keep_weights(path, model, result: Run, seen: Iterable[tuple[str, str, str]] | None = None) -> None:
    """Write the weights of `model` and what its run was told to `path`, atomically.

    `seen` are the labelled clips that the weights were trained on, (data set, clip, group) each: no training
    that starts from these weights may be tested on them, and without `seen` none can start from them.
    """
    state = {
        "study": result.study,
        "run": result.run,
        "model": result.model,
        "options": result.options,
        "classes": result.classes,
        "recipe": result.recipe,
        "seen": None if seen is None else [list(one) for one in seen],
        "weights": model.state_dict(),
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def read_kept(path) -> dict | None:
    """What `keep_weights` wrote to `path`; None when another wrote it, or it is damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of many kinds, for what PyTorch did not write
        return None
    names = {"study", "run", "model", "options", "classes", "weights"}
    return state if isinstance(state, dict) and names <= state.keys() else None


def kept_weights(path):
    """(the network in evaluation mode, what was kept of its run) from a file of `keep_weights`.

    Raises FileNotFoundError when there is none, ValueError when the file is not one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; weights are kept by --keep-weights of `nlutils study`"
        )
    state = read_kept(path)
    if state is None:
        raise ValueError(f"{path} holds no weights that the study kept")
    try:
        model = create_model(state["model"], len(state["classes"]), **state["options"])
        model.load_state_dict(state.pop("weights"))
    except Exception as error:
        raise ValueError(f"{path} holds no weights that the study kept: {error}") from error
    return model.eval(), state
