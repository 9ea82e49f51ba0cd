"""A data set of the hub, served by a small hub on this machine, read in a process that knows no other."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("datasets")

READ = """
import json, pickle, sys
from spade_t5.data import lines
from spade_t5.data.bad_rows import BadRows
from spade_t5.errors import DataError
from spade_t5.pretrain.corpora import HubCorpus

lines.RETRY_PAUSES_SECONDS = (0.0,) * 8
found = []
for settings in json.loads(sys.argv[1]):
    try:
        corpus = pickle.loads(pickle.dumps(HubCorpus(**settings).open()))
        bad_rows = BadRows()
        files = range(len(corpus.files))
        texts = [[document.text for document in corpus.read(file, 0, bad_rows)] for file in files]
        behind_first = [len(list(corpus.read(file, 1, BadRows()))) for file in files]
        found.append([corpus.fingerprint, texts, behind_first, dict(bad_rows.reasons)])
    except DataError as error:
        found.append(str(error))
print(json.dumps(found))
"""

README = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train.*.json.gz
- config_name: tables
  data_files:
  - split: train
    path: tables/*.csv
---
"""


@pytest.fixture(scope="module")
def hub_server() -> ModuleType:
    path = Path(__file__).with_name("hub_server.py")
    spec = importlib.util.spec_from_file_location("hub_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_of_one_commit_are_read_by_our_readers(tmp_path: Path, hub_server: ModuleType) -> None:
    rows = [b'{"text": "%d", "url": "u"}\n' % (number * 7919) for number in range(3000)]
    files = {
        "README.md": README,
        "en/train.0.json.gz": gzip.compress(b"".join(rows[:2000])),
        "en/train.1.json.gz": gzip.compress(b"".join([*rows[2000:], b"not JSON\n"])),
        "tables/a.csv": b"text\na\n",
    }
    settings = [
        {"dataset": "user/set", "subset": "en"},
        {"dataset": "user/set", "subset": "tables"},
        {"dataset": "user/set", "subset": "fr"},
        {"dataset": "user/set", "subset": "en", "split": "validation"},
    ]
    with hub_server.hub(files, torn_answers=1) as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", READ, json.dumps(settings)], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    (fingerprint, texts, behind_first, reasons), unknown_kind, unknown_subset, unknown_split = json.loads(done.stdout)
    assert [name for name, _ in fingerprint["files"]] == [
        f"hf://datasets/user/set@{hub_server.COMMIT}/en/train.{number}.json.gz" for number in range(2)
    ]
    assert [size for _, size in fingerprint["files"]] == [len(files[f"en/train.{number}.json.gz"]) for number in (0, 1)]
    expected = [json.loads(row)["text"] for row in rows]
    assert texts == [expected[:2000], expected[2000:]]
    assert behind_first == [1999, 999]
    assert reasons == {"not JSON": 1}
    assert "a.csv: unknown kind of file" in unknown_kind
    assert "corpus.dataset: user/set cannot be loaded" in unknown_subset
    assert "corpus.split: user/set has no split 'validation'; use one of train" in unknown_split


STREAM = """
import sys
from spade_t5.errors import ConfigError
from spade_t5.pretrain.corpora import HubCorpus
from spade_t5.pretrain.objectives import SpanCorruption
from spade_t5.pretrain.streaming import StreamingData

for revision in (None, "main", sys.argv[2]):
    corpus = HubCorpus(dataset="user/set", subset="en", revision=revision)
    data = StreamingData(corpus=corpus, tokenizer=sys.argv[1], lanes=2, held_out_fraction=0.2, max_eval_rows=2)
    try:
        print(data.open(SpanCorruption(inputs_length=32), seed=0).eval_rows.num_rows)
    except ConfigError as error:
        print(error)
"""


def test_a_stream_wants_the_commit_so_that_a_resume_reads_the_same(
    tmp_path: Path, hub_server: ModuleType, tokenizer_folder: Path
) -> None:
    rows = [b'{"text": "some words of number %d"}\n' % number for number in range(100)]
    files = {"README.md": README, **{f"en/train.{n}.json.gz": gzip.compress(b"".join(rows[n::2])) for n in range(2)}}
    with hub_server.hub(files) as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", STREAM, str(tokenizer_folder), hub_server.COMMIT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    newest, branch, commit = done.stdout.splitlines()
    remedy = f"set it to the commit that it is now, data.corpus.revision={hub_server.COMMIT}"
    assert newest == f"data.corpus.revision: null may be another commit when the run goes on; {remedy}"
    assert branch == f"data.corpus.revision: main may be another commit when the run goes on; {remedy}"
    assert commit == "2"
