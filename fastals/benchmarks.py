"""Pages and comparisons of stored results: pytest-benchmark's JSON and the lines of ``bench/convergence.py``."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastals import charts, tuning
from fastals.errors import UserError
from fastals.stamp import STAMP

Record = dict[str, Any]


def report(files: Sequence[Path], out: Path) -> Path:
    """Write ``report.md`` and its pictures into ``out``; returns the page."""
    found = [read(path) for path in files]
    cases, runs = [c for cases, _ in found for c in cases], [r for _, runs in found for r in runs]
    if not cases and not runs:
        raise UserError(f"there is no result in {', '.join(map(str, files))}")
    out.mkdir(parents=True, exist_ok=True)
    sections = [_conditions([c["extra_info"] for c in cases] + runs)]
    sections += _ratio_sections([c for c in cases if "speedup" in c["extra_info"]], out)
    sections += _kernel_sections([c for c in cases if "copy_gbs" in c["extra_info"]], out)
    sections += _time_sections([c for c in cases if not {"speedup", "copy_gbs"} & c["extra_info"].keys()])
    for task, regime in dict.fromkeys((r["task"], r["regime"]) for r in runs):
        sections += _run_sections([r for r in runs if (r["task"], r["regime"]) == (task, regime)], out)
    page = out / "report.md"
    page.write_text("\n\n".join(["# Benchmark report", *sections]) + "\n")
    return page


def compare(before: Path, after: Path) -> tuple[list[str], bool]:
    """Lines on every case that has changed beyond the spread, and whether any got slower.

    A case has changed if the medians lie outside each other's spread: lowest to highest of the ratios, or the quartiles
    of the times where no ratio is stored.

    Raises:
        UserError: a file that is no result, or cases of ``before`` that ``after`` does not have.
    """
    old, new = ({c["fullname"]: c for c in read(path)[0]} for path in (before, after))
    if not old:
        raise UserError(f"there is no timing in {before}")
    missing = [name for name in old if name not in new]
    if missing:
        raise UserError(f"{after} does not have {', '.join(missing)}")
    devices = [sorted({str(c["extra_info"].get("device")) for c in cases.values()}) for cases in (old, new)]
    lines = [f"the devices differ: {devices[0]} and {devices[1]}"] if devices[0] != devices[1] else []
    slower = False
    for name, case in old.items():
        verdict, values = _verdict(case, new[name])
        lines += [f"{verdict}: {name}: {values}"] if verdict else []
        slower |= verdict == "slower"
    return lines, slower


def read(path: Path) -> tuple[list[Record], list[Record]]:
    """Timings of a pytest-benchmark file, or the runs of a ``.jsonl`` file.

    Raises:
        UserError: no such file, or neither of the two.
    """
    try:
        text = path.read_text()
        if path.suffix == ".jsonl":
            runs = [json.loads(line) for line in text.splitlines()]
            return [], [r for r in runs if r["task"] and r["regime"] and r["losses"] and r["seconds"]]
        cases = json.loads(text)["benchmarks"]
        return [c for c in cases if c["fullname"] and c["stats"]["median"] and "extra_info" in c], []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no pytest-benchmark file and no file of convergence runs") from error


def _verdict(old: Record, new: Record) -> tuple[str, str]:
    """``slower``, ``faster`` or nothing, and the two values; of ratios the higher is better, of times the lower."""
    ratios = "speedup" in old["extra_info"] and "speedup" in new["extra_info"]
    (a, a_low, a_high), (b, b_low, b_high) = (_ratio(c) if ratios else _time(c) for c in (old, new))
    unit = "x" if ratios else " s"
    values = f"{a:.4g}{unit} ({a_low:.4g} - {a_high:.4g}) -> {b:.4g}{unit} ({b_low:.4g} - {b_high:.4g})"
    if a_low <= b <= a_high or b_low <= a <= b_high:
        return "", values
    return "faster" if (b > a) == ratios else "slower", values


def _ratio(case: Record) -> tuple[float, float, float]:
    return case["extra_info"]["speedup"], *case["extra_info"]["spread"]


def _time(case: Record) -> tuple[float, float, float]:
    return case["stats"]["median"], case["stats"]["q1"], case["stats"]["q3"]


def _conditions(records: Iterable[Record]) -> str:
    stamps = list(dict.fromkeys(tuple(str(r.get(k, "")) for k in STAMP) for r in records))
    kept = [i for i, _ in enumerate(STAMP) if any(s[i] for s in stamps)]
    return "## Conditions\n\n" + _table([STAMP[i] for i in kept], [[s[i] for i in kept] for s in stamps])


def _ratio_sections(cases: list[Record], out: Path) -> list[str]:
    sections = []
    for against in dict.fromkeys(c["extra_info"].get("against", "eager") for c in cases):
        members = [c for c in cases if c["extra_info"].get("against", "eager") == against]
        picture = charts.bars(against, members, out)
        sections.append(f"## Against {against}\n\n{_ratio_table(members)}\n\n{_image(picture)}")
    deep = [c for c in cases if "depth" in c["extra_info"]]
    return [*sections, f"## Depth\n\n{_image(charts.depth(deep, out))}"] if deep else sections


def _ratio_table(cases: list[Record]) -> str:
    columns = ["case", "speed-up (lowest - highest)", "limit by forwards", "seconds", "trials a unit", "peak MiB"]
    return _table(columns, map(_ratio_row, cases))


def _ratio_row(case: Record) -> list[str]:
    info, (median, low, high) = case["extra_info"], _ratio(case)
    limit = f"{info['limit']:.2f}x" if "limit" in info else "-"
    peaks = _memory(info["peak_mib"]) if "peak_mib" in info else "-"
    trials = str(info.get("trials_per_unit", "-"))
    return [
        charts.label(case),
        f"{median:.2f}x ({low:.2f} - {high:.2f})",
        limit,
        f"{_time(case)[0]:.4g}",
        trials,
        peaks,
    ]


def _memory(peaks: Record) -> str:
    found = ", ".join(f"{name} {mib}" for name, mib in peaks.items())
    return (
        f"{found} (als over adamw {peaks['als'] / peaks['adamw']:.2f}x)" if {"als", "adamw"} <= peaks.keys() else found
    )


def _kernel_sections(cases: list[Record], out: Path) -> list[str]:
    if not cases:
        return []
    rows = [
        [charts.label(c), kernel, f"{rate:.4g}", f"{rate / c['extra_info']['copy_gbs']:.0%}"]
        for c in cases
        for kernel, rate in charts.rates(c)
    ]
    page = _table(["case", "kernel", "GB/s", "of the copy bandwidth"], rows)
    return [f"## Kernels\n\n{page}\n\n{_image(charts.roof(cases, out))}"]


def _time_sections(cases: list[Record]) -> list[str]:
    rows = []
    for case in cases:
        median, low, high = _time(case)
        others = ", ".join(f"{k} {v}" for k, v in case["extra_info"].items() if k not in STAMP)
        rows.append([charts.label(case), f"{median:.4g} ({low:.4g} - {high:.4g})", others or "-"])
    return ["## Times\n\n" + _table(["case", "seconds (quartiles)", "beside"], rows)] if rows else []


def _run_sections(runs: list[Record], out: Path) -> list[str]:
    """Table and pictures of one task in one regime."""
    regime = "all" if runs[0]["regime"] == "full" else runs[0]["regime"]
    title = f"{runs[0]['task']}, {regime} training samples"
    pictures = [charts.losses(title, runs, tuning.best_rate(runs), out)]
    pictures += [charts.heat_map(title, r, out) for r in [r for r in runs if "step_sizes" in r][:1]]
    images = "\n\n".join(map(_image, pictures))
    return [f"## {title}\n\n{_table(tuning.COLUMNS, tuning.rows(runs))}\n\n{images}"]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def _image(path: Path) -> str:
    return f"![{path.stem}]({path.name})"
