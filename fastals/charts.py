"""Pictures of stored results, for :mod:`fastals.benchmarks`; each function writes one file and returns it."""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastals.plots import new_figure, running_mean
from fastals.tuning import of_method, sweep_cost

Record = dict[str, Any]


def bars(against: str, cases: list[Record], out: Path) -> Path:
    """Speed-ups with their spread, and the arithmetic limit where there is one."""
    figure, axes = new_figure(height=1 + 0.45 * len(cases))
    for i, case in enumerate(reversed(cases)):
        info = case["extra_info"]
        (low, high), median = info["spread"], info["speedup"]
        axes.barh(i, median, xerr=[[median - low], [high - median]], color="C0", alpha=0.7, capsize=3)
        if "limit" in info:
            axes.plot([info["limit"]] * 2, [i - 0.4, i + 0.4], color="C3", label="limit by forwards alone")
    axes.set_yticks(range(len(cases)), [label(c) for c in reversed(cases)])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel=f"speed-up over {against}", title=f"Speed-up over {against}: median, lowest and highest")
    return _saved(figure, axes, out / f"speedup_{_slug(against)}.png")


def depth(cases: list[Record], out: Path) -> Path:
    """Speed-up by the number of blocks, beside the arithmetic limit."""
    figure, axes = new_figure()
    infos = sorted((c["extra_info"] for c in cases), key=lambda info: info["depth"])
    depths, medians = [i["depth"] for i in infos], [i["speedup"] for i in infos]
    errors = [[i["speedup"] - i["spread"][0] for i in infos], [i["spread"][1] - i["speedup"] for i in infos]]
    axes.errorbar(depths, medians, yerr=errors, marker="o", capsize=3, label="measured")
    axes.plot(depths, [i["limit"] for i in infos], color="C3", marker="_", label="limit by forwards alone")
    axes.set(xlabel="blocks", ylabel="speed-up over the eager baseline", title="Depth", xticks=depths)
    return _saved(figure, axes, out / "depth.png")


def roof(cases: list[Record], out: Path) -> Path:
    """Bandwidth of every kernel over the copy bandwidth of the same run."""
    points = [(f"{label(c)} {kernel}", rate / c["extra_info"]["copy_gbs"]) for c in cases for kernel, rate in rates(c)]
    figure, axes = new_figure(height=1 + 0.3 * len(points))
    axes.barh([name for name, _ in reversed(points)], [share for _, share in reversed(points)], color="C0", alpha=0.7)
    axes.axvline(1, color="C3", label="measured copy bandwidth")
    axes.set(xlabel="GB/s over the copy bandwidth of the same run", title="Kernels under the roof")
    return _saved(figure, axes, out / "roof.png")


def losses(title: str, runs: list[Record], best: str, out: Path) -> Path:
    """Running mean of the loss against steps, seconds and forward passes, the mean over the seeds."""
    figure, panels = new_figure(rows=3)
    for panel, key in zip(panels, ("steps", "seconds", "forwards"), strict=True):
        for i, method in enumerate(dict.fromkeys(r["method"] for r in runs)):
            members, tried = of_method(runs, method), method.startswith("adamw") and method != best
            x, y = _curve(members, key)
            color = f"C{i}" if i < 10 else "black"
            panel.plot(x, y, color=color, label=method, linewidth=0.8 if tried else 2)
            if method == best and key != "steps":
                before = statistics.mean(sweep_cost(r, runs, key) - r[key][-1] for r in members)
                panel.plot([before + v for v in x], y, "--", color=color, label=f"{method}, after the other rates")
        panel.set(xlabel={"forwards": "forward passes"}.get(key, key), ylabel="loss, running mean")
    panels[0].set(title=title)
    return _saved(figure, panels[1], out / f"loss_{_slug(title)}.png")


def heat_map(title: str, run: Record, out: Path) -> Path:
    """Step size by unit and step; white where the unit did not move."""
    figure, axes = new_figure()
    sizes = [[math.log10(s) if s else math.nan for s in row] for row in run["step_sizes"].values()]
    image = axes.imshow(sizes, aspect="auto", interpolation="nearest")
    figure.colorbar(image, label="log10 of the step size")
    axes.set_yticks(range(len(sizes)), list(run["step_sizes"]))
    axes.set(xlabel="step", title=f"{title}: step size of each unit, {run['method']}, seed {run['seed']}")
    path = out / f"step_sizes_{_slug(title)}.png"
    figure.savefig(path, dpi=100)
    return path


def label(case: Record) -> str:
    """What a person calls the case: the parameters of its test, or the test."""
    name = case["fullname"].split("::")[-1].removeprefix("test_")
    return name.partition("[")[2].removesuffix("]") or name


def rates(case: Record) -> Iterator[tuple[str, float]]:
    """GB/s of every kernel of the case."""
    for key, value in case["extra_info"].items():
        if key.endswith("_gbs") and key != "copy_gbs":
            yield key.removesuffix("_gbs"), value


def _curve(members: list[Record], key: str) -> tuple[list[float], list[float]]:
    """Means over the seeds; a loss stands where its step begins, for it is measured before."""
    y = [statistics.mean(values) for values in zip(*(running_mean(r["losses"]) for r in members), strict=False)]
    if key == "steps":
        return list(range(len(y))), y
    spent = [statistics.mean(values) for values in zip(*(r[key] for r in members), strict=False)]
    return [0, *spent[:-1]], y


def _saved(figure: Any, axes: Any, path: Path) -> Path:
    """Save with a legend that names each line once; none where nothing is named."""
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if named:
        axes.legend(named.values(), named.keys(), fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)
    return path


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
