"""Steps as captured pieces: one program with a back end that records, on the CPU, and with CUDA graphs on a GPU."""

import contextlib
import copy
import gc
import math
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from helpers.tiny import TinyTransformer, tiny_batches

import fastals
from fastals import rng
from fastals.graphs import cuda, graphed
from fastals.graphs.graphed import WARMUP, GraphedStep, GraphMode, pad
from fastals.graphs.program import Always, Loop, Run, SkipIfAccepted
from fastals.partition import blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HARD = {"c": 0.5, "backtrack": 0.5, "growth": 2.0, "trust": 0.2, "max_trials": 4}
CASES = [
    {"schedule": "sweep"}, {"schedule": "sweep", "order": "bottom_up"}, {"schedule": "independent"},
    {"schedule": "cycle"}, {"schedule": "joint"}, {"schedule": "joint", "momentum": "after"}, {"momentum": "tested"},
    {"every": 2}, {"every": "auto"}, {"max_grad_norm": 0.1}, {"initial": "random"}, {"cache": False},
]  # fmt: skip


class Recording:
    """Runs the captured actions anew at each replay, writes results where the first ones lie, and keeps a log."""

    def __init__(self, params, *, linked, log, draws):
        self.params, self.linked, self.log, self.draws, self.fails = params, linked, log, draws, False

    def session(self):
        return contextlib.nullcontext()

    def held_bytes(self):
        return 0

    def capture_head(self, action):
        self.seed = torch.initial_seed()
        result = action()
        grads = [p.grad for p in self.params]

        def again():
            result.copy_(action())
            for p, g in zip(self.params, grads, strict=True):
                if g is not None:
                    g.copy_(p.grad)
                p.grad = None

        return self.capture(again), result

    def capture(self, action):
        assert torch.initial_seed() == self.seed, "while torch captures, a state of another seed cannot be set"
        self.log.append("capture")
        return action

    def replay(self, piece):
        self.log.append("replay")
        piece()

    def look(self, flags):
        self.log.append("look")
        return flags.tolist()

    def rng_state(self):
        return torch.get_rng_state()

    def set_rng_state(self, state):
        torch.set_rng_state(state)

    def link(self, operations, flags):
        if not self.linked:
            raise RuntimeError("this back end has no loops")

        def launch():
            if self.fails:
                raise RuntimeError("out of memory")
            self.log.append("launch")
            for operation in operations:
                if isinstance(operation, Run):
                    operation.piece()
                elif isinstance(operation, Loop):
                    while int(flags[operation.row, 0]):
                        operation.piece()

        return launch


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the recording back end runs interpreted kernels; here CUDA graphs are tested"
)


def build(loss_fn=None, linked=False, depth=1, dropout=0.1, log=None, **options):
    torch.manual_seed(0)
    model = TinyTransformer(depth=depth, dropout=dropout)
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, **options)

    def backend(device, stream, *, draws):
        return Recording(list(model.parameters()), linked=linked, log=[] if log is None else log, draws=draws)

    return model, opt, GraphedStep(opt, loss_fn or (lambda batch: model(**batch)), backend=backend)


def same_report(a, b):
    assert [(u.name, u.outcome) for u in a.units] == [(u.name, u.outcome) for u in b.units]
    for u, v in zip(a.units, b.units, strict=True):
        assert u.trials == v.trials
        assert (u.step_size, u.slope) == (v.step_size, v.slope)
    assert a.joint_trials == b.joint_trials
    assert a.loss_before == b.loss_before
    assert a.loss_after == b.loss_after or (math.isnan(a.loss_after) and math.isnan(b.loss_after))


@interpreted
@pytest.mark.parametrize("linked", [False, True], ids=["host", "while"])
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_a_replayed_step_is_the_eager_step_bitwise(options, linked):
    options = HARD | options
    model, opt, step = build(linked=linked, **options)
    twin = copy.deepcopy(model)
    eager = fastals.ALS(fastals.units(twin), model=twin, fused=True, **options)
    for t, batch in enumerate(tiny_batches(WARMUP + 3)):
        after = []
        for take in (step, lambda b: eager.step(lambda: twin(**b))):
            torch.manual_seed(100 + t)
            loss = take(batch)
            after.append((float(loss), torch.rand(2).tolist()))
        assert after[0] == after[1], "losses, and where the generators stand"
        same_report(opt.report, eager.report)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert step.mode.name == ("while" if linked else "host")
    ours, theirs = opt.state_dict(), eager.state_dict()
    for a, b in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert a == b
    for i, s in theirs["state"].items():
        assert all(torch.equal(ours["state"][i][k], v) for k, v in s.items())


@interpreted
def test_launches_and_looks():
    """Host mode looks once per trial; in while mode a step is one launch, with dropout two, and no look."""
    for linked, dropout in ((False, 0.1), (True, 0.1), (True, 0.0)):
        log = []
        _, opt, step = build(linked=linked, log=log, dropout=dropout)
        for batch in tiny_batches(WARMUP + 3):
            log.clear()
            step(batch)
        if linked:
            assert log == (["replay", "launch"] if dropout else ["launch"])
        else:
            trials, units = opt.report.trials, len(opt.report.units)
            assert log.count("look") == trials
            assert log.count("replay") == 1 + trials + units + 1  # head, trials, a line before every loop, the end


@interpreted
def test_programs_are_kept_by_signature_and_the_oldest_goes():
    log = []
    model, _, _ = build()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)

    def backend(device, stream, *, draws):
        return Recording(list(model.parameters()), linked=False, log=log, draws=draws)

    step = GraphedStep(opt, lambda batch: model(**batch), max_signatures=2, backend=backend)
    lengths = [next(tiny_batches(1, length=n)) for n in (4, 5, 6)]
    for batch in lengths:
        for _ in range(WARMUP + 2):
            step(batch)
    assert len(step._programs) == 2
    log.clear()
    step(lengths[2])
    step(lengths[1])
    assert "capture" not in log
    step(lengths[0])
    assert "capture" in log
    model.eval()
    step(lengths[0])
    assert step._seen != {}, "another mode is another signature"


@interpreted
def test_frozen_and_moved_parameters_are_captured_anew():
    log = []
    model, _, step = build(log=log)
    batches = list(tiny_batches(WARMUP + 2))
    for batch in batches:
        step(batch)
    assert step.mode.name == "host"
    with torch.no_grad():
        model.head.weight.data = model.head.weight.data.clone()
    log.clear()
    step(batches[0])
    assert log == [], "warms up again"
    for _ in range(WARMUP):
        step(batches[0])
    assert "capture" in log


def move_a_frozen_weight(model):
    model.embed.weight.data = model.embed.weight.data.clone()


def freeze(model):
    model.head.weight.requires_grad_(False)
    model.head.weight.grad = None


def replace_a_module(model):
    model.blocks[0].dropout = torch.nn.Dropout(0.2)


def switch_a_module_to_evaluation(model):
    model.blocks[0].eval()


def move_a_buffer(model):
    model.norm.scale = model.norm.scale.clone()


@interpreted
@pytest.mark.parametrize(
    "change", [move_a_frozen_weight, freeze, replace_a_module, switch_a_module_to_evaluation, move_a_buffer]
)
def test_what_the_graphs_hold_fast_of_the_model_is_captured_anew_where_it_changes(change):
    torch.manual_seed(0)
    model, log = TinyTransformer(depth=1), []
    model.embed.weight.requires_grad_(False)
    model.norm.register_buffer("scale", torch.ones(1))
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    backend = partial(Recording, [p for p in model.parameters() if p.requires_grad], linked=False, log=log)
    step = GraphedStep(opt, lambda b: model(**b), backend=lambda device, stream, *, draws: backend(draws=draws))
    batch = next(tiny_batches(1))
    for _ in range(WARMUP + 2):
        step(batch)
    assert "capture" in log
    change(model)
    log.clear()
    for _ in range(WARMUP):
        step(batch)
    assert log == []
    step(batch)
    assert "capture" in log


@interpreted
@pytest.mark.parametrize("schedule", ["joint", "cycle", "sweep"])
def test_a_resumed_optimizer_replays_with_its_cache(schedule):
    model, opt, step = build(schedule=schedule, depth=2)
    batches = list(tiny_batches(WARMUP + 2))
    for batch in batches:
        step(batch)
    state = opt.state_dict()
    twin, resumed, again = build(schedule=schedule, depth=2)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    weights = [p.detach().clone() for p in twin.parameters()]
    for batch in batches:
        again(batch)
    assert all(resumed._learned.trusted.get(u.name) for u in resumed._units)
    (captured,) = again._programs.values()
    assert all(captured.program.losses.trusted[u.name] for u in resumed._units)
    assert not all(torch.equal(p, q) for p, q in zip(twin.parameters(), weights, strict=True))


@interpreted
def test_a_batch_that_cannot_be_a_signature_runs_eagerly_and_says_why():
    class Task:
        __hash__ = None

    model, _, step = build(loss_fn=lambda b: model(b["tokens"], b["labels"]))
    for batch in tiny_batches(WARMUP + 2):
        step(batch | {"task": Task()})
    assert step.mode.name == "eager"
    assert "unhashable type: 'Task'" in step.mode.reason


@interpreted
def test_signatures_that_never_come_back_are_counted_and_forgotten(monkeypatch):
    monkeypatch.setattr(graphed, "MOST_SEEN", 3)
    model, _, step = build(loss_fn=lambda b: model(b["tokens"], b["labels"]))
    for t, batch in enumerate(tiny_batches(6)):
        step(batch | {"temperature": 0.1 * t})
    assert len(step._seen) == 3
    assert step.mode == GraphMode("eager", f"3 signatures of inputs seen, and one is captured after {WARMUP} steps")


@interpreted
def test_a_failed_capture_falls_back_with_one_warning_and_the_step_is_taken():
    fails = {"now": False}
    model, opt, step = build(loss_fn=lambda batch: work(batch))

    def work(batch):
        if fails["now"]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return model(**batch)

    batches = list(tiny_batches(WARMUP + 3))
    for batch in batches[:WARMUP]:
        step(batch)

    def broken(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    step._make_backend = broken
    before = opt.param_groups[0]["count"]
    with pytest.warns(UserWarning, match="steps run eagerly, because the capture failed"):
        step(batches[3])
    assert opt.param_groups[0]["count"] == before + 1
    assert step.mode.name == "eager"
    assert "not permitted" in step.mode.reason
    step(batches[4])


class BrokenError(Exception):
    """Raised in the user's loss."""


@interpreted
def test_an_error_of_the_loss_during_a_capture_is_raised_and_later_steps_are_captured():
    broken = {"now": False}

    def loss_fn(batch):
        if broken["now"]:
            raise BrokenError
        return model(**batch)

    model, _, step = build(loss_fn=loss_fn)
    batches = list(tiny_batches(WARMUP + 2))
    for batch in batches[:WARMUP]:
        step(batch)
    broken["now"] = True
    with pytest.raises(BrokenError):
        step(batches[-2])
    broken["now"] = False
    step(batches[-1])
    assert step.mode.name == "host"


@interpreted
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_during_a_replay_leaves_everything_as_it_was(linked, at):
    calls = {"left": 10**6}

    def loss_fn(batch):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise BrokenError
        return model(**batch)

    model, opt, step = build(loss_fn=loss_fn, linked=linked, **HARD)
    batches = list(tiny_batches(WARMUP + 3))
    for batch in batches[: WARMUP + 1]:
        step(batch)
    weights = [p.detach().clone() for p in model.parameters()]
    state, generator = copy.deepcopy(opt.state_dict()), torch.get_rng_state()
    calls["left"] = at
    with pytest.raises(BrokenError):
        step(batches[-1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    for a, b in zip(opt.state_dict()["param_groups"], state["param_groups"], strict=True):
        assert a == b
    calls["left"] = 10**6
    step(batches[-1])


@interpreted
def test_a_flag_that_never_says_stop_ends_a_replayed_step_in_an_error(monkeypatch):
    model, _, step = build(**HARD)
    batches = list(tiny_batches(WARMUP + 3))
    for batch in batches[:-2]:
        step(batch)
    weights = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(Recording, "look", lambda *_: [1, 0, 0, 0])
    with pytest.raises(RuntimeError, match="goes on after 5 trials, more than max_trials"):
        step(batches[-2])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    monkeypatch.undo()
    step(batches[-1])
    assert step.mode.name == "host"


@interpreted
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_launch_that_fails_at_once_leaves_the_weights_of_this_step(dropout):
    """And not those of the last one, whose snapshot the device still has."""
    model, opt, step = build(linked=True, dropout=dropout, **HARD)
    batches = list(tiny_batches(WARMUP + 3))
    for batch in batches[:-1]:
        step(batch)
    weights, generator = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    (captured,) = step._programs.values()
    captured.program.backend.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        step(batches[-1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    captured.program.backend.fails = False
    step(batches[-1])
    assert opt.report.loss_after < opt.report.loss_before


@interpreted
@pytest.mark.parametrize("linked", [False, True])
def test_a_replayed_step_is_finished_and_counted_before_an_interrupt(linked):
    interrupted = {"now": False}

    def loss_fn(batch):
        if interrupted["now"]:
            signal.raise_signal(signal.SIGINT)
        return model(**batch)

    model, opt, step = build(loss_fn=loss_fn, linked=linked, **HARD)
    batches = list(tiny_batches(WARMUP + 2))
    for batch in batches[:-1]:
        step(batch)
    interrupted["now"] = True
    with pytest.raises(KeyboardInterrupt):
        step(batches[-1])
    assert opt.param_groups[0]["count"] == int(opt._device.arena.step) == len(opt.reports) == len(batches)


@interpreted
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("cache", [True, False])
def test_module_buffers_are_put_back_where_a_loss_is_not_finite(linked, cache):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    opt = fastals.ALS([{"params": list(model.parameters()), "name": "all"}], model=model, fused=True, cache=cache)

    def backend(device, stream, *, draws):
        return Recording(list(model.parameters()), linked=linked, log=[], draws=draws)

    step = GraphedStep(opt, lambda x: model(x).square().mean(), backend=backend)
    for _ in range(WARMUP + 2):
        step(torch.randn(8, 4))
    assert step.mode.name == ("while" if linked else "host")
    before = [b.clone() for b in model.buffers()]
    refused = torch.full((8, 4), math.nan)
    if linked:
        step(refused)  # nobody waits for it: it is said at the next step, which is not taken
    with pytest.raises(FloatingPointError):
        step(refused)
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), before, strict=True))
    step(torch.randn(8, 4))
    assert not any(torch.equal(b, c) for b, c in zip(model.buffers(), before, strict=True))


@interpreted
def test_a_refused_step_is_said_although_its_program_has_gone():
    scale = torch.ones(())
    model, opt, _ = build()
    backend = partial(Recording, list(model.parameters()), linked=True, log=[])
    step = GraphedStep(
        opt,
        lambda b: model(**b) * scale,
        max_signatures=1,
        backend=lambda device, stream, *, draws: backend(draws=draws),
    )
    short, long = (next(tiny_batches(1, length=n)) for n in (4, 6))
    for batch in [short] * (WARMUP + 1) + [long] * WARMUP + [short]:
        step(batch)
    scale.fill_(math.nan)
    step(short)
    scale.fill_(1.0)
    with pytest.raises(FloatingPointError):
        step(long)


@interpreted
@pytest.mark.parametrize("linked", [False, True])
def test_an_outer_autocast_region_sees_the_weights_behind_a_replayed_step(linked):
    model, _, step = build(linked=linked, momentum="after", **HARD)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for batch in tiny_batches(WARMUP + 2):
            step(batch)
            found = float(model(**batch))
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                assert found == float(model(**batch))
    assert step.mode.name != "eager", step.mode


@interpreted
@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("no loops"), "no loops"), (AttributeError("no such node"), "AttributeError: no such node")],
)
def test_whatever_a_launch_fails_with_the_pieces_are_replayed_by_the_host(error, reason, monkeypatch):
    def fails(self, operations, flags):
        raise error

    monkeypatch.setattr(Recording, "link", fails)
    _, _, step = build()
    for batch in tiny_batches(WARMUP + 1):
        step(batch)
    assert step.mode == GraphMode("host", reason)


@interpreted
@pytest.mark.parametrize("linked", [False, True])
def test_a_loss_that_is_not_finite_moves_nothing_and_is_said(linked):
    scale = torch.ones(())
    model, opt, step = build(loss_fn=lambda batch: model(**batch) * scale, linked=linked)
    batches = list(tiny_batches(WARMUP + 4))
    for batch in batches[: WARMUP + 1]:
        step(batch)
    weights = [p.detach().clone() for p in model.parameters()]
    moments = [s["exp_avg_sq"].clone() for s in opt.state.values()]
    scale.fill_(math.nan)
    if linked:
        step(batches[-2])  # nobody waits for it
        scale.fill_(1.0)
        with pytest.raises(FloatingPointError):
            step(batches[-1])
    else:
        with pytest.raises(FloatingPointError):
            step(batches[-2])
        scale.fill_(1.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(s["exp_avg_sq"], m) for s, m in zip(opt.state.values(), moments, strict=True))
    step(batches[-1])
    assert opt.report.loss_after < opt.report.loss_before


def test_on_a_cpu_the_call_is_the_eager_step():
    torch.manual_seed(0)
    model = TinyTransformer()
    opt = fastals.ALS(model)
    step = opt.graphed(lambda batch: model(**batch))
    if not torch.cuda.is_available():
        assert opt.graph_mode == step.mode == GraphMode("eager", "there is no CUDA device")
    losses = [float(step(b)) for b in tiny_batches(3)]
    assert losses[0] == opt.reports[0].loss_before


@interpreted
@pytest.mark.parametrize(("options", "reason"), [({"order": "random"}, "random"), ({"merge_below": 1e-3}, "merge")])
def test_steps_that_are_no_fixed_sequence_run_eagerly(options, reason):
    _, _, step = build(**options)
    assert step.mode.name == "eager"
    assert reason in step.mode.reason
    step(next(tiny_batches(1)))


def test_padding_to_few_signatures():
    ids = torch.ones(2, 13, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids, "scores": torch.ones(2)}
    padded = pad(batch, 8)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (2, 16)
    assert padded["attention_mask"][:, 13:].sum() == 0
    assert (padded["labels"][:, 13:] == -100).all()
    assert padded["scores"] is batch["scores"]
    assert pad(padded, 8)["input_ids"] is padded["input_ids"]
    with pytest.raises(TypeError, match="attention_mask"):
        pad({"input_ids": ids}, 8)


@interpreted
def test_schedules_differ_in_how_pieces_are_strung_together():
    shapes = {}
    for schedule in ("sweep", "independent", "cycle", "joint"):
        _, _, step = build(schedule=schedule)
        for batch in tiny_batches(WARMUP + 2):
            step(batch)
        (captured,) = step._programs.values()
        (tail, *_) = captured.program.tails.values()
        signs = {Run: "-", Loop: "o", SkipIfAccepted: "<", Always: ">"}
        shapes[schedule] = "".join(signs[type(operation)] for operation in tail.operations)
    assert shapes == {"sweep": "-o-o-o-", "independent": "-o-o-o-o-<>-", "cycle": "-o-", "joint": "-o-<-o-o-o->-"}


@interpreted
def test_the_benchmarks_count_and_replay_what_a_captured_sweep_needs():
    """The floor: the head, a forward per trial and a copy; the work: what the eager step counts."""
    from floor import Floor
    from rivals import Graphed, SearchRival

    log, pairs = [], list(huggingface("bert"))
    model = pairs[0][0]
    twin = copy.deepcopy(model)

    def backend(device, stream, *, draws):
        return Recording(list(model.parameters()), linked=False, log=log, draws=draws)

    graphed = Graphed(model, fastals.ALS(fastals.units(model), model=model, fused=True, **HARD), backend)
    eager = SearchRival(twin, fastals.ALS(fastals.units(twin), model=twin, fused=True, **HARD))
    work = []
    for t in range(graphed.first_steps):
        for rival in (graphed, eager):
            torch.manual_seed(t)
            rival.step(pairs[t % 3][1])
        work.append((graphed.work() if graphed.train_step._programs else 0.0, eager.work()))
    ours, theirs = (b - a for a, b in zip(*work[-2:], strict=True))
    assert ours == pytest.approx(theirs)
    report, log[:] = graphed.optimizer.report, []
    floor = Floor(graphed)
    assert log == ["capture"] * (len(report.units) + 1)
    assert floor.trials == {u.name: u.trials for u in report.units}
    log.clear()
    floor.step({})
    assert log == ["replay"] * (1 + report.trials + 1)


# The launch of a whole tail, with a stand-in for the CUDA bindings


class Bindings:
    """Writes down which nodes are made and on what they wait; those of CUDA 13 have no second version of a call."""

    def __init__(self, major):
        self.nodes, self.major = [], major

    def __getattr__(self, name):
        if self.major > 12 and name.endswith("_v2"):
            raise AttributeError(name)
        return lambda *args: (0, self.node(name, args))

    def node(self, name, args):
        if name == "cudaDriverGetVersion":
            return 13000
        if name in ("cudaGraphCreate", "cudaGraphInstantiate"):
            return name
        self.nodes.append((name, args))
        return len(self.nodes) - 1

    class cudaGraphNodeType:  # noqa: N801
        cudaGraphNodeTypeConditional = "conditional"  # noqa: N815

    class cudaGraphConditionalNodeType:  # noqa: N801
        cudaGraphCondTypeWhile = "while"  # noqa: N815

    class cudaGraphNodeParams:  # noqa: N801
        def __init__(self):
            self.conditional = type("Conditional", (), {"phGraph_out": [77]})()

    class CUDA_KERNEL_NODE_PARAMS:  # noqa: N801
        pass

    @staticmethod
    def cudaGraph_t(address):  # noqa: N802
        return f"body {address}"


@pytest.mark.parametrize("major", [12, 13])
def test_a_tail_becomes_one_graph_of_child_graphs_and_while_nodes(monkeypatch, major):
    bindings = Bindings(major)
    monkeypatch.setattr(cuda, "runtime", bindings)
    monkeypatch.setattr(cuda, "driver", bindings)
    monkeypatch.setattr(cuda, "set_condition", lambda device: "set_condition")
    backend = object.__new__(cuda.CudaGraphs)
    backend.draws, backend.device = False, torch.device("cuda", 0)
    backend.stream = type("Stream", (), {"cuda_stream": 5})()
    piece = type("Piece", (), {"raw_cuda_graph": lambda self: "raw"})()
    flags = torch.zeros(3, 3, dtype=torch.int32)
    launch = backend.link([Run(piece), Loop(piece, 1), SkipIfAccepted(), Run(piece), Always()], flags)
    made = [(name, args[0]) for name, args in bindings.nodes if name.startswith(("cudaGraphAdd", "cuGraphAdd"))]
    assert made == [
        ("cudaGraphAddChildGraphNode", "cudaGraphCreate"), ("cuGraphAddKernelNode", "cudaGraphCreate"),
        ("cudaGraphAddNode", "cudaGraphCreate"), ("cudaGraphAddChildGraphNode", "body 77"),
        ("cuGraphAddKernelNode", "body 77"), ("cudaGraphAddChildGraphNode", "cudaGraphCreate"),
    ]  # fmt: skip
    (added,) = (args for name, args in bindings.nodes if name == "cudaGraphAddNode")
    assert len(added) == (4 if major == 12 else 5), (
        "graph, what it waits for, data of the edges, their count, parameters"
    )
    names = [name for name, _ in bindings.nodes]
    loop = names.index("cudaGraphAddNode")
    last = len(names) - 1 - names[::-1].index("cudaGraphAddChildGraphNode")
    assert bindings.nodes[last][1][1] == [loop], "what follows waits for the loop"
    kernels = [args[3].kernelParams[0] for name, args in bindings.nodes if name == "cuGraphAddKernelNode"]
    assert {flag for _, flag in kernels} == {flags[1].data_ptr()}
    launch()
    assert bindings.nodes[-1] == ("cudaGraphLaunch", ("cudaGraphInstantiate", 5))
    made = len(bindings.nodes)
    del launch, backend
    gc.collect()
    assert sorted(bindings.nodes[made:]) == [
        ("cudaGraphDestroy", ("cudaGraphCreate",)), ("cudaGraphExecDestroy", ("cudaGraphInstantiate",)),
    ]  # fmt: skip


def test_why_there_are_no_loops_on_the_device(monkeypatch):
    backend = object.__new__(cuda.CudaGraphs)
    monkeypatch.setattr(cuda, "runtime", None)
    with pytest.raises(RuntimeError, match="cuda-bindings"):
        backend.link([], None)
    monkeypatch.setattr(cuda, "runtime", Bindings(13))
    monkeypatch.setattr(cuda, "TORCH", (2, 13))
    backend.draws = True
    with pytest.raises(RuntimeError, match="random numbers"):
        backend.link([], None)


def test_a_failed_capture_is_ended_by_a_clean_one(monkeypatch):
    modes, taken_out = [], []

    class Graph:
        def __init__(self, keep_graph=False):
            self.fails = keep_graph

        def capture_begin(self, pool=None, capture_error_mode="global"):
            modes.append(capture_error_mode)

        def capture_end(self):
            if self.fails:
                raise RuntimeError("the capture is not valid")
            warnings.warn("The CUDA Graph is empty.", stacklevel=2)

    def action():
        raise BrokenError

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *where, name=name: taken_out.append((name, *where)), raising=False)
    backend = object.__new__(cuda.CudaGraphs)
    backend.stream, backend.pool, backend.device = None, (0, 1), torch.device("cuda", 0)
    with pytest.raises(BrokenError):
        backend.capture(action)
    with pytest.raises(RuntimeError, match="not valid"):
        backend.capture(lambda: None)
    assert modes == ["relaxed"] * 4
    assert taken_out == [("_cuda_endAllocateToPool", 0, (0, 1)), ("_cuda_releasePool", 0, (0, 1))] * 2


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_kernel_that_sets_a_condition_assembles(architecture):
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "set_condition.ptx"
        source.write_bytes(cuda.SET_CONDITION.rstrip(b"\0"))
        done = subprocess.run(
            [assembler, f"-arch={architecture}", "-c", source, "-o", source.with_suffix(".o")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert not done.returncode, done.stderr


# On a GPU


def on_gpu(model, opt, count=8):
    step = opt.graphed(lambda batch: model(**batch))
    for t, batch in enumerate(tiny_batches(count)):
        torch.manual_seed(t)
        step({k: v.cuda() for k, v in batch.items()})
    print(step.mode)
    return step


@pytest.mark.gpu
@pytest.mark.parametrize("force_host", [False, True], ids=["while", "host"])
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_graphs_take_the_steps_of_the_eager_path(options, force_host, monkeypatch):
    if force_host:
        monkeypatch.setattr(cuda, "runtime", None)
    options = HARD | options
    torch.manual_seed(0)
    model = TinyTransformer(depth=2).cuda()
    twin = copy.deepcopy(model)
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, **options)
    eager = fastals.ALS(fastals.units(twin), model=twin, fused=True, **options)
    step = opt.graphed(lambda batch: model(**batch))
    for t, batch in enumerate(tiny_batches(200 if options == HARD | CASES[0] else 20)):
        batch = {k: v.cuda() for k, v in batch.items()}
        for take in (step, lambda b: eager.step(lambda: twin(**b))):
            torch.manual_seed(100 + t)
            take(batch)
        a, b = opt.report, eager.report
        assert [(u.name, u.outcome, u.trials) for u in a.units] == [(u.name, u.outcome, u.trials) for u in b.units]
        for u, v in zip(a.units, b.units, strict=True):
            assert u.step_size == pytest.approx(v.step_size, rel=1e-3)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.data.copy_(p.data)
        eager.load_state_dict(opt.state_dict())
    print(step.mode)
    assert step.mode.name == "host" if force_host else step.mode.name in ("while", "host"), step.mode


def huggingface(kind):
    """A small Hugging Face model and batches for it."""
    import transformers as hf

    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    if kind == "bert":
        config = hf.BertConfig(**small, vocab_size=100)
        model = hf.BertForSequenceClassification(config)
    else:
        config = hf.LlamaConfig(**small, num_key_value_heads=2, vocab_size=100, pad_token_id=0)
        model = hf.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(1, 100, (4, 16), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 10:] = 0
        labels = ids[:, 0] % 2 if kind == "bert" else ids
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        yield model.to(DEVICE).train(), {name: value.to(DEVICE) for name, value in batch.items()}


@interpreted
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_hugging_face_models_are_replayed(kind):
    pairs = list(huggingface(kind))
    model = pairs[0][0]
    params = list(model.parameters())
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)

    def backend(device, stream, *, draws):
        return Recording(params, linked=False, log=[], draws=draws)

    step = GraphedStep(opt, lambda batch: model(**batch).loss, backend=backend)
    for t in range(WARMUP + 2):
        step(pairs[t % 3][1])
        assert opt.report.loss_after <= opt.report.loss_before
    assert step.mode.name == "host"


@interpreted
def test_what_a_tokenizer_returns_is_a_dict_in_eager_and_in_replayed_steps():
    from transformers import BatchEncoding

    seen = set()

    def loss_fn(batch):
        seen.add(type(batch))
        return model(**batch)

    model, _, step = build(loss_fn=loss_fn)
    for batch in tiny_batches(WARMUP + 2):
        step(BatchEncoding(batch))
    assert step.mode.name == "host"
    assert seen == {dict}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning")  # the compiler's advice
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at activations
@pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32:UserWarning")
@pytest.mark.parametrize("how", ["plain", "autocast", "compiled", "checkpointed", "accumulated"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_hugging_face_models_are_captured_as_they_are(kind, how):
    pairs = list(huggingface(kind))
    model = pairs[0][0]
    if how == "compiled":
        for block in blocks(model).values():
            block.compile()
    if how == "checkpointed":
        model.gradient_checkpointing_enable()

    def loss_fn(batch):
        with torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast"):
            loss = model(**batch, use_cache=False).loss if kind == "llama" else model(**batch).loss
            return (loss + model(**batch).loss) / 2 if how == "accumulated" else loss

    opt = fastals.ALS(model)
    step = opt.graphed(loss_fn)
    for t in range(8):
        step(pairs[t % 3][1])
        assert opt.report.loss_after <= opt.report.loss_before
    print(step.mode)
    assert step.mode.name != "eager", step.mode


@pytest.mark.gpu
def test_two_signatures_live_beside_each_other_and_one_survives_the_other():
    """Captured memory is not handed out: replays stay right while others allocate, and after a program has gone."""
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = opt.graphed(lambda batch: model(**batch), max_signatures=2)
    batches = [{k: v.cuda() for k, v in next(tiny_batches(1, length=n)).items()} for n in (4, 6, 8)]
    for batch in (*batches[:2] * (WARMUP + 2), *batches[2:] * (WARMUP + 2)):  # the third drops the first
        step(batch)
    held = []
    for t in range(200):
        held = [*held[-4:], torch.randn(100_000, device="cuda").fill_(float("nan"))]
        torch.cuda.empty_cache()
        batch = batches[1 + t % 2]
        with torch.no_grad():
            expected = float(model(**batch))
        assert float(step(batch)) == pytest.approx(expected, rel=1e-5)
        assert opt.report.loss_after <= opt.report.loss_before


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["while", "host", "eager"])
def test_dropout_masks_are_held_in_a_step_and_change_between_steps(mode, monkeypatch):
    """With steps too short to change a weight every first trial's loss is f(w_t), bitwise, and is accepted."""
    if mode == "host":
        monkeypatch.setattr(cuda, "runtime", None)
    torch.manual_seed(0)
    model = TinyTransformer(depth=3, dropout=0.5).cuda()
    short = {"trust": None, "eta_init": 1e-30, "eta_max": 1e-30, "eta_min": 1e-38}
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, **short)
    step = opt.graphed(lambda batch: model(**batch)) if mode != "eager" else lambda b: opt.step(lambda: model(**b))
    batch = {k: v.cuda() for k, v in next(tiny_batches(1)).items()}
    starts = []
    for _ in range(8):
        step(batch)
        report = opt.report
        assert [(u.outcome, u.trials) for u in report.units] == [("accepted", 1)] * len(report.units)
        assert report.loss_after == report.loss_before
        starts.append(report.loss_before)
    assert len(set(starts)) == len(starts)
    if mode != "eager" and step.mode.name != mode:
        pytest.skip(f"steps ran in mode {step.mode.name}: {step.mode.reason}")


def cuda_backend():
    device = torch.device("cuda", torch.cuda.current_device())
    return cuda.CudaGraphs(device, torch.cuda.Stream(device), draws=False)


def linked_or_skipped(backend, operations, flags):
    try:
        return backend.link(operations, flags)
    except RuntimeError as error:
        pytest.skip(f"no loops on the device here: {error}")


@pytest.mark.gpu
def test_a_loop_on_the_device_ends_when_its_flag_says_so():
    """A thousand launches, others allocating beside them; two loops, of which the second starts from the first."""
    backend = cuda_backend()
    flags = torch.zeros(2, 3, dtype=torch.int32, device="cuda")
    counters = torch.zeros(2, dtype=torch.int32, device="cuda")

    def arm():
        counters.zero_()
        flags.fill_(1)

    def count(row, end):
        counters[row].add_(1)
        flags[row, 0].copy_(counters.sum() < end)

    actions = [arm, partial(count, 0, 7), partial(count, 1, 12)]
    with torch.cuda.stream(backend.stream):
        for action in actions:
            action()
    torch.cuda.synchronize()
    with backend.session():
        armed, first, second = map(backend.capture, actions)
    launch = linked_or_skipped(backend, [Run(armed), Loop(first, 0), Loop(second, 1)], flags)
    for t in range(1000):
        launch()
        if t % 100 == 0:
            torch.cuda.empty_cache()
            torch.full((1 << 20,), math.nan, device="cuda")
    torch.cuda.synchronize()
    assert counters.tolist() == [7, 5]


class Attending(torch.nn.Module):
    """Two blocks of attention by torch's fused kernels, in bfloat16 under autocast."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(32, 64), torch.nn.Linear(64, 4)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(64, 192) for _ in range(2))

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        for block in self.blocks:
            q, k, v = block(x).unflatten(-1, (3, 2, 32)).transpose(1, 3).unbind(2)
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.nn.functional.cross_entropy(self.head(x.mean(1)).float(), labels)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
def test_losses_have_the_same_bits_whether_host_or_device_runs_the_loops(kernel, monkeypatch):
    """At weights that no step changes, since the backward of some kernels has no fixed order."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    seen = []
    for host in (False, True):
        if host:
            monkeypatch.setattr(cuda, "runtime", None)
        torch.manual_seed(0)
        model = Attending().cuda()

        def loss_fn(batch, model=model):
            with sdpa_kernel(getattr(SDPBackend, kernel)), torch.autocast("cuda", torch.bfloat16):
                return model(**batch)

        short = {"trust": None, "eta_init": 1e-30, "eta_max": 1e-30, "eta_min": 1e-38}
        opt = fastals.ALS(fastals.units(model), model=model, fused=True, **short)
        step = opt.graphed(loss_fn)
        for batch in tiny_batches(WARMUP + 4, length=16):
            step({k: v.cuda() for k, v in batch.items()})
        assert step.mode.name != "eager", step.mode
        seen.append([(r.loss_before, r.loss_after) for r in opt.reports])
    assert seen[0] == seen[1]


@pytest.mark.gpu
def test_searches_without_a_step_and_refused_steps_leave_the_weights_bitwise():
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    factor, shift = torch.ones((), device="cuda"), torch.zeros((), device="cuda")

    def loss_fn(batch):
        """Every evaluation is higher than the one before: no trial passes."""
        shift.add_(1.0)
        return model(**batch) * factor + shift

    opt = fastals.ALS(fastals.units(model), model=model, fused=True, max_trials=3)
    opt._repeatable = True  # it is not, which the first step would refuse
    step = opt.graphed(loss_fn)
    batch = {k: v.cuda() for k, v in next(tiny_batches(1)).items()}
    weights = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cached trials differ from full forwards, by the shift
        for _ in range(WARMUP + 3):
            step(batch)
    assert {(u.outcome, u.trials) for u in opt.report.units} == {("exhausted", 3)}
    factor.fill_(math.nan)
    if step.mode.name == "while":
        step(batch)
        torch.cuda.synchronize()
    with pytest.raises(FloatingPointError):
        step(batch)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


@pytest.mark.gpu
def test_pieces_captured_late_survive_programs_that_have_gone():
    """``cycle`` captures each unit's turn when it comes, between the captures and evictions of other signatures."""
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    twin = copy.deepcopy(model)
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, schedule="cycle")
    eager = fastals.ALS(fastals.units(twin), model=twin, fused=True, schedule="cycle")
    step = opt.graphed(lambda batch: model(**batch), max_signatures=2)
    batches = [{k: v.cuda() for k, v in next(tiny_batches(1, length=n)).items()} for n in (4, 6, 8)]
    order = [0] * 5 + [1] * 5 + [0, 0, 2, 2, 2, 2, 0, 1, 0, 2, 0, 1, 2, 0, 1, 2] * 2
    for k in order:
        step(batches[k])
        eager.step(lambda k=k: twin(**batches[k]))
        assert opt.report.loss_before == pytest.approx(eager.report.loss_before, rel=1e-3)
        torch.full((1 << 20,), math.nan, device="cuda")
    assert step.mode.name != "eager", step.mode


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_batches_on_the_host_are_brought_to_the_device(pinned):
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = opt.graphed(lambda batch: model(**batch))
    for batch in tiny_batches(WARMUP + 3):
        with torch.no_grad():
            expected = float(model(**{k: v.cuda() for k, v in batch.items()}))
        loss = step({k: v.pin_memory() if pinned else v for k, v in batch.items()})
        assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert step.mode.name != "eager", step.mode
    assert step.pool_bytes > 0


@pytest.mark.gpu
def test_a_loss_that_draws_on_the_host_is_not_captured():
    model = TinyTransformer(depth=1, dropout=0.0).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = opt.graphed(lambda batch: model(**batch) * (1 + float(torch.rand(()))))
    for batch in tiny_batches(WARMUP + 2):
        step({k: v.cuda() for k, v in batch.items()})
    assert step.mode.name == "eager"
    assert "random numbers on the host" in step.mode.reason


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_without_gradients_has_the_masks_and_the_loss_of_one_with(dtype):
    """Trials are held against f(w_t): attention with dropout may run another kernel where no gradient is asked for."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=2, intermediate_size=256)
    model = transformers.BertForSequenceClassification(config).to("cuda", dtype).train()
    ids = torch.randint(1000, 2000, (4, 64), device="cuda")
    losses = []
    for gradients in (True, False):
        torch.manual_seed(1)
        with torch.set_grad_enabled(gradients):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            losses.append(float(torch.nn.functional.cross_entropy(logits.float(), ids[:, 0] % 2).detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.gpu
def test_a_captured_step_can_be_profiled():
    code = """
import torch, fastals
from helpers.tiny import TinyTransformer, tiny_batches
model = TinyTransformer(dropout=0.0).cuda()
step = fastals.ALS(fastals.units(model), model=model, fused=True).graphed(lambda batch: model(**batch))
batches = [{k: v.cuda() for k, v in b.items()} for b in tiny_batches(8)]
for batch in batches[:5]:
    step(batch)
with torch.profiler.profile() as profile:
    for batch in batches[5:]:
        step(batch)
    torch.cuda.synchronize()
print(step.mode.name, len(profile.events()))
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env)
    assert not done.returncode, done.stderr[-2000:]
    assert done.stdout.split()[0] in ("while", "host")


@pytest.mark.gpu
def test_a_loss_that_waits_for_the_device_is_not_captured_and_steps_go_on():
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.5).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)

    def loss_fn(batch):
        loss = model(**batch)
        assert math.isfinite(float(loss.detach()))
        return loss

    step = opt.graphed(loss_fn)
    batches = [{k: v.cuda() for k, v in batch.items()} for batch in tiny_batches(WARMUP + 3)]
    for batch in batches[:WARMUP]:
        step(batch)
    with pytest.warns(UserWarning, match="the capture failed"):
        step(batches[-3])
    torch.cuda.empty_cache()  # refuses while a capture is under way
    for batch in batches[-2:]:
        step(batch)
    assert step.mode.name == "eager"
    assert opt.param_groups[0]["count"] == len(batches)


@pytest.mark.gpu
def test_loops_run_on_the_device_where_bindings_and_driver_know_them():
    pytest.importorskip("cuda.bindings")
    version = cuda.checked(cuda.runtime.cudaDriverGetVersion())
    if version < cuda.OLDEST_DRIVER:
        pytest.skip(f"the driver knows CUDA {version} only")
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    step = on_gpu(model, fastals.ALS(fastals.units(model), model=model, fused=True))
    assert step.mode.name == "while", step.mode.reason


@pytest.mark.gpu
def test_a_step_in_while_mode_does_not_wait_for_the_device():
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = on_gpu(model, opt)
    if step.mode.name != "while":
        pytest.skip(f"no loops on the device here: {step.mode.reason}")
    batch = {k: v.cuda() for k, v in next(tiny_batches(1)).items()}
    torch.cuda.synchronize()
    asleep = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    asleep.record()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not asleep.query(), "the step returned while the device was still busy with what came before"


@pytest.mark.gpu
def test_generators_stand_where_a_plain_forward_and_backward_leaves_them():
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.5).cuda()
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = on_gpu(model, opt)
    batch = {k: v.cuda() for k, v in next(tiny_batches(1)).items()}
    states = []
    for take in (lambda: model(**batch).backward(), lambda: step(batch)):
        torch.manual_seed(3)
        take()
        states.append(rng.get_state((0,))[1][0])
    assert torch.equal(*states)
