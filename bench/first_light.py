"""First light: figures of fastals on a GPU, in a minute, each beside its prediction.

BERT-base, 128 tokens, bfloat16 parameters, dropout on, mini-batches of 8 and of 32. Times are medians after a warm-up,
from the call until the device is done. Exceptions: ``host time in step()`` ends when the call returns, and the rows
``without waits between`` are the mean of ten steps. Correctness is not checked here but in ``tests/``.

    python bench/first_light.py first_light.json
    TRITON_INTERPRET=1 python bench/first_light.py --dry-run first_light.json  # tiny and without a GPU

The predictions were written before the first run on a GPU (those of ``without waits between`` after it) and are kept as
they were. They are arithmetic for an H100 (SXM, 80 GB); the constants in :func:`lines` are guesses. The captures of a
relay have no prediction. The arithmetic:

* a copy reads and writes :data:`COPY` bytes a second; a matrix product reaches :data:`PRODUCT`;
* a captured forward and backward takes :data:`GRADIENT` seconds, a forward a third of it, and a trial of a unit the
  share of the 12 blocks that lie above it: 7.5 forwards in a sweep of 14 units with one trial each;
* the kernels move the bytes of :func:`floor.moved_bytes` over the copy bandwidth, AdamW 14 bytes a weight;
* a small kernel in a graph takes :data:`SMALL` seconds, a look of the host :data:`LOOK`, and an operation that Python
  launches one by one :data:`LAUNCH`; BERT's forward has about :data:`OPERATIONS` of them, its backward twice as many.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_kernels import copied, device_of, in_turn, milliseconds, of_pairs, parameters
from digest import table
from floor import moved_bytes
from rivals import RIVALS, Rival, loss_of
from shapes import ACCEPTING, CLASSES, Shape, bert
from stamp import stamp
from transformers import BertConfig, BertForSequenceClassification

from fastals.kernels.arena import STATE
from fastals.kernels.moments import advance, survey
from fastals.kernels.trial import trial

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BATCHES = (8, 32) if CUDA else (8,)
STEPS = 10 if CUDA else 1
UNITS, FORWARDS_OF_A_SWEEP = 14, 7.5
COPY, PRODUCT, WEIGHTS = 3.0e12, 790e12, 109.5e6
GRADIENT = {8: 3.3e-3, 32: 6.6e-3}
SMALL, LOOK, LAUNCH, OPERATIONS = 3e-6, 25e-6, 8e-6, 600
SEARCH = ("survey", "trial", "advance")
KERNELS = sum(moved_bytes(kernel, 2, averages=False) for kernel in SEARCH) * WEIGHTS / COPY  # seconds, as is
REMEMBERED = sum(moved_bytes(kernel, 2, averages=False) for kernel in ("survey_move", "advance")) * WEIGHTS / COPY
FUSED_ADAMW = 14 * WEIGHTS / COPY


class Line(NamedTuple):
    """One figure of the table: name, unit, prediction, and the function that measures it."""

    name: str
    unit: str
    predicted: float | None
    measure: Callable[[], float | dict[str, float]]
    batch: int = 0  # 0 for a figure that has none


class CannotMeasureError(Exception):
    """A figure cannot be measured here; the message says what it needs."""


def lines() -> Iterator[Line]:
    """All figures, the cheapest and most important first."""
    yield Line("copy", "GB/s", COPY / 1e9, copy_bandwidth)
    yield Line("bf16 matrix product", "TFLOP/s", PRODUCT / 1e12, product_rate)
    for kernel, predicted in (("survey", 0.85), ("survey_move", 0.85), ("trial", 0.90), ("advance", 0.85)):
        yield Line(f"{kernel} over copy", "", predicted, partial(of_copy, kernel))
    yield Line("replay of a graph of one kernel", "us", 5, replay_time)
    yield Line("iteration of a WHILE of one kernel", "us", 8, iteration_time)
    for batch in BATCHES:
        gradient, host = GRADIENT[batch], OPERATIONS * LAUNCH
        forward = gradient / 3
        sweep = gradient + FORWARDS_OF_A_SWEEP * forward + KERNELS + 4 * UNITS * SMALL
        plain = 3 * max(host, forward)
        figures: list[tuple[str, float, Callable[[], float]]] = [
            ("forward", max(host, forward), partial(pass_time, batch)),
            ("forward, captured", forward, partial(pass_time, batch, graph=True)),
            ("forward + backward", plain, partial(pass_time, batch, backward=True)),
            ("forward + backward, captured", gradient, partial(pass_time, batch, backward=True, graph=True)),
            ("AdamW", plain + FUSED_ADAMW, partial(step_time, batch, "adamw")),
            ("AdamW, captured", gradient + FUSED_ADAMW, partial(step_time, batch, "adamw-captured")),
            ("sweep, while", sweep, partial(step_time, batch, "graphed", **ACCEPTING)),
            ("sweep, host", sweep + UNITS * LOOK, partial(step_time, batch, "graphed", mode="host", **ACCEPTING)),
            ("sweep, eager fused", plain + FORWARDS_OF_A_SWEEP * max(host, forward) + 12 * UNITS * LAUNCH + KERNELS,
             partial(step_time, batch, "als", **ACCEPTING)),
            ("sweep, eager baseline", plain + UNITS * (max(host, forward) + 200 * LAUNCH) + 3 * KERNELS,
             partial(step_time, batch, "eager", **ACCEPTING)),
            ("joint accepted at once, while", gradient + forward + KERNELS + 2 * UNITS * SMALL,
             partial(step_time, batch, "graphed", **ACCEPTING | {"schedule": "joint"})),
        ]  # fmt: skip
        for name, seconds, measure in figures:
            yield Line(name, "ms", 1e3 * seconds, measure, batch)
        for schedule, expected in (
            ("sweep", sweep),
            ("relay", gradient + (1 + FORWARDS_OF_A_SWEEP / UNITS / 2) * forward + REMEMBERED + 2 * UNITS * SMALL),
            ("joint", gradient + forward + KERNELS + 2 * UNITS * SMALL),
        ):
            measure = partial(back_to_back, batch, "graphed", **ACCEPTING | {"schedule": schedule})
            yield Line(f"{schedule}, while, without waits between", "ms", 1e3 * expected, measure, batch)
        host_time = partial(step_time, batch, "graphed", host=True, **ACCEPTING)
        yield Line("host time in step(), while", "ms", 0.4, host_time, batch)
        state = 4 * WEIGHTS / 2**20  # v and w in float32; AdamW has two moments in bfloat16
        yield Line("memory of a sweep over AdamW's", "MiB", state, partial(memory_over_adamw, batch), batch)
        yield Line("captures of a relay", "s", None, partial(captures_of_relay, batch), batch)


def shape(batch: int) -> Shape:
    """BERT-base; without a GPU a tiny BERT in its place."""
    if not CUDA:
        return Shape(tiny, 2, 8, torch.bfloat16)
    return Shape(lambda: bert(12, 768), batch, 128, torch.bfloat16)


def tiny() -> torch.nn.Module:
    """A BERT that interpreted kernels can train."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=2000, num_labels=CLASSES, **sizes))


def copy_bandwidth() -> float:
    """GB/s of a copy on the device."""
    copy_once, moved = copied()
    return moved / milliseconds(copy_once) / 1e6


def product_rate() -> float:
    """TFLOP/s of a matrix product."""
    size = 8192 if CUDA else 64
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b) / 1e9


def of_copy(kernel: str) -> float:
    """The kernel's bandwidth over that of a copy, with all parameters as one unit."""
    params = parameters("bert_base" if CUDA else "smallest", torch.bfloat16)
    device = device_of(params, averages=False)
    table, arena = device.table, device.arena
    arena.state[0, STATE.index("at")] = float("nan")  # position unknown, so the trial writes
    run = {"survey": survey, "survey_move": partial(survey, move=True), "trial": trial, "advance": advance}[kernel]
    moved = moved_bytes(kernel, 2, averages=False) * sum(p.numel() for p in params)
    copy_once, copy_bytes = copied()
    copies, times = in_turn(copy_once, lambda: run(table, arena))
    return of_pairs([t / copy_bytes for t in copies], [t / moved for t in times])[0]


def replay_time() -> float:
    """Microseconds from replay to replay of a graph of one small kernel."""
    needs_gpu("captures a graph of one kernel, replays it 1000 times")
    x = torch.zeros(1, device=DEVICE)
    replay = captured(lambda: x.add_(1))
    return 1e6 * seconds_of(lambda: [replay() for _ in range(1000)]) / 1000


def iteration_time() -> float:
    """Microseconds per iteration of a WHILE that counts down: the difference of loops of two lengths."""
    needs_gpu("captures a loop on the device, runs it 1000 times over")
    from fastals.graphs.cuda import CudaGraphs
    from fastals.graphs.program import Loop, Run

    device = torch.device("cuda", torch.cuda.current_device())
    backend = CudaGraphs(device, torch.cuda.Stream(device), draws=False)
    flags = torch.zeros(1, 4, dtype=torch.int32, device=device)
    seconds = []
    for count in (1, 1001):
        actions = (partial(flags.fill_, count), partial(flags.sub_, 1))
        with backend.session():
            first, body = map(backend.capture, actions)
        launch = backend.link([Run(first), Loop(body, 0)], flags)
        with torch.cuda.stream(backend.stream):
            seconds.append(seconds_of(launch))
        assert int(flags[0, 0]) == 0
    return 1e6 * (seconds[1] - seconds[0]) / 1000


def pass_time(batch: int, *, backward: bool = False, graph: bool = False) -> float:
    """Milliseconds of a forward without gradients, or of forward and backward."""
    model, example = shape(batch).model(DEVICE), next(shape(batch).batches(DEVICE))

    def run() -> None:
        with torch.set_grad_enabled(backward):
            loss = loss_of(model, example)
        if backward:
            model.zero_grad()
            loss.backward()

    return 1e3 * seconds_of(captured(run) if graph else run)


def step_time(batch: int, kind: str, *, host: bool = False, **options: Any) -> dict[str, float]:
    """Milliseconds of a rival's step, or of the call alone; for ``joint``, of the steps accepted at once."""
    rival, examples = ready(batch, kind, **options)
    seconds = seconds_each(lambda: rival.step(next(examples)), host=host)
    reports = getattr(rival.optimizer, "reports", [])[-STEPS:]
    if options.get("schedule") == "joint":
        at_once = [s for s, r in zip(seconds, reports, strict=True) if (r.joint_trials, r.trials) == (1, 1)]
        if not at_once:
            raise CannotMeasureError("no step was accepted at once")
        return {"measured": 1e3 * statistics.median(at_once), "accepted_at_once": len(at_once) / STEPS}
    entry = {"measured": 1e3 * statistics.median(seconds)}
    trials = [r.trials / len(r.units) for r in reports]
    return entry | ({"trials_per_unit": statistics.mean(trials)} if trials else {})


def back_to_back(batch: int, kind: str, **options: Any) -> float:
    """Milliseconds per step if the host does not wait for the device between steps, as in training."""
    rival, examples = ready(batch, kind, **options)
    return 1e3 * seconds_of(lambda: [rival.step(next(examples)) for _ in range(STEPS)]) / STEPS


def ready(batch: int, kind: str, **options: Any) -> tuple[Rival, Iterator[dict]]:
    """A rival after its first steps, and its mini-batches."""
    if "captured" in kind or kind == "graphed":
        needs_gpu(f"captures the steps of {kind} {options}")
    if kind == "als":
        options["fused"] = True
    rival = RIVALS[kind](shape(batch).model(DEVICE), **options)
    examples = cycle(list(islice(shape(batch).batches(DEVICE), 16)))
    for _ in range(rival.first_steps + 1):
        rival.step(next(examples))
    mode = getattr(getattr(rival, "train_step", None), "mode", None)
    if mode is not None and mode.name != options.get("mode", "while"):
        raise CannotMeasureError(f"runs in mode {mode.name}: {mode.reason}")
    return rival, examples


def memory_over_adamw(batch: int) -> float:
    """MiB that a captured sweep holds beyond a captured AdamW: state, snapshot, memory of the graphs."""
    needs_gpu("weighs a captured sweep and a captured AdamW")
    memory = []
    for kind, options in (("graphed", ACCEPTING), ("adamw-captured", {})):
        clean()
        held = torch.cuda.memory_reserved()
        rival, examples = ready(batch, kind, **options)
        rival.step(next(examples))
        finish()
        torch.cuda.empty_cache()
        memory.append(torch.cuda.memory_reserved() - held)
        del rival
    return (memory[0] - memory[1]) / 2**20


def captures_of_relay(batch: int) -> dict[str, float]:
    """Seconds of all captures of a relay, until every unit has had its turn; with them memory and pieces."""
    rival, _ = ready(batch, "graphed", **ACCEPTING | {"schedule": "relay"})
    step = rival.train_step
    return {"measured": step.capture_seconds, "mib": step.pool_bytes / 2**20} | step.pieces._asdict()


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A function that replays the captured work of ``run``."""
    needs_gpu("captures it")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        run()
    return graph.replay


def seconds_of(run: Callable[[], object]) -> float:
    """Median time of a call."""
    return statistics.median(seconds_each(run))


def seconds_each(run: Callable[[], object], *, host: bool = False) -> list[float]:
    """Seconds of every call but the first, until the device is done or, with ``host``, until the call returns."""
    seconds = []
    for _ in range(STEPS + 1):
        finish()
        begin = time.perf_counter()
        run()
        if not host:
            finish()
        seconds.append(time.perf_counter() - begin)
    finish()
    return seconds[1:]


def finish() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def needs_gpu(would: str) -> None:
    """Without a GPU, raise an error that says what a GPU would do."""
    if not CUDA:
        raise CannotMeasureError(f"{would}; needs a GPU")


def clean() -> None:
    """Free the memory of the figure before."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def measured(line: Line) -> dict[str, Any]:
    """The figure as an entry of the result; if it fails, the entry says why and the other figures go on."""
    entry = {"name": line.name, "unit": line.unit, "batch": line.batch, "predicted": line.predicted}
    try:
        value = line.measure()
        return entry | (value if isinstance(value, dict) else {"measured": value})
    except CannotMeasureError as error:
        return entry | {"why_not": str(error)}
    except Exception as error:  # the figures after it are still wanted
        return entry | {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        clean()


def main() -> int:
    """Measure everything, write the result after each figure, and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="run without a GPU, on a tiny model")
    options = parser.parse_args()
    if not CUDA and not options.dry_run:
        parser.error("there is no CUDA device here; --dry-run runs what does not need one")
    entries: list[dict[str, Any]] = []
    for line in lines():
        begin = time.perf_counter()
        entry = measured(line)
        entry["took_s"] = round(time.perf_counter() - begin, 2)
        entries.append(entry)
        print(json.dumps(entry), flush=True)
        options.out.write_text(json.dumps({"stamp": stamp(), "figures": entries}, indent=1) + "\n")
    if options.dry_run:
        print("a dry run of a tiny model: compare nothing with the predictions")
    print(table(entries))
    return int(any("failed" in e for e in entries))


if __name__ == "__main__":
    sys.exit(main())
