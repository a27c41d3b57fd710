"""What the documents show is what the code has."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("draw_tables", ROOT / "docs" / "draw_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_tables_can_be_drawn_from_an_optimizer_of_today(tmp_path: Path) -> None:
    assert script().main(tmp_path / "tables.png") == 0
    assert (tmp_path / "tables.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    files = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in files if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_source_file_that_a_page_names_by_its_path_is_there(page: Path) -> None:
    rooms = "rbwa_fused|csrc|triton_kernels|tests|benchmarks|studies|examples"
    named = set(re.findall(rf"`((?:{rooms})/[\w/]+\.\w+)`", page.read_text()))
    assert {name for name in named if not (ROOT / name).exists()} == set()
