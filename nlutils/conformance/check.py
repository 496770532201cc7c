"""`check`: all named checks over one block."""

import sys
from contextlib import nullcontext

from nlutils.conformance.case import Case
from nlutils.conformance.checks import CHECKS
from nlutils.conformance.definition import computes, options
from nlutils.conformance.report import Report, Result
from nlutils.conformance.subject import Disagreement, NotRunnable, one_line

__all__ = ["check"]


def check(block, example_input, weights=None) -> Report:
    """Run a non-local block of any origin through named checks.

    block          a torch.nn.Module, channels first, or a Keras layer, channels last; 1D, 2D or 3D. A fresh
                   one: that a block starts as the identity cannot be told once it has been trained, and
                   without a norm whose running mean has moved training does not show
    example_input  a batch of maps that the block takes, (B, C, *size) or (B, *size, C). Its axes count and
                   not its values: the checks draw their own numbers, on all of its frames and at most
                   4 x 6 places, 6 x 8 in 2D, 24 in 1D (half precision: on all of it, up to 1,568 positions)
    weights        where the parts of the block are: {"theta": …, "phi": …, "g": …, "w_z": …, "norm": …,
                   "w_f": …}, each a dotted path ("conv_out.conv"), a layer or a parameter. What a block lacks
                   is left out: theta and phi for a Gaussian, the norm, w_f but for concatenation. A missing
                   bias counts as zero. None: the names just given, as our own blocks have them; a block
                   without them is run through the checks that need no weights

    The block stays as it is: the checks work on a copy in float64. A Keras layer that cannot be made anew
    from its config is used itself, in its own precision, and gets its weights back.

    Returns a `Report`; a check that could not be run says so and why. Raises TypeError or ValueError for a
    block of neither framework, an input without positions, or a place in `weights` that does not exist.
    """
    kind, guard = _kind(block)
    with guard:
        subject = kind(block, example_input)
        try:
            if subject.broken:
                results = [Result("runs", "wrong", subject.broken)]
                results += [
                    Result(name, "not run", "the block does not run") for name in CHECKS if name != "runs"
                ]
                return _report(block, subject, "nothing", {}, results)
            case = Case(subject, subject.locate(weights))
            results = [_run(name, function, case) for name, function in CHECKS.items()]
            return _report(block, subject, computes(case), options(case), results)
        finally:
            subject.release()


def _run(name, function, case):
    try:
        result, diagnosis = function(case)
    except NotRunnable as error:
        result, diagnosis = "not run", str(error)
    except Disagreement:
        raise
    except Exception as error:  # the block raises: that is what the check found
        result, diagnosis = "wrong", f"raises {type(error).__name__}: {one_line(error)}"
    finally:
        case.subject.reset()
    return Result(name, result, diagnosis)


def _kind(block):
    """The `Subject` for this framework, and what keeps its random numbers as they were."""
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    # Keras first: a layer of its PyTorch backend is an nn.Module too.
    if keras is not None and isinstance(block, keras.layers.Layer):
        from nlutils.conformance.keras_subject import KerasSubject

        return KerasSubject, nullcontext()
    if torch is not None and isinstance(block, torch.nn.Module):
        from nlutils.conformance.torch_subject import TorchSubject

        return TorchSubject, torch.random.fork_rng(devices=[])
    raise TypeError(f"block is a {type(block).__name__}; it must be a torch.nn.Module or a Keras layer")


def _report(block, subject, computes, options, results):
    maps = (*subject.size, subject.channels) if subject.channels_last else (subject.channels, *subject.size)
    name = f"{type(block).__module__}.{type(block).__qualname__}"
    return Report(name, subject.framework, (2, *maps), computes, options, tuple(results))
