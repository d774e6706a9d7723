"""Table rows of convergence runs at equal steps and at equal work, with the cost of tuning counted.

AdamW's best rate is known only after all rates have been tried. Its row therefore appears twice: with the cost of its
runs, and charged with the runs of every rate. Rates outside the plan of the task are neither charged nor the best.
"""

import math
import re
import statistics
from collections.abc import Sequence

from methods import EQUAL_WORK, GRADIENT, adamw, rates
from records import MEASURES, Record

Table = list[list[str]]  # the first row is the head
FAMILIES = ("als", "adamw", "capped", "salsa", "als sweep", "schedule-free")  # of the methods in pictures
FAMILY = re.compile(rf"({'|'.join(FAMILIES)})( [\d.e-]+)?( before \w+)?")
KNOWN = adamw(3e-4)  # a rate that is drawn even if it is not the best


def overview(runs: Sequence[Record]) -> list[str]:
    """Held-out perplexity or accuracy of each family: of its default, or of its best rate or share by hindsight."""
    return [_best_figure(family, runs) for family in FAMILIES]


def at_equal_steps(runs: Sequence[Record]) -> Table:
    """A row per method, and AdamW's best rate charged with its sweep."""
    table = [["method", *figure_names(runs), "seconds", "forward passes", "seeds"]]
    table += [_row(m, of_method(runs, m), runs) for m in _at_equal_steps(runs)]
    best = best_rate(runs)
    if best:
        name = f"{best}, best of {len(_rates(runs))} rates, charged with all"
        table.append(_row(name, [_charged(r, runs) for r in of_method(runs, best)], runs))
    return table


def searches(runs: Sequence[Record]) -> Table:
    """Trials and steps that raised the loss of the methods that search; only the head if there are none."""
    table = [["method", "trials a step", "steps that raised the loss", "seeds"]]
    for name in _at_equal_steps(runs):
        searched = [r for r in of_method(runs, name) if "trials" in r]  # none if it diverged at its first step
        if searched:
            trials = f"{statistics.mean(r['trials'] for r in searched):.1f}"
            table.append([name, trials, str(sum(r["rises"] for r in searched)), str(len(searched))])
    return table


def at_equal_work(runs: Sequence[Record]) -> Table:
    """ALS at equal work, then the methods that make no more forward passes than AdamW; else only the head."""
    ours = [m for m in _methods(runs) if m.endswith(EQUAL_WORK)]
    others = [m for m in _at_equal_steps(runs) if _frugal(of_method(runs, m))]
    table = [["method", "forward passes", *figure_names(runs), "seconds", "seeds"]]
    for name in [*ours, *others] if ours else []:
        members = of_method(runs, name)
        steps = sorted({len(r["losses"]) for r in members})
        forwards = f"{_cost(members, 'forwards')} in {' or '.join(map(str, steps))} steps"
        table.append([name, forwards, *figures(members, runs), _cost(members, "seconds"), str(len(members))])
    return table


def drawn(runs: Sequence[Record]) -> list[str]:
    """Methods of the pictures: of each family the default or the best, and AdamW at 3e-4; all if there are none."""
    chosen = [name for family in FAMILIES for name in [_chosen(family, runs), *_known(family, runs)] if name]
    return list(dict.fromkeys(chosen)) or _at_equal_steps(runs)


def family_of(method: str) -> str:
    """The family in the pictures; empty if it is in none."""
    found = FAMILY.fullmatch(method)
    return found[1] if found else ""


def best_rate(runs: Sequence[Record]) -> str:
    """The AdamW rate of best mean :func:`merit`, by hindsight; empty if there are fewer than two rates.

    Rates that lack a seed of the others or diverged on one do not count.
    """
    members = {m: of_method(runs, m) for m in _rates(runs)}
    most = max(map(len, members.values()), default=0)
    return _best([m for m, rs in members.items() if len(rs) == most], runs) if len(members) > 1 else ""


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
    mean, low, high = (f"{f(values):.{digits}f}" for f in (statistics.mean, min, max))
    return mean if low == high else f"{mean} ({low} - {high})"


def _methods(runs: Sequence[Record]) -> list[str]:
    """The methods: ALS with its defaults, its variants, AdamW's rates, and the others."""
    order = ("als", "adamw", "")
    names = dict.fromkeys(r["method"] for r in runs)
    return sorted(names, key=lambda m: (m != "als", next(i for i, start in enumerate(order) if m.startswith(start))))


def _at_equal_steps(runs: Sequence[Record]) -> list[str]:
    return [m for m in _methods(runs) if not m.endswith(EQUAL_WORK) and not _outside(m, runs)]


def _best(methods: Sequence[str], runs: Sequence[Record]) -> str:
    """The method of best mean merit among those that diverged on no seed; empty if there is none."""
    members = {m: of_method(runs, m) for m in methods}
    means = {m: statistics.mean(map(merit, rs)) for m, rs in members.items() if not any(map(diverged, rs))}
    return max(means, key=lambda m: means[m]) if means else ""


def _chosen(family: str, runs: Sequence[Record]) -> str:
    """The default of the family, or its best rate or share; of an older version only if there is no newer one."""
    members = [m for m in _at_equal_steps(runs) if family_of(m) == family]
    newest = [m for m in members if " before " not in m] or members
    if not newest:
        return ""
    if family.startswith("als"):
        return newest[-1]
    best = best_rate(runs) if family == "adamw" else _best(newest, runs)
    return best or newest[0]


def _known(family: str, runs: Sequence[Record]) -> list[str]:
    return [KNOWN] if family == "adamw" and KNOWN in _rates(runs) else []


def _best_figure(family: str, runs: Sequence[Record]) -> str:
    name = _chosen(family, runs)
    members = of_method(runs, name)
    if not members:
        return "-"
    figure = "perplexity" if "perplexity" in members[0] else "accuracy"
    text = "diverged" if any(map(diverged, members)) else spread([r[figure] for r in members], 3)
    chosen = name.removeprefix(family).strip()
    return f"{text}, {chosen}" if chosen else text


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
    costs = [_cost(members, key) for key in ("seconds", "forwards")]
    return [name, *figures(members, runs), *costs, str(len(members))]


def _cost(members: Sequence[Record], key: str) -> str:
    return spread([r[key][-1] for r in members], 0)


def _loss(runs: Sequence[Record]) -> str:
    """Mean and spread of the seeds, or how many diverged: a mean of the others would flatter."""
    lost = sum(map(diverged, runs))
    return f"diverged ({lost} of {len(runs)})" if lost else spread([r["loss"] for r in runs], 3)
