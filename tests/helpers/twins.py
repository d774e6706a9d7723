"""A step beside its twin: every loss that the step saw is computed again by plain full forwards of a copy.

Nothing here is asked of the library. The copy is made before the step and evaluated after it, so that it cannot
disturb the step; for every loss it gets the trained weights, and always the buffers and the random generators as the
step found them.
"""

import copy
import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastals.partition import blocks


@dataclass
class Evaluation:
    """A loss that the closure returned, the trained weights it was returned for, and the block forwards it took."""

    loss: Tensor
    weights: list[Tensor]
    grad_mode: bool
    forwards: int

    def same_point(self, other):
        """Whether the other loss was evaluated at the same weights."""
        return all(map(torch.equal, self.weights, other.weights))


@dataclass
class Judged:
    """One step: its losses in the order in which they were evaluated, and those of the twin, bitwise to be equal.

    Attributes:
        end: the twin's loss at the weights that the step has left.
        forwards: block forwards by block; also those of closures that raised an error.
    """

    evaluations: list[Evaluation] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)
    end: float = float("nan")
    forwards: Counter = field(default_factory=Counter)

    def differences(self, *, settled=False):
        """Index, loss and plain loss wherever the two differ.

        With ``settled`` a wrong loss is forgiven if the step evaluated it again: of several losses at the same weights
        the last one counts, and at the start the first one.
        """
        return [
            (i, float(e.loss), float(plain))
            for i, (e, plain) in enumerate(zip(self.evaluations, self.plain, strict=True))
            if not same_bits(e.loss, plain) and not (settled and self._evaluated_again(i))
        ]

    def _evaluated_again(self, i):
        e = self.evaluations[i]
        if i > 0 and e.same_point(self.evaluations[0]):
            return True
        return any(map(e.same_point, self.evaluations[i + 1 :]))


def judged_step(opt, model, loss_of, leaves):
    """One step of the optimizer, judged by a twin; ``leaves`` are those of :func:`counted_leaves`."""
    step, trained = Judged(), [p for p in model.parameters() if p.requires_grad]
    twin, start = copy.deepcopy(model), generator_states()

    def closure():
        before = step.forwards.total()
        loss = loss_of(model)
        weights = [p.detach().clone() for p in trained]
        forwards = step.forwards.total() - before
        step.evaluations.append(Evaluation(loss.detach().clone(), weights, torch.is_grad_enabled(), forwards))
        return loss

    with counting(leaves, step.forwards):
        opt.step(closure)
    end, buffers = generator_states(), [b.clone() for b in twin.buffers()]

    def plain(weights, grad_mode):
        copied = [p for p in twin.parameters() if p.requires_grad]
        set_generators(start)
        with torch.no_grad():
            for target, value in zip(copied + list(twin.buffers()), weights + buffers, strict=True):
                target.copy_(value)
        with torch.set_grad_enabled(grad_mode):
            return loss_of(twin).detach()

    step.plain = [plain(e.weights, e.grad_mode) for e in step.evaluations]
    step.end = float(plain([p.detach() for p in trained], grad_mode=False))
    set_generators(end)
    return step


def counted_leaves(model, loss_of):
    """By the name of each block, a leaf inside that a forward calls as often as the block itself.

    It shows the block's forwards wherever these are made. It is found in evaluation mode, in which no layer is dropped.
    """
    named, training, states = blocks(model), model.training, generator_states()
    calls = Counter()
    inside = {m for block in named.values() for m in block.modules()}
    handles = [m.register_forward_hook(lambda m, args, output: calls.update([m])) for m in inside]
    model.eval()
    with torch.no_grad():
        loss_of(model)
    model.train(training)
    set_generators(states)
    for handle in handles:
        handle.remove()
    return {
        name: next(m for m in block.modules() if not list(m.children()) and 0 < calls[m] == (calls[block] or calls[m]))
        for name, block in named.items()
    }


@contextmanager
def counting(leaves, counts):
    """Count the calls of the leaves, by name, inside the ``with`` block."""

    def counted(name, plain):
        def forward(*args, **kwargs):
            counts[name] += 1
            return plain(*args, **kwargs)

        return forward

    own = {name: leaf.__dict__.get("forward") for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        leaf.forward = counted(name, leaf.forward)
    try:
        yield
    finally:
        for name, leaf in leaves.items():
            del leaf.forward
            if own[name] is not None:
                leaf.forward = own[name]


def generator_states():
    """The states of all generators: torch's, NumPy's and Python's."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_generators(states):
    """Set all generators to these states."""
    of_torch, of_numpy, of_python = states
    torch.set_rng_state(of_torch)
    np.random.set_state(of_numpy)
    random.setstate(of_python)


def same_bits(a, b):
    """Whether two losses are equal to the last bit; NaN equals NaN."""
    return a.dtype == b.dtype and torch.equal(*(x.reshape(1).view(torch.uint8) for x in (a, b)))
