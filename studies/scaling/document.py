"""The tables of README.md that are computed, each under its name, and the document around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from studies.scaling import answers, simulated, tables

TABLES: dict[str, Callable[[], str]] = {
    "answers": answers.answers,
    "assumptions": answers.assumptions,
    "bytes": tables.bytes_a_parameter,
    "step": tables.step_and_average,
    "collectives": tables.collectives,
    "room": tables.room,
    "buffer": tables.buffer,
    **{
        f"times-{model}-{tokens}": partial(tables.times, model, tokens)
        for model, t in tables.MODELS.items()
        for tokens in (t.tokens, tables.FEW_TOKENS)
    },
    "parts": tables.parts,
    "hidden": tables.hidden,
    "periods": tables.periods,
    "evaluation": tables.evaluation,
    "simulations": simulated.simulations,
}


def marked(texts: dict[str, str]) -> str:
    """Tables as the document has them."""
    return "\n\n".join(f"<!-- {name} -->\n{text}" for name, text in texts.items())


def updated(document: str, texts: dict[str, str]) -> str:
    """The document with these tables behind their names.

    Raises:
        ValueError: for a table that the document does not name.
    """
    for name, text in texts.items():
        before, mark, after = document.partition(f"<!-- {name} -->\n")
        if not mark:
            raise ValueError(f"no table {name} in the document")
        rest = after if after.startswith("\n") else after[len(quoted(document, name)) + 1 :]
        document = f"{before}{mark}{text}\n{rest}"
    return document


def quoted(document: str, name: str) -> str:
    """What stands in a document behind a table's name, up to an empty line."""
    after = document.split(f"<!-- {name} -->\n", 1)[1]
    return "" if after.startswith("\n") else after.partition("\n\n")[0].rstrip("\n")
