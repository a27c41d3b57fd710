"""Whole training runs, drawn at random, on the optimizer and on an independent float64 model.

A failing case is printed as code, event by event, and with a line `@reproduce_failure(...)`: put
that line above `@settings` below and run the test that failed, with the same hypothesis. A case
found on this machine also stays in .hypothesis/ and is tried first the next time.
`RBWA_PROFILE=long` draws five times as many cases.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from program import DTYPES, EVENTS, LAYOUTS, Case, Step
from rules import ALGORITHMS
from strategies import cases
from training import Training

TIMES = 5 if os.environ.get("RBWA_PROFILE") == "long" else 1

Tried = Counter[str]


def explore(backend: str, examples: int, *, device: bool = False) -> Tried:
    """Runs cases; returns how many of them tried what. They are new ones each time."""
    tried: Tried = Counter()

    # All is named: a CI machine's defaults, and those of torch's test helpers, are the same cases
    # each time.
    @settings(
        max_examples=TIMES * examples,
        derandomize=False,
        print_blob=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(device))
    def run(case: Case) -> None:
        tried.update({"case", *Training(case, backend).tried})

    run()
    assert tried["step"] > tried["case"] // 2, "most cases take no step"
    return tried


KINDS = [
    *(event.__name__ for event in EVENTS),
    *(f"{layout} memory" for layout in (*LAYOUTS, "shared")),
    *(f"gradients {layout}" for layout in (*LAYOUTS, "like", "expanded")),
    *map(str, DTYPES),
    *(f"rule {rule}" for rule in ALGORITHMS),
    "no gradient",
    "overflow",
    "unscaled",
    "unscaled already",
    "some gradients missing",
    "all gradients",
    "masters",
    "in the backward pass",
    "40 tensors",
    "two threads",
    "refused momentum",
    "refused step in eval mode",
    *(f"{event.__name__} in eval mode" for event in EVENTS if event is not Step),
    "training weights again",
    "an average beside x",
    "average Mean",
    "average Ema",
    "average Algorithm2",
    "average Ramped",
    "average PowerEma",
    "average Cosine",
    "average Table",
    "average function",
    "average starts at the first_sample",
    "average starts at the current",
    "average starts at the now",
    "average written back never",
    "average written back at every step",
    "average written back at each sample",
    "average written back rarely",
    "average of a dtype of its own",
]


def test_any_run_takes_the_steps_and_averages_of_an_independent_model() -> None:
    explore("auto", 400)


def test_the_reference_does_so_too() -> None:
    explore("reference", 60)


def test_kernels_that_count_on_the_device_do_so_too(emulated_cuda: Any) -> None:
    explore("cuda", 60, device=True)


def test_every_event_rule_dtype_layout_and_average_is_tried() -> None:
    """Hypothesis comes to some kinds in clumps, so it goes on until it has come to all."""
    tried: Tried = Counter()
    for _ in range(10):
        tried += explore("auto", 150)
        if all(tried[kind] > 0 for kind in KINDS):
            return
    assert [kind for kind in KINDS if tried[kind] == 0] == []
