"""How fast data preparation is, and how much memory it takes, against peers.

The same text goes through `data/custom/prepare.py` (from Parquet and from
.jsonl.zst), through `tokenizers.encode_batch`, and through preparations in
the manner of nanoGPT's: `datasets.map` over one document at a time, once with
nanoGPT's own tiktoken and once with transformers' AutoTokenizer. Every run is
a process of its own, timed from its start to its end; beside each peer this
project runs again, so that what else the machine does hits both. Processor
time, user's and system's, depends on that the least. Memory is the largest sum
over the process tree of proportional set sizes.

The text is whatever distinct documentation and source code this machine has;
with --text it is yours. Nothing is downloaded.

    python benchmarks/prepare_speed.py --tokenizer qwen3_tokenizer
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.dataset import open_dataset, verify  # noqa: E402

SUFFIXES = (".py", ".md", ".rst", ".txt", ".html")
MAX_FILE_BYTES = 10**6
ROWS = 1000  # of a Parquet row group, as the hub's
NANOGPT_BATCHES = 1024


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="folder with a tokenizer.json")
    add("--text", nargs="+", type=Path, help="folders with text files")
    add("--megabytes", type=int, default=60, help="of text, for all")
    add("--larger", type=int, default=10, help="times that, for most")
    add("--repeats", type=int, default=1)
    add("--num_proc", type=int, default=len(os.sched_getaffinity(0)))
    add("--work", type=Path, help="folder for corpora and bins (default: a"
        " temporary one)")
    add("--peer", nargs=3, help=argparse.SUPPRESS)  # name, Parquet file, out
    return parser.parse_args()


# The text


def find_texts(folders, limit):
    """(path, data) of distinct text files, mixed, up to `limit` bytes."""
    found = {}
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                if path.suffix in SUFFIXES and not path.is_symlink():
                    found[hashlib.sha256(str(path).encode()).digest()] = path
    seen, total = set(), 0
    for key in sorted(found):
        try:
            data = found[key].read_bytes()
            data.decode()
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(data).digest()
        if 0 < len(data) <= MAX_FILE_BYTES and digest not in seen:
            seen.add(digest)
            yield found[key], data
            total += len(data)
            if total >= limit:
                return


def write_corpora(folders, small, large, work):
    """Parquet and .jsonl.zst of two sizes; {size name: bytes}, and kinds."""
    schema = pa.schema({"text": pa.string()})
    sizes, kinds = {"small": 0, "large": 0}, Counter()
    for name, limit in (("small", small), ("large", large)):
        rows = []
        with (
            pq.ParquetWriter(work / f"{name}.parquet", schema) as parquet,
            open(work / f"{name}.jsonl.zst", "wb") as file,
            zstandard.ZstdCompressor(3).stream_writer(file) as lines,
        ):
            for path, data in find_texts(folders, limit):
                record = {"text": data.decode(), "meta": {"path": str(path)}}
                lines.write(json.dumps(record).encode() + b"\n")
                rows.append(record["text"])
                if len(rows) == ROWS:
                    parquet.write_table(pa.table([rows], schema))
                    rows = []
                sizes[name] += len(data)
                if name == "large":
                    kinds[path.suffix] += len(data)
            parquet.write_table(pa.table([rows], schema))
    return sizes, kinds


# The peers, each run in a process of its own


def encode_batch(path, out, options):
    """tokenizers.encode_batch on all cores, ids appended to one file."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{options.tokenizer}/tokenizer.json")
    eot = tokenizer.token_to_id("<|endoftext|>")
    with open(f"{out}/train.bin", "wb") as file:
        for batch in pq.ParquetFile(path).iter_batches(ROWS):
            texts = batch.column(0).to_pylist()
            for encoding in tokenizer.encode_batch(
                texts, add_special_tokens=False
            ):
                np.array([*encoding.ids, eot], np.uint32).tofile(file)


def tiktoken_encoding(folder):
    """tiktoken with the ranks and pattern of a byte-level tokenizer.json."""
    import tiktoken

    from data.download_qwen3_tokenizer import byte_alphabet

    content = json.loads(Path(folder, "tokenizer.json").read_bytes())
    byte = {char: n for n, char in enumerate(byte_alphabet())}
    ranks = {
        bytes(byte[char] for char in token): id
        for token, id in content["model"]["vocab"].items()
    }
    split = content["pre_tokenizer"]["pretokenizers"][0]
    special = {t["content"]: t["id"] for t in content["added_tokens"]}
    return tiktoken.Encoding(
        "peer",
        pat_str=split["pattern"]["Regex"],
        mergeable_ranks=ranks,
        special_tokens=special,
    )


def nanogpt_style(path, out, options, encode, eot):
    """As nanoGPT's data/openwebtext/prepare.py, with uint32."""
    import datasets

    dataset = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=f"{out}/cache"
    )
    split = dataset.train_test_split(test_size=0.005, seed=42, shuffle=True)
    split["val"] = split.pop("test")

    def process(example):
        ids = encode(example["text"])
        ids.append(eot)
        return {"ids": ids, "len": len(ids)}

    tokenized = split.map(
        process,
        remove_columns=["text"],
        desc="tokenizing the splits",
        num_proc=options.num_proc,
    )
    for name, rows in tokenized.items():
        length = int(np.sum(rows.with_format("numpy")["len"], dtype=np.uint64))
        array = np.memmap(
            f"{out}/{name}.bin", dtype=np.uint32, mode="w+", shape=(length,)
        )
        batches, done = min(NANOGPT_BATCHES, len(rows)), 0
        for i in range(batches):
            batch = rows.shard(
                num_shards=batches, index=i, contiguous=True
            ).with_format("numpy")
            ids = np.concatenate(list(batch["ids"]))
            array[done : done + len(ids)] = ids
            done += len(ids)
        array.flush()


def nanogpt_tiktoken(path, out, options):
    encoding = tiktoken_encoding(options.tokenizer)
    eot = encoding._special_tokens["<|endoftext|>"]
    nanogpt_style(path, out, options, encoding.encode_ordinary, eot)


def nanogpt_autotokenizer(path, out, options):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    eot = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    nanogpt_style(path, out, options, tokenizer.encode, eot)


PEERS = {
    "tokenizers.encode_batch": encode_batch,
    "nanoGPT-style, tiktoken": nanogpt_tiktoken,
    "nanoGPT-style, AutoTokenizer": nanogpt_autotokenizer,
}
# On the larger text, too, where starting costs little.
BOTH = ("nanoGPT-style, tiktoken", "nanoGPT-style, AutoTokenizer")


# Measuring


def measure(command, num_proc):
    """(seconds, processor seconds, peak bytes of the tree) of a command."""
    env = os.environ | {
        "RAYON_NUM_THREADS": str(num_proc),
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_OFFLINE": "1",
    }
    start, cpu, peak = time.perf_counter(), children_seconds(), 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=env
        )
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, tree_memory(tree))
            time.sleep(0.1)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            sys.exit(f"{command} failed:\n{log.read().decode()[-3000:]}")
    return seconds, children_seconds() - cpu, peak


def children_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tree_memory(tree):
    total = 0
    try:
        for process in [tree, *tree.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:  # one has just ended
        pass
    return total


def run_ours(options, work, corpus):
    out = work / "ours"
    measured = measure(
        [
            sys.executable, ROOT / "data/custom/prepare.py",
            "--input", work / corpus, "--tokenizer", options.tokenizer,
            "--name", "benchmark", "--out", out,
            "--num_proc", options.num_proc,
        ],
        options.num_proc,
    )
    dataset = open_dataset(out)
    assert verify(dataset, progress=False) == []
    tokens = sum(split.tokens for split in dataset.splits.values())
    shutil.rmtree(out)
    return *measured, tokens


def run_peer(options, work, name, size):
    out = work / "peer"
    out.mkdir()
    measured = measure(
        [
            sys.executable, __file__, "--tokenizer", options.tokenizer,
            "--num_proc", options.num_proc,
            "--peer", name, work / f"{size}.parquet", out,
        ],
        options.num_proc,
    )
    tokens = sum(path.stat().st_size for path in out.glob("*.bin")) // 4
    shutil.rmtree(out)
    return *measured, tokens


def run_all(options, work):
    """{(name, corpus size): results}, and {.. of a peer: ours beside it}."""
    found, beside = {}, {}

    def note(name, size, result):
        found.setdefault((name, size), []).append(result)
        seconds, cpu, peak, tokens = result
        print(
            f"  {name}, {size}: {seconds:.1f} s, {cpu:.1f} s of processors,"
            f" {peak / 1e9:.2f} GB, {tokens:,} tokens",
            file=sys.stderr,
        )
        return result

    def ours(kind, size):
        result = run_ours(options, work, f"{size}.{kind}")
        return note(f"this project, .{kind}", size, result)

    for _ in range(options.repeats):
        for size in ("small", "large"):
            ours("jsonl.zst", size)
            for name in PEERS if size == "small" else BOTH:
                pair = [ours("parquet", size)]
                note(name, size, run_peer(options, work, name, size))
                pair.append(ours("parquet", size))
                beside.setdefault((name, size), []).extend(pair)
    return found, beside


def median(results, column):
    return statistics.median(result[column] for result in results)


def report(options, sizes, kinds, found, beside):
    packages = ("gigatoken", "tokenizers", "tiktoken", "datasets", "pyarrow")
    total = sum(kinds.values())
    print(
        f"{cpu_name()}, {options.num_proc} cores; Python"
        f" {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages)
        + f". Median of {options.repeats} runs of each peer, ours before and"
        " after each. Text: "
        + f"{total / 1e6:.0f} MB of distinct files of this machine ("
        + ", ".join(
            f"{kind} {size / total:.0%}" for kind, size in kinds.most_common()
        )
        + f"), of which {sizes['small'] / 1e6:.0f} MB for all.\n"
    )
    print(
        "| | text, MB | s | processor s | MB/s | tokens | peak memory, GB"
        " | ours is | by processor time |"
    )
    print("|" + " --- |" * 9)
    for (name, size), results in found.items():
        seconds, cpu = median(results, 0), median(results, 1)
        peak = max(result[2] for result in results)
        factors = ["", ""]
        if pair := beside.get((name, size)):
            factors = [
                f"{median(results, i) / median(pair, i):.1f} x" for i in (0, 1)
            ]
        print(
            f"| {name} | {sizes[size] / 1e6:.0f} | {seconds:.1f} | {cpu:.1f}"
            f" | {sizes[size] / 1e6 / seconds:.1f} | {results[0][3]:,}"
            f" | {peak / 1e9:.2f} | {' | '.join(factors)} |"
        )


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()


def main():
    options = parse_arguments()
    if options.peer:
        name, path, out = options.peer
        PEERS[name](path, out, options)
        return
    folders = options.text or [
        Path(folder)
        for folder in {sys.prefix, sys.base_prefix, "/usr/share", "/usr/lib"}
    ]
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        work = Path(work)
        small = options.megabytes * 10**6
        sizes, kinds = write_corpora(
            folders, small, small * options.larger, work
        )
        report(options, sizes, kinds, *run_all(options, work))


if __name__ == "__main__":
    main()
