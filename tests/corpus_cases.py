"""Small corpora and runs of the preparation, for the tests of it."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data import corpus_readers
from data.tokenize_corpus import Corpus, main

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "the of and data token model caf\u00e9 na\u00efve \u4f60\u597d \u4e16\u754c"
    " \u043f\u0440\u0438\u0432\u0435\u0442 \u0928\u092e\u0938\u094d\u0924\u0947"
    " \U0001f469\u200d\U0001f4bb 1234 3.14 <|endoftext|> <think> </s> e\u0301"
    " don't x_1 == \u2019 \n \n\n \t"
).split(" ")


def make_texts(count=300, seed=0):
    rng = random.Random(seed)
    return [
        f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 120)))
        for i in range(count)
    ]


def write_lines(path, texts, **extra):
    """JSON Lines, compressed as the suffix says."""
    lines = [json.dumps({"text": text, **extra}) + "\n" for text in texts]
    return write_raw_lines(path, "".join(lines).encode())


def write_raw_lines(path, data):
    if path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


def write_parquet(path, texts, column="text", type=None, **options):
    array = pa.array(texts, type)
    pq.write_table(pa.table({"id": range(len(texts)), column: array}), path,
                   **options)
    return path


def small_blocks(monkeypatch, size=4096):
    monkeypatch.setattr(corpus_readers, "BLOCK_BYTES", size)


def prepare(out, inputs, tokenizer, *arguments, **settings):
    """Run the pipeline in this process; SystemExit with its message."""
    inputs = inputs if isinstance(inputs, list) else [inputs]
    corpus = Corpus(
        folder=ROOT / "data" / "custom",
        inputs=None,
        tokenizer=None,
        **{"val_share": 0.2, "part_tokens": 4000, **settings},
    )
    main(corpus, None, [
        "--input", *map(str, inputs), f"--tokenizer={tokenizer}",
        f"--out={out}", "--num_proc=1", "--name=test", *arguments,
    ])


def start_script(dataset, *arguments, cwd=None, **env):
    """Begin data/DATASET/prepare.py as a user does."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "data" / dataset / "prepare.py"),
         *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env=os.environ | env,
        # a shell starts what runs in its background deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_script(*arguments, **settings):
    process = start_script(*arguments, **settings)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
