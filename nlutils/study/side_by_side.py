"""Several runs at a time on one machine, each in a process of its own."""

import contextlib
import multiprocessing
import os
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

# Seconds that a process has to leave its files whole when it is told to end.
GRACE = 5


def side_by_side(work: Work, cells: list[Cell], jobs: int) -> Iterator[Run]:
    """The recorded runs of `cells` as they are done, `jobs` processes at a time.

    When the caller stops (Ctrl-C), or a run fails, the other processes are ended at once; when the caller is
    killed, they end by themselves. Their checkpoints stay. Raises the error of a run, and RuntimeError,
    naming the run, when its process was killed.
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
                result = busy[pipe].result()
                if waiting:
                    busy[pipe].begin(waiting.popleft())
                yield result
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(GRACE)
            worker.process.kill()


class _Worker:
    """A process that does one cell after the other, and this end of the pipe to it."""

    def __init__(self, context, work):
        self.cell = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def begin(self, cell):
        self.cell = cell
        with contextlib.suppress(BrokenPipeError):  # the process has ended; `result` says so
            self.pipe.send(cell)

    def result(self):
        cell, self.cell = self.cell, None
        try:
            outcome = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(GRACE)
            raise RuntimeError(
                f"{cell.name}: its process ended with exit code {self.process.exitcode}, perhaps for want of "
                "memory; call run_study again, and the run goes on behind its last full epoch"
            ) from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _serve(pipe, work):
    # Ctrl-C reaches all processes of a terminal; the parent alone answers it, by telling us to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception: half-written files are removed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        cell = pipe.recv()
        try:
            outcome = work.do(cell)
        except Exception as error:
            error.add_note(f"in the run {cell.name}, a process of its own:\n{traceback.format_exc()}")
            outcome = error
        pipe.send(outcome)


def _end_with_parent():
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
