"""Terminal output of `generate` and `explore`; in a pipe the same words without colour or frames.

Everything goes to stdout. rich decides what the terminal can show, and obeys NO_COLOR, FORCE_COLOR and COLUMNS.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hfgpt.generation.explore import Exploration
from hfgpt.generation.generator import GeneratedText
from hfgpt.system.console import print_status, result_stream, route_lines

LOSS_BINS = (1.0, 2.0, 4.0, 6.0, 9.0)
"""Upper ends of the colours' ranges, in nats; the last colour has none."""

LOSS_COLOURS = ("#fff7dc", "#fed976", "#feb24c", "#fd8d3c", "#e2401c", "#9a0023")
"""From small to large losses, after ColorBrewer's YlOrRd: each is darker, so no colour vision is needed."""

NAMED_COLOURS = ("bright_white", "bright_yellow", "yellow", "bright_red", "red", "magenta")
"""The same for terminals of 16 colours, where some of those above would fall together."""

DARK_FROM = 4
"""From this colour on, text is white."""

MIN_COLUMN = 26
"""Characters; where columns would be narrower, texts stand below one another."""

PIPE_WIDTH = 1000
"""Characters in a line of a pipe, so that nothing is cut."""

CONTROL_PICTURES = {n: 0x2400 + n for n in range(32) if n not in (9, 10)} | {127: 0x2421}
CONTROL_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)
"""Unicode's picture of each control character but tab and line break; those from 128 on have none."""


def open_console() -> Console:
    """The console of stdout."""
    stream = result_stream()
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)


def printable(text: str) -> str:
    """A text without control characters: a model can write escape sequences, which are shown instead of obeyed."""
    return text.translate(CONTROL_PICTURES)


def loss_bin(loss: float) -> int:
    """The index of a loss's colour; `loss` is in nats."""
    return sum(loss >= end for end in LOSS_BINS)


def loss_bin_labels() -> list[str]:
    """The colours' ranges, in nats."""
    starts = (0.0, *LOSS_BINS)
    return [f"{start:g}-{end:g}" for start, end in zip(starts, LOSS_BINS, strict=False)] + [f"{LOSS_BINS[-1]:g}+"]


def percent(probability: float) -> str:
    """A probability in percent, short; a dash if it is 0."""
    if probability == 0:
        return "-"
    return f"{probability:.1%}" if probability >= 0.0005 else f"{probability:.0e}"


def shortened(text: str, length: int = 60) -> str:
    """The end of a text, on one line, from the beginning of a word if there is one near."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    end = line[-length + 1 :]
    return "…" + end[end.find(" ", 0, length // 3) + 1 :]


def stream_to(console: Console, prompt: str, pieces: Iterable[str]) -> None:
    """Print a prompt, bold, and the pieces after it as they come; in a pipe exactly the text, and a line break.

    Not through rich, which would turn tabs into spaces.
    """
    show = printable if console.is_terminal else str
    bold, plain = ("\x1b[1m", "\x1b[0m") if console.is_terminal else ("", "")
    held: list[str] = []
    try:
        # A warning of a library does not come into the middle of the text.
        with route_lines(held.append) if console.is_terminal else nullcontext():
            try:
                for piece in chain([f"{bold}{show(prompt)}{plain}"], map(show, pieces)):
                    console.file.write(piece)
                    console.file.flush()
            finally:  # a Ctrl-C, too, leaves the terminal at the beginning of a line
                console.file.write("\n")
                console.file.flush()
    finally:
        for line in held:
            print_status(line)


def print_texts(console: Console, prompt: str, texts: Sequence[GeneratedText], number: int, prompts: int) -> None:
    """Print the texts of one prompt, the `number`-th of `prompts`, each under a line that says which it is."""
    for sample, text in enumerate(texts, start=1):
        which = [f"prompt {number}/{prompts}"] if prompts > 1 else []
        which += [f"sample {sample}/{len(texts)}"] if len(texts) > 1 else []
        print_titled(console, ", ".join([*which, *origin(text)]), prompt, text)


def print_titled(console: Console, title: str, prompt: str, text: GeneratedText) -> None:
    console.print(Text(f"--- {title} ---", style="dim"))
    stream_to(console, prompt, [text.new_text])
    console.print()


def origin(text: GeneratedText) -> list[str]:
    """Seed or score of a text, if it has one."""
    seed = [] if text.seed is None else [f"seed {text.seed}"]
    return seed if text.score is None else [*seed, f"score {text.score:.3f}"]


def summary(text: GeneratedText) -> str:
    """Origin, length and end of a text."""
    return f"({', '.join([*origin(text), f'{text.new_tokens} tokens', f'ended by {text.ended}'])})"


def print_comparison(console: Console, prompt: str, texts: Mapping[str, Sequence[GeneratedText]]) -> None:
    """Print the continuations of one prompt, by the words of their params: side by side if there is room."""
    if not console.is_terminal or console.width < MIN_COLUMN * len(texts):
        for label, samples in texts.items():
            for text in samples:
                print_titled(console, f"{label} {summary(text)}", prompt, text)
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        title=Text(printable(shortened(prompt, console.width)), style="bold"),
        title_justify="left",
        show_lines=True,
        expand=True,
    )
    for label in texts:
        table.add_column(Text(label, style="bold"), ratio=1, overflow="fold")
    for row in zip(*texts.values(), strict=True):
        table.add_row(*(Text.assemble(printable(each.new_text.strip()), (f"\n{summary(each)}", "dim")) for each in row))
    console.print(table, soft_wrap=False)


def print_exploration(console: Console, found: Exploration) -> None:
    """Print what `hfgpt.generation.explore.explore` found."""
    if found.loss is not None:
        print_losses(console, found)
    after = f"Next token after “{printable(shortened(found.text))}”" if found.text else "First token of a document"
    print_heading(console, after)
    table = make_table(console, "token", *(each.label for each in found.distributions))
    for index, token in enumerate(found.candidates):
        table.add_row(token.label, *(percent(each.probabilities[index]) for each in found.distributions))
    table.add_row("others", *(percent(each.rest) for each in found.distributions), style="dim", end_section=True)
    table.add_row("entropy", *(f"{each.entropy:.2f} bits" for each in found.distributions))
    table.add_row("tokens kept", *(f"{each.kept:,}" for each in found.distributions))
    console.print(table, soft_wrap=False)
    console.print()
    if found.path:
        print_path(console, found)


def print_losses(console: Console, found: Exploration) -> None:
    """Print the loss of each token: as colours behind the text, or as a table where there are no colours."""
    print_heading(console, "How surprising each token was")
    if console.color_system is not None and not console.no_color:
        line = Text()
        for piece in found.pieces:
            # The first token has no colour: it is not predicted.
            style = colour_style(console, loss_bin(piece.loss)) if piece.tokens else ""
            line.append(printable(piece.text), style=style)
        console.print(line)
        legend = Text.assemble(("nats ", "dim"))
        for index, label in enumerate(loss_bin_labels()):
            legend.append(f" {label} ", style=colour_style(console, index))
        console.print(legend)
    else:
        table = make_table(console, "token", "loss (nats)", "probability", "rank")
        for piece in found.pieces:
            for token in piece.tokens:
                table.add_row(token.label, f"{token.loss:.2f}", percent(token.probability), f"{token.rank:,}")
        console.print(table, soft_wrap=False)
    tokens = sum(len(piece.tokens) for piece in found.pieces)
    console.print(
        f"loss {found.loss:.3f} nats/token, perplexity {found.perplexity:,.1f}; {tokens:,} tokens, all but the first"
    )
    console.print()


def colour_style(console: Console, index: int) -> str:
    if console.color_system == "standard":
        return f"{'white' if index >= DARK_FROM else 'black'} on {NAMED_COLOURS[index]}"
    return f"{'#ffffff' if index >= DARK_FROM else '#000000'} on {LOSS_COLOURS[index]}"


def print_path(console: Console, found: Exploration) -> None:
    print_heading(console, "Most likely continuation")
    table = make_table(console, "token", "probability", "entropy", last="alternatives")
    for step in found.path:
        others = "   ".join(f"{token.label} {percent(token.probability)}" for token in step.alternatives)
        table.add_row(step.token.label, percent(step.token.probability), f"{step.entropy:.2f} bits", others)
    console.print(table, soft_wrap=False)


def print_heading(console: Console, text: str) -> None:
    console.print(Text(text, style="bold"))


def make_table(console: Console, first: str, *numbers: str, last: str | None = None) -> Table:
    """A table of a text column, columns of numbers, and perhaps a last text column."""
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    if last is not None:
        table.add_column(last, overflow="fold")
    return table
