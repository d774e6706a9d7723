"""The command line: ``fastals finetune``, ``fastals report`` and ``fastals bench``."""

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastals.cli import ranks
from fastals.cli.errors import UserError
from fastals.cli.experiment import OPTIMIZERS, Experiment, als_options, build_optimizer
from fastals.cli.finetune import Interrupted, TrainingLoop
from fastals.cli.options import ALS_OPTIONS, NAME, OUTPUT, parser
from fastals.cli.page import LOSS, STEP_SIZES, write_page
from fastals.cli.plots import plot_losses, plot_step_sizes, summary_table
from fastals.cli.progress import Progress
from fastals.cli.runs import Config, RunFolder, explained

PAGE = "report.html"
MOST = 1e30  # epochs, and rate of AdamW, which float32 holds
LONGEST_NAME = 255  # bytes, of most file systems


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = parser(finetune, report).parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns at the next fork
    try:
        with _short_warnings():
            code = parsed.command(parsed)
    except UserError as error:
        ranks.say(f"fastals: {error}", error=True)
        code = 2
    ranks.leave()
    return code


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Within this context a warning is printed as a line of text, without the line of code that it comes from."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def finetune(arguments: argparse.Namespace) -> int:
    """Train one optimizer, or all of them in turn on the same batches."""
    ranks.join()
    folder, config = ranks.shared(lambda: _resumed(arguments) if "resume" in arguments else _new(arguments))
    runs = {config.optimizer: RunFolder(folder)}
    if config.compare:
        runs |= {name: RunFolder(folder / name) for name in OPTIMIZERS if name != config.optimizer}
    experiment, parameters = ranks.agreed(lambda: _prepared(config, list(runs)))
    ranks.say(experiment.describe(parameters, list(runs)))
    if not _train_all(experiment, runs):
        launcher = f"torchrun --nproc-per-node {ranks.size()} --no-python " if ranks.several() else ""
        again = f"{launcher}fastals finetune --resume {shlex.quote(str(folder))}"
        ranks.say(f"interrupted; go on with: {again}", error=True)
        return 130
    _show(runs, folder, folder.resolve().name)
    first = runs[config.optimizer]
    ranks.say(f"model    {first.model}\nmetrics  {first.metrics}\nreport   {folder / PAGE}")
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
    _show(runs, out, ", ".join(runs), prefix="report_")
    print(f"report   {out / PAGE}")
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


def _prepared(config: Config, optimizers: list[str]) -> tuple[Experiment, int]:
    """The experiment and its number of parameters, after all that can be wrong was tried: nothing is written before."""
    experiment = Experiment(config)
    for name in optimizers:
        model = experiment.build_model()
        build_optimizer(name, model, experiment)
    return experiment, sum(p.numel() for p in model.parameters())


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
    """Train and show the progress; False if the user stopped it."""
    with Progress(name, experiment.steps) as progress:
        try:
            progress.finish(TrainingLoop(experiment, name, run, progress.show).train())
        except Interrupted:
            return False
    return True


@ranks.by_first
def _show(runs: dict[str, RunFolder], folder: Path, title: str, prefix: str = "") -> None:
    """Draw the runs, write their page and print their table."""
    from rich.console import Console

    lines = {name: run.read_metrics() for name, run in runs.items()}
    summaries = {name: run.read_summary() or {} for name, run in runs.items()}
    configs = {name: run.read_config() if run.configuration.exists() else None for name, run in runs.items()}
    losses, step_sizes = folder / f"{prefix}loss.png", folder / f"{prefix}step_sizes.png"
    with explained(folder, "cannot be written", "make room, and draw the pictures with fastals report"):
        step_sizes.unlink(missing_ok=True)  # of other runs: where nothing is searched, none is drawn
        plot_losses(lines, losses)
        plot_step_sizes(lines, step_sizes)
        write_page(folder / PAGE, title, summaries, configs, {LOSS: losses, STEP_SIZES: step_sizes})
    Console().print(summary_table(summaries))


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


if __name__ == "__main__":
    sys.exit(main())
