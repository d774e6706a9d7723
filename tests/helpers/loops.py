"""One small task for tests that train in the loop of another framework: a model, mini-batches and the plain loop."""

import torch
from helpers.tiny import TinyTransformer, assert_same, tiny_batches
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastals

STEPS = 6


def network(dtype=torch.float32, dropout=0.1):
    """The model, of seed 0."""
    torch.manual_seed(0)
    return TinyTransformer(depth=2, dropout=dropout).to(dtype).train()


def optimizer(model, **options):
    """Its optimizer, and a schedule of ``lr``."""
    opt = fastals.ALS(model, **options)
    return opt, CosineAnnealingLR(opt, 2 * STEPS)


def build(dtype=torch.float32, dropout=0.1, **options):
    """All three, with the generator at 1."""
    model = network(dtype, dropout)
    opt, scheduler = optimizer(model, **options)
    torch.manual_seed(1)
    return model, opt, scheduler


def batches(count=STEPS):
    """Mini-batches of 8 sequences."""
    return list(tiny_batches(count))


def closures(model, batch, divisor=1):
    """The losses of four micro-batches, as ``step`` takes them."""
    micro = [dict(zip(batch, parts, strict=True)) for parts in zip(*(t.chunk(4) for t in batch.values()), strict=True)]
    return [lambda b=b: model(**b) / divisor for b in micro]


def plain_step(model, opt, batch):
    """The step of a plain loop."""
    return opt.step(lambda: model(**batch))


def loop(model, opt, scheduler, data=None, step=plain_step):
    """The model and the optimizer after a step with each mini-batch."""
    for batch in data or batches():
        step(model, opt, batch)
        scheduler.step()
    return model, opt


def assert_same_run(a, b):
    """Two models with their optimizers stand at the same place, to the last bit."""
    for one, other in zip(a, b, strict=True):
        assert_same(one.state_dict(), other.state_dict())
