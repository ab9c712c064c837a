"""The error that stops a build."""


class BuildError(Exception):
    """Its text is all that the user is shown: what is wrong, and what to do about it."""
