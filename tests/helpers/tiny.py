"""Small models and mini-batches that tests and benchmarks share."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class TinyTransformer(nn.Module):
    """A classifier of token sequences with pre-norm blocks and dropout; ``forward`` returns the loss."""

    def __init__(
        self, depth: int = 3, width: int = 16, vocab: int = 32, classes: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(TinyBlock(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the mean-pooled classifier."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x).mean(1)), labels)


class TinyBlock(nn.Module):
    """Attention with one head and an MLP, with dropout behind both."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # a key bias would have rounding noise for a gradient
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream behind the block."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        mixed = torch.softmax(q @ k.mT / math.sqrt(x.shape[-1]), dim=-1) @ v
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(x))


def matrices_only(model: nn.Module) -> nn.Module:
    """The model, of which only the matrices are trained: the same units, in a third of the chunks to interpret."""
    for p in model.parameters():
        p.requires_grad_(p.ndim > 1)
    return model


class TwoHeads(nn.Module):
    """Each batch goes through one of two heads, so the other one has no gradient."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.body = TinyTransformer(depth=2, dropout=dropout)
        self.other = nn.Linear(16, 4)

    def forward(self, tokens: Tensor, labels: Tensor, other: bool | None = None) -> Tensor:
        """Through the other head if ``other`` says so; by default, if the first label is even."""
        if not (labels[0] % 2 == 0 if other is None else other):
            return self.body(tokens, labels)
        x = self.body.blocks[0](self.body.embed(tokens))
        return nn.functional.cross_entropy(self.other(x.mean(1)), labels)


def tiny_batches(count: int, size: int = 8, length: int = 6, vocab: int = 32, classes: int = 4) -> Iterator[dict]:
    """Mini-batches that can be learned: the label is the first token modulo the classes."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        tokens = torch.randint(vocab, (size, length), generator=generator)
        yield {"tokens": tokens, "labels": tokens[:, 0] % classes}


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit, through containers; NaN equals NaN."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)
