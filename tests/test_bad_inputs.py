"""Tables of bad inputs: each is refused by an error that says what to do, and moves nothing."""

import copy
import json
import math
import os
import random
import re
import shutil
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from helpers.films import arguments, save_model, save_table
from helpers.tiny import assert_same
from torch import nn

import fastals
from fastals import presets
from fastals.cli.main import main
from fastals.eager import EagerALS

NAN, INF = math.nan, math.inf
VECTOR, META = torch.ones(2), torch.ones((), device="meta")


class Scene:
    """A model with buffers and dropout, its optimizer after two steps, and the closure of a mini-batch."""

    def __init__(self, optimizer=fastals.ALS, *, writes=False):
        self.generator = torch.Generator().manual_seed(0)
        self.take_batch()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 2))
        self.writes = writes
        self.opt = optimizer(self.model)
        for _ in range(2):
            self.opt.step(self.loss)

    def take_batch(self):
        """Another mini-batch, so that there is always something to learn."""
        self.x = torch.randn(4, 3, generator=self.generator)

    def loss(self):
        """The loss; a forward may write a weight, as one that normalizes it."""
        if self.writes:
            with torch.no_grad():
                self.model[0].weight.clamp_(-9, 9)
        return (self.model(self.x) - self.x[:, :2]).square().mean()

    def snapshot(self):
        """Copies of all that a refused input must leave alone."""
        return {
            "model": [t.clone() for t in self.model.state_dict().values()],
            "state": copy.deepcopy(self.opt.state_dict()),
            "torch": torch.get_rng_state(),
            "others": [list(np.random.get_state()[1]), random.getstate()],
        }

    @contextmanager
    def refused(self, error, message):
        """The code inside is refused so, and moves nothing."""
        before = self.snapshot()
        with pytest.raises(error, match=f"(?s){message}") as raised:
            yield
        assert raised.type is error
        assert_same(self.snapshot(), before)

    def go_on(self):
        """A good step works."""
        self.take_batch()
        count = self.opt.param_groups[0]["count"]
        assert math.isfinite(self.opt.step(self.loss))
        assert self.opt.param_groups[0]["count"] == count + 1


@pytest.fixture(scope="module")
def scene():
    """One for all rows that leave nothing behind, as each of them shows."""
    torch.manual_seed(0)
    return Scene()


@pytest.fixture(scope="module")
def writing_scene():
    """The same with a forward that writes a weight."""
    torch.manual_seed(0)
    return Scene(writes=True)


def table(rows):
    """The rows of a table as test items, named by their keys."""
    return pytest.mark.parametrize("row", rows.values(), ids=map(str, rows))


# Constants and settings: what they must be, and a value out of the range

CONSTANTS = {
    "lr": ("0 or more, and finite", -1.0),
    "betas": ("two numbers from 0 up to 1", (0.9, 1.0)),
    "eps": ("greater than 0, and finite", 0.0),
    "weight_decay": ("0 or more, and finite", -0.1),
    "c": ("between 0 and 1", 1.0),
    "backtrack": ("between 0 and 1", 0),
    "growth": ("1 or more, and finite", 0.9),
    "max_trials": ("an integer of at least 1", 0),
    "trust": ("greater than 0 and finite, or None", -3),
    "initial": ("one of warm", "cold"),
    "eta_init": ("greater than 0 and finite, or None", 0.0),
    "eta_min": ("greater than 0, and finite", 0.0),
    "eta_max": ("at least eta_min, and finite", 1e-12),
    "reference": ("one of monotone", "none"),
    "polyak_c": ("greater than 0, and finite", -1),
    "nonmonotone_weight": ("from 0 to 1", 1.5),
    "smoothing": ("from 0 up to 1", 1.0),
}
SETTINGS = {
    "direction": ("one of adam, sgd", "newton"),
    "momentum": ("one of none, after, tested", "before"),
    "schedule": ("one of relay", "all"),
    "order": ("one of top_down", "sideways"),
    "every": ("an integer of at least 1 or 'auto'", 0),
    "merge_below": ("greater than 0 and finite, or None", 0.0),
    "max_grad_norm": ("greater than 0 and finite, or None", -1.0),
    "cache": ("True, False or 'check'", "chek"),
    "fused": ("True, False or 'auto'", "yes"),
    "seed": ("an integer", 1.5),
}
ALLOWED = {("cache", "bool"), ("fused", "bool")}
KINDS = {"text": "big", "nan": NAN, "inf": INF, "bool": True, "list": [1], "vector": VECTOR, "meta": META}


SOME_KINDS = {kind: KINDS[kind] for kind in ("text", "nan", "bool", "vector")}


def values(names, kinds=KINDS):
    """For each argument a value out of its range, and values of other kinds."""
    rows = {}
    for name, (words, outside) in names.items():
        for kind, value in {"outside": outside, **kinds}.items():
            if (name, kind) not in ALLOWED:
                rows[f"{name}-{kind}"] = name, value, f"^{name} must be .*{re.escape(words)}.*, not "
    return rows


@table(values(CONSTANTS | SETTINGS))
def test_an_argument(row):
    name, value, message = row
    for optimizer in (fastals.ALS, EagerALS):
        with pytest.raises(ValueError, match=message):
            optimizer(nn.Linear(2, 2), **{name: value})


@table(values(CONSTANTS, SOME_KINDS))
def test_a_constant_that_the_user_has_set_in_a_group(row, scene):
    name, value, message = row
    group = scene.opt.param_groups[1]
    kept, group[name] = group[name], value
    for step in (lambda: scene.opt.step(scene.loss), lambda: scene.opt.graphed(lambda _: scene.loss())(scene.x)):
        with scene.refused(ValueError, f"{message}.*in the group '1'"):
            step()
    group[name] = kept
    scene.go_on()


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_that_the_user_has_removed(name, scene):
    group = scene.opt.param_groups[0]
    kept = group.pop(name)
    with scene.refused(ValueError, f"there is no {name} .in the group '0'.: set it"):
        scene.opt.step(scene.loss)
    group[name] = kept
    scene.go_on()


def test_a_constant_that_changes_in_place_is_looked_at_in_every_step():
    s = Scene(lambda model: fastals.ALS(model, lr=torch.tensor(1.0), betas=[0.9, 0.999]))
    for change, back, message in (
        (lambda g: g["lr"].fill_(NAN), lambda g: g["lr"].fill_(1.0), "lr must be"),
        (lambda g: g["betas"].__setitem__(0, 2.0), lambda g: g["betas"].__setitem__(0, 0.9), "betas must be"),
    ):
        change(s.opt.param_groups[0])
        with s.refused(ValueError, message):
            s.opt.step(s.loss)
        back(s.opt.param_groups[0])
        s.go_on()


# What an optimizer is made of


ANOTHER, COMPLEX = nn.Linear(1, 1), nn.Linear(1, 1, dtype=torch.cfloat)


def weight():
    return nn.Parameter(torch.ones(3))


def tied():
    p = weight()
    return [p, p]


PASS = "pass the model, fastals.units"
MAKING = {
    "none": (lambda o, m: o(None), TypeError, f"NoneType: {PASS}"),
    "number": (lambda o, m: o(5), TypeError, f"int: {PASS}"),
    "text": (lambda o, m: o("model"), TypeError, f"str: {PASS}"),
    "dict": (lambda o, m: o(m.state_dict()), TypeError, f"OrderedDict: {PASS}"),
    "class": (lambda o, m: o(nn.Linear), TypeError, f"type: {PASS}"),
    "tensor": (lambda o, m: o(weight()), TypeError, f"Parameter: {PASS}"),
    "empty": (lambda o, m: o([]), ValueError, f"empty: {PASS}"),
    "used up": (lambda o, m: o(iter([])), ValueError, f"empty: {PASS}"),
    "list of none": (lambda o, m: o([None]), TypeError, f"one is a NoneType: {PASS}"),
    "list of models": (lambda o, m: o([m, m]), TypeError, f"one is a Sequential: {PASS}"),
    "tensors and groups": (lambda o, m: o([weight(), {"params": [weight()]}]), TypeError, f"one is a dict: {PASS}"),
    "twice": (lambda o, m: o(tied()), ValueError, "twice.*pass each of them once"),
    "in two groups": (lambda o, m: o([{"params": [p]} for p in tied()]), ValueError, "more than one.*pass each"),
    "computed": (lambda o, m: o([weight() * 2]), ValueError, "result of an operation: pass its parameter"),
    "misspelt params": (lambda o, m: o([{"parms": [weight()]}]), TypeError, r"under 'params', not \['parms'\]"),
    "params none": (lambda o, m: o([{"params": None}]), TypeError, r"list\(model.parameters\(\)\), not a NoneType"),
    "params module": (lambda o, m: o([{"params": m[0]}]), TypeError, r"list\(model.parameters\(\)\), not a Linear"),
    "params stack": (lambda o, m: o([{"params": m}]), TypeError, f"one is a Linear: {PASS}"),
    "params set": (lambda o, m: o([{"params": {weight()}}]), TypeError, r"list\(model.parameters\(\)\), not a set"),
    "params text": (lambda o, m: o([{"params": "all"}]), TypeError, r"list\(model.parameters\(\)\), not a str"),
    "setting in a group": (
        lambda o, m: o([{"params": [weight()], "schedule": "sweep"}]), ValueError, "schedule .*pass it to the optim",
    ),
    "name number": (lambda o, m: o([{"params": [weight()], "name": 3}]), ValueError, "name must be a string, not 3"),
    "unit text": (lambda o, m: o([{"params": [weight()], "unit": "a"}]), ValueError, "unit must be an integer"),
    "nan memory": (lambda o, m: o([{"params": [weight()], "step_size": NAN}]), ValueError, "step_size must be 0"),
    "bad constant": (lambda o, m: o([{"params": [weight()], "trust": -3}]), ValueError, "trust must .*'group0'"),
    "frozen": (lambda o, m: o(copy.deepcopy(m).requires_grad_(False)), ValueError, "no trainable.*set requires_grad"),
    "no parameters": (lambda o, m: o(nn.ReLU()), ValueError, "no trainable.*set requires_grad"),
    "complex": (lambda o, m: o(COMPLEX), ValueError, "'weight' is complex.*view_as_real"),
    "model text": (lambda o, m: o(m, model="bert"), TypeError, "model must be a torch.nn.Module, not a str: leave"),
    "model list": (lambda o, m: o(m.parameters(), model=[m]), TypeError, "must be a torch.nn.Module, not a list"),
    "two models": (lambda o, m: o(m, model=ANOTHER), ValueError, "two models: pass the one to train"),
    "another model": (lambda o, m: o([weight()], model=ANOTHER), ValueError, "in no unit.*pass all of them"),
    "units left out": (lambda o, m: o(fastals.units(m)[1:], model=m), ValueError, "'0.weight' first: pass all of them"),
    "one module": (lambda o, m: o(m, modules=ANOTHER), TypeError, r"modules=\[teacher\], not a Linear"),
    "a stack as modules": (lambda o, m: o(m, modules=m), TypeError, r"modules=\[teacher\], not a Sequential"),
    "modules none": (lambda o, m: o(m, modules=None), TypeError, r"modules=\[teacher\], not a NoneType"),
    "modules texts": (lambda o, m: o(m, modules=["teacher"]), TypeError, r"must be a list of modules.*not a list"),
    "unknown argument": (lambda o, m: o(m, trus=1), TypeError, "unexpected keyword argument 'trus'"),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", [fastals.ALS, EagerALS])
@table(MAKING)
def test_what_an_optimizer_is_made_of(row, optimizer, scene):
    make, error, message = row
    with scene.refused(error, message):
        make(optimizer, scene.model)
    scene.go_on()


def test_other_process_groups_are_none():
    for group in ("nccl", 3, [0, 1]):
        with pytest.raises(TypeError, match=r"process_group must be what torch.distributed.new_group .*leave it out"):
            fastals.ALS(nn.Linear(2, 2), process_group=group)
    with pytest.raises(ValueError, match=r"params is empty: pass the model"):
        fastals.ALS([{"params": []}])


BY = "^by must be 'block', 'model', an integer or a list of patterns, not "
UNITS = {
    "none": ({"model": None}, TypeError, "NoneType: pass the model"),
    "text": ({"model": "bert"}, TypeError, "str: pass the model"),
    "list": ({"model": [nn.Linear(1, 1)]}, TypeError, "list: pass the model"),
    "by none": ({"by": None}, ValueError, BY),
    "by misspelt": ({"by": "blok"}, ValueError, BY),
    "by bool": ({"by": True}, ValueError, BY),
    "by float": ({"by": 1.5}, ValueError, BY),
    "by bytes": ({"by": b"block"}, ValueError, BY),
    "by set": ({"by": {"0"}}, ValueError, BY),
    "by no pattern": ({"by": []}, ValueError, BY),
    "by numbers": ({"by": [0, 1]}, ValueError, BY),
    "by 0": ({"by": 0}, ValueError, "by must be 1 to 3"),
    "by too many": ({"by": 9}, ValueError, "has 3 blocks, so by must be 1 to 3"),
    "by negative": ({"by": -1}, ValueError, "by must be 1 to 3"),
    "by no expression": ({"by": ["("]}, ValueError, r"'\(' is no regular expression .*re.escape"),
    "by no match": ({"by": ["attention"]}, ValueError, r"\['attention'\]: names look like '0.weight'"),
    "decay negative": ({"weight_decay": -1}, ValueError, "weight_decay must be 0 or more, or None, not -1"),
    "decay text": ({"weight_decay": "a"}, ValueError, "weight_decay must be 0 or more, or None, not 'a'"),
    "decay nan": ({"weight_decay": NAN}, ValueError, "weight_decay must be 0 or more, or None, not nan"),
    "decay bool": ({"weight_decay": True}, ValueError, "weight_decay must be 0 or more, or None, not True"),
    "decay tensor": ({"weight_decay": VECTOR}, ValueError, "weight_decay must be 0 or more, or None, not tensor"),
    "decayed alone": ({"decayed": ["0.weight"]}, ValueError, "list of names, beside a weight_decay"),
    "decayed text": ({"weight_decay": 0.1, "decayed": "0.weight"}, ValueError, "must be a list of names.*'0.weight'"),
    "decayed number": ({"weight_decay": 0.1, "decayed": 5}, ValueError, "must be a list of names.*not 5"),
    "decayed unknown": ({"weight_decay": 0.1, "decayed": ["x"]}, ValueError, "the model has no parameter 'x'"),
}  # fmt: skip


@table(UNITS)
def test_units(row):
    changes, error, message = row
    with pytest.raises(error, match=message):
        fastals.units(**{"model": nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))} | changes)


@pytest.mark.parametrize("value", [0, -1, "a", NAN, INF, None])
def test_the_preset_of_a_length(value):
    with pytest.raises(ValueError, match="batches_per_epoch must be greater than 0, and finite, not "):
        presets.sls(value)


ADDED = {
    "none": (lambda s: None, TypeError, "a group is a dict.*'params', not NoneType"),
    "list": (lambda s: [weight()], TypeError, "a group is a dict.*'params', not list"),
    "empty dict": (lambda s: {}, TypeError, r"a group is a dict.*'params', not \[\]"),
    "module": (lambda s: {"params": s.model[0]}, TypeError, r"list\(model.parameters\(\)\), not a Linear"),
    "names": (lambda s: {"params": ["0.weight"]}, TypeError, f"one is a str: {PASS}"),
    "already there": (lambda s: {"params": [s.model[0].weight]}, ValueError, "more than one.*pass each of them once"),
    "stranger": (lambda s: {"params": [weight()]}, ValueError, "does not have: add them to the model first"),
    "strange pair": (lambda s: {"params": [("w", weight())]}, ValueError, "does not have: add them to the model"),
    "constant": (lambda s: {"params": s.late(), "trust": -3}, ValueError, "trust must be greater than 0 and finite"),
    "setting": (lambda s: {"params": s.late(), "cache": False}, ValueError, "cache is a setting.*to the optimizer"),
}  # fmt: skip


class LateScene(Scene):
    """A scene whose model gets another layer after the optimizer was made."""

    def late(self):
        """The parameters of that layer, made at the first call."""
        if len(self.model) == 4:
            self.model.append(nn.Linear(2, 2).requires_grad_(False))
        return list(self.model[4].parameters())


@table(ADDED)
def test_a_group_that_is_added(row):
    group, error, message = row
    s = LateScene()
    added = group(s)
    with s.refused(error, message):
        s.opt.add_param_group(added)
    s.go_on()


def test_pairs_of_name_and_parameter_may_be_added():
    s = LateScene()
    s.late()
    s.opt.add_param_group({"params": s.model[4].requires_grad_(True).named_parameters()})
    assert s.opt.param_groups[-1]["param_names"] == ["4.weight", "4.bias"]
    s.go_on()


# Closures

CLOSURE = r"opt.step\(lambda: model\(\*\*batch\).loss\)"


def backward_itself(s):
    loss = s.loss()
    loss.backward()
    return loss


def another_weight(s):
    with torch.no_grad():
        s.model[0].weight.add_(1.0)
    return s.loss()


def own_generator():
    generator = torch.Generator()
    return lambda s: s.loss() + torch.randn((), generator=generator)


def step_inside(s):
    s.opt.step(s.loss)
    return s.loss()


def fails(s):
    raise KeyError("the user's")


RETURNING = {
    "nothing": (lambda s: None, TypeError, f"returned None.*{CLOSURE}"),
    "vector": (lambda s: s.loss() * VECTOR, ValueError, r"shape \(2,\): reduce it to a scalar"),
    "no element": (lambda s: s.model(s.x)[:0], ValueError, r"shape \(0, 2\): reduce it to a scalar"),
    "int": (lambda s: 3, TypeError, "returned a int, not a tensor: return the loss"),
    "float": (lambda s: s.loss().item(), TypeError, "returned a float, not a tensor: return the loss"),
    "tuple": (lambda s: (s.loss(), 1), TypeError, "returned a tuple, not a tensor: return the loss"),
    "output": (lambda s: {"loss": s.loss()}, TypeError, r"returned a dict, not a tensor.*outputs\.loss"),
    "complex": (lambda s: s.loss() * 1j, ValueError, "complex or sparse: return one real number"),
    "sparse": (lambda s: s.loss().to_sparse(), ValueError, "complex or sparse: return one real number, dense"),
    "nan": (lambda s: s.loss() * NAN, FloatingPointError, "is nan: the step was refused.*Look at this mini-batch"),
    "inf": (lambda s: s.loss() * INF, FloatingPointError, "is inf: the step was refused.*Look at this mini-batch"),
    "integers": (lambda s: torch.tensor(3), RuntimeError, "has no gradient: evaluate it without no_grad"),
    "detached": (lambda s: s.loss().detach(), RuntimeError, r"has no gradient.*without \.detach\(\)"),
    "no_grad": (torch.no_grad()(Scene.loss), RuntimeError, "has no gradient: evaluate it without no_grad"),
    "error": (fails, KeyError, "the user's"),
}  # fmt: skip
CLOSURES = {name: (lambda s, f=f: lambda: f(s), *rest) for name, (f, *rest) in RETURNING.items()} | {
    "number": (lambda s: 5, TypeError, f"int is no closure.*{CLOSURE}"),
    "loss": (lambda s: s.loss(), TypeError, f"Tensor is no closure.*{CLOSURE}"),
    "text": (lambda s: "loss", TypeError, f"a list of closures.*{CLOSURE}"),
    "dict": (lambda s: {"a": s.loss}, TypeError, f"a list of closures.*{CLOSURE}"),
    "no micro-batch": (lambda s: [], TypeError, "empty: pass one closure for each"),
    "no more": (lambda s: iter(()), TypeError, "empty: pass one closure for each"),
    "micro-batches of none": (lambda s: [None], TypeError, f"a list of closures.*{CLOSURE}"),
    "mixed": (lambda s: [s.loss, 3], TypeError, f"a list of closures.*{CLOSURE}"),
    "nested": (lambda s: [[s.loss]], TypeError, f"a list of closures.*{CLOSURE}"),
    "one is none": (lambda s: [s.loss, lambda: None], TypeError, f"returned None.*{CLOSURE}"),
    "one is nan": (lambda s: [s.loss, lambda: s.loss() * NAN], FloatingPointError, "is nan: the step was refused"),
    "with an argument": (lambda s: lambda batch: s.loss(), TypeError, "missing 1 .*argument: 'batch'"),
}  # fmt: skip
IN_ALS = {
    "nothing at all": (lambda s: None, TypeError, f"needs a closure.*{CLOSURE}"),
    "meta": (lambda s: lambda: s.loss().to("meta"), ValueError, "device meta.*load the weights"),
    "backward": (lambda s: lambda: backward_itself(s), RuntimeError, "called backward itself: let it return the loss"),
    "step": (lambda s: lambda: step_inside(s), RuntimeError, "called opt.step.*let it return the loss only"),
    "own generator": (lambda s: partial(own_generator(), s), ValueError, "same function.*a generator of its own"),
    "writes a weight": (lambda s: lambda: another_weight(s), ValueError, "same function at every call of a step"),
}  # fmt: skip


@table(CLOSURES | IN_ALS)
def test_a_closure(row, writing_scene):
    closure, error, message = row
    given = closure(writing_scene)
    with writing_scene.refused(error, message):
        writing_scene.opt.step(given)
    writing_scene.go_on()


@table(CLOSURES)
def test_a_closure_of_the_slow_twin_moves_no_weight(row):
    closure, error, message = row
    s = Scene(EagerALS)
    given, before = closure(s), [p.detach().clone() for p in s.model.parameters()]
    with pytest.raises(error, match=f"(?s){message}"):
        s.opt.step(given)
    assert_same([p.detach() for p in s.model.parameters()], before)


@table(RETURNING)
def test_a_loss_of_a_batch(row, scene):
    loss, error, message = row
    step = scene.opt.graphed(lambda _: loss(scene))
    with scene.refused(error, message):
        step(scene.x)
    scene.go_on()


GRAPHED = {
    "none": ({"loss_fn": None}, TypeError, "loss_fn must be a function of a batch"),
    "a loss": ({"loss_fn": VECTOR}, TypeError, "loss_fn must be a function of a batch"),
    "no signature": ({"max_signatures": 0}, ValueError, "max_signatures must be an integer of at least 1, not 0"),
    "signatures text": ({"max_signatures": "a"}, ValueError, "max_signatures must be an integer of at least 1"),
    "signatures float": ({"max_signatures": 1.5}, ValueError, "max_signatures must be an integer of at least 1"),
    "pad 0": ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be an integer of at least 1, not 0"),
    "pad bool": ({"pad_to_multiple_of": True}, ValueError, "pad_to_multiple_of must be an integer of at least 1"),
    "pad text": ({"pad_to_multiple_of": "8"}, ValueError, "pad_to_multiple_of must be an integer of at least 1"),
    "pad no texts": ({"pad_to_multiple_of": 8}, TypeError, "mappings with input_ids and attention_mask"),
}  # fmt: skip


@table(GRAPHED)
def test_a_function_of_a_batch(row, scene):
    changes, error, message = row
    with scene.refused(error, message):
        scene.opt.graphed(**{"loss_fn": lambda _: scene.loss()} | changes)(scene.x)
    scene.go_on()


LOSS = "loss= must be the loss whose gradients are in place, one real number, not "
BACKWARD = "backward must be a function of a loss, as accelerator.backward, not "
GIVEN = {
    "text": ({"loss": "0.5"}, TypeError, LOSS),
    "list": ({"loss": [0.5]}, TypeError, LOSS),
    "dict": ({"loss": {}}, TypeError, LOSS),
    "bool": ({"loss": True}, TypeError, LOSS),
    "complex": ({"loss": 1j}, TypeError, LOSS),
    "vector": ({"loss": VECTOR}, ValueError, f"{LOSS}.*shape"),
    "meta": ({"loss": META}, ValueError, f"{LOSS}.*meta"),
    "complex tensor": ({"loss": torch.tensor(1j)}, ValueError, f"{LOSS}.*complex"),
    "nan": ({"loss": NAN}, FloatingPointError, "is nan: the step was refused"),
    "inf": ({"loss": torch.tensor(INF)}, FloatingPointError, "is inf: the step was refused"),
    "another": ({"loss": 100.0}, ValueError, "is not what the closure returns.*must evaluate the very loss"),
    "with backward": ({"loss": 0.5, "backward": torch.Tensor.backward}, TypeError, "pass one of them"),
    "backward text": ({"backward": "yes"}, TypeError, BACKWARD),
    "backward bool": ({"backward": True}, TypeError, BACKWARD),
    "backward that does nothing": ({"backward": lambda loss: None}, RuntimeError, "must take the gradient of the loss"),
    "backward with a scale": ({"backward": lambda loss: (65536 * loss).backward()}, RuntimeError, "scaler.unscale_"),
}  # fmt: skip


@table(GIVEN)
def test_gradients_that_came_with_a_loss(row):
    given, error, message = row
    s = Scene()
    s.model[2].p = 0.0  # or the loss may be another
    s.loss().backward()
    with s.refused(error, message):
        s.opt.step(s.loss, **given)
    s.go_on()


@pytest.mark.parametrize("given", [False, True])
def test_a_step_without_any_gradient_is_told(given):
    s, other = Scene(), Scene()
    s.opt.zero_grad()
    before = [p.detach().clone() for p in s.model.parameters()]
    closure = s.loss if given else other.loss
    with pytest.warns(UserWarning, match=r"no parameter .* has a gradient.*call loss.backward\(\) before") as told:
        s.opt.step(closure, **{"loss": s.loss()} if given else {})
    assert told[0].filename == __file__
    assert_same([p.detach() for p in s.model.parameters()], before)


# Models


def sparse():
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Flatten(), nn.Linear(8, 1))
    return model, torch.zeros(4, 2, dtype=torch.long)


def on_meta():
    return nn.Linear(3, 2, device="meta"), torch.ones(4, 3, device="meta")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [(sparse, RuntimeError, "sparse gradient: use dense ones"), (on_meta, ValueError, "device meta.*load the weights")],
)
def test_a_model_that_cannot_be_trained(make, error, message):
    model, x = make()
    opt = fastals.ALS(model)
    with pytest.raises(error, match=message):
        opt.step(lambda: model(x).square().mean())
    assert not opt.state


def test_integers_among_the_parameters_are_left_alone():
    s = Scene()
    indices = nn.Parameter(torch.arange(3), requires_grad=False)
    s.opt = fastals.ALS([indices, *s.model.parameters()])
    s.go_on()
    assert torch.equal(indices, torch.arange(3))


# States


def without(key):
    return lambda state: state["param_groups"][0].pop(key)


def with_value(key, value):
    return lambda state: state["param_groups"][0].update({key: value})


def with_state(key, value):
    return lambda state: state["state"][0].update({key: value})


def renamed(state):
    state["param_groups"][0]["param_names"] = ["a", "b"]


OTHERS = "saved by another optimizer; load what"
STEP, MOMENT = "has no count 'step'.*load what", "has no tensor of real numbers 'exp_avg_sq'.*load what"
STATES = {
    "no state": (lambda state: state.pop("state"), "no dict 'state'.*load what"),
    "no groups": (lambda state: state.pop("param_groups"), "no list 'param_groups'.*load what"),
    "state none": (lambda state: state.update(state=None), "no dict 'state'.*load what"),
    "state list": (lambda state: state.update(state=[1]), "no dict 'state'.*load what"),
    "entry none": (lambda state: state["state"].update({0: None}), "no dict 'state'.*load what"),
    "groups number": (lambda state: state.update(param_groups=5), "no list 'param_groups'.*load what"),
    "groups of none": (lambda state: state.update(param_groups=[None]), "no list 'param_groups'.*load what"),
    "fewer groups": (lambda state: state["param_groups"].pop(), "build it with the same fastals.units"),
    "no group": (lambda state: state.update(param_groups=[]), "build it with the same fastals.units"),
    "other names": (renamed, "build it with the same fastals.units"),
    "names number": (with_value("param_names", 5), "no list 'param_groups'.*load what"),
    "params missing": (without("params"), "no list 'param_groups'.*load what"),
    "names missing": (without("param_names"), "build it with the same fastals.units"),
    **{f"{key} missing": (without(key), f"no '{key}': it was {OTHERS}") for key in ("name", "unit", "trust", "lr")},
    **{f"trust {v}": (with_value("trust", v), "trust must be greater than 0 and finite") for v in (NAN, -1, "a", INF)},
    **{f"lr {v}": (with_value("lr", v), "lr must be 0 or more, and finite") for v in (NAN, -1, "a", None)},
    **{f"betas {v}": (with_value("betas", v), "betas must be two numbers") for v in (0.9, (2, 2), None)},
    **{f"count {v}": (with_value("count", v), "count must be an integer of at least 0") for v in (NAN, -1, "3", 1.5)},
    **{f"step_size {v}": (with_value("step_size", v), "step_size must be 0 or") for v in (NAN, -1, "a", None, INF)},
    **{f"average {v}": (with_value("average", v), "average must be a finite number") for v in (NAN, "a", None)},
    "relative_step -1": (with_value("relative_step", -1), "relative_step must be 0 or more"),
    "last_search -1": (with_value("last_search", -1), "last_search must be an integer of at least 0"),
    "unit text": (with_value("unit", "a"), "unit must be an integer"),
    "name none": (with_value("name", None), "name must be a string"),
    "step missing": (lambda state: state["state"][0].pop("step"), STEP),
    **{f"step {v}": (with_state("step", v), STEP) for v in (None, "3", 3, VECTOR, META)},
    **{f"step of {v}": (with_state("step", torch.tensor(v)), STEP) for v in (-1.0, NAN, INF, 1.5)},
    **{f"moment {v}": (with_state("exp_avg_sq", v), MOMENT) for v in (None, "a", 1.0, [[1.0] * 3] * 4)},
    "moment complex": (with_state("exp_avg_sq", torch.ones(4, 3, dtype=torch.cfloat)), MOMENT),
    "moment integers": (with_state("exp_avg_sq", torch.ones(4, 3, dtype=torch.int)), MOMENT),
    "moment meta": (with_state("exp_avg_sq", torch.ones(4, 3, device="meta")), MOMENT),
    "moment scalar": (with_state("exp_avg_sq", torch.tensor(1.0)), r"another model.*shape \(\)"),
    "moment shape": (with_state("exp_avg_sq", torch.ones(7)), r"another model.*shape \(7,\)"),
    "moment missing": (lambda state: state["state"][0].pop("exp_avg_sq"), "with another momentum or direction"),
}  # fmt: skip


@table(STATES)
def test_a_state(row, scene):
    change, message = row
    state = copy.deepcopy(scene.opt.state_dict())
    change(state)
    with scene.refused(ValueError, message):
        scene.opt.load_state_dict(state)
    scene.go_on()


@pytest.mark.parametrize("state", [None, [], 5, "checkpoint.pt"])
def test_a_state_that_is_no_dict(state, scene):
    with scene.refused(TypeError, "a state is a dict, not a .*: load what opt.state_dict"):
        scene.opt.load_state_dict(state)
    scene.go_on()


def test_the_state_of_another_optimizer():
    s = Scene()
    s.opt = fastals.ALS(list(s.model.parameters()))
    with s.refused(ValueError, f"no 'name': it was {OTHERS}"):
        s.opt.load_state_dict(torch.optim.AdamW(s.model.parameters()).state_dict())
    s.go_on()


# The command line

GOOD = "text,label\n" + "good film,1\nbad film,0\n" * 10
OBJECTS = '{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n' * 5
CSV = r"must be a table with a line of column names"
JSONL = r"must be JSON with one object on each line, as \{\"text\""
FILES = {
    "nothing.csv": ("", CSV),
    "head.csv": ("text,label\n", f"holds no rows: it {CSV}"),
    "binary.csv": (bytes(range(256)), f"{CSV}, in UTF-8"),
    "latin.csv": (("text,label\n" + "café,1\n" * 9).encode("latin-1"), f"{CSV}, in UTF-8"),
    "utf16.csv": (GOOD.encode("utf-16"), f"{CSV}, in UTF-8"),
    "utf16.jsonl": (OBJECTS.encode("utf-16"), f"{JSONL}.*in UTF-8"),
    "ragged.csv": (GOOD + "a,b,c,d\n", f"saw 4.*{CSV}"),
    "columns.csv": ("a,b\n1,2\n", "no column 'text': the columns are a, b; name them with --text-column"),
    "one.csv": ("text,label\n" + "a,1\n" * 9, "has 1 class, and needs at least two: name the column"),
    "apart.csv": ("text,label\n" + "".join(f"a,{i}.5\n" for i in range(30)), "more examples are needed"),
    "unlabelled.csv": (GOOD + "a,\n", "1 rows have no label in the column 'label'.*row 21 first: drop them"),
    "no_text.csv": (GOOD + ",1\n", "1 rows have no text in the column 'text'.*row 21 first: drop them"),
    "nothing.jsonl": ("", f"holds no rows: it {JSONL}"),
    "blank.jsonl": ("\n \n", f"holds no rows: it {JSONL}"),
    "broken.jsonl": (OBJECTS + '{"text": \n', f"line 11 is no JSON.*{JSONL}"),
    "truncated.jsonl": (OBJECTS + '{"text": "b", "lab', f"line 11 is no JSON.*{JSONL}"),
    "lists.jsonl": ('["a", 1]\n["b", 0]\n', f"line 1 is a list and no object.*{JSONL}"),
    "numbers.jsonl": ("1\n2\n", f"line 1 is a int and no object.*{JSONL}"),
    "array.json": ('[{"text": "a", "label": 1}, {"text": "b", "label": 0}]', f"line 1 is a list and no obj.*{JSONL}"),
    "missing.jsonl": (OBJECTS + '{"text": "b"}\n', "1 rows have no label.*row 11 first: drop them or correct them"),
    "null_text.jsonl": (OBJECTS + '{"text": null, "label": 1}', "1 rows have no text.*row 11 first: drop them"),
    "nested_text.jsonl": (OBJECTS + '{"text": {"a": 1}, "label": 1}', "1 rows have no text.*or one that is no text"),
    "listed_text.jsonl": (OBJECTS + '{"text": ["a"], "label": 1}', "1 rows have no text.*or one that is no text"),
    "nested_label.jsonl": (OBJECTS + '{"text": "a", "label": [1]}', "1 rows have no label.*or one that is no text"),
    "nan_label.jsonl": (OBJECTS + '{"text": "a", "label": NaN}', "1 rows have no label.*row 11 first"),
    "table.tsv": (GOOD.replace(",", "\t"), "neither bbc-news, nor a csv or jsonl file"),
    "table.txt": (GOOD, "neither bbc-news, nor a csv or jsonl file"),
}  # fmt: skip
TO_REST = r"must be greater than 0, and at most 1e\+30"
LINES = {
    # values of another kind or out of their range
    **{f"steps {v}": (["--steps", v], "argument --steps: invalid int value") for v in ("a", "nan", "inf", "1.5", "")},
    **{f"steps {v}": (["--steps", v], "--steps must be at least 1") for v in ("0", "-2")},
    **{f"epochs {v}": (["--epochs", v], f"--epochs {TO_REST}") for v in ("0", "-1", "nan", "inf")},
    "epochs a": (["--epochs", "a"], "argument --epochs: invalid float value"),
    "steps and epochs": (["--steps", "1", "--epochs", "1"], "give --steps or --epochs, not both"),
    **{f"batch-size {v}": (["--batch-size", v], "--batch-size must be at least 1") for v in ("0", "-1")},
    "batch-size a": (["--batch-size", "a"], "argument --batch-size: invalid int value"),
    "batch-size large": (["--batch-size", "500"], "--batch-size must be at most 48"),
    **{f"max-length {v}": (["--max-length", v], "--max-length must be at least 1") for v in ("0", "-1")},
    "max-length long": (["--max-length", "33"], "--max-length 33 is more than .* positions for: choose 32 or less"),
    "max-length 1.5": (["--max-length", "1.5"], "argument --max-length: invalid int value"),
    "checkpoint-every 0": (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1"),
    "seed a": (["--seed", "a"], "argument --seed: invalid int value"),
    "seed large": (["--seed", "99999999999999999999"], "--seed must fit in 64 bits: choose a smaller one"),
    **{f"adamw-lr {v}": (["--adamw-lr", v], f"--adamw-lr {TO_REST}") for v in ("0", "-1", "nan", "inf", "1e38")},
    **{f"c {v}": (["--c", v], "c must be between 0 and 1") for v in ("0", "1.5", "nan", "-1")},
    "c a": (["--c", "a"], "argument --c: invalid float value"),
    **{f"trust {v}": (["--trust", v], "trust must be greater than 0 and finite") for v in ("0", "-1", "inf")},
    **{f"lr {v}": (["--lr", v], "lr must be 0 or more, and finite") for v in ("-1", "nan", "inf")},
    **{f"weight-decay {v}": (["--weight-decay", v], "--weight-decay must be 0 or more") for v in ("-1", "nan")},
    "merge-below 0": (["--merge-below", "0"], "--merge-below must be greater than 0 and finite"),
    # names
    **{
        f"{name} unknown": ([f"--{name}", "best"], f"argument --{name}: invalid choice: 'best' .choose from")
        for name in ("optimizer", "precision", "device", "anneal", "schedule", "momentum", "order")
    },
    "preset unknown": (["--preset", "best"], "no preset 'best': the presets are plasls"),
    "units no pattern": (["--units", "nothing_like_this,"], "names look like"),
    "units no expression": (["--units", "("], "no regular expression .*re.escape"),
    "units too many": (["--units", "7"], "by must be 1 to 2"),
    "units 0": (["--units", "0"], "by must be 1 to 2"),
    "units comma": (["--units", ","], "a list of patterns, not"),
    "model unknown": (["--model", "./no/model"], "'./no/model' is neither a folder with a model and a tokenizer nor"),
    "model file": (["--model", "films.csv"], "is neither a folder with a model and a tokenizer nor"),
    "model no hub id": (["--model", "a b"], "is neither a folder with a model and a tokenizer nor"),
    "dataset unknown": (["--dataset", "no-such-data"], "neither bbc-news, nor a csv or jsonl file"),
    "dataset missing": (["--dataset", "nowhere.csv"], "no file nowhere.csv: give the path"),
    "dataset folder": (["--dataset", "folder.csv"], "no file folder.csv: give the path"),
    "dataset long name": (["--dataset", "x" * 300 + ".csv"], "name too long|no file x"),
    "dataset glue": (["--dataset", "glue/nope"], "no task 'nope' .*the tasks are cola"),
    "text-column unknown": (["--text-column", "sentence"], "the columns are text, label; name them"),
    "label-column unknown": (["--label-column", "class"], "the columns are text, label; name them with"),
    "text-column twice too often": (["--text-column", "text"] * 3, "one text or a pair"),
    "text-column label": (["--text-column", "label"], "another column than --label-column"),
    "label-column text": (["--label-column", "text"], "another column than --label-column"),
    **{
        f"{name} empty": ([f"--{name}", ""], f"--{name} must not be empty: leave it out")
        for name in ("model", "dataset", "preset", "units", "name", "output", "text-column", "label-column")
    },
    # where a run lies
    **{
        f"name {v}": (["--name", v], "must name one folder: --output says where it lies")
        for v in ("../../x", "/tmp/fastals-x", "a/b", "..", ".", "a/")
    },
    "name long": (["--name", "x" * 300], "a name in --output or --name is too long .*: choose a shorter one"),
    "output file": (["--output", "films.csv"], "films.csv is no folder that can be written"),
    "output in a file": (["--output", "films.csv/x"], "is no folder that can be written to: choose another --output"),
    # options that the run would not go by
    "adamw c": (["--optimizer", "adamw", "--c", "0.2"], "leave out --c, or add --compare"),
    "adamw preset": (["--optimizer", "adamw", "--preset", "sls"], "leave out --preset, or add --compare"),
    "adamw units": (["--optimizer", "adamw", "--units", "model"], "leave out --units, or add --compare"),
    "als adamw-lr": (["--adamw-lr", "0.1"], "--adamw-lr is for the optimizer adamw.*leave it out, or add --compare"),
    "columns of bbc-news": (["--dataset", "bbc-news", "--text-column", "x"], "own columns: leave out --text-column"),
}  # fmt: skip
WITHOUT_RUN = {
    "nothing": ([], "the following arguments are required: command"),
    "unknown command": (["train"], "invalid choice: 'train' .choose from 'finetune', 'report', 'bench'"),
    "unknown option": (["finetune", "--best"], "unrecognized arguments: --best"),
    "stray word": (["finetune", "films.csv"], "unrecognized arguments: films.csv"),
    "no value": (["finetune", "--steps"], "argument --steps: expected one argument"),
    "resume nowhere": (["finetune", "--resume", "nowhere"], "nowhere is no run"),
    "resume file": (["finetune", "--resume", "films.csv"], "films.csv is no run"),
    "resume empty folder": (["finetune", "--resume", "folder.csv"], "folder.csv is no run"),
    "resume with steps": (["finetune", "--resume", "x", "--steps", "9"], "started with: leave out --steps"),
    "resume with others": (
        ["finetune", "--resume", "x", "--c", "0.2", "--max-length", "9", "--name", "y"],
        "leave out --max-length, --name, --c",
    ),
    "report nothing": (["report"], "the following arguments are required: FOLDER"),
    "report nowhere": (["report", "nowhere"], "nowhere is no finished run: it has no summary.json"),
    "report file": (["report", "films.csv"], "films.csv is no finished run: it has no summary.json"),
    "report into a file": (["report", "done", "--output", "films.csv"], "no folder that can be written to"),
    "bench nothing": (["bench"], "the following arguments are required: command"),
    "bench unknown": (["bench", "run"], "invalid choice: 'run' .choose from 'report', 'compare'"),
    "bench report nothing": (["bench", "report"], "the following arguments are required: FILE"),
    "bench report nowhere": (["bench", "report", "nowhere.json"], "nowhere.json cannot be read: No such file"),
    "bench report folder": (["bench", "report", "folder.csv"], "folder.csv cannot be read: Is a directory"),
    "bench report other": (["bench", "report", "films.csv"], "films.csv is no pytest-benchmark file"),
    "bench compare one": (["bench", "compare", "a.json"], "the following arguments are required: B.json"),
    "bench compare nowhere": (["bench", "compare", "a.json", "b.json"], "a.json cannot be read: No such file"),
    "bench compare other": (["bench", "compare", "films.csv", "films.csv"], "films.csv is no pytest-benchmark file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model with 32 positions."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to be in, with a good table, a folder where a file is looked for, and a finished run."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    save_table(tmp_path / "films.csv")
    for name in ("folder.csv", "done"):
        (tmp_path / name).mkdir()
    summary = {
        "optimizer": "als",
        "steps": 1,
        "loss": 0.5,
        "accuracy": 0.9,
        "trials": 1.0,
        "seconds": 1.0,
        "forwards": 5.0,
    }
    (tmp_path / "done" / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def tree(place):
    """All files and folders with their contents."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in place.rglob("*")}


def refuses(line, message, place, capsys):
    """The command line ends with code 2, one message and nothing written."""
    before, beside = tree(place), set(os.listdir(place.parent))
    try:
        code = main(line)
    except SystemExit as left:  # argparse, which says how the command is used before
        code = left.code
    said = capsys.readouterr().err.strip()
    assert code == 2
    *usage, error = said.split("\n")
    assert re.search(message, error), said
    assert error.startswith("fastals")
    assert not usage or usage[0].startswith("usage: ")
    assert tree(place) == before
    assert set(os.listdir(place.parent)) == beside


@table(FILES)
def test_a_file_of_texts(row, request, model, place, capsys):
    content, message = row
    path = place / request.node.callspec.id
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = arguments(model, path, place, "--steps", "1")
    refuses(line, message, place, capsys)


@table(LINES)
def test_an_option(row, model, place, capsys):
    options, message = row
    refuses(arguments(model, "films.csv", place, *options), message, place, capsys)


@table(WITHOUT_RUN)
def test_a_command(row, place, capsys):
    line, message = row
    refuses(line, message, place, capsys)


def test_a_tokenizer_that_cannot_pad(model, place, capsys):
    other = shutil.copytree(model, place / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (other / name).unlink(missing_ok=True)
    (other / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    line = arguments(other, "films.csv", place, "--steps", "1")
    refuses(line, "has no token to pad texts with: save it with a pad_token", place, capsys)


def test_texts_stay_as_they_are_written(place):
    from fastals.cli.data import load_texts

    (place / "codes.csv").write_text("text,label\n" + "007,a\nNA,b\n" * 10)
    texts = load_texts("codes.csv")
    assert {text for (text,), _ in texts.train + texts.held_out} == {"007", "NA"}
