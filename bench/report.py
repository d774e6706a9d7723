"""The Markdown page of stored results, for ``fastals bench report``."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import charts
import sensitivity
import tuning
from records import Record, Results, bandwidth, device, mini_batch, quartiles, read_all, speedup
from stamp import STAMP

from fastals.cli.errors import UserError


def report(files: Sequence[Path], out: Path) -> Path:
    """Write ``report.md`` and its pictures into ``out``; returns the page.

    Raises:
        UserError: a file is no result, two results are of the same case on the same device, or ``out`` is no folder.
    """
    results = read_all(files)
    if not any(results):
        raise UserError(f"there is no result in {', '.join(map(str, files))}")
    _refuse_duplicates(results)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} is no folder to write the page to: {error.strerror}") from error
    page = out / "report.md"
    page.write_text("\n\n".join(["# Benchmark report", *_sections(results, out)]) + "\n")
    return page


def _refuse_duplicates(results: Results) -> None:
    _refuse_equal(results.cases, lambda c: (c["fullname"], device(c)))
    _refuse_equal(
        results.runs, lambda r: (r["task"], r["regime"], r["method"], f"seed {r['seed']}", r["steps"], r["device"])
    )
    _refuse_equal(results.figures, lambda f: (f["name"], f"batch {f['batch']}", f["device"]))


def _refuse_equal(records: Iterable[Record], identity: Callable[[Record], tuple[Hashable, ...]]) -> None:
    """Refuse two records of the same identity."""
    seen = set()
    for key in map(identity, records):
        if key in seen:
            raise UserError(
                f"there are two results of {', '.join(map(str, key))}: leave one file out, or compare the two files "
                "with fastals bench compare"
            )
        seen.add(key)


def _sections(results: Results, out: Path) -> list[str]:
    """The conditions, then the sections of each device."""
    cases, runs, figures = results
    sections = [_conditions([c["extra_info"] for c in cases] + runs + figures)]
    devices = list(dict.fromkeys([*map(device, cases), *(r["device"] for r in runs + figures)]))
    for name in devices:
        suffix = f" ({name})" if len(devices) > 1 else ""
        sections += _case_sections([c for c in cases if device(c) == name], suffix, out)
        sections += _first_light([f for f in figures if f["device"] == name], suffix)
        sections += _task_sections([r for r in runs if r["device"] == name], suffix, out)
    return sections


def _conditions(records: Iterable[Record]) -> str:
    """A table of the distinct stamps, without the columns that are empty in all of them."""
    stamps = list(dict.fromkeys(tuple(str(r.get(k, "")) for k in STAMP) for r in records))
    filled = [i for i, _ in enumerate(STAMP) if any(s[i] for s in stamps)]
    return "## Conditions\n\n" + _table([STAMP[i] for i in filled], [[s[i] for i in filled] for s in stamps])


def _first_light(figures: list[Record], suffix: str) -> list[str]:
    """The figures of a first light beside their predictions."""
    if not figures:
        return []
    rows = [[f["name"], f["unit"], str(f["batch"] or "-"), _predicted(f), *_measured(f)] for f in figures]
    columns = ["figure", "unit", "batch", "predicted", "measured", "measured / predicted"]
    return [f"## First light{suffix}\n\n{_table(columns, rows)}"]


def _predicted(figure: Record) -> str:
    return "-" if figure["predicted"] is None else f"{figure['predicted']:.4g}"


def _measured(figure: Record) -> list[str]:
    if "measured" not in figure:
        return [figure.get("failed") or figure.get("why_not") or "-", "-"]
    ratio = "-" if figure["predicted"] is None else f"{figure['measured'] / figure['predicted']:.2f}"
    return [f"{figure['measured']:.4g}", ratio]


def _case_sections(cases: list[Record], suffix: str, out: Path) -> list[str]:
    """Outcome of the exactness tests, tables and pictures of the cases of one device."""
    ratios = [c for c in cases if "speedup" in c["extra_info"]]
    kernels = [c for c in cases if "kernels" in c["extra_info"]]
    roofs = [c for c in cases if "copy_roof_gbs" in c["extra_info"]]
    times = [c for c in cases if c not in ratios + kernels + roofs]
    sections = [_gates_sentence(cases, suffix)] if cases else []
    for title in dict.fromkeys(map(charts.family, ratios)):
        members = [c for c in ratios if charts.family(c) == title]
        picture = charts.bars(title + suffix, members, out)
        sections.append(f"## {_capital(title)}{suffix}\n\n{_ratio_table(members)}\n\n{_image(picture)}")
    deep = [c for c in ratios if "depth" in c["extra_info"]]
    if deep:
        sections.append(f"## Depth{suffix}\n\n{_image(charts.depth('Depth' + suffix, deep, out))}")
    if kernels or roofs:
        sections.append("\n\n".join([f"## Kernels{suffix}", *map(_roofs, roofs)]))
    if kernels:
        picture = charts.roof("Kernels under the roof" + suffix, kernels, out)
        sections += [_kernel_table(kernels), _image(picture)]
    return [*sections, f"## Times{suffix}\n\n{_time_table(times)}"] if times else sections


def _gates(case: Record) -> str:
    """Outcome of the exactness tests of the case."""
    gates = case["extra_info"].get("gates", "not run")
    if isinstance(gates, list) or gates == "said to have passed":  # older files: only cases that passed were timed
        return "passed"
    return str(gates)


def _gates_sentence(cases: list[Record], suffix: str) -> str:
    passed = sum(_gates(case) == "passed" for case in cases)
    if passed == len(cases):
        return f"Exactness tests{suffix}: passed for all cases."
    return f"Exactness tests{suffix}: passed for {passed} of {len(cases)} cases; the others are marked below."


def _case_table(columns: Sequence[str], rows: Iterable[tuple[Record, Sequence[str]]]) -> str:
    """A table of cases; unless all passed, the second column is the outcome of their exactness tests."""
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
    info, (median, low, high) = case["extra_info"], speedup(case)
    return [
        charts.label(case),
        mini_batch(case),
        f"{median:.2f}x ({low:.2f} - {high:.2f})",
        f"{info['by_forwards']:.2f}x" if "by_forwards" in info else "-",
        f"{quartiles(case)[0]:.4g}",
        " / ".join(f"{t:g}" for t in info.get("trials_per_unit", ())) or "-",
        _memory(info["peak_mib"]) if "peak_mib" in info else "-",
    ]


def _memory(peaks: Record) -> str:
    text = ", ".join(f"{name} {mib}" for name, mib in peaks.items())
    both = "als" in peaks and peaks.get("adamw")
    return f"{text} (als over adamw {peaks['als'] / peaks['adamw']:.2f}x)" if both else text


def _roofs(case: Record) -> str:
    copy, product = (case["extra_info"][key] for key in ("copy_roof_gbs", "matmul_roof_tflops"))
    gates = _gates(case)
    return (
        f"The roofs, measured on the same device: a copy moves {copy:.4g} GB/s, a bfloat16 matrix product does "
        f"{product:.4g} TFLOP/s." + ("" if gates == "passed" else f" Exactness tests: {gates}.")
    )


def _kernel_table(cases: list[Record]) -> str:
    rows = [
        (case, [charts.label(case), name, f"{k['gbs']:.4g}", "{:.1%} ({:.1%} - {:.1%})".format(*bandwidth(k))])
        for case in cases
        for name, k in case["extra_info"]["kernels"].items()
    ]
    return _case_table(["case", "kernel", "GB/s", "of the copy bandwidth (lowest - highest)"], rows)


def _time_table(cases: list[Record]) -> str:
    rows = []
    for case in cases:
        median, low, high = quartiles(case)
        others = ", ".join(f"{k} {v}" for k, v in case["extra_info"].items() if k not in (*STAMP, "gates"))
        rows.append((case, [charts.full_name(case), f"{median:.4g} ({low:.4g} - {high:.4g})", others or "-"]))
    return _case_table(["case", "seconds (quartiles)", "beside"], rows)


def _task_sections(runs: list[Record], suffix: str, out: Path) -> list[str]:
    """Table and pictures of each task in the convergence runs of one device."""
    sections = []
    for task, regime, steps in dict.fromkeys((r["task"], r["regime"], r["steps"]) for r in runs):
        members = [r for r in runs if (r["task"], r["regime"], r["steps"]) == (task, regime, steps)]
        samples = "all" if regime == "full" else regime
        title = f"{task}, {samples} training samples, {steps} steps{suffix}"
        pictures = [charts.losses(title, members, tuning.best_rate(members), out)]
        searched = sorted((r for r in members if "step_sizes" in r), key=lambda r: r["method"] != "als")
        pictures += [charts.heat_map(title, run, out) for run in searched[:1]]
        images = "\n\n".join(map(_image, pictures))
        sections.append(f"## {_capital(title)}\n\n{_comparisons(members)}\n\n{images}")
    return sections


def _comparisons(runs: list[Record]) -> str:
    """Tables of the runs of one task and length: at equal steps, at equal work, and of the sensitivity."""
    head, *rows = tuning.at_equal_steps(runs)
    tables = [_table(head, rows)]
    titled = {"At equal forward passes": tuning.at_equal_work(runs), "Sensitivity": sensitivity.table(runs)}
    tables += [f"### {title}\n\n{_table(head, rows)}" for title, (head, *rows) in titled.items() if rows]
    return "\n\n".join(tables)


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def _image(path: Path) -> str:
    return f"![{path.stem}]({path.name})"
