"""From the command line to table and pictures; __main__.py is its front door."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from studies.digits import durable
from studies.papers import cli, curves, flatness_report, report, rows, sweep
from studies.papers.datasets import DataError
from studies.papers.jobs import JobError, data_of, memory_errors_told
from studies.papers.store import Store, StoreError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1: a run or archive fails; 2: bad command; 130: Ctrl-C."""
    command = cli.parse(argv)
    plan, path = command.plan, command.out / "results.json"
    extra = {"directions": plan.directions, "rays": plan.rays} if plan.rays else {}
    store = None
    try:
        store = Store(path, plan.command, plan.settings, command.where.device, **extra)
        check_images(command)
        sweep.run(plan, store, command.where, command.jobs)
        written = leave(command, store)
    except KeyboardInterrupt:
        return interrupted(command, store)
    except StoreError as error:
        command.parser.error(str(error))
    except (DataError, JobError) as error:
        print(f"{command.parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {', '.join(written)}")
    return 0


def check_images(command: cli.Command) -> None:
    """Before hours of training: are the archives there, and larger than a batch?"""
    images = {}
    for setting in command.plan.settings:
        if setting.data not in images:
            with memory_errors_told(setting, command.where):
                data = data_of(setting, "final", command.where)
            images[setting.data] = len(data.train.labels)
    cli.check_batch_sizes(command, images)


def leave(command: cli.Command, store: Store) -> list[str]:
    """Prints the table and writes the files beside results.json."""
    plan, out = command.plan, command.out
    if plan.command == "flatness":
        text = flatness_report.markdown(plan, store)
        files = {"table.csv": flatness_report.as_csv(plan, store)}
        picture, image = "flatness.png", flatness_report.draw(plan, store)
    else:
        found = rows.rows(plan, store)
        text = report.markdown(plan, store, found)
        files = {"table.csv": report.as_csv(plan, found)}
        picture, image = "curves.png", curves.draw(plan, store)
    for name, content in {"table.md": text, **files}.items():
        durable.write(out / name, content.encode())
    durable.write(out / picture, image)
    print(text)
    return [str(out / name) for name in ("results.json", "table.md", *files, picture)]


def interrupted(command: cli.Command, store: Store | None) -> int:
    """What Ctrl-C leaves."""
    if store is None:
        print(f"{command.parser.prog}: interrupted: nothing started", file=sys.stderr)
        return 130
    kept = "nothing written"
    if store.records:
        try:
            store.save()  # Ctrl-C may have come while a finished run was being written
            kept = f"kept in {store.path}"
        except OSError as error:
            kept = f"the last not written ({error})"
    print(
        f"{command.parser.prog}: interrupted: {sweep.progress(command.plan, store)} runs finished, "
        f"{kept}; the same command goes on from there",
        file=sys.stderr,
    )
    return 130
