"""From the many descriptors of a clip to one vector, and from that to a class: Fisher vectors, linear SVM."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp

from nlutils.arguments import positive_integer, positive_number, whole_number

__all__ = [
    "FisherEncoder",
    "LinearSVM",
    "Mixture",
    "TrajectoryClassifier",
    "check_labels",
    "fisher_vector",
    "held_out_scores",
    "improved",
    "sharpness",
]

# Fewer descriptors than this a Gaussian, and its variances are noise.
LEAST = 2
# Added to the mixture's variances; whitened numbers have variance 1.
VARIANCE_FLOOR = 1e-4
# What an encoder has learnt, by name, in a classifier's state.
PARTS = ("mean", "projection", "weights", "means", "variances")
# No number may be larger than this: the squares are summed in float64.
LARGEST = float(np.finfo(np.float32).max)


def check_labels(labels, num_classes: int, count: int | None = None) -> np.ndarray:
    """`labels` as an array (`count`,) of whole numbers, two or more of 0 to num_classes - 1; else ValueError.

    `count` None: any number of them.
    """
    labels, last = np.asarray(labels), positive_integer("num_classes", num_classes) - 1
    if labels.ndim != 1 or (count is not None and len(labels) != count):
        expected = "B" if count is None else count
        raise ValueError(f"labels have shape {labels.shape}; they must be ({expected},), one a clip")
    if len(labels) and labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}; they must be whole numbers, 0 to {last}")
    present = np.unique(labels)
    if len(present) < 2 or present[0] < 0 or present[-1] > last:
        raise ValueError(f"labels hold {present.tolist()}; they must hold two or more of 0 to {last}")
    return labels


def _check_rows(name, values, width=None) -> np.ndarray:
    """`values` as float64 (N, W) without NaN and infinity, W = `width` where it is given; else ValueError."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or width not in (None, values.shape[1]):
        raise ValueError(f"{name} have shape {values.shape}; they must be (N, {width or 'W'})")
    right = np.abs(values) <= LARGEST  # not so for NaN
    if not right.all():
        n, w = map(int, np.argwhere(~right)[0])
        raise ValueError(
            f"{name}[{n}, {w}]={values[n, w]} must be a finite number, of a size that float32 can hold"
        )
    return values


@dataclass(frozen=True)
class Mixture:
    """A mixture of K Gaussians with diagonal covariance over D numbers, float64.

    weights (K,), means (K, D), variances (K, D)
    """

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    @classmethod
    def fit(cls, samples, gaussians: int, seed: int = 0) -> "Mixture":
        """Expectation maximisation from k-means, by scikit-learn, on `samples` (N, D)."""
        from sklearn.mixture import GaussianMixture  # here and below: scikit-learn takes a second to import

        fitted = GaussianMixture(
            gaussians, covariance_type="diag", random_state=seed, reg_covar=VARIANCE_FLOOR
        )
        fitted.fit(_check_rows("samples", samples))
        return cls(fitted.weights_, fitted.means_, fitted.covariances_)

    def log_joint(self, samples) -> np.ndarray:
        """log (weight_k N(x_n; k)): float64 (N, K)."""
        samples = np.asarray(samples, np.float64)
        precision = 1 / self.variances
        # sum over d of (x - m)^2 / v, as three matrix products
        distance = (
            samples**2 @ precision.T
            - 2 * samples @ (self.means * precision).T
            + (self.means**2 * precision).sum(axis=1)
        )
        size = self.means.shape[1] * np.log(2 * np.pi) + np.log(self.variances).sum(axis=1)
        return np.log(self.weights) - (size + distance) / 2

    def log_likelihood(self, samples) -> np.ndarray:
        """log p(x_n): float64 (N,)."""
        return logsumexp(self.log_joint(samples), axis=1)

    def posteriors(self, samples) -> np.ndarray:
        """p(k | x_n): float64 (N, K); rows sum to 1."""
        joint = self.log_joint(samples)
        return np.exp(joint - logsumexp(joint, axis=1, keepdims=True))


def fisher_vector(samples, mixture: Mixture) -> np.ndarray:
    """How the mixture would have to change to fit `samples` (N, D) better: float64 (2 K D,).

    The gradient of the mean log-likelihood with respect to the K means and then to the K standard deviations,
    divided by the square root of the Fisher information of one sample (its approximation for well separated
    Gaussians), with q = p(k | x):

        mean over n of  q (x - m) / s / sqrt(w)    and    mean over n of  q (((x - m) / s)^2 - 1) / sqrt(2 w)

    Perronnin, Sánchez and Mensink, "Improving the Fisher kernel for large-scale image classification", ECCV
    2010. Without a sample it is zero. Raises ValueError for samples of another shape, NaN and infinity.
    """
    samples = _check_rows("samples", samples, mixture.means.shape[1])
    if len(samples) == 0:
        return np.zeros(2 * mixture.means.size)
    q = mixture.posteriors(samples) / len(samples)
    # The sums over n of q, q x and q x^2 tell both gradients.
    zeroth, first, second = q.sum(axis=0)[:, None], q.T @ samples, q.T @ samples**2
    means, variances, weights = mixture.means, mixture.variances, mixture.weights[:, None]
    to_mean = (first - zeroth * means) / np.sqrt(variances * weights)
    squares = second - 2 * means * first + means**2 * zeroth
    to_deviation = (squares / variances - zeroth) / np.sqrt(2 * weights)
    return np.concatenate([to_mean.ravel(), to_deviation.ravel()])


def improved(vector) -> np.ndarray:
    """The square root of each number, its sign kept, then length 1; zero stays zero (Perronnin et al.)."""
    vector = np.sign(vector) * np.sqrt(np.abs(vector))
    length = np.linalg.norm(vector)
    return vector / length if length > 0 else vector


class FisherEncoder:
    """PCA with whitening, a Gaussian mixture, improved Fisher vectors: descriptors of one kind in, 2 K D out.

    `fit` takes the descriptors (N, W) of many clips together, `encode` those of one clip. PCA keeps
    `components` = D numbers (None: half of W), or W where that is less, each divided by its standard
    deviation; the mixture has `gaussians` = K parts. With the defaults a vector has 32,768 numbers. Raises
    ValueError for descriptors of another shape, NaN and infinity.
    """

    def __init__(self, components: int | None = 64, gaussians: int = 256, seed: int = 0):
        self.components = None if components is None else positive_integer("components", components)
        self.gaussians = positive_integer("gaussians", gaussians)
        self.seed = whole_number("seed", seed)
        self.mean = self.projection = self.mixture = None

    def fit(self, descriptors) -> "FisherEncoder":
        """Learn the projection and the mixture. Raises ValueError for too few descriptors."""
        descriptors = _check_rows("descriptors", descriptors)
        width = descriptors.shape[1]
        kept = min(self.components or max(1, width // 2), width)
        needed = max(LEAST * self.gaussians, kept)
        if len(descriptors) < needed:
            raise ValueError(
                f"gaussians={self.gaussians} and components={kept} need {needed} descriptors or more, and "
                f"there are {len(descriptors)}; use smaller numbers, more clips or denser tracks"
            )
        from sklearn.decomposition import PCA

        pca = PCA(kept, svd_solver="covariance_eigh").fit(descriptors)
        # A direction in which nothing varies is left as small as it is.
        variance = pca.explained_variance_
        self.mean = pca.mean_
        self.projection = pca.components_.T / np.sqrt(np.maximum(variance, 1e-8 * variance[0] + 1e-12))
        self.mixture = Mixture.fit(self.project(descriptors), self.gaussians, self.seed)
        return self

    def project(self, descriptors) -> np.ndarray:
        """PCA and whitening: (N, W) -> float64 (N, D)."""
        if self.projection is None:
            raise RuntimeError("this encoder knows no projection yet; call fit first")
        return (_check_rows("descriptors", descriptors, len(self.projection)) - self.mean) @ self.projection

    def encode(self, descriptors) -> np.ndarray:
        """The improved Fisher vector of one clip's descriptors: float64 (2 K D,)."""
        if self.mixture is None:
            raise RuntimeError("this encoder knows no mixture yet; call fit first")
        return improved(fisher_vector(self.project(descriptors), self.mixture))


class LinearSVM:
    """One linear classifier a class, against all others: squared hinge loss and an L2 penalty.

    `cost` = C weighs the loss against the penalty; scikit-learn's LinearSVC (liblinear) does the work.
    """

    def __init__(self, cost: float = 100.0, seed: int = 0):
        self.cost, self.seed = positive_number("cost", cost), whole_number("seed", seed)
        self.weight = self.bias = None

    def fit(self, vectors, labels, num_classes: int) -> "LinearSVM":
        """`vectors` (B, V) and `labels` (B,), two or more of 0 to num_classes - 1; ValueError for others."""
        vectors = _check_rows("vectors", vectors)
        labels = check_labels(labels, num_classes, len(vectors))
        from sklearn.svm import LinearSVC

        self.weight, self.bias = np.zeros((num_classes, vectors.shape[1])), np.full(num_classes, -1.0)
        for label in np.unique(labels):
            svm = LinearSVC(C=self.cost, random_state=self.seed, max_iter=20_000)
            svm.fit(vectors, labels == label)
            self.weight[label], self.bias[label] = svm.coef_[0], svm.intercept_[0]
        return self

    def scores(self, vectors) -> np.ndarray:
        """Signed distances from each class's plane, in units of its margin: float64 (B, num_classes).

        A class that training did not show scores -1: "certainly not".
        """
        if self.weight is None:
            raise RuntimeError("this SVM knows no classes yet; call fit first")
        return _check_rows("vectors", vectors, self.weight.shape[1]) @ self.weight.T + self.bias


def held_out_scores(svm: LinearSVM, vectors, labels, num_classes: int, parts: int = 5) -> np.ndarray:
    """Each clip's scores by an SVM, made as `svm` was, that did not see it: float64 (B, num_classes).

    The clips of each class are dealt to `parts` parts in turn; each part is scored by an SVM of the others.
    """
    vectors, labels = np.asarray(vectors), np.asarray(labels)
    turn = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        turn[mine] = np.arange(len(mine)) % parts
    scores = np.full((len(labels), num_classes), -1.0)
    for part in np.unique(turn):
        here = turn == part
        other = LinearSVM(svm.cost, svm.seed).fit(vectors[~here], labels[~here], num_classes)
        scores[here] = other.scores(vectors[here])
    return scores


def sharpness(scores, labels) -> float:
    """The factor of `scores` (B, num_classes) whose softmax gives `labels` the largest likelihood.

    Platt scaling with one number for all classes, "temperature scaling" (Guo et al., On Calibration of Modern
    Neural Networks, ICML 2017, section 4.2). The order of the scores stays, so no class changes.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)

    def loss(log_factor):
        return -log_softmax(np.exp(log_factor) * scores, axis=1)[np.arange(len(labels)), labels].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


class TrajectoryClassifier:
    """Clips to classes by descriptors of their tracks: PCA, Fisher vectors, linear SVM.

    describe     a function that takes a clip and returns {kind: (N, W)}, such as `improved_trajectories`
    components   PCA keeps so many numbers of each kind; None, the default, half of them
    gaussians    K, of each kind's mixture
    cost         C of the SVM
    samples      PCA and mixtures are learnt from at most so many descriptors of each kind, drawn with `seed`

    Each kind has its own Fisher vector of length 1; they are put one behind the other. A clip without tracks
    is the zero vector. K = 256 is the papers', the other numbers are our choice; a few hundred small clips do
    with K = 16.
    """

    def __init__(
        self,
        num_classes: int,
        describe: Callable[..., Mapping[str, np.ndarray]],
        *,
        components: int | None = None,
        gaussians: int = 256,
        cost: float = 100.0,
        samples: int = 100_000,
        seed: int = 0,
    ):
        self.num_classes = positive_integer("num_classes", num_classes)
        self.describe = describe
        self.samples = positive_integer("samples", samples)
        # They check the numbers now, not when all clips are described.
        encoder, self.svm = FisherEncoder(components, gaussians, seed), LinearSVM(cost, seed)
        self.components, self.gaussians = encoder.components, encoder.gaussians
        self.cost, self.seed = self.svm.cost, self.svm.seed
        self.encoders: dict[str, FisherEncoder] = {}

    def fit(self, clips, labels) -> "TrajectoryClassifier":
        """Learn from `clips` (an iterable) and their `labels`: two or more of 0 to num_classes - 1."""
        labels = check_labels(labels, self.num_classes)
        described = [self.describe(clip) for clip in clips]
        if len(described) != len(labels):
            raise ValueError(
                f"there are {len(described)} clips and {len(labels)} labels; need as many of each"
            )
        rng = np.random.default_rng(self.seed)
        encoders = {}
        for kind in described[0]:
            width = _check_rows(kind, described[0][kind]).shape[1]
            pool = np.concatenate([_check_rows(kind, one[kind], width) for one in described])
            if len(pool) > self.samples:
                pool = pool[np.sort(rng.choice(len(pool), self.samples, replace=False))]
            encoders[kind] = self._encoder().fit(pool)
        self.encoders = encoders
        self.svm.fit([self._vector(one) for one in described], labels, self.num_classes)
        return self

    def vectors(self, clips) -> np.ndarray:
        """The Fisher vectors of `clips`, one a row: float64 (B, kinds 2 K D)."""
        return np.stack([self._vector(self.describe(clip)) for clip in clips])

    def scores(self, clips) -> np.ndarray:
        """The SVM's score of each class: float64 (B, num_classes)."""
        return self.svm.scores(self.vectors(clips))

    def predict(self, clips) -> np.ndarray:
        """The class of each clip: int64 (B,)."""
        return self.scores(clips).argmax(axis=1)

    def state(self) -> dict[str, np.ndarray]:
        """All that was learnt, as arrays by name; empty before `fit`."""
        arrays = {}
        for kind, encoder in self.encoders.items():
            mixture = encoder.mixture
            values = (encoder.mean, encoder.projection, mixture.weights, mixture.means, mixture.variances)
            arrays |= {f"{kind}.{part}": value for part, value in zip(PARTS, values, strict=True)}
        return arrays | ({"svm.weight": self.svm.weight, "svm.bias": self.svm.bias} if arrays else {})

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` of another one gave."""
        kinds = dict.fromkeys(name.rpartition(".")[0] for name in arrays if not name.startswith("svm."))
        self.encoders, self.svm = {}, LinearSVM(self.cost, self.seed)
        for kind in kinds:
            mean, projection, *mixture = (np.asarray(arrays[f"{kind}.{part}"]) for part in PARTS)
            encoder = self._encoder()
            encoder.mean, encoder.projection, encoder.mixture = mean, projection, Mixture(*mixture)
            self.encoders[kind] = encoder
        if kinds:
            self.svm.weight, self.svm.bias = np.asarray(arrays["svm.weight"]), np.asarray(arrays["svm.bias"])

    def _encoder(self):
        return FisherEncoder(self.components, self.gaussians, self.seed)

    def _vector(self, described):
        if not self.encoders:
            raise RuntimeError("this classifier has learnt nothing yet; call fit first")
        return np.concatenate([encoder.encode(described[kind]) for kind, encoder in self.encoders.items()])
