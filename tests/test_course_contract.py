"""A notebook that breaks a rule of the contract is refused with the notebook, the cell and the rule."""

import nbformat
import pytest

from nlutils.course import contract, sources


def run_without_a_kernel(folder):
    """What executing the tiny notebook gives, written by hand: counts, and the texts of two cells."""
    sources.build(execute=False, folder=folder)
    path = folder / "01_tiny.ipynb"
    notebook = nbformat.read(path, as_version=4)
    texts = {"print": "the sum is 5\n", "check(": "Exercise 1: not yet\n"}
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(codes, start=1):
        cell.execution_count = count
        for start, text in texts.items():
            if cell.source.startswith(start):
                cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    nbformat.write(notebook, path)
    return path


def test_the_tiny_notebook_keeps_the_contract(tiny):
    assert contract.violations(run_without_a_kernel(tiny())) == []


def test_header_is_parsed(tiny):
    path = run_without_a_kernel(tiny())
    header = contract.header_of(nbformat.read(path, as_version=4).cells[0].source)
    assert header == contract.Header(
        number="01",
        title="A tiny notebook",
        abilities=("add two numbers", "compare the sum with a prediction"),
        needs="nothing",
        minutes=5,
        seconds=2,
        framework="NumPy",
    )


BROKEN = [
    # what is changed in the source, the number of the cell, what is said
    (("# | Machine time | 2 seconds |\n", ""), 1, "no row 'Machine time'"),
    (("2 seconds", "200 seconds"), 1, "200 seconds are more than the 60 allowed"),
    (("2 seconds", "not long"), 1, "'Machine time' is 'not long'"),
    (("5 minutes", "a while"), 1, "'Your time' is 'a while'"),
    (("# 01 ·", "# 02 ·"), 1, "its number is 02, and the file's is 01"),
    (("# # 01 · A tiny notebook", "# # Tiny"), 1, "the title"),
    (("- add two", "- understand two"), 1, "does not begin with a verb"),
    (("# - add two numbers\n", ""), 1, "lists 1 abilities"),
    (("| NumPy |", "| Fortran |"), 1, "names none of NumPy"),
    ((' tags=["parameters"]', ""), None, "the tag 'parameters'"),
    (("settings(profile)\n", ""), None, "no cell calls settings(profile)"),
    (("assert x.shape == (2,)\n", ""), None, "no cell asserts a shape"),
    (('[markdown] tags=["predict"]', "[markdown]"), None, "asks the reader to predict"),
    (("2 and 3?", "2 and 3."), 4, "asks no question"),
    (('[markdown] tags=["explain"]', "[markdown]"), 4, "'explain' follows"),
    (("s = sum(", "# %% [markdown]\n# Now\n\n# %%\ns = sum("), 7, "it is empty"),
    (("# %%\ns = sum(", "# %% [markdown]\n# Now\n\n# %%\ns = sum("), 6, "not followed by the code"),
    (("(easy, 2 minutes)", "(simple, 2 minutes)"), 9, "its heading is not"),
    (("**Expect**", "Expect"), 9, "what to expect"),
    (("Hint 3", "Hint 4"), 9, "three hints"),
    (("    return None  # your code here", '    raise ValueError("yours")'), 10, "can raise an error"),
    (("    return None  # your code here", "    return None)"), 10, "no valid Python"),
    (('check("Exercise 1"', 'check("Exercise 2"'), 11, "named 'Exercise 2'"),
    ((', mistakes={"you added": 5}', ""), 11, "names no mistakes"),
    (('tags=["check"]', ""), 9, "no code cell with the tag 'check'"),
    (("## Exercises", "## Work"), None, "no heading '## Exercises'"),
    (("# - Products are, too.\n", ""), 12, "fewer than two things"),
    (("Turin, 1889", "Turin"), 12, "no year"),
    (("## Further reading", "## More"), None, "last two headings"),
    (("import numpy as np", "import numpy as np\nimport urllib.request"), 3, "it imports urllib.request"),
    (("settings(profile)\n", 'settings(profile)\nopen("https://a.org/b")\n'), 3, "passes the address"),
    (('tags=["check"]', 'tags=["check", "raises-exception"]'), 11, "'raises-exception' is not one of"),
    (("s = sum(", "\n" * 45 + "s = sum("), 7, "more than 40"),
    (("s = sum(", "!ls\ns = sum("), 7, "no valid Python"),
    (("What is the sum", "word " * 2500 + "What is the sum"), None, "more than 2500"),
    (
        ("# %% [markdown]\n# ## Exercises", "# %%\n1\n\n" * 60 + "# %% [markdown]\n# ## Exercises"),
        None,
        "cells",
    ),
    (("What is the sum", "![](a.png) What is the sum"), 4, "image without alt text"),
    (("What is the sum", "<img src='a.png' alt=' '> What is the sum"), 4, "images without alt text"),
]


@pytest.mark.parametrize(("change", "number", "message"), BROKEN, ids=[message for _, _, message in BROKEN])
def test_a_broken_rule_is_named_with_its_cell(tiny, change, number, message):
    path = run_without_a_kernel(tiny(change))
    found = [sentence for sentence in contract.violations(path) if message in sentence]
    assert found, contract.violations(path)
    identity = nbformat.read(path, as_version=4).cells[number - 1].id if number else None
    start = f"01_tiny: cell {number} (id {identity}): " if number else "01_tiny: "
    assert found[0].startswith(start)


def output(kind, **fields):
    return nbformat.v4.new_output(kind, **fields)


OUTPUTS = [
    (output("stream", name="stderr", text="a warning\n"), "wrote to standard error: ['a warning']"),
    (output("error", ename="ValueError", evalue="no", traceback=[]), "ended with ValueError: no"),
    (output("display_data", data={"image/png": "AAAA"}), "shows image/png without alt text"),
    (output("display_data", data={"text/html": "<img src='a'>"}), "shows 1 images without alt text"),
    (output("display_data", data={"text/html": "<svg></svg>"}), "shows 1 images without alt text"),
    (output("stream", name="stdout", text="<object at 0x7f12345678>"), "a memory address"),
    (output("stream", name="stdout", text=f"{contract.project_root()}/data"), "a path of this machine"),
    (output("stream", name="stdout", text="x" * 500_000), "more than 400"),
]


@pytest.mark.parametrize(("shown", "message"), OUTPUTS, ids=[message for _, message in OUTPUTS])
def test_outputs_that_nobody_should_publish_are_refused(tiny, shown, message):
    path = run_without_a_kernel(tiny())
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[6].outputs = [shown]
    nbformat.write(notebook, path)
    assert any(message in sentence for sentence in contract.violations(path)), contract.violations(path)


def test_a_notebook_that_was_not_run_or_not_in_order_is_refused(tiny):
    folder = tiny()
    sources.build(execute=False, folder=folder)
    path = folder / "01_tiny.ipynb"
    assert any("the notebook was not run" in sentence for sentence in contract.violations(path))
    path = run_without_a_kernel(folder)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[6].execution_count = 9
    nbformat.write(notebook, path)
    (sentence,) = contract.violations(path)
    assert sentence.endswith("its execution count is 9, and 4 in order")


def test_a_solved_exercise_is_not_committed(tiny):
    path = run_without_a_kernel(tiny())
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[10].outputs[0].text = "Exercise 1: right (exact)\n"
    nbformat.write(notebook, path)
    (sentence,) = contract.violations(path)
    assert "does not print 'not yet'" in sentence
