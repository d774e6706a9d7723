"""The methods of the convergence runs and the order in which their runs are made."""

import argparse
import json
from itertools import product
from typing import Any, NamedTuple


class Method(NamedTuple):
    """A rival, its arguments, its steps as a multiple of ``--steps``, and whether a scheduler may anneal it."""

    rival: str
    options: dict[str, Any]
    times: float = 1.0
    anneals: bool = True


class Run(NamedTuple):
    """A run to be made; ``method`` is the name of the method."""

    steps: int
    seed: int
    regime: str
    task: str
    method: str
    how: Method


GRADIENT = 3  # forward passes of a step without a search: a forward, and a backward as two
TELLING = 9  # methods of a task that are run first
COST = 5.2  # forward passes of a step of ALS with its defaults, about; results hold the true count
EQUAL_WORK, CONSTANT = ", equal work", ", constant lr"  # endings of the names of such runs
ADAMW_RATES, SHARES = (1e-4, 3e-4, 3e-5, 1e-3, 1e-5), (3e-3, 0.2, 1.5e-3, 6e-3)  # the likeliest first
LORA_RATES, LORA_SHARES = (1e-3, 3e-4, 3e-3, 1e-4, 1e-2), (3e-2, 0.2, 1e-2, 0.1)  # small matrices want longer steps


def rates(task: str) -> tuple[float, ...]:
    """AdamW's rates that are tried on the task."""
    return LORA_RATES if task == "dialogues-lora" else ADAMW_RATES


def shares(task: str) -> tuple[float, ...]:
    """Relative sizes of the steps without a search; the second is the cap of ALS by default."""
    return LORA_SHARES if task == "dialogues-lora" else SHARES


def adamw(rate: float) -> str:
    """Name of the method."""
    return f"adamw {rate:g}"


def capped(share: float) -> str:
    """Name of the method."""
    return f"capped {share:g}"


def equal_work(options: dict[str, Any]) -> Method:
    """ALS for as many steps as take about the forward passes of AdamW."""
    return Method("als", options, GRADIENT / COST)


METHODS = {
    "als": Method("als", {}),
    "als" + EQUAL_WORK: equal_work({}),
    "als" + CONSTANT: Method("als", {}, anneals=False),
    "als averaged" + CONSTANT: Method("averaged", {"decay": 0.9}, anneals=False),
    "als sweep": Method("als", {"schedule": "sweep"}),
    "als joint": Method("als", {"schedule": "joint"}),
    **{adamw(rate): Method("adamw", {"lr": rate}) for rate in (*ADAMW_RATES, *LORA_RATES)},
    **{capped(share): Method("capped", {"trust": share}) for share in (*SHARES, *LORA_SHARES)},
    "salsa": Method("salsa", {}),
    "prodigy": Method("prodigy", {}),
    "schedule-free": Method("schedule-free", {}),
    "schedule-free 3e-4": Method("schedule-free", {"lr": 3e-4}),
    "eager": Method("eager", {}),
}


def methods(task: str) -> list[str]:
    """The methods of a task unless others are asked for, the most telling first, in case the runs are cut short."""
    first, second, *other_rates = map(adamw, rates(task))
    likeliest, cap, *other_shares = map(capped, shares(task))
    return [
        "als", first, second, likeliest, cap, *other_shares, "als" + EQUAL_WORK, *other_rates, "als sweep", "salsa",
        "prodigy", "schedule-free", "schedule-free 3e-4", "als joint", "als" + CONSTANT,
        "als averaged" + CONSTANT, "eager",
    ]  # fmt: skip


def planned(arguments: argparse.Namespace) -> list[Run]:
    """Runs in order: of each length all seeds of the most telling methods first, then those of the others.

    The eager baseline takes the steps of ALS up to rounding and runs once per task, for its time.
    """
    further = {f"als {json.dumps(o)}": Method("als", o) for o in arguments.als}
    if arguments.equal_work:
        further |= {name + EQUAL_WORK: equal_work(method.options) for name, method in further.items()}
    known = METHODS | further
    columns = [[*(methods(t) if arguments.methods is None else arguments.methods), *further] for t in arguments.tasks]
    return [
        Run(steps, seed, regime, task, row[column], known[row[column]])
        for steps, telling in product(arguments.steps, (True, False))
        for seed, regime in product(range(arguments.seeds), arguments.regimes)
        for i, row in enumerate(zip(*columns, strict=True))
        for column, task in enumerate(arguments.tasks)
        if (i < TELLING) == telling and (row[column] != "eager" or (seed, regime) == (0, "full"))
    ]
