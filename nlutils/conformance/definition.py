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
            f"no formula gives this output; the nearest, {in_words(finding.formula)}, "
            f"is off by {finding.error:.2g} of x{untold}"
        )
    faults = [FAULTS[name] for name in finding.formula.faults]
    own = [fault.text for fault in faults if fault.check == "definition"]
    if own:
        return WRONG, "; ".join(own)
    if faults:
        return WRONG, f"not the paper's formula: see {' and '.join(fault.check for fault in faults)}"
    others = ""
    if finding.others:
        more = f" (and {len(finding.others) - 1} more)" if len(finding.others) > 1 else ""
        others = f"; this map cannot tell it from {in_words(finding.others[0])}{more}"
    return OK, f"equal to the sums of the paper to {case.subject.tolerance:.0e} of x{others}"


def in_words(formula, *further):
    """What a formula computes, in one line, with `further` words before its faults."""
    words = [
        formula.instantiation,
        _scale(formula),
        _subsample(formula),
        *([f"over {formula.attention}"] if formula.attention != "spacetime" else []),
        *([f"in groups of {formula.frames_per_group} frames"] if formula.frames_per_group else []),
        *further,
        *(f"but {FAULTS[name].text}" for name in formula.faults),
    ]
    return ", ".join(words)


def _scale(formula):
    return "scaled by d^(-1/2)" if formula.scale else "not scaled"


def _subsample(formula):
    return f"sub-sampled {formula.subsample} phi and g" if formula.subsample else "not sub-sampled"


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
        return (WRONG, "; ".join(faults)) if faults else (OK, text(finding))

    return check


def _softmax_text(finding):
    if finding.formula.instantiation in SOFTMAX_FORMS:
        return "over j: the weights of a position sum to 1"
    return f"nothing to check: {finding.formula.instantiation} has no softmax"


def _normalisation_text(finding):
    if finding.formula.instantiation in SOFTMAX_FORMS:
        return "by the sum of f over j"
    return "by the number of keys M" + (", after sub-sampling" if finding.formula.subsample else "")


FORMULA_CHECKS = {
    "definition": definition,
    "softmax axis": _category("softmax axis", _softmax_text),
    "normalisation": _category("normalisation", _normalisation_text),
    "scale": _category("scale", lambda finding: _scale(finding.formula)),
    "pooling": _category("pooling", lambda finding: _subsample(finding.formula)),
    "channel order": _category("channel order", lambda _: "every channel and position is in its place"),
    "residual and W_z": _category(
        "residual and W_z", lambda finding: "z = x + norm(W_z y)" if finding.oracle.norm else "z = x + W_z y"
    ),
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
    norm = "no norm"
    if known["norm"]:
        norm = "batch normalisation" if known["norm"] == "batch" else "a norm"
        norm += f" (epsilon {known['epsilon']:.3g})" if known["epsilon"] else ""
    channels = f"{known['inner_channels']} of {known['in_channels']} channels inside"
    return in_words(finding.formula, channels, f"{known['ndim']}D", norm)
