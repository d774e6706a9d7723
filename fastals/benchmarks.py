"""Pages and comparisons of stored results: pytest-benchmark's JSON and the lines of ``bench/convergence.py``."""

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastals import charts, tuning
from fastals.errors import UserError
from fastals.stamp import STAMP

Record = dict[str, Any]
RUN = ("task", "regime", "method", "seed", "steps", "loss", "accuracy", "losses", "seconds", "forwards", "device")


def report(files: Sequence[Path], out: Path) -> Path:
    """Write ``report.md`` and its pictures into ``out``; returns the page.

    Raises:
        UserError: a file that is no result, two results of the same case on the same device, or no folder ``out``.
    """
    found = [read(path) for path in files]
    cases, runs = [c for cases, _ in found for c in cases], [r for _, runs in found for r in runs]
    if not cases and not runs:
        raise UserError(f"there is no result in {', '.join(map(str, files))}")
    _refuse_twins(cases, lambda c: (c["fullname"], _device(c)))
    _refuse_twins(runs, lambda r: (r["task"], r["regime"], r["method"], f"seed {r['seed']}", r["steps"], r["device"]))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} is no folder to write the page to: {error.strerror}") from error
    sections = [_conditions([c["extra_info"] for c in cases] + runs)]
    devices = list(dict.fromkeys([*map(_device, cases), *(r["device"] for r in runs)]))
    for device in devices:
        where = f" ({device})" if len(devices) > 1 else ""
        sections += _case_sections([c for c in cases if _device(c) == device], where, out)
        sections += _task_sections([r for r in runs if r["device"] == device], where, out)
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
    devices = [sorted(set(map(_device, cases.values()))) for cases in (old, new)]
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
            return [], [r for r in runs if [r[key] for key in RUN]]
        cases = json.loads(text)["benchmarks"]
        return [c for c in cases if (c["fullname"], _device(c), _time(c))], []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no pytest-benchmark file and no file of convergence runs") from error


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


def _case_sections(cases: list[Record], where: str, out: Path) -> list[str]:
    """Tables and pictures of the timings of one device."""
    ratios = [c for c in cases if "speedup" in c["extra_info"]]
    kernels = [c for c in cases if "kernels" in c["extra_info"]]
    times = [c for c in cases if c not in ratios and c not in kernels]
    sections = []
    for title in dict.fromkeys(map(charts.family, ratios)):
        members = [c for c in ratios if charts.family(c) == title]
        picture = charts.bars(title + where, members, out)
        sections.append(f"## {_capital(title)}{where}\n\n{_ratio_table(members)}\n\n{_image(picture)}")
    deep = [c for c in ratios if "depth" in c["extra_info"]]
    if deep:
        sections.append(f"## Depth{where}\n\n{_image(charts.depth('Depth' + where, deep, out))}")
    if kernels:
        picture = charts.roof("Kernels under the roof" + where, kernels, out)
        sections.append(f"## Kernels{where}\n\n{_kernel_table(kernels)}\n\n{_image(picture)}")
    return [*sections, f"## Times{where}\n\n{_time_table(times)}"] if times else sections


def _ratio_table(cases: list[Record]) -> str:
    columns = [
        "case", "speed-up (lowest - highest)", "from forward passes alone", "seconds", "trials a unit", "peak MiB",
    ]  # fmt: skip
    return _table(columns, map(_ratio_row, cases))


def _ratio_row(case: Record) -> list[str]:
    info, (median, low, high) = case["extra_info"], _ratio(case)
    return [
        charts.label(case),
        f"{median:.2f}x ({low:.2f} - {high:.2f})",
        f"{info['by_forwards']:.2f}x" if "by_forwards" in info else "-",
        f"{_time(case)[0]:.4g}",
        " / ".join(map(str, info.get("trials_per_unit", "-"))),
        _memory(info["peak_mib"]) if "peak_mib" in info else "-",
    ]


def _memory(peaks: Record) -> str:
    found = ", ".join(f"{name} {mib}" for name, mib in peaks.items())
    both = {"als", "adamw"} <= peaks.keys()
    return f"{found} (als over adamw {peaks['als'] / peaks['adamw']:.2f}x)" if both else found


def _kernel_table(cases: list[Record]) -> str:
    rows = [
        [
            charts.label(case),
            name,
            f"{k['gbs']:.4g}",
            f"{k['of_roof']:.1%} ({k['spread'][0]:.1%} - {k['spread'][1]:.1%})",
        ]
        for case in cases
        for name, k in case["extra_info"]["kernels"].items()
    ]
    return _table(["case", "kernel", "GB/s", "of the copy bandwidth (lowest - highest)"], rows)


def _time_table(cases: list[Record]) -> str:
    rows = []
    for case in cases:
        median, low, high = _time(case)
        others = ", ".join(f"{k} {v}" for k, v in case["extra_info"].items() if k not in STAMP)
        rows.append([charts.full_name(case), f"{median:.4g} ({low:.4g} - {high:.4g})", others or "-"])
    return _table(["case", "seconds (quartiles)", "beside"], rows)


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
