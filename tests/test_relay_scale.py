"""The relay's steps are known before the pass over the weights: the scale of the last step, the bounds of this one."""

import copy
import math

import pytest
import torch
from helpers.options import HARD
from helpers.side_by_side import compare
from helpers.tiny import TinyTransformer, assert_same, tiny_batches
from torch import nn

import fastals
from fastals.eager import EagerALS

SIZES = (1.0, 30.0, 1.0, 1e-3, 0.0, 1.0, 100.0, 1e-2)  # of the loss, and so of the gradients, from step to step
PATHS = {"plain": False, "fused": True}


class Scaled(nn.Module):
    """A model whose loss is multiplied by a number that changes from step to step."""

    def __init__(self, dtype=torch.float64, **options):
        super().__init__()
        self.inner, self.size = TinyTransformer(depth=2, **options).to(dtype), 1.0

    def forward(self, **batch):
        return self.size * self.inner(**batch)


def resize(t, opt, model):
    model.size = SIZES[t % len(SIZES)]


def build(fused=False, dtype=torch.float64, **options):
    if fused:
        pytest.importorskip("triton")
        dtype = torch.float32
    torch.manual_seed(0)
    model = Scaled(dtype).to("cuda" if fused and torch.cuda.is_available() else "cpu")
    return model, fastals.ALS(fastals.units(model), model=model, fused=fused, **options)


def step(model, opt, t, size=1.0):
    model.size = size
    batch = {k: v.to(next(model.parameters()).device) for k, v in list(tiny_batches(t + 1))[t].items()}
    torch.manual_seed(t)
    opt.step(lambda: model(**batch))
    return opt.report


def remembered(opt, key):
    return [float(group[key]) for group in opt.param_groups]


def scales_of(opt):
    pairs = zip(remembered(opt, "weight_rms"), remembered(opt, "direction_rms"), strict=True)
    return [weight / max(direction, 1.0) for weight, direction in pairs]


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("options", [
    {}, {"every": 3}, {"direction": "sgd"}, {"momentum": "tested"}, {"momentum": "after"}, {"trust": 0.01, "c": 0.95},
    {"trust": None, "eta_max": 0.05}, {"weight_decay": 0.3, "max_grad_norm": 0.1}, {"merge_below": 1e-2},
], ids=str)  # fmt: skip
def test_the_twin_takes_the_same_steps_where_gradients_change_their_size(options):
    torch.manual_seed(0)
    seen = compare(HARD | {"schedule": "relay"} | options, model=Scaled(), before_step=resize)
    assert seen.rejections + seen.joint_rejections > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"trust": 0.01}, {"direction": "sgd"}, {"momentum": "tested"}], ids=str)
def test_the_device_takes_the_same_steps_where_gradients_change_their_size(options):
    model, opt = build(fused=True, **options)
    twin, plain = build(dtype=torch.float32, **options)
    for t in range(9):
        twin.load_state_dict(model.state_dict())
        plain.load_state_dict(copy.deepcopy(opt.state_dict()))
        ours, theirs = step(model, opt, t, SIZES[t % len(SIZES)]), step(twin, plain, t, SIZES[t % len(SIZES)])
        assert [(u.outcome, u.trials) for u in ours.units] == [(u.outcome, u.trials) for u in theirs.units]
        assert (ours.joint_trials, ours.factor) == (theirs.joint_trials, theirs.factor)
        assert [u.step_size for u in ours.units] == pytest.approx([u.step_size for u in theirs.units], rel=1e-4)
        for key in ("direction_rms", "weight_rms", "relative_step"):
            assert remembered(opt, key) == pytest.approx(remembered(plain, key), rel=1e-4)


@pytest.mark.parametrize("fused", PATHS.values(), ids=PATHS)
def test_a_step_between_two_searches_goes_by_the_scale_of_the_last_step(fused):
    model, opt = build(fused, every=100, trust=5.0)
    for t in range(4):
        step(model, opt, t)
    scales = scales_of(opt)
    relative, factor = remembered(opt, "relative_step"), remembered(opt, "factor")[0]
    report = step(model, opt, 4, size=3.0)
    assert report.joint_trials == 1
    assert [u.step_size for u in report.units] == pytest.approx(
        [factor * r * s for r, s in zip(relative, scales, strict=True)], rel=1e-12
    )
    assert all(d > 1.0 for d in remembered(opt, "direction_rms")), "else the scale would be the same"


@pytest.mark.parametrize("fused", PATHS.values(), ids=PATHS)
def test_no_unit_is_moved_further_than_trust_by_a_gradient_larger_than_the_last(fused):
    """The steps remembered are as long as trust allows, and the direction is longer than in the last step."""
    model, opt = build(fused, every=100, trust=1e-4, c=0.01)
    for t in range(4):
        step(model, opt, t)
    assert remembered(opt, "relative_step") == pytest.approx([1e-4] * 4, rel=1e-6)
    before = [[p.detach().double().clone() for p in group["params"]] for group in opt.param_groups]
    report = step(model, opt, 4, size=30.0)
    assert report.factor > 0
    lengths, weights = remembered(opt, "direction_rms"), remembered(opt, "weight_rms")
    assert min(lengths) > 1.5
    for unit, length, weight in zip(report.units, lengths, weights, strict=True):
        assert unit.step_size * length == pytest.approx(1e-4 * weight, rel=1e-6)
    for group, start, weight in zip(opt.param_groups, before, weights, strict=True):
        moved = [p.detach().double() - q for p, q in zip(group["params"], start, strict=True)]
        entries = sum(int(torch.count_nonzero(p.grad)) for p in group["params"])
        assert math.sqrt(sum(float(m.square().sum()) for m in moved) / entries) <= 1.01e-4 * weight


@pytest.mark.parametrize("fused", PATHS.values(), ids=PATHS)
def test_a_mini_batch_without_a_slope_leaves_the_scale(fused):
    model, opt = build(fused)
    for t in range(3):
        step(model, opt, t)
    before = [remembered(opt, key) for key in ("direction_rms", "weight_rms")]
    step(model, opt, 3, size=0.0)
    assert [remembered(opt, key) for key in ("direction_rms", "weight_rms")] == before
    assert step(model, opt, 4).factor > 0


@pytest.mark.parametrize("fused", PATHS.values(), ids=PATHS)
def test_a_state_without_a_scale_goes_on_with_that_of_the_step(fused):
    """Such as one of before units remembered it: no step is lost."""
    model, opt = build(fused, every=100)
    for t in range(3):
        step(model, opt, t)
    old = opt.state_dict()
    for group in old["param_groups"]:
        del group["direction_rms"], group["weight_rms"]
    opt.load_state_dict(old)
    report = step(model, opt, 3)
    assert {u.outcome for u in report.units} == {"accepted"}
    scales = scales_of(opt)
    steps = [report.factor * r * s for r, s in zip(remembered(opt, "relative_step"), scales, strict=True)]
    assert [u.step_size for u in report.units] == pytest.approx(steps, rel=1e-12)


@pytest.mark.parametrize("optimizer", [fastals.ALS, EagerALS])
def test_a_unit_that_takes_part_for_the_first_time_moves_in_that_step(optimizer):
    torch.manual_seed(0)
    body, late = nn.Linear(4, 4), nn.Linear(4, 4)
    head, x = nn.Linear(4, 1), torch.randn(16, 4)
    groups = [{"params": [*m.parameters()], "name": n} for n, m in (("body", body), ("late", late), ("head", head))]
    opt, used = optimizer(groups, every=100), False

    def closure():
        return (head(late(body(x)) if used else body(x)) - 1).square().mean()

    for t in range(4):
        opt.zero_grad()
        used = t == 3
        opt.step(closure)
    units = {u.name: u for u in opt.report.units}
    assert units["late"].step_size > 0


@pytest.mark.parametrize("fused", PATHS.values(), ids=PATHS)
def test_a_nan_in_a_gradient_leaves_its_unit_bitwise_and_moves_the_others(fused):
    model, opt = build(fused, every=100)
    for t in range(3):
        step(model, opt, t)
    sick = model.inner.blocks[0]
    before, memory = copy.deepcopy(sick.state_dict()), [dict(opt.state_dict()["param_groups"][1])]
    handle = next(sick.parameters()).register_hook(lambda g: g.clone().fill_(math.nan))
    report = step(model, opt, 3)
    handle.remove()
    assert_same(dict(sick.state_dict()), dict(before))
    by_name = {u.name: u for u in report.units}
    assert by_name["inner.blocks.0"].outcome == "not_descent"
    assert all(u.step_size > 0 for n, u in by_name.items() if n != "inner.blocks.0")
    kept = ("direction_rms", "weight_rms", "relative_step")
    assert [opt.state_dict()["param_groups"][1][k] for k in kept] == [memory[0][k] for k in kept]
    assert step(model, opt, 4).factor > 0


@pytest.mark.parametrize("fused", PATHS.values(), ids=PATHS)
def test_weights_that_the_forward_writes_in_a_search_of_another_unit_are_those_of_the_step(fused):
    """The forward copies the weights of one unit into the other, which has been measured after that search."""
    if fused:
        pytest.importorskip("triton")
    torch.manual_seed(0)
    device = "cuda" if fused and torch.cuda.is_available() else "cpu"
    first, second = (nn.Linear(4, 4, bias=False, device=device) for _ in range(2))
    x, y = (torch.randn(16, 4, device=device) for _ in range(2))
    groups = [{"params": [m.weight], "name": n} for n, m in (("first", first), ("second", second))]
    options = {"every": 1, "c": 0.99, "max_trials": 2, "trust": 5.0}  # nothing passes
    opt, before = fastals.ALS(groups, fused=fused, cache=False, **options), first.weight.detach().clone()

    def closure():
        with torch.no_grad():
            second.weight.copy_(first.weight)
        return (second(torch.tanh(first(x))) - y).square().mean()

    for _ in range(4):
        opt.step(closure)
        assert {u.outcome for u in opt.report.units} == {"exhausted"}
        assert_same([first.weight.detach(), second.weight.detach()], [before, before])
