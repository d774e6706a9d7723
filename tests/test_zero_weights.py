"""Weights that start at zero move: ``trust`` bounds a step by the size of the weights, and that has a floor."""

import itertools

import pytest
import torch
from helpers.fused import CUDA, optimizer
from helpers.options import HARD
from helpers.side_by_side import compare
from helpers.tiny import TinyTransformer, tiny_batches
from torch import nn

import fastals
from fastals.search import LEAST_RMS

SCHEDULES = ["relay", "sweep", "independent", "cycle", "joint"]
KINDS = ["plain", "fused", "eager"]
TRUST = {"relay": 0.2}  # by default; 0.006 in the other schedules


def needs_triton(kind):
    if kind == "fused":
        pytest.importorskip("triton")


def constant(size, width=4):
    """A layer whose weights are all of this size."""
    layer = nn.Linear(width, 1, bias=False, device=CUDA)
    nn.init.constant_(layer.weight, size)
    return layer


def zero_head(dtype=torch.float64):
    """A transformer of which only the head is trained, from 0 on."""
    torch.manual_seed(0)
    model = TinyTransformer(depth=2).to(CUDA, dtype).requires_grad_(False)
    for p in model.head.requires_grad_().parameters():
        nn.init.zeros_(p)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("size", "counts_as"), [(0.0, 0.01), (0.009, 0.01), (0.02, 0.02)])
def test_the_first_step_is_a_share_of_the_weights_or_of_the_least_size(size, counts_as, schedule, kind):
    """The loss is linear and Adam's first direction ±1, so that the first trial passes and moves each weight alike."""
    needs_triton(kind)
    model, x = constant(size), torch.ones(4, device=CUDA)
    opt = optimizer(kind, model, by="model", schedule=schedule)
    opt.step(lambda: model(x).sum())
    expected = size - TRUST.get(schedule, 0.006) * counts_as
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 4), expected, device=CUDA), rtol=1e-5, atol=1e-9)
    if schedule == "relay":
        assert float(opt.param_groups[0]["weight_rms"]) == pytest.approx(counts_as, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_unit_remembers_is_no_smaller(kind):
    """Bitwise the floor on all paths, in the double precision of the searches."""
    needs_triton(kind)
    model = constant(0.0)
    opt = optimizer(kind, model, by="model", every=1)
    for _ in range(3):
        opt.step(lambda: model(torch.ones(4, device=CUDA)).sum())
        assert float(opt.param_groups[0]["weight_rms"]) == LEAST_RMS
        assert float(model.weight.detach().abs().max()) < LEAST_RMS


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trust", [None, 0.2])
def test_a_model_of_zeros_learns(trust, kind):
    needs_triton(kind)
    model = nn.Linear(4, 1, device=CUDA)
    for p in model.parameters():
        nn.init.zeros_(p)
    opt = optimizer(kind, model, by="model", trust=trust)
    x = torch.randn(16, 4, device=CUDA)
    losses = [float(opt.step(lambda: (model(x) - x.sum(1, keepdim=True)).square().mean())) for _ in range(40)]
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.slow(keep=8)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"direction": "sgd"}, {"momentum": "tested"}], ids=str)
def test_the_twin_takes_the_same_steps_from_zero(schedule, options):
    seen = compare(HARD | {"schedule": schedule} | options, model=zero_head().cpu())
    assert "accepted" in seen.outcomes


@pytest.mark.parametrize("schedule", ["relay", "sweep"])
def test_the_device_takes_the_same_steps_from_zero(schedule):
    pytest.importorskip("triton")
    models = [zero_head(torch.float32) for _ in range(2)]
    ours, theirs = (optimizer(k, m, schedule=schedule) for k, m in zip(("fused", "plain"), models, strict=True))
    for t, batch in enumerate(tiny_batches(6)):
        for opt, model in zip((ours, theirs), models, strict=True):
            torch.manual_seed(t)
            opt.step(lambda: model(**{k: v.to(CUDA) for k, v in batch.items()}))  # noqa: B023
        assert [u.trials for u in ours.report.units] == [u.trials for u in theirs.report.units]
        assert ours.report.units[0].step_size == pytest.approx(theirs.report.units[0].step_size, rel=1e-4) != 0
        torch.testing.assert_close(models[0].head.weight, models[1].head.weight, rtol=1e-4, atol=1e-7)


def test_trust_says_what_the_floor_is():
    assert str(LEAST_RMS) in fastals.ALS.__doc__
