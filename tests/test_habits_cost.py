"""What the cache must still save in ordinary training code, and what ``cache="check"`` says of the rest."""

from itertools import pairwise

import pytest
import torch
from helpers.audit import Audit, nothing_lost
from helpers.nets import Block, Net, calls, counted, labelled
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastals

pytestmark = pytest.mark.filterwarnings("error:fastals")  # no unit may run uncached


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def share_computed(audit, losses, blocks):
    """Computed calls of the blocks, as a share of those in full forwards, after two steps to find things out."""
    for _ in range(2):
        audit.step(next(losses))
    calls.clear()
    computed, full = 0, 0
    for loss_of in losses:
        audit.step(loss_of)
        full += len(blocks) * (1 + audit.opt.report.trials)
    computed = sum(calls[id(b)] for b in blocks)
    assert audit.moved
    return computed / full


class UNet(nn.Module):
    """Levels are lists of blocks in lists; what goes down is concatenated on the way up."""

    class Joining(Block):
        """A block of two inputs."""

        def __init__(self):
            super().__init__()
            self.join = nn.Linear(32, 16)

        def forward(self, x):
            return super().forward(self.join(x))

    def __init__(self, levels=3):
        super().__init__()
        self.inp, self.middle, self.out = nn.Linear(8, 16), Block(), nn.Linear(16, 8)
        self.downs = nn.ModuleList(nn.ModuleList([Block(), Block()]) for _ in range(levels))
        self.ups = nn.ModuleList(nn.ModuleList([self.Joining(), self.Joining()]) for _ in range(levels))

    def forward(self, x):
        x, skipped = self.inp(x), []
        for level in self.downs:
            for block in level:
                x = block(x)
                skipped.append(x)
        x = self.middle(x)
        for level in self.ups:
            for block in level:
                x = block(torch.cat([x, skipped.pop()], -1))
        return self.out(x)


def test_blocks_in_nested_lists_are_cached():
    model = UNet()
    batches = (torch.randn(16, 8) for _ in range(5))
    losses = ((lambda m, x=x: (m(x) - x.flip(1)).square().mean()) for x in batches)
    assert share_computed(Audit(model), losses, counted(model)) < 0.8


class Dictionary(Block):
    """Returns a dictionary, of which the parent pops what it does not hand on."""

    def forward(self, x):
        return {"x": super().forward(x), "size": x.square().mean()}


class Several(Block):
    """Returns a list, to which the parent appends."""

    def forward(self, x):
        return [super().forward(x)]


class Popping(Net):
    def forward(self, x):
        x, sizes = self.inp(x), 0.0
        for block in self.blocks:
            out = block(x)
            sizes = sizes + out.pop("size")
            x = out.pop("x")
            assert not out
        return self.head(x) + 0.1 * sizes


class Appending(Net):
    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            outs = block(x)
            assert len(outs) == 1
            outs.append(x.roll(1, -1))
            x = sum(outs)
        return self.head(x)


class Overwriting(Net):
    """Puts another tensor into the block's dictionary."""

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            out = block(x)
            out["x"] = out["x"] / (1 + out["size"])
            x = out["x"]
        return self.head(x)


@pytest.mark.parametrize("make", [
    lambda: Popping(blocks=[Dictionary() for _ in range(4)]), lambda: Appending(blocks=[Several() for _ in range(4)]),
    lambda: Overwriting(blocks=[Dictionary() for _ in range(4)]),
], ids=["popping", "appending", "overwriting"])  # fmt: skip
@pytest.mark.parametrize("order", ["top_down", "bottom_up"])
def test_a_parent_may_take_outputs_apart(make, order):
    model = make()
    losses = ((lambda m, x=x, y=y: F.cross_entropy(m(x), y)) for x, y in (labelled() for _ in range(5)))
    assert share_computed(Audit(model, order=order), losses, counted(model)) < 0.8


class Distilling(nn.Module):
    """A student and its frozen teacher, in one order or the other."""

    def __init__(self, first):
        super().__init__()
        self.first, self.student, self.teacher = first, Net(), Net().requires_grad_(False)

    def forward(self, x):
        wanted = self.teach(x) if self.first == "teacher" else None
        scores = self.student(x)
        return (scores - (self.teach(x) if wanted is None else wanted)).square().mean()

    def teach(self, x):
        with torch.no_grad():
            return self.teacher(x)


@pytest.mark.parametrize("schedule", ["sweep", "relay"])
@pytest.mark.parametrize("where", ["teacher first", "student first", "other module", "other module, with gradients"])
def test_a_frozen_teacher_is_computed_once_a_step(where, schedule):
    if "other" not in where:
        models = (Distilling(where.split()[0]),)
        teacher = models[0].teacher

        def loss_of(m, x):
            return m(x)
    else:
        models = (Net(), Net().requires_grad_(False))
        teacher = models[1]

        def loss_of(m, t, x):
            scores = m(x)
            with torch.set_grad_enabled("gradients" in where and torch.is_grad_enabled()):
                wanted = t(x)
            return (scores - wanted).square().mean()

    audit, computed = Audit(*models, schedule=schedule), []
    for _ in range(6):
        x = torch.randn(8, 8)
        calls.clear()
        audit.step(lambda *m, x=x: loss_of(*m, x))
        computed.append([calls[id(b)] for b in counted(teacher)])
        assert audit.opt.report.trials > (3 if schedule == "sweep" else 0)
    assert min(computed[2:]) == [1, 1, 1], "in a step that does not verify"


def test_a_frozen_judge_behind_the_student_is_computed_anew():
    """What depends on the student is no constant."""
    student, judge = Net(outputs=8), Net().requires_grad_(False)
    wanted = torch.randn(8, 3)
    xs = (torch.randn(8, 8) for _ in range(4))
    Audit(student, judge).train((lambda m, j, x=x: (j(m(x)) - wanted).square().mean()) for x in xs)


class Quantized(nn.Module):
    """A layer beside frozen weights that are stored in a buffer."""

    def __init__(self, megabytes):
        super().__init__()
        self.register_buffer("packed", torch.randint(0, 100, (megabytes << 18,), dtype=torch.int32))
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        return x + torch.tanh(self.fc(x)) * self.packed[:16]


class Copied(TorchDispatchMode):
    """Counts the bytes that are copied from some tensors' memory."""

    def __init__(self, tensors):
        super().__init__()
        self.watched, self.bytes = {t.untyped_storage().data_ptr() for t in tensors}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "copy" in func.name() or "clone" in func.name():
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() in self.watched:
                    self.bytes += t.nbytes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", ["in the model", "in another module"])
def test_frozen_buffers_are_not_copied_step_by_step(where):
    store = Net(blocks=[Quantized(4) for _ in range(3)])
    models = (store,) if where == "in the model" else (Net(outputs=8), store.requires_grad_(False))
    opt = fastals.ALS(models[0], **({"modules": [store]} if len(models) > 1 else {}))
    x, y = labelled()

    def closure():
        h = x
        for model in models:
            h = model(h)
        return F.cross_entropy(h, y)

    for _ in range(2):
        opt.step(closure)
    with Copied([b.packed for b in store.blocks]) as seen:
        store.blocks[0].packed.clone()
    assert seen.bytes == 4 << 20, "it counts"
    with Copied([b.packed for b in store.blocks]) as seen:
        opt.step(closure)
    assert opt.report.trials
    assert seen.bytes == 0


# Every trial compared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("schedule", ["sweep", "independent", "joint", "cycle", "relay"])
def test_check_finds_nothing_in_a_tidy_model(schedule, dtype):
    """Steps and reports are those without the check."""
    reports = []
    for cache in (True, "check"):
        torch.manual_seed(0)
        model = Net(blocks=[nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.2), nn.Tanh()) for _ in range(3)]).to(dtype)
        opt = fastals.ALS(model, cache=cache, schedule=schedule, trust=0.05)
        for _ in range(5):
            x, y = labelled(dtype=dtype)
            opt.step(lambda x=x, y=y, model=model: F.cross_entropy(model(x), y))
        reports.append([r.as_dict() for r in opt.reports])
        assert sum(r.trials for r in opt.reports) > 4
    assert reports[0] == reports[1]


class Whispering(nn.Module):
    """Leaves something for the block above, outside of the outputs."""

    below = ()

    def __init__(self, width=16):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x):
        change = self.fc(x)
        self.left = [change.mean()]
        return x + change * (1 + sum(b.left[0] for b in self.below))


def whispering():
    model = Net(blocks=[Whispering() for _ in range(4)])
    for lower, upper in pairwise(model.blocks):
        upper.below = (lower,)  # a tuple, so that it is no child
    return model, lambda m, x, y: F.cross_entropy(m(x), y)


class Kept(Block):
    """Keeps what it adds, for the loss; its output is right in any case."""

    def forward(self, x):
        self.kept = [self.fc(x)]
        return x + self.kept[0]


def kept():
    def loss_of(m, x, y):
        return F.cross_entropy(m(x), y) + sum(b.kept[0].square().mean() for b in m.blocks)

    return Net(blocks=[Kept() for _ in range(4)]), loss_of


@pytest.mark.parametrize(("make", "call"), [(whispering, r"blocks\.[1-3]|Whispering"), (kept, "")])
def test_check_raises_where_a_cached_trial_differs(make, call):
    """Each unit is tried and put back, so that the ones above it meet what its trial has left."""
    model, loss_of = make()
    opt = fastals.ALS(model, cache="check", schedule="independent", order="bottom_up", trust=0.3, max_trials=2)
    (x, y), units = labelled(), "|".join(g["name"] for g in opt.param_groups)
    with nothing_lost(opt, model, error=RuntimeError, match=rf"(?s)(?=.*\b({units})\b)(?=.*({call}))"):
        opt.step(lambda: loss_of(model, x, y))


def test_other_values_of_cache_are_refused():
    with pytest.raises(ValueError, match="cache"):
        fastals.ALS(Net(), cache="always")
