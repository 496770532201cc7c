"""The named checks, in the order of the report.

Each takes a `Case` and returns (result, diagnosis), or raises NotRunnable.
"""

from nlutils.conformance import behaviour, gradients
from nlutils.conformance.definition import FORMULA_CHECKS

__all__ = ["CHECKS"]

CHECKS = {
    "runs": behaviour.runs,
    "repeatable": behaviour.repeatable,
    **FORMULA_CHECKS,
    "gradients": gradients.gradients,
    "identity at the start": behaviour.identity,
    "statistics": behaviour.statistics,
    "position order": behaviour.position_order,
    "batch mates": behaviour.batch_mates,
    "every parameter": gradients.every_parameter,
    "half precision": behaviour.half_precision,
    "trainable": gradients.trainable,
}
