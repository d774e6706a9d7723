"""The command line: ``fastals finetune``, ``fastals report`` and ``fastals bench``."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastals.cli.bench import load_report
from fastals.cli.errors import UserError, needs_extra
from fastals.cli.finetune import DEFAULT_STEPS, OPTIMIZERS, Interrupted, Session, Trainer, als_options, build_optimizer
from fastals.cli.plots import plot_losses, plot_step_sizes, summary_table
from fastals.cli.runs import Config, Run
from fastals.presets import PRESETS
from fastals.schedule import ORDERS, SCHEDULES

# Arguments of ALS that the command line passes on.
ALS_OPTIONS: dict[str, dict[str, Any]] = {
    "schedule": {"choices": list(SCHEDULES), "help": "which units are searched in a step"},
    "momentum": {"choices": ["none", "after", "tested"], "help": "how the averaged direction is used"},
    "order": {"choices": list(ORDERS), "help": "order of the searches"},
    "c": {"type": float, "help": "sufficient-decrease constant"},
    "trust": {"type": float, "help": "largest relative change of a unit in one step"},
    "lr": {"type": float, "help": "multiplier of the largest step"},
    "weight-decay": {"type": float, "help": "decoupled weight decay"},
    "merge-below": {"type": float, "help": "merge units whose step falls below this"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.command(parsed)
    except UserError as error:
        print(f"fastals: {error}", file=sys.stderr)
        return 2


def finetune(arguments: argparse.Namespace) -> int:
    """Train one optimizer, or all of them in turn on the same batches."""
    folder = Path(arguments.resume) if arguments.resume else Path(arguments.output) / arguments.name
    config = Run(folder).config() if arguments.resume else _config(arguments)
    if not arguments.resume and folder.exists():
        raise UserError(f"{folder} exists already: go on with --resume {folder}, or choose another --name")
    session = Session(config)
    runs = {config.optimizer: Run(folder)}
    if config.compare:
        runs |= {name: Run(folder / name) for name in OPTIMIZERS if name != config.optimizer}
    for name in runs:
        build_optimizer(name, session.model(), session.options)  # refuse before anything is written
    for name, run in runs.items():
        if run.result() is None:
            run.create(replace(config, optimizer=name))
            if not _train(session, name, run):
                print(f"interrupted; go on with: fastals finetune --resume {shlex.quote(str(folder))}", file=sys.stderr)
                return 130
    _show(runs, folder, ("loss.png", "step_sizes.png"))
    print(f"metrics, pictures and the model are in {folder}/")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Draw finished runs in one picture and print their table."""
    runs = {str(folder): Run(Path(folder)) for folder in arguments.runs}
    for name, run in runs.items():
        if run.result() is None:
            raise UserError(f"{name} is no finished run: it has no {run.summary.name}")
    out = Path(arguments.output)
    out.mkdir(parents=True, exist_ok=True)
    _show(runs, out, ("report_loss.png", "report_step_sizes.png"))
    print(f"pictures are in {out}/")
    return 0


def bench_report(arguments: argparse.Namespace) -> int:
    """Turn stored results into a page with pictures."""
    page = load_report().report([Path(f) for f in arguments.files], Path(arguments.out))
    print(f"the page is {page}")
    return 0


def bench_compare(arguments: argparse.Namespace) -> int:
    """List what changed beyond the spread; 1 if anything got slower."""
    lines, slower = load_report().compare(Path(arguments.before), Path(arguments.after))
    print("\n".join(lines))
    return int(slower)


def _train(session: Session, name: str, run: Run) -> bool:
    """Train with a progress bar; False if the user stopped it."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise needs_extra(error) from error
    columns = (
        TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[trials]} trials"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=None, loss=float("nan"), trials=0)

        def show(step: int, steps: int, loss: float, trials: int) -> None:
            progress.update(bar, completed=step, total=steps, loss=loss, trials=trials)

        try:
            Trainer(session, name, run, show).train()
        except Interrupted:
            return False
    return True


def _show(runs: dict[str, Run], folder: Path, pictures: tuple[str, str]) -> None:
    """Draw the runs and print their table."""
    from rich.console import Console

    lines = {name: run.lines() for name, run in runs.items()}
    plot_losses(lines, folder / pictures[0])
    plot_step_sizes(lines, folder / pictures[1])
    Console().print(summary_table({name: run.result() or {} for name, run in runs.items()}))


def _config(arguments: argparse.Namespace) -> Config:
    given = vars(arguments)
    options = {k.replace("-", "_"): given[k.replace("-", "_")] for k in ALS_OPTIONS}
    names = [f for f in Config.__dataclass_fields__ if f in given and f not in ("options", "text_column")]
    config = Config(
        **{n: given[n] for n in names},
        options=tuple((k, v) for k, v in options.items() if v is not None),
        text_column=tuple(arguments.text_column or ()),
    )
    for name in ("batch_size", "max_length", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if config.steps < 0 or config.epochs < 0:
        raise UserError("--steps and --epochs must not be negative")
    if config.steps and config.epochs:
        raise UserError("give --steps or --epochs, not both")
    als_options(config)
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastals", description="Armijo line search per layer for transformers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    train = commands.add_parser(
        "finetune", help="fine-tune a text classifier", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    defaults = Config()
    data = train.add_argument_group("model and data")
    data.add_argument("--model", default=defaults.model, help="minilm, a folder or a hub id")
    data.add_argument(
        "--dataset", default=defaults.dataset, help="bbc-news, a csv or jsonl file, glue/<task> or a hub id"
    )
    data.add_argument("--text-column", action="append", help="column of the text; twice for pairs")
    data.add_argument("--label-column", default=defaults.label_column, help="column of the label")
    data.add_argument("--max-length", type=int, default=defaults.max_length, help="tokens a text at most")
    how = train.add_argument_group("training")
    how.add_argument("--optimizer", choices=OPTIMIZERS, default=defaults.optimizer, help="what trains")
    how.add_argument("--compare", action="store_true", help="train with every optimizer on the same batches")
    length = f"0: not said; {DEFAULT_STEPS} steps where neither steps nor epochs are"
    how.add_argument("--steps", type=int, default=defaults.steps, help=length)
    how.add_argument("--epochs", type=float, default=defaults.epochs, help=length)
    how.add_argument("--batch-size", type=int, default=defaults.batch_size, help="texts a mini-batch")
    how.add_argument("--precision", choices=["fp32", "bf16"], default=defaults.precision, help="bf16: autocast")
    how.add_argument("--seed", type=int, default=defaults.seed, help="of classifier, batches and masks")
    how.add_argument("--device", choices=["auto", "cpu", "cuda"], default=defaults.device, help="where it trains")
    how.add_argument("--anneal", choices=["cosine", "constant"], default=defaults.anneal, help="course of lr")
    search = train.add_argument_group("line search")
    search.add_argument("--preset", default=defaults.preset, help=f"a paper's values: {', '.join(PRESETS)}")
    search.add_argument("--units", default=defaults.units, help="block, model, a number, or patterns with commas")
    for name, spec in ALS_OPTIONS.items():
        search.add_argument(f"--{name}", **spec)
    run = train.add_argument_group("run")
    run.add_argument("--name", default="run", help="the run's folder within --output")
    run.add_argument("--output", default="runs", help="where runs' folders are")
    run.add_argument("--resume", metavar="FOLDER", help="go on with an interrupted run, options as it was started")
    run.add_argument(
        "--checkpoint-every",
        type=int,
        default=defaults.checkpoint_every,
        metavar="STEPS",
        help="steps between checkpoints",
    )
    train.set_defaults(command=finetune)
    show = commands.add_parser("report", help="compare finished runs")
    show.add_argument("runs", nargs="+", metavar="FOLDER")
    show.add_argument("--output", default=".", help="folder of the pictures")
    show.set_defaults(command=report)
    _add_bench(commands.add_parser("bench", help="stored benchmark results"))
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="command")
    page = commands.add_parser("report", help="a Markdown page with tables and pictures")
    page.add_argument("files", nargs="+", metavar="FILE", help="pytest-benchmark's .json, or .jsonl of runs")
    page.add_argument("--out", default="report", help="folder of the page and its pictures")
    page.set_defaults(command=bench_report)
    changes = commands.add_parser("compare", help="what got slower beyond the spread; exit code 1 if anything did")
    changes.add_argument("before", metavar="A.json")
    changes.add_argument("after", metavar="B.json")
    changes.set_defaults(command=bench_compare)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
