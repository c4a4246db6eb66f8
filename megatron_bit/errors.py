"""The one exception that means "the user can fix this": printed as one line, exit code 2."""


class UserError(Exception):
    """A mistake in the input: which key or file, its value, what is allowed, what to do.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


class ShardError(UserError):
    """A shard that cannot be had or read; `data.on_error=skip` goes on without it."""

    def __init__(self, message: str, sha256: str) -> None:
        """sha256: of the shard, as the manifest has it."""
        super().__init__(message)
        self.sha256 = sha256


class LocalUserError(UserError):
    """A UserError that one rank found by itself, such as a damaged shard: that rank prints it, whatever its number."""


class Stopped(UserError):
    """Another rank has said why the job ends; this one leaves with the same exit code, silently."""


class Diverged(UserError):
    """Updates were skipped, or losses no numbers, too often in a row: the same data and settings would do it again.

    Exit code EXIT_DIVERGED, which a launcher does not answer with another attempt.
    """


class RankLost(UserError):
    """Ranks do not answer: stopped, or on a node that is. Exit code EXIT_RANK_LOST; another attempt may go well."""


EXIT_USER_ERROR = 2
EXIT_RANK_LOST = 87
EXIT_DIVERGED = 86
EXIT_PREEMPTED = 85  # saved on a signal; the same command continues the run
