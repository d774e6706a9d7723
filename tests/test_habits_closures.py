"""Closures that need gradients, closures that must be refused, and weights the optimizer was not made with."""

import copy
import itertools
import re

import pytest
import torch
import transformers as hf
from helpers.audit import Audit, nothing_lost
from helpers.hf import tiny_bert
from helpers.nets import Net, labelled
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

import fastals

pytestmark = pytest.mark.filterwarnings("ignore:fastals")  # a unit may run uncached; what counts is that it is exact
schedules = pytest.mark.parametrize("schedule", ["sweep", "independent", "joint", "relay"])


# Gradients inside the closure


def physics(m, points):
    """The residual of u' = -u with u(0) = 1."""
    points = points.clone().requires_grad_()
    values = m(points)
    (slopes,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    return (slopes + values).square().mean() + (m(torch.zeros(1, 1)) - 1).square().mean()


def physics_that_enables(m, points):
    with torch.enable_grad():
        return physics(m, points)


def gradient_penalty(m, points):
    """The critic of a Wasserstein GAN; the mixture is drawn anew."""
    fake = torch.randn_like(points)
    mixed = torch.lerp(points, fake, torch.rand_like(points)).requires_grad_()
    (slopes,) = torch.autograd.grad(m(mixed).sum(), mixed, create_graph=True)
    return m(fake).mean() - m(points).mean() + 10 * (slopes.norm(dim=1) - 1).square().mean()


def meta_learning(m, points):
    """One inner step on half of the points, the loss of the stepped weights on the others."""
    inner, outer = points.chunk(2)
    weights = dict(m.named_parameters())
    loss = F.mse_loss(functional_call(m, weights, (inner,)), inner.sin())
    slopes = torch.autograd.grad(loss, tuple(weights.values()), create_graph=True)
    stepped = {n: p - 0.1 * g for (n, p), g in zip(weights.items(), slopes, strict=True)}
    return F.mse_loss(functional_call(m, stepped, (outer,)), outer.sin())


def adversarial_examples(m, points):
    """The points are first moved to where the loss is larger."""
    points = points.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(F.mse_loss(m(points), points.detach().sin()), points)
    moved = (points + 0.1 * slopes.sign()).detach()
    return F.mse_loss(m(moved), points.detach().sin())


def plain_loss(m, points):
    return F.mse_loss(m(points), points.sin())


NEEDING = [physics, physics_that_enables, gradient_penalty, meta_learning, adversarial_examples]


@pytest.mark.parametrize("loss_of", NEEDING)
@schedules
def test_a_loss_that_takes_derivatives(loss_of, schedule):
    points = (torch.randn(16, 1) for _ in range(4))
    audit = Audit(Net(inputs=1, outputs=1), trust=0.05, schedule=schedule)
    audit.train((lambda m, x=x: loss_of(m, x)) for x in points)


class Averaging(nn.Module):
    """Adds to its input an average that each forward moves, behind torch's back."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(1))

    def forward(self, x):
        self.average.data = 0.5 * self.average + 0.5
        return x + self.average


def test_a_try_without_gradients_leaves_no_write_for_the_one_with_them():
    """The loss came from the caller, so nothing has shown yet what the forward writes and needs."""
    points, start = torch.randn(16, 1), nn.Sequential(Averaging(), nn.Linear(1, 1), nn.Tanh())
    model, twin = copy.deepcopy(start), copy.deepcopy(start)
    loss = physics(model, points)
    loss.backward()
    model[0].average.data = torch.zeros(1)
    opt = fastals.ALS(model, cache=False)
    opt.step(lambda: physics(model, points), loss=loss)
    assert opt.report.loss_before == float(physics(twin, points).detach())


@pytest.mark.parametrize("enabled", [False, True], ids=["as it comes", "gradients enabled"])
@pytest.mark.parametrize("loss_of", [physics, meta_learning, plain_loss])
@pytest.mark.parametrize("evaluation", [0, 1, 3])
def test_a_closure_that_calls_backward_is_told_so(evaluation, loss_of, enabled):
    """Also if it does so from a later evaluation on."""
    model, points = Net(inputs=1, outputs=1), torch.randn(16, 1)
    opt = fastals.ALS(model)
    opt.step(lambda: plain_loss(model, points))
    calls = itertools.count()

    def closure():
        with torch.set_grad_enabled(enabled or torch.is_grad_enabled()):
            loss = loss_of(model, points)
            if next(calls) >= evaluation:
                loss.backward()
        return loss

    with nothing_lost(opt, model, error=RuntimeError, match="called backward"):
        opt.step(closure)


class Encoder(nn.Module):
    """torch's own encoder over padded tokens."""

    def __init__(self, pool, nested):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.pool, self.embed = pool, nn.Embedding(30, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(16, 3)

    def forward(self, ids):
        pad = ids == 0
        x = self.encoder(self.embed(ids), src_key_padding_mask=pad)
        kept = torch.ones_like(pad) if self.pool == "all positions" else ~pad
        return self.head((x * kept[..., None]).sum(1) / kept.sum(1, keepdim=True))


@pytest.mark.slow(keep=8)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "not nested"])
@pytest.mark.parametrize("pool", ["all positions", "real positions"])
@schedules
def test_the_fast_path_of_an_encoder_in_eval_mode(pool, nested, mode, schedule):
    """Without gradients torch would take another path, with other roundings and zeros at the padding."""
    model = Encoder(pool, nested).train(mode == "train")
    ids = torch.randint(1, 30, (6, 8))
    ids[:3, 5:] = 0
    labels = (torch.randint(3, (6,)) for _ in range(3))
    audit = Audit(model, trust=0.05, schedule=schedule)
    audit.train((lambda m, y=y: F.cross_entropy(m(ids), y)) for y in labels)


# Closures that are no function of the weights


def fresh_batches():
    """The next batch at each call."""
    model, batches = Net(), iter([labelled() for _ in range(200)])

    def closure(again):
        x, y = next(batches) if again else FIXED
        return F.cross_entropy(model(x), y)

    return model, closure, "batch"


def fresh_batches_at_a_zero_head():
    """The same; a head that starts at zero gives the same loss for every batch."""
    model, closure, cause = fresh_batches()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model, closure, cause


def private_noise(scale=0.1):
    model, generator = Net(), torch.Generator().manual_seed(0)

    def closure(again):
        x, y = FIXED
        noise = torch.randn(x.shape, generator=generator) if again else 0.0
        return F.cross_entropy(model(x + scale * noise), y)

    return model, closure, "random|generator"


def faint_private_noise():
    """Far below what a search needs to be misled at once."""
    return private_noise(scale=1e-4)


def private_dropout_behind_the_blocks():
    """No block sees it."""
    model, draw = Net(), torch.Generator().manual_seed(0)

    def closure(again):
        x, y = FIXED
        kept = torch.rand(16, 3, generator=draw) > 0.2 if again else 1.0
        return F.cross_entropy(model(x) * kept, y)

    return model, closure, "random|generator"


def carried_state():
    """A recurrent state that goes from call to call."""

    class Recurrent(Net):
        def forward(self, x, state):
            return super().forward(torch.cat([x, state], -1))

    model, carried = Recurrent(inputs=16, outputs=8), [torch.zeros(16, 8)]

    def closure(again):
        x, y = FIXED
        state = model(x, carried[0])
        if again:
            carried[0] = state.detach().tanh()
        return F.cross_entropy(state, y)

    return model, closure, "state|carr"


FIXED = labelled()
UNREPEATABLE = [
    fresh_batches, fresh_batches_at_a_zero_head, private_noise, faint_private_noise, private_dropout_behind_the_blocks,
    carried_state,
]  # fmt: skip


@pytest.mark.parametrize("make", UNREPEATABLE)
@schedules
def test_a_closure_that_is_no_function_of_the_weights_is_refused_at_once(make, schedule):
    model, closure, cause = make()
    opt = fastals.ALS(model, schedule=schedule)
    with nothing_lost(opt, model, error=ValueError, match="for the same weights") as raised:
        opt.step(lambda: closure(True))
    assert re.search(cause, str(raised.value), re.IGNORECASE)


@pytest.mark.parametrize("make", [m for m in UNREPEATABLE if m is not fresh_batches_at_a_zero_head])
@schedules
def test_a_closure_that_stops_being_a_function_is_refused_in_that_step(make, schedule):
    model, closure, cause = make()
    opt = fastals.ALS(model, schedule=schedule)
    for _ in range(3):
        opt.step(lambda: closure(False))
    with nothing_lost(opt, model, error=ValueError, match="for the same weights") as raised:
        opt.step(lambda: closure(True))
    assert re.search(cause, str(raised.value), re.IGNORECASE)
    opt.step(lambda: closure(False))
    assert opt.report.trials


# Weights that are not those the optimizer was made with


class Spectral(nn.Module):
    """A layer with complex weights over frequencies."""

    def __init__(self, width=16):
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(5, width, width, dtype=torch.cfloat))
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        frequencies = torch.fft.rfft(x, dim=1)[:, :5]
        mixed = torch.fft.irfft(torch.einsum("bmd,mde->bme", frequencies, self.weight), n=x.shape[1], dim=1)
        return F.gelu(mixed + self.fc(x))


def test_complex_weights_are_refused_when_the_optimizer_is_made():
    model = Net(inputs=1, outputs=1, blocks=[Spectral() for _ in range(2)])
    with pytest.raises(ValueError, match=r"(?i)complex.*blocks\.0\.weight|blocks\.0\.weight.*complex"):
        fastals.ALS(model)


def test_complex_weights_may_be_frozen():
    model = Net(inputs=1, outputs=1, blocks=[Spectral() for _ in range(2)])
    for block in model.blocks:
        block.weight.requires_grad_(False)
    waves = (torch.randn(4, 16, 1) for _ in range(3))
    Audit(model).train((lambda m, x=x: (m(x) - x.cumsum(1)).square().mean()) for x in waves)


def language_model(kind, **options):
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 24, "num_key_value_heads": 1}  # fmt: skip
    if kind == "bert":
        del small["num_key_value_heads"]
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return hf.BertForMaskedLM(hf.BertConfig(**small, **dropout)).train()
    return hf.LlamaForCausalLM(hf.LlamaConfig(**small, **options)).train()


def classifier():
    return tiny_bert(vocab_size=40, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()


def resize(model):
    model.resize_token_embeddings(48, mean_resizing=False)


def new_embedding_weight(model):
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight.detach().clone())


def new_head_weight(model):
    model.classifier.weight = nn.Parameter(torch.randn_like(model.classifier.weight))


def new_head(model):
    model.classifier = nn.Linear(16, 2)


REPLACED = {
    "masked bert, resized": (lambda: language_model("bert"), resize),
    "tied llama, resized": (lambda: language_model("llama", tie_word_embeddings=True), resize),
    "llama, resized": (lambda: language_model("llama", tie_word_embeddings=False), resize),
    "llama, new weight": (lambda: language_model("llama", tie_word_embeddings=False), new_embedding_weight),
    "classifier, new weight": (classifier, new_head_weight),
    "classifier, new head": (classifier, new_head),
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("make", "change"), REPLACED.values(), ids=REPLACED.keys())
def test_a_weight_put_in_place_later_is_named(make, change, steps):
    model = make()
    ids = torch.arange(24).view(2, 12) % 40
    labels = torch.tensor([0, 1]) if hasattr(model, "classifier") else ids
    opt = fastals.ALS(model)

    def closure():
        return model(input_ids=ids, labels=labels).loss

    for _ in range(steps):
        opt.step(closure)
    before = {n: (p, p.shape) for n, p in model.named_parameters()}
    change(model)
    now = dict(model.named_parameters())
    other = [n for n, p in now.items() if p is not before[n][0]]
    reshaped = [n for n, p in now.items() if p.shape != before[n][1]]
    assert other or reshaped
    if steps == 0 and not other:  # the same parameters with other shapes, before anything was built for them
        opt.step(closure)
        assert opt.report.trials
        return
    with nothing_lost(opt, model, error=(ValueError, RuntimeError)) as raised:
        opt.step(closure)
    assert any(name in str(raised.value) for name in other + reshaped)
    assert re.search("optimizer|add_param_group", str(raised.value))


def test_a_weight_with_other_data_is_named_and_all_else_stands():
    """What undoes the step meets the new shape too; it must not stop there."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(40, 16)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.1)) for _ in range(2)
            )
            self.head = nn.Linear(16, 2)

        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model, ids, labels = Tokens().train(), torch.arange(8), torch.randint(2, (8,))
    opt = fastals.ALS(model)
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(model(ids), labels))
    old = model.embed.weight.data
    model.embed.weight.data = torch.cat([old, torch.randn(8, 16)])
    for _ in range(2):
        with nothing_lost(opt, model, error=RuntimeError, match=r"embed\.weight"):
            opt.step(lambda: F.cross_entropy(model(ids), labels))
    model.embed.weight.data, model.embed.weight.grad = old, None
    opt.step(lambda: F.cross_entropy(model(ids), labels))
    assert opt.report.trials


def test_a_loss_that_is_another_without_gradients_is_told_and_stays_exact():
    model = Net()

    def loss_of(m, x, y):
        loss = F.cross_entropy(m(x), y)
        return loss if torch.is_grad_enabled() else loss * 1.5

    x, y = labelled()
    opt = fastals.ALS(model)
    with pytest.warns(UserWarning, match="another loss without gradients"):
        opt.step(lambda: loss_of(model, x, y))
    opt.step(lambda: loss_of(model, x, y))
    assert opt.report.loss_after == loss_of(model, x, y).item()
