"""Loss over steps, seconds and forward passes on real text: one JSON line per run.

    python bench/convergence.py --out convergence.jsonl
    fastals bench report convergence.jsonl --out report

The tasks are those of :mod:`tasks`, the methods those of :mod:`methods`. Every method sees the same batches in the same
order. AdamW warms up for 10 % of the steps and anneals by a cosine to zero; ALS, its units without a search and Prodigy
anneal by the same cosine without a warm-up, but for ALS at a ``constant lr``; schedule-free AdamW warms up and SaLSA
does neither, as their authors say. With ``equal work`` ALS takes fewer steps, annealed over these, so that it makes
about as many forward passes as AdamW. Timed: forward, backward, step. Seconds are wall-clock time on a GPU and
processor time of this process, with one thread, on a CPU. Forward passes are counted as in :mod:`rivals`. The loss is
that of the mini-batch before each step; ``loss`` is its mean over the last fifth of the steps. Accuracy and perplexity
are held out and not timed. A run that ends with an error of the rival, or with a loss that is not finite, is kept with
a loss of NaN. With ``--processes`` runs are made side by side; on a GPU, which they share, their seconds are NaN.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from methods import METHODS, Method, Run, planned
from rivals import RIVALS, Rival
from stamp import stamp
from tasks import REGIMES, TASKS, Task
from transformers import get_cosine_schedule_with_warmup

from fastals.report import StepReport

STEPS = 60
SHOWN = 250  # of the steps of a run that hold step sizes, at most
WARMUP = {
    "adamw": 0.1,
    "als": 0.0,
    "averaged": 0.0,
    "capped": 0.0,
    "eager": 0.0,
    "prodigy": 0.0,
}  # rivals with a cosine: share of the steps that warm up


def train(task: Task, run: Run) -> dict[str, Any]:
    """The result of one run."""
    method, steps = run.how, round(run.steps * run.how.times)
    warms_up = {"warmup_steps": steps // 10} if method.rival == "schedule-free" else {}
    rival = RIVALS[method.rival](task.model(run.seed), **method.options, **warms_up)
    curves, reports = descend(rival, method, task.batches(run.regime, run.seed, steps), steps, task.device)
    rival.rest()
    loss = statistics.mean(curves["losses"][-(steps // 5) :])
    curves["losses"] = [round(x, 5) for x in curves["losses"]]
    result = {"loss": loss} | task.measure(rival.model) | curves
    result |= {k: v for k, v in rival.optimizer.param_groups[0].items() if k == "trust"}
    return result | (search_result(reports, run.seed) if reports else {})


def descend(
    rival: Rival, method: Method, batches: Iterable[dict], steps: int, device: str
) -> tuple[dict[str, list[float]], list[StepReport]]:
    """Train until the batches or the finite losses end; returns losses, seconds and forwards so far, and reports."""
    now = time.process_time if device == "cpu" else time.perf_counter
    annealing = None
    if method.rival in WARMUP and method.anneals:
        annealing = get_cosine_schedule_with_warmup(rival.optimizer, int(WARMUP[method.rival] * steps), steps)
    curves: dict[str, list[float]] = {"losses": [], "seconds": [], "forwards": []}
    reports, clock = [], 0.0
    for batch in batches:
        begin = now()
        loss = step(rival, batch)
        clock += now() - begin
        if annealing:
            annealing.step()
        curves["losses"].append(loss)
        curves["seconds"].append(round(clock, 3))
        curves["forwards"].append(round(rival.work(), 2))
        if report := getattr(rival.optimizer, "report", None):
            reports.append(report)
        if not math.isfinite(loss):
            break
    return curves, reports


def step(rival: Rival, batch: dict[str, torch.Tensor]) -> float:
    """The loss before the step; NaN if the rival refuses it because it is not finite."""
    try:
        return rival.step(batch).item()
    except (FloatingPointError, ValueError) as error:
        print(f"ended by {type(error).__name__}: {error}", flush=True)
        return math.nan


def search_result(reports: list[StepReport], seed: int) -> dict[str, Any]:
    """Trials per step and steps that raised the loss; for the first seed the step sizes at evenly spaced steps.

    ``factors`` are the common factors of the joint tests, 1 in schedules without one.
    """
    result: dict[str, Any] = {
        "trials": statistics.mean(r.trials for r in reports),
        "joint_trials": statistics.mean(r.joint_trials for r in reports),
        "rises": sum(r.loss_after > r.loss_before for r in reports),
    }
    if seed == 0:
        shown = reports[:: math.ceil(len(reports) / SHOWN)]
        result["step_sizes"] = {u.name: [] for u in reports[0].units}
        for unit in (u for r in shown for u in r.units):
            result["step_sizes"][unit.name].append(float(f"{unit.step_size:.4g}"))
        result["factors"] = [float(f"{r.factor:.4g}") for r in shown]
    return result


def identity(run: dict[str, Any]) -> tuple:
    """The fields in which two lines of the output file must differ."""
    return tuple(run[k] for k in ("seed", "regime", "task", "method", "steps"))


def case(run: Run) -> dict[str, Any]:
    """The fields of its line that are known before it is made."""
    return {
        "task": run.task, "regime": run.regime, "method": run.method, "options": run.how.options, "seed": run.seed,
        "steps": run.steps,
    }  # fmt: skip


def run_all(arguments: argparse.Namespace, make: Callable[[Run], dict[str, Any]]) -> int:
    """Make the runs that the output file does not hold yet; returns how many failed."""
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    prepare(arguments.threads)
    conditions = stamp()  # of the code that runs, which may change on the disk before the last run is done
    done = {identity(json.loads(line)) for line in out.read_text().splitlines()} if out.exists() else set()
    failed = 0
    for run, get in started([r for r in planned(arguments) if identity(case(r)) not in done], make, arguments):
        try:
            result = get()
        except ImportError as error:
            print(f"skipped {run.method}: {error}", flush=True)
            continue
        except RuntimeError as error:  # of one run, as one that does not fit into memory
            failed += 1
            print(f"failed: {case(run)}: {type(error).__name__}: {error}", flush=True)
            continue
        with out.open("a") as file:
            file.write(json.dumps(case(run) | result | conditions) + "\n")
        held_out = {k: round(result[k], 4) for k in ("accuracy", "perplexity") if k in result}
        print(case(run), f"loss {result['loss']:.4f} {held_out} {result['seconds'][-1]} s", flush=True)
    return failed


def started(
    runs: list[Run], make: Callable[[Run], dict[str, Any]], arguments: argparse.Namespace
) -> Iterator[tuple[Run, Callable[[], dict[str, Any]]]]:
    """The runs as they end, each with a function that returns its result or raises its error."""
    if arguments.processes == 1:
        yield from ((run, partial(make, run)) for run in runs)
        return
    pool = ProcessPoolExecutor(arguments.processes, get_context("spawn"), prepare, (arguments.threads,))
    try:
        futures = {pool.submit(make, run): run for run in runs}
        yield from ((futures[future], future.result) for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(threads: int) -> None:
    """Settings of a process that makes runs."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def trained(shared: bool, run: Run) -> dict[str, Any]:
    """The result of the run on this machine; without seconds if processes share its GPU."""
    result = train(read(run.task), run)
    if shared and torch.cuda.is_available():
        result["seconds"] = [math.nan] * len(result["seconds"])
    return result


@cache
def read(task: str) -> Task:
    """The task, read once per process."""
    return TASKS[task]("cuda" if torch.cuda.is_available() else "cpu")


def refuse_missing(names: Iterable[str], refuse: Callable[[str], Any]) -> None:
    """Refuse a task whose package is missing, before anything runs."""
    for name in names:
        try:
            read(name)
        except ImportError as error:
            refuse(f"task {name}: {error}")


def ten_or_more(text: str) -> int:
    """A number of steps of which a fifth and a tenth are at least one."""
    if int(text) < 10:
        raise argparse.ArgumentTypeError("at least 10")
    return int(text)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help=".jsonl file; runs that it holds already are not made again")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument(
        "--steps", type=ten_or_more, nargs="+", default=[STEPS], help="steps of a run, at least 10; one length or more"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="tasks to run")
    parser.add_argument("--regimes", nargs="+", default=["full"], choices=list(REGIMES), help="training samples kept")
    parser.add_argument(
        "--methods", nargs="*", choices=list(METHODS), metavar="METHOD", help=f"methods to run: {', '.join(METHODS)}"
    )
    parser.add_argument(
        "--als", nargs="*", type=json.loads, default=[], metavar="JSON", help="arguments of ALS for further methods"
    )
    parser.add_argument("--equal-work", action="store_true", help="run those of --als at equal work as well")
    parser.add_argument("--processes", type=int, default=1, help="runs made side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a process")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    refuse_missing(arguments.tasks, parser.error)
    sys.exit(run_all(arguments, partial(trained, arguments.processes > 1)) > 0)


if __name__ == "__main__":
    main()
