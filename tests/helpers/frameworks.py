"""Trainings by the Trainer, Accelerate and Lightning in a process that torchrun has started, and what they leave."""

import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers.loops import batches, build, closures, loop
from helpers.parallel import decisions, parallel, whole
from helpers.processes import together
from helpers.trainers import bert, first_log, fit, labelled, llama, make, optimizer_of
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback

import fastals
from fastals.integrations.transformers import ALSTrainer

LAUNCHED = {
    "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
#: Of FSDP. On CPUs the Trainer itself fails to save full weights.
ON_CPUS = {
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "sync_module_states": False,
    "state_dict_type": "SHARDED_STATE_DICT",
}  # fmt: skip


def in_two(function, *args):
    """What the function returns in each of two processes."""
    return together(2, launched, function, *args, limit=40.0)


def launched(rank, function, *args):
    """Call the function as in a program that torchrun has started."""
    os.environ |= LAUNCHED
    warnings.simplefilter("ignore")
    return function(rank, *args)


def shard_on_cpus():
    """Accelerate shards on GPUs only: have it do here what it would do there."""
    make_state = AcceleratorState.__init__

    def sharding(self, *args, fsdp_plugin=None, **kwargs):
        make_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = sharding


def counted(model):
    """A list that grows by one with every reduction of gradients by DistributedDataParallel."""
    found = []

    def hook(_, bucket):
        found.append(bucket.index())
        return allreduce_hook(None, bucket)

    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, hook)
    return found


def padded(count=48):
    """Rows of arithmetic for a language model, of 6 to 10 tokens with their padding."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = (torch.arange(10) * 3 + torch.randint(0, 60, (1,), generator=generator)) % 60
        mask = (torch.arange(10) < 6 + i % 5).long()
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return rows


def language_model():
    """Without dropout, in double precision."""
    return llama().double()


def classifier():
    """Without dropout, in double precision, of larger weights than usual."""
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5).double()


class Watch(TrainerCallback):
    """Counts the reductions of gradients, and keeps the weights after every step."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.reductions = counted(self.trainer.model_wrapped)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(whole(model))


def watched(*args, **options):
    """A trainer, and the watch of its training."""
    watch = Watch()
    watch.trainer = make(*args, callbacks=[watch], **options)
    return watch.trainer, watch


def outcome(trainer):
    """Weights, decisions, and all that was logged but for times."""
    logs = [{k: v for k, v in each.items() if not k.startswith("train_")} for each in trainer.state.log_history]
    return whole(trainer.model), [decisions(r) for r in optimizer_of(trainer).reports], logs


def fsdp(options):
    """The options of a Trainer, with those of FSDP completed."""
    if "fsdp" not in options:
        return options
    shard_on_cpus()
    return options | {"fsdp_config": ON_CPUS | options.get("fsdp_config", {})}


def trained(_, out, model, data, options):
    """What a training leaves, and how often gradients were reduced."""
    trainer, watch = watched(out, model(), data(), **fsdp(options))
    trainer.train()
    return outcome(trainer), len(watch.reductions)


def first_logs(_, out, model, data, options):
    """What the first step logs with the line search and without, for each of these options."""
    kinds = {"trainer": ALSTrainer}, {"trainer": Trainer}
    return [[first_log(fit(out, model(), data(), **one, **kind)) for kind in kinds] for one in options]


def resumed(_, out, model, data, options):
    """A training, and the same from its checkpoint on."""
    options = fsdp(options | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4})
    straight = fit(out, model(), data(), **options)
    other = model()
    torch.nn.init.ones_(other.get_input_embeddings().weight)
    return outcome(straight), outcome(fit(out, other, data(), resume=f"{out}/checkpoint-2", **options))


def poisoned(rank, out):
    """A training of two micro-batches a step, one of which is not finite in one process in the steps 2 and 4."""
    differentiated, watch = [], Watch()

    def loss(outputs, labels, num_items_in_batch=None):
        if torch.is_grad_enabled():
            differentiated.append(len(watch.weights))
        bad = rank == 1 and torch.is_grad_enabled() and len(differentiated) in (3, 6)
        return F.cross_entropy(outputs.logits, labels) * (float("nan") if bad else 1.0)

    watch.trainer = trainer = make(
        out, bert(), labelled(), callbacks=[watch], compute_loss_func=loss, gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if str(w.message).startswith("step ")]
    return watch.weights, said, len(optimizer_of(trainer).reports)


class Breaking(Dataset):
    """Rows of which one cannot be read in one process."""

    def __init__(self, rows, bad):
        self.rows, self.left = rows, 12 if bad else None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError("the disk is full of holes")
        return self.rows[i]


def broken(rank, out):
    """The error of a training whose data come to an end in the second process."""
    trainer = make(out, bert(), Breaking(labelled(), bad=rank == 1), per_device_train_batch_size=4)
    try:
        trainer.train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refused(_, out, options):
    """The error of a Trainer that is made with these options."""
    try:
        make(out, language_model(), padded(), **fsdp(options))
    except ValueError as error:
        return str(error)


def half(batch, rank):
    """The rows of one process."""
    return {k: v.chunk(2)[rank] for k, v in batch.items()}


def accelerated(rank, sharded, micro_batches):
    """The loop of the README: weights, decisions, and reductions of gradients."""
    if sharded:
        shard_on_cpus()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["TinyBlock"]
        )
    accelerator = Accelerator(
        cpu=True, fsdp_plugin=plugin if sharded else None, gradient_accumulation_steps=micro_batches
    )
    bare, opt, scheduler = build(torch.float64, dropout=0.0)
    model, _, _ = accelerator.prepare(bare, opt, scheduler)
    reductions = counted(model)

    def step(model, opt, batch):
        evaluations = closures(model, half(batch, rank)) if micro_batches > 1 else lambda: model(**half(batch, rank))
        opt.step(evaluations, backward=accelerator.backward)

    loop(model, opt, scheduler, step=step)
    return whole(model), [decisions(r) for r in opt.reports], len(reductions)


def one_sided(part):
    """A mini-batch of two rows for each process, of which the second one has padding."""
    ids = (3 * torch.arange(10) + torch.tensor([[1 + part], [7 + part]])) % 60
    mask = torch.ones_like(ids)
    mask[:part, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def masked(rank, kind):
    """A training in which the model makes a mask in one process alone: weights and decisions."""
    model, data = parallel(kind, language_model()), one_sided(rank)
    opt = fastals.ALS(model)
    for _ in range(3):
        opt.step(lambda: model(**data).loss)
    return whole(model), [decisions(r) for r in opt.reports]


def lightened(rank, how):
    """The same by a LightningModule: weights, decisions and reductions, or the error."""
    import lightning

    class Manual(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.opt, self.scheduler = build(torch.float64, dropout=0.0)
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [self.opt], [self.scheduler]

        def on_train_start(self):
            self.reductions = counted(self.trainer.strategy.model)

        def training_step(self, batch, _):
            batch = half(batch, rank)
            one = lambda: self.net(**batch)  # noqa: E731
            evaluations = fastals.MicroBatches(closures(self.net, batch, divisor=4)) if how == "micro" else one
            backward = {} if how == "plain" else {"backward": self.manual_backward}
            self.log("loss", self.optimizers().step(evaluations, **backward), sync_dist=True)
            self.lr_schedulers().step()

    module = Manual()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, precision="64-true", use_distributed_sampler=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    try:
        trainer.fit(module, DataLoader(batches(), batch_size=None))
    except RuntimeError as error:
        return str(error)
    logged = float(trainer.callback_metrics["loss"])
    return whole(module.net), [decisions(r) for r in module.opt.reports], len(module.reductions), logged
