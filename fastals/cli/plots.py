"""Pictures and tables of finished runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastals.cli.errors import needs_extra

Lines = Sequence[Mapping[str, Any]]

COLUMNS = ("run", "steps", "training loss", "held-out accuracy", "trials a step", "seconds", "forward passes")


def summary_table(summaries: Mapping[str, Mapping[str, Any]]) -> Any:
    """A rich table, one row a run."""
    try:
        from rich.table import Table
    except ImportError as error:
        raise needs_extra(error) from error
    table = Table(*COLUMNS)
    for name, s in summaries.items():
        trials = f"{s['trials']:.2f}" if s.get("trials") else "-"  # runs of older versions have none
        table.add_row(
            name, str(s["steps"]), f"{s['loss']:.4f}", f"{s['accuracy']:.1%}", trials, f"{s['seconds']:.0f}",
            f"{s['forwards']:.0f}",
        )  # fmt: skip
    return table


def plot_losses(runs: Mapping[str, Lines], path: Path) -> None:
    """Loss at the start of every step, and its running mean."""
    figure, axes = new_figure()
    for i, (name, lines) in enumerate(runs.items()):
        losses = [line["loss_before"] for line in lines]
        axes.plot(losses, color=f"C{i}", alpha=0.25, linewidth=1)
        axes.plot(running_mean(losses), color=f"C{i}", label=name)
    axes.set(
        xlabel="step", ylabel="training loss of the mini-batch", title="Loss before each step, and its running mean"
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_step_sizes(runs: Mapping[str, Lines], path: Path) -> None:
    """Step size of every unit over the steps, log scale, and the common factor of the joint tests if there were any.

    A merged unit starts where its parts end.
    """
    searched = {name: lines for name, lines in runs.items() if any(line["units"] for line in lines)}
    if not searched:
        return
    figure, grid = new_figure(rows=len(searched))
    for axes, (name, lines) in zip(grid if len(searched) > 1 else [grid], searched.items(), strict=True):
        units = list(dict.fromkeys(u["name"] for line in lines for u in line["units"]))
        for i, unit in enumerate(units):
            sizes = [_size(line, unit) for line in lines]
            axes.plot(
                sizes, color=_shade(i / max(1, len(units) - 1)), marker=".", markersize=3, linewidth=1, label=unit
            )
        if any(line.get("joint_trials") for line in lines):
            factors = [line["factor"] or math.nan for line in lines]
            axes.plot(factors, color="C3", linestyle=":", linewidth=1.5, label="common factor")
        axes.set(xlabel="step", ylabel="step size", yscale="log", title=f"{name}: step size of each unit")
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def _size(line: Mapping[str, Any], unit: str) -> float:
    return next((u["step_size"] or math.nan for u in line["units"] if u["name"] == unit), math.nan)


def running_mean(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean of the values so far."""
    means: list[float] = []
    for value in values:
        means.append(weight * means[-1] + (1 - weight) * value if means else value)
    return means


def new_figure(rows: int = 1, height: float = 4.5) -> Any:
    """A figure that needs no display, and its axes; ``height`` is that of a row, in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise needs_extra(error) from error
    figure = Figure(figsize=(9, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows)


def _shade(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * share)
