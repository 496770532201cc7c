"""Running notebooks, several at a time, each in its own process: the runner and the builders share this."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Outcome", "Task", "budget", "cores", "report", "run_tasks", "worst"]

# Seconds on two cores in the profile "quick"; the comparison trains networks. Above its budget a notebook
# is reported; above HARD times its budget, which leaves room for a slow machine, it is stopped and counts
# as failed.
BUDGET = 60
BUDGETS = {"18": 180}
HARD = 3


def budget(name: str) -> int:
    """The seconds that the notebook with this file name may take in the profile "quick"."""
    return BUDGETS.get(name[:2], BUDGET)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Task:
    """One notebook to run in `folder`: where it lies, where its executed copy and its log go."""

    name: str
    notebook: Path
    output: Path
    log: Path
    folder: Path
    parameters: dict = field(default_factory=dict)

    @classmethod
    def of(cls, notebook: Path, *, output: Path, folder: Path | None = None, parameters: dict | None = None):
        """The task for the notebook at a path; `output` is the folder of the executed copy and of `logs/`."""
        notebook, output = Path(notebook).resolve(), Path(output).resolve()
        if output / notebook.name == notebook:
            raise ValueError(
                f"output={str(output)!r} is the folder of {notebook.name} itself; name another folder"
            )
        return cls(
            name=notebook.stem,
            notebook=notebook,
            output=output / notebook.name,
            log=output / "logs" / f"{notebook.stem}.log",
            folder=Path(folder or notebook.parent).resolve(),
            parameters=parameters or {},
        )


@dataclass(frozen=True)
class Outcome:
    """How a task ended: `failure` is None, or which cell failed and why; `limit` is its budget, if any."""

    task: Task
    seconds: float
    failure: str | None
    ran: int = 0
    cells: int = 0
    limit: float | None = None


def run_tasks(
    tasks: list[Task],
    environment: dict[str, str] | None = None,
    *,
    jobs: int | None = None,
    finished: Callable[[Outcome], None] | None = None,
    progress: Callable[[dict[str, str]], None] | None = None,
) -> list[Outcome]:
    """Run the tasks in their order, `jobs` at a time (by default two where there are two cores).

    `environment` is added to the kernels' environment; its NLUTILS_PROFILE decides whether budgets hold.
    Calls `finished(outcome)` after each task, and `progress({name: "cell 3 of 20"})` when a cell starts.
    One task that fails does not stop the others.
    """
    jobs = jobs or min(2, cores())
    threads = str(max(1, cores() // jobs))
    env = {
        # Waiting threads sleep, so that notebooks that run side by side do not slow each other down.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": threads,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_NUM_INTRAOP_THREADS": threads,
        # The debugger in a kernel warns of frozen modules on standard error.
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        **os.environ,
        **(environment or {}),
    }
    # A backend named in the shell would replace the one with which kernels show figures.
    env.pop("MPLBACKEND", None)
    running: dict[str, str] = {}
    processes: set[subprocess.Popen] = set()
    lock = threading.Lock()
    stopping = threading.Event()

    def one(task: Task) -> Outcome:
        def tell(state: str | None) -> None:
            with lock:
                running.pop(task.name, None)
                if state:
                    running[task.name] = state
                if progress:
                    progress(dict(running))

        limit = budget(task.name) if env.get("NLUTILS_PROFILE", "quick") == "quick" else None
        outcome = _run(task, env, limit, processes, tell)
        tell(None)
        with lock:
            if finished and not stopping.is_set():
                finished(outcome)
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, task) for task in tasks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(processes):
                process.terminate()
            raise


def _run(task: Task, env: dict, limit: float | None, processes: set, tell: Callable) -> Outcome:
    """Run one task in a worker process and wait for it."""
    for path in (task.output, task.log):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    allowed = limit * HARD if limit else None
    order = {
        "notebook": str(task.notebook),
        "output": str(task.output),
        "folder": str(task.folder),
        "parameters": task.parameters,
        "limit": allowed,
    }
    command = [sys.executable, "-m", "nlutils.course.worker", json.dumps(order)]
    started = time.monotonic()
    end = None
    with open(task.log, "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=env, text=True)
        processes.add(process)
        # The worker stops the notebook itself; this is for a worker that hangs.
        watchdog = threading.Timer(allowed + 60, process.kill) if allowed else None
        if watchdog:
            watchdog.daemon = True
            watchdog.start()
        tell("starting")
        for line in process.stdout:
            event = json.loads(line)
            if "cell" in event:
                tell(f"cell {event['cell']} of {event['of']}")
            end = event.get("end", end)
        code = process.wait()
        processes.discard(process)
        if watchdog:
            watchdog.cancel()
    if end is None:
        last = task.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or [
            "nothing in its log"
        ]
        end = {"failure": f"its process ended with code {code}: {last[0]}"}
    return Outcome(task, time.monotonic() - started, limit=limit, **end)


def report(outcome: Outcome) -> None:
    """Print the line of a notebook: its name, its seconds, and what went wrong."""
    line = f"{outcome.task.name:<28} {outcome.seconds:6.1f} s"
    if outcome.failure:
        line += f"  FAILED  {outcome.failure}"
    elif outcome.limit and outcome.seconds > outcome.limit:
        line += f"  over its budget of {outcome.limit:.0f} s"
    print(line, flush=True)


def worst(outcomes: list[Outcome]) -> int:
    """The exit code: 0 when every notebook ran to its end, else 1."""
    return int(any(outcome.failure for outcome in outcomes))
