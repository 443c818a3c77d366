"""A tokenizer that goes along with a conversion: what text becomes has a row, and the rest is no obstacle."""

import json

import odd_tokenizers as odd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfgpt.evaluation.report import measure
from hfgpt.generation.generator import generate_texts, load_generator
from hfgpt.generation.params import SamplingParams
from hfgpt.weights.convert import convert


@pytest.fixture
def save_gpt2(make_gpt2, tmp_path):
    def save(tokenizer, rows):
        make_gpt2(vocab_size=rows).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save


@pytest.mark.parametrize(
    ("tokenizer", "rows"),
    [
        (odd.with_pad(), 290),  # transformers#11102
        (odd.with_added("<user>", is_special=True), 290),
        (odd.pad_on_the_last_row(), 290),
        (odd.pad_on_the_last_row(), 320),
        (odd.renumbered(lambda number: number + 1), 291),
        (odd.renumbered(lambda number: 2 * number), 579),
        (odd.wrap(odd.byte_level()), 320),
    ],
)
@pytest.mark.parametrize("to", ["gpt2", "hfgpt"])
def test_ids_that_no_text_becomes_are_no_obstacle(save_gpt2, tmp_path, tokenizer, rows, to):
    base = save_gpt2(tokenizer, rows)

    result = convert(base, tmp_path / "out", to)

    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.get_vocab() == tokenizer.get_vocab()
    assert saved(odd.TEXT)["input_ids"] == tokenizer(odd.TEXT)["input_ids"]
    assert saved.pad_token == ("<pad>" if rows == 320 and tokenizer.pad_token else odd.END)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(**saved(["The", "The fox."], padding=True, return_tensors="pt")).logits.isfinite().all()
    beyond = [token for token, token_id in tokenizer.get_vocab().items() if token_id >= rows]
    assert [note for note in result.notes if "no row" in note] == [
        f"no text becomes {token} of the tokenizer, for which the model has no row."
        + (f" The pad token is {odd.END} instead." if token == "<pad>" else "")
        for token in beyond
    ]


def test_a_word_without_a_row_is_refused_with_advice_that_applies(save_gpt2, tmp_path):
    base = save_gpt2(odd.with_added("<user>", is_special=False), 290)

    with pytest.raises(ValueError, match=r"makes the id 290, the model's `vocab_size` is 290\. '<user>' was added"):
        convert(base, tmp_path / "out", "gpt2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["openai", "gguf"])
def test_tokens_without_a_row_stay_out_of_formats_that_number_them(save_gpt2, tmp_path, to):
    base = save_gpt2(odd.with_pad(), 290)

    convert(base, tmp_path / "out", to)

    if to == "openai":
        assert sorted(json.loads((tmp_path / "out" / "encoder.json").read_text()).values()) == list(range(290))
    else:
        from gguf import GGUFReader

        assert len(GGUFReader(tmp_path / "out").get_field("tokenizer.ggml.tokens").data) == 290


def test_evaluate_and_generate_go_by_the_text_at_hand(save_gpt2, tmp_path):
    base = str(save_gpt2(odd.with_added("<user>", is_special=False), 290))
    refusal = r"base makes the id 290, the model's `vocab_size` is 290\. '<user>' was added"
    (tmp_path / "plain.txt").write_text(odd.TEXT)
    (tmp_path / "user.txt").write_text("<user> The fox")

    assert measure(base, [str(tmp_path / "plain.txt")]).text.measurements[0].bits_per_byte is not None
    with pytest.raises(ValueError, match=refusal):
        measure(base, [str(tmp_path / "user.txt")])
    generator = load_generator(base)
    next(generate_texts(generator, ["The"], SamplingParams(max_new_tokens=2, temperature=0)))
    with pytest.raises(ValueError, match=refusal):
        next(generate_texts(generator, ["<user>"], SamplingParams(max_new_tokens=2, temperature=0)))
