"""Several runs at a time on one machine, each in a process of its own."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import wait

import torch

from nlutils.study.grid import Cell
from nlutils.study.results import Run
from nlutils.study.work import Work

__all__ = ["side_by_side"]

# The first word of a process.
STARTED = "started"
# Seconds that a process has to leave its files whole when it is told to end.
GRACE = 5


def side_by_side(work: Work, cells: list[Cell], jobs: int) -> Iterator[tuple[Cell, Run | Exception]]:
    """(cell, its recorded run) as they are done, `jobs` processes at a time.

    A run that fails does not stop the others: its error comes in its place, RuntimeError where its process
    was killed. When the caller stops (Ctrl-C), all processes are ended at once; when it is killed, they end
    by themselves. Checkpoints stay. Raises RuntimeError when a process cannot start.
    """
    # Tensors travel through shared memory: the clips are there once, whatever the number of processes.
    context = torch.multiprocessing.get_context("spawn")
    waiting, workers = deque(cells), []
    try:
        for _ in range(min(jobs, len(cells))):
            workers.append(_Worker(context, work))
            workers[-1].begin(waiting.popleft())
        while busy := {worker.pipe: worker for worker in workers if worker.cell is not None}:
            for pipe in wait(busy):
                worker = busy[pipe]
                done = worker.receive()
                if done is None:
                    continue
                if waiting and worker.ended:
                    workers.remove(worker)
                    worker = _Worker(context, work)
                    workers.append(worker)
                if waiting:
                    worker.begin(waiting.popleft())
                yield done
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(GRACE)
            worker.process.kill()


class _Worker:
    """A process that does one cell after the other, and this end of the pipe to it."""

    def __init__(self, context, work):
        self.cell, self.started, self.ended = None, False, False
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def begin(self, cell):
        self.cell = cell
        with contextlib.suppress(BrokenPipeError):  # the process has ended; `receive` says so
            self.pipe.send(cell)

    def receive(self):
        """(cell, its run or error); None when the process says that it has started, which it does first."""
        try:
            outcome = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            outcome = self._end()
        if outcome == STARTED:
            self.started = True
            return None
        cell, self.cell = self.cell, None
        return cell, outcome

    def _end(self):
        self.process.join(GRACE)
        self.ended, code = True, self.process.exitcode
        if not self.started:
            raise RuntimeError(
                f"a process for the runs could not start, and ended with exit code {code}. Each process "
                "reads the script that is run: there, call run_study(..., jobs=2) below "
                '`if __name__ == "__main__":`'
            )
        return RuntimeError(
            f"its process ended with exit code {code}, perhaps for want of memory; call run_study again, and "
            "the run goes on after its last full epoch"
        )


def _serve(pipe, work):
    # Ctrl-C reaches all processes of a terminal; the parent alone answers it, by telling us to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception: half-written files are removed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(STARTED)
    while True:
        outcome = work.attempt(pipe.recv())
        pipe.send(_portable(outcome) if isinstance(outcome, Exception) else outcome)


def _portable(error):
    """`error` as another process can read it, with its traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an error's own class does when it is copied
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent():
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
