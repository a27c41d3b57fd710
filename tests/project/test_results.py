"""docs/results.md and README.md quote the committed tables, and links lead somewhere."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
TEXT = (ROOT / "docs" / "results.md").read_text()
LINKING = sorted(
    str(file.relative_to(ROOT))
    for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("studies/*/*.md")]
)
NAMES = re.findall(r"^<!-- (\S+) -->$", TEXT, re.MULTILINE)


def signed(value: str, digits: int) -> str:
    return f"{round(float(value), digits) + 0.0:+.{digits}f}"


def difference(row: dict[str, str], kind: str, digits: int) -> str:
    middle, low, high = (row[f"{kind}{part}"] for part in ("", "_low", "_high"))
    if middle == "":
        return "-"
    if math.isnan(float(low)):
        return signed(middle, digits)
    return f"{signed(middle, digits)} ({signed(low, digits)} to {signed(high, digits)})"


def spread(row: dict[str, str], name: str, digits: int) -> str:
    return f"{float(row[name]):.{digits}f} ± {float(row[f'{name}_deviation']):.{digits}f}"


def quoted(name: str) -> list[str]:
    """The lines of a table in the document."""
    after = TEXT.split(f"<!-- {name} -->\n", 1)[1]
    lines = after.split("\n\n", 1)[0].splitlines()
    return [line for line in lines[2:] if line.startswith("|")]


@pytest.mark.parametrize("name", [name for name in NAMES if "flatness" not in name])
def test_a_quoted_table_is_the_committed_one(name: str) -> None:
    with (RESULTS / name / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    several = len({row["setting"] for row in rows}) > 1
    expected = []
    for row in rows:
        cells = [row["setting"]] if several else []
        cells += [row["system"], f"{float(row['own_lr']):g}", spread(row, "accuracy", 2)]
        cells += [difference(row, "difference", 2), spread(row, "test_loss", 4)]
        cells += [difference(row, "loss_difference", 4)]
        expected.append("| " + " | ".join(cells) + " |")
    assert quoted(name) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if "flatness" in name])
def test_a_quoted_flatness_table_is_the_committed_one(name: str) -> None:
    table = (RESULTS / name / "table.md").read_text().splitlines()
    assert quoted(name) == [line for line in table[2:] if line.startswith("|")]


def test_every_picture_and_folder_that_is_named_is_there() -> None:
    assert NAMES
    for target in re.findall(r"\]\((results/[^)]+)\)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
    assert {path.name for path in RESULTS.iterdir()} == set(NAMES)


@pytest.mark.parametrize("document", LINKING)
def test_links_between_files_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


IN_README = {
    "rf.ema": "ema",
    "rf.swa": "swa",
    "rf.rswa": "rswa",
    "rf.rbwa": "rbwa",
    "rf.rbwa_e": "rbwa-e",
    "rf.lookahead": "lookahead",
    "rf.switch_ema": "switch-ema",
    "rf.RSGDM": "rsgdm",
    "rf.Elastic": "replicas",
}


@pytest.mark.parametrize(("call", "system"), IN_README.items())
def test_the_readme_quotes_a_difference_only_where_it_is_outside_its_interval(
    call: str, system: str
) -> None:
    with (RESULTS / "table5-hard" / "table.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["system"] == system)
    low, high = float(row["difference_low"]), float(row["difference_high"])
    lines = (ROOT / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("|") and f"`{call}(" in line]
    told = line.strip("|").split("|")[-1].strip()
    apart = low > 0.0 or high < 0.0
    assert told == (difference(row, "difference", 2) if apart else "not told apart")
