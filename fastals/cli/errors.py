"""Errors that the user can fix: one line that says what to do."""


class UserError(Exception):
    """Shown by the command line as one line, with exit code 2."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def needs_extra(error: ImportError) -> UserError:
    """The error for a missing package of the extra ``finetune``."""
    return UserError(f"{error.name} is not installed: pip install 'fastals[finetune]'")
