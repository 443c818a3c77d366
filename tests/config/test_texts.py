"""Which text a recipe and its overrides name together, and what a path in them is."""

import re

import pytest

from hfgpt.config.loading import annotated_yaml, load_config, value_origins
from hfgpt.config.schema import DataConfig

STEPS = "train: {max_steps: 100}\n"
PYDOC = STEPS + "data: {source: pydoc}\n"
OF_A_SET = STEPS + "data: {source: user/set, name: small, split: all, validation_split: test, text_column: body}\n"
OF_FILES = STEPS + "data: {files: a.jsonl, validation_files: b.jsonl, text_column: body}\n"


@pytest.mark.parametrize("content", [PYDOC, OF_A_SET])
@pytest.mark.parametrize("override", ["data.files=my.txt", "data={files: my.txt}"])
def test_files_replace_the_data_set_of_a_recipe_and_all_that_belongs_to_it(recipe, content, override):
    config = load_config(recipe(content), [override, "data.block_size=64"])

    assert config.data == DataConfig(files="my.txt", block_size=64)


@pytest.mark.parametrize("override", ["data.files=my.txt", "data={files: my.txt, source: null}"])
def test_to_take_the_data_set_away_as_well_is_the_same(recipe, override):
    config = load_config(recipe(PYDOC), ["data.source=null", override])

    assert config.data == DataConfig(files="my.txt")


def test_a_data_set_replaces_the_files_of_a_recipe_and_all_that_belongs_to_them(recipe):
    path = recipe(OF_FILES)

    assert load_config(path, ["data.source=user/set", "data.name=x"]).data == DataConfig(source="user/set", name="x")
    assert load_config(path, ["data.source=pydoc"]).data == DataConfig(source="pydoc")


def test_other_files_leave_the_rest_of_a_recipe_as_it_is(recipe):
    config = load_config(recipe(OF_FILES), ["data.files=other.jsonl"])

    assert config.data == DataConfig(files="other.jsonl", validation_files="b.jsonl", text_column="body")


def test_what_is_given_beside_the_files_counts(recipe):
    overrides = ["data.text_column=words", "data.files=my.jsonl", "data.validation_files=v.jsonl"]

    config = load_config(recipe(OF_A_SET), overrides)

    assert config.data == DataConfig(files="my.jsonl", validation_files="v.jsonl", text_column="words")


@pytest.mark.parametrize(
    ("data", "overrides"),
    [
        ("{source: pydoc, files: a.txt}", []),
        ("{source: pydoc, files: a.txt}", ["seed=1"]),
        ("{source: pydoc}", ["data.files=b.txt", "data.source=pydoc"]),
        ("{block_size: 8}", ["data={source: pydoc, files: a.txt}"]),
    ],
)
def test_two_texts_at_once_are_refused(recipe, data, overrides):
    with pytest.raises(ValueError, match=r"give `data\.source` or .* one of them: got 'pydoc' and '.\.txt'"):
        load_config(recipe(f"{STEPS}data: {data}\n"), overrides)


def test_the_printed_recipe_has_the_text_that_is_read(recipe):
    path, overrides = recipe(PYDOC), ["data.files=my.txt"]

    config = load_config(path, overrides)
    printed = annotated_yaml(config, value_origins(config, path, overrides))

    assert load_config(recipe(printed)) == config
    assert re.search(r"^  source: null +# default$", printed, flags=re.MULTILINE)
    assert re.search(r"^  files: my.txt +# override$", printed, flags=re.MULTILINE)


HOME = "/home/somebody"


@pytest.mark.parametrize("where", ["recipe", "overrides"])
def test_a_tilde_is_the_home_folder_in_every_path(recipe, monkeypatch, where):
    monkeypatch.setenv("HOME", HOME)
    values = {"output_dir": "~/run", "init_from": "~/model", "tokenizer.name": "~/tokenizer"}
    values |= {"data.files": "[~/a.txt, b~.txt, ./~/c.txt]", "data.validation_files": "~/v.txt"}
    lines = "output_dir: ~/run\ninit_from: ~/model\ntokenizer: {name: ~/tokenizer}\n"
    lines += "data: {files: [~/a.txt, b~.txt, ./~/c.txt], validation_files: ~/v.txt}\n"

    if where == "recipe":
        config = load_config(recipe(STEPS + lines))
    else:
        config = load_config(recipe(PYDOC), [f"{key}={value}" for key, value in values.items()])

    assert (config.output_dir, config.init_from) == (f"{HOME}/run", f"{HOME}/model")
    assert config.tokenizer.name == f"{HOME}/tokenizer"
    assert config.data.files == [f"{HOME}/a.txt", "b~.txt", "./~/c.txt"]
    assert config.data.validation_files == f"{HOME}/v.txt"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.files", "~/a b.txt", f"{HOME}/a b.txt"),
        ("data.source", "~/set", f"{HOME}/set"),
        ("output_dir", "~", HOME),
        ("output_dir", "~nobody-of-that-name/run", "~nobody-of-that-name/run"),  # as a shell does
        ("output_dir", "a~", "a~"),
        ("output_dir", "$HOME/run", "$HOME/run"),
        ("data.text_column", "~", "~"),
        ("sample.prompt", "~/text", "~/text"),
    ],
)
def test_a_tilde_is_expanded_in_paths_alone_and_only_where_they_begin(recipe, monkeypatch, key, value, expected):
    monkeypatch.setenv("HOME", HOME)

    found = load_config(recipe(PYDOC), [f"{key}={value}"])
    for name in key.split("."):
        found = getattr(found, name)

    assert found == expected


def test_a_tilde_in_the_path_of_a_recipe_is_the_home_folder(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))

    assert load_config(f"~/{recipe(PYDOC).name}") == load_config(recipe(PYDOC))
