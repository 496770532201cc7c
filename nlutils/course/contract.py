"""The contract of a notebook: what each one has, checked on the committed file.

`violations(path)` returns one sentence for each broken rule, with the notebook and the cell (its number
among all cells, from 1, and its id) in it.
"""

import ast
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from nlutils.course.execution import budget
from nlutils.paths import project_root

__all__ = ["Header", "header_of", "violations"]

MOST_CELLS, MOST_WORDS, MOST_LINES, MOST_BYTES = 60, 2500, 40, 400 * 1024
FRAMEWORKS = ("NumPy", "PyTorch", "Keras")
DIFFICULTIES = ("easy", "medium", "hard")
TAGS = ("parameters", "predict", "explain", "exercise", "stub", "check", "nbval-ignore-output")
NETWORK = ("aiohttp", "ftplib", "http", "httpx", "requests", "socket", "urllib", "urllib3")
HINT = re.compile(r"<details>\s*<summary>Hint (\d)\b[^<]*</summary>(.*?)</details>", flags=re.DOTALL)
# What nobody can do visibly, or what is no verb: an ability is something that a reader can show.
NO_VERBS = ("a", "an", "and", "how", "know", "learn", "that", "the", "understand", "what", "why")


@dataclass(frozen=True)
class Header:
    """What the first cell of a notebook says."""

    number: str
    title: str
    abilities: tuple[str, ...]
    needs: str
    minutes: int
    seconds: int
    framework: str


def header_of(text: str) -> Header:
    """Parse the first cell of a notebook. Raises ValueError that names the field that is missing or wrong."""
    title = re.match(r"# (\d\d) · (\S.*)", text)
    if not title:
        raise ValueError("the title is not of the form '# 04 · What the notebook is about'")
    if "After this notebook you can" not in text:
        raise ValueError("'After this notebook you can' and its list are missing")
    abilities = tuple(re.findall(r"^- (.+)$", text, flags=re.MULTILINE))
    if not 2 <= len(abilities) <= 5:
        raise ValueError(f"it lists {len(abilities)} abilities, and 2 to 5 are wanted")
    for ability in abilities:
        first = ability.split()[0]
        if not first.isalpha() or not first.islower() or first in NO_VERBS:
            raise ValueError(f"the ability {ability!r} does not begin with a verb that can be seen done")
    rows = dict(re.findall(r"^\| *([A-Z][^|]*?) *\| *(.*?) *\|$", text, flags=re.MULTILINE))
    for row in ("What you need", "Your time", "Machine time", "Framework"):
        if not rows.get(row):
            raise ValueError(f"its table has no row '{row}'")
    minutes = re.fullmatch(r"(\d+) minutes", rows["Your time"])
    seconds = re.fullmatch(r"(\d+) seconds", rows["Machine time"])
    if not minutes:
        raise ValueError(f"'Your time' is {rows['Your time']!r}, and '45 minutes' is the form")
    if not seconds:
        raise ValueError(f"'Machine time' is {rows['Machine time']!r}, and '20 seconds' is the form")
    if not any(framework in rows["Framework"] for framework in FRAMEWORKS):
        raise ValueError(f"'Framework' is {rows['Framework']!r}, and names none of {', '.join(FRAMEWORKS)}")
    return Header(
        number=title[1],
        title=title[2].strip(),
        abilities=abilities,
        needs=rows["What you need"],
        minutes=int(minutes[1]),
        seconds=int(seconds[1]),
        framework=rows["Framework"],
    )


def violations(path) -> list[str]:
    """Every rule of the contract that the notebook at this path breaks; empty when it keeps them all."""
    import nbformat

    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    if not notebook.cells:
        return [f"{path.stem}: it has no cells"]
    found = [
        *_header(path, notebook.cells),
        *_parameters(notebook.cells),
        *_sizes(path, notebook.cells),
        *_prediction(notebook.cells),
        *_equations(notebook.cells),
        *_exercises(notebook.cells),
        *_ending(notebook.cells),
        *_code(notebook.cells),
        *_outputs(notebook.cells),
        *_pictures(notebook.cells),
    ]
    return [f"{path.stem}: {_at(notebook.cells, place)}{sentence}" for place, sentence in found]


# Each rule below yields pairs: the place of the cell (None for the whole notebook) and what is wrong.


def _at(cells, place: int | None) -> str:
    return "" if place is None else f"cell {place + 1} (id {cells[place].id}): "


def _tagged(cells, tag: str) -> list[int]:
    return [place for place, cell in enumerate(cells) if tag in cell.metadata.get("tags", [])]


def _is(cells, place: int, kind: str) -> bool:
    return 0 <= place < len(cells) and cells[place].cell_type == kind


def _header(path, cells):
    if cells[0].cell_type != "markdown":
        yield 0, "the first cell is not the header"
        return
    try:
        header = header_of(cells[0].source)
    except ValueError as error:
        yield 0, f"header: {error}"
        return
    if header.number != path.stem[:2]:
        yield 0, f"header: its number is {header.number}, and the file's is {path.stem[:2]}"
    if header.seconds > budget(path.stem):
        yield 0, f"header: {header.seconds} seconds are more than the {budget(path.stem)} allowed"


def _parameters(cells):
    places = _tagged(cells, "parameters")
    if places != [1] or not _is(cells, 1, "code"):
        yield None, "the second cell, and no other, must be a code cell with the tag 'parameters'"
        return
    if "NLUTILS_PROFILE" not in cells[1].source or "profile" not in _assigned(cells[1].source):
        yield 1, "it does not take `profile` from the environment variable NLUTILS_PROFILE"
    for cell in cells[2:]:
        for call in _calls(cell):
            if _called(call) == "settings" and call.args and getattr(call.args[0], "id", None) == "profile":
                return
    yield None, "no cell calls settings(profile), so an unknown profile would pass unnoticed"


def _sizes(path, cells):
    if len(cells) > MOST_CELLS:
        yield None, f"it has {len(cells)} cells, more than {MOST_CELLS}"
    text = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    words = len(re.findall(r"\S*\w\S*", text))
    if words > MOST_WORDS:
        yield None, f"its text has {words} words, more than {MOST_WORDS}"
    size = path.stat().st_size
    if size > MOST_BYTES:
        yield None, f"the file has {size // 1024} KB, more than {MOST_BYTES // 1024}"
    for place, cell in enumerate(cells):
        lines = len(cell.source.splitlines())
        if lines > MOST_LINES:
            yield place, f"it has {lines} lines, more than {MOST_LINES}"
        if not cell.source.strip():
            yield place, "it is empty"
        for tag in cell.metadata.get("tags", []):
            if tag not in TAGS:
                yield place, f"the tag {tag!r} is not one of {', '.join(TAGS)}"


def _prediction(cells):
    places = _tagged(cells, "predict")
    if not places:
        yield None, "no cell asks the reader to predict something (a text cell with the tag 'predict')"
    for place in places:
        if "?" not in cells[place].source:
            yield place, "it is tagged 'predict' and asks no question"
        if not _is(cells, place + 1, "code"):
            yield place, "the code that answers its question does not follow"
            continue
        after = place + 1
        while _is(cells, after, "code"):
            after += 1
        if after == len(cells) or "explain" not in cells[after].metadata.get("tags", []):
            yield place, "no text cell with the tag 'explain' follows its code"


def _equations(cells):
    for place, cell in enumerate(cells):
        displayed = "$$" in cell.source or r"\begin{equation" in cell.source or r"\begin{align" in cell.source
        if cell.cell_type == "markdown" and displayed and not _is(cells, place + 1, "code"):
            yield place, "its equation is not followed by the code that computes it"


def _exercises(cells):
    places = _tagged(cells, "exercise")
    if not 1 <= len(places) <= 4:
        yield None, f"it has {len(places)} exercises, and 1 to 4 are wanted"
    if not any(re.search(r"^## Exercises", cell.source, flags=re.MULTILINE) for cell in cells):
        yield None, "it has no heading '## Exercises'"
    followed = {place for first in places for place in (first + 1, first + 2)}
    for tag in ("stub", "check"):
        for place in _tagged(cells, tag):
            if place not in followed:
                yield place, f"it is tagged {tag!r} and does not belong to an exercise"
    for number, place in enumerate(places, start=1):
        for where, sentence in _exercise(cells, number, place):
            yield where, f"exercise {number}: {sentence}"


def _exercise(cells, number: int, place: int):
    text = cells[place].source
    heading = re.search(r"^### Exercise (\d) · \S.* \((\w+), \d+ minutes\)$", text, flags=re.MULTILINE)
    if not heading or heading[1] != str(number) or heading[2] not in DIFFICULTIES:
        yield place, f"its heading is not '### Exercise {number} · Title (easy, 10 minutes)'; or medium, hard"
    if "**Expect**" not in text:
        yield place, "it does not say what to expect (**Expect**: …)"
    hints = HINT.findall(text)
    if [hint for hint, _ in hints] != ["1", "2", "3"] or not all(body.strip() for _, body in hints):
        yield place, "it does not have three hints (<details><summary>Hint 1: …</summary> … </details>)"
    if place + 1 not in _tagged(cells, "stub") or not _is(cells, place + 1, "code"):
        yield place, "no code cell with the tag 'stub' follows it"
    else:
        stub = cells[place + 1].source
        tree = _tree(stub)
        if tree is None:
            yield place + 1, "its stub is no valid Python"
        elif any(isinstance(node, ast.Raise | ast.Assert) for node in ast.walk(tree)):
            yield place + 1, "its stub can raise an error"
        if "#:" in stub:
            yield place + 1, "its stub holds a line with '#:'"
    if place + 2 not in _tagged(cells, "check") or not _is(cells, place + 2, "code"):
        yield place, "no code cell with the tag 'check' follows its stub"
        return
    checks = [call for call in _calls(cells[place + 2]) if _called(call) == "check"]
    if not checks:
        yield place + 2, "its check does not call check(…)"
    for call in checks:
        named = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
        if not str(named).startswith(f"Exercise {number}"):
            yield place + 2, f"its check is named {named!r} and not 'Exercise {number}'"
        mistakes = next((word.value for word in call.keywords if word.arg == "mistakes"), None)
        mistakes = mistakes or (call.args[3] if len(call.args) > 3 else None)
        if mistakes is None or (isinstance(mistakes, ast.Dict) and not mistakes.keys):
            yield place + 2, "its check names no mistakes"
    printed = "".join(output.get("text", "") for output in cells[place + 2].outputs).splitlines()
    if not printed or not all(line.endswith(": not yet") for line in printed):
        yield place + 2, "its check does not print 'not yet' for the stub"


def _ending(cells):
    headings = [
        (place, heading)
        for place, cell in enumerate(cells)
        if cell.cell_type == "markdown"
        for heading in re.findall(r"^## (.+)$", cell.source, flags=re.MULTILINE)
    ]
    if [heading for _, heading in headings[-2:]] != ["What you learned", "Further reading"]:
        yield None, "its last two headings are not '## What you learned' and '## Further reading'"
        return
    text = "\n".join(cell.source for cell in cells[headings[-2][0] :])
    learned, reading = text.split("## What you learned")[1].split("## Further reading")
    if len(re.findall(r"^- ", learned, flags=re.MULTILINE)) < 2:
        yield headings[-2][0], "'What you learned' lists fewer than two things"
    citations = re.findall(r"^- (.+(?:\n  .+)*)", reading, flags=re.MULTILINE)
    if not citations:
        yield headings[-1][0], "'Further reading' lists nothing"
    for citation in citations:
        if not re.search(r"\b(1[6-9]|20)\d\d\b", citation):
            yield headings[-1][0], f"'Further reading' gives no year for {citation[:50]!r}"


def _code(cells):
    asserts = []
    for place, cell in enumerate(cells):
        if cell.cell_type != "code":
            continue
        tree = _tree(cell.source)
        if tree is None:
            yield place, "it is no valid Python (no magics, no shell commands)"
            continue
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in imported:
                if module.split(".")[0] in NETWORK:
                    yield place, f"it imports {module}; notebooks fetch nothing from the network"
            if isinstance(node, ast.Call):
                for argument in [a.value for a in node.args if isinstance(a, ast.Constant)]:
                    if re.match(r"(https?|ftp)://", str(argument)):
                        yield place, f"it passes the address {argument} to a function"
            if isinstance(node, ast.Assert):
                asserts.append(ast.unparse(node.test))
    if not any("shape" in test or test.startswith("(") for test in asserts):
        yield None, "no cell asserts a shape"


def _outputs(cells):
    home, root = str(Path.home()), str(project_root())
    codes = [place for place, cell in enumerate(cells) if cell.cell_type == "code"]
    if not any(cells[place].outputs for place in codes):
        yield None, "no cell has an output: the notebook was not run"
    for order, place in enumerate(codes, start=1):
        cell = cells[place]
        if cell.execution_count != order:
            yield place, f"its execution count is {cell.execution_count}, and {order} in order"
        for output in cell.outputs:
            if output.output_type == "error":
                yield place, f"it ended with {output.ename}: {output.evalue}"
            if output.get("name") == "stderr":
                first = output.text.strip().splitlines()[:1]
                yield place, f"it wrote to standard error: {first}"
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            if re.search(r"\bat 0x[0-9a-f]{6,}", text):
                yield place, "it shows a memory address, which changes at every run"
            if (len(home) > 1 and f"{home}/" in text) or f"{root}/" in text:
                yield place, "it shows a path of this machine"


def _pictures(cells):
    for place, cell in enumerate(cells):
        pages = [cell.source] if cell.cell_type == "markdown" else []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for kind in data:
                if kind.startswith("image/"):
                    yield place, f"it shows {kind} without alt text; use plots.show(fig, alt)"
            pages.append(data.get("text/html", ""))
        for page in pages:
            images = _Images()
            images.feed(page)
            if images.unnamed:
                yield place, f"it shows {images.unnamed} images without alt text"
        if cell.cell_type == "markdown" and re.search(r"!\[\s*\]\(", cell.source):
            yield place, "it shows an image without alt text"


class _Images(HTMLParser):
    """Counts the images of a page that have no alt text."""

    def __init__(self):
        super().__init__()
        self.unnamed = 0

    def handle_starttag(self, tag, attributes):
        names = dict(attributes)
        missing = tag == "img" and not (names.get("alt") or "").strip()
        missing = missing or (tag in ("svg", "canvas") and not (names.get("aria-label") or "").strip())
        self.unnamed += missing


def _tree(source: str):
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def _calls(cell) -> list[ast.Call]:
    tree = _tree(cell.source) if cell.cell_type == "code" else None
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)] if tree else []


def _called(call: ast.Call) -> str | None:
    """The last name of what is called: "settings" for `settings(…)` and for `course.settings(…)`."""
    return getattr(call.func, "attr", getattr(call.func, "id", None))


def _assigned(source: str) -> list[str]:
    tree = _tree(source)
    targets = [node.targets[0] for node in ast.walk(tree) if isinstance(node, ast.Assign)] if tree else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
