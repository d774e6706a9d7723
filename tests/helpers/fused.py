"""The fused optimizer on small models, on the GPU if there is one, otherwise with interpreted kernels."""

import copy

import torch
from helpers.tiny import TinyTransformer, tiny_batches

import fastals
from fastals.eager import EagerALS

CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(dtype=torch.float32, depth=2, **options):
    torch.manual_seed(0)
    model = TinyTransformer(depth=depth).to(CUDA, dtype)
    return model, fastals.ALS(fastals.units(model), model=model, fused=True, **options)


def batches(count):
    return [{k: v.to(CUDA) for k, v in b.items()} for b in tiny_batches(count)]


def train(model, opt, batches_, start=0):
    for t, batch in enumerate(batches_, start):
        torch.manual_seed(100 + t)
        opt.step(lambda: model(**batch))  # noqa: B023


def snapshot(model, opt):
    saved = copy.deepcopy(opt.state_dict())
    return [p.detach().clone() for p in model.parameters()], saved, torch.get_rng_state()


def optimizer(kind, model, by="block", **options):
    """The fused, the plain or the eager optimizer."""
    groups = fastals.units(model, by)
    if kind == "eager":
        return EagerALS(groups, **options)
    return fastals.ALS(groups, model=model, fused=kind == "fused", **options)


def holding(*params):
    """A module of these parameters and nothing else."""
    return torch.nn.ParameterList(params)


class BrokenError(Exception):
    """Raised by a closure in a trial."""
