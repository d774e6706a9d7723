"""A checkpoint with the steps that followed it: how the file is recorded, and how a run is continued from it.

``tests/data/first_checkpoint.pt.gz`` is from the first public state, commit c9996ea. With that commit's fastals
installed, and this folder of tests on the path, it was written by::

    PYTHONPATH=tests python -P -m helpers.checkpoints first_checkpoint.pt.gz
"""

import copy
import gzip
import sys

import torch
from helpers.tiny import TinyTransformer, tiny_batches

import fastals

STEPS = 3  # before the checkpoint, and again after it
# Steps so large that some trials are rejected; the schedule is the default of that state.
LARGE_STEPS = {"schedule": "sweep", "trust": 0.05, "c": 0.5, "growth": 2.0, "max_trials": 4}
CASES = {
    "float32": {"momentum": "after", **LARGE_STEPS},
    "bfloat16": {"momentum": "tested", "reference": "smoothed", **LARGE_STEPS},
}


def build(case):
    """The model in the case's precision, and its optimizer."""
    torch.manual_seed(0)
    model = TinyTransformer(depth=2, width=6, dropout=0.0).to(getattr(torch, case)).train()
    return model, fastals.ALS(model, **CASES[case])


def loss_of(model, batch):
    """The loss with a fifth of the tokens hidden at random; dropout would draw other masks on other processors."""
    hidden = torch.rand(batch["tokens"].shape) < 0.2
    return model(batch["tokens"].masked_fill(hidden, 0), batch["labels"])


def take_steps(model, opt, batches):
    """The report of one step on each batch, as plain numbers."""
    reports = []
    for batch in batches:
        opt.step(lambda: loss_of(model, batch))  # noqa: B023
        reports.append(opt.report.as_dict())
    return reports


def batches_before():
    """The mini-batches that lead to the checkpoint."""
    return list(tiny_batches(2 * STEPS))[:STEPS]


def batches_after():
    """The mini-batches that the run continues with."""
    return list(tiny_batches(2 * STEPS))[STEPS:]


def probe(model):
    """Loss and first gradient on the next mini-batch; their bits tell one machine's numerics from another's."""
    generator = torch.get_rng_state()
    loss = loss_of(model, batches_after()[0])
    (gradient,) = torch.autograd.grad(loss, [model.embed.weight])
    torch.set_rng_state(generator)
    return {"loss": loss.detach(), "gradient": gradient}


def record(case):
    """A checkpoint after some steps, and the reports and weights of the steps that follow it."""
    model, opt = build(case)
    take_steps(model, opt, batches_before())
    checkpoint = copy.deepcopy(
        {"model": model.state_dict(), "optimizer": opt.state_dict(), "generator": torch.get_rng_state()}
    )
    checkpoint["probe"] = probe(model)
    reports = take_steps(model, opt, batches_after())
    return {"checkpoint": checkpoint, "reports": reports, "weights": model.state_dict()}


def load(path):
    """What :func:`record` made of each case."""
    with gzip.open(path) as file:
        return torch.load(file, weights_only=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with gzip.open(sys.argv[1], "wb") as file:
        torch.save({case: record(case) for case in CASES}, file)
