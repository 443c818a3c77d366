"""Documents packed into one row, told apart by positions that start again, must not see each other."""

import pytest
import torch
from contract import (
    SUM_ORDER,
    TOKEN_CLASSES,
    cache_of,
    flex_mask_warning,
    flex_uncompiled_warning,
    pad,
    random_ids,
    scores,
)
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache, Trainer, TrainingArguments

import hfgpt
from hfgpt.positions import find_documents

pytestmark = [pytest.mark.usefixtures("uncompiled"), flex_mask_warning, flex_uncompiled_warning]

LENGTHS = [9, 4, 7]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
DOCUMENTS = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))[None]


@pytest.fixture
def ids():
    return random_ids(2, 20)


def in_one_row(ids, model, **arguments):
    return scores(model(ids, position_ids=POSITIONS.expand(len(ids), -1), **arguments))


def one_by_one(ids, model):
    return torch.cat([scores(model(part)) for part in ids.split(LENGTHS, dim=1)], dim=1)


def without_dropout(model):
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "attention_dropout"):
        setattr(model.config, name, 0.0)
    return model


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask of ones"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_class", TOKEN_CLASSES)
def test_documents_in_one_row_are_as_if_alone(make, ids, model_class, attention, training, masked):
    model = without_dropout(make(model_class, attention, classifier_dropout=0.0)).train(training)
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}

    packed = in_one_row(ids, model, **mask)

    torch.testing.assert_close(packed, one_by_one(ids, model), **SUM_ORDER)
    assert not torch.allclose(packed, scores(model(ids)), atol=1e-2)


@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask of ones"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_changing_one_document_changes_no_bit_of_another(make, ids, attention, masked, use_cache):
    model = make(hfgpt.HFGPTForCausalLM, attention)
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}

    with torch.no_grad():
        before = in_one_row(ids, model, use_cache=use_cache, **mask)
        for place in range(20):
            changed = ids.clone()
            changed[0, place] = changed[0, place] % 319 + 1
            after = in_one_row(changed, model, use_cache=use_cache, **mask)

            elsewhere = DOCUMENTS[0] != DOCUMENTS[0, place]
            assert torch.equal(before[0, elsewhere], after[0, elsewhere])
            assert torch.equal(before[1], after[1])
            assert not torch.allclose(before[0, place], after[0, place], atol=1e-2)


def test_flex_attention_keeps_documents_apart_too(make, ids):
    model = make(hfgpt.HFGPTForCausalLM, "flex_attention")

    with torch.no_grad():
        torch.testing.assert_close(in_one_row(ids, model), one_by_one(ids, model), **SUM_ORDER)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_cache_given_empty_does_not_let_documents_see_each_other(make, ids, cache_class):
    model = make(hfgpt.HFGPTForCausalLM)
    cache = DynamicCache() if cache_class is DynamicCache else StaticCache(config=model.config, max_cache_len=32)

    packed = in_one_row(ids, model, cache=cache)

    torch.testing.assert_close(packed, one_by_one(ids, model), **SUM_ORDER)


def test_rows_may_end_in_padding_after_their_documents(make, ids):
    model = make(hfgpt.HFGPTForCausalLM)
    padded, mask = pad(ids, [20, 13], "right")

    packed = in_one_row(padded, model, attention_mask=mask)

    alone = one_by_one(ids, model)
    torch.testing.assert_close(packed[mask == 1], alone[mask == 1], **SUM_ORDER)


@pytest.mark.parametrize("gap", [1, 3])
def test_padding_may_lie_between_documents(make, ids, gap):
    model = make(hfgpt.HFGPTForCausalLM)
    padding = torch.zeros(2, gap, dtype=torch.long)
    first, second = ids[:, :9], ids[:, 9:]
    row = torch.cat([padding, first, padding, second, padding], dim=1)
    nowhere = torch.ones(gap, dtype=torch.long)  # what transformers gives to padding
    positions = torch.cat([nowhere, torch.arange(9), nowhere, torch.arange(11), nowhere])[None]

    packed = model(row, attention_mask=(row != 0).long(), position_ids=positions).logits

    torch.testing.assert_close(packed[:, gap : gap + 9], model(first).logits, **SUM_ORDER)
    torch.testing.assert_close(packed[:, 2 * gap + 9 : -gap], model(second).logits, **SUM_ORDER)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("given_to_padding", [0, 1])
def test_padding_is_not_taken_for_a_document(side, given_to_padding):
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, : 0 if side == "right" else 7] = 0
    mask[2, 20 if side == "left" else 13 :] = 0
    positions = (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, given_to_padding)

    for implementation in ("sdpa", "flash_attention_2"):
        assert find_documents(implementation, torch.zeros(3, 20, 32), mask, positions, DynamicCache(), {}) is None


def test_positions_that_a_padding_mask_implies_are_not_taken_for_documents(make, ids):
    model = make(hfgpt.HFGPTForCausalLM)
    mask = torch.ones_like(ids)
    mask[:, 6:9] = 0  # a hole: the text goes on behind it

    with_hole = model(ids, attention_mask=mask).logits

    joined = model(torch.cat([ids[:, :6], ids[:, 9:]], dim=1)).logits
    torch.testing.assert_close(with_hole[:, 9:], joined[:, 6:], **SUM_ORDER)


def test_a_text_that_goes_on_from_a_cache_sees_what_came_before(make, ids):
    model = make(hfgpt.HFGPTForCausalLM)
    cache = cache_of(model(ids[:, :9]))

    rest = model(ids[:, 9:], position_ids=torch.arange(9, 20)[None], cache=cache).logits

    torch.testing.assert_close(rest, model(ids).logits[:, 9:], **SUM_ORDER)


def test_packed_documents_are_refused_by_an_attention_that_cannot_keep_them_apart(make, ids):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("blind to documents", sdpa_attention_forward)
    model = make(hfgpt.HFGPTForCausalLM, "blind to documents")

    with pytest.raises(ValueError, match="'blind to documents' would let those documents see each other"):
        in_one_row(ids, model)
    boundaries = torch.tensor([0, 9, 13, 20])
    in_one_row(ids, model, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)  # it has been told otherwise
    model(ids, position_ids=torch.arange(20)[None])


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_flash_attention_is_given_only_what_it_keeps_apart(rows, padded):
    """It goes by the positions of a single row without padding; see transformers' `_is_packed_sequence`."""
    mask = torch.ones(rows, 20, dtype=torch.long)
    mask[:, -2:] = 0 if padded else 1
    x_BTC = torch.zeros(rows, 20, 32)

    def documents():
        return find_documents("flash_attention_2", x_BTC, mask, POSITIONS, None, {})

    if rows == 1 and not padded:
        assert torch.equal(documents(), DOCUMENTS)
    else:
        with pytest.raises(ValueError, match="'flash_attention_2' would let those documents see each other"):
            documents()


def test_document_borders_without_positions_are_refused(make, ids):
    borders = torch.tensor([0, 9, 20])

    with pytest.raises(ValueError, match="`cu_seq_lens_q` packs documents; give `position_ids`"):
        make(hfgpt.HFGPTForCausalLM)(ids[:1], cu_seq_lens_q=borders, cu_seq_lens_k=borders)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_trainer_and_a_loop_by_hand_learn_the_same_from_packed_documents(make, tmp_path, attention):
    documents = [{"input_ids": random_ids(1, length, seed=length)[0].tolist()} for length in LENGTHS]
    collate = DataCollatorWithFlattening()
    models = [without_dropout(make(hfgpt.HFGPTForCausalLM, attention)).train() for _ in range(3)]
    by_trainer, by_hand, apart = models
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )

    Trainer(by_trainer, arguments, train_dataset=documents, data_collator=collate).train()
    by_hand(**collate(documents)).loss.backward()
    targets = sum(length - 1 for length in LENGTHS)
    for document in documents:
        ids = torch.tensor([document["input_ids"]])
        (apart(ids, labels=ids).loss * (ids.shape[1] - 1) / targets).backward()

    for model in (by_hand, apart):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, parameter in by_trainer.named_parameters():
        torch.testing.assert_close(parameter, by_hand.get_parameter(name), rtol=0, atol=1e-6)
        torch.testing.assert_close(parameter, apart.get_parameter(name), **SUM_ORDER)
