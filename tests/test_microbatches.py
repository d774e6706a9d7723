"""Micro-batches: one forward and backward of each, and trials of their sum; the caller's own backward."""

import itertools
import math
import weakref

import pytest
import torch
from helpers.audit import generators, nothing_lost, set_generators
from helpers.hf import DEVICE, tiny_bert
from helpers.nets import Net, labelled
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fastals
from fastals.eager import EagerALS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:None of the inputs have requires_grad:UserWarning"
    ),  # in trials, without gradients
]

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(dtype=torch.float32, **config):
    model = tiny_bert(vocab_size=50, num_labels=3, **config).to(DEVICE, dtype).train()
    for layer in model.bert.encoder.layer:  # its gradient is 0 up to rounding, which decides what counts as moving
        layer.attention.self.key.bias.requires_grad_(False)
    return model


def texts(seed, size=8):
    ids = torch.randint(1, 50, (size, 12), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return {"input_ids": ids, "labels": ids[:, 0] % 3}


def parts_of(batch, count):
    """The batch cut into micro-batches."""
    chunks = {k: v.chunk(count) for k, v in batch.items()}
    return [{k: v[i] for k, v in chunks.items()} for i in range(count)]


def closures(model, batch, count, scale=1.0):
    return [lambda b=b: model(**b).loss * scale for b in parts_of(batch, count)]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def decisions(report):
    return [(u.name, u.trials, u.outcome) for u in report.units], report.joint_trials, report.factor


@pytest.mark.parametrize("options", [{}, {"schedule": "sweep"}, {"schedule": "independent", "weight_decay": 0.1},
                                     {"max_grad_norm": 0.5}], ids=str)  # fmt: skip
def test_four_times_two_is_one_times_eight(options):
    whole, cut = bert(torch.float64, **NO_DROPOUT), bert(torch.float64, **NO_DROPOUT)
    one, four = fastals.ALS(whole, **options), fastals.ALS(cut, **options)
    for seed in range(8):
        batch = texts(seed)
        a = one.step(lambda batch=batch: whole(**batch).loss)
        b = four.step(closures(cut, batch, 4, scale=1 / 4))
        assert float(a) == pytest.approx(float(b), rel=1e-9)
        assert decisions(one.report) == decisions(four.report)
        assert one.report.loss_after == pytest.approx(four.report.loss_after, rel=1e-9)
    assert torch.allclose(weights(whole), weights(cut), rtol=0, atol=1e-8)


@pytest.mark.parametrize("schedule", ["relay", "sweep"])
def test_same_answers_as_the_eager_twin(schedule):
    fast, slow = bert(torch.float64, **DROPOUT), bert(torch.float64, **DROPOUT)
    opt, twin = fastals.ALS(fast, schedule=schedule), EagerALS(slow, schedule=schedule)
    for seed in range(5):
        torch.manual_seed(seed)
        opt.step(closures(fast, texts(seed), 3))
        torch.manual_seed(seed)
        twin.step(closures(slow, texts(seed), 3))
        assert decisions(opt.report) == decisions(twin.report)
    assert torch.allclose(weights(fast), weights(slow), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"cache": "check"}, {"cache": "check", "schedule": "sweep"}, {"cache": False},
                                     {"fused": True, "max_trials": 3}], ids=str)  # fmt: skip
def test_every_trial_sees_the_masks_of_the_first_forwards(options):
    """The loss after the step is that of a plain loop over the micro-batches from the step's first state."""
    if "fused" in options:
        pytest.importorskip("triton")
    model = bert(**DROPOUT)
    opt = fastals.ALS(model, **options)
    for seed in range(4):
        micro = closures(model, texts(seed), 4)
        before = generators()
        opt.step(micro)
        after = generators()
        set_generators(before)
        with torch.no_grad():
            assert float(sum(c() for c in micro)) == opt.report.loss_after
        assert opt.report.loss_after <= opt.report.loss_before
        assert torch.equal(torch.get_rng_state(), after["torch"])  # as a plain loop leaves it


def test_gradients_are_those_of_a_plain_loop():
    model, twin = bert(**DROPOUT), bert(**DROPOUT)
    opt = fastals.ALS(model)
    torch.manual_seed(3)
    opt.step(closures(model, texts(0), 4))
    torch.manual_seed(3)
    for closure in closures(twin, texts(0), 4):
        closure().backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs if p.requires_grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_micro_batches(reentrant):
    """The backward of a micro-batch calls modules again, which is no call of the forward."""
    plain, checkpointed = bert(**DROPOUT), bert(**DROPOUT)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    a, b = fastals.ALS(plain), fastals.ALS(checkpointed)
    for seed in range(4):
        torch.manual_seed(seed)
        a.step(closures(plain, texts(seed), 3))
        torch.manual_seed(seed)
        b.step(closures(checkpointed, texts(seed), 3))
    assert torch.equal(weights(plain), weights(checkpointed))
    assert a.last_forwards == b.last_forwards


def test_no_forward_is_added():
    model = bert(**DROPOUT)
    opt, runs = fastals.ALS(model, every=1000, schedule="joint"), 0  # whole forwards: every step moves all units
    model.register_forward_pre_hook(lambda *_: count())

    def count():
        nonlocal runs
        runs += 1

    for seed in range(6):
        runs = 0
        opt.step(closures(model, texts(seed), 4))
    assert runs == 4 * (2 + opt.report.trials)  # gradients, the look at the replay, and the trials


class Alive:
    """Tensors that backward passes still need, at most at any time."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        self.now += tensor.numel()
        self.most = max(self.most, self.now)
        kept = Kept(tensor.detach())  # an output itself would hold its own graph
        weakref.finalize(kept, self._gone, tensor.numel())
        return kept

    def _gone(self, size):
        self.now -= size


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def test_one_graph_at_a_time_is_in_memory():
    most = {}
    for count in (1, 4):
        model, alive = bert(**DROPOUT), Alive()
        opt = fastals.ALS(model)
        with torch.autograd.graph.saved_tensors_hooks(alive.pack, lambda kept: kept.tensor):
            opt.step(closures(model, texts(0, size=2 * count), count))
        most[count] = alive.most
    assert most[4] == most[1]


def test_running_statistics_see_every_micro_batch_once():
    def build():
        torch.manual_seed(1)
        return Net(blocks=[nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()) for _ in range(2)]).train()

    model, twin = build(), build()
    micro = [labelled(8) for _ in range(3)]
    fastals.ALS(model).step([lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in micro])
    for x, _ in micro:
        twin(x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5, 6])
def test_transactional_step_where_one_micro_batch_fails(failing):
    """In the forward of the second, between two backward passes, or in a trial."""
    model, calls = bert(**DROPOUT), itertools.count(1)
    opt = fastals.ALS(model)

    def closure(batch):
        if next(calls) == failing:
            raise OSError("no data")
        return model(**batch).loss

    micro = [lambda b=b: closure(b) for b in parts_of(texts(0), 2)]
    with nothing_lost(opt, model, error=OSError):
        opt.step(micro)
    failing = 0
    opt.step(micro)
    assert opt.report.loss_after < opt.report.loss_before


def test_another_number_of_micro_batches_in_every_step():
    model = bert(**DROPOUT)
    opt = fastals.ALS(model, cache="check")
    for seed, count in enumerate([4, 1, 3, 4, 2, 1]):
        opt.step(closures(model, texts(seed), count, scale=1 / count))
        assert opt.report.loss_after <= opt.report.loss_before


def test_micro_batches_as_one_function():
    one, other = bert(**DROPOUT), bert(**DROPOUT)
    for model, wrap in ((one, list), (other, fastals.MicroBatches)):
        torch.manual_seed(0)
        fastals.ALS(model).step(wrap(closures(model, texts(0), 4)))
    assert torch.equal(weights(one), weights(other))


def test_gradients_of_micro_batches_that_are_there_already():
    model = bert(torch.float64, **NO_DROPOUT)
    twin = bert(torch.float64, **NO_DROPOUT)
    opt, other = fastals.ALS(model), fastals.ALS(twin)
    for seed in range(3):
        opt.zero_grad()
        micro = closures(model, texts(seed), 4)
        losses = [c() for c in micro]
        for loss in losses:
            loss.backward()
        opt.step(micro, loss=sum(losses))
        other.step(closures(twin, texts(seed), 4))
    assert torch.equal(weights(model), weights(twin))


# The caller's own backward


def test_a_backward_that_divides_makes_the_loss_smaller():
    model, twin = bert(**DROPOUT), bert(**DROPOUT)
    opt, other = fastals.ALS(model, cache="check"), fastals.ALS(twin)
    for seed in range(4):
        torch.manual_seed(seed)
        a = opt.step(closures(model, texts(seed), 4), backward=lambda loss: (loss / 4).backward())
        torch.manual_seed(seed)
        b = other.step(closures(twin, texts(seed), 4, scale=1 / 4))
        assert (a, opt.report) == (b, other.report)
    assert torch.equal(weights(model), weights(twin))


def test_a_plain_backward_changes_nothing():
    model, twin = bert(**DROPOUT), bert(**DROPOUT)
    for m, options in ((model, {"backward": lambda loss: loss.backward()}), (twin, {})):
        torch.manual_seed(0)
        fastals.ALS(m).step(lambda m=m: m(**texts(0)).loss, **options)
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("backward", "message"), [
    (lambda loss: (loss * 65536).backward(), "multiplied the loss by 65536.*unscale_"),
    (lambda loss: (-loss).backward(), "multiplied the loss by -1"),
    (lambda loss: None, "must take the gradient of the loss"),
    (lambda loss: loss.detach(), "must take the gradient of the loss"),
])  # fmt: skip
def test_a_backward_of_another_loss_is_refused(backward, message, fused):
    if fused:
        pytest.importorskip("triton")
    model = bert(**NO_DROPOUT)
    opt = fastals.ALS(model, fused=fused)
    with nothing_lost(opt, model, error=RuntimeError, match=message):
        opt.step(lambda: model(**texts(0)).loss, backward=backward)


@pytest.mark.parametrize("config", [DROPOUT, NO_DROPOUT], ids=["dropout", "no dropout"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_that_a_scaler_has_scaled(config, checkpointed):
    model, twin = bert(**config), bert(**config)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    opt, batch = fastals.ALS(model), texts(0)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**16)
    torch.manual_seed(1)
    loss = model(**batch).loss
    scaler.scale(loss).backward()
    with nothing_lost(opt, model, error=RuntimeError, match="times as long.*unscale_"):
        opt.step(lambda: model(**batch).loss, loss=loss)
    scaler.unscale_(opt)
    opt.step(lambda: model(**batch).loss, loss=loss)
    torch.manual_seed(1)
    plain = twin(**batch).loss
    plain.backward()
    other = fastals.ALS(twin)
    other.step(lambda: twin(**batch).loss, loss=plain)
    assert decisions(opt.report) == decisions(other.report)
    assert torch.allclose(weights(model), weights(twin), rtol=0, atol=1e-6)


def test_gradients_summed_over_more_than_the_closure_are_refused():
    model = bert(**NO_DROPOUT)
    opt, batch = fastals.ALS(model), texts(0)
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
    with pytest.raises(RuntimeError, match="2 times as long"):
        opt.step(lambda: model(**batch).loss, loss=loss)


def test_clipped_gradients_are_taken():
    model = bert(**NO_DROPOUT)
    opt, batch = fastals.ALS(model), texts(0)
    loss = model(**batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    opt.step(lambda: model(**batch).loss, loss=loss)
    assert opt.report.loss_after < opt.report.loss_before


# What is no list of closures


@pytest.mark.parametrize("wrong", [[], [None], [torch.zeros(())], torch.zeros(()), 3.0, "loss", {"a": 1}], ids=repr)
def test_what_is_no_closure_is_refused(wrong):
    model = bert()
    opt = fastals.ALS(model)
    with nothing_lost(opt, model, error=TypeError, match="closure"):
        opt.step(wrong)


def test_a_closure_that_calls_backward_between_others_is_refused():
    model = bert()
    opt, micro = fastals.ALS(model), closures(model, texts(0), 3)

    def wrong():
        loss = micro[1]()
        loss.backward()
        return loss

    with nothing_lost(opt, model, error=RuntimeError, match="called backward itself"):
        opt.step([micro[0], wrong, micro[2]])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_micro_batch_whose_loss_is_not_finite(which):
    model = bert()
    opt, micro = fastals.ALS(model), closures(model, texts(0), 3)
    good = micro[which]
    micro[which] = lambda: good() * float("nan")
    with nothing_lost(opt, model, error=FloatingPointError, match="nan"):
        opt.step(micro)


def test_gradients_that_are_there_need_no_backward():
    model = bert()
    opt = fastals.ALS(model)
    with nothing_lost(opt, model, error=TypeError, match="pass one of them"):
        opt.step(lambda: model(**texts(0)).loss, loss=1.0, backward=lambda loss: loss.backward())


class WrittenLate(nn.Module):
    """From its second step on the forward writes a large buffer."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), 0
        self.register_buffer("table", torch.zeros(1 << 17))

    def forward(self, x):
        if self.calls:
            self.table.add_(0.01)
        return self.net(x) + self.table[:3]


def test_a_step_that_starts_again_divides_once():
    model, micro = WrittenLate().to(DEVICE), [[t.to(DEVICE) for t in labelled(8)] for _ in range(2)]
    opt = fastals.ALS(model)
    closures_ = [lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in micro]
    opt.step(closures_, backward=lambda loss: (loss / 2).backward())
    model.calls += 1
    with pytest.warns(UserWarning, match="for the first time"):
        opt.step(closures_, backward=lambda loss: (loss / 2).backward())
    assert opt.report.loss_after < opt.report.loss_before < 2


@pytest.mark.parametrize("clears", [False, True])
def test_a_closure_in_the_manner_of_torch_keeps_the_gradients_that_are_there(clears):
    """It calls backward where gradients are enabled; they have been clipped since."""
    model = bert(**NO_DROPOUT)
    opt = fastals.ALS(model)

    def closure():
        loss = model(**texts(0)).loss
        if torch.is_grad_enabled():
            if clears:
                opt.zero_grad()
            loss.backward()
        return loss

    loss = closure()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    opt.step(closure, loss=loss)
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if n in grads)


@pytest.mark.parametrize("changed", ["infinite", "noise", "decay"])
def test_gradients_that_are_no_multiple_are_taken(changed):
    model = bert(**NO_DROPOUT)
    opt = fastals.ALS(model)
    loss = model(**texts(0)).loss
    loss.backward()
    head = model.classifier.weight
    if changed == "infinite":
        head.grad[0, 0] = math.inf
    elif changed == "noise":
        noise = torch.randn_like(head)
        head.grad += 2 * head.grad.norm() * noise / noise.norm()
    else:
        head.grad += 0.1 * head.detach()
    opt.step(lambda: model(**texts(0)).loss, loss=loss)


def test_one_graph_at_a_time_with_gradients_that_are_there():
    most = {}
    for count in (1, 4):
        model, alive = bert(**DROPOUT), Alive()
        opt, micro = fastals.ALS(model), closures(model, texts(0, size=2 * count), count)
        with torch.no_grad():
            loss = sum(closure() for closure in micro)
        for closure in micro:
            closure().backward()
        with torch.autograd.graph.saved_tensors_hooks(alive.pack, lambda kept: kept.tensor):
            opt.step(micro, loss=loss)
        most[count] = alive.most
    assert most[4] <= 2 * most[1]  # the last one stands until the next loss is there


def test_micro_batches_as_one_function_have_their_own_backward():
    model, twin = bert(**NO_DROPOUT), bert(**NO_DROPOUT)
    by_object = fastals.ALS(model).step(
        fastals.MicroBatches(closures(model, texts(0), 2), lambda loss: (loss / 2).backward())
    )
    assert by_object == fastals.ALS(twin).step(closures(twin, texts(0), 2), backward=lambda loss: (loss / 2).backward())


@pytest.mark.parametrize("weights_", [(1.5, 0.5), (1.0, 0.0)])
def test_a_backward_may_weight_micro_batches(weights_):
    model = bert(torch.float64, **NO_DROPOUT)
    opt, each = fastals.ALS(model), iter(weights_)
    micro = closures(model, texts(0), 2)
    wanted = sum(w * float(c().detach()) for w, c in zip(weights_, micro, strict=True))
    assert float(opt.step(micro, backward=lambda loss: (next(each) * loss).backward())) == pytest.approx(wanted)
    assert opt.report.loss_after < opt.report.loss_before
