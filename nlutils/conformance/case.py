"""What the checks share about the block they look at."""

from functools import cached_property

import numpy as np

from nlutils.conformance.identify import Finding, identify, waking
from nlutils.conformance.subject import NotRunnable, Subject, one_line

__all__ = ["OK", "WRONG", "Case", "apart", "backward_error", "count"]

OK, WRONG = "ok", "wrong"


class Case:
    """One block under check, and what the checks share about it."""

    def __init__(self, subject: Subject, weights_known: bool):
        self.subject, self.weights_known = subject, weights_known

    @cached_property
    def _found(self):
        if not self.weights_known:
            return NotRunnable("say where theta, phi, g and W_z are: `weights`")
        try:
            return identify(self.subject)
        except NotRunnable as error:
            return error
        finally:
            self.subject.reset()

    @property
    def finding(self) -> Finding:
        """The formula of the block; raises NotRunnable."""
        if isinstance(self._found, NotRunnable):
            raise self._found
        return self._found

    @property
    def computed(self):
        """The formula that gives the block's output, with its faults; None when it is not known."""
        found = self._found
        return found.formula if isinstance(found, Finding) and found.fits else None

    @property
    def formula(self):
        """The same where it has no fault, else None."""
        computed = self.computed
        return None if computed is None or computed.faults else computed

    def awake(self, seed=0):
        """An input, after weights that matter have been written into the block."""
        self.subject.reset()
        x, arrays = waking(self.subject, seed)
        self.subject.set(arrays)
        return x

    @cached_property
    def backward(self):
        """None when backward runs, else what it raises."""
        x = self.awake()
        try:
            self.subject.vjp(x, np.ones_like(x), training=True)
        except Exception as error:
            return backward_error(error)
        finally:
            self.subject.reset()


def backward_error(error):
    """What backward raised, in one line."""
    if "modified by an inplace operation" in str(error):
        return "an in-place operation overwrites what backward needs, and backward raises an error"
    return f"backward raises {type(error).__name__}: {one_line(error)}"


def count(number):
    """ "no parameters", "1 parameter", "12 parameters"."""
    return f"{number or 'no'} parameter{'s' * (number != 1)}"


def apart(one, two):
    """The largest difference as a share of the largest value; infinite where one is not finite."""
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        return np.inf
    return float(np.abs(one - two).max() / max(np.abs(two).max(), 1e-30))
