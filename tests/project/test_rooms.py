"""Rooms: what a file may import. Arrows go down, nothing imports in a circle, and another program
uses a room only by its doors."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# For each program its floors from the ground up. A file is on the floor with the longest name that
# begins its own, and imports from its floor and those below.
FLOORS: dict[str, Sequence[str]] = {
    "rbwa_fused": (
        *(f"rbwa_fused.{name}" for name in ("streams", "numbers", "fingerprint", "command")),
        *(
            f"rbwa_fused.{name}"
            for name in (
                "compiled",
                "papers",
                "power",
                "ramp",
                "weights",
                "average",
                "policies",
                "several",
                "renumbered",
                "progress",
                "hyperparameters",
                "rules",
            )
        ),
        *(f"rbwa_fused.engine.{name}" for name in ("sharded", "memory", "segments", "norm")),
        "rbwa_fused.reference",  # a backend, as are these:
        "rbwa_fused.triton_kernels",
        *(
            f"rbwa_fused.engine.{name}"
            for name in ("packed", "samplers", "rows", "counters", "doors", "backends", "checks")
        ),
        "rbwa_fused.engine",
        *(f"rbwa_fused.{name}" for name in ("model_state", "swap", "evaluate", "estimate")),
        *(f"rbwa_fused.{name}" for name in ("averages", "form", "checkpoint", "adopted")),
        *(f"rbwa_fused.{name}" for name in ("members", "buffers", "total_norm", "clipping")),
        *(
            f"rbwa_fused.{name}"
            for name in ("in_backward", "saved", "fused", "optimizer", "replicas", "modes")
        ),
        *(
            f"rbwa_fused.{name}"
            for name in ("into", "foreign", "steppers", "following", "averager")
        ),
        "rbwa_fused.posthoc",
        *(f"rbwa_fused.{name}" for name in ("distributed", "integrations")),
        "rbwa_fused",
    ),
    "benchmarks": (
        "benchmarks.rows",
        "benchmarks.measure",
        "benchmarks.report",
        "benchmarks",  # the commands
    ),
}
# What a program imports of other programs, if not all of it is forbidden.
DOORS: dict[str, Sequence[str]] = {
    "rbwa_fused": (),
    "benchmarks": ("rbwa_fused", "studies.moved"),
    "studies": (
        "rbwa_fused",
        *("benchmarks.measure", "benchmarks.report.markdown", "benchmarks.rows.shapes"),
    ),
}
PROGRAMS = ("rbwa_fused", "triton_kernels", "benchmarks", "studies", "examples", "tests")
NO_CIRCLE = ("rbwa_fused", "benchmarks", "studies")

Arrows = Mapping[str, frozenset[str]]


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def module_of(file: Path, root: Path) -> str:
    name = ".".join(file.relative_to(root).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported(tree: ast.AST, module: str, package: str, modules: frozenset[str]) -> Iterator[str]:
    """The modules that a file's statements name, those inside functions too.

    `from a import b` is a.b where that is a module, else a.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in modules else base


def arrows_in(root: Path, program: str) -> Arrows:
    """What each file of a program imports of the programs in PROGRAMS."""
    files = {module_of(file, root): file for file in sorted((root / program).rglob("*.py"))}
    known = frozenset(module_of(file, root) for p in PROGRAMS for file in (root / p).rglob("*.py"))
    found = {}
    for module, file in files.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        named = imported(ast.parse(file.read_text()), module, package, known)
        found[module] = frozenset(n for n in named if n.split(".")[0] in PROGRAMS and n != module)
    return found


@cache
def arrows(program: str) -> Arrows:
    return arrows_in(ROOT, program)


def upward(found: Arrows, floors: Sequence[str]) -> list[str]:
    """Imports of a floor above."""

    def floor(module: str) -> int:
        room = max((room for room in floors if within(module, room)), key=len)
        return floors.index(room)

    return [
        f"{module} imports {target}"
        for module, targets in found.items()
        for target in sorted(targets)
        if within(target, floors[-1].split(".")[0]) and floor(target) > floor(module)
    ]


def undoored(found: Arrows, program: str, doors: Sequence[str]) -> list[str]:
    """Imports of another program by what is no door."""
    return [
        f"{module} imports {target}"
        for module, targets in found.items()
        for target in sorted(targets)
        if not within(target, program) and not any(within(target, door) for door in doors)
    ]


def circle(found: Arrows) -> list[str]:
    """Modules that import one another, the first again at the end; empty if none do."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(found.get(module, ())):
            way = visit(target, [*path, module])
            if way:
                return way
        done.add(module)
        return []

    return next((way for module in found if (way := visit(module, []))), [])


@pytest.mark.parametrize("program", FLOORS)
def test_a_room_can_be_read_without_those_above_it(program: str) -> None:
    assert arrows(program), program
    assert not upward(arrows(program), FLOORS[program])


@pytest.mark.parametrize("program", DOORS)
def test_a_program_is_used_only_by_its_doors(program: str) -> None:
    assert arrows(program), program
    assert not undoored(arrows(program), program, DOORS[program])


@pytest.mark.parametrize("program", NO_CIRCLE)
def test_no_two_files_need_each_other_to_be_read(program: str) -> None:
    assert not circle(arrows(program))


def tree(root: Path, files: Mapping[str, str]) -> Arrows:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return arrows_in(root, "benchmarks")


FORMS = [
    "from benchmarks.report import tables",
    "from benchmarks.report.tables import table",
    "import benchmarks.report.tables",
    "from ..report import tables",
    "def f():\n    from benchmarks import report",
]


@pytest.mark.parametrize("text", FORMS)
def test_every_form_of_import_is_seen_also_in_a_function(text: str, tmp_path: Path) -> None:
    files = {
        "benchmarks/__init__.py": "",
        "benchmarks/rows/__init__.py": "",
        "benchmarks/rows/row.py": text,
        "benchmarks/report/__init__.py": "",
        "benchmarks/report/tables.py": "",
    }
    (found,) = upward(tree(tmp_path, files), FLOORS["benchmarks"])
    assert found.startswith("benchmarks.rows.row imports benchmarks.report")


def test_circles_and_closed_doors_are_found(tmp_path: Path) -> None:
    files = {
        "benchmarks/a.py": "from benchmarks import b",
        "benchmarks/b.py": "import benchmarks.c",
        "benchmarks/c.py": "def f():\n    from benchmarks.a import x\n    import studies.scaling",
        "studies/scaling.py": "",
    }
    found = tree(tmp_path, files)
    assert circle(found) == [f"benchmarks.{name}" for name in "abca"]
    assert undoored(found, "benchmarks", DOORS["benchmarks"]) == [
        "benchmarks.c imports studies.scaling"
    ]
