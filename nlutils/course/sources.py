"""From a notebook's source in percent format to the committed notebook with its outputs.

A maintainer edits `notebooks/src/NN_slug.py`; `build` writes `notebooks/NN_slug.ipynb`. An exercise's
source holds both what the reader gets and the solution::

    def weights(x):
        #: solution
        return x / x.sum()
        #: stub
        return None  # your code here
        #: end

A notebook made from it holds one of the two: the edition "stub" (committed) or "solution" (`make solutions`).
"""

import ast
import hashlib
import types
from collections import Counter
from pathlib import Path

from nlutils.arguments import one_of
from nlutils.paths import atomic_path, project_root

__all__ = [
    "EDITIONS",
    "build",
    "disagreements",
    "edition",
    "lift",
    "notebook_from_source",
    "notebooks_folder",
    "source_of",
    "source_paths",
    "strip_unstable",
    "write_notebook",
]

EDITIONS = ("stub", "solution")

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks_folder() -> Path:
    """The folder of the committed notebooks."""
    return project_root() / "notebooks"


def source_paths(names=None, folder: Path | None = None) -> list[Path]:
    """The sources in reading order: all, or those named by number ("04"), slug ("formulation") or both.

    Raises ValueError for a name that no source has.
    """
    paths = sorted(((folder or notebooks_folder()) / "src").glob("[0-9][0-9]_*.py"))
    if not names:
        return paths
    return sorted({_named(name, paths) for name in names})


def _named(name: str, paths: list[Path]) -> Path:
    stem = Path(name).stem
    for path in paths:
        number, slug = path.stem.split("_", 1)
        if stem in (path.stem, number, slug):
            return path
    known = ", ".join(path.stem for path in paths) or "none at all"
    raise ValueError(f"{name!r} is not a notebook; there are: {known}")


def source_of(notebook) -> Path:
    """The source that the notebook at this path is made from."""
    notebook = Path(notebook)
    return notebook.parent / "src" / f"{notebook.stem}.py"


def edition(text: str, keep: str, where: str = "the cell") -> str:
    """A cell's text in one edition: `keep` is "stub" or "solution".

    Raises ValueError, with `where` in it, when `#: solution`, `#: stub` and `#: end` do not follow each
    other.
    """
    one_of("keep", keep, EDITIONS)
    following = {None: "solution", "solution": "stub", "stub": "end"}
    kept, part = [], None
    for line in text.splitlines():
        if line.strip().startswith("#:"):
            marker = line.strip()[2:].strip()
            if marker != following[part]:
                raise ValueError(f"{where}: found '#: {marker}' where '#: {following[part]}' is expected")
            part = None if marker == "end" else marker
        elif part in (None, keep):
            kept.append(line)
    if part is not None:
        raise ValueError(f"{where}: '#: {part}' is not followed by '#: {following[part]}'")
    return "\n".join(kept)


def notebook_from_source(path, keep: str = "stub"):
    """The notebook that the source at `path` describes, without outputs.

    Cell ids come from the slug and the cell's own text, so they do not depend on the cells around it. Equal
    cells are told apart by a number in their order.
    """
    import jupytext
    import nbformat

    path = Path(path)
    slug = path.stem.split("_", 1)[-1]
    parsed = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    notebook = nbformat.v4.new_notebook(metadata=_METADATA)
    seen = Counter()
    for number, cell in enumerate(parsed.cells, start=1):
        tags = list(cell.metadata.get("tags", []))
        digest = hashlib.sha256("\0".join((slug, cell.cell_type, cell.source)).encode()).hexdigest()[:12]
        seen[digest] += 1
        identity = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        text = edition(cell.source, keep, f"{path.name}, cell {number}")
        make = getattr(nbformat.v4, f"new_{cell.cell_type}_cell")
        notebook.cells.append(make(text, id=identity, metadata={"tags": tags} if tags else {}))
    return notebook


def disagreements(notebook) -> list[str]:
    """Where the committed notebook at this path is not what its source describes; empty when they agree."""
    import nbformat

    notebook = Path(notebook)
    name, source = notebook.stem, source_of(notebook)
    if not source.is_file():
        return [f"{name}: it has no source, {source.parent.name}/{source.name}"]
    described, committed = notebook_from_source(source).cells, nbformat.read(notebook, as_version=4).cells
    cure = f"run `make notebooks` or `nlutils notebooks build {name}`"
    for number, (want, have) in enumerate(zip(described, committed, strict=False), start=1):
        for what, key in (("kind", "cell_type"), ("text", "source"), ("id", "id")):
            if want[key] != have[key]:
                return [f"{name}: cell {number} (id {have.id}): its {what} is not its source's; {cure}"]
        if want.metadata.get("tags", []) != have.metadata.get("tags", []):
            return [f"{name}: cell {number} (id {have.id}): its tags are not its source's; {cure}"]
    if len(described) != len(committed):
        return [f"{name}: it has {len(committed)} cells, and its source {len(described)}; {cure}"]
    return []


def strip_unstable(notebook) -> None:
    """Remove, in place, what differs between two executions: times, versions, the state of widgets."""
    import nbformat

    notebook.metadata = nbformat.from_dict(_METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}


def write_notebook(notebook, path) -> None:
    """Write a notebook so that a reader of `path` sees the old file or the whole new one."""
    import nbformat

    nbformat.validate(notebook)
    with atomic_path(path) as temporary:
        temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def build(slugs=None, execute: bool = True, *, folder: Path | None = None, jobs: int | None = None) -> int:
    """Make the committed notebooks from their sources and run them on procedural clips, profile "quick".

    A notebook that fails keeps its old committed file. Returns 0 when all were built, else 1.
    """
    from nlutils.course.execution import Task, report, run_tasks, worst

    folder = folder or notebooks_folder()
    drafts = folder.parent / "build" / "notebooks"
    tasks = []
    for source in source_paths(slugs, folder):
        notebook = notebook_from_source(source)
        if execute:
            draft = drafts / f"{source.stem}.ipynb"
            write_notebook(notebook, draft)
            tasks.append(Task.of(draft, output=drafts / "executed", folder=folder))
        else:
            write_notebook(notebook, folder / f"{source.stem}.ipynb")

    def commit(outcome):
        if outcome.failure is None:
            import nbformat

            notebook = nbformat.read(outcome.task.output, as_version=4)
            strip_unstable(notebook)
            write_notebook(notebook, folder / outcome.task.output.name)
        report(outcome)

    fixed = {"NLUTILS_CLIPS": "procedural", "NLUTILS_PROFILE": "quick"}
    return worst(run_tasks(tasks, fixed, jobs=jobs, finished=commit))


def lift(slug: str, name: str, folder: Path | None = None):
    """Take the function or class `name` out of the source of notebook `slug`, and return it.

    Executes the last definition of `name` at the top level of the source and, in their order, the imports,
    functions and classes above it that it needs, directly or through each other. Two kinds of assignment
    count as imports: a shorter name for part of a module (`F = torch.nn.functional`), and `keras =
    import_keras(...)`. Raises ValueError when the source does not define `name`.
    """
    (path,) = source_paths([slug], folder)
    tree = ast.parse(edition(path.read_text(encoding="utf-8"), "solution", path.name), filename=str(path))
    imported = {name for node in tree.body for name in _names_imported(node)}
    defined = [(node, _names_defined(node, imported)) for node in tree.body]
    places = [place for place, (_, names) in enumerate(defined) if name in names]
    if not places:
        raise ValueError(f"{path.name} defines no {name!r} at its top level")
    above = defined[: places[-1] + 1]
    needed, size = {name}, 0
    while len(needed) > size:
        size = len(needed)
        for node, names in above:
            if needed & names:
                needed |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    tree.body = [node for node, names in above if needed & names]
    module = types.ModuleType(path.stem)
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return getattr(module, name)


def _names_imported(node) -> set[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return set()


def _names_defined(node, imported: set[str]) -> set[str]:
    """The names that a statement defines for `lift`; none for the statements that it leaves out."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        value, target = node.value, node.targets[0].id
        if isinstance(value, ast.Call):
            called = getattr(value.func, "attr", getattr(value.func, "id", None))
            return {target} if called == "import_keras" else set()
        while isinstance(value, ast.Attribute):
            value = value.value
        is_part_of_a_module = isinstance(node.value, ast.Attribute) and getattr(value, "id", None) in imported
        return {target} if is_part_of_a_module else set()
    return _names_imported(node)
