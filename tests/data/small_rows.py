"""Rows of a few ids, for tests."""

import datasets

from hfgpt.data.rows import TokenArray, TokenRows


def token_array(documents):
    """The array of documents given as lists of ids, each with its end-of-text in front."""
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    return TokenArray(datasets.Dataset.from_dict({"input_ids": documents}, features=features))


def numbered_rows(count, block_size=4):
    """Rows whose ids tell where they stand: row 2 is 20, 21, 22 ..."""
    ids = [[10 * row + column for column in range(block_size + 1)] for row in range(count)]
    return TokenRows(token_array(ids), block_size, range(0, count * (block_size + 1), block_size + 1))


def ids_of(rows):
    return [rows[index]["input_ids"].tolist() for index in range(len(rows))]
