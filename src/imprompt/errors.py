"""Errors that speak to the person who can fix them: expected, received, next move."""


class UserError(ValueError):
    """Something the user gave cannot be used. The command line prints its one sentence and exits with 2."""


class ImageError(UserError):
    """A picture that cannot be read or is not fit for use."""


class CheckpointError(UserError):
    """A file that is no adapter, is damaged, or does not fit."""


def brief(error: Exception) -> str:
    """What a library says about an error, on one line, to stand in brackets behind our own words."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
