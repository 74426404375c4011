"""Reading a dataset: checks, token windows, and the full verification.

The format is described in `training/dataset_record.py`; the writer is in
`training/dataset_writer.py` and is also found here.

    python -c "from training.dataset import open_dataset; \
print(open_dataset('python_stdlib').split('val').tokens)"
"""

import hashlib
import json
import os
import threading
from bisect import bisect_right
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training.dataset_record import (
    DTYPES,
    REPOSITORY,
    SPLITS,
    DatasetError,
    bins,
    file_problems,
    nanogpt_record,
    prepare_command,
    read_lengths,
    read_record,
    tokenizer_file_problems,
)
from training.dataset_writer import BinWriter, DatasetWriter
from training.durable import part_path

__all__ = [
    "BinWriter",
    "Dataset",
    "DatasetError",
    "DatasetWriter",
    "Split",
    "open_dataset",
    "verify",
]

VERIFY_IDS = 2**22
OPEN_FILES = 256  # of a split; a process may often have 1024 in all


class Split:
    """The tokens of one split, over all its files.

    `tokens` counts them; `documents`, `bytes` (UTF-8 text), `text_sha256`,
    `document_tokens` and `document_bytes` (uint64 arrays, end-of-text
    included in the tokens) are None where the dataset does not record them.
    """

    def __init__(self, folder, name, record, dtype, vocab_size, lengths):
        self.name = name
        self.tokens = record["tokens"]
        self.documents = record["documents"]
        self.bytes = record["bytes"]
        self.text_sha256 = record["text_sha256"]
        self.document_tokens = None if lengths is None else lengths[:, 0]
        self.document_bytes = None if lengths is None else lengths[:, 1]
        self.files = record["files"]
        self._folder, self._dtype = folder, dtype
        self._vocab_size = vocab_size
        counts = [file["tokens"] for file in self.files]
        self._ends = np.cumsum(counts).tolist()
        self._streams, self._lock = {}, threading.Lock()

    def _stream(self, file):
        """The open file number `file`; at most OPEN_FILES stay open."""
        if file not in self._streams:
            if len(self._streams) == OPEN_FILES:
                self._streams.pop(next(iter(self._streams))).close()
            # unbuffered: every read is of as many bytes as are asked for
            self._streams[file] = open(self._path(file), "rb", buffering=0)
        return self._streams[file]

    def _path(self, file):
        return self._folder / self.files[file]["name"]

    def read(self, start, count, out=None):
        """Tokens `start` .. `start + count` as int64, into `out` if given.

        Raises DatasetError outside the split and for an id that the model
        would have no row for, naming file, position and id.
        """
        if out is None:
            out = np.empty(max(count, 0), np.int64)
        if out.shape != (count,):
            raise DatasetError(
                f"{count} tokens asked for, into an array of shape"
                f" {out.shape}; it must be ({count},)"
            )
        self.read_rows([start], out[None])
        return out

    def read_rows(self, starts, out):
        """Fill row i of `out`, (rows, count) int64, from token starts[i].

        Raises like `read`. One test for all rows costs a third of one each.
        """
        ids = np.empty(out.shape, self._dtype)
        with self._lock:  # of the files' positions
            for start, row in zip(starts, ids):
                self._copy(start, row)
        out[...] = ids
        if ids.size and ids.max() >= self._vocab_size:
            for start, row in zip(starts, ids):
                if row.max() >= self._vocab_size:
                    self._refuse_id(start, row)

    def _copy(self, start, row):
        count = len(row)
        if start < 0 or start + count > self.tokens:
            raise DatasetError(
                f"tokens {start} .. {start + count} of split {self.name!r}"
                f" asked for, which has {self.tokens}"
            )
        done = 0
        file = bisect_right(self._ends, start)
        while done < count:
            left = self._ends[file] - start - done  # of this file
            piece = row[done : done + left]
            self._read(file, self.files[file]["tokens"] - left, piece)
            done += len(piece)
            file += 1

    def _read(self, file, skip, ids):
        # Not from a memory map: reading one past the end of a file that has
        # become shorter kills the process (SIGBUS), whatever was checked
        # before. A read says how much it got.
        stream, due = self._stream(file), memoryview(ids).cast("B")
        stream.seek(skip * ids.itemsize)
        while due:
            got = stream.readinto(due)
            if not got:
                self._refuse_size(file)
            due = due[got:]

    def _refuse_size(self, file):
        size = os.fstat(self._stream(file).fileno()).st_size
        tokens = self.files[file]["tokens"]
        raise DatasetError(
            f"{self._path(file)} has {size} bytes, and had"
            f" {tokens * self._dtype.itemsize} ({tokens} tokens) when it was"
            " opened: something cuts it off while it is in use; restore it or"
            f" prepare it again ({prepare_command(self._folder)}), then resume"
        )

    def _refuse_id(self, start, ids):
        where = start + int(np.argmax(ids >= self._vocab_size))
        file = bisect_right(self._ends, where)
        offset = where - (self._ends[file] - self.files[file]["tokens"])
        raise DatasetError(
            f"{self._path(file)}: token {offset} is"
            f" {ids[where - start]}, vocab_size is {self._vocab_size}; the"
            " file is damaged or of another type: prepare it again"
        )


class Dataset:
    """A dataset that passed the checks of `open_dataset`."""

    def __init__(self, folder, meta, lengths):
        self.folder, self.meta = folder, meta
        self.name = meta["name"]
        self.vocab_size = meta["vocab_size"]
        self.dtype = DTYPES[meta["dtype"]]
        self.splits = {
            split: Split(
                folder,
                split,
                meta["splits"][split],
                self.dtype,
                self.vocab_size,
                lengths if split == "val" else None,
            )
            for split in SPLITS
        }
        tokenizer = meta["tokenizer"] or {}
        # nanoGPT's format has one number for both.
        self.tokenizer_size = tokenizer.get("size", self.vocab_size)
        self.eot_id = tokenizer.get("eot_id")
        path = tokenizer.get("path")
        self.tokenizer_folder = folder / path if path else None

    def split(self, name):
        return self.splits[name]

    @cached_property
    def fingerprint(self):
        """SHA-256 (hex) of the record of type, vocabulary and splits."""
        keys = ("dtype", "vocab_size", "splits")
        content = {key: self.meta[key] for key in keys}
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def open_dataset(folder_or_name):
    """Open a dataset by folder, or by name below the repository's `data/`.

    All cheap checks are made and one DatasetError lists every problem.
    """
    folder = _find(folder_or_name)
    if not (folder / "meta.json").is_file():
        if part_path(folder / "meta.json").exists():
            raise DatasetError(
                f"{folder} is incomplete: its preparation was interrupted or"
                f" still runs; run {prepare_command(folder)} (again)"
            )
        if not bins(folder):
            raise DatasetError(
                f"no dataset in {folder}: it has neither meta.json nor bins;"
                f" make it with {prepare_command(folder)}"
            )
        meta, problems = nanogpt_record(folder)
    else:
        meta, problems = read_record(folder), []
    lengths = None
    for split in SPLITS:
        problems += file_problems(folder, meta, split)
    if meta["format_version"] is not None:
        problems += tokenizer_file_problems(folder, meta["tokenizer"])
        found, lengths = read_lengths(folder, meta["splits"]["val"])
        problems += found
    if problems:
        problems.append(f"prepare it again: {prepare_command(folder)}")
        raise DatasetError.of(f"dataset {folder} cannot be used", problems)
    return Dataset(folder, meta, lengths)


def _find(folder_or_name):
    text = os.fspath(folder_or_name)
    named = isinstance(folder_or_name, str) and text not in ("", ".", "..")
    if named and os.sep not in text:
        folder = REPOSITORY / "data" / text
    else:
        folder = Path(text).expanduser().absolute()
    if not folder.is_dir():
        data = sorted((REPOSITORY / "data").iterdir())
        here = [path.name for path in data if is_dataset(path)]
        scripts = [
            path.name for path in data if (path / "prepare.py").is_file()
        ]
        raise DatasetError(
            f"no dataset {text!r}: there is no folder {folder}; make it with"
            f" {prepare_command(folder)} (datasets here:"
            f" {', '.join(here) or 'none'}; scripts for {', '.join(scripts)})"
        )
    return folder


def is_dataset(folder):
    """Whether a folder holds a record, or bins in nanoGPT's format."""
    return (folder / "meta.json").is_file() or (
        folder.is_dir() and bool(bins(folder))
    )


def verify(dataset, progress=True):
    """Read every bin in full; the list of what differs from the record.

    Length, SHA-256 and largest id of each file are compared, and the
    end-of-text id after each validation document; [] means all is well.
    """
    problems = []
    total = sum(split.tokens for split in dataset.splits.values())
    with tqdm(
        total=total, unit="tok", unit_scale=True, disable=not progress
    ) as bar:
        for split in dataset.splits.values():
            for file in split.files:
                problems += _verify_file(dataset, file, bar)
    val = dataset.splits["val"]
    if not problems and val.document_tokens is not None:
        ends = np.cumsum(val.document_tokens).tolist()
        problems += [
            f"val document {i} does not end with the end-of-text id"
            for i, end in enumerate(ends)
            if val.read(end - 1, 1)[0] != dataset.eot_id
        ]
    return problems


def _verify_file(dataset, file, bar):
    path, itemsize = dataset.folder / file["name"], dataset.dtype.itemsize
    if not path.is_file():
        return [f"{file['name']} is missing"]
    problems, done, max_id = [], 0, 0
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(VERIFY_IDS * itemsize):
            digest.update(chunk)
            ids = np.frombuffer(chunk, dataset.dtype, len(chunk) // itemsize)
            top = int(ids.max(initial=0))
            if top >= dataset.vocab_size > max_id:
                where = done + int(np.argmax(ids >= dataset.vocab_size))
                problems.append(
                    f"{file['name']}: token {where} is"
                    f" {ids[where - done]}, vocab_size is"
                    f" {dataset.vocab_size}"
                )
            max_id = max(max_id, top)
            done += len(ids)
            bar.update(len(ids))
    size, due = path.stat().st_size, file["tokens"] * itemsize
    if size != due:
        problems.append(f"{file['name']} has {size} bytes, recorded are {due}")
    if file["sha256"] not in (None, digest.hexdigest()):
        problems.append(f"{file['name']} differs from its recorded sha256")
    if file["max_id"] not in (None, max_id):
        problems.append(
            f"{file['name']}: its largest id is {max_id}, recorded is"
            f" {file['max_id']}"
        )
    return problems
