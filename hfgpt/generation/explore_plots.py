"""Files of `explore`: the distributions of the next token as a PNG, and everything as one HTML page."""

from importlib.resources import files

import jinja2
from matplotlib.figure import Figure

from hfgpt.generation.explore import Exploration
from hfgpt.generation.render import DARK_FROM, LOSS_COLOURS, loss_bin, loss_bin_labels, percent, shortened
from hfgpt.results.plots import encode_png

FIGURE_HEIGHT = 4.8
"""Of the PNG, in inches; the width follows the number of bars."""


def draw_distributions(found: Exploration) -> bytes:
    """Draw the distributions of the next token as grouped bars; returns the bytes of a PNG, equal for equal input.

    The lecture's figure of a softmax at several temperatures, for a real model: a group of bars per token, one bar per
    variant, and all other tokens as the last group.
    """
    labels = [token.label for token in found.candidates] + ["all\nothers"]
    # A gap of half a group before the last one, which is not a single token.
    places = [float(index) for index in range(len(found.candidates))] + [len(found.candidates) + 0.5]
    count = len(found.distributions)
    bar = 0.8 / count
    group = 0.35 + 0.16 * count  # inches
    width = min(24.0, max(7.0, 1.6 + len(places) * group))
    figure = Figure(figsize=(width, FIGURE_HEIGHT), dpi=120, layout="constrained")
    highest = max(height for each in found.distributions for height in (*each.probabilities, each.rest))
    axes = figure.add_subplot(ylabel="probability", ylim=(0, min(1, 1.05 * highest)))
    for index, each in enumerate(found.distributions):
        shift = (index - (count - 1) / 2) * bar
        name = f"{each.label}  ({each.entropy:.2f} bits)"
        heights = [*each.probabilities, each.rest]
        axes.bar([place + shift for place in places], heights, bar * 0.92, label=name, color=f"C{index % 10}")
    is_long = max(map(len, labels[:-1]), default=0) * 0.085 > group  # a character is about 0.085 inches wide
    axes.set_xticks(places, labels, rotation=40 if is_long else 0, ha="right" if is_long else "center")
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, places[-1] + 0.6)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    longest = max(len(each.label) for each in found.distributions) + len("  (10.00 bits)")
    columns = max(1, min(count, int(width / (0.6 + 0.085 * longest))))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    after = f"Next token after “{shortened(found.text)}”" if found.text else "First token of a document"
    axes.set_title(after, loc="left", pad=12)
    return encode_png(figure)


def render_page(found: Exploration) -> bytes:
    """Render everything as one HTML page that needs no other file and no network."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"percent": percent, "shortened": shortened, "bin_of": loss_bin}
    template = environment.from_string(files("hfgpt.generation").joinpath("explore.html").read_text(encoding="utf-8"))
    colours = [
        (label, colour, "#fff" if index >= DARK_FROM else "#000")
        for index, (label, colour) in enumerate(zip(loss_bin_labels(), LOSS_COLOURS, strict=True))
    ]
    return template.render(found=found, colours=colours).encode()
