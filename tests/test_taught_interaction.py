"""Notebook 16: what it builds is the library's, its sums are the law's, its records agree with the code."""

import json

import numpy as np
import pytest
import torch

from benchmarks import interaction_networks as benchmark
from nlutils.course.sources import lift
from nlutils.paths import results_root
from nlutils.torch.models import interaction
from nlutils.video import physics

torch.set_num_threads(1)


def taught(name):
    return lift("interaction_networks", name)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal_with_the_same_weights(ours, library, x, *arguments):
    """Outputs and all gradients, to rounding; a module that is called by another name is bound first."""
    library.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    results = []
    for module in (ours, library):
        x_in = x.clone().requires_grad_()
        y = module.rollout(x_in, *arguments) if arguments else module(x_in)
        direction = numbers(*y.shape, seed=1)
        weights = dict(module.named_parameters())
        slopes = torch.autograd.grad((y * direction).sum(), [x_in, *weights.values()])
        results.append({"y": y, "x": slopes[0], **dict(zip(weights, slopes[1:], strict=True))})
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=1e-11, msg=name)
    assert results[0]["y"].std() > 1e-3
    assert results[0]["x"].abs().max() > 1e-6


@pytest.mark.parametrize("relations", [True, False])
def test_the_taught_core_is_the_packaged_one(relations):
    torch.manual_seed(0)
    ours = taught("InteractionCore")(8, relations).double()
    library = interaction.InteractionCore(8, relations=relations).double()
    assert_equal_with_the_same_weights(ours, library, numbers(2, 4, 8))
    if relations:
        s, N = numbers(1, 4, 8), 4
        effects, packed = ours.effects(s), library.effects(s)
        assert effects.shape == (1, N, N, 8)
        for i in range(N):
            assert not effects[0, i, i].any()
            others = [j for j in range(N) if j != i]
            torch.testing.assert_close(effects[0, i, others], packed[0, i], rtol=0, atol=1e-12)


def test_the_taught_dynamics_are_the_packaged_ones():
    torch.manual_seed(0)
    for offsets in ((1, 2, 4), (1, 3)):
        ours = taught("Dynamics")(8, offsets).double()
        library = interaction.Dynamics(8, offsets=offsets).double()
        assert_equal_with_the_same_weights(ours, library, numbers(2, 5, 3, 8))


@pytest.mark.parametrize("relations", [True, False])
def test_the_taught_network_from_states_is_the_packaged_one(relations):
    torch.manual_seed(0)
    ours = taught("FromStates")(8, relations).double()
    library = interaction.VisualInteractionNetwork(3, input="states", width=8, relations=relations).double()
    assert_equal_with_the_same_weights(ours, library, numbers(2, 4, 3, 4), 6)
    states = numbers(2, 12, 3, 4)
    torch.testing.assert_close(ours.loss(states), library.loss(states[:, :4], states), rtol=1e-12, atol=0)


def test_the_taught_encoder_is_the_packaged_one():
    torch.manual_seed(0)
    ours = taught("VisualEncoder")(2, 8).double()
    library = interaction.VisualEncoder(2, 8).double()
    assert_equal_with_the_same_weights(ours, library, numbers(2, 3, 5, 32, 32))


def test_the_taught_pull_is_the_simulated_one():
    """Two discs at rest, one short step: the velocity gained is the pull."""
    start = np.array([[-0.5, 0.1, 0, 0], [0.2, 0.5, 0, 0]])
    pull = taught("pull")
    pull.__globals__.update(k=physics.STIFFNESS, L=physics.REST)  # assigned in the same cell
    gained = physics.simulate("springs", start, 2, substeps=256)[1, 0, 2:]
    np.testing.assert_allclose(pull(start[0, :2], start[1, :2]), gained, rtol=0.02)


def recorded():
    folder = results_root() / "interaction_networks"
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}


def test_the_records_are_complete():
    rows, records = benchmark.rows(), recorded()
    assert sorted(records) == sorted(rows)
    for name, record in records.items():
        assert {key: record[key] for key in rows[name]} == rows[name], name
        assert (record["frames_seen"], record["steps_tested"], record["test"]) == (6, 50, 200)
        core = 49_792 if record["relations"] else 49_792 - (128 * 64 + 64 + 2 * (64 * 64 + 64))
        encoder = 33_560 + 6_336 + 12_416 if record["input"] == "rgb" else 4 * 64 + 64
        assert record["parameters"] == encoder + 3 * core + 16_512 + 260
        assert len(record["losses"]) == benchmark.PARTS
        for kind, error in record["error"].items():
            assert len(record["error_by_step"][kind]) == 50
            assert error == pytest.approx(np.mean(record["error_by_step"][kind]), abs=1e-4)


def test_all_recorded_networks_predict_better_than_constant_velocity_over_50_steps():
    records = recorded()
    for name, record in records.items():
        assert record["better_than_constant_velocity"], name
        assert record["error"]["network"] < record["error"]["constant_velocity"], name
    with_relations, alone = records["springs-states"], records["springs-states-alone"]
    assert with_relations["error"]["network"] < 0.6 * alone["error"]["network"]


@pytest.mark.parametrize("name", ["springs-states", "billiards-states-alone"])
def test_the_first_recorded_losses_can_be_trained_anew(name):
    """The code of today goes the recorded way for a twentieth of the steps, up to rounding."""
    row = benchmark.rows()[name]
    model, states, _ = benchmark.prepared(row)
    (first,) = benchmark.train(model, states, None, row, until=row["steps"] // benchmark.PARTS)
    assert first == pytest.approx(recorded()[name]["losses"][0], rel=0.02)


def test_the_recorded_baselines_can_be_computed_anew():
    for system in ("springs", "billiards"):
        record = recorded()[f"{system}-states"]
        truth = physics.Simulations(system, record["test"], frames=56, seed=1).states()
        others = benchmark.without_a_network(system, truth[:, 5])
        for kind, prediction in others.items():
            error = np.linalg.norm(prediction[..., :2] - truth[:, 6:, :, :2], axis=-1)
            assert error.mean() == pytest.approx(record["error"][kind], abs=1e-4), (system, kind)
        straight = others["constant_velocity"]
        np.testing.assert_allclose(straight[:, 9, :, :2] - truth[:, 5, :, :2], 10 * truth[:, 5, :, 2:])
        if system == "springs":
            np.testing.assert_allclose(others["each_alone"], straight, atol=1e-12)
        predicted = np.array(record["places"])
        assert predicted.shape == (4, 50, 3, 2)
        first = benchmark.errors(predicted, truth[:4, 6:])[:, :5].mean()
        assert first < 0.5 * benchmark.errors(others["standing_still"], truth[:, 6:])[:, :20].mean()


def test_the_benchmark_trains_alike_twice_and_its_frames_are_those_of_the_states(monkeypatch):
    monkeypatch.setattr(benchmark, "BATCH", 2)
    monkeypatch.setattr(benchmark, "ENCODER_BATCH", 2)
    row = benchmark.rows()["springs-frames"] | {"encoder_steps": 30, "steps": 60}
    losses = []
    for _ in range(2):
        model, states, frames = benchmark.prepared(row, simulations=3)
        assert frames.shape == (3, benchmark.LENGTH, 32, 32, 3)
        losses.append(benchmark.train(model, states, frames, row, until=3))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1
    red = frames[0, 7, ..., 0].float() - frames[0, 7, ..., 1:].amax(dim=2).float()
    brightest = divmod(int(red.argmax()), 32)
    place = states[0, 7, 0, :2].numpy()
    np.testing.assert_allclose((2 * np.array(brightest[::-1]) + 1) / 32 - 1, place, atol=0.25)


def test_the_benchmark_refuses_what_it_does_not_know(capsys):
    assert benchmark.main(["--row", "no-such-row"]) == 1
    assert "springs-frames" in capsys.readouterr().err
    assert benchmark.main(["--list", "--row", "springs-*"]) == 0
    assert capsys.readouterr().out.split() == ["springs-states", "springs-states-alone", "springs-frames"]
