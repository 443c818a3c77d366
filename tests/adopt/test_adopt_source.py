import pytest
from manners import STRANGERS

from hfgpt.adopt.source import Program


def written(tmp_path, file, name, constants=()):
    program = Program(STRANGERS / file, name, dict(constants), set())
    return program, {each: (tmp_path / each).read_text() for each in program.write(tmp_path)}


def test_a_script_is_not_run_and_what_its_body_makes_is_asked_for():
    with pytest.raises(ValueError, match=r"`vocab_size` \(lecture.py, line 18\).*`vocab_size: 65`"):
        Program(STRANGERS / "lecture.py", "LanguageModel", {}, set())


def test_of_a_script_goes_along_what_the_class_needs_and_nothing_that_trains(tmp_path):
    program, files = written(tmp_path, "lecture.py", "LanguageModel", {"vocab_size": 40})

    text = files["lecture.py"]
    assert "vocab_size = 40" in text
    assert "head_size = n_embd // n_head" in text
    assert "open(" not in text
    assert "optimizer" not in text
    assert any("`stoi`" in note for note in program.notes)


def test_a_package_that_the_class_does_not_use_is_not_needed(tmp_path):
    _, files = written(tmp_path, "single_file.py", "GPT")

    text = files["single_file.py"]
    assert "import not_installed_anywhere" not in text
    assert text.startswith('"""A licence of somebody\'s."""')
    assert "__main__" not in text


def test_files_of_a_package_lie_side_by_side_as_transformers_follows_them(tmp_path):
    _, files = written(tmp_path, "pack/model.py", "Decoder")

    assert set(files) == {"model.py", "layers.py", "rope.py"}
    assert "from .rope import rotary_table" in files["model.py"]
    assert "from .layers import __doc__ as _\nfrom . import layers" in files["model.py"]
    assert "from .rope import rotate" in files["layers.py"]
    assert "from einops import rearrange" in files["layers.py"]


def test_a_neighbour_that_is_imported_by_its_name_goes_along(tmp_path):
    _, files = written(tmp_path, "book.py", "GPTModel")

    assert "from .neighbour import FeedForward" in files["book.py"]
    assert "from . import neighbour as parts" in files["book.py"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\ntorch.set_default_dtype(torch.float64)\nclass GPT(torch.nn.Module): pass", "whole process"),
        ("from .nowhere import Block\nclass GPT(Block): pass", "no file for `from .nowhere import Block`"),
        ("import side.part\nclass GPT(side.part.Block): pass", "`import side.part`"),
        ("class Other: pass", "no 'GPT'. Its classes are Other"),
        ("def f(:", "line 1"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "side").mkdir()
    (tmp_path / "side" / "part.py").write_text("class Block: pass\n")
    (tmp_path / "mine.py").write_text(text + "\n")

    with pytest.raises(ValueError, match=r"mine\.py") as error:
        Program(tmp_path / "mine.py", "GPT", {}, set())

    assert message in str(error.value)
