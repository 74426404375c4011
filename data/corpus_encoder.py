"""Encoding documents, exactly and fast, on one core or on many.

`tokenizers` is the reference. gigatoken gives the same ids many times faster
(RESULTS.md); what has rare characters, the reference encodes.
Special-token text inside a document is plain text.

    python data/custom/prepare.py --input FILE --tokenizer qwen3 --name mine
"""

import hashlib
import re
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import NamedTuple

import gigatoken
import msgspec
import numpy as np
import psutil
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from data.corpus_readers import CorpusError, texts
from data.download_qwen3_tokenizer import SPLIT_PATTERN
from training.dataset_record import SPLITS
from training.dataset_writer import checked_ids

IN_FLIGHT = 4  # blocks: two in the threads, one read, one to be written
# Of each batch, checked against the reference: half a megabyte of a gigabyte.
SAMPLE_BYTES = 2**12
# Of memory, for the words that gigatoken has met and the blocks in work.
CACHE_BYTES = 2**29
# Documents above it are encoded in pieces, in bounded memory.
PIECE_BYTES = 2**20
BATCH_BYTES = 2**24

# Where a text may be cut: no match of the patterns below goes on from a
# letter to a space, and but for GPT-2's none looks beyond the end of a line;
# NFC changes nothing across either.
WORD = rb"(?<=[A-Za-z])(?= [A-Za-z])"
LINE = rb"(?<=\n)(?=[!-~\xc3-\xdf\xe4-\xf4])"
LINE_PATTERNS = (SPLIT_PATTERN, SPLIT_PATTERN.replace("N}|", "N}{1,3}|"))

# Where libraries could part: scripts, digits, spaces, joiners, code.
PROBES = [
    "Hello, world! I'll pay 1234.50 EUR\n\n  for x in y:\r\n\treturn x_1  ",
    " leading and trailing \u00a0\u3000 spaces\t\t\n \n",
    "caf\u00e9 cafe\u0301 \u1e9b\u0323 \u212b \u0130\u0131 \ufb01",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \ud55c\uae00"
    " \u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f469\u200d\U0001f4bb\u2764\ufe0f \U0001d400 <|endoftext|> </s><s>",
    "\x00\x01\x7f\x85\u2028 it's IT'S don\u2019t >>>===!!!??? 2\u00b2 \u2167",
    "\u2581 a\u2581b  \u2581", "a" * 300, "\n" * 50 + " " * 50, "<0x0A>",
]

NO_SPACE = re.compile(rb"\S")

# What a character asks for. Text of plain ones goes to gigatoken as it is.
PLAIN, MARK, RARE, UNASKED = range(4)
ASCII = bytes(range(128))


def border_of(content):
    """The pattern of where a tokenizer's texts may be cut.

    None where nothing is known of its word pattern.
    """
    steps = content["pre_tokenizer"] or {}
    *splits, last = steps.get("pretokenizers", [steps])
    patterns = [split.get("pattern", {}).get("Regex") for split in splits]
    if (
        content["normalizer"] not in (None, {"type": "NFC"})
        or last.get("type") != "ByteLevel"
        or last.get("add_prefix_space", True)
    ):
        return None
    # what a file leaves out is true: the official GPT-2's has no use_regex
    if not splits and last.get("use_regex", True):  # GPT-2's
        return re.compile(WORD)
    if len(patterns) == 1 and patterns[0] in LINE_PATTERNS:
        return re.compile(WORD + b"|" + LINE)
    return None


@cache
def marks():
    """All characters that NFC could move or join to the one before them."""
    points = [*range(0xD800), *range(0xE000, 0x34000)]  # no text above
    chars = "\n".join(map(chr, points))
    apart = unicodedata.normalize("NFD", chars).split("\n")
    return {char for whole in apart for char in whole[1:]}


def kind_of(char):
    """Whether a character is a MARK, so that its text may not be NFC."""
    plain = unicodedata.is_normalized("NFC", char) and char not in marks()
    return PLAIN if plain and not unicodedata.combining(char) else MARK


class Encoder:
    """Encodes UTF-8 documents with one tokenizer, on `num_proc` cores.

    `fallback` says why gigatoken is not used, or is None.
    """

    def __init__(self, tokenizer, fallback=None, num_proc=1):
        content = tokenizer.plain_content
        self.vocab_size = tokenizer.vocab_size
        self.eot_id = tokenizer.record["eot_id"]
        self.eot_token = tokenizer.record["eot_token"]
        self._border = border_of(content)
        # gigatoken's NFC has newer tables than the reference's; so it is done
        # here, by the reference's own for what Python finds is not NFC. Where
        # Python finds that it is, so do the older tables.
        self._nfc = None
        if content["normalizer"] == {"type": "NFC"}:
            self._nfc = normalizers.NFC()
            content["normalizer"] = None
        self._content = msgspec.json.encode(content).decode()
        self._reference = Tokenizer.from_str(self._content)
        if self._nfc:
            self._reference.normalizer = self._nfc
        # Without a word pattern no class of characters matters.
        self._classes = content["pre_tokenizer"] is not None
        self._kinds = np.full(0x110000, UNASKED, np.uint8)
        # A second core has enough to do: reading, hashing, writing. None:
        # gigatoken finds out that it runs in a fork, where the threads of its
        # pool are lost.
        self._parallel = None if num_proc > 2 else False
        self._lock = Lock()
        self._fast, self.fallback = None, fallback
        self.fallback = fallback or self._load_fast()
        self._limit = psutil.Process().memory_info().rss + CACHE_BYTES

    def _load_fast(self):
        """Why gigatoken cannot be used, or None."""
        probes = [text.encode() for text in PROBES]
        try:
            self._fast = gigatoken.Tokenizer.from_json(self._content)
            for probe, ids in zip(probes, self.encode_pieces(probes)):
                if not np.array_equal(ids, self.encode(probe)):
                    return f"its ids of {probe.decode()[:40]!r} differ"
        except Exception as error:  # whatever a foreign library raises
            return f"{type(error).__name__}: {error}"
        return None

    def _limit_cache(self):
        """Load gigatoken anew where the words it remembers are too many.

        It forgets none, and a corpus has new ones without end.
        """
        with self._lock:
            resident = psutil.Process().memory_info().rss
            if self.fallback or resident < self._limit:
                return
            self._fast = None  # first free, then load
            self._fast = gigatoken.Tokenizer.from_json(self._content)
            resident = psutil.Process().memory_info().rss
            self._limit = max(self._limit, resident + CACHE_BYTES // 2)

    def encode(self, document):
        """The reference's ids of one document, uint32."""
        encoding = self._reference.encode(
            document.decode(), add_special_tokens=False
        )
        return np.array(encoding.ids, np.uint32)

    def encode_pieces(self, pieces):
        """A row of ids (uint32) for each document or piece of one."""
        if self.fallback:
            texts = [piece.decode() for piece in pieces]
            encodings = self._reference.encode_batch_fast(
                texts, add_special_tokens=False
            )
            return [np.array(encoding.ids, np.uint32) for encoding in encodings]
        plain, rare = list(pieces), {}
        for i, piece in enumerate(pieces):
            if piece.isascii():
                continue
            kind = self._kind(piece.translate(None, ASCII).decode()).max()
            if kind == RARE and self._classes:
                rare[i] = self.encode(piece)
                plain[i] = b"-"  # its place is kept, its ids are not
            elif kind >= MARK and self._nfc:
                text = piece.decode()
                if not unicodedata.is_normalized("NFC", text):
                    plain[i] = self._nfc.normalize_str(text).encode()
        with self._lock:  # it has one of its own, but would wait holding Python
            batch = self._fast.encode_batch(plain, parallel=self._parallel)
        ids = np.asarray(batch.layout.content.data)
        ends = batch.layout.offsets.data.tolist()
        rows = [ids[start:end] for start, end in zip(ends, ends[1:])]
        for i, row in rare.items():
            rows[i] = row
        return rows

    def _kind(self, text):
        """The kind of each character, uint8.

        RARE are those that `tokenizers` takes as unassigned: its regex engine
        has an older Unicode than gigatoken; on what both know they agree
        (compared for every code point).
        """
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        kinds = self._kinds[points]
        if (kinds == UNASKED).any():
            new = np.unique(points[kinds == UNASKED])
            chars = "".join(map(chr, new))
            split = pre_tokenizers.Split(Regex(r"\P{Cn}+"), "removed")
            rare = {c for run, _ in split.pre_tokenize_str(chars) for c in run}
            # In one step: another thread may be looking.
            self._kinds[new] = [
                RARE if c in rare else kind_of(c) if self._nfc else PLAIN
                for c in chars
            ]
            kinds = self._kinds[points]
        return kinds

    def batches(self, documents):
        """Lists of (number, piece, is it the last) of documents, in order."""
        batch, size = [], 0
        for i, document in enumerate(documents):
            start = 0
            while start < len(document):
                end = len(document)
                if end - start > PIECE_BYTES and self._border and (
                    cut := self._border.search(document, start + PIECE_BYTES)
                ):
                    end = cut.start()
                batch.append((i, document[start:end], end == len(document)))
                size += end - start
                start = end
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def encode_documents(self, documents, tokens, counts):
        """Arrays of ids (uint32), with an end-of-text id after each document.

        Adds the tokens of each document to the list `tokens`, and the texts
        that the reference has checked to `counts`. Raises DatasetError for an
        id that has no row, CorpusError for an end-of-text id in a document.
        """
        for batch in self.batches(documents):
            numbers, pieces, last = zip(*batch)
            rows = self.encode_pieces(pieces)
            counts["checked"] += self.check_sample(pieces, rows)
            size = sum(map(len, rows)) + sum(last)
            ids, end = np.empty(size, np.uint32), 0
            for number, row, is_last in zip(numbers, rows, last):
                start, end = end, end + len(row)
                ids[start:end] = row
                if is_last:
                    ids[end] = self.eot_id
                    end += 1
                tokens[number] += end - start
            checked_ids(ids, self.vocab_size)
            if np.count_nonzero(ids == self.eot_id) != sum(last):
                raise CorpusError(
                    f"the tokenizer makes {self.eot_token} out of plain text;"
                    " name another end-of-text token with --eot_token"
                )
            self._limit_cache()
            yield ids

    def check_sample(self, pieces, rows):
        """Compare a few rows with the reference; the number compared.

        Which ones, a checksum decides. Of a long text the first SAMPLE_BYTES
        are encoded anew, by both libraries.
        """
        if self.fallback:
            return 0
        left, checked = SAMPLE_BYTES, 0
        for i in range(zlib.crc32(pieces[0]) % len(pieces), len(pieces)):
            piece, made = pieces[i], rows[i]
            if len(piece) > SAMPLE_BYTES:
                piece = piece[:SAMPLE_BYTES].decode("utf-8", "ignore").encode()
                (made,) = self.encode_pieces([piece])
            if len(piece) > left:
                break
            left -= len(piece)
            if not np.array_equal(made, self.encode(piece)):
                raise CorpusError(
                    f"gigatoken and tokenizers disagree on the ids of"
                    f" {piece[:80]!r}...; please report it, and prepare with"
                    " --encoder=tokenizers"
                )
            checked += 1
        return checked


class Encoded(NamedTuple):
    """The documents of one split in one block."""

    ids: Iterable[np.ndarray]  # uint32, end-of-text after each document
    tokens: list[int]  # of each document, counted as `ids` are made
    sizes: list[int]  # their UTF-8 bytes
    digests: bytes  # SHA-256 of each, joined


class BlockEncoder:
    """Splits and encodes the documents of blocks."""

    def __init__(self, encoder, column, on_bad_text, val_share, seed):
        self.encoder = encoder
        self.column, self.on_bad_text = column, on_bad_text
        self._seed = f"{seed}:".encode()
        self._limit = int(val_share * 2**64)

    def split_of(self, digest):
        """The split of a document, by a seeded hash of its content.

        So it depends neither on order, files, cores nor tokenizer, and equal
        documents are on one side.
        """
        drawn = hashlib.sha256(self._seed + digest).digest()[:8]
        val = int.from_bytes(drawn, "big") < self._limit
        return "val" if val else "train"

    def __call__(self, block):
        """({split: Encoded}, counts of what became of the records).

        The ids of a huge document are made only as they are written.
        """
        kept = {split: ([], []) for split in SPLITS}
        counts = Counter(records=len(block.records))
        for text, fault in texts(block, self.column, self.on_bad_text):
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
            if documents:
                tokens = [0] * len(documents)
                ids = self.encoder.encode_documents(documents, tokens, counts)
                if not is_huge(block):
                    ids = list(ids)
                sizes = [len(document) for document in documents]
                digests = b"".join(digests)
                result[split] = Encoded(ids, tokens, sizes, digests)
        return result, counts


def is_huge(block):
    sizes = (len(record or b"") for record in block.records)
    return max(sizes, default=0) > BATCH_BYTES


def is_blank(text):
    """Whether a text is empty or white space alone, of any script."""
    first = NO_SPACE.search(text)
    # It knows ASCII alone; other spaces start outside of it.
    return not first or (
        text[first.start()] >= 0x80 and text.decode().isspace()
    )


def encoded(blocks, encode, num_proc):
    """(block without its records, what `encode` makes of it), in order.

    Of two threads one prepares texts while the other's are encoded on all
    cores. What they give does not depend on them.
    """
    if num_proc == 1:
        for block in blocks:
            yield block._replace(records=[]), encode(block)
        return
    pool, waiting = ThreadPoolExecutor(2), deque()

    def first():
        block, result = waiting.popleft()
        return block, result.result()

    try:
        for block in blocks:
            huge = is_huge(block)
            waiting.append(
                (block._replace(records=[]), pool.submit(encode, block))
            )
            del block
            # A huge record passes alone.
            while len(waiting) > (0 if huge else IN_FLIGHT - 1):
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
