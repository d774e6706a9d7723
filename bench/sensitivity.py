"""How much a method loses if its one number is ten times too large or a third: ``trust`` of ALS, the rate of AdamW."""

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from methods import CONSTANT, EQUAL_WORK
from records import Record
from tuning import Table, best_rate, figure_names, figures, of_method

FACTORS = {"a third": (0.28, 0.4), "1": (0.99, 1.01), "10": (9.0, 11.0)}  # name: lowest and highest ratio


class Row(NamedTuple):
    """The runs of a method with its number at a value that is the factor times its default or best one."""

    method: str
    value: str
    factor: str
    runs: list[Record]


def table(runs: Sequence[Record]) -> Table:
    """A row per method and factor, of the seeds that all of these have; only the head if no factor but 1 was run."""
    rows = [*_of_als(runs), *_of_adamw(runs)]
    head = ["method", "value", "times its default or best", *figure_names(runs), "seeds"]
    if all(row.factor == "1" for row in rows):
        return [head]
    seeds = set.intersection(*({r["seed"] for r in row.runs} for row in rows))
    return [head, *([*row[:3], *_figures(row, seeds, runs), str(len(seeds))] for row in rows if seeds)]


def _figures(row: Row, seeds: set[int], runs: Sequence[Record]) -> list[str]:
    return figures([r for r in row.runs if r["seed"] in seeds], runs)


def _of_als(runs: Sequence[Record]) -> Iterator[Row]:
    """The rows of each set of other arguments whose cap was varied."""
    searches = [
        r
        for r in runs
        if r["method"].startswith("als") and not r["method"].endswith((EQUAL_WORK, CONSTANT)) and r.get("trust")
    ]
    for others in dict.fromkeys(map(_others, searches)):
        family = [r for r in searches if _others(r) == others]
        default = [r for r in family if "trust" not in r["options"]]
        if default:
            yield from _rows(default[0]["method"], family, "trust", default[0]["trust"])


def _of_adamw(runs: Sequence[Record]) -> Iterator[Row]:
    """The same of AdamW's rates."""
    tried = [r | r["options"] for r in runs if r["method"].startswith("adamw") and not r["method"].endswith("x steps")]
    best = of_method(tried, best_rate(runs))
    if best and all("lr" in r for r in tried):
        yield from _rows("adamw", tried, "lr", best[0]["lr"])


def _rows(name: str, family: Sequence[Record], key: str, base: float) -> Iterator[Row]:
    for factor, (low, high) in FACTORS.items():
        within = [r for r in family if low <= r[key] / base <= high]
        if within:
            yield Row(name, f"{within[0][key]:.3g}", factor, of_method(within, within[0]["method"]))


def _others(run: Record) -> tuple[str, str]:
    """The arguments of the method but for the cap, and the commit that a stored run is of before, if it is."""
    others = json.dumps({k: v for k, v in run["options"].items() if k != "trust"}, sort_keys=True)
    return others, run["method"].partition(" before ")[2]
