"""What fastals calls of torch and cuda-bindings that only a GPU runs: each name exists and takes what it is given.

Read from signatures, type stubs and the bindings' own conversion of arguments, for whichever versions are installed.
"""

import ast
import ctypes
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastals
from fastals import cuda_graphs

SOURCES = {path.name: path.read_text() for path in Path(fastals.__file__).parent.glob("*.py")}
TORCH = Path(torch.__file__).parent
STUBS = {  # of torch._C, which a CPU build has in its stub alone
    "_cuda_clearCublasWorkspaces": [],
    "_cuda_endAllocateToPool": ["device", "mempool_id"],
    "_cuda_releasePool": ["device", "mempool_id"],
}
METHODS = {  # of torch.cuda.CUDAGraph, with the keywords that they are given
    "__new__": ["keep_graph"], "capture_begin": ["pool", "capture_error_mode"], "capture_end": [], "instantiate": [],
    "replay": [], "raw_cuda_graph": [],
}  # fmt: skip
CUDA = {
    "get_rng_state": ["device"], "set_rng_state": ["new_state", "device"], "graph_pool_handle": [],
    "current_stream": ["device"], "synchronize": ["device"], "empty_cache": [], "memory_snapshot": [],
    "get_device_capability": ["device"], "get_device_name": ["device"], "is_available": [], "device_of": None,
    "stream": None, "Stream": None, "Event": None, "default_generators": None, "CUDAGraph": None,
}  # fmt: skip
STREAMS = {
    "Event": ["record", "synchronize", "query"], "Stream": ["wait_stream", "cuda_stream", "synchronize"],
}  # fmt: skip
FOREACH = {"_foreach_add_.Scalar": 2, "_foreach_copy_": 2, "_foreach_norm.Scalar": 2}


@pytest.fixture(scope="module")
def stub():
    return ast.parse((TORCH / "_C" / "__init__.pyi").read_text()).body


def functions(body):
    return {n.name: [a.arg for a in n.args.args] for n in body if isinstance(n, ast.FunctionDef)}


def used(pattern, *names):
    return {found for name in names or SOURCES for found in re.findall(pattern, SOURCES[name])}


def test_every_module_imports():
    packages = (fastals, fastals.kernels)  # the second lies elsewhere in the source tree
    modules = [m.name for p in packages for m in pkgutil.iter_modules(p.__path__, f"{p.__name__}.")]
    assert {"fastals.cuda_graphs", "fastals.kernels.armijo"} <= set(modules)
    for name in modules:
        importlib.import_module(name)


def test_every_private_function_of_torch_is_known_here(stub):
    assert used(r"torch\._C\.(\w+)") == set(STUBS)
    declared = functions(stub)
    for name, parameters in STUBS.items():
        assert declared[name] == parameters, name
    if torch.version.cuda:
        for name, parameters in STUBS.items():
            function = getattr(torch._C, name)
            assert not function.__doc__ or function.__doc__.count("arg") == len(parameters), function.__doc__


def test_a_graph_is_captured_and_replayed_by_these_methods(stub):
    for name, keywords in METHODS.items():
        taken = inspect.signature(getattr(torch.cuda.CUDAGraph, name)).parameters
        assert set(keywords) <= set(taken), name
        required = [p for p in taken.values() if p.default is p.empty and p.name not in ("self", "cls")]
        assert not required, f"{name} asks for {required}"
    (graph,) = (n for n in stub if isinstance(n, ast.ClassDef) and n.name == "_CUDAGraph")
    declared = functions(graph.body)
    assert set(METHODS) <= set(declared)
    assert "keep_graph" in declared["__new__"]
    assert {"pool", "capture_error_mode"} <= set(declared["capture_begin"])
    assert cuda_graphs.MODE in {"global", "thread_local", "relaxed"}
    if torch.version.cuda:
        assert "capture_error_mode: str" in torch._C._CUDAGraph.capture_begin.__doc__
        assert "-> int" in torch._C._CUDAGraph.raw_cuda_graph.__doc__


def test_every_function_of_torch_cuda_is_known_here():
    assert used(r"torch\.cuda\.(\w+)") <= set(CUDA)
    for name, parameters in CUDA.items():
        found = getattr(torch.cuda, name)
        if parameters is not None:
            signature = inspect.signature(found).parameters
            assert list(signature)[: len(parameters)] == parameters, name
            assert all(p.default is not p.empty for p in list(signature.values())[max(len(parameters), 1) :]), name
    for kind, members in STREAMS.items():
        assert all(hasattr(getattr(torch.cuda, kind), member) for member in members) or not torch.version.cuda
    assert {"get_state", "set_state"} <= set(dir(torch.Generator))


def test_the_snapshot_of_the_allocator_has_the_keys_that_are_read():
    read = used(r"\bs\[\"(\w+)\"\]", "cuda_graphs.py")
    assert read == {"total_size", "segment_pool_id"}
    own = (TORCH / "_inductor" / "cudagraph_trees.py").read_text() + (TORCH / "cuda" / "_memory_viz.py").read_text()
    assert all(f'["{key}"]' in own for key in read)


def test_lists_of_tensors_are_handled_by_these_functions():
    assert used(r"torch\.(_foreach_\w+)") == {name.split(".")[0] for name in FOREACH}
    ones, out = [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(3)]
    torch._foreach_copy_(out, ones)
    torch._foreach_add_(out, 0.5)
    norms = torch._foreach_norm([t.bfloat16() for t in out], 2, dtype=torch.float32)
    assert [n.dtype for n in norms] == [torch.float32] * 2


def test_attributes_of_modules_and_tensors_that_the_cache_reads():
    module = nn.Linear(1, 1)
    assert module._compiled_call_impl is None
    assert hasattr(torch.compile(module), "_orig_mod")
    version = module.weight._version
    with torch.no_grad():
        module.weight.add_(1)
    assert module.weight._version == version + 1


bindings = pytest.mark.skipif(cuda_graphs.runtime is None, reason="cuda-bindings is not installed")
RUNTIME = {  # arguments as fastals.cuda_graphs gives them
    "cudaDriverGetVersion": (), "cudaGraphCreate": (0,), "cudaGraphDestroy": ("graph",),
    "cudaGraphInstantiate": ("graph", 0), "cudaGraphExecDestroy": ("executable",),
    "cudaGraphLaunch": ("executable", 1234), "cudaGraphConditionalHandleCreate": ("graph", 0, 1),
    "cudaGraphAddNode": ("graph", ["node"], "edges", 1, "parameters"),
    "cudaGraphAddChildGraphNode": ("graph", ["node"], 1, 1234),
}  # fmt: skip
DRIVER = {
    "cuGraphAddKernelNode": ("graph", ["node"], 1, "kernel"), "cuModuleLoadData": (cuda_graphs.SET_CONDITION,),
    "cuModuleGetFunction": ("module", b"set_condition"),
}  # fmt: skip
TYPES = {
    "cudaGraphNodeParams", "cudaGraphNodeType", "cudaGraphConditionalNodeType", "cudaGraph_t",
    "CUDA_KERNEL_NODE_PARAMS",
}  # fmt: skip


@bindings
def test_every_name_of_the_bindings_is_known_here():
    from cuda.bindings import driver, runtime

    called = used(r"\b(?:runtime|driver)\.([a-zA-Z]\w+)", "cuda_graphs.py")
    assert called == {*RUNTIME, *DRIVER, *TYPES}
    for module, calls in ((runtime, RUNTIME), (driver, DRIVER)):
        assert all(callable(getattr(module, name)) for name in calls)


def handles():
    """What stands for the graph, the node and the parameters in :data:`RUNTIME` and :data:`DRIVER`."""
    from cuda.bindings import driver, runtime

    loop = runtime.cudaGraphNodeParams()
    loop.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
    loop.conditional.handle = runtime.cudaGraphConditionalHandle(7)
    loop.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeWhile
    loop.conditional.size = 1
    assert (int(loop.conditional.handle), loop.conditional.size) == (7, 1)
    kernel = driver.CUDA_KERNEL_NODE_PARAMS()
    kernel.func = driver.CUfunction(3)
    for size in ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ"):
        setattr(kernel, size, 1)
    kernel.kernelParams = ((int(loop.conditional.handle), 1234), (ctypes.c_uint64, ctypes.c_void_p))
    return {
        "graph": runtime.cudaGraph_t(0), "node": runtime.cudaGraphNode_t(0), "module": driver.CUmodule(0),
        "executable": runtime.cudaGraphExec_t(0), "parameters": loop, "kernel": kernel, "edges": None,
    }  # fmt: skip


@bindings
def test_the_bindings_take_the_arguments_that_they_are_given():
    """They convert every argument before they ask the driver, which is not there; a wrong one is a ``TypeError``."""
    from cuda.bindings import driver, runtime

    if torch.cuda.is_available():
        pytest.skip("with a driver the calls would be made, with handles of nothing")
    known = handles()
    for module, calls in ((runtime, RUNTIME), (driver, DRIVER)):
        for name, wanted in calls.items():
            arguments = [[known[w[0]]] if isinstance(w, list) else known.get(w, w) for w in wanted]
            if hasattr(runtime, "cudaGraphAddNode_v2") and name == "cudaGraphAddNode":
                arguments.remove(None)
            try:
                error, *_ = getattr(module, name)(*arguments)
            except RuntimeError as failed:
                error = failed
            assert name == "cudaDriverGetVersion" or re.search("libcuda|InsufficientDriver", repr(error)), (name, error)
    with pytest.raises(TypeError):
        runtime.cudaGraphAddChildGraphNode(known["graph"], ["no node"], 1, 1234)


@bindings
def test_the_body_of_a_loop_is_found_in_the_parameters_of_its_node():
    from cuda.bindings import runtime

    parameters = handles()["parameters"]
    assert int(runtime.cudaGraph_t(int(parameters.conditional.phGraph_out[0]))) == 0
