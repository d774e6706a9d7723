"""Kernels over flat buffers, imported as ``fastals.kernels``.

:mod:`fastals.kernels.plain` holds the plain torch versions, which are the CPU path. The modules ``moments``,
``trial``, ``armijo`` and ``all_units`` launch the Triton kernels, over the tensors of a ``table`` and the memory of an
``arena``. They need Triton, so they are not imported here.
"""

import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)  # the oldest that the tests compile the kernels for
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["FUSED_DTYPES", "why_not_fused"]


def why_not_fused(params: Sequence[Tensor]) -> str:
    """Why the Triton kernels cannot work on these parameters; empty if they can.

    With ``TRITON_INTERPRET=1`` they run on the CPU as well, slowly, for tests.
    """
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if len({p.device for p in params}) > 1:
        return "the parameters lie on several devices"
    device = params[0].device.type
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the parameters are on {device}, and the kernels need a CUDA device"
    if device == "cuda" and (reason := _why_not_compiled(params[0].device)):
        return reason
    if other := {p.dtype for p in params} - set(FUSED_DTYPES):
        return f"there are parameters of {other.pop()}; the kernels know float32, bfloat16 and float16"
    if not all(p.is_contiguous() for p in params):
        return "a parameter is not contiguous"
    return ""


def _why_not_compiled(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
        return f"the GPU has compute capability {have}, and the kernels need {need}"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton finds no C compiler (install gcc, or set CC)"
    return ""
