"""Blocks in nested lists, in lists of bare layers and in models that are a ``Sequential``."""

from collections import Counter

import pytest
import torch
from torch import nn

import fastals
from fastals.partition import blocks, boundaries

WIDTH = 6
X = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)


class Res(nn.Module):
    def __init__(self, wide=1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(wide * WIDTH, WIDTH), nn.SiLU(), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH))
        self.skip = nn.Linear(wide * WIDTH, WIDTH)

    def forward(self, x):
        return self.body(x) + self.skip(x)


class UNet(nn.Module):
    """Levels are lists of lists, with a bare layer at the end of each."""

    def __init__(self, levels=2):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.downs = nn.ModuleList(
            nn.ModuleList([nn.ModuleList([Res(), Res()]), nn.Linear(WIDTH, WIDTH)]) for _ in range(levels)
        )
        self.mid = Res()
        self.ups = nn.ModuleList(nn.ModuleList([Res(2), Res(2)]) for _ in range(levels))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x, skips = self.stem(x), []
        for level, down in self.downs:
            for block in level:
                x = block(x)
                skips.append(x)
            x = down(x)
        x = self.mid(x)
        for level in self.ups:
            for block in level:
                x = block(torch.cat([x, skips.pop()], -1))
        return self.out(x)


class Levels(nn.Module):
    """Levels that are dictionaries, and levels that are modules without a forward."""

    def __init__(self):
        super().__init__()
        bare = nn.Module()
        bare.block, bare.down = nn.ModuleList([Res(), Res()]), nn.Linear(WIDTH, WIDTH)
        self.levels = nn.ModuleList([nn.ModuleDict({"block": nn.ModuleList([Res()]), "down": Res()}), bare])
        self.mid = nn.Module()
        self.mid.first = Res()

    def forward(self, x):
        for level in self.levels:
            parts = level if isinstance(level, nn.ModuleDict) else vars(level)["_modules"]
            for block in parts["block"]:
                x = block(x)
            x = parts["down"](x)
        return self.mid.first(x)


class Listed(nn.ModuleList):
    """A list that is called, and so is a module like any other."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class Stack(nn.Module):
    """A stem, a list of given blocks, and task heads in a list of bare layers."""

    def __init__(self, *entries):
        super().__init__()
        self.stem, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(entries)
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 3)])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return [head(x) for head in self.heads]


class Bare(nn.Module):
    """A multi-layer perceptron whose layers are a list."""

    def __init__(self):
        super().__init__()
        self.stem, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(linear() for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class ResNet(nn.Module):
    """Stages that are sequences, as in torchvision."""

    def __init__(self):
        super().__init__()
        self.conv1, self.layer1, self.layer2 = linear(), nn.Sequential(Res(), Res()), nn.Sequential(Res(), Res())

    def forward(self, x):
        return self.layer2(self.layer1(self.conv1(x)))


class Branches(nn.Module):
    """A block with a list of blocks inside."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([Res(), Res()])

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


def linear():
    return nn.Linear(WIDTH, WIDTH)


STAGES = ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
DOWN, UP = ("0.0", "0.1", "1"), ("0", "1")
CASES = {
    "u-net": (UNet, [f"downs.{i}.{n}" for i in (0, 1) for n in DOWN] + [f"ups.{i}.{n}" for i in (0, 1) for n in UP]),
    "levels": (Levels, [f"levels.{n}" for n in ("0.block.0", "0.down", "1.block.0", "1.block.1", "1.down")]),
    "called-lists": (lambda: Stack(Listed([Res(), Res()]), Listed([linear()])), ["layers.0", "layers.1"]),
    "mixed-list": (lambda: Stack(linear(), Res(), linear()), ["layers.0", "layers.1", "layers.2"]),
    "bare-heads-beside-blocks": (lambda: Stack(Res(), Res()), ["layers.0", "layers.1"]),
    "bare": (Bare, ["layers.0", "layers.1", "layers.2"]),
    "resnet": (ResNet, STAGES),
    "resnet-in-sequential": (lambda: nn.Sequential(ResNet(), linear()), [f"0.{n}" for n in STAGES]),
    "bare-in-sequential": (lambda: nn.Sequential(Bare(), linear()), ["0.layers.0", "0.layers.1", "0.layers.2"]),
    "sequential-in-sequential": (
        lambda: nn.Sequential(linear(), nn.Sequential(Res(), Res()), nn.LayerNorm(WIDTH)),
        ["1.0", "1.1"],
    ),
    "stages-in-sequential": (
        lambda: nn.Sequential(nn.Sequential(Res(), Res()), nn.Sequential(Res(), Res())),
        ["0.0", "0.1", "1.0", "1.1"],
    ),
    "alone-in-sequential": (lambda: nn.Sequential(ResNet()), [f"0.{n}" for n in STAGES]),
    "sequential": (lambda: nn.Sequential(linear(), nn.Tanh(), Res(), linear()), ["0", "2", "3"]),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    build, expected = CASES[request.param]
    return build().train(), expected


def loss_of(model):
    out = model(X)
    return sum(o.square().mean() for o in (out if isinstance(out, list) else [out]))


def test_blocks_are_the_modules_that_are_called(case):
    model, expected = case
    assert list(blocks(model)) == expected
    groups = fastals.units(model)
    assert [g["name"] for g in groups if g["name"] not in ("embeddings", "head")] == expected
    names = [n for g in groups for n in g["param_names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


def test_every_called_module_is_in_one_boundary_or_around_them(case):
    model, _ = case
    called: Counter = Counter()
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: called.update([module]))
    model(X)
    found = boundaries(model)
    inside = Counter(m for b in found for m in b.modules())
    around = {m for m in model.modules() if any(b in found for b in m.modules()) and m not in found}
    assert set(blocks(model).values()) <= set(found) <= set(called)
    assert set(inside.values()) == {1}
    assert set(called) <= set(inside) | around


@pytest.mark.parametrize("schedule", ["sweep", "relay"])
def test_trials_are_cached_and_give_the_loss_of_full_forwards(case, schedule):
    model, _ = case
    opt = fastals.ALS(model, schedule=schedule, every=1, trust=0.02)
    for _ in range(len(opt.param_groups) if schedule == "relay" else 2):  # it ends with a search of the head
        state = torch.get_rng_state()
        opt.step(lambda: loss_of(model))
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        with torch.no_grad():
            assert float(loss_of(model)) == opt.report.loss_after
        torch.set_rng_state(after)
    assert opt.last_forwards < 1 + opt.report.trials


def test_a_module_in_two_levels_is_one_block():
    shared = Res()
    model = nn.ModuleList([nn.ModuleList([shared, Res()]), nn.ModuleList([shared, Res()])])
    assert list(blocks(model)) == ["0.0", "0.1", "1.1"]
