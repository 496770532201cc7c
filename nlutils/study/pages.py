"""A study's page beside its runs, `data/results/<study>/README.md`: every row and part, written from them."""

from pathlib import Path

from nlutils.paths import atomic_path, results_root
from nlutils.study.plan import CANDIDATES, PARTS, STUDIES
from nlutils.study.readme import caption
from nlutils.study.results import is_recorded, read_runs
from nlutils.study.tables import by_row, choice_table, difference_table, markdown_table, summarise, time_table

__all__ = ["results_page", "write_results_pages"]


def results_page(study: str, root=None) -> str:
    """The page of `study`: its rows, its parts whose rows are all recorded, other orders of time, choices."""
    runs = read_runs(study, root)
    rows = by_row(runs)
    sections = [
        f"# Results of `{study}`",
        f"{caption(runs)} This page is written by `nlutils study pages`.",
        f"## Every row\n\n{markdown_table(summarise(runs))}",
    ]
    for name in STUDIES[study].parts if study in STUDIES else ():
        part = PARTS[name]
        if part.reference and set(part.rows) <= rows.keys():
            sections.append(f"## {name}: {part.title}\n\n{difference_table(runs, part)}")
    first = min(run.seed for run in runs)
    seen = [run for run in runs if run.views and run.seed == first]
    if seen:
        sections.append(f"## Tested in other orders of time, seed {first}\n\n{time_table(seen)}")
    return "\n\n".join([*sections, *_choices(study, root)]) + "\n"


def _choices(study, root) -> list[str]:
    """A section for each family of candidates that is recorded."""
    if not is_recorded(f"{study}-choice", root):
        return []
    tried = by_row(read_runs(f"{study}-choice", root))
    sections = []
    for family, candidates in CANDIDATES.items():
        names = [f"{family}-{name}" for name in candidates]
        if set(names) <= tried.keys():
            table = choice_table({name: tried[name] for name in names})
            sections.append(f"## Choice inside the training folds: {family}\n\n{table}")
    return sections


def write_results_pages(root=None) -> list[Path]:
    """Write the page of every study of the plan that is recorded; returns where."""
    written = []
    for study in STUDIES:
        if is_recorded(study, root):
            path = Path(root or results_root()) / study / "README.md"
            page = results_page(study, root)
            with atomic_path(path) as temporary:
                temporary.write_text(page, encoding="utf-8")
            written.append(path)
    return written
