"""Clips a second in training: the study's loop beside a plain one, and beside what limits it.

    .venv/bin/python -m benchmarks.throughput --row "*-cpu"     # minutes of one core; --list, --again
    python -m benchmarks.throughput --row "*-cuda"              # on a GPU

A training step of 16 clips of core8 is timed in variants that take turns. The input is differences of frames,
which need no optical flow.

plain       every clip decoded again from its file, resized and made float; kernels in PyTorch's default order
in_memory   clips decoded once and kept as bytes; cut, mirrored and made float a batch at a time
study       the same with channels-last kernels: what `nlutils.study.train` does
compiled    the same through torch.compile; how long its compilation takes is recorded beside
half        on a GPU: as study and as compiled, in bfloat16

Limits, clips a second: `decode` alone, `cut` alone, the `step` alone on a batch that is ready. The step's
multiply-adds a second stand beside those of a product of two matrices of 2048 x 2048 on the same processor.
"""

import os
import statistics
import sys
import time
from dataclasses import replace

# A first compiled step is to compile, whatever was compiled here before.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch

from benchmarks.measure import CpuMeter, CudaMeter, timed_in_turns
from benchmarks.records import record_rows
from nlutils.origin import digest
from nlutils.paths import project_root
from nlutils.study import Recipe, multiply_adds, prepare, provenance, seeded
from nlutils.study.arithmetic import autocast, channels_last, objective
from nlutils.study.inputs import evenly, resized
from nlutils.torch.models import create_model
from nlutils.video import decode, open_clips
from nlutils.video.jhmdb import find

SOURCES = (
    "benchmarks/throughput.py",
    "benchmarks/measure.py",
    "nlutils/study/arithmetic.py",
    "nlutils/study/inputs.py",
)
NETWORKS = ("frame_average", "c3d_small", "c3d_small_non_local")
ROWS = {f"{name}-{device}": (name, device) for device in ("cpu", "cuda") for name in NETWORKS}
RECIPE = Recipe(input="differences")
REPEATS = 7
MATRIX = 2048


class Step:
    """One training step in one of the variants, on batches of the study's own making."""

    def __init__(self, name, inputs, device, *, last=True, compiled=False, half=False, source=None):
        self.inputs, self.device, self.source = inputs, device, source
        with seeded(0):
            self.model = create_model(name, len(inputs.classes), input=RECIPE.input).to(device).train()
        if last:
            channels_last(self.model)
        self.recipe = RECIPE.replace(compile=compiled, precision="bfloat16" if half else "float32")
        self.loss_of = objective(self.model, self.recipe)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.labels = inputs.labels.to(device)
        self.draw = torch.Generator().manual_seed(0)

    def batch(self):
        """The next 16 clips: (x, labels)."""
        picks = torch.randperm(len(self.inputs), generator=self.draw)[: RECIPE.batch]
        told = {"generator": self.draw, "flip": True}
        if self.source is None:
            return self.inputs.batch(RECIPE.input, picks, RECIPE.size, **told), self.labels[picks]
        # The same cuts of clips that are read anew.
        frames = torch.stack([self.source(self.inputs.names[i]) for i in picks])
        fresh = replace(self.inputs, frames=frames)
        everyone = torch.arange(len(picks))
        return fresh.batch(RECIPE.input, everyone, RECIPE.size, **told), self.labels[picks]

    def learn(self, x, labels):
        """Forward, backward, and a step of the optimizer."""
        with autocast(self.recipe, self.device):
            loss = self.loss_of(x, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def __call__(self):
        self.learn(*self.batch())


def read_anew(name, paths):
    """The frames that the study sees of a clip, from its file: uint8 (3, T + 1, H, W)."""
    frames = evenly(decode(paths[name]), RECIPE.frames + 1)
    return torch.from_numpy(resized(frames, RECIPE.resize).transpose(3, 0, 1, 2).copy())


def record(row, told):
    """Time one row; returns what is written."""
    name, device = told
    torch.set_num_threads(1)
    on_gpu = device == "cuda"
    meter = CudaMeter() if on_gpu else CpuMeter()
    clips = open_clips("core8")
    paths = {path.stem: path for path in find().folder.rglob("*") if path.suffix in (".mp4", ".avi")}
    inputs = prepare(clips, RECIPE.frames, RECIPE.resize, flow=False)
    here = inputs.to(device)
    steps = {
        "in_memory": Step(name, here, device, last=False),
        "study": Step(name, here, device),
        "compiled": Step(name, here, device, compiled=True),
    }
    if on_gpu:
        steps["half"] = Step(name, here, device, half=True)
        steps["half_compiled"] = Step(name, here, device, half=True, compiled=True)
    else:
        steps["plain"] = Step(name, inputs, device, last=False, source=lambda clip: read_anew(clip, paths))
    first = {}
    for variant, step in steps.items():
        start = time.perf_counter()
        step()
        first[variant] = round(time.perf_counter() - start, 2)
        step()
    ready = steps["study"].batch()
    a, b = torch.randn(2, MATRIX, MATRIX, device=device)
    calls = {
        **steps,
        "step": lambda: steps["study"].learn(*ready),
        "cut": steps["study"].batch,
        "matrix": lambda: a @ b,
    }
    if not on_gpu:
        calls["decode"] = lambda: [read_anew(clip, paths) for clip in inputs.names[: RECIPE.batch]]
    seconds = timed_in_turns(calls, REPEATS, meter)
    middle = {variant: statistics.median(taken) for variant, taken in seconds.items()}
    rates = {variant: round(RECIPE.batch / middle[variant], 1) for variant in calls if variant != "matrix"}
    sums = multiply_adds(steps["study"].model, ready[0])
    return {
        "row": row,
        "model": name,
        "input": RECIPE.input,
        "batch": RECIPE.batch,
        "clips_per_second": rates,
        "multiply_adds_per_second": {
            # Backward makes the products twice more: for the input and for the weights.
            "step": round(3 * sums / middle["step"]),
            "matrix": round(MATRIX**3 / middle["matrix"]),
        },
        "first_step_seconds": first,
        "seconds": seconds,
        "provenance": {**provenance(torch.device(device)), "code": code_digest()},
    }


def code_digest() -> str:
    """The digest of what a record depends on."""
    root = project_root()
    return digest([root / source for source in SOURCES], root)


def say(result):
    """What is printed of a record."""
    return [f"{variant} {rate}" for variant, rate in result["clips_per_second"].items()]


def main(arguments=None) -> int:
    """The command."""
    return record_rows(
        "throughput", ROWS, record, code_digest(), say, "Clips a second in training.", arguments
    )


if __name__ == "__main__":
    sys.exit(main())
