"""What must hold, one test (or a few) per invariant. ``test_reference.py`` holds the one called same answers."""

import copy
import gc
import io
import itertools
import math
import os
import pickle
import signal
import sys

import pytest
import torch
from helpers.hf import tiny_bert
from helpers.options import HARD_SWEEP
from helpers.tiny import TinyTransformer, assert_same, tiny_batches
from torch import nn

import fastals
from fastals.buffers import Unit
from fastals.kernels import plain

SCHEDULES = ["sweep", "independent", "cycle", "joint", "relay"]


def build(dtype=torch.float32, model=None, **options):
    torch.manual_seed(0)
    model = (TinyTransformer(depth=2) if model is None else model).to(dtype)
    return model, fastals.ALS(model, **(HARD_SWEEP | options))


def train(model, opt, steps, first=0):
    """Steps ``first`` up to ``steps``, each with its own seed; returns the reports."""
    reports = []
    for t, batch in list(enumerate(tiny_batches(steps)))[first:]:
        torch.manual_seed(100 + t)
        opt.step(lambda: model(**batch))  # noqa: B023
        reports.append(opt.report)
    return reports


def snapshot(model, opt):
    """Copies of everything that a refused step must leave alone."""
    return {
        "weights": [p.detach().clone() for p in model.state_dict().values()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "state": copy.deepcopy(opt.state_dict()),
        "rng": torch.get_rng_state(),
    }


# 1. Exact trial


@pytest.mark.parametrize("order", ["top_down", "bottom_up", "random"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_exact_trial(schedule, order):
    """With and without the activation cache every loss, step and weight is the same to the last bit."""
    cached, with_cache = build(schedule=schedule, order=order)
    plain, without = build(schedule=schedule, order=order, cache=False)
    reports = train(cached, with_cache, 10)
    assert_same([r.as_dict() for r in reports], [r.as_dict() for r in train(plain, without, 10)])
    assert_same(list(cached.parameters()), list(plain.parameters()))
    assert sum(r.trials for r in reports) > 20


# 2. Monotone


@pytest.mark.parametrize("momentum", ["none", "tested"])
@pytest.mark.parametrize("schedule", ["sweep", "independent", "joint", "relay"])
def test_monotone(schedule, momentum):
    model, opt = build(torch.float64, schedule=schedule, momentum=momentum, c=0.5)
    moved = 0
    for t, batch in enumerate(tiny_batches(30)):
        state = torch.manual_seed(100 + t).get_state()
        with torch.no_grad():
            before = float(model(**batch))
        torch.set_rng_state(state)
        opt.step(lambda: model(**batch))  # noqa: B023
        torch.set_rng_state(state)
        with torch.no_grad():
            after = float(model(**batch))
        required = sum(0.5 * u.step_size * u.slope for u in opt.report.units)
        assert (opt.report.loss_before, opt.report.loss_after) == (before, after)
        assert after <= before - required + 1e-14, f"step {t}"
        moved += required > 0
    assert moved > 10


def test_monotone_needs_no_descent_from_an_exhausted_search():
    """Where no step helps, the weights and the loss stay as they are."""
    model, opt = build(c=1 - 1e-9, max_trials=1, trust=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    (report,) = train(model, opt, 1)
    assert {u.outcome for u in report.units} == {"exhausted"}
    assert report.loss_after == report.loss_before
    assert_same([p.detach() for p in model.parameters()], before)


# 4. Transactional step


def fail_at(model, batch, index, error):
    """A closure whose ``index``-th evaluation raises, halfway through the model."""
    calls = iter(range(10**6))

    def closure():
        loss = model(**batch)
        if next(calls) == index:
            raise error("in the closure")
        return loss

    return closure


@pytest.mark.slow(keep=29)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("momentum", ["none", "after"])
@pytest.mark.parametrize("done", [0, 3])
def test_transactional_step(schedule, momentum, error, done):
    """Raised at every possible evaluation of the step after ``done`` others; then the step is tried again."""
    model, opt = build(schedule=schedule, momentum=momentum, merge_below=1e9)
    twin, twin_opt = build(schedule=schedule, momentum=momentum, merge_below=1e9)
    train(model, opt, done)
    train(twin, twin_opt, done)
    batch, index = list(tiny_batches(done + 1))[-1], 0
    while True:
        torch.manual_seed(7)
        before, report, grads = snapshot(model, opt), opt.report, [p.grad for p in model.parameters()]
        try:
            opt.step(fail_at(model, batch, index, error))
            break
        except error:
            assert_same(snapshot(model, opt), before)
            assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
            assert opt.report is report
            index += 1
    torch.manual_seed(7)
    twin_opt.step(lambda: twin(**batch))
    assert index >= opt.report.trials + 1
    assert_same(snapshot(model, opt), snapshot(twin, twin_opt))
    assert_same(opt.report.as_dict(), twin_opt.report.as_dict())


@pytest.mark.parametrize("kernel", ["snapshot", "direction", "trial"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_transactional_step_where_a_kernel_runs_out_of_memory(monkeypatch, schedule, kernel):
    """At every call of the kernel up to the commit."""
    model, opt = build(schedule=schedule, momentum="after")
    train(model, opt, 3)
    batch, original, real_commit = list(tiny_batches(4))[-1], getattr(plain, kernel), opt.engine._commit
    before, calls, limit = snapshot(model, opt), 0, 0

    def limited(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == limit:
            raise MemoryError(kernel)
        return original(*args, **kwargs)

    def unlimited_commit(*args, **kwargs):
        nonlocal limit
        limit = math.inf
        real_commit(*args, **kwargs)

    monkeypatch.setattr(plain, kernel, limited)
    monkeypatch.setattr(opt.engine, "_commit", unlimited_commit)
    failures = 0
    while limit < math.inf:
        calls, limit = 0, failures + 1
        torch.set_rng_state(before["rng"])
        try:
            opt.step(lambda: model(**batch))
        except MemoryError:
            failures += 1
            assert_same(snapshot(model, opt), before)
    assert failures >= 4


def test_transactional_step_with_gradients_already_there():
    model, opt = build()
    train(model, opt, 2)
    batch = next(tiny_batches(1))
    opt.zero_grad()
    loss = model(**batch)
    loss.backward()
    for index in range(4):
        before = snapshot(model, opt)
        with pytest.raises(ValueError, match="in the closure"):
            opt.step(fail_at(model, batch, index, ValueError), loss=loss)
        assert_same(snapshot(model, opt), before)
    opt.step(lambda: model(**batch), loss=loss)


def test_transactional_step_in_bfloat16_keeps_master_weights():
    model, opt = build(torch.bfloat16)
    train(model, opt, 3)
    batch = next(tiny_batches(1))
    before = snapshot(model, opt)
    with pytest.raises(MemoryError):
        opt.step(fail_at(model, batch, 3, MemoryError))
    assert_same(snapshot(model, opt), before)


def test_transactional_step_restores_module_buffers():
    """Running statistics that the refused step's forward has written are put back."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    opt = fastals.ALS(model)
    x = torch.randn(16, 4)
    before = snapshot(model, opt)

    def closure():
        loss = model(x).square().mean()
        if not torch.is_grad_enabled():
            raise ValueError("in the first trial")
        return loss

    with pytest.raises(ValueError, match="first trial"):
        opt.step(closure)
    assert_same(snapshot(model, opt), before)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_ctrl_c_during_the_commit_comes_after_it(monkeypatch, call):
    """The signal is held back until the step is whole, so that no half of it is lost."""
    model, opt = build()
    twin, twin_opt = build()
    train(model, opt, 2)
    train(twin, twin_opt, 3)
    calls, advance = iter(range(1, 100)), plain.advance

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        advance(*args, **kwargs)

    monkeypatch.setattr(plain, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, opt, 3, first=2)
    assert next(calls) > call
    assert_same(snapshot(model, opt), snapshot(twin, twin_opt))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_during_the_commit_comes_after_it(monkeypatch):
    """With a handler as those of programs that a scheduler ends."""
    model, opt = build()
    twin, twin_opt = build()
    train(model, opt, 2)
    train(twin, twin_opt, 3)
    advance, before = plain.advance, signal.signal(signal.SIGTERM, lambda *caught: sys.exit(1))

    def terminated(*args, **kwargs):
        advance(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(plain, "advance", terminated)
    try:
        with pytest.raises(SystemExit):
            train(model, opt, 3, first=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert_same(snapshot(model, opt), snapshot(twin, twin_opt))


@pytest.mark.parametrize("count", range(8))
def test_a_step_whose_state_cannot_be_allocated_is_undone(monkeypatch, count):
    """At each of the tensors that count the updates: before the moments advance, which could not be undone."""
    model, opt = build()
    train(model, opt, 2)
    batch, real, calls = list(tiny_batches(3))[-1], Unit._entry, itertools.count()
    before = snapshot(model, opt)

    def limited(*args):
        if next(calls) == count:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(Unit, "_entry", limited)
    with pytest.raises(MemoryError):
        opt.step(lambda: model(**batch))
    assert_same(snapshot(model, opt), before)


def test_ctrl_c_that_comes_amid_a_step_that_fails_is_not_lost(monkeypatch):
    model, opt = build()
    train(model, opt, 2)
    before, batch = snapshot(model, opt), next(tiny_batches(1))

    def broken(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        raise ValueError("in a pass")

    monkeypatch.setattr(plain, "direction", broken)
    with pytest.raises(KeyboardInterrupt) as caught:
        opt.step(lambda: model(**batch))
    assert "in a pass" in str(caught.value.__context__)
    assert_same(snapshot(model, opt), before)


def test_ctrl_c_during_a_trial_undoes_the_step():
    model, opt = build()
    train(model, opt, 2)
    before, batch = snapshot(model, opt), next(tiny_batches(1))

    def closure():
        if not torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGINT)
        return model(**batch)

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert_same(snapshot(model, opt), before)


# 5. RNG


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rng(schedule):
    """All evaluations of a step start from one state; it ends where a plain forward and backward does."""
    model, opt = build(schedule=schedule)
    torch.manual_seed(5)
    first_draws = []
    for batch in tiny_batches(5):
        before = torch.get_rng_state()
        model(**batch)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        seen = []

        def closure():
            seen.append(torch.get_rng_state())  # noqa: B023
            return model(**batch)  # noqa: B023

        opt.step(closure)
        assert len(seen) > 1
        assert all(torch.equal(s, before) for s in seen)
        assert torch.equal(torch.get_rng_state(), after)
        first_draws.append(before)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(first_draws))


def test_rng_with_gradients_already_there():
    """The caller's forward and backward have drawn already; the step draws nothing more."""
    model, opt = build()
    for batch in tiny_batches(3):
        opt.zero_grad()
        loss = model(**batch)
        loss.backward()
        before = torch.get_rng_state()
        opt.step(lambda: model(**batch), loss=loss)  # noqa: B023
        assert torch.equal(torch.get_rng_state(), before)


# 6. Exact resume

RESUMED = {
    "sweep": {},
    "random order": {"order": "random", "initial": "random"},
    "mid-cycle": {"schedule": "cycle", "momentum": "after"},
    "joint": {"schedule": "joint", "reference": "smoothed"},
    "nonmonotone": {"schedule": "independent", "reference": "nonmonotone", "initial": "polyak"},
    "mid-relay": {"schedule": "relay", "every": 3, "momentum": "after"},
    "relay rarely": {"schedule": "relay", "every": "auto", "merge_below": 1e-2, "direction": "sgd", "trust": None},
    "exhausted": {"c": 0.99, "max_trials": 1},
    "merging": {"merge_below": 1e9, "every": "auto"},
    "sgd": {"direction": "sgd", "momentum": "tested", "trust": None},
}


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.slow(keep=9)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_exact_resume(options, dtype):
    """From any of the first steps, through a file, bitwise the same trajectory."""
    model, opt = build(dtype, **options)
    saved = [through_a_file((model.state_dict(), opt.state_dict()))]
    reports = []
    for t in range(8):
        reports += train(model, opt, t + 1, first=t)
        saved.append(through_a_file((model.state_dict(), opt.state_dict())))
    for t in (0, 1, 2, 5, 7):
        again, again_opt = build(dtype, **options)
        again.load_state_dict(saved[t][0])
        again_opt.load_state_dict(saved[t][1])
        assert_same(again_opt.state_dict(), saved[t][1])
        assert_same([r.as_dict() for r in train(again, again_opt, 8, first=t)], [r.as_dict() for r in reports[t:]])
        assert_same(snapshot(again, again_opt), snapshot(model, opt))


def test_the_resumed_cases_are_what_they_are_called():
    model, opt = build(**RESUMED["exhausted"])
    assert any(u.outcome == "exhausted" for r in train(model, opt, 8) for u in r.units)
    model, opt = build(**RESUMED["merging"])
    assert [len(r.units) for r in train(model, opt, 8)][-1] == 2
    model, opt = build(**RESUMED["mid-cycle"])
    assert any(u.outcome == "kept" for r in train(model, opt, 8) for u in r.units)


def test_a_loaded_state_is_a_copy():
    model, opt = build()
    train(model, opt, 2)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    again, again_opt = build()
    again_opt.load_state_dict(saved)
    train(again, again_opt, 3)
    assert_same(saved, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_resume_through_distributed_checkpoint(dtype):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, opt = build(dtype)
    train(model, opt, 3)
    saved = through_a_file((model.state_dict(), get_optimizer_state_dict(model, opt)))
    again, again_opt = build(dtype)
    again.load_state_dict(saved[0])
    set_optimizer_state_dict(again, again_opt, saved[1])
    assert_same(again_opt.state_dict(), opt.state_dict())
    assert_same([r.as_dict() for r in train(again, again_opt, 6, 3)], [r.as_dict() for r in train(model, opt, 6, 3)])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_of_model_and_optimizer_goes_on_alone(copied):
    model, opt = build(schedule="cycle", momentum="after")
    train(model, opt, 3)
    twin, twin_opt = copied((model, opt))
    assert twin_opt.param_groups[0]["params"][0] is next(twin.parameters())
    before = snapshot(model, opt)
    reports = train(twin, twin_opt, 6, first=3)
    torch.set_rng_state(before["rng"])
    assert_same(snapshot(model, opt), before)
    assert_same([r.as_dict() for r in train(model, opt, 6, first=3)], [r.as_dict() for r in reports])
    assert_same(list(twin.parameters()), list(model.parameters()))


# 7. The user's tensors stay the user's


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_users_tensors_stay_the_users(schedule, dtype):
    model, opt = build(dtype, schedule=schedule, momentum="after")
    addresses = [(p, p.data_ptr(), p.untyped_storage().data_ptr()) for p in model.parameters()]
    train(model, opt, 5)
    for p, (old, address, storage) in zip(model.parameters(), addresses, strict=True):
        assert p is old
        assert (p.data_ptr(), p.untyped_storage().data_ptr()) == (address, storage)
        assert p.grad.dtype == p.dtype
    users = storages([*model.parameters(), *(p.grad for p in model.parameters())])
    assert len(users) == 2 * len(addresses), "no two of the user's tensors share a storage"
    ours = storages(v for s in opt.state.values() for v in s.values())
    assert not users & ours


def test_gradients_are_those_of_a_plain_backward():
    model, opt = build(max_grad_norm=0.1, weight_decay=0.1)
    train(model, opt, 2)
    batch = next(tiny_batches(1))
    twin = copy.deepcopy(model)
    twin.zero_grad()
    torch.manual_seed(3)
    twin(**batch).backward()
    torch.manual_seed(3)
    opt.step(lambda: model(**batch))
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def bert():
    return tiny_bert(vocab_size=32, num_labels=4, max_position_embeddings=16)


def tiny_gpt2():
    """Tied: the head is the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def five_steps(model, lm=False, **options):
    opt = fastals.ALS(model, **options)
    for batch in tiny_batches(5):
        ids = batch["tokens"]
        opt.step(lambda: model(input_ids=ids, labels=ids if lm else batch["labels"]).loss)  # noqa: B023
    assert any(u.step_size for u in opt.report.units)
    return opt


@pytest.mark.parametrize(("make", "lm"), [(bert, False), (tiny_gpt2, True)], ids=["bert", "tied gpt2"])
def test_saved_models_reload_bitwise(make, lm, tmp_path):
    import accelerate
    from safetensors.torch import load_model

    model = make()
    five_steps(model, lm, schedule="independent")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    if lm:
        assert model.lm_head.weight is model.transformer.wte.weight

    model.save_pretrained(tmp_path / "pretrained")
    assert_same(dict(type(model).from_pretrained(tmp_path / "pretrained").state_dict()), weights)

    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "accelerate")
    other = make()
    load_model(other, tmp_path / "accelerate" / "model.safetensors")
    assert_same(dict(other.state_dict()), weights)

    torch.save(model, tmp_path / "model.pt")
    assert_same(dict(torch.load(tmp_path / "model.pt", weights_only=False).state_dict()), weights)
    assert_same(dict(copy.deepcopy(model).state_dict()), weights)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # within PEFT
def test_saved_adapters_reload_bitwise(tmp_path):
    import peft

    def wrapped():
        config = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"], lora_dropout=0.1)
        return peft.get_peft_model(bert(), config)

    model = wrapped()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    five_steps(model)
    moved = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert frozen
    assert_same({n: p.detach() for n, p in model.named_parameters() if n in frozen}, frozen)
    assert any(torch.count_nonzero(p) for n, p in moved.items() if "lora_B" in n), "adapters start at 0 and must move"
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bert(), tmp_path)
    loaded = dict(again.named_parameters())
    assert_same({n: loaded[n].detach() for n in moved}, {n: p.detach() for n, p in moved.items()})


# 8. Nothing grows


@pytest.mark.slow(keep=3)
@pytest.mark.filterwarnings("ignore:fastals. 20 steps in a row have not moved:UserWarning")  # all is learned by then
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_grows(schedule):
    model, opt = build(schedule=schedule, every="auto", momentum="after")
    batches = list(tiny_batches(3))

    def held_after(steps):
        for t in range(steps):
            opt.step(lambda: model(**batches[t % 3]))  # noqa: B023
        gc.collect()
        alive = gc.get_objects()
        tensors = [o for o in alive if issubclass(type(o), torch.Tensor)]
        keys = [sorted(d) for d in (*opt.param_groups, *opt.state.values())]
        return len(tensors), sum(t.numel() for t in tensors), keys, len(alive)

    *tensors, objects = held_after(70)  # reports of the last 64 steps are kept
    *later_tensors, later_objects = held_after(50)
    assert later_tensors == tensors
    assert later_objects - objects < 50, "less than one object per step"


# 9. Clear errors: those that the tables of test_bad_inputs.py do not hold


@pytest.fixture
def trained():
    model, opt = build()
    train(model, opt, 2)
    return model, opt


def backward_itself(model, batch):
    loss = model(**batch)
    loss.backward()
    return loss


def test_clear_error_for_a_closure_that_is_not_repeatable():
    model, opt = build()
    batches, before = tiny_batches(100), snapshot(model, opt)
    with pytest.raises(ValueError, match=r"and then .* for the same weights"):
        opt.step(lambda: model(**next(batches)))
    assert_same(snapshot(model, opt), before)


def test_clear_error_for_a_closure_that_calls_backward_in_a_trial(trained):
    model, opt = trained
    batch = next(tiny_batches(1))
    loss = model(**batch)
    loss.backward()
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match="called backward"):
        opt.step(lambda: backward_itself(model, batch), loss=loss)
    assert_same(snapshot(model, opt), before)


def test_clear_error_for_a_loss_that_is_not_the_closures():
    model, opt = build(model=TinyTransformer(depth=2, dropout=0.0))
    batch = next(tiny_batches(1))
    loss = model(**batch)
    loss.backward()
    with pytest.raises(ValueError, match="is not what the closure returns"):
        opt.step(lambda: model(**batch), loss=loss / 4)


def test_clear_errors_for_units():
    model = TinyTransformer()
    groups = fastals.units(model)
    with pytest.raises(ValueError, match="more than one parameter group"):
        fastals.ALS([*groups, {"name": "again", "params": [model.head.weight], "param_names": ["head.weight"]}])
    with pytest.raises(ValueError, match=r"trainable parameters are in no unit, 'embed.weight' first"):
        fastals.ALS(groups[1:], model=model)
    with pytest.raises(ValueError, match="parameters that the model does not have"):
        fastals.ALS([*groups, *fastals.units(TinyTransformer())], model=model)
    with pytest.raises(ValueError, match="no trainable parameter"):
        fastals.ALS(TinyTransformer().requires_grad_(False))


def test_clear_error_for_the_state_of_another_partition():
    model = TinyTransformer(depth=2)
    opt = fastals.ALS(fastals.units(model, by=2), model=model)
    train(model, opt, 2)
    before = snapshot(model, opt)
    for other in (fastals.units(model, by="model"), fastals.units(model), fastals.units(model, by=2)[::-1]):
        state = fastals.ALS(other).state_dict()
        with pytest.raises(ValueError, match=r"the state was saved with units .* same fastals.units"):
            opt.load_state_dict(state)
    assert_same(snapshot(model, opt), before)


@pytest.mark.parametrize("named", [True, False])
def test_clear_error_for_the_state_of_another_model(named):
    """torch itself would spread a moment of another shape over the parameter."""
    model, others = TinyTransformer(width=8), [TinyTransformer(width=4), TinyTransformer(width=16)]
    opts = [fastals.ALS(m if named else [{"params": [*m.parameters()]}]) for m in (model, *others)]
    for m, opt in zip((model, *others), opts, strict=True):
        train(m, opt, 2)
    before = snapshot(model, opts[0])
    for other in opts[1:]:
        with pytest.raises(ValueError, match=r"saved with another model: its exp_avg_sq has the shape"):
            opts[0].load_state_dict(other.state_dict())
    assert_same(snapshot(model, opts[0]), before)


def test_clear_error_for_parameters_converted_after_construction(trained):
    model, opt = trained
    model.double()
    before = [p.detach().clone() for p in model.parameters()]
    batch = next(tiny_batches(1))
    with pytest.raises(RuntimeError, match=r"torch.float32.*torch.float64.*before making the optimizer"):
        opt.step(lambda: model(**batch))
    assert_same([p.detach() for p in model.parameters()], before)
