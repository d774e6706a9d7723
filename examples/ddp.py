"""Train on several processes with DistributedDataParallel: ``torchrun --nproc-per-node 2 ddp.py``.

Needs ``pip install fastals``. The model learns which digit occurs most often in a row of digits. Each process has its
own mini-batches, and all take the same steps: those of the mean of their losses. With a GPU for each process they talk
by nccl, else by gloo. ``--width 384 --blocks 6`` is the size of MiniLM.
"""

import argparse
import os
from itertools import count, islice

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastals

DIGITS, LENGTH = 10, 16


class Transformer(nn.Module):
    """A classifier of rows of digits; its forward returns the loss."""

    def __init__(self, width, blocks):
        super().__init__()
        self.embed = nn.Embedding(DIGITS, width)
        layers = (nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(blocks))
        self.blocks, self.head = nn.ModuleList(layers), nn.Linear(width, DIGITS)

    def forward(self, rows, labels):
        x = self.embed(rows)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x.mean(1)), labels)


def arguments():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="number of steps")
    parser.add_argument("--batch", type=int, default=32, help="rows in a mini-batch of one process")
    parser.add_argument("--width", type=int, default=32, help="width of the model, a multiple of 4")
    parser.add_argument("--blocks", type=int, default=3, help="number of blocks")
    parser.add_argument("--output", default="model.pt", help="file of the trained weights")
    return parser.parse_args()


def start():
    """Meet the other processes; returns the device of this one."""
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if torch.cuda.device_count() >= here else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def digits(size=4096):
    """Rows of digits, each with the one that occurs most often; the same in every process."""
    rows = torch.randint(DIGITS, (size, LENGTH), generator=torch.Generator().manual_seed(0))
    return TensorDataset(rows, rows.mode(dim=1).values)


def batches(data, size):
    """Mini-batches of this process without end, shuffled anew in every epoch."""
    sampler = DistributedSampler(data)
    loader = DataLoader(data, size, sampler=sampler, drop_last=True)
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from loader


def check_alike(model):
    """Make sure that all processes have the same weights, to the last bit."""
    own = nn.utils.parameters_to_vector(model.parameters()).detach()
    all_weights = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_weights, own)
    if not all(torch.equal(own, weights) for weights in all_weights):
        raise RuntimeError("the processes have different weights")


def main():
    args, device = arguments(), start()
    torch.manual_seed(dist.get_rank())  # each process has its own dropout masks; the weights are those of the first
    model = DistributedDataParallel(Transformer(args.width, args.blocks).to(device))
    opt = fastals.ALS(model)
    for step, batch in enumerate(islice(batches(digits(), args.batch), args.steps), start=1):
        rows, labels = (tensor.to(device) for tensor in batch)
        opt.step(lambda rows=rows, labels=labels: model(rows, labels))
        if dist.get_rank() == 0 and (step % 10 == 0 or step == args.steps):
            r = opt.report
            print(f"step {step}: mean loss {r.loss_before:.3f} -> {r.loss_after:.3f}, {r.trials} trials", flush=True)
    check_alike(model)
    if dist.get_rank() == 0:
        torch.save(model.module.state_dict(), args.output)
        print(f"{dist.get_world_size()} processes, the same weights in all, saved in {args.output}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
