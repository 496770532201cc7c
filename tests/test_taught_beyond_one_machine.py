"""What notebook 20 derives is what `nlutils.study.whole_batch` does to several processes' batch."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident

import pytest
import torch
import torch.nn.functional as F

from nlutils.course.sources import lift
from nlutils.study import whole_batch
from nlutils.study.whole_batch import WholeBatch, part

EPS = 1e-3


def taught(name):
    return lift("beyond_one_machine", name)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Talk:
    """Stands in for torch.distributed: processes are threads, each with its rank, that wait for all."""

    def __init__(self, count):
        self.count, self.barrier, self.said, self.ranks = count, Barrier(count, timeout=20), {}, {}

    def exchange(self, mine):
        self.said[self.ranks[get_ident()]] = mine.clone()
        self.barrier.wait()
        heard = [self.said[rank] for rank in range(self.count)]
        self.barrier.wait()  # nobody speaks again before all have heard
        return heard

    def get_world_size(self):
        return self.count

    def all_gather(self, told, mine):
        for place, heard in zip(told, self.exchange(mine), strict=True):
            place.copy_(heard)

    def all_reduce(self, mine):
        mine.copy_(sum(self.exchange(mine)))


def together(work, parts, monkeypatch):
    """[work(part)] of all parts at once, each in a thread that stands for a process."""
    talk = Talk(len(parts))
    monkeypatch.setattr(whole_batch, "group", talk)

    def serve(rank):
        talk.ranks[get_ident()] = rank
        talk.barrier.wait()  # so that no thread serves twice
        return work(parts[rank])

    with ThreadPoolExecutor(len(parts)) as threads:
        return list(threads.map(serve, range(len(parts))))


@pytest.mark.parametrize("shape", [(7, 3, 2, 4, 5), (7, 3)])
def test_the_taught_normalisation_of_a_whole_batch_is_the_studys(shape, monkeypatch):
    """The same y and the same gradient in every part, for parts of 2, 2 and 3 clips."""
    parts = [part(7, rank, 3) for rank in range(3)]
    assert sorted(one.stop - one.start for one in parts) == [2, 2, 3]
    x, g = 5 + noise(*shape), noise(*shape, seed=1)
    gamma, beta = 1 + noise(3, seed=2).abs(), noise(3, seed=3)

    def study_does(one):
        leaf = one.rows(x).clone().requires_grad_()
        with WholeBatch(one):
            y = F.batch_norm(leaf, None, None, gamma, beta, training=True, eps=EPS)
        return y.detach(), torch.autograd.grad((y * one.rows(g)).sum(), leaf)[0]

    theirs = together(study_does, parts, monkeypatch)
    n, m, v = taught("of_all")([taught("told")(one.rows(x)) for one in parts])
    mine = [taught("normalised")(one.rows(x), m, v, gamma, beta, EPS) for one in parts]
    sums = [taught("two_sums")(one.rows(g), x_hat) for one, (_, x_hat) in zip(parts, mine, strict=True)]
    sum_g, sum_gx = (sum(of_parts) for of_parts in zip(*sums, strict=True))
    for one, (y, x_hat), (their_y, their_gradient) in zip(parts, mine, theirs, strict=True):
        torch.testing.assert_close(y, their_y, rtol=0, atol=1e-12)
        gradient = taught("gradient_through")(one.rows(g), x_hat, v, gamma, n, sum_g, sum_gx, EPS)
        torch.testing.assert_close(gradient, their_gradient, rtol=0, atol=1e-12)


def test_a_parts_mean_and_variance_are_all_that_the_whole_needs():
    x = noise(6, 2, 5)
    for sizes in ((6,), (1, 5), (2, 3, 1)):
        n, m, v = taught("of_all")([taught("told")(one) for one in x.split(sizes)])
        assert n == 30
        torch.testing.assert_close(m, x.mean(dim=(0, 2)), rtol=0, atol=1e-12)
        torch.testing.assert_close(v, x.var(dim=(0, 2), correction=0), rtol=0, atol=1e-12)


def test_a_poisoned_sum_is_found():
    """The function with the fault leaves its last number unwritten."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.isnan(taught("changes")(torch.arange(4.0))).tolist() == [False, False, False, True]
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_map_over_several_machines_is_the_map():
    logits, g = 900 + 5 * noise(3, 8), noise(8, 2, seed=1)
    told = []
    for own, values in zip(logits.split((1, 7), dim=1), g.split((1, 7)), strict=True):
        m = own.amax(dim=1)
        told.append((m, (own - m[:, None]).exp().sum(dim=1), own.softmax(dim=1) @ values))
    m, s, y = (torch.stack(one) for one in zip(*told, strict=True))
    torch.testing.assert_close(taught("joined")(m, s, y), logits.softmax(dim=1) @ g, rtol=0, atol=1e-12)
