"""Trained weights of recorded runs: kept beside the records, with what is needed to use them again."""

from collections.abc import Iterable
from pathlib import Path

import torch

from nlutils.paths import atomic_path, own_results_root, results_root, shown
from nlutils.study.results import Run
from nlutils.torch.models import create_model

__all__ = ["find_kept", "keep_weights", "kept_weights", "read_kept", "weights_path"]


def weights_path(study: str, run: str, root=None) -> Path:
    """Where the weights of a run are kept: `<root>/<study>/weights/<run>.pt`, `root` as of `run_study`."""
    return Path(root or results_root()) / study / "weights" / f"{run}.pt"


def find_kept(model) -> Path:
    """The file of weights that `model` means: "STUDY/RUN", or the path of a .pt file, which is given back.

    STUDY/RUN is looked for in `data/results`, then in `build/results`. Raises ValueError for what is neither,
    FileNotFoundError, saying what there is, where such a run's weights are not kept.
    """
    if Path(model).suffix == ".pt":
        return Path(model)
    study, _, run = str(model).rpartition("/")
    if not study or not run:
        raise ValueError(
            f"model={str(model)!r} must be STUDY/RUN, such as core8/c3d_small-fold0-seed0, or a file .pt of "
            "kept weights"
        )
    paths = [weights_path(study, run, root) for root in (results_root(), own_results_root())]
    found = next((path for path in paths if path.is_file()), None)
    if found is not None:
        return found
    kept = sorted(
        other.stem for path in paths for other in path.parent.glob("*.pt") if not other.name.startswith(".")
    )
    named = ", ".join(kept[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")
    have = f"those of {named} are" if kept else f"none of {study} are"
    raise FileNotFoundError(
        f"the weights of {model} are kept neither in {shown(paths[0].parent)} nor in "
        f"{shown(paths[1].parent)} ({have}); name the .pt file of another root, or train it with "
        f"--keep-weights, by `nlutils study run {study} --keep-weights` or by "
        "`nlutils study --data FOLDER --keep-weights`"
    )


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
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = create_model(state["model"], len(state["classes"]), **state["options"])
        model.load_state_dict(state.pop("weights"))
    except Exception as error:
        raise ValueError(f"{path} holds no weights that the study kept: {error}") from error
    return model.eval(), state
