"""The one exception that stands for a user's mistake."""


class InputError(ValueError):
    """Wrong input: an option, a path, a checkpoint or a data set that cannot be used.

    Its message is one sentence for the user that names the key or the file, its value, and what would be right.
    The command line prints it without a traceback and exits with status 2.
    """
