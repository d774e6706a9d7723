"""Plain torch versions of the kernels over flat buffers, vectorised over a unit's buffers.

``g``, ``m``, ``v``, ``w`` and ``d`` are 1-D tensors of a block within one segment: consecutive parameters that share
their hyperparameters and their update count. Alignment gaps inside a segment hold zeros and stay zero.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def direction(
    g: Tensor,  # [n] gradient
    m: Tensor,  # [n] first moment before this mini-batch (empty if nothing is averaged)
    v: Tensor,  # [n] second moment before this mini-batch (empty for SGD)
    w: Tensor,  # [n] weights
    *,
    out: Tensor,  # [n] direction d, written
    scratch: Tensor,  # [n] overwritten
    adam: bool,
    averaged: bool,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    count: int,
    grad_scale: float = 1.0,
) -> None:
    r"""Write the descent direction d; the moments are read only.

    Adam (if ``adam``): d = x / (√v̂ + ε) + λ w with v̂ = (β₂ v + (1−β₂) g²) / (1−β₂ᵗ), t = ``count``, and x the
    gradient, or m̂ = (β₁ m + (1−β₁) g) / (1−β₁ᵗ) if ``averaged``. SGD: d = x + λ w with x the gradient, or the
    heavy-ball average β₁ m + g if ``averaged``. ``grad_scale`` multiplies g first (gradient clipping).
    """
    beta1, beta2 = betas
    x = g if grad_scale == 1.0 else torch.mul(g, grad_scale, out=out)
    if adam:
        torch.mul(v, beta2, out=scratch).addcmul_(x, x, value=1 - beta2)
        scratch.clamp_(min=torch.finfo(v.dtype).tiny)  # MKL takes 25 times as long for the root of 0
        scratch.sqrt_().div_(math.sqrt(1 - beta2**count)).add_(eps)
        if averaged:
            x = torch.mul(x, 1 - beta1, out=out).add_(m, alpha=beta1).div_(1 - beta1**count)
        x = torch.div(x, scratch, out=out)
    elif averaged:
        x = torch.add(x, m, alpha=beta1, out=out)
    if weight_decay:
        x = torch.add(x, w, alpha=weight_decay, out=out)
    if x is g:
        out.copy_(g)


def advance(
    g: Tensor,  # [n] gradient
    m: Tensor,  # [n] first moment (empty if there is none)
    v: Tensor,  # [n] second moment (empty for SGD)
    *,
    scratch: Tensor,  # [n] overwritten
    adam: bool,
    betas: tuple[float, float],
    grad_scale: float = 1.0,
) -> None:
    """Take one mini-batch into the moments, in place.

    Adam (if ``adam``): m ← β₁ m + (1−β₁) g, v ← β₂ v + (1−β₂) g². SGD: m ← β₁ m + g.
    """
    beta1, beta2 = betas
    if grad_scale != 1.0:
        g = torch.mul(g, grad_scale, out=scratch)
    if adam:
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if m.numel():
        m.mul_(beta1).add_(g, alpha=1 - beta1 if adam else 1.0)


def rounding(params: Sequence[Tensor]) -> float:
    """Relative change that a parameter with a float32 master may lose in rounding; 0 without one."""
    return max((torch.finfo(p.dtype).eps / 2 for p in params if p.itemsize < 4), default=0.0)


def snapshot(params: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Copy every tensor into its flat view, in the view's dtype.

    A wider view is the tensor's master: an element that rounds to the tensor's bits stays as it is. An element of the
    tensor that was written since replaces its master.
    """
    pairs = list(zip(params, out, strict=True))
    copies = [(p, view) for p, view in pairs if view.itemsize <= p.itemsize]
    copy([p for p, _ in copies], [view for _, view in copies])
    for p, view in pairs:
        if view.itemsize > p.itemsize:
            bits = torch.int16 if p.itemsize == 2 else torch.int32
            same = view.to(p.dtype).view(bits) == p.view(bits)
            view.copy_(torch.where(same, view, p.to(view.dtype)))


def copy(tensors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Copy every tensor into another of its shape, in the dtype of that one."""
    if tensors:
        torch._foreach_copy_(list(out), list(tensors))


def trial(params: Sequence[Tensor], w: Sequence[Tensor], d: Sequence[Tensor], eta: float) -> None:
    """Put w − η d into p, rounded once to the dtype of p. η = 0 copies w, whatever d holds: a bitwise restore."""
    if eta == 0.0:
        copy(w, params)
        return
    for p, view, step in zip(params, w, d, strict=True):
        if p.dtype == view.dtype:
            torch.sub(view, step, alpha=eta, out=p)
        else:
            p.copy_(torch.sub(view, step, alpha=eta))
