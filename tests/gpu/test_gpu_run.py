"""The stages of `make gpu` where there is no GPU: whatever one of them does, the others report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_smoke
import gpu_stages
import pytest
from gpu_process import ROOT, Output, take
from gpu_run import Run, Stage, chosen, judged, main, wheels_installed

MACHINE = {"gpu": "none", "compute capability": "9.0", "slug": "none", "date": "2026-01-01"}
FOLDER = Path("/nowhere")  # for stages that are looked at and not taken
STAGES = gpu_stages.stages(FOLDER, MACHINE)


def python(name: str, code: str, limit: float = 20.0, **options: Any) -> Stage:
    options = {"least": 0.0, **options}
    return Stage(name, [sys.executable, "-c", code], limit, **options)


def runs(out: Path, stages: Sequence[Stage], minutes: float = 1.0) -> tuple[Run, int]:
    run = Run(out, MACHINE, minutes, gpu_stages.file_name(MACHINE), time.perf_counter())
    return run, run.all(stages)


FIRST = python("first", "print('12 passed')")
LAST = python("last", "print('all is well')")
FAILING = python(
    "fails", "print('FAILED tests/test_x.py::test_y - assert 1 == 2\\n1 failed'); exit(1)"
)
DYING = python("dies", "import os; print('at work', flush=True); os.kill(os.getpid(), 9)")
HANGING = python(
    "hangs",
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "print('row 1', flush=True); time.sleep(600)",
    limit=1.0,
)
MISSING = Stage("missing", ["no-such-program"], 5.0, least=0.0)


def test_a_stage_that_fails_dies_or_hangs_leaves_the_results_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpu_process.GRACE", 0.2)
    run, failed = runs(tmp_path, [FIRST, FAILING, DYING, HANGING, MISSING, LAST])
    assert failed == 4
    assert [o.status for o in run.outcomes] == ["ok", "failed", "failed", "killed", "failed", "ok"]
    log = (tmp_path / "log.txt").read_text()
    for stage in (FIRST, FAILING, DYING, HANGING, MISSING, LAST):
        assert f"######## {stage.name}: " in log
    assert all(said in log for said in ("12 passed", "at work", "row 1", "all is well"))
    table = (tmp_path / "table.txt").read_text()
    lines = table.splitlines()[-6:]
    assert [line.split()[0] for line in lines] == [o.stage.name for o in run.outcomes]
    assert "12 passed" in lines[0]
    assert "1 failed; first: FAILED tests/test_x.py::test_y" in lines[1]
    assert "died by signal 9; at work" in lines[2]
    assert "killed" in lines[3] and "row 1" in lines[3]
    assert "fails: FAILED tests/test_x.py::test_y - assert 1 == 2" in table
    written = json.loads((tmp_path / "none-2026-01-01-run.json").read_text())
    assert written["machine"] == MACHINE
    assert [s["status"] for s in written["stages"]] == [o.status for o in run.outcomes]
    assert sys.executable not in json.dumps(written) and str(tmp_path) not in json.dumps(written)
    assert len(list(tmp_path.iterdir())) == 3
    assert "all is well" in capsys.readouterr().out


def test_output_without_end_leaves_a_log_that_can_be_kept_and_the_last_line(tmp_path: Path) -> None:
    flood = "for i in range(60_000): print(f'{i:099}')\nprint('ERROR SUMMARY: 3 errors')"
    run, _ = runs(tmp_path, [python("floods", flood), LAST])
    assert run.outcomes[0].line == "ERROR SUMMARY: 3 errors"
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 1_500_000 and "all is well" in log
    assert f"{0:099}\n" in log and "bytes left out]" in log and f"{59_999:099}\n" in log


def test_a_full_disk_and_a_reader_that_is_gone_end_no_stage(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import errno, os, pathlib, gpu_run, gpu_stages\n"
        "def full(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        f"gpu_stages.facts = lambda: {MACHINE!r}\n"
        "def stage(name, code):\n"
        "    return gpu_run.Stage(name, [sys.executable, '-c', code], 60.0)\n"
        "gpu_stages.stages = lambda out, facts: [\n"
        "    stage('prints', 'print(12 * \"passed\")'),\n"
        "    stage('last', f'open({str(pathlib.Path(sys.argv[1]) / \"here\")!r}, \"w\")')]\n"
        "pathlib.Path.write_text = full\n"
        "run = gpu_run.main(['--out', sys.argv[1]])\n"
        "sys.exit(run)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.txt").symlink_to("/dev/full")
    (out / "table.txt").write_text("an earlier one\n")
    command = [sys.executable, str(program), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "passedpassed" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("not all written: No space left on device: ")
    assert (out / "table.txt").read_text() == "an earlier one\n"
    (out / "here").unlink()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == ""
    assert process.wait() == 0 and (out / "here").exists()


def test_a_folder_that_cannot_be_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(gpu_stages, "facts", lambda: MACHINE)
    with pytest.raises(SystemExit, match=r"gpu_run: cannot write .*file/out \(Not a directory\)"):
        main(["--out", str(tmp_path / "file" / "out")])


def test_a_stage_is_asked_to_end_where_the_run_was_started_in_the_background() -> None:
    """What a shell starts with `&` ignores SIGINT, and so would what that starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = Output()
    code = (
        "import time\nprint('at work', flush=True)\n"
        "try: time.sleep(600)\nfinally: print('the first failures')"
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            take([sys.executable, "-c", code], 1.0, output, {})
    finally:
        signal.signal(signal.SIGINT, before)
    assert "the first failures" in output.text()


def test_ninja_beside_python_and_the_toolkit_are_found_where_path_lacks_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    output = Output()
    code = "import os; print(os.environ['PATH'])"
    assert take([sys.executable, "-c", code], 20.0, output, {}) == 0
    beside = os.path.dirname(sys.executable)
    assert output.text().strip().split(":") == ["/usr/bin", "/bin", beside, "/usr/local/cuda/bin"]


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_in_which_nothing_fits_are_refused(minutes: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "out"), "--minutes", minutes])
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()


def test_what_leaves_the_group_and_holds_the_output_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpu_process.GRACE", 0.5)
    code = (
        "import subprocess, sys\nprint('done', flush=True)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(25)'],"
        " start_new_session=True)"
    )
    output, begun = Output(), time.perf_counter()
    assert take([sys.executable, "-c", code], 40.0, output, {}) == 0
    assert time.perf_counter() - begun < 20 and output.text() == "done\n"


@pytest.mark.parametrize(
    "line",
    [
        "FAILED tests/test_x.py::test_y - assert 1 == 2",
        "ERROR process 3 died by signal 11",
        "WRONG: torch.float32, plain, none: 2 tensors differ",
        "**WRONG: EMA, cuda, not timed**",
        "      csrc/cpu/ops_cpu.cpp:4:10: fatal error: pybind11/pybind11.h: No such file",
        "      csrc/cuda/step_cuda.cu(12): error: identifier is undefined",
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
    ],
)
def test_the_line_that_says_why_is_found(line: str) -> None:
    passed, told = judged(1, f"some lines\n{line}\nand others\n")
    assert not passed and told == f"and others; first: {line.strip()}"


def test_what_a_stage_left_running_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid)"
    )
    run, _ = runs(tmp_path, [python("leaves", code)])
    child = int(run.outcomes[0].line)
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("it still runs")


def test_a_stage_without_the_one_that_it_needs_is_left_out(tmp_path: Path) -> None:
    broken = python("build", "exit(1)", fallback=python("build, no CUDA", "print('built')"))
    needing = python("smoke", "print('ok')", needs="build")
    run, failed = runs(tmp_path, [broken, needing, LAST])
    assert [(o.stage.name, o.status) for o in run.outcomes] == [
        ("build", "failed"),
        ("build, no CUDA", "ok"),
        ("smoke", "left out"),
        ("last", "ok"),
    ]
    assert failed == 1
    run, _ = runs(tmp_path, [needing])  # alone it is up to whoever asked
    assert run.outcomes[0].status == "ok"


def test_what_does_not_fit_into_the_minutes_is_left_out(tmp_path: Path) -> None:
    run, failed = runs(tmp_path, [FIRST, python("long", "", least=60.0), LAST], minutes=0.5)
    assert [o.status for o in run.outcomes] == ["ok", "left out", "ok"] and failed == 0
    assert "s are left" in run.outcomes[1].line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_ends_its_stage_and_leaves_the_table(
    tmp_path: Path, number: signal.Signals
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"import signal, sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # in a shell's background, too
        "import gpu_run, gpu_stages\n"
        f"gpu_stages.facts = lambda: {MACHINE!r}\n"
        "hanging = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        "def stage(name, code):\n"
        "    return gpu_run.Stage(name, [sys.executable, '-c', code], 60.0)\n"
        "gpu_stages.stages = lambda out, facts: [stage('first', ''), stage('hangs', hanging)]\n"
        f"sys.exit(gpu_run.main(['--out', {str(tmp_path / 'out')!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "log.txt"
    for _ in range(600):
        if log.exists() and log.read_text().rstrip().split("\n")[-1].isdigit():
            break
        time.sleep(0.05)
    child = int(log.read_text().rstrip().split("\n")[-1])
    assert "running" in (tmp_path / "out" / "table.txt").read_text()  # what a hard kill would leave
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table.rstrip() in printed
    assert [line.split()[1] for line in table.splitlines()[-2:]] == ["ok", "interrupted"]
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_stages_are_chosen_by_name_and_kept_in_their_order() -> None:
    assert [s.name for s in chosen(STAGES, "bench, smoke")] == ["smoke", "bench"]
    assert [s.name for s in chosen(STAGES, None)] == list(gpu_stages.NAMES)
    with pytest.raises(ValueError, match="unknown stage: 'smok'"):
        chosen(STAGES, "smok")


def test_without_a_gpu_the_run_says_so_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "tests/gpu_run.py", "--out", str(tmp_path / "out")]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.splitlines() == ["gpu_run: torch sees no CUDA device"]


def test_wheels_that_the_machine_lacks_are_there_for_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)  # the stages run elsewhere
    (tmp_path / "some-1-py3-none-any.whl").touch()
    first, build, *others = wheels_installed(STAGES, Path("."), "/site")
    assert first.command[-1] == str(tmp_path / "some-1-py3-none-any.whl")
    assert build.fallback is not None and build.fallback.environment["RBWA_CUDA"] == "0"
    for stage in (build, build.fallback, *others):
        assert stage.environment["PYTHONPATH"].split(os.pathsep)[0] == "/site"
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--wheels", str(tmp_path / "empty")])


# ---- the real stages, as far as a machine without a GPU takes them -------------------------------


def named(name: str) -> Stage:
    (stage,) = chosen(STAGES, name)
    return stage


def test_every_command_names_programs_that_are_there() -> None:
    for stage in STAGES:
        for part in stage.command:
            if part.startswith("tests/"):
                assert (ROOT / part).is_file(), part


def test_the_build_that_leaves_kernels_out_is_none() -> None:
    judge = named("build").judge
    assert judge(0, "  compiling\nSuccessfully installed rbwa_fused-0.1.0") == (
        True,
        "Successfully installed rbwa_fused-0.1.0",
    )
    why = "rbwa_fused: without CUDA kernels: no nvcc that works on PATH, no CUDA_HOME"
    assert judge(0, f"  running\n  {why}\nSuccessfully installed") == (False, why)


def test_the_smoke_test_takes_its_stages_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(gpu_smoke.Smoke, "all", lambda self: asked.append(self.backend) or [])
    for name in gpu_stages.SMOKE:
        assert gpu_smoke.main(named(name).command[2:]) == 0
    assert asked == ["cuda", "triton"]


def test_the_benchmarks_take_their_stages_arguments() -> None:
    from benchmarks import __main__ as suite
    from benchmarks import step
    from benchmarks.rows import shapes

    for name in ("bench", "bench triton"):
        args = step.arguments(named(name).command[3:])
        assert args.device == "cuda" and args.backend == {"bench": "cuda"}.get(name, "triton")
        assert set(args.model) <= shapes.MODELS.keys() and args.out.parent == FOLDER
    args = suite.arguments(named("rest").command[3:])
    assert set(args.model) <= shapes.MODELS.keys() and args.out.parent == FOLDER
    assert not args.pictures and args.seconds < named("rest").limit


def test_everything_lands_in_at_most_eight_files() -> None:
    outs = {stage.command[-1] for stage in STAGES if "--out" in stage.command}
    assert len(outs) == 3  # and the log, the table and the run


SEEN = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void {kernel}<float>(T1)+0x150
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("text", "passed", "line"),
    [
        (SEEN.format(kernel="at::vectorized_elementwise_kernel"), True, "0 uninit"),
        (SEEN.format(kernel="<unnamed>::step_kernel"), False, "1 uninit"),
        ("========= Error: Device not supported. Please refer to\n", False, "Device not supp"),
    ],
)
def test_initcheck_is_judged_by_our_own_kernels(text: str, passed: bool, line: str) -> None:
    found = gpu_stages.uninitialized(0, text)
    assert found[0] == passed and line in found[1]


def test_the_self_check_tells_what_was_checked() -> None:
    judge = named("check").judge
    text = "gpu     some\ncheck cuda       ok, differs by 0\ncheck triton     not run: why\n"
    assert judge(0, text) == (True, "cuda ok, triton not run")
    assert judge(1, "RuntimeError: no")[1].startswith("RuntimeError: no")


def test_a_benchmark_tells_the_ratios_that_it_has_written(tmp_path: Path) -> None:
    (stage,) = chosen(gpu_stages.stages(tmp_path, MACHINE), "bench")
    assert stage.judge(1, "RuntimeError: no\nbye") == (False, "bye; first: RuntimeError: no")
    rows = {name: {"ratio": r} for name, r in [("torch SGD fused", 1.0), ("EMA, cuda", 1.414)]}
    problem = {"model": "resnet18", "rows": rows, "wrong": []}
    Path(stage.command[-1]).write_text(json.dumps({"problems": [problem]}))
    assert stage.judge(0, "written") == (True, "resnet18: 2 rows, EMA, cuda 1.41")
    os.utime(stage.command[-1], (0, 0))  # of an earlier run
    assert stage.judge(1, "died") == (False, "died")


# ---- pytest in several processes ----------------------------------------------------------------

TESTS = """
import os, signal, pytest

@pytest.mark.parametrize("number", range(7))
def test_one(number):
    assert number != 3

@pytest.mark.skipif(True, reason="")
def test_skipped(): pass
"""


def in_parallel(folder: Path, text: str, *options: str) -> tuple[int, str]:
    (folder / "test_dealt.py").write_text(text)
    command = [sys.executable, str(ROOT / "tests/gpu/parallel.py"), "3", "-q", "--tb=no", "-rfE"]
    done = subprocess.run(
        [*command, *options, "-p", "no:cacheprovider", "test_dealt.py"],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


def test_tests_are_dealt_out_each_to_one_process(tmp_path: Path) -> None:
    status, printed = in_parallel(tmp_path, TESTS)
    assert status == 1
    assert printed.splitlines()[-1] == "1 failed, 6 passed, 1 skipped"
    assert printed.count("\nFAILED test_dealt.py::test_one[3]") == 1
    status, printed = in_parallel(tmp_path, TESTS, "-k", "one and (1 or 2)")  # less than processes
    assert (status, printed.splitlines()[-1]) == (0, "2 passed")
    status, printed = in_parallel(tmp_path, TESTS, "-k", "skipped")  # as without a GPU
    assert (status, printed.splitlines()[-1]) == (1, "1 skipped")


def test_a_process_that_dies_is_no_success(tmp_path: Path) -> None:
    dying = "import os\ndef test_a(): pass\ndef test_b(): os.kill(os.getpid(), 9)\n"
    status, printed = in_parallel(tmp_path, dying)
    assert status == 1 and "ERROR process 1 died by signal 9" in printed
    assert printed.splitlines()[-1] == "1 passed"
