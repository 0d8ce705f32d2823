"""The exceptions that end a command with one line instead of a traceback, and warnings of one line."""

import os
import sys
from functools import cache
from pathlib import Path


class UserError(Exception):
    """Bad input: a config value, data row, checkpoint, tokenizer or layout that cannot work.

    The message is one line naming the option or file, the value found and what would be valid.
    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, where: str, found: str, remedy: str):
        """``where``: option or file; ``found``: the offending value; ``remedy``: what would be valid."""
        self.where, self.found, self.remedy = where, found, remedy
        super().__init__(f"{where}: {found}; {remedy}".replace("\n", " "))


class RunError(Exception):
    """A run that cannot go on though its input was good. One line, exit code 1."""


class AlarmError(RunError):
    """A run ended by an alarm of ``alarms.stop_on``. One line, exit code 3."""


class Preempted(Exception):
    """All ranks have agreed to leave (parallel/preemption.py). The weights are those of the last finished step."""


def unwritable(path: Path, error: OSError) -> UserError:
    """The ``UserError`` for a file that the disk or its permissions refuse."""
    return UserError(str(path), f"cannot be written ({error.strerror})", "free disk space or choose another place")


@cache
def warn(line: str) -> None:
    """Say on stderr what works, but perhaps not as meant: once a process, and of a world only on its first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"g2r: warning: {line}", file=sys.stderr, flush=True)
