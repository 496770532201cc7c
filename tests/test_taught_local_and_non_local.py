"""Notebook 01: its block is the library's, its pictures are what it says, its recorded rows are its own."""

import importlib.util
import json

import numpy as np
import pytest
import torch

import nlutils.torch
from nlutils.course.sources import lift
from nlutils.paths import project_root, results_root


def taught(name):
    return lift("local_and_non_local", name)


@pytest.fixture(scope="module")
def benchmark():
    path = project_root() / "benchmarks" / "local_and_non_local.py"
    spec = importlib.util.spec_from_file_location("local_and_non_local", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_block_with_similarity_is_the_gaussian_block():
    ours = taught("Block")(taught("similarity"), C=6, d=4).double()
    library = nlutils.torch.NonLocalBlock(6, 4, ndim=2, instantiation="gaussian").double()
    library.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z, expected = ours(x), library(x)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for block, output in ((ours, z), (library, expected)):
        (output * direction).sum().backward()
        assert all(parameter.grad is not None for parameter in block.parameters())
    for ours_p, library_p in zip(ours.parameters(), library.parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad, library_p.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pairs", [1, 2, 4, 8, 12])
def test_every_grey_thing_has_one_twin_of_its_pattern_and_answer(pairs):
    patterns = taught("draw_patterns")(50, np.random.default_rng(0))
    assert len({pattern.tobytes() for pattern in patterns}) == 50
    assert (patterns.sum(axis=(1, 2)) == 8).all()
    x, answer = taught("twins")(20, np.random.default_rng(1), pairs, patterns)
    cells = x.reshape(20, 3, 6, 4, 6, 4).permute(0, 2, 4, 1, 3, 5)  # (B, 6, 6, 3, 4, 4)
    lit = (cells > 0).any(dim=3)
    colours = {}  # answer -> the colour of the twin
    for b in range(20):
        grey = (answer[b] >= 0).nonzero().tolist()
        things = lit[b].flatten(2).any(dim=2).nonzero().tolist()
        assert (len(grey), len(things)) == (pairs, 2 * pairs)
        for r, c in grey:
            assert c >= 4
            look = lit[b, r, c]
            (twin,) = [[i, j] for i, j in things if j < 2 and torch.equal(lit[b, i, j], look)]
            colour = tuple(cells[b, twin[0], twin[1]].flatten(1).amax(dim=1).tolist())
            assert colours.setdefault(int(answer[b, r, c]), colour) == colour
        counts = torch.bincount(answer[b][answer[b] >= 0], minlength=4)
        assert counts.max() - counts.min() <= 1  # how many of each colour says nothing
    assert len(set(colours.values())) == len(colours)


def test_the_records_are_of_the_notebooks_definitions(benchmark):
    rows, digest = benchmark.rows(), benchmark.digest()
    folder = results_root() / "local_and_non_local"
    assert sorted(path.stem for path in folder.glob("*.json")) == sorted(rows)
    for name in rows:
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        assert record["provenance"]["code"] == digest, f"{name}: run benchmarks/local_and_non_local.py"
        told = {key: value for key, value in rows[name].items() if key in record and key != "block"}
        assert told == {key: record[key] for key in told}
        assert record["parameters"] == sum(p.numel() for p in rows[name]["block"]().parameters())
        accuracies = [values for key, values in record.items() if key.startswith("accuracy")]
        assert accuracies
        assert all(len(values) == len(record["seeds"]) == 5 for values in accuracies)


def test_blocks_that_are_compared_have_equally_many_parameters(benchmark):
    rows = benchmark.rows()
    counts = {
        name: sum(parameter.numel() for parameter in rows[f"new-8-{name}"]["block"]().parameters())
        for name in ("itself", "deep", "average", "similarity")
    }
    assert set(counts.values()) == {1136}
    with pytest.raises(SystemExit):
        benchmark.main(["--no-such-option"])
    assert benchmark.main(["--row", "no-such-row"]) == 1
