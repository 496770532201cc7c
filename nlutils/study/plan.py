"""What the comparison on `core8` trains: its rows, and the settings among which validation chooses."""

from itertools import combinations

from nlutils.study.grid import Entry

__all__ = ["CANDIDATES", "pairs"]



def _non_local(recipe=None, **options):
    return Entry("c3d_small_non_local", options, recipe or {})


# Settings for the 3D network with and without blocks, tried on the training folds alone (`nlutils.study.choice`).
CANDIDATES = {
    "c3d_small": {
        "default": Entry("c3d_small"),
        "differences": Entry("c3d_small", {"input": "differences"}),
        "smoothed": Entry("c3d_small", {}, {"label_smoothing": 0.1}),
        "long": Entry("c3d_small", {}, {"epochs": 48}),
        "wide": Entry("c3d_small", {"widths": [24, 48, 96, 192]}),
        "slow": Entry("c3d_small", {}, {"lr": 2.5e-3}),
    },
    "c3d_small_non_local": {
        "default": _non_local(),
        "scaled": _non_local(scale=True),
        "late": _non_local(non_local=[3]),
        "last": _non_local(non_local=[4]),
        "dot_product": _non_local(instantiation="dot_product"),
        "all_keys": _non_local(subsample=None),
        "slow_blocks": _non_local({"block_lr": 0.2}),
        "fast_blocks": _non_local({"block_lr": 3.0}),
        "smoothed": _non_local({"label_smoothing": 0.1}),
    },
}


def pairs(folds) -> list[tuple[int, int]]:
    """Every two of `folds`: what is left out together when settings are chosen."""
    return list(combinations(folds, 2))
