"""Columns of the tables by name, for the kernels: ``RULE_BACKTRACK`` is the column "backtrack" of ``rules``.

``N_RULES`` is the number of columns; a constant of the search has its own name. Import each by name: Triton hashes the
globals that a kernel uses, but not the attributes of a module, and would take a stale kernel from its disk cache.
"""

import triton.language as tl

from fastals.kernels import arena, table

TABLES = {
    "": arena.STATE,
    "BATCH_": arena.BATCH,
    "MEMORY_": arena.REMEMBERED,
    "RULE_": arena.RULES,
    "FLAG_": arena.FLAGS,
    "SUM_": arena.SUMS,
    "CONSTANT_": arena.CONSTANTS,
    "OUTCOME_": arena.OUTCOMES,
    "INITIAL_": arena.INITIALS,
    "REFERENCE_": arena.REFERENCES,
    "CHUNK_": table.CHUNK,
    "PROGRAM_": table.PROGRAM,
    "LAYOUT_": table.LAYOUT,
    "PLACE_": table.PLACES,
    "SPAN_": table.SPANS,
}
SIZES = {
    "N_STATE": len(arena.STATE),
    "N_MEMORY": len(arena.REMEMBERED),
    "N_RULES": len(arena.RULES),
    "N_FLAGS": len(arena.FLAGS),
    "N_SUMS": len(arena.SUMS),
    "N_CONSTANTS": len(arena.CONSTANTS),
    "N_CHUNK": len(table.CHUNK),
    "N_PROGRAM": len(table.PROGRAM),
    "N_LAYOUT": len(table.LAYOUT),
    "N_PLACES": len(table.PLACES),
    "N_SPANS": len(table.SPANS),
    "N_RING": arena.RING,
    "N_SPLIT": arena.SPLIT,
}
CONSTANTS = {"LEAST_RMS": arena.LEAST_RMS}
_columns = [(prefix + name.upper(), i) for prefix, names in TABLES.items() for i, name in enumerate(names) if name]
_numbers = SIZES | CONSTANTS | dict(_columns)
if len(_numbers) < len(SIZES) + len(CONSTANTS) + len(_columns):
    raise ImportError("two columns of the kernels' tables have one name")


def __getattr__(name: str) -> tl.constexpr:
    """The column, size or constant of this name; importing any other name raises an ImportError."""
    if name not in _numbers:
        raise AttributeError(f"no table of the kernels has a column {name}")
    return tl.constexpr(_numbers[name])
