"""The Visual Interaction Network on springs and billiards: better than constant velocity, 50 frames ahead?

    python -m benchmarks.interaction_networks --list
    python -m benchmarks.interaction_networks                    # all rows, under 4 minutes of one core
    python -m benchmarks.interaction_networks --row "springs-*" --again

One file a row, `data/results/interaction_networks/<row>.json`; a row that these very sources have recorded
is passed over. Beside the network stand predictions without one: constant velocity from the *true* last
state, standing still at the true last place, always the middle of the box, and each disc alone under the
true law (billiards: with walls, without the other discs). Rows that end in "-alone" are the control whose
cores have no relations. The row that ends in "-frames" sees pictures; its encoder first learns alone, from
the second term of the loss, which is cheaper than a step of the whole network.
"""

import functools
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.records import provenance, record_rows
from nlutils.origin import digest
from nlutils.paths import project_root
from nlutils.study import seeded
from nlutils.torch.models.interaction import VisualInteractionNetwork
from nlutils.video import physics
from nlutils.video.physics import Simulations, simulate

SEEN, AHEAD, TRAINED = 6, 50, 8  # frames that a network is given, predicts in the test, predicts in training
TRAIN, TEST = 400, 200  # simulations, of seeds 0 and 1
BATCH, ENCODER_BATCH = 16, 32  # of the whole network, of the encoder alone
LENGTH = 64  # frames of a simulation to train on
SHOWN = 4  # test simulations of which the predicted places are kept
UNITS = torch.tensor([1.0, 1.0, 10.0, 10.0])  # velocities a ten frames: as large, on average, as places
PARTS = 20  # of the training, for the recorded losses
# What a record depends on.
SOURCES = (
    "benchmarks/interaction_networks.py",
    "nlutils/torch/models/interaction.py",
    "nlutils/video/physics.py",
    "nlutils/video/procedural/texture.py",
)


def rows() -> dict:
    """{row: what is trained, and how}."""
    states = {"input": "states", "encoder_steps": 0, "steps": 600, "rate": 3e-3}
    frames = {"input": "rgb", "encoder_steps": 520, "steps": 160, "rate": 3e-3}
    found = {}
    for system in ("springs", "billiards"):
        found[f"{system}-states"] = {"system": system, **states, "relations": True}
        found[f"{system}-states-alone"] = {"system": system, **states, "relations": False}
    found["springs-frames"] = {"system": "springs", **frames, "relations": True}
    return found


@functools.cache
def code() -> str:
    """The digest of SOURCES."""
    root = project_root()
    return digest((root / source for source in SOURCES), root)


def windows(sequences: torch.Tensor, number: torch.Tensor, start: torch.Tensor, length: int) -> torch.Tensor:
    """From sequences (count, T, ...) the `length` frames of number[b] from start[b] on: (B, length, ...)."""
    return sequences[number[:, None], start[:, None] + torch.arange(length)]


def clips(frames: torch.Tensor, expects) -> torch.Tensor:
    """uint8 (B, T, H, W, 3) -> what the network expects, (B, 3, T, H, W)."""
    x = (frames.float() / 255 - torch.tensor(expects.mean)) / torch.tensor(expects.std)
    return x.permute(0, 4, 1, 2, 3)


def train(model, states: torch.Tensor, frames: torch.Tensor | None, row: dict, until=None) -> list[float]:
    """Train on random windows; the mean loss of each PARTS-th of the steps. `until` stops it earlier.

    A code is of the last of its three frames: six frames give the codes of frames 2 to 5.
    """

    def seen(number, start, length):
        return clips(windows(frames, number, start, length), model.expects)

    def whole(number, start):
        target = windows(states, number, start + 2, SEEN - 2 + TRAINED)
        return model.loss(target[:, : SEEN - 2] if frames is None else seen(number, start, SEEN), target)

    def encoder_alone(number, start):
        codes = model.encoder(seen(number, start, 3))
        return F.mse_loss(model.decoder(codes), windows(states, number, start + 2, 1))

    if row["encoder_steps"]:
        draw = torch.Generator().manual_seed(1)
        number, start = (torch.randint(high, (64,), generator=draw) for high in (len(states), LENGTH - 2))
        standardise(model.encoder, seen(number, start, 3))
        descend(model, encoder_alone, states.shape, ENCODER_BATCH, row["rate"], row["encoder_steps"])
    losses = descend(model, whole, states.shape, BATCH, row["rate"], row["steps"], until)
    length = row["steps"] // PARTS
    return [float(np.mean(losses[k : k + length])) for k in range(0, len(losses), length)]


@torch.no_grad()
def standardise(encoder, x: torch.Tensor) -> None:
    """Scale weights and set biases so that each convolution's channels have mean 0 and deviation 1 on `x`.

    In the spirit of Mishkin and Matas, "All you need is a good init", ICLR 2016. With weights drawn alone,
    32 maxima over a picture hardly differ from one picture to the next, and training stands still for its
    first two hundred steps.
    """

    def hook(layer, inputs, output):
        axes = [axis for axis in range(output.ndim) if axis != 1]
        mean, deviation = output.mean(dim=axes), output.std(dim=axes)
        layer.weight /= deviation.view(-1, *[1] * (layer.weight.ndim - 1))
        layer.bias.copy_((layer.bias - mean) / deviation)
        shape = (1, -1, *[1] * (output.ndim - 2))
        return (output - mean.view(shape)) / deviation.view(shape)

    layers = [layer for layer in encoder.modules() if isinstance(layer, torch.nn.Conv2d)]
    hooks = [layer.register_forward_hook(hook) for layer in (*layers, encoder.pair_code)]
    encoder(x)
    for each in hooks:
        each.remove()


def descend(model, loss_of, shape, batch, rate, steps, until=None) -> list[float]:
    """Adam, its rate up for a twentieth of the steps and then down; the loss of each step."""
    draw = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.05)
    losses = []
    for _ in range(until or steps):
        number = torch.randint(shape[0], (batch,), generator=draw)
        start = torch.randint(shape[1] - SEEN - TRAINED + 1, (batch,), generator=draw)
        optimiser.zero_grad()
        loss = loss_of(number, start)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def errors(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The mean distance of places (count, steps, N, 2) from the true ones, for each simulation and step."""
    return np.linalg.norm(predicted[..., :2] - true[..., :2], axis=-1).mean(axis=-1)


def without_a_network(system: str, last: np.ndarray) -> dict:
    """Predictions (count, AHEAD, N, 4) from the true states (count, N, 4) of the last frame that is seen."""
    ahead = np.arange(1, AHEAD + 1)[:, None, None]
    still = np.repeat(last[:, None], AHEAD, axis=1)
    straight = still.copy()
    straight[..., :2] += ahead * last[:, None, :, 2:]
    alone = simulate(system, last[:, :, None], AHEAD + 1)[:, :, 1:, 0].swapaxes(1, 2)
    return {
        "constant_velocity": straight,
        "standing_still": still,
        "middle_of_the_box": np.zeros_like(still),
        "each_alone": alone,
    }


def pictures(simulations: Simulations, states: np.ndarray, count: int) -> torch.Tensor:
    """The first `count` frames of each: uint8 (simulations, count, H, W, 3)."""
    drawn = [
        physics.render(each[:count], background=simulations.background(index))
        for index, each in enumerate(states)
    ]
    return torch.from_numpy(np.stack(drawn))


def prepared(row: dict, simulations: int = TRAIN):
    """A row's fresh network, and the states and, where it sees them, pictures to train it on."""
    known = Simulations(row["system"], simulations, frames=LENGTH, seed=0)
    states = known.states()
    frames = pictures(known, states, LENGTH) if row["input"] == "rgb" else None
    with seeded(0):
        model = VisualInteractionNetwork(known.discs, input=row["input"], relations=row["relations"])
    # channels_last: the same sums, in two thirds of the time
    return model.to(memory_format=torch.channels_last), torch.tensor(states).float() * UNITS, frames


@torch.no_grad()
def predict(model, row: dict, new: Simulations, truth: np.ndarray) -> np.ndarray:
    """States (TEST, AHEAD, N, 4) after the SEEN first frames."""
    if row["input"] == "rgb":
        seen = clips(pictures(new, truth, SEEN), model.expects)
    else:
        seen = torch.tensor(truth[:, 2:SEEN]).float() * UNITS
    return (model.eval().rollout(seen, AHEAD) / UNITS).double().numpy()


def run(row: dict) -> dict:
    """Train and test one network."""
    torch.set_num_threads(1)
    begin = time.process_time()
    model, states, frames = prepared(row)
    losses = train(model, states, frames, row)
    seconds = time.process_time() - begin
    new = Simulations(row["system"], TEST, frames=SEEN + AHEAD, seed=1)
    truth = new.states()
    predicted = predict(model, row, new, truth)
    predictions = {"network": predicted, **without_a_network(row["system"], truth[:, SEEN - 1])}
    distances = {name: errors(each, truth[:, SEEN:]) for name, each in predictions.items()}
    mean = {name: each.mean(axis=1) for name, each in distances.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": [round(loss, 6) for loss in losses],
        "seconds": round(seconds, 1),
        "error": {name: round(float(each.mean()), 5) for name, each in mean.items()},
        "better_than_constant_velocity": bool(mean["network"].mean() < mean["constant_velocity"].mean()),
        "share_better": round(float((mean["network"] < mean["constant_velocity"]).mean()), 4),
        "places": predicted[:SHOWN, ..., :2].round(3).tolist(),
        "error_by_step": {name: [round(e, 5) for e in each.mean(axis=0)] for name, each in distances.items()},
    }


def record(name: str, row: dict) -> dict:
    """The row's result with where it comes from."""
    sizes = {"batch": BATCH, "encoder_batch": ENCODER_BATCH, "train": TRAIN, "test": TEST}
    sizes |= {"frames_seen": SEEN, "steps_trained": TRAINED, "steps_tested": AHEAD}
    source = provenance("torch") | {"code": code()}
    return {"study": "interaction_networks", "row": name, **row, **sizes, **run(row), "provenance": source}


def main(arguments=None) -> int:
    """Record the rows that are asked for; 1 when a pattern names none."""

    def say(result):
        return result["error"], f"{result['seconds']:.0f} s"

    return record_rows(
        "interaction_networks", rows(), record, code(), say, __doc__.splitlines()[0], arguments
    )


if __name__ == "__main__":
    sys.exit(main())
