"""Pages and comparisons of what pytest-benchmark, ``bench/convergence.py`` and ``bench/first_light.py`` have stored."""

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import charts
import tuning
from stamp import STAMP

from fastals.cli.errors import UserError

Record = dict[str, Any]
APART = 1.05  # what two values must differ by to count as changed


class Measure(NamedTuple):
    """What a case is judged by: the median, lowest and highest ratio of its rounds; the higher the better."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} - {self.high:.4g})"


def report(files: Sequence[Path], out: Path) -> Path:
    """Write ``report.md`` and its pictures into ``out``; returns the page.

    Raises:
        UserError: a file that is no result, two results of the same case on the same device, or no folder ``out``.
    """
    found = [read(path) for path in files]
    cases, runs, figures = ([record for result in found for record in result[i]] for i in range(3))
    if not cases and not runs and not figures:
        raise UserError(f"there is no result in {', '.join(map(str, files))}")
    _refuse_twins(cases, lambda c: (c["fullname"], _device(c)))
    _refuse_twins(runs, lambda r: (r["task"], r["regime"], r["method"], f"seed {r['seed']}", r["steps"], r["device"]))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} is no folder to write the page to: {error.strerror}") from error
    _refuse_twins(figures, lambda f: (f["name"], f"batch {f['batch']}", f["device"]))
    sections = [_conditions([c["extra_info"] for c in cases] + runs + figures)]
    devices = list(dict.fromkeys([*map(_device, cases), *(r["device"] for r in runs + figures)]))
    for device in devices:
        where = f" ({device})" if len(devices) > 1 else ""
        sections += _case_sections([c for c in cases if _device(c) == device], where, out)
        sections += _first_light([f for f in figures if f["device"] == device], where)
        sections += _task_sections([r for r in runs if r["device"] == device], where, out)
    page = out / "report.md"
    page.write_text("\n\n".join(["# Benchmark report", *sections]) + "\n")
    return page


def compare(before: Path, after: Path) -> tuple[list[str], bool]:
    """Lines on the conditions that differ and on every measure that has changed, and whether any got slower.

    Measured are ratios of times taken in turn: a case's speed-up, and each kernel's bandwidth over that of a copy. One
    has changed if its two ranges, lowest to highest, are disjoint and its medians more than 5 % apart: with five rounds
    a side ranges are disjoint by chance in 1 of 126 comparisons. Seconds are not judged, for those of two runs are not
    comparable.

    Raises:
        UserError: a file that is no result or has no measure, or measures of ``before`` that ``after`` does not have.
    """
    cases = [read(path)[0] for path in (before, after)]
    old, new = ({name: m for c in own for name, m in _measures(c).items()} for own in cases)
    for path, measures in ((before, old), (after, new)):
        if not measures:
            raise UserError(f"nothing can be judged in {path}: it has neither ratios nor kernels")
    missing = [name for name in old if name not in new]
    if missing:
        raise UserError(f"{after} does not have {'; '.join(missing)}")
    verdicts = {name: _verdict(measure, new[name]) for name, measure in old.items()}
    lines = [f"{verdict}: {name}: {old[name]} -> {new[name]}" for name, verdict in verdicts.items() if verdict]
    return _differences(*cases) + (lines or ["nothing changed beyond the spread"]), "slower" in verdicts.values()


def read(path: Path) -> tuple[list[Record], list[Record], list[Record]]:
    """Timings of a pytest-benchmark file, the runs of a ``.jsonl`` file, the figures of a first light.

    Raises:
        UserError: no such file, or none of the three.
    """
    try:
        text = path.read_text()
        if path.suffix == ".jsonl":
            return [], [_run(json.loads(line)) for line in text.splitlines() if line.strip()], []
        result = json.loads(text)
        if "figures" in result:
            return [], [], [_figure(result["stamp"] | f) for f in result["figures"]]
        return [_case(c) for c in result["benchmarks"]], [], []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no pytest-benchmark file, no first light and no file of convergence runs: "
            f"{type(error).__name__}: {error}"
        ) from error


def _case(case: Record) -> Record:
    """The timing; fails unless it has all that pages and comparisons look up."""
    info = case["extra_info"]
    _all(str, case["fullname"], info["device"], charts.mini_batch(case))
    _all(Real, *_time(case), *info.get("trials_per_unit", ()), *info.get("peak_mib", {}).values())
    _all(Real, *(info[k] for k in ("by_forwards", "depth") if k in info))
    for measure in _measures(case).values():
        _all(Real, *measure)
        if not measure.low <= measure.median <= measure.high:
            raise ValueError(f"{measure} lies outside its own spread")
    _all(Real, *(k["gbs"] for k in info.get("kernels", {}).values()))
    if "copy_roof_gbs" in info:
        _all(Real, info["copy_roof_gbs"], info["matmul_roof_tflops"])
    return case


def _run(run: Record) -> Record:
    """The convergence run; fails unless it has all that pages look up."""
    _all(str, run["task"], run["regime"], run["method"], run["device"])
    _all(Real, run["seed"], run["steps"], run["loss"], run["accuracy"])
    _all_of_one_length(run[key] for key in ("losses", "seconds", "forwards"))
    if "step_sizes" in run:
        _all_of_one_length(run["step_sizes"].values())
    if "trials" in run:
        _all(Real, run["trials"], run["rises"])
    return run


def _figure(figure: Record) -> Record:
    """The figure of a first light; fails unless it has all that the page looks up."""
    _all(str, figure["device"], figure["name"], figure["unit"])
    _all(Real, figure["batch"], figure["predicted"], figure.get("measured", 0.0))
    return figure


def _all(kind: type, *values: Any) -> None:
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")


def _all_of_one_length(rows: Iterable[Iterable[float]]) -> None:
    values = [value for column in zip(*rows, strict=True) for value in column]
    if not values:
        raise ValueError("no numbers")
    _all(Real, *values)


def _refuse_twins(records: Iterable[Record], identity: Callable[[Record], tuple[Hashable, ...]]) -> None:
    seen = set()
    for key in map(identity, records):
        if key in seen:
            raise UserError(
                f"there are two results of {', '.join(map(str, key))}: leave one file out, or hold the two against "
                "each other with fastals bench compare"
            )
        seen.add(key)


def _device(case: Record) -> str:
    return case["extra_info"]["device"]


def _measures(case: Record) -> dict[str, Measure]:
    """All that the case is judged by."""
    name, info = case["fullname"], case["extra_info"]
    found = {f"{name}, against {info['against']}": _ratio(case)} if "speedup" in info else {}
    return found | {f"{name}, {kernel}": _of_roof(k) for kernel, k in info.get("kernels", {}).items()}


def _ratio(case: Record) -> Measure:
    return Measure(case["extra_info"]["speedup"], *case["extra_info"]["spread"])


def _of_roof(kernel: Record) -> Measure:
    return Measure(kernel["of_roof"], *kernel["spread"])


def _verdict(old: Measure, new: Measure) -> str:
    """``slower``, ``faster`` or nothing."""
    low, high = sorted((old, new))
    if low.high >= high.low or high.median <= APART * low.median:
        return ""
    return "faster" if high is new else "slower"


def _differences(old: list[Record], new: list[Record]) -> list[str]:
    """The conditions that differ, commits aside, and whether either tree was dirty."""
    lines = []
    for key in STAMP:
        a, b = (sorted({str(c["extra_info"].get(key, "")) or "-" for c in cases}) for cases in (old, new))
        if key != "commit" and (a != b or (key == "dirty" and "True" in a)):
            lines.append(f"{key}: {' / '.join(a)} -> {' / '.join(b)}")
    return lines


def _time(case: Record) -> tuple[float, float, float]:
    return case["stats"]["median"], case["stats"]["q1"], case["stats"]["q3"]


def _conditions(records: Iterable[Record]) -> str:
    stamps = list(dict.fromkeys(tuple(str(r.get(k, "")) for k in STAMP) for r in records))
    kept = [i for i, _ in enumerate(STAMP) if any(s[i] for s in stamps)]
    return "## Conditions\n\n" + _table([STAMP[i] for i in kept], [[s[i] for i in kept] for s in stamps])


def _first_light(figures: list[Record], where: str) -> list[str]:
    """The figures of a first light beside their predictions."""
    if not figures:
        return []
    rows = [
        [f["name"], f["unit"], str(f["batch"] or "-"), f"{f['predicted']:.4g}", *_measured(f)] for f in figures
    ]  # fmt: skip
    columns = ["figure", "unit", "batch", "predicted", "measured", "measured / predicted"]
    return [f"## First light{where}\n\n{_table(columns, rows)}"]


def _measured(figure: Record) -> list[str]:
    if "measured" not in figure:
        return [figure.get("failed") or figure.get("why_not") or "-", "-"]
    return [f"{figure['measured']:.4g}", f"{figure['measured'] / figure['predicted']:.2f}"]


def _case_sections(cases: list[Record], where: str, out: Path) -> list[str]:
    """What the exactness tests of one device's timings came to, and the tables and pictures of them."""
    ratios = [c for c in cases if "speedup" in c["extra_info"]]
    kernels = [c for c in cases if "kernels" in c["extra_info"]]
    roofs = [c for c in cases if "copy_roof_gbs" in c["extra_info"]]
    times = [c for c in cases if c not in ratios + kernels + roofs]
    sections = [_gates_sentence(cases, where)] if cases else []
    for title in dict.fromkeys(map(charts.family, ratios)):
        members = [c for c in ratios if charts.family(c) == title]
        picture = charts.bars(title + where, members, out)
        sections.append(f"## {_capital(title)}{where}\n\n{_ratio_table(members)}\n\n{_image(picture)}")
    deep = [c for c in ratios if "depth" in c["extra_info"]]
    if deep:
        sections.append(f"## Depth{where}\n\n{_image(charts.depth('Depth' + where, deep, out))}")
    if kernels or roofs:
        sections.append("\n\n".join([f"## Kernels{where}", *map(_roofs, roofs)]))
    if kernels:
        picture = charts.roof("Kernels under the roof" + where, kernels, out)
        sections += [_kernel_table(kernels), _image(picture)]
    return [*sections, f"## Times{where}\n\n{_time_table(times)}"] if times else sections


def _gates(case: Record) -> str:
    """What the exactness tests of the case came to."""
    gates = case["extra_info"].get("gates", "not run")
    if isinstance(gates, list) or gates == "said to have passed":  # of a time when a case was not timed otherwise
        return "passed"
    return str(gates)


def _gates_sentence(cases: list[Record], where: str) -> str:
    passed = sum(_gates(case) == "passed" for case in cases)
    if passed == len(cases):
        return f"Exactness tests{where}: passed for all cases."
    return f"Exactness tests{where}: passed for {passed} of {len(cases)} cases; the others are marked below."


def _case_table(columns: Sequence[str], rows: Iterable[tuple[Record, Sequence[str]]]) -> str:
    """A table of cases, with what their exactness tests came to in the second column unless all passed."""
    marked = [(_gates(case), row) for case, row in rows]
    if all(gates == "passed" for gates, _ in marked):
        return _table(columns, [row for _, row in marked])
    return _table([columns[0], "exactness tests", *columns[1:]], [[row[0], g, *row[1:]] for g, row in marked])


def _ratio_table(cases: list[Record]) -> str:
    columns = [
        "case", "mini-batch", "speed-up (lowest - highest)", "from forward passes alone", "seconds", "trials a unit",
        "peak MiB",
    ]  # fmt: skip
    return _case_table(columns, [(case, _ratio_row(case)) for case in cases])


def _ratio_row(case: Record) -> list[str]:
    info, (median, low, high) = case["extra_info"], _ratio(case)
    return [
        charts.label(case),
        charts.mini_batch(case),
        f"{median:.2f}x ({low:.2f} - {high:.2f})",
        f"{info['by_forwards']:.2f}x" if "by_forwards" in info else "-",
        f"{_time(case)[0]:.4g}",
        " / ".join(f"{t:g}" for t in info.get("trials_per_unit", ())) or "-",
        _memory(info["peak_mib"]) if "peak_mib" in info else "-",
    ]


def _memory(peaks: Record) -> str:
    found = ", ".join(f"{name} {mib}" for name, mib in peaks.items())
    both = "als" in peaks and peaks.get("adamw")
    return f"{found} (als over adamw {peaks['als'] / peaks['adamw']:.2f}x)" if both else found


def _roofs(case: Record) -> str:
    copy, product = (case["extra_info"][key] for key in ("copy_roof_gbs", "matmul_roof_tflops"))
    gates = _gates(case)
    return (
        f"The roofs, measured on the same device: a copy moves {copy:.4g} GB/s, a bfloat16 matrix product does "
        f"{product:.4g} TFLOP/s." + ("" if gates == "passed" else f" Exactness tests: {gates}.")
    )


def _kernel_table(cases: list[Record]) -> str:
    rows = [
        (case, [charts.label(case), name, f"{k['gbs']:.4g}", "{:.1%} ({:.1%} - {:.1%})".format(*_of_roof(k))])
        for case in cases
        for name, k in case["extra_info"]["kernels"].items()
    ]
    return _case_table(["case", "kernel", "GB/s", "of the copy bandwidth (lowest - highest)"], rows)


def _time_table(cases: list[Record]) -> str:
    rows = []
    for case in cases:
        median, low, high = _time(case)
        others = ", ".join(f"{k} {v}" for k, v in case["extra_info"].items() if k not in (*STAMP, "gates"))
        rows.append((case, [charts.full_name(case), f"{median:.4g} ({low:.4g} - {high:.4g})", others or "-"]))
    return _case_table(["case", "seconds (quartiles)", "beside"], rows)


def _task_sections(runs: list[Record], where: str, out: Path) -> list[str]:
    """Tables and pictures of the convergence runs of one device."""
    sections = []
    for task, regime, steps in dict.fromkeys((r["task"], r["regime"], r["steps"]) for r in runs):
        members = [r for r in runs if (r["task"], r["regime"], r["steps"]) == (task, regime, steps)]
        samples = "all" if regime == "full" else regime
        title = f"{task}, {samples} training samples, {steps} steps{where}"
        pictures = [charts.losses(title, members, tuning.best_rate(members), out)]
        searched = sorted((r for r in members if "step_sizes" in r), key=lambda r: r["method"] != "als")
        pictures += [charts.heat_map(title, run, out) for run in searched[:1]]
        images = "\n\n".join(map(_image, pictures))
        sections.append(f"## {_capital(title)}\n\n{_table(tuning.COLUMNS, tuning.rows(members))}\n\n{images}")
    return sections


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def _image(path: Path) -> str:
    return f"![{path.stem}]({path.name})"
