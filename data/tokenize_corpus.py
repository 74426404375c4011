"""The one pipeline from a corpus to a dataset, for every `prepare.py`.

Records are read in blocks, encoded in threads, and written in order as parts
of about a gigabyte. A part that is finished stays: a killed run
goes on after the last one, and its bytes are those of an undisturbed run.
All is kept in the dataset's folder under `.prepare/` until the last step,
which gives the parts their names and writes meta.json.

Memory depends on the size of a block and of the longest document, not on the
corpus. Large corpora are cut into lanes, groups of files that any number of
machines prepare independently (--shard i/n) and one command joins (--merge).

    python data/slimpajama_6b_qwen3/prepare.py
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import corpus_readers
from data.corpus_encoder import BlockEncoder, Encoder, encoded
from data.corpus_options import parse_arguments
from data.corpus_readers import (
    HUB,
    CorpusError,
    InputFile,
    find_inputs,
    read_blocks,
)
from data.corpus_tokenizer import load_tokenizer
from training.dataset_record import SPLITS, DatasetError, bins
from training.dataset_writer import BinWriter, DatasetWriter
from training.durable import fsync, part_path

RECIPE = 1  # raise when the same inputs would give other bytes
SEED = 42
WORK_FOLDER = ".prepare"


class Corpus(NamedTuple):
    """What a `prepare.py` prepares, where its options do not say otherwise."""

    folder: Path  # of the dataset
    inputs: str | None  # None: --input must be given
    tokenizer: str | None  # a name in KNOWN; None: --tokenizer must be given
    val_share: float = 0.005  # of the documents
    part_tokens: int = 2**28  # 1 GiB
    files_per_lane: int | None = None  # None: one lane


class Job:
    """One preparation: its inputs and everything that decides its bytes."""

    def __init__(self, options, corpus, tokenizer, files):
        self.folder, self.name = options.out, options.name
        self.work = options.out / WORK_FOLDER
        self.tokenizer, self.files = tokenizer, files
        self.options = options
        self.part_tokens = corpus.part_tokens
        size = corpus.files_per_lane or max(len(files), 1)
        if options.max_documents is not None:
            size = max(len(files), 1)  # "the first N" needs one order
        self.lanes = [
            files[i : i + size] for i in range(0, len(files), size)
        ]
        self.plan = {
            "recipe": RECIPE,
            "inputs": [[f.name, f.size, f.sha256] for f in files],
            "files_per_lane": size,
            "block_bytes": corpus_readers.BLOCK_BYTES,
            "part_tokens": corpus.part_tokens,
            "tokenizer_sha256": tokenizer.record["sha256"],
            "eot_id": tokenizer.record["eot_id"],
            "vocab_size": tokenizer.vocab_size,
            "column": options.column,
            "val_share": options.val_share,
            "seed": SEED,
            "on_bad_text": options.on_bad_text,
            "max_documents": options.max_documents,
        }

    @property
    def hash(self):
        text = json.dumps(self.plan, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def source(self, parts):
        """The `source` of meta.json."""
        counts = Counter()
        for part in parts:
            counts.update(part["counts"])
        return {
            "corpus": self.name,
            "files": len(self.files),
            "file_bytes": sum(file.size for file in self.files),
            "inputs_sha256": self.hash,
            "records": counts["records"],
            "left_out": {k: counts[k] for k in ("empty", "skipped")},
            "replaced": counts["replaced"],
            "on_bad_text": self.options.on_bad_text,
            "max_documents": self.options.max_documents,
            "val_share": self.options.val_share,
            "seed": SEED,
            "split": "by a seeded hash of each document's text",
            "special_tokens": "encoded as plain text",
        }


# The state on disk


def corpus_files(options):
    """The input files; what the hub has is listed once, in manifest.json.

    So all machines, and later runs, have the same files of one revision.
    """
    path, specs = options.out / "manifest.json", list(map(str, options.input))
    if not any(spec.startswith(HUB) for spec in specs):
        return find_inputs(specs)
    # a merge joins what the shards have read
    if path.exists() and (options.merge or not options.overwrite):
        manifest = json.loads(path.read_text())
        if manifest["inputs"] == specs:
            return [InputFile(*file) for file in manifest["files"]]
    files = find_inputs(specs)
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = {"inputs": specs, "files": files}
    write_durably(path, json.dumps(manifest, indent=0).encode())
    return files


def is_done(job, overwrite):
    """Whether the folder holds this dataset; CorpusError for another one."""
    path = job.folder / "meta.json"
    if overwrite or not job.folder.is_dir():
        return False
    if not path.exists():
        # A last step that was killed leaves bins and a partial record.
        if bins(job.folder) and not part_path(path).exists():
            raise CorpusError(
                f"{job.folder} has bins without a record, a dataset of"
                " another origin; replace it with --overwrite or choose --out"
            )
        return False
    try:
        found = json.loads(path.read_text())["source"]["inputs_sha256"]
    except (ValueError, KeyError, TypeError):
        found = None
    if found != job.hash:
        raise CorpusError(
            f"{job.folder} holds a dataset made from other inputs or with"
            " other options; replace it with --overwrite or choose --out"
        )
    return True


def begin(job):
    """Make the work folder, or find in it what a former run has done."""
    plan = job.work / "plan.json"
    text = json.dumps(job.plan, indent=1)
    if plan.exists() and plan.read_text() != text:
        other = (
            f"{job.work} holds an unfinished preparation of other inputs or"
            " options; give those again to finish it"
        )
        if job.options.merge:
            raise CorpusError(other)
        if not job.options.overwrite:
            raise CorpusError(other + ", or --overwrite to throw it away")
        with ExitStack() as locks:  # nobody is at work on a lane of it
            for path in job.work.glob("*.lock"):
                locks.enter_context(locked(path))
            shutil.rmtree(job.work)
    job.work.mkdir(parents=True, exist_ok=True)
    if not plan.exists():
        write_durably(plan, text.encode())


def write_durably(path, content):
    # Of several machines that write the same, each has its own name for it.
    writer = f"{os.uname().nodename}.{os.getpid()}"
    part = path.with_name(f".{path.name}.{writer}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    fsync(path.parent)


@contextmanager
def locked(path):
    """Hold a lock that dies with the process."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(
                f"another process is at work in {path.parent}; wait for it"
            ) from None
        yield


def finished_parts(job, lane):
    """Records of the lane's parts in order, each with its bins on disk."""
    parts = []
    while True:
        path = job.work / f"{lane:05d}_{len(parts):05d}.json"
        if not path.exists():
            return parts
        part = json.loads(path.read_text())
        for record in part["bins"].values():
            size = (job.work / record["name"]).stat().st_size
            if size != 4 * record["tokens"]:
                raise CorpusError(
                    f"{job.work / record['name']} has {size} bytes, not"
                    f" {4 * record['tokens']}: remove"
                    f" {job.work}/{lane:05d}_* and run the same command again"
                )
        parts.append(part)


# A lane


class Part:
    """A part that is being written: a bin for each split that has documents."""

    def __init__(self, work, stem):
        self.work, self.stem = work, stem
        self.counts = Counter()
        self._bins = {}
        self._lengths = {split: [] for split in SPLITS}
        self._digests = {split: bytearray() for split in SPLITS}

    @property
    def tokens(self):
        return sum(writer.tokens for writer in self._bins.values())

    def add(self, documents_of, counts):
        for split, documents in documents_of.items():
            if split not in self._bins:
                path = self.work / f"{self.stem}.{split}.bin"
                self._bins[split] = BinWriter(path)
            for ids in documents.ids:
                self._bins[split].add(ids)
            lengths = [documents.tokens, documents.sizes]
            self._lengths[split].append(np.array(lengths, np.uint64).T)
            self._digests[split] += documents.digests
        self.counts += counts

    def finish(self, next_block, last):
        """Make the part durable; its record is written last."""
        records, arrays = {}, {}
        for split, writer in self._bins.items():
            records[split] = writer.finish()
            os.replace(part_path(writer.path), writer.path)
            arrays[f"{split}_lengths"] = np.concatenate(self._lengths[split])
            digests = np.frombuffer(self._digests[split], np.uint8)
            arrays[f"{split}_digests"] = digests
        with open(self.work / f"{self.stem}.npz", "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        record = {"next": next_block, "last": last, "bins": records}
        record["counts"] = dict(self.counts)
        path = self.work / f"{self.stem}.json"
        write_durably(path, json.dumps(record).encode())

    def abort(self):
        for writer in self._bins.values():
            writer.abort()


def prepare_lane(job, lane, encode, progress):
    """Write the parts of a lane that are missing."""
    parts = finished_parts(job, lane)
    if parts and parts[-1]["last"]:
        return
    files, options = job.lanes[lane], job.options
    start = tuple(parts[-1]["next"]) if parts else (0, 0)
    blocks = read_blocks(files, start, options.column)
    if options.max_documents is not None:
        done = sum(part["counts"]["records"] for part in parts)
        blocks = first_records(blocks, options.max_documents - done)
    number = len(parts)
    part = Part(job.work, f"{lane:05d}_{number:05d}")
    try:
        for block, result in encoded(blocks, encode, options.num_proc):
            part.add(*result)
            progress.show(lane, block, result[0])
            if part.tokens >= job.part_tokens:
                part.finish(block.next, last=False)
                number += 1
                part = Part(job.work, f"{lane:05d}_{number:05d}")
        part.finish((len(files), 0), last=True)
    except BaseException:
        part.abort()
        raise


def first_records(blocks, limit):
    """The blocks up to `limit` records in all."""
    while limit > 0 and (block := next(blocks, None)):
        block = block._replace(records=block.records[:limit])
        limit -= len(block.records)
        yield block


class Progress:
    """A bar over the input's bytes: MB/s of text, tokens/s, time left."""

    def __init__(self, job, lanes):
        self.text = self.tokens = 0
        sizes = [sum(file.size for file in job.lanes[lane]) for lane in lanes]
        self._before = dict(zip(lanes, np.cumsum([0, *sizes]).tolist()))
        self.bar = tqdm(
            total=sum(sizes), unit="B", unit_scale=True, desc="reading"
        )

    def show(self, lane, block, documents_of):
        for documents in documents_of.values():
            self.tokens += sum(documents.tokens)
            self.text += sum(documents.sizes)
        seconds = time.time() - self.bar.start_t
        self.bar.set_postfix_str(
            f"text {self.text / 1e6 / seconds:.1f} MB/s,"
            f" {self.tokens / 1e6 / seconds:.2f} M tokens/s",
            refresh=False,
        )
        self.bar.update(int(self._before[lane] + block.done) - self.bar.n)


# The last step


def merge(job, overwrite):
    """Name all parts and write meta.json; its content, documents checked."""
    parts, missing = [], []
    for lane in range(len(job.lanes)):
        found = finished_parts(job, lane)
        if not found or not found[-1]["last"]:
            missing.append(lane)
        parts += [
            (f"{lane:05d}_{i:05d}", part) for i, part in enumerate(found)
        ]
    if missing:
        raise CorpusError(
            f"{len(missing)} of {len(job.lanes)} lanes are not prepared yet:"
            f" {', '.join(map(str, missing[:20]))}; run the shards that have"
            " them (lane k belongs to shard k mod n)"
        )
    source = job.source([part for _, part in parts])
    bins_of = Counter(split for _, part in parts for split in part["bins"])
    if empty := [split for split in SPLITS if not bins_of[split]]:
        raise CorpusError(
            f"of {source['records']} records no document went to"
            f" {' and '.join(empty)} at --val_share={source['val_share']}; give"
            " more documents, or another share with --val_share and"
            " --overwrite"
        )
    with DatasetWriter(
        job.folder,
        name=job.name,
        vocab_size=job.tokenizer.vocab_size,
        tokenizer=job.tokenizer.record,
        source=source,
        shard_tokens=job.part_tokens if max(bins_of.values()) > 1 else None,
        overwrite=overwrite,
    ) as writer:
        for name, content in job.tokenizer.files.items():
            writer.add_file(f"tokenizer/{name}", content)
        for stem, part in parts:
            with np.load(job.work / f"{stem}.npz", allow_pickle=False) as kept:
                for split, record in part["bins"].items():
                    writer.adopt(
                        split,
                        job.work / record["name"],
                        record,
                        kept[f"{split}_lengths"],
                        kept[f"{split}_digests"].tobytes(),
                    )
        meta = writer.close()
    shutil.rmtree(job.work)
    return meta, sum(part["counts"].get("checked", 0) for _, part in parts)


# The command


def prepare(options, corpus):
    start = time.perf_counter()
    tokenizer = load_tokenizer(
        options.tokenizer,
        corpus.tokenizer,
        options.eot_token,
        options.vocab_size,
    )
    job = Job(options, corpus, tokenizer, corpus_files(options))
    if is_done(job, options.overwrite):
        shutil.rmtree(job.work, ignore_errors=True)
        print(f"{job.folder} already holds this dataset: nothing to do")
        return
    begin(job)
    if not options.merge:
        index, total = options.shard or (0, 1)
        prepare_lanes(job, list(range(index, len(job.lanes), total)), options)
        if options.shard:
            print(
                f"shard {index}/{total} is prepared; when all are, run this"
                " command with --merge"
            )
            return
    meta, checked = merge(job, options.overwrite)
    seconds = time.perf_counter() - start
    print(
        f"{job.folder}: {meta['source']['records']:,} records in {seconds:.1f}"
        " s"
        + (
            f"; ids of {checked:,} texts agree with those of tokenizers"
            if checked
            else ""
        )
    )
    report(meta)


def prepare_lanes(job, lanes, options):
    # for the pools of both libraries, which are made when first used
    os.environ["RAYON_NUM_THREADS"] = str(options.num_proc)
    forced = options.encoder == "tokenizers"
    fallback = "--encoder=tokenizers" if forced else None
    encoder = Encoder(job.tokenizer, fallback, options.num_proc)
    describe(job, encoder.fallback)
    encode = BlockEncoder(
        encoder, options.column, options.on_bad_text, options.val_share, SEED
    )
    progress = Progress(job, lanes)
    with progress.bar:
        for lane in lanes:
            with locked(job.work / f"{lane:05d}.lock"):
                prepare_lane(job, lane, encode, progress)


def describe(job, fallback):
    record = job.tokenizer.record
    print(
        f"{record['name']}: {record['size']:,} ids,"
        f" {job.tokenizer.vocab_size:,} rows; {record['eot_token']}"
        f" ({record['eot_id']}) after every document; special-token text"
        " inside a document is plain text"
    )
    if fallback:
        print(f"encoding with tokenizers, some 50 times slower: {fallback}")
    size = sum(file.size for file in job.files)
    print(
        f"{len(job.files):,} files, {size / 1e9:.2f} GB, {len(job.lanes)}"
        f" lane(s), {job.options.num_proc} core(s), into {job.folder}"
    )


def report(meta):
    source = meta["source"]
    if any(source["left_out"].values()) or source["replaced"]:
        print(
            f"  left out: {source['left_out']['empty']} empty,"
            f" {source['left_out']['skipped']} bad; {source['replaced']} with"
            " characters replaced"
        )
    for name, split in meta["splits"].items():
        print(
            f"  {name:5}  {split['documents']:,} documents"
            f"  {split['bytes'] / 1e6:,.2f} MB  {split['tokens']:,} tokens"
            f"  {split['bytes'] / split['tokens']:.2f} bytes per token"
        )


def main(corpus, doc=None, arguments=None):
    """Run a `prepare.py`: exit status 1 and a message where it fails."""
    options = parse_arguments(corpus, doc, arguments)
    try:
        prepare(options, corpus)
    except (CorpusError, DatasetError) as error:
        sys.exit(f"prepare.py: {error}")
    except OSError as error:
        sys.exit(
            f"prepare.py: {error}, while preparing {options.out}\nWhat is"
            " finished is kept: mend this and run the same command again."
        )
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; the same command continues")
