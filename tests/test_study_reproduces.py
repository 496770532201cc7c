"""`nlutils study run` trains a committed run again: the same accuracy within its interval, on any machine."""

import numpy as np
import torch

from nlutils import cli
from nlutils.paths import results_root
from nlutils.study import difference_interval, interval
from nlutils.study.results import read_run

NAME = "procedural/two_stream_small-fold0-seed0.json"


def test_a_recorded_run_comes_out_again(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    words = ["--row", "two_stream_small", "--fold", "0", "--threads", "1", "--root", str(tmp_path)]
    try:
        assert cli.main(["study", "run", "procedural", *words]) == 0
    finally:
        torch.set_num_threads(threads)
    now, then = read_run(tmp_path / NAME), read_run(results_root() / NAME)
    for what in ("study", "row", "model", "options", "recipe", "names", "labels", "groups", "classes"):
        assert getattr(now, what) == getattr(then, what), what
    assert now.data["source"] == then.data["source"]
    recorded = interval([then])
    assert recorded.low <= now.accuracy <= recorded.high
    gap = difference_interval([now], [then])
    assert gap.low <= 0 <= gap.high
    # Rounding differs from machine to machine, and grows; the first epoch is near.
    np.testing.assert_allclose(now.losses[0], then.losses[0], rtol=0.02)
