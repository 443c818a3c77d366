"""A prompt loop: type a text, see it written on, change the settings, try again.

Texts go to stdout, everything else to stderr, so that `hfgpt play MODEL < prompts.txt > texts.txt` works as well.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from hfgpt.generation.generator import TextGenerator, continue_text
from hfgpt.generation.params import Settings, make_settings, parse_settings, without_effect
from hfgpt.generation.render import open_console, stream_to
from hfgpt.system.console import print_status, result_stream

MARKER = "> "

HELP = """\
Type a text and press Enter: the model writes on from it.
/set temperature=0.7,top_k=40   changes settings, for all that follows
/settings                       shows them
/reset                          makes them what they were at the start
/again                          writes on from the last text once more
/quit, or Ctrl-D                leaves; Ctrl-C stops a text
A text that starts with / is typed with two of them."""


def play(writer: TextGenerator, given: Mapping[str, Any]) -> None:
    """Read lines and answer them until there are no more.

    Where nobody sits at the terminal, no marker is printed, and the first mistake ends the loop.

    Args:
        writer: see `hfgpt.generation.generator.load_generator`.
        given: settings that differ from the defaults.

    Raises:
        ValueError: a setting that nothing can be written with; without a terminal also any other mistake.
    """
    is_attended = all(stream.isatty() for stream in (sys.stdin, result_stream(), sys.stderr))
    start = settings = make_settings(given)
    last = ""
    if is_attended:
        print_status(f"{writer.source} is ready. /help says what can be typed here.")
    for line in read_lines(MARKER if is_attended else ""):
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/set":
                settings = changed(settings, rest)
            elif command == "/settings":
                print_status(describe(settings))
            elif command == "/reset":
                settings = start
            elif command == "/help":
                print_status(HELP)
            elif command == "/again" and last:
                write_on(writer, last, settings)
            elif line.startswith("/") and not line.startswith("//"):
                raise ValueError(f"{command} is no command here, or there is nothing for it to do. See /help.")
            elif line.strip():
                last = line.removeprefix("/")
                write_on(writer, last, settings)
        except ValueError as error:
            if not is_attended:
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


def changed(settings: Settings, text: str) -> Settings:
    """`settings` with some others.

    Raises:
        ValueError: a setting that nothing can be written with, or that has no effect.
    """
    own = parse_settings(text)
    result = Settings(**{**asdict(settings), **own})
    if reason := without_effect(own, result):
        raise ValueError(reason)
    return result


def describe(settings: Settings) -> str:
    """The settings as they could be typed."""
    return ",".join(
        f"{field.name}={text}"
        for field in fields(settings)
        for text in as_typed(field.name, getattr(settings, field.name))
    )


def as_typed(name: str, value: Any) -> list[str]:
    if name == "stop":
        return [text.replace("\n", "\\n") for text in value]
    return [str(value).lower()]


def write_on(writer: TextGenerator, prompt: str, settings: Settings) -> None:
    """Print the prompt and what follows it, as it comes; Ctrl-C stops it."""
    pieces = continue_text(writer, prompt, settings)
    try:
        stream_to(open_console(), prompt, pieces)
    except KeyboardInterrupt:
        print_status("(stopped)")
