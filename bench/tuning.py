"""Table rows of convergence runs at equal steps and at equal work, with the cost of tuning counted.

AdamW's best rate is known only after all rates have been tried. Its row therefore appears twice: with the cost of its
runs, and charged with the runs of every rate. Rates outside the plan of the task are neither charged nor the best.
"""

import math
import statistics
from collections.abc import Sequence

from methods import EQUAL_WORK, GRADIENT, adamw, rates
from records import MEASURES, Record

Table = list[list[str]]  # the first row is the head


def at_equal_steps(runs: Sequence[Record]) -> Table:
    """A row per method, and AdamW's best rate charged with its sweep."""
    names = [m for m in _methods(runs) if not m.endswith(EQUAL_WORK) and not _outside(m, runs)]
    head = [
        "method",
        *figure_names(runs),
        "seconds",
        "forward passes",
        "trials a step",
        "steps that raised the loss",
        "seeds",
    ]
    table = [head, *(_row(m, of_method(runs, m), runs) for m in names)]
    best = best_rate(runs)
    if best:
        name = f"{best}, best of {len(_rates(runs))} rates, charged with all"
        table.append(_row(name, [_charged(r, runs) for r in of_method(runs, best)], runs))
    return table


def at_equal_work(runs: Sequence[Record]) -> Table:
    """ALS at equal work, then the methods that make no more forward passes than AdamW; else only the head."""
    ours = [m for m in _methods(runs) if m.endswith(EQUAL_WORK)]
    others = [m for m in _methods(runs) if m not in ours and not _outside(m, runs) and _frugal(of_method(runs, m))]
    table = [["method", "steps", "forward passes", *figure_names(runs), "seconds", "seeds"]]
    for name in [*ours, *others] if ours else []:
        members = of_method(runs, name)
        steps, forwards, seconds = (
            spread([f(r) for r in members], 0)
            for f in (lambda r: len(r["losses"]), lambda r: r["forwards"][-1], lambda r: r["seconds"][-1])
        )
        table.append([name, steps, forwards, *figures(members, runs), seconds, str(len(members))])
    return table


def best_rate(runs: Sequence[Record]) -> str:
    """The AdamW rate of best mean :func:`merit`, by hindsight; empty if there are fewer than two rates.

    Rates that lack a seed of the others or diverged on one do not count.
    """
    members = {m: of_method(runs, m) for m in _rates(runs)}
    most = max((len(rs) for rs in members.values()), default=0)
    complete = {m: rs for m, rs in members.items() if len(rs) == most and not any(map(diverged, rs))}
    means = {m: statistics.mean(map(merit, rs)) for m, rs in complete.items()}
    return max(means, key=lambda m: means[m]) if len(members) > 1 and means else ""


def merit(run: Record) -> float:
    """Held-out perplexity with its sign turned, or accuracy; higher is better."""
    return -run["perplexity"] if "perplexity" in run else run["accuracy"]


def sweep_cost(run: Record, runs: Sequence[Record], key: str) -> float:
    """Seconds or forward passes of all AdamW rates on the run's seed."""
    return sum(r[key][-1] for m in _rates(runs) for r in of_method(runs, m) if r["seed"] == run["seed"])


def of_method(runs: Sequence[Record], method: str) -> list[Record]:
    """The runs of one method."""
    return [r for r in runs if r["method"] == method]


def diverged(run: Record) -> bool:
    """Whether the run ended in a loss that is not finite, most often before its last step."""
    return not math.isfinite(run["loss"])


def figure_names(runs: Sequence[Record]) -> list[str]:
    """Heads of the columns of :func:`figures`: the held-out figures that any of the runs has."""
    return ["training loss", *(name for key, name in MEASURES.items() if any(key in r for r in runs))]


def figures(members: Sequence[Record], runs: Sequence[Record]) -> list[str]:
    """Training loss and held-out figures of some of the runs: mean and spread of the seeds."""
    held_out = [key for key in MEASURES if any(key in r for r in runs)]
    return [_loss(members), *(spread([r[key] for r in members if key in r], 3) for key in held_out)]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, lowest and highest; a dash where none were measured."""
    if not values or any(map(math.isnan, values)):
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ({min(values):.{digits}f} - {max(values):.{digits}f})" if len(values) > 1 else mean


def _methods(runs: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r["method"] for r in runs))


def _rates(runs: Sequence[Record]) -> list[str]:
    """AdamW's rates of the task's plan, at the usual number of steps."""
    return [m for m in _methods(runs) if m in map(adamw, rates(runs[0]["task"]))]


def _outside(method: str, runs: Sequence[Record]) -> bool:
    """Whether it is a rate of AdamW outside the plan; the names of longer runs end in ``4x steps``."""
    return method.startswith("adamw") and not method.endswith("x steps") and method not in _rates(runs)


def _frugal(runs: Sequence[Record]) -> bool:
    """Whether the runs make at most the forward passes of AdamW, but for a tenth."""
    return all(r["forwards"][-1] <= 1.1 * GRADIENT * r["steps"] for r in runs)


def _charged(run: Record, runs: Sequence[Record]) -> Record:
    return run | {key: [sweep_cost(run, runs, key)] for key in ("seconds", "forwards")}


def _row(name: str, members: Sequence[Record], runs: Sequence[Record]) -> list[str]:
    searched = [r for r in members if "trials" in r]  # a run that diverged at its first step has none
    trials = f"{statistics.mean(r['trials'] for r in searched):.1f}" if searched else "-"
    rises = str(sum(r["rises"] for r in searched)) if searched else "-"
    costs = [spread([r[key][-1] for r in members], 0) for key in ("seconds", "forwards")]
    return [name, *figures(members, runs), *costs, trials, rises, str(len(members))]


def _loss(runs: Sequence[Record]) -> str:
    """Mean and spread of the seeds, or how many diverged: a mean of the others would flatter."""
    lost = sum(map(diverged, runs))
    return f"diverged ({lost} of {len(runs)})" if lost else spread([r["loss"] for r in runs], 3)
