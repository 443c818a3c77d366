"""What a row's text is, and what is refused: the same whether it is stored or streamed, a file or a data set."""

import bz2
import gzip
import io
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfgpt.config.schema import DataConfig
from hfgpt.data.text import read_source, stream_texts


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        yield


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(**columns):
    return as_parquet(pa.table(columns))


def as_parquet(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def arrow(new, **columns):
    table, buffer = pa.table(columns), io.BytesIO()
    with new(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def zstd(content):
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as packed:
        packed.write(content)
    return buffer.getvalue().to_pybytes()


ABC = ["a", "b", "c"]
ROWS = [{"text": text} for text in ABC]
LIST = json.dumps(ROWS).encode()
FROM_A_NEWER_HUB = {b"huggingface": b'{"info": {"features": {"text": {"_type": "Newest"}}}}'}

READ = {
    "other-keys-vary.jsonl": jsonl({"text": "a", "n": 1}, {"text": "b", "n": "x"}, {"n": [{}], "text": "c"}),
    "other-keys-late.jsonl": jsonl(*ROWS) + jsonl(*[{"text": ""}] * 2_000, {"text": "", "late": {"key": 1}}),
    "content-beside-text.jsonl": jsonl(*[{"content": "no", **row} for row in ROWS]),
    "blank-lines.jsonl": b"\n" + jsonl(*ROWS).replace(b"\n", b"\r\n \r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(*ROWS),
    "no-line-feed.ndjson": jsonl(*ROWS).strip(),
    "list.json": LIST,
    "list-over-lines.json": json.dumps(ROWS, indent=1).encode(),
    "list-of-texts.json": json.dumps(ABC).encode(),
    "lines.json": jsonl(*ROWS),
    "list.jsonl": LIST,
    "quoted.csv": b'n,text\n1,a\n\n2,"b"\n"3,",c\n',
    "bom.csv": b"\xef\xbb\xbftext,n\na,1\nb,2\nc,3\n",
    "carriage-returns.csv": b"text,n\ra,1\rb,2\rc,3",
    "tabs.tsv": b"text\tn\na\t,\nb\t,\nc\t,\n",
    "string.parquet": parquet(text=ABC),
    "large_string.parquet": parquet(text=pa.array(ABC, pa.large_string())),
    "string_view.parquet": parquet(text=pa.array(ABC, pa.string_view())),
    "dictionary.parquet": parquet(text=pa.array(ABC).dictionary_encode()),
    "binary.parquet": parquet(text=pa.array([b"a", b"b", b"c"], pa.binary())),
    "large_binary.parquet": parquet(text=pa.array([b"a", b"b", b"c"], pa.large_binary())),
    "map-beside.parquet": parquet(text=ABC, m=pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64()))),
    "newer-hub.parquet": as_parquet(pa.table({"text": ABC}).replace_schema_metadata(FROM_A_NEWER_HUB)),
    "odd-types-beside.parquet": parquet(text=ABC, d=pa.array([1, 2, 3], pa.duration("s")), n=pa.nulls(3)),
    "stream.arrow": arrow(pa.ipc.new_stream, text=ABC, n=[1, 2, 3]),
    "feather.arrow": arrow(pa.ipc.new_file, text=pa.array(ABC).dictionary_encode()),
    "rows.jsonl.gz": gzip.compress(jsonl(*ROWS)),
    "two-members.jsonl.gz": gzip.compress(jsonl(ROWS[0])) + gzip.compress(jsonl(*ROWS[1:])),
    "rows.jsonl.zst": zstd(jsonl(*ROWS)),
    "two-frames.jsonl.zst": zstd(jsonl(*ROWS[:2])) + zstd(jsonl(ROWS[2])),
    "rows.csv.bz2": bz2.compress(b"text\na\nb\nc\n"),
    "list.json.xz": lzma.compress(LIST),
    "UPPER.JSONL.GZ": gzip.compress(jsonl(*ROWS)),
}


def by_every_path(folder, name, content):
    """The texts of a file by each way to read it, or what was said instead."""
    path = folder / "set" / name
    path.parent.mkdir()
    path.write_bytes(content)
    answers = []
    for data in (DataConfig(files=str(path)), DataConfig(source=str(path.parent))):
        for read in (read_stored, read_streamed):
            try:
                answers.append(read(data))
            except ValueError as error:
                answers.append(str(error).replace(str(path), name))
    return answers


def read_stored(data):
    return read_source(data, data.files, data.split)["text"][:]


def read_streamed(data):
    return [row["text"] for row in stream_texts(data, shuffle_seed=None)]


@pytest.mark.parametrize("name", READ)
def test_every_path_reads_the_same_texts(tmp_path, name):
    content = READ[name]

    answers = by_every_path(tmp_path, name, content)

    if name == "UPPER.JSONL.GZ":  # `datasets` finds no data set in such a folder
        answers = answers[:2]
    assert answers == [ABC] * len(answers)


def test_what_looks_like_something_else_is_text(tmp_path):
    texts = ["2024-01-01", "12:30", "007", "1e3", "NA", "null", "nan", "True", "[1]", " "]

    for name, content in [
        ("a.jsonl", jsonl(*[{"text": text} for text in texts])),
        ("a.csv", ("text\n" + "\n".join(texts) + "\n").encode()),
        ("a.parquet", parquet(text=texts)),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        assert by_every_path(folder, name, content) == [texts] * 4


NOT_A_TEXT = {"None": None, "1": 1, "1.5": 1.5, "True": True, "['a']": ["a"], "{'a': 'b'}": {"a": "b"}}


@pytest.mark.parametrize("value", NOT_A_TEXT.values(), ids=NOT_A_TEXT)
@pytest.mark.parametrize("row", [0, 2, 3_000])
def test_a_value_that_is_no_text_is_refused_by_every_path(tmp_path, value, row):
    rows = [{"text": f"some words, number {i}"} for i in range(row)] + [{"text": value}, {"text": "z"}]
    name = "a.jsonl"

    answers = by_every_path(tmp_path, name, jsonl(*rows))

    assert answers == [f"a.jsonl: row {row} (the first is 0) of column 'text' must be a text, got {value!r}."] * 4


REFUSED = {
    "missing.jsonl": (jsonl(*ROWS, {"body": "x"}), ": row 3 (the first is 0) has no column 'text'"),
    "other-name.jsonl": (jsonl({"content": "x"}), " has no column 'text', only ['content']"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', ": row 0 (the first is 0) of column 'text' holds half"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', ": row 1 (the first is 0) is no JSON: Unterminated string"),
    "texts.jsonl": (b'"a"\n"b"\n', ": row 0 (the first is 0) must be an object with 'text' in it, got 'a'."),
    "mixed.json": (b'["a", {"text": "b"}]', ": row 0 (the first is 0) must be an object with 'text' in it"),
    "columns.json": (b'{"text": ["a", "b"]}', ": row 0 (the first is 0) of column 'text' must be"),
    "nested.json": (json.dumps({"data": ROWS}).encode(), " has no column 'text', only ['data']"),
    "bytes.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', " is not UTF-8: byte 0xff at offset 24 (invalid"),
    "more.csv": (b"text\na,b\nc,d\n", ": row 0 (the first is 0) has 2 field(s), the header 1."),
    "more-later.csv": (b"text,n\na,1\nb, c,2\n", ": row 1 (the first is 0) has 3 field(s), the header 2."),
    "fewer.csv": (b"text,n\nhello\nworld,1\n", ": row 0 (the first is 0) has 1 field(s), the header 2."),
    "comma-at-the-end.csv": (b"text,n\na,1,\n", ": row 0 (the first is 0) has 3 field(s), the header 2."),
    "twice.csv": (b"text,text\na,b\n", " has 2 columns 'text'. Give the text's a name of its own."),
    "semicolon.csv": (b"text;n\na;1\n", " has no column 'text', only ['text;n']"),
    "open-quote.csv": (b'text\n"a\nb\n', " cannot be read: unexpected end of data, in line 3."),
    "null.parquet": (parquet(text=["a", None]), ": row 1 (the first is 0) of column 'text' must be"),
    "nulls.parquet": (parquet(text=pa.nulls(2)), ": row 0 (the first is 0) of column 'text' must be"),
    "number.parquet": (parquet(text=[1, 2]), ": row 0 (the first is 0) of column 'text' must be a text, got 1."),
    "date.parquet": (parquet(text=pa.array([1], pa.date32())), ": row 0 (the first is 0) of column 'text' must be"),
    "list.parquet": (parquet(text=[["a"]]), ": row 0 (the first is 0) of column 'text' must be a text, got ['a']."),
    "bytes.parquet": (parquet(text=[b"a", b"\xff"]), ": row 1 (the first is 0) of column 'text' is not UTF-8"),
    "cut.parquet": (parquet(text=ABC)[:-20], " cannot be read: Parquet magic bytes not found"),
    "number.arrow": (arrow(pa.ipc.new_stream, text=[1]), ": row 0 (the first is 0) of column 'text' must be"),
    "cut.jsonl.gz": (gzip.compress(jsonl(*ROWS))[:-10], " cannot be read: Compressed file ended before"),
    "cut.jsonl.zst": (zstd(jsonl(*ROWS))[:-5], " cannot be read: Truncated compressed stream"),
    "cut.csv.xz": (lzma.compress(b"text\na\n")[:-10], " cannot be read: Compressed file ended before"),
    "plain.jsonl.gz": (jsonl(*ROWS), " cannot be read: Not a gzipped file"),
    "bytes.jsonl.gz": (gzip.compress(b'{"text": "\xff"}'), " is not UTF-8: byte 0xff at offset 10"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_path_refuses_with_the_same_words(tmp_path, name):
    content, message = REFUSED[name]

    answers = by_every_path(tmp_path, name, content)

    assert answers[0].startswith(name + message)
    assert answers == [answers[0]] * 4
    assert "\n" not in answers[0]


def test_bytes_that_are_never_read_are_not_looked_at(tmp_path):
    """A later row of a stream may still be bad: it is refused when it comes."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')

    stream = iter(stream_texts(DataConfig(files=str(path)), shuffle_seed=None))

    assert next(stream) == {"text": "a"}
    with pytest.raises(ValueError, match=r"a\.jsonl is not UTF-8: byte 0xff at offset 24"):
        next(stream)


def test_a_text_longer_than_any_buffer_is_read(tmp_path):
    long = "word " * 100_000

    for name, content in [("a.csv", f'text\n"{long}"\n'.encode()), ("a.jsonl", jsonl({"text": long}))]:
        folder = tmp_path / name
        folder.mkdir()
        assert by_every_path(folder, name, content) == [[long]] * 4
