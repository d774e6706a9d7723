"""Units and their buffers, built by hand."""

import inspect

import fastals
from fastals.blocks import Scratch
from fastals.device import DeviceUnits
from fastals.distributed import Processes
from fastals.passes import Passes
from fastals.settings import sort_arguments


def settings(**changes):
    """The settings of an ALS with these arguments."""
    defaults = {name: p.default for name, p in inspect.signature(fastals.ALS).parameters.items()}
    return sort_arguments(defaults | changes)[0]


def device_units(groups, kind, averages, state, *, several=False):
    """The groups as one unit of the fused kernels, or as a unit each."""
    for i, group in enumerate(groups):
        group["unit"] = i if several else 0
    return DeviceUnits(groups, settings(direction=kind, momentum="after" if averages else "none"), state, Processes())


def passes(unit):
    """The unit's passes on the host, with a scratch that is a little too large and not empty."""
    scratch = Scratch(unit.dtype, unit.device)
    for buffer in scratch.take(unit.size + 7):
        buffer.fill_(3.0)  # another unit has left it so
    return Passes(unit, scratch)
