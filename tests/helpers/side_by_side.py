"""Runs of twins: the fast path and the eager baseline on the same batches, step by step."""

import copy
from dataclasses import dataclass

import pytest
import torch
from helpers.tiny import TinyTransformer, tiny_batches

import fastals
from fastals.eager import EagerALS
from fastals.search import MEMORY

STEPS = 30


@dataclass
class Seen:
    """What happened in a run, so that a test can say that it met the cases it is about."""

    outcomes: set
    rejections: int = 0
    joint_trials: int = 0
    joint_rejections: int = 0


def assert_same_step(fast, eager, rtol):
    """The reports of one step, up to rounding."""
    assert [(u.name, u.outcome, u.trials) for u in fast.units] == [(u.name, u.outcome, u.trials) for u in eager.units]
    assert (fast.joint_trials, fast.factor) == (eager.joint_trials, eager.factor)
    for a, b in zip(fast.units, eager.units, strict=True):
        assert a.step_size == pytest.approx(b.step_size, rel=rtol)
        assert a.slope == pytest.approx(b.slope, rel=rtol, abs=rtol * max(1e-3, abs(b.slope)))
    assert fast.loss_before == pytest.approx(eager.loss_before, rel=rtol)
    assert fast.loss_after == pytest.approx(eager.loss_after, rel=rtol, nan_ok=True)


def assert_same_memory(fast, eager, rtol):
    """What the units of the two optimizers remember, up to rounding."""
    for ours, theirs in zip(fast.param_groups, eager.param_groups, strict=True):
        assert {k: float(ours[k]) for k in MEMORY} == pytest.approx({k: theirs[k] for k in MEMORY}, rel=rtol, abs=rtol)


def compare(options, model=None, batches=None, rtol=1e-5, backward=False, resync=False, before_step=None):
    """Train twins from the same weights on the same batches; every step and the final weights must agree.

    ``before_step(t, opt, model)`` is called for each of the two before step t.
    """
    torch.manual_seed(0)
    fast_model = TinyTransformer(depth=2).double() if model is None else model
    eager_model = copy.deepcopy(fast_model)
    fast = fastals.ALS(fastals.units(fast_model), model=fast_model, **options)
    eager = EagerALS(fastals.units(eager_model), **options)
    seen = Seen(set())
    for t, batch in enumerate(tiny_batches(STEPS) if batches is None else batches):
        after = []
        for opt, net in ((fast, fast_model), (eager, eager_model)):
            if before_step is not None:
                before_step(t, opt, net)
            torch.manual_seed(100 + t)
            one_step(opt, net, batch, backward)
            after.append(torch.rand(3))
        assert torch.equal(*after), "the generators must stand where a plain forward and backward leaves them"
        assert_same_step(fast.report, eager.report, rtol)
        assert_same_memory(fast, eager, rtol)
        seen.outcomes |= {u.outcome for u in fast.report.units}
        seen.rejections += sum(u.trials - (u.outcome == "accepted") for u in fast.report.units if u.trials)
        seen.joint_trials += fast.report.joint_trials
        seen.joint_rejections += fast.report.joint_trials - (fast.report.factor > 0) if fast.report.joint_trials else 0
        if resync:
            hand_over(fast, eager)
    for a, b in zip(fast_model.parameters(), eager_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=10 * rtol)
    return seen


@torch.no_grad()
def hand_over(fast, eager):
    """Start the next step of the baseline from the fast path's weights, state and memory."""
    for ours, theirs in zip(fast.param_groups, eager.param_groups, strict=True):
        theirs.update({k: v for k, v in ours.items() if k not in ("params", "param_names")})
        for p, q in zip(ours["params"], theirs["params"], strict=True):
            q.copy_(p)
            if p in fast.state:
                eager.state[q] = copy.deepcopy(fast.state[p])


def one_step(opt, model, batch, backward):
    """A step on the batch; with ``backward`` the caller computes the gradients."""

    def closure():
        out = model(**batch)
        return out if isinstance(out, torch.Tensor) else out.loss

    if not backward:
        return opt.step(closure)
    opt.zero_grad()
    state = torch.get_rng_state()
    loss = closure()
    loss.backward()
    torch.set_rng_state(state)  # the trials are to see the masks of the gradient
    return opt.step(closure, loss=loss)
