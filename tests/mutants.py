"""Mutants of what stands around the mathematics, for mutate.py: the CPU loop, the checks of tables,
memory, state, checkpoints, counters. Each is (file, old text, new text), with the tests for a file.
"""

from __future__ import annotations

Mutants = list[tuple[str, str]]

CPU_LOOP: Mutants = [
    ("(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "(bits + 0x8000u) >> 16"),
    ("nan ? 0x7fc0u : rounded", "rounded"),
    ("for (; i < n; ++i) to[i] = widen_float16", "for (; i + 1 < n; ++i) to[i] = widen_float16"),
    ("for (; i < n; ++i) to[i] = narrow_float16", "for (; i + 1 < n; ++i) to[i] = narrow_float16"),
    ("_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO"),
    ("theta[i] = e.theta;", ""),
    ("m[i] = e.m;", ";"),
    ("if constexpr (averaged) a[i] = e.a;", ""),
    ("z[i] = e.z, previous[i] = e.previous;", "z[i] = e.z;"),
    ("static_cast<T*>(stream) + begin", "static_cast<T*>(stream)"),
    ("static_cast<const T*>(s.g) + begin", "static_cast<const T*>(s.g)"),
    ("static_cast<S*>(start) + begin", "static_cast<S*>(start)"),
    ("at += kTile", "at += 2 * kTile"),
    ("static_cast<float*>(s.a) + begin + at", "static_cast<float*>(s.a) + begin"),
    ("if (!a_is_float) a.store(at, size);", ""),
    ("z.store(at, size), previous.store(at, size);", "z.store(at, size);"),
    ("T(r.eta) * T(a.scale)", "T(r.eta * a.scale)"),
    ("a.current != 0, a.write_back != 0", "a.write_back != 0, a.current != 0"),
    ("if (s.g == nullptr) return;", ""),
]
STEP_CPU: Mutants = [
    ("after - work.first_chunk - 1", "after - work.first_chunk"),
    ("std::min(end, work.first_chunk[i + 1])", "work.first_chunk[i + 1]"),
    ("(begin - work.first_chunk[i]) * kChunk", "begin * kChunk"),
    ("(segments[i].length + kChunk - 1) / kChunk", "segments[i].length / kChunk"),
    ("work.rows[segment.row]", "work.rows[0]"),
    ("work.samplings[segment.sampling]", "work.samplings[0]"),
    ("exchange.a + end, exchange.b + begin", "exchange.a + end, exchange.b"),
    ("chosen = &c;", ""),
]
OPS: Mutants = [
    ("alike(view_of(b[i]), left) && a[i].is_cpu()", "a[i].is_cpu()"),
    ("STD_TORCH_CHECK(a.size() == b.size()", "STD_TORCH_CHECK(true"),
    ("const py::gil_scoped_release release;", ""),
]
TABLES: Mutants = [
    ("      same(view.dtype, type) && view.device.device_type", "      view.device.device_type"),
    ("expected *= view.shape[d]", "expected = view.shape[d]"),
    ("if (!same(view.dtype, type) || !same", "if (!same"),
    (" || view.ndim != dims", ""),
    ("if (view.shape[d] != sizes[d]) return false;", ""),
    ("strides[d] && sizes[d] != 1", "strides[d]"),
    ("sizes[d] != 1 && length != 0", "sizes[d] != 1"),
    ("if (!same(a.dtype, b.dtype) || !same", "if (!same"),
    ("if (a.shape[d] != b.shape[d]) return false;", ""),
    ("numel == 0 || last + 1 == numel", "true"),
    ("numel == 0 || last + 1 == numel", "last + 1 == numel"),
    ("tables.grads.size()) == count", "tables.grads.size()) <= count"),
    ("segment.row < row_count", "segment.row <= row_count"),
    ("segment.sampling >= 0", "segment.sampling >= -1"),
    ("segment.length >= 0 && dims >= 0", "dims >= 0"),
    ("column[kShape] >= 0 &&", ""),
    ("STD_TORCH_CHECK(is_contiguous(buffer)", "STD_TORCH_CHECK(true"),
    ("std::vector<int64_t> numel;", "auto& numel = *new std::vector<int64_t>;"),  # a leak
    ("index >= 0 && index < state_count", "index < state_count"),
    ("index < state_count && offset", "offset"),
    ("type->bits == 0 || same(buffer.dtype, *type)", "true"),
    (
        "segment.m = momentum ? stream(kMomentum, &type) : nullptr",
        "segment.m = stream(kMomentum, &type)",
    ),
    ("kFloat32 && type.bits == 16)", "kFloat32)"),
    ("same_dtype && numel_of(param)", "numel_of(param)"),
    ("numel_of(param) == segment.length &&", ""),
    ("(param.data != nullptr || segment.length == 0) &&", ""),
    ("STD_TORCH_CHECK(fits(grad, device", "STD_TORCH_CHECK(true || fits(grad, device"),
    ("!momentum || segment.m != nullptr || segment.length == 0", "true"),
    ("(segment.z == nullptr) == (segment.previous == nullptr)", "true"),
    ("grad.data != nullptr || segment.length == 0", "true"),
]
FLAT: Mutants = [
    ("expected *= size", "expected = size"),
    ("a == b or size == 1 or", "a == b or"),
    ("length = -(-tensor.numel() // step) * step", "length = tensor.numel()"),
    ("(end + length) * size > LARGEST_BUFFER", "(end + length) * size >= LARGEST_BUFFER"),
    ("span[1] < end", "span[1] <= end"),
    ("turn[i] = 1 + max(earlier, default=-1)", "turn[i] = max(earlier, default=0)"),
    ("alone[i] = False", "alone[i] = True"),
    ("and not param.is_shared()", ""),
    ("and param.untyped_storage().nbytes() == param.numel() * param.element_size()", ""),
    (
        "self._columns[segment][ROW] = row\n        self._tensors = None",
        "self._columns[segment][ROW] = row",
    ),
    ("param.dtype == made_for.dtype\n            and ", ""),
    ("views[i].copy_(value)", "pass"),
    ("= len(self.state), offset", "= len(self.state), 0"),
    ("(storage) != holders", "(storage) > holders"),
]
CHECKPOINT: Mutants = [
    (
        "None if policy is None else repr(policy)\n        group.update",
        "policy\n        group.update",
    ),
    ("        if p in live:", "        if False:"),
    ("state_dict = hook_result", "pass"),
    ("saved_groups = deepcopy(state_dict[", "saved_groups = (state_dict["),
    ("if lengths != [", "if False and lengths != ["),
    ("new = {**group, **new}", "new = {**new, **group}"),
    ("value.detach().clone() if", "value.detach() if"),
    ("if not (name in STREAMS and value is None)", ""),
    ("opt._steps = max(", "opt._steps = min("),
    ('saved.get("implicit_momentum")) for', "None) for"),
    ("post_hook(opt)", "pass"),
    ("if rule != opt.rule_name:", "if False:"),
    ("or count < 0:", "or count < -1:"),
    ("not isinstance(count, int) or ", ""),
    ("if structure(theirs) != structure(ours):", "if False:"),
    ("if changed:", "if False:"),
    ("value.dtype not in DTYPES or value.is_meta", "value.dtype not in DTYPES"),
    ("if value.layout != torch.strided:", "if False:"),
    ("if kept not in ((), streams):", "if False:"),
    ('if "average" in held and policy is None:', "if False:"),
    ("policy is not None and n_averaged > 0:", "policy is not None and n_averaged > 1:"),
    ("if dtype != expected:", "if False:"),
]
EVALUATE: Mutants = [
    ("self.saved.append((p, p.detach().clone()))", "self.saved.append((p, p.detach()))"),
    ("self.pairs.reverse()", "pass"),
    ("in reversed(self.saved)", "in self.saved"),
    ("torch.autograd.graph.increment_version(written)", "pass"),
    ("{p: p.detach().clone() for", "{p: p.detach() for"),
    ("same_layout(p, a) for", "True for"),
    ("if plan.n_averaged > 0:", "if True:"),
    ("if plan.buffered(p) and ", "if "),
    ("if opt._evaluating is not None:", "if False:"),
    ("        opt._evaluating = None\n", ""),
    ("if opt._evaluating is None else {}", ""),
    ("copy=True", "copy=False"),
    ("restore_modes()\n            yield model", "restore_buffers\n            yield model"),
    ("                module.restore_buffers()\n", ""),
    ("self.module.momentum = self.momentum", "pass"),
]
LAYOUT: Mutants = [
    ("            self.param_groups.pop()\n", ""),
    (" if own])", "])"),
    (
        "group_plan.row(first=False), group_plan.sampling(p)",
        "group_plan.row(first=True), group_plan.sampling(p)",
    ),
    ("group_plan.sampling(p)\n", "group_plan.sampler.first_row\n"),
    ("sorted(self._tables.items(), key=lambda item: item[0][1])", "self._tables.items()"),
    ("self.state.get(p, {}) if p in new else {}", "self.state.get(p, {})"),
    ("held.pop(stream, None)", "pass"),
    ("[stream] = view\n        self._known_size = len(self.state)\n", "[stream] = view\n"),
    ("0 if starts_again else plan.n_averaged", "plan.n_averaged"),
    ("cleared and any(plan.buffered(p) for p in plan.params)", "cleared"),
    ("None if cleared else plan.beta", "plan.beta"),
    ("group.sampler.written_back and group.buffered(param)", "group.buffered(param)"),
    ("group.sampler.written_back and group.buffered(param)", "group.sampler.written_back"),
    ("if self._evaluating is not None:", "if False:"),
    ("            checks.state(group, self.state)\n", ""),
]
FUSED: Mutants = [
    ("            or _global_optimizer_post_hooks\n", ""),
    ("            or torch.autograd._profiler_enabled()\n", ""),
    (
        "            with torch.enable_grad():\n                loss",
        "            if True:\n                loss",
    ),
    ("torch._C._set_grad_enabled(grad_enabled)", "torch._C._set_grad_enabled(True)"),
    ("            self.state is not self._known_state\n            or ", "            "),
    ("            or len(self.state) != self._known_size\n", ""),
    ("            or len(plan.groups) != len(self.param_groups)\n", ""),
    ("        if len(self._tables) > 1:\n            plan.starting = True\n", ""),
    ("            if not table.holds_state():\n                return False\n", ""),
    ("if table.lacking and any(", "if False and any("),
    ("        if not present:\n            return True\n", ""),
    ("found_inf.item() != 0", "found_inf.item() == 1"),
    ("            self._steps += 1\n", ""),
    ("            plan.commit()\n", ""),
    ("p.detach() if group.n_averaged > 0 else None", "None"),
    ("p.detach() if group.n_averaged > 0 else None", "p.detach()"),
    ("table.lacking.append(i)", "pass"),
    ("table.set_row(i, group.row(first=True))", "pass"),
    ("table.first.append(i)", "pass"),
    ('group.beta = float(group.group["momentum"])', "pass"),
    ("            memory.copy_(param)\n", "            pass\n"),
    ("            param.copy_(memory)\n", "            pass\n"),
    ("        if absent:\n", "        if False:\n"),
    ("1.0 / scale)", "scale)"),
    ("        self.register_state_dict_post_hook(checkpoint.export)\n", ""),
    ('"counters": self._counters(),', '"counters": [(0, None)] * len(self.param_groups),'),
]

STEPS = (
    "test_outside_edits.py",
    "test_optimizer.py",
    "test_methods.py",
    "test_averaged.py",
    "test_bad_input.py",
    "test_checkpoint.py",
)
BITS = (
    *("test_ops.py", "test_threads.py", "test_update.py", "-k"),
    "test_ops or test_threads or flat_threads or (literal and none)",
)
# file, mutants, tests, whether the CPU module must be compiled
CASES: list[tuple[str, Mutants, tuple[str, ...], bool]] = [
    ("csrc/step_cpu_loop.h", CPU_LOOP, BITS, True),
    ("csrc/step_cpu.cpp", STEP_CPU, BITS, True),
    ("csrc/ops.cpp", OPS, ("test_ops.py", "test_outside_edits.py", "test_threads.py"), True),
    (
        "csrc/tables.cpp",
        TABLES,
        ("test_ops.py", "test_outside_edits.py", "test_optimizer.py"),
        True,
    ),
    ("rbwa_fused/flat.py", FLAT, STEPS, False),
    ("rbwa_fused/layout.py", LAYOUT, STEPS, False),
    ("rbwa_fused/fused.py", FUSED, STEPS, False),
    ("rbwa_fused/evaluate.py", EVALUATE, ("test_averaged.py", "test_outside_edits.py"), False),
    (
        "rbwa_fused/checkpoint.py",
        CHECKPOINT,
        ("test_checkpoint.py", "test_bad_input.py", "test_averaged.py"),
        False,
    ),
]
# Edits that change no result, with the reason; they are printed and not run.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("csrc/tables.cpp", "dims <= shape_count / 2 &&", ""): (
        "the product overflows then, and wraps to what is refused; `make sanitize` finds it"
    ),
}
