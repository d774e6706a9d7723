"""Linking captured pieces into one graph with WHILE nodes: a stand-in for the CUDA bindings writes them down."""

import gc
import subprocess
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastals.graphs import cuda
from fastals.graphs.program import EndSkip, Loop, Run, SkipIfAccepted


class Bindings:
    """Writes down which nodes are made and on what they wait; those of CUDA 13 have no second version of a call."""

    def __init__(self, major):
        self.nodes, self.major = [], major

    def __getattr__(self, name):
        if self.major > 12 and name.endswith("_v2"):
            raise AttributeError(name)
        return lambda *args: (0, self.node(name, args))

    def node(self, name, args):
        if name == "cudaDriverGetVersion":
            return 13000
        if name in ("cudaGraphCreate", "cudaGraphInstantiate"):
            return name
        self.nodes.append((name, args))
        return len(self.nodes) - 1

    class cudaGraphNodeType:  # noqa: N801
        cudaGraphNodeTypeConditional = "conditional"  # noqa: N815

    class cudaGraphConditionalNodeType:  # noqa: N801
        cudaGraphCondTypeWhile = "while"  # noqa: N815

    class cudaGraphNodeParams:  # noqa: N801
        def __init__(self):
            self.conditional = type("Conditional", (), {"phGraph_out": [77]})()

    class CUDA_KERNEL_NODE_PARAMS:  # noqa: N801
        pass

    @staticmethod
    def cudaGraph_t(address):  # noqa: N802
        return f"body {address}"


class BrokenError(Exception):
    """Raised by a captured action."""


@pytest.mark.parametrize("major", [12, 13])
def test_a_tail_becomes_one_graph_of_child_graphs_and_while_nodes(monkeypatch, major):
    bindings = Bindings(major)
    monkeypatch.setattr(cuda, "runtime", bindings)
    monkeypatch.setattr(cuda, "driver", bindings)
    monkeypatch.setattr(cuda, "set_condition", lambda device: "set_condition")
    backend = object.__new__(cuda.CudaGraphs)
    backend.draws, backend.device = False, torch.device("cuda", 0)
    backend.stream = type("Stream", (), {"cuda_stream": 5})()
    piece = type("Piece", (), {"raw_cuda_graph": lambda self: "raw"})()
    flags = torch.zeros(3, 3, dtype=torch.int32)
    launch = backend.link([Run(piece), Loop(piece, 1), SkipIfAccepted(), Run(piece), EndSkip()], flags)
    made = [(name, args[0]) for name, args in bindings.nodes if name.startswith(("cudaGraphAdd", "cuGraphAdd"))]
    assert made == [
        ("cudaGraphAddChildGraphNode", "cudaGraphCreate"), ("cuGraphAddKernelNode", "cudaGraphCreate"),
        ("cudaGraphAddNode", "cudaGraphCreate"), ("cudaGraphAddChildGraphNode", "body 77"),
        ("cuGraphAddKernelNode", "body 77"), ("cudaGraphAddChildGraphNode", "cudaGraphCreate"),
    ]  # fmt: skip
    (added,) = (args for name, args in bindings.nodes if name == "cudaGraphAddNode")
    assert len(added) == (4 if major == 12 else 5), (
        "graph, what it waits for, data of the edges, their count, parameters"
    )
    names = [name for name, _ in bindings.nodes]
    loop = names.index("cudaGraphAddNode")
    last = len(names) - 1 - names[::-1].index("cudaGraphAddChildGraphNode")
    assert bindings.nodes[last][1][1] == [loop], "what follows waits for the loop"
    kernels = [args[3].kernelParams[0] for name, args in bindings.nodes if name == "cuGraphAddKernelNode"]
    assert {flag for _, flag in kernels} == {flags[1].data_ptr()}
    launch()
    assert bindings.nodes[-1] == ("cudaGraphLaunch", ("cudaGraphInstantiate", 5))
    made = len(bindings.nodes)
    del launch, backend
    gc.collect()
    assert sorted(bindings.nodes[made:]) == [
        ("cudaGraphDestroy", ("cudaGraphCreate",)), ("cudaGraphExecDestroy", ("cudaGraphInstantiate",)),
    ]  # fmt: skip


def test_why_there_are_no_loops_on_the_device(monkeypatch):
    backend = object.__new__(cuda.CudaGraphs)
    monkeypatch.setattr(cuda, "runtime", None)
    with pytest.raises(RuntimeError, match="cuda-bindings"):
        backend.link([], None)
    monkeypatch.setattr(cuda, "runtime", Bindings(13))
    monkeypatch.setattr(cuda, "TORCH", (2, 13))
    backend.draws = True
    with pytest.raises(RuntimeError, match="random numbers"):
        backend.link([], None)


def test_a_failed_capture_is_ended_by_a_clean_one(monkeypatch):
    modes, taken_out = [], []

    class Graph:
        def __init__(self, keep_graph=False):
            self.fails = keep_graph

        def capture_begin(self, pool=None, capture_error_mode="global"):
            modes.append(capture_error_mode)

        def capture_end(self):
            if self.fails:
                raise RuntimeError("the capture is not valid")
            warnings.warn("The CUDA Graph is empty.", stacklevel=2)

    def action():
        raise BrokenError

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *where, name=name: taken_out.append((name, *where)), raising=False)
    backend = object.__new__(cuda.CudaGraphs)
    backend.stream, backend.pool, backend.device = None, (0, 1), torch.device("cuda", 0)
    with pytest.raises(BrokenError):
        backend.capture(action)
    with pytest.raises(RuntimeError, match="not valid"):
        backend.capture(lambda: None)
    assert modes == ["relaxed"] * 4
    assert taken_out == [("_cuda_endAllocateToPool", 0, (0, 1)), ("_cuda_releasePool", 0, (0, 1))] * 2


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_kernel_that_sets_a_condition_assembles(architecture):
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "set_condition.ptx"
        source.write_bytes(cuda.SET_CONDITION.rstrip(b"\0"))
        done = subprocess.run(
            [assembler, f"-arch={architecture}", "-c", source, "-o", source.with_suffix(".o")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert not done.returncode, done.stderr
