"""CUDA graphs with loops run by the host, even if the device could run them."""

from typing import NoReturn

from fastals.graphs.cuda import CudaGraphs


class HostLoops(CudaGraphs):
    """Captured pieces; the host reads one flag per trial."""

    def link(self, *_) -> NoReturn:
        """Refuse to link the pieces into one launch."""
        raise RuntimeError("the loops of this rival are run by the host")
