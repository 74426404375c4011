"""The embedded corpus, prepared for real on a part of the documents."""

import hashlib
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from corpus_cases import contents
from transformers import AutoTokenizer

from training.dataset import open_dataset, verify

SCRIPT = (
    Path(__file__).resolve().parent.parent
    / "data"
    / "python_stdlib"
    / "prepare.py"
)


def run(out, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, str(SCRIPT), f"--out={out}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
    )


STDLIB = Path(sysconfig.get_path("stdlib"))
SMALL = ("--max_documents=150", "--vocab_size=512")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stdlib") / "set"
    result = run(folder, *SMALL)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("stdlib_prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_dataset_holds_the_documents(prepared, script):
    folder, output = prepared
    dataset = open_dataset(folder)
    assert dataset.vocab_size == dataset.tokenizer_size == 512
    assert dataset.eot_id == 0
    assert verify(dataset, progress=False) == []
    tokenizer = AutoTokenizer.from_pretrained(dataset.tokenizer_folder)
    documents = script.collect_documents(STDLIB, 150)
    for name, split in dataset.splits.items():
        texts = [
            text for doc, text in documents if script.split_of(doc) == name
        ]
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        assert split.documents == len(texts) > 0
        assert split.bytes == sum(len(text.encode()) for text in texts)
        joined = hashlib.sha256(b"".join(digests)).hexdigest()
        assert split.text_sha256 == joined
        assert f"{split.tokens:,} tokens" in output
        ids = split.read(0, split.tokens)
        ends = np.flatnonzero(ids == 0)
        assert len(ends) == len(texts) and ends[-1] == len(ids) - 1
        start = 0
        for end, text in list(zip(ends, texts))[:10]:
            assert tokenizer.decode(ids[start:end]) == text
            start = end + 1


def test_the_tokenizer_loads_and_round_trips(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared[0] / "tokenizer")
    assert len(tokenizer) == 512
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == 0
    text = "def f(x):\n\treturn 'ü €  中 \U0001f40d'\r\n\x00"
    ids = tokenizer(text)["input_ids"]
    assert 0 not in ids and tokenizer.decode(ids) == text


def test_two_runs_give_the_same_bytes(prepared, tmp_path):
    result = run("again", *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "again") == contents(prepared[0])


def test_the_same_dataset_is_left_alone(prepared):
    before = {
        path: path.stat().st_mtime_ns for path in prepared[0].rglob("*")
    }
    result = run(prepared[0], *SMALL)
    assert result.returncode == 0
    assert "already holds this dataset: nothing to do" in result.stdout
    after = {path: path.stat().st_mtime_ns for path in prepared[0].rglob("*")}
    assert after == before


def test_another_dataset_is_replaced_only_when_asked(prepared, tmp_path):
    shutil.copytree(prepared[0], tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    other = ("--max_documents=100", "--vocab_size=300")
    result = run(tmp_path, *other)
    assert result.returncode == 1
    assert "made from other inputs" in result.stderr
    assert "--overwrite" in result.stderr
    assert "Traceback" not in result.stderr
    assert contents(tmp_path) == before
    assert run(tmp_path, *other, "--overwrite").returncode == 0
    dataset = open_dataset(tmp_path)
    assert dataset.vocab_size == 300
    assert verify(dataset, progress=False) == []


def test_a_damaged_dataset_is_named(prepared, tmp_path):
    shutil.copytree(prepared[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "train.bin").unlink()
    result = run(tmp_path, *SMALL)
    assert result.returncode == 1
    assert "train.bin is missing" in result.stderr
    assert "--overwrite" in result.stderr
    assert run(tmp_path, *SMALL, "--overwrite").returncode == 0
    assert verify(open_dataset(tmp_path), progress=False) == []


@pytest.mark.parametrize(
    "argument", ["--vocab_size=256", "--max_documents=2", "--vocabsize=1"]
)
def test_wrong_options(tmp_path, argument):
    result = run(tmp_path / "set", argument)
    assert result.returncode == 2
    assert argument in result.stderr
    assert not (tmp_path / "set").exists()


def test_an_unusable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    result = run(tmp_path / "file" / "set", *SMALL)
    assert result.returncode == 1
    assert "prepare.py: " in result.stderr
    assert "Traceback" not in result.stderr


def test_special_token_text_is_text(script, tmp_path):
    text = "end = '<|endoftext|>'  # not a border\n"
    documents = [(f"file{i}.py", text + f"x = {i}\n") for i in range(100)]
    tokenizer = script.train_tokenizer([text for _, text in documents], 300)
    record = {
        "name": "test",
        "size": tokenizer.get_vocab_size(),
        "sha256": "",
        "eot_id": 0,
        "eot_token": "<|endoftext|>",
        "path": None,
    }
    with script.DatasetWriter(
        tmp_path, name="test", vocab_size=300, tokenizer=record, source={}
    ) as writer:
        script.encode(tokenizer, documents, writer)
        writer.close()
    for split in open_dataset(tmp_path).splits.values():
        ids = split.read(0, split.tokens)
        assert np.sum(ids == 0) == split.documents > 0
        first = ids[: np.flatnonzero(ids == 0)[0]]
        assert tokenizer.decode(first).startswith(text)


def test_files_that_are_no_text_of_the_library(script, tmp_path):
    for name, content in {
        "good.py": b"x = 1\n",
        "package/__init__.py": b" \n",
        "package/latin.py": b"# \xe4\n",
        "package/unicode.py": "# ä\r\n".encode(),
        "package/test/test_it.py": b"x = 1\n",
        "site-packages/other.py": b"x = 1\n",
        "encodings/cp1.py": b"decoding_table = ''\n",
        "encodings/hex.py": b"x = 1\n",
        "_sysconfigdata_x.py": b"x = 1\n",
        "sitecustomize.py": b"x = 1\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    documents, left_out = script.source_documents(tmp_path)
    assert sorted(documents) == [
        ("encodings/hex.py", "x = 1\n"),
        ("good.py", "x = 1\n"),
        ("package/unicode.py", "# ä\r\n"),
    ]
    assert left_out == {"empty": 1, "not UTF-8": 1, "tables": 2}


def test_the_order_is_mixed_and_the_whole_is_about_11_mb(script):
    documents = script.collect_documents(STDLIB)
    names = [name for name, _ in documents]
    assert len(set(names)) == len(names) > 300
    due = sorted(documents)  # whatever order the file system has
    random.Random(script.SEED).shuffle(due)
    assert documents == due != sorted(documents)
    size = sum(len(text.encode()) for _, text in documents)
    assert 6e6 < size < 14e6  # distributors leave parts out
    val = [name for name in names if script.split_of(name) == "val"]
    assert 0.02 < len(val) / len(names) < 0.08


def test_the_record_names_no_folder_of_this_machine(prepared):
    meta = json.loads((prepared[0] / "meta.json").read_text())
    assert meta["source"]["documents"] == 150
    assert meta["source"]["vocab_size"] == 512
    assert str(Path.home()) not in json.dumps(meta)
