"""Mutants of what stands around the mathematics, for mutate.py: the CPU loop, the checks of tables,
memory, state, checkpoints, counters. Each is (file, old text, new text), with the tests for a file.
"""

from __future__ import annotations

Mutants = list[tuple[str, str]]

CPU_LOOP: Mutants = [
    ("at.theta[i] = e.theta;", ";"),
    ("if (writes_weight<kind>(k)) at.theta[i] = e.theta;", "at.theta[i] = e.theta;"),
    ("if constexpr (keeps_##stream(kind)) at.stream[i] = e.stream;", ""),
    ("if constexpr (averaged) at.a[i] = e.a;", ""),
    ("static_cast<T*>(stream) + begin", "static_cast<T*>(stream)"),
    ("static_cast<const T*>(s.g) + begin", "static_cast<const T*>(s.g)"),
    ("k.eta *= T(sampling.scale);", ""),
    ("k.eta *= T(sampling.scale);", "k.eta = T(row.numbers.eta * sampling.scale);"),
    ("sampling.current != 0,", "sampling.write_back != 0,"),
]
NARROW_LOOP: Mutants = [
    ("for (; i < n; ++i) to[i] = _cvtsh", "for (; i + 1 < n; ++i) to[i] = _cvtsh"),
    ("for (; i < n; ++i) to[i].bits = _cvtss", "for (; i + 1 < n; ++i) to[i].bits = _cvtss"),
    ("_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO"),
    ("i += kHalves) widen_vector", "i += 2 * kHalves) widen_vector"),
    ("i += kHalves) narrow_vector", "i += 2 * kHalves) narrow_vector"),
    ("if (!writes_weight<kind>(k)) continue;", ""),
    ("static_cast<S*>(start) + begin", "static_cast<S*>(start)"),
    ("at += kTile", "at += 2 * kTile"),
    ("return wide + at;", "return wide;"),
    ("if constexpr (averaged) a.store(at, size);", ""),
    ("if (param != nullptr) follow(places.theta, param + at, size);", ""),
    ("if (param != nullptr) narrow(places.theta, param + at, size);", ""),
    ("if constexpr (keeps_##stream(kind)) stream.store(at, size);", ""),
]
CONVERT: Mutants = [
    ("(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "(bits + 0x8000u) >> 16"),
    ("nan ? 0x7fc0u : rounded", "rounded"),
]
STEP_CPU: Mutants = [
    ("after - work.first_chunk - 1", "after - work.first_chunk"),
    ("std::min(end, work.first_chunk[i + 1])", "work.first_chunk[i + 1]"),
    ("(begin - work.first_chunk[i]) * kChunk", "begin * kChunk"),
    ("(segments[i].length + kChunk - 1) / kChunk", "segments[i].length / kChunk"),
    ("work.rows[segment.row]", "work.rows[0]"),
    ("work.samplings[segment.sampling]", "work.samplings[0]"),
    ("chosen = &c;", ""),
]
OPS: Mutants = [
    ("const py::gil_scoped_release release;", ""),
    ("  grow(segments, tables);\n", ""),
]
IN_TURN: Mutants = [
    ("  const NoGrad no_grad;\n", ""),
    ("enable()(enabled_);", ""),
]
GRADIENTS: Mutants = [
    ("some_negated || negated(gradient)", "some_negated"),
    ("      absent = true;\n", ""),
    ("      present = true;\n", ""),
    ("if (grad == nullptr || !exact(param))", "if (grad == nullptr)"),
    ("if (is_neg == nullptr || !exact(gradient.ptr()))", "if (is_neg == nullptr)"),
]
VIEWS: Mutants = [
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
]
TABLES: Mutants = [
    ("      same(view.dtype, type) && view.device.device_type", "      view.device.device_type"),
    ("grads.size()) == count &&", "grads.size()) <= count &&"),
    (" && numel_of(tables.ages) == count", ""),
    ("row < row_count - 1", "row <= row_count"),
    ("row % kRowsPerGroup == 0 && ", ""),
    ("segment.sampling >= 0", "segment.sampling >= -1"),
    ("segment.length >= 0 && dims >= 0", "dims >= 0"),
    ("column[kShape] >= 0 &&", ""),
    ("&& is_contiguous(tables.state[which])", ""),
    ("numel_of(tables.state[which]) == length", "true"),
    ("which >= 0 && which < state_count", "which < state_count"),
    ("which < state_count &&", ""),
    ("type->bits == 0 || same(view.dtype, *type)", "true"),
    ("kFloat32 && is_narrow(segment.dtype))", "kFloat32)"),
    ("(same(theta_type, kFloat) && is_narrow(segment.dtype))", "is_narrow(segment.dtype)"),
    ("(same(theta_type, kFloat) && is_narrow(segment.dtype))", "same(theta_type, kFloat)"),
    ("static_cast<int64_t>(segment.dtype) == column[kDtype] &&", ""),
    ("segment.row = row + (segment.age == 0 && !is_adam(kind));", ""),
    ("STD_TORCH_CHECK(has_kind(rows[row])", "STD_TORCH_CHECK(true"),
    ("if (keeps_##name(kind)) {", "if (true) {"),
    ("ages[i] = segments[i].age + keeps_any(segments[i].kind)", "ages[i] = segments[i].age + 1"),
    ("std::vector<Segment> result(count);", "auto& result = *new std::vector<Segment>(count);"),
    ("numel_of(param) == segment.length &&", ""),
    ("(param.data != nullptr || segment.length == 0) &&", ""),
    ("!moves || fits(grad, device", "true || fits(grad, device"),
    ("!moves || segment.name != nullptr || segment.length == 0", "true"),
    ("!moves || grad.data != nullptr || segment.length == 0", "true"),
]
MEMORY: Mutants = [
    ("expected *= size", "expected = size"),
    ("a == b or size == 1 or", "a == b or"),
    ("length = -(-tensor.numel() // step) * step", "length = tensor.numel()"),
    ("(end + length) * size > LARGEST_BUFFER", "(end + length) * size >= LARGEST_BUFFER"),
    ("span[1] < end", "span[1] <= end"),
    ("turn[i] = 1 + max(earlier, default=-1)", "turn[i] = max(earlier, default=0)"),
    ("alone[i] = False", "alone[i] = True"),
    ("and not param.is_shared()", ""),
    ('and param.device.type == "cpu"', ""),
    ("and param.untyped_storage().nbytes() == param.numel() * param.element_size()", ""),
]
SEGMENTS: Mutants = [
    ("param.dtype == made_for.dtype\n            and ", ""),
    ("= len(self._state) - 1\n", "= 0\n"),
    ("self.set_ages(self.ages)", "pass"),
    ("        self._ages = list(ages)\n", ""),
]
CHECKPOINT: Mutants = [
    ('        if policies_of(group["average"]):\n', "        if False:\n"),
    ("for saved in deepcopy(state_dict[", "for saved in (state_dict["),
    ("if lengths != [", "if False and lengths != ["),
    ("new = {**group, **live_keys(saved)}", "new = {**live_keys(saved), **group}"),
    ("group[OWN + key] = group[key]", "pass"),
    ("live.setdefault(OWN + key, None)", "pass"),
    ("keys | {own[k]: v for", "keys | {k: v for"),
    ("value.detach().clone() if", "value.detach() if"),
    ("if not (name in (STEP, *STREAMS, *engine.rule.aside) and _absent(value))", ""),
    ("taken: int = max(", "taken: int = min("),
    ("if counted and step not in (None, taken):", "if False:"),
    ("return taken if step is None else step", "return taken"),
    ("not counted and policy is not None:", "policy is not None:"),
    ("counted = counted and len(counts) > 0", "counted = len(counts) > 0"),
    ("and not (name in AVERAGES and key in left_out)", ""),
    (
        "            renumbered.forget(saved)\n    moved:",
        "            pass\n    moved:",
    ),
    ("        renumbered.forget(saved)\n    return", "        pass\n    return"),
    ("            group.pop(key, None)\n", "            pass\n"),
    ("(*OURS, *TORCHS, ", "(*OURS, "),
    ("for key in MEMORY if saved.get(key) is not None}", "for key in ()}"),
    ("if theirs != rule.name:", "if False:"),
    ("if kind != own_kind:", "if False:"),
    ("not same(theirs, ours):", "True:"),
    ("value.dtype not in DTYPES or value.is_meta", "value.dtype not in DTYPES"),
    ("if value.layout != torch.strided:", "if False:"),
    ("if kept not in ((), needed, (STEP,))", "if False"),
    ('if "master_param" in held and not plan.master_weights:', "if False:"),
    ("if key in held and policy is None:", "if False:"),
    ("policy is not None and n_averaged > 0:", "policy is not None and n_averaged > 1:"),
    ("if dtype != expected:", "if False:"),
    ("stream in set(rule.late) - held.keys()", "False"),
]
EVALUATE: Mutants = [
    (
        "                return\n            failure = before",
        "                pass\n            failure = before",
    ),
    ("failure.__context__, error.__context__ = error.__context__, failure", "pass"),
    ("            self._swap.put()\n", ""),
    ("            if failure is not None:\n                raise failure", "            pass"),
    ("            failure = swap.restore()\n", "            failure = None\n"),
    ("            swap.restore()\n            raise\n", "            raise\n"),
    ("            self._leave(error)\n            raise\n", "            raise\n"),
    ("        if failure is not None and error is None:\n            raise failure\n", ""),
    ("            swap.restore()\n\n    def _leave", "            pass\n\n    def _leave"),
    ("if members and members.isdisjoint(", "if members.isdisjoint("),
    ("    swap.adopt(opt, which)\n", "    pass\n"),
    ("swap.blended(opt, p, local(a), blend)", "local(a)"),
]
ESTIMATE: Mutants = [
    ("restore_modes()\n                if has", "restore_buffers\n                if has"),
    ("    for module in frozen:\n        module.training = False\n", ""),
    ("if has_statistics(m) and m.training]", "if has_statistics(m)]"),
    ("else size / inputs_so_far", "else 0.1"),
    ("len(inputs) if weighted else 1", "1"),
    ("isinstance(norm, _BatchNorm) and not weighted", "isinstance(norm, _BatchNorm)"),
    ("if has_statistics(module.module) and _as_reset(module.module):", "if False:"),
    ("if batches == 0:", "if False:"),
    ("                module.restore_buffers()\n", ""),
    ("self.module.momentum = self.momentum", "pass"),
    ("_kind(now) == _kind(value)", "True"),
    ("buffer.shape == value.shape and ", ""),
    ("with suppress(RuntimeError):", "if True:"),
    ("                self.module._buffers[name] = buffer\n", "                pass\n"),
]
SWAP: Mutants = [
    ("param if master is None else master).detach().to(", "param).detach().to("),
    ("blend * (average - weights)", "blend * average"),
    ("                local(master).copy_(average)\n", "                pass\n"),
    ("            elif key == AVERAGE and plan.is_the_weights(p):\n", "            elif False:\n"),
    ("        _announce([p for p, _ in fitting])\n", ""),
    ("local(p).detach().clone()", "local(p).detach()"),
    ("torch.clear_autocast_cache()", "pass"),
    ("if plan.samples(key) > 0]", "]"),
    ("if buffered and average is not None else", "if average is not None else"),
    ("if average is not None and p.numel() > 0:", "if average is not None:"),
    ("            checks.params(group, plan.master_weights)\n", ""),
    ("            checks.state(group, opt.state if plan.state is None else plan.state)\n", ""),
    ("        self.left = True\n", ""),
    (" or self._context() is None", ""),
    ("self._missing is not None or self.restore()", "self.restore()"),
    ("            self._owner.engine.swapped = None\n", ""),
    ("if p in now:", "if True:"),
    (" or shard.dtype not in DTYPES", ""),
    ("if shard.shape != weights.shape:", "if False:"),
    ("(foreign or lost)", "foreign"),
    ("shard.is_inference() and not saved.inference", "shard.is_inference()"),
    ("saved.inference or now[p] is not p", "saved.inference"),
    (
        "return torch.inference_mode() if param.is_inference() else nullcontext()",
        "return nullcontext()",
    ),
    ("with nullcontext() if lost else _as_made(shard):", "with nullcontext():"),
    ("heirs.get(p, p) for group in groups", "p for group in groups"),
    ("address != saved.address and ", ""),
    ("self._taken = {*addresses, *", "self._taken = {*"),
    ("*(saved.address for saved in self._saved.values())", ""),
    ("    taken.add(shard.data_ptr())\n", ""),
    ("        if not self.over:", "        if True:"),
]
PLAN: Mutants = [
    ("        plan.rule_inputs = None  # until both rows hold them\n", ""),
    ("        plan.rule_inputs = None  # until both rows hold it\n", ""),
]
IN_PLACE: Mutants = [
    ("list(value) if type(value) is list else value", "value"),
    ("self._pack_lr(plan, lr, known)", "self._pack_lr(plan, lr, inputs)"),
    ("not isinstance(value, Number | None)", "isinstance(value, Tensor)"),
]
OWN_STATE: Mutants = [
    ("if kept not in ((), needed, (STEP,)):", "if False:"),
    ("if rule.counts and own.get(STEP) is not None:", "if False:"),
    ("if not isinstance(value, Tensor):", "if False:"),
    ("value.is_meta or value.is_complex() or", "value.is_complex() or"),
    ("value.is_meta or value.is_complex() or", "value.is_meta or"),
]
MODEL_STATE: Mutants = [
    ("None in sources.values() or ", ""),
    ("len(sources) < len(result) or ", ""),
    (" or missing)", ")"),
    (" - set(model.buffers())", ""),
    ("other[source].to(source.dtype)", "other[source]"),
    ("t.detach().clone()", "t.detach()"),
    (", tensor.is_neg()", ""),
    (" or is_traceable_wrapper_subclass(memory)", ""),
    (".data.copy_(local(value))", ".copy_(local(value))"),
    ("local(p).detach().clone() for p", "local(p).detach() for p"),
    ("        _write(own)\n", ""),
]
ENGINE: Mutants = [
    ("if self.swapped is not None:", "if False:"),
    ("group.sampler.written_back and group.has_buffer(param)", "group.has_buffer(param)"),
    ("group.sampler.written_back and group.has_buffer(param)", "group.sampler.written_back"),
    ("plan.state_is_due or negated or not", "plan.state_is_due or not"),
    ("        if len(launches) > 1:\n            plan.state_is_due = True\n", ""),
    ("if table.lacking and any(", "if False and any("),
    ("        if not present:\n            return True\n", ""),
    ("found_inf.item() != 0", "found_inf.item() == 1"),
    ("            calls.append(self.end())\n", ""),
    ("        plan.sample()\n        plan.update", "        plan.update"),
    ("        plan.update(scale)\n\n", "        pass\n\n"),
    ("return [*before, call,", "return [call,"),
    ("*((param.copy_, copy) for param, copy in table.copies)]", "]"),
    ("            calls += self.finish(table, grads, absent, scale)\n", ""),
    ("*calls, *behind, *after]", "*calls, *after]"),
    ("        if absent:\n", "        if False:\n"),
    ("torch.tensor(1.0 / scale", "torch.tensor(scale"),
    ("if table.copies and not all(", "if False and not all("),
]
UPKEEP: Mutants = [
    ("0 if starts_again else plan.n_averaged", "plan.n_averaged"),
    ("cleared and any(plan.has_buffer(p) for p in plan.params)", "cleared"),
    ("None if cleared else dict(plan.memory)", "dict(plan.memory)"),
]
TABLES_OF_GROUPS: Mutants = [
    (" if own])", "])"),
    ("group_plan.row, group_plan.sampling(p)\n", "group_plan.row, group_plan.sampler.first_row\n"),
    ("not self.describes_state(state) or not", "not"),
    ("or not self.describes_groups(groups)", ""),
    ("        self.state.forget()  #", "        #"),
]
STATE: Mutants = [
    ("self.of(group, p) if p in new else {}", "self.of(group, p)"),
    ("own.copy_(shard_of(value, p).detach())", "own.zero_()"),
    ("own.copy_(shard_of(value, p).detach())", "own.copy_(shard_of(value, p))"),
    ("                state[p] = {}\n", "                pass\n"),
    ("changes.append((held, stream, beside(own, p)))", "pass"),
    ("                        and own.dtype == dtype\n", ""),
    ("                        and taken.add(own)\n", ""),
    ("                        and memory.lies_as(own, table.memory[i])\n", ""),
    ("tensor.zero_() if value is None", "tensor.fill_(1) if value is None"),
    ("if any(given.values()) or not self.stands(self._state):", "if False:"),
    ("held.pop(stream, None)", "pass"),
    ("give(key, local(p).detach())", "give(key, None)"),
    ("                lacking.append(i)\n", "                pass\n"),
    ("                    ages[i] = 1\n", "                    pass\n"),
    ("behind.append((group.memory.update, self._rule.remember(group.group)))", "pass"),
    ("give(MASTER, local(p).detach())", "give(MASTER, None)"),
    ("and (moves or first in held)", "and moves"),
    ("(lacks_kept or lacks_late or lacks_master)", "lacks_kept"),
    ("            group.samples(key) > 0\n            and ", "            "),
    ("            and policy.write_back_every != 1\n", ""),
    ("p if master is None else master", "p"),
    (
        "                if sampler.due and self._is_lost(group, p, key):\n",
        "                if self._is_lost(group, p, key):\n",
    ),
    (
        "        self.lost = any(\n",
        "        self.lost = False and any(\n",
    ),
    (
        "streams = () if age > 0 else (*self._rule.streams, STEP)",
        "streams = (*self._rule.streams, STEP)",
    ),
    ("streams = () if age > 0 else (*self._rule.streams, STEP)", "streams = ()"),
    (" and id(local(tensor)) in self._made", ""),
]
FUSED: Mutants = [
    ("            del self.param_groups[before:]  #", "            #"),
    ("            or _global_optimizer_post_hooks\n", ""),
    ("            or torch.autograd._profiler_enabled()\n", ""),
    (
        "            with torch.enable_grad():\n                return",
        "            if True:\n                return",
    ),
    ("            if self._watched:\n", "            if False:\n"),
    ("                self._watched = False\n", "                pass\n"),
]
SAVED: Mutants = [
    ("            checks.state(group, self.state)\n", ""),
    ("if export not in self._optimizer_state_dict_post_hooks.values():", "if True:"),
    ("engine.options.flatten and not live", "engine.options.flatten"),
    (
        "engine.rule.name, engine.options._asdict(), engine.steps",
        "engine.rule.name, {}, engine.steps",
    ),
    ('            "state": held,\n', ""),
    ("        self.register_state_dict_post_hook(export)\n", ""),
    ('"counts": engine.counts(self.param_groups, self.state),', '"counts": None,'),
    ("state_dict = hook_result", "pass"),
    ("post_hook(self)", "pass"),
    ("if loaded.notes:", "if False:"),
    (
        "if not engine.tables.describes_groups(self.param_groups):\n            self",
        "if False:\n            self",
    ),
]
WHERE_DEVICES_COUNT: Mutants = [
    ("if all(all(map(is_, g, r)) for", "if False and all(g is r for"),
    ("not tables.state.lost and (", "("),
]
ADOPTED: Mutants = [
    ("if said is not None or _is_torchs(group):", "if said is not None:"),
    ("if said is not None or _is_torchs(group):", "if _is_torchs(group):"),
    ('if isinstance(theirs.get("average"), str):', "if False:"),
    ("engine.rule.check(full)", "pass"),
    ("            _check_not_cast(name, p, streams, group_plan)\n", ""),
    ("steps = checkpoint.steps_taken(policies, told, None, not outdated, notes)", "pass"),
    ("    steps = engine.steps\n", "    steps = 0\n"),
    ("        checks.refuse_uncounted(held)\n", "        pass\n"),
    ("            del group[key]\n", "            pass\n"),
    ("known.n_averaged if averaged else 0", "known.n_averaged"),
    ("not buffered or any(", "any("),
    ("dict(known.memory) if moved else None", "None"),
    ("if v is not None and not (k", "if not (k"),
]
IN_BACKWARD: Mutants = [
    ('(setattr, param, "grad", None), ', ""),
    (", (stepped.add, param)", ","),
    ("if param in stepped:", "if False:"),
    ("calls += engine.end(), (setattr,", "calls += ((setattr,"),
    ("        engine.begin()\n", ""),
    ("self._launch_of.keys() & self._engine.tables.alone", "self._launch_of.keys()"),
    ("if moves or engine.tables.plan.state_is_due:", "if moves:"),
    ('(setattr, plan, "state_is_due", tables.state.lost)', '(setattr, plan, "state_is_due", True)'),
    ("self._handles.pop(p).remove()", "pass"),
    ("        if self._frozen:\n            self._hook_unfrozen()\n", ""),
    ('engine.refuse_inside_averaged("backward")', "pass"),
    ("        self._look_for_others(opt)\n", ""),
    ("                gc.collect()\n", ""),
    ("        self._look_for_replicas()\n", ""),
    ("            and all(table.fits(0) for table, _ in engine.tables.launches)\n", ""),
    (
        "            engine.tables.describes(opt.param_groups, opt.state)\n            and ",
        "            ",
    ),
    ("weakref.finalize(self, remove, self._handles).atexit = False", "pass"),
    ("grad is not None or group.policy is not None", "grad is not None"),
    ("grads, grads[0] is None)", "grads, False)"),
    ("behind = engine.tables.state.give(table, grads)", "behind = []"),
    ("if not engine.tables.fit(table, grads):", "if False:"),
    ("            if p in stepped:\n                continue\n", ""),
    ("if found_inf is not None:", "if False:"),
    ("if closure is not None:", "if False:"),
    (
        "        replicated = torch.nn",
        "        self._replicated = True\n        replicated = torch.nn",
    ),
]
LOADED_WHERE_WEIGHTS_ARE_MISSING: Mutants = [
    ("        engine.swapped = self._standing()  #", "        #")
]
AVERAGER: Mutants = [
    ("            self._hook(followed)\n", "            pass\n"),
    ("for stepper in followed:", "for stepper in followed[-1:]:"),
    ("followed[-1].register_step_post_hook", "followed[0].register_step_post_hook"),
    ('getattr(stepper, "found_inf", None)', "None"),
    ("            handle.remove()\n", "            pass\n"),
    ("        self._optimizer = None\n", ""),
    ('        self.engine.refuse_inside_averaged("step")\n', ""),
    ('        self.engine.refuse_inside_averaged("update")\n', ""),
    ("            into.attach(self.param_groups, self.state)\n", ""),
    ("            behind.append((torch._C._increment_version,", "            ((torch._C,"),
    (
        "        self._catch_up()\n        if not self.engine.starting",
        "        if not self.engine.starting",
    ),
    ("            self._catch_up()\n        super", "            pass\n        super"),
    ("broken(*arguments) if torch.compiler.is_compiling() else ", ""),
    ('        checks.captured("update()", CAPTURED)\n', ""),
    ('        checks.captured("a step that an Averager follows", CAPTURED)\n', ""),
    ("            self._into.refuse_trained(", "            (lambda *_: None)("),
]
FOLLOWING: Mutants = [
    ("self.engine.starting() if self._optimizer is None else []", "self.engine.starting()"),
    ("if starting or self.engine.steps == 0:", "if starting:"),
    ("{id(p): p for group", "{p: p for group"),
    ('Counts(int(group["average"] is not None))', "Counts(0)"),
    ("        self._check_into()\n", "        pass\n"),
    (
        "            if writer is not None and writer is not self:",
        "            if writer is not None:",
    ),
    ("            if writer is not None and writer is not self:", "            if False:"),
    ("            _writers[p] = weakref.ref(self)", "            pass"),
    ("                del _writers[p]", "                pass"),
    ("same=True", "same=False"),
    ("        if not (loaded.steps or any(", "        if False and not (loaded.steps or any("),
    ("        self._module.look()\n", "        pass\n"),
    ("if any(held[key].shape != p.shape for key in AVERAGES if key in held):", "if False:"),
    ("        if self._into is not None:\n            state = {}", "        pass"),
    ("loaded._replace(notes=[*loaded.notes, note])", "loaded"),
    ("        count = saved.samples\n", "        count = 0\n"),
    ("steps = saved.steps if step is None else", "steps = 0 if step is None else"),
    ("        checkpoint.keep_tensors(loaded.state, self.state)\n", ""),
    ("        engine.swapped = self._owed = None\n", "        self._owed = None\n"),
    ("        engine.swapped = self._owed = None\n", "        engine.swapped = None\n"),
]
SAMPLES: Mutants = [
    ("*calls, *behind, *after]", "*calls, *behind]"),
    ("        if unseen:", "        if False:"),
    ("        if self.tables.averages and plan.rule.moves:", "        if False:"),
    ("        if self.tables.averages and plan.rule.moves:", "        if True:"),
]
STEPPERS: Mutants = [
    ("if p.requires_grad and p not in theirs", "if p not in theirs"),
    ('    while getattr(optimizer, "optimizer", None) is not None:', "    while False:"),
]
SHARDS_IN_AVERAGER: Mutants = [
    ("super().averaged(self._or_own(model), blend", "super().averaged(model, blend"),
]
SHARDS_IN_MEMBERS: Mutants = [
    (
        "            reshard(self.module)\n        full, empty",
        "            pass\n        full, empty",
    )
]
MEMBERS: Mutants = [
    (
        "            if self._with_buffers:\n                dicts",
        "            if True:\n                dicts",
    ),
    (
        "            if self._with_parameters:\n                dicts",
        "            if True:\n                dicts",
    ),
    ("        return any(empty) or not all(", "        return not all("),
    ("gone not in new and", ""),
    (" and now[name].shape == p.shape", ""),
    ("            kept.setdefault(p, state[gone])", "            pass"),
    ("len(members) == len(seen) and all", "all"),
    ("if b.is_floating_point()}", "}"),
    ("        if not any(fnmatchcase", "        if False and not any(fnmatchcase"),
    ('getattr(module, "_orig_mod", module)', "module"),
    ('{"average": average, **group, **own}', '{**group, "average": average, **own}'),
    ("    if len(set(everything)) != len(everything):", "    if False:"),
]
FORM: Mutants = [
    ("0 <= value <", "-1 <= value <"),
    ("isinstance(value, int) and not", "not"),
    ("not isinstance(value, bool) and ", ""),
    (" < 2**63", ""),
]
AVERAGES: Mutants = [
    (' and len(group["params"]) > 0', ""),
    ("int(now and", "0 * int(now and"),
    ("if engine.swapped is None and any(", "if any("),
    ("                if _starts_now(plan.averages[key].policy)\n", ""),
    ("                self._rebuild()\n", "                pass\n"),
]
BUFFERS: Mutants = [
    (
        "            self.state[buffer] = state[buffer] if fits else {}",
        "            self.state[buffer] = state[buffer]",
    ),
    (
        "            self.state[buffer] = state[buffer] if fits else {}",
        "            self.state[buffer] = {}",
    ),
    ("            del self.state[buffer]", "            pass"),
    ("        return self._followed.heirs([self.group])", "        return {}"),
    ("        self._followed.look()", "        pass"),
    ("        checks.params(group, master_weights=False)", "        pass"),
    (
        '            if any(group.get("n_averaged")',
        '            if not any(group.get("n_averaged")',
    ),
    ("= checkpoint.check_averages(", "= (lambda *given: {})("),
    ("complete=bool(n)", "complete=False"),
    ("        if missing or further:", "        if missing:"),
    ("            _check(name, averages.get(name), buffer)", "            pass"),
    ("            checkpoint.keep_tensors({None: new}, {None: held})", "            pass"),
    ("            held.update(new)", "            pass"),
]
BESIDE_PARAMETERS: Mutants = [  # what an engine has beside the param groups
    (
        "(self._dtypes, self.rule) if beside is None else (Dtypes(), rules.NONE)",
        "(self._dtypes, self.rule)",
    ),
    (
        "(self._dtypes, self.rule) if beside is None else (Dtypes(), rules.NONE)",
        "(self._dtypes, self.rule if beside is None else rules.NONE)",
    ),
]
BESIDE_IN_TABLES: Mutants = [
    ("            not own.changed() and plan", "            plan"),
    (
        "            not own.changed() and plan.describes(own.group)",
        "            not own.changed()",
    ),
    ("[plan for plan in self.plan.groups if plan.state is None]", "self.plan.groups"),
    ("steps=beside is None", "steps=True"),
]
BESIDE_IN_SAVED: Mutants = [("not loaded or steps == engine.steps", "not loaded")]
BESIDE_IN_SAMPLES: Mutants = [
    ("doors.gradients(table.stepped)", "doors.gradients(table.params)"),
    ("if g is not None and p.grad is not None:", "if p.grad is not None:"),
]
BESIDE_IN_BACKWARD: Mutants = [("self._engine.tables.alone & stepped", "self._engine.tables.alone")]
BESIDE_IN_UPKEEP: Mutants = [
    ("            self.beside.follow()\n", ""),
    (
        "        if not plans or self.tables.were_cleared(state):",
        "        if not plans:",
    ),
]
FOREIGN: Mutants = [
    ('if "shadow_params" in state_dict:', "if False:"),
    ("        if missing or further:\n", "        if missing:\n"),
    ("        if missing or further:\n", "        if further:\n"),
    ("{*names, *left_out}", "{*names}"),
    ("        if value.shape != p.shape:\n", "        if False:\n"),
    ('    named = _below("ema_model.", state_dict)\n', "    named = {}\n"),
    (' if state_dict.get("initted", True) else 0', ""),
    (' - int(state_dict.get("update_after_step", 0))', ""),
    ('samples = int(state_dict.get("n_averaged", 1))', "samples = 1"),
]
INTO: Mutants = [
    ("    if dtypes == natural:\n", "    if True:\n"),
    ("if policy.dtype is not None or len(set(dtypes)) > 1:", "if policy.dtype is not None:"),
    ("if policy.dtype is not None or len(set(dtypes)) > 1:", "if len(set(dtypes)) > 1:"),
    ("    _check_moves(policy, dtypes[0])\n", ""),
    ("                    continue\n", "                    pass\n"),
    ("                changed = True\n", "                pass\n"),
    ("self._module is not None and self._module.changed()", "False"),
    ("        if missing:\n", "        if False:\n"),
    ("1.0 - weight.decay < least", "1.0 - weight.decay <= least"),
    ("isinstance(weight, Mean) or", ""),
    ("    if target.shape != param.shape:", "    if False:"),
    ("    if not lies_as(there.detach(), local(param)):", "    if False:"),
    ("    return a.data_ptr() == b.data_ptr() and", "    return"),
]
SHARDED: Mutants = [
    ('return shard.wait() if hasattr(shard, "wait") else shard', "return shard"),
    ("tensor.placements == param.placements and (mesh is other or mesh == other)", "True"),
    ("tensor.full_tensor() if is_sharded(tensor) else tensor", "tensor"),
    (", src_data_rank=None", ""),
    ("dtype=shard.dtype", "dtype=None"),
    ("state._local_tensor = shard", "state._local_tensor = shard.clone()"),
    ("any(p.is_partial() for p in tensor.placements)", "False"),
    ("        module.reshard()\n", "        pass\n"),
    ("            _reshard(module, handle, True)", "            pass"),
    ("ran = module._is_root is not None", "ran = True"),
    ('_modules(model, "FullyShardedDataParallel")\n    members', "[model]\n    members"),
    ('.training_state.name == "SUMMON_FULL_PARAMS"', ".training_state.name is None"),
]
HELD: Mutants = [
    ("if not self._ask(state):", "if False:"),
    ("state is not self._state or not", "not"),
    ("all(local(t) is shard for t, shard in self._shards)", "True"),
    ("        p is q\n        and ", "        "),
    ("and value is thing ", ""),
    (" and memory == place", ""),
    ("        and len(values) == len(others)\n", ""),
    ("(value.data_ptr(), value.numel())", "(0, value.numel())"),
]
HELD_COMPILED: Mutants = [
    ("if (state.ptr() != state_.ptr()) return false;", ""),
    ("param != expected->param.ptr() || ", ""),
    (" || dict != expected->dict.ptr()", ""),
    ("key != next->key.ptr() || ", ""),
    (" || value != next->value.ptr()", ""),
    ("tensor.data_ptr() != next->data || ", ""),
    (" || tensor.numel() != next->numel", ""),
    ("      next += expected->count;\n", ""),
    ("PyDict_GET_SIZE(dict) != expected.count", "false"),
]
SHARDS_IN_TABLES_OF_GROUPS: Mutants = [
    ("not self._sharded or all(map(Segments.holds_shards, self._sharded))", "True"),
]
SHARDS_IN_STATE: Mutants = [("tensor if stream == STEP else beside(tensor, p)", "tensor")]
SHARDS_IN_TABLES: Mutants = [
    ("all(local(param) is shard for param, shard in self.shards)", "True"),
    ("                if alike is not g:\n                    param.grad = alike\n", ""),
]
SHARDS_IN_MEMORY: Mutants = [
    ("enumerate(map(local, params))", "enumerate(params)"),
    ("        and not is_flattened(param)\n", ""),
]
SHARDS_IN_EVALUATION: Mutants = [
    ("    reshard(model)\n    members", "    members"),
    ("if params and model is None:", "if False:"),
    ("    if missing:\n", "    if False:\n"),
]
SHARDS_IN_GROUPS: Mutants = [
    ("self._step_supports_amp_scaling = False", "pass"),
    ("if options.in_backward and kind is not None:", "if False:"),
]
SHARDS_IN_SWAP: Mutants = [
    ("            reshard(self._model)\n", "            pass\n"),
]

TRANSFORMERS: Mutants = [
    ("            _call(evaluating)\n", ""),
    ("            _call(training)\n", ""),
    (
        "            self._evaluated = True\n            self._enter()",
        "            self._evaluated = True",
    ),
    ("            self._leave()\n            _call(training)", "            _call(training)"),
    ("self._asked = True\n            self._enter()", "self._asked = True"),
    ("if self._control.should_save:", "if True:"),
    ("keep=state.global_step > 0", "keep=True"),
    ("keep = keep or any(", "keep = keep and any("),
    ('_write(model, saved["training_weights"])', "pass"),
    ('self.averager.load_state_dict(saved["averager"])', "pass"),
    ("self.averager.remove()  # the last", "pass  # the last"),
    ("buffers=self._buffers_too,", ""),
    ("exclude=self._exclude,", ""),
    ('(saved["run"], saved["step"]) == (marked["run"], state.global_step)', "saved"),
    ("folders.insert(0, str(args.resume_from_checkpoint))", "pass"),
    ('in (args.output_dir, marked["output_dir"])]', "in (args.output_dir,)]"),
    ('in (args.output_dir, marked["output_dir"])]', 'in (marked["output_dir"],)]'),
    ("not (args.load_best_model_at_end and", "not (False and"),
    ("        self._detach()\n        if not (args", "        if not (args"),
    ("if self._hook is None:  # outside train()", "if False:"),
    ("        self._control = control\n        self._leave()\n", "        self._leave()\n"),
    (
        "        self._control = control\n        self._leave()\n",
        "        self._control = control\n",
    ),
    ("self._control = control  # another callback may have exchanged it", "pass"),
    ("def on_epoch_end", "def _on_epoch_end"),
    ("def on_log", "def _on_log"),
    ("def on_predict", "def _on_predict"),
    ("if not self._evaluated:", "if False:"),
    ("        self._evaluated = False\n\n    def on_step_end", "\n    def on_step_end"),
    ("if not asked:", "if False:"),
    ("asked, self._asked = self._asked, False\n        self._leave()", "asked = self._asked"),
    ("if not args.save_only_model:", "if True:"),
    ("    if missing:\n", "    if False:\n"),
    ("inner = inner.optimizer", "break"),
]
COMPILED: Mutants = [
    ("isinstance(error, ModuleNotFoundError) and error.name == name", "True"),
    ("is not None:  # of another", "is None:  # of another"),
    ('torch.__version__ < "2.10"', 'torch.__version__ < "2.9"'),
    ("torch.version.cuda is None", "torch.version.cuda is not None"),
    ("str(toolkit // 1000) ==", "str(toolkit // 1000) !="),
]
CHECKED: Mutants = [('set(verdicts) == {"ok"}', 'set(verdicts) <= {"ok"}')]
STEPS = (
    "engine/test_state.py",
    "engine/test_outside_edits.py",
    "optimizer/test_optimizer.py",
    "update/test_methods.py",
    "averages/test_averaged.py",
    "optimizer/test_bad_input.py",
    "checkpoints/test_checkpoint.py",
    "optimizer/test_master_weights.py",
    "optimizer/test_catalogue_watched.py",
    "update/test_threads.py",
    "checkpoints/test_distributed_checkpoint.py",
    "optimizer/test_subclasses.py",
    "engine/test_plain_memory.py",
    "optimizer/test_torchs_idioms.py",
    "engine/test_step_fails.py",
    "engine/test_interrupted.py",
)
BESIDE = (
    "averages/test_averager.py",
    "averages/test_averager_follows.py",
    "averages/test_averager_fails.py",
    "averages/test_readouts.py",
    "averages/test_foreign_averages.py",
)
BITS = (
    *("update/test_ops.py", "update/test_threads.py", "update/test_update.py", "-k"),
    "test_ops or test_threads or flat_threads or (literal and none)",
)
SHARDS = (
    "distributed/test_fsdp.py",
    "distributed/test_fsdp1.py",
    "distributed/test_tensor_parallel.py",
)
# file, mutants, tests, whether the CPU module must be compiled
CASES: list[tuple[str, Mutants, tuple[str, ...], bool]] = [
    ("rbwa_fused/compiled.py", COMPILED, ("project/test_compiled.py",), False),
    ("rbwa_fused/__main__.py", CHECKED, ("project/test_compiled.py",), False),
    ("csrc/cpu/loop.h", CPU_LOOP, BITS, True),
    ("csrc/cpu/narrow_loop.h", NARROW_LOOP, BITS, True),
    ("csrc/convert.h", CONVERT, BITS, True),
    ("csrc/cpu/step_cpu.cpp", STEP_CPU, BITS, True),
    (
        "csrc/gradients.h",
        GRADIENTS,
        (
            "engine/test_plain_memory.py",
            "optimizer/test_optimizer.py",
            "engine/test_outside_edits.py",
        ),
        True,
    ),
    (
        "csrc/cpu/ops_cpu.cpp",
        OPS,
        ("update/test_ops.py", "engine/test_outside_edits.py", "update/test_threads.py"),
        True,
    ),
    (
        "csrc/in_turn.h",
        IN_TURN,
        ("optimizer/test_optimizer.py", "engine/test_interrupted.py", "engine/test_step_fails.py"),
        True,
    ),
    (
        "csrc/tables.cpp",
        TABLES,
        (
            "update/test_ops.py",
            "engine/test_outside_edits.py",
            "engine/test_step_fails.py",
            "optimizer/test_optimizer.py",
        ),
        True,
    ),
    (
        "csrc/views.cpp",
        VIEWS,
        (
            "update/test_ops.py",
            "engine/test_outside_edits.py",
            "optimizer/test_optimizer.py",
            "update/test_replicas.py",
        ),
        True,
    ),
    ("rbwa_fused/averager.py", AVERAGER, BESIDE, False),
    ("rbwa_fused/following.py", FOLLOWING, BESIDE, False),
    (
        "rbwa_fused/integrations/transformers.py",
        TRANSFORMERS,
        ("integrations/test_transformers.py", "integrations/test_transformers_checkpoints.py"),
        False,
    ),
    ("rbwa_fused/engine/engine.py", SAMPLES, BESIDE, False),
    ("rbwa_fused/steppers.py", STEPPERS, BESIDE, False),
    (
        "rbwa_fused/averager.py",
        SHARDS_IN_AVERAGER,
        ("distributed/test_averager_on_ranks.py",),
        False,
    ),
    (
        "rbwa_fused/members.py",
        SHARDS_IN_MEMBERS,
        ("distributed/test_averager_on_ranks.py",),
        False,
    ),
    ("rbwa_fused/members.py", MEMBERS, (*BESIDE, "averages/test_buffers.py"), False),
    ("rbwa_fused/into.py", INTO, BESIDE, False),
    (
        "rbwa_fused/form.py",
        FORM,
        ("checkpoints/test_foreign_checkpoints.py", "averages/test_buffers.py"),
        False,
    ),
    (
        "rbwa_fused/averages.py",
        AVERAGES,
        ("averages/test_readouts.py", "averages/test_averaged.py", "averages/test_buffers.py"),
        False,
    ),
    ("rbwa_fused/buffers.py", BUFFERS, ("averages/test_buffers.py",), False),
    ("rbwa_fused/engine/rows.py", BESIDE_PARAMETERS, ("averages/test_buffers.py",), False),
    ("rbwa_fused/engine/tables.py", BESIDE_IN_TABLES, ("averages/test_buffers.py",), False),
    ("rbwa_fused/engine/upkeep.py", BESIDE_IN_UPKEEP, ("averages/test_buffers.py",), False),
    ("rbwa_fused/saved.py", BESIDE_IN_SAVED, ("averages/test_buffers.py",), False),
    ("rbwa_fused/engine/engine.py", BESIDE_IN_SAMPLES, ("averages/test_buffers.py",), False),
    ("rbwa_fused/in_backward.py", BESIDE_IN_BACKWARD, ("averages/test_buffers.py",), False),
    ("rbwa_fused/foreign.py", FOREIGN, ("averages/test_foreign_averages.py",), False),
    ("rbwa_fused/engine/memory.py", MEMORY, STEPS, False),
    ("rbwa_fused/engine/memory.py", SHARDS_IN_MEMORY, SHARDS, False),
    ("rbwa_fused/engine/segments.py", SEGMENTS, STEPS, False),
    ("rbwa_fused/engine/held.py", HELD, ("engine/test_state.py", *SHARDS), False),
    ("csrc/held.h", HELD_COMPILED, ("engine/test_state.py",), True),
    ("rbwa_fused/engine/sharded.py", SHARDED, SHARDS, False),
    ("rbwa_fused/engine/segments.py", SHARDS_IN_TABLES, SHARDS, False),
    ("rbwa_fused/engine/tables.py", SHARDS_IN_TABLES_OF_GROUPS, SHARDS, False),
    ("rbwa_fused/engine/state.py", SHARDS_IN_STATE, SHARDS, False),
    ("rbwa_fused/evaluate.py", SHARDS_IN_EVALUATION, SHARDS, False),
    ("rbwa_fused/fused.py", SHARDS_IN_GROUPS, SHARDS, False),
    ("rbwa_fused/engine/engine.py", ENGINE, STEPS, False),
    ("rbwa_fused/engine/upkeep.py", UPKEEP, STEPS, False),
    ("rbwa_fused/engine/tables.py", TABLES_OF_GROUPS, STEPS, False),
    ("rbwa_fused/engine/state.py", STATE, STEPS, False),
    ("rbwa_fused/fused.py", FUSED, STEPS, False),
    ("rbwa_fused/saved.py", SAVED, STEPS, False),
    (
        "rbwa_fused/saved.py",
        LOADED_WHERE_WEIGHTS_ARE_MISSING,
        ("averages/test_averaged_fails.py",),
        False,
    ),
    (
        "rbwa_fused/engine/engine.py",
        WHERE_DEVICES_COUNT,
        ("update/test_cuda.py", "-k", "failed or taken_away"),
        False,
    ),
    (
        "rbwa_fused/in_backward.py",
        IN_BACKWARD,
        ("optimizer/test_in_backward.py", "engine/test_step_fails.py"),
        False,
    ),
    ("rbwa_fused/adopted.py", ADOPTED, ("optimizer/test_torchs_idioms.py",), False),
    (
        "rbwa_fused/evaluate.py",
        EVALUATE,
        (
            "averages/test_averaged.py",
            "averages/test_averaged_fails.py",
            "averages/test_readouts.py",
            "averages/test_averaged_state_dict.py",
            "engine/test_interrupted.py",
        ),
        False,
    ),
    (
        "rbwa_fused/estimate.py",
        ESTIMATE,
        (
            "averages/test_averaged.py",
            "averages/test_averaged_fails.py",
            "averages/test_readouts.py",
            "averages/test_averaged_state_dict.py",
            "engine/test_interrupted.py",
        ),
        False,
    ),
    ("rbwa_fused/model_state.py", MODEL_STATE, ("averages/test_averaged_state_dict.py",), False),
    (
        "rbwa_fused/swap.py",
        SWAP,
        (
            "averages/test_averaged.py",
            "averages/test_averaged_fails.py",
            "averages/test_buffers.py",
            "averages/test_readouts.py",
            "optimizer/test_neighbours.py",
            "engine/test_interrupted.py",
        ),
        False,
    ),
    ("rbwa_fused/swap.py", SHARDS_IN_SWAP, SHARDS, False),
    ("rbwa_fused/engine/rows.py", PLAN, ("engine/test_step_fails.py",), False),
    ("rbwa_fused/engine/rows.py", IN_PLACE, ("optimizer/test_adam.py",), False),
    ("rbwa_fused/engine/checks.py", OWN_STATE, ("engine/test_state.py",), False),
    (
        "rbwa_fused/checkpoint.py",
        CHECKPOINT,
        (
            "checkpoints/test_checkpoint.py",
            "checkpoints/test_foreign_checkpoints.py",
            "averages/test_custom_weights.py",
            "optimizer/test_bad_input.py",
            "averages/test_averaged.py",
            "optimizer/test_torchs_idioms.py",
            "checkpoints/test_distributed_checkpoint.py",
            "optimizer/test_master_weights.py",
            "engine/test_outside_edits.py",
        ),
        False,
    ),
]
# Edits that change no result, with the reason; they are printed and not run.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "rbwa_fused/engine/segments.py",
        "known is None or known.rows is not rows:",
        "known is None:",
    ): ("rows grow with a group, for which `ParameterState.take_over` sets all tables' ages anew"),
    (
        "rbwa_fused/in_backward.py",
        "if not self._engine.run(gathered, calls):",
        "if self._engine.run(gathered, calls) is None:",
    ): ("`_ready` has found that all fits; only another thread could convert a parameter since"),
    ("csrc/tables.cpp", "dims <= shape_count / 2 &&", ""): (
        "the product overflows then, and wraps to what is refused; `make sanitize` finds it"
    ),
    (
        "csrc/cpu/norm_cpu.cpp",
        "std::min(end, work.first_chunk[i + 1])",
        "work.first_chunk[i + 1]",
    ): ("two threads compute the same sums of a gradient, which takes longer"),
    ("triton_kernels/schedule.py", "size <= 16", "size <= 1e9"): (
        "larger powers have the host's bits neither way, and the same bound"
    ),
}
