"""What pull leaves in a folder: the repository with every checksum right, or nothing."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_client import environment
from hub_models import SENT
from huggingface_hub import constants, snapshot_download

from hfgpt.hub.pull import pull
from hfgpt.hub.push import HubError, push


def copied(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".pulled.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def repo(hub):
    """A repository with files of either kind, and one in a folder."""
    files = {
        "model.safetensors": os.urandom(50_000),
        "config.json": b"{}",
        "deep/er/notes.md": b"# notes\n",
        "empty": b"",
    }
    hub.put("anna/demo", "Upload model", files)
    return "anna/demo"


def test_a_copy_is_the_repository_bit_for_bit(hub, repo, tmp_path):
    pulled = pull(repo, tmp_path / "copy")

    assert copied(tmp_path / "copy") == hub.files(repo)
    assert pulled.commit == hub.repos[repo].find("main").oid
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".copy")] == []
    assert not (Path(constants.HF_HUB_CACHE)).exists()  # nothing is stored twice


def test_what_was_pushed_is_what_comes_back(hub, run, tmp_path):
    pushed = push(run, "anna/demo")

    assert pull("anna/demo", tmp_path / "copy", revision=pushed.commit).commit == pushed.commit

    there = copied(tmp_path / "copy")
    del there[".gitattributes"]
    assert there == {name: content for name, content in copied(run).items() if name in there}
    assert {*there} == SENT


@pytest.mark.parametrize("endpoint", ["get", "storage-get"])
def test_a_flipped_bit_is_found_and_fetched_again(hub, repo, tmp_path, endpoint):
    hub.fail(endpoint, "flip", 2)
    said = []

    pull(repo, tmp_path / "copy", log=said.append)

    assert copied(tmp_path / "copy") == hub.files(repo)
    assert len([line for line in said if line.endswith("is damaged; fetching it again")]) == 2


def test_a_bit_flipped_in_the_cache_of_this_machine_is_found_too(hub, repo, tmp_path):
    """The client copies from there, and looks at nothing but the name."""
    hub.fail("storage-get", "flip", 1)
    cached = Path(snapshot_download(repo))
    assert (cached / "model.safetensors").read_bytes() != hub.files(repo)["model.safetensors"]

    pull(repo, tmp_path / "copy")

    assert copied(tmp_path / "copy") == hub.files(repo)


def test_a_file_that_is_always_damaged_leaves_no_folder(hub, repo, tmp_path):
    hub.fail("storage-get", "flip", 100)

    with pytest.raises(HubError, match=r"model\.safetensors of anna/demo came damaged 5 times"):
        pull(repo, tmp_path / "copy")

    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "deep/file"])
def test_a_folder_of_something_else_is_left_alone(hub, repo, tmp_path, name):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")

    with pytest.raises(ValueError, match=r"holds files of something else\. Name an empty folder or a new one"):
        pull(repo, tmp_path / "mine")

    assert copied(tmp_path / "mine") == {name: b"mine"}
    assert hub.seen == []


def test_a_folder_of_another_repository_is_left_alone(hub, repo, tmp_path):
    hub.put("anna/other", "Upload model", {"config.json": b"[]"})
    pull(repo, tmp_path / "copy")

    with pytest.raises(ValueError, match=r"holds anna/demo, not anna/other\. Name another folder"):
        pull("anna/other", tmp_path / "copy")

    assert copied(tmp_path / "copy") == hub.files(repo)


@pytest.mark.parametrize("change", ["edited", "added"])
def test_what_was_changed_since_is_left_alone(hub, repo, tmp_path, change):
    pull(repo, tmp_path / "copy")
    path = tmp_path / "copy" / ("config.json" if change == "edited" else "mine.txt")
    path.write_text("mine")
    hub.put(repo, "Another", {"config.json": b"[]"})

    with pytest.raises(ValueError, match="is not as it was pulled"):
        pull(repo, tmp_path / "copy")

    assert path.read_text() == "mine"


def test_pulling_again_fetches_only_what_is_new_or_missing(hub, repo, tmp_path):
    pull(repo, tmp_path / "copy")
    hub.put(repo, "Another", {"config.json": b"[]"})
    (tmp_path / "copy" / "deep" / "er" / "notes.md").unlink()
    hub.seen.clear()

    assert pull(repo, tmp_path / "copy").is_new
    assert not pull(repo, tmp_path / "copy").is_new

    assert copied(tmp_path / "copy") == hub.files(repo)
    assert {seen.path.rpartition("/")[2] for seen in hub.requests("get")} == {"config.json", "notes.md"}
    assert hub.requests("storage-get") == []


def test_a_damaged_note_of_origin_is_told(hub, repo, tmp_path):
    pull(repo, tmp_path / "copy")
    (tmp_path / "copy" / ".pulled.json").write_text('{"repo_id": "anna/demo"}')

    with pytest.raises(ValueError, match=r"\.pulled\.json is damaged \(KeyError\)\. Name a new folder"):
        pull(repo, tmp_path / "copy")


@pytest.mark.parametrize("name", ["../escaped.txt", "/tmp/escaped.txt", "a/../../b", "..\\c"])
def test_a_file_that_would_lie_elsewhere_is_refused(hub, tmp_path, name):
    hub.put("anna/demo", "Trap", {name: b"boo"})

    with pytest.raises(ValueError, match="would lie outside of the folder"):
        pull("anna/demo", tmp_path / "sub")

    assert not (tmp_path / "escaped.txt").exists()
    assert not (tmp_path / "sub").exists()


@pytest.mark.parametrize(
    ("repo_id", "revision", "message"),
    [
        ("anna/none", None, "there is no repository anna/none on the Hub"),
        ("anna/demo", "none", "anna/demo has no such revision. Name a branch, a tag or a commit"),
        ("not a name", None, "Repo id must"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(hub, repo, tmp_path, repo_id, revision, message):
    with pytest.raises(ValueError, match=message):
        pull(repo_id, tmp_path / "copy", revision=revision)

    assert not (tmp_path / "copy").exists()


def test_a_killed_pull_goes_on_with_what_is_missing(hub, tmp_path):
    files = {f"model-{number:05d}-of-00006.safetensors": os.urandom(5_000) for number in range(1, 7)}
    hub.put("anna/demo", "Upload model", files)
    arrived = threading.Event()

    def hold_back(seen):
        if seen.endpoint == "storage-get" and len(hub.requests("storage-get")) > 3:
            arrived.set()
            time.sleep(20)

    hub.before = hold_back
    process = subprocess.Popen(
        [sys.executable, "-m", "hfgpt", "pull", "anna/demo", "copy"],
        cwd=tmp_path,
        env=os.environ | environment(hub, tmp_path / "home"),
        stderr=subprocess.DEVNULL,
    )
    assert arrived.wait(timeout=60)
    process.kill()
    process.wait()
    assert not (tmp_path / "copy").exists()
    there = {path.name for path in (tmp_path / ".copy.pull").glob("*.safetensors")}
    hub.before = lambda seen: None
    hub.seen.clear()

    pull("anna/demo", tmp_path / "copy")

    assert 0 < len(there) < 6
    # By name: what the killed process had asked for last may be heard of only now.
    assert len({seen.path for seen in hub.requests("storage-get")}) == 6 - len(there)
    assert copied(tmp_path / "copy") == hub.files("anna/demo")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".copy")] == []


def test_files_have_the_mode_that_new_files_have(hub, repo, tmp_path):
    before = os.umask(0o027)
    try:
        pull(repo, tmp_path / "copy")
    finally:
        os.umask(before)

    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert modes == {0o640}
    assert json.loads((tmp_path / "copy" / ".pulled.json").read_text())["repo_id"] == repo
