"""Files that are whole or as they were."""

import json
import math
import os
import stat

import pytest

from hfgpt.system.storage import write_json


def test_json_comes_back_as_it_was_written_and_ends_in_a_newline(tmp_path):
    written = {"val_loss": 3.25, "step": 600, "environment": {"device": "Prozessor für alles", "commit": None}}

    write_json(tmp_path / "results.json", written)

    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert text == json.dumps(written, indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_written_file_has_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "results.json", {})
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "results.json").stat().st_mode) == 0o666 & ~umask


def test_what_cannot_be_written_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    def no_space(file_descriptor):
        raise OSError(28, "No space left on device")

    write_json(tmp_path / "results.json", {"val_loss": 3.0})
    with pytest.raises(ValueError, match=r"`evaluations\.1\.val_loss` is nan in results\.json"):
        write_json(tmp_path / "results.json", {"evaluations": [{"val_loss": 3.0}, {"val_loss": math.nan}]})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "results.json", {"val_loss": 2.0})

    assert os.listdir(tmp_path) == ["results.json"]
    assert json.loads((tmp_path / "results.json").read_text()) == {"val_loss": 3.0}
