"""`nlutils notebooks solutions`: the notebooks with their exercises solved."""

from pathlib import Path

from nlutils.course.execution import Task, report, run_tasks, worst
from nlutils.course.sources import notebook_from_source, notebooks_folder, source_paths, write_notebook
from nlutils.paths import project_root

__all__ = ["build", "unsolved"]


def build(names=None, *, folder: Path | None = None, output=None, jobs: int | None = None) -> int:
    """Write the solution edition of the notebooks into `build/solutions` and run it.

    Prints a line a notebook and each check that does not print *right*. Returns 0 when every notebook ran and
    every check is right, else 1.
    """
    folder = folder or notebooks_folder()
    output = Path(output) if output else project_root() / "build" / "solutions"
    drafts = output / "sources"
    tasks = []
    for source in source_paths(names, folder):
        draft = drafts / f"{source.stem}.ipynb"
        write_notebook(notebook_from_source(source, "solution"), draft)
        tasks.append(Task.of(draft, output=output, folder=folder))
    fixed = {"NLUTILS_CLIPS": "procedural", "NLUTILS_PROFILE": "quick"}
    outcomes = run_tasks(tasks, fixed, jobs=jobs, finished=report)
    complaints = [
        line for outcome in outcomes if not outcome.failure for line in unsolved(outcome.task.output)
    ]
    print("\n".join(complaints) if complaints else f"Every check that ran is right. Solutions: {output}")
    return worst(outcomes) or int(bool(complaints))


def unsolved(notebook) -> list[str]:
    """The checks in the executed notebook at this path that did not print *right*, a line each."""
    import nbformat

    lines = []
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells, start=1):
        if "check" in cell.metadata.get("tags", []):
            printed = "".join(output.get("text", "") for output in cell.outputs).strip()
            if not printed or not all(": right (" in line for line in printed.splitlines()):
                lines.append(
                    f"{Path(notebook).stem}: cell {number} (id {cell.id}): {printed or 'printed nothing'}"
                )
    return lines
