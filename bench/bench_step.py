"""One whole ALS step: against eager, stage by stage, against what a user would pick instead; memory and host time.

In the clock: forward, backward, all trials, all updates. Not in the clock: building the models and mini-batches, and
the first step of each (allocation, verification of the cache, capture). ``trust`` is small, so that the first trial of
most searches passes although the weights are random. ``limit`` is the ratio of the forward passes that both make, a
backward counted as two: the speed-up if nothing else cost time.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rivals import RIVALS
from shapes import SHAPES

import fastals

TRUST = {"trust": 1e-3}
# No decrease comes so close to the slope's promise over so long a step: every search makes all its trials.
REJECTING = {"c": 0.999999, "trust": 0.05, "initial": "reset"}
CASES = {  # name: (shape, arguments of both)
    "minilm": ("minilm", TRUST),
    "bert-base": ("bert-base", TRUST),
    **{f"depth-{n}": (f"depth-{n}", TRUST) for n in (6, 12, 24, 48)},
    **{f"{s}": ("minilm", TRUST | {"schedule": s}) for s in ("independent", "cycle", "joint")},
    **{f"{k}-rejected": ("minilm", REJECTING | {"max_trials": k}) for k in (1, 2, 5)},
    **{name: (name, TRUST) for name in SHAPES if name.startswith(("width", "batch", "length"))},
    **{name: (name, TRUST) for name in ("gpt2", "llama", "vit", "lora")},
}
ROUNDS = {"bert-base": 3}  # of 5 otherwise
QUICK = ("minilm", "bert-base", "depth-6", "depth-12")
needs_gpu = pytest.mark.gpu
STAGES = [  # each adds one thing to the one before; the cache on the CPU is the case "minilm" above
    pytest.param("als", {"cache": False, "fused": False}, id="buffers"),
    pytest.param("als", {"fused": False}, id="cache", marks=needs_gpu),
    pytest.param("als", {"fused": True}, id="fused", marks=[needs_gpu, pytest.mark.exact("tests/test_fused.py")]),
    pytest.param("graphed", {"fused": True}, id="graphs", marks=needs_gpu),
]
SAME_AS_EAGER = "tests/test_reference.py::test_same_answers_on_bert"


def full(names, quick):
    """Parameters of which those outside ``quick`` belong to the full profile."""
    return [pytest.param(n, marks=[] if n in quick else [pytest.mark.full]) for n in names]


def twins(shape, device, kind, options, eager_options):
    """The eager baseline and a rival on two equal models."""
    models = [SHAPES[shape].model(device) for _ in range(2)]
    return RIVALS["eager"](models[0], **eager_options), RIVALS[kind](models[1], **options)


def same_trials(eager, fast):
    """Fails if the two have not made the same searches, which would make their times incomparable."""
    assert [u.trials for u in fast.optimizer.report.units] == [u.trials for u in eager.optimizer.report.units]
    assert fast.optimizer.report.joint_trials == eager.optimizer.report.joint_trials


@pytest.mark.exact(SAME_AS_EAGER)
@pytest.mark.exact("tests/test_reference.py::test_same_answers_for_each_schedule_and_momentum")
@pytest.mark.parametrize("case", full(CASES, QUICK))
def test_step(benchmark, in_turn, device, case):
    shape, options = CASES[case]
    eager, fast = twins(shape, device, "als", options, options)
    in_turn(eager, fast, SHAPES[shape].batches(device), "eager", ROUNDS.get(shape, 5), lambda: same_trials(eager, fast))
    report = fast.optimizer.report
    if "rejected" in case:
        assert {u.trials for u in report.units} == {options["max_trials"]}
    benchmark.extra_info["trials_per_unit"] = round(report.trials / len(report.units), 2)
    if case.startswith("depth"):
        benchmark.extra_info["depth"] = int(case.removeprefix("depth-"))
    if case in ("minilm", "bert-base"):
        benchmark.extra_info["peak_mib"] = {name: peak_memory(shape, name) for name in ("als", "eager", "adamw")}


@pytest.mark.exact(SAME_AS_EAGER)
@pytest.mark.parametrize(("kind", "options"), STAGES)
def test_stage(in_turn, device, kind, options):
    if kind == "graphed" and not hasattr(fastals.ALS, "graphed"):
        pytest.skip("this version of ALS cannot be captured")
    eager, fast = twins("minilm", device, kind, TRUST | options, TRUST)
    in_turn(eager, fast, SHAPES["minilm"].batches(device), "eager", check=lambda: same_trials(eager, fast))


@pytest.mark.parametrize("shape", full(["minilm", "bert-base"], ["minilm"]))
@pytest.mark.parametrize(
    "rival", ["als", "schedule-free", "prodigy", "salsa", pytest.param("adamw-captured", marks=needs_gpu)]
)
def test_instead(in_turn, device, rival, shape):
    models = [SHAPES[shape].model(device) for _ in range(2)]
    try:
        other = RIVALS[rival](models[1], **(TRUST if rival == "als" else {}))
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    in_turn(RIVALS["adamw"](models[0]), other, SHAPES[shape].batches(device), "AdamW")


@needs_gpu
@pytest.mark.parametrize("kind", ["als", "eager", "adamw"])
def test_host_time(benchmark, device, kind):
    """Seconds until step() returns to the host, the device possibly still at work."""
    rival, batches = RIVALS[kind](SHAPES["minilm"].model(device)), SHAPES["minilm"].batches(device)
    rival.step(next(batches))
    host = []

    def step():
        begin = time.perf_counter()
        rival.step(batch)
        host.append(time.perf_counter() - begin)
        torch.cuda.synchronize()

    batch = next(batches)
    benchmark.pedantic(step, rounds=5)
    benchmark.extra_info["host_ms"] = round(1e3 * sorted(host)[len(host) // 2], 3)


def peak_memory(shape, kind):
    """Peak memory in MiB of a fresh process that takes two steps."""
    done = subprocess.run([sys.executable, __file__, shape, kind], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(shape, kind):
    """Take two steps and print the peak memory in MiB: allocated on the GPU if there is one, else resident."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rival = RIVALS[kind](SHAPES[shape].model(device), **({} if kind == "adamw" else TRUST))
    batches = SHAPES[shape].batches(device)
    for _ in range(2):
        rival.step(next(batches))
    if device == "cuda":
        print(torch.cuda.max_memory_allocated() // 2**20)
    else:
        status = Path("/proc/self/status").read_text()  # ru_maxrss would start at the parent's size
        print(int(status.split("VmHWM:")[1].split()[0]) // 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
