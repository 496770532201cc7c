"""How long a training took, over all the processes that did parts of it one after the other."""

import time

__all__ = ["Stopwatch"]


class Stopwatch:
    """Seconds on the wall and of processor time since it was made; `add` what an earlier process spent."""

    def __init__(self):
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def add(self, earlier) -> None:
        """Count `earlier` = (wall, processor), what `read` gave when a checkpoint was written."""
        self._wall -= earlier[0]
        self._processor -= earlier[1]

    def read(self) -> tuple[float, float]:
        """(seconds on the wall, seconds of processor time) so far."""
        return time.perf_counter() - self._wall, time.process_time() - self._processor
