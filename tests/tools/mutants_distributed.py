"""Mutants of rbwa_fused/distributed, for mutate.py."""

from __future__ import annotations

Mutants = list[tuple[str, str]]

ELASTIC: Mutants = [
    ("        self._steps += 1\n", ""),
    ("        self._correct(params)\n        if alpha", "        if alpha"),
    ("            self._correct(self._params())\n", "            pass\n"),
    ("elif since == self._every // 2 and", "elif since == 0 and"),
    ("if since == 0:", "if since == 1 % self._every:"),
    ("if self._overlap:", "if False:"),
    ("pull, self._under_way = self._under_way, None", "pull = self._under_way"),
    ('integer("steps", state_dict["steps"], least=0)', "0"),
    ('        self._refuse_under_way("state_dict")\n', ""),
    ('        self._refuse_under_way("load_state_dict")\n', ""),
    ("                if theirs[name] != first:", "                if False:"),
    ("            if isinstance(theirs, str):", "            if False:"),
    ("    if shared is not None:", "    if False:"),
    ("            if kind != before:", "            if False:"),
    ("        if len(now) != len(self._kinds):", "        if False:"),
    ("        self.alpha(finished_epochs)  #", "        #"),
]
PULL: Mutants = [
    ("reference.correction_(mean, start, self._alpha)", "pass"),
    ("p.detach().add_(correction)", "p.detach().copy_(correction)"),
    ("reference.pulled_(mean, start, self._alpha)", "pass"),
    ("wide = torch.float64 if p.dtype == torch.float64 else torch.float32", "wide = torch.float32"),
    ("-(-max(length, 1) // world) * world", "max(length, 1) // world * world"),
    ("members.setdefault((p.device, wide), [])", "members.setdefault((p.device, p.dtype), [])"),
]
EXCHANGE: Mutants = [
    (
        "backends.pull_([[piece] for piece in pieces], 1.0)",
        "pieces[0] = pieces.mean(0)",
    ),
    ("        if self._piece is not None:\n            return\n", ""),
    ("        ) from error\n", "        ) from None\n"),
    ("self._received.div_(self._world)", "self._received"),
    ("self._received = mine.clone()", "self._received = mine"),
]
STATES: Mutants = [
    (
        "rank = dist.get_rank(self._group) if is_last_joiner else -1",
        "rank = dist.get_rank(self._group)",
    ),
    ("dist.ReduceOp.MAX", "dist.ReduceOp.MIN"),
    (
        "        for follower in self._followers:\n",
        "        for follower in self._followers[:1]:\n",
    ),
    ("        dist.broadcast(tensor, src=source, group=group)\n", ""),
    ("value.enable and value.is_first_joinable", "False"),
    ("self._followers = (opt, *others)", "self._followers = others"),
    ("    _refuse_sharded(opt)\n    if dist", "    if dist"),
    ("    if kind is not None:", "    if False:"),
    ("    if dist.get_rank(group) < 0:", "    if False:"),
    ("apart = copy(tree)", "apart = {}"),
    ("        _refuse_sharded(opt)\n        super", "        super"),
]
ZERO: Mutants = [
    (" if k not in options} | counters", " if k not in options}"),
    ("if k not in options}", "if True}"),
    ('            group.update(_without("params", loaded))\n', "            pass\n"),
    ("if k in wanted and held", "if held"),
    ("for group, owns in of_all if owns]", "for group, owns in of_all]"),
    ("        if sizes != [", "        if False and sizes != ["),
    ("        if len(steps) > 1:", "        if False:"),
    ("self._counters.append(max(", "self._counters.append(min("),
    ("any(group[key] is not None for key in MEMORY)", "True"),
    ('key_of[p] for p in group["params"]]', 'key_of[p] for p in reversed(group["params"])]'),
]
ZERO_MODES: Mutants = [
    ("            broadcast(self, shares, mode)\n", ""),
    ('                group["train_mode"] = mode == "train"\n', "                pass\n"),
    ("            getattr(local, mode)()\n", ""),
    ("group.update(progress(group).left)", "pass"),
    ('if own["k"] == k and any(', "if any("),
    ('any(p.grad is not None for p in group["params"])', "True"),
    (', "average", *START,', ', "average",'),
    (", EXPORTED_K, *PACKAGES, *KEYS}", ", *KEYS}"),
]
SHARES: Mutants = [
    (
        '            broadcast(opt, shares, "averaged")\n            live = True\n',
        "            live = True\n",
    ),
    ("            live = True\n", ""),
    ("    increment_version([p for share in shares for p in share])\n", ""),
    ("local.averaged(**options)", "local.averaged()"),
    ('    with explained(what, "The weights', '    with explained("averaged", "The weights'),
]
CASES: list[tuple[str, Mutants, tuple[str, ...], bool]] = [
    ("rbwa_fused/distributed/elastic.py", ELASTIC, ("distributed/test_elastic.py",), False),
    ("rbwa_fused/distributed/pull.py", PULL, ("distributed/test_elastic.py",), False),
    (
        "rbwa_fused/distributed/exchange.py",
        EXCHANGE,
        ("distributed/test_elastic.py", "distributed/test_gone.py"),
        False,
    ),
    (
        "rbwa_fused/distributed/states.py",
        STATES,
        ("distributed/test_ddp.py", "distributed/test_zero.py"),
        False,
    ),
    ("rbwa_fused/distributed/zero.py", ZERO, ("distributed/test_zero.py",), False),
    ("rbwa_fused/distributed/zero.py", ZERO_MODES, ("distributed/test_zero_modes.py",), False),
    (
        "rbwa_fused/distributed/shares.py",
        SHARES,
        ("distributed/test_zero.py", "distributed/test_zero_modes.py"),
        False,
    ),
]
