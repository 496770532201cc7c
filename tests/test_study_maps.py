"""Statistics of maps: known for maps made by hand, there for softmax blocks alone."""

import pytest
import torch
from test_study_start import INPUTS, NARROW, TINY

from nlutils.study import run_fold
from nlutils.study.maps import _statistics, map_statistics
from nlutils.torch import create_model
from nlutils.torch.blocks import NonLocalBlock

torch.set_num_threads(1)


def network(**options):
    torch.manual_seed(0)
    return create_model("c3d_small", 2, **{**NARROW, "non_local": [2, 3], **options})


def test_maps_made_by_hand():
    even = torch.full((2, 3, 8), 1 / 8, dtype=torch.float64)
    assert _statistics(even) == {"keys": 8, "effective": 8.0, "apart": 0.0}
    one = torch.zeros(2, 4, 8, dtype=torch.float64)
    one[..., 5] = 1
    assert _statistics(one) == {"keys": 8, "effective": 1.0, "apart": 0.0}
    # Each of four rows looks at a place of its own: 3/4 of its weight is not in the mean row.
    each = torch.eye(4, dtype=torch.float64)[None]
    assert _statistics(each) == {"keys": 4, "effective": 1.0, "apart": 0.75}
    half = torch.tensor([[[0.5, 0.5, 0.0, 0.0]]], dtype=torch.float64)
    assert _statistics(half) == {"keys": 4, "effective": 2.0, "apart": 0.0}
    with pytest.raises(ValueError, match="maps that are not finite"):
        _statistics(half * float("nan"))


def test_a_block_that_sees_only_its_embedding_s_bias_looks_evenly_and_one_of_large_weights_at_one_place():
    model, everything = network(), torch.arange(len(INPUTS))
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, NonLocalBlock)}
    for block in blocks.values():
        torch.nn.init.zeros_(block.theta.weight)
        torch.nn.init.zeros_(block.theta.bias)
    found = map_statistics(model.train(), INPUTS, everything, TINY)
    assert list(found) == list(blocks) == ["features.7", "features.12"]
    assert [entry["keys"] for entry in found.values()] == [2 * 4 * 4, 1 * 2 * 2]
    for entry in found.values():
        assert entry["effective"] == pytest.approx(entry["keys"])
        assert entry["apart"] == pytest.approx(0, abs=1e-6)
    assert model.training
    assert not model.features[7]._forward_pre_hooks
    for block in blocks.values():
        torch.nn.init.constant_(block.theta.bias, 1e4)  # the same for all positions that ask
    for entry in map_statistics(model, INPUTS, everything, TINY).values():
        assert entry["effective"] < 1.5
        assert entry["apart"] < 0.1


def test_a_run_records_softmax_maps_alone():
    options = {**NARROW, "non_local": [3]}
    run = run_fold(INPUTS, "c3d_small", 0, TINY, options=options)
    assert run.maps["features.11"]["keys"] == 4
    assert 1 <= run.maps["features.11"]["effective"] <= 4
    for kind, block in (("uniform", {}), ("window", {}), ("non_local", {"instantiation": "dot_product"})):
        model = network(kind=kind, block=block)
        assert map_statistics(model, INPUTS, torch.arange(4), TINY) == {}
