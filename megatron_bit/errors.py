"""The one exception that means "the user can fix this": printed as one line, exit code 2."""


class UserError(Exception):
    """A mistake in the input: which key or file, its value, what is allowed, what to do.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


class LocalUserError(UserError):
    """A UserError that one rank found by itself, such as a damaged shard: that rank prints it, whatever its number."""


class Stopped(UserError):
    """Another rank has said why the job ends; this one leaves with the same exit code, silently."""


EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 85  # saved on a signal; the same command continues the run
