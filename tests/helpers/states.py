"""The state of a model under test and of the generators: taken, put back and compared."""

import random
import warnings
from contextlib import contextmanager

import numpy as np
import torch
from helpers.tiny import assert_same


def generators():
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_generators(state):
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


@contextmanager
def generators_held():
    state = generators()
    try:
        yield
    finally:
        set_generators(state)


def copied(tensor):
    return None if tensor is None else tensor.detach().clone()


def trained(model):
    return {n: copied(p) for n, p in model.named_parameters() if p.requires_grad}


def rest(model):
    """Frozen weights, buffers, and the generators."""
    return {
        "frozen": {n: copied(p) for n, p in model.named_parameters() if not p.requires_grad},
        "buffers": {f"{m}.{n}": copied(b) for m, module in model.named_modules() for n, b in module._buffers.items()},
        "generators": generators(),
    }


def gradients(model):
    return {n: copied(p.grad) for n, p in model.named_parameters()}


def put(model, weights, others):
    """Put the model and the generators into this state."""
    put_rest(model, others)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(weights[name])


@torch.no_grad()
def put_rest(model, others):
    """Put all but the trained weights into this state."""
    for name, p in model.named_parameters():
        if not p.requires_grad:
            p.copy_(others["frozen"][name])
    for name, module in model.named_modules():
        for buffer in module._buffers:
            module._buffers[buffer] = copied(others["buffers"][f"{name}.{buffer}"])
    set_generators(others["generators"])


def footprint(model):
    """The names of all attributes of all modules, and their hooks."""
    return [(set(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def comparable(others):
    """The state with the generators by name, and NumPy's as plain numbers."""
    of_torch, of_numpy, of_python = others["generators"]
    of_numpy = [x.tolist() if isinstance(x, np.ndarray) else x for x in of_numpy]
    return others | {"generators": {"of torch": of_torch, "of NumPy": of_numpy, "of Python": of_python}}


def assert_all_same(found, expected):
    """All parts equal to the last bit; otherwise an error that names those that differ."""
    differing = []
    found = flat(found)
    for part, value in flat(expected).items():
        try:
            assert_same(found[part], value)
        except AssertionError:
            differing.append(part)
    assert not differing, f"different: {differing}"


def flat(parts):
    """Names and values of a dict of dicts."""
    return {f"{k} {n}": v for k, inner in parts.items() for n, v in inner.items()}


@contextmanager
def warnings_of_fastals():
    """A list of the warnings of fastals; any other one is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.filterwarnings("always", message="fastals")
        yield caught
