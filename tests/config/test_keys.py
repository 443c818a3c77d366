"""Which keys a recipe has, and what an unknown one is answered with."""

from dataclasses import asdict

import pytest

from hfgpt import HFGPTConfig
from hfgpt.config.architectures import FIELD_TYPES
from hfgpt.config.keys import ANSWERS, ELSEWHERE, MAIN_KEYS, model_aliases, model_fields, recipe_keys
from hfgpt.config.loading import flatten, load_config
from hfgpt.config.schema import NANOCHAT_FIELDS, RunConfig


def refusal(*overrides):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what the callers look at
        load_config("demo", overrides)
    return str(caught.value)


def test_the_keys_are_those_of_a_recipe_and_of_a_model():
    keys = recipe_keys()

    assert {key for key in keys if not key.startswith("model.")} == {*flatten(asdict(RunConfig()))} - {"model"}
    fields = ["architecture", *HFGPTConfig.__annotations__, *NANOCHAT_FIELDS]
    assert [key.removeprefix("model.") for key in keys if key.startswith("model.")] == fields
    assert {*fields} - {"architecture"} == {name for types in FIELD_TYPES.values() for name in types}
    assert model_fields() == [*HFGPTConfig.__annotations__]
    assert model_aliases() == [*HFGPTConfig.attribute_map]


def test_every_answer_leads_to_a_key_that_exists_and_no_key_is_taken_for_a_word_of_others():
    keys = {*recipe_keys(with_aliases=True)}

    assert {key for answer in [*ELSEWHERE.values(), *MAIN_KEYS.values()] for key in answer.split()} <= keys
    assert not {key.rpartition(".")[2] for key in keys} & ({*ELSEWHERE} | {*ANSWERS}) - {"optim"}


NEAREST = {
    # Misspelt.
    "optim.learning_rat=1": "optim.learning_rate=1",
    "trian.max_steps=1": "train.max_steps=1",
    "train.epoch=1": "train.epochs=1",
    "train.max-steps=5": "train.max_steps=5",
    "Train.Max_Steps=5": "train.max_steps=5",
    "model.n_layers=6": "model.n_layer=6",
    "model.hiden_size=6": "model.hidden_size=6",
    "data.file=my.txt": "data.files=my.txt",
    # Without their section, or in another.
    "max_steps=5": "train.max_steps=5",
    "epochs=3": "train.epochs=3",
    "batch_size=4": "train.batch_size=4",
    "n_layer=2": "model.n_layer=2",
    "optim.max_steps=5": "train.max_steps=5",
    "train.seed=5": "seed=5",
    "vocab_size=300": "tokenizer.vocab_size=300",
    "prompt=Once upon": "'sample.prompt=Once upon'",
    "prompt=옛날 옛적에": "'sample.prompt=옛날 옛적에'",
    # nanoGPT.
    "max_iters=10": "train.max_steps=10",
    "eval_interval=5": "train.eval_every=5",
    "out_dir=out/x": "output_dir=out/x",
    "grad_clip=1.0": "optim.max_grad_norm=1.0",
    "warmup_iters=5": "optim.warmup_steps=5",
    "dtype=bf16": "train.precision=bf16",
    # Trainer.
    "num_train_epochs=2": "train.epochs=2",
    "per_device_train_batch_size=2": "train.batch_size=2",
    "lr_scheduler_type=cosine": "optim.schedule=cosine",
    "save_total_limit=1": "train.keep_last=1",
    "logging_steps=1": "train.log_every=1",
    "model_name_or_path=gpt2": "init_from=gpt2",
    # litgpt.
    "train.micro_batch_size=4": "train.batch_size=4",
    "train.lr_warmup_steps=4": "optim.warmup_steps=4",
    "eval.interval=4": "train.eval_every=4",
    "train.max_norm=1": "optim.max_grad_norm=1",
    "optimizer.lr=1": "optim.learning_rate=1",
    # The books.
    "optim.lr=1": "optim.learning_rate=1",
    "lr=1e-3": "optim.learning_rate=1e-3",
    "n_layers=2": "model.n_layer=2",
    "emb_dim=64": "model.n_embd=64",
    "context_length=64": "data.block_size=64` or `model.n_positions=64",
    # A section that is given a value.
    "tokenizer=gpt2": "tokenizer.name=gpt2",
    "data=my.txt": "data.files=my.txt",
}


@pytest.mark.parametrize("override", NEAREST, ids=ascii)
def test_an_unknown_key_is_answered_with_the_right_one_as_it_is_typed(override):
    message = refusal(override)

    assert f"`{override.partition('=')[0]}`" in message
    assert message.endswith(f"Did you mean `{NEAREST[override]}`?")


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("dropout=0.1", "`model.resid_pdrop`, `model.embd_pdrop`, `model.attn_pdrop`"),
        ("bf16=true", "`train.precision=bf16`"),
        ("beta2=0.95", "`'optim.betas=[0.9,0.95]'`"),
        ("report_to=wandb", "train.trackers="),
        ("evaluation_strategy=steps", "`train.eval_every`"),
        ("warmup_ratio=0.1", "`optim.warmup_steps`"),
        ("train.max_tokens=1000", "`train.max_steps`"),
        ("device=cuda", "accelerate launch"),
        ("resume=true", "`--resume`"),
    ],
)
def test_a_key_of_another_program_that_has_no_counterpart_is_answered_with_what_to_do(override, answer):
    assert answer in refusal(override)


def test_an_unknown_key_without_a_near_one_is_answered_with_all_there_are():
    assert refusal("sample.xyzzy=1") == (
        "unknown key `sample.xyzzy`. `sample` has prompt, max_new_tokens, temperature, top_k."
    )
    assert "A recipe has output_dir, loop, seed," in refusal("xyzzy=1")


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("max_steps", "Did you mean `train.max_steps=VALUE`?"),
        ("train.max_steps:5", "Did you mean `train.max_steps=5`?"),
        ("train.max_steps=", "`train.max_steps`"),
        ("LICENSE", "Did you mean `data.files=LICENSE`?"),
        ("5", "Write `key.path=value`, without spaces, such as `train.max_steps=100`."),
        ("", "Write `key.path=value`, without spaces, such as `train.max_steps=100`."),
    ],
)
def test_a_word_that_is_no_override_is_answered_with_how_one_is_written(word, answer, tmp_path, monkeypatch):
    (tmp_path / "LICENSE").touch()
    monkeypatch.chdir(tmp_path)

    assert answer in refusal(word)


def test_a_long_value_is_not_repeated():
    assert refusal("prompt=" + "long " * 1000).endswith("Did you mean `sample.prompt=VALUE`?")
