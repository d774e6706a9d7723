"""The command line: ``fastals finetune``, ``fastals report`` and ``fastals bench``."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastals.cli import ranks
from fastals.cli.bench import bench_compare, bench_report
from fastals.cli.errors import UserError, needs_extra
from fastals.cli.experiment import DEFAULT_STEPS, OPTIMIZERS, Experiment, als_options, build_optimizer
from fastals.cli.finetune import Interrupted, TrainingLoop
from fastals.cli.plots import plot_losses, plot_step_sizes, summary_table
from fastals.cli.runs import CHOICES, Config, RunFolder, explained
from fastals.presets import PRESETS
from fastals.schedule import ORDERS, SCHEDULES

# Arguments of ALS that can be set on the command line.
ALS_OPTIONS: dict[str, dict[str, Any]] = {
    "schedule": {"choices": list(SCHEDULES), "help": "which units are searched in a step"},
    "momentum": {
        "choices": ["none", "after", "tested"],
        "help": "none: no averaged direction; after: move along it, untested; tested: search along it",
    },
    "order": {"choices": list(ORDERS), "help": "order in which the units are searched"},
    "c": {"type": float, "help": "share of the promised decrease that a trial must deliver, between 0 and 1"},
    "trust": {"type": float, "help": "largest relative change of a unit in one step"},
    "lr": {"type": float, "help": "factor on the largest step size, no learning rate; usually 1"},
    "weight-decay": {"type": float, "help": "decoupled weight decay"},
    "merge-below": {"type": float, "help": "merge units whose step size falls below this"},
}

NAME, OUTPUT = "run", "runs"
MOST = 1e30  # epochs, and rate of AdamW, which float32 holds
LONGEST_NAME = 255  # bytes, of most file systems
PROCESSES = (
    "On several GPUs: torchrun --nproc-per-node 2 --no-python fastals finetune ... Each process takes an equal part of "
    "every mini-batch, and all take the steps of one process with the whole mini-batch, up to rounding and dropout "
    "masks. The first process writes the run's folder. Resumed with as many processes, a run goes on as if it had not "
    "been interrupted; with fewer or more, it goes on with other dropout masks."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        code = parsed.command(parsed)
    except UserError as error:
        ranks.say(f"fastals: {error}", error=True)
        code = 2
    ranks.leave()
    return code


def finetune(arguments: argparse.Namespace) -> int:
    """Train one optimizer, or all of them in turn on the same batches."""
    ranks.join()
    folder, config = ranks.shared(lambda: _resumed(arguments) if "resume" in arguments else _new(arguments))
    runs = {config.optimizer: RunFolder(folder)}
    if config.compare:
        runs |= {name: RunFolder(folder / name) for name in OPTIMIZERS if name != config.optimizer}
    experiment = ranks.agreed(lambda: _prepared(config, list(runs)))
    if not _train_all(experiment, runs):
        launcher = f"torchrun --nproc-per-node {ranks.size()} --no-python " if ranks.several() else ""
        again = f"{launcher}fastals finetune --resume {shlex.quote(str(folder))}"
        ranks.say(f"interrupted; go on with: {again}", error=True)
        return 130
    _show(runs, folder, ("loss.png", "step_sizes.png"))
    ranks.say(f"metrics, pictures and the model are in {folder}/")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Draw finished runs in one picture and print their table."""
    runs = {str(folder): RunFolder(Path(folder)) for folder in arguments.runs}
    for name, run in runs.items():
        if run.read_summary() is None:
            raise UserError(f"{name} is no finished run: it has no {run.summary.name}")
    out = Path(arguments.output)
    _refuse_unwritable(out)
    with explained(out, "cannot be written", "choose another --output"):
        out.mkdir(parents=True, exist_ok=True)
    _show(runs, out, ("report_loss.png", "report_step_sizes.png"))
    print(f"pictures are in {out}/")
    return 0


def _resumed(arguments: argparse.Namespace) -> tuple[Path, Config]:
    """Folder and configuration of the run to go on with."""
    folder, defaults = Path(arguments.resume), asdict(Config()) | {"name": NAME, "output": OUTPUT}
    given = {k: v for k, v in vars(arguments).items() if k not in ("resume", "command")}
    if other := [name for name, value in given.items() if value != defaults.get(name)]:
        raise UserError(f"a run goes on with the options that it was started with: leave out {_options(other)}")
    config = RunFolder(folder).read_config()
    if unknown := [name for name, _ in config.options if name.replace("_", "-") not in ALS_OPTIONS]:
        raise UserError(f"{folder} cannot be resumed: its configuration has the unknown option {unknown[0]!r}")
    stored = {k: v for k, v in asdict(config).items() if v != getattr(Config, k)}
    _check({"name": NAME, "seed": config.seed} | stored)
    als_options(config)
    return folder, config


def _new(arguments: argparse.Namespace) -> tuple[Path, Config]:
    """Folder and configuration of a new run."""
    _check(vars(arguments))
    folder, config = Path(arguments.output) / arguments.name, _config(arguments)
    als_options(config)
    _refuse_ignored(config)
    _refuse_unwritable(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already: go on with --resume {folder}, or choose another --name")
    return folder, config


def _prepared(config: Config, optimizers: list[str]) -> Experiment:
    """The experiment, after all that can be wrong was tried: nothing is written before."""
    experiment = Experiment(config)
    for name in optimizers:
        build_optimizer(name, experiment.build_model(), experiment)
    return experiment


def _train_all(experiment: Experiment, runs: dict[str, RunFolder]) -> bool:
    """Train every optimizer whose run is not finished; False if the user stopped one."""
    for name, run in runs.items():
        if ranks.shared(run.read_summary) is None:
            compare = experiment.config.compare and name == experiment.config.optimizer
            run.create(replace(experiment.config, optimizer=name, compare=compare))
            if not _train(experiment, name, run):
                return False
    return True


def _train(experiment: Experiment, name: str, run: RunFolder) -> bool:
    """Train with a progress bar; False if the user stopped it."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise needs_extra(error) from error
    columns = (
        TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[trials]} trials"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, disable=ranks.rank() > 0) as progress:
        bar = progress.add_task(name, total=None, loss=float("nan"), trials=0)

        def show(step: int, steps: int, loss: float, trials: int) -> None:
            progress.update(bar, completed=step, total=steps, loss=loss, trials=trials)

        try:
            TrainingLoop(experiment, name, run, show).train()
        except Interrupted:
            return False
    return True


@ranks.by_first
def _show(runs: dict[str, RunFolder], folder: Path, pictures: tuple[str, str]) -> None:
    """Draw the runs and print their table."""
    from rich.console import Console

    lines = {name: run.read_metrics() for name, run in runs.items()}
    with explained(folder, "cannot be written", "make room, and draw the pictures with fastals report"):
        plot_losses(lines, folder / pictures[0])
        plot_step_sizes(lines, folder / pictures[1])
    Console().print(summary_table({name: run.read_summary() or {} for name, run in runs.items()}))


def _config(arguments: argparse.Namespace) -> Config:
    """The configuration of a new run. An option that is not given has its default, or is missing in ``arguments``."""
    values = vars(arguments)
    options = [name.replace("-", "_") for name in ALS_OPTIONS]
    names = [f for f in Config.__dataclass_fields__ if f in values and f not in ("options", "text_column")]
    return Config(
        **{n: values[n] for n in names},
        options=tuple((name, values[name]) for name in options if name in values),
        text_column=tuple(values.get("text_column", ())),
    )


def _check(values: Mapping[str, Any]) -> None:
    """Refuse values that no run can have, before data or model are loaded."""
    for name in ("batch_size", "max_length", "checkpoint_every", "steps"):
        if values.get(name, 1) < 1:
            raise UserError(f"{_options([name])} must be at least 1")
    for name in ("epochs", "adamw_lr"):
        if not 0 < values.get(name, 1) <= MOST:
            raise UserError(f"{_options([name])} must be greater than 0, and at most {MOST:g}")
    if "steps" in values and "epochs" in values:
        raise UserError("give --steps or --epochs, not both")
    if abs(values["seed"]) >= 1 << 63:
        raise UserError("--seed must fit in 64 bits: choose a smaller one")
    if empty := [name for name, value in values.items() if value in ("", [""])]:
        raise UserError(f"{_options(empty)} must not be empty: leave it out for the default")
    if values["name"] in ("..", ".") or Path(values["name"]).name != values["name"]:
        raise UserError(f"--name {values['name']} must name one folder: --output says where it lies")


def _refuse_ignored(config: Config) -> None:
    """Refuse options that the run would not go by."""
    trained = OPTIMIZERS if config.compare else (config.optimizer,)
    searching = [name for name, _ in config.options]
    searching += [name for name in ("preset", "units") if getattr(config, name) != getattr(Config, name)]
    if trained == ("adamw",) and searching:
        raise UserError(f"the optimizer adamw searches nothing: leave out {_options(searching)}, or add --compare")
    if "adamw" not in trained and config.adamw_lr != Config.adamw_lr:
        raise UserError("--adamw-lr is for the optimizer adamw, which is not trained: leave it out, or add --compare")
    own_columns = config.text_column or config.label_column != Config.label_column
    if config.dataset == "bbc-news" and own_columns:
        raise UserError("the data set bbc-news has its own columns: leave out --text-column and --label-column")
    if len(config.text_column) > 2 or config.label_column in (config.text_column or ("text",)):
        raise UserError("--text-column must name one text or a pair of them, and another column than --label-column")


def _refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to."""
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in folder.parts):
        raise UserError("a name in --output or --name is too long for a folder: choose a shorter one")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{there} is no folder that can be written to: choose another --output")


def _options(names: Iterable[str]) -> str:
    """The options of these names, as they are given."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastals", description="Armijo line search per layer for transformers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_finetune(
        commands.add_parser(
            "finetune",
            help="fine-tune a text classifier",
            epilog=PROCESSES,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    _add_report(commands.add_parser("report", help="compare finished runs"))
    _add_bench(commands.add_parser("bench", help="pages and comparisons of benchmark results; needs a clone"))
    return parser


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    defaults = Config()
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", default=defaults.model, help="minilm, a folder or a hub id")
    data.add_argument(
        "--dataset", default=defaults.dataset, help="bbc-news, a csv or jsonl file, glue/<task> or a hub id"
    )
    data.add_argument(
        "--text-column",
        action="append",
        default=argparse.SUPPRESS,
        help="column of the text (default: text, or those of the GLUE task); give it twice for pairs of texts",
    )
    data.add_argument("--label-column", default=defaults.label_column, help="column of the label")
    data.add_argument(
        "--max-length", type=int, default=defaults.max_length, help="longer texts are cut to this many tokens"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--optimizer", choices=OPTIMIZERS, default=defaults.optimizer, help="the optimizer to train with"
    )
    training.add_argument(
        "--compare",
        action="store_true",
        default=argparse.SUPPRESS,
        help="train with every optimizer on the same batches",
    )
    training.add_argument(
        "--steps", type=int, default=argparse.SUPPRESS, help=f"number of steps (default: {DEFAULT_STEPS})"
    )
    training.add_argument(
        "--epochs", type=float, default=argparse.SUPPRESS, help="number of epochs, in place of --steps"
    )
    training.add_argument("--batch-size", type=int, default=defaults.batch_size, help="texts in a mini-batch")
    training.add_argument(
        "--precision", choices=CHOICES["precision"], default=defaults.precision, help="bf16 means bfloat16 autocast"
    )
    training.add_argument(
        "--seed", type=int, default=defaults.seed, help="seed of classifier, batches and dropout masks"
    )
    training.add_argument(
        "--device", choices=CHOICES["device"], default=defaults.device, help="auto: a GPU if there is one"
    )
    training.add_argument(
        "--adamw-lr", type=float, default=defaults.adamw_lr, metavar="RATE", help="learning rate of the optimizer adamw"
    )
    training.add_argument(
        "--anneal",
        choices=CHOICES["anneal"],
        default=defaults.anneal,
        help="cosine: lr falls to 0; constant: it stays",
    )
    search = parser.add_argument_group("line search", "Defaults are those of fastals.ALS, or of the preset.")
    search.add_argument("--preset", default=argparse.SUPPRESS, help=f"values of a paper: {', '.join(PRESETS)}")
    search.add_argument(
        "--units", default=defaults.units, help="block, model, a number of units, or name patterns separated by commas"
    )
    for name, spec in ALS_OPTIONS.items():
        search.add_argument(f"--{name}", default=argparse.SUPPRESS, **spec)
    run = parser.add_argument_group("run")
    run.add_argument("--name", default=NAME, help="name of the run's folder in --output")
    run.add_argument("--output", default=OUTPUT, help="folder that holds the folders of runs")
    run.add_argument(
        "--resume",
        metavar="FOLDER",
        default=argparse.SUPPRESS,
        help="go on with an interrupted run; its options stay as they were",
    )
    run.add_argument(
        "--checkpoint-every", type=int, default=defaults.checkpoint_every, metavar="STEPS",
        help="steps between checkpoints",
    )  # fmt: skip
    parser.set_defaults(command=finetune)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="folder of a finished run")
    parser.add_argument("--output", default=".", help="folder of the pictures")
    parser.set_defaults(command=report)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="command")
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


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
