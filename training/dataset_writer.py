"""Writing a dataset in bounded memory, whole or not at all.

The format is described in `training/dataset_record.py`.

    python data/python_stdlib/prepare.py
"""

import errno
import fcntl
import hashlib
import json
import os
import pickle
import shutil
from array import array
from pathlib import Path

import numpy as np

from training.dataset_record import (
    DTYPES,
    FORMAT_VERSION,
    SPLITS,
    DatasetError,
    bins,
    hash_file,
    leftovers,
    tokenizer_problems,
)
from training.durable import fsync, part_path

# what file systems without hard links, or with them in one folder only, say
NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)
BUFFER_IDS = 2**20  # 4 MB of uint32 for each split being written


def checked_ids(ids, vocab_size):
    """`ids` as an integer array, each id tested before any narrowing cast."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise DatasetError(
            f"a document's ids are {ids.dtype} of shape {ids.shape}; they must"
            " be a non-empty row of integers (leave empty documents out)"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise DatasetError(
            f"token id {low if low < 0 else high} is outside 0 .."
            f" {vocab_size - 1}; use the tokenizer that vocab_size"
            f" {vocab_size} was set for, or a larger vocab_size"
        )
    return ids


class BinWriter:
    """One bin, written in bounded memory under its temporary name.

    The caller passes ids that `checked_ids` has seen, as uint32 arrays that
    it does not change. `finish` makes the file durable and returns its
    record; renaming is left to the caller.
    """

    def __init__(self, path):
        self.path = path
        self.tokens = self.max_id = self._held = 0
        self._hash = hashlib.sha256()
        self._waiting = []
        self._file = open(part_path(path), "wb", buffering=0)

    def add(self, ids):
        self._waiting.append(ids)
        self.tokens += len(ids)
        self._held += len(ids)
        if self._held >= BUFFER_IDS:
            self._flush()

    def _flush(self):
        if not self._held:
            return
        ids = self._waiting[0]
        if len(self._waiting) > 1:
            ids = np.concatenate(self._waiting)
        self.max_id = max(self.max_id, int(ids.max()))
        left, start = memoryview(ids.view(np.uint8)), self._file.tell()
        self._hash.update(left)
        while left:  # an unbuffered write may take only a part
            left = left[self._file.write(left) :]
        if hasattr(os, "posix_fadvise"):
            # The disk may begin, so that fsync finds little left to wait for.
            os.posix_fadvise(
                self._file.fileno(), start, ids.nbytes, os.POSIX_FADV_DONTNEED
            )
        self._waiting, self._held = [], 0

    def finish(self):
        self._flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {
            "name": self.path.name,
            "tokens": self.tokens,
            "max_id": self.max_id,
            "sha256": self._hash.hexdigest(),
        }

    def abort(self):
        self._file.close()
        part_path(self.path).unlink(missing_ok=True)


class SplitWriter:
    """The bins of one split, and the sums and hashes of its documents."""

    def __init__(self, folder, name, shard_tokens):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.files = []
        self.tokens = self.documents = self.bytes = 0
        self._text_hash = hashlib.sha256()
        # Only the validation split's documents are listed: 16 bytes each.
        self.lengths = array("Q") if name == "val" else None
        self._bin = None

    def next_path(self):
        """The final path of the bin after those that are finished."""
        stem = self.name
        if self.shard_tokens is not None:
            stem += f"_{len(self.files):05d}"
        return self.folder / f"{stem}.bin"

    def add(self, ids, eot_id, text_bytes, text_digest):
        if self._bin is None:
            self._bin = BinWriter(self.next_path())
        self._bin.add(np.append(ids, eot_id).astype(DTYPES["uint32"]))
        self.tokens += len(ids) + 1
        self.documents += 1
        self.bytes += text_bytes
        self._text_hash.update(text_digest)
        if self.lengths is not None:
            self.lengths.extend((len(ids) + 1, text_bytes))
        # A shard ends with a whole document, so it may pass its size a little.
        if self.shard_tokens is not None and (
            self._bin.tokens >= self.shard_tokens
        ):
            self._finish_bin()

    def adopt(self, record, lengths, digests):
        """Append a finished bin: its record, documents and text digests."""
        self.files.append({**record, "name": self.next_path().name})
        tokens, text_bytes = (int(total) for total in lengths.sum(axis=0))
        self.tokens += tokens
        self.documents += len(lengths)
        self.bytes += text_bytes
        self._text_hash.update(digests)
        if self.lengths is not None:
            self.lengths.frombytes(np.ascontiguousarray(lengths).tobytes())

    def _finish_bin(self):
        self.files.append(self._bin.finish())
        self._bin = None

    def finish(self):
        """Close the last bin; the split's record, names still final ones."""
        if self._bin is not None:
            self._finish_bin()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "text_sha256": self._text_hash.hexdigest(),
            "files": self.files,
        }

    def abort(self):
        if self._bin is not None:
            self._bin.abort()


class DatasetWriter:
    """Writes a dataset of `train` and `val` in bounded memory.

    `tokenizer` holds name, size, sha256, eot_id, eot_token and path as
    `meta.json` records them. Everything is written under temporary names;
    `close` makes it durable, renames it, and writes `meta.json` last, so a
    folder with a `meta.json` is a whole dataset whenever the writer dies.
    As a context manager it removes its files unless `close` was reached.
    With `shard_tokens` a split is cut into `train_00000.bin` ... after the
    document that reaches that many tokens; with None it is one file.
    Raises DatasetError for an existing dataset unless `overwrite`, whose old
    files stay until `close`.
    """

    def __init__(
        self,
        folder,
        *,
        name,
        vocab_size,
        tokenizer,
        source,
        shard_tokens=None,
        overwrite=False,
    ):
        self.folder = Path(folder)
        self.vocab_size = vocab_size
        self.eot_id = tokenizer["eot_id"]
        self._meta = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "dtype": "uint32",
            "vocab_size": vocab_size,
            "tokenizer": dict(tokenizer),
            "source": source,
        }
        problems = tokenizer_problems(self._meta)
        if problems:
            raise DatasetError.of(f"cannot write {folder}", problems)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._meta_path = self.folder / "meta.json"
        self._refuse_existing(overwrite)
        self._meta_file = self._lock()
        self._refuse_existing(overwrite)  # another writer may just have closed
        for leftover in leftovers(self.folder):
            if leftover != part_path(self._meta_path):
                leftover.unlink()
        self._whole = []  # final paths whose temporary file is complete
        self._renamed = []
        self._splits = {
            split: SplitWriter(self.folder, split, shard_tokens)
            for split in SPLITS
        }

    def _refuse_existing(self, overwrite):
        # Bins beside a `.meta.json.part` are what a killed writer left; bins
        # without one are somebody's dataset in nanoGPT's format.
        whole = self._meta_path.exists() or (
            bins(self.folder) and not part_path(self._meta_path).exists()
        )
        if whole and not overwrite:
            raise DatasetError(
                f"{self.folder} already holds a dataset; choose another folder"
                " or ask for it to be overwritten (--overwrite)"
            )

    def _lock(self):
        """The open, locked temporary `meta.json`: one writer at a time."""
        path = part_path(self._meta_path)
        file = open(path, "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            file.close()
            raise DatasetError(
                f"another process is writing {self.folder}; wait for it"
            )
        file.truncate(0)
        return file

    def add(self, split, ids, text_bytes, text_digest):
        """Append a document and its end-of-text id.

        `ids`: integers without end-of-text; `text_bytes`: length of the UTF-8
        text; `text_digest`: its SHA-256, 32 raw bytes.
        """
        if split not in SPLITS or text_bytes < 1 or len(text_digest) != 32:
            raise DatasetError(
                f"split {split!r}, {text_bytes} bytes, digest of"
                f" {len(text_digest)}: the split is one of {SPLITS}, a"
                " document has at least one byte and a SHA-256 of 32 bytes"
            )
        ids = checked_ids(ids, self.vocab_size)
        self._splits[split].add(ids, self.eot_id, text_bytes, text_digest)

    def adopt(self, split, path, record, lengths, digests):
        """Append a bin of whole documents that a `BinWriter` made elsewhere.

        `path`: where it lies, on the disk of the dataset, which gets a hard
        link; `record`: from `finish`; `lengths`: uint64 (documents, 2) as in
        val_documents.npy; `digests`: the documents' SHA-256 joined, raw.
        """
        if record["max_id"] >= self.vocab_size or (
            int(lengths[:, 0].sum()) != record["tokens"]
            or len(digests) != 32 * len(lengths)
        ):
            raise DatasetError(
                f"{path} does not fit its record {record}: {len(lengths)}"
                f" documents, {len(digests)} bytes of digests, vocab_size"
                f" {self.vocab_size}; prepare it again"
            )
        target = self._splits[split].next_path()
        try:
            os.link(path, part_path(target))
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            print(f"copying {path.name}: no hard links in {self.folder}")
            with open(path, "rb") as old, open(part_path(target), "wb") as new:
                shutil.copyfileobj(old, new)
                new.flush()
                os.fsync(new.fileno())
        self._splits[split].adopt(record, lengths, digests)
        self._whole.append(target)

    def add_file(self, name, content):
        """Add a small file (bytes), such as `tokenizer/tokenizer.json`."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with open(part_path(path), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._whole.append(path)

    def close(self):
        """Finish the dataset and return its record, the dict of meta.json."""
        empty = [s for s in SPLITS if not self._splits[s].documents]
        if empty:
            raise DatasetError(
                f"no document went to {' and '.join(empty)}; both splits need"
                " one: give more documents or another share for validation"
            )
        records = {}
        for split, writer in self._splits.items():
            records[split] = writer.finish()
            paths = [self.folder / file["name"] for file in writer.files]
            self._whole += [p for p in paths if p not in self._whole]
        lengths = np.array(self._splits["val"].lengths, "<u8").reshape(-1, 2)
        records["val"]["documents_file"] = self._add_array(lengths)
        self._meta["splits"] = records
        tokenizer = self._meta["tokenizer"]
        self.add_file(
            "meta.pkl",
            pickle.dumps(
                {
                    "vocab_size": self.vocab_size,
                    "tokenizer": tokenizer["name"],
                    "train_tokens": records["train"]["tokens"],
                    "val_tokens": records["val"]["tokens"],
                    "dtype": "uint32",
                },
                protocol=4,
            ),
        )
        json.dump(self._meta, self._meta_file, indent=1)
        self._meta_file.write("\n")
        self._meta_file.flush()
        os.fsync(self._meta_file.fileno())
        self._remove_old()
        for path in self._whole:
            self._rename(path)
        for folder in {path.parent for path in self._whole}:
            fsync(folder)
        self._rename(self._meta_path)
        fsync(self.folder)
        self._meta_file.close()
        return self._meta

    def _rename(self, path):
        os.replace(part_path(path), path)
        self._renamed.append(path)

    def _add_array(self, lengths):
        name = "val_documents.npy"
        with open(part_path(self.folder / name), "wb") as file:
            np.save(file, lengths, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        self._whole.append(self.folder / name)
        return {"name": name, "sha256": hash_file(file.name)}

    def _remove_old(self):
        # First the record, so that a half-replaced dataset never looks whole.
        self._meta_path.unlink(missing_ok=True)
        fsync(self.folder)
        for path in bins(self.folder):
            path.unlink()

    def abort(self):
        """Remove every file of an unfinished dataset."""
        if self._meta_file.closed:
            return
        for writer in self._splits.values():
            writer.abort()
        # A renamed meta.json goes first, the temporary one last: between the
        # two the folder is known as incomplete.
        part = part_path(self._meta_path)
        parts = [path for path in leftovers(self.folder) if path != part]
        for path in [*reversed(self._renamed), *parts, part]:
            path.unlink(missing_ok=True)
        self._meta_file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.abort()
