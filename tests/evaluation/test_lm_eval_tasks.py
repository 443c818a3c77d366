"""lm-evaluation-harness: its perplexities are ours, and its tasks run in this process, offline and by name."""

import json
import math
import sys

import odd_tokenizers as odd
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from small_models import adding, make_model, write_task

from hfgpt.evaluation.lm_eval_tasks import find_tasks, run_tasks
from hfgpt.evaluation.perplexity import encode_texts, measure_texts

ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def texts(lines):
    """Short, long and odd texts, one with a literal special token and one that begins with it."""
    return [
        lines[0],
        " Ein  Bär\n",
        "두 번째 글이다.\n",
        "\n".join(lines[10:40]),
        "one<|endoftext|>two words",
        "<|endoftext|>three words",
        "\n".join(lines[40:50]),
    ]


@pytest.mark.parametrize("kind", ["hfgpt", "llama", "neox"])
@pytest.mark.parametrize("template", ["$A", "<|endoftext|> $A", "<|endoftext|> $A <|endoftext|>"])
def test_the_summed_loss_of_each_text_is_lm_eval_s_loglikelihood_rolling(kind, template, tiny_config, tokenizer, texts):
    model = make_model(kind, tiny_config)
    tokenizer = adding(tokenizer, template)
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=24)

    theirs = harness.loglikelihood_rolling(requests, disable_tqdm=True)

    for text, log_likelihood in zip(texts, theirs, strict=True):
        ours = measure_texts(model, encode_texts(tokenizer, [text]), context=24, stride=24, batch_size=4)
        # Both from fp32 logits, in batches of another size: rounding only.
        assert ours.loss * ours.tokens == pytest.approx(-log_likelihood, rel=1e-6)
    if template != "$A":  # scoring only what the text itself holds is not the same
        own = measure_texts(model, encode_texts(tokenizer, texts[:1], "text"), context=24, stride=24)
        assert own.loss * own.tokens != pytest.approx(-theirs[0], rel=1e-3)


@pytest.fixture(scope="module")
def read(texts, tmp_path_factory):
    """A task that reads the texts."""
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    rows = [{"text": text} for text in texts]
    metrics = [{"metric": name} for name in ROLLING]
    return find_tasks([write_task(tmp_path_factory.mktemp("read"), "read", rows, metric_list=metrics, **rolling)])


def test_nothing_is_said_per_byte_of_texts_that_their_tokens_do_not_determine(tiny_config, read, capsys):
    model = make_model("hfgpt", tiny_config)

    found = run_tasks(model, odd.words(["the", "of"]), read, 64)["read"]

    assert not {*ROLLING} & {name.removesuffix("_stderr") for name in found}
    assert "of the tokens are unknown to the tokenizer: a loss says little" in " ".join(capsys.readouterr().err.split())


def test_a_tokenizer_without_a_token_to_begin_with_is_refused(tiny_config, read):
    with pytest.raises(ValueError, match="`--tasks` needs a bos or an eos token"):
        run_tasks(make_model("hfgpt", tiny_config), odd.characters(), read, 64)


@pytest.mark.parametrize(("kind", "context"), [("hfgpt", 64), ("llama", 10)])
def test_word_and_byte_perplexity_and_bits_per_byte_are_those_of_lm_eval(
    kind, context, tiny_config, tokenizer, texts, read
):
    model = make_model(kind, tiny_config)

    theirs = run_tasks(model, tokenizer, read, context, batch_size=3)["read"]

    ours = measure_texts(model, encode_texts(tokenizer, texts), context, stride=context)
    for name in ROLLING:
        assert getattr(ours, name) == pytest.approx(theirs[name], rel=2e-6)  # as above, and e to it
    assert tokenizer.pad_token is None  # the harness gives its own copy one


@pytest.fixture(scope="module")
def folder(lines, tmp_path_factory):
    """Two tasks with their data; the rows are read back from there."""
    folder = tmp_path_factory.mktemp("tasks")
    long = [line for line in lines if len(line) > 60][:4]
    write_task(  # beginnings with three endings each, of different lengths
        folder,
        "my_hellaswag",
        [
            {"query": line[:20], "choices": [line[20:26], line[20:44], line[30:58]], "label": i % 3}
            for i, line in enumerate(long)
        ],
        output_type="multiple_choice",
        doc_to_text="{{query}}",
        doc_to_target="{{label}}",
        doc_to_choice="choices",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    write_task(  # texts whose last word is asked for
        folder,
        "my_lambada",
        [{"text": " ".join(line.split()[:8])} for line in lines if len(line.split()) > 8][:5],
        output_type="loglikelihood",
        doc_to_text="{{text.split(' ')[:-1]|join(' ')}}",
        doc_to_target="{{' '+text.split(' ')[-1]}}",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )
    return folder


@pytest.fixture
def found(folder, tiny_config, tokenizer):
    """A model, and what it reached in all tasks of the folder."""
    model = make_model("llama", tiny_config)
    return model, run_tasks(model, tokenizer, find_tasks([str(folder)]), context=64, batch_size=2)


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def log_probabilities(model, tokenizer, before, after):
    """Of the tokens that `after` adds to `before`, each by a forward pass of its own; and are they the likeliest?"""
    start, ids = len(tokenizer(before)["input_ids"]), tokenizer(before + after)["input_ids"]
    found = []
    for i in range(start, len(ids)):
        scores = model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)
        found.append((float(scores[ids[i]]), int(scores.argmax()) == ids[i]))
    return found


def test_tasks_in_the_style_of_hellaswag_and_lambada_are_scored_as_by_hand(found, folder, tokenizer):
    model, tasks = found
    rows = rows_of(folder, "my_hellaswag")
    right = {"acc": 0, "acc_norm": 0}
    for row in rows:
        sums = [sum(p for p, _ in log_probabilities(model, tokenizer, row["query"], " " + c)) for c in row["choices"]]
        per_character = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        right["acc"] += sums.index(max(sums)) == row["label"]
        right["acc_norm"] += per_character.index(max(per_character)) == row["label"]
    texts = [row["text"].rpartition(" ") for row in rows_of(folder, "my_lambada")]
    words = [log_probabilities(model, tokenizer, before, " " + last) for before, _, last in texts]
    nats = [-sum(p for p, _ in word) for word in words]

    assert {name: tasks["my_hellaswag"][name] for name in right} == {n: right[n] / len(rows) for n in right}
    assert tasks["my_lambada"]["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    assert tasks["my_lambada"]["acc"] == sum(all(best for _, best in word) for word in words) / len(words)
    for name, samples, stderr in (("my_hellaswag", 4, "acc_stderr"), ("my_lambada", 5, "perplexity_stderr")):
        assert (tasks[name]["samples"], tasks[name]["num_fewshot"]) == (samples, 0)
        assert tasks[name][stderr] > 0
        assert tasks[name]["lm_eval_version"].startswith("0.")
    json.dumps(tasks, allow_nan=False)


def test_inputs_that_the_harness_cuts_are_told(folder, tiny_config, tokenizer, capfd):
    tasks = find_tasks([str(folder / "my_lambada.yaml")])

    found = run_tasks(make_model("hfgpt", tiny_config), tokenizer, tasks, context=8, limit=3)

    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == "3 inputs of the tasks are longer than 8 tokens: lm-eval left out their beginnings.\n"
    assert (found["my_lambada"]["samples"], found["my_lambada"]["context"]) == (3, 8)


def test_what_is_no_task_is_refused(tmp_path):
    (tmp_path / "odd.yaml").write_text("just: words\n")
    (tmp_path / "empty").mkdir()

    with pytest.raises(ValueError, match=r"odd\.yaml' is no task"):
        find_tasks([str(tmp_path / "odd.yaml")])
    with pytest.raises(ValueError, match="empty holds no YAML file that defines a task"):
        find_tasks([str(tmp_path / "empty")])


def test_a_task_whose_data_cannot_be_fetched_gets_one_line(tmp_path, capfd):
    task = {"task": "far", "dataset_path": "Rowan/hellaswag", "output_type": "loglikelihood", "test_split": "test"}
    (tmp_path / "far.yaml").write_text(json.dumps(task))

    with pytest.raises(
        ConnectionError, match=r"the data of the task '.*far.yaml' cannot be fetched: .*Rowan/hellaswag"
    ):
        find_tasks([str(tmp_path / "far.yaml")])
    assert capfd.readouterr().out == ""


def test_a_task_that_comes_with_hfgpt_is_known_by_name_in_any_folder(tmp_path, monkeypatch):
    (tmp_path / "license.txt").write_text("Some words of a licence.\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    assert set(find_tasks(["license"])["tasks"]) == {"license"}


@pytest.mark.slow  # the harness reads its thousands of YAML files
def test_tasks_are_known_by_name():
    with pytest.raises(ValueError, match=r"'helaswag' is no task of lm-eval .* Did you mean 'hellaswag'\?"):
        find_tasks(["helaswag"])
    with pytest.raises(ConnectionError, match=r"the data of the task 'hellaswag' cannot be fetched: .*Rowan/hellaswag"):
        find_tasks(["hellaswag"])


def test_without_lm_eval_the_answer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # as if it were not there

    with pytest.raises(ValueError, match=r"^`--tasks` needs lm-eval \(extra `neighbours`\): `.*\"lm-eval>=.*`\.$"):
        find_tasks(["hellaswag"])


@pytest.mark.hub
def test_hellaswag_and_lambada_are_found_by_name(tiny_config, tokenizer):
    tasks = find_tasks(["hellaswag", "lambada_openai"])

    found = run_tasks(make_model("hfgpt", tiny_config), tokenizer, tasks, context=64, limit=2)

    assert set(found) == {"hellaswag", "lambada_openai"}
    assert found["hellaswag"]["samples"] == 2
