"""A whole adoption, and what the folder can do in the hands of transformers."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from manners import KINDS, STRANGERS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hfgpt.adopt.adopt import adopt


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A stranger's own checkpoint of a compiled model, every parameter drawn, and the module that it is of."""
    from hfgpt.adopt.constructor import find_constructor
    from hfgpt.adopt.folder import load_file, package_of
    from hfgpt.adopt.source import Program

    folder = tmp_path_factory.mktemp("stranger")
    _, values = KINDS["a dataclass"]
    program = Program(STRANGERS / "single_file.py", "GPT", {}, set())
    program.write(folder)
    with package_of(folder) as package:
        home = load_file(package, "single_file")
        constructor = find_constructor(home.GPT, home, values)
        module = constructor.build(home.GPT).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2, generator=generator)
    state = {f"_orig_mod.{name}": each for name, each in module.state_dict().items()}
    path = folder / "ckpt.pt"
    torch.save({"model": state, "optimizer": {}, "model_args": constructor.values, "config": {"lr": 1.0}}, path)
    return path, module


@pytest.fixture(scope="module")
def adopted(checkpoint, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adopted")
    tokenizer.save_pretrained(folder / "tokenizer")
    words = str(folder / "tokenizer")
    return adopt(f"{STRANGERS}/single_file.py:GPT", folder / "my-gpt", checkpoint=checkpoint[0], tokenizer=words)


@pytest.fixture
def model(adopted):
    return AutoModelForCausalLM.from_pretrained(adopted.folder, trust_remote_code=True).eval()


def own_logits(module, ids):
    return module(ids, ids)[0]


def test_the_folder_computes_what_the_class_computes_bit_for_bit(adopted, checkpoint, model):
    ids = torch.arange(24).view(2, 12)

    assert torch.equal(model(ids).logits, own_logits(checkpoint[1], ids))
    assert "bit-equal" in adopted.compared
    assert adopted.limit == 64
    assert not any(name.endswith("mask") for name in model.state_dict())


def test_constructor_arguments_are_fields_of_the_config_with_their_types(adopted, model):
    stored = json.loads((Path(adopted.folder) / "config.json").read_text())

    assert (stored["n_layer"], stored["bias"]) == (2, True)
    assert model.gpt.config.betas == (0.9, 0.99)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 16)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_tokenizer_goes_along_and_the_model_knows_its_end(adopted, model, tokenizer):
    loaded = AutoTokenizer.from_pretrained(adopted.folder)
    text = model.generate(**loaded("The", return_tensors="pt"), max_new_tokens=3, do_sample=False)

    assert loaded("The text")["input_ids"] == tokenizer("The text")["input_ids"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.decode(text[0]).startswith("The")


def test_padding_on_either_side_changes_nothing(model):
    ids = torch.arange(1, 6)[None]
    alone = model(ids).logits
    pads = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])

    left = model(torch.cat([pads, ids], 1), attention_mask=mask).logits[:, 3:]
    right = model(torch.cat([ids, pads], 1), attention_mask=mask.flip(1)).logits[:, :5]

    torch.testing.assert_close(left, alone, rtol=0, atol=1e-5)  # sums of another length
    torch.testing.assert_close(right, alone, rtol=0, atol=1e-5)


def test_a_padded_batch_generates_what_its_rows_generate_alone(model, checkpoint):
    long, short = torch.arange(1, 7), torch.arange(20, 23)
    batch = torch.stack([long, torch.cat([torch.zeros(3, dtype=torch.long), short])])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])

    together = model.generate(batch, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)

    for row, prompt in zip(together, (long, short), strict=True):
        ids = prompt[None]
        for _ in range(5):
            ids = torch.cat([ids, own_logits(checkpoint[1], ids)[:, -1:].argmax(-1)], 1)
        assert row[-5:].tolist() == ids[0, -5:].tolist()


@pytest.mark.parametrize("options", [{"use_cache": True}, {"num_beams": 2}, {"do_sample": True}])
def test_generate_reads_the_whole_prefix_whatever_is_asked(model, options):
    ids = torch.arange(1, 7)[None]
    torch.manual_seed(0)
    text = model.generate(ids, max_new_tokens=4, pad_token_id=0, **{"do_sample": False, **options})
    torch.manual_seed(0)
    again = model.generate(ids, max_new_tokens=4, pad_token_id=0, **{"do_sample": False, **options, "use_cache": False})

    assert text.shape == (1, 10)
    assert torch.equal(text, again)


def test_the_loss_is_next_token_and_honours_what_trainer_gives(model):
    ids = torch.arange(24).view(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    logits = model(ids).logits
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")

    losses = [
        model(ids, labels=labels).loss * (shifted != -100).sum(),
        model(ids, labels=labels, num_items_in_batch=7).loss * 7,
        model(ids, shift_labels=shifted, num_items_in_batch=torch.tensor(7)).loss * 7,
    ]

    for loss in losses:
        torch.testing.assert_close(loss, total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 65, dtype=torch.long)}, "65 tokens are more than the 64"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long), "position_ids": torch.zeros(1, 2)}, "position_ids"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 3)}, r"\(1, 2\)"),
        ({}, "give `input_ids`"),
    ],
)
def test_what_the_class_cannot_honour_is_refused(model, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model(**arguments)


def test_a_model_that_was_changed_is_saved_and_loaded_as_it_is(model, tmp_path):
    model.resize_token_embeddings(330, mean_resizing=False)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    ids = torch.tensor([[1, 325, 2]])

    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.vocab_size == 330


def test_in_half_precision_it_is_the_class_in_half_precision(adopted, checkpoint):
    import copy

    half = AutoModelForCausalLM.from_pretrained(adopted.folder, trust_remote_code=True, dtype=torch.bfloat16)
    own = copy.deepcopy(checkpoint[1]).to(torch.bfloat16)
    ids = torch.arange(12)[None]

    assert torch.equal(half(ids).logits, own_logits(own, ids))


def test_from_config_draws_weights_as_the_constructor_does(adopted, checkpoint):
    config = AutoConfig.from_pretrained(adopted.folder, trust_remote_code=True)
    torch.manual_seed(3)
    drawn = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    torch.manual_seed(3)
    own = type(drawn.gpt)(drawn.gpt.config)

    assert all(torch.equal(a, b) for a, b in zip(drawn.parameters(), own.parameters(), strict=True))


def test_an_error_leaves_nothing_behind(tmp_path, checkpoint):
    (tmp_path / "config.yaml").write_text("n_layer: 3\nn_embd: 16\nn_head: 2\n")

    with pytest.raises(ValueError, match="`n_layer` is 3 in the config, and 2 in"):
        adopt(f"{STRANGERS}/single_file.py:GPT", tmp_path / "new", tmp_path / "config.yaml", checkpoint[0])

    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="exists"):
        adopt(f"{STRANGERS}/single_file.py:GPT", tmp_path)


def test_what_was_adopted_leaves_no_module_of_the_stranger_behind(adopted):
    assert not any(name.startswith("hfgpt_adopted") for name in sys.modules)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a dataclass"])
def test_every_manner_of_writing_a_gpt_is_adopted(tmp_path, kind):
    what, values = KINDS[kind]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))

    found = adopt(f"{STRANGERS}/{what}", tmp_path / "new", tmp_path / "config.yaml")

    assert "bit-equal" in found.compared
    assert ("einops" in found.requirements) == ("package" in kind)
    assert not (STRANGERS / "it_trained").exists()
