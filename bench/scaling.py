"""Steps of ALS and of AdamW on several processes, in turn; and on paper, what the reductions of ALS cost on many GPUs.

    python bench/scaling.py --out scaling.json  # DDP and FSDP2 on 1, 2 and 4 processes by gloo, on the CPU
    python bench/scaling.py --table scaling.json  # the table of stored results
    python bench/scaling.py --paper  # the tables on paper; nothing is measured

Model and text are those of the task ``bbc-news`` of :mod:`tasks`: MiniLM with a fresh classifier, dropout on, 64 tokens
a text. Strong: :data:`TOTAL` texts in a step, divided among the processes. Weak: :data:`EACH` texts in a step of each
process. Every process has one thread, and a copy of the model for each optimizer. Both take the same mini-batches in
turn; a step is timed from a barrier until it returns, and counts as long as the slowest process takes. The ratio is
that of seconds of ALS by seconds of AdamW in the same round: median, lowest and highest. More processes than cores wait
for each other, so only a ratio within one number of processes means something.

Reductions and their bytes are those that ALS itself makes to decide together. The collectives of the model (averages of
gradients, and with FSDP2 gathered weights) are counted in further steps, which are not timed; their bytes are those of
whole tensors, gathered or before they are scattered.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import transformers as hf
from rivals import Rival, als
from shapes import CLASSES
from stamp import stamp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fastals.engine import SUMS_ON_HOST
from fastals.signals import LOSS

if TYPE_CHECKING:
    from tasks import Task

TOTAL, EACH = 16, 4
SIZES = (1, 2, 4)
FIRST, ROUNDS, COUNTED = 4, 8, 2  # steps of each optimizer: not timed, timed, counted


class Case(NamedTuple):
    """One run: how the model is spread over how many processes, and the texts in a step of each."""

    parallel: str
    processes: int
    texts: int
    task: str = "bbc-news"
    first: int = FIRST
    rounds: int = ROUNDS
    counted: int = COUNTED


def cases(parallels: Sequence[str], sizes: Sequence[int]) -> list[Case]:
    """The runs of strong and weak scaling; one that belongs to both is made once."""
    texts = [(p, n, each) for p in parallels for n in sizes for each in (TOTAL // n, EACH)]
    return [Case(*case) for case in dict.fromkeys(texts)]


class Tiny:
    """A small BERT and random tokens, for a test of this file."""

    train = range(1000)

    def model(self, seed: int) -> nn.Module:
        """The model, as of a :class:`Task`."""
        torch.manual_seed(seed)
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        return hf.BertForSequenceClassification(hf.BertConfig(num_labels=CLASSES, **small)).train()

    def encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """What the model takes of these rows, and labels."""
        generator = torch.Generator().manual_seed(rows[0])
        ids = torch.randint(1000, 2000, (len(rows), 16), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(rows) % CLASSES}


def spread(model: nn.Module, parallel: str) -> nn.Module:
    """The model over all processes: replicated (``ddp``) or sharded, every block and the rest (``fsdp2``)."""
    if parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.bert.encoder.layer:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def task_of(name: str) -> "Task | Tiny":
    """The task of this name."""
    if name == "tiny":
        return Tiny()
    from tasks import TASKS

    return TASKS[name]("cpu")


def mini_batches(task: "Task | Tiny", case: Case, rank: int) -> Iterator[dict[str, Tensor]]:
    """Mini-batches of one process; those of a step are the same texts however many processes divide them."""
    for step in range(case.first + case.rounds + case.counted):
        first = (step * case.processes + rank) * case.texts
        yield task.encode([task.train[i % len(task.train)] for i in range(first, first + case.texts)])


class Collectives(TorchDispatchMode):
    """Counts the collectives of torch.distributed, and the bytes of their whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def per_step(self, steps: int, own: tuple[int, int] = (0, 0)) -> dict[str, float]:
        """Calls by name and MB in one of so many steps, without the reductions and bytes of ALS itself."""
        calls = self.calls - Counter(allreduce=own[0])
        return {name: n / steps for name, n in sorted(calls.items())} | {"MB": (self.bytes - own[1]) / 1e6 / steps}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._overloadpacket._qualified_op_name if hasattr(func, "_overloadpacket") else ""
        if name.startswith("c10d::") and not name.endswith(("barrier", "monitored_barrier_")):
            self.calls[name.removeprefix("c10d::").strip("_")] += 1
            self.bytes += max(map(_bytes, args), default=0)
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0


def measure(rank: int, case: Case) -> dict[str, Any]:
    """Seconds, reductions, trials and collectives of this process, which torch.distributed has connected."""
    task = task_of(case.task)
    rivals = {name: make(spread(task.model(0), case.parallel)) for name, make in (("als", als), ("adamw", adamw))}
    batches = iter(list(mini_batches(task, case, rank)))
    for _ in range(case.first):
        _one_round(rivals, next(batches))
    before = [rival.work() for rival in rivals.values()]
    rounds = [_one_round(rivals, next(batches)) for _ in range(case.rounds)]
    forwards = [rival.work() - b for rival, b in zip(rivals.values(), before, strict=True)]
    reports = rivals["als"].optimizer.reports[-case.rounds :]
    return {
        "seconds": {name: [seconds[name] for seconds in rounds] for name in rivals},
        "trials": sum(report.trials for report in reports) / case.rounds,
        "reductions": sum(report.collectives for report in reports) / case.rounds,
        "reduced_bytes": sum(report.reduced_bytes for report in reports) / case.rounds,
        "by_forwards": forwards[0] / forwards[1],
        "collectives": count(rivals, [next(batches) for _ in range(case.counted)]),
    }


def adamw(model: nn.Module) -> Rival:
    """AdamW with torch's fused kernel."""
    return Rival(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))


def _one_round(rivals: dict[str, Rival], batch: dict[str, Tensor]) -> dict[str, float]:
    """Seconds of one step of each, from a barrier on."""
    seconds = {}
    for name, rival in rivals.items():
        dist.barrier()
        begin = time.perf_counter()
        rival.step(batch)
        seconds[name] = time.perf_counter() - begin
    return seconds


def count(rivals: dict[str, Rival], batches: list[dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """The collectives of the model in one step of each, averaged over the mini-batches."""
    found = {}
    for name, rival in rivals.items():
        with Collectives() as seen:
            for batch in batches:
                rival.step(batch)
        reports = rival.optimizer.reports[-len(batches) :] if name == "als" else []
        own = sum(report.collectives for report in reports), sum(report.reduced_bytes for report in reports)
        found[name] = seen.per_step(len(batches), own)
    return found


def run(case: Case) -> dict[str, Any]:
    """Run the case in processes of its own; the record of it."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (case, folder), nprocs=case.processes)
        return record(case, [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(case.processes)])


def _process(rank: int, case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(minutes=2), world_size=case.processes, rank=rank)
    Path(folder, f"{rank}.json").write_text(json.dumps(measure(rank, case)))
    dist.barrier()
    dist.destroy_process_group()


def record(case: Case, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record of a case by what its processes have found; a step takes as long as in the slowest one."""
    seconds = {
        name: [*map(max, zip(*(f["seconds"][name] for f in found), strict=True))] for name in found[0]["seconds"]
    }
    ratios = [a / b for a, b in zip(seconds["als"], seconds["adamw"], strict=True)]
    return {
        **case._asdict(),
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "median_seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        **{k: round(found[0][k], 3) for k in ("by_forwards", "trials", "reductions", "reduced_bytes")},
        "collectives": found[0]["collectives"],
    }


def scaling_table(records: Iterable[dict[str, Any]]) -> str:
    """The table of measured cases."""
    head = [
        "model", "processes", "texts each", "ALS / AdamW (lowest - highest)", "by forward passes", "trials",
        "own reductions, bytes", "model's collectives", "model's with AdamW",
    ]  # fmt: skip
    return _table(head, map(_row, records))


def _row(record: dict[str, Any]) -> list[str]:
    low, high = record["spread"]
    return [
        {"ddp": "DDP", "fsdp2": "FSDP2"}[record["parallel"]],
        str(record["processes"]),
        f"{record['texts']} ({scaling_kinds(record['processes'], record['texts'])})",
        f"{record['ratio']:.2f}x ({low:.2f} - {high:.2f})",
        f"{record['by_forwards']:.2f}x",
        f"{record['trials']:.2f}",
        f"{record['reductions']:.2f}, {record['reduced_bytes']:.0f}",
        *(_calls(record["collectives"][name]) for name in ("als", "adamw")),
    ]


def scaling_kinds(processes: int, texts: int) -> str:
    """Whether a case belongs to strong or to weak scaling."""
    kinds = {"strong": texts * processes == TOTAL, "weak": texts == EACH}
    return " and ".join(kind for kind, holds in kinds.items() if holds)


def _calls(collectives: dict[str, float]) -> str:
    calls = {k: v for k, v in collectives.items() if k != "MB"}
    if not calls:
        return "none"
    return ", ".join(f"{n:g} {name}" for name, n in calls.items()) + f"; {collectives['MB']:.1f} MB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


# On paper. Microseconds of NCCL's own estimate for an all_reduce of a few bytes by a tree and its protocol LL, in
# src/graph/tuning.cc: at all, a hop by NVLink, a hop between nodes.
BASE, NVLINK, NET = 6.8, 0.6, 5.0
NODE = 8  # GPUs of a node
SLOWER = 3.0  # a poor network by NCCL's estimate: 75.4 µs measured for 4 KiB on 16 H100 where NCCL expects 25.9 µs
GPUS = (8, 64, 256, 1024)
BLOCKS, PARAMETERS = 32, 8.03e9  # Llama 3 8B
ROOT = 2 * 128256 * 4096 / PARAMETERS  # share of its embeddings and head, which are in no block
STEP = 8192 / 2904  # seconds of its step: tokens of a GPU in a step by tokens a second, torchtitan on 64 A100
JOINT, OF_UNITS, SEARCHED = 1.07, 1.26, 0.5  # trials and searches a step, stored convergence runs of 240 steps


def reductions(trials: float, searched: float) -> float:
    """Reductions of a step: f(w_t), its replay, each trial, the sums of the units in one or two parts, the commit."""
    return 4 + trials + searched


def frame_bytes(units: int) -> int:
    """Bytes of one reduction."""
    return 8 * (LOSS + SUMS_ON_HOST * units)


def latency(gpus: int) -> float:
    """Microseconds of an all_reduce of a few bytes by NCCL's estimate."""
    inside = min(gpus, NODE)
    return BASE + 2 * ((inside - 1) * NVLINK + math.log2(gpus / inside) * NET)


def gathered_gb(gpus: int, forwards: float, size: int = 2) -> float:
    """GB of weights that every GPU receives with FSDP2 for so many forward passes, in numbers of ``size`` bytes."""
    return PARAMETERS * size * (gpus - 1) / gpus * forwards / 1e9


def paper_tables() -> str:
    """What the reductions of ALS add to a step, and what FSDP2 gathers for its trials."""
    made = reductions(JOINT + OF_UNITS, SEARCHED)
    small = _table(
        ["GPUs", "one reduction", "a step's", "of a step of 2.8 s", "a step's in a poor network", "of the step"],
        [
            [
                str(n),
                f"{t:.0f} µs",
                f"{made * t:.0f} µs",
                f"{share:.3%}",
                f"{SLOWER * made * t:.0f} µs",
                f"{SLOWER * share:.3%}",
            ]
            for n, t, share in ((n, latency(n), made * latency(n) / 1e6 / STEP) for n in GPUS)
        ],
    )
    of_unit = ROOT + (1 - ROOT) * (BLOCKS + 1) / (2 * BLOCKS)  # the root, and the blocks from the unit's on
    kinds = {
        "forward and backward, as AdamW": 2 - ROOT,  # the root stays gathered between them
        "a joint trial": 1.0,
        "a trial of a unit, cached, on average": of_unit,
        "the same, not cached": 1.0,
        "f(w_t) replayed, once a step": ROOT,
        "all that a step of the relay adds": JOINT + OF_UNITS * of_unit + ROOT,
    }
    large = _table(
        ["gathered for", "of all weights", *(f"{n} GPUs" for n in GPUS)],
        [[name, f"{f:.2f}x", *(f"{gathered_gb(n, f):.1f} GB" for n in GPUS)] for name, f in kinds.items()],
    )
    return f"{small}\n\n{large}"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="measure, and write this .json file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a stored file")
    parser.add_argument("--paper", action="store_true", help="print the tables on paper")
    parser.add_argument("--parallel", nargs="+", default=["ddp", "fsdp2"], choices=["ddp", "fsdp2"])
    parser.add_argument("--processes", nargs="+", type=int, default=SIZES)
    arguments = parser.parse_args()
    if arguments.out:
        torch.set_num_threads(1)
        conditions, records = stamp(), []
        for case in cases(arguments.parallel, arguments.processes):
            records.append(run(case))
            print(scaling_table(records[-1:]).splitlines()[-1], flush=True)
            arguments.out.write_text(json.dumps({"stamp": conditions, "scaling": records}, indent=1) + "\n")
    if arguments.table:
        print(scaling_table(json.loads(arguments.table.read_text())["scaling"]))
    if arguments.paper:
        print(paper_tables())


if __name__ == "__main__":
    main()
