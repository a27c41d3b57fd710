"""Mutants of several averages in one pass: their tables, their samples, their checkpoints."""

from __future__ import annotations

Mutants = list[tuple[str, str]]
ALL = ("averages/test_several.py",)
KERNELS = ("update/test_cuda.py",)

LOOP: Mutants = [("    if (segment.further_count > 0) {\n", "    if (false) {\n")]
SEVERAL: Mutants = [
    ("if (before ? !f->current : ", "if (before ? true : "),
    ("k.w = before ? T(1) : T(f->w);", "k.w = T(1);"),
    ("    further_full<T>(s, true, at, size);\n", ""),
    ("    further_full<T>(s, false, at, size);\n", ""),
    ("    further_narrow<S>(s, true, theta, at, size);\n", ""),
    ("    further_narrow<S>(s, false, theta, at, size);\n", ""),
    ("++s.further, --s.further_count;", "--s.further_count;"),
    ("sampling = {1, s.further->w, 1, ", "sampling = {1, sampling.w, 1, "),
    ("    at.a = a.load(0, n);\n", "    at.a = a.tile;\n"),
    ("    a.store(0, n);\n", ""),
    ("      follow(theta, param, size);\n", ""),
    ("      widen(param, theta, size);\n", ""),
]
TABLES: Mutants = [
    ("if (!every_average && own.sample == 0) continue;", ""),
    ("for (; next != last && next->segment == i; ++next) {", "for (; next != last; ++next) {"),
]
PACKER: Mutants = [
    ("if (s.a != nullptr) further_.push_back({s.a, own.sampling, 0});", ""),
    ("i == s.further_count - 1});", "i == 0});"),
    ("own.several == other.several &&", ""),
    (" || streams.several;", ";"),
    ("own.further = static_cast<uint16_t>(further_.size());", "own.further = 0;"),
]
BODY: Mutants = [
    ("all &= sampling.current == 0 && widest(a) == kVectorBytes;", "(void)a, (void)sampling;"),
    ("sampling.current != 0 ? moved.before : ", "sampling.current != 0 ? moved.x : "),
    ("    moved.x = e.theta;\n", ""),
    ("    written |= sampling.write_back != 0;\n  });\n  if", "  });\n  if"),
    ("        x[i] = e.theta;\n", ""),
    ("k.w = sampling.w, ", "k.w = T(1), "),
    ("if (own->sample != 0) work(", "work("),
    ("      narrow(x[i], *theta.at(i));\n", ""),
    ("static_cast<A*>(f->a) + begin", "static_cast<A*>(f->a)"),
]
REFERENCE: Mutants = [
    ("            if sample != 0:\n", "            if True:\n"),
    ("theta if current else further.to(wide)", "further.to(wide)"),
    ('"a" not in e and not k.further:', '"a" not in e:'),
]
SEGMENTS: Mutants = [
    ("self._samplings[i][number])", "self._samplings[i][0])"),
    ("in sorted(self._further.items())", "in self._further.items()"),
]
ROWS: Mutants = [
    ("zip(policies, samples, strict=False)]", "zip(policies, repeat(0), strict=False)]"),
    ("if given != plan.average or isinstance(", "if isinstance("),
    ("        if key != streams.AVERAGE:\n", "        if False:\n"),
]
POLICIES: Mutants = [
    ("        if policy.write_back_every > 0:\n", "        if False:\n"),
    ("if names is None and len(policies) == 1:", "if False:"),
    ("    if not 1 <= len(policies) <= len(AVERAGES):\n", "    if not policies:\n"),
    ("    if isinstance(which, bool) or not", "    if not"),
    ("(negative or all(", "(all("),
    ("names.index(which) if which in names", "0 if which in names"),
]
RENUMBERED: Mutants = [
    ("return named and own.name == one.name", "return False"),
    ("return same(one.text, own.text)", "return False"),
    ("return not named and structure", "return structure"),
    ("return not named and structure(one.text) == structure(own.text)", "return False"),
    ("            moved[one.key] = own.key\n", ""),
    ("    forget(saved)\n    for i, own", "    for i, own"),
    ("numbered(COUNT, i): one.samples}", "numbered(COUNT, i): 0}"),
    ("        if i not in found:\n            notes", "        if False:\n            notes"),
    (
        "        if number not in found.values():\n            notes",
        "        if False:\n            notes",
    ),
    ("            own[numbered(NAME, i)] = names[i]\n", "            pass\n"),
]
CHECKPOINT: Mutants = [
    ("    for key, policy in renumbered.policies(average)[1:]:\n", "    for key, policy in ():\n"),
    ("renumbered.state_of(held, moved[key]).items()", "held.items()"),
    ("left, renumbered.further_samples(saved))", "left)"),
]
STATE: Mutants = [
    ("averages = [key for key in AVERAGES if key in standing]", "averages = [*AVERAGES[:1]]"),
    ("for key, sampler in group.averages.items():", "for key, sampler in ():"),
]
BUFFERS: Mutants = [
    ("samples = (counts.n_averaged, *counts.further,", "samples = (counts.n_averaged,"),
    ("own = moved.get(key, key if key == AVERAGE else None)", "own = key"),
]
INTO: Mutants = [('if len(policies_of(group["average"])) > 1:', "if False:")]

CASES: list[tuple[str, Mutants, tuple[str, ...], bool]] = [
    ("csrc/cpu/step_cpu.cpp", LOOP, ALL, True),
    ("csrc/cpu/several.h", SEVERAL, ALL, True),
    ("csrc/tables.cpp", TABLES, ALL, True),
    ("csrc/cuda/packer.cpp", PACKER, KERNELS, False),
    ("csrc/cuda/several.h", BODY, KERNELS, False),
    ("rbwa_fused/reference.py", REFERENCE, ALL, False),
    ("rbwa_fused/engine/segments.py", SEGMENTS, ALL, False),
    ("rbwa_fused/engine/rows.py", ROWS, (*ALL, "distributed/test_zero.py"), False),
    ("rbwa_fused/engine/state.py", STATE, ALL, False),
    ("rbwa_fused/several.py", POLICIES, ALL, False),
    ("rbwa_fused/renumbered.py", RENUMBERED, ALL, False),
    ("rbwa_fused/checkpoint.py", CHECKPOINT, ALL, False),
    ("rbwa_fused/buffers.py", BUFFERS, ALL, False),
    ("rbwa_fused/into.py", INTO, ALL, False),
]
