"""Pictures for the page of :mod:`report`. Each function writes one file and returns its path."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from records import Record, bandwidth, mini_batch, speedup
from stamp import slug
from tuning import FAMILIES, diverged, family_of, of_method

from fastals.cli.plots import (
    COLORS,
    STYLES,
    begin_at_zero,
    draw_factors,
    label_units,
    legend_below,
    marks,
    new_figure,
    running_mean,
    wrapped,
)

ARITHMETIC = "from forward passes alone"
BAR, MARK = COLORS[:2]


def bars(title: str, cases: list[Record], out: Path) -> Path:
    """Speed-ups with their spread, beside the ratio of forward passes."""
    figure, axes = new_figure(height=1 + 0.3 * len(cases))
    _bars(axes, [label(c) for c in cases], map(speedup, cases))
    for i, case in enumerate(reversed(cases)):
        if "by_forwards" in case["extra_info"]:
            x = case["extra_info"]["by_forwards"]
            axes.plot([x] * 2, [i - 0.4, i + 0.4], color=MARK, linestyle="-", marker="", linewidth=2, label=ARITHMETIC)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="speed-up", title=wrapped(title))
    return _saved(figure, [axes], out / f"speedup_{slug(title)}.png")


def depth(title: str, cases: list[Record], out: Path) -> Path:
    """Speed-up over the number of blocks, beside the ratio of forward passes."""
    figure, axes = new_figure()
    names = [f"{family(c)}\n{mini_batch(c)}" for c in cases]
    for name, style in zip(dict.fromkeys(names), STYLES, strict=False):
        infos = [c["extra_info"] for c, case_name in zip(cases, names, strict=True) if case_name == name]
        infos.sort(key=lambda info: info["depth"])
        medians, lows, highs = zip(*((info["speedup"], *info["spread"]) for info in infos), strict=True)
        depths, errors = [info["depth"] for info in infos], _errors(medians, lows, highs)
        axes.errorbar(depths, medians, yerr=errors, color=style["color"], fmt="none", capsize=3)
        axes.plot(depths, medians, **style, label=name)  # by itself: a legend lists error bars last
        counted = [(info["depth"], info["by_forwards"]) for info in infos if "by_forwards" in info]
        if counted:
            dashed = {"color": style["color"], "marker": "_", "linestyle": "--"}
            axes.plot(*zip(*counted, strict=True), **dashed, label=f"{name}\n{ARITHMETIC}")
    axes.set_xticks(sorted({c["extra_info"]["depth"] for c in cases}))
    axes.set(xlabel="blocks", ylabel="speed-up", title=wrapped(title))
    return _saved(figure, [axes], out / f"{slug(title)}.png")


def roof(title: str, cases: list[Record], out: Path) -> Path:
    """Bandwidth of every kernel over the copy bandwidth of the same run."""
    kernels = [c["extra_info"]["kernels"] for c in cases]
    figure, _ = new_figure(len(cases), [0.8 + 0.25 * len(k) for k in kernels])
    panels = list(figure.axes)
    for panel, case, measured in zip(panels, cases, kernels, strict=True):
        _bars(panel, list(measured), map(bandwidth, measured.values()))
        panel.axvline(1, color=MARK, label="copy")
        panel.set_title(wrapped(label(case)), fontsize="medium")
        panel.sharex(panels[0])
        panel.label_outer()
    panels[-1].set_xlabel("bandwidth over that of a copy")
    return _saved(figure, panels, out / f"{slug(title)}.png")


def losses(title: str, runs: list[Record], best: str, out: Path) -> Path:
    """Running mean of the loss over steps, seconds if there are any, and forward passes: mean and range of the seeds.

    The axis ends just above the first loss, so that a diverging method does not squeeze the others. It begins at 0
    unless all that is drawn is far from it.
    """
    keys = [k for k in ("steps", "seconds", "forwards") if k != "seconds" or timed(runs)]
    figure, panels = new_figure(rows=len(keys), height=2.7)
    top = 1.1 * max((r["losses"][0] for r in runs if math.isfinite(r["losses"][0])), default=1)
    methods = styles(dict.fromkeys(r["method"] for r in runs), best)
    lowest = min((x for m in methods for x in _curve(of_method(runs, m), "steps")[2]), default=0)
    for panel, key in zip(panels, keys, strict=True):
        for i, (method, style) in enumerate(methods.items()):
            members, wide = of_method(runs, method), method == best or family_of(method) == "als"
            name = f"{method} (diverged)" if any(map(diverged, members)) else method
            x, y, low, high = _curve(members, key)
            panel.plot(x, y, **style, label=name, linewidth=2.2 if wide else 1.2, markevery=marks(i, y), zorder=3)
            if len(members) > 1:
                panel.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        panel.set(xlabel={"forwards": "forward passes"}.get(key, key), ylabel="training loss", ylim=(0.9 * lowest, top))
        begin_at_zero(panel, [lowest, top])
    panels[0].set(title=wrapped(title), xlim=(0, runs[0]["steps"]))
    return _saved(figure, panels[:1], out / f"loss_{slug(title)}.png")


def styles(methods: Iterable[str], best: str) -> dict[str, dict[str, str]]:
    """A style of its own for each method, in the colour of its family; the best rate of a family has the whole line."""
    free, chosen = list(STYLES), {}
    for method in sorted(methods, key=lambda m: (m != best, not family_of(m))):
        color = COLORS[FAMILIES.index(family_of(method))] if family_of(method) else COLORS[-1]
        free = free or list(STYLES)
        chosen[method] = next((style for style in free if style["color"] == color), free[0])
        free.remove(chosen[method])
    return {method: chosen[method] for method in methods}


def timed(runs: Iterable[Record]) -> bool:
    """Whether any of the runs has seconds: those that shared a device have none."""
    return any(math.isfinite(second) for r in runs for second in r["seconds"])


def heat_map(title: str, run: Record, out: Path) -> Path:
    """Step size by unit and step, the top of the model at the top, and the common factor of the joint tests below.

    White if the unit did not move. The scale leaves out the smallest fiftieth, with which a schedule ends.
    """
    from matplotlib.colors import LogNorm

    factors, units, steps = run.get("factors", []), list(run["step_sizes"]), len(run["losses"])
    figure, _ = new_figure(*((2, (3.4, 1.2)) if factors else (1, 3.6)))
    axes, *below = figure.axes
    sizes = [[s if s > 0 else math.nan for s in row] for row in run["step_sizes"].values()]
    moved = sorted(s for row in sizes for s in row if s > 0) or [1.0]
    image = axes.imshow(
        sizes, norm=LogNorm(moved[len(moved) // 50], moved[-1]), origin="lower", aspect="auto", interpolation="nearest",
        extent=(-0.5, steps - 0.5, -0.5, len(units) - 0.5),
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, label="step size", extend="min")
    bar.ax.minorticks_off()
    axes.grid(visible=False)
    label_units(axes, units)
    axes.set(xlabel="step", title=wrapped(f"Step size of each unit, {run['method']}"))
    for panel in below:
        width = steps / len(factors)
        draw_factors(panel, axes, [(i + 0.5) * width - 0.5 for i in range(len(factors))], factors)
    return _saved(figure, [], out / f"step_sizes_{slug(title)}.png")


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


def _bars(axes: Any, names: Sequence[str], measured: Iterable[Sequence[float]]) -> None:
    """A bar for each median, the first on top, with an error bar from the lowest to the highest."""
    medians, lows, highs = zip(*measured, strict=True)
    places = range(len(names))[::-1]
    axes.barh(places, medians, xerr=_errors(medians, lows, highs), color=BAR, alpha=0.7, capsize=3)
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(visible=False, axis="y")


def _errors(medians: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> list[list[float]]:
    """Lengths of the error bars, below and above."""
    return [
        [m - x for m, x in zip(medians, lows, strict=True)],
        [x - m for m, x in zip(medians, highs, strict=True)],
    ]


def _saved(figure: Any, panels: Sequence[Any], path: Path) -> Path:
    """Save with a legend that names each line of the panels once."""
    legend_below(figure, *panels)
    figure.savefig(path)
    return path
