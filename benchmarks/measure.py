"""Measuring: processor time of variants in turns, and the peak memory of one call."""

import ctypes
import gc
import os
import statistics
import time
from pathlib import Path

__all__ = ["CpuMeter", "CudaMeter", "available_gib", "medians", "peak_mib", "ratios", "timed_in_turns"]

MIB = 2**20
# A turn lasts at least so many seconds: a short call is made several times in it. One call alone would mostly
# measure how the other variants left the processor's cache and the memory.
TURN = 0.1


class CpuMeter:
    """Seconds of processor time of this process, which other programs on the machine hardly change."""

    name = "cpu"

    def seconds(self, call) -> float:
        """The processor time that `call` takes; what it returns is dropped."""
        start = time.process_time()
        call()
        return time.process_time() - start

    def peak(self, call) -> float:
        """MiB that the process grows by, at most, while `call` runs."""
        return peak_mib(call)


class CudaMeter:
    """The same on a GPU: events around the call, and the allocator's own count of bytes."""

    name = "cuda"

    def seconds(self, call) -> float:
        """Seconds between two events in the GPU's queue around `call`."""
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def peak(self, call) -> float:
        """MiB that tensors take at most while `call` runs, above what is there before."""
        import torch

        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB


def timed_in_turns(calls: dict, repeats: int, meter, prepare=lambda name: None) -> dict:
    """Time `calls` {name: function} `repeats` times in turns: {name: [seconds, …]}.

    Every round gives each call one turn, beginning with another one each time, so that a slow minute of the
    machine meets all of them. A turn repeats its call until TURN seconds are spent; its time is their mean.
    `prepare(name)` runs before each call and is not timed.
    """
    names = list(calls)
    seconds = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            taken = []
            while sum(taken) < TURN:
                prepare(name)
                taken.append(meter.seconds(calls[name]))
            seconds[name].append(round(sum(taken) / len(taken), 7))
    return seconds


def medians(values: dict) -> dict:
    """{variant: {pass: [numbers]}} -> {variant: {pass: median}}."""
    return {
        variant: {name: round(statistics.median(numbers), 7) for name, numbers in passes.items()}
        for variant, passes in values.items()
    }


def ratios(middle: dict, ours: dict) -> dict:
    """How many times faster ours is: {variant: {pass: its median / the median of `ours[variant]`}}."""
    return {
        variant: {name: round(middle[variant][name] / middle[mine][name], 4) for name in middle[variant]}
        for variant, mine in ours.items()
        if variant in middle
    }


def peak_mib(call) -> float:
    """Call `call`; how many MiB the process' resident memory rose at its highest above the start.

    Linux only: the high-water mark VmHWM is set back through /proc/self/clear_refs just before the call.
    Memory that the C library keeps for later is returned first, so that it cannot be used unseen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(
            f"the peak of the memory cannot be set back ({error}); it needs Linux with /proc/self/clear_refs"
        ) from error
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 1024


def available_gib() -> float:
    """GiB of memory that a new process can have now."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only")
