"""The figures in README and docs, from stored results: a page names a table between two comments, this fills it in.

python bench/figures.py            # write them into the pages
python bench/figures.py --demo DIR # store the runs of ``make demo`` first
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from records import Record, read, speedup
from report import table
from stamp import stamp
from tuning import best_rate, merit, of_method, spread

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
CPU, H100, H200 = (RESULTS / n for n in ("intel-r-xeon-r-processor", "nvidia-h100-80gb-hbm3", "nvidia-h200"))
PROFILE = CPU / "2abec49-quick.json", CPU / "2abec49-full.json"  # the newest full profile, in two parts
DEMO = CPU / "demo.json"
RELAY, GRAPHS = H200 / "0a83002-first-light.json", H100 / "e7e5e47-first-light.json"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->).*?(<!-- end of figures -->)", re.DOTALL)
TASKS = {"bbc-news": "BBC News", "film-reviews": "film reviews", "tweets": "tweets", "sms-spam": "SMS spam"}
STEPS = 240
TELLING = {
    "**ALS (relay)**": "als", "SaLSA": "salsa", "AdamW at 1e-4": "adamw 0.0001", "AdamW at 3e-5": "adamw 3e-05",
    "AdamW at 3e-4": "adamw 0.0003", "no search, r = 0.0015": "capped 0.0015", "no search, r = 0.2": "capped 0.2",
}  # fmt: skip
EQUAL_WORK = "als before 639c5a7, equal work"
BEFORE = " before 3260cb2"  # steps of full length where the gradient is small


def fill(text: str) -> str:
    """The page with the figures that it names.

    Raises:
        KeyError: there are no figures of a name in it.
    """

    def block(match: re.Match[str]) -> str:
        figures = FIGURES[match[2]]()
        gap = "\n\n" if "\n" in figures else ""
        return f"{match[1]}{gap}{figures}{gap}{match[3]}"

    return MARKED.sub(block, text)


# Convergence


@cache
def _stored() -> dict[tuple[str, int, str], list[Record]]:
    """Runs by task, steps and method: the newest ones, and those from before a change of the method if no others."""
    runs = [r for folder in (CPU, H200) for r in read(folder / "convergence.jsonl").runs if r["regime"] == "full"]
    newest: dict[tuple[str, int, str], list[Record]] = {}
    for suffix in ("", BEFORE):
        named = [r for r in runs if r["method"].endswith(suffix)]
        for run in named:
            key = run["task"], run["steps"], run["method"].removesuffix(suffix)
            chosen = newest.setdefault(key, [])
            if not chosen or (chosen[0]["device"], chosen[0]["older"]) == (run["device"], bool(suffix)):
                chosen.append(run | {"method": key[2], "older": bool(suffix)})
    return newest


def _runs(task: str, method: str, steps: int = STEPS) -> list[Record]:
    return _stored()[task, steps, method]


def _all_of(task: str, family: str) -> list[Record]:
    """The runs of all methods of a family, by their names."""
    return [
        r for (of, steps, name), runs in sorted(_stored().items(), key=lambda item: item[0])
        if (of, steps) == (task, STEPS) and re.fullmatch(rf"{family} [\d.e-]+", name)
        for r in runs
    ]  # fmt: skip


def _rates(task: str) -> list[Record]:
    return _all_of(task, "adamw")


def _best_adamw(task: str) -> list[Record]:
    return of_method(_rates(task), best_rate(_rates(task)))


def _shares(task: str) -> list[Record]:
    return _all_of(task, "capped")


def _best_share(task: str) -> list[Record]:
    """Units moved by a relative step without a search: the best size by hindsight."""
    shares = _shares(task)
    by_size = [of_method(shares, name) for name in dict.fromkeys(r["method"] for r in shares)]
    return max(by_size, key=lambda runs: _mean(map(merit, runs)))


def _sizes(runs: Iterable[Record]) -> int:
    return len({r["method"] for r in runs})


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def _passes(runs: Iterable[Record]) -> float:
    return _mean(r["forwards"][-1] for r in runs)


def _spent(runs: Sequence[Record]) -> float:
    """Forward passes of one run of every method, which finding the best one takes."""
    return sum(_passes(of_method(runs, m)) for m in {r["method"] for r in runs})


def accuracies() -> str:
    """Held-out accuracy of the telling methods on every task, and the forward passes of a run."""
    rows = [
        [title, *_accuracy(method), f"{_mean(_passes(_runs(t, method)) for t in TASKS):,.0f}"]
        for title, method in TELLING.items()
    ]
    return table(["method", *TASKS.values(), "forward passes"], rows)


def _accuracy(method: str) -> list[str]:
    return [f"{_mean(r['accuracy'] for r in _runs(task, method)):.1%}" for task in TASKS]


def origins() -> str:
    """Where the rows of :func:`accuracies` were made."""
    return _origins({title: _runs("tweets", method) for title, method in TELLING.items()})


def passes() -> str:
    """Forward passes that a step of the relay takes, a backward counted as two."""
    return f"{_mean(_passes(_runs(t, 'als')) for t in TASKS) / STEPS:.1f}"


def sweep_passes() -> str:
    """The fewest and the most forward passes that a step of the sweep takes, by tasks."""
    steps = [_passes(_runs(t, "als sweep")) / STEPS for t in TASKS]
    return f"{min(steps):.0f} to {max(steps):.0f}"


def gap() -> str:
    """Most that the relay's mean accuracy lies below that of AdamW at its best rate, in points."""
    gaps = [_mean(r["accuracy"] for r in _best_adamw(t)) - _mean(r["accuracy"] for r in _runs(t, "als")) for t in TASKS]
    return f"{100 * max(gaps):.1f}"


def share_of_tuning() -> str:
    """Forward passes of the relay by those of AdamW at every rate."""
    return f"{_mean(_passes(_runs(t, 'als')) / _spent(_rates(t)) for t in TASKS):.0%}"


def scatter() -> str:
    """Largest difference of two seeds of the relay, in points of accuracy."""
    accuracies = [[r["accuracy"] for r in _runs(t, "als")] for t in TASKS]
    return f"{100 * max(max(a) - min(a) for a in accuracies):.1f}"


def rises() -> str:
    """How many steps of the relay raised the loss of their mini-batch, of how many."""
    runs = [r for t in TASKS for r in _runs(t, "als")]
    return f"{sum(r['rises'] for r in runs)} of {sum(len(r['losses']) for r in runs):,}"


def equal_work() -> str:
    """Accuracy of the relay in as many forward passes as AdamW's, beside AdamW at its best rate."""
    rows = []
    for task, title in TASKS.items():
        ours, best = _runs(task, EQUAL_WORK), _best_adamw(task)
        accuracies = (spread([r["accuracy"] for r in runs], 3) for runs in (ours, best))
        steps = f"{_mean(len(r['losses']) for r in ours):.0f}"
        rows.append([title, *accuracies, steps, f"{_passes(ours):,.0f}", f"{_passes(best):,.0f}"])
    columns = ["task", "ALS, relay", "AdamW, best rate", "steps of ALS", "its forward passes", "AdamW's"]
    return (
        f"{table(columns, rows)}\n\nALS: commit {_commits(_runs('tweets', EQUAL_WORK))}, with the moves of that time."
    )


def on_task(task: str) -> str:
    """Loss, accuracy and work of every method on one task, then where and when they were run."""
    rates, shares = _rates(task), _shares(task)
    best, size = _best_adamw(task), _best_share(task)
    methods = {
        "**ALS, relay**": _runs(task, "als"),
        f"AdamW at {_number(best)}, best of {_sizes(rates)} rates": best,
        "AdamW at 3e-4": _runs(task, "adamw 0.0003"),
        f"no search, r = {_number(size)}, best of {_sizes(shares)}": size,
        "no search, r = 0.2": _runs(task, "capped 0.2"),
        "ALS, sweep": _runs(task, "als sweep"),
        "SaLSA": _runs(task, "salsa"),
        "schedule-free AdamW at 3e-4": _runs(task, "schedule-free 3e-4"),
        "Prodigy": _runs(task, "prodigy"),
    }
    rows = [[name, *_outcome(runs)] for name, runs in methods.items()]
    columns = ["method", "training loss", "held-out accuracy", "forward passes", "steps that raised the loss", "seeds"]
    return f"{table(columns, rows)}\n\n{_origins(methods)}"


def _number(runs: Sequence[Record]) -> str:
    """The rate or the relative step in a method's name, as 1e-4 or 0.0015."""
    number = runs[0]["method"].rpartition(" ")[2]
    return f"{float(number):.0e}".replace("e-0", "e-") if float(number) < 1e-3 else number


def _outcome(runs: Sequence[Record]) -> list[str]:
    raised = str(sum(r["rises"] for r in runs)) if all("rises" in r for r in runs) else "-"
    loss, accuracy = (spread([r[key] for r in runs], 3) for key in ("loss", "accuracy"))
    return [loss, accuracy, f"{_passes(runs):,.0f}", raised, str(len(runs))]


def _origins(methods: dict[str, list[Record]]) -> str:
    """A sentence for each device and commit: which rows are of it."""
    places = {
        name.replace("*", ""): (runs[0]["device"], runs[0]["torch"], _commits(runs), runs[0]["older"])
        for name, runs in methods.items()
    }
    sentences = []
    names: Iterable[str]
    for (device, torch, commit, older), names in groupby(sorted(places, key=lambda n: places[n]), places.get):
        note = "; steps of full length where the gradient is small, as they were then" if older else ""
        sentences.append(f"{'; '.join(names)}: {device}, torch {torch}, commit {commit}{note}.")
    return " ".join(sentences)


def _commits(runs: Iterable[Record]) -> str:
    return ", ".join(dict.fromkeys(r["commit"] for r in runs))


def language_model() -> str:
    """Held-out perplexity of the language model, whole and by LoRA, after 60 steps."""
    rows = []
    for task, kind in {"dialogues": "whole", "dialogues-lora": "LoRA"}.items():
        methods = [
            name for of, _, name in _stored() if of == task and re.fullmatch(r"als|(adamw|capped) [\d.e-]+", name)
        ]
        for name in sorted(methods, key=lambda n: (n != "als", n)):
            runs = _runs(task, name, 60)
            perplexity = spread([r["perplexity"] for r in runs], 1)
            rows.append([kind, _title(name), perplexity, f"{_passes(runs):,.0f}", str(len(runs)), _commits(runs)])
    return table(["training", "method", "held-out perplexity", "forward passes", "seeds", "commit"], rows)


def _title(method: str) -> str:
    family, _, number = method.partition(" ")
    return {"als": "**ALS, relay**", "adamw": f"AdamW at {number}", "capped": f"no search, r = {number}"}[family]


# Speed


def _cases(test: str) -> list[Record]:
    return [c for path in PROFILE for c in read(path).cases if f"::{test}[" in c["fullname"]]


def _case(case: Record) -> str:
    return case["fullname"].partition("[")[2].removesuffix("]")


def against_eager() -> str:
    """Whole steps against the eager baseline on a CPU."""
    rows = []
    for case in _cases("test_step"):
        info = case["extra_info"]
        size = f"{info['batch']} x {info['length']}" if info["length"] else f"{info['batch']} images"
        trials = f"{info['trials_per_unit'][0]:g}"
        rows.append([_case(case), size, _ratio(case), f"{info['by_forwards']:.2f}x", trials])
    head = ["case", "mini-batch", "speed-up (lowest - highest)", "from forward passes alone", "trials a unit"]
    return f"{table(head, rows)}\n\n{_made()}"


def _ratio(case: Record) -> str:
    median, low, high = speedup(case)
    return f"{median:.2f}x ({low:.2f} - {high:.2f})"


def against_adamw() -> str:
    """Time of a step by that of AdamW on a CPU."""
    rows = []
    for case in _cases("test_instead"):
        info, (median, low, high) = case["extra_info"], speedup(case)
        name = _case(case).removesuffix("-minilm")
        by_passes = 1 / info["by_forwards"]
        rows.append([name, f"{1 / median:.2f}x ({1 / high:.2f} - {1 / low:.2f})", f"{by_passes:.2f}x"])
    head = ["optimizer", "time of a step by AdamW's (lowest - highest)", "from forward passes alone"]
    return f"{table(head, rows)}\n\n{_made()}"


def time_of_relay() -> str:
    """Time of a step of the relay by that of AdamW on a CPU, median of the rounds."""
    case = next(c for c in _cases("test_instead") if _case(c) == "als-minilm")
    return f"{1 / speedup(case).median:.1f}"


def memory() -> str:
    """Peak memory of two steps by that of AdamW."""
    cases = [c for c in _cases("test_step") if "peak_mib" in c["extra_info"]]
    rows = []
    for case in cases:
        peak = case["extra_info"]["peak_mib"]
        rows.append(
            [_case(case), *(str(peak[k]) for k in ("als", "eager", "adamw")), f"{peak['als'] / peak['adamw']:.2f}x"]
        )
    return table(["case", "ALS, MiB", "eager, MiB", "AdamW, MiB", "ALS by AdamW"], rows)


def _made() -> str:
    info = read(PROFILE[0]).cases[0]["extra_info"]
    return f"{info['device']}, {info['cores']} cores, torch {info['torch']}, commit {info['commit']}."


# GPU


def _milliseconds(path: Path) -> dict[str, list[str]]:
    """By name: milliseconds of a step at both sizes of the mini-batch."""
    times: dict[str, list[str]] = {}
    for figure in read(path).figures:
        if figure["unit"] == "ms" and "measured" in figure:
            times.setdefault(figure["name"], []).append(f"{figure['measured']:.1f}")
    return times


def on_gpus() -> str:
    """Milliseconds of a step on both GPUs."""
    names = {
        "relay, while, without waits between": "relay, captured, no wait between steps",
        "joint, while, without waits between": "`joint`, captured, no wait between steps",
        "joint accepted at once, while": "`joint`, captured",
        "sweep, while": "sweep, captured, loops on the device (`while`)",
        "sweep, host": "sweep, captured, loops by the host (`host`)",
        "sweep, eager fused": "sweep, fused kernels without capture",
        "sweep, eager baseline": "sweep, eager baseline",
        "AdamW": "AdamW, torch's fused one",
        "AdamW, captured": "AdamW, captured",
    }
    h100, h200 = _milliseconds(GRAPHS), _milliseconds(RELAY)
    rows = [[text, *h100.get(name, ["-"] * 2), *h200.get(name, ["-"] * 2)] for name, text in names.items()]
    columns = ["step", "H100, batch 8", "H100, 32", "H200, 8", "H200, 32"]
    conditions = "; ".join(_light_conditions(path) for path in (GRAPHS, RELAY))
    return f"{table(columns, rows)}\n\n{conditions}."


def on_gpus_in_short() -> str:
    """The lines of README: captured steps timed in turn with others."""
    kinds = {"adamw": "AdamW, torch's fused one", "adamw-captured": "AdamW, captured", "eager": "sweep, eager baseline"}
    rows = []
    for case in _captured_cases():
        info, is_sweep = case["extra_info"], "test_captured_sweep[" in case["fullname"]
        if is_sweep or _case(case).startswith("relay"):
            schedule = "sweep" if is_sweep else "relay"
            what = [f"{schedule}, captured", kinds[info["against"]], _gpu(info), str(info["batch"])]
            rows.append([*what, _ratio(case)])
    return table(["step", "against", "GPU", "batch", "times as fast (lowest - highest)"], rows)


def _light_conditions(path: Path) -> str:
    made = json.loads(path.read_text())["stamp"]
    return (
        f"{made['device']}, driver {made['driver']}, torch {made['torch']}, Triton {made['triton']}, "
        f"commit {made['commit']}"
    )


def captured() -> str:
    """Captured steps timed in turn with something."""
    rows = []
    for case in _captured_cases():
        info = case["extra_info"]
        what = f"{case['fullname'].split('::test_')[1]} against {info['against']}"
        rows.append([_gpu(info), what, str(info["batch"]), _ratio(case), info["commit"]])
    return table(["GPU", "case", "batch", "speed-up (lowest - highest)", "commit"], rows)


def _captured_cases() -> list[Record]:
    paths = (*sorted(H200.glob("*-*.json")), *sorted(H100.glob("*-*.json")))
    return [case for path in paths for case in read(path).cases if "bench_graph.py" in case["fullname"]]


def _gpu(info: Record) -> str:
    return info["device"].removeprefix("NVIDIA ").partition(" ")[0]


# The first run


def keep_demo(folder: Path) -> None:
    """Store the summaries of the runs of ``make demo``."""
    runs = {"als": folder, "eager": folder / "eager", "adamw": folder / "adamw"}
    summaries = {name: json.loads((run / "summary.json").read_text()) for name, run in runs.items()}
    DEMO.write_text(json.dumps({"stamp": stamp(), "runs": summaries}, indent=1) + "\n")


def demo() -> str:
    """The table that ``make demo`` ends with."""
    rows = [
        [name, f"{s['loss']:.4f}", f"{s['accuracy']:.1%}", f"{s['seconds']:.0f}", f"{s['forwards']:.0f}"]
        for name, s in _demo()["runs"].items()
    ]
    return table(["run", "training loss", "held-out accuracy", "seconds", "forward passes"], rows)


def demo_accuracies() -> str:
    """Accuracies of the three runs, in a sentence."""
    als, eager, adamw = (f"{_demo()['runs'][name]['accuracy']:.1%}" for name in ("als", "eager", "adamw"))
    return f"{als} with ALS, {eager} with its eager baseline and {adamw} with AdamW at 3e-4"


def demo_minutes() -> str:
    """Minutes that the three runs took."""
    return f"{sum(s['seconds'] for s in _demo()['runs'].values()) / 60:.0f}"


@cache
def _demo() -> dict[str, Any]:
    return json.loads(DEMO.read_text())


FIGURES: dict[str, Callable[[], str]] = {
    "accuracies": accuracies, "origins": origins, "passes": passes, "gap": gap, "share-of-tuning": share_of_tuning,
    "scatter": scatter, "sweep-passes": sweep_passes, "time": time_of_relay,
    "rises": rises, "equal-work": equal_work, "language-model": language_model, "against-eager": against_eager,
    "against-adamw": against_adamw, "memory": memory, "on-gpus": on_gpus, "on-gpus-in-short": on_gpus_in_short,
    "captured": captured, "demo": demo, "demo-minutes": demo_minutes, "demo-accuracies": demo_accuracies,
    **{task: partial(on_task, task) for task in TASKS},
}  # fmt: skip


def main() -> None:
    """Fill in all pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, metavar="DIR", help="store the runs of make demo in this folder first")
    arguments = parser.parse_args()
    if arguments.demo:
        keep_demo(arguments.demo)
    for page in PAGES:
        page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main()
