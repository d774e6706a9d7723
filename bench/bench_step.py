"""One whole ALS step: against eager, stage by stage, against what a user would pick instead; memory and host time.

In the clock: forward, backward, all trials, all updates. Not in the clock: building the models and mini-batches, and
the first step of each (allocation, verification of the cache, capture). ``trust`` is small, so that the first trial of
most searches passes although the weights are random. ``by_forwards`` is the ratio of the forward passes that both make,
a backward counted as two: the speed-up if forwards were all that costs time.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rivals import RIVALS
from shapes import SHAPES

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
ROUNDS = {"bert-base": 3, "2-rejected": 3}  # of 5 otherwise
QUICK = ("minilm", "bert-base", "depth-6", "depth-12", "2-rejected")
needs_gpu = pytest.mark.gpu
STAGES = [  # each adds one thing to the one before; the cache on the CPU is the case "minilm" above
    pytest.param("als", {"cache": False, "fused": False}, id="buffers"),
    pytest.param("als", {"fused": False}, id="cache", marks=needs_gpu),
    pytest.param("als", {"fused": True}, id="fused", marks=needs_gpu),
    pytest.param("graphed", {"mode": "host"}, id="graphs-host", marks=needs_gpu),
    pytest.param("graphed", {"mode": "while"}, id="graphs-while", marks=needs_gpu),
]
SAME_AS_EAGER = pytest.mark.exact("tests/test_reference.py::test_same_answers_on_bert")
FUSED_SAME_AS_EAGER = pytest.mark.exact_on_gpu("tests/test_device.py::test_same_steps_as_the_eager_baseline")
GRAPHS_SAME_AS_EAGER = pytest.mark.exact_on_gpu("tests/test_graph.py::test_graphs_take_the_steps_of_the_eager_path")


def full(names, quick):
    """Parameters of which those outside ``quick`` belong to the full profile."""
    return [pytest.param(n, marks=[] if n in quick else [pytest.mark.full]) for n in names]


def twins(shape, device, kind, options, eager_options):
    """The eager baseline and a rival on two equal models."""
    models = [SHAPES[shape].model(device) for _ in range(2)]
    return RIVALS["eager"](models[0], **eager_options), RIVALS[kind](models[1], **options)


@SAME_AS_EAGER
@FUSED_SAME_AS_EAGER
@pytest.mark.exact("tests/test_reference.py::test_same_answers_for_each_schedule_and_momentum")
@pytest.mark.parametrize("case", full(CASES, QUICK))
def test_step(benchmark, in_turn, device, case):
    shape, options = CASES[case]
    eager, fast = twins(shape, device, "als", options, options)
    in_turn(eager, fast, SHAPES[shape].batches(device), "eager", ROUNDS.get(case, 5))
    if "rejected" in case:
        assert {u.trials for u in fast.optimizer.report.units} == {options["max_trials"]}
    if case.startswith("depth"):
        benchmark.extra_info["depth"] = int(case.removeprefix("depth-"))
    if case in ("minilm", "bert-base"):
        benchmark.extra_info["peak_mib"] = {name: peak_memory(shape, name) for name in ("als", "eager", "adamw")}


@SAME_AS_EAGER
@FUSED_SAME_AS_EAGER
@GRAPHS_SAME_AS_EAGER
@pytest.mark.parametrize(("kind", "options"), STAGES)
def test_stage(benchmark, in_turn, device, kind, options):
    eager, fast = twins("minilm", device, kind, TRUST | options, TRUST)
    if kind == "graphed":
        benchmark.extra_info["graph_mode"] = probed_mode(options, device)
    in_turn(eager, fast, SHAPES["minilm"].batches(device), "eager")


def probed_mode(options, device):
    """The wanted mode, after a third model has been captured in it; a visible skip where it is not possible."""
    rival, batches = RIVALS["graphed"](SHAPES["minilm"].model(device), **options), SHAPES["minilm"].batches(device)
    for _ in range(rival.first_steps):
        rival.step(next(batches))
    name, reason = rival.train_step.mode
    if name != options["mode"]:
        pytest.skip(f"mode {options['mode']} is not possible here: {reason}")
    return name


@SAME_AS_EAGER
@FUSED_SAME_AS_EAGER
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
    in_turn(RIVALS["adamw"](models[0]), other, SHAPES[shape].batches(device), "adamw")


@needs_gpu
@FUSED_SAME_AS_EAGER
@pytest.mark.parametrize("kind", ["als", "graphed", "eager", "adamw"])
def test_host_time(benchmark, device, kind):
    """Seconds until step() returns to the host, the device possibly still at work."""
    rival, batches = RIVALS[kind](SHAPES["minilm"].model(device)), SHAPES["minilm"].batches(device)
    for _ in range(rival.first_steps):
        rival.step(next(batches))
    torch.cuda.synchronize()
    batch = next(batches)
    benchmark.pedantic(rival.step, args=(batch,), teardown=lambda _: torch.cuda.synchronize(), rounds=9)


def peak_memory(shape, kind):
    """Peak memory in MiB of a fresh process that takes two steps, above what its imports hold."""
    done = subprocess.run([sys.executable, "-P", __file__, shape, kind], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def resident(field):
    """Resident memory in MiB: ``VmRSS`` now, ``VmHWM`` at the peak (ru_maxrss would start at the parent's size)."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) // 1024


def main(shape, kind):
    """Take two steps and print the peak memory in MiB: allocated on the GPU if there is one, else resident."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    imports = resident("VmRSS")
    rival = RIVALS[kind](SHAPES[shape].model(device), **({} if kind == "adamw" else TRUST))
    batches = SHAPES[shape].batches(device)
    for _ in range(2):
        rival.step(next(batches))
    print(torch.cuda.max_memory_allocated() // 2**20 if device == "cuda" else resident("VmHWM") - imports)


if __name__ == "__main__":
    main(*sys.argv[1:])
