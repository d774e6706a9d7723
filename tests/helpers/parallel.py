"""Small models under every parallelism of torch, and the same training in one process."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import fastals

VOCABULARY = 64
#: By name: processes that hold different data, and processes that share one model between them (tensor parallel).
KINDS = {
    "ddp": (2, 1), "ddp4": (4, 1), "fsdp": (2, 1), "fsdp4": (4, 1), "kept": (2, 1), "hsdp": (4, 1), "tp": (1, 2),
    "fsdp_tp": (2, 2),
}  # fmt: skip


def tiny_llama(**config):
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**small | {"vocab_size": VOCABULARY, "pad_token_id": 0} | config)).train()


def batch(step, part, size):
    """Token sequences of one data-parallel process in one step."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    start = torch.randint(1, VOCABULARY // 2, (size, 1), generator=generator)
    ids = (start + torch.arange(8)) % (VOCABULARY - 1) + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def sizes(parts, *, uneven):
    """Sequences of each data-parallel process."""
    return [1 + 2 * i if uneven else 3 for i in range(parts)]


def parallel(kind, model):
    """The model under this parallelism."""
    blocks = model.model.layers if hasattr(model, "model") else model.bert.encoder.layer
    if kind.startswith("ddp"):
        return DistributedDataParallel(model)
    parts, shared = KINDS[kind]
    shape = (2, 2) if kind in ("hsdp", "fsdp_tp") else (parts * shared,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
    if kind in ("tp", "fsdp_tp"):
        across = mesh["b"] if kind == "fsdp_tp" else mesh
        plan = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
        plan |= {
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        for block in blocks:
            parallelize_module(block, across, plan)
    if kind != "tp":
        data = mesh["a"] if kind == "fsdp_tp" else mesh
        keep = {"reshard_after_forward": False} if kind == "kept" else {}
        for block in blocks:
            fully_shard(block, mesh=data, **keep)
        fully_shard(model, mesh=data, **keep)
    return model


def whole(model):
    """All weights, gathered, by name."""
    found = {}
    for name, p in model.named_parameters():
        value = p.detach()
        found[name.removeprefix("module.")] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return found


def decisions(report):
    """What a step has decided, and by which losses."""
    units = [(u.name, u.trials, u.outcome, u.step_size) for u in report.units]
    return units, report.joint_trials, report.factor, report.loss_before, report.loss_after


def train(rank, kind, steps, options, uneven=False, dtype=torch.float32):
    """Train under a parallelism; decisions and weights."""
    parts, shared = KINDS[kind]
    model = parallel(kind, tiny_llama().to(dtype))
    opt = fastals.ALS(model, **options)
    part = rank // shared
    found = []
    for step in range(steps):
        data = batch(step, part, sizes(parts, uneven=uneven)[part])
        opt.step(lambda data=data: model(**data).loss)
        found.append(decisions(opt.report))
    return found, whole(model)


def train_alone(kind, steps, options, uneven=False, dtype=torch.float32):
    """The same in one process that has the data of all."""
    parts, _ = KINDS[kind]
    model = tiny_llama().to(dtype)
    opt = fastals.ALS(model, **options)
    found = []
    for step in range(steps):
        data = [batch(step, part, size) for part, size in enumerate(sizes(parts, uneven=uneven))]
        opt.step([lambda d=d: model(**d).loss / parts for d in data])
        found.append(decisions(opt.report))
    return found, whole(model)
