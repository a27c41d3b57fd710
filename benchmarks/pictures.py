"""The suite's pictures, from its results: ``python -m benchmarks.pictures FILE.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.report.pictures import draw
from rbwa_fused import command


def main() -> None:
    """Draws results that were written before."""
    parser = command.Parser(
        "python -m benchmarks.pictures", description="Draws results in JSON again."
    )
    parser.add_argument("file", nargs="*", type=Path, help="as python -m benchmarks writes it")
    for file in parser.parse_args().file:
        print(*draw(json.loads(file.read_text()), file.with_suffix("")))


if __name__ == "__main__":
    sys.exit(command.run("benchmarks.pictures", main))
