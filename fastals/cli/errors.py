"""Errors that are the user's to mend: one line that says what to do."""


class UserError(Exception):
    """Shown by the command line as one line, with exit code 2."""


def needs_extra(error: ImportError) -> UserError:
    """The error for a package of the extra ``finetune`` that is not installed."""
    return UserError(f"{error.name} is not installed: pip install 'fastals[finetune]'")
