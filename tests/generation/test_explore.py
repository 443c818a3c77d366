"""What a model expects, checked by brute force on transformers' GPT-2; and how it is shown."""

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from transformers import GPT2LMHeadModel

from hfgpt.generation.explore import entropy_bits, explore, token_label
from hfgpt.generation.explore_plots import draw_distributions, render_page
from hfgpt.generation.generator import GeneratedText, load_generator
from hfgpt.generation.params import EXPLORED, explored_variants
from hfgpt.generation.render import percent, print_comparison, print_exploration, printable, shortened, stream_to

TEXT = "The object 한국 <b> of"


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A GPT-2 that is of several minds."""
    from transformers import GPT2Config

    folder = tmp_path_factory.mktemp("explored")
    config = GPT2Config(vocab_size=384, n_positions=48, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def generator(folder):
    return load_generator(folder)


@pytest.fixture(scope="module")
def found(generator):
    return explore(generator, TEXT, explored_variants(EXPLORED), top=6, steps=5, alternatives=2)


@torch.no_grad()
def reference(folder, ids):
    """fp64 log-probabilities of the next token after `ids`, from transformers' own forward pass."""
    return GPT2LMHeadModel.from_pretrained(folder).eval()(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def test_each_token_has_its_loss_after_its_own_prefix(folder, found, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    tokens = [token for piece in found.pieces for token in piece.tokens]

    assert [token.token_id for token in tokens] == ids[1:]
    for index, token in enumerate(tokens, start=1):
        expected = reference(folder, ids[:index])
        assert token.loss == pytest.approx(-float(expected[ids[index]]), abs=1e-5)  # fp32 logits, in another order
        assert token.probability == pytest.approx(math.exp(-token.loss))
        assert token.rank == 1 + int((expected > expected[ids[index]]).sum())
    assert found.loss == pytest.approx(sum(token.loss for token in tokens) / len(tokens))
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_pieces_are_whole_characters_and_join_to_the_text(found):
    texts = [piece.text for piece in found.pieces]

    assert "".join(texts) == TEXT
    assert {"한", "국"} <= set(texts)
    (korean,) = (piece for piece in found.pieces if piece.text == "한")
    assert len(korean.tokens) == 3
    assert korean.loss == pytest.approx(sum(token.loss for token in korean.tokens))
    assert [token.label for token in korean.tokens] == ["<ED>", "<95>", "<9C>"]
    assert found.pieces[0].tokens == []


def test_distributions_are_softmax_at_each_temperature_without_ids_of_no_token(folder, found, tokenizer):
    logits = reference(folder, tokenizer(TEXT)["input_ids"])[:320]  # the rest is padding of the vocabulary
    candidates = [token.token_id for token in found.candidates]
    by_label = {each.label: each for each in found.distributions}

    assert candidates == logits.topk(6).indices.tolist()
    for temperature in (1, 0.1, 5):
        expected = (logits / temperature).softmax(-1)
        each = by_label[f"temperature={temperature}"]
        assert each.probabilities == pytest.approx(expected[candidates].tolist(), rel=1e-4)
        assert each.rest == pytest.approx(1 - float(expected[candidates].sum()), rel=1e-4, abs=1e-9)
        assert each.entropy == pytest.approx(-float((expected * expected.log2()).sum()), rel=1e-3)
        assert each.kept == 320
    top_k = by_label["top_k=3"]
    assert top_k.probabilities == pytest.approx([*logits.topk(3).values.softmax(-1).tolist(), 0, 0, 0], rel=1e-4)
    assert (top_k.kept, top_k.rest) == (3, 0)


def test_entropy_is_in_bits():
    assert entropy_bits(torch.full((8,), 0.125)) == pytest.approx(3)
    assert entropy_bits(torch.tensor([0.5, 0.25, 0.25, 0.0])) == pytest.approx(1.5)
    assert entropy_bits(torch.tensor([1.0, 0.0])) == 0


def test_the_continuation_is_greedy_and_its_alternatives_are_the_next_likeliest(folder, found, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]

    assert len(found.path) == 5
    for step in found.path:
        expected = reference(folder, ids)[:320].softmax(-1)
        best = expected.topk(3)
        shown = [step.token, *step.alternatives]
        assert [token.token_id for token in shown] == best.indices.tolist()
        assert [token.probability for token in shown] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert step.entropy == pytest.approx(entropy_bits(expected), rel=1e-4)
        ids.append(step.token.token_id)


def test_the_continuation_ends_where_the_model_has_no_position_left(generator, tokenizer):
    text = "x" * 46

    found = explore(generator, text, explored_variants(["top_k=3"]), steps=5)

    assert len(tokenizer(text)["input_ids"]) == 46
    assert len(found.path) == 2
    assert explore(generator, "x" * 48, explored_variants(["top_k=3"]), steps=5).path == []
    with pytest.raises(ValueError, match=r"the text has 49 tokens, more than the model's .* \(48\)"):
        explore(generator, "x" * 49, explored_variants(["top_k=3"]))


def test_an_empty_text_shows_how_documents_begin(folder, generator, tokenizer):
    found = explore(generator, "", explored_variants(EXPLORED), steps=1)

    expected = reference(folder, [tokenizer.eos_token_id])[:320].softmax(-1)
    assert found.distributions[0].probabilities == pytest.approx(expected.topk(10).values.tolist(), rel=1e-4)
    assert (found.loss, found.perplexity, found.pieces) == (None, None, [])
    assert "First token of a document" in shown(found)
    assert b"First token of a document" in render_page(found)
    assert draw_distributions(found).startswith(b"\x89PNG")


def test_temperature_zero_can_be_looked_at_alone(generator):
    (certain,) = explore(generator, TEXT, explored_variants(["temperature=0"])).distributions

    assert (certain.probabilities[0], certain.kept) == (1, 1)


def test_rules_about_earlier_tokens_and_temperature_zero_can_be_compared(generator):
    found = explore(generator, TEXT, explored_variants(["temperature=0", "repetition_penalty=3"]))

    certain, penalized = found.distributions
    assert (certain.probabilities[0], certain.entropy, certain.kept) == (1, 0, 1)
    assert (
        penalized.probabilities
        != explore(generator, TEXT, explored_variants(["temperature=1"])).distributions[0].probabilities
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_beams=4", "'num_beams=4': `num_beams` has no effect on the distribution of the next token"),
        ("temperature=2,stop=x", "`stop` has no effect on the distribution"),
        ("temperature=0,top_k=3", "`top_k` has no effect: at `temperature` 0"),
    ],
)
def test_settings_that_do_nothing_to_one_token_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        explored_variants(["top_p=0.9", text])


def test_labels_show_white_space_and_bytes(tokenizer):
    labels = {text: token_label(tokenizer, tokenizer(text)["input_ids"][0]) for text in (" ", "\n", "é", "a", "\x1b")}

    assert labels == {" ": "␣", "\n": "↵", "é": "<C3>", "a": "a", "\x1b": "<1B>"}
    assert token_label(tokenizer, tokenizer.eos_token_id) == "<|endoftext|>"


def shown(found, **settings):
    console = Console(file=io.StringIO(), width=200, highlight=False, markup=False, soft_wrap=True, **settings)
    print_exploration(console, found)
    return console.file.getvalue()


def test_in_a_pipe_every_number_stands_in_a_table_without_colour(found):
    text = shown(found)

    assert "\x1b" not in text
    for token in (token for piece in found.pieces for token in piece.tokens):
        assert re.search(rf"^{re.escape(token.label)} +{token.loss:.2f} ", text, flags=re.MULTILINE)
    for each in found.distributions:
        assert f"{each.entropy:.2f} bits" in text
    assert (
        f"loss {found.loss:.3f} nats/token, perplexity {found.perplexity:,.1f}; {len(found.pieces) + 3} tokens" in text
    )


def test_at_a_terminal_the_text_is_coloured_by_its_loss(found):
    coloured = shown(found, force_terminal=True, color_system="truecolor")

    line = coloured.splitlines()[1]
    assert re.sub(r"\x1b\[[0-9;]*m", "", line) == TEXT
    colours = re.findall(r"48;2;(\d+;\d+;\d+)m", line)
    assert len(colours) == len(found.pieces) - 1  # the first was not expected
    assert len(set(colours)) > 1
    assert "\x1b[38;" not in shown(found, force_terminal=True, color_system="truecolor", no_color=True)


class Reader(HTMLParser):
    """Collects the text of a page, which attributes it has, and whether every tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.attributes, self.coloured = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag not in ("meta",):
            self.open.append((tag, dict(attributes).get("class") or ""))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append(data)
        in_text = any(name == "text" for _, name in self.open)
        if in_text and not any(name == "tip" for _, name in self.open):
            self.coloured.append((data, self.open[-1][1]))


def test_the_page_is_whole_needs_nothing_else_and_shows_the_text_coloured(found):
    page = render_page(found).decode()
    reader = Reader(page)

    assert page.startswith("<!DOCTYPE html>")
    assert reader.open == []
    assert not {"src", "href"} & {name for name, _ in reader.attributes}
    assert "http" not in page
    assert "".join(text for text, _ in reader.coloured) == TEXT  # with its <b> as text
    assert [("t l" in name) for _, name in reader.coloured] == [bool(piece.tokens) for piece in found.pieces]
    whole = "".join(reader.texts)
    assert f"Loss {found.loss:.3f} nats/token" in whole
    for step in found.path:
        assert step.token.label in whole


def test_the_picture_is_a_png_of_a_bar_per_token_and_setting_and_equal_for_equal_input(found):
    even = replace(
        found, distributions=[replace(each, probabilities=[0.1] * 6, rest=0.4) for each in found.distributions]
    )

    picture = draw_distributions(even)

    pixels = (imread(io.BytesIO(picture))[:, :, :3] * 255).round()
    is_blue = (pixels == [31, 119, 180]).all(-1)  # C0, the bars of the first setting
    bars_on_each_line = (is_blue[:, 1:] & ~is_blue[:, :-1]).sum(1)
    assert pixels.shape[1] >= 840
    assert bars_on_each_line.max() == len(found.candidates) + 1
    assert draw_distributions(even) == picture


def test_json_has_all_of_it(found):
    record = json.loads(json.dumps(found.record()))

    assert record["distributions"][0]["entropy"] == found.distributions[0].entropy
    assert [piece["text"] for piece in record["pieces"]] == [piece.text for piece in found.pieces]
    assert record["path"][0]["token"]["label"] == found.path[0].token.label
    assert record["perplexity"] == found.perplexity


def test_control_characters_are_shown_at_a_terminal_and_kept_in_a_pipe():
    evil = "a\x1b[2Jb\x07\r\x9b\tc\nd"
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    pipe = Console(file=io.StringIO())
    for console in (terminal, pipe):
        stream_to(console, "p\x1b", [evil])

    assert printable(evil) == "a␛[2Jb␇␍\ufffd\tc\nd"
    assert terminal.file.getvalue() == f"\x1b[1mp␛\x1b[0m{printable(evil)}\n"
    assert pipe.file.getvalue() == f"p\x1b{evil}\n"


def test_numbers_and_texts_are_shortened():
    assert [percent(p) for p in (1.0, 0.48309, 0.0011, 2.3e-7, 0.0)] == ["100.0%", "48.3%", "0.1%", "2e-07", "-"]
    assert shortened("one  two\nthree") == "one two three"
    assert shortened("x" * 90 + " the end of it", 30) == "…" + "x" * 15 + " the end of it"
    assert shortened("someone wrote: the end of it", 20) == "…the end of it"


@pytest.mark.parametrize(("width", "side_by_side"), [(100, True), (40, False)])
def test_comparisons_stand_side_by_side_where_there_is_room(width, side_by_side):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, markup=False)
    texts = {
        "temperature=0.5": [GeneratedText("p", " 한국어 one", 2, "length", 3)],
        "num_beams=2": [GeneratedText("p", " two", 1, "eos", score=-1.5)],
    }

    print_comparison(console, "p", texts)

    lines = console.file.getvalue().splitlines()
    both = [line for line in lines if "한국어 one" in line and "two" in line]
    assert bool(both) == side_by_side
    assert any("seed 3" in line for line in lines)
    assert any("score -1.500" in line for line in lines)
