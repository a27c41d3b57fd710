"""Programs end in one line, with a status that says so, where the world around them is at fault."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import mutate
import pytest
import sanitize

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from rbwa_fused.command import run

ROOT = Path(__file__).resolve().parents[2]
# Whose reader is the program that started it.
WORKERS = ("benchmarks.measure.process", "benchmarks.measure.one_checkout")
MOVED = {
    "examples.train": "studies.digits",
    "examples.compare": "studies.digits",
    "examples.papers": "studies.papers",
    "benchmarks.scaling": "studies.scaling",
}


def full() -> TextIO:
    """A disk without room."""
    return open("/dev/full", "w")


def gone() -> TextIO:
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w")


def programs() -> Iterator[str]:
    """All that `python -m` starts; an example is plain PyTorch, see test_examples.py."""
    for package in ("rbwa_fused", "studies", "benchmarks"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if '\nif __name__ == "__main__":\n' in file.read_text():
                name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                if name not in WORKERS and name not in MOVED:
                    yield name.removesuffix(".__main__")


PROGRAMS = list(programs())
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


def test_all_programs_are_found() -> None:
    assert {"rbwa_fused", "benchmarks", *MOVED.values()} < set(PROGRAMS)


@pytest.mark.parametrize("old", MOVED)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_command_that_moved_says_where_it_is_and_does_what_it_did(
    old: str, as_file: bool, tmp_path: Path
) -> None:
    name = str(ROOT / f"{old.replace('.', '/')}.py")
    program = [name] if as_file else ["-m", old]
    done = subprocess.run(
        [sys.executable, *program, "--help"],
        cwd=tmp_path if as_file else ROOT,
        capture_output=True,
        text=True,
    )
    new = MOVED[old]
    assert done.returncode == 0
    assert done.stderr == f"{old} has moved: python -m {new}\n"
    usage = done.stdout.splitlines()[0]
    assert usage.startswith("usage: ") and new.removeprefix("studies.") in usage


def started(module: str, argument: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit status of `python -m module argument`, in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, argument])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    return ended.value.code


@needs_full
@pytest.mark.filterwarnings("ignore:.* found in sys.modules after import")
@pytest.mark.parametrize("module", PROGRAMS)
def test_a_full_disk_is_one_line_and_a_gone_reader_none(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stdout, status in ((full(), 1), (gone(), 141)):
        with monkeypatch.context() as patch, stdout:
            patch.setattr(sys, "stdout", stdout)
            assert started(module, "--help", patch) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: [Errno 28] No space left on device")


@pytest.mark.filterwarnings("ignore:.* found in sys.modules after import")
@pytest.mark.parametrize("module", PROGRAMS)
def test_an_unknown_argument_is_one_line(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = started(module, "--no-such-option", monkeypatch)
    said = capsys.readouterr().err + (status if isinstance(status, str) else "")
    assert status != 0 and len(said.splitlines()) == 1
    assert "--no-such-option" in said or "COMMAND" in said


@pytest.mark.parametrize(
    ("tool", "argument"), [(mutate, "--help-me"), (mutate, "no_such_file"), (sanitize, "quickly")]
)
def test_a_tool_does_not_run_for_minutes_where_it_is_asked_for_something_else(
    tool: Any, argument: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "Workspace", lambda *_: pytest.fail("it runs"))
    with pytest.raises(SystemExit) as ended:
        tool.main([argument])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and argument in line


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nothing_is_said_at_pythons_end_about_output_that_was_lost(unbuffered: str) -> None:
    command = [sys.executable, "-m", "rbwa_fused"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    for stdout, status, words in (
        (full(), 1, "python -m rbwa_fused: error: [Errno 28] No space left"),
        (gone(), 141, ""),
    ):
        with stdout:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == status
        assert done.stderr.startswith(words) and len(done.stderr.splitlines()) == bool(words)


def test_a_package_that_is_missing_is_one_line_and_a_module_of_ours_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def of_others() -> None:
        import no_such_package.part  # type: ignore[import-not-found]  # noqa: F401

    def of_ours() -> None:
        import rbwa_fused.no_such_module  # noqa: F401

    assert run("name", of_others) == 1
    assert capsys.readouterr().err == "name: error: no_such_package is not installed\n"
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run("name", of_ours)


def test_the_benchmarks_name_all_that_is_missing_before_anything_is_imported() -> None:
    missing = ("torchvision", "matplotlib", "scipy")
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({missing})); "
        "sys.argv = ['benchmarks']; runpy.run_module('benchmarks', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"benchmarks: {', '.join(missing)} not installed: make .venv/dev\n"


def test_the_scaling_study_without_numpy_says_so_in_one_line_however_it_is_called() -> None:
    for name in ("studies.scaling", "benchmarks.scaling"):
        code = (
            "import runpy, sys; sys.modules['numpy'] = None; "
            f"sys.argv = ['{name}']; runpy.run_module('{name}', run_name='__main__')"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and not done.stdout
        moves = [f"{name} has moved"] if name in MOVED else []
        *before, last = done.stderr.splitlines()
        assert last == "studies.scaling: numpy not installed: make .venv/dev"
        assert [line.partition(":")[0] for line in before] == moves


def test_a_process_group_is_destroyed_only_after_all_are_done() -> None:
    """torch 2.14 aborts about one process in eight that leaves while another still talks to it."""
    found = 0
    for folder in ("examples", "studies", "tests", "benchmarks", "docs"):
        for file in (ROOT / folder).rglob("*.*"):
            if file.suffix in (".py", ".md") and file != Path(__file__).resolve():
                lines = file.read_text().splitlines()
                for before, line in pairwise(lines):
                    if re.search(r"\bdestroy_process_group\(\)", line):
                        found += 1
                        assert ".barrier()" in before, f"{file}: {before}"
    assert found >= 3
