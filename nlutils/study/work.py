"""What is done for a cell of the grid: train it, record it, forget its checkpoint."""

import functools
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from nlutils.study import distributed
from nlutils.study.fold import run_fold
from nlutils.study.grid import Cell
from nlutils.study.inputs import Inputs
from nlutils.study.results import Run, write_run
from nlutils.study.weights import weights_path

__all__ = ["Work"]


@dataclass(frozen=True)
class Work:
    """What all cells of one study share: the clips, and how and where their runs are done and recorded."""

    inputs: Inputs
    device: torch.device
    threads: int = 1
    root: Path | str | None = None
    keep_weights: bool = False

    def recorded(self, cell: Cell) -> Run | None:
        """The recorded run of `cell`, if there is one.

        Raises ValueError when it is one of other settings, or its weights are wanted and were not kept.

        A process that was killed right behind its record has left a checkpoint, which goes now.
        """
        run = distributed.from_first(lambda: cell.recorded(self.inputs, self.root))
        if run is not None:
            kept = weights_path(cell.study, cell.name, self.root)
            if self.keep_weights and not distributed.from_first(kept.is_file):
                raise ValueError(
                    f"{cell.name} is recorded without its weights; "
                    "give another root or study, or delete its record"
                )
            self.forget(cell)
        return run

    def train(self, cell: Cell, keep=None) -> Run:
        """Train and test `cell`; returns the run, unwritten. Its checkpoint stays until `forget`.

        `keep` is a path for the trained weights. Several processes train together, and each of them tests.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self._runner(cell)(
                self.inputs,
                cell.model,
                cell.fold,
                cell.recipe,
                study=cell.study,
                row=cell.row,
                options=cell.options,
                checkpoint=cell.checkpoint(self.inputs),
                keep=keep,
            )
        finally:
            torch.set_num_threads(before)

    def _runner(self, cell):
        if cell.framework == "torch":
            return functools.partial(run_fold, device=self.device)
        from nlutils.study.keras_fold import run_keras_fold  # PyTorch users never import Keras

        return run_keras_fold

    def attempt(self, cell: Cell) -> Run | Exception:
        """`do`, but for the error of a run that fails, which is returned: the other runs go on.

        Of processes that train together one may fail alone; there it is raised, and torchrun ends them all.
        """
        try:
            return self.do(cell)
        except Exception as error:
            if distributed.count() > 1:
                raise
            traceback.clear_frames(error.__traceback__)  # which hold the network and its memory
            return error

    def do(self, cell: Cell) -> Run:
        """Train, test and record `cell`, unless somebody else recorded it meanwhile; returns the run."""
        recorded = self.recorded(cell)
        if recorded is not None:
            return recorded
        keep = weights_path(cell.study, cell.name, self.root)
        result = self.train(cell, keep if self.keep_weights and distributed.first() else None)

        def write():
            write_run(result, self.root)
            return result

        result = distributed.from_first(write)
        self.forget(cell)
        return result

    def forget(self, cell: Cell) -> None:
        """Delete the checkpoint of `cell`."""
        if distributed.first():
            cell.checkpoint(self.inputs).unlink(missing_ok=True)
