"""A line search per layer in 60 lines of PyTorch: ``python als_in_60_lines.py`` lets a small model learn this text.

For a mini-batch with loss f, each layer in turn, the head first, moves along Adam's direction d = g / √v by the first
step size η, βη, β²η ... with

    f(w - η d) ≤ f(w) - c η ⟨g, d⟩

while the other layers rest and dropout draws the same masks. If no trial passes, the layer stays where it was.
``fastals.eager.EagerALS(model, schedule="sweep")`` takes the same steps, bit by bit; ``fastals.ALS`` makes them fast.
"""

import math

import torch
from torch import nn

C, BETA, TRIALS = 0.1, 0.5, 8  # share of the promised decrease to ask for, factor on a rejected step, trials at most
GROWTH, TRUST = 1.3, 0.006  # factor on the last step, largest change of a layer as a share of its weights
DECAY, EPS = 0.999, 1e-8  # of Adam's second moments


def norm(tensors):
    return float(torch.stack([t.detach().norm().double() for t in tensors]).norm())


def rms(tensors):
    return norm(tensors) / math.sqrt(sum(t.numel() for t in tensors))


class Layer:
    """Parameters that share a step size."""

    def __init__(self, params):
        self.params = list(params)
        self.squares = [torch.zeros_like(p) for p in self.params]  # Adam's v
        self.steps = self.trials = 0
        self.eta = self.remembered = 0.0  # the last step, and where the next search starts

    def aim(self):
        """Adam's direction d, and the slope ⟨g, d⟩ along it."""
        grads, self.steps = [p.grad for p in self.params], self.steps + 1
        self.squares = [DECAY * v + (1 - DECAY) * g**2 for v, g in zip(self.squares, grads, strict=True)]
        direction = [g / ((v / (1 - DECAY**self.steps)).sqrt() + EPS) for v, g in zip(self.squares, grads, strict=True)]
        return direction, float(sum((g * d).sum().double() for g, d in zip(grads, direction, strict=True)))

    def first_step(self, direction, size):
        """The step to try first: a little above the last one, under a cap; ``size`` is the RMS of all weights."""
        moving = sum(p.grad.count_nonzero() for p in self.params)  # not the rows of absent words
        cap = TRUST * max(rms(self.params), size, 0.01) / (norm(direction) / math.sqrt(moving))
        return min(cap, max(GROWTH * self.remembered, cap * BETA ** (TRIALS - 1))) if self.remembered else cap

    @torch.no_grad()
    def search(self, loss, evaluate, size):
        """Move by the first step that passes the test, or not at all; returns the loss there."""
        direction, slope = self.aim()
        weights, self.eta, self.trials = [p.clone() for p in self.params], 0.0, 0
        if slope == 0:  # no gradient comes here
            return loss
        eta = first = self.first_step(direction, size)
        while self.trials < TRIALS:
            self.move(weights, direction, eta)
            self.trials, trial = self.trials + 1, evaluate()
            if trial <= loss - C * eta * slope:
                self.eta = self.remembered = eta
                return trial
            eta *= BETA
        self.move(weights, direction, 0.0)
        self.remembered = BETA * first
        return loss

    def move(self, weights, direction, eta):
        for p, w, d in zip(self.params, weights, direction, strict=True):
            p.copy_(w - eta * d if eta else w)


def step(layers, closure):
    """Search all layers on a mini-batch, whose loss ``closure`` evaluates; returns the loss before and after."""
    params = [p for layer in layers for p in layer.params]
    masks = torch.get_rng_state()  # dropout draws its masks from here, now and in every trial

    def evaluate():
        torch.set_rng_state(masks)
        return float(closure())

    loss = closure()
    for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
        p.grad = g
    drawn, size, before = torch.get_rng_state(), rms(params), loss.item()
    after = before
    for layer in reversed(layers):
        after = layer.search(after, evaluate, size)
    torch.set_rng_state(drawn)
    return before, after


class Transformer(nn.Module):
    """Predicts each next character of a text."""

    def __init__(self, characters, length, width=32, depth=3):
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(length, width)
        blocks = (nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(depth))
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(width, characters)

    def layers(self):
        embeddings = [*self.characters.parameters(), *self.places.parameters()]
        return [Layer(embeddings), *(Layer(block.parameters()) for block in self.blocks), Layer(self.head.parameters())]

    def forward(self, ids, targets):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.characters(ids) + self.places.weight
        for block in self.blocks:
            x = block(x, mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).mT, targets)


def main(steps=60, batch=16, length=32):
    torch.manual_seed(0)
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text])
    model = Transformer(len(characters), length)
    layers = model.layers()
    for i in range(1, steps + 1):
        rows = ids[torch.randint(len(ids) - length, (batch, 1)) + torch.arange(length + 1)]
        before, after = step(layers, lambda rows=rows: model(rows[:, :-1], rows[:, 1:]))
        if i % 10 == 0:
            sizes = " ".join(f"{layer.eta:.4f}" for layer in layers)
            print(f"step {i}: loss {before:.3f} -> {after:.3f}, step sizes bottom to top {sizes}")


if __name__ == "__main__":
    main()
