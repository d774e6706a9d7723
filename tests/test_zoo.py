"""Many small architectures and adapters, dropout on: every loss of a step, and how many blocks it computed.

Both are judged without the library's help: the losses by a copy of the model (:mod:`helpers.twins`), the forwards by
counters inside the blocks. The first step of an optimizer makes more forwards, for its checks, and is not counted.
"""

import warnings
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from helpers import zoo
from helpers.twins import counted_leaves, judged_step

import fastals
from fastals.partition import blocks

SEED = 4  # of every step: some layers are dropped where the model drops layers
SEEDS = {"swin": 1}  # whose roundings show
STACK = "a stack"  # every block runs once, and a trial of a unit computes the blocks from it on, and no others


class Row(NamedTuple):
    """Block forwards that a step may make at most: as many as with the cache of commit a595ad1.

    Attributes:
        forward: of the first forward.
        trials: of a trial of every unit, in the order of the units; None for a unit without gradients.
        checks: of the step outside the first forward and the trials.
        uncached: units that may be reported to run without the cache, by the ends of their names.
    """

    forward: int
    trials: tuple[int | None, ...]
    checks: int = 0
    uncached: tuple[str, ...] = ()


EXPECTED: dict[str, str | Row] = {
    "bert": STACK,
    "distilbert": STACK,
    "roberta": STACK,
    "electra": STACK,
    "albert": Row(3, (3, 3, 0)),  # one block that runs three times
    "mpnet": STACK,
    "deberta": STACK,
    "deberta-v2": STACK,
    "modernbert": STACK,
    "xlnet": STACK,
    "funnel": Row(4, (4, 4, 3, 2, 1, 0)),
    "longformer": STACK,
    "gpt2": STACK,
    "gpt-neo": STACK,
    "opt-layerdrop": Row(2, (2, 2, None, 1)),
    "bloom": STACK,
    "llama": STACK,
    "mistral": STACK,
    "qwen3": STACK,
    "gemma": STACK,
    "gemma3": STACK,
    "mixtral": STACK,
    # the loss reads router logits, which are collected inside the blocks
    "mixtral-router-loss": Row(3, (3, 3, 3, 3, 3), checks=3, uncached=("layers.1", "layers.2", "head")),
    "qwen3-moe": STACK,
    "gpt-oss": STACK,
    "deepseek-v3": STACK,
    "mamba": STACK,
    "mamba2": STACK,
    "jamba": STACK,
    "rwkv": STACK,
    "t5": STACK,
    "switch": STACK,
    "bart": Row(5, (5, 5, 4, 3, 2, 1, None)),
    "bart-layerdrop": Row(3, (3, 3, None, 2, None, 1, None)),
    "pegasus": STACK,
    "vit": STACK,
    "beit-drop-path": Row(3, (3, 3, 2, 1, 0)),
    "swin": Row(2, (2, 2, 1, 0), checks=2),  # it rounds otherwise without gradients, so its calls are recorded again
    "convnext": Row(3, (3, 3, 2, 1, 0)),
    "resnet": STACK,
    "segformer": Row(4, (4, 3, 2, 1, 0)),
    "detr": Row(6, (6, 3, 2, 1, 0)),
    "yolos": STACK,
    "wav2vec2": Row(5, (None, 5, 4, 3, 2, 1, 0)),
    # a mask is written into the output of the projection; measured with NumPy's generator held in trials as well
    "wav2vec2-spec-augment": Row(3, (3, 3, 2, None, None, 1, 3), checks=3, uncached=("head",)),
    "hubert": Row(5, (None, 5, 4, 3, 2, 1, 0)),
    "whisper": STACK,
    "clip": Row(4, (4, 2, 1, 4, 3, 0)),  # the tower of images runs before that of texts
    "siglip": Row(4, (4, 2, 1, 4, 3, 0)),
    "sequential": STACK,
    "lora": STACK,
    "rslora": STACK,
    "dora": STACK,
    "lora-modules-to-save": STACK,
    # the embeddings and the head share a module, and only one of them is known as its user
    "lora-all-linear-tied": Row(3, (3, 3, 3, 3), uncached=("embeddings", "layers.0", "layers.1", "layers.2")),
    "adalora": STACK,
    "ia3": STACK,
    "prefix-tuning": Row(3, (3,)),
    "prompt-tuning": Row(3, (3,)),
    "p-tuning": Row(3, (3,)),
    "adaption-prompt": Row(3, (2, 1)),
    "loha": STACK,
    "lokr": STACK,
    "oft": STACK,
    "boft": STACK,
    "vera": STACK,
    "ln-tuning": STACK,
    "fourierft": STACK,
    "trainable-tokens": STACK,
    "vblora": Row(3, (3, 2, 1)),
    "hra": STACK,
    "miss": STACK,
    "c3a": STACK,
    "randlora": STACK,
    "shira": STACK,
    "road": STACK,
    "delora": STACK,
    "waveft": STACK,
    "poly": STACK,
    "x-lora": Row(6, (6,), uncached=("head",)),  # a first pass weights the adapters of the second, by hooks
}
DIVERSE = (  # searched bottom up and by the relay, too
    "bert", "albert", "deberta-v2", "funnel", "gpt2", "opt-layerdrop", "mixtral-router-loss", "qwen3-moe", "mamba",
    "t5", "bart-layerdrop", "swin", "resnet", "detr", "wav2vec2-spec-augment", "whisper", "clip", "lora",
    "lora-all-linear-tied", "adalora", "prefix-tuning", "lokr", "x-lora",
)  # fmt: skip
OVERWRITTEN = ("wav2vec2-spec-augment",)  # the mask is written into the output of a module
MARKS = {
    "boft": pytest.mark.skipif(torch.cuda.is_available(), reason="it compiles a CUDA extension"),
}
SEARCHES = {  # options of the optimizer, and steps
    "top_down": ({"schedule": "sweep", "order": "top_down"}, 3),
    "bottom_up": ({"schedule": "sweep", "order": "bottom_up"}, 2),
    "relay": ({"schedule": "relay", "every": 1}, 4),
}
CASES = [
    pytest.param(name, search, marks=MARKS.get(name, ()), id=f"{name}-{search}")
    for name in EXPECTED
    for search in (SEARCHES if name in DIVERSE else ("top_down",))
]


def test_the_table_has_every_model_of_the_zoo():
    assert list(EXPECTED) == [*zoo.ZOO, *zoo.ADAPTERS]


@pytest.mark.slow(keep=6)
@pytest.mark.parametrize(("name", "search"), CASES)
def test_every_loss_is_that_of_a_full_forward_and_no_block_is_computed_in_vain(name, search):
    row, (options, count) = EXPECTED[name], SEARCHES[search]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, loss_of = zoo.build(name)
        leaves = counted_leaves(model, loss_of)
        opt = fastals.ALS(model, trust=0.02, **options)
        steps, reports = [], []
        for _ in range(count):
            zoo.seed_generators(SEEDS.get(name, SEED))
            steps.append(judged_step(opt, model, loss_of, leaves))
            reports.append(opt.report)
    names = [g["name"] for g in opt.param_groups]
    assert all(r.trials for r in reports)
    for step, report in zip(steps[1:], reports[1:], strict=True):
        searched = {u.name: u.trials for u in report.units}
        if row == STACK:
            assert step.forwards == forwards_of_a_stack(list(blocks(model)), searched, report.joint_trials)
        else:
            of_trials = sum(searched.get(unit, 0) * (k or 0) for unit, k in zip(names, row.trials, strict=True))
            at_most = row.forward * (1 + report.joint_trials) + row.checks + of_trials
            assert step.forwards.total() <= at_most, f"measured: {measured(step, searched, names, search)}"
    uncached = () if row == STACK else row.uncached
    complaints = [str(w.message) for w in caught if str(w.message).startswith("fastals")]
    if name in OVERWRITTEN:
        complaints = [c for c in complaints if "its output is changed in place" not in c]
    assert not [c for c in complaints if not any(f"{end}' run without the activation cache" in c for end in uncached)]
    differences = [d for step in steps for d in step.differences(settled=bool(uncached))]
    differences += [("end", r.loss_after, s.end) for s, r in zip(steps, reports, strict=True) if s.end != r.loss_after]
    assert not differences


def forwards_of_a_stack(stack, trials, joint_trials):
    """Forwards of a block in a step: the first, the joint trials, and the trials of the units that are not above it."""
    first = {"embeddings": 0, "head": len(stack)} | {block: i for i, block in enumerate(stack)}
    return Counter(
        {
            block: 1 + joint_trials + sum(k for unit, k in trials.items() if first[unit] <= i)
            for i, block in enumerate(stack)
        }
    )


def measured(step, trials, names, search):
    """What :data:`EXPECTED` has to say about this step of a sweep."""
    row, left = dict.fromkeys(names), list(step.evaluations)
    for unit in list(trials)[:: -1 if search == "bottom_up" else 1]:  # the last trial is the last loss
        for _ in range(trials[unit]):
            row[unit] = left.pop().forwards
    rest = step.forwards.total() - sum(k * row[unit] for unit, k in trials.items() if k)
    return Row(left[0].forwards, tuple(row.values()), checks=rest - left[0].forwards)
