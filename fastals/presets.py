"""Published settings: each function returns the settings of a paper or of its authors' code.

The keyword arguments are those of :class:`fastals.ALS`; ``by`` is that of :func:`fastals.units`::

    preset = fastals.presets.plasls()
    opt = fastals.ALS(fastals.units(model, by=preset.pop("by")), model=model, **preset)

All presets differ from the originals in four points:

* The random state holds the dropout masks. The originals seed with the second of the wall clock.
* A unit goes back to its old weights if all its trials fail. The originals keep the last or a tiny step.
* A search ends if the loss cannot show a smaller decrease. Some originals accept an equal loss.
* With β = 0.9 a search has 250 trials at most, not 100, because no search starts below η_max β^(trials − 1).
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

Preset = dict[str, Any]


def plasls() -> Preset:
    """PLASLS: each step searches one unit and moves the others by their remembered steps.

    Kenneweg, Galli, Kenneweg, Hammer, *Faster Convergence for Transformer Fine-tuning with Line Search Methods*,
    IJCNN 2023, arXiv 2403.18506. Trials go along g/√v̂, the move along m̂/√v̂. First step, β, γ and momenta are
    the defaults of the authors' code; c = 0.1 is the default of its base class.

    Not verified in the paper's text: c (its scripts also run 0.2 and 0.3) and the number of units. Deviations: the
    units are the single blocks; the first step searches every unit (the code searches one common step six
    times); no step is larger than 10, as in :func:`sls`; a trial is compared with the loss at the weights it starts
    from (in the code, other units have moved since that loss).
    """
    return _kenneweg() | {"by": "block", "schedule": "cycle", "c": 0.1}


def adamsls() -> Preset:
    """ADAMSLS: PLASLS with the whole model as one unit.

    arXiv 2403.18506, see :func:`plasls`; Adam with a line search goes back to Vaswani et al., *Adaptive Gradient
    Methods Converge Faster with Over-Parameterization*, arXiv 2006.06835.
    """
    return _kenneweg() | {"by": "model", "c": 0.1}


def salsa() -> Preset:
    """SaLSA: exponential averages of decrease and slope in the test, few searches while step sizes hardly change.

    Kenneweg, Kenneweg, Fumagalli, Hammer, *No learning rates needed: Introducing SALSA*, IJCNN 2024, arXiv 2407.20650.
    c = 0.5 is from the README, smoothing 0.99 from the scripts, the rest as in :func:`adamsls`, its starting point.

    Not verified in the paper's text: smoothing, β and γ; the later package ``SaLSa-Optimizer`` sets 0.9, 0.8 and 1.1.
    Deviations: the package searches in each of its first nine steps and moves without momentum in steps that
    search; here every move has momentum.
    """
    return _kenneweg() | {"by": "model", "c": 0.5, "reference": "smoothed", "smoothing": 0.99, "every": "auto"}


def ponos() -> Preset:
    """PoNoS: Polyak's first step, a nonmonotone reference, and backtracks carried to the next search.

    Galli, Rauhut, Schmidt, *Don't be so Monotone: Relaxing Stochastic Line Search in Over-Parameterized Models*,
    NeurIPS 2023, arXiv 2306.12747. All values are the defaults of the authors' ``PoNoS.py``, which also takes f* = 0.

    Deviation: a search ends below the smallest step, 1e-6; the code may start at it and go on below it.
    """
    return {
        "by": "model", "direction": "sgd", "momentum": "none", "schedule": "sweep", "every": 1, "trust": None,
        "c": 0.5, "backtrack": 0.5, "max_trials": 100, "initial": "polyak", "polyak_c": 0.1, "eta_min": 1e-6,
        "eta_max": 10.0, "reference": "nonmonotone", "nonmonotone_weight": 1.0, "weight_decay": 0.0,
    }  # fmt: skip


def sls(batches_per_epoch: int = 500) -> Preset:
    """SLS: SGD with an Armijo search from the last step size, which grows by the factor 2 per epoch.

    Vaswani, Mishkin, Laradji, Schmidt, Gidel, Lacoste-Julien, *Painless Stochastic Gradient: Interpolation,
    Line-Search, and Convergence Rates*, NeurIPS 2019, arXiv 1905.09997. Values: the defaults of the authors' ``Sls``.

    Args:
        batches_per_epoch: n / b for n examples in mini-batches of b; the step size grows by 2^(b/n) between them.

    Raises:
        ValueError: it is no number above 0.
    """
    if not isinstance(batches_per_epoch, Real) or not 0 < batches_per_epoch < math.inf:
        raise ValueError(f"batches_per_epoch must be greater than 0, and finite, not {batches_per_epoch!r}")
    return {
        "by": "model", "direction": "sgd", "momentum": "none", "schedule": "sweep", "every": 1, "trust": None,
        "c": 0.1, "backtrack": 0.9, "growth": 2 ** (1 / batches_per_epoch), "max_trials": 250, "initial": "warm",
        "eta_init": 1.0, "eta_max": 10.0, "reference": "monotone", "weight_decay": 0.0,
    }  # fmt: skip


def _kenneweg() -> Preset:
    """The settings that PLASLS, ADAMSLS and SaLSA share."""
    return {
        "direction": "adam", "momentum": "after", "schedule": "sweep", "every": 1, "trust": None,
        "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "backtrack": 0.9, "growth": 2 ** (1 / 500),
        "max_trials": 250, "initial": "warm", "eta_init": 0.1, "eta_max": 10.0, "reference": "monotone",
    }  # fmt: skip


PRESETS: dict[str, Callable[[], Preset]] = {
    "plasls": plasls,
    "adamsls": adamsls,
    "salsa": salsa,
    "ponos": ponos,
    "sls": sls,
}
