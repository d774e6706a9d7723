"""A whole ALS step against its eager baseline, stage by stage, and against other optimizers; memory and host time.

Timed: forward, backward, all trials, all updates. Not timed: building the models and mini-batches, and the first steps
of each rival (allocation, verification of the cache, capture). ``trust`` is small, so that most first trials pass
although the weights are random. ``by_forwards`` is the ratio of the forward passes of both, a backward counted as two:
the speed-up if only forward passes took time.
"""

import pytest
from memory import peak_mib
from rivals import RIVALS
from shapes import ACCEPTING, REJECTING, SHAPES

ARCHITECTURES = ("gpt2", "llama", "vit", "lora")
CASES = {  # name: (shape, arguments of both)
    "minilm": ("minilm", ACCEPTING),
    "bert-base": ("bert-base", ACCEPTING),
    **{f"depth-{n}": (f"depth-{n}", ACCEPTING) for n in (6, 12, 24, 48)},
    **{f"{s}": ("minilm", ACCEPTING | {"schedule": s}) for s in ("relay", "independent", "cycle", "joint")},
    **{f"{k}-rejected": ("minilm", REJECTING | {"max_trials": k}) for k in (1, 2, 5)},
    **{name: (name, ACCEPTING) for name in SHAPES if name.startswith(("width", "batch", "length"))},
    **{name: (name, ACCEPTING) for name in ARCHITECTURES},
}
QUICK = ("minilm", "bert-base", "depth-6", "depth-12", "relay", "2-rejected")
WEIGHED = ("minilm", "bert-base", *ARCHITECTURES)  # cases with a measured peak memory
OPTIONS = {"als": {"trust": ACCEPTING["trust"]}, "sweep": ACCEPTING}  # of the rivals of AdamW
needs_gpu = pytest.mark.gpu
STAGES = [  # each adds one thing to the one before
    pytest.param("als", {"cache": False, "fused": False}, id="buffers"),
    pytest.param("als", {"fused": False}, id="cache"),
    pytest.param("als", {"fused": True}, id="fused", marks=needs_gpu),
    pytest.param("graphed", {"mode": "host"}, id="graphs-host", marks=needs_gpu),
    pytest.param("graphed", {"mode": "while"}, id="graphs-while", marks=needs_gpu),
]
SAME_AS_EAGER = pytest.mark.exact("same-answers-on-bert")
SAME_SCHEDULES = pytest.mark.exact("same-answers-for-each-schedule")
EVERY_ARCHITECTURE = pytest.mark.exact("every-architecture")
FUSED_SAME_AS_EAGER = pytest.mark.exact_on_gpu("fused-steps")
GRAPHS_SAME_AS_EAGER = pytest.mark.exact_on_gpu("captured-steps")
CAPTURED_SAME_AS_ADAMW = pytest.mark.exact_on_gpu("captured-adamw")


def full(names, quick, marks=None):
    """Parameters; those outside ``quick`` belong to the full profile."""
    marks = marks or {}
    return [pytest.param(n, marks=([] if n in quick else [pytest.mark.full]) + marks.get(n, [])) for n in names]


def models_of(shape, device, count=2):
    """Equal models; skips visibly if their package is missing."""
    try:
        return [SHAPES[shape].model(device) for _ in range(count)]
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")


@SAME_AS_EAGER
@FUSED_SAME_AS_EAGER
@SAME_SCHEDULES
@pytest.mark.parametrize("case", full(CASES, QUICK, {name: [EVERY_ARCHITECTURE] for name in ARCHITECTURES}))
def test_step(benchmark, in_turn, device, case):
    shape, options = CASES[case]
    models = models_of(shape, device)
    eager, fast = RIVALS["eager"](models[0], **options), RIVALS["als"](models[1], **options)
    in_turn(eager, fast, SHAPES[shape], "eager")
    if "rejected" in case:
        assert {u.trials for u in fast.optimizer.report.units} == {options["max_trials"]}
    if case.startswith("depth"):
        benchmark.extra_info["depth"] = int(case.removeprefix("depth-"))
    if case in WEIGHED:
        benchmark.extra_info["peak_mib"] = peaks(case, device)


def peaks(shape, device):
    """Peak memory by rival."""
    kinds = {"als": ACCEPTING, "eager": ACCEPTING, "adamw": {}}
    return {kind: peak_mib(shape, kind, options, device) for kind, options in kinds.items()}


@SAME_AS_EAGER
@FUSED_SAME_AS_EAGER
@GRAPHS_SAME_AS_EAGER
@pytest.mark.parametrize(("kind", "options"), STAGES)
def test_stage(benchmark, in_turn, device, kind, options):
    models = models_of("minilm", device)
    if kind == "graphed":
        benchmark.extra_info["graph_mode"] = probed_mode(options, device)
    eager = RIVALS["eager"](models[0], **ACCEPTING)
    in_turn(eager, RIVALS[kind](models[1], **ACCEPTING, **options), SHAPES["minilm"], "eager")


def probed_mode(options, device):
    """Mode in which a third model is captured; skips visibly if that is not the mode in ``options``."""
    rival, batches = RIVALS["graphed"](SHAPES["minilm"].model(device), **options), SHAPES["minilm"].batches(device)
    for _ in range(rival.first_steps):
        rival.step(next(batches))
    name, reason = rival.train_step.mode
    if name != options["mode"]:
        pytest.skip(f"mode {options['mode']} is not possible here: {reason}")
    return name


@SAME_AS_EAGER
@FUSED_SAME_AS_EAGER
@CAPTURED_SAME_AS_ADAMW
@pytest.mark.parametrize("shape", full(["minilm", "bert-base"], ["minilm"]))
@pytest.mark.parametrize(
    "rival", ["als", "sweep", "schedule-free", "prodigy", "salsa", pytest.param("adamw-captured", marks=needs_gpu)]
)
def test_instead(in_turn, device, rival, shape):
    models = models_of(shape, device)
    try:
        other = RIVALS["als" if rival == "sweep" else rival](models[1], **OPTIONS.get(rival, {}))
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    in_turn(RIVALS["adamw"](models[0]), other, SHAPES[shape], "adamw")


@needs_gpu
@FUSED_SAME_AS_EAGER
@GRAPHS_SAME_AS_EAGER
@pytest.mark.parametrize("kind", ["als", "graphed", "eager"])
def test_host_time(in_turn, device, kind):
    """Time until step() returns, though the device may still be working, against AdamW's."""
    models = models_of("minilm", device)
    in_turn(RIVALS["adamw"](models[0]), RIVALS[kind](models[1], **ACCEPTING), SHAPES["minilm"], "adamw", host=True)
