"""The benchmark measures what it says, resumes, and what it recorded is whole."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nlutils.paths import project_root

sys.path.insert(0, str(project_root()))

from benchmarks import measure, operation, records, torch_side
from benchmarks.cases import CASES, Target, judge, judge_record
from benchmarks.measure import CpuMeter, medians, peak_mib, ratios, timed_in_turns

PROC = Path("/proc/self/clear_refs")
RECORDED = sorted(records.folder().glob("[!.]*.json"))


@pytest.mark.skipif(not PROC.exists(), reason="the peak of the memory is measured on Linux only")
def test_peak_memory_sees_what_is_given_back_before_the_end():
    def allocate():
        big = np.ones(64 * 2**17)  # 64 MiB
        del big
        np.ones(16 * 2**17)

    assert peak_mib(allocate) == pytest.approx(64, abs=4)
    assert peak_mib(lambda: None) < 4


def test_a_short_call_is_made_again_until_its_turn_is_over():
    class Meter:
        def seconds(self, call):
            return call()

    lengths = {"short": iter([0.06, 0.02, 0.04, *[1.0] * 9]), "long": iter([0.5, *[9.0] * 9])}
    calls = {name: lambda name=name: next(lengths[name]) for name in lengths}
    assert timed_in_turns(calls, 1, Meter()) == {"short": [0.04], "long": [0.5]}


def test_every_round_begins_with_another_variant(monkeypatch):
    monkeypatch.setattr(measure, "TURN", 1e-12)
    called, prepared = [], []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = timed_in_turns(calls, 3, CpuMeter(), prepared.append)
    assert "".join(called) == "".join(prepared) == "abcbcacab"
    assert all(len(numbers) == 3 and min(numbers) >= 0 for numbers in seconds.values())


def test_processor_time_does_not_count_sleep():
    import time

    meter = CpuMeter()
    assert meter.seconds(lambda: time.sleep(0.2)) < 0.1
    busy = np.ones((400, 400))
    assert meter.seconds(lambda: [busy @ busy for _ in range(20)]) > 0


def test_ratios_are_theirs_over_ours():
    values = {"nlutils": {"forward": [1.0, 9.0, 2.0]}, "peer": {"forward": [6.0, 4.0, 5.0]}}
    middle = medians(values)
    assert middle == {"nlutils": {"forward": 2.0}, "peer": {"forward": 5.0}}
    assert ratios(middle, {"peer": "nlutils", "not measured": "nlutils"}) == {"peer": {"forward": 2.5}}


def test_targets_are_judged():
    targets = (
        Target("every peer", "forward", "at least", 2),
        Target("a", "training", "at least", 1),
        Target("a", "memory", "at most", 5),
    )
    case = replace(CASES["dot_product-784"], targets=targets)
    values = {"a": {"forward": 2.0, "memory": 5.1}, "b": {"forward": 1.9}}
    judged = judge(case, values, ("a", "b"))
    assert [(t["variant"], t["value"], t["met"]) for t in judged] == [
        ("a", 2.0, True),
        ("b", 1.9, False),
        ("a", None, None),
        ("a", 5.1, False),
    ]


SMALL = {"size": (2, 3, 3), "channels": 8, "repeats": 2, "raises": ()}


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("concatenation-784", ("nlutils", "materialised_pairs")),
        ("concatenation-6272-operation", ("nlutils", "materialised_sums")),
        ("embedded_gaussian-784", ("nlutils", "nlutils_2d", "plain")),
        ("gaussian-6272", ("nlutils", "plain")),
        ("dot_product-784", ("nlutils", "plain")),
    ],
)
def test_variants_compute_the_same_and_are_timed(name, variants):
    case = replace(CASES[name], variants=variants, **SMALL)
    done = torch_side.measure_time(case)
    assert set(done["values"]) == set(variants)
    assert all(
        len(passes[passed]) == 2 for passes in done["values"].values() for passed in ("forward", "training")
    )
    assert all(gap < 1e-5 for passes in done["agreement"].values() for gap in passes.values())


def test_a_variant_that_computes_something_else_is_refused(monkeypatch):
    wrong = torch_side.plain_operation
    monkeypatch.setattr(
        torch_side, "plain_operation", lambda *words, **options: 1.01 * wrong(*words, **options)
    )
    case = replace(CASES["concatenation-6272-operation"], **SMALL)
    with pytest.raises(RuntimeError, match="materialised_sums computes something else"):
        torch_side.measure_time(case)


@pytest.mark.parametrize("leaf", range(4))
def test_a_wrong_gradient_of_any_input_is_refused(monkeypatch, leaf):
    right = torch_side.plain_operation

    def wrong(form, *values, w_f):
        values = [*values, w_f]
        # The same value, and a gradient that is 1 % larger.
        values[leaf] = 1.01 * values[leaf] - 0.01 * values[leaf].detach()
        return right(form, *values[:3], w_f=values[3])

    monkeypatch.setattr(torch_side, "plain_operation", wrong)
    case = replace(CASES["concatenation-6272-operation"], **SMALL)
    with pytest.raises(RuntimeError, match="materialised_sums computes something else"):
        torch_side.measure_time(case)


@pytest.mark.parametrize("scale", [None, float("nan")])
def test_a_weight_without_a_finite_gradient_is_refused(monkeypatch, scale):
    class Wrong(torch_side.PlainBlock):
        def forward(self, x):
            bias = self.ours.theta.bias
            if scale is None:
                bias.requires_grad_(False)
            elif bias.requires_grad:
                bias.register_hook(lambda gradient: gradient * scale)
            return super().forward(x)

    monkeypatch.setattr(torch_side, "PlainBlock", Wrong)
    case = replace(CASES["dot_product-784"], variants=("nlutils", "plain"), **SMALL)
    with pytest.raises(RuntimeError, match="plain leaves an input or a weight without a finite gradient"):
        torch_side.measure_time(case)


def test_an_error_that_is_known_must_come():
    case = replace(CASES["concatenation-784"], variants=("nlutils", "materialised_pairs"), **SMALL)
    with pytest.raises(RuntimeError, match="materialised_pairs was known to raise"):
        torch_side.measure_time(replace(case, raises=("materialised_pairs",)))


def test_a_missing_peer_names_the_cure():
    with pytest.raises(ModuleNotFoundError, match=r"benchmarks/README\.md"):
        torch_side.measure_time(replace(CASES["dot_product-784"], **SMALL))


def test_weights_are_those_that_training_leaves():
    block = torch_side.our_block(CASES["concatenation-784"])
    assert block.norm.weight.all()
    assert 0.5 < block.theta.weight.std() * 256**0.5 < 2
    assert not any(parameter.any() for name, parameter in block.named_parameters() if name.endswith("z.bias"))


def trial(out, *words):
    return operation.main(["--size", "2,3,3", "--channels", "8", "--out", str(out), *words])


@pytest.fixture
def measured(monkeypatch):
    """Stands in for the processes; returns the names of the cases that were measured."""
    names = []

    def run(case, options, variant=None):
        names.append(case.name)
        if "gaussian" in case.name:
            raise RuntimeError("no luck")
        values = {name: {passed: [1.0] for passed in case.passes} for name in case.variants}
        ours = dict.fromkeys(case.variants[1:], "nlutils")
        return {"values": values, "ours": ours, "provenance": records.provenance("torch")}

    monkeypatch.setattr(operation, "_run", run)
    return names


def test_recorded_cases_are_passed_over_until_the_sources_change(tmp_path, measured, monkeypatch, capsys):
    assert trial(tmp_path, "--case", "dot_product-784") == 0
    assert trial(tmp_path, "--case", "dot_product-*784", "--case", "dot_product-6272") == 0
    assert measured == ["dot_product-784", "dot_product-6272"]
    assert "dot_product-784: recorded already" in capsys.readouterr().out
    assert trial(tmp_path, "--case", "dot_product-784", "--again") == 0
    monkeypatch.setattr(records, "code_digest", lambda framework: "other")
    assert trial(tmp_path, "--case", "dot_product-6272") == 0
    assert measured[2:] == ["dot_product-784", "dot_product-6272"]


@pytest.mark.parametrize(
    "change",
    [
        {"size": (2, 3, 4)},
        {"channels": 4},
        {"instantiation": "concatenation"},
        {"level": "operation"},
        {"variants": ("nlutils", "mmcv")},
        {"variants": ("nlutils", "mmcv", "pytorchvideo", "plain")},
        {"passes": ("forward",)},
        {"raises": ("mmcv",)},
    ],
    ids=str,
)
def test_a_changed_case_is_measured_again(tmp_path, measured, monkeypatch, capsys, change):
    words = ["--case", "dot_product-784", "--out", str(tmp_path)]
    small = replace(CASES["dot_product-784"], size=(2, 3, 3), channels=8)
    monkeypatch.setitem(CASES, small.name, small)
    assert operation.main(words) == operation.main(words) == 0
    assert len(measured) == 1
    monkeypatch.setitem(CASES, small.name, replace(small, **change))
    assert operation.main([*words, "--list"]) == 0
    assert capsys.readouterr().out.endswith("of other code or another case\n")
    assert operation.main(words) == 0
    assert len(measured) == 2


def test_changed_targets_are_judged_anew_without_measuring(tmp_path, measured, monkeypatch, capsys):
    words = ["--case", "dot_product-784", "--out", str(tmp_path)]
    assert operation.main(words) == 0
    targets = (Target("every peer", "forward", "at least", 2),)
    changed = replace(CASES["dot_product-784"], targets=targets)
    monkeypatch.setitem(CASES, changed.name, changed)
    assert operation.main([*words, "--list"]) == operation.main(words) == 0
    assert "0 of 2 targets met" in capsys.readouterr().out
    assert measured == ["dot_product-784"]
    judged = records.read(tmp_path / "dot_product-784.json")["targets"]
    assert [(target["variant"], target["met"]) for target in judged] == [
        ("mmcv", False),
        ("pytorchvideo", False),
    ]


def test_what_fails_is_named_and_the_rest_is_recorded(tmp_path, measured, capsys):
    assert trial(tmp_path, "--case", "gaussian-6272", "--case", "dot_product-784") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dot_product-784.json"]
    printed = capsys.readouterr().out
    assert "gaussian-6272: no luck" in printed
    assert "not measured: gaussian-6272" in printed


def test_unknown_case_and_trial_without_folder_are_errors():
    with pytest.raises(SystemExit, match="no case is named nothing"):
        operation.main(["--case", "nothing"])
    with pytest.raises(SystemExit, match="give --out"):
        operation.main(["--size", "2,3,3"])


def test_a_case_in_its_own_process(tmp_path):
    name = "gaussian-100352-memory"
    assert trial(tmp_path, "--case", name) == 0
    record = records.read(tmp_path / f"{name}.json")
    assert record["positions"] == 18
    assert 0 <= record["medians"]["nlutils"]["training"] < 50
    assert record["targets"][0]["met"]
    assert record["provenance"]["versions"]["torch"] == torch.__version__


def test_a_file_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "half.json"
    path.write_text('{"case": "half"')
    with pytest.raises(ValueError, match=r"half\.json is not a recorded measurement"):
        records.read(path)


def test_every_case_is_recorded():
    assert set(CASES) <= {path.stem for path in RECORDED}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_record_is_consistent(path):
    record = records.read(path)
    case = CASES[record["case"]]
    assert path == records.record_path(case.name, record["device"], record["dtype"])
    assert record["size"] == list(case.size)
    assert record["channels"] == case.channels
    assert record["medians"] == medians(record["values"])
    if case.measure == "time":
        assert record["ratios"] == ratios(record["medians"], record["ours"])
        bound = torch_side.allowed(case, record["dtype"])
        assert all(gap <= bound for gaps in record["agreement"].values() for gap in gaps.values())
    if record["device"] == "cpu":
        assert record["targets"] == judge_record(case, record)
        assert set(case.variants) <= set(record["values"])
    assert record["provenance"]["commit"]


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_all_records_of_a_framework_are_of_one_code_and_one_machine(framework):
    found = [records.read(path) for path in RECORDED]
    mine = [r["provenance"] for r in found if r["framework"] == framework and r["device"] == "cpu"]
    assert len({provenance["code"] for provenance in mine}) == 1
    assert not any(provenance["changed"] for provenance in mine)
    assert len({provenance["machine"]["processor"] for provenance in mine}) == 1


@pytest.fixture(scope="module")
def keras_side():
    from benchmarks import keras_side

    return keras_side


@pytest.mark.skipif(not PROC.exists(), reason="the peak of the memory is measured on Linux only")
def test_the_first_call_is_measured_in_keras(keras_side):
    passes = ("forward graph", "training jit")
    case = replace(CASES["keras-dot_product-6272"], size=(2, 32, 32), channels=16, passes=passes)
    one_map = 2048**2 * 4 / 2**20
    plain = keras_side.measure_memory(case, "materialised")["values"]
    assert all(plain[passed][0] >= one_map for passed in passes)
    ours = keras_side.measure_memory(replace(case, passes=passes[:1]), "nlutils")["values"]
    assert ours[passes[0]][0] < one_map


def test_a_wrong_gradient_is_refused_in_keras(keras_side):
    import tensorflow as tf

    case = replace(CASES["keras-concatenation-6272"], size=(2, 3, 3), channels=8)
    operands = keras_side._operands(case, case.size)
    results = {}
    for name in ("materialised", "nlutils"):
        results[name] = keras_side._compiled(keras_side._operation(case, name), "training graph")(*operands)
        assert len(results[name]) == 5
    assert keras_side.agree(*results.values()) < 1e-5
    for wrong in range(5):
        changed = list(results["materialised"])
        changed[wrong] = tf.constant(1.01) * changed[wrong]
        with pytest.raises(RuntimeError, match="computes something else than nlutils"):
            keras_side.agree(changed, results["nlutils"])
