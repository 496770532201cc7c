"""Every exercise can be solved: the solution in the source passes its own check."""

import pytest

from nlutils.course import solutions, sources


@pytest.mark.parametrize("name", [path.stem for path in sources.source_paths()])
def test_the_solutions_of_a_notebook_are_right(name, tmp_path, capsys):
    assert solutions.build([name], output=tmp_path, jobs=1) == 0, capsys.readouterr().out
