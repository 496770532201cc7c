"""Improved dense trajectories as a network: learning eight clips, what is kept, what is refused."""

import numpy as np
import pytest
import torch

from nlutils.torch.models.idt import IDT
from nlutils.video.descriptors import SMALL, improved_trajectories
from nlutils.video.fisher import held_out_scores, sharpness
from nlutils.video.procedural import Actions
from nlutils.video.tracks import Limits

torch.set_num_threads(1)
OPTIONS = {**SMALL, "step": 4, "components": 6, "gaussians": 2}


@pytest.fixture(scope="module")
def eight():
    """Eight clips as networks see them, their labels, and their frames."""
    actions = Actions(12, frames=16, size=(40, 56), seed=1)
    clips = [actions[index] for index in range(8)]
    frames = np.stack([clip.frames for clip in clips])
    x = (torch.from_numpy(frames.transpose(0, 4, 1, 2, 3)).float() / 255 - 0.45) / 0.225
    return x, torch.tensor([clip.label for clip in clips]), frames


@pytest.fixture(scope="module")
def fitted(eight):
    x, labels, _ = eight
    return IDT(6, **OPTIONS).fit([(x[:4], labels[:4]), (x[4:], labels[4:])])


def test_eight_clips_are_learnt(eight, fitted, tmp_path):
    x, labels, _ = eight
    scores = fitted(x)
    assert scores.shape == (8, 6)
    assert scores.dtype == x.dtype
    assert scores.argmax(dim=1).tolist() == labels.tolist()
    torch.save(fitted.state_dict(), tmp_path / "idt.pt")
    copy = IDT(6, **OPTIONS)
    copy.load_state_dict(torch.load(tmp_path / "idt.pt", weights_only=True))
    assert torch.equal(copy(x[:2]), scores[:2])


def test_scores_are_as_sure_as_clips_that_were_not_seen_allow(eight):
    """Where a class has a single clip nothing can be held out; with two of each, a factor is learnt."""
    x, labels, _ = eight
    assert min(labels.bincount()) == 1
    assert IDT(6, **OPTIONS).fit([(x, labels)]).sharpness == 1.0
    halves = torch.arange(8) % 2
    model = IDT(2, **OPTIONS).fit([(x, halves)])
    encoded = model.encoding.vectors(model.describe(x))
    held_out = held_out_scores(model.encoding.svm, encoded, halves.numpy(), 2)
    assert model.sharpness == sharpness(held_out, halves.numpy()) != 1.0
    expected = model.sharpness * model.encoding.svm.scores(encoded)
    torch.testing.assert_close(model(x), torch.from_numpy(expected).float())


def test_descriptors_are_those_of_the_clip_whatever_its_scale(eight):
    x, _, frames = eight
    model = IDT(6, **OPTIONS)
    low, high = frames[0].min(), frames[0].max()
    stretched = np.rint((frames[0].astype(float) - low) / (high - low) * 255).astype(np.uint8)
    tracks = {name: OPTIONS[name] for name in SMALL}
    expected = improved_trajectories(stretched, **tracks)
    for one in (x[:1], 3 * x[:1] - 7):
        (found,) = model.describe(one)
        assert list(found) == ["shape", "hog", "hof", "mbhx", "mbhy"]
        for name, values in found.items():
            assert len(values) > 10
            np.testing.assert_array_equal(values, expected[name])


def test_options_reach_the_tracks(eight):
    x, _, _ = eight
    (usual,) = IDT(6, **OPTIONS).describe(x[:1])
    count = len(usual["hog"])
    for other in ({"scales": 1}, {"step": 8}, {"length": 12}, {"limits": Limits(least_motion=1)}):
        assert len(IDT(6, **OPTIONS | other).describe(x[:1])[0]["hog"]) != count, other
    for other in ({"patch": 12}, {"median": 5}):
        (found,) = IDT(6, **OPTIONS | other).describe(x[:1])
        assert not np.array_equal(found["hof"], usual["hof"]), other


def test_a_clip_without_structure_has_no_track(fitted):
    blank = torch.full((1, 3, 16, 40, 56), 0.7)
    assert len(fitted.describe(blank)[0]["shape"]) == 0
    assert fitted(blank)[0].tolist() == pytest.approx(fitted.encoding.svm.bias.tolist())


def test_nothing_is_trained_by_gradients_and_what_is_fitted_is_counted(eight, fitted):
    x, labels, _ = eight
    assert (fitted.trains, fitted.second_stage) == (False, True)
    assert list(fitted.parameters()) == []
    with pytest.raises(RuntimeError, match="no weights that a loss could train; call fit"):
        fitted.loss(x, labels)
    # Of each kind: mean and projection, mixture; of the SVM a weight for each of 2 K D numbers, and a bias.
    D, K, widths = 6, 2, (30, 96, 108, 96, 96)
    encoders = sum(W + W * D + K * (1 + 2 * D) for W in widths)
    assert fitted.fitted_numbers() == encoders + 6 * (len(widths) * 2 * K * D + 1)
    fresh = IDT(6, **OPTIONS)
    assert fresh.fitted_numbers() == 0
    with pytest.raises(RuntimeError, match="idt knows no Fisher vectors yet; call fit"):
        fresh(x)


def test_mixtures_learn_from_so_many_samples(eight, fitted):
    x, labels, _ = eight
    few = IDT(6, **OPTIONS, samples=60).fit([(x, labels)])
    states = few.encoding.state(), fitted.encoding.state()
    assert not np.allclose(*(state["hog.mean"] for state in states))
    assert few.fitted_numbers() == fitted.fitted_numbers()


def test_options_from_a_file_are_the_same_network(fitted):
    limits = {"least_spread": 0, "least_motion": 0}
    IDT(6, **OPTIONS | {"limits": limits}).load_state_dict(fitted.state_dict())


@pytest.mark.parametrize(
    "other",
    [
        {"step": 5},
        {"length": 12},
        {"patch": 12},
        {"scales": 1},
        {"median": 5},
        {"limits": None},
        {"components": 4},
        {"gaussians": 3},
    ],
)
def test_a_fitted_state_is_not_taken_for_other_options(fitted, other):
    copy = IDT(6, **OPTIONS | other)
    (name,) = other
    with pytest.raises(ValueError, match=rf"{name}=.* but this state was fitted with {name}="):
        copy.load_state_dict(fitted.state_dict())
    assert copy.fitted_numbers() == 0


def test_what_cannot_be_meant_is_named(eight):
    x, _, _ = eight
    for options, message in (
        ({"patch": 0}, "patch=0 must be a whole number"),
        ({"scales": 1.5}, "scales=1.5 must be a whole number"),
        ({"median": 2}, "median=2 is not known; use one of 1, 3, 5"),
        ({"limits": 3}, "limits=3 must be a Limits"),
        ({"samples": 0}, "samples=0 must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            IDT(2, **options)
    model = IDT(6, **OPTIONS)
    with pytest.raises(ValueError, match=r"must be \(B, 3, T, H, W\), because it is rgb"):
        model.describe(x[:, :2])
    with pytest.raises(ValueError, match="length=15 needs 16 frames or more; the clip has 8"):
        model.describe(x[:, :, :8])
    with pytest.raises(ValueError, match="patch=44 is larger than the picture"):
        IDT(6, **OPTIONS | {"patch": 44}).describe(x)


def test_it_says_which_clips_it_takes():
    assert IDT(6).clip_shapes() == ((16, 40, 56),)
    assert IDT(6, length=20, patch=48).clip_shapes() == ((21, 48, 56),)
