"""Mixtures, Fisher vectors as gradients, their normalisation, PCA, the SVM, and the three together."""

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from nlutils.video.fisher import (
    FisherEncoder,
    LinearSVM,
    Mixture,
    TrajectoryClassifier,
    check_labels,
    fisher_vector,
    held_out_scores,
    improved,
    sharpness,
)


def mixture_of(gaussians, width, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1.5, gaussians)
    means, variances = rng.normal(size=(gaussians, width)), rng.uniform(0.3, 2, (gaussians, width))
    return Mixture(weights / weights.sum(), means, variances)


def clips_of(classes=3, a_class=6, seed=0):
    """Clips of two kinds of descriptors: class c has its first kind's middles at its own places."""
    rng = np.random.default_rng(seed)
    places = rng.normal(size=(classes, 3, 6)) * 2
    clips, labels = [], []
    for label in np.tile(np.arange(classes), a_class):
        at = places[label][rng.integers(3, size=40)]
        clips.append({"a": at + 0.5 * rng.normal(size=(40, 6)), "b": rng.normal(size=(40, 5))})
        labels.append(label)
    return clips, np.array(labels)


def test_densities_by_the_formula():
    mixture = mixture_of(3, 4)
    samples = np.random.default_rng(1).normal(size=(7, 4))
    joint = np.zeros((7, 3))
    for n, x in enumerate(samples):
        for k in range(3):
            mean, variance = mixture.means[k], mixture.variances[k]
            exponent = -0.5 * ((x - mean) ** 2 / variance).sum()
            joint[n, k] = mixture.weights[k] * np.exp(exponent) / np.sqrt(np.prod(2 * np.pi * variance))
    assert np.allclose(mixture.log_joint(samples), np.log(joint))
    assert np.allclose(mixture.log_likelihood(samples), np.log(joint.sum(axis=1)))
    assert np.allclose(mixture.posteriors(samples), joint / joint.sum(axis=1, keepdims=True))


def test_far_samples_have_posteriors():
    mixture = mixture_of(3, 4)
    assert np.isfinite(mixture.log_likelihood(np.full((1, 4), 1e3))).all()
    assert np.allclose(mixture.posteriors(np.full((1, 4), 1e3)).sum(), 1)


def test_the_fisher_vector_is_the_normalised_gradient_of_the_mean_log_likelihood():
    K, D, step = 3, 4, 1e-5
    mixture = mixture_of(K, D)
    samples = np.random.default_rng(1).normal(size=(9, D)) * 1.5
    deviations = np.sqrt(mixture.variances)

    def likelihood(means, deviations):
        return Mixture(mixture.weights, means, deviations**2).log_likelihood(samples).mean()

    gradient = np.zeros((2, K, D))
    for k in range(K):
        for d in range(D):
            nudge = np.zeros((K, D))
            nudge[k, d] = step
            gradient[0, k, d] = (
                likelihood(mixture.means + nudge, deviations) - likelihood(mixture.means - nudge, deviations)
            ) / (2 * step)
            gradient[1, k, d] = (
                likelihood(mixture.means, deviations + nudge) - likelihood(mixture.means, deviations - nudge)
            ) / (2 * step)
    # The information of one sample: w / s^2 for a mean, 2 w / s^2 for a standard deviation.
    weights = mixture.weights[:, None]
    information = np.stack([weights / mixture.variances, 2 * weights / mixture.variances])
    expected = (gradient / np.sqrt(information)).ravel()
    assert np.abs(expected).max() > 0.1
    assert np.allclose(fisher_vector(samples, mixture), expected, atol=1e-8)


def test_the_fisher_vector_of_the_mixtures_own_samples_vanishes():
    mixture, rng = mixture_of(3, 4), np.random.default_rng(2)
    parts = rng.choice(3, 200_000, p=mixture.weights)
    samples = rng.normal(mixture.means[parts], np.sqrt(mixture.variances[parts]))
    assert np.abs(fisher_vector(samples, mixture)).max() < 0.02


def test_the_fisher_vector_by_hand():
    mixture = Mixture(np.ones(1), np.array([[1.0]]), np.array([[4.0]]))
    # (x - 1) / 2 is 1 and -2: mean -1/2; squares less one 0 and 3: mean 3/2, over the square root of two
    assert np.allclose(fisher_vector([[3.0], [-3.0]], mixture), [-0.5, 1.5 / np.sqrt(2)])


def test_a_vector_has_2_k_d_numbers():
    # K = 256 (wanglimin/TDD, extract_fv.m) and 64 of PCA (the project's page, wanglimin.github.io/tdd)
    mixture = mixture_of(256, 64)
    assert fisher_vector(np.random.default_rng(0).normal(size=(5, 64)), mixture).shape == (32_768,)
    defaults = FisherEncoder()
    assert 2 * defaults.gaussians * defaults.components == 32_768


def test_no_descriptor_is_the_zero_vector():
    mixture = mixture_of(3, 4)
    assert np.array_equal(fisher_vector(np.zeros((0, 4)), mixture), np.zeros(24))
    assert np.array_equal(improved(np.zeros(24)), np.zeros(24))


def test_improved_by_hand():
    assert np.allclose(improved(np.array([9.0, -16.0, 0.0])), [0.6, -0.8, 0])


def test_samples_of_another_width_are_named():
    with pytest.raises(ValueError, match=r"samples have shape \(5, 3\); they must be \(N, 4\)"):
        fisher_vector(np.zeros((5, 3)), mixture_of(3, 4))


def test_a_mixture_finds_its_parts():
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.normal(-3, 0.5, (300, 2)), rng.normal(2, [1.0, 0.3], (700, 2))])
    mixture = Mixture.fit(samples, 2, seed=3)
    order = mixture.means[:, 0].argsort()
    assert np.allclose(mixture.weights[order], [0.3, 0.7], atol=0.02)
    assert np.allclose(mixture.means[order], [[-3, -3], [2, 2]], atol=0.1)
    assert np.allclose(np.sqrt(mixture.variances[order]), [[0.5, 0.5], [1, 0.3]], atol=0.08)
    again = Mixture.fit(samples, 2, seed=3)
    assert np.array_equal(mixture.means, again.means)


def test_pca_whitens():
    rng = np.random.default_rng(0)
    descriptors = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 5
    encoder = FisherEncoder(components=4, gaussians=2).fit(descriptors)
    projected = encoder.project(descriptors)
    assert projected.shape == (500, 4)
    assert np.allclose(projected.mean(axis=0), 0, atol=1e-9)
    assert np.allclose(np.cov(projected.T), np.eye(4), atol=1e-6)
    # They are the directions of the largest variance.
    values = np.linalg.eigvalsh(np.cov(descriptors.T))[::-1]
    assert np.allclose(1 / np.linalg.norm(encoder.projection, axis=0) ** 2, values[:4])
    vector = encoder.encode(descriptors[:30])
    assert vector.shape == (2 * 2 * 4,)
    assert np.linalg.norm(vector) == pytest.approx(1)


def test_pca_keeps_half_or_what_there_is():
    descriptors = np.random.default_rng(0).normal(size=(50, 9))
    assert FisherEncoder(None, 2).fit(descriptors).projection.shape == (9, 4)
    assert FisherEncoder(64, 2).fit(descriptors).projection.shape == (9, 9)
    constant = np.concatenate([descriptors, np.ones((50, 1))], axis=1)
    assert np.isfinite(FisherEncoder(10, 2).fit(constant).encode(constant)).all()


def test_too_few_descriptors_are_named():
    with pytest.raises(ValueError, match="gaussians=4 and components=3 need 8 descriptors or more"):
        FisherEncoder(3, 4).fit(np.zeros((7, 5)))
    with pytest.raises(RuntimeError, match="call fit first"):
        FisherEncoder(3, 4).encode(np.zeros((7, 5)))


def test_the_svm_is_one_against_all():
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(60, 5)), rng.integers(3, size=60)
    vectors[:, :3] += 2 * np.eye(3)[labels]
    svm = LinearSVM(cost=1.0).fit(vectors, labels, num_classes=4)
    scores = svm.scores(vectors)
    assert scores.shape == (60, 4)
    assert (scores[:, 3] == -1).all()  # nothing was said about class 3
    theirs = LinearSVC(C=1.0, random_state=0, max_iter=20_000).fit(vectors, labels)
    assert np.allclose(scores[:, :3], theirs.decision_function(vectors), atol=1e-2)
    assert (scores.argmax(axis=1) == labels).mean() > 0.8


def test_the_svm_minimises_the_regularised_squared_hinge():
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(40, 3)), rng.integers(2, size=40)
    svm = LinearSVM(cost=2.0).fit(vectors, labels, num_classes=2)

    def objective(weight, bias):
        hinge = np.maximum(0, 1 - (2 * labels - 1) * (vectors @ weight + bias))
        return (weight @ weight + bias**2) / 2 + 2.0 * (hinge**2).sum()

    weight, bias = svm.weight[1], svm.bias[1]
    least = objective(weight, bias)
    for _ in range(20):
        assert objective(weight + 0.05 * rng.normal(size=3), bias + 0.05 * rng.normal()) > least


def test_labels_that_cannot_be_learnt_are_named():
    with pytest.raises(ValueError, match=r"labels hold \[1\]; they must hold two or more of 0 to 2"):
        LinearSVM().fit(np.zeros((3, 2)), [1, 1, 1], num_classes=3)
    with pytest.raises(ValueError, match=r"labels hold \[1, 3\]"):
        LinearSVM().fit(np.zeros((3, 2)), [1, 3, 1], num_classes=3)
    with pytest.raises(RuntimeError, match="call fit first"):
        LinearSVM().scores(np.zeros((3, 2)))


def test_a_classifier_learns_and_gives_its_state():
    clips, labels = clips_of()
    classifier = TrajectoryClassifier(3, dict, components=4, gaussians=3).fit(clips, labels)
    assert classifier.vectors(clips).shape == (18, 2 * 2 * 3 * 4)
    assert np.array_equal(classifier.predict(clips), labels)
    # Other clips with the same places.
    others, truth = clips_of(a_class=12)
    assert (classifier.predict(others[18:]) == truth[18:]).mean() > 0.8
    copy = TrajectoryClassifier(3, dict)
    copy.load_state(classifier.state())
    assert np.array_equal(copy.scores(clips), classifier.scores(clips))
    again = TrajectoryClassifier(3, dict, components=4, gaussians=3).fit(clips, labels)
    assert np.array_equal(again.scores(clips), classifier.scores(clips))


def test_a_classifier_takes_clips_without_tracks_and_at_most_some_samples():
    clips, labels = clips_of()
    empty = {"a": np.zeros((0, 6)), "b": np.zeros((0, 5))}
    classifier = TrajectoryClassifier(3, dict, components=4, gaussians=3, samples=100)
    classifier.fit([*clips, empty], [*labels, 0])
    assert not classifier.vectors([empty]).any()
    assert classifier.scores([empty]).shape == (1, 3)
    with pytest.raises(ValueError, match="18 clips and 17 labels"):
        classifier.fit(clips, labels[:-1])
    with pytest.raises(RuntimeError, match="call fit first"):
        TrajectoryClassifier(3, dict).predict(clips)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.0], "labels are float64; they must be whole numbers, 0 to 2"),
        ([False, True], "labels are bool"),
        (["0", "1"], "labels are <U1"),
        ([0, -1], r"labels hold \[-1, 0\]; they must hold two or more of 0 to 2"),
        ([0, 9], r"labels hold \[0, 9\]"),
        ([2, 2], r"labels hold \[2\]"),
        ([], r"labels hold \[\]"),
        ([[0, 1]], r"labels have shape \(1, 2\)"),
    ],
)
def test_labels_are_checked_in_one_place(labels, message):
    vectors = np.eye(2)
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 3)
    with pytest.raises(ValueError, match=message):
        TrajectoryClassifier(3, dict).fit([{"a": vectors}] * len(labels), labels)
    if len(labels) == 2:
        with pytest.raises(ValueError, match=message):
            LinearSVM().fit(vectors, labels, 3)


def test_labels_are_counted():
    assert check_labels((0, 2), 3, 2).tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"labels have shape \(3,\); they must be \(2,\), one a clip"):
        LinearSVM().fit(np.eye(2), [0, 1, 0], 3)
    with pytest.raises(ValueError, match="num_classes=0 must be a whole number"):
        LinearSVM().fit(np.eye(2), [0, 1], 0)
    with pytest.raises(ValueError, match="there are 0 clips and 2 labels"):
        TrajectoryClassifier(3, dict).fit([], [0, 1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros(5), r"have shape \(5,\); they must be \(N, "),
        (np.full((9, 5), np.nan), r"\[0, 0\]=nan must be a finite number"),
        (np.full((9, 5), np.inf), r"\[0, 0\]=inf must be a finite number"),
        (np.full((9, 5), 1e300), r"\[0, 0\]=1e\+300 must be a finite number, of a size that float32"),
        (np.zeros((9, 4)), r"have shape \(9, 4\); they must be \(N, 5\)"),
    ],
)
def test_descriptors_that_cannot_be_encoded_are_named(rows, message):
    good = np.random.default_rng(0).normal(size=(40, 5))
    encoder = FisherEncoder(5, 2).fit(good)
    svm = LinearSVM().fit(good, np.arange(40) % 2, 2)
    calls = [encoder.encode, encoder.project, lambda rows: fisher_vector(rows, encoder.mixture), svm.scores]
    if rows.shape != (9, 4):  # any width can be learnt
        calls += [FisherEncoder(3, 2).fit, lambda rows: LinearSVM().fit(rows, [0] * 8 + [1], 2)]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(rows)


def test_the_largest_descriptors_give_a_vector():
    encoder = FisherEncoder(5, 2).fit(np.random.default_rng(0).normal(size=(40, 5)))
    assert np.linalg.norm(encoder.encode(np.full((3, 5), 1e37))) == pytest.approx(1)


def test_a_clip_with_descriptors_of_another_width_is_named():
    clips, labels = clips_of()
    clips[4]["b"] = clips[4]["b"][:, :3]
    with pytest.raises(ValueError, match=r"b have shape \(40, 3\); they must be \(N, 5\)"):
        TrajectoryClassifier(3, dict, components=4, gaussians=3).fit(clips, labels)


def test_wrong_settings_are_named_before_anything_is_learnt():
    for options, message in (
        ({"cost": -1}, "cost=-1 must be a finite number above 0"),
        ({"cost": float("nan")}, "cost=nan"),
        ({"gaussians": 0}, "gaussians=0"),
        ({"components": 2.5}, "components=2.5"),
        ({"seed": -1}, "seed=-1"),
        ({"samples": 0}, "samples=0"),
    ):
        with pytest.raises(ValueError, match=message):
            TrajectoryClassifier(3, dict, **options)
    with pytest.raises(ValueError, match="cost=0"):
        LinearSVM(cost=0)


def test_defaults():
    assert (LinearSVM().cost, TrajectoryClassifier(2, dict).svm.cost) == (100, 100)  # our choice
    assert TrajectoryClassifier(2, dict).gaussians == 256  # wanglimin/TDD, extract_fv.m
    assert TrajectoryClassifier(2, dict).components is None


def test_held_out_scores_are_those_of_an_svm_that_did_not_see_the_clip():
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0])
    vectors = rng.normal(size=(11, 4)) + labels[:, None]
    scores = held_out_scores(LinearSVM(1.0), vectors, labels, 3, parts=2)
    turn = np.zeros(11, dtype=int)
    turn[[3, 6, 10]] = 1  # the second, fourth and sixth clip of class 0
    turn[[2, 7]] = 1  # and of class 1
    for part in (0, 1):
        other = LinearSVM(1.0).fit(vectors[turn != part], labels[turn != part], 3)
        np.testing.assert_allclose(scores[turn == part], other.scores(vectors[turn == part]))
    assert (scores[:, 2] == -1).all()


def test_sharpness_makes_the_softmax_as_sure_as_it_may_be():
    """Right in 3 of 4: the softmax of two classes shall say 3/4, so the factor is log 3 over the gap of 2."""
    scores = np.array([[1.0, -1.0]] * 4)
    assert sharpness(scores, [0, 0, 0, 1]) == pytest.approx(np.log(3) / 2, rel=1e-4)
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 5, 200)
    noisy = rng.normal(size=(200, 5)) + 2 * np.eye(5)[labels]
    best = sharpness(noisy, labels)

    def loss(factor):
        shifted = factor * noisy - (factor * noisy).max(axis=1, keepdims=True)
        p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
        return -np.log(p[np.arange(200), labels]).mean()

    assert loss(best) < min(loss(0.9 * best), loss(1.1 * best))
