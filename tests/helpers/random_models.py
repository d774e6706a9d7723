"""Random small models with their losses, described by plain specs that print and shrink well.

A :class:`Case` holds all of it: :func:`build` makes its model, always the same one, and :func:`evaluate` its loss on a
mini-batch. Strategies for cases are at the end.

Autograd refuses a backward through a tensor that was written after an operation saved it. So the blocks add and
subtract what they or others write in place, and never multiply by it.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

WIDTH, VOCAB, SIZE = 4, 5, 4  # of the model, of its tokens, of a mini-batch
COINS = {
    "torch": lambda: float(torch.rand(())) < 0.5,
    "python": lambda: random.random() < 0.5,
    "numpy": lambda: np.random.rand() < 0.5,
}


@dataclass(frozen=True)
class BlockSpec:
    """One block: what it does, what its parent does around it, and whether it is trained."""

    kind: str = "plain"
    glue: str = "plain"
    frozen: bool = False


@dataclass(frozen=True)
class Case:
    """A model, the loss of a mini-batch, and the options of the optimizer."""

    blocks: tuple[BlockSpec, ...] = (BlockSpec(),)
    tied: bool = False  # the head's weight is the embedding
    token: bool = False  # a trained parameter that no child module holds
    closure: str = "one pass"
    coin: str = "torch"  # the generator that tosses the closure's coin
    penalty: bool = False  # the loss reads weights directly
    given: bool = False  # the caller computes gradients, and hands over the loss
    dtype: str = "float32"  # of the weights; "autocast" of float32 ones to bfloat16
    pieces: int = 1  # closures of a mini-batch, one for each micro-batch
    ragged: bool = False  # mini-batches are not of one size
    seed: int = 0
    options: dict = field(default_factory=dict)


# Blocks. Each has a child ``linear``, so that the model's list of blocks is taken for one.


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def hidden(self, x: Tensor) -> Tensor:
        """What the block adds to its input."""
        return torch.tanh(self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.hidden(x)


class Dropout(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.hidden(x), 0.3, self.training)


class AlphaDropout(Block):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.AlphaDropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x) + self.hidden(x)


class RowDropout(Block):
    """Drops its hidden units for some of the samples."""

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(len(x), 1) < 0.7 if self.training else 1.0
        return x + kept * self.hidden(x)


class NumpyDraw(Block):
    """Skips itself at random, and returns its input then."""

    def forward(self, x: Tensor) -> Tensor:
        return x if np.random.rand() < 0.5 else x + self.hidden(x)


class PythonDraw(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + random.random() * self.hidden(x)


class WritesInput(Block):
    """Changes its input and returns another tensor."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x.clone())
        x.mul_(0.9)
        return x + hidden


class ReturnsInput(Block):
    """Changes its input and returns it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.hidden(x.clone()))


class BatchNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.linear(x))


class SpectralNorm(Block):
    """Each use of the weight goes on with a power iteration, whose vectors are buffers."""

    def __init__(self) -> None:
        super().__init__()
        spectral_norm(self.linear)


class Replaced(Block):
    """Replaces its buffer at each call, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        self.mean = 0.8 * self.mean + 0.2 * hidden.detach().mean(0)
        return x + hidden - self.mean


class Late(Block):
    """A buffer that is None until the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        if self.first is None:
            self.first = hidden.detach().mean(0)
        return x + hidden - self.first


class Codebook(Block):
    """Codes that follow what they encode, written in place and read by the output."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        distances = (hidden.detach().unsqueeze(1) - self.codes).square().sum(-1)
        if self.training:
            self.codes.mul_(0.8).add_(0.2 * hidden.detach().mean(0))
        return x + hidden - self.codes[distances.argmin(1)]


class Data(Block):
    """Assigns to ``.data`` of its buffer, behind the version counter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        self.mean.data = 0.8 * self.mean + 0.2 * hidden.detach().mean(0)
        return x + hidden - self.mean


class MovingCopy(Block):
    """A frozen copy of the weights that follows them in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.linear.parameters(), strict=True):
                slow.lerp_(fast, 0.2)
        return x + self.hidden(x) - F.linear(x, self.slow.weight.clone(), self.slow.bias.clone())


class NestedTuple(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.hidden(x)
        return x + hidden, {"hidden": hidden}


class NestedDict(Block):
    """The parent pops from its output."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.hidden(x)
        return {"x": x + hidden, "hidden": hidden}


class NestedList(Block):
    """The parent appends to its output."""

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.hidden(x)
        return [x, hidden]


class Appends(Block):
    """Reads the last entry of a list that the parent hands over, and appends to it."""

    takes = "memory"

    def forward(self, x: Tensor, memory: list[Tensor]) -> Tensor:
        hidden = self.hidden(x)
        if memory:
            hidden = hidden + 0.5 * memory[-1].mean(0)
        memory.append(hidden)
        return x + hidden


class Stores(Block):
    """Enters something into a dict that the parent hands over."""

    takes = "store"

    def forward(self, x: Tensor, store: dict[int, Tensor]) -> Tensor:
        hidden = self.hidden(x)
        store[len(store)] = hidden
        return x + hidden


class Masked(Block):
    """Takes a mask, which the parent makes anew for each call."""

    takes = "mask"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.hidden(x).masked_fill(mask, 0.0)


class Scaled(Block):
    """Takes a number, which the parent reads off its input."""

    takes = "scale"

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return x + scale * self.hidden(x)


class Hooked(Block):
    """A hook on the block keeps its output, which the loss reads."""


class HookedInside(Block):
    """A hook on a child of the block keeps features, which the loss reads."""


class Auxiliary(Block):
    """Leaves a second loss in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.aux: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        self.aux = hidden.square().mean()
        return x + hidden


class Peeking(Block):
    """Reads a weight of another module through a reference that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.peek: Callable[[], Tensor] = lambda: torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.hidden(x) * (1 + self.peek().mean())


class Shared(Block):
    """All blocks of this kind hold the same second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: nn.Module = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.shared(self.hidden(x)))


class Nested(Block):
    """Blocks in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Dropout(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for block in self.inner:
            x = block(x)
        return x


class Adapted(Block):
    """A frozen layer with a trained LoRA beside it, which starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x) + self.up(self.down(F.dropout(x, 0.1, self.training))))


class Checkpointed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def inner(self, x: Tensor, training: bool) -> Tensor:
        """It runs again in the backward, when the model may have left the mode of the forward."""
        norm = self.norm
        normed = F.batch_norm(
            self.linear(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, training=training
        )
        return F.dropout(torch.tanh(normed), 0.3, training)

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, x, self.training, use_reentrant=False)


DRAWING = {
    "dropout": Dropout, "alpha dropout": AlphaDropout, "row dropout": RowDropout, "numpy draw": NumpyDraw,
    "python draw": PythonDraw,
}  # fmt: skip
WRITING = {
    "batch norm": BatchNorm, "spectral norm": SpectralNorm, "replaced buffer": Replaced, "late buffer": Late,
    "codebook": Codebook, "buffer data": Data, "moving copy": MovingCopy, "checkpointed": Checkpointed,
}  # fmt: skip
ALIASING = {
    "writes input": WritesInput, "returns input": ReturnsInput, "tuple": NestedTuple, "dict": NestedDict,
    "list": NestedList,
}  # fmt: skip
ARGUMENTS = {"masked": Masked, "scaled": Scaled}
SHARING = {"shared": Shared}
INSIDE = {"nested": Nested, "adapter": Adapted}
AGAIN = "again"  # the block before, once more
HIDDEN = {
    "appends": Appends, "stores": Stores, "hooked": Hooked, "hooked inside": HookedInside, "auxiliary": Auxiliary,
    "peeking": Peeking,
}  # fmt: skip
KINDS: dict[str, type[Block]] = {"plain": Block} | DRAWING | WRITING | ALIASING | ARGUMENTS | SHARING | INSIDE | HIDDEN
GLUES = ("plain", "residual", "dropout", "in place", "twice", "skips", "tosses", "selects")
BEHIND_COUNTERS = ("in place data",)


class Teacher(nn.Module):
    """Other logits of the same tokens, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.dropout(self.embed(tokens).mean(1), 0.3, self.training))


class Model(nn.Module):
    """Embeddings, blocks and a head; ``forward`` returns logits of each sample.

    Attributes:
        features: what the hooks have kept in the last pass.
        fuse: an error to raise between the last block and the head, or None.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.glues = [spec.glue for spec in case.blocks]
        self.features: list[Tensor] = []
        self.fuse: BaseException | None = None
        self.embed = nn.Embedding(VOCAB, WIDTH)
        if case.token:
            self.token = nn.Parameter(torch.randn(WIDTH))
        if case.closure in ("self-conditioning", "rollout"):
            self.feed = nn.Linear(VOCAB, WIDTH)
        self.blocks = nn.ModuleList()
        for spec in case.blocks:
            self.blocks.append(self.blocks[-1] if spec.kind == AGAIN else KINDS[spec.kind]())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        if case.tied:
            self.head.weight = self.embed.weight
        if case.closure.startswith("teacher"):
            self.teacher = Teacher().requires_grad_(False)
        self._connect()
        for block, spec in zip(self.blocks, case.blocks, strict=True):
            if spec.frozen:
                (block.linear if isinstance(block, Shared) else block).requires_grad_(False)

    def _connect(self) -> None:
        """Give the blocks what they share, peek at and keep."""
        shared = [block for block in self.blocks if isinstance(block, Shared)]
        for block in shared:
            block.shared = shared[0].shared
        others = [*(block.linear for block in self.blocks), self.head]
        for i, block in enumerate(dict.fromkeys(self.blocks)):
            if isinstance(block, Peeking):
                block.peek = lambda other=others[i + 1]: other.weight
            elif isinstance(block, Hooked):
                block.register_forward_hook(self._keep)
            elif isinstance(block, HookedInside):
                block.linear.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        del module, args
        self.features.append(output)

    def forward(self, tokens: Tensor, condition: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        self.features.clear()
        x = self.embed(tokens).mean(1)
        if hasattr(self, "token"):
            x = x + self.token
        if condition is not None:
            x = x + self.feed(condition)
        if shift is not None:
            x = x + shift
        held: dict[str, Any] = {"memory": [], "store": {}}
        for block, glue in zip(self.blocks, self.glues, strict=True):
            x = self._glued(block, glue, x, held)
        if self.fuse is not None:
            raise self.fuse
        for kept in [*held["memory"], *held["store"].values()]:
            x = x + 0.5 * kept.mean(0)
        return self.head(self.norm(x))

    def _glued(self, block: nn.Module, glue: str, x: Tensor, held: dict) -> Tensor:
        """The block's output after what the parent does around its call."""

        def call(x: Tensor) -> Tensor:
            if not hasattr(block, "takes"):
                return unpacked(block(x))
            held["mask"] = torch.arange(WIDTH) == 1
            held["scale"] = round(float(x.detach().mean()), 1)
            return unpacked(block(x, **{block.takes: held[block.takes]}))

        match glue:
            case "residual":
                return x + 0.5 * call(x)
            case "dropout":
                return F.dropout(call(x), 0.2, self.training)
            case "in place":
                return call(x).mul_(1.1)
            case "in place data":
                x = call(x)
                x.data.mul_(1.1)
                return x
            case "twice":
                return call(call(x))
            case "skips" if float(x.detach().mean()) > 0:
                return skipped(block, x)
            case "tosses" if np.random.rand() < 0.4:
                return skipped(block, x)
            case "selects":
                count = 2 + int(float(x.detach().mean()) > 0)
                rows = x.detach().square().sum(1).argsort(descending=True, stable=True)[:count]
                return x.index_copy(0, rows, call(x[rows]))
        return call(x)


def skipped(block: nn.Module, x: Tensor) -> Tensor:
    """The input; the block leaves nothing for the loss."""
    if isinstance(block, Auxiliary):
        block.aux = None
    return x


def unpacked(output: Tensor | tuple | dict | list) -> Tensor:
    """A block's output as one tensor; dicts and lists are changed on the way."""
    if isinstance(output, dict):
        return output.pop("x") + 0.5 * output.pop("hidden")
    if isinstance(output, list):
        output.append(0.5 * output[-1])
        return sum(output)
    if isinstance(output, tuple):
        return output[0] + 0.5 * output[1]["hidden"]
    return output


# The losses of a mini-batch


def one_pass(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens), labels)


def micro_batches(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    halves = zip(tokens.chunk(2), labels.chunk(2), strict=True)
    return sum(F.cross_entropy(model(t), y) for t, y in halves) / 2


def selection(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    """A second pass over the hardest samples of the first one, more or fewer of them."""
    each = F.cross_entropy(model(tokens), labels, reduction="none")
    count = max(2, int((each.detach() > each.detach().mean()).sum()))
    hard = each.detach().argsort(descending=True, stable=True)[:count]
    return each.mean() + F.cross_entropy(model(tokens[hard]), labels[hard])


def self_conditioning(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    """By the toss of a coin, the model reads its own prediction."""
    condition = None
    if COINS[case.coin]():
        with torch.no_grad():
            condition = model(tokens).softmax(-1)
    return F.cross_entropy(model(tokens, condition), labels)


def rollout(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    """Two or three rounds; each reads the prediction of the one before, as numbers and as tokens."""
    condition, losses = None, []
    for _ in range(2 + COINS[case.coin]()):
        logits = model(tokens, condition)
        losses.append(F.cross_entropy(logits, labels))
        condition = logits.softmax(-1)
        tokens = torch.cat([tokens[:, 1:], logits.argmax(-1, keepdim=True)], 1)
    return sum(losses) / len(losses)


def teacher_before(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    target = model.teacher(tokens)
    logits = model(tokens)
    return F.cross_entropy(logits, labels) + F.mse_loss(logits, target)


def teacher_after(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = model(tokens)
    return F.cross_entropy(logits, labels) + F.mse_loss(logits, model.teacher(tokens))


def without_gradient(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    """The first pass is without gradients."""
    with torch.no_grad():
        target = model(tokens)
    logits = model(tokens)
    return F.cross_entropy(logits, labels) + F.mse_loss(logits, target)


def second_in_eval(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = model(tokens)
    model.eval()
    try:
        return F.cross_entropy(logits, labels) + F.mse_loss(model(tokens), logits.detach())
    finally:
        model.train()


def slope(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    """A penalty on the gradient with respect to the input."""
    shift = torch.zeros(len(tokens), WIDTH, dtype=model.norm.weight.dtype, requires_grad=True)
    loss = F.cross_entropy(model(tokens, shift=shift), labels)
    (gradient,) = torch.autograd.grad(loss, shift, create_graph=True)
    return loss + gradient.square().sum()


def enabled_slope(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    """The same, with gradients switched on by the closure itself."""
    with torch.enable_grad():
        return slope(case, model, tokens, labels)


CLOSURES: dict[str, Callable[[Case, Model, Tensor, Tensor], Tensor]] = {
    "one pass": one_pass, "micro-batches": micro_batches, "selection": selection,
    "self-conditioning": self_conditioning, "rollout": rollout, "teacher before": teacher_before,
    "teacher after": teacher_after, "without gradient": without_gradient, "second in eval": second_in_eval,
    "slope": slope, "enabled slope": enabled_slope,
}  # fmt: skip


def evaluate(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    """The loss of the mini-batch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "autocast"):
        loss = CLOSURES[case.closure](case, model, tokens, labels)
    left = [block.aux for block in model.blocks if isinstance(block, Auxiliary) and block.aux is not None]
    kept = [feature.square().mean() for feature in model.features]
    penalty = [0.05 * p.square().sum() for p in model.parameters() if p.requires_grad and case.penalty]
    return sum(left + kept + penalty, loss)


def closures(case: Case, model: Model, tokens: Tensor, labels: Tensor) -> list[Callable[[], Tensor]]:
    """A closure for each micro-batch; the loss of the mini-batch is their sum."""
    pieces = zip(tokens.chunk(case.pieces), labels.chunk(case.pieces), strict=True)
    return [lambda piece=piece: evaluate(case, model, *piece) / case.pieces for piece in pieces]


def build(case: Case) -> Model:
    """The case's model; the same one each time. The generators stay as they are."""
    dtype = torch.float32 if case.dtype == "autocast" else getattr(torch, case.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return Model(case).to(dtype).train()


def batches(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Mini-batches without end."""
    generator = torch.Generator().manual_seed(case.seed)
    sizes = random.Random(case.seed)
    while True:
        size = case.pieces * (SIZE + (sizes.randrange(3) if case.ragged else 0))
        yield torch.randint(VOCAB, (size, 3), generator=generator), torch.randint(VOCAB, (size,), generator=generator)


# Draws


OPTIONS = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(["sweep", "independent", "joint", "cycle", "relay"]),
        "order": st.sampled_from(["top_down", "bottom_up", "random"]),
        "momentum": st.sampled_from(["none", "none", "after"]),
        "trust": st.sampled_from([0.01, 0.05, 0.3]),
        "max_trials": st.integers(2, 4),
        "c": st.sampled_from([0.1, 0.5, 0.95]),  # the larger, the more trials are rejected
    }
)


def cases(
    kinds: dict | tuple = tuple(KINDS), glues: tuple = ("plain",), closures: tuple = ("one pass",), **fixed: object
) -> st.SearchStrategy[Case]:
    """Random cases with blocks of these kinds, or plain ones, in these glues, and with these losses."""
    block = st.builds(
        BlockSpec,
        kind=st.sampled_from(list(dict.fromkeys(["plain", *kinds]))) | st.sampled_from(list(kinds)),
        glue=st.sampled_from(glues),
        frozen=st.sampled_from([False, False, False, True]),
    )
    drawn = {
        "blocks": (st.lists(block, min_size=1, max_size=4) | st.lists(block, min_size=3, max_size=4)).map(tuple),
        "tied": st.booleans(),
        "token": st.booleans(),
        "closure": st.sampled_from(closures),
        "coin": st.sampled_from(list(COINS)),
        "penalty": st.booleans(),
        "given": st.sampled_from([False, False, True]),
        "dtype": st.sampled_from(["float32", "bfloat16", "float64"]),
        "seed": st.integers(0, 99),
        "options": OPTIONS,
    }
    return st.builds(Case, **(drawn | {name: st.just(value) for name, value in fixed.items()}))


# Every argument that changes the steps; the common values more than once.
ARGUMENTS_OF_ALS = {
    "schedule": ("relay", "relay", "sweep", "sweep", "independent", "joint", "cycle"),
    "order": ("top_down", "bottom_up", "random"),
    "direction": ("adam", "adam", "adam", "sgd"),
    "momentum": ("none", "none", "after", "tested"),
    "reference": ("monotone", "monotone", "nonmonotone", "smoothed"),
    "initial": ("warm", "warm", "reset", "polyak", "random"),
    "every": (1, 1, 2, 3, "auto"),
    "lr": (1.0, 1.0, 0.3),
    "weight_decay": (0.0, 0.0, 0.1),
    "max_grad_norm": (None, None, 0.1),
    "merge_below": (None, None, 0.03, 1e9),
    "trust": (0.01, 0.05, 0.3),
    "max_trials": (1, 2, 3, 4),
    "c": (0.1, 0.5, 0.95),
}


def set_up(seed: int) -> Case:
    """The random set-up of this number: any legal one, with every argument drawn.

    Three things are left out. No memo can see writes behind the version counters (``BEHIND_COUNTERS``). Torch itself
    refuses ``autograd.grad`` through reentrant checkpoints. And the backward of a checkpointed batch norm writes its
    statistics once more: where a later micro-batch reads them, f is no function that trials could evaluate again.
    """
    draw = random.Random(seed)
    kinds = [draw.choice([*KINDS, *["plain"] * 3, *[AGAIN] * (2 * bool(i))]) for i in range(draw.randint(1, 3))]
    blocks = [BlockSpec(kind, draw.choice(["plain"] * 6 + [*GLUES]), draw.random() < 0.2) for kind in kinds]
    closure = draw.choice(["one pass"] * 4 + [*CLOSURES])
    reads_statistics = "checkpointed" in kinds and closure == "second in eval"
    return Case(
        blocks=tuple(blocks),
        tied=draw.random() < 0.3,
        token=draw.random() < 0.3,
        closure=closure,
        coin=draw.choice([*COINS]),
        penalty=draw.random() < 0.2,
        given=draw.random() < 0.2,
        dtype=draw.choice(["float32", "bfloat16", "float64", "autocast"]),
        pieces=1 if reads_statistics else draw.choice([1, 1, 1, 1, 2, 3]),
        ragged=draw.random() < 0.3,
        seed=seed,
        options={name: draw.choice(values) for name, values in ARGUMENTS_OF_ALS.items()},
    )
