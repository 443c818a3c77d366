"""A data set on the Hub: read stored, streamed and, once stored, without the Hub."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hub_server import TestHub

READ = """
import json, sys
from hfgpt.config.schema import DataConfig
from hfgpt.data.text import read_source, stream_texts

for source in sys.argv[2:]:
    data = DataConfig(source=source)
    texts = read_source(data, None, "train") if sys.argv[1] == "stored" else stream_texts(data, None)
    print(json.dumps([row["text"] for row in texts]))
"""


def test_a_data_set_of_the_hub_is_read_like_files_and_again_without_the_hub(tmp_path):
    """By the same code as files, so that a column that `datasets` has no type for, or that varies, does no harm."""
    parquet = io.BytesIO()
    column = pa.array([[("key", 1)], []], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"text": ["a", "b"], "beside": column}), parquet)
    lines = b'{"text": "c", "n": 1}\n{"text": "", "n": []}\n{"n": "x", "text": "d"}\n'
    sources = ["user/parquet", "user/lines"]

    # Neither this machine's settings nor its caches.
    online = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    def read(how, **environment):
        return subprocess.run(
            [sys.executable, "-c", READ, how, *sources],
            env={**online, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), **environment},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
        )

    with TestHub({"hf_token": ["user"]}) as hub:
        hub.put("user/parquet", "add", {"README.md": b"# card\n", "train-00000-of-00001.parquet": parquet.getvalue()})
        hub.put(
            "user/lines", "add", {"LICENSE": b"MIT", "README.md": b"# card\n", "train.jsonl.gz": gzip.compress(lines)}
        )
        answers = [read("stored"), read("streamed"), read("stored", HF_HUB_OFFLINE="1")]

    for answer in answers:
        assert answer.returncode == 0, answer.stderr
        assert [json.loads(line) for line in answer.stdout.splitlines()] == [["a", "b"], ["c", "d"]]
