"""Sources to notebooks: ids, editions, agreement, definitions lifted out of a notebook."""

import nbformat
import pytest

from nlutils.course import sources


def ids(path):
    return [cell.id for cell in sources.notebook_from_source(path).cells]


def test_an_inserted_cell_changes_one_id(tiny):
    path = tiny() / "src" / "01_tiny.py"
    before = ids(path)
    path.write_text(path.read_text().replace("# %%\ns = sum(", '# %%\nprint("new")\n\n# %%\ns = sum('))
    after = ids(path)
    assert len(after) == len(before) + 1
    assert [identity for identity in after if identity in before] == before


def test_equal_cells_get_different_ids_and_the_file_is_valid(tiny, tmp_path):
    path = tiny() / "src" / "01_tiny.py"
    path.write_text(path.read_text() + "\n# %%\nprint(1)\n\n# %%\nprint(1)\n")
    first, second = ids(path)[-2:]
    assert second == f"{first}-2"
    sources.write_notebook(sources.notebook_from_source(path), tmp_path / "a.ipynb")
    nbformat.validate(nbformat.read(tmp_path / "a.ipynb", as_version=4))


def test_ids_depend_on_the_slug_and_not_on_the_number(tiny):
    one, two = (ids(tiny(stem=stem) / "src" / f"{stem}.py") for stem in ("01_tiny", "02_tiny"))
    other = ids(tiny(stem="01_other") / "src" / "01_other.py")
    assert one == two
    assert not set(one) & set(other)


def test_editions_hold_the_stub_or_the_solution(tiny):
    path = tiny() / "src" / "01_tiny.py"
    stub, solution = (sources.notebook_from_source(path, keep) for keep in sources.EDITIONS)
    (place,) = [i for i, cell in enumerate(stub.cells) if "stub" in cell.metadata.get("tags", [])]
    assert stub.cells[place].source == "def product(x):\n    return None  # your code here"
    assert solution.cells[place].source == "def product(x):\n    return x[0] * x[1]"
    assert [cell.id for cell in stub.cells] == [cell.id for cell in solution.cells]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#: stub\nx\n#: end", "'#: stub' where '#: solution'"),
        ("#: solution\nx\n#: end", "'#: end' where '#: stub'"),
        ("#: solution\nx\n#: stub\ny", "'#: stub' is not followed by '#: end'"),
    ],
)
def test_markers_out_of_order_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        sources.edition(text, "stub", "01_tiny.py, cell 3")


def test_disagreements_name_the_cell(tiny):
    folder = tiny()
    sources.build(execute=False, folder=folder)
    path = folder / "01_tiny.ipynb"
    assert sources.disagreements(path) == []

    notebook = nbformat.read(path, as_version=4)
    notebook.cells[4].source += "  # changed by hand"
    nbformat.write(notebook, path)
    (sentence,) = sources.disagreements(path)
    assert sentence.startswith(f"01_tiny: cell 5 (id {notebook.cells[4].id}): its text")

    sources.build(execute=False, folder=folder)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[4].metadata["tags"] = ["nbval-ignore-output"]
    nbformat.write(notebook, path)
    assert "its tags are not its source's" in sources.disagreements(path)[0]

    del notebook.cells[-1]
    notebook.cells[4].metadata.pop("tags")
    nbformat.write(notebook, path)
    assert "it has 11 cells, and its source 12" in sources.disagreements(path)[0]

    (folder / "src" / "01_tiny.py").unlink()
    assert "it has no source" in sources.disagreements(path)[0]


def test_unknown_names_are_refused_with_the_known_ones(tiny):
    with pytest.raises(ValueError, match="'03' is not a notebook; there are: 01_tiny"):
        sources.source_paths(["03"], tiny())


LIFTED = """
# %%
import math as m
from nlutils import course

keras = course.import_keras()
pi = m.pi

# %%
start = undefined_elsewhere

def helper(x):
    return x * pi

def unrelated(x=start):
    return x

class Layer:
    def call(self, x):
        return helper(x)

# %%
Layer().call(start)

# %%
class Layer(Layer):
    def twice(self, x):
        #: solution
        return 2 * self.call(x)
        #: stub
        return None
        #: end

# %%
def helper(x):
    raise RuntimeError("defined below Layer, so Layer does not use it")
"""


def test_lift_takes_a_definition_and_what_it_needs(tiny):
    folder = tiny()
    # `keras` is not needed by Layer, so Keras is not imported here.
    (folder / "src" / "01_tiny.py").write_text(LIFTED)
    layer = sources.lift("tiny", "Layer", folder)()
    assert layer.twice(1) == pytest.approx(6.283185307)
    with pytest.raises(ValueError, match="defines no 'Block' at its top level"):
        sources.lift("01", "Block", folder)
