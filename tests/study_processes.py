"""What test_study_distributed.py starts with torchrun: two processes that train together.

    torchrun --nproc-per-node 2 tests/study_processes.py FOLDER

Each has a cache of its own, as two machines that share no folder have.
"""

import os
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from test_study_training import TINY, fake_clips
from torch import nn

from nlutils.study import distributed, evaluate, fold, prepare, run_study, seeded, train
from nlutils.study.inputs import Inputs
from nlutils.torch import create_model
from nlutils.torch.models import VideoClassifier
from nlutils.torch.models.inception import BatchNormLSTM

WIDTHS = {"widths": (4, 4, 8, 8)}
NETWORKS = {
    "frame_average": ("frame_average", WIDTHS),
    "c3d_small": ("c3d_small", WIDTHS),
    "c3d_small_non_local": ("c3d_small_non_local", WIDTHS),
    "two_stream_small": ("two_stream_small", {**WIDTHS, "stack": 2}),
    "cnn_rnn": ("cnn_rnn", {**WIDTHS, "hidden": 6}),
    "uniform": ("c3d_small", {**WIDTHS, "non_local": (3,), "kind": "uniform"}),
    "recurrent_norm": (None, {}),
}
# 17 clips in batches of 5: parts of 2 and 3, and a last batch of 2, where one process stands in.
CLIPS = torch.arange(17)
RECIPE = TINY.replace(epochs=2, batch=5, input="rgb", warmup=0)
STUDY = {"2d": ("frame_average", WIDTHS)}


class Exact(Inputs):
    """Clips in float64, so that another order of sums leaves no trace."""

    def batch(self, *args, **kwargs):
        x = super().batch(*args, **kwargs)
        return x.double() if isinstance(x, torch.Tensor) else tuple(one.double() for one in x)


class RecurrentNorm(VideoClassifier):
    """Batch normalisation called as a function, a time step after the other."""

    input = "rgb"

    def __init__(self):
        super().__init__()
        self.lstm, self.classifier = BatchNormLSTM(3 * 8 * 8, 4), nn.Linear(4, 2)

    def forward(self, x):
        frames = nn.functional.avg_pool3d(x, (1, 2, 2)).transpose(1, 2).flatten(2)
        return self.classifier(self.lstm(frames)[:, -1])


def study_inputs():
    return prepare(fake_clips(), TINY.frames, TINY.resize)


def exact_inputs():
    made = study_inputs()
    return Exact(**{field.name: getattr(made, field.name) for field in fields(made)})


def fresh(name):
    network, options = NETWORKS[name]
    with seeded(RECIPE.seed):
        return (RecurrentNorm() if network is None else create_model(network, 2, **options)).double()


def trained(name, inputs, **options):
    """(losses, weights and statistics, logits of the other clips) of a network of `NETWORKS`."""
    model = fresh(name)
    losses = train(model, inputs, CLIPS, RECIPE, **options)
    return losses, model.state_dict(), evaluate(model, inputs, torch.arange(17, 20), RECIPE)


def interrupted(name, inputs, checkpoint):
    """As `trained`, but stopped after an epoch and begun again with a new network."""

    def stop(epoch, loss):
        raise KeyboardInterrupt

    try:
        trained(name, inputs, checkpoint=checkpoint, after_epoch=stop)
    except KeyboardInterrupt:
        return trained(name, inputs, checkpoint=checkpoint)


def study(folder, **options):
    recipe = replace(TINY, epochs=3)
    return run_study("shared", STUDY, [0], recipe=recipe, root=folder, keep_weights=True, **options)


def killed(train, when):
    """`train`, in which the second process is killed behind epoch `when`."""

    def dies(*args, **kwargs):
        def after_epoch(epoch, loss):
            if distributed.rank() == 1 and epoch == when:
                os.kill(os.getpid(), signal.SIGKILL)

        return train(*args, **kwargs, after_epoch=after_epoch)

    return dies


def main(folder):
    torch.set_num_threads(1)
    rank = distributed.rank()
    os.environ["NLUTILS_CACHE"] = str(folder / f"cache{rank}")
    with distributed.joined("cpu"):
        inputs = exact_inputs()
        told = {name: trained(name, inputs) for name in NETWORKS}
        told["interrupted"] = interrupted("c3d_small", inputs, folder / f"cache{rank}" / "interrupted.pt")
        torch.save(told, folder / f"networks{rank}.pt")
    for run in study(folder, clips=study_inputs()):
        print(f"process {rank}: {run.run}")
    fold.train = killed(fold.train, when=1)
    study(folder / "killed", clips=study_inputs())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
