"""Which files of a folder are the text, and that what is left out is said."""

import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfgpt.config.schema import DataConfig
from hfgpt.data.corpus import find_files
from hfgpt.data.streaming import sample_documents
from hfgpt.data.text import read_source, stream_texts


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    """A function that fills a folder, and returns it; what is no bytes becomes lines of JSON."""

    def fill(**files):
        for name, content in files.items():
            path = tmp_path / "c" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps({"text": text}) + "\n" for text in content).encode()
            path.write_bytes(content if isinstance(content, bytes) else lines)
        return tmp_path / "c"

    return fill


def stored(path, **options):
    data = DataConfig(**{"files": str(path), **options})
    return read_source(data, data.files, data.split)["text"][:]


def streamed(path):
    return [row["text"] for row in stream_texts(DataConfig(files=str(path)), shuffle_seed=None)]


CHAPTERS = {f"ch{i}.txt": f"chapter {i}".encode() for i in range(1, 7)}
TEXTS = [f"chapter {i}" for i in range(1, 7)]
NO_TEXT = {
    ".ipynb_checkpoints/ch1-checkpoint.txt": "hidden",
    ".ipynb_checkpoints/deeper/ch2.txt": "hidden",
    ".git/description.txt": "hidden",
    ".svn/x.md": "hidden",
    "inner/.hidden.jsonl": "hidden",
    "._ch1.txt": "hidden",
    "__MACOSX/ch1.txt": "hidden",
    "__MACOSX/inner/._ch1.txt": "hidden",
    "CVS/x.txt": "hidden",
    "~$ch1.txt": "hidden",
    "README.md": "about the text, not of it",
    "readme.TXT": "about the text, not of it",
    "README.ko.md": "about the text, not of it",
    "LICENSE.txt": "about the text, not of it",
    "inner/LICENCE.md": "about the text, not of it",
    "COPYING.txt": "about the text, not of it",
    "dataset_infos.json": "about the text, not of it",
    "Thumbs.db": "of another kind",
    "LICENSE": "of another kind",
    "ch1.txt~": "of another kind",
    "cover.png": "of another kind",
    "ch1.txt.gz": "there unpacked as well",
    "empty.txt": "empty",
    "empty.md": "empty",
    "empty.jsonl": "empty",
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_of_a_folder_is_left_out_and_said(folder, capsys, name):
    content = b"" if NO_TEXT[name] == "empty" else gzip.compress(b"chapter 1") if name.endswith("gz") else b"{}"
    path = folder(**CHAPTERS, **{name: content})

    assert stored(path) == TEXTS
    said = capsys.readouterr().err

    shown = str(path / name) if NO_TEXT[name] == "empty" else name
    assert said == f"left out of the text: 1 file: 1 {NO_TEXT[name]} ({shown})\n"
    assert streamed(path) == TEXTS


def test_everything_that_is_left_out_is_counted_by_its_reason(folder, capsys):
    path = folder(**CHAPTERS, **{name: b"" if reason == "empty" else b"x" for name, reason in NO_TEXT.items()})

    assert stored(path) == TEXTS

    said = capsys.readouterr().err
    assert said.startswith("left out of the text: 25 files: ")
    for part in ("10 hidden (", "7 about the text, not of it (", "4 of another kind (", "3 empty (", " and 7 more"):
        assert part in said


def test_nothing_is_said_where_nothing_is_left_out(folder, capsys):
    assert stored(folder(**CHAPTERS)) == TEXTS
    assert capsys.readouterr().err == ""


def test_a_stream_says_it_once(folder, capsys):
    path = folder(**CHAPTERS, **{".git/a.txt": b"x", "z.jsonl": b""})

    samples = sample_documents(DataConfig(files=str(path), streaming=True, validation_documents=2), seed=0)

    assert samples.validation["text"][:] == TEXTS[:2]
    assert capsys.readouterr().err.count("left out of the text: 2 files: 1 hidden (.git/a.txt); 1 empty (") == 1


@pytest.mark.parametrize("name", ["README.md", ".hidden.txt", ".git/a.txt", "LICENSE.txt"])
def test_a_file_that_is_named_is_read(folder, name):
    path = folder(**{"a.txt": b"a", name: b"named"})

    assert stored(path, files=[str(path), str(path / name)]) == ["a", "named"]


def test_a_folder_below_a_hidden_one_is_read_if_it_is_named(folder):
    path = folder(**{".cache/corpus/a.txt": b"a", ".cache/corpus/.git/b.txt": b"b"})

    assert stored(path / ".cache" / "corpus") == ["a"]


def test_a_repository_of_a_data_set_is_its_data(folder, capsys):
    card = b"---\nlicense: mit\n---\n# A data set\n"
    path = folder(**{"README.md": card, ".gitattributes": b"x", "data/train.jsonl": ["a", "b"], "LICENSE": b"MIT"})

    assert stored(path) == streamed(path) == ["a", "b"]
    assert "1 about the text, not of it (README.md)" in capsys.readouterr().err
    assert stored(None, files=None, source=str(path)) == ["a", "b"]


def test_a_folder_of_nothing_but_what_is_left_out_says_so(folder):
    path = folder(**{"README.md": b"card", ".git/a.txt": b"x", "image.png": b"x"})

    with pytest.raises(ValueError, match=r"holds no file that ends in \.txt.* left out of the text: 3 files: "):
        stored(path)


EMPTY = {
    "a.txt": b"",
    "a.txt.gz": gzip.compress(b""),
    "a.jsonl": b"\n",
    "a.json": b"[]",
    "b.json": b" [ ]\n",
    "c.json": b"",
    "a.csv": b"text,n\n",
    "b.csv": b"",
    "c.csv": b"text,n\n,1\n",
    "a.jsonl.zst": b"",
    "d.jsonl": b'{"text": ""}\n',
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_shard_without_text_is_left_out_like_an_empty_file(folder, capsys, name):
    path = folder(**{"0.jsonl": ["x"], name: EMPTY[name], "z.jsonl": ["y"]})

    assert stored(path) == ["x", "y"]
    assert capsys.readouterr().err == f"left out of the text: 1 file: 1 empty ({path / name})\n"
    assert streamed(path) == ["x", "y"]
    with pytest.raises(ValueError, match=rf"^{path / name} is empty: there is no text to read\.$"):
        stored(path / name)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_empty_shard_among_parquet_files_is_left_out(folder, capsys, at):
    path = folder()
    path.mkdir()
    for shard, texts in enumerate([["a"], ["b", "c"]]):
        pq.write_table(pa.table({"text": texts}), path / f"{2 * shard + 1}.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path / f"{2 * at}.parquet")

    assert stored(path) == streamed(path) == ["a", "b", "c"]
    assert f"1 empty ({path / str(2 * at)}.parquet)" in capsys.readouterr().err


def test_files_that_are_all_empty_are_refused_in_a_sentence(folder):
    path = folder(**{f"{letter}.txt": b"" for letter in "abcde"})

    with pytest.raises(ValueError, match=r"^\S+a\.txt, \S+b\.txt, \S+c\.txt and 2 more are empty: there is no text"):
        stored(path)
    with pytest.raises(ValueError, match=r"^\S+a\.txt is empty: there is no text to read\.$"):
        sample_documents(DataConfig(files=str(path / "a.txt"), streaming=True), seed=0)


def save(texts, path, **options):
    datasets.Dataset.from_dict({"text": texts, "n": list(range(len(texts)))}).save_to_disk(path, **options)


def test_a_data_set_that_was_saved_to_disk_is_read_as_what_it_is(tmp_path, capsys):
    texts = [f"text {i}" for i in range(20)]
    save(texts, tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-1234.arrow").write_bytes(b"left by `map`")

    assert stored(tmp_path / "saved") == streamed(tmp_path / "saved") == texts
    assert stored(None, files=None, source=str(tmp_path / "saved")) == texts
    assert stored(tmp_path) == texts  # a folder around it
    assert capsys.readouterr().err == ""


def test_rows_that_were_chosen_before_saving_are_the_data_set(tmp_path):
    whole = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    whole.select([2, 0]).save_to_disk(tmp_path / "saved")

    assert stored(tmp_path / "saved") == ["c", "a"]


def test_a_saved_data_set_with_splits_wants_one_named(tmp_path):
    splits = {"train": ["a", "b"], "test": ["c"]}
    saved = tmp_path / "saved"
    datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in splits.items()}).save_to_disk(saved)

    with pytest.raises(ValueError, match=r"holds the splits \['train', 'test'\] of a data set\. Name one, such as"):
        stored(saved)
    assert stored(saved / "test") == ["c"]
    assert stored(None, files=None, source=str(saved)) == ["a", "b"]
    assert stored(None, files=None, source=str(saved), split="test") == ["c"]
    with pytest.raises(ValueError, match=r"has no split 'dev', only \['train', 'test'\]"):
        stored(None, files=None, source=str(saved), split="dev")


def test_a_saved_data_set_with_one_split_is_that(tmp_path):
    datasets.DatasetDict({"all": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "saved")

    assert stored(tmp_path / "saved") == ["a"]


def test_linked_folders_are_followed_and_circles_end(folder, tmp_path):
    path = folder(**{"a.txt": b"a"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_bytes(b"b")
    os.symlink(tmp_path / "elsewhere", path / "linked")
    os.symlink(path, path / "myself")
    os.symlink(tmp_path / "nothing", path / "gone.txt")

    assert stored(path) == ["a", "b"]
    assert find_files(str(path)).left_out == {"a link to nothing": ["gone.txt"]}


def test_slices_and_sums_of_splits_are_those_of_datasets(folder):
    path = str(folder(**{"train.jsonl": list("abcdefghij"), "test.jsonl": list("xyz")}))

    def chosen(split):
        return "".join(stored(None, files=None, source=path, split=split))

    assert chosen("train[:20%]") == "ab"
    assert chosen("train[8:]+test[:1]") == "ijx"
    with pytest.raises(ValueError, match=r"has no split 'dev', only"):
        chosen("dev[:10%]")
    with pytest.raises(ValueError, match=r"no such split as 'train\[:a\]'"):
        chosen("train[:a]")
