"""A copy of the tree that is broken in one place at a time; what it compiles is kept in between."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = (
    "csrc",
    "rbwa_fused",
    "triton_kernels",
    "tests",
    "benchmarks",
    "studies",
    "setup.py",
    "pyproject.toml",
)
TEXTS = ("README.md", "docs")  # tests read them
OURS = (".cpp", ".cu", ".h", ".md", ".py", ".toml")

Edit = tuple[str, str, str]  # file, old text, new text


class Workspace:
    """A working copy under build/, with the CPU module compiled in place by `compile`.

    Files are written only where they differ from the tree's, so ninja compiles what an edit
    concerns and no more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        wanted = set()
        for name in (*TREE, *TEXTS):
            source = ROOT / name
            for file in [source] if source.is_file() else source.rglob("*"):
                if file.suffix in OURS:
                    wanted.add(file.relative_to(ROOT))
                    self._write(file.relative_to(ROOT), file.read_text())
        for name in (*TREE, *TEXTS):
            for file in (folder / name).rglob("*"):
                if file.suffix in OURS and file.relative_to(folder) not in wanted:
                    file.unlink()
        # As installed, or the installation's would be found.
        installed = folder / "rbwa_fused" / "triton_kernels"
        if not installed.is_symlink():
            installed.symlink_to(folder / "triton_kernels")

    def _write(self, name: Path, text: str) -> None:
        copy = self.folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)

    @contextmanager
    def broken(self, *edits: Edit) -> Iterator[None]:
        """The edits stand inside the context; each must find its text."""
        try:
            for file, old, new in edits:
                text = (self.folder / file).read_text()
                if old not in text:
                    raise LookupError(f"{file} has no {old!r}")
                (self.folder / file).write_text(text.replace(old, new))
            yield
        finally:
            for file, _, _ in edits:
                self._write(Path(file), (ROOT / file).read_text())

    def compile(self, flags: str = "") -> None:
        """The CPU module as setup.py builds it, with more flags for compiler and linker."""
        environment = {**os.environ, "RBWA_CUDA": "0", "CFLAGS": flags, "LDFLAGS": flags}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])

    def pytest(
        self, *arguments: str, environment: Mapping[str, str] | None = None, timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Runs tests on the copy, what failed last first. Paths are relative to its tests."""
        pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "--ff"]
        return subprocess.run(
            [*pytest, *arguments],
            cwd=self.folder / "tests",
            env={
                **os.environ,
                "PYTHONPATH": str(self.folder),
                "PYTHONDONTWRITEBYTECODE": "1",  # a second is too coarse a stamp for edits
                **(environment or {}),
            },
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def remove(self) -> None:
        """Deletes the copy and what it has compiled."""
        shutil.rmtree(self.folder)
