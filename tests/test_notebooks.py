"""Every committed notebook keeps the contract, and is what its source describes."""

import pytest

from nlutils.course import contract, runner, sources

NOTEBOOKS = sorted(sources.notebooks_folder().glob("*.ipynb"))
SOURCES = sources.source_paths()


def test_every_source_has_its_notebook_and_numbers_are_not_used_twice():
    assert [path.stem for path in NOTEBOOKS] == [path.stem for path in SOURCES]
    numbers = [path.stem[:2] for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)
    assert runner.notebook_paths() == NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_contract_is_kept(path):
    assert contract.violations(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_source_and_notebook_agree(path):
    assert sources.disagreements(path) == []
