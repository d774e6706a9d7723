"""Whether the arguments of a call are the recorded ones, and whether two outputs are equal."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fastals.calls import Arguments, Call, Contents, contents, flatten
from fastals.shards import local, placements
from fastals.stamps import Stamp, Stamps
from fastals.surroundings import SMALL

ROUNDINGS = 8  # of the norm of an output, allowed where kernels depend on addresses
Guesses = dict[tuple, bool]  # by evaluation, call and argument, whether the values have been equal so far


class Comparison:
    """Compares arguments with recorded ones during one evaluation.

    Most arguments are the recorded tensors themselves. Of a tensor that was made anew (a mask) the values decide. If
    the host may wait they are compared at once. Otherwise the host goes by what it has seen before, and the device
    notes in ``differs`` whether that was wrong.

    Args:
        name: what is evaluated; the guesses are kept by it.
        guesses: what the host has seen so far.
        device: that of the trained parameters.
        wait: whether the host may wait for the device.
        at_start: whether the weights stand at w_t, so that all is expected to be equal.
        agree: whether something holds in all processes, where all have to replay the same calls.
        learning: whether they ask each other.

    Attributes:
        differs: 0-d bool on the device, whether a guess was wrong; None if no guess was made.
        agreed: whether one was in any process, once it is known.
        doubtful: whether a call was replayed because the other processes did, which should have been computed.
    """

    def __init__(
        self,
        name: str,
        guesses: Guesses,
        device: torch.device,
        *,
        wait: bool,
        at_start: bool = False,
        agree: Callable[[bool], bool] | None = None,
        learning: bool = False,
    ) -> None:
        self.agree, self.learning, self.doubtful = agree, learning, False
        self.name, self.guesses, self.device, self.wait, self.at_start = name, guesses, device, wait, at_start
        self._compared: dict[tuple[int, int, Stamp], tuple[object, bool]] = {}
        self._unequal: list[Tensor] = []
        self.agreed: Tensor | None = None

    @property
    def differs(self) -> Tensor | None:
        """Whether values differed that were taken for equal."""
        if self.agreed is not None:
            return self.agreed
        return reduce(torch.logical_or, self._unequal) if self._unequal else None

    def same(self, call: Call, arguments: Arguments, stamps: Stamps) -> bool:
        """Whether the arguments are those of the recorded call."""
        if len(arguments.leaves) != len(call.inputs) or arguments.shape != call.shape:
            return False
        leaves = zip(arguments.leaves, call.inputs, call.input_stamps, strict=True)
        return all(
            self._same(leaf, kept, stamp, stamps, (*call.key, i)) for i, (leaf, kept, stamp) in enumerate(leaves)
        )

    def of_all(self, key: tuple[int, int], why: str) -> str:
        """Why the processes compute a call that has collectives inside; empty if all of them replay it.

        They ask each other while they learn, and go by what they have learned afterwards. A process for which that is
        wrong does as the others do, and doubts the evaluation.
        """
        assert self.agree is not None
        guess = self.name, *key
        if self.learning:
            replay = self.agree(not why)
            self.guesses[guess] = replay and self.guesses.get(guess, True)
        else:
            replay = self.guesses.get(guess, self.at_start)
            self.doubtful |= replay and bool(why)
        return "" if replay else why or "another process computes it"

    def _same(self, leaf: object, kept: object, stamp: Stamp, stamps: Stamps, place: tuple) -> bool:
        if isinstance(kept, Tensor):
            return self._same_tensor(leaf, kept, stamp, stamps, place)
        if isinstance(kept, Contents):
            return self._same_contents(leaf, kept, stamps, place)
        return leaf is kept or (type(leaf) is type(kept) and bool(leaf == kept))

    def _same_contents(self, thing: object, kept: Contents, stamps: Stamps, place: tuple) -> bool:
        """Whether an opaque object held the recorded contents when it was first an argument."""
        pair = id(thing), id(kept), 0
        if pair not in self._compared:
            leaves = contents(thing)
            same = len(leaves) == len(kept.leaves) and all(
                self._same(leaf, was, stamp, stamps, (*place, i))
                for i, (leaf, was, stamp) in enumerate(zip(leaves, kept.leaves, kept.stamps, strict=True))
            )
            self._compared[pair] = thing, same
        return self._compared[pair][1]

    def _same_tensor(self, leaf: object, kept: Tensor, stamp: Stamp, stamps: Stamps, place: tuple) -> bool:
        if stamps.of(kept) != stamp or not isinstance(leaf, Tensor):
            return False
        if leaf is kept:
            return True
        if type(leaf) is not type(kept) or not _same_layout(leaf, kept):
            return False
        if local(leaf).data_ptr() == local(kept).data_ptr():
            return True
        pair = id(leaf), id(kept), stamps.of(leaf)
        if pair not in self._compared:  # masks go to every block
            self._compared[pair] = leaf, self._same_values(leaf, kept, (self.name, *place))
        return self._compared[pair][1]

    def _same_values(self, leaf: Tensor, kept: Tensor, key: tuple) -> bool:
        leaf, kept = local(leaf), local(kept)
        if self.wait or leaf.device != self.device:
            equal = torch.equal(leaf, kept) or (kept.numel() <= SMALL and _equal_but_for_nan(leaf, kept))
            self.guesses[key] = equal and self.guesses.get(key, True)
            return equal
        if not self.guesses.get(key, self.at_start):
            return False
        self._unequal.append((leaf != kept).any())
        return True


def _equal_but_for_nan(a: Tensor, b: Tensor) -> bool:
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _same_layout(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device or a.layout != b.layout:
        return False
    if placements(a) != placements(b):
        return False
    return a.layout == torch.strided and not a.is_nested and a.stride() == b.stride()


def digest(output: Any) -> list[Tensor]:
    """Sums over every tensor of an output, which differ for outputs that differ."""
    leaves = [output] if isinstance(output, Tensor) else flatten(output)[0]
    tensors = (t for t in leaves if isinstance(t, Tensor))
    return [_sums(local(t.detach())) for t in tensors if t.layout == torch.strided and not t.is_nested]


def _sums(t: Tensor) -> Tensor:
    """Σ x, Σ w x with weights w from 1 to 2, and ε ‖x‖, by which rounding may change these sums."""
    eps = torch.finfo(t.dtype).eps if t.is_floating_point() or t.is_complex() else 0.0
    t = t.resolve_conj().resolve_neg()
    flat = (torch.view_as_real(t) if t.is_complex() else t).reshape(-1).double()
    ramp = torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)
    return torch.stack([flat.sum(), flat @ ramp, eps * flat.norm()])


def same_loss(cached: Tensor, full: Tensor, *, rounds: bool = False) -> Tensor:
    """Whether two losses are equal: bitwise on the CPU; elsewhere up to roundings, as kernels depend on addresses.

    With ``rounds`` they may differ by the rounding of another kernel.
    """
    eps = torch.finfo(full.dtype).eps
    rounding = 0.0 if full.device.type == "cpu" else 1e-6
    if rounds:
        rounding = max(64 * eps if full.dtype.itemsize >= 4 else 2 * eps, 0.0 if full.device.type == "cpu" else 1e-3)
    return torch.isclose(cached.to(full.dtype), full, rtol=rounding, atol=rounding, equal_nan=True)


def same_outputs(cached: list[Tensor] | None, full: list[Tensor]) -> bool:
    """Whether two outputs are equal by their digests: bitwise on the CPU, elsewhere up to roundings."""
    if cached is None or len(cached) != len(full):
        return False
    return all(_same_sums(a, b) for a, b in zip(cached, full, strict=True))


def _same_sums(a: Tensor, b: Tensor) -> bool:
    equal = (a == b) | (a.isnan() & b.isnan())
    if b.device.type != "cpu":
        equal |= (a - b).abs() <= ROUNDINGS * b[2]
    return bool(equal.all())
