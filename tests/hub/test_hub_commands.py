"""`hfgpt push` and `hfgpt pull` as a user types them, online, offline, in odd surroundings, and mistyped."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
from hub_client import environment, start_anew
from hub_models import KEPT, SENT
from hub_server import ALWAYS
from huggingface_hub import constants
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import hfgpt.gpt
from hfgpt.cli import main
from hfgpt.hub.allowlist import plan_push
from hfgpt.hub.push import push
from hfgpt.training.checkpoint import Manifest, TrainState, newest_checkpoint, save_checkpoint, seal
from hfgpt.weights import load


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code, and what it said."""

    code: int
    out: str
    err: str


def hfgpt_command(*words):
    """Run the command line in this process, in the current folder."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["hfgpt", *map(str, words)])
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def test_there_and_back(hub, run, tmp_path):
    pushed = hfgpt_command("push", run, "anna/demo", "--private", "--tag", "v1", "-m", "First words")
    pulled = hfgpt_command("pull", "anna/demo", tmp_path / "copy", "--revision", "v1")

    assert (pushed.code, pulled.code) == (0, 0)
    assert pushed.out == f"{hub.url}/anna/demo/commit/{hub.repos['anna/demo'].find('v1').oid}\n"
    assert pushed.err == "pushed\n"
    assert pulled.out == f"{tmp_path / 'copy'}\n"
    assert pulled.err.endswith("every checksum right\n")
    assert hub.titles("anna/demo") == ["First words", "initial commit"]


def test_what_programs_read_is_one_object(hub, run, tmp_path):
    pushed = json.loads(hfgpt_command("push", run, "anna/demo", "--json").out)
    pulled = json.loads(hfgpt_command("pull", "anna/demo", tmp_path / "copy", "--json").out)

    assert pushed == {
        "repo_id": "anna/demo",
        "commit": pulled["commit"],
        "url": f"{hub.url}/anna/demo/commit/{pulled['commit']}",
        "is_new": True,
        "pull_request": None,
    }
    assert pulled == {"repo_id": "anna/demo", "commit": pushed["commit"], "files": len(SENT) + 1, "is_new": True}


def test_a_dry_run_lists_what_would_go_with_sizes_and_asks_nothing(hub, run):
    listed = hfgpt_command("push", run, "anna/demo", "--dry-run")
    as_json = json.loads(hfgpt_command("push", run, "anna/demo", "--dry-run", "--json").out)

    assert hub.seen == []
    assert listed.code == 0
    assert {line.split()[0] for line in listed.out.splitlines() if line.startswith("  ")} == SENT | KEPT
    size = (run / "model.safetensors").stat().st_size
    assert re.search(rf"^  model\.safetensors +{size / 1000:.1f} kB$", listed.out, re.MULTILINE)
    assert re.search(rf"^  \.env +{(run / '.env').stat().st_size} B  secrets$", listed.out, re.MULTILINE)
    assert as_json["files"] == {name: (run / name).stat().st_size for name in SENT}
    assert {*as_json["skipped"]} == KEPT


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_code_that_is_not_this_hfgpts_goes_only_when_asked_for(hub, run, words):
    (run / "gpt.py").write_text("# of another day\n" + (run / "gpt.py").read_text())

    refused = hfgpt_command("push", run, "anna/demo", *words)
    seen_when_refused = [*hub.seen]
    sent = hfgpt_command("push", run, "anna/demo", "--own-code", *words)

    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert f"`hfgpt update-code {run}`" in refused.err
    assert seen_when_refused == []
    assert sent.code == 0
    assert words or hub.files("anna/demo")["gpt.py"] == (run / "gpt.py").read_bytes()


def test_a_pulled_folder_with_new_code_is_pushed_and_not_pulled_over(hub, run, tmp_path):
    (run / "gpt.py").write_text("# of another day\n" + (run / "gpt.py").read_text())
    hfgpt_command("push", run, "anna/demo", "--own-code")
    copy = tmp_path / "copy"
    hfgpt_command("pull", "anna/demo", copy)

    updated = hfgpt_command("update-code", copy)
    pulled = hfgpt_command("pull", "anna/demo", copy)
    pushed = hfgpt_command("push", copy, "anna/demo")

    assert updated.out.startswith(f"{copy}: gpt.py now of hfgpt ")
    assert "pull will not replace it" in updated.err
    assert pulled.code == 2
    assert "gpt.py is not as it was pulled" in pulled.err
    assert pushed.code == 0
    assert hub.files("anna/demo")["gpt.py"] == Path(hfgpt.gpt.__file__).read_bytes()
    assert hfgpt_command("update-code", copy).out.endswith("nothing was changed\n")


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (("commit", "status", 503), 1, "error: the Hub answered 503, again and again. Try later"),
        (("create", "drop", 0), 1, "error: the connection to the Hub broke, again and again. Try later"),
        (("commit", "status", 413), 1, "error: the Hub answered 413: made to fail"),
        (("create", "status", 401), 2, "error: the Hub does not know this token"),
        (("commit", "status", 403), 2, "error: this token (`hf auth whoami`) may not write to anna/demo"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, run, fault, code, message):
    endpoint, kind, value = fault
    hub.fail(endpoint, kind, ALWAYS, value=value)

    result = hfgpt_command("push", run, "anna/demo")

    *tries, last = result.err.splitlines()
    assert result.code == code
    assert last.startswith(message)
    assert all("; trying again in 0 s (" in line for line in tries)
    assert len(tries) == (4 if "again and again" in last else 0)


# Row 27 of the fault matrix: without the Hub.

NOWHERE = "http://hub.invalid"  # By RFC 2606 nobody ever has this name.
ASK_THE_HUB = [
    ("pull", "user/model", "out"),
    ("push", "{run}", "user/model"),
    ("evaluate", "user/model", "--data", "my.txt"),
    ("generate", "user/model", "The"),
    ("verify", "user/model"),
    ("convert", "user/model", "out", "--to", "gpt2"),
    ("train", "recipe.yaml", "init_from=user/model"),
    ("train", "recipe.yaml", "tokenizer.name=user/model"),
    ("train", "recipe.yaml", "data.files=null", "data.source=user/data"),
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a text and a recipe, and the current one."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (place / "my.txt").write_text("The quick brown fox.\n" * 50)
    (place / "recipe.yaml").write_text(
        "output_dir: out\ndata: {files: my.txt, block_size: 8}\ntrain: {max_steps: 1}\noptim: {warmup_steps: 1}\n"
    )
    return place


@pytest.mark.parametrize("words", ASK_THE_HUB, ids=lambda words: " ".join(words[:1] + words[2:]))
def test_without_a_network_a_name_on_the_hub_fails_soon_and_plainly(hub, run, workplace, monkeypatch, words):
    """huggingface_hub by itself takes 23 s for each file where no names are resolved."""
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", NOWHERE + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", NOWHERE)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    start_anew()

    started = time.monotonic()
    result = hfgpt_command(*(word.format(run=run) for word in words))

    assert time.monotonic() - started < 2
    assert result.code in (1, 2)
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert "hub.invalid" in line or "connect" in line or "user/" in line
    assert not (workplace / "out").exists()


@pytest.mark.parametrize("words", ASK_THE_HUB, ids=lambda words: " ".join(words[:1] + words[2:]))
def test_told_to_be_offline_a_name_on_the_hub_fails_soon_and_plainly(hub, run, workplace, monkeypatch, words):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    started = time.monotonic()
    result = hfgpt_command(*(word.format(run=run) for word in words))

    assert time.monotonic() - started < 2
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert hub.seen == []


def test_offline_a_local_folder_works(hub, run, workplace, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    result = hfgpt_command("generate", run, "the quick", "--max-new-tokens", 3, "--json")

    assert result.code == 0, result.err
    assert json.loads(result.out)["text"].startswith("the quick")
    assert hub.seen == []


# Row 29: odd surroundings.


@pytest.fixture
def odd_place(hub, tmp_path):
    """A folder with spaces and letters of other alphabets, a terminal without UTF-8, a home that cannot be written."""
    place = tmp_path / "Ünï 한글 folder"
    place.mkdir()
    surroundings = {"HOME": "/proc/none", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def in_process(*words, **changes):
        return subprocess.run(
            [sys.executable, "-m", "hfgpt", *words],
            cwd=place,
            env=os.environ | environment(hub, place / "hf home") | surroundings | changes,
            capture_output=True,
            check=False,
        )

    return place, in_process


def test_odd_surroundings_are_no_obstacle(odd_place, hub, run):
    place, in_process = odd_place
    push(run.rename(place / "my mödel"), "anna/demo")

    pulled = in_process("pull", "anna/demo", "a copy")
    named = in_process("pull", "anna/demo", "a cöpy", LC_ALL="C.UTF-8")

    assert (pulled.returncode, named.returncode) == (0, 0), pulled.stderr
    for copy in ("a copy", "a cöpy"):
        assert (place / copy / "config.json").read_bytes() == (place / "my mödel" / "config.json").read_bytes()
    assert {path.name for path in place.iterdir()} == {"my mödel", "a copy", "a cöpy"}


@pytest.mark.slow
def test_a_whole_job_is_done_in_odd_surroundings(odd_place, lines, tmp_path):
    place, in_process = odd_place
    (place / "my text.txt").write_text("\n".join([*lines, "Ünï 한글"]), encoding="utf-8")
    tiny = "model.n_embd=32 model.n_layer=1 model.n_head=2 tokenizer.vocab_size=400 train.max_steps=2"
    small = "optim.warmup_steps=1 train.batch_size=2 train.eval_rows=2 sample.max_new_tokens=3 data.source=null"

    train = ["train", "demo", "output_dir=out/a model", "data.files=my text.txt", *tiny.split(), *small.split()]

    refused = in_process(*train)  # the cache of datasets lies below a name that is no text in this locale
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(b"error: a folder in use, such as HF_HOME, has letters")
    for words in (
        train,
        ["evaluate", "out/a model", "--data", "my text.txt"],
        ["generate", "out/a model", "the", "--max-new-tokens", "5"],
        ["push", "out/a model", "anna/demo"],
        ["pull", "anna/demo", "a copy"],
    ):
        done = in_process(*words, HF_HOME=str(tmp_path / "home"))
        assert done.returncode == 0, (words, done.stderr.decode(errors="replace")[-2000:])
    trained, copy = (folder / "model.safetensors" for folder in (place / "out" / "a model", place / "a copy"))
    assert copy.read_bytes() == trained.read_bytes()


def test_no_clock_of_the_day_decides_anything():
    """So that it may jump: durations are measured by `perf_counter`."""
    package = Path(__file__).parents[2] / "hfgpt"

    for path in package.rglob("*.py"):
        assert not re.search(
            r"\btime\.time\(|\b(datetime|date)\.(now|utcnow|today)\(", path.read_text(encoding="utf-8")
        ), path


# Row 30: nonsense.

WORDS = st.one_of(
    st.sampled_from(["push", "pull", "train", "evaluate", "generate", "verify", "convert", "config", "tokenizer"]),
    st.sampled_from(["--json", "--pr", "--tag", "--revision", "--private", "--dry-run", "--resume", "--to", "--help"]),
    st.sampled_from(["demo", "anna/demo", "no/such/thing", "out", "seed=1", "train.max_steps=x", "=", "-", "--", "."]),
    st.text(st.characters(exclude_characters="\x00"), max_size=12),
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WORDS, max_size=6))
@example(words=["push", "\ud800", "anna/demo"])
@example(words=["push", ".", "anna/demo", "--dry-run"])
@example(words=["pull", "-", "--", ""])
@example(words=["config", "demo", "seed=" + "9" * 5000])
@example(words=["generate", "x" * 5000, ""])
@example(words=["pull", "anna/" + "x" * 300, "out"])
def test_any_words_get_an_answer_and_never_a_traceback(workplace, words):
    if words[:1] == ["train"] or words[:2] == ["tokenizer", "train"]:
        words = [words[0], "no such recipe", *words[1:]]  # what can begin in earnest would
    result = hfgpt_command(*words)

    assert result.code in (0, 2), result.err
    if result.code == 2 and result.err.startswith("error: "):
        assert len(result.err.splitlines()) == 1
    assert "Traceback" not in result.err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        *("intermediate_size", "n_inner", "tie_word_embeddings", "activation_function", "layer_norm_epsilon"),
        *("embd_pdrop", "eos_token_id", "model_type", "architectures", "auto_map", "dtype", "transformers_version"),
        "no_such_field",
    ]
)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(FIELDS, JSON, min_size=1, max_size=2), cut=st.none() | st.integers(0, 400))
def test_any_config_json_is_taken_or_refused_with_one_line(saved_run, tmp_path, change, cut):
    folder = tmp_path / "fuzzed"
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "tokenizer.json", "gpt.py", "loss.py", "loss_triton.py", "positions.py"):
        (folder / name).write_bytes((saved_run / name).read_bytes())
    text = json.dumps(json.loads((saved_run / "config.json").read_text()) | change)
    (folder / "config.json").write_text(text[:cut])

    for read in (load, plan_push):
        with contextlib.suppress(ValueError):  # anything else is a fault of ours
            read(folder)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=JSON | st.binary(max_size=40), key=st.sampled_from(["position", "identity", "val_loss", "files", None]))
def test_any_manifest_is_taken_or_passed_over(tmp_path, content, key):
    folder = tmp_path / "run"
    if not folder.exists():
        folder.mkdir()
        save_checkpoint(folder, Manifest(TrainState(1), {}), lambda place: (place / "a").write_text("a"), {}, 5)
    path = folder / "checkpoint-1" / "manifest.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif key is None:
        path.write_text(json.dumps(content))
    else:  # a sound seal on nonsense
        manifest = {"position": {"step": 1}, "identity": {}, "val_loss": None, "files": {}} | {key: content}
        path.write_text(seal(manifest))
    reasons = []

    found = newest_checkpoint(folder, warn=reasons.append)

    assert (found is None) == (len(reasons) == 1)
    assert all(len(reason.splitlines()) == 1 for reason in reasons)
