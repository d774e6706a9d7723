"""Forwards that write: every evaluation of a step starts from the same state, and one forward's worth of it is left."""

import copy

import pytest
import torch
from helpers.audit import Audit, Deliberate, fail_everywhere, nothing_lost
from helpers.nets import Net, labelled
from torch import nn
from torch.ao import quantization
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

import fastals

pytestmark = pytest.mark.filterwarnings("ignore:fastals")  # a unit may run uncached; what counts is that it is exact
schedules = pytest.mark.parametrize("schedule", ["sweep", "independent", "joint", "relay"])


class Codebook(nn.Module):
    """Vector quantization whose codes follow the inputs by moving averages in the forward."""

    def __init__(self, how, decay, codes=16, width=8):
        super().__init__()
        self.how, self.decay = how, decay
        start = torch.randn(codes, width)
        for name, value in (("codes", start), ("sums", start), ("sizes", torch.ones(codes))):
            self.register_buffer(name, value.clone())

    def forward(self, z):
        nearest = torch.cdist(z, self.codes).argmin(-1)
        if self.training:
            self.follow(z.detach(), F.one_hot(nearest, len(self.codes)).to(z.dtype))
        code = self.codes[nearest].detach()  # those that this very forward has moved
        return z + (code - z).detach(), (code - z).square().mean()

    @torch.no_grad()
    def follow(self, z, chosen):
        sizes = self.decay * self.sizes + (1 - self.decay) * chosen.sum(0)
        sums = self.decay * self.sums + (1 - self.decay) * chosen.T @ z
        for name, value in (("sizes", sizes), ("sums", sums), ("codes", sums / (sizes + 1e-5)[:, None])):
            if self.how == "replaced":
                setattr(self, name, value)
            elif self.how == "data":
                getattr(self, name).data = value
            else:
                getattr(self, name).copy_(value)


class Quantizing(nn.Module):
    """An autoencoder with a codebook in the middle."""

    def __init__(self, how, decay):
        super().__init__()
        self.encoder, self.decoder = (
            nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))
            for _ in range(2)
        )
        self.codebook = Codebook(how, decay)

    def forward(self, x):
        h = x
        for block in self.encoder:
            h = h + block(h)
        h, commitment = self.codebook(h)
        for block in self.decoder:
            h = h + block(h)
        return (h - x).square().mean() + 0.25 * commitment


class Centred(nn.Module):
    """Batch normalization by hand; its statistics do not change what it returns in training mode."""

    def __init__(self, how, width=16):
        super().__init__()
        self.how = how
        self.gain = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        mean = x.mean(0)
        moved = 0.9 * self.mean + 0.1 * mean.detach()
        if self.how == "replaced":
            self.mean, self.batches = moved, self.batches + 1
        elif self.how == "data":
            self.mean.data, self.batches.data = moved, self.batches + 1
        else:
            self.mean.copy_(moved)
            self.batches += 1
        return self.gain * (x - mean)


class Byol(nn.Module):
    """A frozen network that moves towards the trained one at the start of every forward."""

    def __init__(self, momentum, how):
        super().__init__()
        self.online, self.target = Net(outputs=8), Net(outputs=8).requires_grad_(False)
        self.predict, self.momentum, self.how = nn.Linear(8, 8), momentum, how

    def forward(self, a, b):
        with torch.no_grad():
            for p, q in zip(self.online.parameters(), self.target.parameters(), strict=True):
                if self.how == "data":
                    q.data = self.momentum * q.data + (1 - self.momentum) * p.data
                else:
                    q.lerp_(p, 1 - self.momentum)
        predicted = F.normalize(self.predict(self.online(a)), dim=1)
        with torch.no_grad():
            wanted = F.normalize(self.target(b), dim=1)
        return 2 - 2 * (predicted * wanted).sum(1).mean()


class Peak(nn.Module):
    """Keeps the largest activation that it has seen, and scales by it: most forwards write nothing."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.register_buffer("peak", torch.zeros(()))

    def forward(self, x):
        x = x + self.fc(x)
        if x.detach().max() > self.peak:
            self.peak.copy_(x.detach().max())
        return x / self.peak


def quantizing(how, decay):
    def batch():
        x = torch.randn(32, 8)
        return lambda m: m(x)

    return Quantizing(how, decay), batch


def classify(scale=1.0):
    x, y = labelled()
    return lambda m: F.cross_entropy(m(scale * x + 1), y)


def centred(how):
    blocks = [nn.Sequential(Centred(how), nn.Linear(16, 16), nn.Tanh()) for _ in range(3)]
    return Net(blocks=blocks), classify


def byol(momentum, how="in place"):
    def batch():
        x = torch.randn(16, 8)
        a, b = (x + 0.1 * torch.randn(16, 8) for _ in range(2))
        return lambda m: m(a, b)

    return Byol(momentum, how), batch


def quantization_aware():
    """Fake quantization, whose observers move with every forward; the inputs grow."""

    class Stubs(Net):
        def __init__(self):
            super().__init__(blocks=[nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)])
            self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()

        def forward(self, x):
            return self.dequant(super().forward(self.quant(x)))

    model = Stubs().train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    scales = iter(range(1, 100))
    return model, lambda: classify(next(scales))


def batch_norm():
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.1)) for _ in range(2)]
    return Net(blocks=blocks), classify


def peaks():
    """The peaks are those of the first batch at w_t, so that the first step's first forward writes none."""
    model = Net(blocks=[Peak() for _ in range(3)])
    x, y = labelled()
    with torch.no_grad():
        model(x)
    return model, lambda: lambda m: F.cross_entropy(m(x), y)


WRITING = {
    **{f"codebook {h} {d}": (lambda h=h, d=d: quantizing(h, d)) for h in ("in place", "replaced", "data")
       for d in (0.9, 0.99)},
    **{f"statistics {h}": (lambda h=h: centred(h)) for h in ("in place", "replaced", "data")},
    "teacher 0.99": lambda: byol(0.99), "teacher 0.9": lambda: byol(0.9), "teacher data": lambda: byol(0.9, "data"),
    "observers": quantization_aware, "batch norm": batch_norm, "written by some trials only": peaks,
}  # fmt: skip
quantization_is_moving = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning", "ignore:.*reduce_range:UserWarning"
)
writing = pytest.mark.parametrize("make", WRITING.values(), ids=WRITING.keys())


@pytest.mark.slow(keep=17)
@quantization_is_moving
@writing
@schedules
def test_a_forward_that_writes_is_a_function_of_the_weights(make, schedule):
    torch.manual_seed(3)
    model, batch = make()
    Audit(model.train(), trust=0.05, schedule=schedule).train(batch() for _ in range(5))


@pytest.mark.slow(keep=2)
@quantization_is_moving
@pytest.mark.parametrize("name", ["codebook replaced 0.9", "statistics replaced", "teacher 0.9", "observers"])
def test_it_is_one_on_the_fused_path_too(name):
    pytest.importorskip("triton")
    torch.manual_seed(3)
    model, batch = WRITING[name]()
    Audit(model.train(), fused=True, trust=0.05, max_trials=3).train(batch() for _ in range(3))


@pytest.mark.slow(keep=10)
@quantization_is_moving
@writing
@pytest.mark.parametrize("schedule", ["sweep", "relay"])
def test_after_an_error_everything_stands_as_it_stood(make, schedule):
    torch.manual_seed(3)
    model, batch = make()
    opt = fastals.ALS(model.train(), schedule=schedule, every=1, trust=0.05, max_trials=4)
    for _ in range(2):
        fail_everywhere(opt, batch(), model)


@pytest.mark.parametrize(("schedule", "most"), [("sweep", 4), ("relay", 3)])
@pytest.mark.parametrize("how", ["in place", "replaced", "data"])
def test_an_error_halfway_through_a_forward(how, schedule, most):
    """The head raises at its n-th call, when the blocks below it have written."""
    model, batch = centred(how)
    opt = fastals.ALS(model, schedule=schedule, every=1)
    calls = 0

    def fail(module, args):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise Deliberate

    model.head.register_forward_pre_hook(fail)
    for _ in range(2):
        loss_of = batch()
        for failing in range(1, most + 1):  # noqa: B007
            calls = 0
            with nothing_lost(opt, model, error=Deliberate):
                opt.step(lambda loss_of=loss_of: loss_of(model))
        failing = 0
        opt.step(lambda loss_of=loss_of: loss_of(model))


@pytest.mark.parametrize("how", ["in place", "replaced", "data"])
def test_statistics_count_one_forward_a_step(how):
    model, batch = centred(how)
    opt = fastals.ALS(model)
    for _ in range(4):
        loss_of = batch()
        opt.step(lambda loss_of=loss_of: loss_of(model))
        assert opt.report.trials
    assert [int(b[0].batches) for b in model.blocks] == [4, 4, 4]


@pytest.mark.parametrize("step", [0, 2])
def test_a_buffer_that_only_trials_write_is_not_written(step):
    """The peaks of w_t are known before the step, so that its first forward finds no new one; some trials do."""
    model, batch = peaks()
    loss_of, peaked = batch(), []
    opt = fastals.ALS(model, trust=0.3, max_trials=3)

    def closure():
        before = [b.peak.clone() for b in model.blocks]
        loss = loss_of(model)
        peaked.append(any(b.peak > p for b, p in zip(model.blocks, before, strict=True)))
        return loss

    for _ in range(step):
        opt.step(closure)
    for block in model.blocks:
        block.peak.zero_()
    with torch.no_grad():
        loss_of(model)  # the peaks of w_t
    before = {n: b.clone() for n, b in model.named_buffers()}
    peaked.clear()
    opt.step(closure)
    assert not peaked[0]
    assert any(peaked)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


# The other model of an adversarial loss


def discriminator(kind):
    """One whose forward writes its buffers: running statistics, or the vectors of a power iteration."""
    if kind == "batch norm":
        inner = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.LeakyReLU()) for _ in range(2)]
    else:
        inner = [
            nn.Sequential(parametrizations.spectral_norm(nn.Linear(16, 16)), nn.LeakyReLU(), nn.Dropout(0.1))
            for _ in range(2)
        ]
    return Net(inputs=8, outputs=1, blocks=inner)


def adversarial(kind):
    generator = Net(inputs=4, outputs=8, blocks=[nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh())])

    def fooling(g, d, noise):
        return F.softplus(-d(g(noise))).mean()

    def telling(d, g, noise, real):
        return F.softplus(d(g(noise).detach())).mean() + F.softplus(-d(real)).mean()

    return generator, discriminator(kind), fooling, telling


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("kind", ["batch norm", "spectral norm"])
@schedules
def test_the_buffers_of_another_model_are_held(kind, frozen, schedule):
    generator, other, fooling, _ = adversarial(kind)
    other.requires_grad_(not frozen)
    audit = Audit(generator, other, trust=0.05, schedule=schedule)
    noises = (torch.randn(16, 4) for _ in range(4))
    audit.train((lambda g, d, noise=noise: fooling(g, d, noise)) for noise in noises)


@pytest.mark.parametrize("kind", ["batch norm", "spectral norm"])
def test_after_an_error_the_other_model_stands_as_it_stood(kind):
    generator, other, fooling, _ = adversarial(kind)
    other.requires_grad_(False)
    opt = fastals.ALS(generator, modules=[other])
    for _ in range(2):
        noise = torch.randn(16, 4)
        fail_everywhere(opt, lambda g, d, noise=noise: fooling(g, d, noise), generator, other)


def followed(student, teacher, x):
    """A mean teacher that the closure moves before it asks it."""
    with torch.no_grad():
        for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
            q.lerp_(p, 0.1)
        wanted = teacher(x)
    return (student(x + 0.1 * torch.randn_like(x)) - wanted).square().mean()


@schedules
def test_the_frozen_weights_of_another_model_are_held(schedule):
    audit = Audit(Net(), Net().requires_grad_(False), trust=0.05, schedule=schedule)
    xs = (torch.randn(16, 8) for _ in range(4))
    audit.train((lambda s, t, x=x: followed(s, t, x)) for x in xs)
    x = torch.randn(16, 8)
    fail_everywhere(audit.opt, lambda s, t: followed(s, t, x), *audit.models)


@pytest.mark.parametrize("kind", ["batch norm", "spectral norm"])
def test_two_optimizers_hold_the_buffers_of_each_others_models(kind):
    """A generator and a discriminator trained in turn: each step leaves one forward's worth of buffers in both."""
    generator, other, fooling, telling = adversarial(kind)
    train_generator = fastals.ALS(generator, modules=[other], trust=0.05)
    train_other = fastals.ALS(other, modules=[generator], trust=0.05)
    for _ in range(3):
        noise, real = torch.randn(16, 4), torch.randn(16, 8)
        for opt, models, loss_of in (
            (train_other, (other, generator), lambda d, g, noise=noise, real=real: telling(d, g, noise, real)),
            (train_generator, (generator, other), lambda g, d, noise=noise: fooling(g, d, noise)),
        ):
            once, state = copy.deepcopy(models), torch.get_rng_state()
            loss_of(*once)
            torch.set_rng_state(state)
            opt.step(lambda models=models, loss_of=loss_of: loss_of(*models))
            assert opt.report.trials
            for model, expected in zip(models, once, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(model.buffers(), expected.buffers(), strict=True))
