"""Pictures and tables of finished runs."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastals.cli.errors import needs_extra

Lines = Sequence[Mapping[str, Any]]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito's, less yellow
MARKERS = ("o", "^", "D", "v", "s", "P", "X")
STYLES = [  # of the lines of a picture, told apart without colour by marker and dashes
    {"color": color, "marker": marker, "linestyle": dashes}
    for dashes in ("-", "--", ":", "-.")
    for color, marker in zip(COLORS, MARKERS, strict=True)
]
SPACING = 0.12  # between the markers of a line, as a share of the diagonal of its axes
WIDTH, DPI = 5.5, 180  # inches, in which text of 10 points can be read on a telephone
CHARACTERS, LINE = 70, 0.2  # that fit into the width of a legend; height of its lines in inches

COLUMNS = ("run", "steps", "training loss", "held-out accuracy", "trials a step", "seconds", "forward passes")


def summary_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of :data:`COLUMNS`, one row a run."""
    return [
        (
            name, str(s["steps"]), f"{s['loss']:.4f}", f"{s['accuracy']:.1%}",
            f"{s['trials']:.2f}" if s.get("trials") else "-",  # runs of older versions have none
            f"{s['seconds']:.0f}", f"{s['forwards']:.0f}",
        )
        for name, s in summaries.items()
    ]  # fmt: skip


def summary_table(summaries: Mapping[str, Mapping[str, Any]]) -> Any:
    """A rich table, one row a run."""
    try:
        from rich.markup import escape
        from rich.table import Table
    except ImportError as error:
        raise needs_extra(error) from error
    table = Table(COLUMNS[0])
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right", overflow="fold")
    for row in summary_rows(summaries):
        table.add_row(*map(escape, row))
    return table


def plot_losses(runs: Mapping[str, Lines], path: Path) -> None:
    """Loss at the start of every step, faint, and its running mean; from 0 if a loss comes near it."""
    figure, axes = new_figure()
    for i, (name, lines) in enumerate(runs.items()):
        losses = [line["loss_before"] for line in lines]
        means = running_mean(losses)
        steps = range(1, len(lines) + 1)
        (mean,) = axes.plot(steps, means, label=name, markevery=marks(i, means))
        look = {"color": mean.get_color(), "linestyle": mean.get_linestyle(), "marker": ""}
        axes.plot(steps, losses, **look, alpha=0.3, linewidth=1, zorder=1)
    axes.set(xlabel="step", ylabel="training loss", title="Loss of each mini-batch and running mean")
    axes.locator_params(axis="x", integer=True, nbins=7)
    begin_at_zero(axes, [line["loss_before"] for lines in runs.values() for line in lines])
    legend_below(figure, axes)
    figure.savefig(path)


def plot_step_sizes(runs: Mapping[str, Lines], path: Path) -> None:
    """Step size of every unit over the steps, and below it the common factor of the joint tests if there were any.

    A merged unit counts as its parts, which all move by its step.
    """
    searched = {name: lines for name, lines in runs.items() if any(line["units"] for line in lines)}
    if not searched:
        return
    factored = {name: any(line.get("joint_trials") for line in lines) for name, lines in searched.items()}
    heights = [h for name in searched for h in ((3.4, 1.2) if factored[name] else (3.6,))]
    figure, _ = new_figure(len(heights), heights)
    panels = iter(list(figure.axes))
    for name, lines in searched.items():
        axes = next(panels)
        steps = range(1, len(lines) + 1)
        units = list(dict.fromkeys(part for line in lines for u in line["units"] for part in u["name"].split("+")))
        for unit, color in zip(units, shades(len(units)), strict=True):
            sizes = [_size(line, unit) for line in lines]
            axes.plot(steps, sizes, color=color, marker=".", linestyle="-", markersize=3, linewidth=1, label=unit)
        axes.set(xlabel="step", ylabel="step size", yscale="log", title=wrapped(f"Step size of each unit, {name}"))
        axes.locator_params(axis="x", integer=True, nbins=7)
        _units_scale(figure, axes, units)
        if factored[name]:
            draw_factors(next(panels), axes, steps, [line["factor"] for line in lines])
    figure.savefig(path)


def _size(line: Mapping[str, Any], unit: str) -> float:
    return next((u["step_size"] or math.nan for u in line["units"] if unit in u["name"].split("+")), math.nan)


def _units_scale(figure: Any, axes: Any, units: Sequence[str]) -> None:
    """A scale of the colours of the units beside the axes, the top of the model at its top."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colors = ScalarMappable(Normalize(-0.5, len(units) - 0.5), ListedColormap(shades(len(units))))
    label_units(figure.colorbar(colors, ax=axes).ax, units)


def draw_factors(axes: Any, above: Any, steps: Sequence[float], factors: Sequence[float | None]) -> None:
    """The common factor of the joint tests, missing where it is 0, over the steps of the axes above."""
    axes.plot(steps, [f or math.nan for f in factors], color=COLORS[-1], marker=".", linestyle="-", markersize=3)
    axes.set(xlabel="step", ylabel="common\nfactor")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.sharex(above)
    above.set_xlabel("")
    above.tick_params(labelbottom=False)


def label_units(axes: Any, units: Sequence[str], most: int = 9) -> None:
    """Name the units on the y axis, on which they are numbered from the bottom of the model; not all if there are many.

    A numbered block is named by the last two parts of its name.
    """
    last = len(units) - 1
    shown = sorted({round(i * last / (most - 1)) for i in range(most)})
    parts = [units[i].split(".") for i in shown]
    axes.set_yticks(shown, [" ".join(p[-2:]) if p[-1].isdigit() else ".".join(p) for p in parts], minor=False)


def running_mean(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean of the values so far."""
    means: list[float] = []
    for value in values:
        means.append(weight * means[-1] + (1 - weight) * value if means else value)
    return means


def new_figure(rows: int = 1, height: float | Sequence[float] = 3.6) -> Any:
    """A figure that needs no display, and its axes; ``height`` is that of a row, or of each, in inches.

    Lines take the colours, markers and dashes of ``STYLES`` in turn.
    """
    try:
        from cycler import cycler
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise needs_extra(error) from error
    heights = [height] * rows if isinstance(height, int | float) else list(height)
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, height_ratios=heights)
    for axes in figure.axes:
        axes.set_prop_cycle(cycler(**{key: [style[key] for style in STYLES] for key in STYLES[0]}))
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, grid


def legend_below(figure: Any, *axes: Any) -> None:
    """Name each line of the axes once, below all, in as many columns as fit; the figure grows by their height."""
    named: dict[str, Any] = {}
    for one in axes:
        named |= dict(zip(*reversed(one.get_legend_handles_labels()), strict=True))
    if named:
        labels = [wrapped(label, CHARACTERS - 6) for label in named]
        longest = max(len(line) for label in labels for line in label.splitlines())
        columns = max(1, min(len(labels), CHARACTERS // (longest + 6)))
        lines = -(-sum(label.count("\n") + 1 for label in labels) // columns)
        figure.set_figheight(figure.get_figheight() + LINE * lines)
        figure.legend(named.values(), labels, loc="outside lower center", ncols=columns, frameon=False)


def marks(line: int, values: Sequence[float]) -> tuple[float, float] | None:
    """Places of the markers of a line, those of the next one beside them; matplotlib finds none on a line of NaN."""
    return (0.03 * (line % 4), SPACING) if any(map(math.isfinite, values)) else None


def begin_at_zero(axes: Any, values: Iterable[float]) -> None:
    """Begin the y axis at 0 if the lowest of the values is nearer to it than to the highest."""
    finite = [v for v in values if math.isfinite(v)]
    if finite and 0 <= min(finite) < max(finite) / 2:
        axes.set_ylim(bottom=0)


def wrapped(text: str, width: int = 48) -> str:
    """The text in lines that fit above the axes."""
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def shades(count: int) -> list[Any]:
    """So many colours from dark to light, none too light for a line on white."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]
