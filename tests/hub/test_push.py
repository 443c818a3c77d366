"""What push makes of a repository: one commit of what is on the list, on the branch that was asked for."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
from hub_client import OTHER_TOKEN, TOKEN, environment
from hub_models import KEPT, SENT, save_model
from hub_server import GIT_ATTRIBUTES

import hfgpt.hub.push
from hfgpt import HFGPTForCausalLM
from hfgpt.hub.pull import pull
from hfgpt.hub.push import HubError, push


def contents(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


def test_what_is_on_the_list_goes_bit_for_bit_and_nothing_else(hub, run):
    pushed = push(run, "anna/demo", message="First words")

    assert hub.files("anna/demo") == contents(run, SENT) | {".gitattributes": GIT_ATTRIBUTES}
    assert {path.name for path in run.iterdir()} == SENT | KEPT
    assert hub.titles("anna/demo") == ["First words", "initial commit"]
    assert pushed.commit == hub.repos["anna/demo"].find("main").oid
    assert pushed.url == f"{hub.url}/anna/demo/commit/{pushed.commit}"


def test_pushing_the_same_again_makes_no_commit(hub, run):
    first = push(run, "anna/demo")

    again = push(run, "anna/demo", message="Once more")

    assert (first.is_new, again.is_new) == (True, False)
    assert again.commit == first.commit
    assert hub.titles("anna/demo") == ["Upload model", "initial commit"]


def test_pushing_a_change_sends_only_that(hub, run):
    push(run, "anna/demo")
    (run / "README.md").write_text("# Changed\n")
    hub.seen.clear()

    push(run, "anna/demo", message="Say more")

    assert hub.titles("anna/demo") == ["Say more", "Upload model", "initial commit"]
    assert hub.requests("lfs-put") == []
    (commit,) = hub.requests("commit")
    assert re.findall(rb'"path": "([^"]*)"', commit.body) == [b"README.md"]


def test_weights_of_an_earlier_model_are_removed_in_the_same_commit(hub, run):
    """Or transformers would go on loading the old ones: it looks for the one file before the shards."""
    push(run, "anna/demo")
    (run / "model.safetensors").unlink()
    save_model(run, seed=1, max_shard_size="20kB")

    push(run, "anna/demo", message="In shards")

    assert hub.titles("anna/demo") == ["In shards", "Upload model", "initial commit"]
    assert "model.safetensors" not in hub.files("anna/demo")
    loaded = HFGPTForCausalLM.from_pretrained("anna/demo")
    here = HFGPTForCausalLM.from_pretrained(run)
    assert all(torch.equal(tensor, here.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_large_file_goes_in_parts(hub, run):
    hub.part_size = 10_000

    push(run, "anna/demo")

    assert len(hub.requests("lfs-put")) == -(-(run / "model.safetensors").stat().st_size // 10_000) >= 3
    assert hub.files("anna/demo")["model.safetensors"] == (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("private", "visible"), [(True, False), (False, True), (None, True)])
def test_a_new_repository_is_as_private_as_asked(hub, run, private, visible, tmp_path):
    push(run, "anna/demo", private=private)

    assert hub.repos["anna/demo"].private is not visible
    if visible:
        pull("anna/demo", tmp_path / "copy", token=OTHER_TOKEN)
    else:
        with pytest.raises(ValueError, match="no repository anna/demo on the Hub, or this token"):
            pull("anna/demo", tmp_path / "copy", token=OTHER_TOKEN)


@pytest.mark.parametrize(("there", "asked"), [(False, True), (True, False)])
def test_a_repository_that_is_not_as_private_as_asked_gets_nothing(hub, run, there, asked):
    hub.put("anna/demo", "initial commit", {})
    hub.repos["anna/demo"].private = there

    with pytest.raises(ValueError, match="anna/demo exists and is p"):
        push(run, "anna/demo", private=asked)

    assert hub.titles("anna/demo") == ["initial commit"]
    assert hub.requests("preupload") == []


def test_an_organisation_is_pushed_to_by_its_members_only(hub, run):
    push(run, "guild/demo")
    (run / "README.md").write_text("# Taken over\n")

    with pytest.raises(ValueError, match="may not write to guild/demo"):
        push(run, "guild/demo", token=OTHER_TOKEN)

    assert hub.titles("guild/demo") == ["Upload model", "initial commit"]


def test_a_branch_is_made_and_main_stays(hub, run):
    push(run, "anna/demo", revision="wide")
    (run / "README.md").write_text("# Changed\n")
    push(run, "anna/demo", revision="wide", message="Say more")

    assert hub.titles("anna/demo", "wide") == ["Say more", "Upload model", "initial commit"]
    assert hub.titles("anna/demo", "main") == ["initial commit"]


def test_a_tag_names_the_commit_for_good(hub, run, tmp_path):
    first = push(run, "anna/demo", tag="v1")
    assert push(run, "anna/demo", tag="v1").commit == first.commit
    (run / "README.md").write_text("# Changed\n")

    with pytest.raises(ValueError, match="the tag 'v1' of anna/demo names another commit"):
        push(run, "anna/demo", tag="v1")
    push(run, "anna/demo", tag="v2")

    assert hub.repos["anna/demo"].refs["refs/tags/v1"].oid == first.commit
    pull("anna/demo", tmp_path / "one", revision="v1")
    pull("anna/demo", tmp_path / "two", revision="v2")
    assert (tmp_path / "one" / "README.md").read_text() != (tmp_path / "two" / "README.md").read_text()


def test_a_pull_request_leaves_main_and_can_come_from_anybody(hub, run):
    push(run, "anna/demo")
    (run / "README.md").write_text("# Better\n")

    pushed = push(run, "anna/demo", create_pr=True, token=OTHER_TOKEN)

    assert pushed.pull_request == "refs/pr/1"
    assert hub.files("anna/demo", "refs/pr/1")["README.md"] == b"# Better\n"
    assert hub.titles("anna/demo") == ["Upload model", "initial commit"]


@pytest.mark.parametrize("options", [{"revision": "wide"}, {"tag": "v1"}])
def test_a_pull_request_with_what_would_have_no_effect_is_refused(hub, run, options):
    with pytest.raises(ValueError, match="leave out the revision and the tag"):
        push(run, "anna/demo", create_pr=True, **options)


def test_a_commit_in_the_meantime_is_reported_and_not_overwritten(hub, run):
    hub.put("anna/demo", "initial commit", {})

    def interfere(seen):
        if seen.endpoint == "commit":
            hub.put("anna/demo", "Theirs", {"README.md": b"theirs"})

    hub.before = interfere
    with pytest.raises(HubError, match=r"anna/demo has a newer commit, .* than when this push began"):
        push(run, "anna/demo")

    assert hub.titles("anna/demo") == ["Theirs", "initial commit"]
    assert hub.files("anna/demo")["README.md"] == b"theirs"


def test_two_pushes_at_once_make_one_commit_each_or_say_so(hub, run, saved_run):
    hub.put("anna/demo", "initial commit", {})
    (run / "README.md").write_text("# Another\n")
    barrier, met = threading.Barrier(2), set()

    def meet(seen):
        if seen.endpoint == "commit" and threading.get_ident() not in met:
            met.add(threading.get_ident())
            barrier.wait(timeout=10)

    hub.before = meet
    failures = []

    def try_push(folder, message):
        try:
            push(folder, "anna/demo", message=message)
        except HubError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=try_push, args=pair) for pair in ((run, "one"), (saved_run, "other"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(failures) == 1
    assert len(hub.titles("anna/demo")) == 2


def test_an_answer_that_never_comes_is_not_waited_for(hub, run, monkeypatch):
    """huggingface_hub itself would wait for ever."""
    monkeypatch.setattr(hfgpt.system.network, "ANSWER_SECONDS", 0.3)
    hub.fail("commit", "stall", 1, value=2)
    said = []

    started = time.monotonic()
    push(run, "anna/demo", log=said.append)

    assert time.monotonic() - started < 10
    assert "the Hub did not answer in time" in said[0]


def test_the_hub_s_wish_to_wait_is_honoured(hub, run):
    hub.fail("create", "limit", 1, value=1)
    said = []

    started = time.monotonic()
    push(run, "anna/demo", log=said.append)

    assert time.monotonic() - started >= 1
    assert said == ["the Hub answered 429; trying again in 1 s (1 of 4)"]


@pytest.mark.parametrize("repo_id", ["demo", "anna/demo/more", "anna/", "an na/demo", "anna/de--mo", ""])
def test_a_name_that_is_none_is_refused_before_anything_is_asked(hub, run, repo_id):
    with pytest.raises(ValueError, match=r"."):
        push(run, repo_id)

    assert hub.seen == []


def test_without_a_token_nothing_is_asked(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")

    with pytest.raises(ValueError, match=r"no token for the Hub. Run `hf auth login`, or set HF_TOKEN"):
        push(run, "anna/demo")

    assert hub.seen == []


def test_a_token_that_the_hub_does_not_know_is_told(hub, run):
    with pytest.raises(ValueError, match=r"does not know this token. Run `hf auth login`"):
        push(run, "anna/demo", token="hf_of nobody")


PUSH = """
import sys
from pathlib import Path
import hfgpt.hub.push as pushing
from hfgpt.hub.allowlist import Plan

folder = Path(sys.argv[1])
# Without the checks of a plan, which take seconds to import.
pushing.plan_push = lambda *args: Plan(folder, {name: folder / name for name in sys.argv[2:]}, {})
pushing.push(folder, "anna/demo")
"""


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sending", "hfgpt push"])
def test_a_killed_push_goes_on_with_what_is_missing(hub, run, tmp_path, whole):
    (run / "model.safetensors").unlink()
    save_model(run, max_shard_size="3kB")
    shards = {path.name for path in run.glob("model-*.safetensors")}
    names = SENT - {"model.safetensors"} | {"model.safetensors.index.json"} | shards
    assert len(shards) >= 5
    arrived = threading.Event()

    def hold_back(seen):
        if seen.endpoint == "lfs-put" and len(hub.requests("lfs-put")) > len(shards) - 2:
            arrived.set()
            time.sleep(20)  # in a thread of the Hub; the push is killed by then

    hub.before = hold_back
    command = ["-m", "hfgpt", "push", run, "anna/demo"] if whole else ["-c", PUSH, run, *names]
    process = subprocess.Popen(
        [sys.executable, *command], env=os.environ | environment(hub, tmp_path / "home"), stderr=subprocess.DEVNULL
    )
    assert arrived.wait(timeout=60)
    process.kill()
    process.wait()
    there = {sha for _, sha in hub.objects}
    assert 0 < len(there) < len(shards)
    assert hub.titles("anna/demo") == ["initial commit"]
    hub.seen.clear()
    hub.before = lambda seen: None

    push(run, "anna/demo")

    sent_again = {seen.path.rpartition("/")[2] for seen in hub.requests("lfs-put")}
    assert len(sent_again) == len(shards) - len(there)
    assert not sent_again & there
    assert hub.titles("anna/demo") == ["Upload model", "initial commit"]
    assert hub.files("anna/demo") == contents(run, names) | {".gitattributes": GIT_ATTRIBUTES}


def test_the_token_goes_to_the_hub_only(hub, run):
    hub.part_size = 10_000
    push(run, "anna/demo")

    assert {seen.headers.get("authorization") for seen in hub.seen if seen.path.startswith("/storage/")} == {None}
    assert {seen.headers.get("authorization") for seen in hub.requests("commit")} == {f"Bearer {TOKEN}"}
