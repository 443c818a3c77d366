"""Perplexity of texts: brute force agrees token by token, every token counts once, and no usual mistake is made."""

import math

import evaluate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows
from small_models import adding, make_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hfgpt import HFGPTForCausalLM
from hfgpt.data.tokenizer import PIECE, encode_ids
from hfgpt.data.vocabulary import Coverage
from hfgpt.evaluation import METRIC
from hfgpt.evaluation.loss import Score, token_losses
from hfgpt.evaluation.perplexity import (
    EncodedTexts,
    encode_texts,
    make_batch,
    make_windows,
    measure_texts,
    summarize,
)


@pytest.fixture(params=["hfgpt", "llama", "neox"])
def model(request, tiny_config):
    return make_model(request.param, tiny_config)


@pytest.fixture
def hfgpt_model(tiny_config):
    return make_model("hfgpt", tiny_config)


@pytest.fixture
def texts(lines):
    """Five texts of different lengths: shorter than any context, a multiple of 8 tokens or not, and long ones."""
    return ["e", lines[0], " ".join(lines[3:6]), "두 번째 글이다.\n", "\n".join(lines[10:20])]


def encoded(*texts):
    """Texts that are ids already."""
    nothing_lost = Coverage(tokens=0, unknown=0, loss_of_text=None)
    return EncodedTexts([torch.tensor(ids).int().numpy() for ids in texts], "text", "?", 0, 0, 0, nothing_lost)


@torch.no_grad()
def brute_force(model, ids, context, stride):
    """Loss of every id but the first, each by a forward pass over just what stands before it in its window.

    Target i (from 1) is in the first window if that reaches so far. Otherwise windows end at context + k * stride, but
    not behind the text, and the first one that holds target i scores it.
    """
    losses = []
    for i in range(1, len(ids)):
        k = max(0, math.ceil((i - context) / stride))
        end = min(context + k * stride, len(ids) - 1)
        before = torch.tensor(ids[max(0, end - context) : i])
        logits = model(input_ids=before[None]).logits[0, -1].double()
        losses.append(-float(logits.log_softmax(-1)[ids[i]]))
    return losses


@pytest.mark.parametrize("stride", range(1, 9))
def test_every_stride_scores_each_token_as_one_forward_pass_of_its_own_does(model, tokenizer, texts, stride):
    ids = [[tokenizer.eos_token_id, *each] for each in encode_ids(tokenizer, [*texts[:3], texts[4][:90]])]

    measured = measure_texts(model, encoded(*ids), context=8, stride=stride, batch_size=16)

    losses = [loss for each in ids for loss in brute_force(model, each, 8, stride)]
    assert measured.tokens == len(losses) == sum(map(len, ids)) - len(ids)
    # fp32 logits, summed in another order
    assert measured.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    variance = torch.tensor(losses).double().var().item()
    assert measured.loss_standard_error == pytest.approx(math.sqrt(variance / len(losses)), rel=1e-5)


def test_a_model_without_attention_is_scored_too(tiny_config, tokenizer, texts):
    model = make_model("mamba", tiny_config)
    ids = [tokenizer.eos_token_id, *encode_ids(tokenizer, [texts[2]])[0]][:30]

    measured = measure_texts(model, encoded(ids), context=8, stride=3)

    losses = brute_force(model, ids, 8, 3)
    assert measured.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)


@given(st.lists(st.integers(0, 40), max_size=4), st.integers(1, 12), st.data())
def test_windows_are_those_of_lm_eval_and_hold_each_target_once(lengths, context, data):
    stride = data.draw(st.integers(1, context))

    windows = list(make_windows(lengths, context, stride))

    for text, length in enumerate(lengths):
        ids = list(range(length + 1))  # the prefix is 0
        mine = [window for window in windows if window.text == text]
        theirs = get_rolling_token_windows(ids[1:], 0, max_seq_len=context, context_len=context - stride + 1)
        assert [(ids[each.start : each.end], ids[each.end - each.scored + 1 : each.end + 1]) for each in mine] == list(
            theirs
        )
        scored = [target for each in mine for target in range(each.end - each.scored + 1, each.end + 1)]
        assert scored == ids[1:]
        for each in mine[1:]:  # the first target of a window has the least before it
            assert each.end - each.scored + 1 - each.start >= context - stride + 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(1, 6), st.data())
def test_batches_ask_for_each_token_after_those_before_it(lengths, context, data):
    stride = data.draw(st.integers(1, context))
    texts = encoded(*[[100 * text + place for place in range(length + 1)] for text, length in enumerate(lengths)])
    windows = list(make_windows(texts.lengths, context, stride))
    asked = []
    while windows:
        size = data.draw(st.integers(1, len(windows)))

        batch = make_batch(texts, windows[:size])

        inputs, targets = batch["input_ids"], batch["shift_labels"]
        assert inputs.shape[1] <= context
        kept = inputs[:, -targets.shape[1] :]
        is_target = targets != -100
        assert torch.equal(kept[is_target] + 1, targets[is_target])
        asked += targets[is_target].tolist()
        windows = windows[size:]
    assert sorted(asked) == [100 * text + i for text, length in enumerate(lengths) for i in range(1, length + 1)]


@pytest.mark.parametrize("stride", [0, 9, -1])
def test_a_stride_that_leaves_out_tokens_is_refused(hfgpt_model, stride):
    with pytest.raises(ValueError, match=rf"`--stride` must be between 1 and the context \(8\), got {stride}"):
        measure_texts(hfgpt_model, encoded(list(range(20))), 8, stride)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_does_not_change_the_figures(model, tokenizer, texts, batch_size):
    ids = encode_texts(tokenizer, texts)

    measured = measure_texts(model, ids, 64, 40, batch_size)

    whole = measure_texts(model, ids, 64, 40, 7)
    assert measured.tokens == whole.tokens
    assert measured.loss == pytest.approx(whole.loss, rel=1e-6)
    assert measured.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-6)


def test_it_is_no_mean_of_the_perplexities_of_texts(hfgpt_model, tokenizer, texts):
    alone = [measure_texts(hfgpt_model, encode_texts(tokenizer, [text]), 64, 64) for text in texts]

    together = measure_texts(hfgpt_model, encode_texts(tokenizer, texts), 64, 64)

    nats = math.fsum(each.loss * each.tokens for each in alone)
    assert together.tokens == sum(each.tokens for each in alone)
    assert together.token_perplexity == pytest.approx(math.exp(nats / together.tokens), rel=1e-5)
    mean = sum(each.token_perplexity for each in alone) / len(alone)
    assert not 0.9 < mean / together.token_perplexity < 1.1  # the mistake would be seen


def test_a_text_longer_than_the_context_is_scored_to_its_end(hfgpt_model, tokenizer, lines):
    text = "\n".join(lines[:40])

    measured = measure_texts(hfgpt_model, encode_texts(tokenizer, [text]), 16, 16)

    (ids,) = encode_ids(tokenizer, [text])
    assert measured.tokens == len(ids) > 20 * 16


def test_words_bytes_and_tokens_are_told_apart(hfgpt_model, tokenizer):
    texts = [" Ein  Bär\n", "두 단어"]

    ids = encode_texts(tokenizer, texts)
    measured = measure_texts(hfgpt_model, ids, 64, 64)

    assert ids.words == 4 + 2  # as lm-eval counts, with the empty ones at both ends
    assert ids.bytes == len(" Ein  Bär\n".encode()) + 3 * 3 + 1
    nats = measured.loss * measured.tokens
    assert len({measured.tokens, ids.words, ids.bytes}) == 3
    assert measured.token_perplexity == pytest.approx(math.exp(nats / measured.tokens))
    assert measured.word_perplexity == pytest.approx(math.exp(nats / 6))
    assert measured.byte_perplexity == pytest.approx(math.exp(nats / ids.bytes))
    assert measured.bits_per_byte == pytest.approx(nats / ids.bytes / math.log(2))
    assert measured.byte_perplexity == pytest.approx(2**measured.bits_per_byte)


def test_more_context_helps_a_model_that_uses_it(tiny_config, tokenizer):
    """A stride below the context may only be worth something if it is really the context that grows."""
    torch.manual_seed(0)
    model = HFGPTForCausalLM(tiny_config).train()
    period = torch.randint(1, 320, (5,))
    ids = period.repeat(40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = torch.stack([ids[row:][:32] for row in range(5)])
    for _ in range(40):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    texts = encoded(ids.tolist())

    narrow, wide = (measure_texts(model, texts, 4, stride) for stride in (4, 1))

    assert wide.loss < narrow.loss
    assert model.training  # left as it was


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_a_narrow_model_are_fp32_and_their_sums_fp64(dtype, tiny_config, tokenizer, lines):
    model = make_model("llama", tiny_config).to(dtype)
    texts = encode_texts(tokenizer, ["\n".join(lines)])

    measured = measure_texts(model, texts, 64, 64, batch_size=1)

    losses = []
    for window in make_windows(texts.lengths, 64, 64):
        batch = make_batch(texts, [window])
        inputs, targets = batch["input_ids"], batch["shift_labels"]
        with torch.no_grad():
            logits = model(input_ids=inputs).logits[0, -targets.shape[1] :].double()
        losses += torch.nn.functional.cross_entropy(logits, targets[0], reduction="none", ignore_index=-100)[
            targets[0] != -100
        ].tolist()
    assert measured.tokens == len(losses) > 2000
    assert measured.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-7)  # fp32 of the same logits
    narrow = torch.zeros((), dtype=dtype)
    for loss in losses:
        narrow += loss
    assert abs(narrow / len(losses) - measured.loss) > 1e-3  # such a sum would be seen


def test_logits_of_all_tokens_of_an_hfgpt_model_never_exist(tiny_config):
    from test_loss_of_a_split import LargestTensor

    from hfgpt.evaluation.loss import SCORED_AT_ONCE

    model = make_model("hfgpt", tiny_config)
    inputs = torch.randint(320, (40, 64))

    with LargestTensor() as largest:
        losses = token_losses(model, {"input_ids": inputs}, inputs.roll(-1, dims=1))

    assert losses.shape == (40 * 64,)
    assert SCORED_AT_ONCE * 320 <= largest.elements <= 40 * 64 * 320 / 2  # the rest is the MLP


def test_a_diverged_model_gets_no_figures(hfgpt_model):
    torch.nn.init.constant_(hfgpt_model.model.norm.weight, math.nan)

    with pytest.raises(FloatingPointError, match="the loss is nan: a weight is no number"):
        measure_texts(hfgpt_model, encoded(list(range(20))), 8, 8)


def test_what_is_beyond_floating_point_is_infinite():
    perplexity = summarize(Score(1, 1e4, 1e8), words=1, bytes=1)

    assert (perplexity.token_perplexity, perplexity.word_perplexity) == (math.inf, math.inf)
    assert perplexity.bits_per_byte == pytest.approx(1e4 / math.log(2))
    assert perplexity.loss_standard_error is None


# --- what stands before a text's first token


def test_by_default_each_text_begins_after_the_bos_token(tokenizer, texts):
    ids = encode_texts(tokenizer, texts)

    assert [each.tolist() for each in ids.ids] == [[0, *each] for each in encode_ids(tokenizer, texts)]
    assert ids.prefix == "<|endoftext|>"
    assert ids.special_tokens == 0
    assert "its first token predicted from <|endoftext|>, as lm-eval does" in ids.convention


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [("<|endoftext|> $A", [0], []), ("$A <|endoftext|>", [], [0]), ("<|endoftext|> $A <|endoftext|>", [0], [0])],
)
def test_what_the_tokenizer_adds_is_scored_as_lm_eval_does_and_only_then(tokenizer, texts, template, before, after):
    adds = adding(tokenizer, template)
    bare = encode_ids(tokenizer, texts)

    like_lm_eval, own = encode_texts(adds, texts), encode_texts(adds, texts, "text")

    assert [each[1:].tolist() for each in like_lm_eval.ids] == [before + each + after for each in bare]
    assert [each[1:].tolist() for each in like_lm_eval.ids] == [adds(text)["input_ids"] for text in texts]
    assert like_lm_eval.special_tokens == len(texts) * len(before + after)
    assert [each.tolist() for each in own.ids] == [[0, *each] for each in bare]
    assert own.special_tokens == 0


def test_a_literal_special_token_is_one_for_lm_eval_and_text_otherwise(tokenizer):
    texts = ["one<|endoftext|>two"]

    like_lm_eval, own = encode_texts(tokenizer, texts), encode_texts(tokenizer, texts, "text")

    assert like_lm_eval.special_tokens == 1
    assert like_lm_eval.ids[0].tolist().count(0) == 2
    assert own.special_tokens == 0
    assert own.ids[0].tolist().count(0) == 1
    assert tokenizer.decode(own.ids[0][1:]) == texts[0]


def test_a_text_too_long_for_one_call_of_the_tokenizer_gets_the_same_ids(tokenizer, lines):
    adds = adding(tokenizer, "<|endoftext|> $A")
    text = "\n".join([*lines, "<|endoftext|>"] * 12)
    assert len(text) > 2 * PIECE

    ids = encode_texts(adds, [text])

    assert ids.ids[0][1:].tolist() == adds(text)["input_ids"]
    assert ids.special_tokens == 1 + 12


def test_a_first_token_that_is_not_scored_leaves_words_and_bytes_undefined(hfgpt_model, tokenizer, texts):
    ids = encode_texts(tokenizer, texts, "skip")

    measured = measure_texts(hfgpt_model, ids, 8, 3)

    bare = encode_ids(tokenizer, texts)
    losses = [loss for each in bare for loss in brute_force(hfgpt_model, each, 8, 3)]
    assert measured.tokens == sum(len(each) - 1 for each in bare)
    assert measured.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    assert measured.word_perplexity is measured.byte_perplexity is measured.bits_per_byte is None
    assert "not scored" in ids.convention


def test_a_tokenizer_without_bos_and_eos_has_nothing_to_begin_with(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))

    with pytest.raises(ValueError, match=r"neither a bos nor an eos token.* Set `--first-token skip`"):
        encode_texts(bare, ["text"])

    assert encode_texts(bare, ["text"], "skip").prefix is None


def test_an_unknown_policy_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"`--first-token` must be one of \['lm-eval', 'text', 'skip'\], got 'bos'"):
        encode_texts(tokenizer, ["text"], "bos")


def test_nothing_to_score_is_refused(hfgpt_model, tokenizer):
    with pytest.raises(ValueError, match="there is nothing to score"):
        measure_texts(hfgpt_model, encode_texts(tokenizer, ["e", "x", ""], "skip"), 8, 8)


# --- the metric of `evaluate`


@pytest.fixture
def metric(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return evaluate.load(METRIC, cache_dir=str(tmp_path / "metrics"))


def test_the_metric_gives_the_same_of_token_losses(metric, hfgpt_model, tokenizer, texts):
    ids = encode_texts(tokenizer, texts)
    expected = measure_texts(hfgpt_model, ids, 64, 64)

    for window in make_windows(ids.lengths, 64, 64):
        batch = make_batch(ids, [window])
        targets = batch.pop("shift_labels")
        metric.add_batch(predictions=token_losses(hfgpt_model, batch, targets))
    computed = metric.compute(words=ids.words, bytes=ids.bytes)

    assert computed["tokens"] == expected.tokens
    assert computed["perplexity"] == pytest.approx(expected.token_perplexity, rel=1e-6)
    for name in ("loss", "loss_standard_error", "word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert computed[name] == pytest.approx(getattr(expected, name), rel=1e-6)
    assert computed["convention"] == "e to the mean of the losses that were added"


def test_the_metric_gives_the_same_of_texts_and_a_model(metric, hfgpt_model, tokenizer, texts, tmp_path):
    hfgpt_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    expected = measure_texts(hfgpt_model, encode_texts(tokenizer, [*texts, "2.5"]), 64, 20)

    results = []
    for model in ({"model": str(tmp_path / "model")}, {"model": hfgpt_model, "tokenizer": tokenizer}):
        metric.add_batch(predictions=texts)
        metric.add_batch(predictions=["2.5"])
        results.append(metric.compute(**model, stride=20))

    for computed in results:
        assert computed["tokens"] == expected.tokens
        assert computed["perplexity"] == pytest.approx(expected.token_perplexity, rel=1e-6)
        assert computed["word_perplexity"] == pytest.approx(expected.word_perplexity, rel=1e-6)
        assert computed["convention"].startswith("windows of 64 tokens, stride 20; each text alone")


def test_the_metric_refuses_what_does_not_fit(metric, hfgpt_model):
    with pytest.raises(ValueError, match="texts need a model"):
        metric.compute(predictions=["text"])
    # As `compute` calls it; an error there leaves a lock behind, and the next call waits a second for it.
    with pytest.raises(ValueError, match="`model` has no effect"):
        metric._compute([1.0], model=hfgpt_model)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        metric._compute(["text"], model=hfgpt_model)
    with pytest.raises(FloatingPointError, match="1 of 2 losses are no numbers"):
        metric._compute([1.0, math.nan])
