"""Text from a saved model: the model's own, fixed by a seed, in whole characters, one by one or in batches."""

import json
from dataclasses import replace

import odd_tokenizers
import pytest
import torch
from transformers import GPT2LMHeadModel

from hfgpt.data.tokenizer import train_tokenizer
from hfgpt.generation.explore import explore
from hfgpt.generation.generator import continue_text, generate_texts, load_generator, read_prompts
from hfgpt.generation.params import SamplingParams

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


PROMPTS = ["The object", KOREAN, "", "x", "of the other"]


@pytest.fixture
def generator(folder):
    return load_generator(folder)


def write(folder, prompt, **settings):
    return "".join(continue_text(load_generator(folder), prompt, SamplingParams(**{"max_new_tokens": 30, **settings})))


def write_all(generator, prompts, samples=1, batch_size=8, **settings):
    settings = SamplingParams(**{"max_new_tokens": 20, **settings})
    return list(generate_texts(generator, prompts, settings, samples=samples, batch_size=batch_size))


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

    pieces = list(continue_text(load_generator(folder), "A", SamplingParams(max_new_tokens=len(ids), temperature=0)))

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


def test_a_prompt_that_is_too_long_is_refused_at_once_and_not_at_the_first_piece(generator):
    with pytest.raises(ValueError, match=r"`max_new_tokens` \(64\) are together longer than the model's"):
        continue_text(generator, "The", SamplingParams(max_new_tokens=64))
    with pytest.raises(ValueError, match=r"prompt 2: The prompt \(\d+ tokens\) and `max_new_tokens` \(60\)"):
        generate_texts(generator, ["x", "The object of the other"], SamplingParams(max_new_tokens=60))


def test_ids_that_the_model_does_not_know_are_refused(make_gpt2, tokenizer, tmp_path):
    make_gpt2(vocab_size=260).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    generator = load_generator(str(tmp_path / "model"))

    with pytest.raises(ValueError, match=r"makes the id \d+, the model's `vocab_size` is 260\. They do not belong"):
        continue_text(generator, "in the object", SamplingParams(max_new_tokens=5))


@pytest.mark.parametrize(
    ("kind", "prompt", "message"),
    [
        ("characters", "The dog\u00e9", r"does not know 'é' \(U\+00E9\), and has no token"),
        ("characters", "", "has no eos token, from which an empty text would start"),
        ("dropping", "한국어", "makes no token of '한국어': it knows nothing of it"),
        ("pieces", "", "has no eos token"),
    ],
)
def test_what_the_tokenizer_does_not_know_is_refused_in_one_line(make_gpt2, tmp_path, kind, prompt, message):
    make_gpt2(vocab_size=300).save_pretrained(tmp_path / "model")
    getattr(odd_tokenizers, kind)().save_pretrained(tmp_path / "model")
    generator = load_generator(str(tmp_path / "model"))

    for refused in (
        lambda: continue_text(generator, prompt, SamplingParams(max_new_tokens=5)),
        lambda: generate_texts(generator, ["The", prompt], SamplingParams(max_new_tokens=5)),
        lambda: explore(generator, prompt, {}),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            refused()
        assert "\n" not in str(refusal.value)


def test_the_end_of_text_of_a_config_ends_a_text_and_begins_one(make_gpt2, tmp_path):
    gpt2 = make_gpt2(vocab_size=60, eos_token_id=1)  # as KoGPT2's config does
    with torch.no_grad():
        gpt2.lm_head.weight[1].add_(100 * gpt2.transformer.ln_f.bias)
    gpt2.save_pretrained(tmp_path / "model")
    odd_tokenizers.pieces().save_pretrained(tmp_path / "model")
    generator = load_generator(str(tmp_path / "model"))

    ((text,),) = write_all(generator, [""], temperature=0)

    assert (text.ended, text.new_text, text.new_tokens) == ("eos", "", 1)


def test_a_folder_without_a_tokenizer_is_refused(make_gpt2, tmp_path):
    make_gpt2().save_pretrained(tmp_path / "model")

    with pytest.raises(ValueError, match="no tokenizer"):
        load_generator(str(tmp_path / "model"))


def test_ids_of_a_padded_vocabulary_are_never_written(make_gpt2, tokenizer, tmp_path):
    gpt2 = make_gpt2(vocab_size=384)
    with torch.no_grad():
        gpt2.lm_head.weight[350].add_(100 * gpt2.transformer.ln_f.bias)  # tied: an id of no token is the likeliest
    gpt2.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    generator = load_generator(str(tmp_path / "model"))

    with torch.no_grad():
        assert int(generator.model(torch.tensor([[5]])).logits[0, -1].argmax()) == 350
    assert generator.suppress_mask.nonzero()[:, 0].tolist() == list(range(320, 384))
    for settings in ({"temperature": 0}, {"temperature": 50.0, "top_k": 0, "seed": 0}, {"num_beams": 3}):
        ((written,),) = write_all(generator, ["The"], **settings)
        assert written.new_text
        assert len(tokenizer.encode(written.new_text, add_special_tokens=False)) > 5


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.9, "top_k": 40, "seed": 5}, {"temperature": 0}, {"num_beams": 3}],
    ids=["sampled", "greedy", "beams"],
)
def test_a_text_does_not_depend_on_what_stands_beside_it(generator, settings):
    samples = 1 if settings.get("temperature") == 0 else 2

    def write_rounded(*args, **more):
        """Scores are sums in fp32, whose last digits depend on the shape of the batch."""
        texts = write_all(generator, *args, **more, **settings)
        return [[replace(each, score=each.score and round(each.score, 4)) for each in row] for row in texts]

    together = write_rounded(PROMPTS, samples)

    assert [[each.prompt for each in texts] for texts in together] == [[prompt] * samples for prompt in PROMPTS]
    assert together == write_rounded(PROMPTS, samples, batch_size=3)
    assert together[::-1] == write_rounded(PROMPTS[::-1], samples)
    for prompt, texts in zip(PROMPTS, together, strict=True):
        assert texts == write_rounded([prompt], samples, batch_size=1)[0]
        assert texts[0].new_text == write(generator.source, prompt, max_new_tokens=20, **settings)


def test_the_next_sample_has_the_next_seed(generator):
    (texts,) = write_all(generator, ["The"], samples=3, seed=7)

    assert [text.seed for text in texts] == [7, 8, 9]
    assert [[texts[1]], [texts[2]]] == [write_all(generator, ["The"], seed=seed)[0] for seed in (8, 9)]
    assert len({text.new_text for text in texts}) == 3


def test_without_a_seed_equal_prompts_get_different_texts_and_say_by_which_seeds(generator):
    first, second = (texts[0] for texts in write_all(generator, ["The", "The"]))

    assert first.new_text != second.new_text
    assert [[first]] == write_all(generator, ["The"], seed=first.seed)


def test_beams_are_those_of_transformers_generate(generator, folder, tokenizer):
    (texts,) = write_all(generator, ["The object"], samples=3, num_beams=4, length_penalty=0.5, repetition_penalty=1.3)

    model = GPT2LMHeadModel.from_pretrained(folder)
    batch = tokenizer("The object", return_tensors="pt")
    search = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "repetition_penalty": 1.3}
    ids = model.generate(**batch, max_new_tokens=20, do_sample=False, pad_token_id=0, **search)
    new_ids = ids[:, batch["input_ids"].shape[1] :]
    assert [text.new_text for text in texts] == tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    assert [text.score for text in texts] == sorted((text.score for text in texts), reverse=True)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_stop_text_ends_a_row_where_it_ends_in_transformers_generate(generator, folder, tokenizer, settings):
    free = [texts[0].new_text for texts in write_all(generator, PROMPTS, **settings)]
    stops = (free[0][5:7], free[3][9])  # the first of two characters, of two tokens perhaps

    stopped = [texts[0] for texts in write_all(generator, PROMPTS, stop=stops, **settings)]

    model = GPT2LMHeadModel.from_pretrained(folder)
    ended = set()
    for prompt, text in zip(PROMPTS, stopped, strict=True):
        batch = tokenizer(prompt or "<|endoftext|>", return_tensors="pt")
        how = {"num_beams": settings.get("num_beams", 1), "stop_strings": list(stops), "tokenizer": tokenizer}
        ids = model.generate(**batch, max_new_tokens=20, do_sample=False, pad_token_id=0, **how)[0]
        whole = tokenizer.decode(ids[batch["input_ids"].shape[1] :], skip_special_tokens=True)
        starts = [whole.find(stop) for stop in stops if stop in whole]
        assert text.new_text == whole[: min(starts, default=len(whole))]
        assert (text.ended == "stop") == bool(starts)
        ended.add(text.ended)
    assert ended == {"stop", "length"}


def test_a_stop_text_is_not_shown_while_it_comes(folder, tokenizer):
    ids = tokenizer("to be or not", add_special_tokens=False)["input_ids"]
    teach(folder, ids)
    generator = load_generator(folder)

    pieces = list(continue_text(generator, "A", SamplingParams(max_new_tokens=len(ids), temperature=0, stop=("or n",))))

    assert "".join(pieces) == "to be "
    ((written,),) = write_all(generator, ["A"], temperature=0, stop=("or n",))
    assert (written.new_text, written.ended) == ("to be ", "stop")


def test_what_cannot_be_sampled_is_refused(generator):
    with pytest.raises(ValueError, match=r"`samples` \(2\): at `temperature` 0 each would be the same text"):
        write_all(generator, ["x"], samples=2, temperature=0)
    with pytest.raises(ValueError, match=r"`samples` \(3\) must be at most `num_beams` \(2\)"):
        write_all(generator, ["x"], samples=3, num_beams=2)


def test_prompts_are_lines_or_objects(tmp_path):
    text, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes('\ufeffone\r\n\n  한국어 \n{"prompt": 1}\n'.encode())
    objects.write_text('{"prompt": "a\\nb", "id": 7}\n\n{"prompt": ""}\n')

    assert read_prompts(text) == [{"prompt": "one"}, {"prompt": "  한국어 "}, {"prompt": '{"prompt": 1}'}]
    assert read_prompts(objects) == [{"prompt": "a\nb", "id": 7}, {"prompt": ""}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "p.txt holds no prompt: every line is blank"),
        ("p.txt", b"a\xff", "p.txt is not UTF-8: byte 0xff at offset 1"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "p.jsonl, line 3: no JSON"),
        ("p.jsonl", b'["a"]', 'p.jsonl, line 1: must be an object with a text named "prompt"'),
        ("p.jsonl", b'{"prompt": 3}', 'p.jsonl, line 1: must be an object with a text named "prompt"'),
        (
            "p.jsonl",
            b'{"prompt": "a", "text": "b", "seed": 1}',
            r"line 1: the fields \['seed', 'text'\] are the answer",
        ),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_record_is_json_with_prompt_and_text(generator):
    ((written,),) = write_all(generator, [KOREAN], seed=1)

    record = json.loads(json.dumps(written.record()))

    assert record["text"] == KOREAN + record["new_text"]
    assert {name: record[name] for name in ("new_tokens", "ended", "seed")} == {
        "new_tokens": 20,
        "ended": "length",
        "seed": 1,
    }
    assert "score" not in record
