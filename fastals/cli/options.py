"""The options of the command line, and what ``--help`` says of them."""

import argparse
from collections.abc import Callable
from typing import Any

import fastals
from fastals.cli.bench import bench_compare, bench_report
from fastals.cli.experiment import DEFAULT_STEPS, OPTIMIZERS
from fastals.cli.runs import CHOICES, Config
from fastals.presets import PRESETS
from fastals.schedule import ORDERS, SCHEDULES

Command = Callable[[argparse.Namespace], int]

#: Arguments of ALS that can be set on the command line.
ALS_OPTIONS: dict[str, dict[str, Any]] = {
    "schedule": {"choices": list(SCHEDULES), "help": "which units are searched in a step"},
    "c": {
        "type": float, "metavar": "SHARE",
        "help": "share of the promised decrease that a trial must deliver, between 0 and 1",
    },
    "trust": {"type": float, "metavar": "SHARE", "help": "largest relative change of a unit in one step"},
    "lr": {
        "type": float, "metavar": "FACTOR", "help": "factor on the largest step size, no learning rate; usually 1",
    },
    "weight-decay": {"type": float, "metavar": "RATE", "help": "decoupled weight decay"},
    "merge-below": {"type": float, "metavar": "STEP-SIZE", "help": "merge units whose step size falls below this"},
    "momentum": {
        "choices": ["none", "after", "tested"],
        "help": "none: no averaged direction; after: move along it, untested; tested: search along it",
    },
    "order": {"choices": list(ORDERS), "help": "order in which the units are searched"},
}  # fmt: skip

NAME, OUTPUT = "run", "runs"

FINETUNE = """\
Fine-tune a text classifier with an Armijo line search per layer, without a
learning rate to choose. The run's folder then holds the model, the losses and
step sizes of every step, and report.html, a page with table and pictures.

examples:
  MiniLM on BBC News, the defaults:
    fastals finetune
  a model and a table of your own:
    fastals finetune --model path/to/model --dataset reviews.csv --epochs 3
  the line search, its eager twin and AdamW on the same mini-batches:
    fastals finetune --steps 60 --compare --name compared
  go on with an interrupted run:
    fastals finetune --resume runs/compared
"""
PROCESSES = """\
On several GPUs:
    torchrun --nproc-per-node 2 --no-python fastals finetune ...
Each process takes an equal part of every mini-batch, and all take the steps
of one process with the whole mini-batch, up to rounding and dropout masks.
The first process writes the run's folder. Resumed with as many processes, a
run goes on as if it had not been interrupted; with fewer or more, it goes on
with other dropout masks.
"""
REPORT = """\
Compare finished runs: print their table, and write their pictures and
report.html, one page with all of it that needs no other file.

example:
    fastals report runs/a runs/b --output compared
"""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions keep their lines, and every option with a default says it."""

    def __init__(self, prog: str, **given: Any) -> None:
        super().__init__(prog, **{"max_help_position": 28} | given)


def parser(finetune: Command, report: Command) -> argparse.ArgumentParser:
    """The parser of the command line, whose commands are these functions and those of ``fastals bench``."""
    top = argparse.ArgumentParser(
        prog="fastals", description="Train transformers with an Armijo line search per layer.", formatter_class=_Help
    )
    top.add_argument(
        "--version", action="version", version=f"fastals {fastals.__version__}", help="print the version and exit"
    )
    commands = top.add_subparsers(
        title="commands", required=True, metavar="command", help="one of these; fastals COMMAND --help says more"
    )
    training = commands.add_parser(
        "finetune",
        help="fine-tune a text classifier",
        usage="fastals finetune [--model MODEL] [--dataset DATA] [--epochs N] ...",
        description=FINETUNE,
        epilog=PROCESSES,
        formatter_class=_Help,
    )
    training.set_defaults(command=finetune)
    for add in (_add_data, _add_training, _add_run, _add_optimizers, _add_search):
        add(training)
    page = commands.add_parser("report", help="compare finished runs", description=REPORT, formatter_class=_Help)
    page.add_argument("runs", nargs="+", metavar="FOLDER", help="folder of a finished run")
    page.add_argument("--output", default=".", metavar="FOLDER", help="folder of the page and the pictures")
    page.set_defaults(command=report)
    _add_bench(commands.add_parser("bench", help="pages and comparisons of benchmark results; needs a clone"))
    return top


def _add_data(finetune: argparse.ArgumentParser) -> None:
    add = finetune.add_argument_group("model and data").add_argument
    add("--model", default=Config.model, help="minilm, a folder or a hub id")
    add("--dataset", default=Config.dataset, metavar="DATA",
        help="bbc-news, a csv or jsonl file, glue/<task> or a hub id")  # fmt: skip
    add("--text-column", action="append", default=argparse.SUPPRESS, metavar="COLUMN",
        help="column of the text (default: text, or those of the GLUE task); give it twice for pairs of "
        "texts")  # fmt: skip
    add("--label-column", default=Config.label_column, metavar="COLUMN", help="column of the label")
    add("--max-length", type=int, default=Config.max_length, metavar="TOKENS",
        help="longer texts are cut to this many tokens")  # fmt: skip


def _add_training(finetune: argparse.ArgumentParser) -> None:
    add = finetune.add_argument_group("training").add_argument
    add("--steps", type=int, default=argparse.SUPPRESS, metavar="N", help=f"number of steps (default: {DEFAULT_STEPS})")
    add("--epochs", type=float, default=argparse.SUPPRESS, metavar="N", help="number of epochs, in place of --steps")
    add("--batch-size", type=int, default=Config.batch_size, metavar="TEXTS", help="texts in a mini-batch")
    add("--device", choices=CHOICES["device"], default=Config.device, help="auto: a GPU if there is one")
    add("--precision", choices=CHOICES["precision"], default=Config.precision, help="bf16: bfloat16 autocast")
    add("--seed", type=int, default=Config.seed, metavar="N", help="seed of classifier, batches and dropout masks")


def _add_run(finetune: argparse.ArgumentParser) -> None:
    add = finetune.add_argument_group("folder of the run").add_argument
    add("--name", default=NAME, help="name of the run's folder in --output")
    add("--output", default=OUTPUT, metavar="FOLDER", help="folder that holds the folders of runs")
    add("--resume", default=argparse.SUPPRESS, metavar="FOLDER",
        help="go on with an interrupted run; its options stay as they were")  # fmt: skip
    add("--checkpoint-every", type=int, default=Config.checkpoint_every, metavar="STEPS",
        help="steps between checkpoints")  # fmt: skip


def _add_optimizers(finetune: argparse.ArgumentParser) -> None:
    add = finetune.add_argument_group("optimizers").add_argument
    add("--optimizer", choices=OPTIMIZERS, default=Config.optimizer,
        help="als: the line search; eager: its slow twin; adamw: AdamW")  # fmt: skip
    add("--compare", action="store_true", default=argparse.SUPPRESS,
        help="train with all three in turn, on the same batches")  # fmt: skip
    add("--adamw-lr", type=float, default=Config.adamw_lr, metavar="RATE", help="learning rate of adamw")
    add("--anneal", choices=CHOICES["anneal"], default=Config.anneal, help="cosine: lr falls to 0; constant: it stays")


def _add_search(finetune: argparse.ArgumentParser) -> None:
    group = finetune.add_argument_group("line search", "Defaults are those of fastals.ALS, or of the preset.")
    group.add_argument(
        "--preset", default=argparse.SUPPRESS, metavar="PAPER", help=f"values of a paper: {', '.join(PRESETS)}"
    )
    group.add_argument(
        "--units", default=Config.units,
        help="block, model, a number of units, or name patterns separated by commas",
    )  # fmt: skip
    for name, spec in ALS_OPTIONS.items():
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, **spec)


def _add_bench(bench: argparse.ArgumentParser) -> None:
    commands = bench.add_subparsers(required=True, metavar="command")
    page = commands.add_parser("report", help="a Markdown page with tables and pictures")
    page.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a .json of pytest-benchmark or of bench/first_light.py, or a .jsonl of bench/convergence.py",
    )
    page.add_argument("--out", default="report", help="folder of the page and its pictures")
    page.set_defaults(command=bench_report)
    changes = commands.add_parser("compare", help="list what got slower or faster; exit code 1 if anything got slower")
    changes.add_argument("before", metavar="A.json", help="results to compare with")
    changes.add_argument("after", metavar="B.json", help="results to judge")
    changes.set_defaults(command=bench_compare)
