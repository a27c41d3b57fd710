"""Mutants of clipping for mutate.py: the norm, whose gradients a coefficient belongs to, and the
places where it is read."""

from __future__ import annotations

Mutants = list[tuple[str, str]]

CLIPPING: Mutants = [
    ("elif version != version_before:", "elif False:"),
    ("if shard is not before:", "if False:"),
    ('return ("changed" if new else "same") if same else "new"', 'return "same"'),
    ('return "same" if any(g is not None for g in shards) else "new"', 'return "same"'),
    ('if not self.spent and self.gradients() == "changed":', 'if self.gradients() == "changed":'),
    ('or (self.spent and found == "changed")', ""),
    ("if share is not None and share is not self:", "if False:"),
    ("share._shares = everyone", "share._shares = everyone[:1]"),
    ("        self._itself.pending_clip = None\n        super()", "        super()"),
    ("        if grad_scale is not None:\n            raise RuntimeError(SCALED)\n", ""),
    ('[(setattr, self.pending_clip, "spent", True)]', "[]"),
    (
        "not self.pending_clip.spent:\n            self.pending_clip = None",
        "False:\n            pass",
    ),
    (".clamp(max=1.0)", ""),
    ("(total + 1e-6)", "total"),
    ("            target.pending_clip.check()\n", "            pass\n"),
    ("if target is None or in_place:", "if in_place:"),
    ("if present and not in_place:", "if present:"),
    ("grads[i] = laid_out_as(p, g)", "grads[i] = g"),
    ("g._version + s._version for", "s._version for"),
    ("if not limit >= 0.0:", "if limit != limit:"),
    ("any(p.grad is not None for p in set(params).difference(self._params))", "False"),
    ("if target is not None and target.engine.options.in_backward:", "if False:"),
    ('math.inf if norm_type == "inf" else number', "number"),
    ('share.mixed and share.gradients() == "same"', "False"),
    ("                target.pending_clip = None\n    present", "    present"),
]
TOTAL_NORM: Mutants = [
    ("torch.float64 if wide else torch.float32", "torch.float32"),
    ("grad.resolve_conj()", "grad"),
    ("(grad.is_contiguous() or is_dense(grad)) and is_plain(grad)", "is_plain(grad)"),
    ("math.inf if p < 0 else 0.0", "0.0"),
    ('"max" if p > 0 else "min"', '"max"'),
    ("where.total(norms**p) ** (1 / p)", "where.total(norms)"),
    ("where.total(_sum_squares(shards, backend))", "_sum_squares(shards, backend)"),
]
NORM_PY: Mutants = [
    ("lanes[:, :half] + lanes[:, half:]", "lanes[:, ::2] + lanes[:, 1::2]"),
    ("at += own", "at += 1"),
    (".double()", ""),
]
NORM_H: Mutants = [
    ("const double wide = static_cast<double>(g);", "const T wide = g;"),
    ("(length + kNormChunk - 1) / kNormChunk", "length / kNormChunk + 1"),
]
NORM_LOOP: Mutants = [
    ("at[lane] += at[lane + half];", "at[lane] = at[2 * lane] + at[2 * lane + 1];"),
    ("row < end; row += kNormLanes", "row + kNormLanes <= end; row += kNormLanes"),
    ("sums[chunk + k * apart] =", "sums[kTogether * chunk + k] ="),
]
NORM_CPU: Mutants = [
    ("begin - work.first_chunk[i], stop", "begin, stop"),
    ("work.sums + begin", "work.sums"),
]
SUMMED: Mutants = [
    ("(is_contiguous(grad) || is_dense(grad))", "true"),
    ("if (stride != expected) return numel_of(view) == 0;", ""),
    ("grad.data != nullptr || length == 0", "true"),
    ("numel_of(sums) == 1 + chunks", "numel_of(sums) >= 1 + chunks"),
]
NORM_BODY: Mutants = [
    ("return {grad.g, begin, end, grad.first_sum + chunk};", "return {grad.g, begin, end, block};"),
    ("lanes[thread] += lanes[thread + half]", "lanes[thread] += lanes[half]"),
    ("chunk.end - chunk.begin == kNormChunk", "true"),
]
NORM_PACKER: Mutants = [
    ("    chunks += own;\n", "    chunks += 1;\n"),
    ("    blocks = 0;\n", ""),
]
CLIPPED = ("optimizer/test_clipping.py",)
RANKS = (*CLIPPED, "distributed/test_clipped_ranks.py")
NORMS = ("update/test_norm.py",)
CASES: list[tuple[str, Mutants, tuple[str, ...], bool]] = [
    ("rbwa_fused/clipping.py", CLIPPING, RANKS, False),
    ("rbwa_fused/total_norm.py", TOTAL_NORM, (*NORMS, *RANKS), False),
    ("rbwa_fused/engine/norm.py", NORM_PY, NORMS, False),
    ("csrc/norm.h", NORM_H, NORMS, True),
    ("csrc/cpu/norm_loop.h", NORM_LOOP, NORMS, True),
    ("csrc/cpu/norm_cpu.cpp", NORM_CPU, NORMS, True),
    ("csrc/summed.cpp", SUMMED, NORMS, True),
    ("csrc/cuda/norm_body.h", NORM_BODY, NORMS, False),
    ("csrc/cuda/norm_packer.cpp", NORM_PACKER, NORMS, False),
    (
        "csrc/cuda/body.h",
        [("if (launch.clip != nullptr) k.s *=", "if (false) k.s *=")],
        CLIPPED,
        False,
    ),
    (
        "csrc/cpu/ops_cpu.cpp",
        [("for (Row& row : clipped) row.numbers.s *= coefficient;", "")],
        CLIPPED,
        True,
    ),
    ("rbwa_fused/reference.py", [("k.s = k.s * clip.to(wide)", "pass")], CLIPPED, False),
    (
        "rbwa_fused/engine/sharded.py",
        [
            ("if not p.is_replicate()", ""),
            ("for dim in self.dims:", "for dim in range(self.mesh.ndim):"),
        ],
        ("distributed/test_clipped_ranks.py",),
        False,
    ),
    (
        "rbwa_fused/saved.py",
        [
            ("self.state, self.pending_clip = loaded.state, None", "self.state = loaded.state"),
            ('self.__dict__.pop("pending_clip", None)', "pass"),
        ],
        CLIPPED,
        False,
    ),
    (
        "triton_kernels/norm.py",
        [
            (
                "tl.reshape(lanes, (2, WIDTH >> (halving + 1))), axis=0)",
                "tl.reshape(lanes, (WIDTH >> (halving + 1), 2)), axis=1)",
            ),
            ("chunk * BLOCK + row * WIDTH", "chunk * BLOCK"),
        ],
        ("update/test_triton.py",),
        False,
    ),
    (
        "triton_kernels/update.py",
        [("s = s * tl.load(clip).to(s.dtype)", "s = s * 1.0")],
        ("update/test_triton.py",),
        False,
    ),
]
