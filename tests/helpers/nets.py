"""Small networks of blocks for the tests of training habits."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

calls: Counter[int] = Counter()  # computed forwards of each counted block, by its id


class Block(nn.Module):
    """A residual layer that counts its forwards where no copy of it is counted."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream behind the block."""
        calls[id(self)] += 1
        return x + self.fc(x)


class Net(nn.Module):
    """A layer in front, blocks, and a head; the blocks may be handed over."""

    def __init__(self, inputs: int = 8, outputs: int = 3, width: int = 16, depth: int = 3, blocks: Any = None) -> None:
        super().__init__()
        self.inp = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(blocks or (Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of the head."""
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Masked(Net):
    """Beside the blocks a layer for a mask that is made anew in every forward; if ``late`` from a block's weight."""

    def __init__(self) -> None:
        super().__init__(inputs=4, outputs=8, width=8)
        self.side, self.late = nn.Linear(8, 8), False

    def forward(self, x: Tensor) -> Tensor:
        """A loss."""
        mask = torch.arange(8) % 2 + (10 * self.blocks[0].fc[0].weight.mean() if self.late else 0.0)
        return (super().forward(x) * self.side(mask)).square().mean()


def counted(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model whose forwards are counted."""
    return [m for m in model.modules() if isinstance(m, Block)]


def labelled(size: int = 16, inputs: int = 8, classes: int = 3, *, dtype: torch.dtype = torch.float32) -> Any:
    """A batch of random inputs with random labels."""
    return torch.randn(size, inputs).to(dtype), torch.randint(classes, (size,))


def visible_loss(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss in the dtype of the weights, and beside it the scores, for rounding may hide a wrong loss."""
    scores = model(x, **options)
    return F.cross_entropy(scores.float(), y).to(scores.dtype), scores


class UsedLate(nn.Module):
    """A norm that is registered before the blocks and used after them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x)).square().mean()
