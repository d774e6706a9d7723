"""Captured steps on a GPU: against their own pieces, the eager baseline, and AdamW, captured and plain.

BERT-base, sequence 128, bfloat16 parameters. ``pieces`` is the time of the step's captured pieces (forward and
backward, every trial that was made, the lines between) replayed one after the other without anything decided in
between: what is above it is the cost of deciding. In the clock: copying the mini-batch in, the step. Not in the clock:
the first steps (compilation, verification of the cache, capture); ``capture_s`` has their time by itself.
"""

import statistics
import time

import pytest
import torch
from rivals import RIVALS
from shapes import SHAPES, Shape, bert

from fastals.program import Loop, Run

ACCEPTING = {"trust": 1e-3}
# No decrease comes so close to the slope's promise over so long a step: every search makes all its trials.
REJECTING = {"c": 0.999999, "trust": 0.05, "initial": "reset"}
SETTLED = 6  # steps until everything has been compiled, verified and captured
pytestmark = [pytest.mark.gpu, pytest.mark.exact("tests/test_graph.py::test_graphs_take_the_steps_of_the_eager_path")]


def shape(batch, depth=12):
    return Shape(lambda: bert(depth, 768).bfloat16(), batch, 128)


def milliseconds(function, rounds=10):
    """Median time of one call, by events of the device."""
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def settled(kind, shape_, batches, **options):
    """A rival that has taken its first steps, and the seconds that they took."""
    rival, begin = RIVALS[kind](shape_.model("cuda"), **options), time.perf_counter()
    for _ in range(SETTLED):
        rival.step(next(batches))
    torch.cuda.synchronize()
    return rival, time.perf_counter() - begin


def pieces(graphed, trials):
    """Time of the captured pieces by themselves: head, lines, and every loop's body as often as it was tried."""
    (captured,) = graphed.train_step._programs.values()
    program, (tail,) = captured.program, captured.program.tails.values()
    with torch.cuda.stream(program.backend.stream):  # where they are replayed, so that the events are on it too
        total = milliseconds(lambda: program.backend.replay(program.head))
        for operation in tail.operations:
            if isinstance(operation, Run | Loop):
                repeated = trials[operation.row] if isinstance(operation, Loop) else 1
                total += repeated * milliseconds(lambda op=operation: program.backend.replay(op.piece))
    return total


@pytest.mark.parametrize("trials", [1, 2, 5])
@pytest.mark.parametrize("batch", [8, pytest.param(32, marks=pytest.mark.full)])
def test_sweep_against_its_pieces(benchmark, batch, trials):
    """At most 10 % above the pieces."""
    shape_ = shape(batch)
    batches = shape_.batches("cuda")
    graphed, seconds = settled("graphed", shape_, batches, **REJECTING, max_trials=trials)
    example = next(batches)
    step_ms = milliseconds(lambda: graphed.step(example))
    begin = time.perf_counter()
    graphed.step(example)
    host_ms = 1e3 * (time.perf_counter() - begin)
    report, units = graphed.optimizer.report, graphed.optimizer._units
    made = {u.row: r.trials for u, r in zip(sorted(units, key=lambda u: u.row), report.units, strict=True)}
    pieces_ms = pieces(graphed, made)
    benchmark.pedantic(graphed.step, args=(example,), rounds=3)
    benchmark.extra_info.update(
        mode=str(graphed.train_step.mode), step_ms=round(step_ms, 3), pieces_ms=round(pieces_ms, 3),
        over_pieces=round(step_ms / pieces_ms, 3), host_ms=round(host_ms, 3), capture_s=round(seconds, 2),
        pool_mib=graphed.train_step.pool_bytes // 2**20, trials_per_unit=round(statistics.mean(made.values()), 3),
    )  # fmt: skip


@pytest.mark.parametrize("batch", [8, 32])
def test_sweep_against_eager(in_turn, batch):
    """At least 8x at batch 8 and 4x at batch 32."""
    shape_ = shape(batch)
    eager = RIVALS["eager"](shape_.model("cuda"), **ACCEPTING)
    graphed = RIVALS["graphed"](shape_.model("cuda"), **ACCEPTING)
    in_turn(eager, graphed, shape_.batches("cuda"), "eager")


@pytest.mark.parametrize("rival", ["adamw", "adamw-captured"])
@pytest.mark.parametrize("schedule", ["sweep", "joint", "cycle"])
def test_against_adamw(in_turn, schedule, rival):
    """``joint`` accepted at once: at most 1.4x the captured AdamW, and faster than the plain one; ``cycle`` 1.25x."""
    shape_ = shape(32)
    graphed = RIVALS["graphed"](shape_.model("cuda"), **ACCEPTING, schedule=schedule)
    in_turn(RIVALS[rival](shape_.model("cuda")), graphed, shape_.batches("cuda"), rival)


@pytest.mark.parametrize("depth", [6, 12, 24, pytest.param(48, marks=pytest.mark.full)])
def test_depth(in_turn, benchmark, depth):
    """Growth with depth, one trial a unit."""
    shape_ = shape(8, depth)
    eager = RIVALS["eager"](shape_.model("cuda"), **ACCEPTING)
    graphed = RIVALS["graphed"](shape_.model("cuda"), **ACCEPTING)
    in_turn(eager, graphed, shape_.batches("cuda"), "eager", rounds=3)
    benchmark.extra_info["depth"] = depth


@pytest.mark.parametrize("kind", ["als", "graphed"])
def test_minilm(in_turn, kind):
    """A small model, where launches weigh most: fused kernels alone, and captured."""
    options = ACCEPTING | {"fused": True}
    fast = RIVALS[kind](SHAPES["minilm"].model("cuda"), **options)
    in_turn(
        RIVALS["eager"](SHAPES["minilm"].model("cuda"), **ACCEPTING), fast, SHAPES["minilm"].batches("cuda"), "eager"
    )
