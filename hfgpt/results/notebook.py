"""Results as a notebook shows them: a table of numbers, the curves, a text; and as a shell prints them."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfgpt.results.records import PLOT_FILE, RESULTS_FILE, read_results
from hfgpt.system.console import align_columns

FIGURES = (
    ("validation loss, nats/token", "val_loss", ".4f"),
    ("validation perplexity", "val_perplexity", ",.1f"),
    ("  a bigram model's", "bigram_perplexity", ",.1f"),
    ("  a unigram model's", "unigram_perplexity", ",.1f"),
    ("training loss, nats/token", "train_loss", ".4f"),
    ("bits per byte", "bits_per_byte", ".3f"),
    ("parameters", "parameters", ",d"),
    ("steps", "last_step", ",d"),
    ("best step", "best_step", ",d"),
    ("tokens seen", "tokens", ",d"),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("seconds", "elapsed_seconds", ",.0f"),
)
"""What is shown of results.json, in this order, and how its numbers are written."""


class RunResults(dict[str, Any]):
    """What results.json holds, with the folder that it lies in.

    Args:
        results: as results.json has them; empty on all processes but the main one.
        folder: of the run.
        was_finished: whether the run was finished before.
    """

    def __init__(self, results: Mapping[str, Any], folder: str | Path, was_finished: bool = False) -> None:
        super().__init__(results)
        self.folder, self.was_finished = Path(folder), was_finished

    @classmethod
    def read(cls, folder: str | Path) -> "RunResults":
        """Those of a finished run."""
        return cls(read_results(Path(folder) / RESULTS_FILE), folder, was_finished=True)

    def rows(self) -> list[list[str]]:
        """Names and numbers, as text."""
        shown = [[label, format(self[key], form)] for label, key, form in FIGURES if self.get(key) is not None]
        return [["folder", str(self.folder)], *shown]

    def sample(self) -> str:
        """The last text that the model wrote while it was trained; "" if it wrote none."""
        samples = self.get("samples") or [{"text": ""}]
        return str(samples[-1]["text"])

    def __repr__(self) -> str:
        return "\n".join([align_columns(self.rows(), numbers=True), *([self.sample()] if self.sample() else [])])

    def _repr_html_(self) -> str:
        picture = self.folder / PLOT_FILE
        parts = [html_table(self.rows())]
        parts += [html_picture(picture.read_bytes(), "loss against tokens seen")] if picture.is_file() else []
        return "".join([*parts, html_text(self.sample()) if self.sample() else ""])


class Comparison(dict[str, Any]):
    """What `compare_runs` found, with the picture of the curves.

    Args:
        found: `runs`, `differing_options` and `warnings`.
        text: the same as a table to read.
        png: the picture.
    """

    def __init__(self, found: Mapping[str, Any], text: str, png: bytes) -> None:
        super().__init__(found)
        self.text, self.png = text, png

    def __repr__(self) -> str:
        return "\n".join([self.text, *(f"warning: {warning}" for warning in self["warnings"])])

    def _repr_html_(self) -> str:
        return html_text(repr(self)) + html_picture(self.png, "losses against tokens seen")


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names what the second one holds."""
    lines = (f"<tr><th style='text-align:left'>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{''.join(lines)}</table>"


def html_text(text: str) -> str:
    """A text as it stands, line by line."""
    return f"<pre style='white-space:pre-wrap'>{html.escape(text)}</pre>"


def html_picture(png: bytes, what: str) -> str:
    """A picture inside of the page, so that a saved notebook keeps it."""
    return f"<img alt='{html.escape(what)}' width='720' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
