"""Mutants of the schedule-free optimizers; see tests/mutate.py."""

from __future__ import annotations

Mutants = list[tuple[str, str]]

TESTS = ("optimizer/test_schedule_free.py",)
PROGRESS: Mutants = [
    ("if k < warmup_steps:", "if k <= warmup_steps + 1:"),
    ("        eta *= (k + 1) / warmup_steps\n", "        eta *= k / warmup_steps\n"),
    ('largest = max(eta, float(group["lr_max"]))', "largest = eta"),
    ('(k + 1) ** group["r"]', 'k ** group["r"]'),
    ('** group["weight_lr_power"]', "** 2"),
    ('float(group["weight_sum"]) + weight', "weight"),
    ('"k": k + 1,', '"k": k,'),
    ('"scheduled_lr": eta}', '"scheduled_lr": 0.0}'),
    ("(1.0 - 1.0 / beta)", "(1.0 - beta)"),
    ("x + (1.0 - beta) * (z - x)", "x + beta * (z - x)"),
    ("if policy and policy.write_back_every > 0:", "if False:"),
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
        "                    if g is not None\n                }\n",
        "                }\n",
    ),
    ('            checks.captured("step() of a schedule-free', '            str("step() of a'),
]
STATE: Mutants = [
    ("start = self._weights(p, held, given[MASTER].get(i))", "pass"),
    ("                        local(held[stream]).copy_(self._weights(p, held))\n", "pass\n"),
]
ROWS: Mutants = [
    (
        "                if plan.rule.scheduled is not None:\n                    self._pack",
        "                if False:\n                    self._pack",
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
    ("torch.where(master.to(weights.dtype) == weights, master,", "torch.where(True, weights,"),
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
    ("group.update(PACKAGES, train_mode", "group.update(train_mode"),
    ("            group[EXPORTED_K] = group", "            group"),
    ("                group[key] = float(group[key])\n", "                pass\n"),
    ('            group["train_mode"] = mode\n', "            pass\n"),
    ("(step is None or went_on)", "step is None"),
    ("(step is None or went_on)", "went_on"),
    ("            held.pop(Y, None)\n", "            pass\n"),
    ("        if options.capturable:\n", "        if False:\n"),
]
CASES: list[tuple[str, Mutants, tuple[str, ...], bool]] = [
    ("rbwa_fused/progress.py", PROGRESS, TESTS, False),
    ("rbwa_fused/rules.py", RULES, (*TESTS, "update/test_update.py"), False),
    ("rbwa_fused/engine/engine.py", ENGINE, TESTS, False),
    ("rbwa_fused/engine/state.py", STATE, TESTS, False),
    ("rbwa_fused/engine/rows.py", ROWS, TESTS, False),
    ("rbwa_fused/in_backward.py", IN_BACKWARD, TESTS, False),
    ("rbwa_fused/checkpoint.py", CHECKPOINT, TESTS, False),
    ("rbwa_fused/form.py", FORM, TESTS, False),
    ("rbwa_fused/modes.py", MODES, TESTS, False),
]
