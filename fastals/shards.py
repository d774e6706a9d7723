"""Tensors and modules of which this process holds a part: DTensors, the modules of FSDP2, and those inside DDP.

Everything that fastals computes, it computes on the parts that lie here, as plain tensors.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel


def connected() -> bool:
    """Whether torch.distributed connects this process to others, as FSDP2 and DistributedDataParallel need it."""
    return dist.is_available() and dist.is_initialized()


def is_sharded(t: object) -> bool:
    """Whether it is a DTensor; one made by this program has imported its package."""
    package: Any = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(t, package.DTensor)


def local(t: Tensor) -> Tensor:
    """The part of a tensor that lies in this process, on the same storage; the tensor itself if it is no DTensor."""
    placed: Any = t
    return placed.to_local() if is_sharded(t) else t


def placements(t: Tensor) -> tuple:
    """How a mesh holds a tensor; empty if it is no DTensor."""
    placed: Any = t
    return placed.placements if is_sharded(t) else ()


def placed_like(part: Tensor, p: Tensor) -> Tensor:
    """``part``, what this process holds, as a DTensor that is placed as ``p``; itself if p is none."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    to: Any = p
    return DTensor.from_local(part, to.device_mesh, to.placements, run_check=False, shape=p.shape, stride=p.stride())


def part_for(value: Tensor, p: Tensor) -> Tensor:
    """What this process holds of a saved value of ``p``, however the value was placed when it was saved."""
    saved: Any = value
    to: Any = p
    if not is_sharded(p):
        return saved.full_tensor() if is_sharded(value) else value
    if is_sharded(value):
        return local(saved.redistribute(to.device_mesh, to.placements))
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(value, to.device_mesh, to.placements, src_data_rank=None))


def settle_gradients(params: Iterable[Tensor]) -> None:
    """Add up gradients that a mesh still holds in parts, as those of a norm whose inputs are sharded."""
    for p in params:
        grad: Any = p.grad
        if is_sharded(grad) and any(placement.is_partial() for placement in grad.placements):
            to: Any = p
            p.grad = grad.redistribute(to.device_mesh, to.placements)


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the module itself."""
    package: Any = sys.modules.get("torch.distributed.fsdp")
    return package is not None and isinstance(module, package.FSDPModule)


def reshard(modules: Iterable[nn.Module]) -> None:
    """Drop gathered weights, which are not those of the shards once these have moved.

    FSDP2 keeps those of its root, and of all modules with ``reshard_after_forward=False``, until the next backward; and
    those that it was told to prefetch, until the module is called.
    """
    for module in filter(is_fsdp, modules if connected() else ()):
        if _has_prefetched(module):
            module.unshard()  # type: ignore[operator]  # waits for them
        module.reshard()  # type: ignore[operator]


def _has_prefetched(module: Any) -> bool:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return any(getattr(group, "_all_gather_result", None) is not None for group in groups)


def recover(modules: Iterable[nn.Module]) -> None:
    """Bring FSDP2 back to the start of an iteration after an error amid one, which it can from torch 2.13 on."""
    for module in filter(is_fsdp, modules if connected() else ()):
        if hasattr(module, "reset_iter_state"):
            try:
                module.reset_iter_state()  # type: ignore[operator]
            except RuntimeError:  # it is not the root, whose iteration it is
                continue
    reshard(modules)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, by whose names the parameters are known with and without it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def refuse_unsupported(modules: Iterable[nn.Module]) -> None:
    """Refuse what makes the steps itself, or has other processes wait where a line search does not come.

    Raises:
        ValueError: modules of FSDP1 or DeepSpeed.
        RuntimeError: inside of ``torch.distributed.algorithms.Join``.
    """
    for module in modules:
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        if name == "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel":
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) holds its weights in flat parameters, which units cannot be cut "
                "from: use torch.distributed.fsdp.fully_shard on each block and on the model (FSDP2)"
            )
        if name.startswith("deepspeed."):
            raise ValueError(
                "DeepSpeed makes the steps itself and takes no closure: use torch.distributed.fsdp.fully_shard, which "
                "shards weights, gradients and moments as well"
            )
        if isinstance(module, DistributedDataParallel) and module._join_config.enable:
            raise RuntimeError(
                "inside of Join a process without data follows the collectives of DistributedDataParallel, and not the "
                "trials of a line search: give every process as many mini-batches (DistributedSampler does, or "
                "drop_last=True), of any size"
            )


def has_collectives(modules: Iterable[nn.Module]) -> bool:
    """Whether calls of the modules have collectives inside: those of FSDP2, of DTensors, of SyncBatchNorm."""
    return any(
        is_fsdp(m) or isinstance(m, nn.SyncBatchNorm) or any(map(is_sharded, m._parameters.values())) for m in modules
    )


def without_sync(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """No reduction of gradients by DistributedDataParallel inside the ``with`` block."""
    return _replicas(modules, lambda replica, stack: stack.enter_context(replica.no_sync()))


def with_buffers(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Broadcasts of buffers by DistributedDataParallel inside the ``with`` block, which it makes in training only."""

    def sync(replica: DistributedDataParallel, _: ExitStack) -> None:
        replica.require_forward_param_sync = True

    return _replicas(modules, sync)


@contextmanager
def _replicas(
    modules: Iterable[nn.Module], act: Callable[[DistributedDataParallel, ExitStack], object]
) -> Iterator[None]:
    """Act on every DistributedDataParallel before it is called inside the ``with`` block.

    Frameworks put it around the model after the optimizer was made from that: then it is found where it is called, here
    or around the code that makes the step, as Lightning calls ``training_step``.
    """
    if not connected():
        yield
        return
    with ExitStack() as stack:

        def look(module: object, *_: object) -> None:
            if isinstance(module, DistributedDataParallel):
                act(module, stack)

        known = [module for module in modules if isinstance(module, DistributedDataParallel)]
        for module in known:
            look(module)
        if not known:
            look(getattr(DistributedDataParallel, "_active_ddp_module", None))
            stack.callback(register_module_forward_pre_hook(look).remove)
        yield
