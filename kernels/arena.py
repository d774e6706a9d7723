"""Device memory of the kernels besides parameters and gradients: moments, snapshot, and the scalars of the search."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastals.kernels.table import Table, upload

#: Columns of ``state`` in the row of a unit: where its search stands.
STATE = (
    "eta",  # step of the trial under way, or the step found
    "move",  # step to put the parameters at
    "at",  # step at which the parameters are; NaN if not known
    "go",  # 1 while there is another trial to make
    "trials", "outcome",
    "start",  # first step
    "loss",  # where the search starts
    "reference", "required_slope", "slope", "final_loss", "resolution",
    "hidden",  # steps below this may vanish in the rounding of the parameters
    "averaged",  # 1 if the direction is the averaged one
    "relative_step",  # relay: what the unit will remember; negative if it is to remember what it does
    "held",  # 1 if the snapshot holds the weights of this step
    "scale",  # relay: the step of which the relative step is a share; 0 if not known
    "direction_rms", "weight_rms",  # relay: what the unit will remember of this step
)  # fmt: skip
#: Columns of the last row of ``state``: the mini-batch, and the joint test of all units. "" is not used.
BATCH = (
    "factor",  # common factor of the steps
    "", "", "go", "trials", "outcome",
    "loss_before",  # f(w_t); NaN between two steps
    "loss",  # at the current weights; NaN if not known
    "reference",
    "required",  # sum of the decreases that the units require
    "", "", "resolution", "", "",
    "next_factor",  # relay: first factor of the next joint test; negative if it is to stay as it is
    "", "", "", "",
)  # fmt: skip
#: Columns of ``memory``: what a unit remembers between mini-batches.
REMEMBERED = (
    "step_size", "backtracks", "average", "average_weight", "mean_decrease", "mean_slope", "relative_step", "factor",
    "direction_rms", "weight_rms",
)  # fmt: skip
#: Columns of ``rules``: the constants of a parameter group, ``floor`` = β^(max_trials − 1), and ``uniform``, drawn from
#: [0, 1) for this step.
RULES = (
    "beta1", "beta2", "eps", "weight_decay", "lr", "c", "backtrack", "growth", "max_trials", "trust", "initial",
    "eta_init", "eta_min", "eta_max", "floor", "reference", "polyak_c", "nonmonotone_weight", "smoothing", "uniform",
)  # fmt: skip
#: Columns of ``flags``, which a loop on the host reads; it reads nothing else.
FLAGS = (
    "go", "accepted", "refused",
    "outdated",  # 1 if the activation cache is not as the host assumes; written by eager steps
)  # fmt: skip
#: Columns of ``sums``: ⟨g, d⟩, ‖d‖², entries with g ≠ 0, ‖w‖², entries; ⟨g, d⟩ and ‖d‖² of the averaged direction.
SUMS = ("slope", "direction", "moving", "weights", "elements", "averaged_slope", "averaged_direction")
#: Columns of ``constants``: β₁, 1 − β₁, β₂, 1 − β₂, 1/(1−β₁ᵗ), 1/√(1−β₂ᵗ), ε and λ of each parameter.
CONSTANTS = ("beta1", "new1", "beta2", "new2", "correction1", "correction2", "eps", "decay")
#: Numbers that stand for an outcome in ``state``, and for an option in ``rules``.
OUTCOMES = ("running", "accepted", "exhausted", "not_descent", "kept")
INITIALS = ("warm", "reset", "polyak", "random")
REFERENCES = ("monotone", "nonmonotone", "smoothed")
#: Weights whose RMS is below this count as of this size, so that those that start at 0 can move. Models are initialised
#: above it, at 0.02 say.
LEAST_RMS = 0.01
RING = 64  # steps whose states are kept for reports, at least fastals.reports.KEPT_REPORTS
SPLIT = 64  # programs that add up the partial sums of one unit


class Arena:
    """Everything that the kernels own, allocated once per partition of the model into units.

    Attributes:
        has_m: whether there is a first moment.
        m, v, w: float32 [size]: moments and snapshot (masters) of all units; m and v are empty if not needed.
        counts: float32 [parameters], updates so far.
        constants: float32 [parameters, 8], of this step's update.
        partials: float32 [7, chunks], of which the rows of programs are used; parts: float64 [units, 64, 7];
        sums: float64 [units, 7]: the sums of a step.
        state: float64 [units + 1, 20]; memory: float64 [units, 10]; rules: float64 [groups, 20].
        flags: int32 [units + 1, 4]; history: float64 [64, units + 1, 20], a ring; step: int64 [1].
        lead: int32 [units], the row of ``rules`` that each unit follows.
        rounding: float64 [units], of the unit's parameters, see :func:`fastals.kernels.plain.rounding`.
        grad_scale: float32 [1], multiplies the gradient in the direction.
    """

    def __init__(self, table: Table, size: int, lead: Sequence[int], groups: int, *, adam: bool, has_m: bool) -> None:
        self.adam, self.has_m, self.units, self.device = adam, has_m, len(lead), table.device
        units = self.units

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=table.device)

        self.w = zeros(size, dtype=torch.float32)
        self.v = zeros(size if adam else 0, dtype=torch.float32)
        self.m = zeros(size if has_m else 0, dtype=torch.float32)
        self.counts = zeros(len(table.params), dtype=torch.float32)
        self.constants = zeros(len(table.params), len(CONSTANTS), dtype=torch.float32)
        self.partials = zeros(len(SUMS), table.n_chunks, dtype=torch.float32)
        self.parts, self.sums = zeros(units, SPLIT, len(SUMS)), zeros(units, len(SUMS))
        self.state, self.memory = zeros(units + 1, len(STATE)), zeros(units, len(REMEMBERED))
        self.state[-1, BATCH.index("loss_before")] = float("nan")
        self.rules = zeros(groups, len(RULES))
        self.flags = zeros(units + 1, len(FLAGS), dtype=torch.int32)
        self.history = zeros(RING, units + 1, len(STATE))
        self.step = zeros(1, dtype=torch.int64)
        self.lead = upload(torch.tensor(lead, dtype=torch.int32, device="cpu"), table.device)
        self.rounding = zeros(units)
        self.grad_scale = torch.ones(1, dtype=torch.float32, device=table.device)
        self.steps = 0  # steps in the history, counted by the host; ``step`` is the count of the device
        self._rules: list[list[float]] = []

    @property
    def padded_rows(self) -> int:
        """Rows of ``state``, rounded up to a power of two."""
        return 1 << self.units.bit_length()

    @property
    def most_trials(self) -> int:
        """The largest ``max_trials`` of all groups."""
        return int(max(rule[RULES.index("max_trials")] for rule in self._rules))

    def set_rules(self, rules: Sequence[Sequence[float]]) -> None:
        """Bring the constants of the groups up to date, if any has changed."""
        if (wanted := [list(r) for r in rules]) != self._rules:
            host = torch.tensor(wanted, dtype=torch.float64, device="cpu")
            self.rules.copy_(upload(host, self.device), non_blocking=True)
            self._rules = wanted
