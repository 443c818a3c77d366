"""A recipe: which layer wins, what text means, and which options are refused with which words."""

import dataclasses
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfgpt.config.loading import config_yaml, load_config, value_origins
from hfgpt.config.recipes import find_recipe
from hfgpt.config.schema import RunConfig
from hfgpt.config.validation import check_model

BASE = """\
data: {source: pydoc}
train: {max_steps: 100}
"""
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

# Every string that a shell can hand over in UTF-8.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
paths = text.filter(lambda name: name[:1] != "~")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


def load(recipe, *overrides):
    return load_config(recipe(), overrides)


def refusal(recipe, *overrides):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what the callers look at
        load_config(recipe(), overrides)
    return str(caught.value)


def test_defaults_give_way_to_the_recipe_and_the_recipe_to_overrides(recipe):
    path = recipe(BASE + "optim: {learning_rate: 0.5, weight_decay: 0.25}\n")

    config = load_config(path, ["optim.learning_rate=0.75"])

    assert config.optim.learning_rate == 0.75
    assert config.optim.weight_decay == 0.25
    assert config.optim.warmup_steps == RunConfig().optim.warmup_steps


def test_the_last_of_two_overrides_wins(recipe):
    assert load(recipe, "seed=1", "seed=2").seed == 2


def test_an_alias_and_its_field_are_one_option_between_layers(recipe):
    path = recipe(BASE + "model: {hidden_size: 192, n_layer: 2}\n")

    config = load_config(path, ["model.n_embd=252", "model.num_hidden_layers=3", "model.n_head=2", "model.n_head=4"])

    assert config.model == {"hidden_size": 252, "num_hidden_layers": 3, "num_attention_heads": 4}


def test_an_alias_that_contradicts_its_field_within_a_layer_is_refused(recipe):
    path = recipe(BASE + "model: {hidden_size: 192, n_embd: 256}\n")

    with pytest.raises(ValueError, match=r"`hidden_size` \(192\) and `n_embd` \(256\) are the same field"):
        load_config(path)


def test_a_whole_section_may_be_given_at_once(recipe):
    config = load(recipe, "optim={learning_rate: 1e-2, warmup_steps: 1e1}", "model={n_layer: 2, n_embd: 24, n_head: 3}")

    assert (config.optim.learning_rate, config.optim.warmup_steps) == (0.01, 10)
    assert config.model == {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3}


@pytest.mark.parametrize("value", ["1e-3", "0.001", "1.0e-3"])
@pytest.mark.parametrize("where", ["recipe", "override"])
def test_an_exponent_makes_a_number(recipe, value, where):
    overrides = [f"optim.learning_rate={value}"]
    content = BASE

    if where == "recipe":
        overrides, content = [], BASE + f"optim: {{learning_rate: {value}}}\n"

    assert load_config(recipe(content), overrides).optim.learning_rate == 1e-3


@pytest.mark.parametrize("key", ["train.max_steps", "train.eval_every", "train.save_every", "data.num_proc", "seed"])
def test_1e3_is_a_whole_number_where_one_is_meant(recipe, key):
    config = load(recipe, f"{key}=1e3", "optim.learning_rate=1e3")

    value = config
    for name in key.split("."):
        value = getattr(value, name)
    assert (value, type(value)) == (1000, int)
    assert type(config.optim.learning_rate) is float


def test_1e3_is_a_whole_number_in_the_model_too(recipe):
    model = load(recipe, "model.n_positions=1e3", "model.n_inner=1e3", "model.resid_pdrop=1e0").model

    assert (model["max_position_embeddings"], type(model["max_position_embeddings"])) == (1000, int)
    assert type(model["intermediate_size"]) is int
    assert type(model["resid_pdrop"]) is float


def test_files_are_one_path_or_a_list(recipe):
    path = recipe("train: {max_steps: 100}\n")

    assert load_config(path, ["data.files=a b.txt"]).data.files == "a b.txt"
    assert load_config(path, ["data.files=[a.txt, b.txt]"]).data.files == ["a.txt", "b.txt"]


VERBATIM = [
    "Hello: world",
    "${x}",
    "${",
    "\\${x}",
    "\\\\${x}",
    "${oc.env:HOME}",
    "$.?.",
    "???",
    "null",
    "true",
    "1e3",
    "12:30",
    "2026-01-01",
    "'a' \"b\"",
    "a\\b\\\\",
    "[1, {a: 2}",
    " spaces at both ends ",
    "a=b",
    "# no comment",
    "",
    "two\nlines\r\n\tand\0more",
    "\x85\u2028\ufeff",
    "한국어 \U0001f600",
]


@pytest.mark.parametrize("value", VERBATIM)
@pytest.mark.parametrize("key", ["sample.prompt", "data.text_column"])
def test_a_text_field_takes_what_follows_the_equals_sign_as_it_is(recipe, key, value):
    section, name = key.split(".")

    config = load(recipe, f"{key}={value}")

    assert getattr(getattr(config, section), name) == value


@settings(deadline=None, max_examples=25)
@given(prompt=text | st.sampled_from(VERBATIM), column=text, name=paths.filter(bool))
@example(prompt="???", column="${", name="1e5")
def test_any_text_survives_override_saving_and_loading(folder, prompt, column, name):
    path = folder / "run.yaml"

    config = load_config("demo", [f"sample.prompt={prompt}", f"data.text_column={column}", f"output_dir={name}"])
    path.write_text(config_yaml(config), encoding="utf-8")

    assert (config.sample.prompt, config.data.text_column, config.output_dir) == (prompt, column, name)
    assert load_config(path) == config


@settings(deadline=None, max_examples=20)
@given(
    files=st.lists(paths, min_size=1, max_size=3),
    rate=st.floats(1e-30, 1e30),
    activation=text,
)
def test_any_value_survives_saving_and_loading(folder, files, rate, activation):
    defaults = RunConfig()
    config = check_model(
        dataclasses.replace(
            defaults,
            data=dataclasses.replace(defaults.data, files=files),
            optim=dataclasses.replace(defaults.optim, learning_rate=rate),
            train=dataclasses.replace(defaults.train, max_steps=100),
            model={"activation_function": activation},
        )
    )

    (folder / "run.yaml").write_text(config_yaml(config), encoding="utf-8")

    assert load_config(folder / "run.yaml") == config


@pytest.mark.parametrize("value", ["null", ""])
@pytest.mark.parametrize("key", ["init_from", "tokenizer.name", "data.validation_split"])
def test_a_text_that_may_be_missing_reads_null_as_none(recipe, key, value):
    config = load(recipe, f"{key}={value}")

    assert asdict(config) == asdict(load(recipe))


def test_a_text_that_may_be_missing_is_taken_as_it_is_otherwise(recipe):
    assert load(recipe, "tokenizer.name=my: ${folder}").tokenizer.name == "my: ${folder}"
    assert load(recipe, "init_from=???").init_from == "???"


def test_interpolations_in_a_recipe_are_text(recipe):
    path = recipe(BASE + "output_dir: ${oc.env:HOME}\nsample:\n  prompt: ???\n")

    config = load_config(path)

    assert (config.output_dir, config.sample.prompt) == ("${oc.env:HOME}", "???")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {learning_rat: 1}", "unknown key `optim.learning_rat`. Did you mean `optim: {learning_rate: 1}`?"),
        ("optim.learning_rate: 1", "unknown key `optim.learning_rate`. Did you mean `optim: {learning_rate: 1}`?"),
        ("optim: 3", "`optim` must hold `key: value` lines, got 3. Its keys are name,"),
        ("optim:", "`optim` must hold `key: value` lines, got None."),
        ("seed: {a: 1}", "`seed` must be a whole number, got {'a': 1}."),
        ("model: [n_layer]", "`model` must hold `key: value` lines"),
        ("model: {n_layers: 6}", "Did you mean `model: {n_layer: 6}`?"),
        ('prompt: "He said: so"', "Did you mean `sample: {prompt: 'He said: so'}`?"),
        ("- a list", "it must hold `key: value` lines."),
        ("just text", "unknown key `just text`. A recipe has output_dir, loop,"),
        ("3", "is not a recipe: Invalid loaded object type: int"),
        ("a: [", "is not a recipe: while parsing"),
        ("seed: 1\nseed: 2", "found duplicate key seed"),
    ],
)
def test_a_recipe_that_is_none_is_refused(recipe, content, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_config(recipe(content))

    assert message in str(caught.value)


def test_a_recipe_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ValueError, match=r"model\.yaml is not a recipe: 'utf-8' codec can't decode"):
        load_config(tmp_path / "model.yaml")


def test_a_recipe_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe 'dmeo': it is neither a file nor the name of a recipe"):
        load_config("dmeo")
    with pytest.raises(ValueError, match="no recipe"):
        load_config(tmp_path)


REFUSALS = [
    # Choices.
    ("loop=trainr", "`loop` must be one of ['accelerate', 'trainer'], got 'trainr'."),
    ("train.precision=no", "`train.precision` must be one of ['fp32', 'bf16', 'fp16'], got 'no'."),
    ("data.packing=best-fit", "`data.packing` must be one of ['contiguous', 'isolated', 'padded'], got 'best-fit'."),
    ("data.streaming=true", "`data.streaming` has no effect on `data.source=pydoc`"),
    # Ranges.
    ("train.max_steps=0", "`train.max_steps` must be at least 1, got 0."),
    ("train.batch_size=0", "`train.batch_size` must be at least 1, got 0."),
    ("train.gradient_accumulation_steps=0", "`train.gradient_accumulation_steps` must be at least 1, got 0."),
    ("train.log_every=0", "`train.log_every` must be at least 1, got 0."),
    ("train.eval_rows=-1", "`train.eval_rows` must be at least 0, got -1."),
    ("train.keep_last=0", "`train.keep_last` must be at least 1, got 0."),
    ("train.eval_every=0", "`train.eval_every` must be a number of steps, at least 1, or 'epoch', got 0."),
    ("train.eval_every=epochs", "`train.eval_every` must be a number of steps, at least 1, or 'epoch', got 'epochs'."),
    ("train.eval_every=true", "`train.eval_every` must be a number of steps, at least 1, or 'epoch', got True."),
    ("train.eval_every=null", "`train.eval_every` must be a number of steps, at least 1, or 'epoch', got None."),
    ("train.save_every=-1", "`train.save_every` must be a number of steps, at least 0, or 'epoch', got -1."),
    ("train.save_every=1.5", "`train.save_every` must be a number of steps, at least 0, or 'epoch', got 1.5."),
    ("data.block_size=0", "`data.block_size` must be at least 1, got 0."),
    ("data.num_proc=0", "`data.num_proc` must be at least 1, got 0."),
    ("data.separator=none", "`data.separator` must be 'eos' or null, got 'none'."),
    ("data.stride=0", "`data.stride` must be at least 1, got 0."),
    ("data.stride=129", "`data.stride` (129) is longer than `data.block_size` (128)"),
    ("data.validation_fraction=1", "`data.validation_fraction` must be between 0 and 1, got 1.0."),
    ("data.validation_fraction=nan", "`data.validation_fraction` must be between 0 and 1, got nan."),
    ("tokenizer.vocab_size=256", "`tokenizer.vocab_size` must be at least 257, got 256."),
    ("optim.learning_rate=0", "`optim.learning_rate` must be finite and above 0, got 0.0."),
    ("optim.learning_rate=nan", "`optim.learning_rate` must be finite and above 0, got nan."),
    ("optim.learning_rate=inf", "`optim.learning_rate` must be finite and above 0, got inf."),
    ("optim.weight_decay=-0.1", "`optim.weight_decay` must be at least 0, got -0.1."),
    ("optim.weight_decay=inf", "`optim.weight_decay` must be finite, got inf."),
    ("optim.max_grad_norm=-1", "`optim.max_grad_norm` must be at least 0, got -1.0."),
    ("optim.max_grad_norm=nan", "`optim.max_grad_norm` must be at least 0, got nan."),
    ("optim.betas=[0.9]", "`optim.betas` must be two numbers in [0, 1), got [0.9]."),
    ("optim.betas=[0.9, 1]", "`optim.betas` must be two numbers in [0, 1), got [0.9, 1.0]."),
    ("optim.warmup_steps=-1", "`optim.warmup_steps` must be at least 0, got -1."),
    ("optim.warmup_steps=101", "`optim.warmup_steps` (101) is longer than `train.max_steps` (100)."),
    ("sample.max_new_tokens=-1", "`sample.max_new_tokens` must be at least 0, got -1."),
    ("sample.temperature=-1", "`sample.temperature` must be at least 0, got -1.0."),
    ("sample.temperature=inf", "`sample.temperature` must be finite, got inf."),
    ("sample.top_k=-1", "`sample.top_k` must be at least 0, got -1."),
    ("seed=-1", "`seed` must be at least 0, got -1."),
    ("seed=4294967295", "`seed` must be at most 4294901760, got 4294967295."),
    ("output_dir=", "`output_dir` is empty."),
    # Types.
    ("train.max_steps=ten", "`train.max_steps` must be a whole number or null, got 'ten'."),
    ("train.max_steps=1.5", "`train.max_steps` must be a whole number or null, got 1.5."),
    ("train.max_steps=true", "`train.max_steps` must be a whole number or null, got True."),
    ("train.max_steps=???", "`train.max_steps` must be a whole number or null, got '???'."),
    ("train.max_steps={a: 1}", "`train.max_steps` must be a whole number or null, got {'a': 1}."),
    ("train.batch_size=null", "`train.batch_size` must be a whole number, got None."),
    ("seed=1.5", "`seed` must be a whole number, got 1.5."),
    ("optim.learning_rate=${x}", "`optim.learning_rate` must be a number, got '${x}'."),
    ("optim.learning_rate=[1]", "`optim.learning_rate` must be a number, got [1]."),
    ("data.streaming=maybe", "`data.streaming` must be true or false, got 'maybe'."),
    ("optim.betas=0.9", "`optim.betas` must be a list of numbers, such as [0.9, 0.95], got 0.9."),
    ("optim.betas=[a, b]", "`optim.betas` must be a list of numbers, such as [0.9, 0.95], got ['a', 'b']."),
    ("train.trackers=wandb", "`train.trackers` must be a list of texts, such as [tensorboard], got 'wandb'."),
    ("model.n_embd=[", "`model.n_embd`: '[' is not YAML."),
    ("model=null", "`model` must hold `key: value` lines, got None."),
    # The model.
    ("model.n_head=5", "`hidden_size` (`n_embd`, 768) is not divisible by `num_attention_heads` (`n_head`, 5)."),
    ("model.n_positions=64", "`data.block_size` (128) is longer than the model's `n_positions` (64)."),
    ("model.n_layer=0", "`num_hidden_layers` must be at least 1, got 0."),
    ("model.resid_pdrop=1.5", "`resid_pdrop` must be between 0 and 1, got 1.5."),
    ("model.n_embd=wide", "`model.hidden_size` must be a whole number, got 'wide'."),
    ("model.n_layer=1.5", "`model.num_hidden_layers` must be a whole number, got 1.5."),
    ("model.n_layer=true", "`model.num_hidden_layers` must be a whole number, got True."),
    ("model.n_inner=wide", "`model.intermediate_size` must be a whole number or null, got 'wide'."),
    ("model.resid_pdrop=some", "`model.resid_pdrop` must be a number, got 'some'."),
    ("model.layer_norm_epsilon=null", "`model.layer_norm_epsilon` must be a number, got None."),
    ("model.use_cache=maybe", "`model.use_cache` must be true or false, got 'maybe'."),
    ("model.activation_function=3", "`model.activation_function` must be a text, got 3."),
    ("model.vocab_size=500", "`model.vocab_size` (500) comes from the tokenizer"),
    ("model.eos_token_id=7", "`model.eos_token_id` (7) comes from the tokenizer"),
    # One or the other.
    ("data={source: pydoc, files: a.txt}", "give `data.source` or `data.files`, one of them: got 'pydoc' and 'a.txt'."),
    ("data.source=null", "give `data.source` or `data.files`, one of them: got None and None."),
    ("train.epochs=2", "give `train.max_steps` or `train.epochs`, one of them: got 100 and 2."),
    ("train.max_steps=null", "give `train.max_steps` or `train.epochs`, one of them: got None and None."),
]


@pytest.mark.parametrize(("override", "message"), REFUSALS, ids=[override for override, _ in REFUSALS])
def test_what_no_run_can_be_is_refused_with_the_option_and_its_value(recipe, override, message):
    found = refusal(recipe, override)

    assert message in found
    assert "\n" not in found


WITHOUT_EFFECT = [
    (["data.separator=null", "data.packing=padded"], "`data.packing` ('padded') keeps documents apart"),
    (["data.separator=null", "data.packing=isolated"], "`data.packing` ('isolated') keeps documents apart"),
    (["data.name=x"], "`data.name` ('x') has no effect: `data.source` is no Hub data set."),
    (["data.split=test"], "`data.split` ('test') has no effect: `data.source` is no Hub data set."),
    (["data.validation_split=test"], "`data.validation_split` ('test') has no effect: `data.source` is no Hub"),
    (["data.validation_files=v.txt"], "`data.validation_files` ('v.txt') has no effect: `data.files` is not given."),
    (
        ["data.source=null", "data.files=a.txt", "data.validation_files=v.txt", "data.validation_fraction=0.2"],
        "`data.validation_fraction` (0.2) has no effect: the validation text is named.",
    ),
    (["init_from=gpt2", "model.n_layer=2"], "`model.num_hidden_layers` has no effect: `init_from` ('gpt2') fixes"),
    (["tokenizer.name=gpt2", "tokenizer.vocab_size=500"], "`tokenizer.vocab_size` (500) has no effect: the tokenizer"),
    (["init_from=gpt2", "tokenizer.vocab_size=500"], "`tokenizer.vocab_size` (500) has no effect: the tokenizer of"),
]


@pytest.mark.parametrize(("overrides", "message"), WITHOUT_EFFECT, ids=[" ".join(words) for words, _ in WITHOUT_EFFECT])
def test_an_option_without_effect_is_refused(recipe, overrides, message):
    assert message in refusal(recipe, *overrides)


def test_dropouts_may_be_set_for_a_model_that_exists(recipe):
    config = load(recipe, "init_from=gpt2", "model.resid_pdrop=0.0", "model.attn_pdrop=0.2")

    assert config.model == {"resid_pdrop": 0.0, "attn_pdrop": 0.2}


def test_a_hub_data_set_may_name_its_configuration_and_splits(recipe):
    config = load(recipe, "data.source=wikitext", "data.name=wikitext-2-raw-v1", "data.validation_split=validation")

    assert (config.data.name, config.data.validation_split) == ("wikitext-2-raw-v1", "validation")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_saved_recipe_loads_equal(path, tmp_path):
    config = load_config(path)

    (tmp_path / "run.yaml").write_text(config_yaml(config), encoding="utf-8")

    assert load_config(tmp_path / "run.yaml") == config


def test_saved_values_stand_in_the_order_of_the_code_and_are_all_there(recipe):
    config = load(recipe)

    lines = config_yaml(config).splitlines()

    assert [line.split(":")[0] for line in lines if line[0].isalpha()] == [
        field.name for field in dataclasses.fields(RunConfig)
    ]
    assert "  learning_rate: 0.001" in lines
    assert "  prompt: The" in lines


def test_a_recipe_is_found_by_path_before_it_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    brought_along = find_recipe("demo")

    (tmp_path / "demo").write_text(BASE)

    assert brought_along.name == "demo.yaml"
    assert find_recipe("demo") == Path("demo")


@pytest.mark.parametrize(
    ("recipe_text", "overrides", "warmup_steps"),
    [
        ("train: {max_steps: 300}\noptim: {warmup_steps: 100}\n", ["train.max_steps=40"], 4),
        ("train: {max_steps: 300}\noptim: {warmup_steps: 100}\n", ["train.max_steps=3"], 0),
        ("train: {max_steps: 300}\noptim: {warmup_steps: 100}\n", ["train.max_steps=99", "train.max_steps=30"], 3),
        ("train: {epochs: 1}\noptim: {warmup_steps: 100}\n", ["train.epochs=null", "train={max_steps: 20}"], 2),
        ("train: {max_steps: 30}\n", [], 3),  # the default of 50
        ("train: {max_steps: 300}\n", ["train.max_steps=20"], 2),
        ("train: {max_steps: 300}\noptim: {warmup_steps: 100}\n", ["train.max_steps=100"], None),
    ],
)
def test_a_warmup_from_before_a_shorter_run_was_asked_for_is_shortened_and_said(
    tmp_path, capsys, recipe_text, overrides, warmup_steps
):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {source: pydoc}\n" + recipe_text)

    config = load_config(path, overrides)

    said = capsys.readouterr().err
    if warmup_steps is None:
        assert (config.optim.warmup_steps, said) == (100, "")
        return
    assert config.optim.warmup_steps == warmup_steps
    assert f"is longer than `train.max_steps` ({config.train.max_steps}): {warmup_steps} are taken" in said
    origin = "override" if overrides else "recipe"
    assert value_origins(config, path, overrides)["optim.warmup_steps"] == origin
    (tmp_path / "run.yaml").write_text(config_yaml(config))
    assert load_config(tmp_path / "run.yaml") == config  # as a run that goes on reads it


@pytest.mark.parametrize(
    ("recipe_text", "overrides"),
    [
        ("train: {max_steps: 30}\noptim: {warmup_steps: 100}\n", []),
        ("train: {max_steps: 300}\n", ["train.max_steps=30", "optim.warmup_steps=100"]),
        ("train: {max_steps: 300}\n", ["optim.warmup_steps=100", "train.max_steps=30"]),
        ("train: {max_steps: 30}\n", ["optim.warmup_steps=100"]),
    ],
)
def test_a_warmup_that_was_asked_for_beside_a_shorter_run_is_refused(tmp_path, recipe_text, overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {source: pydoc}\n" + recipe_text)

    with pytest.raises(ValueError, match=r"`optim\.warmup_steps` \(100\) is longer than `train\.max_steps` \(30\)"):
        load_config(path, overrides)
