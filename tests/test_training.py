"""What users of an optimizer do: schedulers, late groups, frozen and unused parameters, accumulation."""

import copy

import pytest
import torch
from helpers.tiny import TinyTransformer, TwoHeads, tiny_batches
from torch import nn

import fastals
from fastals.eager import EagerALS

# Every first trial is η = lr · eta_max and small enough to be accepted.
AS_ADAMW = {
    "schedule": "sweep", "momentum": "after", "initial": "reset", "reference": "monotone", "trust": None,
    "eta_max": 1e-3, "c": 1e-6, "betas": (0.8, 0.99),
}  # fmt: skip


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["sweep", "independent", "cycle", "joint"])
def test_with_the_step_size_fixed_it_is_adamw(schedule, decay):
    """Moments, bias corrections by each parameter's own count of updates, decoupled decay: as in torch's AdamW."""
    torch.manual_seed(0)
    model = TwoHeads(dropout=0.0).double()
    twin = copy.deepcopy(model)
    opt = fastals.ALS(
        fastals.units(model, by=["body", "other"]),
        model=model,
        weight_decay=decay,
        **(AS_ADAMW | {"schedule": schedule}),
    )
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.8, 0.99), weight_decay=decay)
    for t, batch in enumerate(tiny_batches(30)):
        batch["other"] = t % 3 == 1
        opt.step(lambda: model(**batch))  # noqa: B023
        assert all(u.step_size == pytest.approx(1e-3) for u in opt.report.units)
        adamw.zero_grad()
        twin(**batch).backward()
        adamw.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    counts = {int(opt.state[p]["step"]) for p in model.parameters()}
    assert counts == {int(adamw.state[q]["step"]) for q in twin.parameters()} == {10, 20, 30}


def test_with_the_step_size_fixed_and_clipping_it_is_clipped_adamw():
    torch.manual_seed(0)
    model = TinyTransformer(dropout=0.0).double()
    twin = copy.deepcopy(model)
    opt = fastals.ALS(fastals.units(model, by="model"), model=model, max_grad_norm=0.1, **AS_ADAMW)
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.8, 0.99), weight_decay=0)
    for batch in tiny_batches(10):
        opt.step(lambda: model(**batch))  # noqa: B023
        adamw.zero_grad()
        twin(**batch).backward()
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1) > 0.1
        adamw.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_clipping_does_not_change_the_slope():
    """The test compares with the true gradient; along the clipped direction the slope of SGD is scaled once."""
    torch.manual_seed(0)
    model = TinyTransformer(dropout=0.0).double()
    opt = fastals.ALS(model, max_grad_norm=1e-3, direction="sgd", momentum="none", max_trials=1)
    batch = next(tiny_batches(1))
    opt.step(lambda: model(**batch))
    norms = [sum(float(p.grad.square().sum()) for p in g["params"]) for g in opt.param_groups]
    scale = 1e-3 / (sum(norms) ** 0.5 + 1e-6)
    assert [u.slope for u in opt.report.units] == pytest.approx([scale * n for n in norms])


@pytest.mark.parametrize("schedule", ["sweep", "independent", "cycle", "joint", "relay"])
def test_accumulated_micro_batches_equal_the_big_batch(schedule):
    torch.manual_seed(0)
    model = TinyTransformer(dropout=0.0).double()
    twin = copy.deepcopy(model)
    opt, whole = (fastals.ALS(m, schedule=schedule, trust=0.2, c=0.5, growth=2.0, max_trials=4) for m in (model, twin))
    rejected = 0
    for batch in tiny_batches(10, size=8):
        halves = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]
        opt.zero_grad()
        loss = 0.0
        for half in halves:
            part = model(**half) / 2
            part.backward()
            loss += part.detach()
        opt.step(lambda: sum(model(**half) / 2 for half in halves), loss=loss)  # noqa: B023
        whole.step(lambda: twin(**batch))  # noqa: B023
        for a, b in zip(opt.report.units, whole.report.units, strict=True):
            assert (a.outcome, a.trials) == (b.outcome, b.trials)
            assert a.step_size == pytest.approx(b.step_size, rel=1e-6)
        rejected += opt.report.trials > sum(u.outcome == "accepted" for u in opt.report.units)
    assert rejected
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("scheduler", "factors"),
    [
        (lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)), [1, 1 / 2, 1 / 3, 1 / 4]),
        (lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=4), [1, 0.8536, 0.5, 0.1464]),
    ],
    ids=["lambda", "cosine"],
)
def test_schedulers_scale_the_largest_step(scheduler, factors):
    """``lr`` multiplies the cap; with steps found under the cap every time, the steps are the cap."""
    torch.manual_seed(0)
    model = TinyTransformer(dropout=0.0)
    opt = fastals.ALS(model, **(AS_ADAMW | {"momentum": "none"}))
    schedule = scheduler(opt)
    for batch, factor in zip(tiny_batches(4), factors, strict=True):
        opt.step(lambda: model(**batch))  # noqa: B023
        schedule.step()
        assert all(u.step_size == pytest.approx(1e-3 * factor, rel=1e-3) for u in opt.report.units)


def test_a_schedule_may_end_a_rounding_below_zero():
    model = TinyTransformer(depth=1)
    opt = fastals.ALS(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 0.1, 0.0, total_iters=7)
    for batch in tiny_batches(9):
        opt.step(lambda batch=batch: model(**batch))
        scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_lr_of_zero_moves_nothing():
    model = TinyTransformer()
    opt = fastals.ALS(model, lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    batch = next(tiny_batches(1))
    opt.step(lambda: model(**batch))
    assert {u.outcome for u in opt.report.units} == {"not_descent"}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("schedule", ["cycle", "relay"])
def test_a_group_added_while_training_is_searched_from_then_on(schedule):
    torch.manual_seed(0)
    model = TinyTransformer()
    model.embed.requires_grad_(False)
    opt = fastals.ALS(model, schedule=schedule, every=2)
    batches = list(tiny_batches(8))
    for batch in batches[:3]:
        opt.step(lambda: model(**batch))  # noqa: B023
    assert "embed.weight" not in [n for g in opt.param_groups for n in g["param_names"]]
    frozen = model.embed.weight.detach().clone()
    moments = {p: s["exp_avg_sq"].clone() for p, s in opt.state.items()}
    model.embed.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'embed.weight' first: .*add_param_group"):
        opt.step(lambda: model(**batches[3]))
    opt.add_param_group({"name": "late", "params": model.embed.weight})
    assert opt.param_groups[-1]["param_names"] == ["embed.weight"]
    with pytest.raises(ValueError, match="parameters that the model does not have"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert all(torch.equal(opt.state[p]["exp_avg_sq"], m) for p, m in moments.items())
    opt.step(lambda: model(**batches[3]))
    late = next(u for u in opt.report.units if u.name == "late")
    assert late is opt.report.units[0], "units stand in the order of the forward"
    assert late.outcome == "accepted"
    assert not torch.equal(model.embed.weight, frozen)
    assert int(opt.state[model.embed.weight]["step"]) == 1
    assert int(opt.state[model.head.weight]["step"]) == 4


def test_a_module_added_while_training_has_to_be_in_a_unit():
    torch.manual_seed(0)
    model, batch = TinyTransformer(), next(tiny_batches(1))
    opt = fastals.ALS(model)
    opt.step(lambda: model(**batch))
    model.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="adapter"):
        opt.step(lambda: model(**batch))
    opt.add_param_group({"params": model.adapter.parameters()})
    opt.step(lambda: model(**batch))


class Kink(nn.Module):
    """A finite loss, and a gradient of ``scale`` that is not: the root at 0."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.body(x).square().mean() + self.scale.abs().sqrt().sum()


@pytest.mark.parametrize("schedule", ["sweep", "independent", "cycle", "joint", "relay"])
def test_a_gradient_that_is_not_finite_stops_its_unit_only(schedule):
    torch.manual_seed(0)
    model = Kink()
    opt = fastals.ALS(fastals.units(model, by=["body", "scale"]), model=model, schedule=schedule)
    x = torch.randn(8, 4)
    for t in range(3):
        opt.step(lambda: model(x))
        assert not torch.isfinite(model.scale.grad).all()
        moved = "kept" if schedule == "cycle" and t == 2 else "accepted"  # the other unit's turn
        assert [u.outcome for u in opt.report.units] == [moved, "not_descent"]
    assert model.scale.item() == 0
    assert int(opt.state[model.body.weight]["step"]) == 3
    assert model.scale not in opt.state, "nothing of it reached the moments"


def test_frozen_parameters_stay():
    torch.manual_seed(0)
    model = TinyTransformer()
    model.blocks[1].requires_grad_(False)
    frozen = [p.detach().clone() for p in model.blocks[1].parameters()]
    opt = fastals.ALS(model)
    for batch in tiny_batches(3):
        opt.step(lambda: model(**batch))  # noqa: B023
    assert [u.name for u in opt.report.units] == ["embeddings", "blocks.0", "blocks.2", "head"]
    assert all(torch.equal(p, q) for p, q in zip(model.blocks[1].parameters(), frozen, strict=True))
    assert all(p.grad is None for p in model.blocks[1].parameters())


def test_a_parameter_frozen_after_construction_is_skipped():
    torch.manual_seed(0)
    model = TinyTransformer()
    opt = fastals.ALS(model)
    batches = list(tiny_batches(3))
    opt.step(lambda: model(**batches[0]))
    model.head.requires_grad_(False)
    kept = model.head.weight.detach().clone()
    opt.step(lambda: model(**batches[1]))
    assert torch.equal(model.head.weight, kept)
    assert int(opt.state[model.head.weight]["step"]) == 1


@pytest.mark.parametrize("schedule", ["sweep", "relay"])
def test_a_unit_that_is_never_used_does_not_make_the_others_search(schedule):
    torch.manual_seed(0)
    model = TwoHeads(dropout=0.0)
    opt = fastals.ALS(fastals.units(model, by=["body", "other"]), model=model, schedule=schedule, every=3)
    outcomes, searched = [], []
    for batch in tiny_batches(7):
        opt.step(lambda: model(**batch, other=False))  # noqa: B023
        outcomes += [u.outcome for u in opt.report.units]
        searched += [u.trials > 0 for u in opt.report.units]
    between = "kept" if schedule == "sweep" else "accepted"  # the relay tests its remembered steps
    assert outcomes == ["accepted", between, between] * 2 + ["accepted"]
    assert searched == [True, False, False] * 2 + [True]


@pytest.mark.parametrize("form", ["parameters", "named", "groups"])
def test_plain_parameters_are_units_without_a_cache(form):
    torch.manual_seed(0)
    model = TinyTransformer(dropout=0.0)
    forms = {
        "parameters": model.parameters(),
        "named": model.named_parameters(),
        "groups": [{"params": model.blocks.parameters()}, {"params": [*model.embed.parameters()], "c": 0.9}],
    }
    opt = fastals.ALS(forms[form], trust=0.05)
    batches = list(tiny_batches(2)) * 15
    losses = [float(opt.step(lambda: model(**batch))) for batch in batches]  # noqa: B023
    assert losses[-1] < losses[0]
    assert len(opt.report.units) == (2 if form == "groups" else 1)
    assert opt.param_groups[-1]["c"] == (0.9 if form == "groups" else opt.defaults["c"])


def test_units_know_their_model():
    """Its activations are cached, and a trial leaves running statistics alone."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3)))
    opt = fastals.ALS(fastals.units(model, by=2), schedule="sweep")
    x = torch.randn(16, 4)
    for _ in range(3):
        opt.step(lambda: (model(x) - 1).square().mean())
    assert int(model[0][1].num_batches_tracked) == 3
    assert opt.last_forwards < 1 + opt.report.trials


@pytest.mark.parametrize("make", [fastals.ALS, EagerALS], ids=["als", "eager"])
def test_a_learning_rate_of_adamw_is_warned_of(make):
    with pytest.warns(UserWarning, match="lr=5e-05 is no learning rate here"):
        make(TinyTransformer(depth=1), lr=5e-5)


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 1.0)])
def test_betas_are_a_pair(betas):
    with pytest.raises(ValueError, match="betas must be two numbers"):
        fastals.ALS(TinyTransformer(depth=1), betas=betas)


def test_a_state_without_the_moments_of_this_momentum_is_refused_when_it_is_loaded():
    model, batch = TinyTransformer(depth=1), next(tiny_batches(1))
    opt = fastals.ALS(model)
    opt.step(lambda: model(**batch))
    with pytest.raises(ValueError, match="no 'exp_avg'"):
        fastals.ALS(copy.deepcopy(model), momentum="after").load_state_dict(opt.state_dict())


def test_hooks_and_repr():
    model = TinyTransformer()
    opt = fastals.ALS(model)
    calls = []
    opt.register_step_pre_hook(lambda *args: calls.append("before"))
    opt.register_step_post_hook(lambda *args: calls.append("after"))
    batch = next(tiny_batches(1))
    opt.step(lambda: model(**batch))
    assert calls == ["before", "after"]
    assert "blocks.0: 1,904" in repr(opt)
