"""What steps find out about a model, once for all steps."""

from dataclasses import dataclass, field

from fastals.compare import Guesses
from fastals.surroundings import Memory

ALL_UNITS = "all units"  # the name of trials of all units at once


@dataclass
class Learned:
    """Facts about the model that earlier steps have established; a changed model starts a new one.

    Attributes:
        collective: whether the calls of modules have collectives inside, so that all processes must replay the same.
        replays: whether the closure gives f(w_t) from recorded outputs alone, by the last step.
        verdicts: by ``replays`` and by unit, whether a cached trial of the unit equals a full forward.
        watched: whether a step has looked at everything that the forward writes and draws.
        memory: of buffers and untrained parameters that a forward writes.
        drawn: names of the generators that it draws from; None as long as this is not known.
        effects: whether calls leave something outside of their outputs that the loss reads.
        own_writes: ids of trained parameters that the forward writes (``nn.Embedding(max_norm=...)``).
        gradients: whether the closure needs gradients inside (``torch.autograd.grad``) to give its loss.
        rounds: whether outputs without gradients differ from those with gradients by rounding, so that a step takes one
            more forward to record its calls.
        guesses: see :class:`fastals.compare.Comparison`.
        sequences: the sequences of calls for which the verdicts were found; looks: how often such a one was new.
        compilations: see :func:`fastals.compiler.compilations`, when the closure was last found to be repeatable.
        obstacles: reasons of which the user has been told why calls are never replayed.
    """

    collective: bool = False
    replays: bool = True
    verdicts: dict[bool, dict[str, bool]] = field(default_factory=lambda: {True: {}, False: {}})
    watched: bool = False
    memory: Memory = field(default_factory=Memory)
    drawn: set[str] | None = None
    effects: bool = False
    own_writes: set[int] = field(default_factory=set)
    gradients: bool = False
    rounds: bool = False
    guesses: Guesses = field(default_factory=dict)
    sequences: set[tuple[int, ...]] = field(default_factory=set)
    looks: int = 0
    compilations: int = 0
    obstacles: set[str] = field(default_factory=set)

    @property
    def trusted(self) -> dict[str, bool]:
        """By unit, whether its cached trial equals a full forward, for the present :attr:`replays`."""
        return self.verdicts[self.replays]

    def trusts(self, unit: str) -> bool:
        """Whether cached trials of the unit are right; those of all units are if those of each are."""
        if unit == ALL_UNITS:
            return all(self.trusted.values())
        return self.trusted.get(unit, False)
