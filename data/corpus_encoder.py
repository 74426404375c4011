"""Tokenizers for a corpus: loading them, and encoding exactly and fast.

`tokenizers` is the reference. gigatoken gives the same ids 20 to 80 times
faster, apart from rare characters, which the reference encodes.
Special-token text inside a document is plain text.

    python data/custom/prepare.py --input FILE --tokenizer qwen3 --name mine
"""

import hashlib
import json
import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from data.corpus_readers import CorpusError
from training.dataset_record import REPOSITORY, tokenizer_problems
from training.dataset_writer import checked_ids

# Of each split in each block, checked against the reference: half a megabyte
# of a gigabyte, a tenth of the time that encoding takes.
SAMPLE_BYTES = 2**12
CACHE_BYTES = 3 * 2**26  # of memory, for the words that gigatoken has met
# Documents above it are encoded in pieces, in bounded memory.
PIECE_BYTES = 2**20
# Between two ASCII words the patterns in use always cut, and NFC changes
# nothing across; whether a tokenizer's does, is tried on the pairs below.
BORDER = r"(?<=[A-Za-z])(?= [A-Za-z])"
BYTES_BORDER, TEXT_BORDER = re.compile(BORDER.encode()), re.compile(BORDER)
BORDER_PROBES = (
    ("word", " next"), ("a 1b", " c"), ("don't", " Z"), ("\n\n a", " q"),
    ("!?x", " s\n"), ("\u4f60a", " t "), ("e\u0301E", " e\u0301"),
)
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


class Known(NamedTuple):
    """A published tokenizer: where it is, and what its models need."""

    title: str
    hub: str
    size: int  # ids
    vocab_size: int  # rows of the models' embeddings
    eot_token: str
    eot_id: int


# Rows exceed ids where models were padded; GPT-2's rows are nanoGPT's.
KNOWN = {
    "qwen3": Known(
        "Qwen3", "Qwen/Qwen3-0.6B", 151669, 151936, "<|endoftext|>", 151643
    ),
    "llama3": Known(
        "Llama-3",
        "meta-llama/Meta-Llama-3-8B",
        128256,
        128256,
        "<|end_of_text|>",
        128001,
    ),
    "llama2": Known(
        "LLaMA-2", "meta-llama/Llama-2-7b-hf", 32000, 32000, "</s>", 2
    ),
    "gpt2": Known(
        "GPT-2", "openai-community/gpt2", 50257, 50304, "<|endoftext|>", 50256
    ),
}
EOT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

# Llama-3's own file has BPE ranks alone; the rest is in Meta's code:
# github.com/meta-llama/llama3, llama/tokenizer.py.
LLAMA3_SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]

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


class CorpusTokenizer(NamedTuple):
    """A tokenizer as a dataset records it, with its two files."""

    record: dict  # name, size, sha256, eot_id, eot_token, path
    vocab_size: int
    files: dict[str, bytes]

    @property
    def content(self):
        """tokenizer.json without added tokens: everything is plain text.

        Merges that would build a special token go as well: sentencepiece
        never makes a control symbol such as </s> out of text.
        """
        content = json.loads(self.files[TOKENIZER_FILE])
        special = {
            token["content"]
            for token in content["added_tokens"]
            if token["special"]
        }
        special.add(self.record["eot_token"])
        model = content["model"]
        if "merges" in model:
            model["merges"] = [
                merge
                for merge in model["merges"]
                if _joined(merge) not in special
            ]
        return content | {
            "added_tokens": [],
            "truncation": None,
            "padding": None,
        }


def _joined(merge):
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return "".join(parts)


# Loading


def load_tokenizer(spec, known=None, eot_token=None, vocab_size=None):
    """The tokenizer of a path, a name in KNOWN or a hub repository.

    `spec` None means that of `known`, a name in KNOWN whose sizes the
    tokenizer must then have. Raises CorpusError, saying how to get it.
    """
    source = spec or known
    files = _read_files(str(source), known or source)
    vocab = _vocabulary(source, files[TOKENIZER_FILE])
    size = max(vocab.values()) + 1
    if eot_token is None:
        named = [KNOWN[known].eot_token] if known else EOT_TOKENS
        eot_token = next((name for name in named if name in vocab), None)
    if eot_token not in vocab:
        raise CorpusError(
            f"tokenizer {source} has no end-of-text token"
            f" {eot_token or ' or '.join(EOT_TOKENS)}; name one of its tokens"
            " with --eot_token"
        )
    eot_id = vocab[eot_token]
    match = next(
        (k for k in KNOWN.values() if (k.size, k.eot_id) == (size, eot_id)),
        None,
    )
    if known and match != KNOWN[known]:
        due = KNOWN[known]
        raise CorpusError(
            f"{source} has {size} ids and {eot_token} is {eot_id};"
            f" {due.title}'s has {due.size} and {due.eot_id}: give another"
            " one with --tokenizer, or use data/custom/prepare.py"
        )
    if vocab_size is None:  # a multiple of 64 is what GPUs are fast with
        vocab_size = match.vocab_size if match else -(-size // 64) * 64
    record = {
        "name": match.title if match else Path(str(source)).name,
        "size": size,
        "sha256": hashlib.sha256(files[TOKENIZER_FILE]).hexdigest(),
        "eot_id": eot_id,
        "eot_token": eot_token,
        "path": "tokenizer",
    }
    meta = {"vocab_size": vocab_size, "tokenizer": record}
    if problems := tokenizer_problems(meta):
        raise CorpusError(f"tokenizer {source}: " + "; ".join(problems))
    return CorpusTokenizer(record, vocab_size, files)


def _vocabulary(source, data):
    """{token: id} of a tokenizer.json, added tokens included."""
    try:
        content = json.loads(data)
        if content["model"].get("type", "BPE") == "BPE":
            vocab = dict(content["model"]["vocab"])
        else:
            vocab = Tokenizer.from_str(data.decode()).get_vocab()
        added = content["added_tokens"]
        return vocab | {token["content"]: token["id"] for token in added}
    except Exception as error:  # tokenizers raises Exception itself
        raise CorpusError(
            f"{source}: its {TOKENIZER_FILE} is damaged: {error}"
        ) from error


def _read_files(source, known):
    """The two files of a tokenizer, by name."""
    path = Path(source).expanduser()
    if source in KNOWN:
        path = REPOSITORY / f"{source}_tokenizer"
        if source == "qwen3" and not path.exists():
            raise CorpusError(
                f"the Qwen3 tokenizer is not in {path}; fetch it with `python"
                " data/download_qwen3_tokenizer.py`, or give it with"
                " --tokenizer PATH"
            )
    if not path.exists():
        return _hub_files(KNOWN[source].hub if source in KNOWN else source)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        names = (TOKENIZER_FILE, "tokenizer.model")
        path = next((path / n for n in names if (path / n).is_file()), None)
        if path is None:
            raise CorpusError(f"{folder} has no {' and no '.join(names)}")
    data, config = path.read_bytes(), folder / CONFIG_FILE
    if path.suffix == ".model":
        data = _from_model_file(path, data, known)
    if config.is_file():
        return {TOKENIZER_FILE: data, CONFIG_FILE: config.read_bytes()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {TOKENIZER_FILE: data, CONFIG_FILE: json.dumps(settings).encode()}


def _from_model_file(path, data, known):
    """tokenizer.json made from sentencepiece's or Llama-3's own file."""
    try:
        if known == "llama3":
            from transformers.convert_slow_tokenizer import TikTokenConverter

            made = TikTokenConverter(
                str(path), extra_special_tokens=LLAMA3_SPECIAL_TOKENS
            ).converted()
            return made.to_str().encode()
        from gigatoken._load import sentencepiece

        content = json.loads(
            sentencepiece.sentencepiece_to_tokenizer_json(data)
        )
        content["decoder"] = {  # LLaMA-2's; without it words run together
            "type": "Sequence",
            "decoders": [
                {
                    "type": "Replace",
                    "pattern": {"String": "\u2581"},
                    "content": " ",
                },
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        }
        return json.dumps(content, ensure_ascii=False).encode()
    except Exception as error:  # parsers of foreign files raise anything
        raise CorpusError(
            f"{path} is neither a sentencepiece BPE model with byte fallback"
            f" nor, for llama3, Meta's file of ranks ({error}); give a"
            f" {TOKENIZER_FILE}"
        ) from error


def _hub_files(repo):
    import huggingface_hub as hub

    try:
        paths = {
            name: hub.try_to_load_from_cache(repo, name)
            for name in (TOKENIZER_FILE, CONFIG_FILE)
        }
        if not all(isinstance(path, str) for path in paths.values()):
            # One short question first: a download is retried for minutes.
            url = hub.hf_hub_url(repo, TOKENIZER_FILE)
            hub.get_hf_file_metadata(url, timeout=10)
            paths = {name: hub.hf_hub_download(repo, name) for name in paths}
        return {name: Path(path).read_bytes() for name, path in paths.items()}
    except Exception as error:  # the hub's errors change with its versions
        said = " ".join(str(error).split())
        raise CorpusError(
            f"no tokenizer {repo}: there is no such path, and the hub says"
            f" {type(error).__name__}: {said}\n"
            f"Where it asks for a login: accept the licence at"
            f" https://huggingface.co/{repo} and run `hf auth login`. Without"
            f" a network: bring its {TOKENIZER_FILE} or tokenizer.model here"
            " and give it as --tokenizer PATH."
        ) from error


# Encoding


@cache
def unknown_characters():
    """A table over all code points: which `tokenizers` takes as unassigned.

    Its regex engine has an older Unicode than gigatoken; on what both know
    they agree (compared for every code point). Planes above 3 have no
    characters of text.
    """
    points = [*range(0xD800), *range(0xE000, 0x34000)]
    split = pre_tokenizers.Split(Regex(r"\P{Cn}+"), "removed")
    unknown = split.pre_tokenize_str("".join(map(chr, points)))
    table = np.zeros(0x110000, bool)
    for run, _ in unknown:
        table[[ord(char) for char in run]] = True
    return table


class Encoder:
    """Encodes UTF-8 documents with one tokenizer.

    `fallback` says why gigatoken is not used, or is None.
    """

    def __init__(self, tokenizer, fallback=None):
        content = tokenizer.content
        self.vocab_size = tokenizer.vocab_size
        self.eot_id = tokenizer.record["eot_id"]
        self.eot_token = tokenizer.record["eot_token"]
        self._reference = Tokenizer.from_str(json.dumps(content))
        self._fast, self._limit = None, 0
        # gigatoken's NFC has newer tables than the reference's; so it is done
        # here, by the reference's own for what Python finds is not NFC. Where
        # Python finds that it is, so do the older tables.
        self._nfc = None
        if content["normalizer"] == {"type": "NFC"}:
            self._nfc = normalizers.NFC().normalize_str
            content["normalizer"] = None
        # Without a word pattern no class of characters matters.
        self._classes = content["pre_tokenizer"] is not None
        self._cuts_words = all(
            np.array_equal(
                self.encode((one + two).encode()),
                np.append(self.encode(one.encode()), self.encode(two.encode())),
            )
            for one, two in BORDER_PROBES
        )
        self.fallback = fallback or self._load_fast(content)
        if self.fallback:
            self._fast = None

    def _load_fast(self, content):
        """Why gigatoken cannot be used, or None."""
        import gigatoken

        texts = [text.encode() for text in PROBES]
        self._content = json.dumps(content)
        try:
            self._fast = gigatoken.Tokenizer.from_json(self._content)
            for text, ids in zip(texts, np.split(*self.encode_rows(texts))):
                if not np.array_equal(ids, self.encode(text)):
                    return f"its ids of {text.decode()[:40]!r} differ"
        except Exception as error:  # whatever a foreign library raises
            return f"{type(error).__name__}: {error}"
        return None

    def limit_cache(self):
        """Load gigatoken anew where the words it remembers are too many.

        It forgets none, and a corpus has new ones without end.
        """
        resident = psutil.Process().memory_info().rss
        if self._fast is None or resident < self._limit:
            self._limit = self._limit or resident + CACHE_BYTES
            return
        import gigatoken

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

    def encode_rows(self, documents):
        """Ids of all documents in a row (uint32), and where to cut them."""
        if self._fast is None:
            texts = [document.decode() for document in documents]
            rows = [
                np.array(encoding.ids, np.uint32)
                for encoding in self._reference.encode_batch_fast(
                    texts, add_special_tokens=False
                )
            ]
            return np.concatenate(rows), np.cumsum([*map(len, rows)])[:-1]
        pieces = [self._pieces(document) for document in documents]
        ids, cuts = self._encode_pieces([p for row in pieces for p in row])
        last = np.cumsum([*map(len, pieces)])[:-1] - 1
        return ids, np.append(cuts, len(ids))[last]

    def _pieces(self, document):
        starts = [0]
        while self._cuts_words and (
            match := BYTES_BORDER.search(document, starts[-1] + PIECE_BYTES)
        ):
            starts.append(match.start())
        ends = [*starts[1:], len(document)]
        return [document[start:end] for start, end in zip(starts, ends)]

    def _encode_pieces(self, documents):
        plain, rare = list(documents), {}
        for i, document in enumerate(documents):
            if not document.isascii():
                text = document.decode()
                points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
                unknown = unknown_characters()[points]
                if self._classes and unknown.any():
                    rare[i] = self._encode_rare(text, np.flatnonzero(unknown))
                    plain[i] = b"-"  # its place is kept, its ids are not
                else:
                    plain[i] = self._normal(text, document)
        ids, cuts = self._encode_fast(plain)
        if rare:
            rows = np.split(ids, cuts)
            for i, row in rare.items():
                rows[i] = row
            ids, cuts = np.concatenate(rows), np.cumsum([*map(len, rows)])[:-1]
        return ids, cuts

    def _normal(self, text, document):
        """The document's UTF-8 after the tokenizer's own NFC, if it has one."""
        if self._nfc and not unicodedata.is_normalized("NFC", text):
            return self._nfc(text).encode()
        return document

    def _encode_fast(self, documents):
        # Not parallel: worker processes share the cores already, and the
        # threads of a pool would be lost in a fork.
        layout = self._fast.encode_batch(documents, parallel=False).layout
        cuts = np.asarray(layout.offsets)[1:-1]
        return np.asarray(layout.content.data), cuts

    def _encode_rare(self, text, places):
        """Ids of a text with rare characters at `places`.

        Words with them are encoded by the reference, those between by
        gigatoken.
        """
        borders = [0]
        if self._cuts_words:
            borders += (match.start() for match in TEXT_BORDER.finditer(text))
        borders.append(len(text))
        ids, done = [], 0
        for n in np.unique(np.searchsorted(borders, places, "right") - 1):
            start, end = borders[n], borders[n + 1]
            if start > done:
                between = text[done:start]
                data = self._normal(between, between.encode())
                ids.append(self._encode_fast([data])[0])
            ids.append(self.encode(text[start:end].encode()))
            done = end
        if done < len(text):
            data = self._normal(text[done:], text[done:].encode())
            ids.append(self._encode_fast([data])[0])
        return np.concatenate(ids)

    def encode_documents(self, documents):
        """(ids with an end-of-text id after each document, tokens of each).

        Both are arrays, uint32 and int64. Raises DatasetError for an id that
        has no row, CorpusError for an end-of-text id inside a document.
        """
        ids, cuts = self.encode_rows(documents)
        checked_ids(ids, self.vocab_size)
        if (ids == self.eot_id).any():
            raise CorpusError(
                f"the tokenizer makes {self.eot_token} out of plain text; name"
                " another end-of-text token with --eot_token"
            )
        counts = np.diff(cuts, prepend=0, append=len(ids)) + 1
        ends = np.cumsum(counts) - 1
        marked = np.empty(len(ids) + len(counts), np.uint32)
        inside = np.ones(len(marked), bool)
        inside[ends] = False
        marked[inside] = ids
        marked[ends] = self.eot_id
        return marked, counts

    def check_sample(self, documents, ids, counts, digest):
        """Compare a few documents with the reference; the number compared.

        Which ones `digest`, of any text, decides. Of a long one the first
        SAMPLE_BYTES are encoded anew, by both libraries.
        """
        if self._fast is None:
            return 0
        first = int.from_bytes(digest[:8], "little") % len(documents)
        ends, left, checked = np.cumsum(counts), SAMPLE_BYTES, 0
        for i in range(first, len(documents)):
            document, end = documents[i], ends[i] - 1
            made = ids[end + 1 - counts[i] : end]
            if len(document) > SAMPLE_BYTES:
                document = document[:SAMPLE_BYTES].decode("utf-8", "ignore")
                document = document.encode()
                made = self.encode_rows([document])[0]
            if len(document) > left:
                break
            left -= len(document)
            if not np.array_equal(made, self.encode(document)):
                raise CorpusError(
                    "gigatoken and tokenizers disagree on the ids of"
                    f" {document[:80]!r}...; please report it, and prepare"
                    " with --encoder=tokenizers"
                )
            checked += 1
        return checked
