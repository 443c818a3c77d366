"""Fonts of pictures: which one has a character, among those that are installed now.

matplotlib lists a machine's fonts once and keeps the list in its cache. A font that was installed later is not in that
list; here it is added.
"""

import unicodedata
from functools import cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from hfgpt.system.console import print_status

PREFERRED = (
    *("DejaVu Sans", "NanumGothic", "Noto Sans CJK KR", "Noto Sans KR", "Malgun Gothic", "Apple SD Gothic Neo"),
    *("Noto Sans CJK JP", "Noto Sans", "Arial Unicode MS", "Noto Emoji", "Segoe UI Symbol"),
)
"""The first that has a character draws it: matplotlib's own, then common ones; any other font after them."""

SCRIPTS = {"Korean": "한", "Chinese": "汉", "Japanese": "あ"}
"""Scripts that matplotlib's own font does not have, and a character of each."""

PACKAGES = {
    "HANGUL": "NanumGothic (Debian, Ubuntu: `apt install fonts-nanum`)",
    **dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA"), "Noto Sans CJK (Debian, Ubuntu: `apt install fonts-noto-cjk`)"),
}
"""A font for the characters whose Unicode names begin so."""
OTHER_PACKAGE = "one of the Noto fonts (Debian, Ubuntu: `apt install fonts-noto-core fonts-symbola`)"


@cache
def font_files() -> dict[str, list[Path]]:
    """Files of the fonts that are installed now, by their names, the preferred ones first."""
    listed = {font.fname for font in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in listed:
            try:
                font_manager.fontManager.addfont(path)
            except (OSError, RuntimeError, UnicodeError, ValueError):  # what matplotlib cannot read it cannot draw with
                continue
    files: dict[str, list[Path]] = {name: [] for name in PREFERRED}
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name, font.fname)):
        # One that was removed may still be in the list; and matplotlib's own last resort is boxes.
        if Path(font.fname).is_file() and not font.name.startswith("Last Resort"):
            files.setdefault(font.name, []).append(Path(font.fname))
    return {name: paths for name, paths in files.items() if paths}


@cache
def font_of(character: str) -> str | None:
    """The name of a font that has a character, or None."""
    for name, paths in font_files().items():
        if all(font_manager.get_font(path).get_char_index(ord(character)) for path in paths):  # in every style
            return name
    return None


def drawable(text: str) -> str:
    """A text as it can be drawn: numbers for characters that no font has, after a word on the font to install."""
    missing = {c for c in text if c != "\n" and font_of(c) is None}
    for script in {unicodedata.name(c, "OTHER").partition(" ")[0] for c in missing}:
        name_font(PACKAGES.get(script, OTHER_PACKAGE))
    return "".join(f"\\u{ord(c):04x}" if c in missing else c for c in text)


def fonts_of_scripts() -> dict[str, str | None]:
    """For each of `SCRIPTS` the font that draws it, or None."""
    return {script: font_of(character) for script, character in SCRIPTS.items()}


@cache
def name_font(package: str) -> None:
    """Say, once, which font to install."""
    print_status(f"letters that no font here has are drawn as their numbers. Install {package}.")


def fit_fonts(figure: Figure) -> None:
    """Draw every text of a figure with fonts that have its characters, and none of it as a formula."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if any(drawable(label) != label for label in labels):  # changed in place, they would be written again
            axis.set_ticks(axis.get_ticklocs(), [drawable(label) for label in labels])
    for artist in figure.findobj(Text):
        assert isinstance(artist, Text)
        text = drawable(artist.get_text())
        fonts = dict.fromkeys(["DejaVu Sans", *(font_of(c) or "DejaVu Sans" for c in text if c != "\n")])
        artist.set(text=text, fontfamily=list(fonts), parse_math=False)
