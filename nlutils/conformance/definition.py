"""The definition, and what is read off the formula that the block was found to compute."""

from nlutils.conformance.case import OK, WRONG
from nlutils.conformance.formulas import FAULTS
from nlutils.conformance.subject import NotRunnable
from nlutils.instantiations import SOFTMAX_FORMS

__all__ = ["FORMULA_CHECKS", "computes", "options"]


def definition(case):
    finding = case.finding
    if not finding.fits:
        untold = f"; `weights` does not tell what {', '.join(finding.untold)} do" if finding.untold else ""
        return WRONG, (
            f"no formula gives this output; the nearest, {_short(finding.formula)}, "
            f"is off by {finding.error:.2g} of x{untold}"
        )
    faults = [FAULTS[name] for name in finding.formula.faults]
    own = [fault.text for fault in faults if fault.check == "definition"]
    if own:
        return WRONG, "; ".join(own)
    if faults:
        return WRONG, f"not the paper's formula: see {' and '.join(fault.check for fault in faults)}"
    others = f"; this map cannot tell it from {_short(finding.others[0])}" if finding.others else ""
    return OK, f"equal to the sums of the paper to {case.subject.tolerance:.0e} of x{others}"


def _short(formula):
    words = [formula.instantiation]
    words += ["scaled"] if formula.scale else []
    words += [f"sub-sampled {formula.subsample}"] if formula.subsample else []
    words += [f"over {formula.attention}"] if formula.attention != "spacetime" else []
    words += [f"in groups of {formula.frames_per_group} frames"] if formula.frames_per_group else []
    words += [f"with {FAULTS[name].text}" for name in formula.faults]
    return ", ".join(words)


def _category(name, text):
    """A check that reads off the formula: wrong when it has a fault of this name."""

    def check(case):
        try:
            finding = case.finding
        except NotRunnable:
            raise NotRunnable("the formula is not known: see definition") from None
        if not finding.fits:
            raise NotRunnable("no formula fits the block's output")
        faults = [FAULTS[fault].text for fault in finding.formula.faults if FAULTS[fault].check == name]
        return (WRONG, "; ".join(faults)) if faults else (OK, text(case, finding))

    return check


def _softmax_text(case, finding):
    if finding.formula.instantiation in SOFTMAX_FORMS:
        return "over j: the weights of a position sum to 1"
    return f"nothing to check: {finding.formula.instantiation} has no softmax"


def _normalisation_text(case, finding):
    if finding.formula.instantiation in SOFTMAX_FORMS:
        return "by the sum of f over j"
    return "by the number of keys M" + (", after sub-sampling" if finding.formula.subsample else "")


def _scale_text(case, finding):
    if not finding.formula.scale:
        return "none"
    return f"d^(-1/2) with d = {finding.widths[1]}"


def _pooling_text(case, finding):
    if finding.formula.subsample is None:
        return "none"
    where = "before phi and g" if finding.formula.subsample == "before" else "after phi and g"
    axes = {1: "by 2 in length", 2: "by 2 in height and width"}
    return f"maxima {where}, " + axes.get(case.subject.ndim, "by 2 in height and width, not in time")


def _order_text(case, finding):
    return "every channel and position is in its place"


def _residual_text(case, finding):
    return "z = x + norm(W_z y)" if finding.oracle.norm else "z = x + W_z y"


FORMULA_CHECKS = {
    "definition": definition,
    "softmax axis": _category("softmax axis", _softmax_text),
    "normalisation": _category("normalisation", _normalisation_text),
    "scale": _category("scale", _scale_text),
    "pooling": _category("pooling", _pooling_text),
    "channel order": _category("channel order", _order_text),
    "residual and W_z": _category("residual and W_z", _residual_text),
}


def options(case) -> dict:
    """What the block computes, named as the options of `nlutils.torch.NonLocalBlock`; {} if not known."""
    try:
        finding = case.finding
    except NotRunnable:
        return {}
    if not finding.fits:
        return {}
    formula, subject = finding.formula, case.subject
    norm = subject.keys.get("norm")
    return {
        "instantiation": formula.instantiation,
        "in_channels": finding.widths[0],
        "inner_channels": finding.widths[1],
        "ndim": subject.ndim,
        "scale": formula.scale,
        "subsample": formula.subsample,
        "attention": formula.attention,
        "frames_per_group": formula.frames_per_group,
        "norm": None if norm is None else "batch" if "running_mean" in norm else "other",
        "epsilon": None if norm is None else subject.norm_epsilon("norm"),
        "faults": list(formula.faults),
    }


def computes(case) -> str:
    """The same in one line."""
    try:
        finding = case.finding
    except NotRunnable as error:
        return f"not known: {error}"
    if not finding.fits:
        return "no formula that is known here"
    known = options(case)
    formula = finding.formula
    words = [
        formula.instantiation,
        "scaled by d^(-1/2)" if formula.scale else "not scaled",
        f"sub-sampled {formula.subsample} phi and g" if formula.subsample else "not sub-sampled",
        f"{known['inner_channels']} of {known['in_channels']} channels inside",
        f"{known['ndim']}D",
    ]
    words += [f"over {formula.attention}"] if formula.attention != "spacetime" else []
    words += [f"in groups of {formula.frames_per_group} frames"] if formula.frames_per_group else []
    if known["norm"] is None:
        words.append("no norm")
    else:
        kind = "batch normalisation" if known["norm"] == "batch" else "a norm"
        words.append(f"{kind} (epsilon {known['epsilon']:.3g})" if known["epsilon"] else kind)
    words += [f"but {FAULTS[name].text}" for name in formula.faults]
    return ", ".join(words)
