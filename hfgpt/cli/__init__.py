"""The command line: each command parses its words and hands them to one function of the library.

Results go to stdout, talk goes to stderr. Exit codes: 0 done, 1 fault, 2 misuse, 75 stopped by a signal and resumable,
130 stopped at once by Ctrl-C.
"""

import os
import sys

from hfgpt.cli import card_commands, model_commands, run_commands, weights_commands  # noqa: F401 - each registers its commands
from hfgpt.cli.app import app

# What a user's words can cause; what else fails, a full disk or a run that diverged, is a fault.
MISUSES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def main() -> None:
    """Run the command line; a user's mistake gets one line and exit code 2, without a traceback."""
    is_debug = "--debug" in sys.argv
    # Every command knows --debug, wherever it stands.
    sys.argv = [sys.argv[0], *join_resume([word for word in sys.argv[1:] if word != "--debug"])]
    quieten_libraries()
    try:
        check_encoding(sys.argv)
        app()
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint is as it was.", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError) as error:
        if is_debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, MISUSES) else 1) from None


def check_encoding(words: list[str]) -> None:
    """Refuse words that are no text: Python hands bytes that it cannot decode on as lone surrogates.

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


def quieten_libraries() -> None:
    """Leave the terminal to hfgpt: transformers' bars and hints, and, where nobody watches, those of datasets.

    By environment variables, because importing the libraries takes seconds that `--help` does not need.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
