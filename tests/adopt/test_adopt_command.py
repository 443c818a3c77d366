"""The command itself: what it prints, what it leaves, and its exit code."""

import json

import pytest
from manners import KINDS, STRANGERS
from typer.testing import CliRunner

from hfgpt.check import run
from hfgpt.check.promise import PROMISES
from hfgpt.cli import app


@pytest.fixture
def hfgpt_adopt(tmp_path, monkeypatch):
    """A function that adopts the stranger made of a dictionary; of the promises it tries those named."""

    def adopt(*words, promises=(), **changes):
        monkeypatch.setattr(run, "choose_promises", lambda only: [PROMISES[name] for name in promises])
        what, values = KINDS["a dictionary"]
        (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
        paths = ["--config", tmp_path / "config.json", "--out", tmp_path / "my-gpt"]
        return CliRunner().invoke(app, ["adopt", f"{STRANGERS}/{what}", *map(str, [*paths, *words])])

    return adopt


def test_adopt_ends_with_a_report_and_leaves_the_folder_though_a_promise_is_broken(hfgpt_adopt, tmp_path):
    from hfgpt.check.promise import holds, promise

    @promise("tools", meaning="none", usual_causes="none")
    def it_is_broken(subject):
        return holds(False, "as it was to be")

    try:
        done = hfgpt_adopt(promises=["the-class-can-generate", "it-is-broken"], droprate=0.2)
    finally:
        del PROMISES["it-is-broken"]

    assert done.exit_code == 0, done.output
    assert "bit-equal" in done.stdout
    assert "note: nothing in the code reads `droprate` of the config" in done.stdout
    assert "1 promises kept, 1 broken" in done.stdout
    assert done.stderr.rstrip().endswith("my-gpt --trust-remote-code --only it-is-broken")
    assert (tmp_path / "my-gpt" / "config.json").is_file()
