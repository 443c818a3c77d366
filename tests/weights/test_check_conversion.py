"""`hfgpt convert --verify`: two mathematics on the same tokens. They are judged here by transformers' GPT-2 in fp64."""

import dataclasses
import json

import pytest
import torch
from foreign import HEADS_UNKNOWN, KINDS, from_scratch, llmc_bytes, save_in, save_nanogpt

from hfgpt.cli import app
from hfgpt.weights import WRITERS, load
from hfgpt.weights.check_conversion import WHO_RUNS, compare
from hfgpt.weights.convert import convert, open_source
from hfgpt.weights.formats import llmc, nanogpt


@pytest.fixture
def ids():
    return torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(gpt2, ids):
    return gpt2.double()(ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_mathematics_of_each_file_are_gpt2s(make_gpt2, tmp_path, ids, kind):
    gpt2 = make_gpt2(activation_function=KINDS[kind][1])
    file = save_in(kind, gpt2, tmp_path)

    _, checkpoint = open_source(file, heads=4 if kind in HEADS_UNKNOWN else None)

    torch.testing.assert_close(checkpoint.logits(ids, torch.float64), logits_of(gpt2, ids), rtol=0, atol=1e-11)


def test_the_mathematics_of_openais_folder_are_gpt2s(make_gpt2, tmp_path, ids):
    gpt2 = make_gpt2()
    gpt2.save_pretrained(tmp_path / "gpt2")
    convert(tmp_path / "gpt2", tmp_path / "openai", "openai")

    _, checkpoint = open_source(tmp_path / "openai")

    torch.testing.assert_close(checkpoint.logits(ids, torch.float64), logits_of(gpt2, ids), rtol=0, atol=1e-11)


def test_an_untied_head_and_missing_biases_are_computed_as_the_book_does(make_gpt2, tmp_path, ids):
    gpt2 = make_gpt2(tie_word_embeddings=False)
    for layer in gpt2.transformer.h:
        layer.attn.c_attn.bias.data.zero_()
    tensors = {name: each for name, each in from_scratch(gpt2).items() if ".W_" not in name or "bias" not in name}
    torch.save(tensors, tmp_path / "model.pth")

    _, checkpoint = open_source(tmp_path / "model.pth", heads=4)

    torch.testing.assert_close(checkpoint.logits(ids, torch.float64), logits_of(gpt2, ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize("to", [form for form in WRITERS if form != "nanochat"])  # which holds another network
def test_what_was_written_can_be_verified(make_gpt2, tmp_path, to):
    make_gpt2(activation_function="gelu" if to == "nanogpt" else "gelu_new").save_pretrained(tmp_path / "gpt2")

    found = convert(tmp_path / "gpt2", tmp_path / "out.bin", to, verify=True).comparison

    assert (found.source_by, found.dest_by, found.dtype) == ("transformers' GPT-2", WHO_RUNS[to], "float64")
    assert found.max_abs_diff <= 1e-11
    assert abs(found.kl) < 1e-12
    assert found.argmax_agreement == 1
    assert found.passed


def test_a_mistake_in_a_table_is_found_and_exits_with_1(make_gpt2, tmp_path, monkeypatch, capsys):
    save_nanogpt(make_gpt2(activation_function="gelu"), tmp_path / "ckpt.pt")
    other_norm = {"ln_1": "ln_2", "ln_2": "ln_1"}
    swapped = [
        dataclasses.replace(row, foreign=other_norm.get(row.foreign[:4], row.foreign[:4]) + row.foreign[4:])
        for row in nanogpt.EACH_BLOCK
    ]
    monkeypatch.setattr(nanogpt, "EACH_BLOCK", swapped)
    words = ["convert", str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), "--to", "hfgpt", "--verify"]

    assert app(words, standalone_mode=False) == 1

    assert "(FAILED, another model: at most 1.0e-09 was to be expected)" in capsys.readouterr().out


def test_a_destination_that_says_something_else_is_seen(make_gpt2, tmp_path):
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    _, checkpoint = open_source(tmp_path / "gpt2")
    model = load(tmp_path / "gpt2")
    model.model.layers[1].mlp.up_proj.bias.data[3] += 0.5
    model.save_pretrained(tmp_path / "other")

    found = compare(checkpoint.logits, "gpt2", tmp_path / "other", "hfgpt", model.config)

    assert found.max_abs_diff > 1e-3
    assert found.kl > 1e-6
    assert not found.passed


def test_rounding_is_listed_refused_if_asked_and_measured(make_gpt2, tmp_path):
    make_gpt2().save_pretrained(tmp_path / "gpt2")

    result = convert(tmp_path / "gpt2", tmp_path / "half", "hfgpt", dtype="bf16", verify=True)

    assert {step.action for step in result.steps_between} == {"rounded to bf16"}
    assert len(result.lossy) == len(list(load(tmp_path / "half").parameters()))
    assert 1e-4 < result.comparison.max_abs_diff < 0.1
    assert result.comparison.tolerance is None
    assert result.comparison.passed
    with pytest.raises(ValueError, match=r"--strict: model\.embed_tokens\.weight would be rounded to bf16 \(36 such"):
        convert(tmp_path / "gpt2", tmp_path / "strict", "hfgpt", dtype="bf16", strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_dtype_that_holds_every_number_rounds_nothing(make_gpt2, tmp_path):
    make_gpt2().to(torch.bfloat16).save_pretrained(tmp_path / "gpt2")

    convert(tmp_path / "gpt2", tmp_path / "wide", "hfgpt", dtype="fp32", strict=True)
    result = convert(tmp_path / "wide", tmp_path / "narrow", "gpt2", dtype="bf16", strict=True, verify=True)

    assert result.lossy == []
    assert result.comparison.max_abs_diff <= 1e-11


def test_numbers_beyond_the_dtype_are_refused(make_gpt2, tmp_path):
    gpt2 = make_gpt2()
    gpt2.transformer.h[1].mlp.c_fc.bias.data[3] = 1e5
    gpt2.save_pretrained(tmp_path / "gpt2")

    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.bias: holds 1e\+05, and fp16 ends at 6\.55e\+04"):
        convert(tmp_path / "gpt2", tmp_path / "half", "hfgpt", dtype="fp16")


def test_a_file_of_several_types_asks_for_one(make_gpt2, tmp_path):
    gpt2 = make_gpt2()
    gpt2.transformer.h.to(torch.bfloat16)
    torch.save(from_scratch(gpt2, fast=True), tmp_path / "model.pth")  # without masks, which would be dropped

    with pytest.raises(ValueError, match=r"several types, \['torch\.bfloat16', 'torch\.float32'\]\. Give `--dtype`"):
        convert(tmp_path / "model.pth", tmp_path / "out", "hfgpt", heads=4)
    convert(tmp_path / "model.pth", tmp_path / "out", "hfgpt", heads=4, dtype="fp32", strict=True)


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_is_cut_if_asked(make_gpt2, tmp_path, ids, tied):
    gpt2 = make_gpt2(vocab_size=384, tie_word_embeddings=tied)
    gpt2.save_pretrained(tmp_path / "gpt2")

    result = convert(tmp_path / "gpt2", tmp_path / "cut", "gpt2", vocab_size=320, verify=True)

    cut = load(tmp_path / "cut")
    assert [step.action for step in result.steps_between] == ["cut: 64 rows after the first 320"] * (2 - tied)
    assert cut.config.vocab_size == 320
    torch.testing.assert_close(cut(ids).logits, gpt2(ids).logits[..., :320], rtol=0, atol=2e-5)
    assert result.comparison.max_abs_diff <= 1e-11  # of the logits that both have
    # The softmax of the rest has lost 64 tokens of 384; by brute force, with the same tokens as `compare`:
    draws = torch.randint(320, (2, 64), generator=torch.Generator().manual_seed(0))
    before = logits_of(gpt2, draws).softmax(-1)[..., :320]
    after = before / before.sum(-1, keepdim=True)
    assert result.comparison.kl == pytest.approx(float((before * (before / after).log()).sum(-1).mean()), rel=1e-9)


def test_a_vocabulary_cannot_be_cut_below_its_own_tokens(make_gpt2, tmp_path):
    gpt2 = make_gpt2()
    gpt2.config.eos_token_id = 319
    gpt2.save_pretrained(tmp_path / "gpt2")

    with pytest.raises(ValueError, match="`--vocab-size` is 319, and the model's `eos_token_id` is 319"):
        convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt", vocab_size=319)
    with pytest.raises(ValueError, match="`--vocab-size` must be between 1 and the model's 320, got 321"):
        convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt", vocab_size=321)


@pytest.fixture
def llmc_files(make_gpt2, tmp_path):
    """A model file and its debug state, made by transformers' GPT-2 and torch's autograd."""
    gpt2 = make_gpt2()
    draws = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(320, (4, 16), generator=draws, dtype=torch.int32) for _ in range(2))
    logits = gpt2(ids.long()).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten().long())
    loss.backward()
    gradients = make_gpt2()
    for name, parameter in gradients.named_parameters():
        parameter.data = gpt2.get_parameter(name).grad
    header = torch.zeros(256, dtype=torch.int32)
    header[:4] = torch.tensor([20240327, 2, 4, 16])
    content = b"".join(each.detach().numpy().tobytes() for each in (header, ids, targets, logits, loss))
    (tmp_path / "model.bin").write_bytes(llmc_bytes(gpt2))
    (tmp_path / "model_debug_state.bin").write_bytes(content + llmc_bytes(gradients)[1024:])
    return tmp_path / "model.bin"


def test_the_debug_state_of_llmc_is_read(llmc_files, tmp_path):
    beside = tmp_path / "model_debug_state.bin"
    model = load(llmc_files)

    theirs = llmc.read_debug_state(beside, model.config)
    ours = llmc.make_debug_state(model, theirs.ids, theirs.targets)

    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=2e-5)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    assert ours.gradients.keys() == theirs.gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in theirs.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=0, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_verify_compares_with_the_debug_state_beside_a_model(llmc_files, tmp_path):
    [note] = convert(llmc_files, tmp_path / "out", "hfgpt", verify=True).notes

    words = note.split()
    assert words[:2] == ["model_debug_state.bin:", "max"]
    assert all(float(words[place].rstrip(",")) <= 2e-5 for place in (3, 5, 8))
    assert convert(llmc_files, tmp_path / "unverified", "hfgpt").notes == []
    beside, config = llmc.debug_state_beside(llmc_files), load(llmc_files).config
    content = bytearray(beside.read_bytes())
    for place, value, message in ((0, 5, "begins with 5; a debug state"), (1, 1, "version 1; hfgpt reads 2")):
        damaged = content.copy()
        damaged[4 * place : 4 * place + 4] = value.to_bytes(4, "little")
        beside.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            llmc.read_debug_state(beside, config)
    beside.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="bytes, by its header it should have"):
        llmc.read_debug_state(beside, config)


def test_the_comparison_is_in_the_json(make_gpt2, tmp_path, capsys):
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    words = ["convert", str(tmp_path / "gpt2"), str(tmp_path / "out"), "--to", "hfgpt", "--verify", "--json"]

    app(words, standalone_mode=False)

    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert comparison["source_by"] == "transformers' GPT-2"
    assert comparison["max_abs_diff"] <= comparison["tolerance"]
