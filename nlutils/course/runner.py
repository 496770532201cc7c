"""`nlutils run`: run the notebooks in reading order, headless, into a folder."""

import ast
import os
import shutil
import sys
import time
from pathlib import Path

from nlutils.arguments import one_of
from nlutils.course.execution import Task, report, run_tasks, worst
from nlutils.course.profiles import PROFILES
from nlutils.course.sources import notebooks_folder
from nlutils.paths import project_root, shown

__all__ = ["notebook_paths", "parameter_names", "run_all"]


def notebook_paths(names=None, folder: Path | None = None) -> list[Path]:
    """The committed notebooks in reading order: all, or those named by number, slug, both, or a path.

    Raises ValueError for a name that no notebook has.
    """
    folder = folder or notebooks_folder()
    known = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not names:
        if not known:
            raise ValueError(f"{folder} holds no notebooks; make them with `nlutils notebooks build`")
        return list(known.values())
    found = {}
    for name in names:
        if name.endswith(".ipynb") and Path(name).is_file():
            found[Path(name).stem] = Path(name)
            continue
        stem = Path(name).stem
        matches = [path for key, path in known.items() if stem in (key, *key.split("_", 1))]
        if not matches:
            raise ValueError(f"{name!r} is not a notebook; there are: {', '.join(known) or 'none at all'}")
        found[matches[0].stem] = matches[0]
    return [found[stem] for stem in sorted(found)]


def parameter_names(notebook) -> list[str]:
    """The names that the cell tagged "parameters" of the notebook at this path assigns."""
    import nbformat

    names = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            for node in ast.parse(cell.source).body:
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def run_all(names=None, *, profile=None, parameters=None, output="build/run", jobs=None) -> int:
    """Run notebooks with papermill and write executed copies, logs and the comparison's table into `output`.

    `names` as in `notebook_paths`; `parameters` are set in every notebook that runs. Raises ValueError,
    before anything runs, for an unknown notebook, profile or parameter. Returns 0 when every notebook ran
    to its end.
    """
    profile = profile or os.environ.get("NLUTILS_PROFILE", "quick")
    one_of("profile", profile, PROFILES)
    parameters = parameters or {}
    if "profile" in parameters:
        profile = one_of("profile", parameters["profile"], PROFILES)
    paths = notebook_paths(names)
    for path in paths:
        accepted = parameter_names(path)
        for parameter in parameters:
            if parameter not in accepted:
                raise ValueError(
                    f"{path.stem} has no parameter {parameter!r}; it has: {', '.join(accepted) or 'none'}"
                )
    output = (project_root() / output).resolve()
    table = output / "comparison.md"
    table.unlink(missing_ok=True)

    from nlutils.video.catalogue import describe_source

    print(describe_source())
    print(f"Running {len(paths)} notebooks, profile {profile!r}.", flush=True)
    started = time.monotonic()
    screen = _Screen()
    outcomes = run_tasks(
        [Task.of(path, output=output, parameters=parameters) for path in paths],
        {"NLUTILS_PROFILE": profile, "NLUTILS_OUTPUT": str(output)},
        jobs=jobs,
        finished=screen.finished,
        progress=screen.progress,
    )
    screen.clear()
    print(f"{len(outcomes)} notebooks in {time.monotonic() - started:.0f} seconds.")
    _closing_words(outcomes, output, table)
    return worst(outcomes)


def _closing_words(outcomes, output: Path, table: Path) -> None:
    """Where to look next, then the comparison's table; failures come after it, so that nobody misses them."""
    where = shown(output)
    print(f"\nExecuted notebooks: {where}/*.ipynb   what they printed: {where}/logs/")
    print("Read and change them: `make lab`.")
    picture = output / "comparison.png"
    if picture.is_file():
        print(f"The comparison as a picture: {shown(picture)}")
    if table.is_file():
        print("\n" + table.read_text(encoding="utf-8").strip())
    failed = [outcome for outcome in outcomes if outcome.failure]
    if failed:
        print(f"\n{len(failed)} of {len(outcomes)} notebooks failed:")
    for outcome in failed:
        print(f"  {outcome.task.name}: {outcome.failure}\n    log: {shown(outcome.task.log)}")


class _Screen:
    """A line for each finished notebook and, on a terminal, one line below that says what is running."""

    def __init__(self):
        self.live = sys.stdout.isatty()

    def clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", flush=True)

    def progress(self, running: dict[str, str]) -> None:
        if self.live:
            state = "   ".join(f"{name}: {cell}" for name, cell in running.items())
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{state[:width]}", end="", flush=True)

    def finished(self, outcome) -> None:
        self.clear()
        report(outcome)
