"""Long runs, in which nothing may grow: ``python tests/long_runs.py --steps 5000 --changes 1000``.

A run is made of equal periods. At the end of each, everything stands where it stood at the end of the one before: the
schedule of ``lr`` starts again, what was frozen is trained, and the adapter has gone. So what a period leaves shows.
"""

import argparse
import gc
import io
import os
import sys
import time
import warnings
from statistics import median
from typing import NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import psutil
import torch
from helpers import interpreter
from helpers.recording import recorded
from helpers.tiny import TinyTransformer, matrices_only, tiny_batches
from torch import nn

import fastals

PERIODS = 5
SHAPES, KEPT = 3, 2  # of mini-batches; programs that a captured step keeps: some make room for others
#: Growth that is admitted over all periods: counts of steps get longer in a checkpoint, allocators keep some memory.
GROWTH = {"objects": 100, "tensors": 0, "elements": 0, "checkpoint": 512, "resident": 8 << 20}


class Held(NamedTuple):
    """What is held at the end of a period, and the median time of its steps."""

    objects: int
    tensors: int
    elements: int
    checkpoint: int  # bytes
    resident: int  # bytes
    seconds: float

    def grown(self, later: "Held") -> list[str]:
        """What has grown until ``later``."""
        more = {name: getattr(later, name) - getattr(self, name) for name in GROWTH}
        return [f"{name} by {grown}" for name, grown in more.items() if grown > GROWTH[name]]


class Adapter(nn.Module):
    """A linear layer with a low-rank correction."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


def held(opt, seconds):
    assert opt.reports  # and none of them is left on the device
    gc.collect()
    alive = gc.get_objects()
    tensors = [o for o in alive if issubclass(type(o), torch.Tensor)]
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    resident = psutil.Process(os.getpid()).memory_info().rss
    elements = sum(t.numel() for t in tensors)
    return Held(len(alive), len(tensors), elements, len(file.getvalue()), resident, median(seconds))


def timed(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def train(steps, **options):
    """What is held at the end of each period of plain steps: a block freezes, an adapter comes and goes."""
    torch.manual_seed(0)
    model, period = TinyTransformer(depth=3), steps // PERIODS
    opt = fastals.ALS(model, **options)
    block, adapter = model.blocks[1], Adapter(model.blocks[1].qkv)
    block.qkv = adapter  # for the optimizer to see
    opt.add_param_group({"params": [adapter.down.weight, adapter.up.weight], "name": "adapter"})
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, period, eta_min=0.3)
    batches = list(tiny_batches(16))
    for _ in range(PERIODS):
        seconds = []
        for t in range(period):
            model.blocks[0].requires_grad_(not period // 5 <= t < 2 * period // 5)
            block.qkv = adapter if 3 * period // 5 <= t < 4 * period // 5 else adapter.linear
            seconds.append(timed(lambda t=t: opt.step(lambda: model(**batches[t % 16]))))
            scheduler.step()
        yield held(opt, seconds)


def change_shapes(changes, **options):
    """What is held at the end of each period of captured steps, whose mini-batches change their shape every time."""
    torch.manual_seed(0)
    model, period = matrices_only(TinyTransformer(depth=1, width=8)), changes // PERIODS
    opt = fastals.ALS(model, fused=True, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, period, eta_min=0.3)
    step = recorded(opt, model, lambda batch: model(**batch), max_signatures=KEPT)
    batches = [next(tiny_batches(1, size=4, length=3 + n)) for n in range(SHAPES)]
    for _ in range(PERIODS):
        seconds = []
        for t in range(period):
            model.embed.requires_grad_(t >= period // 10)
            batch = batches[t * (1 + t // SHAPES % 5) % SHAPES] if t % 7 else batches[t // 7 % SHAPES]
            seconds.append(timed(lambda batch=batch: step(batch)))
            scheduler.step()
        assert len(step._programs) == KEPT, step.mode
        yield held(opt, seconds)


def growth(periods):
    """What has grown since the second period; the first one has met everything for the first time."""
    _, second, *_, last = periods
    return second.grown(last)


def slower(periods):
    """How many times as long as in the first periods a step takes in the last ones; the best of two counts."""
    seconds = [period.seconds for period in periods]
    return min(seconds[-2:]) / min(seconds[:2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="plain steps of each schedule")
    parser.add_argument("--changes", type=int, default=1000, help="changes of shape under captured steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "fastals. 20 steps in a row")  # all is learned by then
    faults = 0
    for name, run in {
        "relay": train(arguments.steps),
        "sweep": train(arguments.steps, schedule="sweep", momentum="after", every="auto"),
        "captured": change_shapes(arguments.changes),
    }.items():
        periods = list(run)
        grown, times = growth(periods), slower(periods)
        faults += len(grown) + (times > 1.3)
        print(
            f"{name}: {', '.join(grown) or 'nothing has grown'}; the last steps take {times:.2f} x the first",
            flush=True,
        )
        print(*periods, sep="\n", flush=True)
    print(f"{faults} faults")
    return faults > 0


if __name__ == "__main__":
    with interpreter.faster():
        sys.exit(main())
