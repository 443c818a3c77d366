import pytest
import torch
import transformers
from contract import ALL_CLASSES, SUM_ORDER, TOKEN_CLASSES, make_labels, pad, random_ids, scores
from transformers import AutoConfig, pipeline

import hfgpt
from hfgpt.modeling_hfgpt import AUTO_CLASSES

HEADS = [hfgpt.HFGPTForSequenceClassification, hfgpt.HFGPTForTokenClassification, hfgpt.HFGPTForQuestionAnswering]


@pytest.fixture
def ids():
    return random_ids(3, 20)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_auto_classes_make_and_load_each_class(make, tmp_path, auto_class):
    model_class, auto_class = AUTO_CLASSES[auto_class], getattr(transformers, auto_class)
    model = make(model_class)
    model.save_pretrained(tmp_path)

    loaded = auto_class.from_pretrained(tmp_path)
    made = auto_class.from_config(AutoConfig.from_pretrained(tmp_path))

    assert type(loaded) is type(made) is model_class
    assert loaded.config.num_labels == made.config.num_labels == 3
    assert loaded.state_dict().keys() == made.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_head_says_what_that_of_transformers_says(make_pair, ids, model_class, attention, side):
    gpt2, model = make_pair(model_class, attention)
    padded, mask = pad(ids, [20, 13, 5], side)
    labels = make_labels(model_class, padded)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)  # GPT-2 does not find them itself

    mine = model(padded, attention_mask=mask, **labels)
    theirs = gpt2(padded, attention_mask=mask, position_ids=positions, **labels)

    seen = mask == 1 if scores(mine).ndim == 3 else slice(None)
    torch.testing.assert_close(scores(mine)[seen], scores(theirs)[seen], **SUM_ORDER)


@pytest.mark.parametrize("model_class", HEADS)
def test_loss_and_gradients_of_each_head_are_gpt2s(make_pair, ids, model_class):
    gpt2, model = make_pair(model_class, classifier_dropout=0.0)
    for each in (gpt2, model):
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            setattr(each.config, name, 0.0)
    labels = make_labels(model_class, ids)

    losses = [each(ids, **labels).loss for each in (gpt2, model)]
    for loss in losses:
        loss.backward()

    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-6)
    mine, theirs = model.get_input_embeddings().weight.grad, gpt2.get_input_embeddings().weight.grad
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (1, torch.tensor([0.5, -1.0, 2.0]), "regression"),
        (3, torch.tensor([2, 0, 1]), "single_label_classification"),
        (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), "multi_label_classification"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_kind_of_problem_is_taken_from_the_labels_as_gpt2_does(make_pair, ids, num_labels, labels, problem):
    gpt2, model = make_pair(hfgpt.HFGPTForSequenceClassification, num_labels=num_labels)

    losses = [each(ids, labels=labels).loss for each in (gpt2, model)]

    assert model.config.problem_type == gpt2.config.problem_type == problem
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_token_id", [0, None])
def test_a_text_is_classified_by_its_own_last_token(make, ids, side, pad_token_id):
    model = make(hfgpt.HFGPTForSequenceClassification, pad_token_id=pad_token_id)
    lengths = [20, 13, 5]
    padded, mask = pad(ids, lengths, side)

    logits = model(padded, attention_mask=mask).logits

    alone = [model(ids[[row], :length]).logits[0] for row, length in enumerate(lengths)]
    torch.testing.assert_close(logits, torch.stack(alone), **SUM_ORDER)
    embeddings = model.get_input_embeddings()(padded)
    torch.testing.assert_close(model(inputs_embeds=embeddings, attention_mask=mask).logits, logits, **SUM_ORDER)


def test_right_padding_needs_no_mask_to_classify_if_there_is_a_pad_token(make, ids):
    model = make(hfgpt.HFGPTForSequenceClassification, pad_token_id=0)
    padded, mask = pad(ids, [20, 13, 5], "right")

    assert torch.allclose(model(padded).logits, model(padded, attention_mask=mask).logits, **SUM_ORDER)


def test_a_text_that_ends_with_the_pad_token_is_classified_by_it(make, ids):
    ids[:, -1] = 0
    model, no_pad = (make(hfgpt.HFGPTForSequenceClassification, pad_token_id=pad_id) for pad_id in (0, None))

    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, no_pad(ids).logits)
    assert not torch.allclose(model(ids).logits, no_pad(ids).logits, atol=1e-2)


def test_rows_of_one_length_need_neither_mask_nor_pad_token_to_be_classified(make, ids):
    model = make(hfgpt.HFGPTForSequenceClassification)

    together = model(ids).logits

    torch.testing.assert_close(together, torch.cat([model(row[None]).logits for row in ids]), **SUM_ORDER)


@pytest.mark.parametrize("model_class", TOKEN_CLASSES)
def test_changing_a_token_leaves_what_is_said_of_earlier_ones(make, ids, model_class):
    model = make(model_class)
    changed = ids.clone()
    changed[0, 7] = changed[0, 7] % 319 + 1

    before, after = scores(model(ids)), scores(model(changed))

    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[0, 7:], after[0, 7:], atol=1e-2)


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("family", ["reference", "hfgpt"])
def test_a_new_head_may_be_put_on_a_pretrained_body(make_pair, tmp_path, model_class, family):
    _, pretrained = make_pair(hfgpt.HFGPTForCausalLM)
    pretrained.save_pretrained(tmp_path / "hfgpt")

    model = model_class.from_pretrained(tmp_path / family, num_labels=7)

    body = model.model.state_dict()
    assert all(torch.equal(body[name], tensor) for name, tensor in pretrained.model.state_dict().items())
    head = [module for name, module in model.named_children() if name in ("score", "qa_outputs")]
    assert head[0].out_features == (2 if model_class is hfgpt.HFGPTForQuestionAnswering else 7)
    assert 0.015 < head[0].weight.std() < 0.025  # drawn anew, by `initializer_range`


@pytest.mark.parametrize("model_class", HEADS)
def test_the_body_can_be_taken_out_from_under_a_head(make, tmp_path, model_class):
    model = make(model_class)
    model.save_pretrained(tmp_path)

    body = hfgpt.HFGPTModel.from_pretrained(tmp_path)
    language_model = hfgpt.HFGPTForCausalLM.from_pretrained(tmp_path)

    for each in (body, language_model.model):
        assert all(torch.equal(each.state_dict()[name], tensor) for name, tensor in model.model.state_dict().items())


def test_a_head_of_another_size_is_refused(make, tmp_path):
    make(hfgpt.HFGPTForSequenceClassification).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"score\.weight: in the file \(3, 32\), in the model \(5, 32\)"):
        hfgpt.HFGPTForSequenceClassification.from_pretrained(tmp_path, num_labels=5)


def test_an_untied_output_layer_that_is_not_in_the_file_is_refused(make, tmp_path):
    make(hfgpt.HFGPTModel, tie_word_embeddings=False).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"lm_head\.weight: not in the file"):
        hfgpt.HFGPTForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_class", HEADS)
def test_a_head_learns_its_labels_by_heart(make, ids, model_class):
    torch.manual_seed(0)
    model = make(model_class, num_labels=3).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = make_labels(model_class, ids)

    for _ in range(60):
        model(ids, **labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert model.eval()(ids, **labels).loss < 0.05


@pytest.mark.parametrize(
    ("task", "model_class"),
    [
        ("text-classification", hfgpt.HFGPTForSequenceClassification),
        ("token-classification", hfgpt.HFGPTForTokenClassification),
    ],
)
def test_classification_pipelines_answer_what_they_answer_with_gpt2(make_pair, tokenizer, task, model_class):
    gpt2, model = make_pair(model_class)

    theirs, mine = (
        pipeline(task, model=each, tokenizer=tokenizer)("The file object is open.") for each in (gpt2, model)
    )

    assert len(mine) == len(theirs) > 0
    for answer, expected in zip(mine, theirs, strict=True):
        assert answer == {**expected, "score": pytest.approx(expected["score"], rel=1e-5)}
