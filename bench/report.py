"""The Markdown page of stored results, for ``fastals bench report``."""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import charts
import sensitivity
import tuning
from records import Record, Results, bandwidth, device, mini_batch, quartiles, read_all, speedup
from stamp import STAMP
from tuning import of_method

from fastals.cli.errors import UserError

CONTENTS = 3  # sections of a page without a table of contents, at most
SPREAD = "Means of the seeds, in brackets the lowest and the highest of them."
NAMES = {  # beginning of a method's name: what it is
    "als": "`als` is fastals with its defaults, or with other arguments where the name has some.",
    "adamw": "`adamw` is torch's AdamW with this learning rate.",
    "capped": "`capped` moves the units as `als` does, by this share of their weights, without a search.",
    "salsa": "`salsa` is SaLSA, a line search over all weights at once.",
    "schedule-free": "`schedule-free` is schedule-free AdamW, with its default learning rate or this one.",
    "prodigy": "`prodigy` is Prodigy, which estimates a learning rate.",
    "eager": "`eager` makes the search of `als` without the cache of activations.",
}
AFTER = {  # within a method's name: what it is
    "before": "`before` a commit: measured before this commit changed the method.",
    "equal work": "`equal work`: fewer steps, with about the forward passes of AdamW.",
    "constant lr": "`constant lr`: without the cosine that the others anneal by.",
    "x steps": "`4x steps`: four times as many steps.",
}


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
    sections = _sections(results, out)
    page.write_text("\n\n".join([*_beginning(results, sections), *sections]) + "\n")
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


def _beginning(results: Results, sections: list[str]) -> list[str]:
    """Title, a sentence that says what the page is, and a table of contents if there are many sections."""
    records = _stamped(results)
    devices, commits = (_listed(str(r.get(key, "unknown")) for r in records) for key in ("device", "commit"))
    titles = [line.removeprefix("## ") for section in sections for line in section.splitlines() if line[:3] == "## "]
    contents = "\n".join(f"* [{title}](#{_anchor(title)})" for title in titles)
    sentence = (
        f"Measurements of fastals on {devices} at commit {commits}, drawn from stored results by `fastals bench "
        "report`. How they are made is in `bench/README.md`; versions and settings are [at the end](#conditions)."
    )
    return [f"# Benchmarks on {devices}", sentence, *([contents] if len(titles) > CONTENTS else [])]


def _listed(words: Iterable[str]) -> str:
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} and {last}" if others else last


def _anchor(title: str) -> str:
    """The address of a heading within the page."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _sections(results: Results, out: Path) -> list[str]:
    """The sections of each device, then the names of the methods and the conditions."""
    sections = []
    devices = list(dict.fromkeys(r["device"] for r in _stamped(results)))
    for name in devices:
        suffix = f" ({name})" if len(devices) > 1 else ""
        cases = [c for c in results.cases if device(c) == name]
        runs, figures = ([r for r in records if r["device"] == name] for records in results[1:])
        sections += [_gates_sentence(cases, suffix)] if cases else []
        sections += _overview(runs, suffix)
        sections += _case_sections(cases, suffix, out)
        sections += _first_light(figures, suffix)
        sections += _task_sections(runs, suffix, out)
    return [*sections, *_names(results.runs), _conditions(_stamped(results))]


def _stamped(results: Results) -> list[Record]:
    return [c["extra_info"] for c in results.cases] + results.runs + results.figures


def _conditions(records: list[Record]) -> str:
    """What all stamps have in common, and an entry for each with the rest of it."""
    keys = ["commit", *(key for key in STAMP if key != "commit")]
    stamps = list(dict.fromkeys(tuple(f"{k} {r[k]}" if r.get(k, "") != "" else "" for k in keys) for r in records))
    common = [len(set(column)) == 1 for column in zip(*stamps, strict=True)]
    entries = [", ".join(text for text, shared in zip(s, common, strict=True) if text and not shared) for s in stamps]
    every = ", ".join(text for text, shared in zip(stamps[0], common, strict=True) if text and shared)
    return "\n".join(["## Conditions", "", *(f"* {entry}" for entry in [every, *entries] if entry)])


def _names(runs: list[Record]) -> list[str]:
    """What the names of the methods mean."""
    names = {r["method"] for r in runs}
    notes = [note for start, note in NAMES.items() if any(name.startswith(start) for name in names)]
    notes += [note for part, note in AFTER.items() if any(part in name for name in names)]
    return ["\n".join(["## Names of the methods", "", *(f"* {note}" for note in notes)])] if notes else []


def _overview(runs: list[Record], suffix: str) -> list[str]:
    """Held-out figures of the tasks side by side, if there are several tasks."""
    tasks = _by_task(runs, suffix)
    if len(tasks) < 2:
        return []
    rows = [
        [f"[{title.replace(', all training samples', '')}](#{_anchor(title)})", *tuning.overview(members)]
        for title, members in tasks.items()
    ]
    filled = [i for i in range(len(rows[0])) if any(row[i] != "-" for row in rows)]
    head = ["task", *tuning.FAMILIES]
    overview = table([head[i] for i in filled], [[row[i] for i in filled] for row in rows])
    words = (
        f"Held-out accuracy, or perplexity of language models (the numbers above 1), at equal steps. {SPREAD} Where "
        "several rates or shares were tried, the best one by hindsight, which is named."
    )
    return [f"## All tasks{suffix}\n\n{words}\n\n{overview}"]


def _first_light(figures: list[Record], suffix: str) -> list[str]:
    """The figures of a first light beside their predictions."""
    if not figures:
        return []
    rows = [[f["name"], f["unit"], str(f["batch"] or "-"), _predicted(f), *_measured(f)] for f in figures]
    columns = ["figure", "unit", "batch", "predicted", "measured", "measured / predicted"]
    words = "Figures of a short run, beside the predictions that were made before it."
    return [f"## First light{suffix}\n\n{words}\n\n{table(columns, rows)}"]


def _predicted(figure: Record) -> str:
    return "-" if figure["predicted"] is None else f"{figure['predicted']:.4g}"


def _measured(figure: Record) -> list[str]:
    if "measured" not in figure:
        return [figure.get("failed") or figure.get("why_not") or "-", "-"]
    ratio = "-" if figure["predicted"] is None else f"{figure['measured'] / figure['predicted']:.2f}"
    return [f"{figure['measured']:.4g}", ratio]


def _case_sections(cases: list[Record], suffix: str, out: Path) -> list[str]:
    """Tables and pictures of the cases of one device."""
    ratios = [c for c in cases if "speedup" in c["extra_info"]]
    kernels = [c for c in cases if "kernels" in c["extra_info"]]
    roofs = [c for c in cases if "copy_roof_gbs" in c["extra_info"]]
    times = [c for c in cases if c not in ratios + kernels + roofs]
    sections = []
    ratios.sort(key=lambda c: not _of_default(c))
    for title in dict.fromkeys(map(charts.family, ratios)):
        members = [c for c in ratios if charts.family(c) == title]
        picture = _speedups(title, members, charts.bars(title + suffix, members, out))
        sections.append("\n\n".join([f"## {_capital(title)}{suffix}", *_ratio_tables(members), picture]))
    deep = [c for c in ratios if "depth" in c["extra_info"]]
    if deep:
        sections.append(f"## Depth{suffix}\n\n{_depths(charts.depth('Depth' + suffix, deep, out))}")
    if kernels or roofs:
        sections.append("\n\n".join([f"## Kernels{suffix}", *map(_roofs, roofs)]))
    if kernels:
        sections += [_kernel_table(kernels), _kernels(charts.roof("Kernels under the roof" + suffix, kernels, out))]
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
        return table(columns, [row for _, row in marked])
    return table([columns[0], "exactness tests", *columns[1:]], [[row[0], g, *row[1:]] for g, row in marked])


def _of_default(case: Record) -> bool:
    """Whether the case is of the default method: the relay, or ALS beside other optimizers."""
    return not {"relay", "als"}.isdisjoint(re.split(r"[^a-z]+", charts.full_name(case)))


def _ratio_tables(cases: list[Record]) -> list[str]:
    """Speed-ups, and the peak memory of the cases that have it."""
    columns = [
        "case", "mini-batch", "speed-up (lowest - highest)", "from forward passes alone", "seconds", "trials a unit",
    ]  # fmt: skip
    tables = [_case_table(columns, [(case, _ratio_row(case)) for case in cases])]
    weighed = [c for c in cases if "peak_mib" in c["extra_info"]]
    if weighed:
        names = list(dict.fromkeys(name for c in weighed for name in c["extra_info"]["peak_mib"]))
        rows = [_memory_row(c, names) for c in weighed]
        tables.append("Peak memory in MiB:\n\n" + table(["case", *names, "als over adamw"], rows))
    return tables


def _ratio_row(case: Record) -> list[str]:
    info, (median, low, high) = case["extra_info"], speedup(case)
    return [
        charts.label(case),
        mini_batch(case),
        f"{median:.2f}x ({low:.2f} - {high:.2f})",
        f"{info['by_forwards']:.2f}x" if "by_forwards" in info else "-",
        f"{quartiles(case)[0]:.4g}",
        " / ".join(f"{t:g}" for t in info.get("trials_per_unit", ())) or "-",
    ]


def _memory_row(case: Record, names: list[str]) -> list[str]:
    peaks = case["extra_info"]["peak_mib"]
    ratio = f"{peaks['als'] / peaks['adamw']:.2f}x" if "als" in peaks and peaks.get("adamw") else "-"
    return [charts.label(case), *(str(peaks.get(name, "-")) for name in names), ratio]


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
    for title, members in _by_task(runs, suffix).items():
        best, names = tuning.best_rate(members), tuning.drawn(members)
        shown = [r for name in names for r in of_method(members, name)]
        pictures = [_curves(title, shown, members, charts.losses(title, shown, best, out))]
        searched = sorted((r for r in members if "step_sizes" in r), key=lambda r: r["method"] not in names[:1])
        pictures += [_step_sizes(title, run, charts.heat_map(title, run, out)) for run in searched[:1]]
        sections.append("\n\n".join([f"## {_capital(title)}", _comparisons(members), *pictures]))
    return sections


def _by_task(runs: list[Record], suffix: str) -> dict[str, list[Record]]:
    """The runs by title of their section, those with the default method first."""
    tasks: dict[str, list[Record]] = {}
    for run in runs:
        samples = "all" if run["regime"] == "full" else run["regime"]
        title = f"{run['task']}, {samples} training samples, {run['steps']} steps{suffix}"
        tasks.setdefault(title, []).append(run)
    return dict(sorted(tasks.items(), key=lambda item: not of_method(item[1], "als")))


def _comparisons(runs: list[Record]) -> str:
    """Tables of the runs of one task and length: at equal steps, of the searches, at equal work, of the sensitivity."""
    head, *rows = tuning.at_equal_steps(runs)
    tables = [SPREAD, table(head, rows)]
    titled = {
        "The searches": tuning.searches(runs),
        "At equal forward passes": tuning.at_equal_work(runs),
        "Sensitivity": sensitivity.table(runs),
    }
    tables += [f"### {title}\n\n{table(head, rows)}" for title, (head, *rows) in titled.items() if rows]
    return "\n\n".join(tables)


def _speedups(title: str, cases: list[Record], path: Path) -> str:
    against = cases[0]["extra_info"]["against"]
    caption = f"Bars: median speed-up against {against}, the line at 1; error bars: lowest and highest of the rounds."
    if any("by_forwards" in c["extra_info"] for c in cases):
        caption += " Upright marks: the speed-up if only forward passes took time, a backward counted as two."
    return _picture(path, f"Bar chart of the speed-ups of the cases of {title}.", caption)


def _depths(path: Path) -> str:
    caption = (
        "Lines: median speed-up; error bars: lowest and highest of the rounds; dashed: the speed-up if only forward "
        "passes took time."
    )
    return _picture(path, "Line chart of the speed-up over the number of blocks of the model.", caption)


def _kernels(path: Path) -> str:
    caption = (
        "Bars: median bandwidth of each kernel, as a share of that of a copy in the same run, the line at 1; error "
        "bars: lowest and highest of the rounds."
    )
    return _picture(path, "Bar chart of the bandwidth of each kernel over that of a copy.", caption)


def _curves(title: str, shown: list[Record], runs: list[Record], path: Path) -> str:
    """The picture of the losses; its caption names the methods that are left out."""
    methods = dict.fromkeys(r["method"] for r in shown)
    several = any(len(of_method(shown, m)) > 1 for m in methods)
    caption = "Running mean of the loss of each mini-batch before the step" + (
        "; lines: mean of the seeds, bands: from their lowest to their highest." if several else ", of one seed each."
    )
    if not charts.timed(shown):
        caption += " No panel of seconds: the runs shared the device."
    left_out = [f"`{m}`" for m in dict.fromkeys(r["method"] for r in runs) if m not in methods]
    if left_out:
        caption += f" In the tables and not drawn: {', '.join(left_out)}."
    return _picture(path, f"Line chart of the training loss of {len(methods)} methods on {title}.", caption)


def _step_sizes(title: str, run: Record, path: Path) -> str:
    caption = (
        f"Step size of each unit in each step of `{run['method']}` with seed {run['seed']}, the embeddings at the "
        "bottom and the head at the top; white: the unit did not move; darkest: this small or smaller."
    )
    if "factors" in run:
        caption += " Below: the common factor of the joint tests."
    return _picture(path, f"Heat map of the step sizes of {run['method']} by unit and step on {title}.", caption)


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def _picture(path: Path, alternative: str, caption: str) -> str:
    return f"![{alternative}]({path.name})\n\n*{caption}*"
