"""The mutants and canaries that `make mutants` and `make sanitize` put into the code.

Those run for an hour. An edit whose text has left the code breaks nothing, and would be noticed
then alone.
"""

from __future__ import annotations

import mutants
import mutate
import pytest
import sanitize
from workspace import ROOT

TESTS = ROOT / "tests"
EDITS = [
    *((file, old, new) for file, changes, _, _ in mutate.CASES for old, new in changes),
    *mutants.EQUIVALENT,
    *(edit for canary in sanitize.CANARIES for edit in canary.edits),
]
FILES = sorted({file for file, _, _ in EDITS})


@pytest.mark.parametrize("file", FILES)
def test_every_mutant_still_changes_its_file(file: str) -> None:
    text = (ROOT / file).read_text()
    edits = [(old, new) for edited, old, new in EDITS if edited == file]
    assert [edit for edit in edits if edit[0] not in text or edit[0] == edit[1]] == []


def test_every_file_of_tests_that_is_to_notice_a_mutant_is_there() -> None:
    named = [test for _, _, tests, _ in mutate.CASES for test in tests]
    named += [*sanitize.TESTS, *(test for canary in sanitize.CANARIES for test in canary.tests)]
    files = {name.partition("::")[0] for name in named if ".py" in name}
    assert {name for name in files if not (TESTS / name).is_file()} == set()
