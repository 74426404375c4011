"""Worker processes that turn blocks of records into ids, in order.

The parent reads and writes; what it writes depends on the blocks alone, not
on the number of workers. A worker whose parent dies, dies with it.

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

from data.corpus_encoder import Encoder
from data.corpus_readers import CorpusError, texts
from training.dataset_record import SPLITS, DatasetError

IN_FLIGHT = 2  # blocks of each worker: one in work and the next


class Settings(NamedTuple):
    """What decides the ids and the split of a document."""

    tokenizer: tuple  # a CorpusTokenizer
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

    def __init__(self, settings):
        self.settings = settings
        self.encoder = Encoder(settings.tokenizer)
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
        """({split: Encoded or None}, counts of records by what became of them)."""
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


def encode_blocks(blocks, settings, num_proc):
    """(records, block, result of BlockEncoder) for each block, in order.

    The blocks come back without their data.
    """
    if num_proc == 1:
        encode = BlockEncoder(settings)
        for block in blocks:
            yield block.records, block._replace(data=b""), encode(block)
        return
    workers = []
    try:
        yield from _in_turns(blocks, settings, num_proc, workers)
    finally:
        for _, connection in workers:
            connection.close()
        for process, _ in workers:
            process.join(5)
            process.kill()


def _in_turns(blocks, settings, num_proc, workers):
    context = multiprocessing.get_context("spawn")
    waiting = deque()  # (records, block without its data, worker)
    for i, block in enumerate(blocks):
        if len(workers) < num_proc:
            workers.append(_start(context, settings))
        if len(waiting) == IN_FLIGHT * num_proc:
            yield _receive(*waiting.popleft())
        process, connection = worker = workers[i % num_proc]
        try:
            connection.send(block)
        except OSError as error:
            raise _died(process) from error
        waiting.append((block.records, block._replace(data=b""), worker))
    while waiting:
        yield _receive(*waiting.popleft())


def _start(context, settings):
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, settings))
    process.daemon = True
    process.start()
    theirs.close()
    return process, ours


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


def work(connection, settings):
    """A worker's life: blocks in, results out, until the parent is gone."""
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
    encode = None
    while (block := arrived.get()) is not None:
        try:
            encode = encode or BlockEncoder(settings)
            answer = encode(block)
        except (CorpusError, DatasetError) as error:
            answer = type(error)(*error.args)
        except Exception:
            answer = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
        try:
            connection.send(answer)
        except OSError:
            return
