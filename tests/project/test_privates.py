"""No object of the package reaches into another's privates: who owns a thing does the thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Modules of others, of which a private name may be one of ours as well.
FOREIGN = {"torch", "nn", "sys", "gc"}
# By these names torch asks an optimizer.
TORCHS = {"_step_supports_amp_scaling"}
# export() is a hook: for its optimizer it may get a wrapper that has taken on its class.
ARGUED = {"saved.py: _itself"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def definitions(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each private attribute that a class defines, with the class's name."""
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef):
            continue
        for node in ast.walk(owner):
            if isinstance(node, ast.FunctionDef):
                names = [node.name]
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own = isinstance(node.value, ast.Name) and node.value.id == "self"
                names = [node.attr] if own else []
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            elif isinstance(node, ast.Assign):
                names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            else:
                names = []
            yield from ((name, owner.name) for name in names if private(name))


def root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id
    return node.id if isinstance(node, ast.Name) else ""


def reaches(tree: ast.AST, owners: Mapping[str, set[str]]) -> Iterator[str]:
    """The private names that are read of another object, outside the class that alone has them."""

    def visit(node: ast.AST, inside: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            within = child.name if isinstance(child, ast.ClassDef) else inside
            if (
                isinstance(child, ast.Attribute)
                and child.attr in owners.keys() - TORCHS
                and owners[child.attr] != {inside}
                and root(child.value) not in FOREIGN
                and not (isinstance(child.value, ast.Name) and child.value.id in ("self", "cls"))
                and not (isinstance(child.value, ast.Call) and root(child.value) == "super")
            ):
                yield child.attr
            yield from visit(child, within)

    yield from visit(tree, "")


def found(folder: Path) -> set[str]:
    trees = {file: ast.parse(file.read_text()) for file in sorted(folder.rglob("*.py"))}
    owners: dict[str, set[str]] = defaultdict(set)
    for tree in trees.values():
        for name, owner in definitions(tree):
            owners[name].add(owner)
    return {
        f"{file.name}: {name}" for file, tree in trees.items() for name in reaches(tree, owners)
    }


def test_nobody_reaches_into_anothers_privates() -> None:
    assert found(ROOT / "rbwa_fused") == ARGUED


def test_a_reach_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "class A:\n"
        "    def __init__(self):\n        self._own = self._other()\n"
        "    def _other(self, other):\n        return other._own\n"
    )
    assert found(tmp_path) == set()
    (tmp_path / "b.py").write_text("import torch\ndef f(a):\n    torch._own\n    return a.x._own\n")
    assert found(tmp_path) == {"b.py: _own"}
