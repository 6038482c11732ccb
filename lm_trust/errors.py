"""Errors that are meant for the person at the terminal."""


class UserError(Exception):
    """Something that the user can put right: a configuration, a file, a missing package, a reward function.

    The message is one line. It names the file, key or sample that is at fault and says what to do.
    The command line prints it without a traceback and exits with status 2.
    """
