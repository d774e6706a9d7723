"""Options of the optimizer that several test files share."""

# Steps so large that trials are rejected and searches exhausted.
HARD = {"c": 0.5, "backtrack": 0.5, "growth": 2.0, "trust": 0.2, "max_trials": 4}
HARD_SWEEP = HARD | {
    "schedule": "sweep", "order": "top_down", "momentum": "none", "initial": "warm", "reference": "monotone",
}  # fmt: skip
CAPTURED = [  # what a captured step must support
    {"schedule": "relay"}, {"schedule": "sweep"}, {"schedule": "sweep", "every": 2},
    {"schedule": "sweep", "order": "bottom_up"}, {"schedule": "independent"}, {"schedule": "cycle"},
    {"schedule": "joint"}, {"schedule": "joint", "momentum": "after"}, {"momentum": "tested"}, {"every": 2},
    {"every": "auto"}, {"max_grad_norm": 0.1}, {"initial": "random"}, {"cache": False},
]  # fmt: skip


def values(options: dict) -> str:
    """The name of a test case: the values of its options."""
    return "-".join(map(str, options.values()))
