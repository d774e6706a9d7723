"""Fused steps are those of the eager baseline and of the plain path, in every dtype.

Without a GPU the kernels are interpreted: the same code, slowly.
"""

import copy
import io
import itertools

import pytest
import torch

pytest.importorskip("triton")
from helpers.fused import CUDA, batches, build, holding, optimizer, train
from helpers.options import HARD, HARD_SWEEP, values
from helpers.tiny import TinyTransformer

import fastals
from fastals.eager import EagerALS
from fastals.search import MEMORY

pytestmark = pytest.mark.proves(claim="fused-optimizer")
CASES = [
    {"schedule": "sweep"}, {"schedule": "sweep", "order": "bottom_up"}, {"schedule": "sweep", "order": "random"},
    {"schedule": "independent"}, {"schedule": "independent", "momentum": "tested"}, {"schedule": "cycle"},
    {"schedule": "joint"}, {"schedule": "joint", "momentum": "after"}, {"momentum": "after"}, {"momentum": "tested"},
    {"initial": "reset"}, {"initial": "polyak", "reference": "nonmonotone"}, {"initial": "random"},
    {"reference": "smoothed"}, {"direction": "sgd"}, {"direction": "sgd", "momentum": "tested", "weight_decay": 0.1},
    {"every": 2}, {"every": "auto"}, {"max_grad_norm": 0.1}, {"merge_below": 1.0}, {"trust": None, "eta_init": 0.05},
]  # fmt: skip


def outcomes(report):
    return [(u.name, u.outcome, u.trials) for u in report.units], report.joint_trials


@pytest.mark.slow(keep=1)
@pytest.mark.proves(claim="fused-steps")
@pytest.mark.parametrize("options", CASES, ids=values)
def test_same_steps_as_the_eager_baseline(options):
    options = HARD | options
    model, opt = build(**options)
    twin = copy.deepcopy(model)
    eager = EagerALS(fastals.units(twin), **options)
    for t, batch in enumerate(batches(5)):
        for o, net in ((opt, model), (eager, twin)):
            torch.manual_seed(100 + t)
            o.step(lambda: net(**batch))  # noqa: B023
        ours, theirs = opt.report, eager.report
        if CUDA.type == "cuda" and outcomes(ours) != outcomes(theirs):
            # kernels of the forward may be chosen by address, so that losses differ by a rounding or two
            assert min(map(abs, eager.margins)) <= 1e-6 * (1 + abs(theirs.loss_before))
            return  # the two stand at different points from here on
        assert outcomes(ours) == outcomes(theirs)
        for a, b in zip(ours.units, theirs.units, strict=True):
            assert a.step_size == pytest.approx(b.step_size, rel=1e-4)
            assert a.slope == pytest.approx(b.slope, rel=1e-3, abs=1e-4)
        assert ours.loss_after == pytest.approx(theirs.loss_after, rel=1e-4, nan_ok=True)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(opt.state_dict()["param_groups"], eager.param_groups, strict=True):
        assert ours["step_size"] == pytest.approx(theirs["step_size"], rel=1e-4)
        assert {k: type(ours[k]) for k in ("step_size", "backtracks", "count")} == {
            "step_size": float, "backtracks": int, "count": int,
        }  # fmt: skip


def test_the_loss_never_rises_by_plain_forwards():
    model, opt = build(**HARD)
    for t, batch in enumerate(batches(6)):
        with torch.no_grad():
            torch.manual_seed(100 + t)
            before = float(model(**batch))
        torch.manual_seed(100 + t)
        opt.step(lambda: model(**batch))  # noqa: B023
        with torch.no_grad():
            torch.manual_seed(100 + t)
            after = float(model(**batch))
        decrease = sum(0.5 * u.step_size * u.slope for u in opt.report.units)
        assert after <= before - decrease + 1e-6
        exact = 0.0 if CUDA.type == "cpu" else 1e-6  # on a GPU kernels of the forward may be chosen by address
        assert opt.report.loss_before == pytest.approx(before, rel=exact, abs=exact)
        assert opt.report.loss_after == pytest.approx(after, rel=exact, abs=exact)


@pytest.mark.slow
def test_exact_resume_and_to_and_from_the_plain_path():
    data = batches(6)
    straight, opt = build(**HARD)
    train(straight, opt, data[:3])
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    weights = copy.deepcopy(straight.state_dict())
    train(straight, opt, data[3:], start=3)
    for fused in (True, False):
        file.seek(0)
        model = TinyTransformer(depth=2).to(CUDA)
        model.load_state_dict(weights)
        resumed = fastals.ALS(fastals.units(model), model=model, fused=fused, **HARD)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        train(model, resumed, data[3:], start=3)
        for p, q in zip(model.parameters(), straight.parameters(), strict=True):
            assert torch.equal(p, q) if fused else torch.allclose(p, q, rtol=1e-4, atol=1e-5)
        if not fused:
            opt.load_state_dict(copy.deepcopy(resumed.state_dict()))
            train(straight, opt, data[:1])


def test_bfloat16_parameters_train_through_their_masters():
    model, opt = build(dtype=torch.bfloat16, trust=0.01)
    twin = copy.deepcopy(model)
    plain = fastals.ALS(fastals.units(twin), model=twin, fused=False, trust=0.01)
    for t, batch in enumerate(batches(4)):
        for o, net in ((opt, model), (plain, twin)):
            torch.manual_seed(t)
            o.step(lambda: net(**batch))  # noqa: B023
        assert opt.report.loss_after <= opt.report.loss_before
        if t == 0:
            for a, b in zip(opt.report.units, plain.report.units, strict=True):
                assert a.step_size == pytest.approx(b.step_size, rel=1e-3)
    moved = 0
    for p in model.parameters():
        master = opt.state[p]["master"]
        assert p.dtype == torch.bfloat16
        assert master.dtype == torch.float32
        moved += int((master != p.float()).sum())
        assert torch.equal(rounded(master), p)
    assert moved > 1000, "the masters hold what bfloat16 cannot"


def rounded(master):
    """The master in bfloat16, as the kernels store it: the interpreter cuts off instead of rounding."""
    if CUDA.type == "cuda":
        return master.to(torch.bfloat16)
    return (master.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_clipped_model_in_bfloat16_trains(kind):
    torch.manual_seed(0)
    model = TinyTransformer(depth=1, dropout=0.0).to(CUDA, torch.bfloat16)
    opt = optimizer(kind, model, max_grad_norm=0.1)
    train(model, opt, batches(2))
    assert opt.report.loss_after < opt.report.loss_before


def other_dtype(loss, params, dtype):
    """Gradients of the loss in another dtype than their parameters'."""
    loss.backward()
    for p in params:
        p.grad, found = None, p.grad
        p.grad_dtype = dtype
        p.grad = found.to(dtype)
    return loss.detach()


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch gives gradients the parameter's dtype")
@pytest.mark.parametrize(
    ("dtype", "gradient"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_gradients_may_have_another_dtype_than_their_parameters(dtype, gradient):
    reports = []
    for kind in ("fused", "plain"):
        torch.manual_seed(0)
        model = TinyTransformer(depth=1, dropout=0.0).to(CUDA, dtype)
        opt = optimizer(kind, model)
        (batch,) = batches(1)
        loss = other_dtype(model(**batch), list(model.parameters()), gradient)
        opt.step(lambda m=model, b=batch: m(**b), loss=loss)
        reports.append(opt.report)
    for a, b in zip(*(r.units for r in reports), strict=True):
        assert a.slope == pytest.approx(b.slope, rel=1e-3)
    assert reports[0].loss_after < reports[0].loss_before


def test_under_autocast_the_fused_path_takes_the_steps_of_the_plain_one():
    reports = []
    for kind in ("fused", "plain"):
        torch.manual_seed(0)
        model = TinyTransformer(depth=2).to(CUDA)
        opt = optimizer(kind, model, **HARD)
        with torch.autocast(CUDA.type, torch.bfloat16):
            train(model, opt, batches(2))
        reports.append(opt.reports)
    for ours, theirs in zip(*reports, strict=True):
        assert ours.loss_after <= ours.loss_before
        assert [(u.outcome, u.trials) for u in ours.units] == [(u.outcome, u.trials) for u in theirs.units]


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["adam", "sgd"])
def test_the_fused_relay_remembers_what_the_plain_one_does(direction):
    remembered = []
    for kind in ("fused", "plain"):
        torch.manual_seed(0)
        model = TinyTransformer(depth=2).to(CUDA)
        hard = {"c": 0.9, "trust": 3.0, "every": 1, "initial": "reset", "direction": direction}
        opt = optimizer(kind, model, **hard)
        for t, batch in enumerate(batches(6)):
            opt.step(lambda m=model, b=batch, scale=0.01 if t == 4 else 1.0: scale * m(**b))
        remembered.append([{k: float(group[k]) for k in MEMORY} for group in opt.state_dict()["param_groups"]])
    assert direction == "sgd" or any(unit["backtracks"] for unit in remembered[0])
    for ours, theirs in zip(*remembered, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype):
    found = []
    for _ in range(2):
        model, opt = build(dtype=dtype, momentum="after", **HARD)
        train(model, opt, batches(5))
        found.append(
            [*(p.detach().clone() for p in model.parameters()), *(s["exp_avg_sq"] for s in opt.state.values())]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_common_factor_shrinks_by_the_rules_of_the_first_unit_that_has_gradients(kind):
    """The steps found one by one are too long together: the loss of their sum counts more than theirs."""
    frozen, *moving = (torch.nn.Parameter(torch.full((4,), x, device=CUDA)) for x in (1.0, 1.0, 1.0))
    groups = [{"name": "frozen", "params": [frozen], "max_trials": 1}]
    groups += [{"name": str(i), "params": [p], "backtrack": 0.25} for i, p in enumerate(moving)]
    opt = fastals.ALS(groups, fused=kind == "fused", schedule="independent", direction="sgd", trust=None, eta_init=0.1)

    def closure():
        a, b = moving
        return (a + b).square().sum() + 20 * ((1 - a) * (1 - b)).sum().abs()

    opt.step(closure)
    assert opt.report.joint_trials > 1
    step = opt.report.units[0].step_size
    assert step == pytest.approx(0.1 * 0.25 ** (opt.report.joint_trials - 1))


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("kind", ["fused", "plain", "eager"])
def test_the_common_factor_does_not_grow_back_what_lr_takes_away(kind):
    """On a parabola that the units share, from one point every time: their steps may add up to 1.4 with c = 0.3."""
    params = [torch.nn.Parameter(torch.ones(4, device=CUDA)) for _ in range(2)]
    opt = optimizer(kind, holding(*params), by=[r"\b0", r"\b1"], direction="sgd", trust=8.0, every=1000)
    factors = []
    for t in range(40):
        for group in opt.param_groups:
            group["lr"] = 0.1 if t else 1.0
        with torch.no_grad():
            for p in params:
                p.fill_(1.0)
        opt.step(lambda: (params[0] + params[1]).square().sum() / 2)
        factors.append(opt.report.factor)
    assert factors[0] == 0.5, "each unit has found 1"
    assert factors[:5] == pytest.approx([0.5 * 1.1**t for t in (0, 0, 1, 2, 3)], rel=1e-6)
    assert 0.7 < factors[-1] <= 0.77
    assert factors[-1] == factors[10]


@pytest.mark.parametrize("kind", ["fused", "plain", "eager"])
def test_steps_that_a_bfloat16_loss_cannot_show_are_taken_and_grow(kind):
    weight = torch.nn.Parameter(torch.ones(64, device=CUDA))
    opt = optimizer(kind, holding(weight), schedule="sweep", eta_init=1e-5)
    steps = []
    for _ in range(8):
        opt.step(lambda: (1 + 1e-3 * weight.mean()).bfloat16())
        (unit,) = opt.report.units
        assert (unit.outcome, unit.trials) == ("accepted", 1)
        steps.append(unit.step_size)
    assert [b / a for a, b in itertools.pairwise(steps[1:])] == pytest.approx([1.3] * 6)
    assert float(weight.detach().mean()) == pytest.approx(1 - sum(steps), rel=1e-6)


@pytest.mark.slow(keep=4)
@pytest.mark.parametrize("schedule", ["sweep", "independent", "joint"])
@pytest.mark.parametrize("kind", ["fused", "plain", "eager"])
def test_steps_below_the_rounding_of_the_weights_add_up_in_the_masters(kind, schedule):
    """No single step of 1e-3 moves a bfloat16 weight in [1, 2), four of them do."""
    params = [torch.nn.Parameter(torch.full((64,), 1.5, dtype=torch.bfloat16, device=CUDA)) for _ in range(2)]
    opt = optimizer(
        kind, holding(*params), by=[r"\b0", r"\b1"], schedule=schedule, trust=None, eta_max=1e-3, growth=1.0
    )
    losses = []
    for _ in range(12):
        losses.append(float(opt.step(lambda: sum(p.float().square().sum() for p in params))))
        assert {u.outcome for u in opt.report.units} == {"accepted"}
        assert opt.report.loss_after <= opt.report.loss_before
    if kind != "fused" or CUDA.type == "cuda":  # the interpreter cuts off where it should round
        assert losses[1] == losses[0], "the first step moves the masters alone"
    for p in params:
        assert float(p.detach().float().mean()) == pytest.approx(1.5 - 12e-3, abs=2**-7)


def margin_where_they_part(ours, theirs, margins):
    """In a sweep from the top: the margin of the first test that went the other way; None if none did."""
    judged = 0
    for a, b in zip(reversed(ours.units), reversed(theirs.units), strict=True):
        if (a.trials, a.outcome) != (b.trials, b.outcome):
            assert min(a.trials, b.trials), "one saw no descent"
            return margins[judged + min(a.trials, b.trials) - 1]
        judged += b.trials
    return None


@pytest.mark.slow
def test_many_steps_from_the_same_points_accept_the_same_steps():
    """Outcomes may differ only where the test's margin is below the rounding of the loss; those are counted."""
    steps = 200 if CUDA.type == "cuda" else 3
    torch.manual_seed(0)
    model = TinyTransformer(depth=4, width=64, dropout=0.0).to(CUDA)
    twin = copy.deepcopy(model)
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, **HARD_SWEEP)
    eager = EagerALS(fastals.units(twin), **HARD_SWEEP)
    close_calls = rejected = 0
    for batch in batches(steps):
        opt.step(lambda: model(**batch))  # noqa: B023
        eager.step(lambda: twin(**batch))  # noqa: B023
        margin = margin_where_they_part(opt.report, eager.report, eager.margins)
        rejected += sum(m > 0 for m in eager.margins)
        if margin is not None:
            close_calls += 1
            assert abs(margin) <= 8 * torch.finfo(torch.float32).eps * eager.report.loss_before
        else:
            for a, b in zip(opt.report.units, eager.report.units, strict=True):
                assert a.step_size == pytest.approx(b.step_size, rel=1e-3)
        with torch.no_grad():  # from the same point again, so that rounding does not add up
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.copy_(p)
        eager.load_state_dict(copy.deepcopy(opt.state_dict()))  # which it takes over as it is
    print(f"{close_calls} of {steps} steps differ in a trial; {rejected} trials were rejected")
    assert rejected > steps
    assert close_calls <= steps / 50
