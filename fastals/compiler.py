"""What torch.compile makes of the modules whose calls are intercepted.

Compiled code calls no Python, so a compiled block is intercepted as a whole. Modules that are compiled as parts of
something larger cannot be intercepted at all: the compiler would take the stand-ins for new code at every evaluation.
"""

import sys

import torch
from torch import nn

AROUND_COMPILED = "_TorchDynamoContext.__call__.<locals>.compile_wrapper"  # torch's functions around what is compiled
AROUND_DISABLED = "DisableContext.__call__.<locals>._fn"  # and around what must not be


class TracedError(BaseException):
    """Intercepted modules are compiled as parts of something larger; nothing was compiled, no closure catches it."""


def is_compiled(module: nn.Module) -> bool:
    """Whether the module was compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def below_compiled(model: nn.Module) -> set[int]:
    """Ids of the modules inside a compiled one, whose calls Python does not see, and of scripted ones."""
    scripted = {id(m) for m in model.modules() if isinstance(m, torch.jit.ScriptModule)}
    return scripted | {id(inner) for m in model.modules() if is_compiled(m) for inner in m.modules() if inner is not m}


def refuse_trace() -> None:
    """End a compilation; the compiler itself runs this, see :func:`mark_refusal`."""
    raise TracedError


def mark_refusal() -> None:
    """Have compilers run :func:`refuse_trace` at once instead of compiling it; not at import, it takes a second."""
    torch.compiler.assume_constant_result(refuse_trace)


def runs_in_compiled() -> bool:
    """Whether the caller was called by something compiled that runs uncompiled for now."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_qualname not in (AROUND_COMPILED, AROUND_DISABLED):
        frame = frame.f_back
    return frame.f_code.co_qualname == AROUND_COMPILED


def compilations() -> int:
    """How many frames torch.compile has compiled in this process; it changes with every compilation."""
    from torch._dynamo.utils import counters

    return counters["frames"]["total"]
