"""The schedule relay: units searched alone in turn, all moved by relative steps and a common factor, tested jointly."""

import copy
import itertools
import math

import pytest
import torch
from helpers.options import values
from helpers.side_by_side import compare, one_step
from helpers.tiny import TinyTransformer, TwoHeads, assert_same, tiny_batches
from helpers.twins import counted_leaves, judged_step
from torch import nn

import fastals
from fastals.eager import EagerALS
from fastals.search import MEMORY

HARD = {"c": 0.6, "trust": 0.5, "max_trials": 4}  # trials are rejected
HARDEST = {"c": 0.9, "trust": 0.1, "max_trials": 2}  # searches and joint tests are exhausted


def build(dtype=torch.float64, model=None, **options):
    torch.manual_seed(0)
    model = (TinyTransformer(depth=2) if model is None else model).to(dtype)
    return model, fastals.ALS(fastals.units(model), model=model, **({"schedule": "relay"} | options))


def take_step(model, opt, batch, seed=7):
    torch.manual_seed(seed)
    opt.step(lambda: model(**batch))
    return opt.report


def train(model, opt, steps, first=0):
    """Steps ``first`` up to ``steps``, each with its own seed; returns the reports."""
    return [take_step(model, opt, b, 100 + t) for t, b in list(enumerate(tiny_batches(steps)))[first:]]


def memory(opt, *keys):
    return [tuple(group[k] for k in keys or MEMORY) for group in opt.param_groups]


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


# The formulas


class ByHand:
    """One run in plain float64 arithmetic, with nothing of fastals in it.

    Adam without momentum. Attributes: relative step r, common factor a, and what the last step did.
    """

    def __init__(self, units, loss_of, *, c=0.3, trust=0.2, growth=1.1, every=2, max_trials=8):
        self.units, self.loss_of = units, loss_of
        self.c, self.trust, self.growth, self.every, self.tries = c, trust, growth, every, max_trials
        self.r, self.a, self.count = [0.0] * len(units), 1.0, 0
        self.lengths, self.weights = [0.0] * len(units), [0.0] * len(units)  # RMS in the last step
        self.squares = [[torch.zeros_like(p) for p in unit] for unit in units]

    def step(self, lr=1.0):
        everything = [p for unit in self.units for p in unit]
        loss = self.loss_of()
        grads = iter(torch.autograd.grad(loss, everything))
        self.before, self.count = loss.item(), self.count + 1
        self.start = [[p.detach().clone() for p in unit] for unit in self.units]
        all_rms = rms(everything)
        self.d, self.slopes, lengths, weights = [], [], [], []
        for unit, squares in zip(self.units, self.squares, strict=True):
            g = [next(grads) for _ in unit]
            for v, x in zip(squares, g, strict=True):
                v.mul_(0.999).add_(0.001 * x * x)
            d = [x / ((v / (1 - 0.999**self.count)).sqrt() + 1e-8) for x, v in zip(g, squares, strict=True)]
            moving = sum(int((x != 0).sum()) for x in g)
            lengths.append(math.sqrt(sum(float((y * y).sum()) for y in d) / moving))
            weights.append(max(rms(unit), all_rms))
            self.d.append(d)
            self.slopes.append(sum(float((x * y).sum()) for x, y in zip(g, d, strict=True)))
        self.trials = [0] * len(self.units)
        due = (self.count - 1) % self.every == 0
        turn = ((self.count - 1) // self.every - 1) % len(self.units)
        self.scales = [w / max(length, 1.0) for w, length in zip(self.weights, self.lengths, strict=True)]
        for u in range(len(self.units)) if self.count == 1 else [turn] * due:
            self.scales[u] = (weights[u] if self.count == 1 else self.weights[u]) / max(lengths[u], 1.0)
            self.search_alone(u, min(10.0, self.trust * self.scales[u]))
        caps = [min(10.0, self.trust * w / max(length, 1.0)) for w, length in zip(weights, lengths, strict=True)]
        self.lengths, self.weights = lengths, weights
        self.missed = lr * (1 - self.c)  # of the promised decrease, if the factor is to grow
        last, recalled = 2 ** (self.tries - 1), zip(caps, self.r, self.scales, strict=True)
        self.move_all([lr * min(cap, r * s) if r else lr * cap / last for cap, r, s in recalled])

    def search_alone(self, u, cap):
        last = cap / 2 ** (self.tries - 1)
        eta = min(cap, max(2 * self.r[u] * self.scales[u], last)) if self.r[u] else cap
        for k in range(self.tries):
            self.trials[u] = k + 1
            if self.loss_with({u: eta}) <= self.before - self.c * eta * self.slopes[u]:
                found = eta / self.scales[u]
                self.r[u] = math.sqrt(self.r[u] * found) if self.r[u] else found
                return
            eta /= 2
        self.r[u] /= 2

    def move_all(self, etas):
        a, self.steps, self.factor = self.a, [0.0] * len(etas), 0.0
        for k in range(self.tries):
            self.joint_trials = k + 1
            chosen = {u: a * eta for u, eta in enumerate(etas)}
            self.after = self.loss_with(chosen)
            promised = sum(a * e * s for e, s in zip(etas, self.slopes, strict=True))
            if self.after <= self.before - self.c * promised:
                self.put(chosen)
                self.steps, self.factor = list(chosen.values()), a
                grows = k == 0 and self.after <= self.before - (1 - self.missed) * promised
                self.a = max(min(1.0, self.growth * a) if grows else a, 0.5 ** (self.tries - 1))
                return
            a /= 2
        self.after, self.a = self.before, max(self.a / 2, 0.5 ** (self.tries - 1))

    @torch.no_grad()
    def put(self, etas):
        for u, (unit, start) in enumerate(zip(self.units, self.start, strict=True)):
            for p, w, d in zip(unit, start, self.d[u], strict=True):
                p.copy_(w - etas.get(u, 0.0) * d)

    def loss_with(self, etas):
        self.put(etas)
        with torch.no_grad():
            loss = float(self.loss_of())
        self.put({})
        return loss


def rms(tensors):
    return math.sqrt(sum(float(t.detach().square().sum()) for t in tensors) / sum(t.numel() for t in tensors))


BY_HAND = [{}, HARD, HARD | {"every": 1, "growth": 1.5}, {"every": 3, "trust": 0.02}, HARDEST | {"every": 1}]


@pytest.mark.parametrize("options", BY_HAND, ids=values)
@pytest.mark.parametrize("warm_up", [False, True], ids=["", "warm-up"])
def test_a_run_is_the_one_computed_by_hand(options, warm_up):
    model, opt = build(model=TinyTransformer(depth=2, width=6, dropout=0.0), **options)
    twin, batch = copy.deepcopy(model), {}
    units = [[dict(twin.named_parameters())[n] for n in g["param_names"]] for g in opt.param_groups]
    hand = ByHand(units, lambda: twin(**batch), **options)
    for t, batch in enumerate(tiny_batches(16)):
        lr = min(1.0, (t + 1) / 8) if warm_up else 1.0
        for group in opt.param_groups:
            group["lr"] = lr
        report = take_step(model, opt, batch)
        hand.step(lr)
        assert [u.trials for u in report.units] == hand.trials, f"step {t}"
        assert (report.joint_trials, report.factor) == (hand.joint_trials, hand.factor)
        assert [u.step_size for u in report.units] == pytest.approx(hand.steps, rel=1e-8)
        assert [u.slope for u in report.units] == pytest.approx(hand.slopes, rel=1e-8)
        assert (report.loss_before, report.loss_after) == pytest.approx((hand.before, hand.after), rel=1e-12)
        assert [r for (r,) in memory(opt, "relative_step")] == pytest.approx(hand.r, rel=1e-8)
        assert memory(opt, "factor") == [(hand.a,)] * len(units)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("direction", ["adam", "sgd"])
def test_a_batch_with_a_small_gradient_moves_the_model_little_along_adams_direction(direction):
    """As after Adam; a relative step of a short direction would be as long as any, along what is left of noise."""
    options = {"schedule": "relay", "direction": direction, "every": 100, "eta_max": 1e6}
    model, opt = build(**options)
    train(model, opt, 6)
    moved = []
    for factor in (1.0, 0.01):
        twin, state = copy.deepcopy(model), copy.deepcopy(opt.state_dict())
        again = fastals.ALS(fastals.units(twin), model=twin, **options)
        again.load_state_dict(state)
        start, batch = weights(twin), list(tiny_batches(7))[6]
        torch.manual_seed(1)
        again.step(lambda: factor * twin(**batch))  # noqa: B023
        assert again.report.joint_trials == 1
        moved.append(
            sum(float((p.detach() - q).square().sum()) for p, q in zip(twin.parameters(), start, strict=True)) ** 0.5
        )
    if direction == "adam":
        assert moved[1] < 0.1 * moved[0]
    else:
        assert moved[1] == pytest.approx(moved[0], rel=1e-6)


@pytest.mark.parametrize("momentum", ["none", "tested"])
def test_a_search_raises_the_relative_step_by_half_a_backtrack_and_never_above_trust(momentum):
    """Also where the direction is short, so that a trial of any length passes."""
    model, opt = build(every=1, momentum=momentum)
    largest = []
    for t, batch in enumerate(tiny_batches(40)):
        before = [r for (r,) in memory(opt, "relative_step")]
        torch.manual_seed(t)
        opt.step(lambda b=batch, scale=1e-3 if t % 2 else 1.0: scale * model(**b))
        after = [r for (r,) in memory(opt, "relative_step")]
        pairs = [(old, new) for old, new in zip(before, after, strict=True) if old]
        lowest = 0.2 / 2**7  # where no search starts below
        assert all(new <= 1.0001 * math.sqrt(old * max(2 * old, lowest)) for old, new in pairs)
        largest.append(max(after))
    assert max(largest) <= 0.2 * 1.0001


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fastals. 20 steps in a row have not moved:UserWarning")
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_two_trials_are_enough_to_find_the_factor(fused):
    if fused:
        pytest.importorskip("triton")
    device = "cuda" if fused and torch.cuda.is_available() else "cpu"
    params = [nn.Parameter(torch.ones(4, device=device)) for _ in range(8)]
    groups = [{"params": [p], "name": str(i)} for i, p in enumerate(params)]
    opt = fastals.ALS(groups, max_trials=2, fused=fused)
    for _ in range(40):
        opt.step(lambda: (sum(p.sum() for p in params) - 30).square() / 100)
    assert opt.report.loss_after < 1e-3


@pytest.mark.filterwarnings("ignore:fastals. no parameter of the optimizer has a gradient:UserWarning")
@pytest.mark.parametrize("optimizer", [fastals.ALS, EagerALS])
def test_a_step_in_which_no_unit_has_a_gradient_moves_nothing(optimizer):
    model = TinyTransformer(depth=2)
    opt = optimizer(fastals.units(model), model=model)
    other = nn.Parameter(torch.ones(()))
    before = weights(model)
    opt.step(lambda: other.square())
    assert_same(weights(model), before)


def test_the_runs_by_hand_meet_every_case():
    """Rejections of both kinds, an exhausted search and joint test, and a factor that shrinks and grows."""
    joint, alone, exhausted, factors = 0, 0, set(), []
    for options in BY_HAND:
        model, opt = build(model=TinyTransformer(depth=2, width=6, dropout=0.0), **options)
        before = [0.0] * len(opt.param_groups)
        for report in (take_step(model, opt, batch) for batch in tiny_batches(16)):
            now = [r for (r,) in memory(opt, "relative_step")]
            halved = [a and b == a / 2 for a, b in zip(before, now, strict=True)]
            exhausted |= {"alone"} if any(halved) else set()
            exhausted |= {"jointly"} if report.factor == 0 else set()
            alone += any(u.trials > 1 for u in report.units)
            joint += report.joint_trials > 1
            factors.append(opt.param_groups[0]["factor"])
            before = now
    assert alone
    assert joint
    assert exhausted == {"alone", "jointly"}
    assert any(a < b < 1 for a, b in itertools.pairwise(factors))


# The slow twin


TWINS = {
    "defaults": {},
    "hard": HARD,
    "each step": HARD | {"every": 1},
    "every third": HARD | {"every": 3},
    "auto": HARD | {"every": "auto"},
    "tested": HARD | {"momentum": "tested"},
    "after": HARD | {"momentum": "after"},
    "auto, after": HARD | {"every": "auto", "momentum": "after"},
    "no trust": HARD | {"trust": None, "eta_max": 0.5},
    "hardest": HARDEST,
    "narrow": {"trust": 0.02, "c": 0.95},
    "sgd": HARD | {"direction": "sgd", "momentum": "tested"},
    "sgd without trust": {"direction": "sgd", "trust": None, "eta_max": 2.0},
    "merging": HARD | {"merge_below": 1e-2},
    "merging, auto": HARD | {"merge_below": 1e-2, "every": "auto", "momentum": "after"},
    "clipped": HARD | {"max_grad_norm": 0.1, "weight_decay": 0.1},
    "polyak": HARD | {"initial": "polyak", "reference": "nonmonotone"},
    "random": HARD | {"initial": "random", "reference": "smoothed", "order": "random"},
    "reset": HARD | {"initial": "reset", "order": "bottom_up"},
}


@pytest.mark.slow(keep=5)
@pytest.mark.parametrize("options", TWINS.values(), ids=TWINS)
def test_the_twin_takes_the_same_steps(options):
    torch.manual_seed(0)
    model = TinyTransformer(depth=4 if "merge_below" in options else 2).double()
    seen = compare({"schedule": "relay"} | options, model=model)
    assert "accepted" in seen.outcomes
    assert "kept" not in seen.outcomes
    assert seen.rejections + seen.joint_rejections > 0


@pytest.mark.parametrize("momentum", ["none", "tested", "after"])
def test_the_twin_takes_the_same_steps_in_bfloat16_with_masters(momentum):
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, dropout=0.0).bfloat16()
    assert compare(HARD | {"schedule": "relay", "momentum": momentum}, model=model, resync=True).rejections > 0


@pytest.mark.parametrize("every", [1, 2, "auto"])
def test_the_twin_takes_the_same_steps_where_units_have_no_gradient(every):
    torch.manual_seed(0)
    compare(HARD | {"schedule": "relay", "every": every}, model=TwoHeads().double())


@pytest.mark.parametrize("lrs", [[0.0, 0.25, 0.5, 0.75, 1.0], [1.0, 0.5, 0.0, 0.5, 1.0]], ids=["from 0", "through 0"])
def test_the_twin_takes_the_same_steps_under_a_scheduler(lrs):
    def set_lr(t, opt, model):
        for group in opt.param_groups:
            group["lr"] = lrs[t % len(lrs)]

    seen = compare(HARD | {"schedule": "relay"}, before_step=set_lr)
    assert {"accepted", "not_descent"} <= seen.outcomes


def test_the_twin_takes_the_same_steps_when_a_unit_comes_later():
    """It comes with nothing remembered, so that all units are searched alone again, from what they remember."""
    torch.manual_seed(0)
    model, searched = TinyTransformer(depth=2).double(), {}
    nn.ModuleList([model.norm, model.head]).requires_grad_(False)

    def thaw(t, opt, model):
        if opt.report is not None:
            searched.setdefault(t - 1, []).append([u.name for u in opt.report.units if u.trials])
        if t == 5:
            named = [(n, p.requires_grad_()) for n, p in model.named_parameters() if not p.requires_grad]
            params = named if isinstance(opt, EagerALS) else [p for _, p in named]  # ALS finds the names in the model
            opt.add_param_group({"params": params, "name": "late"})

    compare(HARD | {"schedule": "relay"}, model=model, before_step=thaw)
    assert [len(names) for names, _ in (searched[t] for t in (3, 4, 5, 6, 7))] == [0, 1, 4, 0, 1]


# Monotone


def plain_loss(model, batch, state):
    torch.set_rng_state(state)
    with torch.no_grad():
        return float(model(**batch))


@pytest.mark.parametrize("momentum", ["none", "tested"])
@pytest.mark.parametrize("options", [{}, HARD, {"every": 1, "trust": 1.0}], ids=values)
def test_the_loss_of_the_batch_falls_enough_in_every_step(options, momentum):
    model, opt = build(momentum=momentum, **options)
    c = opt.param_groups[0]["c"]
    for t, batch in enumerate(tiny_batches(30)):
        state = torch.manual_seed(t).get_state()
        before = plain_loss(model, batch, state)
        torch.set_rng_state(state)
        opt.step(lambda: model(**batch))  # noqa: B023
        after = plain_loss(model, batch, state)
        required = c * sum(u.step_size * u.slope for u in opt.report.units)
        assert (opt.report.loss_before, opt.report.loss_after) == (before, after)
        assert after <= before - required + 1e-14, f"step {t}"
        assert (after < before) == (opt.report.factor > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_the_batch_never_rises_in_low_precision(dtype):
    model, opt = build(dtype, **HARD)
    for report in train(model, opt, 30):
        assert report.loss_after <= report.loss_before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_where_nothing_passes_all_is_as_before_and_the_factor_halves(dtype):
    """Down to the last factor that a test from 1 tries."""
    model, opt = build(dtype, c=1 - 1e-9, max_trials=3, trust=4.0)
    before = weights(model)
    for t, batch in enumerate(tiny_batches(4)):
        report = take_step(model, opt, batch, t)
        assert_same(weights(model), before)
        assert {u.outcome for u in report.units} == {"exhausted"}
        assert {u.step_size for u in report.units} == {0.0}
        assert (report.factor, report.joint_trials, report.loss_after) == (0.0, 3, report.loss_before)
        assert [u.trials for u in report.units] == ([3] * 4 if t == 0 else [3 * (t == 2 and i == 0) for i in range(4)])
        assert memory(opt, "factor", "relative_step") == [(max(0.5 ** (t + 1), 0.25), 0.0)] * 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fastals. 20 steps in a row have not moved:UserWarning")
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_stretch_of_batches_without_a_step_is_forgotten(fused):
    """A factor that had gone on shrinking would hide every decrease in the rounding of the loss, for ever."""
    if fused:
        pytest.importorskip("triton")
    torch.manual_seed(0)
    model = nn.Linear(4, 1, device="cuda" if fused and torch.cuda.is_available() else "cpu")
    opt = fastals.ALS([{"params": [*model.parameters()], "name": "all"}], schedule="relay", fused=fused)
    x, plateau = torch.randn(16, 4, device=model.weight.device), True

    def closure():
        loss = (model(x) - x.sum(1, keepdim=True) - 1).square().mean()
        moved = not all(map(torch.equal, model.parameters(), start))
        return loss + 1 if plateau and moved else loss

    for plateau in (True, False):
        for _ in range(20 if plateau else 80):
            start = [p.detach().clone() for p in model.parameters()]
            opt.step(closure)
        assert (opt.state_dict()["param_groups"][0]["factor"] == 0.5**7) == plateau
    assert opt.report.loss_after < 0.5


def test_masters_stay_where_nothing_passes():
    """Of parameters in bfloat16 what was remembered of their rounding stays too."""
    model, opt = build(torch.bfloat16, trust=0.05)
    train(model, opt, 4)
    masters = {p: s["master"].clone() for p, s in opt.state.items()}
    for group in opt.param_groups:
        group.update(c=1 - 1e-9, max_trials=1, relative_step=1e4, trust=1e4)
    assert take_step(model, opt, next(tiny_batches(1))).factor == 0
    assert_same({p: s["master"] for p, s in opt.state.items()}, masters)


# Turns


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5])
def test_every_unit_gets_its_turn(every):
    """Also where ``every`` divides the number of units, 4; in the first step each is searched, the last one first."""
    model, opt = build(every=every)
    reports = train(model, opt, 8 * every + 1)
    names = [u.name for u in reports[0].units]
    searched = [[u.name for u in r.units if u.trials] for r in reports]
    assert searched[0] == names
    assert all(len(s) == (t % every == 0) for t, s in enumerate(searched) if t)
    assert [s[0] for s in searched[every::every]] == [names[i % 4] for i in range(8)]


def test_a_search_alone_leaves_no_trace_but_what_is_learned():
    """All units move, the one that was searched too, by the factor that the joint test has accepted."""
    model, opt = build()
    for t, report in enumerate(train(model, opt, 8)):
        assert report.factor > 0
        assert all(u.step_size > 0 and u.outcome == "accepted" for u in report.units), f"step {t}"


# Memory


def through_a_file(value, folder):
    torch.save(value, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [2, 3, "auto"])
def test_a_run_resumes_from_any_step(every, dtype, tmp_path):
    """Between two searches too, to the last bit."""
    options = HARD | {"every": every, "momentum": "after"}
    model, opt = build(dtype, **options)
    saved, reports = [], []
    for t in range(7):
        saved.append(through_a_file((model.state_dict(), opt.state_dict()), tmp_path))
        reports += train(model, opt, t + 1, first=t)
    for t, (of_model, of_opt) in enumerate(saved):
        again, again_opt = build(dtype, **options)
        again.load_state_dict(of_model)
        again_opt.load_state_dict(of_opt)
        assert_same([r.as_dict() for r in train(again, again_opt, 7, first=t)], [r.as_dict() for r in reports[t:]])
        assert_same(weights(again), weights(model))
        assert_same(again_opt.state_dict(), opt.state_dict())


@pytest.mark.parametrize("schedule", ["relay", "sweep"])
def test_a_state_from_before_the_relay_is_loaded(schedule, tmp_path):
    """It has no relative steps; they are learned from then on."""
    model, opt = build(schedule="sweep")
    train(model, opt, 3)
    old = opt.state_dict()
    for group in old["param_groups"]:
        del group["relative_step"], group["factor"]
    again, loaded = build(schedule=schedule)
    again.load_state_dict(model.state_dict())
    loaded.load_state_dict(through_a_file(old, tmp_path))
    assert memory(loaded, "relative_step", "factor") == [(0.0, 0.0)] * 4
    assert_same(loaded.state_dict(), opt.state_dict())
    train(again, loaded, 12, first=3)
    assert [r > 0 for (r,) in memory(loaded, "relative_step")] == [schedule == "relay"] * 4


def test_a_merged_unit_starts_from_the_mean_of_both_relative_steps():
    apart, opt_apart = build(model=TinyTransformer(depth=3), **HARD)
    model, opt = build(model=TinyTransformer(depth=3), merge_below=1e9, **HARD)
    train(apart, opt_apart, 1)
    train(model, opt, 1)
    low, high = sorted(opt_apart.param_groups, key=lambda g: g["step_size"])[:2]
    merged = [g for g in opt.param_groups if g["name"] in (low["name"], high["name"])]
    assert len({g["unit"] for g in opt.param_groups}) == 4
    assert {g["unit"] for g in merged} == {merged[0]["unit"]}
    mean = (low["relative_step"] + high["relative_step"]) / 2
    assert [g["relative_step"] for g in merged] == [mean, mean]
    assert low["relative_step"] != high["relative_step"]


# Cost


def test_a_step_computes_the_blocks_above_the_searched_unit_and_all_blocks_in_joint_trials():
    model, opt = build(torch.float32, model=TinyTransformer(depth=4, width=8), **HARD)
    stack = [f"blocks.{i}" for i in range(4)]
    first = {"embeddings": 0, "head": 4} | {name: i for i, name in enumerate(stack)}
    batch, joint = {}, 0
    leaves = counted_leaves(model, lambda m: m(**next(tiny_batches(1))))
    for t, batch in enumerate(tiny_batches(14)):
        torch.manual_seed(t)
        step = judged_step(opt, model, lambda m: m(**batch), leaves)  # noqa: B023
        report = opt.report
        assert not step.differences()
        assert step.end == report.loss_after
        if t == 0:
            continue  # with the forwards that verify the closure and the cache
        trials = {u.name: u.trials for u in report.units}
        for i, block in enumerate(stack):
            below = sum(k for unit, k in trials.items() if first[unit] <= i)
            assert step.forwards[block] == 1 + report.joint_trials + below
        assert opt.last_forwards == pytest.approx(step.forwards.total() / 4)
        joint += report.joint_trials > 1
    assert joint


def test_a_step_takes_hardly_more_forwards_than_its_trials_at_the_defaults():
    """1 for the gradient, 1 for the joint test, and every second step a search of a part of the blocks."""
    model, opt = build(torch.float32, model=TinyTransformer(depth=4, width=8))
    train(model, opt, 2)
    forwards = []
    for t in range(2, 42):
        train(model, opt, t + 1, first=t)
        forwards.append(opt.last_forwards)
    assert min(forwards) == 2
    assert sum(forwards) / len(forwards) < 4


# Report


def test_the_report_says_the_factor():
    """1 without a joint test, 0 if it has put all units back; the steps of the units are those of the move."""
    model, opt = build(**HARDEST)
    factors = set()
    for t, batch in enumerate(tiny_batches(20)):
        first = opt.param_groups[0]["factor"] or 1.0
        report = take_step(model, opt, batch, t)
        allowed = [first, first / 2]
        assert report.factor == (allowed[report.joint_trials - 1] if report.factor else 0.0)
        assert report.as_dict()["factor"] == report.factor
        assert all((u.step_size > 0) == (report.factor > 0) for u in report.units)
        factors.add(report.factor)
    assert 0.0 in factors
    assert len(factors) > 3
    for schedule in ("sweep", "cycle"):
        model, opt = build(schedule=schedule)
        assert {r.factor for r in train(model, opt, 3)} == {1.0}


# Errors and awkward models


def snapshot(model, opt):
    return {
        "weights": [p.detach().clone() for p in model.state_dict().values()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "state": copy.deepcopy(opt.state_dict()),
        "generator": torch.get_rng_state(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("done", [0, 3, 4], ids=["first", "between", "turn"])
def test_an_error_in_any_evaluation_leaves_all_as_it_was(done, dtype):
    """In the searches of single units and in the joint test; then the step is the one without the error."""
    model, opt = build(dtype, **HARD)
    train(model, opt, done)
    twin, twin_opt = copy.deepcopy((model, opt))
    batch = list(tiny_batches(done + 1))[-1]
    expected = take_step(twin, twin_opt, batch)
    for index in itertools.count():
        calls = itertools.count()
        torch.manual_seed(7)
        before, report = snapshot(model, opt), opt.report

        def closure(index=index, calls=calls):
            loss = model(**batch)
            if next(calls) == index:
                raise KeyError("deliberate")
            return loss

        try:
            opt.step(closure)
            break
        except KeyError:
            assert_same(snapshot(model, opt), before)
            assert opt.report is report
    assert index > expected.trials
    assert_same(opt.report.as_dict(), expected.as_dict())
    assert_same(snapshot(model, opt), snapshot(twin, twin_opt))


def test_a_loss_that_is_not_finite_in_searches_is_a_rejection():
    """The loss is NaN where the head has moved far; its first finite trial is what it remembers."""
    model, opt = build(model=TinyTransformer(depth=2, dropout=0.0))
    batch, start = next(tiny_batches(1)), model.head.bias.detach().clone()

    def closure():
        far = (model.head.bias.detach() - start).abs().max() > 0.02  # the first step of Adam moves every entry by η
        return model(**batch) * torch.where(far, math.nan, 1.0)

    opt.step(closure)
    assert opt.report.loss_after < opt.report.loss_before
    assert opt.report.units[-1].trials > 1
    assert 0.01 < opt.report.units[-1].step_size / opt.report.factor <= 0.02
    assert all(math.isfinite(x) for row in memory(opt) for x in row)


def test_a_step_in_which_every_move_gives_nan_moves_nothing():
    model, opt = build(model=TinyTransformer(depth=2, dropout=0.0))
    batch = next(tiny_batches(1))
    train(model, opt, 2)
    start, learned = weights(model), memory(opt, "relative_step", "factor")

    def closure():
        loss = model(**batch)
        return loss if all(map(torch.equal, model.parameters(), start)) else loss * math.nan

    opt.step(closure)
    assert_same(weights(model), start)
    assert (opt.report.factor, opt.report.loss_after) == (0.0, opt.report.loss_before)
    for i, (relative_step, factor) in enumerate(memory(opt, "relative_step", "factor")):
        assert factor == learned[i][1] / 2
        assert relative_step == (learned[i][0] / 2 if i == 0 else learned[i][0]), "it is the turn of unit 0"


def test_where_no_direction_descends_no_trial_is_made():
    """A loss that is flat: no joint test, and the factor stays."""
    model, opt = build(model=TinyTransformer(depth=2, dropout=0.0))
    train(model, opt, 3)
    before, learned, batch = weights(model), memory(opt, "factor", "relative_step"), next(tiny_batches(1))
    opt.step(lambda: 0.0 * model(**batch))
    assert {u.outcome for u in opt.report.units} == {"not_descent"}
    assert (opt.report.trials, opt.report.factor, opt.report.loss_after) == (0, 1.0, 0.0)
    assert_same(weights(model), before)
    assert memory(opt, "factor", "relative_step") == learned


def test_a_unit_that_does_not_descend_stays_and_the_others_move():
    """The averaged direction of one unit points up, and its decay points further up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [{"params": [*m.parameters()], "name": n} for n, m in model.named_children()]
    groups[0]["weight_decay"] = 1e3
    opt, x = fastals.ALS(groups, schedule="relay", direction="sgd"), torch.randn(16, 4)
    with torch.no_grad():
        model[0].weight.fill_(0.1)

    def closure():
        return (model(x) - 30).square().mean() if not flip else -model[0].weight.sum() + model[1].weight.square().sum()

    flip = True
    for _ in range(4):
        opt.step(closure)
        by_name = {u.name: u for u in opt.report.units}
        assert by_name["0"].outcome == "not_descent"
        assert by_name["0"].step_size == 0
        assert by_name["1"].outcome == "accepted"
    assert [g["relative_step"] > 0 for g in opt.param_groups] == [False, True]


def test_a_frozen_unit_has_no_turn():
    model = TinyTransformer(depth=3)
    model.blocks[1].requires_grad_(False)
    model, opt = build(model=model, every=1)
    searched = [[u.name for u in r.units if u.trials] for r in train(model, opt, 9)]
    assert [s[0] for s in searched[1:]] == ["embeddings", "blocks.0", "blocks.2", "head"] * 2


# The defaults


def test_the_relay_is_the_default_with_constants_of_its_own():
    model = TinyTransformer(depth=1)
    opt = fastals.ALS(model)
    assert (opt.settings.schedule, opt.settings.every) == ("relay", 2)
    assert {k: opt.defaults[k] for k in ("c", "trust", "growth")} == {"c": 0.3, "trust": 0.2, "growth": 1.1}
    for schedule in ("sweep", "independent", "cycle", "joint"):
        opt = fastals.ALS(model, schedule=schedule)
        assert opt.settings.every == 1
        assert {k: opt.defaults[k] for k in ("c", "trust", "growth")} == {"c": 0.1, "trust": 0.006, "growth": 1.3}


@pytest.mark.parametrize("schedule", ["relay", "sweep"])
def test_given_constants_are_taken_with_any_schedule(schedule):
    given = {"c": 0.4, "trust": None, "growth": 1.0}
    opt = fastals.ALS(TinyTransformer(depth=1), schedule=schedule, every=5, **given)
    assert opt.settings.every == 5
    assert {k: opt.defaults[k] for k in given} == given


def test_steps_with_gradients_already_there_are_the_same():
    model, opt = build(**HARD)
    twin, twin_opt = build(**HARD)
    for t, batch in enumerate(tiny_batches(6)):
        reports = []
        for net, optimizer, backward in ((model, opt, False), (twin, twin_opt, True)):
            torch.manual_seed(t)
            one_step(optimizer, net, batch, backward)
            reports.append(optimizer.report.as_dict())
        assert_same(*reports)


# Turns


class TwoTasks(nn.Module):
    """A body with a head for each of two tasks that alternate."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

    def forward(self, x, task):
        return self.heads[task](self.body(x).tanh())


@pytest.mark.parametrize("every", [1, 2, "auto"])
@pytest.mark.parametrize("optimizer", [fastals.ALS, EagerALS])
def test_no_unit_misses_its_turns_because_tasks_alternate(optimizer, every):
    """With a search in every second step, those of one task only would search."""
    torch.manual_seed(0)
    model = TwoTasks()
    modules = {"body": model.body, "a": model.heads[0], "b": model.heads[1]}
    groups = [{"name": name, "params": list(module.parameters())} for name, module in modules.items()]
    opt, searched = optimizer(groups, model=model, schedule="relay", every=every), []
    for t in range(60):
        opt.zero_grad()
        x = torch.randn(16, 4)
        opt.step(lambda: (model(x, t % 2) - x.sum(1, keepdim=True)).square().mean())  # noqa: B023
        searched += [(t, u.name) for u in opt.report.units if u.trials]
    steps = {name: [t for t, n in searched if n == name] for name in "ab"}
    waits = {name: max(b - a for a, b in itertools.pairwise([*ts, 60])) for name, ts in steps.items()}
    assert max(waits.values()) <= 4 * 3 * (10 if every == "auto" else every)
    assert all(g["relative_step"] > 0 for g in opt.param_groups)


def test_a_warm_up_from_0_does_not_cost_the_first_search():
    model, opt = build()
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    report = take_step(model, opt, next(tiny_batches(1)))
    assert all(u.trials for u in report.units)
    assert report.joint_trials == 0
    assert all(group["relative_step"] > 0 for group in opt.param_groups)
    assert_same(weights(model), before)


@pytest.mark.parametrize("name", ["c", "trust", "growth", "every"])
def test_a_misspelt_default_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .*, not 'defualt'"):
        fastals.ALS(nn.Linear(2, 2), **{name: "defualt"})
