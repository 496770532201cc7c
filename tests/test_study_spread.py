"""A grid spread over processes and over Ray: stopped, killed or done twice, it loses and doubles no run."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_study_training import SMALL, TINY, fake_clips

from nlutils.study import Entry, fold, prepare, read_runs, run_study
from nlutils.study.grid import Cell
from nlutils.study.results import Run
from nlutils.study.side_by_side import side_by_side
from nlutils.study.work import Work

TESTS = str(Path(__file__).parent)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLUTILS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLUTILS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return prepare(fake_clips(), TINY.frames, TINY.resize)


def cells(study, folds, recipe=TINY):
    return [Cell(study, "2d", *SMALL["2d"], fold, recipe) for fold in folds]


def start(program):
    """`program` in a process of its own, the first of a new group, as a shell would start it."""
    paths = os.pathsep.join([TESTS, *sys.path])
    # Behind `nohup` or `&` Ctrl-C is ignored, by the children of such tests too.
    hears = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [sys.executable, "-c", hears + textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(true, what, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


# What a process ends with.


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
def test_ctrl_c_ends_all_processes_soon_and_leaves_checkpoints(tmp_path):
    running = start(f"""
        from test_study_training import SMALL, TINY, fake_clips
        from nlutils.study import prepare, run_study
        inputs = prepare(fake_clips(), TINY.frames, TINY.resize)
        recipe = TINY.replace(epochs=100_000)
        run_study("long", SMALL, [0], clips=inputs, recipe=recipe, root={str(tmp_path)!r}, jobs=2)
    """)
    try:
        checkpoints = tmp_path / "cache" / "checkpoints" / "long"
        until(lambda: len(list(checkpoints.glob("[!.]*.pt"))) == 2, "two checkpoints")
        os.killpg(running.pid, signal.SIGINT)
        stopped = time.monotonic()
        errors = running.communicate(timeout=60)[1]
    finally:
        if not gone(running.pid):
            os.killpg(running.pid, signal.SIGKILL)
    assert time.monotonic() - stopped < 30
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1, errors  # the children say nothing
    until(lambda: gone(running.pid), "the children's end", 10)
    assert len(list(checkpoints.iterdir())) == 2  # whole, and no half-written file beside them
    for checkpoint in checkpoints.iterdir():
        assert len(torch.load(checkpoint)["losses"]) >= 1
    assert not list(tmp_path.glob("long/*"))


class Odd(Exception):
    """An error that no other process can read."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


@dataclass(frozen=True)
class Sleep(Work):
    """Work that says that it has begun, and never ends; or kills its own process, and fails in fold 1."""

    kill: bool = False

    def do(self, cell):
        if cell.fold == 1:
            raise Odd("one", "other")
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        Path(self.root, "begun").touch()
        time.sleep(600)


def forked(monkeypatch):
    """Processes begin as copies of this one, which takes no time; they must not compute."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda kind: fork)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_children_of_a_killed_process_end(tmp_path):
    running = start(f"""
        import pytest
        from test_study_spread import CPU, Sleep, cells, forked
        from nlutils.study.side_by_side import side_by_side
        forked(pytest.MonkeyPatch())
        list(side_by_side(Sleep(None, CPU, root={str(tmp_path)!r}), cells("sleep", [0]), 2))
    """)
    try:
        until((tmp_path / "begun").exists, "the child")
        os.kill(running.pid, signal.SIGKILL)
        running.wait(10)
        until(lambda: gone(running.pid), "the child's end", 30)
    finally:
        if not gone(running.pid):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_child_stops_no_other_run(monkeypatch):
    forked(monkeypatch)
    done = list(side_by_side(Sleep(None, CPU, kill=True), cells("sleep", [0, 1, 0, 1]), 1))
    assert [cell.fold for cell, _ in done] == [0, 1, 0, 1]
    for killed, failed in ((done[0][1], done[1][1]), (done[2][1], done[3][1])):
        assert str(killed).startswith("its process ended with exit code -9, perhaps for want of memory")
        assert str(failed) == "Odd: one and other"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_a_script_that_every_process_would_run_anew(monkeypatch):
    """Its processes end before they begin, and the message says what the script needs."""
    forked(monkeypatch)
    monkeypatch.setattr("nlutils.study.side_by_side._serve", lambda pipe, work: os._exit(1))
    with pytest.raises(RuntimeError, match=r'could not start, .* below `if __name__ == "__main__":`'):
        list(side_by_side(Sleep(None, CPU), cells("sleep", [0, 1]), 1))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_stops_no_other(inputs, tmp_path, jobs):
    """And two processes record what one does."""
    recipe, lines = TINY.replace(epochs=1), []
    rows = {"2d": SMALL["2d"], "bad": Entry("frame_average", SMALL["2d"][1], {"lr": 1e30, "warmup": 0})}
    told = {"folds": [0, 3], "clips": inputs, "recipe": recipe, "root": tmp_path}
    with pytest.raises(RuntimeError) as raised:
        run_study("some", rows, **told, jobs=jobs, log=lines.append)
    failed, *reasons = str(raised.value).splitlines()
    assert failed == "2 of 4 runs failed"
    assert sorted(reason.partition(": the loss")[0] for reason in reasons) == [
        f"bad-fold{fold}-seed0: FloatingPointError" for fold in (0, 3)
    ]
    assert sum(line.startswith("some bad-fold0-seed0: failed, FloatingPointError: ") for line in lines) == 1
    recorded = read_runs("some", tmp_path)
    alone = run_study("alone", {"2d": rows["2d"]}, **told, log=lambda line: None)
    assert [(run.run, run.logits) for run in recorded] == [(run.run, run.logits) for run in alone]


# Nothing lost, nothing twice.


def test_killed_between_the_record_and_the_end_of_the_checkpoint(inputs, tmp_path, monkeypatch):
    told = {"models": {"2d": SMALL["2d"]}, "folds": [0], "clips": inputs, "root": tmp_path}
    told |= {"recipe": TINY.replace(epochs=1), "log": lambda line: None}

    def killed(work, cell):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "forget", killed)
        with pytest.raises(KeyboardInterrupt):
            run_study("between", **told)
    recorded = read_runs("between", tmp_path)
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 1
    assert run_study("between", **told) == recorded
    assert not list((tmp_path / "cache").rglob("*.pt"))


def test_two_calls_at_once_record_each_run_once(inputs, tmp_path, monkeypatch):
    """The second begins, and ends, while the first is in the middle of its first run."""
    told = {"models": {"2d": SMALL["2d"]}, "folds": [0, 3], "clips": inputs, "root": tmp_path}
    told |= {"recipe": TINY, "log": lambda line: None}
    second, train = [], fold.train

    def meanwhile(epoch, loss):
        if epoch == 1 and not second:
            second.append(None)
            second[:] = run_study("twice", **told)

    monkeypatch.setattr(fold, "train", lambda *args, **kwargs: train(*args, **kwargs, after_epoch=meanwhile))
    first = run_study("twice", **told)
    alone = run_study("once", **told)
    for runs in (first, second, read_runs("twice", tmp_path)):
        assert [(run.run, run.logits) for run in runs] == [(run.run, run.logits) for run in alone]
    assert len(list((tmp_path / "twice").iterdir())) == 2
    assert not list((tmp_path / "cache").rglob("*.pt"))
    # What the second call recorded, the first reads.
    assert first[1].seconds == second[1].seconds


# Ray.


@dataclass(frozen=True)
class Frail(Work):
    """Work whose worker is killed the first time in fold 1, and which fails in fold 2."""

    def train(self, cell, keep=None):
        mark = Path(os.environ["NLUTILS_CACHE"]) / "killed"
        if cell.fold == 1 and not mark.exists():
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.fold == 2:
            raise FloatingPointError("the loss is nan in epoch 3")
        return super().train(cell, keep)


def test_ray_does_the_runs(inputs, tmp_path, monkeypatch):
    """A worker is lost, and its run done again; a run or its record fails, is named, and stops no other."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")
    from nlutils.study import spread as module
    from nlutils.study.spread import spread

    record = module._record

    def full_disk(work, cell, *what):
        if cell.fold == 3:
            raise OSError("no space left")
        record(work, cell, *what)

    monkeypatch.setattr(module, "_record", full_disk)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    recipe = TINY.replace(epochs=1)
    work = Frail(inputs, CPU, root=tmp_path, keep_weights=True)
    done, failed = [], []

    def do_all():
        for cell, run in spread(work, cells("ray", range(4), recipe), "local"):
            if not isinstance(run, Run):
                failed.append((cell.name, str(run)))
                continue
            assert run.run in [one.run for one in read_runs("ray", tmp_path)]  # recorded before it is told
            done.append(run.run)

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        do_all()
        assert sorted(failed) == [
            ("2d-fold2-seed0", "the loss is nan in epoch 3"),
            ("2d-fold3-seed0", "no space left"),
        ]
        assert sorted(done) == ["2d-fold0-seed0", "2d-fold1-seed0"]
        assert (tmp_path / "cache" / "killed").exists()
        states = tmp_path / "cache" / "checkpoints"
        until(lambda: len(list(states.rglob("*.pt"))) == 1, "the end of the recorded runs' checkpoints")
        told = {"models": {"2d": SMALL["2d"]}, "folds": [0, 1], "clips": inputs, "recipe": recipe}
        told |= {"root": tmp_path, "log": lambda line: None}
        assert [run.run for run in run_study("ray", **told, cluster="local")] == sorted(done)[:2]
        here = run_study("here", **told)
    finally:
        ray.shutdown()
    there = [run for run in read_runs("ray", tmp_path) if run.fold in (0, 1)]
    assert [run.logits for run in there] == [run.logits for run in here]
    assert len(list((tmp_path / "ray" / "weights").iterdir())) == 2


def test_a_cluster_that_cannot_be_is_refused(inputs, tmp_path, monkeypatch):
    told = {"models": SMALL, "folds": [0], "clips": inputs, "recipe": TINY, "root": tmp_path}
    with pytest.raises(ValueError, match="jobs=2 and cluster='local': Ray knows"):
        run_study("x", **told, jobs=2, cluster="local")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[ray\]"'):
        run_study("x", **told, cluster="local")
