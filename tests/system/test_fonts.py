"""Pictures draw every letter that an installed font has, also a new one, and otherwise name the font to install."""

import json
import os
import subprocess
import sys
import warnings

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure

from hfgpt.results.plots import encode_png
from hfgpt.system import fonts

PROGRAM = """
import json
from matplotlib.figure import Figure
from hfgpt.results.plots import encode_png
from hfgpt.system.fonts import drawable, fonts_of_scripts

figure = Figure(figsize=(4, 2))
axes = figure.add_subplot(title="한")
axes.bar([0, 1], [1, 2], label="한")
axes.set_xticks([0, 1], ["한", "$x"])
figure.legend()
png = encode_png(figure)
print(json.dumps([fonts_of_scripts()["Korean"], drawable("a한")]))
"""


def make_font(path, characters, name):
    """Write a font that has a square for each of some characters."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 500), (500, 500), (500, 0)):
        pen.lineTo(point)
    pen.closePath()
    glyphs = {glyph: pen.glyph() for glyph in (".notdef", "square")}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(character): "square" for character in characters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def without_korean(monkeypatch):
    """As on a machine that has no other fonts than matplotlib's own."""
    monkeypatch.setattr(
        fonts, "font_files", lambda: {"DejaVu Sans": [fonts.font_manager.fontManager.findfont("DejaVu Sans")]}
    )
    for function in (fonts.font_of, fonts.name_font):
        function.cache_clear()
    yield
    for function in (fonts.font_of, fonts.name_font):
        function.cache_clear()


def test_a_font_is_used_as_soon_as_it_is_installed_though_matplotlib_has_its_old_list(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {"HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path / "matplotlib"), "XDG_DATA_HOME": ""}

    def draw():
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    before, _ = draw()
    folder = tmp_path / ".fonts"
    folder.mkdir()
    make_font(folder / "own.ttf", "한", "NanumGothic")
    (folder / "broken.ttf").write_bytes(b"no font")
    after, said = draw()

    if before[0] is None:  # else this machine has a Korean font already
        assert before == [None, "a\\ud55c"]
    assert after == ["NanumGothic", "a한"]
    assert said == ""
    (folder / "own.ttf").unlink()
    assert draw()[0] == before


@pytest.mark.parametrize(
    ("text", "package"),
    [
        ("데이터", "fonts-nanum"),
        ("漢字", "fonts-noto-cjk"),
        ("あ", "fonts-noto-cjk"),
        ("ก", "fonts-noto-core"),
        ("\ue000", "fonts-noto-core"),
    ],
)
def test_without_a_font_letters_are_drawn_as_their_numbers_and_the_font_is_named_once(
    without_korean, capsys, text, package
):
    figure = Figure(figsize=(4, 2))
    axes = figure.add_subplot(title=text, xlabel="a$b$ _ é\nsecond line")
    axes.bar([0], [1], label=text)
    axes.set_xticks([0], [text])
    legend = figure.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of letters that it draws as boxes
        encode_png(figure)

    numbers = "".join(f"\\u{ord(character):04x}" for character in text)
    shown = [axes.title, axes.get_xticklabels()[0], legend.get_texts()[0]]
    assert [each.get_text() for each in shown] == [numbers] * 3
    assert axes.xaxis.label.get_text() == "a$b$ _ é\nsecond line"
    said = capsys.readouterr().err
    assert said.count("Install") == 1
    assert f"apt install {package}" in said


def test_what_is_between_dollars_is_no_formula():
    figure = Figure(figsize=(4, 2))
    figure.add_subplot(title=r"$\frac{$ a$b", xlabel="$$")

    encode_png(figure)  # as a formula this could not be read
