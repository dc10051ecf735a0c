"""What can go wrong, and the exit code that says so.

A message is one sentence with where, what was got, what was expected and what to do next:
``DataError("train_data.csv: row 17 (id 8cdf…): letter 'X' in the sequence; expected A, C, G, U. Next: …")``.
"""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What follows the sentence that a name is not known: the one most like it, or nothing.

    >>> did_you_mean("hyna", ["drsn", "hyena"]), did_you_mean("bert", ["drsn", "hyena"])
    (" Did you mean 'hyena'?", '')
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class PipelineError(Exception):
    """A failure that a user can act on; the command line prints it in one sentence, without a traceback."""

    exit_code = 1


class ConfigError(PipelineError):
    """An option, a TOML file or a combination of them does not make sense."""

    exit_code = 2


class DataError(PipelineError):
    """An input file is missing, damaged, or not what it claims to be."""

    exit_code = 3


class DivergedError(PipelineError):
    """Training met non-finite values that every fallback failed to cure."""

    exit_code = 4


class StorageError(PipelineError):
    """Disk or memory ran out, or no readable checkpoint is left."""

    exit_code = 5


class NetworkError(PipelineError):
    """A service could not be reached or refused the credentials."""

    exit_code = 6


class CrashedError(PipelineError):
    """The run died several times in the same place, of a signal or a lost device; starting it again changes nothing."""

    exit_code = 7


class StoppedError(PipelineError):
    """The run was asked to stop; it saved its state and goes on when started again."""

    exit_code = 75


class LostDeviceError(StoppedError):
    """The device failed; nothing was saved from it, and the run goes on from its last checkpoint."""


class BusyError(StoppedError):
    """Another process is at work on the same run."""
