import json
import sys

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfgpt.config.schema import DataConfig
from hfgpt.data import python_docs
from hfgpt.data.text import load_documents, store_rows

ODD = "a\r\nb\rc\n\0 \ufeffe\u0301 \U0001f600 한국어 <|endoftext|>, \"q\" 'x'\t "


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        yield


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def in_order(files, **options):
    """Both parts of the text, joined again in the order of the source."""
    documents = load_documents(DataConfig(files=files, shuffle_documents=False, **options), seed=0)
    return [*documents.train["text"], *documents.validation["text"]]


@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.TXT"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, name):
    assert in_order([write(tmp_path / name, "\ufeff" + ODD), write(tmp_path / "z.txt", "z")]) == ["\ufeff" + ODD, "z"]


def test_jsonl_json_csv_and_parquet_give_their_texts_unchanged(tmp_path):
    texts = [ODD, "NA", "007", "x"]
    pq.write_table(pa.table({"text": texts, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    files = [
        str(tmp_path / "a.parquet"),
        write(tmp_path / "b.jsonl", jsonl(*[{"text": text, "n": 1} for text in texts])),
        write(tmp_path / "c.json", json.dumps([{"text": text} for text in texts])),
        write(tmp_path / "d.csv", "n,text\r\n" + "".join(f"1,{text}\r\n" for text in quoted)),
    ]

    for file in files:
        assert in_order(file) == texts
    assert in_order(files) == texts * 4


def test_a_csv_of_numbers_keeps_their_spelling(tmp_path):
    assert in_order(write(tmp_path / "a.csv", "text\n007\n1e3\n")) == ["007", "1e3"]


def test_a_folder_is_walked_in_sorted_order_and_files_of_other_kinds_are_left_out(tmp_path):
    write(tmp_path / "b" / "2.txt", "three")
    write(tmp_path / "b" / "1.jsonl", jsonl({"text": "two"}))
    write(tmp_path / "a.md", "one")
    write(tmp_path / "c.txt", "four")
    write(tmp_path / "image.png", b"\xff")
    write(tmp_path / "weird [1]*.jsonl", jsonl({"text": "five"}))

    assert in_order(str(tmp_path)) == ["one", "two", "three", "four", "five"]
    assert in_order([str(tmp_path / "c.txt"), str(tmp_path / "b")]) == ["four", "two", "three"]


def test_the_text_column_can_have_another_name(tmp_path):
    file = write(tmp_path / "a.jsonl", jsonl({"text": 1, "body": "one"}, {"text": 2, "body": "two"}))

    assert in_order(file, text_column="body") == ["one", "two"]


def test_empty_documents_are_left_out_and_blank_ones_are_not(tmp_path):
    files = [
        write(tmp_path / "a.txt", ""),
        write(tmp_path / "b.txt", " "),
        write(tmp_path / "c.jsonl", jsonl({"text": ""}, {"text": "\n"}, {"text": "x"})),
        write(tmp_path / "d.jsonl", ""),
        write(tmp_path / "e.csv", "text,n\n,1\nNA,2\n"),
    ]

    assert in_order(files) == [" ", "\n", "x", "NA"]


def test_a_changed_file_is_read_again(tmp_path):
    text, table = tmp_path / "a.txt", tmp_path / "b.jsonl"
    for content in ["old", "new"]:
        write(text, content)
        write(table, jsonl({"text": content + "!"}))
        assert in_order([str(text), str(table)]) == [content, content + "!"]


def test_text_that_changes_while_it_is_read_is_refused():
    contents = iter(["before", "after"])

    with pytest.raises(ValueError, match=r"the text changed while it was read\."):
        store_rows(lambda: [{"text": "before"}], lambda: next(contents))


def test_a_data_set_is_loaded_by_name_and_split(tmp_path):
    for split in ["train", "test"]:
        write(tmp_path / f"{split}.jsonl", jsonl(*[{"text": f"{split} {i}", "id": i} for i in range(3)]))
    source = str(tmp_path)  # `load_dataset` takes a folder in the place of a Hub id

    part = load_documents(DataConfig(source=source, split="test", shuffle_documents=False), seed=0)
    both = load_documents(DataConfig(source=source, validation_split="test", shuffle_documents=False), seed=0)

    assert [*part.train["text"], *part.validation["text"]] == ["test 0", "test 1", "test 2"]
    assert both.train["text"][:] == ["train 0", "train 1", "train 2"]
    assert both.validation["text"][:] == ["test 0", "test 1", "test 2"]
    with pytest.raises(ValueError, match=r"has no split 'tset', only \['train', 'test'\]\. Set `data\.split`\.$"):
        load_documents(DataConfig(source=source, split="tset"), seed=0)


def test_the_validation_part_is_the_last_of_the_shuffled_documents(tmp_path):
    file = write(tmp_path / "a.jsonl", jsonl(*[{"text": str(i)} for i in range(20)]))

    plain = load_documents(DataConfig(files=file, validation_fraction=0.25, shuffle_documents=False), seed=0)
    first, again, other = (load_documents(DataConfig(files=file, validation_fraction=0.25), seed=s) for s in (1, 1, 2))

    assert plain.validation["text"][:] == [str(i) for i in range(15, 20)]
    assert (len(first.train), len(first.validation)) == (15, 5)
    assert sorted([*first.train["text"], *first.validation["text"]], key=int) == [str(i) for i in range(20)]
    assert first.validation["text"][:] == again.validation["text"][:] != other.validation["text"][:]
    assert first.train["text"][:] != sorted(first.train["text"], key=int)


@pytest.mark.parametrize(("fraction", "sizes"), [(0.001, (2, 1)), (0.999, (1, 2))])
def test_each_part_has_at_least_one_document(tmp_path, fraction, sizes):
    file = write(tmp_path / "a.jsonl", jsonl({"text": "a"}, {"text": "b"}, {"text": "c"}))

    documents = load_documents(DataConfig(files=file, validation_fraction=fraction), seed=0)

    assert (len(documents.train), len(documents.validation)) == sizes


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_single_document_is_cut_at_a_character(tmp_path, shuffle):
    file = write(tmp_path / "a.txt", "0123456여우\n")

    documents = load_documents(DataConfig(files=file, validation_fraction=0.3, shuffle_documents=shuffle), seed=0)

    assert documents.train["text"][:] == ["0123456"]
    assert documents.validation["text"][:] == ["여우\n"]


def test_given_validation_files_are_taken_as_they_are(tmp_path):
    train = write(tmp_path / "train.jsonl", jsonl(*[{"text": str(i)} for i in range(9)]))
    validation = write(tmp_path / "validation.jsonl", jsonl({"text": "b"}, {"text": "a"}))

    documents = load_documents(DataConfig(files=train, validation_files=validation), seed=0)

    assert sorted(documents.train["text"]) == [str(i) for i in range(9)] != documents.train["text"][:]
    assert documents.validation["text"][:] == ["b", "a"]


REFUSALS = {
    "a.jsonl": (jsonl({"body": "x"}), r"a\.jsonl has no column 'text', only \['body'\]"),
    "b.jsonl": (jsonl({"text": "x"}, {"text": None}), r"row 1 \(the first is 0\) of column 'text' .* got None"),
    "c.jsonl": (jsonl({"text": "x"}, {"text": 2}), r"c\.jsonl: row 1 .* got 2\."),
    "d.jsonl": (jsonl({"text": 1}), r"row 0 .* got 1\."),
    "e.jsonl": ('{"text": "a"}\n{"text"\n', r"e\.jsonl: row 1 \(the first is 0\) is no JSON: Expecting ':'"),
    "f.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', r"f\.jsonl is not UTF-8: byte 0xff at offset 24"),
    "g.txt": (b"abc\xed\xa0\x80", r"g\.txt is not UTF-8: byte 0xed at offset 3"),
    "h.txt": ("a".encode("utf-16"), r"h\.txt is not UTF-8: byte 0xff at offset 0"),
    "i.csv": (
        "text\na,b\n",
        r"i\.csv: row 0 \(the first is 0\) has 2 field\(s\), the header 1\. Quote texts",
    ),
    "j.csv": (b"text\n\xff\n", r"j\.csv is not UTF-8: byte 0xff at offset 5"),
    "k.csv": ('text\n"a\n', r"k\.csv cannot be read: unexpected end of data, in line 2"),
    "m.parquet": ("not parquet", r"m\.parquet cannot be read: Parquet magic bytes not found"),
    "n.txt": ("", r"n\.txt is empty: there is no text to read\."),
    "o.jsonl": (jsonl({"text": ""}), r"o\.jsonl is empty: there is no text to read\."),
    "p.jsonl": ("\n", r"p\.jsonl is empty: there is no text to read\."),
    "q.txt": ("a", r"single character: there is nothing to split"),
    "r.pdf": ("a", r"the name must end in one of \.txt, .* got '\.pdf'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_file_that_is_not_text_is_refused_in_one_line(tmp_path, name):
    content, message = REFUSALS[name]

    with pytest.raises(ValueError, match=message) as refusal:
        load_documents(DataConfig(files=write(tmp_path / name, content)), seed=0)

    assert "\n" not in str(refusal.value)


def test_paths_that_are_not_there_are_refused(tmp_path):
    write(tmp_path / "folder" / "image.png", b"")

    for files, message in [
        ([], r"`data\.files` and .* must be a path or a list of paths, got \[\]"),
        ([1], r"must be a path or a list of paths, got \[1\]"),
        (str(tmp_path / "a.txt"), r"there is no file or folder '.*a\.txt'"),
        (str(tmp_path / "folder"), r"the folder .* holds no file that ends in \.txt"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_documents(DataConfig(files=files), seed=0)


def test_a_text_column_without_a_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`data\.text_column` \('body'\) has no effect"):
        load_documents(DataConfig(files=write(tmp_path / "a.txt", "text"), text_column="body"), seed=0)
    with pytest.raises(ValueError, match=r"`data\.text_column` \('body'\) has no effect"):
        load_documents(DataConfig(source="pydoc", text_column="body"), seed=0)

    table, text = write(tmp_path / "b.jsonl", jsonl({"body": "table"})), str(tmp_path / "a.txt")
    both = load_documents(DataConfig(files=table, validation_files=text, text_column="body"), seed=0)
    assert (both.train["text"][:], both.validation["text"][:]) == (["table"], ["text"])


def test_a_data_set_that_cannot_be_reached_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^nobody/nothing cannot be read: [^\n]+$"):
        load_documents(DataConfig(source="nobody/nothing"), seed=0)


def test_pydoc_is_the_documentation_of_this_python_and_imports_nothing():
    modules = set(sys.modules)

    texts = list(python_docs.documents())

    new = set(sys.modules) - modules
    assert not {name for name in new if not name.startswith("encodings.")}  # codecs that a file's first line names
    assert sum(map(len, texts)) > 1_500_000
    assert len(texts) == len(set(texts)) > 500
    assert texts[0].startswith('The "assert" statement')
    assert any(json.__doc__.strip() in text and json.dumps.__doc__.splitlines()[0] in text for text in texts)
    documents = load_documents(DataConfig(source="pydoc", shuffle_documents=False), seed=0)
    assert [*documents.train["text"], *documents.validation["text"]] == texts


def test_docstrings_come_in_the_order_of_the_source_without_those_of_tests(tmp_path):
    source = 'class A:\n    """A."""\n    def b(self):\n        """B\n\n          b."""\n'
    write(tmp_path / "two.py", f'"""Two."""\nif True:\n    {source.replace(chr(10), chr(10) + "    ")}\nx = "no"\n')
    write(tmp_path / "a" / "one.py", 'async def f():\n    """F."""\n')
    write(tmp_path / "test" / "hidden.py", '"""Hidden."""')
    write(tmp_path / "broken.py", b'"""Broken \xff"""')

    assert list(python_docs.module_documents(tmp_path)) == ["F.", "Two.\n\nA.\n\nB\n\nb."]
