"""Two processes that train together do what one does, to the order of sums, and either may die."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import study_processes
import torch

from nlutils.study import distributed, fold, read_runs, run_study
from nlutils.study.whole_batch import Part, WholeBatch, part

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="this PyTorch has no Gloo for processes on CPUs"
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes trained all networks, did a study, and began another, in which one was killed."""
    folder, program = tmp_path_factory.mktemp("processes"), Path(study_processes.__file__)
    ended = subprocess.run(
        [*TORCHRUN, str(program), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(program.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    (folder / "output.txt").write_text(ended.stdout)
    assert ended.returncode == 1, ended.stderr
    assert "exitcode  : -9" in ended.stderr
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLUTILS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return study_processes.exact_inputs()


@pytest.mark.parametrize("name", study_processes.NETWORKS)
def test_two_processes_train_as_one_does(folder, inputs, name):
    """In float64: weights, running statistics, losses and the logits of other clips; dropout is on."""
    losses, weights, logits = study_processes.trained(name, inputs)
    for rank in range(2):
        told = torch.load(folder / f"networks{rank}.pt")[name]
        assert told[0] == pytest.approx(losses, rel=1e-10)
        assert told[1].keys() == weights.keys()
        for key, weight in weights.items():
            # AdamW makes steps of rounding errors where a gradient is zero, as those of biases before a norm.
            torch.testing.assert_close(told[1][key], weight, rtol=1e-8, atol=1e-9, msg=key)
        torch.testing.assert_close(told[2], logits, rtol=1e-5, atol=1e-6)


def test_all_go_on_from_the_checkpoint_of_the_first(folder):
    """Which the others cannot read, as on machines that share no folder."""
    assert (folder / "cache0" / "interrupted.pt").is_file()
    assert not (folder / "cache1" / "interrupted.pt").exists()
    for rank in range(2):
        told = torch.load(folder / f"networks{rank}.pt")
        assert told["interrupted"][0] == told["c3d_small"][0]
        for key, weight in told["c3d_small"][1].items():
            assert torch.equal(told["interrupted"][1][key], weight)


def test_the_first_process_alone_writes_and_speaks(folder):
    output = (folder / "output.txt").read_text()
    assert output.count("shared 2d-fold0-seed0: ") == 1
    assert [output.count(f"process {rank}: 2d-fold0-seed0") for rank in range(2)] == [1, 1]
    assert (folder / "shared" / "weights" / "2d-fold0-seed0.pt").is_file()
    assert read_runs("shared", folder)[0].provenance["machine"]["processes"] == 2


def test_a_run_of_two_processes_is_ended_by_one(folder, monkeypatch):
    """The second was killed after two of three epochs; torchrun ended the first, whose checkpoint is left."""
    assert not (folder / "killed" / "shared").exists()
    monkeypatch.setenv("NLUTILS_CACHE", str(folder / "cache0"))
    assert len(list((folder / "cache0" / "checkpoints" / "shared").iterdir())) == 1
    epochs = []
    monkeypatch.setattr(
        fold, "train", partial(fold.train, after_epoch=lambda epoch, loss: epochs.append(epoch))
    )
    resumed = study_processes.study(
        folder / "killed", clips=study_processes.study_inputs(), log=lambda line: None
    )
    assert epochs == [2]
    (shared,) = read_runs("shared", folder)
    assert resumed[0].losses == pytest.approx(shared.losses, abs=1e-3)
    torch.testing.assert_close(
        torch.tensor(resumed[0].logits), torch.tensor(shared.logits), rtol=0, atol=1e-2
    )
    assert not list((folder / "cache0" / "checkpoints" / "shared").iterdir())


@pytest.mark.parametrize(("total", "count"), [(16, 2), (17, 4), (5, 2), (3, 2), (3, 8), (2, 2), (1, 2)])
def test_parts_are_the_batch(total, count):
    parts = [part(total, rank, count) for rank in range(count)]
    taken = [clip for one in parts for clip in range(one.start, one.stop)]
    assert taken == list(range(total))
    assert sum(one.share for one in parts) == pytest.approx(1)
    assert total == 1 or all(one.stop - one.start != 1 for one in parts)
    assert all(one.seen == min(2, total) for one in parts if not one.counts)
    rows = torch.arange(3 * total)  # three rows a clip
    assert torch.cat([one.rows(rows) for one in parts if one.counts]).tolist() == rows.tolist()


def test_a_mask_is_the_rows_of_the_mask_of_the_batch():
    """Also of maps that lie in memory time first, as recurrent layers give them."""
    whole = torch.randn(3, 5, 4).transpose(0, 1)  # 5 clips, 3 steps
    torch.manual_seed(0)
    expected = torch.nn.functional.dropout(whole)
    for one in (Part(0, 2, 5), Part(2, 5, 5)):
        torch.manual_seed(0)
        mine = whole[one.start : one.stop].transpose(0, 1).contiguous().transpose(0, 1)
        with WholeBatch(one):
            assert torch.equal(torch.nn.functional.dropout(mine), expected[one.start : one.stop])
    with WholeBatch(Part(0, 2, 5)), pytest.raises(ValueError, match="must hold the 2 clips"):
        torch.nn.functional.dropout(torch.ones(3, 4))
    with WholeBatch(Part(0, 2, 5)), pytest.raises(ValueError, match="dropout2d cannot be shared"):
        torch.nn.functional.dropout2d(torch.ones(2, 3, 4, 4))


def test_what_several_processes_cannot_do_is_refused(inputs, monkeypatch):
    from nlutils.study import arithmetic, whole_batch

    monkeypatch.setattr(distributed, "count", lambda: 2)
    told = {"models": study_processes.STUDY, "clips": inputs, "recipe": study_processes.RECIPE}
    with pytest.raises(ValueError, match="jobs=2 and cluster=None: 2 processes train each run together"):
        run_study("x", **told, jobs=2)
    with pytest.raises(ValueError, match="compile=True with 2 processes"):
        arithmetic.objective(torch.nn.Linear(1, 1), study_processes.RECIPE.replace(compile=True))
    deep = torch.nn.Sequential(torch.nn.LSTM(3, 3, num_layers=2, dropout=0.5))
    with pytest.raises(ValueError, match=r"0 has dropout=0\.5 between its layers"):
        whole_batch.SharedObjective(deep)
