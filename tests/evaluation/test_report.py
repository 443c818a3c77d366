"""`hfgpt evaluate` as one function: files in, one table out; tasks beside a run's own results."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import datasets
import odd_tokenizers as odd
import pytest
from small_models import make_model, write_task

from hfgpt.evaluation.perplexity import encode_texts, measure_texts
from hfgpt.evaluation.report import measure, render, save_tasks, to_json
from hfgpt.system.storage import write_json


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture
def world(tiny_config, tokenizer, lines, tmp_path, monkeypatch):
    """A folder with a Llama, two texts and a table that holds the same."""
    model = make_model("llama", tiny_config)
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    texts = ["\n".join(lines[:20]), "\n".join(lines[20:23])]
    for name, text in zip(("a.txt", "b.txt"), texts, strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = [{"words": text} for text in texts]
    (tmp_path / "both.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return model, texts


def figures(measurement):
    return {name: value for name, value in asdict(measurement).items() if name != "elapsed_seconds"}


def test_files_are_measured_in_windows_of_the_context_and_of_half_of_it(world, tokenizer):
    model, texts = world

    report = measure("llama", ["a.txt", "b.txt"])

    encoded = encode_texts(tokenizer, texts)
    assert [each.stride for each in report.text.measurements] == [64, 32]
    for each in report.text.measurements:
        assert figures(each) == figures(measure_texts(model, encoded, 64, each.stride))
    text = report.text
    assert (text.documents, text.words, text.bytes) == (2, encoded.words, encoded.bytes)
    assert (text.context, text.dtype, text.device, text.processes) == (64, "float32", "cpu", 1)
    assert text.peak_memory_bytes > 1e7


def test_a_table_is_read_by_its_column(world):
    table = measure("llama", ["both.jsonl"], text_column="words", strides=[64])

    files = measure("llama", ["a.txt", "b.txt"], strides=[64])
    assert figures(table.text.measurements[0]) == figures(files.text.measurements[0])


def test_strides_context_and_policy_are_those_that_were_asked_for(world):
    report = measure("llama", ["b.txt"], strides=[5, 16, 1], context=16, first_token="skip", dtype="bf16")

    assert [each.stride for each in report.text.measurements] == [16, 5, 1]  # the context first, and only once
    assert report.text.dtype == "bfloat16"
    assert report.text.measurements[0].word_perplexity is None
    assert "-" in next(line for line in render(report).splitlines() if line.startswith("word perplexity")).split()


def test_the_table_says_all_that_the_figures_depend_on(world):
    report = measure("llama", ["a.txt"])

    printed = render(report)

    text, (windows, strided) = report.text, report.text.measurements
    assert f"llama: 1 document, {text.bytes:,} bytes, {text.words:,} words" in printed
    assert f"{windows.tokens:,} tokens, each scored once" in printed
    assert "its first token predicted from <|endoftext|>, as lm-eval does" in printed
    assert "context 64 tokens, float32 on cpu" in printed
    rows = {line[:18].strip(): line[18:].split() for line in printed.splitlines()}
    assert rows["token perplexity"] == [f"{each.token_perplexity:,.3f}" for each in (windows, strided)]
    assert rows["word perplexity"] == [f"{each.word_perplexity:,.3f}" for each in (windows, strided)]
    assert rows["bits per byte"] == [f"{each.bits_per_byte:,.4f}" for each in (windows, strided)]
    assert rows["standard error"] == [f"{each.loss_standard_error:,.4f}" for each in (windows, strided)]
    assert "peak memory" in printed


@pytest.mark.parametrize(
    ("kind", "text", "share", "said"),
    [
        (lambda: odd.words(["the", "dog"]), "the cat and the dog", 0.4, "2 unknown tokens"),
        (lambda: odd.words(["the", "dog"]), "the dog\nthe dog", 0, r"'the dog\nthe dog' comes back as"),
        (odd.lowering, "The dog", 0, "'The dog' comes back as 'the dog'"),
        (odd.dropping, "the 개 dog", 1 / 3, "1 characters left out"),
        (lambda: odd.pieces(byte_fallback=True), "The 개", 0, None),
        (odd.with_pad, "The 개 sleeps <pad>", 0, None),
    ],
)
@pytest.mark.parametrize("first_token", ["lm-eval", "text"])
def test_nothing_is_said_per_byte_of_text_that_its_tokens_do_not_determine(
    tiny_config, tmp_path, capsys, kind, text, share, said, first_token
):
    make_model("llama", tiny_config).save_pretrained(tmp_path / "model")
    kind().save_pretrained(tmp_path / "model")
    if kind is not odd.with_pad:
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
    (tmp_path / "text.txt").write_text(text)

    report = measure(str(tmp_path / "model"), [str(tmp_path / "text.txt")], first_token=first_token)

    found, printed = report.text, render(report)
    assert (found.unknown_share, found.loss_of_text is None) == (pytest.approx(share), said is None)
    for each in found.measurements:
        assert each.loss > 0
        assert (each.bits_per_byte is None) == (each.byte_perplexity is None) == (said is not None)
        assert (each.word_perplexity is None) == (said is not None)
    if said is not None:
        assert f"nothing per word or byte, because other texts have the same tokens: {said}" in printed
    warning = f"warning: {share:.1%} of the tokens are unknown to the tokenizer: a loss says little"
    assert (warning in " ".join(capsys.readouterr().err.split())) == (share > 0.1)


def test_json_has_null_for_what_is_infinite(world, tmp_path):
    (tmp_path / "long.txt").write_text("x" * 600)  # one word of some hundred tokens

    result = to_json(measure("llama", ["long.txt"], strides=[64]))

    (measured,) = result["text"]["measurements"]
    assert measured["word_perplexity"] is None
    assert measured["bits_per_byte"] > 0
    json.dumps(result, allow_nan=False)


def test_a_text_column_without_a_table_is_refused(world):
    with pytest.raises(ValueError, match=r"`--text-column` \('words'\) has no effect: plain text has no columns"):
        measure("llama", ["a.txt"], text_column="words")


def test_ids_that_the_model_does_not_know_are_refused(make_gpt2, tokenizer, world):
    make_gpt2(vocab_size=300).save_pretrained("small")
    tokenizer.save_pretrained("small")

    with pytest.raises(ValueError, match=r"makes the id 319, the model's `vocab_size` is 300"):
        measure("small", ["a.txt"])


def test_knobs_without_effect_are_refused(world):
    with pytest.raises(ValueError, match="give `--data`, `--tasks` or both"):
        measure("llama")
    with pytest.raises(ValueError, match=r"`--limit` \(3\) has no effect without `--tasks`"):
        measure("llama", ["a.txt"], limit=3)


def test_tasks_stand_beside_texts(world, tmp_path):
    task = write_task(
        tmp_path,
        "last_word",
        [{"text": "one two three"}, {"text": "four five"}],
        output_type="loglikelihood",
        doc_to_text="{{text.split(' ')[0]}}",
        doc_to_target="{{' '+text.split(' ')[-1]}}",
        metric_list=[{"metric": "acc"}],
    )

    report = measure("llama", ["b.txt"], strides=[64], tasks=[task], limit=1)

    assert report.tasks["last_word"]["samples"] == 1
    line = next(line for line in render(report).splitlines() if line.startswith("last_word"))
    assert line.split()[1:3] == ["acc", f"{report.tasks['last_word']['acc']:.4f}"]
    assert "token perplexity" in render(report)


# --- results.json


def test_figures_of_tasks_go_beside_all_that_results_json_holds(tmp_path):
    before = {"val_loss": 4.25, "environment": {"torch": "2"}, "lm_eval": {"old": {"acc": 0.5}, "new": {"acc": 0.1}}}
    write_json(tmp_path / "results.json", before)

    path = save_tasks(str(tmp_path), {"new": {"acc": 0.25, "perplexity": "inf"}})

    assert path == str(tmp_path / "results.json")
    after = json.loads((tmp_path / "results.json").read_text())
    assert after == {**before, "lm_eval": {"old": {"acc": 0.5}, "new": {"acc": 0.25, "perplexity": "inf"}}}


def test_a_results_json_that_cannot_be_read_is_left_as_it_is(tmp_path):
    for content in ("{torn", "[1]", '{"lm_eval": 3}'):
        (tmp_path / "results.json").write_text(content)

        with pytest.raises(ValueError, match="the tasks' results cannot be added"):
            save_tasks(str(tmp_path), {"new": {"acc": 0.25}})

        assert (tmp_path / "results.json").read_text() == content


def test_without_a_finished_run_or_tasks_nothing_is_written(tmp_path):
    assert save_tasks(str(tmp_path), {"new": {"acc": 0.25}}) is None
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "results.json", {"val_loss": 4.25})
    before = (tmp_path / "results.json").stat()
    assert save_tasks(str(tmp_path), {}) is None
    assert (tmp_path / "results.json").stat() == before


# --- several processes


@pytest.mark.slow
def test_two_processes_score_each_token_once(world, cache):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(cache)}
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += " --dynamo_backend no --main_process_port 0 -m hfgpt evaluate llama --data a.txt --data b.txt --json"

    ran = subprocess.run(
        [sys.executable, *launch.split(), "--batch-size", "3"], env=environment, capture_output=True, text=True
    )

    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("\n") == 1  # the main process speaks alone
    together = json.loads(ran.stdout)["text"]
    alone = measure("llama", ["a.txt", "b.txt"]).text
    assert (together["processes"], alone.processes) == (2, 1)
    for one, two in zip(alone.measurements, together["measurements"], strict=True):
        assert (two["tokens"], two["windows"]) == (one.tokens, one.windows)
        for name in ("loss", "loss_standard_error", "word_perplexity", "bits_per_byte"):
            assert two[name] == pytest.approx(getattr(one, name), rel=1e-6)
