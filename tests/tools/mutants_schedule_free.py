"""Mutants of the schedule-free optimizers; see tests/mutate.py."""

from __future__ import annotations

Mutants = list[tuple[str, str]]

TESTS = ("optimizer/test_schedule_free.py",)
PROGRESS: Mutants = [
    ("if k < warmup_steps:", "if k <= warmup_steps + 1:"),
    ("        eta *= (k + 1) / warmup_steps\n", "        eta *= k / warmup_steps\n"),
    ('largest = max(eta, float(group["lr_max"]))', "largest = eta"),
    ("to_the(float(k + 1), r)", "to_the(float(k), r)"),
    ('to_the(largest, group["weight_lr_power"])', "largest * largest"),
    ("    if exponent == 2.0:\n", "    if exponent >= 2.0:\n"),
    ("size <= 16.0", "size <= 1e9"),
    ("(2.0 * size).is_integer()", "size.is_integer()"),
    ("        result *= math.sqrt(base)\n", "        pass\n"),
    ("return 1.0 / result if exponent < 0.0 else result", "return result"),
    ('float(group["weight_sum"]) + weight', "weight"),
    ('"k": k + 1,', '"k": k,'),
    ('"scheduled_lr": eta}', '"scheduled_lr": 0.0}'),
    ("(1.0 - 1.0 / beta)", "(1.0 - beta)"),
    ("x + (1.0 - beta) * (z - x)", "x + beta * (z - x)"),
    ("if policy.write_back_every > 0:", "if False:"),
    ('integer("k", group["k"], least=0)', "pass"),
    ("if r != r:", "if False:"),
    ("if not 0.0 < number(name, beta) < 1.0:", "if not 0.0 <= number(name, beta) <= 1.0:"),
]
RULES: Mutants = [
    ("return Scheduled(-eta,", "return Scheduled(eta,"),
    ("eta * (1.0 - c) * (1.0 - beta), -c, c)", "eta * (1.0 - beta), -c, c)"),
    ("(1.0 - beta), -c, c), left", "(1.0 - beta), c, c), left"),
    ("if beta != memory.get(BETA, beta):", "if False:"),
    ("if self.scheduled is None else 1.0", "if True else 1.0"),
    ("grown = 1.0 if free else", "grown = 2.0 if free else"),
]
ENGINE: Mutants = [
    ("                calls += self.moved(moved)\n", "                pass\n"),
    (
        "                if g is not None\n            }\n",
        "            }\n",
    ),
    ('            checks.captured("step() of a schedule-free', '            str("step() of a'),
    ("plan.update(scale, on_device=True,", "plan.update(scale,"),
    ("table, grads, on_device=on_device)", "table, grads)"),
]
STATE: Mutants = [
    ("start = self._weights(p, held, given[MASTER].get(i))", "pass"),
    ("                        local(held[stream]).copy_(self._weights(p, held))\n", "pass\n"),
]
ROWS: Mutants = [
    (
        "            if rule.scheduled is not None and not on_device:\n",
        "            if False:\n",
    ),
    ("self._rows.pack_from(plan.row + first, RHO, rho)", "pass"),
]
IN_BACKWARD: Mutants = [("            calls += engine.moved(\n", "            str(\n")]
CHECKPOINT: Mutants = [
    ("if engine.rule.name == ADAM.name and held", "if engine.rule.counts and held"),
    ("held.keys() & {*STREAMS, *rule.aside}", "held.keys() & {*STREAMS}"),
]
FORM: Mutants = [
    ('if "weight_lr_power" in group:', "if False:"),
    ("(SCHEDULE_FREE_ADAMW if", "(SCHEDULE_FREE_SGD if"),
    ('"train_mode", "warmup_steps")', '"train_mode")'),
]
MODES: Mutants = [
    ('if what in ("step", "backward", "adopt"):', 'if what in ("step", "adopt"):'),
    ('if what in ("step", "backward", "adopt"):', 'if what in ("backward", "adopt"):'),
    ("        engine.refuse_inside_averaged(mode)\n", ""),
    ("            self._mirror()\n            return\n", "            pass\n"),
    ("                calls.append((held.pop, Y, None))\n", ""),
    ("beside(before.clone(), p)", "beside(before, p)"),
    ('        calls += [(group.__setitem__, "train_mode", trains)', "        [(str, trains)"),
    ("        engine.tables.state.look()  #", "        #"),
    ("            plan.rule.check_memory(plan.group, plan.memory)\n", ""),
    ("theta = followed(master, weights)", "theta = weights"),
    ("theta = followed(master, weights)", "theta = weights if master is None else master"),
    ("            y = held[MASTER]\n", "            pass\n"),
    ("if y is None or y.shape != param.shape:", "if True:"),
    ("torch.where(untouched, y.to(weights.dtype), computed)", "y.to(weights.dtype)"),
    ("plan.memory.setdefault(rules.BETA, self._beta(plan))", "pass"),
    (
        "                return weights\n            return self._x",
        "                pass\n            return self._x",
    ),
    ("local(param).detach() if set_aside is None else set_aside", "local(param).detach()"),
    ("                others.refuse(mode)\n", "                pass\n"),
    ("        self._itself._mirror()\n", "        pass\n"),
    ("            self._warned = True\n", "            pass\n"),
    ("        self._mirror()\n        return super", "        return super"),
    ("group.update(PACKAGES, **counted", "group.update(**counted"),
    ("group.update(PACKAGES, **counted, ", "group.update(PACKAGES, "),
    ("Z not in waiting.get(p, ())", "True"),
    ("            group[EXPORTED_K] = group", "            group"),
    ("                group[key] = float(group[key])\n", "                pass\n"),
    ('            group["train_mode"] = mode\n', "            pass\n"),
    ("(step is None or went_on)", "step is None"),
    ("(step is None or went_on)", "went_on"),
    ("            held.pop(Y, None)\n", "            pass\n"),
]
# Where a device counts.
ON_DEVICE = "optimizer/test_schedule_free_on_devices.py"
SCHEDULE_H: Mutants = [
    ("now.k < setting.warmup_steps", "now.k <= setting.warmup_steps + 1"),
    ("(now.k + 1) / setting.warmup_steps", "now.k / setting.warmup_steps"),
    ("now.lr_max > eta ? now.lr_max : eta", "eta"),
    ("to_the(now.k + 1, setting.r)", "to_the(now.k, setting.r)"),
    ("to_the(largest, setting.weight_lr_power)", "(largest * largest)"),
    ("now.weight_sum + weight", "weight"),
    ("total != 0 ? weight / total : 0", "weight / total"),
    ("group.c = -eta", "group.c = eta"),
    ("eta * (1 - c) * (1 - setting.beta)", "eta * (1 - setting.beta)"),
    ("group.gamma = -c;", "group.gamma = c;"),
    ("group.rho = c;", ""),
    ("setting.taken != 0 ?", "true ?"),
    ("if (half) result *= std::sqrt(base);", ""),
    ("size <= 16", "size <= 1e9"),
    ("exponent < 0 ? 1 / result : result", "result"),
]
BODY: Mutants = [
    ("k.c = static_cast<T>(schedule->c);", ""),
    ("k.alpha = static_cast<T>(schedule->alpha);", ""),
    ("k.gamma = static_cast<T>(schedule->gamma);", ""),
    ("k.rho = static_cast<T>(schedule->rho);", ""),
    ("k.begins = launch.marks[2 * s.index] == 0;", ""),
    ("k.begins = launch.marks[2 * s.index] == 0;", "k.begins = true;"),
]
POLICY: Mutants = [("d.schedules[i].now = d.schedules[i].left;", ";")]
PACKER: Mutants = [
    ("key.most = Kind::kDifference;", ""),
    ("step_.schedules + group", "step_.schedules"),
]
DISPATCH: Mutants = [
    ("most == Kind::kDifference || most == Kind::kScheduleFree", "most == Kind::kScheduleFree"),
    ("(most == Kind::kDecoupled && keeps_wider)", "false"),
]
SCHEDULES: Mutants = [
    ("if p.rule.scheduled is not None}", "}"),
    ("            rows[i][: len(counted)] = map(float, counted)\n", "            pass\n"),
    ("0.0 if lrs[i] is not None else float", "float"),
    ("float(i in taking_part)", "1.0"),
    ("            calls += self._assigned(i, group)\n", ""),
    ("        if said != self._said:\n", "        if self._said is None:\n"),
    ("None if capturing else said", "said"),
    ("            self._captured.append((self._sent, self.settings))\n", "            pass\n"),
    ("                if lr_there is not None:\n", "                if False:\n"),
    ("        return [*calls, (self._told.__setitem__, i, counted)]\n", "        return calls\n"),
    ("            if _counted(group) == self._told[i]:\n", "            if True:\n"),
    ("                self._told[i] = _counted(group)\n", ""),
    ("(int(k), *others)", "(k, *others)"),
]
COUNTING: Mutants = [
    ("            lrs = [None] * len(groups)  #", "            #"),
    ("            self._schedules.read_back()\n", "            pass\n"),
    (" if tables.scheduled else None", ""),
]
TRITON: Mutants = [
    ("k < warmup_steps", "k <= warmup_steps + 1"),
    ("eta * ((k + 1) / tl", "eta * (k / tl"),
    ("tl.where(lr_max > eta, lr_max, eta)", "eta"),
    ("to_the(k + 1, r)", "to_the(k, r)"),
    ("weight_sum + weight", "weight"),
    ("tl.store(prepared, -eta", "tl.store(prepared, eta"),
    ("eta * (1 - c) * (1 - beta)", "eta * (1 - beta)"),
    ("tl.store(prepared + 2, -c", "tl.store(prepared + 2, c"),
    ("tl.store(prepared + 3, c", "tl.store(prepared + 3, eta"),
    ("    taken = taken != 0\n", "    taken = taken == taken\n"),
    ("tl.where(half, result * tl.sqrt(base), result)", "result"),
    ("inverse = exponent < 0", "inverse = exponent < -99"),
    ("tl.program_id(0) * BLOCK + ", ""),
]
TRITON_UPDATE: Mutants = [
    ("c = tl.load(prepared).to(c.dtype)", "c = c"),
    ("alpha = tl.load(prepared + 1).to(c.dtype)", "alpha = alpha"),
    ("gamma = tl.load(prepared + 2).to(c.dtype)", "gamma = gamma"),
    ("rho = tl.load(prepared + 3).to(c.dtype)", "rho = rho"),
    ("m = tl.where(k[17], theta, m)", "m = m"),
    ("grown = tl.where(kind == SCHEDULE_FREE, 1, grown)", "grown = grown"),
]
TRITON_ADVANCE: Mutants = [("                move_on(schedules", "                grow(marks")]
TRITON_STEP: Mutants = [("            _prepare(counters)\n", "            pass\n")]
IN_TRITON = ("update/test_triton.py",)
CASES: list[tuple[str, Mutants, tuple[str, ...], bool]] = [
    ("rbwa_fused/progress.py", PROGRESS, (*TESTS, ON_DEVICE), False),
    ("rbwa_fused/rules.py", RULES, (*TESTS, "update/test_update.py"), False),
    ("rbwa_fused/engine/engine.py", ENGINE, (*TESTS, ON_DEVICE), False),
    ("rbwa_fused/engine/state.py", STATE, TESTS, False),
    ("rbwa_fused/engine/rows.py", ROWS, TESTS, False),
    ("rbwa_fused/in_backward.py", IN_BACKWARD, TESTS, False),
    ("rbwa_fused/checkpoint.py", CHECKPOINT, TESTS, False),
    ("rbwa_fused/form.py", FORM, TESTS, False),
    ("rbwa_fused/modes.py", MODES, (*TESTS, ON_DEVICE), False),
    ("csrc/schedule.h", SCHEDULE_H, (ON_DEVICE,), False),
    ("csrc/policy.h", POLICY, (ON_DEVICE,), False),
    ("csrc/dispatch.h", DISPATCH, (ON_DEVICE,), False),
    ("csrc/cuda/body.h", BODY, (ON_DEVICE,), False),
    ("csrc/cuda/packer.cpp", PACKER, (ON_DEVICE,), False),
    ("rbwa_fused/engine/schedules.py", SCHEDULES, (ON_DEVICE,), False),
    ("rbwa_fused/engine/on_device.py", COUNTING, (ON_DEVICE, "averages/test_averager.py"), False),
    ("triton_kernels/schedule.py", TRITON, IN_TRITON, False),
    ("triton_kernels/update.py", TRITON_UPDATE, IN_TRITON, False),
    ("triton_kernels/advance.py", TRITON_ADVANCE, IN_TRITON, False),
    ("triton_kernels/step.py", TRITON_STEP, IN_TRITON, False),
]
