"""Ordinary training code in several processes: right, or refused by an error that says what to use."""

import copy
import os
import pickle
import random
import re

import pytest
import torch
import torch.distributed as dist
from helpers import pages
from helpers.parallel import batch, decisions, parallel, tiny_llama, whole
from helpers.processes import together
from helpers.tiny import TinyTransformer, assert_same
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import fastals

SMOOTH = {"eps": 1e-4, "c": 0.9, "trust": 1.0}


def double(**config):
    return tiny_llama(**config).double()


def batches(step, count, first=0):
    return [batch(step, first + i, 2) for i in range(count)]


def near(weights, others):
    return max(float((weights[n] - others[n]).norm() / others[n].norm()) for n in others) < 1e-9


def micro_batches(rank, how):
    """Two micro-batches in a process, in one of the ways to accumulate; decisions, weights, reductions of gradients."""
    model = parallel("fsdp" if how == "fsdp" else "ddp", double())
    opt, found, reductions = fastals.ALS(model, **SMOOTH), [], []
    if how != "fsdp":
        model.register_comm_hook(None, lambda _, bucket: reductions.append(1) or averaged(bucket))
    for step in range(4):
        closures = [lambda b=b: model(**b).loss / 2 for b in batches(step, 2, first=2 * rank)]
        if how == "loss=":
            opt.zero_grad()
            with model.no_sync():
                first = closures[0]()
                first.backward()
            second = closures[1]()
            second.backward()
            opt.step(lambda closures=closures: sum(c() for c in closures), loss=(first + second).detach())
        else:
            opt.step(closures)
        found.append(decisions(opt.report))
    return found, whole(model), len(reductions)


def averaged(bucket):
    return (
        dist.all_reduce(bucket.buffer(), async_op=True)
        .get_future()
        .then(lambda f: f.value()[0] / dist.get_world_size())
    )


@pytest.mark.parametrize("how", ["list", "loss=", "fsdp"])
def test_accumulation_is_one_mini_batch_and_reduces_gradients_once(how):
    model = double()
    opt, expected = fastals.ALS(model, **SMOOTH), []
    for step in range(4):
        opt.step([lambda b=b: model(**b).loss / 4 for b in batches(step, 4)])
        expected.append(decisions(opt.report))
    for found, weights, reductions in together(2, micro_batches, how):
        assert [[u[:3] for u in d[0]] for d in found] == [[u[:3] for u in d[0]] for d in expected]
        assert near(weights, whole(model))
        assert reductions == 4 or how != "list"


def lean(rank, kind, what):
    """Activation checkpointing, or adapters on a frozen model."""
    model = prepared(what)
    model = parallel(kind, model)
    opt, found = fastals.ALS(model, **SMOOTH), []
    for step in range(3):
        data = batch(step, rank, 2)
        opt.step(lambda data=data: model(**data).loss)
        found.append(decisions(opt.report))
    return found, whole(model), dict(opt.engine.learned.trusted)


def prepared(what):
    model = double()
    if what == "checkpointing":
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).get_base_model()
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.02)
            p.data = p.data.double()
    return model


@pytest.mark.parametrize("what", ["checkpointing", "adapters"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_checkpointing_and_adapters(kind, what):
    model = prepared(what)
    opt, expected = fastals.ALS(model, **SMOOTH), []
    for step in range(3):
        opt.step([lambda b=b: model(**b).loss / 2 for b in batches(step, 2)])
        expected.append(decisions(opt.report))
    for found, weights, trusted in together(2, lean, kind, what):
        assert [[u[:3] for u in d[0]] for d in found] == [[u[:3] for u in d[0]] for d in expected]
        assert near(weights, whole(model))
        assert all(trusted.values())


def of_docs(rank):
    """The loop of the docs; the processes have met already."""
    lines = pages.block("DistributedDataParallel(model)").splitlines()
    names = {"fastals": fastals, "model": tiny_llama(), "loader": [batch(step, rank, 2) for step in range(8)]}
    exec("\n".join(line for line in lines if not line.startswith("dist.")), names)
    return [report.loss_before for report in names["opt"].reports]


def test_the_loop_of_the_docs_trains():
    losses, same = together(2, of_docs)
    assert losses == same
    assert losses[-1] < losses[0]


class Counting(nn.Module):
    """A model with a batch norm, whose statistics DDP broadcasts, and layers that drop out at random."""

    def __init__(self):
        super().__init__()
        self.inp, self.norm, self.head = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))

    def forward(self, x, y):
        x = self.norm(self.inp(x))
        for block in self.blocks:
            if random.random() > 0.3:
                x = x + block(x)
        return nn.functional.cross_entropy(self.head(x), y)


def drop_layers(rank, optimizer):
    """Layers drop out where each process draws; the closure has a reduction of its own."""
    torch.manual_seed(0)
    random.seed(rank)
    model = DistributedDataParallel(Counting(), find_unused_parameters=True)
    opt = fastals.ALS(model, c=0.9, trust=1.0) if optimizer == "als" else torch.optim.SGD(model.parameters(), 0.0)
    generator, trials, metric = torch.Generator().manual_seed(rank), [], torch.zeros(())
    for _ in range(12):
        x, y = torch.randn(6, 8, generator=generator), torch.randint(3, (6,), generator=generator)

        def loss(x=x, y=y):
            value = model(x, y)
            dist.all_reduce(metric.copy_(value.detach()))
            return value

        if optimizer == "als":
            opt.step(loss)
            trials.append(opt.report.trials)
        else:
            loss().backward()
    return trials, [whole(model), {n: b.clone() for n, b in model.named_buffers()}]


def test_processes_agree_where_layers_drop_out_and_closures_reduce():
    (trials, (weights, _)), (others, (same, _)) = together(2, drop_layers, "als")
    assert trials == others
    assert max(trials) > 1
    assert_same(weights, same)


def statistics(rank, optimizer):
    """Running statistics after some steps that move nothing."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    opt = fastals.ALS(model, lr=0.5, c=0.999, trust=1e-9) if optimizer == "als" else None
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        x, y = torch.randn(6, 8, generator=generator), torch.randint(3, (6,), generator=generator)

        def loss(x=x, y=y):
            return nn.functional.cross_entropy(model(x), y)

        opt.step(loss) if opt else loss().backward()
    return [b.clone() for b in model.buffers()]


def test_buffers_end_as_after_plain_training():
    for found, plain in zip(together(2, statistics, "als"), together(2, statistics, ""), strict=True):
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def apart(rank):
    """Two trainings beside each other: groups of two processes in a world of four, then every process alone."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, found = groups[rank // 2], []
    torch.manual_seed(rank // 2)
    net = TinyTransformer(depth=1, dropout=0.0)
    model, opt = DistributedDataParallel(net, process_group=mine), fastals.ALS(net, process_group=mine)
    tokens = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(rank))
    for _ in range(2):
        opt.step(lambda: model(tokens, tokens[:, 0] % 4))
        found.append(opt.report.loss_after)
    again = copy.deepcopy(opt)
    assert again._processes.size == 2
    alone = TinyTransformer(depth=1, dropout=0.0)
    own = fastals.ALS(alone, process_group=dist.new_subgroups(1)[0])
    own.step(lambda: alone(tokens, tokens[:, 0] % 4))
    assert own.report.collectives == 0
    assert pickle.loads(pickle.dumps(opt))._processes.size == 4
    return found


def test_groups_of_processes_train_apart():
    found = together(4, apart)
    assert found[0] == found[1] != found[2] == found[3]


def refused(rank, mistake):
    """The error that a mistake ends in."""
    torch.manual_seed(0)
    net = TinyTransformer(depth=1, dropout=0.0)
    tokens = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(rank))

    def loss(model):
        return model(tokens, tokens[:, 0] % 4)

    try:
        make_mistake(rank, mistake, net, loss)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was refused"


def make_mistake(rank, mistake, net, loss):
    if mistake == "not wrapped":
        fastals.ALS(net).step(lambda: loss(net))
    elif mistake == "other arguments":
        model = DistributedDataParallel(net)
        fastals.ALS(model, c=0.1 + 0.1 * rank).step(lambda: loss(model))
    elif mistake == "stages":
        part = net.blocks if rank else net.embed
        fastals.ALS(part).step(lambda: sum(p.sum() for p in part.parameters()))
    elif mistake == "join":
        model = DistributedDataParallel(net)
        with Join([model]):
            fastals.ALS(model).step(lambda: loss(model))
    elif mistake == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        fastals.ALS(FullyShardedDataParallel(net, device_id=torch.device("cpu")))
    elif mistake == "deepspeed":
        Engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})  # noqa: N806
        engine = Engine()
        engine.module = net
        fastals.ALS(engine)
    elif mistake == "rates":
        model = DistributedDataParallel(net)
        opt = fastals.ALS(model)
        opt.step(lambda: loss(model))
        opt.param_groups[0]["lr"] = 1.0 - 0.5 * rank
        opt.step(lambda: loss(model))


def prefetch(rank):
    """FSDP2 is told to prefetch a block that trials replay; reported losses and true ones."""
    model = parallel("fsdp", double())
    model.set_modules_to_forward_prefetch([model.model.layers[0]])
    opt, found = fastals.ALS(model, **SMOOTH), []
    for step in range(4):
        data = batch(step, rank, 2)
        opt.step(lambda data=data: model(**data).loss)
        with torch.no_grad():
            for module in (model, *model.model.layers):
                module.reshard()
            true = model(**data).loss.detach()
        dist.all_reduce(true)
        found.append((opt.report.loss_after, float(true) / 2))
    return found


def test_prefetched_weights_are_not_used_in_trials():
    for after, true in together(2, prefetch)[0]:
        assert after == pytest.approx(true, rel=1e-12)


def one_is_different(rank, what):
    """One process does something that the other does not; what each step has ended in."""
    torch.manual_seed(0)
    net = TinyTransformer(depth=2, dropout=0.1)
    model = DistributedDataParallel(net)
    opt, ended = fastals.ALS(model), []
    tokens = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(rank))
    for step in range(6):
        closures = [lambda: model(tokens, tokens[:, 0] % 4)]
        if rank and step == 3:
            if what == "hook":
                net.blocks[0].register_forward_hook(lambda *_: None)
            elif what == "draws":
                closures = [lambda plain=closures[0]: plain() + 0 * random.random()]
            elif what == "micro-batches":
                closures *= 2
            elif what == "no closure":
                closures = []
            elif what == "no gradient":
                closures = [lambda plain=closures[0]: plain().detach()]
        try:
            opt.step(closures)
            ended.append("made")
        except (RuntimeError, TypeError) as error:
            ended.append(type(error).__name__)
    return ended, whole(model)


@pytest.mark.parametrize(
    ("what", "ends"),
    [
        ("hook", ("made", "made")), ("draws", ("made", "made")), ("micro-batches", ("RuntimeError", "RuntimeError")),
        ("no closure", ("PeerError", "TypeError")), ("no gradient", ("RuntimeError", "RuntimeError")),
    ],
)  # fmt: skip
def test_a_process_that_does_something_else_for_once(what, ends):
    found = together(2, one_is_different, what)
    for (ended, weights), end in zip(found, ends, strict=True):
        assert ended == ["made", "made", "made", end, "made", "made"]
        assert_same(weights, found[0][1])


MISTAKES = {
    "not wrapped": "gradients differ .* DistributedDataParallel or fully_shard",
    "other arguments": "do not train alike", "stages": "do not train alike.*pipeline",
    "join": "inside of Join", "fsdp1": "FSDP1.*fully_shard", "deepspeed": "DeepSpeed.*fully_shard",
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_by_all(mistake):
    for message in together(2, refused, mistake):
        assert re.search(MISTAKES[mistake], message), message


def test_debugging_compares_what_decides_in_every_step(monkeypatch):
    monkeypatch.setitem(os.environ, "TORCH_DISTRIBUTED_DEBUG", "INFO")
    for message in together(2, refused_debugging):
        assert "do not train alike" in message


def refused_debugging(rank):
    dist.set_debug_level(dist.DebugLevel.INFO)
    return refused(rank, "rates")
