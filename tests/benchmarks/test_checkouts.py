"""Two checkouts side by side: here the same one twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkouts

ROOT = Path(__file__).resolve().parents[2]
ITSELF = [str(ROOT), "--python", sys.executable, "--processes", "2", "--rounds", "1"]


def test_a_checkout_has_its_own_bits_and_about_its_own_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert checkouts.main([*ITSELF, "--only", "host time: [mE]*", "--only", "in cache: b*m"]) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[1].strip() for line in lines] == [
        "host time: momentum",
        "host time: EMA",
        "in cache: bfloat16, momentum",
    ]
    assert all(line[6].strip() == "yes" for line in lines)
    assert all(0.2 < float(line[4]) < 5.0 for line in lines)


def test_other_bits_are_said_and_are_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = checkouts.Checkout.__init__
    started: list[Any] = []

    def changed(self: Any, *args: Any) -> None:
        start(self, *args)
        if started:
            self.digests["host time: EMA"] = "others"
        started.append(self)

    monkeypatch.setattr(checkouts.Checkout, "__init__", changed)
    assert checkouts.main([*ITSELF, "--only", "host time: EMA"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("NO |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "no checkout in /nowhere"),
        ([*ITSELF, "--only", "nothing"], "no row is named nothing"),
        ([str(ROOT), "--processes", "1"], "--processes must be at least 2"),
        ([str(ROOT), "--python", "/no/python"], "No such file or directory: '/no/python'"),
        ([str(ROOT), "--python", "/bin/true"], "it ended"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        checkouts.main(arguments)
    *_, line = capsys.readouterr().err.splitlines()  # behind the progress bar's
    assert ended.value.code and line.startswith("python -m benchmarks.checkouts: error: ")
    assert message in line
