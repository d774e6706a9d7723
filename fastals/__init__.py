"""fastals: Armijo line search per layer for transformers, as a PyTorch optimizer."""

from fastals import presets
from fastals.microbatches import MicroBatches
from fastals.optimizer import ALS
from fastals.partition import units
from fastals.report import StepReport, UnitReport

__all__ = ["ALS", "MicroBatches", "StepReport", "UnitReport", "presets", "units"]
__version__ = "0.2.0"
