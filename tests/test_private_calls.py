"""What fastals calls of torch and cuda-bindings that only a GPU runs: each name exists and takes what it is given.

The calls of torch are read from the sources of fastals and bound to the signatures, or type stubs, of the installed
version. The calls of the bindings are made: these convert every argument before they ask for the driver.
"""

import ast
import gc
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastals
from fastals.graphs import cuda
from fastals.graphs.program import Loop, Run

PACKAGES = (fastals, fastals.kernels)  # the second lies elsewhere in the source tree
FOLDERS = [Path(package.__file__).parent for package in PACKAGES]
SOURCES = {str(path.relative_to(folder)): path.read_text() for folder in FOLDERS for path in folder.rglob("*.py")}
TORCH = Path(torch.__file__).parent
STUB = ast.parse((TORCH / "_C" / "__init__.pyi").read_text()).body
FUNCTORCH = ast.parse((TORCH / "_C" / "_functorch.pyi").read_text()).body
FUNCTIONS = ast.parse((TORCH / "_C" / "_VariableFunctions.pyi").read_text()).body
KINDS = {  # what makes or annotates an object, and its class
    "torch.cuda.CUDAGraph": "torch.cuda.CUDAGraph", "torch.cuda.Event": "torch.cuda.Event",
    "torch.cuda.Stream": "torch.cuda.Stream", "torch.cuda.current_stream": "torch.cuda.Stream",
}  # fmt: skip
EXPECTED = {
    "torch._C._cuda_clearCublasWorkspaces", "torch._C._cuda_endAllocateToPool", "torch._C._cuda_releasePool",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._foreach_norm", "torch.cuda.CUDAGraph",
    *(f"torch.cuda.CUDAGraph.{m}" for m in ("capture_begin", "capture_end", "instantiate", "raw_cuda_graph", "replay")),
    "torch.cuda.Event.record", "torch.cuda.Event.synchronize", "torch.cuda.Stream",
    "torch.cuda.Stream.wait_stream", "torch.cuda.current_stream", "torch.cuda.empty_cache",
    "torch.cuda.get_rng_state", "torch.cuda.graph_pool_handle", "torch.cuda.memory_snapshot",
    "torch.cuda.set_rng_state", "torch.cuda.stream", "torch.cuda.synchronize",
}  # fmt: skip


def used(pattern, *names):
    return {found for name in names or SOURCES for found in re.findall(pattern, SOURCES[name])}


def kinds_of(tree):
    """The class of every graph, event and stream, by the name that it has in the module."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation and ast.unparse(node.annotation) in KINDS:
            found[node.arg] = KINDS[ast.unparse(node.annotation)]
        elif isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            for to, made in zip(target.elts, value.elts, strict=True) if several else [(target, value)]:
                if isinstance(made, ast.Call) and ast.unparse(made.func) in KINDS:
                    found[ast.unparse(to)] = KINDS[ast.unparse(made.func)]
    return found


def calls_of_torch():
    """Every call of a private function, of ``torch.cuda`` or of a method of its objects: whose, and the call."""
    for source in SOURCES.values():
        tree = ast.parse(source)
        kinds = kinds_of(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                name = f"{kinds.get(owner, owner)}.{node.func.attr}"
                if name.startswith(("torch.cuda.", "torch._C.", "torch._foreach_")):
                    yield name, node


def declared(body, name):
    """The signatures of a function in a type stub."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                argument.annotation = None
            yield inspect.signature(eval(f"lambda {ast.unparse(node.args)}: None"))


def signatures(name):
    owner, _, last = name.rpartition(".")
    if owner == "torch._C":  # a CPU build has it in its stub alone
        return list(declared(STUB, last))
    if owner == "torch._C._functorch":
        return list(declared(FUNCTORCH, last))
    if owner == "torch":
        return list(declared(FUNCTIONS, last))
    signature = inspect.signature(pkgutil.resolve_name(name))
    taken = list(signature.parameters.values())
    return [signature.replace(parameters=taken[inspect.isclass(pkgutil.resolve_name(owner)) :])]  # without self


def fits(signature, call):
    try:
        signature.bind(*call.args, **{k.arg: k.value for k in call.keywords})
    except TypeError:
        return False
    return True


def test_every_module_imports():
    modules = [m.name for p in PACKAGES for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")]
    assert {"fastals.graphs.cuda", "fastals.kernels.armijo"} <= set(modules)
    for name in modules:
        importlib.import_module(name)


def test_torch_takes_the_arguments_that_it_is_given():
    calls = list(calls_of_torch())
    assert {name for name, _ in calls} >= EXPECTED
    for name, call in calls:
        written = f"{name}: {ast.unparse(call)}"
        assert not any(isinstance(a, ast.Starred) for a in call.args), written
        assert all(k.arg for k in call.keywords), written
        assert any(fits(signature, call) for signature in signatures(name)), written
        if name.startswith("torch._C._cuda") and torch.version.cuda:
            documented = getattr(torch._C, name.rpartition(".")[2]).__doc__
            assert not documented or documented.count("arg") == len(call.args), documented


def test_a_graph_has_these_methods_below_its_python_class():
    (graph,) = (n for n in STUB if isinstance(n, ast.ClassDef) and n.name == "_CUDAGraph")
    assert "keep_graph" in next(declared(graph.body, "__new__")).parameters
    assert {"pool", "capture_error_mode"} <= set(next(declared(graph.body, "capture_begin")).parameters)
    assert cuda.MODE in {"global", "thread_local", "relaxed"}
    if torch.version.cuda:
        assert "capture_error_mode: str" in torch._C._CUDAGraph.capture_begin.__doc__
        assert "-> int" in torch._C._CUDAGraph.raw_cuda_graph.__doc__


def test_names_whose_calls_are_not_found():
    assert all(hasattr(torch.cuda, name) for name in used(r"torch\.cuda\.(\w+)"))
    assert hasattr(torch.cuda.Event, "query")
    assert hasattr(torch.cuda.Stream, "cuda_stream") or not torch.version.cuda
    assert {"get_state", "set_state"} <= set(dir(torch.Generator))


def test_the_snapshot_of_the_allocator_has_the_keys_that_are_read():
    read = used(r"\bs\[\"(\w+)\"\]", "graphs/cuda.py")
    assert read == {"total_size", "segment_pool_id"}
    own = (TORCH / "_inductor" / "cudagraph_trees.py").read_text() + (TORCH / "cuda" / "_memory_viz.py").read_text()
    assert all(f'["{key}"]' in own for key in read)


def test_attributes_of_modules_and_tensors_that_the_cache_reads():
    module = nn.Linear(1, 1)
    assert module._compiled_call_impl is None
    assert "_orig_mod" in torch.compile(module)._modules
    version = module.weight._version
    with torch.no_grad():
        module.weight.add_(1)
    assert module.weight._version == version + 1


class WithoutDriver:
    """One module of the bindings: the call is made, fails for want of a driver, and is answered with a handle.

    An argument that cannot be converted, one too many or too few is a ``TypeError``.
    """

    def __init__(self, module, answers, calls):
        self.module, self.answers, self.calls = module, answers, calls

    def __getattr__(self, name):
        real = getattr(self.module, name)
        if inspect.isclass(real):
            return real

        def call(*args):
            try:
                error, *_ = real(*args)
            except RuntimeError as failed:
                error = failed
            self.calls[name] = repr(error)
            return 0, *self.answers[name]

        return call


@pytest.mark.skipif(cuda.runtime is None, reason="cuda-bindings is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a driver the calls would be made, with handles of nothing")
def test_the_bindings_take_the_arguments_that_they_are_given(monkeypatch):
    """A tail is built of real parameters, handles and calls; the piece has the methods of a graph."""
    from cuda.bindings import driver, runtime

    node, calls = runtime.cudaGraphNode_t(0), {}
    answers = {
        "cudaDriverGetVersion": [13000], "cudaGraphCreate": [runtime.cudaGraph_t(0)], "cudaGraphDestroy": [],
        "cudaGraphInstantiate": [runtime.cudaGraphExec_t(0)], "cudaGraphExecDestroy": [], "cudaGraphLaunch": [],
        "cudaGraphConditionalHandleCreate": [runtime.cudaGraphConditionalHandle(7)], "cudaGraphAddNode": [node],
        "cudaGraphAddChildGraphNode": [node], "cuGraphAddKernelNode": [driver.CUgraphNode(0)],
        "cuModuleLoadData": [driver.CUmodule(0)], "cuModuleGetFunction": [driver.CUfunction(3)],
    }  # fmt: skip
    for module in (runtime, driver):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(cuda, name, WithoutDriver(module, answers, calls))
    monkeypatch.setattr(cuda, "set_condition", cuda.set_condition.__wrapped__)
    backend = object.__new__(cuda.CudaGraphs)
    backend.draws, backend.device = False, torch.device("cuda", 0)
    backend.stream = SimpleNamespace(cuda_stream=1234)
    piece = SimpleNamespace(raw_cuda_graph=lambda: 1234)
    launch = backend.link([Run(piece), Loop(piece, 1), Run(piece)], torch.zeros(3, 3, dtype=torch.int32))
    launch()
    del launch, backend
    gc.collect()  # frees handles that a cycle holds
    known = used(r"\b(?:runtime|driver)\.([a-zA-Z]\w+)", "graphs/cuda.py")
    assert set(calls) == {n for n in known if not inspect.isclass(getattr(runtime, n, None) or getattr(driver, n))}
    del calls["cudaDriverGetVersion"]  # it says 0
    assert all(re.search("libcuda|InsufficientDriver", error) for error in calls.values()), calls
