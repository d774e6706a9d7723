"""Table rows of convergence runs, with the cost of tuning counted.

AdamW's best rate is known only after all rates have been tried. Its row therefore appears twice: with the cost of its
runs, and charged with the runs of every rate.
"""

import math
import statistics
from collections.abc import Sequence

from records import Record

COLUMNS = (
    "method", "training loss", "held-out accuracy", "seconds", "forward passes", "trials a step",
    "steps that raised the loss", "seeds",
)  # fmt: skip


def rows(runs: Sequence[Record]) -> list[list[str]]:
    """A row per method, and AdamW's best rate charged with its sweep."""
    table = [_row(m, of_method(runs, m)) for m in dict.fromkeys(r["method"] for r in runs)]
    best = best_rate(runs)
    if best:
        name = f"{best}, best of {len(_rates(runs))} rates, charged with all"
        table.append(_row(name, [_charged(r, runs) for r in of_method(runs, best)]))
    return table


def best_rate(runs: Sequence[Record]) -> str:
    """The AdamW rate of highest mean held-out accuracy, by hindsight; empty if there are fewer than two rates.

    Rates that lack a seed of the others or diverged on one do not count.
    """
    members = {m: of_method(runs, m) for m in _rates(runs)}
    most = max((len(rs) for rs in members.values()), default=0)
    complete = {m: rs for m, rs in members.items() if len(rs) == most and not any(map(diverged, rs))}
    means = {m: statistics.mean(r["accuracy"] for r in rs) for m, rs in complete.items()}
    return max(means, key=lambda m: means[m]) if len(members) > 1 and means else ""


def sweep_cost(run: Record, runs: Sequence[Record], key: str) -> float:
    """Seconds or forward passes of all AdamW rates on the run's seed."""
    return sum(r[key][-1] for m in _rates(runs) for r in of_method(runs, m) if r["seed"] == run["seed"])


def of_method(runs: Sequence[Record], method: str) -> list[Record]:
    """The runs of one method."""
    return [r for r in runs if r["method"] == method]


def diverged(run: Record) -> bool:
    """Whether the run ended in a loss that is not finite, most often before its last step."""
    return not math.isfinite(run["loss"])


def _rates(runs: Sequence[Record]) -> list[str]:
    """AdamW's rates at the usual number of steps; the names of longer runs end in ``4x steps``."""
    methods = dict.fromkeys(r["method"] for r in runs)
    return [m for m in methods if m.startswith("adamw") and not m.endswith("x steps")]


def _charged(run: Record, runs: Sequence[Record]) -> Record:
    return run | {key: [sweep_cost(run, runs, key)] for key in ("seconds", "forwards")}


def _row(name: str, runs: Sequence[Record]) -> list[str]:
    searched = [r for r in runs if "trials" in r]  # a run that diverged at its first step has none
    trials = f"{statistics.mean(r['trials'] for r in searched):.1f}" if searched else "-"
    rises = str(sum(r["rises"] for r in searched)) if searched else "-"
    accuracy = _spread([r["accuracy"] for r in runs], 3)
    costs = [_spread([r[key][-1] for r in runs], 0) for key in ("seconds", "forwards")]
    return [name, _loss(runs), accuracy, *costs, trials, rises, str(len(runs))]


def _loss(runs: Sequence[Record]) -> str:
    """Mean and spread of the seeds, or how many diverged: a mean of the others would flatter."""
    lost = sum(map(diverged, runs))
    return f"diverged ({lost} of {len(runs)})" if lost else _spread([r["loss"] for r in runs], 3)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ({min(values):.{digits}f} - {max(values):.{digits}f})" if len(values) > 1 else mean
