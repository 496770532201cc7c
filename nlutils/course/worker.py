"""The process that runs one notebook with papermill: `python -m nlutils.course.worker TASK`, TASK in JSON.

It reports on standard output, a JSON object a line: {"cell": 3, "of": 20} when cell 3 starts, and
{"end": ...} at the end. Everything else that is printed here or by the kernel process itself goes to
standard error, which is the notebook's log.
"""

import json
import os
import re
import sys
import time

_MARKUP = re.compile(r"\x1b\[[0-9;]*m")


class _Watch:
    """Follows a run: reports and logs each cell, and knows how much time is left."""

    def __init__(self, notebook, limit, events):
        self.numbers = {cell.id: number for number, cell in enumerate(notebook.cells, start=1)}
        self.limit = limit
        self.events = events
        self.started = self.cell_started = time.monotonic()
        self.current = "before its first cell"

    def tell(self, **event):
        print(json.dumps(event), file=self.events, flush=True)

    def place(self, cell) -> str:
        first = next((line.strip() for line in cell.source.splitlines() if line.strip()), "")
        number = self.numbers.get(cell.id, "of the given parameters")
        return f"cell {number} (id {cell.id}, `{first[:60]}`)"

    def cell_starts(self, cell, cell_index):
        self.current = self.place(cell)
        self.cell_started = time.monotonic()
        self.tell(cell=self.numbers.get(cell.id, 0), of=len(self.numbers))

    def cell_ran(self, cell, cell_index, execute_reply):
        log(f"--- {self.place(cell)}: {time.monotonic() - self.cell_started:.1f} s")
        log(*map(text_of, cell.outputs))

    def seconds_left(self, cell) -> int:
        """What nbclient may wait for this cell; below 0 there is no limit."""
        return max(1, int(self.limit - (time.monotonic() - self.started))) if self.limit else -1


def main() -> None:
    task = json.loads(sys.argv[1])
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    # When this package is there, jsonschema imports it and it spends 1.5 seconds on a grammar of addresses,
    # which notebooks do not have. None makes its import fail, and jsonschema goes on without it.
    sys.modules.setdefault("rfc3987_syntax", None)

    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    watch = _Watch(nbformat.read(task["notebook"], as_version=4), task["limit"], events)
    failure = None
    try:
        papermill.execute_notebook(
            task["notebook"],
            task["output"],
            parameters=task["parameters"],
            cwd=task["folder"],
            progress_bar=False,
            timeout_func=watch.seconds_left,
            on_cell_start=watch.cell_starts,
            on_cell_executed=watch.cell_ran,
            coalesce_streams=True,
            record_timing=False,
        )
    except papermill.PapermillExecutionError as error:
        reason = next(iter(str(error.evalue).strip().splitlines()), "")
        failure = f"{watch.current}: {error.ename}: {reason}"
        log(*error.traceback)
    except CellTimeoutError:
        failure = f"{watch.current}: stopped after the {watch.limit:.0f} s that the notebook may take"
    except DeadKernelError:
        failure = f"{watch.current}: the kernel died (out of memory, or a crash)"

    executed = nbformat.read(task["output"], as_version=4)
    cells = [cell for cell in executed.cells if cell.id in watch.numbers and cell.cell_type == "code"]
    idle = [cell for cell in cells if cell.execution_count is None]
    if failure is None and idle:
        failure = f"{watch.place(idle[0])}: it did not run; {len(idle)} of {len(cells)} code cells did not"
    log(failure)
    watch.tell(end={"failure": failure, "ran": len(cells) - len(idle), "cells": len(cells)})


def log(*texts) -> None:
    for text in filter(None, texts):
        print(_MARKUP.sub("", text.rstrip()), file=sys.stderr, flush=True)


def text_of(output) -> str:
    """What an output says, without its pictures; an error's traceback is logged at the end."""
    return output.get("text") or output.get("data", {}).get("text/plain", "")


if __name__ == "__main__":
    main()
