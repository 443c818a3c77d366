"""Text from a saved model: the model's own, fixed by a seed, in whole characters."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from hfgpt.generation import continue_text
from hfgpt.tokenizer import train_tokenizer

KOREAN = "한국어는 한글로 적는다. "


@pytest.fixture(scope="module")
def tokenizer(lines):
    """One that has seen Korean, so that syllables fall into tokens of one, two and three bytes."""
    return train_tokenizer([*lines, KOREAN * 10], vocab_size=320, model_max_length=64)


@pytest.fixture
def folder(make_gpt2, tokenizer, tmp_path):
    make_gpt2(bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write(folder, prompt, **settings):
    return "".join(continue_text(folder, prompt, **{"max_new_tokens": 30, **settings}))


@pytest.mark.parametrize("prompt", ["The object", KOREAN, "x"])
def test_greedy_text_is_that_of_generate(folder, tokenizer, prompt):
    text = write(folder, prompt, temperature=0)

    model = GPT2LMHeadModel.from_pretrained(folder)
    batch = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert text == tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text


def test_a_seed_fixes_the_text(folder):
    first = write(folder, "The", seed=1)

    assert write(folder, "The", seed=1) == first
    assert write(folder, "The", seed=2) != first


def test_without_a_seed_each_text_is_another_and_torchs_own_numbers_stay(folder):
    torch.manual_seed(0)
    first = write(folder, "The")
    state = torch.get_rng_state()

    torch.manual_seed(0)
    assert write(folder, "The") != first
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_prompt_begins_a_document(folder, tokenizer):
    text = write(folder, "", temperature=0)

    model = GPT2LMHeadModel.from_pretrained(folder)
    ids = model.generate(torch.tensor([[tokenizer.eos_token_id]]), max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert text == tokenizer.decode(ids[0, 1:], skip_special_tokens=True)


def test_a_literal_end_of_text_in_the_prompt_is_text(folder, tokenizer):
    prompt = "<|endoftext|>"

    text = write(folder, prompt, temperature=0)

    ids = tokenizer(prompt, split_special_tokens=True, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 1
    model = GPT2LMHeadModel.from_pretrained(folder)
    written = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert text == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def teach(folder, ids):
    """Make the model in `folder` write `ids`, whatever the prompt: no small model learns Korean in a test.

    Each position's embedding is the code of the id to come, and no block changes it.
    """
    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1)
        width = model.config.n_embd
        codes = torch.nn.functional.normalize(torch.randn(320, width, generator=torch.Generator().manual_seed(0)))
        codes -= codes.mean(dim=1, keepdim=True)  # the norm takes the mean out
        model.lm_head.weight.copy_(codes)  # tied: the embedding as well
        for position, token_id in enumerate(ids):
            model.transformer.wpe.weight[position] = 1000 * codes[token_id]  # drowns the token's own
    model.save_pretrained(folder)


def test_korean_comes_in_whole_characters(folder, tokenizer):
    ids = tokenizer(KOREAN)["input_ids"]
    teach(folder, ids)

    pieces = list(continue_text(folder, "A", max_new_tokens=len(ids), temperature=0))

    assert len(tokenizer("A")["input_ids"]) == 1
    assert any("\ufffd" in tokenizer.decode([token_id]) for token_id in ids)  # some tokens are parts of a syllable
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert len(pieces) > 5


def test_an_end_of_text_ends_the_text(folder, tokenizer):
    ids = [*tokenizer(" to be", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id, 5, 6, 7]
    teach(folder, ids)

    text = write(folder, "A", temperature=0)

    assert text == " to be"


def test_settings_are_refused_at_once_and_not_at_the_first_piece(folder):
    with pytest.raises(ValueError, match=r"`temperature` must be a finite number of at least 0, got -1"):
        continue_text(folder, "The", max_new_tokens=5, temperature=-1)
    with pytest.raises(ValueError, match=r"`top_p` must be above 0 and at most 1, got 0"):
        continue_text(folder, "The", max_new_tokens=5, top_p=0)
    with pytest.raises(ValueError, match=r"`max_new_tokens` \(64\) are together longer than the model's"):
        continue_text(folder, "The", max_new_tokens=64)


def test_ids_that_the_model_does_not_know_are_refused(make_gpt2, tokenizer, tmp_path):
    make_gpt2(vocab_size=260).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    with pytest.raises(ValueError, match=r"makes the id \d+, the model's `vocab_size` is 260\. They do not belong"):
        continue_text(str(tmp_path / "model"), "in the object", max_new_tokens=5)


def test_a_folder_without_a_tokenizer_is_refused(make_gpt2, tmp_path):
    make_gpt2().save_pretrained(tmp_path / "model")

    with pytest.raises(ValueError, match="no tokenizer"):
        continue_text(str(tmp_path / "model"), "The", max_new_tokens=5)
