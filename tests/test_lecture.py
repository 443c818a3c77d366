"""The lecture runs whole and in steps, computes what the book computes, and its README says what was measured."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hfgpt.config.recipes.lecture import story
from hfgpt.config.recipes.lecture.__main__ import RECIPE, main, make_lecture
from hfgpt.config.recipes.lecture.book import make_model, prepare
from hfgpt.config.recipes.lecture.korean import HEADINGS
from hfgpt.config.recipes.lecture.steps import EXAMPLES, STEPS
from hfgpt.config.recipes.lecture.table import largest_difference, render
from hfgpt.config.recipes.lecture.training import describe_overfitting, evaluations, make_optimizer, train
from torch import nn

from hfgpt import HFGPTConfig
from hfgpt.config.loading import load_config
from hfgpt.data.text import load_documents
from hfgpt.data.tokenizer import encode_ids
from hfgpt.training.checkpoint import Manifest, TrainState, load_states, restore_random_states, save_checkpoint
from hfgpt.weights import load

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "lecture"
STORY = ROOT.parent / "shared" / "data" / "the-verdict.txt"
PUBLISHED = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))
MEASURED = json.loads((FOLDER / "measured.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world(tmp_path_factory, lines, tokenizer):
    """A folder with a text, a tokenizer, and GPT-2's weights' stand-in: a random GPT-2 of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("lecture")
    (folder / "my.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture(scope="module")
def overrides(world):
    """What makes the lecture small."""
    return [
        f"output_dir={world / 'out'}",
        f"data.files={world / 'my.txt'}",
        f"tokenizer.name={world / 'tokenizer'}",
        f"weights={world / 'gpt2'}",
        *("model.n_embd=32", "model.n_layer=2", "model.n_head=4", "model.n_positions=64"),
        *("data.block_size=32", "data.stride=32", "train.batch_size=4", "train.epochs=2", "train.eval_every=20"),
        *("train.eval_rows=8", "sample.max_new_tokens=5", "optim.learning_rate=3e-3"),
    ]


@pytest.fixture(scope="module")
def whole(overrides, world):
    """The lecture run whole: its exit code, what it printed, and its figures."""
    import io
    from contextlib import redirect_stdout

    printed = io.StringIO()
    with redirect_stdout(printed):
        code = main(overrides)
    return code, printed.getvalue(), json.loads((world / "out" / "lecture.json").read_text(encoding="utf-8"))


@pytest.fixture
def lecture(overrides, tmp_path):
    return make_lecture([*overrides, f"output_dir={tmp_path / 'out'}"])


class BookAttention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out, self.heads, self.dropout = nn.Linear(width, width), heads, nn.Dropout(dropout)

    def forward(self, x):
        batch, length, width = x.shape
        query, key, value = (
            each(x).view(batch, length, self.heads, -1).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (query @ key.mT).masked_fill(future, -torch.inf) / math.sqrt(width // self.heads)
        return self.out((self.dropout(scores.softmax(-1)) @ value).transpose(1, 2).reshape(batch, length, width))


class BookBlock(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.attention = BookAttention(width, heads, dropout)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.inner(self.norm2(x)))


class BookModel(nn.Module):
    """The book's architecture from its text, in torch's own layers: made, and called, in the order it describes."""

    def __init__(self, shape):
        super().__init__()
        width, dropout = shape.hidden_size, shape.embd_pdrop
        self.tokens = nn.Embedding(shape.vocab_size, width)
        self.positions = nn.Embedding(shape.max_position_embeddings, width)
        blocks = [BookBlock(width, shape.num_attention_heads, dropout) for _ in range(shape.num_hidden_layers)]
        self.dropout, self.blocks, self.norm = nn.Dropout(dropout), nn.Sequential(*blocks), nn.LayerNorm(width)
        self.head = nn.Linear(width, shape.vocab_size, bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(self.dropout(x))))


def every_row(rows):
    """The rows as one tensor of ids, (N, T + 1)."""
    return torch.tensor([rows[index]["input_ids"].tolist() for index in range(len(rows))])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_model_is_the_books_with_the_same_weights_and_the_same_dropout(lecture, mode):
    model = make_model(lecture.config, vocab_size=320).train(mode == "train")
    torch.manual_seed(lecture.config.seed)
    oracle = BookModel(HFGPTConfig(**lecture.config.model, vocab_size=320)).train(mode == "train")
    ids = torch.randint(320, (2, 32), generator=torch.Generator().manual_seed(0))

    torch.manual_seed(7)
    ours = model(ids, use_cache=False).logits
    torch.manual_seed(7)
    theirs = oracle(ids)

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # fp32; the scores are scaled before or after


def test_training_takes_the_steps_that_the_books_model_takes(lecture):
    config = replace(lecture.config.train, eval_every=1000)
    model = make_model(lecture.config, 320)
    optimizer = make_optimizer(model, lecture.config.optim)
    torch.manual_seed(lecture.config.seed)
    oracle = BookModel(HFGPTConfig(**lecture.config.model, vocab_size=320))
    optim = lecture.config.optim
    theirs = torch.optim.AdamW(oracle.parameters(), lr=optim.learning_rate, weight_decay=optim.weight_decay)

    torch.manual_seed(3)
    train(model, optimizer, lecture.loaders, config, lambda: "", TrainState(step=1), epochs=1)
    torch.manual_seed(3)
    oracle.train()
    for batch in lecture.loaders.train:
        theirs.zero_grad()
        F.cross_entropy(oracle(batch["input_ids"]).flatten(0, 1), batch["shift_labels"].flatten()).backward()
        theirs.step()

    assert len(lecture.loaders.train) >= 20
    # Adam divides by the gradient's size, so rounding of 1e-7 grows with the steps; the weights moved by 0.05.
    torch.testing.assert_close(model.lm_head.weight, oracle.head.weight, rtol=0, atol=1e-3)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            assert not parameter.any(), name  # the book's attention has none


def test_gpt2s_initialisation_can_be_trained_from_as_well(overrides, tmp_path):
    out = tmp_path / "out"

    assert main(["training", *overrides, "init=gpt2", "train.epochs=1", f"output_dir={out}"]) == 0

    records = json.loads((out / "lecture.json").read_text(encoding="utf-8"))["training"]["records"]
    assert evaluations(records)[0]["train_loss"] == pytest.approx(math.log(320), abs=0.2)  # one step from uniform


def test_the_whole_lecture_runs(whole):
    code, printed, figures = whole

    assert code == 0
    assert {*STEPS} | {"identity", "environment"} == {*figures}
    positions = [printed.index(f"--- {name}: {step.__doc__}") for name, step in STEPS.items()]
    assert positions == sorted(positions)


def test_the_headings_are_korean_where_that_is_asked_for(overrides, tmp_path, capsys):
    asked = ["tokens", "temperature", "language=ko", *overrides, f"output_dir={tmp_path}"]

    assert main(asked) == 0

    printed = capsys.readouterr().out
    assert {*HEADINGS} == {*STEPS}
    for name in ("tokens", "temperature"):
        assert f"--- {name}: {HEADINGS[name]}\n" in printed
        assert STEPS[name].__doc__ not in printed


def test_the_loss_by_hand_is_that_of_cross_entropy(whole):
    loss = whole[2]["loss"]

    assert loss["by_hand"] == pytest.approx(loss["cross_entropy"], rel=1e-6)
    assert loss["hfgpt"] == pytest.approx(loss["cross_entropy"], rel=1e-6)
    flat = [math.log(each) for row in loss["target_probabilities"] for each in row]
    assert loss["by_hand"] == pytest.approx(-sum(flat) / len(flat), rel=1e-6)
    assert whole[2]["perplexity"]["perplexity"] == pytest.approx(math.exp(loss["by_hand"]), rel=1e-5)


def test_windows_are_the_texts_ids_and_their_targets_the_next_ones(lecture):
    (ids,) = encode_ids(lecture.tokenizer, [lecture.training_text])

    rows = every_row(lecture.rows.train).tolist()

    assert rows == [ids[start : start + 33] for start in range(0, len(ids) - 32, 32)]


def test_losses_before_training_are_the_mean_over_every_target(whole, lecture):
    model = make_model(lecture.config, 320)
    rows = every_row(lecture.rows.validation)

    with torch.no_grad():
        expected = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())

    assert whole[2]["before"]["book"]["val_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert whole[2]["before"]["gpt2"]["val_loss"] == pytest.approx(math.log(320), abs=0.05)  # near uniform by design


def test_training_prints_both_losses_every_few_steps_and_a_sample_per_epoch(whole):
    _, printed, figures = whole
    records = figures["training"]["records"]

    scored, samples = evaluations(records), [each for each in records if "sample" in each]

    assert [each["step"] for each in scored] == list(range(0, scored[-1]["step"] + 1, 20))
    assert len(scored) >= 3
    assert [each["epoch"] for each in samples] == [1, 2]
    for each in scored:
        line = f"Ep {each['epoch']} (Step {each['step']:06d}): Train loss {each['train_loss']:.3f}, "
        assert f"{line}Val loss {each['val_loss']:.3f}\n" in printed
    assert all(each["sample"].replace("\n", " ") in printed for each in samples)
    assert scored[-1]["train_loss"] < scored[0]["train_loss"] - 0.5


def test_the_pictures_are_there(whole, world):
    for name in ("loss.png", "temperature.png"):
        assert (world / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_overfitting_is_said_with_its_numbers_and_only_where_it_is():
    def records(train_loss, val_loss):
        first = {"epoch": 1, "step": 0, "tokens": 8, "train_loss": 9.0, "val_loss": 6.1}
        last = {"epoch": 2, "step": 5, "tokens": 48, "train_loss": train_loss, "val_loss": val_loss}
        return [first, last, {"epoch": 2, "sample": "Say so quite insensible to nothing"}]

    text = "She was quite insensible to the irony."

    overfitted = describe_overfitting(records(0.391, 6.452), text, "Say")
    not_yet = describe_overfitting(records(5.9, 6.0), text, "Say")

    assert overfitted.startswith("Overfitting: at the end the training loss is 0.391 and the validation loss 6.452")
    assert "best at step 0 (6.100)" in overfitted
    assert f"{len(' quite insensible to ')} in a row" in overfitted
    assert not_yet.startswith("No overfitting yet")


def test_the_nine_words_are_drawn_as_often_as_in_the_book(whole):
    assert whole[2]["temperature"]["counts"] == PUBLISHED["temperature"]["counts"]
    assert whole[2]["temperature"]["counts"]["1"] == [73, 0, 0, 582, 2, 0, 0, 343, 0]


def test_top_k_keeps_three_words(whole):
    assert whole[2]["top_k"]["kept"] == pytest.approx([6.75, 6.28, 4.51])
    assert whole[2]["top_k"]["probabilities"] == pytest.approx([0.0615, 0, 0, 0.5775, 0, 0, 0, 0.3610, 0], abs=1e-4)


def test_a_second_run_does_not_train_again(whole, overrides, capsys):
    before = whole[2]["training"]

    assert main(["training", *overrides]) == 0

    said = capsys.readouterr().out
    assert "holds this run already" in said
    assert "Ep 1" not in said
    assert make_lecture(overrides).figures()["training"] == before


def test_another_recipe_in_the_same_folder_is_refused(whole, overrides, capsys):
    code = main(["training", *overrides, "optim.learning_rate=1e-4"])

    assert code == 2
    assert "figures of another recipe or text" in capsys.readouterr().err


def test_going_on_begins_where_training_ended(whole, overrides):
    lecture = make_lecture(overrides)
    checkpoint, manifest = lecture.newest()
    first = whole[2]["resume"]["records"][0]

    assert manifest.state.epoch == 2
    assert manifest.state.step == 2 * len(lecture.loaders.train)
    assert first["step"] >= manifest.state.step  # counted from 0
    assert first["train_loss"] < 5  # of 5.8 at the start: the weights are those that were trained
    before = make_model(lecture.config, 320).lm_head.weight
    assert not torch.equal(load(checkpoint).lm_head.weight, before)


def test_going_on_with_the_random_states_equals_never_stopping(lecture, tmp_path):
    config = replace(lecture.config.train, eval_every=1000)

    def start():
        model = make_model(lecture.config, 320)
        return model, make_optimizer(model, lecture.config.optim)

    model, optimizer = start()
    train(model, optimizer, lecture.loaders, config, lambda: "", TrainState(), epochs=2)
    stopped, its_optimizer = start()
    _, position = train(stopped, its_optimizer, lecture.loaders, config, lambda: "", TrainState(), epochs=1)
    checkpoint = save_checkpoint(
        tmp_path, Manifest(position, {}), stopped.save_pretrained, {"optimizer": its_optimizer}, keep_last=1
    )
    resumed = prepare(load(checkpoint))
    its_optimizer = make_optimizer(resumed, lecture.config.optim)
    load_states(checkpoint, {"optimizer": its_optimizer})
    restore_random_states(checkpoint, seed=0)
    train(resumed, its_optimizer, lecture.loaders, config, lambda: "", position, epochs=1)

    assert torch.equal(resumed.lm_head.weight, model.lm_head.weight)


def test_the_losses_of_gpt2s_weights_are_transformers_own(whole, world, lecture):
    from transformers import GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel.from_pretrained(world / "gpt2").eval()
    rows = every_row(lecture.rows.validation)

    with torch.no_grad():
        expected = F.cross_entropy(gpt2(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())

    assert whole[2]["gpt2"]["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert whole[2]["gpt2"]["text"].startswith("Every effort moves you")


def test_without_gpt2s_weights_the_step_says_that_it_is_left_out(lecture, capsys):
    lecture.weights = None  # the tests do not go to the Hub

    figures = STEPS["gpt2"](lecture)

    assert figures == {}
    assert capsys.readouterr().out.startswith("Left out: ")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["trainig"], "there is no step 'trainig'"),
        (["train.precision=bf16"], "`train.precision` has no effect in the lecture"),
        (["optim.learning_rat=1"], "Did you mean `optim.learning_rate=1`?"),
        (["train.eval_every=epoch"], "`train.eval_every` must be a number of steps"),
        (["init=xavier"], "`init` must be one of"),
        (["language=kr"], "`language` must be one of ['en', 'ko'], got 'kr'"),
        (["gpt2", "weights=no-such-folder"], "no-such-folder"),
        (["top_k"], "Run the step `training` first"),
        (["windows", "train.batch_size=9999"], "fewer than `train.batch_size`"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(overrides, tmp_path, capsys, words, reason):
    code = main([*overrides, f"output_dir={tmp_path / 'out'}", *words])

    assert code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert reason in error


def test_the_story_is_fetched_once_and_known_by_its_checksum(tmp_path, monkeypatch):
    import hashlib

    source = tmp_path / "published.txt"
    source.write_text("It was no great surprise to me.", encoding="utf-8")
    monkeypatch.setattr(story, "URL", source.as_uri())
    monkeypatch.setattr(story, "SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    config = load_config(RECIPE, [f"data.files={tmp_path / 'out' / 'story.txt'}"])

    found = story.find_story(config)
    source.unlink()

    assert found == config == story.find_story(config)
    assert Path(found.data.files).read_text(encoding="utf-8") == "It was no great surprise to me."


@pytest.mark.parametrize("content", [None, "another text"])
def test_without_the_story_pythons_documentation_takes_its_place_with_a_word(tmp_path, monkeypatch, capsys, content):
    source = tmp_path / "published.txt"
    if content is not None:
        source.write_text(content, encoding="utf-8")
    monkeypatch.setattr(story, "URL", source.as_uri())

    found = story.find_story(load_config(RECIPE, [f"data.files={tmp_path / 'story.txt'}"]))

    assert "cannot be fetched" in capsys.readouterr().err
    assert len(Path(found.data.files).read_text(encoding="utf-8")) == story.CHARACTERS
    assert not (tmp_path / "story.txt").exists()


def test_gpt2s_own_token_ids_are_there_without_a_network(overrides):
    lecture = make_lecture([*overrides, "tokenizer.name=null"])

    assert len(lecture.tokenizer) == 50257
    assert lecture.encode("Every effort moves you").tolist() == [[6109, 3626, 6100, 345]]
    assert encode_ids(lecture.tokenizer, list(EXAMPLES)) == [[16833, 3626, 6100, 345], [40, 1107, 588, 11311]]


def test_without_gpt2s_vocabulary_a_tokenizer_is_trained_with_a_word(overrides, monkeypatch, capsys):
    monkeypatch.setattr(story, "gpt2_vocabulary", lambda: None)
    config = load_config(RECIPE, ["tokenizer.vocab_size=300", next(each for each in overrides if "data.files" in each)])

    tokenizer = story.find_tokenizer(config, load_documents(config.data, config.seed))

    assert len(tokenizer) == 300
    assert "neither here nor on the Hub" in capsys.readouterr().err


@pytest.mark.skipif(not STORY.is_file(), reason="The Verdict is not committed; it was looked for beside the repository")
def test_the_story_has_the_books_counts(overrides, tmp_path):
    files = [f"data.files={STORY}", "tokenizer.name=null", f"output_dir={tmp_path}"]
    lecture = make_lecture([*overrides, *files, "data.block_size=256", "data.stride=256", "model.n_positions=256"])

    assert story.hashlib.sha256(STORY.read_bytes()).hexdigest() == story.SHA256
    assert STEPS["text"](lecture) == PUBLISHED["text"]
    assert (len(lecture.rows.train), len(lecture.rows.validation)) == (18, 2)


@pytest.mark.slow
def test_the_untrained_model_writes_the_books_gibberish_with_the_books_probabilities(tmp_path, world):
    lecture = make_lecture([f"data.files={world / 'my.txt'}", f"output_dir={tmp_path}"])

    assert STEPS["gibberish"](lecture) == PUBLISHED["gibberish"]
    found = STEPS["loss"](lecture)

    assert found["likeliest"] == PUBLISHED["loss"]["likeliest"]
    found, published = (torch.tensor(each["target_probabilities"]) for each in (found, PUBLISHED["loss"]))
    torch.testing.assert_close(found, published, rtol=1e-4, atol=0)  # five digits were printed


def test_what_was_measured_is_what_the_book_published():
    scored, published = (evaluations(each["training"]["records"]) for each in (MEASURED, PUBLISHED))

    assert MEASURED["text"] == PUBLISHED["text"]
    assert MEASURED["gibberish"] == PUBLISHED["gibberish"]
    for name in ("train_loss", "val_loss"):
        assert MEASURED["before"]["book"][name] == pytest.approx(PUBLISHED["before"]["book"][name], abs=1e-5)
    assert [each["step"] for each in scored] == [each["step"] for each in published]
    assert largest_difference(MEASURED) < 1e-3  # three digits were published
    assert MEASURED["top_k"]["greedy"] == PUBLISHED["top_k"]["greedy"]
    assert MEASURED["top_k"]["text"] == PUBLISHED["top_k"]["text"]
    assert scored[-1]["train_loss"] < 1
    assert 6 <= scored[-1]["val_loss"] <= 6.6
    assert MEASURED["temperature"]["counts"] == PUBLISHED["temperature"]["counts"]


@pytest.mark.parametrize(("name", "language"), [("README.md", "english"), ("README.ko.md", "korean")])
def test_the_table_in_each_readme_is_what_was_measured(name, language):
    readme = (FOLDER / name).read_text(encoding="utf-8")

    assert render(MEASURED, language) in readme


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_numbers_in_the_text_of_each_readme_are_those_that_were_measured(name):
    readme = (FOLDER / name).read_text(encoding="utf-8")

    assert f"> {MEASURED['training']['overfitting']}\n" in readme
    assert f" {largest_difference(MEASURED):.4f}" in readme
    assert re.search(rf"\b{MEASURED['training']['elapsed_seconds'] / 60:.0f}( minutes|분)", readme)


def test_the_commands_of_the_readme_name_steps_and_keys_that_there_are(world, tmp_path):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^hfgpt lecture( .*)?$", readme, flags=re.MULTILINE)

    for command in commands:
        words = command.partition("#")[0].split()
        assert {word for word in words if "=" not in word} <= {*STEPS}
        here = [f"data.files={world / 'my.txt'}", f"output_dir={tmp_path}"]
        make_lecture([*(word for word in words if "=" in word), *here])  # refuses what has no effect
    assert len(commands) >= 4


def test_the_row_in_the_main_readme_is_what_was_measured():
    row = next(line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "| [lecture]" in line)

    val_loss = evaluations(MEASURED["training"]["records"])[-1]["val_loss"]

    assert f"| {math.exp(val_loss):.0f}, " in row


def test_both_readmes_tell_the_same():
    english, korean = ((FOLDER / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md"))

    def skeleton(text):
        return (
            re.findall(r"^#+", text, flags=re.MULTILINE),
            re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL),
            re.findall(r"\]\(([^)]+)\)", re.sub(r"README(\.ko)?\.md", "other", text)),
        )

    assert skeleton(english) == skeleton(korean)
    for term in ("교차 엔트로피", "퍼플렉서티(혼란도)", "문맥 길이", "탐욕적 디코딩", "온도 스케일링", "top-k 샘플링"):
        assert term in korean
    for name in STEPS:
        assert f"`{name}`" in english
        assert f"`{name}`" in korean
