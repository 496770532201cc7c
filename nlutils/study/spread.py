"""The grid spread over a Ray cluster: a run is a task, on whichever machine has room.

Moritz et al., Ray: A Distributed Framework for Emerging AI Applications, OSDI 2018; https://docs.ray.io.
"""

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nlutils.paths import atomic_path
from nlutils.study.grid import Cell
from nlutils.study.provenance import code_digest
from nlutils.study.results import Run, write_run
from nlutils.study.weights import weights_path
from nlutils.study.work import Work

__all__ = ["spread"]

# How often a run is done again when its worker is lost: killed, out of memory, its machine gone.
RETRIES = 3
# Seconds that the last checkpoints may take to go, on machines that may be gone themselves.
PATIENCE = 30


def spread(work: Work, cells: list[Cell], cluster: str) -> Iterator[tuple[Cell, Run | Exception]]:
    """(cell, its run) as they are done and recorded, each a task of the Ray cluster `cluster`.

    `cluster` is "local" (an own Ray on this machine), "auto" (the cluster that this machine is part of) or
    an address. A run takes `work.threads` processors, and a GPU when `work.device` is one. Runs are recorded
    here, trained weights are kept here; checkpoints lie in the cache of the machine that trains.

    A lost worker's run is done again, up to `RETRIES` times. A run that fails does not stop the others: its
    error comes in its place. Raises ImportError without Ray, ConnectionError without such a cluster.
    """
    ray = _ray()
    with _connected(ray, cluster):
        gpus = 1 if work.device.type == "cuda" else 0
        task = ray.remote(num_cpus=work.threads, num_gpus=gpus, max_retries=RETRIES)(_train)
        shared = ray.put(replace(work, root=None))
        waiting = {task.remote(shared, cell, code_digest()): cell for cell in cells}
        forgotten = []
        try:
            while waiting:
                ready, _ = ray.wait(list(waiting), num_returns=1)
                cell = waiting.pop(ready[0])
                try:
                    result, weights, node = ray.get(ready[0])
                except ray.exceptions.RayError as error:
                    yield cell, getattr(error, "cause", None) or error  # without the worker's traceback
                    continue
                try:
                    _record(work, cell, result, weights)
                except Exception as error:
                    yield cell, error
                    continue
                forgotten.append(_forget(ray, node, shared, cell))
                yield cell, result
            if forgotten:
                ray.wait(forgotten, num_returns=len(forgotten), timeout=PATIENCE)
        finally:
            for one in waiting:
                ray.cancel(one, force=True)


def _train(work, cell, code):
    """On a worker: (the run, the bytes of its weights or None, the machine's name in Ray)."""
    import ray

    if code_digest() != code:
        raise ValueError(
            f"{socket.gethostname()} has another version of nlutils than the machine that asks; "
            "install the same on all"
        )
    node = ray.get_runtime_context().get_node_id()
    if not work.keep_weights:
        return work.train(cell), None, node
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder) / "weights.pt"
        return work.train(cell, keep), keep.read_bytes(), node


def _record(work, cell, result, weights):
    if weights is not None:
        with atomic_path(weights_path(cell.study, cell.name, work.root)) as temporary:
            temporary.write_bytes(weights)
    write_run(result, work.root)


def _forget(ray, node, shared, cell):
    """Delete the checkpoint on the machine that has it, now that the run is recorded."""
    there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=True)
    task = ray.remote(num_cpus=0, scheduling_strategy=there)(_forget_here)
    return task.remote(shared, cell)


def _forget_here(work, cell):
    work.forget(cell)


@contextmanager
def _connected(ray, cluster):
    """Connected to `cluster`; a connection that exists already is used, and stays."""
    if ray.is_initialized():
        yield
        return
    ray.init(address=cluster, log_to_driver=False, include_dashboard=False if cluster == "local" else None)
    try:
        yield
    finally:
        ray.shutdown()


def _ray():
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ImportError(
            f'cluster= needs Ray ({error}): pip install -e ".[ray]" in the folder of the project'
        ) from error
    return ray
