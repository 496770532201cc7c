"""What a conformance run found: a table for people, JSON for the record."""

import json
from dataclasses import asdict, dataclass

from nlutils.arguments import one_of

__all__ = ["RESULTS", "Report", "Result"]

RESULTS = ("ok", "wrong", "not run")


@dataclass(frozen=True)
class Result:
    """One check: its name, "ok", "wrong" or "not run", and a diagnosis of one line (why, when not run)."""

    check: str
    result: str
    diagnosis: str

    def __post_init__(self):
        one_of("result", self.result, RESULTS)


@dataclass(frozen=True)
class Report:
    """The result of `nlutils.conformance.check`; `print(report)` shows it as a table.

    block      the class of the block, with its module
    framework  "PyTorch" or "Keras on tensorflow" (or torch, jax)
    size       the map it was checked on: (B, C, *size) or (B, *size, C), as the framework has it
    computes   one line: what the block computes
    options    the same as a dict: instantiation, scale, subsample, attention, frames_per_group, in_channels,
               inner_channels, ndim, norm, faults; empty when the formula is not known
    results    one `Result` a check
    """

    block: str
    framework: str
    size: tuple
    computes: str
    options: dict
    results: tuple

    @property
    def passed(self) -> bool:
        """No check is wrong, and the definition was among those that were run."""
        return not self.faults and self["definition"].result == "ok"

    @property
    def faults(self) -> list[str]:
        """ "check: diagnosis" of every check that is wrong."""
        return [f"{r.check}: {r.diagnosis}" for r in self.results if r.result == "wrong"]

    @property
    def not_run(self) -> list[str]:
        """ "check: why" of every check that could not be run."""
        return [f"{r.check}: {r.diagnosis}" for r in self.results if r.result == "not run"]

    def __getitem__(self, check: str) -> Result:
        """The result of the check with this name; KeyError that lists the names."""
        for result in self.results:
            if result.check == check:
                return result
        raise KeyError(f"no check is called {check!r}; there are {', '.join(r.check for r in self.results)}")

    def __str__(self):
        counts = [sum(r.result == kind for r in self.results) for kind in RESULTS]
        title = f"{self.block} ({self.framework}), checked on {' x '.join(map(str, self.size))}"
        total = ", ".join(f"{count} {kind}" for count, kind in zip(counts, RESULTS, strict=True))
        wide = max(len(r.check) for r in self.results)
        lines = [f"{r.check:{wide}}  {r.result:7}  {r.diagnosis}" for r in self.results]
        return "\n".join([title, f"computes: {self.computes}", "", *lines, "", total])

    def to_json(self) -> str:
        """The report as JSON text, one line a field and a check."""
        fields = asdict(self)
        checks = ",\n  ".join(json.dumps(result) for result in fields.pop("results"))
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        return "{\n" + ",\n".join(lines) + f',\n"results": [\n  {checks}\n]\n}}'

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote; ValueError when `text` is something else."""
        try:
            fields = json.loads(text)
            results = tuple(Result(**result) for result in fields.pop("results"))
            return cls(results=results, size=tuple(fields.pop("size")), **fields)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is not a conformance report: {type(error).__name__}: {error}") from error
