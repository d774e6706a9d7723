"""An independent judge of steps: a copy of the model repeats every evaluation as a plain full forward.

A loss is given as ``loss_of(model, *others)``, so that it can be evaluated on any copy. It may return a tuple: the loss
first, then tensors that show more of the forward than a rounded scalar does; all of them are compared, bitwise.
"""

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count, zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import assert_same
from torch import Tensor, nn

import fastals

LossOf = Callable[..., Any]
SEARCHES = [{"schedule": "sweep", "order": "top_down"}, {"schedule": "sweep", "order": "bottom_up"},
            {"schedule": "sweep", "order": "random"}, {"schedule": "independent"}, {"schedule": "joint"},
            {"schedule": "relay"}]  # fmt: skip
searches = pytest.mark.parametrize("search", SEARCHES, ids=lambda s: "-".join(s.values()))


class Audit:
    """An optimizer of ``models[0]`` whose steps are judged; the other models are its ``modules``.

    Every evaluation that the optimizer makes in a step is repeated on a copy of the models: with the weights it had,
    with buffers, frozen parameters and random generators as the step found them. The state after the step is
    compared with the one that a single forward and backward leave.

    Args:
        models: the model, then further modules that the loss uses.
        beside: also make every step without the cache, on copies, and compare reports and weights. Single evaluations
            are then not judged: one that finds out that a unit cannot be cached returns a wrong loss, to nobody's harm.
        options: arguments of the optimizer; without a schedule it makes sweeps, which ask most of the cache.
    """

    def __init__(self, *models: nn.Module, beside: bool = False, **options: Any) -> None:
        self.models, self.twins = models, copy.deepcopy(models)
        self.slow = Audit(*copy.deepcopy(models), **options | {"cache": False}) if beside else None
        further = {"modules": list(models[1:])} if models[1:] else {}
        self.opt = fastals.ALS(models[0], **further, **({"schedule": "sweep"} | options))
        self.trained = {id(p) for group in self.opt.param_groups for p in group["params"]}
        self.trials = self.moved = 0

    def train(self, losses: Iterable[LossOf]) -> None:
        """One judged step per loss; some unit has to move."""
        for loss_of in losses:
            self.step(loss_of)
        assert self.moved, "no unit has moved, so nothing was at stake"

    def step(self, loss_of: LossOf) -> None:
        """One judged step."""
        before, start = generators(), everything_held(self.models)
        w_t, evaluations = self._weights(), []

        def closure() -> Tensor:
            weights, result = self._weights(), _tensors(loss_of(*self.models))
            evaluations.append((weights, [t.detach().clone() for t in result]))
            return result[0]

        self.opt.step(closure)
        report = self.opt.report
        assert report.trials, "a step without trials shows nothing"
        self.trials += report.trials
        self.moved += sum(u.step_size > 0 for u in report.units)

        after = generators()
        truth = self._plain(loss_of, start, before, w_t, backward=True)
        _agree("loss_before", report.loss_before, float(truth[0]))
        _agree("buffers and frozen weights after the step", everything_held(self.models), self._with_weights())
        _agree("gradients after the step", self._grads(self.models), self._grads(self.twins))
        _agree("generators after the step", after, generators())
        at_new_weights = self._plain(loss_of, start, before, self._weights())
        _agree("loss_after", report.loss_after, float(at_new_weights[0]))
        if self.slow is None:
            truths = [self._plain(loss_of, start, before, weights) for weights, _ in evaluations]
            wrong = [
                f"evaluation {i} of {len(truths)}: {returned[0].item()!r}, a full forward gives {truth[0].item()!r}"
                for i, ((_, returned), truth) in enumerate(zip(evaluations, truths, strict=True))
                if not all(a is not None and b is not None and _equal(a, b) for a, b in zip_longest(returned, truth))
            ]
            assert not wrong, "\n".join(wrong)
        else:
            set_generators(before)
            self.slow.step(loss_of)
            _agree("reports with and without the cache", report.as_dict(), self.slow.opt.report.as_dict())
            _agree("models with and without it", everything_held(self.models), everything_held(self.slow.models))
        set_generators(after)

    def _weights(self) -> list[Tensor]:
        """Copies of the trained weights, as they stand now."""
        return [p.detach().clone() for m in self.models for p in m.parameters() if id(p) in self.trained]

    def _plain(
        self, loss_of: LossOf, start: Any, state: Any, weights: list[Tensor], *, backward: bool = False
    ) -> list[Tensor]:
        """The loss on the copies, from the start of the step but with these trained weights."""
        set_generators(state)
        trained = iter(weights)
        for model, twin, held in zip(self.models, self.twins, start, strict=True):
            for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
                q.data.copy_(next(trained) if id(p) in self.trained else held[name])
                q.requires_grad_(p.requires_grad).grad = None
            for name, buffer in twin.named_buffers():
                buffer.data = held[name].clone()
        with torch.enable_grad():
            result = _tensors(loss_of(*self.twins))
        if backward:
            result[0].backward()
        return [t.detach() for t in result]

    def _with_weights(self) -> list[dict[str, Tensor]]:
        """What the last evaluation on the copies has left, with the trained weights of the models."""
        left = everything_held(self.twins)
        for model, held in zip(self.models, left, strict=True):
            held.update((n, p.detach().clone()) for n, p in model.named_parameters() if id(p) in self.trained)
        return left

    def _grads(self, models: tuple[nn.Module, ...]) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in models[0].parameters()]


def everything_held(models: Iterable[nn.Module]) -> list[dict[str, Tensor]]:
    """Copies of all parameters and buffers, by name."""
    return [{n: t.detach().clone() for n, t in (*m.named_parameters(), *m.named_buffers())} for m in models]


def generators() -> dict[str, Any]:
    """The states of the global generators of torch, NumPy and Python."""
    kind, key, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "numpy": (kind, key.tolist(), *rest), "python": random.getstate()}


def set_generators(state: dict[str, Any]) -> None:
    """Set the three generators."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


class Deliberate(Exception):  # noqa: N818
    """What a closure raises on purpose."""


@contextmanager
def nothing_lost(opt: fastals.ALS, *models: nn.Module, error: Any, match: str | None = None) -> Iterator[Any]:
    """The error is raised inside, and everything stands as it stood: values, and whose tensors they are."""
    before, owned = _everything(opt, models), _tensors_of(models)
    with pytest.raises(error, match=match) as raised:
        yield raised
    _agree_on_all(_everything(opt, models), before)
    now = _tensors_of(models)
    assert now.keys() == owned.keys()
    assert all(now[name] is tensor for name, tensor in owned.items()), "a tensor has been replaced"


def fail_everywhere(opt: fastals.ALS, loss_of: LossOf, *models: nn.Module) -> None:
    """Try a step with an error in its first evaluation, its second and so on, until one is made."""
    for index in count():
        calls = count()

        def failing(index: int = index, calls: Iterator[int] = calls) -> Tensor:
            loss = _tensors(loss_of(*models))[0]
            if next(calls) == index:
                raise Deliberate
            return loss

        report = opt.report
        before, owned = _everything(opt, models), _tensors_of(models)
        try:
            opt.step(failing)
        except Deliberate:
            _agree_on_all(_everything(opt, models), before)
            assert all(_tensors_of(models)[name] is tensor for name, tensor in owned.items()), f"evaluation {index}"
            assert opt.report is report
        else:
            assert index > opt.report.trials > 0
            return


def _everything(opt: fastals.ALS, models: Iterable[nn.Module]) -> dict[str, Any]:
    grads = [p.grad for m in models for p in m.parameters()]
    return {
        "weights and buffers": everything_held(models),
        "gradients": [None if g is None else g.clone() for g in grads],
        "optimizer": copy.deepcopy(opt.state_dict()),
        "generators": generators(),
    }


def _tensors_of(models: Iterable[nn.Module]) -> dict[str, Tensor | None]:
    tensors: dict[str, Tensor | None] = {}
    for i, model in enumerate(models):
        tensors |= {f"{i}.{n}": t for n, t in (*model.named_parameters(), *model.named_buffers())}
        tensors |= {f"{i}.{n}.grad": p.grad for n, p in model.named_parameters()}
    return tensors


def _agree(what: str, got: Any, wanted: Any) -> None:
    """Equal to the last bit; otherwise the error says what is not."""
    try:
        assert_same(got, wanted)
    except AssertionError as error:
        raise AssertionError(f"wrong: {what}") from error


def _agree_on_all(now: dict[str, Any], before: dict[str, Any]) -> None:
    for what, value in before.items():
        _agree(f"{what} after an error", now[what], value)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and values; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (a.numel() == 1 and math.isnan(a) and math.isnan(b))
