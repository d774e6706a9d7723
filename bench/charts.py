"""Pictures for the page of :mod:`report`. Each function writes one file and returns its path."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from records import Record, bandwidth, mini_batch, speedup
from stamp import slug
from tuning import diverged, of_method, sweep_cost

from fastals.cli.plots import new_figure, running_mean

LINES = ("-", ":")  # line style of the first ten methods, and of the next ten; dashes mark the charged sweep
ARITHMETIC = "from forward passes alone"


def bars(title: str, cases: list[Record], out: Path) -> Path:
    """Speed-ups with their spread, beside the ratio of forward passes."""
    figure, axes = new_figure(height=1 + 0.45 * len(cases))
    for i, case in enumerate(reversed(cases)):
        info, (median, low, high) = case["extra_info"], speedup(case)
        axes.barh(i, median, xerr=[[median - low], [high - median]], color="C0", alpha=0.7, capsize=3)
        if "by_forwards" in info:
            axes.plot([info["by_forwards"]] * 2, [i - 0.4, i + 0.4], color="C3", label=ARITHMETIC)
    axes.set_yticks(range(len(cases)), [label(c) for c in reversed(cases)])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="speed-up: median, lowest and highest", title=title, ylim=(-0.6, len(cases) - 0.4))
    return _saved(figure, axes, out / f"speedup_{slug(title)}.png")


def depth(title: str, cases: list[Record], out: Path) -> Path:
    """Speed-up over the number of blocks, beside the ratio of forward passes."""
    figure, axes = new_figure()
    names = [f"{family(c)}\n{mini_batch(c)}" for c in cases]
    for i, name in enumerate(dict.fromkeys(names)):
        infos = [c["extra_info"] for c, case_name in zip(cases, names, strict=True) if case_name == name]
        infos.sort(key=lambda info: info["depth"])
        medians, lows, highs = zip(*((info["speedup"], *info["spread"]) for info in infos), strict=True)
        errors = [
            [m - x for m, x in zip(medians, lows, strict=True)],
            [x - m for m, x in zip(medians, highs, strict=True)],
        ]
        depths = [info["depth"] for info in infos]
        axes.errorbar(depths, medians, yerr=errors, color=f"C{i}", fmt="none", capsize=3)
        axes.plot(depths, medians, color=f"C{i}", marker="o", label=name)  # by itself: a legend lists error bars last
        counted = [(info["depth"], info["by_forwards"]) for info in infos if "by_forwards" in info]
        axes.plot(*zip(*counted, strict=True), color=f"C{i}", marker="_", linestyle="--", label=f"{name}\n{ARITHMETIC}")
    axes.set(xlabel="blocks", ylabel="speed-up", title=title)
    return _saved(figure, axes, out / f"{slug(title)}.png")


def roof(title: str, cases: list[Record], out: Path) -> Path:
    """Bandwidth of every kernel over the copy bandwidth of the same run."""
    points = [(f"{label(c)} {name}", k) for c in cases for name, k in c["extra_info"]["kernels"].items()]
    figure, axes = new_figure(height=1 + 0.3 * len(points))
    for i, (_, k) in enumerate(reversed(points)):
        median, low, high = bandwidth(k)
        axes.barh(i, median, xerr=[[median - low], [high - median]], color="C0", alpha=0.7, capsize=3)
    axes.set_yticks(range(len(points)), [name for name, _ in reversed(points)])
    axes.axvline(1, color="C3", label="measured copy bandwidth")
    axes.set(xlabel="GB/s over the copy bandwidth of the same run", title=title, ylim=(-0.6, len(points) - 0.4))
    return _saved(figure, axes, out / f"{slug(title)}.png")


def losses(title: str, runs: list[Record], best: str, out: Path) -> Path:
    """Running mean of the loss over steps, seconds and forward passes: mean and range of the seeds.

    The axis ends just above the first loss, so that a diverging method does not squeeze the others. It begins at 0
    unless all losses are far from it.
    """
    figure, panels = new_figure(rows=3)
    top = 1.1 * max((r["losses"][0] for r in runs if math.isfinite(r["losses"][0])), default=1)
    lowest = min((x for r in runs for x in r["losses"] if math.isfinite(x)), default=0)
    for panel, key in zip(panels, ("steps", "seconds", "forwards"), strict=True):
        for i, method in enumerate(dict.fromkeys(r["method"] for r in runs)):
            members, wide = of_method(runs, method), method == best or not method.startswith("adamw")
            name = f"{method} (diverged)" if any(map(diverged, members)) else method
            color, (x, y, low, high) = f"C{i % 10}", _curve(members, key)
            panel.plot(x, y, LINES[i // 10 % 2], color=color, label=name, linewidth=2 if wide else 1)
            if wide and len(members) > 1:
                panel.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            if method == best and key != "steps":
                before = statistics.mean(sweep_cost(r, runs, key) - r[key][-1] for r in members)
                panel.plot([before + v for v in x], y, "--", color=color, label=f"{method}, after the other rates")
        panel.set(xlabel={"forwards": "forward passes"}.get(key, key), ylabel="loss, running mean")
        panel.set(ylim=(0 if lowest < top / 2 else 0.9 * lowest, top))
    panels[0].set(title=title, xlim=(0, runs[0]["steps"]))
    return _saved(figure, panels[1], out / f"loss_{slug(title)}.png")


def heat_map(title: str, run: Record, out: Path) -> Path:
    """Step size by unit and step; white if the unit did not move."""
    figure, axes = new_figure()
    sizes = [[math.log10(s) if s > 0 else math.nan for s in row] for row in run["step_sizes"].values()]
    extent = (-0.5, len(run["losses"]) - 0.5, len(sizes) - 0.5, -0.5)
    image = axes.imshow(sizes, aspect="auto", interpolation="nearest", extent=extent)
    figure.colorbar(image, label="log10 of the step size")
    axes.set_yticks(range(len(sizes)), list(run["step_sizes"]))
    axes.set(xlabel="step", title=f"{title}: step size of each unit, {run['method']}, seed {run['seed']}")
    path = out / f"step_sizes_{slug(title)}.png"
    figure.savefig(path, dpi=100)
    return path


def label(case: Record) -> str:
    """Short name of the case: its parameters, or the test if it has none."""
    return full_name(case).partition("[")[2].removesuffix("]") or full_name(case)


def full_name(case: Record) -> str:
    """Name of the case: test and parameters."""
    return case["fullname"].split("::")[-1].removeprefix("test_")


def family(case: Record) -> str:
    """Name of the test and of the reference that its cases are timed against."""
    test = full_name(case).partition("[")[0].replace("_", " ")
    return f"{test}, against {case['extra_info']['against']}"


def _curve(members: list[Record], key: str) -> tuple[list[float], ...]:
    """Positions, mean over the seeds, lowest and highest of the losses, up to the first that is not finite.

    A loss is drawn at the start of its step, because it is measured before the step.
    """
    together = zip(*(running_mean(r["losses"]) for r in members), strict=False)
    points = list(takewhile(lambda values: all(map(math.isfinite, values)), together))
    spent = range(1, len(points)) if key == "steps" else _means(zip(*(r[key] for r in members), strict=False))
    return [0, *spent][: len(points)], _means(points), [*map(min, points)], [*map(max, points)]


def _means(points: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.mean(values) for values in points]


def _saved(figure: Any, axes: Any, path: Path) -> Path:
    """Save with a legend that names each line once, or without one if no line has a name."""
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if named:
        axes.legend(named.values(), named.keys(), fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)
    return path
