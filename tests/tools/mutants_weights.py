"""Mutants of the weights of samples: on the host, and where a device counts."""

from __future__ import annotations

Mutants = list[tuple[str, str]]

HOST = ("averages/test_weights.py",)
CUDA = ("update/test_cuda.py::test_a_skipped_step_skips_everything_and_costs_no_look",)
TRITON = ("update/test_triton.py",)

WEIGHTS: Mutants = [
    (
        "-math.expm1(-math.log(2.0) * times.every / self.half_life)",
        "1 - 2 ** (-1 / self.half_life)",
    ),
    ("return max(caps)", "return min(caps)"),
    (
        "min(max(self.ramp.of(n, cap), cap), 1.0 - self.ramp.floor)",
        "max(self.ramp.of(n, cap), cap)",
    ),
    ("min(max(self.ramp.of(n, cap), cap), 1.0", "min(self.ramp.of(n, cap), 1.0"),
    ("step - times.every <= times.origin", "step <= times.origin"),
    ("times.every / (step - times.start)", "1 / (step - times.start)"),
    ("times.every / (step - times.start)", "times.every / (step - times.origin)"),
    (
        "-math.expm1((self.gamma + 1.0) * math.log1p(-passed))",
        "1.0 - (1.0 - passed) ** (self.gamma + 1.0)",
    ),
    ("(self.gamma + 1.0) * math", "self.gamma * math"),
    ("min(n + 1, self.samples)", "min(n, self.samples)"),
    ("for k in (2 * j - 1, 1, j)", "for k in (2 * j + 1, 1, j)"),
    ("taken = n - (times.begins < math.inf)", "taken = n"),
    ("self.weights[min(taken, len(self.weights) - 1)]", "self.weights[taken % len(self.weights)]"),
    ("c / s if s > 0.0 else 1.0", "c / sum(shares)"),
    ("by_step: ClassVar[bool] = True\n\n    gamma", "by_step: ClassVar[bool] = False\n\n    gamma"),
    ('struct.pack(f"{len(self.weights)}d", *self.weights)', 'b""'),
]
RAMPS: Mutants = [
    ("9.0 / (10 + n)", "9.0 / (9 + n)"),
    ("math.pow(1.0 + n / self.gamma, -self.power)", "math.pow(1.0 + n, -self.power)"),
    ("math.pow(1.0 + n / self.gamma, -self.power)", "1.0 / (1.0 + n / self.gamma)"),
    ("cap + (1.0 - cap) * math.exp(-n / self.tau)", "math.exp(-n / self.tau)"),
]
POWER: Mutants = [
    ("math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)", "1.0 / (gamma + 2.0)"),
    ("16.0 - s) * gamma + 12.0 - s", "16.0 - s) * gamma + 12.0"),
]
POLICIES: Mutants = [
    ("PowerEma(-0.5)", "PowerEma(0.5)"),
    ("Cosine((stop - start) // every)", "Cosine(stop - start)"),
    ("stop = start + every * samples", "stop = start + samples"),
    ("if given and half_life is not None and ramp is None:", "if False:"),
    ("if given else None, half_life", "if False else None, half_life"),
]
AVERAGE: Mutants = [
    ("and (self.stop is None or step <= self.stop)", ""),
    ("step <= self.stop)", "step < self.stop)"),
    ("named and self.stop is None)", "named)"),
    ('stop = "" if self.stop is None else', 'stop = "" if True else'),
]
ON_DEVICE: Mutants = [
    ("smaller(larger(9.0 / (10.0 + count), cap), most)", "larger(9.0 / (10.0 + count), cap)"),
    ("9.0 / (10.0 + count), cap", "9.0 / (10.0 + count), 0"),
    ("1.0 + count / numbers[2]", "1.0 + count"),
    ("cap + (1.0 - cap) * std::exp", "std::exp"),
    ("at - policy.every <= policy.origin", "at <= policy.origin"),
    ("policy.every / (at - numbers[1])", "1 / (at - numbers[1])"),
    ("smaller(count + 1, numbers[0])", "smaller(count, numbers[0])"),
    ("smaller(count - begun, numbers[0] - 1)", "smaller(count, numbers[0] - 1)"),
    ("smaller(count - begun, numbers[0] - 1)", "count - begun"),
    ("if (static_cast<double>(step) > policy.stop) return n;", ""),
]
IN_TRITON: Mutants = [
    ("w = tl.where(w < cap, cap, w)", ""),
    ("return tl.where(most < w, most, w)", "return w"),
    ("log1p(n / third)), w)", "log1p(n)), w)"),
    ("tl.where(past, -expm1((gamma + 1.0)", "tl.where(past, -expm1(gamma"),
    ("(step - every > origin)", "(step > origin)"),
    ("j = tl.minimum(n + 1.0, samples)", "j = tl.minimum(n, samples)"),
    ('n - (begins < float("inf")).to(tl.int64), length - 1)', "n, length - 1)"),
    ("& (step.to(tl.float64) <= stop)", ""),
]
CASES: list[tuple[str, Mutants, tuple[str, ...], bool]] = [
    ("rbwa_fused/weights.py", WEIGHTS, HOST, False),
    ("rbwa_fused/ramp.py", RAMPS, HOST, False),
    ("rbwa_fused/power.py", POWER, HOST, False),
    ("rbwa_fused/policies.py", POLICIES, (*HOST, "optimizer/test_bad_input.py"), False),
    ("rbwa_fused/average.py", AVERAGE, HOST, False),
    ("csrc/policy.h", ON_DEVICE, CUDA, False),
    ("triton_kernels/advance.py", IN_TRITON, TRITON, False),
]
