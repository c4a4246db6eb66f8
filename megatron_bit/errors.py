"""The one exception that means "the user can fix this": printed as one line, with its exit code."""

from __future__ import annotations

import copy

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 85  # saved on a signal; the same command continues the run
EXIT_DIVERGED = 86
EXIT_RANK_LOST = 87
EXIT_EXHAUSTED = 88


class UserError(Exception):
    """A mistake in the input: which key or file, its value, what is allowed, what to do.

    The command line prints the message alone, without a traceback, and exits with `exit_code`.
    """

    exit_code = EXIT_USER_ERROR

    def with_text(self, message: str) -> UserError:
        """The same with more said: of the same kind and exit code."""
        other = copy.copy(self)
        other.args = (message,)
        return other


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

    def __init__(self, message: str = "", exit_code: int = EXIT_USER_ERROR) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Diverged(UserError):
    """Updates were skipped, or losses no numbers, too often in a row: the same data and settings would do it again.

    A launcher does not answer its exit code with another attempt.
    """

    exit_code = EXIT_DIVERGED


class RankLost(UserError):
    """Ranks do not answer: stopped, or on a node that is. Another attempt may go well."""

    exit_code = EXIT_RANK_LOST


class Exhausted(UserError):
    """Memory, threads or file descriptors have run out in one process: it says so, whatever its rank."""

    exit_code = EXIT_EXHAUSTED
