"""Other formats in and out. The oracle is transformers' GPT-2, whose tensors are put into each format here by hand."""

import json
import os
import pickle
import sys
from dataclasses import make_dataclass

import pytest
import torch
from foreign import HEADS_UNKNOWN, KINDS, Canary, as_linear, from_scratch, llmc_bytes, save_in, save_nanogpt
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.cli import app
from hfgpt.data.tokenizer import encode_ids, load_tokenizer
from hfgpt.weights import load, save
from hfgpt.weights.convert import convert, open_source
from hfgpt.weights.formats.bpe import join_model
from hfgpt.weights.model_parts import build_from


@pytest.fixture
def ids():
    return torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))


def read(source, **settings):
    """The model of a source, its format, what was done to each tensor, and what was guessed."""
    found, checkpoint = open_source(source, **settings)
    model, steps = build_from(source, checkpoint)
    return model, found, steps, checkpoint.guesses


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_each_kind_gives_gpt2s_logits(make_gpt2, tmp_path, ids, kind):
    expected_format, activation = KINDS[kind]
    gpt2 = make_gpt2(activation_function=activation)
    file = save_in(kind, gpt2, tmp_path)

    model, found, steps, _ = read(file, heads=4 if kind in HEADS_UNKNOWN else None)

    assert found == expected_format
    expected = gpt2(ids).logits
    bound = 2e-5 * max(1.0, expected.abs().max().item() / 3)  # as in test_weights: sums in another order
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=bound)
    assert model.config.tie_word_embeddings
    assert len({step.name for step in steps}) >= 28  # every tensor of a two-layer GPT-2 is accounted for


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_file_is_in_the_report(make_gpt2, tmp_path, kind):
    file = save_in(kind, make_gpt2(), tmp_path)

    _, _, steps, _ = read(file, heads=4 if kind in HEADS_UNKNOWN else None)

    if kind == "llm.c":
        assert [step for step in steps if not step.is_exact] == [steps[0]]
        assert (steps[0].name, steps[0].shape, steps[0].action) == ("wte", (384, 32), "cut: 64 rows of padding")
        return
    content = load_file(file) if kind == "safetensors" else torch.load(file)
    tensors = content.get("model", content.get("model_state_dict", content))
    names = {name.removeprefix("module._orig_mod."): tuple(tensor.shape) for name, tensor in tensors.items()}
    assert {step.name: step.shape for step in steps} == names


@pytest.mark.parametrize("to", ["nanogpt", "llms-from-scratch", "llm.c"])
def test_each_file_format_is_written_as_its_own_code_reads_it(make_gpt2, tmp_path, to):
    gpt2 = make_gpt2(activation_function="gelu" if to == "nanogpt" else "gelu_new")
    gpt2.save_pretrained(tmp_path / "gpt2")

    convert(tmp_path / "gpt2", tmp_path / "written.bin", to)

    if to == "llm.c":
        assert (tmp_path / "written.bin").read_bytes() == llmc_bytes(gpt2)
        return
    content = torch.load(tmp_path / "written.bin")
    expected = as_linear(gpt2) if to == "nanogpt" else from_scratch(gpt2)
    written = content["model"] if to == "nanogpt" else content
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    if to == "nanogpt":
        assert content["model_args"] == {
            "n_layer": 2,
            "n_head": 4,
            "n_embd": 32,
            "block_size": 64,
            "bias": True,
            "vocab_size": 320,
            "dropout": 0.1,
        }


def test_python_loads_and_saves_files_too(make_gpt2, tmp_path, ids):
    gpt2 = make_gpt2()
    model = load(save_in("llms-from-scratch", gpt2, tmp_path), heads=4, resid_pdrop=0.25)

    save(model, tmp_path / "model.bin", "llm.c")

    assert (tmp_path / "model.bin").read_bytes() == llmc_bytes(gpt2)
    assert model.config.resid_pdrop == 0.25
    assert load(tmp_path / "model.bin", dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`--heads` and `--activation` are for files"):
        load("openai-community/gpt2", heads=4)


def test_a_nanogpt_without_biases_gets_zeros_and_says_so(make_gpt2, tmp_path, ids):
    gpt2 = make_gpt2(activation_function="gelu")
    for name, parameter in gpt2.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    save_nanogpt(gpt2, tmp_path / "ckpt.pt", leave_out=["bias"])

    model, _, steps, guesses = read(tmp_path / "ckpt.pt")

    torch.testing.assert_close(model(ids).logits, gpt2(ids).logits, rtol=0, atol=2e-5)
    assert len([step for step in steps if step.action == "filled with zeros"]) == 2 * 6 + 1
    assert model.config.resid_pdrop == 0.2
    assert "`--activation gelu`, or gelu_new" in guesses[0]
    with pytest.raises(ValueError, match=r"--strict: .*bias would be filled with zeros \(13 such tensors"):
        convert(tmp_path / "ckpt.pt", tmp_path / "out", "hfgpt", strict=True, activation="gelu")
    assert not (tmp_path / "out").exists()


def test_an_older_nanogpt_is_read_with_its_own_activation(make_gpt2, tmp_path, ids):
    gpt2 = make_gpt2(activation_function="gelu_new")
    save_nanogpt(gpt2, tmp_path / "ckpt.pt")

    model, _, _, guesses = read(tmp_path / "ckpt.pt", activation="gelu_new")

    torch.testing.assert_close(model(ids).logits, gpt2(ids).logits, rtol=0, atol=2e-5)
    assert guesses == []


def test_a_build_nanogpt_checkpoint_is_read_with_its_config_object(make_gpt2, tmp_path, ids, monkeypatch):
    fields = {"block_size": 64, "vocab_size": 320, "n_layer": 2, "n_head": 4, "n_embd": 32}
    gpt_config = make_dataclass("GPTConfig", [(name, int, value) for name, value in fields.items()])
    gpt_config.__module__ = "__main__"
    gpt2 = make_gpt2()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["__main__"], "GPTConfig", gpt_config, raising=False)
        torch.save({"model": as_linear(gpt2), "config": gpt_config(), "step": 3}, tmp_path / "model.pt")

    model, found, _, guesses = read(tmp_path / "model.pt")

    assert found == "nanogpt"
    assert guesses == []
    torch.testing.assert_close(model(ids).logits, gpt2(ids).logits, rtol=0, atol=2e-5)


def test_a_book_model_trained_from_scratch_keeps_its_own_output_layer(make_gpt2, tmp_path, ids):
    gpt2 = make_gpt2(tie_word_embeddings=False)
    for layer in gpt2.transformer.h:
        layer.attn.c_attn.bias.data.zero_()
    tensors = {name: each for name, each in from_scratch(gpt2).items() if ".W_" not in name or "bias" not in name}
    torch.save(tensors, tmp_path / "model.pth")

    model, _, steps, _ = read(tmp_path / "model.pth", heads=4)

    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(model(ids).logits, gpt2(ids).logits, rtol=0, atol=2e-5)
    assert len([step for step in steps if step.action == "filled with zeros"]) == 6


@pytest.mark.parametrize("width", [32, 64, 128, 512, 832])
@pytest.mark.parametrize("kind", HEADS_UNKNOWN)
def test_heads_that_a_file_does_not_say_are_asked_for_where_gpt2_has_no_such_width(make_gpt2, tmp_path, kind, width):
    file = save_in(kind, make_gpt2(hidden_size=width, num_attention_heads=2), tmp_path)
    words = ["convert", str(file), str(tmp_path / "out"), "--to", "hfgpt"]

    with pytest.raises(ValueError, match=rf"how many heads share its width of {width}\. Give `--heads`"):
        app(words, standalone_mode=False)

    assert not (tmp_path / "out").exists()
    app([*words, "--heads", "2", "--activation", "gelu_new"], standalone_mode=False)
    assert load(tmp_path / "out").config.num_attention_heads == 2


@pytest.mark.parametrize(
    ("kind", "width", "option"),
    [
        ("llms-from-scratch", 768, "--heads"),
        ("GPTModelFast", 1024, "--heads"),
        ("mingpt", 1280, "--heads"),
        ("mingpt", 768, "--activation"),
        ("nanogpt", 32, "--activation"),
    ],
)
def test_a_guess_is_told_and_refused_if_asked_and_never_called_verified(
    make_gpt2, tmp_path, capsys, kind, width, option
):
    activation = "gelu" if kind == "nanogpt" else "gelu_new"
    gpt2 = make_gpt2(hidden_size=width, num_attention_heads=4, activation_function=activation, num_hidden_layers=1)
    file = save_in(kind, gpt2, tmp_path)
    words = ["convert", str(file), str(tmp_path / "out"), "--to", "hfgpt"]
    known = {"--heads": "4", "--activation": activation} if kind == "mingpt" else {}
    others = [word for name, said in known.items() if name != option for word in (name, said)]

    app([*words, *others, "--verify"], standalone_mode=False)

    written = capsys.readouterr().out
    assert f"`{option}" in next(line for line in written.splitlines() if line.startswith("guessed: "))
    assert "the same on a guess" in written
    assert "verified" not in written
    with pytest.raises(ValueError, match=rf"--strict: .* would be dropped|to be guessed: .*`{option}"):
        convert(file, tmp_path / "strict", "hfgpt", strict=True)
    load(file)
    assert "guessed: " in capsys.readouterr().err
    told = [*others, option, "4" if option == "--heads" else activation]
    app([*words[:2], str(tmp_path / "told"), *words[3:], *told, "--verify"], standalone_mode=False)
    assert "(verified: " in capsys.readouterr().out


@pytest.mark.parametrize("fields", [{"bias": True, "dropout": 0.0}, {}])
def test_settings_of_nanogpts_kind_do_not_say_the_activation(make_gpt2, tmp_path, fields):
    sizes = {"block_size": 64, "vocab_size": 320, "n_layer": 2, "n_head": 4, "n_embd": 32}
    torch.save({"model": as_linear(make_gpt2()), "config": sizes | fields}, tmp_path / "model.pt")

    model, _, _, guesses = read(tmp_path / "model.pt")

    assert model.config.activation_function == ("gelu" if fields else "gelu_new")
    assert len(guesses) == 1


@pytest.mark.parametrize("by", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, by):
    content, file = {"model": Canary(tmp_path / "sang")}, tmp_path / "model.pt"
    if by == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))

    with pytest.raises(ValueError, match=r"model\.pt: not opened"):
        read(file)

    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize("kind", ["nanogpt", "llms-from-scratch", "safetensors", "llm.c"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(make_gpt2, tmp_path, kind, share):
    file = save_in(kind, make_gpt2(), tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])

    with pytest.raises(ValueError, match=rf"{file.name}: "):
        read(file, heads=4 if kind in HEADS_UNKNOWN else None)


def test_a_flipped_bit_is_found_by_the_checksum_of_torch_save(make_gpt2, tmp_path):
    file = save_in("nanogpt", make_gpt2(), tmp_path)
    content = bytearray(file.read_bytes())
    middle = content.index(bytes(as_linear(make_gpt2())["transformer.wte.weight"].view(torch.uint8).numpy()[3][:16]))
    content[middle] ^= 1
    file.write_bytes(content)

    with pytest.raises(ValueError, match=r"model\.pth: .*(checksum|CRC)"):
        read(file)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 20240520, r"begins with 20240520; a model of llm\.c begins with 20240326"),
        (0, int.from_bytes((20240326).to_bytes(4, "little"), "big", signed=True), "big-endian"),
        (1, 1, r"version 1; hfgpt reads \[3, 5\]"),
        (1, 5, "bytes, by its header it should have"),
        (4, 0, "the header has an impossible shape"),
        (4, 3, "bytes, by its header it should have"),
        (7, 100, "the header has an impossible shape"),
    ],
)
def test_a_wrong_header_of_llmc_is_refused(make_gpt2, tmp_path, place, value, message):
    file = save_in("llm.c", make_gpt2(), tmp_path)
    content = bytearray(file.read_bytes())
    content[place * 4 : place * 4 + 4] = value.to_bytes(4, "little", signed=True)
    file.write_bytes(content)

    with pytest.raises(ValueError, match=message):
        read(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.h.1.mlp.c_fc.weight": None}, r"h\.1\.mlp\.c_fc\.weight: not in the file"),
        ({"transformer.h.1.gate": torch.ones(3)}, r"h\.1\.gate: left over"),
        ({"transformer.ln_f.weight": torch.ones(31)}, r"ln_f\.weight: expected shape \(32,\), got \(31,\)"),
        ({"transformer.ln_f.weight": torch.full((32,), torch.nan)}, r"ln_f\.weight: holds NaN or infinity"),
    ],
    ids=["missing", "left over", "of another shape", "NaN"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(make_gpt2, tmp_path, change, message):
    file = save_in("nanogpt", make_gpt2(), tmp_path)
    content = torch.load(file)
    content["model"] = {name: each for name, each in (content["model"] | change).items() if each is not None}
    torch.save(content, file)

    with pytest.raises(ValueError, match=rf"model\.pth: .*{message}"):
        read(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a dictionary"),
        ({"weight": torch.ones(2)}, "no format that hfgpt knows; it holds weight"),
    ],
)
def test_what_is_no_gpt_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")

    with pytest.raises(ValueError, match=message):
        read(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        ("nanogpt", {}, "needs `activation_function` = 'gelu', the model has 'gelu_new'"),
        ("llm.c", {"activation_function": "gelu"}, "needs `activation_function` = 'gelu_new', the model has 'gelu'"),
        ("llm.c", {"tie_word_embeddings": False}, "needs `tie_word_embeddings` = True, the model has False"),
        ("llms-from-scratch", {"intermediate_size": 100}, "needs `intermediate_size` = 128, the model has 100"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tiny, tmp_path, to, changes, message):
    HFGPTForCausalLM(HFGPTConfig(**tiny, **changes)).save_pretrained(tmp_path / "model")

    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model", tmp_path / "out", to)

    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_nothing_is_overwritten_and_what_is_asked_must_exist(make_gpt2, tmp_path):
    file = save_in("llm.c", make_gpt2(), tmp_path)
    (tmp_path / "there").write_text("mine")

    with pytest.raises(FileExistsError, match="there exists"):
        convert(file, tmp_path / "there", "hfgpt")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        convert(file, tmp_path / "nowhere/out", "hfgpt")
    with pytest.raises(ValueError, match="`--to` must be one of"):
        convert(file, tmp_path / "out", "gguff")
    with pytest.raises(ValueError, match=r"is not 'nanogpt' but 'llm\.c'"):
        convert(file, tmp_path / "out", "hfgpt", source_format="nanogpt")
    with pytest.raises(ValueError, match="`--heads` and `--activation` are for files that do not say them"):
        convert(file, tmp_path / "out", "hfgpt", heads=2)

    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hfgpt", "llm.c", "openai"])
def test_what_is_written_may_be_read_by_whom_the_umask_lets(make_gpt2, tmp_path, to):
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    umask = os.umask(0o027)

    try:
        convert(tmp_path / "gpt2", tmp_path / "out", to)
    finally:
        os.umask(umask)

    written = tmp_path / "out"
    files = [each for each in (written, *written.rglob("*")) if each.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
    assert written.is_file() or written.stat().st_mode & 0o777 == 0o750


def test_the_command_prints_every_tensor_and_the_sum(make_gpt2, tmp_path, capsys):
    file = save_in("llm.c", make_gpt2(), tmp_path)

    app(
        ["convert", str(file), str(tmp_path / "gpt2"), "--to", "gpt2", "--dtype", "bf16", "--verify"],
        standalone_mode=False,
    )

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["wte", "384x32", "cut:", "64", "rows", "of", "padding"]
    assert any(line.split()[:3] == ["1.qkvw", "96x32", "split"] for line in lines)
    assert any(line.split()[1:] == ["32x96", "transposed,", "joined"] for line in lines)
    assert "changed:" in lines
    assert any(line.split() == ["model.embed_tokens.weight", "320x32", "rounded", "to", "bf16"] for line in lines)
    assert lines[-2].startswith("transformers' GPT-2 beside llm.c's mathematics, in float64: max |Δlogit| ")
    assert lines[-2].endswith("(measured, after a change that was asked for)")
    assert lines[-1] == "37,760 parameters from 29 tensors (llm.c) to 28; 37 filled, cut, dropped, rounded or exchanged"
    assert {each.dtype for each in load_file(tmp_path / "gpt2/model.safetensors").values()} == {torch.bfloat16}

    app(["convert", str(file), str(tmp_path / "own"), "--to", "hfgpt", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["source_format"] == "llm.c"


@pytest.mark.parametrize(
    ("tensor", "kind"), [("transformer.wpe.weight", "nanogpt"), ("pos_emb.weight", "llms-from-scratch")]
)
def test_a_missing_matrix_is_refused_by_name(make_gpt2, tmp_path, tensor, kind):
    file = save_in(kind, make_gpt2(), tmp_path)
    content = torch.load(file)
    del content.get("model", content)[tensor]
    torch.save(content, file)

    with pytest.raises(ValueError, match=rf"model\.pth: {tensor}: not in the file"):
        read(file)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"n_layer": 3}, {}, "the file says `n_layer` = 3, its tensors say 2"),
        ({"block_size": 65}, {}, "the file says `block_size` = 65, its tensors say 64"),
        ({"n_head": None}, {}, "the file's settings have no `n_head`; they have n_layer, n_head"),
        ({}, {"heads": 2}, "`--heads` is 2, the file says `n_head` = 4"),
    ],
)
def test_settings_that_contradict_the_tensors_or_the_user_are_refused(make_gpt2, tmp_path, changes, settings, message):
    file = save_in("nanogpt", make_gpt2(), tmp_path)
    content = torch.load(file)
    content["model_args"] |= changes
    torch.save(content, file)

    with pytest.raises(ValueError, match=rf"model\.pth: {message}"):
        read(file, **settings)


def test_tensors_that_are_views_and_lie_on_a_gpu_are_read(make_gpt2, tmp_path, ids, monkeypatch):
    gpt2 = make_gpt2(activation_function="gelu")
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
    tensors = {name: each.T.contiguous().T if each.ndim == 2 else each for name, each in as_linear(gpt2).items()}
    arguments = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64, "vocab_size": 320, "bias": True}
    torch.save({"model": tensors, "model_args": arguments}, tmp_path / "ckpt.pt")

    model, _, _, _ = read(tmp_path / "ckpt.pt")

    torch.testing.assert_close(model(ids).logits, gpt2(ids).logits, rtol=0, atol=2e-5)


def test_saving_refuses_what_is_there_and_leaves_nothing_behind(make_gpt2, tmp_path):
    model = load(save_in("llm.c", make_gpt2(), tmp_path))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    (tmp_path / "mine").write_text("mine")

    with pytest.raises(FileExistsError, match="mine exists"):
        save(model, tmp_path / "mine", "llm.c")
    with pytest.raises(ValueError, match="needs `activation_function` = 'gelu'"):
        save(model, tmp_path / "ckpt.pt", "nanogpt")
    for form in ("hfgpt", "llm.c"):
        save(model, tmp_path / form, form)

    assert sorted(each.name for each in tmp_path.iterdir()) == ["hfgpt", "llm.c", "mine", "model.bin"]
    assert (tmp_path / "mine").read_text() == "mine"
    assert all(torch.equal(model.state_dict()[name], each) for name, each in before.items())  # used up by nobody


@pytest.fixture
def nanogpt_with_characters(make_gpt2, tmp_path):
    characters = sorted("\n !abcdefghijklmnopqrstuvwxyz\u00e9\U0001f600")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters))}
    meta["stoi"] = {character: number for number, character in meta["itos"].items()}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    save_nanogpt(make_gpt2(activation_function="gelu", vocab_size=len(characters)), tmp_path / "ckpt.pt")
    return meta


def test_the_characters_of_a_nanogpt_become_its_tokenizer(nanogpt_with_characters, tmp_path, capsys):
    stoi = nanogpt_with_characters["stoi"]
    text = "a caf\u00e9!\n\n  of \U0001f600 "

    convert(tmp_path / "ckpt.pt", tmp_path / "out", "hfgpt", verify=True)

    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert encode_ids(tokenizer, [text]) == [[stoi[character] for character in text]]
    assert tokenizer.decode([stoi[character] for character in text]) == text
    with pytest.raises(ValueError, match="does not know 'Q'"):
        encode_ids(tokenizer, ["Q"])  # nanoGPT refuses it too
    words = ["generate", str(tmp_path / "out"), "abc", "--max-new-tokens", "5", "--temperature", "0"]
    app(words, standalone_mode=False)
    assert capsys.readouterr().out.startswith("abc")


def test_characters_that_are_a_malicious_pickle_are_refused_and_not_run(nanogpt_with_characters, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": Canary(tmp_path / "sang")}))

    with pytest.raises(ValueError, match=r"meta\.pkl: .*it wants to run"):
        convert(tmp_path / "ckpt.pt", tmp_path / "out", "hfgpt")

    assert not (tmp_path / "sang").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no vocabulary of nanoGPT's"),
        (pickle.dumps([1, 2]), "no vocabulary of nanoGPT's"),
        (pickle.dumps({"stoi": {"a": 0, "b": 2}}), "not one number, from 0 on, for each of 2 characters"),
        (pickle.dumps({"stoi": {"a": 0, "bc": 1}}), "not one number, from 0 on, for each of 2 characters"),
    ],
)
def test_characters_that_are_no_vocabulary_are_refused(nanogpt_with_characters, tmp_path, content, message):
    (tmp_path / "meta.pkl").write_bytes(content)

    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ckpt.pt", tmp_path / "out", "hfgpt")


def test_the_other_gelu_is_taken_if_asked_listed_and_measured(make_gpt2, tmp_path):
    save_nanogpt(make_gpt2(activation_function="gelu"), tmp_path / "ckpt.pt")

    result = convert(tmp_path / "ckpt.pt", tmp_path / "out", "llms-from-scratch", nearest=True, verify=True)

    assert [step.action for step in result.lossy] == ["exchanged: gelu for gelu_new"]
    assert 1e-5 < result.comparison.max_abs_diff < 1e-2  # the two differ by up to 4.7e-4 per unit
    assert result.comparison.tolerance is None
    with pytest.raises(ValueError, match=r"--strict: activation_function would be exchanged: gelu for gelu_new"):
        convert(tmp_path / "ckpt.pt", tmp_path / "strict", "llms-from-scratch", nearest=True, strict=True)
    unneeded = convert(tmp_path / "ckpt.pt", tmp_path / "same", "hfgpt", nearest=True, verify=True)
    assert unneeded.lossy == []
    assert unneeded.comparison.passed


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "gelu_fast"])
def test_another_name_of_gpt2s_activation_needs_no_other_mathematics(make_gpt2, tmp_path, name):
    make_gpt2(activation_function=name).save_pretrained(tmp_path / "gpt2")

    found = convert(tmp_path / "gpt2", tmp_path / "model.pth", "llms-from-scratch", strict=True, verify=True)

    assert found.comparison.max_abs_diff <= 1e-9
    assert found.comparison.passed


@pytest.mark.parametrize(("activation", "expected"), [(None, "gelu_new"), ("gelu", "gelu")])
def test_bare_tensors_of_nanogpts_names_are_mingpts_unless_told(make_gpt2, tmp_path, activation, expected):
    torch.save(as_linear(make_gpt2()), tmp_path / "model.pt")

    model, _, _, guesses = read(tmp_path / "model.pt", heads=4, activation=activation)

    assert model.config.activation_function == expected
    assert len(guesses) == (activation is None)


def test_rows_behind_the_vocabulary_of_llmc_must_be_padding(make_gpt2, tmp_path):
    file = save_in("llm.c", make_gpt2(), tmp_path)
    content = bytearray(file.read_bytes())
    content[12:16] = (319).to_bytes(4, "little")
    file.write_bytes(content)

    with pytest.raises(ValueError, match=r"`vocab_size` is 319, and wte has numbers after so many rows"):
        read(file)


def test_tensors_of_several_types_are_not_loaded_unless_told(make_gpt2, tmp_path):
    gpt2 = make_gpt2()
    gpt2.transformer.h.to(torch.bfloat16)
    gpt2.save_pretrained(tmp_path / "gpt2")

    with pytest.raises(ValueError, match="of several types"):
        load(tmp_path / "gpt2")
    assert load(tmp_path / "gpt2", dtype=torch.float32).dtype == torch.float32


def test_a_gpt2_folder_has_the_two_files_that_other_tools_read(make_gpt2, tokenizer, tmp_path):
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    text = "The file object: 한국어 \r\n  and so on<|endoftext|>"

    result = convert(tmp_path / "gpt2", tmp_path / "again", "gpt2")

    assert result.notes == []
    alone = join_model(tmp_path / "again/vocab.json", tmp_path / "again/merges.txt", 64)
    assert alone(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert alone.get_vocab() == tokenizer.get_vocab()
    assert load_tokenizer(str(tmp_path / "again"))(text)["input_ids"] == tokenizer(text)["input_ids"]
    with_pad = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    with_pad.add_special_tokens({"pad_token": "<pad>"})
    with_pad.save_pretrained(tmp_path / "pad")
    make_gpt2(vocab_size=321).save_pretrained(tmp_path / "pad")
    [note] = convert(tmp_path / "pad", tmp_path / "padded", "gpt2").notes
    assert note == "who reads vocab.json and merges.txt alone splits '<pad>', which tokenizer.json keeps whole."


def test_a_tokenizer_of_another_kind_goes_along_without_them_and_it_is_said(nanogpt_with_characters, tmp_path):
    taken, note = convert(tmp_path / "ckpt.pt", tmp_path / "out", "gpt2", activation="gelu").notes

    assert taken == f"the tokenizer is that of {tmp_path / 'meta.pkl'}."

    assert note.startswith("tokenizer.json alone, no vocab.json and merges.txt")
    assert {"vocab.json", "merges.txt"}.isdisjoint(file.name for file in (tmp_path / "out").iterdir())
    assert load_tokenizer(str(tmp_path / "out")).decode([3, 4]) == "ab"
