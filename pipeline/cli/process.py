"""The process: it runs a verb, tells a failure in one sentence, and ends with the exit code."""

import atexit
import itertools
import locale
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from rich.text import Text

from pipeline import commands
from pipeline.cli.options import ask_for_kernels
from pipeline.cli.program import app
from pipeline.errors import ConfigError, PipelineError, StorageError
from pipeline.memory import bound_cpus, usable_cpus
from pipeline.runlog import Unbreakable, console

_INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended, and what typer makes of it


def main() -> NoReturn:
    """Run the verb of the command line, and end the process with its exit code.

    The process ends before Python's own shutdown: there, a thread of Arrow that still has to let go of a Python object
    aborts it, with SIGABRT instead of the exit code, after a file that was refused.
    """
    is_utf8 = sys.flags.utf8_mode or locale.getencoding().lower() == "utf-8"
    if not is_utf8 and os.environ.get("PYTHONUTF8") != "1":  # our files are UTF-8 whatever the terminal is
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # torch's threads wait by spinning, which beside another busy process made training 2 to 10 times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if usable_cpus() < bound_cpus():  # threads of all CPUs would mostly wait for each other to be given time
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ.setdefault(name, str(usable_cpus()))
    code = 1  # of an exception that nobody expected

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    atexit.register(leave)  # the first to be registered is the last to run
    code = run_verb()
    raise SystemExit(code)


@commands.scope()
def run_verb(arguments: Sequence[str] | None = None) -> int:
    """Run a verb, by default that of the command line; a failure that a user can act on is told in one sentence.

    Returns:
        The exit code.
    """
    try:
        ask_for_kernels(os.environ.get("RNA_KERNELS") or "auto")
        words = sys.argv[1:] if arguments is None else arguments
        words = [os.path.expanduser(word) for word in words]  # make quotes them, and zsh leaves ~ behind a =
        code = app(args=words, standalone_mode=False) or 0
        return _interrupted() if code == _INTERRUPTED else code
    except PipelineError as err:
        return _fail(str(err), err.exit_code)
    except MemoryError as err:
        return _fail(
            f"out of memory: {err}. Next: close other programs, or lower the batch size.", StorageError.exit_code
        )
    except (OSError, ImportError) as err:
        said = _system_failure(err) if isinstance(err, OSError) else ""
        if said:
            return _fail(f"{said}. Next: check the path, its permissions and the disk.", StorageError.exit_code)
        if not re.search(r"\.so\b", str(err)):
            raise
        told = "a package's own code cannot be loaded. Next: see whether ulimit -v leaves it room, or install it again."
        return _fail(f"{err}: {told}", ConfigError.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except Exception as err:
        if not hasattr(err, "format_message"):  # not one of the command line's own
            if re.search(r"\(os error \d+\)", str(err)):  # the system's, of polars
                return _fail(f"{_system_failure(err)}. Next: check the disk.", StorageError.exit_code)
            raise
        sentence = _with_value(err, words)  # empty where no verb was given: the help is printed then
        context = getattr(err, "ctx", None)
        which = f" {context.info_name}" if context is not None and context.parent is not None else ""
        told = f"{sentence if sentence.endswith('?') else sentence.rstrip('.') + '.'} Next: rna{which} --help."
        return _fail(told, ConfigError.exit_code) if sentence else ConfigError.exit_code


def _with_value(err: Any, words: Sequence[str]) -> str:
    """What the command line refuses; of an option, also what it was given, which the program's library leaves out."""
    sentence: str = err.format_message()
    for word, following in itertools.pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        if option and re.match(f"Invalid value for [^:]*'{option}'", sentence):
            return sentence.replace(":", f", got {(value if equals else following)!r}:", 1)
    return sentence


def _system_failure(err: Exception) -> str:
    """What the system refused, and where; empty where it was not the system. Polars names both in the text alone."""
    if isinstance(err, OSError) and err.errno is not None and err.strerror is not None:
        return f"{err.filename}: {err.strerror}" if err.filename else err.strerror
    found = re.search(r"(.+) \(os error \d+\)(?:: (.+))?", str(err))
    return ": ".join(part for part in reversed(found.groups()) if part) if found else ""


def _interrupted() -> int:
    return _fail("interrupted; nothing is half-written. Next: the same command again.", _INTERRUPTED)


def _fail(message: str, code: int) -> int:
    if os.environ.get("RNA_DEBUG"):
        traceback.print_exc()
    console.print(Text.assemble(("error: ", "bold red"), f"{commands.complete(message)} (exit code {code})"))
    return code
