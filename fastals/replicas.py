"""Weights that several processes hold: how often each counts in a sum, and whether the replicas are alike."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastals.distributed import Processes
from fastals.shards import is_sharded, local

DIFFERENT = (
    "gradients differ between the processes, or weights do, and the same weights would be moved in different ways: the "
    "closure must call the model that DistributedDataParallel or fully_shard has made (in Lightning, pass "
    "backward=self.manual_backward), or average the gradients and pass loss=. A backward under no_sync leaves them "
    "unaveraged. For one training in each process, pass process_group= with that process alone"
)
ROUNDING = 1e-3  # of a norm, by which replicas may differ that compute their gradients themselves


def share(p: Tensor, processes: int) -> float:
    """One over the number of processes that hold the very numbers which this one holds of ``p``."""
    if not is_sharded(p) or processes == 1:
        return 1 / processes
    placed: Any = p
    sharded = [i for i, placement in enumerate(placed.placements) if not placement.is_replicate()]
    return math.prod(map(placed.device_mesh.size, sharded)) / processes


def refuse_drift(
    processes: Processes, unit: str, shares: Sequence[float], own: Sequence[float], total: Sequence[float]
) -> None:
    """Compare ‖d‖² and ‖w‖² of a unit that every process holds as a whole with what all have summed up.

    Raises:
        RuntimeError: they differ.
    """
    whole = all(s == 1 / processes.size for s in shares)
    pairs = [(processes.size * part, mean) for part, mean in zip(own, total, strict=True)]
    if whole and any(_differs(here, mean) for here, mean in pairs):
        raise RuntimeError(f"unit {unit!r}: {DIFFERENT}")


def refuse_different_gradients(processes: Processes, params: Sequence[Tensor]) -> None:
    """Compare the gradients of replicas, by their norms.

    Raises:
        RuntimeError: they differ.
    """
    if not processes.several:
        return
    norm = _norm([p for p in params if not is_sharded(p)])
    differ = _differs(norm, processes.total([norm], "gradients")[0] / processes.size)
    for (mesh, dimension), replicated in _replicated(params).items():
        norm, group = _norm(replicated), mesh.get_group(dimension)
        whole = torch.tensor([norm], dtype=torch.float64, device=replicated[0].device)
        dist.all_reduce(whole, group=group)
        differ |= _differs(norm, float(whole) / dist.get_world_size(group))
    if processes.any(differ)[0]:
        raise RuntimeError(DIFFERENT)


def _replicated(params: Sequence[Tensor]) -> dict[tuple[Any, int], list[Tensor]]:
    """The DTensors by the dimensions of meshes that replicate them."""
    found: dict[tuple[Any, int], list[Tensor]] = {}
    for p in filter(is_sharded, params):
        placed: Any = p
        for i, placement in enumerate(placed.placements):
            if placement.is_replicate() and placed.device_mesh.size(i) > 1:
                found.setdefault((placed.device_mesh, i), []).append(p)
    return found


def _norm(params: Sequence[Tensor]) -> float:
    """‖g‖ of what lies here."""
    norms = [torch.linalg.vector_norm(local(p.grad), dtype=torch.float64) for p in params if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _differs(here: float, mean: float) -> bool:
    return math.isfinite(mean) and abs(here - mean) > ROUNDING * mean
