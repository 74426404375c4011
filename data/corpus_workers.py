"""Worker processes that turn blocks of records into ids, in order.

The parent reads and writes; what it writes depends on the blocks alone, not
on the number of workers. Workers are forked, which shares the tokenizer's
memory and saves loading it again; so they must start before anything in the
parent starts threads. A worker whose parent dies, dies with it.

    python data/custom/prepare.py --help
"""

import hashlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import Counter, deque
from typing import NamedTuple

import numpy as np

from data.corpus_readers import CorpusError, texts
from training.dataset_record import SPLITS, DatasetError

IN_FLIGHT = 2  # blocks of each worker: one in work and the next


class Settings(NamedTuple):
    """What decides the ids and the split of a document."""

    column: str
    on_bad_text: str
    val_share: float
    seed: int


class Encoded(NamedTuple):
    """The documents of one split in one block."""

    ids: np.ndarray  # uint32, an end-of-text id after each document
    lengths: np.ndarray  # uint64 (documents, 2): tokens, UTF-8 bytes
    digests: bytes  # SHA-256 of each document


class BlockEncoder:
    """Splits and encodes the documents of blocks."""

    def __init__(self, settings, encoder):
        self.settings, self.encoder = settings, encoder
        self._seed = f"{settings.seed}:".encode()
        self._limit = int(settings.val_share * 2**64)

    def split_of(self, digest):
        """The split of a document, by a seeded hash of its content.

        So it depends neither on order, files, workers nor tokenizer, and
        equal documents are on one side.
        """
        drawn = hashlib.sha256(self._seed + digest).digest()[:8]
        val = int.from_bytes(drawn, "big") < self._limit
        return "val" if val else "train"

    def __call__(self, block):
        """({split: Encoded or None}, counts of what became of records)."""
        kept = {split: ([], []) for split in SPLITS}
        counts = Counter()
        for text, fault in texts(
            block, self.settings.column, self.settings.on_bad_text
        ):
            if fault:
                counts[fault] += 1
            if text is None:
                continue
            if is_blank(text):
                counts["empty"] += 1
                continue
            digest = hashlib.sha256(text).digest()
            documents, digests = kept[self.split_of(digest)]
            documents.append(text)
            digests.append(digest)
        result = {}
        for split, (documents, digests) in kept.items():
            result[split] = None
            if documents:
                result[split] = self._encoded(documents, digests, counts)
        self.encoder.limit_cache()
        return result, counts

    def _encoded(self, documents, digests, counts):
        ids, tokens = self.encoder.encode_documents(documents)
        counts["checked"] += self.encoder.check_sample(
            documents, ids, tokens, digests[0]
        )
        sizes = [len(document) for document in documents]
        lengths = np.array([tokens, sizes], np.uint64).T
        return Encoded(ids, lengths, b"".join(digests))


def is_blank(text):
    """Whether a text is empty or white space alone, of any script."""
    if not text or text.isspace():
        return True
    # bytes.isspace() knows ASCII alone; other spaces start outside of it.
    return text.lstrip()[0] >= 0x80 and text.decode().isspace()


class Workers:
    """Applies a BlockEncoder to blocks in `num_proc` processes.

    With one, no process is started. A context manager.
    """

    def __init__(self, encode, num_proc):
        self._encode = encode
        self._workers = []  # (process, our end of its pipe)
        if num_proc == 1:
            return
        context = multiprocessing.get_context("fork")
        for _ in range(num_proc):
            ours, theirs = context.Pipe()
            # Our ends, in the child too: open there, they would keep a worker
            # alive whose parent is gone.
            ends = [*(end for _, end in self._workers), ours]
            process = context.Process(
                target=work, args=(theirs, encode, ends), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(5)
            process.kill()

    def encoded(self, blocks):
        """(records, block, result of BlockEncoder) for each block, in order.

        The blocks come back without their data.
        """
        if not self._workers:
            for block in blocks:
                yield block.records, _empty(block), self._encode(block)
            return
        waiting = deque()  # (records, block, worker)
        for i, block in enumerate(blocks):
            if len(waiting) == IN_FLIGHT * len(self._workers):
                yield _receive(*waiting.popleft())
            process, connection = worker = self._workers[
                i % len(self._workers)
            ]
            try:
                connection.send(block)
            except OSError as error:
                raise _died(process) from error
            waiting.append((block.records, _empty(block), worker))
        while waiting:
            yield _receive(*waiting.popleft())


def _empty(block):
    return block._replace(data=b"", offsets=None, nulls=None)


def _receive(records, block, worker):
    process, connection = worker
    try:
        result = connection.recv()
    except (EOFError, OSError) as error:
        raise _died(process) from error
    if isinstance(result, Exception):
        raise result
    return records, block, result


def _died(process):
    process.join(5)
    return CorpusError(
        f"a worker process died (exit code {process.exitcode}; -9 is mostly a"
        " lack of memory): run the same command again to continue, with a"
        " smaller --num_proc"
    )


def work(connection, encode, ends_of_parent):
    """A worker's life: blocks in, results out, until the parent is gone."""
    for end in ends_of_parent:
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    # The workers have the cores already; `tokenizers` would take them again.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    arrived = queue.SimpleQueue()

    def receive():
        # Aside, so that the parent's sending never waits for ours.
        try:
            while True:
                arrived.put(connection.recv())
        except (EOFError, OSError):
            arrived.put(None)

    threading.Thread(target=receive, daemon=True).start()
    while (block := arrived.get()) is not None:
        try:
            answer = encode(block)
        except (CorpusError, DatasetError) as error:
            answer = type(error)(*error.args)
        except Exception:
            answer = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
        try:
            connection.send(answer)
        except OSError:
            return
