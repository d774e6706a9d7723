"""CUDA graphs whose loops are run by the host even where the device could."""

from typing import NoReturn

from fastals.graphs.cuda import CudaGraphs


class HostLoops(CudaGraphs):
    """Captured pieces, one flag read per trial."""

    def link(self, *_) -> NoReturn:
        """Refuse to make one launch of them."""
        raise RuntimeError("the loops of this rival are run by the host")
