"""Evaluate, generate, explore and play by command: what is done, printed and refused."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from commands import hfgpt

from hfgpt.evaluation.report import measure, render
from hfgpt.generation.params import OPTIONS, SamplingParams


def test_evaluate_prints_a_table_to_read(world):
    words = ["--stride", 7, "--stride", 20, "--context", 40, "--first-token", "text", "--device", "cpu"]
    printed = hfgpt("evaluate", "out/accelerate", "--data", "text.txt", "--batch-size", 50, *words)

    report = measure("out/accelerate", ["text.txt"], strides=[7, 20], context=40, first_token="text", batch_size=50)
    assert (printed.code, printed.err) == (0, "")

    def measured(text):
        return [line for line in text.splitlines() if not line.startswith(("time", "peak memory"))]

    assert measured(printed.out) == measured(render(report))


def test_evaluate_puts_the_figures_of_tasks_beside_a_run_s_own(world):
    rows = [{"text": f"The {word}"} for word in ("object", "value", "name")]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "nouns",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "The",
        "doc_to_target": "{{text[3:]}}",
        "metric_list": [{"metric": "perplexity"}],
    }
    Path("nouns.yaml").write_text(json.dumps(task))
    before = json.loads(Path("out/accelerate/results.json").read_text())

    printed = hfgpt("evaluate", "out/accelerate", "--tasks", "nouns.yaml", "--json")

    assert printed.code == 0
    assert printed.err.splitlines()[-1] == "the tasks' figures are in out/accelerate/results.json, too"
    (figures,) = json.loads(printed.out)["tasks"].values()
    assert figures["perplexity"] > 1
    assert json.loads(Path("out/accelerate/results.json").read_text()) == {**before, "lm_eval": {"nouns": figures}}


def test_generate_prints_prompt_and_text_as_json(world):
    words = ["generate", "out/accelerate", "한국어 The", "--max-new-tokens", 10, "--seed", 3]

    as_json, printed = hfgpt(*words, "--json"), hfgpt(*words)

    result = json.loads(as_json.out)
    assert (as_json.code, as_json.err, as_json.out.count("\n")) == (0, "", 1)
    assert result["prompt"] == "한국어 The"
    assert result["text"].startswith("한국어 The")
    assert printed.out == result["text"] + "\n"
    assert "한국어" in as_json.out  # not as \\u escapes


def test_generate_prints_the_prompt_though_nothing_follows(world, monkeypatch):
    monkeypatch.setattr("hfgpt.generation.generator.continue_text", lambda *args: iter([]))

    assert hfgpt("generate", "out/accelerate", "The").out == "The\n"


def test_generate_hands_every_option_on(world, monkeypatch):
    heard = []
    monkeypatch.setattr(
        "hfgpt.generation.generator.continue_text",
        lambda generator, prompt, params: iter([heard.append((generator.source, prompt, params)) or "!"]),
    )

    sampling = "--max-new-tokens 7 --temperature 0.5 --top-k 4 --top-p 0.75 --min-p 0.1 --seed 9 --stop a\\n --stop b"
    searching = (
        "--num-beams 3 --length-penalty 0.5 --early-stopping never --repetition-penalty 2 --no-repeat-ngram-size 3"
    )
    for options in (sampling, searching):
        hfgpt("generate", "out/accelerate", "a b", *options.split())

    sampled = SamplingParams(7, 0.5, 4, 0.75, 0.1, stop=("a\n", "b"), seed=9)
    searched = SamplingParams(
        num_beams=3, length_penalty=0.5, early_stopping="never", repetition_penalty=2.0, no_repeat_ngram_size=3
    )
    assert heard == [("out/accelerate", "a b", sampled), ("out/accelerate", "a b", searched)]


def test_generate_has_an_option_for_every_field_of_the_params(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    printed = hfgpt("generate", "--help").out

    for name, field in OPTIONS.items():
        assert re.search(rf"--{name.replace('_', '-')} .*{re.escape(field.metadata['help'])}", printed)
    assert "Tokens to write. [default: (100)]" in printed


def test_generate_answers_many_prompts_in_their_order(world):
    Path("p.jsonl").write_text('{"prompt": "The", "id": 7}\n{"id": 8, "prompt": "한국어"}\n', encoding="utf-8")
    words = ["generate", "out/accelerate", "--prompts", "p.jsonl", "--samples", 2, "--max-new-tokens", 8, "--seed", 3]

    as_json, printed = hfgpt(*words, "--json", "--batch-size", 3), hfgpt(*words)

    records = [json.loads(line) for line in as_json.out.splitlines()]
    assert (as_json.code, as_json.err, printed.code, printed.err) == (0, "", 0, "")
    assert [(each["id"], each["prompt"], each["seed"]) for each in records] == [
        *((7, "The", 3), (7, "The", 4), (8, "한국어", 3), (8, "한국어", 4))
    ]
    alone = hfgpt("generate", "out/accelerate", "한국어", "--max-new-tokens", 8, "--seed", 4).out
    assert records[3]["text"] + "\n" == alone
    for number, each in enumerate(records):
        heading = f"--- prompt {number // 2 + 1}/2, sample {number % 2 + 1}/2, seed {each['seed']} ---"
        assert f"{heading}\n{each['text']}\n" in printed.out


def test_generate_compares_settings(world):
    words = ["generate", "out/accelerate", "The", "--seed", 3, "--max-new-tokens", 8]
    words += ["--compare", "temperature=2", "--compare", "num_beams=2"]

    as_json, printed = hfgpt(*words, "--json"), hfgpt(*words)

    hot, searched = (json.loads(line) for line in as_json.out.splitlines())
    assert (hot["settings"], searched["settings"]) == ("temperature=2", "num_beams=2")
    assert (hot["seed"], "seed" in searched, searched["score"] < 0) == (3, False, True)
    assert hot["text"] + "\n" == hfgpt(*words[:7], "--temperature", 2).out
    for each in (hot, searched):
        assert re.search(rf"--- {each['settings']} \(.*\) ---\n{re.escape(each['text'])}\n", printed.out)


def test_explore_prints_tables_and_writes_what_it_is_asked_for(world):
    words = ["explore", "out/accelerate", "The object is", "--plot", "next.png", "--html", "page.html"]

    printed, again, replaced = hfgpt(*words), hfgpt(*words), hfgpt(*words, "--overwrite", "--json")

    assert (printed.code, printed.err) == (0, "wrote next.png\nwrote page.html\n")
    assert "temperature=0.1" in printed.out
    assert Path("next.png").read_bytes().startswith(b"\x89PNG")
    assert "The object is" in Path("page.html").read_text(encoding="utf-8")
    assert (again.code, again.out) == (2, "")
    assert "next.png exists. Name another file, or add `--overwrite`." in again.err
    found = json.loads(replaced.out)
    assert (replaced.code, found["text"], len(found["distributions"])) == (0, "The object is", 4)


def test_play_answers_lines_from_a_pipe(world, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The\n/set temprature=1\n"))

    said = hfgpt("play", "out/accelerate", "--set", "max_new_tokens=8,seed=3")

    assert said.out == hfgpt("generate", "out/accelerate", "The", "--max-new-tokens", 8, "--seed", 3).out
    assert (said.code, said.err) == (2, "error: `temprature` is no setting. Did you mean `temperature`?\n")


BAD_INPUT = [
    # The model.
    ("evaluate mixed --data text.txt", "id 511", "`vocab_size` is 300", "do not belong together"),
    ("generate mixed The", "tokenizer of mixed", "`vocab_size` is 300", "do not belong together"),
    ("explore mixed The", "tokenizer of mixed", "`vocab_size` is 300", "do not belong together"),
    ("evaluate notes --data text.txt", "notes is no model folder", "config.json"),
    ("evaluate nowhere/at-all --data text.txt", "no model 'nowhere/at-all'"),
    ("evaluate damaged --data text.txt", "damaged/model.safetensors", "header"),
    ("evaluate unfitting --data text.txt", "'unfitting'", "config.json", "`model_type`"),
    ("generate unfitting The", "unfitting"),
    ("generate listed The", "'listed'", "config.json must hold a JSON object"),
    ("evaluate listed --data text.txt", "'listed'", "config.json must hold a JSON object"),
    ("generate notes The", "notes is no model folder", "config.json"),
    ("play notes", "notes is no model folder", "config.json"),
    # What it is measured on, and how.
    ("evaluate small --data missing.txt", "no file or folder 'missing.txt'"),
    ("evaluate small --data empty.txt", "empty.txt is empty", "no text to read"),
    ("evaluate small --data lines.jsonl --text-column body", "lines.jsonl", "'body'", "['text']"),
    ("evaluate small --data text.txt --text-column body", "`--text-column` ('body') has no effect"),
    ("evaluate small", "give `--data`, `--tasks` or both"),
    ("evaluate small --data text.txt --stride 65", "`--stride`", "65", "between 1 and the context (64)"),
    ("evaluate small --data text.txt --context 65", "`--context` (65)", "(64)", "Lower it"),
    (
        "evaluate small --data text.txt --first-token bos",
        "`--first-token`",
        "'bos'",
        "one of ['lm-eval', 'text', 'skip']",
    ),
    ("evaluate small --data text.txt --dtype int8", "`--dtype`", "'int8'", "one of ['auto', 'fp32', 'bf16', 'fp16']"),
    ("evaluate small --data text.txt --device tpu", "`--device` ('tpu')", "cpu"),
    ("evaluate small --data text.txt --limit 3", "`--limit` (3) has no effect", "`--tasks`"),
    ("evaluate small --tasks typo.yaml", "'typo.yaml' is no task"),
    # How it writes.
    ("generate small The --max-new-tokens 64", "`max_new_tokens` (64)", "(64)", "Shorten the prompt", "lower"),
    ("generate small The --max-new-tokens 0", "`max_new_tokens`", "at least 1", "got 0"),
    ("generate small The --temperature -1", "`temperature`", "at least 0", "got -1.0"),
    ("generate small The --top-p 2", "`top_p`", "above 0 and at most 1", "got 2.0"),
    ("generate small The\udcff", r"'The\udcff'", "UTF-8"),
    ("generate small The --num-beams 2 --top-k 5", "`top_k` has no effect", "(`num_beams` 2)"),
    ("generate small The --samples 2 --temperature 0", "`samples` (2)", "`temperature` 0"),
    ("generate small The --compare tok_p=1", "`tok_p`", "Did you mean `top_p`?"),
    ("generate small --prompts empty.txt", "empty.txt holds no prompt"),
    ("generate small --prompts missing.txt", "missing.txt is not there"),
    ("generate small --prompts shrt.txt", "shrt.txt is not there", "Did you mean `short.txt`?"),
    ("generate small --prompts notes", "notes is a folder. Name a file."),
    ("generate small The --prompts short.txt", "got both", "'short.txt'"),
    ("evaluate small --data tex.txt", "'tex.txt'", "Did you mean `text.txt`?"),
    ("explore small The --plot text.txt", "text.txt", "must end in .png"),
    ("explore small The --html nowhere/x.html", "nowhere is no folder", "Make it first"),
    ("explore small The --compare top_q=3", "`top_q`", "Did you mean `top_p`?"),
    ("play small --set top_q=3", "`top_q`", "Did you mean `top_p`?"),
]


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: ascii(case[0]))
def test_bad_input_gets_one_clear_line_and_leaves_everything_as_it_was(refuse, case):
    refuse(*case)
