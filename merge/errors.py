"""The one error that this package raises for a bad input or a merge that cannot be done exactly."""


class MergeError(ValueError):
    """A refused merge or export. The message says what was found, where, what was expected and what to do."""
