"""The command line: each command parses its words and hands them to one function of the library.

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 fault, 2 misuse, 75 stopped by a signal and resumable,
130 stopped at once by Ctrl-C.
"""

import errno
import io
import os
import re
import sys
from typing import NoReturn

from typer.exceptions import TyperException

from hfgpt.cli import card_commands, hub_commands, model_commands, run_commands, weights_commands  # noqa: F401 - registered
from hfgpt.cli.app import app
from hfgpt.system.console import print_status, result_stream
from hfgpt.system.extras import brought_by, needs
from hfgpt.system.quoting import shorten_words

# What a user's words can cause. Other errors, such as a full disk or a run that diverged, are faults.
MISUSES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

INTERRUPTED = 130
"""The exit code of typer, and of a shell, for a program that Ctrl-C ended."""


def main() -> None:
    """Run the command line; a user's mistake gets one line and exit code 2, without a traceback."""
    is_debug = "--debug" in sys.argv
    # Every command knows --debug, wherever it stands.
    sys.argv = [sys.argv[0], *join_resume([word for word in sys.argv[1:] if word != "--debug"])]
    prepare_streams()
    silence_libraries()
    try:
        check_encoding(sys.argv)
        code = app(standalone_mode=False) or 0
        result_stream().flush()  # here a full disk, or a reader that has gone, is noticed
    except BrokenPipeError:  # `hfgpt config demo | head -1`: the reader has had enough
        discard_stdout()
        raise SystemExit(1) from None
    except TyperException as error:
        fail(describe_misuse(error), 2)
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError, RuntimeError) as error:
        message = describe(error)
        if is_debug or message is None:
            raise
        is_misuse = isinstance(error, MISUSES) or getattr(error, "errno", None) == errno.ENAMETOOLONG
        fail(message, 2 if is_misuse else 1)
    if code == INTERRUPTED:
        print_status("stopped at once; the last checkpoint is as it was.")
    raise SystemExit(code)


def fail(message: str, code: int) -> NoReturn:
    """Print one line that says what is wrong, and end."""
    try:
        result_stream().flush()
    except OSError:
        discard_stdout()
    if message:
        message = shorten_words(message, sys.argv[1:])
        print(f"error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201 - from every process, unlike print_status
    raise SystemExit(code) from None


def describe_misuse(error: TyperException) -> str:
    """One line about words that typer does not understand: the nearest known ones, and the help to read."""
    message = error.format_message().strip()
    if not message:  # `hfgpt` alone: its help has been printed
        return ""
    message = re.sub(r" \(Possible options: (.*)\)$", r". Did you mean \1?", message[0].lower() + message[1:])
    key = re.match(r"no such option: -+(\w+\.[\w.]+)", message)
    if key:
        message = f"{key[0]}. Values of a recipe have no dashes: `{key[1]}=VALUE`."
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "hfgpt"
    return f"{message}{'' if message[-1] in '.?' else '.'} See `{where} --help`."


def describe(error: Exception) -> str | None:
    """One line about what went wrong; None if only a traceback can tell."""
    if isinstance(error, ModuleNotFoundError):
        return describe_missing(error)
    if isinstance(error, ImportError):  # Python gives a name to its own; without one, a version is too old
        return None if error.name else str(error)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        # Python reads names that the locale has no letters for as surrogates; pyarrow (25), below datasets, does not.
        return "a folder in use, such as HF_HOME, has letters that this locale has not. Set LC_ALL=C.UTF-8."
    # torch, on a GPU or a CPU
    is_torch_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or is_torch_memory:
        return f"out of memory. Lower the batch, the rows or the model. {error}"
    is_ours = isinstance(error, RuntimeError) and not isinstance(error, MISUSES)
    return None if is_ours else str(error)


def describe_missing(error: ModuleNotFoundError) -> str | None:
    """The command that installs a missing package; None if no extra of hfgpt brings it."""
    missing = (error.name or "").partition(".")[0]
    found = brought_by(missing)
    return needs("this", found[1].name) if found and found[0] != "test" else None


def prepare_streams() -> None:
    """Make every text writable: to nowhere where a stream is closed, as an escape where its encoding lacks a letter."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_stdout() -> None:
    """Send what is left in the buffer to nowhere, or Python complains about it when it ends."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), result_stream().fileno())


def check_encoding(words: list[str]) -> None:
    """Refuse words that are not UTF-8: Python passes bytes that it cannot decode as lone surrogates.

    Raises:
        ValueError: naming the word.
    """
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ValueError(f"{word!r} is not UTF-8. Set the terminal to UTF-8.")


def join_resume(words: list[str]) -> list[str]:
    """Write `--resume` and `--resume PATH` as one word each, since typer has no options whose value may be left out.

    What follows is a path if it comes after the recipe and is neither an option nor a `key=value`.
    """
    result: list[str] = []
    for word in words:
        has_recipe = len([earlier for earlier in result if not earlier.startswith("-")]) > 1  # after the command
        is_path = not word.startswith("-") and "=" not in word and result[-1:] == ["--resume="]
        if is_path and has_recipe:
            result[-1] += word
        else:
            result.append("--resume=" if word == "--resume" else word)
    return result


def silence_libraries() -> None:
    """Switch off transformers' bars and hints and, where stderr is no terminal, the bars of datasets and the Hub.

    By environment variables, because importing the libraries takes seconds that `--help` does not need.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
