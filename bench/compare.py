"""The comparison of two files of benchmark results, for ``fastals bench compare``."""

from pathlib import Path

from records import Measure, Record, measures, read
from stamp import STAMP

from fastals.cli.errors import UserError

APART = 1.05  # two medians closer than this factor count as equal


def compare(before: Path, after: Path) -> tuple[list[str], bool]:
    """Lines with the conditions that differ and the measures that changed, and whether any got slower.

    A measure is a ratio of times taken in turn: the speed-up of a case, or the bandwidth of a kernel over that of a
    copy. It has changed if its two ranges, lowest to highest, are disjoint and its medians more than 5 % apart: with
    five rounds a side, ranges are disjoint by chance in 1 of 126 comparisons. Seconds are not compared: those of two
    runs are not comparable.

    Raises:
        UserError: a file is no result or has no measure, or ``after`` lacks a measure of ``before``.
    """
    old_cases, new_cases = (read(path).cases for path in (before, after))
    old, new = _measures_of(before, old_cases), _measures_of(after, new_cases)
    missing = [name for name in old if name not in new]
    if missing:
        raise UserError(f"{after} does not have {'; '.join(missing)}")
    verdicts = {name: _verdict(measure, new[name]) for name, measure in old.items()}
    lines = [f"{verdict}: {name}: {old[name]} -> {new[name]}" for name, verdict in verdicts.items() if verdict]
    lines = lines or ["nothing changed beyond the spread"]
    return _differing_conditions(old_cases, new_cases) + lines, "slower" in verdicts.values()


def _measures_of(path: Path, cases: list[Record]) -> dict[str, Measure]:
    by_name = {name: measure for case in cases for name, measure in measures(case).items()}
    if not by_name:
        raise UserError(f"nothing can be judged in {path}: it has neither ratios nor kernels")
    return by_name


def _verdict(old: Measure, new: Measure) -> str:
    """``slower``, ``faster``, or empty if the measure has not changed."""
    low, high = sorted((old, new))
    if low.high >= high.low or high.median <= APART * low.median:
        return ""
    return "faster" if high is new else "slower"


def _differing_conditions(old: list[Record], new: list[Record]) -> list[str]:
    """A line for each entry of the stamp that differs, except the commit; ``dirty`` also if both trees were dirty."""
    lines = []
    for key in STAMP:
        a, b = (sorted({str(c["extra_info"].get(key, "")) or "-" for c in cases}) for cases in (old, new))
        if key != "commit" and (a != b or (key == "dirty" and "True" in a)):
            lines.append(f"{key}: {' / '.join(a)} -> {' / '.join(b)}")
    return lines
