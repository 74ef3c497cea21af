"""The one exception for mistakes that the user can mend."""


class UserError(Exception):
    """A mistake in the configuration, the files or the machine: printed as one message, exit code 2, no traceback.

    The text names the key or file, what was found, what was expected and what to do.
    """
