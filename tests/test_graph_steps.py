"""Captured steps equal eager steps: a back end that records stands in for CUDA graphs, on the CPU."""

import copy
import math
import signal

import pytest
import torch
from torch.utils._pytree import tree_flatten

pytest.importorskip("triton")
from helpers.hf import model_and_batches, padded_batches, tiny_bert
from helpers.options import CAPTURED, HARD, HARD_SWEEP, values
from helpers.recording import Recording, build, interpreted, recorded
from helpers.tiny import matrices_only, tiny_batches

import fastals
from fastals.graphs.graphed import WARMUP, _signature
from fastals.graphs.program import EndSkip, Loop, Run, SkipIfAccepted
from fastals.report import StepReport, UnitReport


def same_report(a, b):
    assert [(u.name, u.outcome) for u in a.units] == [(u.name, u.outcome) for u in b.units]
    for u, v in zip(a.units, b.units, strict=True):
        assert u.trials == v.trials
        assert (u.step_size, u.slope) == (v.step_size, v.slope)
    assert a.joint_trials == b.joint_trials
    assert a.loss_before == b.loss_before
    assert a.loss_after == b.loss_after or (math.isnan(a.loss_after) and math.isnan(b.loss_after))


@pytest.mark.slow(keep=1)
@interpreted
@pytest.mark.parametrize("linked", [False, True], ids=["host", "while"])
@pytest.mark.parametrize("options", CAPTURED, ids=values)
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
        _, opt, step = build(linked=linked, log=log, dropout=dropout, schedule="sweep")
        for batch in tiny_batches(WARMUP + 3):
            log.clear()
            step(batch)
        if linked:
            assert log == (["replay", "launch"] if dropout else ["launch"])
        else:
            trials, units = opt.report.trials, len(opt.report.units)
            assert log.count("look") == trials
            assert log.count("replay") == 1 + trials + units + 1  # head, trials, a line before every loop, the end


@pytest.mark.slow
@interpreted
def test_launches_and_looks_of_a_relay():
    """A step that searches is as many launches as one between two searches; the host reads nothing in while mode."""
    for linked, dropout in ((False, 0.1), (True, 0.1), (True, 0.0)):
        log, kinds = [], set()
        _, opt, step = build(linked=linked, log=log, dropout=dropout, schedule="relay", every=2, **HARD)
        for t, batch in enumerate(tiny_batches(WARMUP + 8)):
            log.clear()
            step(batch)
            searched = opt.report.trials > opt.report.joint_trials
            if t < WARMUP:
                continue
            kinds.add(searched)
            launched = [entry for entry in log if entry != "capture"]
            if linked:
                assert launched == (["replay", "launch"] if dropout else ["launch"])
            else:
                lines = 4 if searched else 3  # a line before every loop, one after a search alone, the end
                assert launched.count("look") == opt.report.trials
                assert launched.count("replay") == 1 + opt.report.trials + lines
        assert kinds == {True, False}


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(
    ("first", "momentum", "linked"), [("keep", "none", True), (0, "after", True), (2, "none", False)]
)
def test_a_relay_takes_the_eager_steps_whichever_tail_is_captured_first(first, momentum, linked):
    """Through the turns of all units, twice, and the steps between, with rejections."""
    options = HARD | {"schedule": "relay", "every": 2, "momentum": momentum}
    log = []
    model, opt, step = build(linked=linked, log=log, **options)
    twin = copy.deepcopy(model)
    eager = fastals.ALS(fastals.units(twin), model=twin, fused=True, **options)
    units, trials = len(opt.param_groups), []
    batches = list(tiny_batches(WARMUP + 4 * units))
    for t, batch in enumerate(batches):
        if t == WARMUP:
            capture(step, batch, [first, 1, "keep", 2, 0])
            log.clear()
        for take in (step, lambda b: eager.step(lambda: twin(**b))):
            torch.manual_seed(100 + t)
            take(batch)
        same_report(opt.report, eager.report)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        trials.append((opt.report.trials - opt.report.joint_trials, opt.report.joint_trials))
    assert "capture" not in log
    assert all(max(made) > 1 for made in zip(*trials[WARMUP:], strict=True)), "no rejections"
    assert {u.name for r in opt.reports[WARMUP:] for u in r.units if u.trials} == {u.name for u in opt.report.units}
    for a, b in zip(opt.state_dict()["param_groups"], eager.state_dict()["param_groups"], strict=True):
        assert a == b


def capture(step, batch, turns):
    """Capture the tails of these turns in their order, before their steps come."""
    leaves, spec = tree_flatten(batch)
    groups = step.engine.groups
    before = [group["last_search"] for group in groups]
    program = step._captured(_signature(leaves, spec, step.engine.find_modules()), leaves, spec).program
    for turn in turns:
        for i, group in enumerate(groups):
            group["last_search"] = int(i != turn)
        step._tail(program, search=turn != "keep")
    for group, last in zip(groups, before, strict=True):
        group["last_search"] = last


@pytest.mark.slow
@interpreted
def test_time_and_pieces_of_captures_are_told():
    log = []
    _, opt, step = build(log=log, schedule="relay", every=1)
    units, seconds = len(opt.param_groups), [step.capture_seconds]
    for batch in tiny_batches(WARMUP + units):
        step(batch)
        seconds.append(step.capture_seconds)
    assert seconds[WARMUP] == 0
    assert sorted(set(seconds)) == seconds[WARMUP:], "every step but the first ones has captured"
    step(batch)
    assert step.capture_seconds == seconds[-1]
    assert step.pieces == (log.count("capture"), 7 * units) == (3 * units + 4, 7 * units)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("schedule", ["relay", "joint", "cycle", "sweep"])
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
    assert all(resumed.engine.learned.trusted.get(u.name) for u in resumed.engine.partition.units)
    (captured,) = again._programs.values()
    assert all(captured.program.losses.learned.trusted[u.name] for u in resumed.engine.partition.units)
    assert not all(torch.equal(p, q) for p, q in zip(twin.parameters(), weights, strict=True))


@pytest.mark.slow(keep=1)
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
    assert opt.param_groups[0]["count"] == int(opt.engine.partition.arena.step) == len(opt.reports) == len(batches)


@pytest.mark.slow(keep=1)
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


@pytest.mark.slow
@interpreted
def test_schedules_differ_in_how_pieces_are_strung_together():
    shapes = {}
    for schedule in ("relay", "sweep", "independent", "cycle", "joint"):
        _, _, step = build(schedule=schedule)
        for batch in tiny_batches(WARMUP + 2):
            step(batch)
        (captured,) = step._programs.values()
        (tail, *_) = captured.program.tails.values()
        signs = {Run: "-", Loop: "o", SkipIfAccepted: "<", EndSkip: ">"}
        shapes[schedule] = "".join(signs[type(operation)] for operation in tail.operations)
    assert shapes.pop("relay") in ("-o--o-", "--o-"), "with and without a search"
    assert shapes == {"sweep": "-o-o-o-", "independent": "-o-o-o-o-<>-", "cycle": "-o-", "joint": "-o-<-o-o-o->-"}


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("schedule", ["sweep", "relay"])
def test_the_benchmarks_count_and_replay_what_a_captured_step_needs(schedule):
    """The floor: the head, a forward per trial and a copy; the work: what the eager step counts."""
    from floor import Floor
    from rivals import Graphed, SearchRival

    log, batches, options = [], list(padded_batches(classify=True)), HARD_SWEEP | {"schedule": schedule}
    model = matrices_only(tiny_bert(vocab_size=100)).train()
    twin, params = copy.deepcopy(model), [p for p in model.parameters() if p.requires_grad]

    def backend(device, stream, *, draws):
        return Recording(params, linked=False, log=log, draws=draws)

    graphed = Graphed(model, fastals.ALS(fastals.units(model), model=model, fused=True, **options), backend)
    eager = SearchRival(twin, fastals.ALS(fastals.units(twin), model=twin, fused=True, **options))
    work = []
    for t in range(graphed.first_steps):
        for rival in (graphed, eager):
            torch.manual_seed(t)
            rival.step(batches[t % 3])
        work.append((graphed.work() if graphed.train_step._programs else 0.0, eager.work()))
    ours, theirs = (b - a for a, b in zip(*work[-2:], strict=True))
    assert ours == pytest.approx(theirs)
    report, log[:] = graphed.optimizer.report, []
    floor = Floor(graphed)
    assert log == ["capture"] * (len(report.units) + 2)
    assert floor.trials == {u.name: u.trials for u in report.units}
    log.clear()
    floor.step({})
    assert log == ["replay"] * (1 + report.trials + 1)


def test_the_floor_counts_the_passes_of_each_kernel():
    from floor import kernel_calls

    unit, put_back = UnitReport("a", 1e-3, 1.0, 2, "accepted"), UnitReport("a", 0.0, 1.0, 2, "exhausted")
    swept, moved = StepReport(1.0, 0.5, [unit]), StepReport(1.0, 0.5, [unit], 2, 0.5)
    assert kernel_calls(unit, swept, False) == {"survey": 1, "trial": 2, "restore": 0, "advance": 1}
    assert kernel_calls(put_back, swept, False)["restore"] == 1
    relay = {"survey": 1, "trial": 3, "restore": 1, "survey_move": 1, "advance": 1}
    assert kernel_calls(unit, moved, True) == relay
    assert kernel_calls(put_back, moved, True) == relay | {"restore": 2}
    between = UnitReport("a", 1e-3, 1.0, 0, "accepted")
    assert sum(kernel_calls(between, StepReport(1.0, 0.5, [between], 1, 1.0), True).values()) == 2


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_hugging_face_models_are_replayed(kind):
    model, batches = model_and_batches(kind)
    opt = fastals.ALS(fastals.units(model), model=model, fused=True)
    step = recorded(opt, model, lambda batch: model(**batch).loss)
    for t in range(WARMUP + 2):
        step(batches[t % 3])
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
