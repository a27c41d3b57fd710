"""The study of windows in place of decays, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("rbwa_fused._C")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")

from studies.windows import __main__ as windows
from studies.windows import training


def test_a_run_has_every_window_and_every_decay_of_the_same_steps() -> None:
    text = training.load()
    assert len(text.train) > 5 * len(text.test) > 10**5
    found = training.results(0, 12, [6, 3], text)
    assert len(found) == 1 + 2 * 2 * 3
    assert all(4 < value < 9 for value in found.values()), found  # bits of 8, hardly trained
    assert len(set(found.values())) > 9  # a window of a few steps is close to its decay, not equal


def test_a_decay_goes_on_from_where_its_window_begins() -> None:
    """With a rate that does not fall it is the run itself."""
    text, steps, length = training.load(), 12, 5
    ends = []
    for branches in (False, True):
        net, order = training.model(3), torch.Generator().manual_seed(3)
        opt = training.rf.FusedAdamW(net.parameters(), lr=training.LR)
        for part in (steps - length, length) if branches else (steps,):
            training.trained(net, opt, text, order, iter([1.0] * part))
        ends.append(training.tested(net, text))
    assert ends[0] == ends[1]


def test_its_table_is_printed_again_from_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows.main(["--steps", "40", "--seeds", "2", "--out", str(tmp_path / "w.json")])
    printed = capsys.readouterr().out
    windows.main(["--results", str(tmp_path / "w.json")])
    assert capsys.readouterr().out == printed
    assert printed.count("\n| ") == 1 + 1 + 9 and "| cosine, 2 " in printed
    known = json.loads((tmp_path / "w.json").read_text())
    assert known["lengths"] == [2, 8, 20] and len(known["runs"]) == 2


def test_the_readme_quotes_the_committed_results() -> None:
    folder = Path(windows.__file__).parent
    known = json.loads((folder / "results" / "windows.json").read_text())
    assert windows.table(known) in (folder / "README.md").read_text()
