"""Objects that pass between blocks, and what ordinary closures do with modules besides calling them."""

import copy
import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.audit import Audit, nothing_lost
from helpers.nets import Block, Net, labelled
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fastals


@dataclass
class State:
    """What a block takes and gives."""

    hidden: torch.Tensor
    depth: int


class StateBlock(Block):
    def forward(self, state):
        return State(super().forward(state.hidden), state.depth + 1)


class StateNet(Net):
    def forward(self, x):
        state = State(self.inp(x), 0)
        for block in self.blocks:
            state = block(state)
        return self.head(state.hidden)


class Scaled(Block):
    """Takes a number, an array or an adjacency beside its input."""

    def forward(self, x, by):
        if isinstance(by, torch.Tensor):
            return by @ super().forward(x)
        return super().forward(x) * float(np.sum(by))


class ScaledNet(Net):
    by = staticmethod(lambda x: 1.0)

    def forward(self, x):
        x = self.inp(x)
        by = self.by(x)
        for block in self.blocks:
            x = block(x, by)
        return self.head(x)


def loss_of(m, x, y):
    return F.cross_entropy(m(x), y)


def late_count(kind, x):
    """How many activations are large: none at first, more and more as the weights move."""
    return kind(1 + int((x.detach().abs() > 1.2).sum()) / x.numel())


SCALES = {
    "numpy scalar": functools.partial(late_count, np.float64),
    "array": functools.partial(late_count, lambda n: np.full(3, n)),
    "sparse": lambda x: torch.eye(len(x)).to_sparse(),
}


@pytest.mark.parametrize("by", SCALES)
@pytest.mark.parametrize("order", ["top_down", "bottom_up"])
def test_arguments_of_other_kinds_are_compared_by_value(by, order):
    model = ScaledNet(blocks=[Scaled() for _ in range(3)])
    model.by = SCALES[by]
    audit = Audit(model, trust=0.3, max_trials=2, order=order)
    for _ in range(8):
        x, y = labelled()
        audit.step(lambda m, x=x, y=y: loss_of(m, x, y))


def test_a_sparse_argument_and_dataclasses_keep_the_cache():
    x, y = labelled()
    graph = torch.eye(len(x)).to_sparse()
    sparse = ScaledNet(blocks=[Scaled() for _ in range(3)])
    sparse.by = lambda x: graph
    for model in (sparse, StateNet(blocks=[StateBlock() for _ in range(3)])):
        opt = fastals.ALS(model, cache="check", schedule="sweep")
        for _ in range(3):
            opt.step(lambda: loss_of(model, x, y))  # noqa: B023
        assert opt.last_forwards < 0.7 * (1 + opt.report.trials)


def test_a_copy_that_the_closure_makes_computes_with_its_own_weights():
    model, (x, y) = Net(), labelled()
    copies = []

    def closure():
        copies.append(copy.deepcopy(model))
        return loss_of(model, x, y)

    opt = fastals.ALS(model)
    opt.step(closure)
    with torch.no_grad():
        for p in copies[0].parameters():
            p.zero_()
        assert not copies[0](x).any()


def test_a_block_that_changes_its_mode_between_passes():
    def twice(m, x, y):
        m.train()
        loss = loss_of(m, x, y)
        if loss.item() < 1.1:
            m.eval()
        return loss + loss_of(m, x + 0.1, y)

    audit = Audit(Net(blocks=[nn.Sequential(Block(), nn.Dropout(0.3)) for _ in range(3)]).train(), trust=0.2)
    for _ in range(8):
        x, y = labelled()
        audit.step(lambda m, x=x, y=y: twice(m, x, y))


def test_attributes_that_the_loss_comes_to_read_later():
    class Balanced(Block):
        def forward(self, x):
            self.aux = x.square().mean()
            return super().forward(x)

    audit = Audit(Net(blocks=[Balanced() for _ in range(3)]), trust=0.3, max_trials=2, order="bottom_up")
    for i in range(8):
        x, y = labelled()
        weight = max(0, i - 2) * 0.3
        audit.step(lambda m, x=x, y=y, w=weight: loss_of(m, x, y) + w * sum(b.aux for b in m.blocks))


class Positive(nn.Module):
    """A scale that must stay positive, or torch refuses it."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = Net(outputs=1), nn.Parameter(torch.full((1,), 0.2))

    def forward(self, x):
        return -torch.distributions.Normal(self.net(x), self.scale, validate_args=True).log_prob(x[:, :1]).mean()


def test_weights_far_away_may_be_refused_by_the_closure():
    model, (x, _) = Positive(), labelled()
    opt = fastals.ALS(model, cache="check")
    for _ in range(3):
        opt.step(lambda: model(x))
    assert all(opt.engine.learned.trusted.values())


def test_a_buffer_that_is_assigned_before_every_step_does_not_pile_up():
    model, (x, y) = Net(), labelled()
    opt = fastals.ALS(model)
    for _ in range(6):
        model.register_buffer("mask", torch.ones(16), persistent=False)
        opt.step(lambda: loss_of(model, x, y))
    assert len(opt.engine.learned.memory.spare) < 3


def test_models_under_vmap():
    model, (x, y) = Net(), labelled()
    opt = fastals.ALS(model)
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(torch.vmap(model)(x), y))
    assert opt.report.loss_after < opt.report.loss_before


@pytest.mark.parametrize(("schedule", "at"), [("sweep", 3), ("relay", 1)])
def test_an_error_that_speaks_of_gradients_only_by_chance_is_the_users(schedule, at):
    model, (x, y) = Net(), labelled()
    opt = fastals.ALS(model, schedule=schedule)
    opt.step(lambda: loss_of(model, x, y))
    calls = iter(range(100))

    def closure():
        if next(calls) == at:
            raise RuntimeError("storage is being upgraded")
        return loss_of(model, x, y)

    with nothing_lost(opt, model, error=RuntimeError, match="upgraded"):
        opt.step(closure)
    assert not opt.engine.learned.gradients


def test_weights_that_the_forward_normalizes_stand_as_they_stood_after_an_error():
    layers = [nn.Embedding(10, 8, max_norm=1.0), nn.Flatten(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 2)]
    model, tokens = nn.Sequential(*layers), torch.randint(10, (6, 3))
    opt = fastals.ALS(model)
    opt.step(lambda: model(tokens).square().mean())
    with torch.no_grad():
        layers[0].weight.mul_(3)
    calls = iter(range(100))

    def closure():
        loss = model(tokens).square().mean()
        if next(calls) == 1:
            raise KeyError("in a trial")
        return loss

    with nothing_lost(opt, model, error=KeyError, match="in a trial"):
        opt.step(closure)


# Hooks of state dicts


def trained_net():
    torch.manual_seed(0)
    model = Net()
    opt = fastals.ALS(model)
    x, y = labelled()
    opt.step(lambda: F.cross_entropy(model(x), y))
    return model, opt


def test_hooks_of_state_dicts_may_wrap_them():
    model, opt = trained_net()
    plain, seen = opt.state_dict(), []
    opt.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda _, state: {"wrapped": state, "version": 2})
    opt.register_state_dict_post_hook(lambda _, state: seen.append(sorted(state)))
    saved = opt.state_dict()
    assert seen == ["pre", ["version", "wrapped"]]
    assert saved["wrapped"]["param_groups"] == plain["param_groups"]
    again = copy.deepcopy(model)
    other = fastals.ALS(again)
    other.register_load_state_dict_pre_hook(lambda _, state: state["wrapped"])
    other.register_load_state_dict_post_hook(lambda opt: seen.append(opt.param_groups[0]["count"]))
    for _ in range(2):
        other.load_state_dict(saved)
    assert seen[2:] == [1, 1]
    x, y = labelled()
    for m, o in ((model, opt), (again, other)):
        o.step(lambda m=m: F.cross_entropy(m(x), y))
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_a_hook_that_removes_a_moment_is_found_out():
    model, opt = trained_net()
    other = fastals.ALS(copy.deepcopy(model))
    before = other.state_dict()

    def without_moments(_, state):
        return state | {"state": {i: {"step": s["step"]} for i, s in state["state"].items()}}

    handle = other.register_load_state_dict_pre_hook(without_moments)
    with pytest.raises(ValueError, match="no 'exp_avg_sq'"):
        other.load_state_dict(opt.state_dict())
    assert other.state_dict() == before
    handle.remove()
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["count"] == 1
