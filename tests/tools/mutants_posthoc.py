"""Mutants of posthoc/ for mutate.py: the mathematics of profiles, what is written when, which files
belong together, and what is made of them."""

from __future__ import annotations

Mutants = list[tuple[str, str]]

PROFILES: Mutants = [
    ("gamma = torch.where(t_a < t_b, gamma_b, gamma_a)", "gamma = torch.minimum(gamma_a, gamma_b)"),
    ("(gamma_a + gamma_b + 1) * latest", "(gamma_a + gamma_b + 2) * latest"),
    ("weights = weights / weights.sum()", "weights = weights / 1.0"),
    ("2 * weights @ wanted).item() + whole", "weights @ wanted).item() + whole"),
    ("square - mean**2", "square"),
    ("(times > 0) & (times <= t)", "times > 0"),
]
TENSORS: Mutants = [
    ("if 8 + length + at != size:", "if 8 + length + at > size:"),
    ("[at, at + kind.elements * kind.dtype.itemsize]", "offsets[name]"),
    ("opened.seek(self._begins[name] + first * dtype.itemsize)", "opened.seek(self._begins[name])"),
    ("        if kind is not None:\n            return self._give_up()\n", ""),
    ("            self._part.unlink()", "            pass"),
    ("if self._left != 0:", "if False:"),
]
SNAPSHOTS: Mutants = [
    ("passed = steps // self.every > before // self.every", "passed = steps % self.every == 0"),
    ("before < stop <= steps", "before < stop < steps"),
    ("not (gamma is None and average.over)", "gamma is not None"),
    ("self._unread < self._until_due()", "self._unread < 1"),
    (
        "                if about.name in self._written:\n                    continue",
        "                if False:\n                    continue",
    ),
    ("            refuse_others(self._own.snapshots(), self._run)\n", ""),
    ('owner.engine.refuse_inside_averaged("Snapshots.update")', "pass"),
    ("self._own.clear_behind(self._began, self._written)", "pass"),
    ("begins = life != self._life", "begins = not self._life"),
    ("owed = begins and", "owed = False and"),
    ("model=model,", "model=self._run,"),
    ("                self._warn(error)\n                continue", "                raise"),
    ("            self._failed.add(type(error))\n", "            pass\n"),
]
BEGUN: Mutants = [
    ("if began == 0:", "if False:"),
    ("if owner.engine.steps != first.engine.steps:", "if False:"),
    ("    if not earlier:", "    if False:"),
]
OWN: Mutants = [
    ("snapshot.about.step > step", "False"),
    ("[:-keep]", "[: -keep - 1]"),
]
PARTS: Mutants = [("                    part.unlink()", "                    pass")]
REPLICAS: Mutants = [
    ("return 0, 1, rank == 0", "return 0, 1, True"),
    ("if snapshot.about.world != world:", "if False:"),
]
KEPT: Mutants = [
    ("return 0.0 if policy.initial", "return 1.0 if policy.initial"),
    ("until - (until - policy.origin) % policy.every", "until"),
    ("if last > policy.start", "if True"),
    ("{**self.weights, **self.tensors}", "{**self.tensors, **self.weights}"),
    ("if (narrow.isinf() & shard.isfinite()).any():", "if False:"),
]
FOLDER: Mutants = [
    (
        "return Profile(self.step - self.origin, self.gamma)",
        "return Profile(self.step, self.gamma)",
    ),
    ('for what in ("run", "model"):', 'for what in ("model",):'),
    ('for what in ("run", "model"):', 'for what in ("run",):'),
    ('        ("origin", "of averages that start at another step"),\n', ""),
]
MEMBERS: Mutants = [
    ("if key[0] <= chosen]", "]"),
    ("chosen - found[0].about.origin", "chosen"),
    ("[-keep:]", "[:keep]"),
]
SYNTHESIS: Mutants = [
    ("if not value <= most", "if False"),
    ("off = math.hypot(*(w * norm", "off = sum((w * norm"),
]
JOINED: Mutants = [
    ("sum(prod(block) for _, block in blocks) != prod(shape)", "False"),
    ("whole[block] = reader.read(name).reshape(shape)", "pass"),
    ("slice(o, o + n)", "slice(0, n)"),
    ("if None in here:", "if True:"),
    ("if not is_flattened(tensor):", "if True:"),
]
WEIGHTED: Mutants = [
    ("source.read(name, first, count)", "source.read(name, 0, count)"),
    ("sources[-1].read(name, first, count)", "sources[0].read(name, first, count)"),
    ("else torch.float64", "else torch.float32"),
]
MERGING: Mutants = [
    ("(math.sqrt(j) - math.sqrt(j - 1))", "(math.sqrt(count - j + 1) - math.sqrt(count - j))"),
    ("math.sin((2 * j - 1) * half)", "math.sin(2 * j * half)"),
    ("row = [weight / total for weight in scaled]", "row = list(row)"),
    ("    refuse_differences(paths, sources)\n", ""),
]
WHOLE = ("posthoc/test_synthesis.py",)
WRITTEN = ("posthoc/test_snapshots.py",)
LIVES = "posthoc/test_lives.py"
KILLED = ("posthoc/test_killed_snapshots.py",)
MERGED = ("posthoc/test_merging.py",)
RANKS = ("distributed/test_snapshots_on_ranks.py",)
CASES: list[tuple[str, Mutants, tuple[str, ...], bool]] = [
    ("rbwa_fused/posthoc/profiles.py", PROFILES, ("posthoc/test_profiles.py",), False),
    ("rbwa_fused/posthoc/tensors.py", TENSORS, ("posthoc/test_tensors.py",), False),
    ("rbwa_fused/posthoc/snapshots.py", SNAPSHOTS, (*WRITTEN, LIVES), False),
    ("rbwa_fused/posthoc/begun.py", BEGUN, (LIVES,), False),
    ("rbwa_fused/posthoc/own.py", OWN, (*WRITTEN, LIVES), False),
    ("rbwa_fused/posthoc/own.py", PARTS, KILLED, False),
    ("rbwa_fused/posthoc/begun.py", REPLICAS, RANKS, False),
    ("rbwa_fused/posthoc/kept.py", KEPT, (*WRITTEN, *WHOLE), False),
    ("rbwa_fused/posthoc/folder.py", FOLDER, WHOLE, False),
    ("rbwa_fused/posthoc/members.py", MEMBERS, WHOLE, False),
    ("rbwa_fused/posthoc/members.py", [("if len(row) == world", "")], RANKS, False),
    ("rbwa_fused/posthoc/synthesis.py", SYNTHESIS, WHOLE, False),
    ("rbwa_fused/posthoc/joined.py", JOINED, ("posthoc/test_joined.py", *RANKS), False),
    ("rbwa_fused/posthoc/weighted.py", WEIGHTED, (*MERGED, *WHOLE), False),
    ("rbwa_fused/posthoc/merging.py", MERGING, MERGED, False),
]
