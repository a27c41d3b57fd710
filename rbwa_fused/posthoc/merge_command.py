"""Merges checkpoints into their weighted mean.

    python -m rbwa_fused.merge A.pt B.pt C.pt --out mean.safetensors
    python -m rbwa_fused.merge --latest 5 FOLDER --decay sqrt --out mean.safetensors

Files are of safetensors or torch.save; equal weights imitate a learning rate that decays linearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rbwa_fused.command import Parser
from rbwa_fused.posthoc.checkpoints import latest, opened
from rbwa_fused.posthoc.merging import DECAYS, merge_files
from rbwa_fused.posthoc.report import bar

NAME = "python -m rbwa_fused.merge"


def parser() -> Parser:
    made = Parser(prog=NAME, description=(__doc__ or "").split("\n")[0])
    made.add_argument("files", nargs="*", type=Path, help="checkpoints, in the order of the steps")
    made.add_argument(
        "--latest",
        nargs=2,
        metavar=("K", "FOLDER"),
        help="instead: the last K of a folder, by the numbers in their names",
    )
    made.add_argument("--weights", nargs="+", type=float, metavar="W", help="of the files")
    made.add_argument(
        "--decay", choices=DECAYS, help="that the weights imitate (default: linear, equal weights)"
    )
    made.add_argument("--key", default="", help="of the state dict in torch's files, such as model")
    made.add_argument("--out", type=Path, metavar="FILE", help="written; .safetensors or torch's")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Merges, and prints the weight of each file."""
    told = parser()
    args = told.parse_args(argv)
    if bool(args.files) == (args.latest is not None):
        told.error("expected checkpoints or --latest K FOLDER, one of the two")
    if args.out is None:
        told.error("no --out FILE was given")
    if args.weights and args.decay:
        told.error("expected --weights or --decay, one of the two")
    try:
        files = args.files
        if args.latest is not None:
            count, folder = args.latest
            if not (count.isdigit() and int(count) > 0):
                told.error(f"Invalid --latest: {count!r} (expected an integer of at least 1)")
            files = latest(Path(folder), int(count), args.out)
        total = sum(kind.elements for kind in opened(files[0], args.key).kinds.values())
        with bar(total * len(files)) as done:
            weights = merge_files(
                files,
                args.out,
                weights=args.weights,
                decay=args.decay or "linear",
                key=args.key,
                done=done,
            )
    except ValueError as error:
        told.error(str(error))
    for file, weight in zip(files, weights, strict=True):
        print(f"{weight:.6f}  {file}")
