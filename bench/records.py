"""Stored results, read and checked: benchmark cases, convergence runs and the figures of ``bench/first_light.py``."""

import json
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from fastals.cli.errors import UserError

Record = dict[str, Any]
MEASURES = {  # held-out figures of a run: name in the record, head of their column
    "perplexity": "held-out perplexity",
    "accuracy": "held-out accuracy",
    "balanced_accuracy": "mean over the classes",
}


class Measure(NamedTuple):
    """Median, lowest and highest ratio of a case's rounds; higher is better."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} - {self.high:.4g})"


class Results(NamedTuple):
    """The records of one or more files, by kind."""

    cases: list[Record]
    runs: list[Record]
    figures: list[Record]


def read_all(paths: Iterable[Path]) -> Results:
    """The records of all files together."""
    files = [read(path) for path in paths]
    return Results(*([record for file in files for record in file[kind]] for kind in range(3)))


def read(path: Path) -> Results:
    """The cases of a pytest-benchmark file, the runs of a ``.jsonl`` file or the figures of a first light.

    Raises:
        UserError: the file does not exist, or is none of the three.
    """
    try:
        text = path.read_text()
        if path.suffix == ".jsonl":
            return Results([], [_checked_run(json.loads(line)) for line in text.splitlines() if line.strip()], [])
        result = json.loads(text)
        if "figures" in result:
            return Results([], [], [_checked_figure(result["stamp"] | f) for f in result["figures"]])
        return Results([_checked_case(c) for c in result["benchmarks"]], [], [])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no pytest-benchmark file, no first light and no file of convergence runs: "
            f"{type(error).__name__}: {error}"
        ) from error


def device(case: Record) -> str:
    """The device that the case was timed on."""
    return case["extra_info"]["device"]


def mini_batch(case: Record) -> str:
    """Size and type of the mini-batch: texts x tokens, or images."""
    info = case["extra_info"]
    if "batch" not in info:
        return "-"
    return f"{info['batch']} " + (f"x {info['length']}" if info["length"] else "images") + f", {info['dtype']}"


def quartiles(case: Record) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the case's seconds."""
    return case["stats"]["median"], case["stats"]["q1"], case["stats"]["q3"]


def speedup(case: Record) -> Measure:
    """The speed-up of the case over its reference."""
    return Measure(case["extra_info"]["speedup"], *case["extra_info"]["spread"])


def bandwidth(kernel: Record) -> Measure:
    """The kernel's bandwidth as a share of that of a copy."""
    return Measure(kernel["of_roof"], *kernel["spread"])


def measures(case: Record) -> dict[str, Measure]:
    """Every measure of the case, by name."""
    name, info = case["fullname"], case["extra_info"]
    speedups = {f"{name}, against {info['against']}": speedup(case)} if "speedup" in info else {}
    return speedups | {f"{name}, {kernel}": bandwidth(k) for kernel, k in info.get("kernels", {}).items()}


def _checked_case(case: Record) -> Record:
    """The case; fails if it lacks anything that pages and comparisons read."""
    info = case["extra_info"]
    _check_type(str, case["fullname"], info["device"], mini_batch(case))
    _check_type(Real, *quartiles(case), *info.get("trials_per_unit", ()), *info.get("peak_mib", {}).values())
    _check_type(Real, *(info[k] for k in ("by_forwards", "depth") if k in info))
    for measure in measures(case).values():
        _check_type(Real, *measure)
        if not measure.low <= measure.median <= measure.high:
            raise ValueError(f"{measure} lies outside its own spread")
    _check_type(Real, *(k["gbs"] for k in info.get("kernels", {}).values()))
    if "copy_roof_gbs" in info:
        _check_type(Real, info["copy_roof_gbs"], info["matmul_roof_tflops"])
    return case


def _checked_run(run: Record) -> Record:
    """The convergence run; fails if it lacks anything that pages read."""
    _check_type(str, run["task"], run["regime"], run["method"], run["device"])
    _check_type(Real, run["seed"], run["steps"], run["loss"], run["accuracy"])
    _check_rows(run[key] for key in ("losses", "seconds", "forwards"))
    _check_type(Real, *(run[key] for key in (*MEASURES, "trust", "joint_trials") if run.get(key) is not None))
    _check_type(dict, run["options"])
    if "step_sizes" in run:
        _check_rows([*run["step_sizes"].values(), *([run["factors"]] if "factors" in run else [])])
    if "trials" in run:
        _check_type(Real, run["trials"], run["rises"])
    return run


def _checked_figure(figure: Record) -> Record:
    """The figure of a first light; fails if it lacks anything that pages read."""
    _check_type(str, figure["device"], figure["name"], figure["unit"])
    numbers = figure["batch"], figure["predicted"], figure.get("measured")
    _check_type(Real, *(n for n in numbers if n is not None))
    return figure


def _check_type(kind: type, *values: Any) -> None:
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")


def _check_rows(rows: Iterable[Iterable[float]]) -> None:
    """Fails unless the rows hold numbers and have the same length."""
    values = [value for column in zip(*rows, strict=True) for value in column]
    if not values:
        raise ValueError("no numbers")
    _check_type(Real, *values)
