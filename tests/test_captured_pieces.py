"""What captured pieces are made of, without a GPU: no wait for the device, no copy from the host, no lost memory.

Model, inputs and arena lie on the ``meta`` device, which stands for the GPU: its tensors have shapes and storages but
no values, so that whatever needs a value on the host cannot have it. (A fake ``cuda`` tensor of ``FakeTensorMode`` is
nearer to the truth, but where there is no GPU autograd cannot go through one: torch 2.11 asks for the device's context,
the CPU build of 2.13 for its guard.) The very program of :class:`GraphedStep` is captured by a back end
that runs every piece under :class:`Watch`, which sees each operator of forward, backward, trials and cache. A Triton
kernel is no operator: its launch is replaced by a check of its arguments against the types that
``compile_kernels.py`` compiles for.

Not seen: what an operator does within itself on a GPU (workspaces, a library that waits, kernels that autocast adds),
and waits that go around torch.
"""

import contextlib
import gc
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

pytest.importorskip("triton")
from helpers.hf import tiny_bert
from helpers.tiny import TinyTransformer, tiny_batches

import fastals
from fastals import kernels, rng
from fastals.graphs import graphed
from fastals.graphs.graphed import GraphedStep
from fastals.graphs.program import EndSkip, Loop, Run, SkipIfAccepted
from fastals.kernels import all_units, arena, armijo, moments, relay, table
from fastals.kernels import trial as trials
from fastals.losses import Losses

SPEC = importlib.util.spec_from_file_location("compile_kernels", Path(__file__).with_name("compile_kernels.py"))
compile_kernels = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compile_kernels)

aten = torch.ops.aten
READS = {  # results that the host has to know, be it only their size
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.unique_consecutive,
    aten._unique2, aten.unique_dim, aten.bincount, aten.nonzero_numpy, aten.allclose,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor, torch.from_numpy}
POINTERS = {"*fp32": torch.float32, "*fp64": torch.float64, "*i32": torch.int32, "*i64": torch.int64}
BEFORE, BETWEEN = "before the first capture", "between two captures"
OPTIONS = {"num_warps", "maxnreg", *table.LAUNCH}


class CapturedError(AssertionError):
    """A captured piece does what a replay cannot."""


def on_device(value):
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


class Watch(TorchDispatchMode):
    """Sees every operator; within a piece it refuses some, and notes where the memory that is used comes from."""

    def __init__(self):
        super().__init__()
        self.piece, self.pieces = None, 0
        self.born, self.refs, self.used = {}, {}, {}
        self.reads = self.operators = 0

    @contextlib.contextmanager
    def capturing(self):
        assert self.piece is None, "a capture within a capture"
        self.piece, self.pieces = self.pieces, self.pieces + 1
        self.used[self.piece] = set()
        try:
            with NoHostData():
                yield
            for key in self.used[self.piece]:
                born = self.born[key]
                if born != self.piece and self.refs[key].expired():
                    raise CapturedError(f"piece {self.piece} uses memory of {born} that nobody holds after it")
        finally:
            self.piece = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func.overloadpacket is aten._to_copy or any(map(on_device, given)):
            self.look_at(func, args, kwargs or {})
        self.use(given)
        result = func(*args, **(kwargs or {}))
        self.use([t for t in tree_leaves(result) if isinstance(t, torch.Tensor)], self.now())
        self.operators += self.piece is not None
        return result

    def look_at(self, func, args, kwargs):
        operator, source, target = func.overloadpacket, None, None
        if operator is aten.copy_:
            source, target = args[1].device.type, args[0].device.type
        elif operator is aten._to_copy:
            source = args[0].device.type
            target = torch.device(kwargs.get("device") or source).type
        indices = [i for i in tree_leaves(args[1]) if i is not None] if operator in INDEXING else []
        chosen = any(i.dtype in (torch.bool, torch.uint8) for i in indices)  # how many is known to the device alone
        if operator in READS or chosen or (source, target) == ("meta", "cpu"):
            self.reads += 1
            self.refuse(f"{func} reads from the device")
        if target is not None and source != target:
            self.refuse(f"{func} copies from the host")
        if not all(map(on_device, indices)):
            self.refuse(f"{func} takes an index from the host")

    def refuse(self, what):
        if self.piece is not None:
            raise CapturedError(f"in piece {self.piece}, {what}")

    def use(self, tensors, born=BEFORE):
        """Tensors that no operator has made here were there before."""
        for tensor in filter(on_device, tensors):
            ref = StorageWeakRef(tensor.untyped_storage())
            if ref.cdata not in self.refs:  # the reference keeps the address from being used again
                self.refs[ref.cdata], self.born[ref.cdata] = ref, born
            if self.piece is not None:
                self.used[self.piece].add(ref.cdata)

    def now(self):
        if self.piece is not None:
            return self.piece
        return BETWEEN if self.pieces else BEFORE

    def birth(self, tensor):
        return self.born[StorageWeakRef(tensor.untyped_storage()).cdata]


class NoHostData(TorchFunctionMode):
    """Refuses tensors that are made of the host's numbers on the device: no operator on ``meta``, a copy on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in FROM_HOST and on_device(result) and not on_device(args[0] if args else None):
            raise CapturedError(f"in a piece, {func.__name__} copies from the host to the device")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if on_device(args[0]) and any(isinstance(i, list) for i in index):
                raise CapturedError(f"in a piece, {func.__name__} takes a list of indices from the host")
        return result


class Tracing:
    """Captures by running; a replay does nothing, and a look says that the search is over, and if it ``accepts``."""

    accepts = False

    def __init__(self, watch, *, linked, draws):
        self.watch, self.linked, self.draws, self.log = watch, linked, draws, []

    def session(self):
        return contextlib.nullcontext()

    def held_bytes(self):
        return 0

    def capture_head(self, action):
        results = []
        return self.capture(lambda: results.append(action())), results[0]

    def capture(self, action):
        with self.watch.capturing():
            action()
        return self.watch.pieces - 1

    def replay(self, piece):
        self.log.append(piece)

    def look(self, flags):
        assert self.watch.piece is None, "a look within a capture"
        self.log.append("look")
        return [int(self.accepts and name == "accepted") for name in arena.FLAGS]

    def rng_state(self):
        return torch.cuda.get_rng_state(0)

    def set_rng_state(self, state):
        torch.cuda.set_rng_state(state, 0)

    def link(self, operations, flags):
        if not self.linked:
            raise RuntimeError("this back end has no loops")
        pieces = [o.piece for o in operations if isinstance(o, Run | Loop)]
        return lambda: self.log.append(pieces)


class Generator:
    """A generator of the device: while torch captures, a state of another seed cannot be set."""

    def __init__(self, watch):
        self.watch, self.state, self.sets = watch, torch.tensor([1, 0]), 0

    def get(self, index):
        return self.state.clone()

    def set(self, state, index):
        assert self.watch.piece is None or torch.equal(state[:1], self.state[:1]), "another seed within a capture"
        self.state = state.clone()
        self.sets += self.watch.piece is not None


class Launch:
    """Takes the place of a Triton kernel, and checks what it is launched with."""

    def __init__(self, kernel, watch, log):
        self.kernel, self.watch, self.log = kernel, watch, log
        self.types = compile_kernels.SCALARS | compile_kernels.TABLES | compile_kernels.FLAT

    def __getitem__(self, grid):
        assert all(isinstance(n, int) and n > 0 for n in grid)
        return self.launch

    def launch(self, *args, **given):
        names, name = self.kernel.arg_names, self.kernel.__name__
        assert table.LAUNCH.items() <= given.items(), f"{name} is launched without the options of all kernels"
        options = {k for k in given if k not in names}
        assert options <= OPTIONS, f"{name} is launched with {options}"
        bound = dict(zip(names, args, strict=False)) | {k: v for k, v in given.items() if k in names}
        assert len(args) + len(given) - len(options) == len(bound) == len(names), f"{name} has other arguments"
        for argument, value in bound.items():
            self.check(name, argument, value)
        self.watch.use([v for v in bound.values() if isinstance(v, torch.Tensor)])
        self.log.append((name, self.watch.piece))

    def check(self, name, argument, value):
        kind = self.types.get(argument)
        if argument.isupper():  # a constant of the compiler
            fits = isinstance(value, bool | int)
        elif kind in ("i32", "fp32"):
            fits = type(value) is {"i32": int, "fp32": float}[kind]
        elif argument in ("p_base", "g_base", "loss"):
            fits = on_device(value) and value.dtype in kernels.FUSED_DTYPES
        else:
            fits = on_device(value) and value.dtype == POINTERS[kind]
        described = f"{value.dtype} on {value.device}" if isinstance(value, torch.Tensor) else repr(value)
        assert fits, f"{name} is compiled for {argument}: {kind} and launched with {described}"
        assert not isinstance(value, torch.Tensor) or value.is_contiguous()


@pytest.fixture
def watch(monkeypatch):
    found = Watch()
    generator = Generator(found)
    found.launches, found.generator = [], generator
    for module in (all_units, armijo, moments, relay, trials):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Launch(kernel, found, found.launches))
    monkeypatch.setattr(kernels, "why_not_fused", lambda params: "")
    for module in (table, arena):
        monkeypatch.setattr(module, "upload", lambda host, device: host.to(device))
    monkeypatch.setattr(graphed, "Notes", Notes)
    monkeypatch.setattr(rng, "cuda_devices", lambda tensors: (0,))
    monkeypatch.setattr(torch.cuda, "get_rng_state", generator.get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", generator.set)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.piece is not None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: found.refuse("torch.cuda.synchronize"))
    return found


class Notes:
    """In place of the flags on their way to the host."""

    def __init__(self):
        self.added = 0

    def new(self, flags):
        return None

    def add(self, note, flags):
        self.added += 1

    def read(self):
        return False


def tiny():
    return TinyTransformer(depth=2).to("meta"), next(tiny_batches(1))


def low_precision():
    model, batch = tiny()
    return model.to(torch.bfloat16), batch


class Normed(nn.Module):
    """The forward writes module buffers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x, labels):
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x), labels)


def normed():
    return Normed().to("meta"), {"x": torch.randn(8, 6), "labels": torch.arange(8) % 4}


def bert():
    ids = torch.tensor([[3, 5, 7, 9, 11, 4], [2, 8, 6, 1, 9, 3]])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    model = tiny_bert(vocab_size=40, intermediate_size=24).to("meta").train()
    return model, {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}


def loss_of(output):
    return output if isinstance(output, torch.Tensor) else output.loss


class Traced:
    """A step function past its warm-up, on a model without values."""

    def __init__(self, watch, make, loss_fn=None, *, linked=False, **options):
        self.watch = watch
        model, self.batch = make()
        self.opt = fastals.ALS(fastals.units(model), model=model, fused=True, **options)
        with torch.no_grad():
            units = self.opt.engine.partition.units
        self.opt.engine.meet()
        self.opt.engine.refresh()
        self.opt.engine.learned.trusted.update(dict.fromkeys([*(u.name for u in units), "all units"], True))
        learned = self.opt.engine.learned
        learned.watched, learned.drawn = True, set()
        if make is normed:
            learned.memory.written = {(id(m._buffers), name) for m in model.modules() for name in m._buffers}
        for group in self.opt.param_groups:
            group["count"], group["last_search"] = graphed.WARMUP, 1

        def evaluate(batch):
            return loss_fn(model, batch) if loss_fn else loss_of(model(**batch))

        self.model = model
        self.step = GraphedStep(
            self.opt, evaluate, backend=lambda device, stream, *, draws: Tracing(watch, linked=linked, draws=draws)
        )
        self.step._draws = make is not normed  # the warm-up has seen the dropout
        self.leaves, self.spec = tree_flatten(self.batch)

    def take(self, signature="signature"):
        """Capture what is missing and replay, as ``GraphedStep.__call__`` does."""
        with self.watch:
            captured = self.step._captured(signature, self.leaves, self.spec)
            search = self.opt.engine.is_due(captured.program.units)
            tail = self.step._tail(captured.program, search)
            before = self.watch.reads
            self.step._replay(captured, tail, self.leaves, searched=search)
        assert self.watch.reads == before, "a replayed step waits for the device only where it looks"
        return captured.program, tail, search


CASES = [
    (make, options)
    for make in (tiny, bert)
    for options in (
        {"schedule": "relay"}, {"schedule": "sweep"}, {"schedule": "sweep", "order": "bottom_up"},
        {"schedule": "independent"}, {"schedule": "cycle"}, {"schedule": "joint"},
        {"momentum": "after"}, {"momentum": "tested"}, {"max_grad_norm": 0.1},
        {"cache": False}, {"schedule": "joint", "cache": False, "momentum": "after", "max_grad_norm": 1.0},
        {"direction": "sgd"},
    )
] + [(low_precision, {}), (normed, {}), (normed, {"schedule": "joint", "cache": False})]  # fmt: skip


@pytest.mark.slow(keep=12)
@pytest.mark.parametrize("linked", [False, True], ids=["host", "while"])
@pytest.mark.parametrize(
    ("make", "options"), CASES, ids=["-".join([m.__name__, *map(str, o.values())]) for m, o in CASES]
)
def test_no_piece_waits_copies_from_the_host_or_uses_memory_of_others(make, options, linked, watch):
    traced = Traced(watch, make, linked=linked, every=2, **options)
    kinds = set()
    for _ in range(2):  # a step that searches and one that keeps the remembered steps; a cycle is as long as its units
        program, tail, due = traced.take()
        kinds.add(due)
        looks, loops = program.backend.log.count("look"), sum(isinstance(o, Loop) for o in tail.operations)
        assert looks == (0 if linked else loops)
        program.backend.log.clear()
    assert kinds == {True, False}
    assert traced.step.mode.name == ("while" if linked else "host")
    assert watch.operators > 100
    assert watch.generator.sets > 0
    memory_is_held(watch, program)
    launched = {name for name, piece in watch.launches if piece is not None}
    assert {"begin_kernel", "survey_kernel", "trial_kernel", "advance_kernel", "remember_kernel"} <= launched


def memory_is_held(watch, program):
    """All that pieces use is theirs, or is held for as long as the program; results are theirs."""
    gc.collect()
    inside = {k for used in watch.used.values() for k in used}
    outside = {k for k in inside if isinstance(watch.born[k], str)}
    assert not any(watch.refs[k].expired() for k in outside)
    own = program.device.table
    known = [own.layout, own.places, own.spans]
    known += [t for k in own.by_dtypes.values() for t in (k.param, k.gradient, k.rows, k.programs)]
    between = {k for k in outside if watch.born[k] == BETWEEN}
    assert between <= {StorageWeakRef(t.untyped_storage()).cdata for t in known}, "memory made between two captures"
    assert watch.birth(program.loss) == 0
    assert all(watch.birth(g) == 0 for g in program.grads)
    assert all(watch.birth(p) == BEFORE for p in program.params)


def test_the_tails_of_all_turns_of_a_cycle(watch):
    traced = Traced(watch, tiny, schedule="cycle")
    for seed, _ in enumerate(traced.opt.engine.partition.units):
        watch.generator.state = torch.tensor([seed, 0])  # torch.manual_seed between two captures
        program, _, due = traced.take()
        assert due
    assert len(program.tails) == len(traced.opt.engine.partition.units)
    memory_is_held(watch, program)


@pytest.fixture
def computed(monkeypatch):
    """Of every trial that is captured: its unit, and the first call that it computes although it is recorded."""
    found, plain = [], Losses.at

    def at(losses, unit, params, *, record=False):
        loss = plain(losses, unit, params, record=record)
        found.append((unit, losses.cache.missed))
        return loss

    monkeypatch.setattr(Losses, "at", at)
    return found


@pytest.mark.parametrize("schedule", ["relay", "cycle"])
def test_a_tail_captured_late_replays_as_many_calls_as_the_first(schedule, computed, watch):
    """Whatever tails before it have noted of the weights, and however often the batch has been written."""
    traced, seen = Traced(watch, tiny, schedule=schedule, every=1), {}
    groups = traced.opt.param_groups
    for signature in ("all", *range(len(groups))):
        for turn in range(len(groups)) if signature == "all" else [signature]:
            for i, group in enumerate(groups):
                group["last_search"] = 1 + (i != turn)
            computed.clear()
            traced.take(signature)
            unit, missed = computed[0]
            assert seen.setdefault(unit, missed) == missed
    assert len(seen) == len(groups)
    assert "'norm': its parameters" in seen["head"], "the blocks below the head are replayed"


def test_the_sweep_behind_a_joint_test_replays_the_calls_of_any_sweep(computed, watch):
    seen = []
    for schedule in ("sweep", "joint"):
        computed.clear()
        Traced(watch, tiny, schedule=schedule).take()
        seen.append([found for found in computed if found[0] != "all units"])
    assert seen[0] == seen[1]


def test_tails_of_a_relay_share_what_follows_their_search(computed, watch):
    """3 pieces for each turn, 1 for the steps between, 3 that all share, and the head; one joint trial is captured."""
    traced = Traced(watch, tiny, schedule="relay", every=2)
    units = len(traced.opt.param_groups)
    for _ in range(2 * units):
        program, _, _ = traced.take()
    assert len(program.tails) == units + 1
    assert watch.pieces == len(set(program.pieces)) == 3 * units + 5
    assert len(program.pieces) == 7 * units + 5
    assert [unit for unit, _ in computed].count("all units") == 1
    memory_is_held(watch, program)


def test_every_program_has_a_table_of_its_own(watch):
    """The addresses of one program's gradients are not those of another, nor of an eager step."""
    traced = Traced(watch, tiny)
    programs = [traced.take(signature)[0] for signature in "ab"]
    tables = [traced.opt.engine.partition.table, *(program.device.table for program in programs)]
    written = [t for own in tables for k in own.by_dtypes.values() for t in (k.param, k.gradient)]
    assert len({StorageWeakRef(t.untyped_storage()).cdata for t in written}) == len(written) > len(tables)


class Replacing(nn.Module):
    """The forward gives the model another buffer, on the host, where addresses can be told apart."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.kept = inner, []
        self.register_buffer("calls", torch.zeros((), device="cpu"))

    def forward(self, **batch):
        self.kept.append(self.calls)
        self.calls = self.calls + 1
        return self.inner(**batch)


def test_buffers_that_a_capture_replaces_do_not_make_the_next_step_capture_anew(watch):
    model, batch = tiny()
    traced = Traced(watch, lambda: (Replacing(model), batch))
    step = traced.step
    step._identity = step._standing(step.engine.find_modules())
    traced.take()
    assert not step._forget_if_changed(step.engine.find_modules())
    assert len(traced.model.kept) > 2


@pytest.mark.parametrize("momentum", ["none", "after"])
def test_an_accepted_joint_trial_leaves_out_the_sweep_and_nothing_else(momentum, watch):
    traced = Traced(watch, tiny, schedule="joint", momentum=momentum)
    program, tail, _ = traced.take()
    backend, kinds = program.backend, [type(o) for o in tail.operations]
    pieces = [[o.piece for o in part if isinstance(o, Run | Loop)] for part in split(tail.operations, kinds)]
    assert all(pieces)
    first, sweep, last = pieces
    for backend.accepts, expected in ((False, first + sweep + last), (True, first + last)):
        backend.log.clear()
        traced.take()
        assert [entry for entry in backend.log if entry != "look"] == [program.head, *expected]


def split(operations, kinds):
    """What comes before a sweep that may be left out, the sweep, and what comes after it."""
    start, end = kinds.index(SkipIfAccepted), kinds.index(EndSkip)
    return operations[:start], operations[start:end], operations[end:]


def branch(model, batch):
    loss = loss_of(model(**batch))
    return loss if loss > 0 else -loss


def read(model, batch):
    return loss_of(model(**batch)) * loss_of(model(**batch)).item()


def listed(model, batch):
    return loss_of(model(**batch)) * max(batch["labels"].tolist())


def compared(model, batch):
    return loss_of(model(**batch)) * torch.equal(batch["labels"], batch["labels"])


def selected(model, batch):
    return loss_of(model(**batch)) + batch["labels"][batch["labels"] > 0].sum()


def made_of_numbers(model, batch):
    return (loss_of(model(**batch)) * torch.tensor([1.0, 2.0], device=batch["labels"].device)).sum()


def taken_along(model, batch):
    return (loss_of(model(**batch)) * torch.ones(2, device="cpu").to(batch["labels"].device)).sum()


def copied(model, batch):
    weight = torch.empty(2, device=batch["labels"].device)
    weight.copy_(torch.ones(2, device="cpu"))
    return (loss_of(model(**batch)) * weight).sum()


def indexed_by_a_list(model, batch):
    return loss_of(model(**batch)) + batch["labels"][[0, 1]].sum()


def indexed_from_the_host(model, batch):
    return loss_of(model(**batch)) + batch["labels"][torch.tensor([0, 1])].sum()


def synchronized(model, batch):
    torch.cuda.synchronize()
    return loss_of(model(**batch))


CAUGHT = {
    branch: "_local_scalar_dense.*reads", read: "_local_scalar_dense.*reads", compared: "equal.*reads",
    selected: "index.*reads", made_of_numbers: "tensor copies from the host", taken_along: "_to_copy.*host",
    copied: "copy_.*host", indexed_by_a_list: "list of indices", indexed_from_the_host: "index from the host",
    synchronized: "synchronize", listed: "_to_copy.*reads",
}  # fmt: skip


@pytest.mark.parametrize("loss_fn", CAUGHT, ids=lambda f: f.__name__)
def test_a_loss_that_cannot_be_captured_is_caught_and_named(loss_fn, watch):
    with pytest.raises(CapturedError, match=CAUGHT[loss_fn]):
        Traced(watch, tiny, loss_fn).take()


def test_memory_that_is_freed_between_two_pieces_is_caught(watch):
    with watch:
        kept = [torch.zeros(3, device="meta")]
        backend = Tracing(watch, linked=False, draws=False)
        backend.capture(lambda: kept.append(kept[0] + 1))
        with pytest.raises(CapturedError, match="piece 1 uses memory of 0 that nobody holds"):
            backend.capture(lambda: kept[0].copy_(kept.pop()))


def test_a_look_within_a_piece_is_caught(watch):
    backend = Tracing(watch, linked=False, draws=False)
    with pytest.raises(AssertionError, match="a look within a capture"):
        backend.capture(lambda: backend.look(torch.zeros(3)))


def test_a_launch_with_a_wrong_argument_is_caught(watch):
    traced = Traced(watch, tiny)
    arena = traced.opt.engine.partition.arena
    with pytest.raises(AssertionError, match=r"judge_kernel is compiled for unit: i32 and launched with 0\.0"):
        armijo.judge(arena, 0.0, torch.zeros((), device="meta"))
    arena.flags = arena.flags.float()
    with pytest.raises(AssertionError, match="judge_kernel is compiled for flags"):
        armijo.judge(arena, 0, torch.zeros((), device="meta"))
