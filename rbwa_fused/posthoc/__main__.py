"""Averages of any length out of the snapshots of a run.

    python -m rbwa_fused.posthoc FOLDER --sigma-rel 0.05 0.10 0.15 --out DIR

Without ``--out`` it only says how near the snapshots come to these lengths, which reads no tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rbwa_fused.command import Parser, run
from rbwa_fused.posthoc import report
from rbwa_fused.posthoc.members import members_of
from rbwa_fused.posthoc.synthesis import MOST, files_of, planned, refuse_too_far, written

NAME = "python -m rbwa_fused.posthoc"


def parser() -> Parser:
    made = Parser(prog=NAME, description=(__doc__ or "").split("\n")[0])
    made.add_argument("folder", nargs="?", type=Path, help="of rf.posthoc.Snapshots")
    made.add_argument(
        "--sigma-rel",
        nargs="+",
        type=float,
        default=[],
        metavar="S",
        help="lengths asked for, 0 to 0.2887 of the steps since the averages' start",
    )
    made.add_argument("--gamma", nargs="+", type=float, default=[], metavar="G", help="or powers")
    made.add_argument("--out", type=Path, metavar="DIR", help="folder of the averages, and picture")
    made.add_argument("--step", type=int, help="a snapshot's (default: the last)")
    made.add_argument(
        "--keep", type=int, metavar="K", help="as if only the newest K of each average were there"
    )
    made.add_argument(
        "--most",
        type=float,
        default=MOST,
        help=f"largest residual, and error by rounding, to write (default: {MOST})",
    )
    made.add_argument("--picture", type=Path, help="of the profiles (default: DIR/profiles.png)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and with --out writes the averages first."""
    told = parser()
    args = told.parse_args(argv)
    if args.folder is None:
        told.error("no FOLDER of snapshots was given")
    if not (args.sigma_rel or args.gamma):
        told.error("no length was given (expected --sigma-rel or --gamma)")
    if args.keep is not None and args.keep < 1:
        told.error(f"Invalid --keep: {args.keep} (expected at least 1)")
    try:
        members = members_of(args.folder, args.step, args.keep)
        plans = [planned(members, sigma_rel=value) for value in args.sigma_rel]
        plans += [planned(members, gamma=value) for value in args.gamma]
        if args.out is not None:
            refuse_too_far(plans, args.most)
            files = files_of(plans, args.out)
        picture = args.picture or (None if args.out is None else args.out / "profiles.png")
        report.refuse_picture(picture)
    except ValueError as error:
        told.error(str(error))
    size = sum(s.reader.file.stat().st_size for row in members.ranks for s in row)
    print(
        f"step {members.step}, {len(members.ranks)} snapshots, "
        f"{len(members.ranks[0])} ranks, {size / 1e6:,.1f} MB"
    )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        with report.bar(members.elements) as done:
            plans = written(members, plans, files, done)
    print(report.table(plans))
    if picture is None:
        return
    if find_spec("matplotlib") is None:
        print(f"{NAME}: no {picture}: matplotlib is not installed", file=sys.stderr)
        return
    report.draw(plans, picture)


if __name__ == "__main__":
    sys.exit(run(NAME, main))
