"""Breaks the code in one place at a time and counts what no test notices.

    python tests/mutate.py [part of a file's name ...]

Each mutant is one edit in a copy of the tree under build/mutants. The mathematics of the CUDA
kernels runs in emulated ones (tests/emulation.py) against the CPU's; the mathematics of reference
and rules must fail against the literal algorithms of the tests. tools/mutants.py lists what
stands around the mathematics; for its C++ the CPU module is compiled. RBWA_MUTATE_WORKERS says how
many mutants run at a time (2). The exit status is the number of survivors.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(1, str(Path(__file__).resolve().parent / "tools"))

import mutants
import mutants_clipping
import mutants_distributed
import mutants_posthoc
import mutants_schedule_free
import mutants_several
import mutants_weights
from workspace import ROOT, Workspace

from rbwa_fused.command import Parser

UPDATE = [
    ("T g = k.s * e.g;", "T g = e.g;"),
    ("g + k.lambda * e.theta", "g - k.lambda * e.theta"),
    ("e.m = k.mu * e.m + k.c * g;", "e.m = k.mu * e.m + g;"),
    ("e.m = k.mu * e.m + k.c * g;", "e.m = e.m + k.c * g;"),
    ("k.gamma * e.m;", "e.m;"),
    ("k.alpha * g + m : m", "g + m : m"),
    ("k.alpha != T(0)", "k.alpha == T(0)"),
    ("k.kappa * (g - e.previous)", "k.kappa * (g + e.previous)"),
    ("k.kappa * (g - e.previous)", "(g - e.previous)"),
    ("e.z = k.mu * e.z", "e.z = e.z"),
    ("e.previous = g;", "e.previous = e.g;"),
    ("k.delta * e.z", "e.z"),
    ("e.theta - k.eta * direction", "e.theta + k.eta * direction"),
    ("k.w * (x - a)", "k.w * (a - x)"),
    ("k.w == T(1) ? x", "k.w == T(1) ? a"),
    ("k.w != T(0)", "k.w == T(0)"),
    ("k.current ? e.theta : e.a", "e.a"),
    ("k.write_back ? e.a : x", "x"),
    ("  e.theta = x;\n", ""),
    ("(k.q * g) * g", "k.q * (g * g)"),
    ("k.nu * e.v", "e.v"),
    ("v <= e.v_max ? e.v_max : v", "e.v_max < v ? v : e.v_max"),
    ("v = e.v_max;", ""),
    ("std::sqrt(v) * k.bias", "std::sqrt(v)"),
    (" + k.epsilon", ""),
    ("direction + k.rho * e.theta", "direction"),
    ("1 - power(mu, age + 1)", "1 - power(mu, age)"),
    ("1 - power(nu, age + 1)", "1 - power(nu, age)"),
    ("row.eta / grown", "row.eta"),
    ("row.rho * grown", "row.rho"),
    ("k.eta = aging.eta;", ""),
    ("rounded == param ? master : param", "master"),
]
SAMPLED = [
    ("return kind != Kind::kSample || k.write_back;", "return true;"),
    ("return kind != Kind::kSample || k.write_back;", "return kind != Kind::kSample;"),
]
PULLED = [
    ("distance + (theta - first)", "distance - (theta - first)"),
    ("distance + (theta - first)", "theta - first"),
    ("first + share * distance", "first + distance"),
    ("first + share * distance", "share * distance"),
    ("alpha == T(1) ? mean", "alpha == T(1) ? theta"),
    ("alpha == T(1) ? mean :", "false ? mean :"),
    ("theta + alpha * (mean - theta)", "theta + alpha * (theta - mean)"),
    ("theta + alpha * (mean - theta)", "theta + (mean - theta)"),
]
PULL_BODY = [
    ("if (k < replicas) add(", "if (k + 1 < replicas) add("),
    ("if (k < replicas) move(", "if (k + 1 < replicas) move("),
    ("add(further, mean);", ""),
    ("store(again, of(theta[k], at));", ""),
    ("+ p.first_address", ""),
    ("<= block ? low : high", "< block ? low : high"),
    ("done = end - (end - begin) % count", "done = end"),
    ("at < end; at += kThreads", "at + 1 < end; at += kThreads"),
    ("first < done; first += flight * stride", "first < done; first += stride"),
]
PULL_LAUNCHES = [
    ("chunks += own;", "chunks += 1;"),
    ("(param.length + kSmallChunk - 1) / kSmallChunk", "param.length / kSmallChunk"),
    ("% 16 == 0", "% 2 == 0"),
    ("bytes > kPullTableBytes", "bytes > 2 * kPullTableBytes"),
]
BODY = [
    ("k.eta *= sampling.scale;", ""),
    ("first ? group.first : group.usual", "group.usual"),
    ("if constexpr (kHasMaster<S, W>) narrow(e.theta, chunk.theta[i]);", ""),
    ("narrow(e.theta, weights(chunk)[i]);", ""),
    ("if (writes_weight<kind>(k)) param[f].store(chunk.param, vector);", ""),
    ("if (writes_weight<kind>(k)) theta[f].store(chunk.theta, vector);", ""),
    ("if (writes_weight<kind>(k)) theta[f].store", "theta[f].store"),
    ("if constexpr (kHasMaster<S, W>) all |= address(chunk.param);", ""),
    ("if constexpr (keeps_##stream(kind)) narrow(e.stream, chunk.stream[i]);", ""),
    ("if constexpr (keeps_##stream(kind)) all |= address(chunk.stream);", ""),
    ("if constexpr (keeps_##stream(kind)) stream[f].store(chunk.stream, vector);", ""),
    ("if constexpr (averaged) narrow(e.a, chunk.a[i]);", ""),
    ("e.g = u.unscale * e.g;", ""),
    ("narrow(e.g, chunk.g[i]);", ""),
    ("if (u.scaled) store_gradient(chunk.g + vector * count, g_bytes, g[f]);", ""),
    ("u.unscale = T(1) / static_cast<T>(*launch.grad_scale)", "u.unscale = T(1)"),
    ("done = chunk.n - chunk.n % count", "done = chunk.n"),
    ("done = chunk.n - chunk.n % count", "done = 0"),
    ("i < chunk.n; i += kThreads", "i + 1 < chunk.n; i += kThreads"),
    ("if (vector >= whole) continue;", "if (vector > whole) continue;"),
    ("first < whole; first += flight * kThreads", "first < whole; first += kThreads"),
    ("all % kVectorBytes == 0", "true"),
    ("<= block ? low : high", "< block ? low : high"),
    ("s.length - begin < launch.chunk", "s.length - begin > launch.chunk"),
    ("*launch.found_inf != 0", "*launch.found_inf == 1"),
    ("launch.marks[2 * s.index + 1] = 1;", ""),
    ("keeps_any(kind) && launch.marks", "launch.marks"),
    ("launch.marks[2 * s.index] == 0", "launch.marks[2 * s.index] != 0"),
    ("if (bytes == 8) return load_pieces<8>", "if (bytes == 8) return load_pieces<16>"),
    ("k.eta = static_cast<T>(*group.lr);", ";"),
    (
        "if (kind == Kind::name) return",
        "if (kind == Kind::name && kind != Kind::kSample) return",
    ),
]
AVERAGE_H = [
    ("1.0 / (count + 1)", "1.0 / count"),
    ("return 1.0 - numbers[0]", "return numbers[0]"),
    ("(step - 1) / steps_per_epoch + 1", "step / steps_per_epoch + 1"),
    ("(step - 1) % steps_per_epoch", "step % steps_per_epoch"),
    ("past <= 0 ||", ""),
    ("static_cast<double>(step) > policy.begins", "policy.begins < 1e300"),
    ("buffered.current = buffered.sample = 1", "buffered.sample = 1"),
    ("past % write_back_every == 0", "true"),
    ("return n + 1;", "return n;"),
    ("d.marks[2 * i] += d.marks[2 * i + 1];", ""),
    ("d.marks[2 * i + 1] = 0;", ""),
    ("sampling_of(policy, n, step + 1, d.policies, rows[0], rows[1])", "0"),
]
LAUNCHES = [
    ("group = s.row / kRowsPerGroup;", "group = s.row;"),
    ("static_cast<uint8_t>(s.row % kRowsPerGroup)", "uint8_t{0}"),
    ("rounded<Numbers<T>, T>(rows[1].numbers)", "rounded<Numbers<T>, T>(rows[0].numbers)"),
    ("key.most = std::max(key.most, served_by(segments[i].kind))", "key.most = segments[i].kind"),
    ("key.averaged |= segments[i].a != nullptr || ", "key.averaged |= "),
    ("lacking(own) != lacks ||", "lacks == 0 ||"),
    ("own.kind = static_cast<uint8_t>(served_by(s.kind));", ""),
    ("chunks_ += chunks;", "chunks_ += 1;"),
    ("(s.length + launch_.chunk - 1) / launch_.chunk", "s.length / launch_.chunk"),
    ("bytes_with(s) > kTableBytes", "bytes_with(s) > 2 * kTableBytes"),
]
FORMS = [
    ("if (launch_form.block_table) at = put_blocks(at);", ""),
    ("after - segments_[i].first_chunk, static_cast", "1, static_cast"),
    ("if (chunks_ * static_cast<int64_t>(sizeof(uint16_t)) > left) return at;", ""),
    ("static_cast<int32_t>(at - launch_.tables) : kTableBytes", "0 : kTableBytes"),
]
REFERENCE = [
    ("g + k.lambda_ * theta if", "g - k.lambda_ * theta if"),
    ('k.mu * old["m"] + k.c * g', 'k.mu * old["m"] + g'),
    ("k.alpha * g + direction", "g + direction"),
    ('k.kappa * (g - old["previous"])', '(g - old["previous"])'),
    ("x = theta - k.eta * direction", "x = theta + k.eta * direction"),
    ("a + w * (x - a)", "a - w * (x - a)"),
    ("x = a if k.write_back else x", "x = x"),
    ('e["previous"].copy_(g)', "pass"),
    ("master.to(theta.dtype) == theta", "master == master"),
    ("theta.copy_(held[MASTER])", "pass"),
    ("columns[ROW] + first]", "columns[ROW]]"),
    ("ages[i] += bool(KEPT_BY[kind])", "pass"),
    ("            kind = Kind.SAMPLE\n", "            pass\n"),
]
PULL_REFERENCE = [
    ("distance + (theta.detach().to(wide) - first)", "theta.detach().to(wide) - first"),
    ("first + share * distance", "first + distance"),
    ("average.sub_(theta).mul_(alpha)", "average.sub_(theta)"),
    (
        "        return average\n    return correction_",
        "        return theta\n    return correction_",
    ),
]
RULES = [
    ('-1.0 if group.get("maximize") else 1.0', "1.0"),
    ('c = 1.0 if first else 1.0 - float(group["dampening"])', "c = 1.0"),
    ("c=1.0, alpha=1.0, gamma=mu", "c=1.0, alpha=1.0, gamma=1.0"),
    ("beta, 1.0 - beta, gamma=1.0)", "beta, 1.0, gamma=1.0)"),
    ("c = 0.0 if first else 1.0 - beta", "c = 1.0 - beta"),
    ("alpha=1.0 - beta, gamma=beta", "alpha=beta, gamma=beta"),
    ("kappa=0.0 if first else 1.0 - beta", "kappa=1.0 - beta"),
    ("gamma=1.0, delta=beta", "gamma=1.0, delta=1.0"),
]
WEIGHTS = [
    ("return 1.0 / (n + 1)", "return 1.0 / n"),
    ("return 1.0 - self.decay", "return self.decay"),
    ("divmod(step - 1, self.steps_per_epoch)", "divmod(step, self.steps_per_epoch)"),
    ("(epochs + 1 - self.start_epoch)", "(epochs - self.start_epoch)"),
]
AVERAGE = [
    ("past > 0 and past % self.every == 0", "past >= 0 and past % self.every == 0"),
    ("(step - self.origin) % self.write_back_every == 0", "step % self.write_back_every == 0"),
    ("self.start + (self.offset - self.every if self.offset else 0)", "self.start"),
    ("return 0 if self.initial", "return 1 if self.initial"),
    ('if self.initial == "now" else self.start', 'if self.initial != "now" else self.start'),
    ("self.write_back_every == 1 and", "self.write_back_every >= 1 and"),
]
SAMPLER = [
    ("scale=w if due else 1.0", "scale=1.0"),
    ("due or current, current,", "due, current,"),
    ("                n = 1\n", ""),
]
PLAN = [
    ("s / scale, *rest", "s, *rest"),
    ("next_counts.append(sampler.update(", "next_counts.append(0 * sampler.update("),
    ("        self.next_counts = next_counts\n", ""),
    ("if kind != plan.kind:", "if False:"),
]

TRITON = [
    ("g = s * g\n", "g = g\n"),
    ("g + lambda_ * theta, g)", "g - lambda_ * theta, g)"),
    ("m = mu * m + c * g", "m = mu * m + g"),
    ("alpha * g + direction, direction", "g + direction, direction"),
    ("kappa * (g - previous)", "kappa * (g + previous)"),
    ("direction + delta * z", "direction + z"),
    ("x = theta - eta * direction", "x = theta + eta * direction"),
    ("a + w * (x - a)", "a - w * (x - a)"),
    ("toward(w, tl.where(current, theta, a), x)", "toward(w, a, x)"),
    ("tl.where(further[4 * i + 3], before, load(", "tl.where(False, before, load("),
    ("toward(further[4 * i + 2], own, theta)", "own"),
    ("any_sampled = any_sampled | further[4 * i + 1]", "any_sampled = any_sampled"),
    ("x = tl.where(write_back, a, x)", "x = x"),
    ("eta * tl.load(sampling)", "eta"),
    ("row + 1, row)", "row, row)"),
    ("tl.store(mark + 1, 1, mask=keeps", "tl.store(mark + 1, 0, mask=keeps"),
    ("tl.load(found_inf) == 0", "tl.load(found_inf) != 1"),
    ("store(g_at, g * unscale, mask, FULL)", "store(g_at, g, mask, FULL)"),
    ("store(z_at, z, mask, FULL)", "pass"),
    ("theta = followed(theta, rounded, param)", "pass"),
    ("store(theta_at, theta, mask, FULL)", "pass"),
    ("weights_at = param_at", "pass"),
]
TRITON_SAMPLED = [("        if k[16]:", "        if k[16] | (k[14] != 0):")]
UPLOADS = [
    ("or (at, used) != (self.key[0], self.used)", ""),
    ("or (at, used) != (self.key[0], self.used)", "or True"),
    ("upload is None or (at, values) != self.key", "upload is None"),
    ("row += bool(KEPT_BY[kind]) and bool(first) and first[number]", "pass"),
    ("table.ages.copy_(torch.tensor(older", "(torch.tensor(older"),
]
COUNTERS = [
    ("& (step.to(tl.float64) > begins)", "& (begins < 1e300)"),
    ("1.0 / (k + 1)", "1.0 / (k + 2)"),
    ("1.0 - first", "first"),
    ("(step - 1) % steps_per_epoch", "step % steps_per_epoch"),
    ("n + due.to(tl.int64)", "n"),
    ("tl.store(marks + 2 * segment, age, mask=mask)", "pass"),
    ("tl.store(marks + 2 * segment + 1, tl.zeros(segment.shape, tl.int32), mask=mask)", "pass"),
]

CUDA = ("update/test_cuda.py",)
REPLICAS = ("update/test_replicas.py",)
SAMPLES = ("update/test_threads.py::test_weights_that_are_only_sampled_are_not_written",)
PYTHON = ("update/test_update.py", "update/test_methods.py", "optimizer/test_optimizer.py")
# file, mutants, tests, whether the CPU module must be compiled
CASES: list[tuple[str, list[tuple[str, str]], tuple[str, ...], bool]] = [
    ("csrc/update.h", UPDATE, CUDA, False),
    ("csrc/update.h", SAMPLED, (*CUDA, *SAMPLES), False),
    ("csrc/update.h", PULLED, REPLICAS, False),
    ("csrc/cuda/pull_body.h", PULL_BODY, REPLICAS, False),
    ("csrc/cuda/pull_packer.cpp", PULL_LAUNCHES, (*REPLICAS, "project/test_sanitized.py"), False),
    ("csrc/cuda/body.h", BODY, (*CUDA, *SAMPLES, "project/test_sanitized.py"), False),
    ("csrc/policy.h", AVERAGE_H, CUDA, False),
    ("csrc/cuda/packer.cpp", LAUNCHES, CUDA, False),
    ("csrc/cuda/packer.cpp", FORMS, ("update/test_launch_forms.py",), False),
    ("triton_kernels/update.py", TRITON, ("update/test_triton.py",), False),
    ("triton_kernels/update.py", TRITON_SAMPLED, SAMPLES, False),
    ("triton_kernels/step.py", UPLOADS, ("update/test_triton.py",), False),
    ("triton_kernels/advance.py", COUNTERS, ("update/test_triton.py",), False),
    ("rbwa_fused/reference.py", REFERENCE, PYTHON, False),
    ("rbwa_fused/reference.py", PULL_REFERENCE, REPLICAS, False),
    ("rbwa_fused/rules.py", RULES, PYTHON, False),
    ("rbwa_fused/weights.py", WEIGHTS, PYTHON, False),
    ("rbwa_fused/average.py", AVERAGE, PYTHON, False),
    ("rbwa_fused/engine/rows.py", PLAN, PYTHON, False),
    ("rbwa_fused/engine/samplers.py", SAMPLER, PYTHON, False),
    *mutants.CASES,
    *mutants_distributed.CASES,
    *mutants_clipping.CASES,
    *mutants_schedule_free.CASES,
    *mutants_posthoc.CASES,
    *mutants_several.CASES,
    *mutants_weights.CASES,
]
PATIENCE = 600  # seconds; a test that hangs has noticed


class Worker:
    """A workspace, and whether its CPU module is that of a mutant."""

    def __init__(self, number: int) -> None:
        self.workspace = Workspace(ROOT / "build" / "mutants" / str(number))
        self.stale = True

    def survives(
        self, file: str, old: str, new: str, tests: tuple[str, ...], compiled: bool
    ) -> bool:
        """Whether all tests pass with that edit."""
        with self.workspace.broken((file, old, new)):
            if compiled or self.stale:
                self.workspace.compile()
            self.stale = compiled
            try:
                return self.passes(tests, PATIENCE)
            except subprocess.TimeoutExpired:
                return False

    def unbroken(self, tests: tuple[str, ...]) -> bool:
        """Whether all tests pass without an edit."""
        self.workspace.compile()
        self.stale = False
        return not tests or self.passes(tests, len(tests) * PATIENCE)

    def passes(self, tests: tuple[str, ...], seconds: float) -> bool:
        one_thread = {"OMP_NUM_THREADS": "1", "MAX_JOBS": "1"}
        done = self.workspace.pytest(*tests, environment=one_thread, timeout=seconds)
        return done.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the mutants, a few at a time."""
    parser = Parser(prog="mutate.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", nargs="*", help="of a file's name (default: all files)")
    wanted = parser.parse_args(argv).part or [""]
    start = time.monotonic()
    edits = [
        (file, old, new, tests, compiled)
        for file, changes, tests, compiled in CASES
        for old, new in changes
        if any(part in file for part in wanted)
    ]
    if not edits:
        parser.error(f"no file that has mutants is named {' or '.join(wanted)}")
    count = int(os.environ.get("RBWA_MUTATE_WORKERS", "2"))
    free: SimpleQueue[Worker] = SimpleQueue()
    for number in range(count):
        free.put(Worker(number))

    def survives(*edit: str) -> bool:
        worker = free.get()
        try:
            return worker.survives(*edit)
        finally:
            free.put(worker)

    def unbroken(tests: tuple[str, ...]) -> bool:
        worker = free.get()
        try:
            return worker.unbroken(tests)
        finally:
            free.put(worker)

    survivors = 0
    with ThreadPoolExecutor(max_workers=count) as pool:
        selected = {
            edit[3] for edit in edits if "-k" in edit[3]
        }  # an expression is of its own files
        needed = sorted({test for *_, tests, _ in edits if tests not in selected for test in tests})
        shares = [*(tuple(needed[i::count]) for i in range(count)), *sorted(selected)]
        for share, passed in zip(shares, pool.map(unbroken, shares), strict=True):
            if not passed:
                raise SystemExit(f"some of {' '.join(share)} fail without a mutant")
        jobs = [pool.submit(survives, *edit) for edit in edits]
        for (file, old, new, *_), job in zip(edits, jobs, strict=True):
            alive = job.result()
            survivors += alive
            print(f"{'SURVIVED' if alive else 'killed  '} {file}: {old.strip()} -> {new.strip()}")
            sys.stdout.flush()
    for (file, old, new), reason in mutants.EQUIVALENT.items():
        print(f"the same {file}: {old.strip()} -> {new.strip()}: {reason}")
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    minutes = (time.monotonic() - start) / 60
    print(
        f"{time.strftime('%Y-%m-%d')}, {commit}: {len(edits) - survivors} of {len(edits)} mutants "
        f"killed, {len(mutants.EQUIVALENT)} equivalent; {minutes:.0f} minutes, {count} at a time"
    )
    return survivors


if __name__ == "__main__":
    sys.exit(main())
