"""How fast text becomes rows, beside the way of transformers' run_clm: `python tests/training/preparation.py`.

Both read the same .jsonl, tokenize it with the same tokenizer on one process and make blocks of 1,024; then a file of
a gigabyte of tokens is opened, and its rows are read at random.
"""

import argparse
import json
import tempfile
import time
from itertools import chain
from pathlib import Path

import datasets
import datasets.arrow_writer
import numpy as np

from hfgpt.config.schema import DataConfig
from hfgpt.data.loaders import collate
from hfgpt.data.prepare import load_rows
from hfgpt.data.python_docs import documents
from hfgpt.data.rows import TokenArray, TokenRows
from hfgpt.data.text import load_documents
from hfgpt.data.tokenizer import train_tokenizer

BLOCK = 1024


def timed(make):
    started = time.perf_counter()
    result = make()
    return result, time.perf_counter() - started


def prepare_as_run_clm(path, tokenizer):
    """Tokenize batches of 1,000 texts, join each, cut it into blocks and drop its rest: run_clm's defaults."""
    texts = datasets.load_dataset("json", data_files=str(path), split="train")
    ids = texts.map(lambda batch: tokenizer(batch["text"], verbose=False), batched=True, remove_columns=["text"])

    def group(batch):
        joined = {name: list(chain(*lists)) for name, lists in batch.items()}
        whole = len(joined["input_ids"]) // BLOCK * BLOCK
        blocks = {name: [values[i : i + BLOCK] for i in range(0, whole, BLOCK)] for name, values in joined.items()}
        return {**blocks, "labels": list(blocks["input_ids"])}

    return ids.map(group, batched=True)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=50, help="of text to tokenize")
    parser.add_argument("--tokens", type=int, default=250_000_000, help="in the file that is opened, 4 bytes each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        datasets.config.HF_DATASETS_CACHE = place / "cache"
        datasets.disable_progress_bars()
        texts = list(documents())
        tokenizer = train_tokenizer(texts, 4096, model_max_length=BLOCK)
        size, number = 0, 0
        with (place / "text.jsonl").open("w") as file:
            while size < options.megabytes * 1_000_000:
                text = f"{number}\n{texts[number % len(texts)]}"
                size += file.write(json.dumps({"text": text}) + "\n")
                number += 1
        (place / "validation.jsonl").write_text(json.dumps({"text": "\n".join(texts[:20])}) + "\n")

        data = DataConfig(
            files=str(place / "text.jsonl"), validation_files=str(place / "validation.jsonl"), block_size=BLOCK
        )
        ours, seconds = timed(lambda: load_rows(load_documents(data, seed=0), tokenizer, data))
        theirs, their_seconds = timed(lambda: prepare_as_run_clm(place / "text.jsonl", tokenizer))
        tokens = ours.train_counts.tokens
        print(f"{size / 1e6:.0f} MB of text, {number:,} documents, {tokens:,} tokens, one process")
        print(
            f"hfgpt    {seconds:6.1f} s  {tokens / seconds:12,.0f} tokens/s  {ours.train_counts.remainder:,} left over"
        )
        kept = len(theirs) * BLOCK
        print(f"run_clm  {their_seconds:6.1f} s  {tokens / their_seconds:12,.0f} tokens/s  {tokens - kept:,} lost")
        _, again = timed(lambda: load_rows(load_documents(data, seed=0), tokenizer, data))
        print(f"hfgpt, found in the cache: {again:.2f} s")

        length = 2000
        rng = np.random.default_rng(0)
        with datasets.arrow_writer.ArrowWriter(
            features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
            path=str(place / "tokens.arrow"),
        ) as writer:
            for _ in range(options.tokens // length // 1000):
                writer.write_batch({"input_ids": list(rng.integers(0, 4096, (1000, length), dtype=np.int32))})
            writer.finalize()
        stream, opening = timed(lambda: TokenArray(datasets.Dataset.from_file(str(place / "tokens.arrow"))))
        rows = TokenRows(stream, BLOCK, range(1, len(stream) - BLOCK, BLOCK))
        print(f"{4 * len(stream) / 1e9:.2f} GB of tokens opened in {opening:.3f} s, {len(rows):,} rows")
        chosen = rng.integers(0, len(rows), (200, 16)).tolist()
        _, reading = timed(lambda: [collate([rows[index] for index in batch]) for batch in chosen])
        print(f"a micro-batch of 16 rows of {BLOCK}, at random: {reading / len(chosen) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
