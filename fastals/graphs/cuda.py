"""CUDA graphs as the back end of a captured step.

Pieces are ordinary ``torch.cuda.CUDAGraph`` objects on one stream and in one memory pool. To run a whole tail by one
launch, they become child graphs of one larger graph in which every loop is a conditional WHILE node. A kernel of one
thread reads the loop's flag and sets the node's condition, before the node and at the end of its body. If such a graph
cannot be built, the host replays the same pieces.

WHILE nodes: CUDA programming guide, "Conditional graph nodes". They need the package cuda-bindings and a driver
of CUDA 12.4 or newer. From torch 2.12 on, only a graph's own replay fills in the generator's state, so the host has to
replay pieces with dropout.
"""

import ctypes
import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastals.graphs.program import Action, Loop, Operation, Run

try:
    from cuda.bindings import driver, runtime
except ImportError:
    driver = runtime = None

OLDEST_DRIVER = 12040
MODE = "relaxed"  # a kernel may be loaded at its first launch; a wait for the device fails the capture in any mode
_failed: list[torch.cuda.CUDAGraph] = []
TORCH = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])

#: One thread: condition ← flag ≠ 0. The driver provides cudaGraphSetConditional.
SET_CONDITION = b"""
.version 7.0
.target sm_70
.address_size 64

.extern .func cudaGraphSetConditional (.param .b64 handle, .param .b32 value);

.visible .entry set_condition (.param .u64 handle, .param .u64 flag)
{
    .reg .pred  %set;
    .reg .b32   %value;
    .reg .b64   %handle, %address;

    ld.param.u64        %handle, [handle];
    ld.param.u64        %address, [flag];
    cvta.to.global.u64  %address, %address;
    ld.global.u32       %value, [%address];
    setp.ne.u32         %set, %value, 0;
    selp.b32            %value, 1, 0, %set;
    {
        .param .b64 first;
        .param .b32 second;
        st.param.b64 [first], %handle;
        st.param.b32 [second], %value;
        call.uni cudaGraphSetConditional, (first, second);
    }
    ret;
}
\0"""


class CudaGraphs:
    """Captures on one stream into one pool; all pieces live and die together.

    Args:
        device: the CUDA device.
        stream: captures and replays run on it; warm up on it too.
        draws: whether the forward draws random numbers (dropout).
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream, *, draws: bool) -> None:
        self.device, self.stream, self.draws = device, stream, draws
        self.generator = torch.cuda.default_generators[device.index or 0]
        self.pool = torch.cuda.graph_pool_handle()
        self._read = torch.cuda.Event()
        self._flags: Tensor | None = None  # pinned memory that the host reads

    @contextmanager
    def session(self) -> Iterator[None]:
        """Surrounds captures: their cuBLAS workspaces belong to this pool, and no other program uses them."""
        gc.collect()  # so that no cycle is freed within a capture
        torch._C._cuda_clearCublasWorkspaces()
        try:
            yield
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def capture_head(self, action: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture forward and backward."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        results: list[Tensor] = []
        piece = self.capture(lambda: results.append(action()))
        return piece, results[0]

    def capture(self, action: Action) -> torch.cuda.CUDAGraph:
        """Capture an action as a graph.

        Raises:
            Exception: whatever the action raises; allocator and generator are usable again.
        """
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode=MODE)
            try:
                action()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        graph.instantiate()
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a failed capture. An empty capture after it, while the failed graph lives, frees the generator."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            try:
                graph.capture_end()
            except RuntimeError:
                _failed.append(graph)  # torch's pinned allocator may go on asking it
                self._stop_allocating()
                clean = torch.cuda.CUDAGraph()
                clean.capture_begin(capture_error_mode=MODE)
                clean.capture_end()

    def _stop_allocating(self) -> None:
        """Take the allocator out of a capture that could not be ended: torch before 2.12 leaves it in."""
        index = self.device.index or 0
        try:
            torch._C._cuda_endAllocateToPool(index, self.pool)
        except RuntimeError:
            return  # it is out already
        torch._C._cuda_releasePool(index, self.pool)

    def replay(self, piece: torch.cuda.CUDAGraph) -> None:
        """Launch the graph on the stream."""
        with torch.cuda.stream(self.stream):
            piece.replay()

    def look(self, flags: Tensor) -> list[int]:
        """Wait for the stream and read the flags through pinned memory."""
        if self._flags is None:
            self._flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        with torch.cuda.stream(self.stream):
            self._flags.copy_(flags, non_blocking=True)
            self._read.record(self.stream)
        self._read.synchronize()
        return self._flags.tolist()

    def held_bytes(self) -> int:
        """Memory of the pool."""
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self.pool))

    def rng_state(self) -> Tensor:
        """Seed and offset, which the host keeps."""
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor) -> None:
        """Set seed and offset for the next replay."""
        self.generator.set_state(state)

    def link(self, operations: Sequence[Operation], flags: Tensor) -> Action:
        """One launch for all operations, every loop a WHILE node.

        Raises:
            RuntimeError: bindings, driver or torch do not allow it.
        """
        if runtime is None:
            raise RuntimeError("the package cuda-bindings is not installed")
        version = checked(runtime.cudaDriverGetVersion())
        if version < OLDEST_DRIVER:
            raise RuntimeError(f"the driver knows CUDA {version // 1000}.{version % 1000 // 10}; loops need 12.4")
        if self.draws and TORCH >= (2, 12):
            raise RuntimeError("the forward draws random numbers, which torch 2.12 and newer cannot replay in a loop")
        graph = self._destroy_with_self(checked(runtime.cudaGraphCreate(0)), runtime.cudaGraphDestroy)
        last: list[Any] = []
        for operation in operations:
            if isinstance(operation, Run):
                last = [_child(graph, last, operation.piece)]
            elif isinstance(operation, Loop):
                last = [self._while(graph, last, operation, flags)]
        executable = self._destroy_with_self(
            checked(runtime.cudaGraphInstantiate(graph, 0)), runtime.cudaGraphExecDestroy
        )
        return lambda: checked(runtime.cudaGraphLaunch(executable, self.stream.cuda_stream))

    def _destroy_with_self(self, made: Any, destroy: Callable[[Any], object]) -> Any:
        """Destroy an object of the driver together with this one; a graph that still runs is freed after its run."""
        weakref.finalize(self, destroy, made).atexit = False  # at exit the context goes first
        return made

    def _while(self, graph: Any, after: list[Any], loop: Loop, flags: Tensor) -> Any:
        """Add the node of while (flag) { piece }, and before it the kernel that sets its condition."""
        handle = checked(runtime.cudaGraphConditionalHandleCreate(graph, 0, 1))  # 1: assign the default at every launch
        flag = flags[loop.row].data_ptr()
        ready = self._set_condition(graph, after, handle, flag)
        wanted = runtime.cudaGraphNodeParams()
        wanted.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
        wanted.conditional.handle = handle
        wanted.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeWhile
        wanted.conditional.size = 1
        # the bindings of CUDA 13 take one argument more than those of 12, for edge data
        edges = [] if hasattr(runtime, "cudaGraphAddNode_v2") else [None]
        node = checked(runtime.cudaGraphAddNode(graph, [ready], *edges, 1, wanted))
        body = runtime.cudaGraph_t(int(wanted.conditional.phGraph_out[0]))
        self._set_condition(body, [_child(body, [], loop.piece)], handle, flag)
        return node

    def _set_condition(self, graph: Any, after: list[Any], handle: Any, flag: int) -> Any:
        wanted = driver.CUDA_KERNEL_NODE_PARAMS()
        wanted.func = set_condition(self.device)
        for size in ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ"):
            setattr(wanted, size, 1)
        wanted.kernelParams = ((int(handle), flag), (ctypes.c_uint64, ctypes.c_void_p))
        return checked(driver.cuGraphAddKernelNode(graph, after, len(after), wanted))


@functools.cache
def set_condition(device: torch.device) -> Any:
    """The kernel of :data:`SET_CONDITION`, loaded once a device: graphs that run it may outlive their back end."""
    module = checked(driver.cuModuleLoadData(SET_CONDITION))
    return checked(driver.cuModuleGetFunction(module, b"set_condition"))


def _child(graph: Any, after: list[Any], piece: torch.cuda.CUDAGraph) -> Any:
    """A copy of the piece's graph as one node."""
    return checked(runtime.cudaGraphAddChildGraphNode(graph, after, len(after), piece.raw_cuda_graph()))


def checked(returned: tuple) -> Any:
    """The results of a call of the bindings.

    Raises:
        RuntimeError: the call returned an error.
    """
    error, *results = returned
    if int(error):
        raise RuntimeError(f"a CUDA call failed with {error!r}")
    return results[0] if len(results) == 1 else results


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run the ``with`` block on the stream, after the earlier and before the later work of the current stream."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)
