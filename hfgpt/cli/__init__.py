"""The command line: each command parses its words and hands them to one function of the library.

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 fault, 2 misuse, 75 stopped by a signal and resumable,
130 stopped at once by Ctrl-C.
"""

import errno
import io
import os
import sys
from pathlib import Path
from typing import NoReturn

from typer.exceptions import TyperException

from hfgpt.cli import (  # noqa: F401 - registered
    adopt_commands,
    card_commands,
    check_commands,
    hub_commands,
    model_commands,
    new_commands,
    run_commands,
    studio_commands,
    weights_commands,
)
from hfgpt.cli.app import app
from hfgpt.system.console import print_status, result_stream
from hfgpt.system.extras import brought_by, needs
from hfgpt.system.quoting import shorten_words
from hfgpt.system.suggest import nearest_path

# What a user's words can cause. Other errors, such as a full disk or a run that diverged, are faults.
MISUSES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

UNUSABLE = {
    errno.EACCES: "may not be used by you: no permission. Name another, or change that with chmod.",
    errno.EROFS: "is on a disk that cannot be written to. Name another.",
    errno.EPERM: "may not be used by you: no permission. Name another.",
    errno.EISDIR: "is a folder. Name a file.",
    errno.ENOTDIR: "is a file. Name a folder.",
    errno.ENOENT: "is not there: no such file or folder.",
    errno.EEXIST: "exists already. Name another.",
    errno.ENAMETOOLONG: "has too long a name. Shorten it.",
}
"""What is wrong with a path that the operating system refused, and what to do."""

INTERRUPTED = 130
"""The exit code of typer, and of a shell, for a program that Ctrl-C ended."""


def main() -> None:
    """Run the command line; a user's mistake gets one line and exit code 2, without a traceback."""
    is_debug = "--debug" in sys.argv
    # Every command knows --debug, wherever it stands.
    words = [word for word in sys.argv[1:] if word != "--debug"]
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    sys.argv = [sys.argv[0], *join_resume(words)]
    prepare_streams()
    silence_libraries()
    try:
        check_encoding(sys.argv)
        code = app(standalone_mode=False, prog_name="hfgpt") or 0
        result_stream().flush()  # here a full disk, or a reader that has gone, is noticed
    except BrokenPipeError:  # `hfgpt config demo | head -1`: the reader has had enough
        discard_stdout()
        raise SystemExit(1) from None
    except TyperException as error:
        from hfgpt.cli.misuse import describe_misuse  # reads the options of a recipe, which take time

        fail(describe_misuse(error), 2)
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError, RuntimeError) as error:
        message = describe(error)
        if is_debug or message is None:
            raise
        is_misuse = isinstance(error, MISUSES) or getattr(error, "errno", None) == errno.ENAMETOOLONG
        fail(message + near_path(message) if is_misuse else message, 2 if is_misuse else 1)
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
    if isinstance(error, OSError) and error.filename and error.errno in UNUSABLE:
        return describe_path(Path(os.fsdecode(error.filename)), UNUSABLE[error.errno])
    is_ours = isinstance(error, RuntimeError) and not isinstance(error, MISUSES)
    return None if is_ours else str(error)


def describe_path(path: Path, fault: str) -> str:
    """Which part of a path cannot be used, why, and what to do."""
    if path.name.endswith(".tmp"):  # what `write_atomically` writes before it is whole
        path = path.with_name(path.name.removeprefix(".").removesuffix(".tmp"))
    folder = next(each for each in path.parents if each.exists())
    if folder.is_file():
        return f"{path}: {folder} is a file. Name a folder there."
    if folder not in (path.parent, path):
        return f"{path}: there is no folder {path.parent}. Make it first, or name another."
    return f"{path} {fault}"


def near_path(message: str) -> str:
    """The end of an error message: the file that a path on the command line may have meant, if the message names it."""
    for word in sys.argv[1:]:
        for typed in (word, word.partition("=")[2]):
            if typed and repr(typed)[1:-1] in message and "Did you mean" not in message and not os.path.exists(typed):
                return nearest_path(Path(typed))
    return ""


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
