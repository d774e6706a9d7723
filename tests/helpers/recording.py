"""A back end for captured steps that needs no GPU: it records actions and runs them anew at each replay."""

import contextlib

import pytest
import torch
from helpers.tiny import TinyTransformer, matrices_only

import fastals
from fastals.graphs.graphed import GraphedStep
from fastals.graphs.program import Loop, Run

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the recording back end runs interpreted kernels; here CUDA graphs are tested"
)


class Recording:
    """Runs the captured actions anew at each replay, writes results where the first ones lie, and keeps a log."""

    def __init__(self, params, *, linked, log, draws, buffers=()):
        self.params, self.linked, self.log, self.draws, self.fails = params, linked, log, draws, False
        self.buffers = buffers  # of the model

    def session(self):
        return contextlib.nullcontext()

    def held_bytes(self):
        return 0

    def capture_head(self, action):
        self.seed, before = torch.initial_seed(), [b.clone() for b in self.buffers]
        try:
            result = action()
        finally:  # a capture computes nothing
            for b, values in zip(self.buffers, before, strict=True):
                b.data.copy_(values)  # and nobody is to see a write
        grads = [p.grad for p in self.params]

        def again():
            result.copy_(action())
            for p, g in zip(self.params, grads, strict=True):
                if g is not None:
                    g.copy_(p.grad)
                p.grad = None

        return self.capture(again), result

    def capture(self, action):
        assert torch.initial_seed() == self.seed, "while torch captures, a state of another seed cannot be set"
        self.log.append("capture")
        return action

    def replay(self, piece):
        self.log.append("replay")
        piece()

    def look(self, flags):
        self.log.append("look")
        return flags.tolist()

    def rng_state(self):
        return torch.get_rng_state()

    def set_rng_state(self, state):
        torch.set_rng_state(state)

    def link(self, operations, flags):
        if not self.linked:
            raise RuntimeError("this back end has no loops")

        def launch():
            if self.fails:
                raise RuntimeError("out of memory")
            self.log.append("launch")
            for operation in operations:
                if isinstance(operation, Run):
                    operation.piece()
                elif isinstance(operation, Loop):
                    while int(flags[operation.row, 0]):
                        operation.piece()

        return launch


def recorded(opt, model, loss_fn, *, linked=False, log=None, **options):
    """A captured step of the optimizer with this back end."""
    params, buffers = [p for p in model.parameters() if p.requires_grad], list(model.buffers())

    def backend(device, stream, *, draws):
        return Recording(params, linked=linked, log=[] if log is None else log, draws=draws, buffers=buffers)

    return GraphedStep(opt, loss_fn, backend=backend, **options)


def build(loss_fn=None, linked=False, depth=1, dropout=0.1, log=None, max_signatures=None, **options):
    """A tiny model, its optimizer and its captured step."""
    torch.manual_seed(0)
    model = matrices_only(TinyTransformer(depth=depth, dropout=dropout))
    opt = fastals.ALS(fastals.units(model), model=model, fused=True, **options)
    kept = {} if max_signatures is None else {"max_signatures": max_signatures}
    return model, opt, recorded(opt, model, loss_fn or (lambda batch: model(**batch)), linked=linked, log=log, **kept)
