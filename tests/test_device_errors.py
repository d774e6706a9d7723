"""What fused steps refuse, and that a refused or interrupted step leaves everything as it was.

Without a GPU the kernels are interpreted: the same code, slowly.
"""

import itertools
import math
import signal
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from helpers.fused import CUDA, BrokenError, batches, build, holding, optimizer, snapshot, train
from helpers.options import HARD
from helpers.tiny import TinyTransformer, assert_same

import fastals
from fastals import device as device_module
from fastals import kernels
from fastals.kernels import all_units, moments

pytestmark = pytest.mark.proves(claim="fused-optimizer")


@pytest.mark.slow(keep=3)
@pytest.mark.parametrize(
    ("schedule", "steps", "at"),
    [("sweep", 0, 1), ("sweep", 0, 4), ("sweep", 2, 2), ("sweep", 2, 4), ("independent", 2, 1), ("independent", 2, 5),
     ("cycle", 2, 1), ("joint", 2, 1), ("joint", 2, 3)],
)  # fmt: skip
def test_an_error_in_a_trial_leaves_everything_as_it_was(schedule, steps, at):
    """The ``at``-th evaluation after the first fails."""
    model, opt = build(schedule=schedule, **HARD)
    data = batches(4)
    train(model, opt, data[:steps])
    calls = iter(range(100))

    def closure():
        if next(calls) == at:
            raise BrokenError
        return model(**data[2])

    torch.manual_seed(5)
    before = snapshot(model, opt)
    with pytest.raises(BrokenError):
        opt.step(closure)
    assert_same(snapshot(model, opt), before)
    opt.step(lambda: model(**data[2]))


@pytest.mark.parametrize("schedule", ["sweep", "joint"])
def test_a_flag_that_never_says_stop_ends_in_an_error_and_not_in_a_loop(schedule, monkeypatch):
    model, opt = build(schedule=schedule, **HARD)
    data = batches(3)
    train(model, opt, data[:2])
    before, calls = snapshot(model, opt), []

    def closure():
        calls.append(None)
        return model(**data[2])

    monkeypatch.setattr(device_module, "read_flags", lambda flags: [1, 0, 0, 0])
    with pytest.raises(RuntimeError, match="goes on after 5 trials, more than max_trials"):
        opt.step(closure)
    assert len(calls) == 2 + 5, "the gradient's forward, the check of the recorded outputs, the trials"
    assert_same(snapshot(model, opt), before)
    monkeypatch.undo()
    opt.step(closure)


def test_a_loss_that_is_not_finite_is_refused_and_nothing_moves():
    model, opt = build(**HARD)
    data = batches(3)
    train(model, opt, data[:2])
    before = snapshot(model, opt)
    with pytest.raises(FloatingPointError, match="loss at the current weights is nan"):
        opt.step(lambda: model(**data[2]) * math.nan)
    assert_same(snapshot(model, opt), before)
    train(model, opt, data[2:])


def spoilt(gradient, value):
    """The gradient with one bad number."""
    gradient = gradient.clone()
    gradient.view(-1)[0] = value
    return gradient


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["fused", "plain", "eager"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_a_gradient_that_is_not_finite_leaves_its_unit_out_and_clips_nobody(kind, bad):
    torch.manual_seed(0)
    model = TinyTransformer(depth=2).to(CUDA)
    model.head.weight.register_hook(lambda g: spoilt(g, bad))
    opt = optimizer(kind, model, max_grad_norm=0.1)
    train(model, opt, batches(1))
    assert all(opt.state[p]["exp_avg_sq"].any() for p in [*model.embed.parameters(), *model.blocks.parameters()])
    outcomes = {u.name: u.outcome for u in opt.report.units}
    assert outcomes.pop("head") == "not_descent"
    assert set(outcomes.values()) == {"accepted"}


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["dropped", "zeroed"])
@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_closure_that_zeroes_the_gradients_does_no_harm(kind, set_to_none, first):
    reports, data = [], batches(2)
    for zeroes in (True, False):
        torch.manual_seed(0)
        model = TinyTransformer(depth=1).to(CUDA)
        opt = optimizer(kind, model)
        if not first:
            train(model, opt, data[:1])
        torch.manual_seed(1)

        def closure():
            if zeroes:  # noqa: B023
                opt.zero_grad(set_to_none)  # noqa: B023
            return model(**data[1])  # noqa: B023

        opt.step(closure)
        assert any(p.grad.any() for p in model.parameters())
        reports.append(opt.report.as_dict())
    assert_same(reports[0], reports[1])


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_first_step_at_a_loss_that_is_not_finite_is_refused(kind):
    torch.manual_seed(0)
    model = TinyTransformer(depth=1).to(CUDA)
    opt = optimizer(kind, model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="loss at the current weights is nan"):
        opt.step(lambda: model(**batches(1)[0]) * math.nan)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert opt.param_groups[0]["count"] == 0
    train(model, opt, batches(1))
    assert opt.report.loss_after < opt.report.loss_before


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_kept_step_at_a_loss_that_is_not_finite_is_refused(kind):
    torch.manual_seed(0)
    model = TinyTransformer(depth=1).to(CUDA)
    opt = optimizer(kind, model, schedule="sweep", every=2)
    data = batches(2)
    train(model, opt, data[:1])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError):
        opt.step(lambda: model(**data[1]) * math.nan)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert (opt.param_groups[0]["count"], len(opt.reports)) == (1, 1)
    train(model, opt, data[1:], start=1)
    assert {u.outcome for u in opt.report.units} == {"kept"}


def shrink(weight):
    weight.data = weight.data[:1].clone()


def transpose(weight):
    weight.data = weight.data.t()


@pytest.mark.parametrize(("change", "message"), [(shrink, "resize|elements"), (transpose, "not contiguous")])
def test_a_parameter_that_is_not_what_it_was_is_refused(change, message):
    weight = torch.nn.Parameter(torch.randn(16, 16, device=CUDA))
    opt = fastals.ALS([{"name": "all", "params": [weight]}], fused=True)
    opt.step(lambda: weight.square().sum())
    weight.grad = None
    change(weight)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match=message):
        opt.step(lambda: weight.square().sum(), loss=weight.detach().square().sum())


def test_a_sparse_gradient_is_named_as_on_the_plain_path():
    model = torch.nn.Embedding(8, 4, sparse=True).to(CUDA)
    opt = fastals.ALS([{"name": "all", "params": list(model.parameters())}], fused=True)
    with pytest.raises(RuntimeError, match=r"sparse gradient.*sparse=False"):
        opt.step(lambda: model(torch.tensor([1, 2], device=CUDA)).square().sum())


@pytest.mark.filterwarnings("ignore:fastals. no parameter of the optimizer has a gradient:UserWarning")
@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_gradient_norm_without_gradients_is_no_error(kind):
    weight = torch.nn.Parameter(torch.ones(8, device=CUDA))
    opt = optimizer(kind, holding(weight), max_grad_norm=1.0)
    opt.step(lambda: weight.detach().sum(), loss=8.0)
    assert opt.report.units == []


@pytest.mark.slow(keep=1)
@pytest.mark.filterwarnings("ignore:fastals")
@pytest.mark.parametrize(("schedule", "missing"), [("sweep", "raises"), ("cycle", "is another loss")])
@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_loss_that_comes_to_need_what_hooks_collect_is_noticed_in_that_step(kind, schedule, missing):
    """A replayed block calls no hook: the loss then finds nothing, or too little, and raises or is another one."""
    torch.manual_seed(0)
    model = TinyTransformer(depth=3, dropout=0.0).to(CUDA)
    seen, inside = [], False
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, output: seen.append(output))

    def closure():
        seen.clear()
        loss = model(**batch)
        if not inside or (missing == "is another loss" and not seen):
            return loss
        return loss + 0.1 * seen[2].square().mean()

    opt, (batch,) = optimizer(kind, model, schedule=schedule), batches(1)
    for inside in (False, False, True, True, False, False):
        opt.step(closure)
        assert opt.engine.learned.replays is not inside
    assert set(opt.engine.learned.verdicts[True].values()) == {True}, "what was trusted before still is"


def misjudge(monkeypatch):
    """Have the first look of the next step say that the cache was misjudged."""
    turned, plain = iter([True]), device_module.replay_outdated
    monkeypatch.setattr(device_module, "replay_outdated", lambda *args: plain(*args) | next(turned, False))


@pytest.mark.parametrize("given", [False, True])
def test_a_step_that_starts_anew_starts_from_its_own_loss(given, monkeypatch):
    """Even if the closure has written another loss to the tensor that it returns."""
    model, opt = build(depth=1)
    (batch,) = batches(1)
    train(model, opt, [batch])
    misjudge(monkeypatch)
    static, begun, plain_begin = torch.zeros((), device=CUDA), [], all_units.begin

    def closure():
        loss = model(**batch)
        static.copy_(loss.detach())
        return static if given else loss

    monkeypatch.setattr(all_units, "begin", lambda a, x, **how: (begun.append(float(x)), plain_begin(a, x, **how)))
    opt.zero_grad()
    loss = model(**batch)
    if given:
        loss.backward()
    opt.step(closure, loss=loss.detach() if given else None)
    assert len(begun) > 1
    assert len(set(begun)) == 1


def test_an_interrupt_of_a_step_that_starts_anew_leaves_everything_as_it_was(monkeypatch):
    model, opt = build(depth=1)
    (batch,), plain_restore = batches(1), all_units.restore
    train(model, opt, [batch])
    misjudge(monkeypatch)
    before = snapshot(model, opt)

    def interrupted(arena):
        plain_restore(arena)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(all_units, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step(lambda: model(**batch))
    monkeypatch.undo()
    assert_same(snapshot(model, opt)[0], before[0])
    opt.step(lambda: model(**batch))


@pytest.mark.parametrize("kernel", ["advance", "remember"])
def test_a_kernel_of_the_commit_that_cannot_be_compiled_is_met_before_it(kernel, monkeypatch):
    model, opt = build(depth=1)
    (batch,) = batches(1)
    before, module, launched = snapshot(model, opt), moments if kernel == "advance" else all_units, []

    def failing(compiled, programs, *, compile_only):
        launched.append((compiled, compile_only))
        if compile_only and compiled is getattr(module, f"{kernel}_kernel"):
            raise BrokenError
        return lambda **_: None

    for place in (moments, all_units):
        monkeypatch.setattr(place, "launched", failing)
    with pytest.raises(BrokenError):
        opt.step(lambda: model(**batch))
    assert all(compile_only for _, compile_only in launched)
    monkeypatch.undo()
    assert_same(snapshot(model, opt)[0], before[0])
    opt.step(lambda: model(**batch))


@pytest.mark.parametrize(
    ("where", "name", "fails"), [(device_module, "trial", 0), (all_units, "begin", 1)], ids=["trial", "begin"]
)
def test_units_are_put_back_after_a_launch_that_has_failed_to_do_so(where, name, fails, monkeypatch):
    """Amid the verification of the first step, whose weights are far from w_t then and again after it."""
    model, opt = build(depth=1)
    (batch,), plain, calls = batches(1), getattr(where, name), itertools.count()
    before = snapshot(model, opt)

    def failing(*args, **kwargs):
        if next(calls) == fails:
            raise BrokenError
        plain(*args, **kwargs)

    monkeypatch.setattr(where, name, failing)
    with pytest.raises(BrokenError):
        opt.step(lambda: model(**batch))
    monkeypatch.undo()
    assert next(calls) > 2
    assert_same(snapshot(model, opt)[0], before[0])
    opt.step(lambda: model(**batch))


def test_units_that_cannot_be_made_again_leave_the_state_as_it_was(monkeypatch):
    """They are after a merge and a load; state that shows what is not written yet would be read at the next try."""
    model, opt = build(depth=1)
    data = batches(3)
    train(model, opt, data[:2])
    opt.load_state_dict(opt.state_dict())
    before = snapshot(model, opt)

    def failing(units):
        raise torch.OutOfMemoryError("deliberate")

    monkeypatch.setattr(device_module.DeviceUnits, "_fill_arena", failing)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step(lambda: model(**data[2]))
    monkeypatch.undo()
    assert_same(snapshot(model, opt), before)


@pytest.mark.parametrize(
    ("capability", "compiler", "reason"),
    [((7, 5), "/bin/gcc", "compute capability 7.5"), ((9, 0), None, "no C compiler"), ((9, 0), "/bin/gcc", "")],
)
def test_a_gpu_on_which_nothing_can_be_compiled_is_named(monkeypatch, capability, compiler, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("shutil.which", lambda name: compiler)
    monkeypatch.delenv("CC", raising=False)
    param = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, is_contiguous=lambda: True)
    found = kernels.why_not_fused([param])
    assert reason in found
    assert bool(found) == bool(reason)


def test_fused_is_refused_where_it_cannot_be_and_says_why(monkeypatch):
    model = TinyTransformer().to(CUDA, torch.float64)
    with pytest.raises(ValueError, match="float64"):
        fastals.ALS(model, fused=True)
    fastals.ALS(model, fused="auto")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="need a CUDA device"):
            fastals.ALS(TinyTransformer(), fused=True)
    with pytest.raises(ValueError, match="fused must be"):
        fastals.ALS(model, fused="yes")


@pytest.mark.parametrize("broken", [0, 1])
def test_a_survey_that_fails_between_two_dtypes_leaves_no_unit_moved(broken, monkeypatch):
    """The snapshots of one dtype are of this step then, and those of the other of the step before."""
    torch.manual_seed(0)
    low, high = torch.nn.Linear(4, 4).bfloat16().to(CUDA), torch.nn.Linear(4, 1).to(CUDA)
    params, x = [*low.parameters(), *high.parameters()], torch.randn(8, 4, device=CUDA)
    opt = fastals.ALS([{"params": params, "name": "all"}], fused=True, every=100)

    def closure():
        return (high(low(x.bfloat16()).float()) - 1).square().mean()

    for _ in range(2):
        opt.step(closure)
    before, launched, plain = [p.detach().clone() for p in params], itertools.count(), moments._survey_chunks

    def breaking(*args, **kwargs):
        if next(launched) == broken:
            raise BrokenError
        plain(*args, **kwargs)

    monkeypatch.setattr(moments, "_survey_chunks", breaking)
    with pytest.raises(BrokenError):
        opt.step(closure)
    assert_same([p.detach() for p in params], before)
    monkeypatch.undo()
    opt.step(closure)
    assert opt.report.loss_after < opt.report.loss_before
