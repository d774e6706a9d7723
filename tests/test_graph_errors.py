"""Errors, refused losses and interrupts in captured steps leave weights, state and generators as they were."""

import copy
import math

import pytest
import torch

pytest.importorskip("triton")
from helpers.options import HARD
from helpers.recording import Recording, build, interpreted, recorded
from helpers.tiny import tiny_batches

import fastals
from fastals.graphs.graphed import WARMUP, Notes


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


@pytest.mark.slow(keep=1)
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
def test_a_replayed_step_needs_no_memory_once_it_has_run(monkeypatch):
    """It would have moved the weights without being counted."""
    model, opt, step = build(**HARD)
    batches = list(tiny_batches(WARMUP + 3))
    for batch in batches[:-2]:
        step(batch)
    weights, count = [p.detach().clone() for p in model.parameters()], opt.param_groups[0]["count"]

    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Notes, "new", full)
    with pytest.raises(torch.OutOfMemoryError):
        step(batches[-2])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert opt.param_groups[0]["count"] == count
    monkeypatch.undo()
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


@pytest.mark.slow(keep=1)
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


@pytest.mark.slow(keep=1)
@interpreted
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("cache", [True, False])
def test_module_buffers_are_put_back_where_a_loss_is_not_finite(linked, cache):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    opt = fastals.ALS([{"params": list(model.parameters()), "name": "all"}], model=model, fused=True, cache=cache)
    step = recorded(opt, model, lambda x: model(x).square().mean(), linked=linked)
    for _ in range(WARMUP + 2):
        step(torch.randn(8, 4))
    assert step.mode.name == ("while" if linked else "host")
    before = [b.clone() for b in model.buffers()]
    refused = torch.full((8, 4), math.nan)
    if linked:
        step(refused)  # the host does not wait: the next step raises and is not taken
    with pytest.raises(FloatingPointError):
        step(refused)
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), before, strict=True))
    step(torch.randn(8, 4))
    assert not any(torch.equal(b, c) for b, c in zip(model.buffers(), before, strict=True))


@interpreted
def test_a_refused_step_is_said_although_its_program_has_gone():
    scale = torch.ones(())
    model, _, step = build(loss_fn=lambda batch: model(**batch) * scale, linked=True, max_signatures=1)
    short, long = (next(tiny_batches(1, length=n)) for n in (4, 6))
    for batch in [short] * (WARMUP + 1) + [long] * WARMUP + [short]:
        step(batch)
    scale.fill_(math.nan)
    step(short)
    scale.fill_(1.0)
    with pytest.raises(FloatingPointError):
        step(long)


@pytest.mark.slow(keep=1)
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
        step(batches[-2])  # the host does not wait
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
