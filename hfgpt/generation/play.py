"""`hfgpt play`: type a text, read its continuation, change the settings, try again.

Texts go to stdout, everything else to stderr, so that `hfgpt play MODEL < prompts.txt > texts.txt` works as well.
"""

import sys
from collections.abc import Iterator

from hfgpt.generation.generator import TextGenerator, continue_text
from hfgpt.generation.params import OPTIONS, SamplingParams, change_params, format_value, parse_params
from hfgpt.generation.render import open_console, stream_to
from hfgpt.system.console import print_status, result_stream
from hfgpt.system.quoting import shorten

MARKER = "> "

HELP = """\
Type a text and press Enter: the model continues it.
/set temperature=0.7,top_k=40   changes settings, for all that follows
/settings                       shows them
/reset                          makes them what they were at the start
/again                          continues the last text once more
/quit, or Ctrl-D                leaves; Ctrl-C stops a text
A text that starts with / is typed with two of them."""


def play(generator: TextGenerator, start: SamplingParams) -> None:
    """Read lines and answer them until there are no more.

    In a pipe no marker is printed, and the first mistake ends the loop.

    Args:
        generator: see `hfgpt.generation.generator.load_generator`.
        start: params until they are changed.

    Raises:
        ValueError: a mistake in a pipe.
    """
    is_terminal = all(stream.isatty() for stream in (sys.stdin, result_stream(), sys.stderr))
    params = start
    last = ""
    if is_terminal:
        print_status(f"{generator.source} is ready. /help says what can be typed here.")
    for line in read_lines(MARKER if is_terminal else ""):
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/set":
                params = change_params(params, parse_params(rest))
            elif command == "/settings":
                print_status(describe(params))
            elif command == "/reset":
                params = start
            elif command == "/help":
                print_status(HELP)
            elif command == "/again" and last:
                answer(generator, last, params)
            elif line.startswith("/") and not line.startswith("//"):
                raise ValueError(f"{shorten(command)} is no command here, or there is nothing for it to do. See /help.")
            elif line.strip():
                last = line.removeprefix("/")
                answer(generator, last, params)
        except ValueError as error:
            if not is_terminal:
                raise
            print_status(f"error: {error}")


def read_lines(marker: str) -> Iterator[str]:
    """Lines from stdin: at a terminal with editing and history, and a Ctrl-C there only clears the line."""
    if marker:
        import readline  # noqa: F401 - gives `input` editing and history
    while True:
        try:
            yield input(marker)
        except EOFError:
            if marker:
                print_status("")
            return
        except KeyboardInterrupt:
            if not marker:
                raise
            print_status("\nCtrl-D or /quit leaves.")


def describe(params: SamplingParams) -> str:
    """The params as they could be typed."""
    return ",".join(f"{name}={text}" for name in OPTIONS for text in format_value(name, getattr(params, name)))


def answer(generator: TextGenerator, prompt: str, params: SamplingParams) -> None:
    """Print the prompt and what follows it, as it comes; Ctrl-C stops it."""
    pieces = continue_text(generator, prompt, params)
    try:
        stream_to(open_console(), prompt, pieces)
    except KeyboardInterrupt:
        print_status("(stopped)")
