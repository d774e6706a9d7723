"""The page of finished runs: one HTML file with their table, pictures and options, which needs no other file."""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fastals.cli.plots import COLUMNS, summary_rows
from fastals.cli.runs import Config
from fastals.files import replacing

LOSS, STEP_SIZES = "Loss", "Step sizes"
#: How each picture is read.
CAPTIONS = {
    LOSS: "The loss of each mini-batch before its step, pale, and its running mean, strong. Mini-batches differ, so "
    "compare the means; the table has the mean over the last fifth of the steps. Lower is better; only the held-out "
    "accuracy tells of texts that no run was trained on.",
    STEP_SIZES: "The step size of each unit, on a log scale. Compare a unit with itself over the steps: each has a "
    "scale of its own. Where a unit has no point, it has not moved in that step.",
}
ALWAYS = "model", "dataset", "optimizer", "steps", "seed", "adamw_lr"
#: Without influence on the result, or told better by the summary.
NEVER = {"data", "compare", "checkpoint_every", "device"}

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --soft: #59636e; --line: #d1d9e0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9198a1; --line: #3d444d } }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif }
h1, h2 { line-height: 1.25; overflow-wrap: anywhere }
h2 { margin-top: 2rem }
p { color: var(--soft) }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #ffffff }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 0.35rem 0.9rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
thead th { color: var(--soft); font-weight: 600 }
tbody th { font-weight: 600 }
.numbers td, .numbers th + th { text-align: right }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def write_page(
    path: Path,
    title: str,
    summaries: Mapping[str, Mapping[str, Any]],
    configs: Mapping[str, Config | None],
    pictures: Mapping[str, Path],
) -> None:
    """Write the page of these runs, by name.

    Args:
        path: where the page goes.
        title: its heading.
        summaries: what :meth:`RunFolder.read_summary` returns.
        configs: the configurations; None if a run has left none.
        pictures: PNG files by :data:`LOSS` and :data:`STEP_SIZES`; those that are not there are left out.
    """
    parts = [_table(COLUMNS, summary_rows(summaries), "numbers")]
    parts += [_picture(name, file) for name, file in pictures.items() if file.exists()]
    parts += ["<h2>What was run</h2>", _table(["", *summaries], _options(summaries, configs))]
    page = PAGE.substitute(title=escape(title), body="\n".join(parts))
    with replacing(path) as new:
        new.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def _table(head: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "words") -> str:
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    ]
    body = "\n".join(["<tbody>", *lines, "</tbody>"])
    return f'<div class="scroll"><table class="{kind}">\n<thead><tr>{columns}</tr></thead>\n{body}\n</table></div>'


def _picture(name: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<h2>{name}</h2>\n<p>{CAPTIONS[name]}</p>\n<img alt="{name}" src="data:image/png;base64,{data}">'


def _options(
    summaries: Mapping[str, Mapping[str, Any]], configs: Mapping[str, Config | None]
) -> Iterator[tuple[str, ...]]:
    """Rows of what every reader needs and of what is no default, devices and versions last; a column for each run."""
    runs = [_facts(configs[name], summary) for name, summary in summaries.items()]
    defaults = {name: _text(value) for name, value in asdict(Config()).items() if name not in ALWAYS}
    for name in dict.fromkeys((*ALWAYS, *(name for facts in runs for name in facts))):
        cells = [facts.get(name, "-") for facts in runs]
        if set(cells) - {"-", defaults.get(name)}:
            yield name.replace("_", "-"), *cells


def _facts(config: Config | None, summary: Mapping[str, Any]) -> dict[str, str]:
    """Options that the run has gone by, device and versions; runs of older versions have stored less."""
    facts = {} if config is None else asdict(config) | dict(config.options)
    searching = ("preset", "units", *(name for name, _ in config.options)) if config else ()
    ignored = searching if config and config.optimizer == "adamw" else ("adamw_lr",)
    facts = {name: value for name, value in facts.items() if name not in (*NEVER, *ignored, "options")}
    stored = {name: summary[name] for name in ("optimizer", "steps", "device") if name in summary}
    return {name: _text(value) for name, value in (facts | stored | summary.get("versions", {})).items()}


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value) or "-"
