import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from hfgpt import HFGPTConfig, HFGPTForCausalLM, HFGPTModel
from hfgpt.arguments import CACHE
from hfgpt.weights.formats.gpt2 import entries
from hfgpt.weights.table import export_tensors

IGNORED = -100


def random_ids(rows, length, seed=0):
    return torch.randint(320, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ids():
    return random_ids(3, 20)


@pytest.fixture
def model(make_twins):
    """An hfgpt model with every parameter drawn, in eval mode."""
    return make_twins()[1]


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_keys_and_values_are_kept_outside_of_training_only(model, ids):
    assert model(ids)[CACHE].get_seq_length() == 20
    assert CACHE not in model(ids, use_cache=False)
    model.train()
    assert CACHE not in model(ids)
    assert model(ids, use_cache=True)[CACHE].get_seq_length() == 20


def test_only_the_logits_asked_for_are_made(model, ids):
    everything = model(ids).logits

    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, everything[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, everything[:, [0, 5]])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_equal_gpt2s(make_twins, ids, attention):
    gpt2, model = make_twins(attention)

    for candidate in (gpt2, model):
        candidate(ids, labels=ids).loss.backward()

    mine, _ = export_tensors(entries(num_layers=2, tied=True), gradients(model))
    theirs = gradients(gpt2)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


def test_loss_is_the_mean_over_every_target(model, ids):
    labels = ids.clone()
    labels[0, :5] = labels[1, 9] = labels[2] = IGNORED

    loss = model(ids, labels=labels).loss

    log_probabilities = model(ids).logits.log_softmax(dim=-1)
    targets = [(row, place) for row in range(3) for place in range(19) if labels[row, place + 1] != IGNORED]
    by_hand = -torch.stack([log_probabilities[row, place, ids[row, place + 1]] for row, place in targets]).mean()
    assert len(targets) == 2 * 19 - 4 - 1
    torch.testing.assert_close(loss, by_hand)


def test_every_token_of_a_block_is_scored_when_targets_are_given(model):
    rows = random_ids(2, 21)

    loss = model(rows[:, :-1], labels=rows[:, :-1], shift_labels=rows[:, 1:]).loss

    one_pass = model(rows[:, :-1]).logits.flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(one_pass, rows[:, 1:].flatten()))
    assert torch.equal(model(rows[:, :-1], shift_labels=rows[:, 1:]).loss, loss)


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["int", "tensor"])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_micro_batches_divided_by_the_same_number_add_up_to_the_whole(model, ids, items, skip_logits):
    labels = ids.clone()
    labels[0, :15] = IGNORED

    whole = model(ids, labels=labels, num_items_in_batch=items, skip_logits=skip_logits).loss
    parts = [
        model(ids[[row]], labels=labels[[row]], num_items_in_batch=items, skip_logits=skip_logits).loss
        for row in range(3)
    ]

    torch.testing.assert_close(whole, sum(parts))
    torch.testing.assert_close(whole * 7, model(ids, labels=labels).loss * (3 * 19 - 14))


@pytest.mark.parametrize("how", ["labels", "shift_labels", "num_items_in_batch", "in training"])
def test_skipping_the_logits_changes_neither_loss_nor_gradients(model, ids, how):
    labels = ids.clone()
    labels[1] = IGNORED
    arguments = {"labels": labels, "num_items_in_batch": 11 if how == "num_items_in_batch" else None}
    if how == "shift_labels":
        arguments["shift_labels"] = labels.flip(1)
    model.train(how == "in training")
    losses, grads = [], []

    for skip_logits in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        output = model(ids, **arguments, skip_logits=skip_logits)
        output.loss.backward()
        assert (output.logits is None) == skip_logits
        losses.append(output.loss)
        grads.append(gradients(model))

    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_gradient_checkpointing_gives_the_very_same_gradients(model, ids):
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        torch.manual_seed(0)  # dropout is on
        model(ids, labels=ids, use_cache=False).loss.backward()
        results.append(gradients(model))

    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


def test_one_batch_can_be_learnt_by_heart(tiny):
    torch.manual_seed(0)
    model = HFGPTForCausalLM(HFGPTConfig(**tiny)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = random_ids(2, 16)

    for _ in range(80):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    assert model(batch, labels=batch).loss < 0.05
    assert torch.equal(model.generate(batch[:, :1], max_new_tokens=15, do_sample=False), batch)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same_model(make_twins, tmp_path, tied, shard_size, dtype):
    model = make_twins(tie_word_embeddings=tied)[1].to(dtype)

    model.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)

    assert (len([*(tmp_path / "saved").glob("*.safetensors")]) > 1) == (shard_size == "20KB")
    for again in (
        HFGPTForCausalLM.from_pretrained(tmp_path / "saved"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
    ):
        assert type(again) is HFGPTForCausalLM
        assert again.dtype == dtype
        assert again.config.tie_word_embeddings == tied
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    base = AutoModel.from_pretrained(tmp_path / "saved")
    assert type(base) is HFGPTModel
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor), name


def test_what_is_on_disk_is_what_is_in_memory(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")

    on_disk = load_file(tmp_path / "saved/model.safetensors")
    assert on_disk.keys() == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(on_disk[name], parameter) for name, parameter in model.named_parameters())
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("hfgpt", ["HFGPTForCausalLM"])


def test_a_model_made_from_a_gpt2_config_saves_as_hfgpts_own(random_gpt2, tmp_path):
    random_gpt2.config.save_pretrained(tmp_path / "gpt2")
    model = HFGPTForCausalLM(HFGPTConfig.from_pretrained(tmp_path / "gpt2"))

    model.save_pretrained(tmp_path / "own")

    assert load_file(tmp_path / "own/model.safetensors").keys() == {name for name, _ in model.named_parameters()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert type(again) is HFGPTForCausalLM
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "hfgpt"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 1}, r"layers\.1\..* in the file, not in the model"),
        ({"n_layer": 3}, r"layers\.2\..* not in the file"),
        ({"n_embd": 64}, r"embed_positions\.weight: in the file \(64, 32\), in the model \(64, 64\) \(and 35 more\)"),
        ({"n_positions": 32}, r"embed_positions\.weight: in the file \(64, 32\), in the model \(32, 32\)"),
        ({"vocab_size": 300}, r"embed_tokens\.weight: in the file \(320, 32\), in the model \(300, 32\)"),
    ],
    ids=["fewer layers", "more layers", "wider", "fewer positions", "fewer tokens"],
)
def test_another_shape_than_the_files_is_refused(make_twins, tmp_path, family, changes, message):
    _, model = make_twins()
    model.save_pretrained(tmp_path / "hfgpt")
    config = HFGPTConfig.from_pretrained(tmp_path / family, **changes)

    with pytest.raises(ValueError, match=message):
        HFGPTForCausalLM.from_pretrained(tmp_path / family, config=config)
    with pytest.raises(ValueError, match=message):
        HFGPTForCausalLM.from_pretrained(tmp_path / family, **changes)
