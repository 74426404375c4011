"""Reading a corpus: which files it has, and their records in blocks.

Parquet, Arrow (as `datasets` saves it), JSON Lines (plain, gzip, zstd) and
text files; local, or fetched one by one from the Hugging Face hub. A block
is some 8 MB of records, always the same ones for the same file, so a number
of blocks is a place to continue from.

    python data/custom/prepare.py --help
"""

import codecs
import fnmatch
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

BLOCK_BYTES = 2**23
BLOCK_ROWS = 2**14
HUB = "hub:"
HUB_TIMEOUT_S = 10
ENDS_BYTES = 2**16
LONG_BYTES = 2**24
ARROW_FILE = b"ARROW1"  # a stream begins otherwise
# Where a JSON string may be cut: after six bytes no escape is open, nor is
# half of a surrogate pair behind; never inside a character.
NO_ESCAPE = re.compile(rb"(?<=[^\\]{6})[\x00-\x7f\xc0-\xff]")
# Of columns: as what to look at their UTF-8.
BINARY = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}
TEXT_TYPES = (*BINARY, *BINARY.values())
# Longest suffix first; the compressions are pyarrow's names.
FORMATS = {
    ".jsonl.zst": ("lines", "zstd"),
    ".jsonl.gz": ("lines", "gzip"),
    ".json.gz": ("lines", "gzip"),
    ".jsonl": ("lines", None),
    ".parquet": ("parquet", None),
    ".arrow": ("arrow", None),
    ".txt": ("text", None),
    ".md": ("text", None),
}


class CorpusError(ValueError):
    """A corpus, or a text in it, that cannot be read as asked."""


class InputFile(NamedTuple):
    """One file: its name in the corpus, size in bytes, a hash, and where."""

    name: str
    size: int
    sha256: str  # of a local file's size and ends, of a hub file's content
    path: str | None  # None: fetched from `hub` when its turn comes
    hub: tuple[str, str] | None  # repository and revision

    @property
    def format(self):
        for suffix, form in FORMATS.items():
            if self.name.endswith(suffix):
                return form
        return ("text", None)


class Block(NamedTuple):
    """Consecutive records of a file; `next` is where reading goes on."""

    names: list[str]  # one for all records, or one for each
    first: int  # number of the first record in its file, from 0
    records: list[bytes | None]  # texts, or lines of JSON
    are_json: bool
    done: float  # bytes of the input files up to the end of this block
    next: tuple[int, int]  # file, block of it

    def where(self, i):
        if len(self.names) > 1:
            return self.names[i]
        return f"{self.names[0]}, record {self.first + i}"


# Finding the files


def find_inputs(specs):
    """The files of a corpus, in an order that their names decide.

    `specs`: paths of files, folders (searched for the known suffixes) or
    `hub:OWNER/NAME[@REVISION][:PATTERN]`. Raises CorpusError for all that
    are not there.
    """
    files, problems = [], []
    for spec in specs:
        if str(spec).startswith(HUB):
            files += _hub_files(str(spec))
            continue
        path = Path(spec).expanduser()
        found = [(path.name, path)] if path.is_file() else []
        if path.is_dir():
            found = sorted(
                (entry.relative_to(path).as_posix(), entry)
                for entry in path.rglob("*")
                if entry.is_file() and entry.name.endswith(tuple(FORMATS))
            )
        if not found:
            problems.append(
                f"--input {spec}: "
                + (
                    f"no file below it ends in {', '.join(FORMATS)}"
                    if path.is_dir()
                    else "no such file or folder"
                )
            )
        files += [local_file(name, path) for name, path in found]
    if problems:
        raise CorpusError("\n".join(problems))
    return files


def local_file(name, path):
    """The record of a local file; its hash is over size, head and tail."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(ENDS_BYTES))
        file.seek(max(0, size - ENDS_BYTES))
        digest.update(file.read())
    return InputFile(name, size, digest.hexdigest(), str(path), None)


def _hub_files(spec):
    import huggingface_hub as hub

    repo, _, pattern = spec.removeprefix(HUB).partition(":")
    repo, _, revision = repo.partition("@")
    try:
        info = hub.HfApi().dataset_info(
            repo, revision=revision or None, timeout=HUB_TIMEOUT_S
        )
        entries = hub.HfApi().list_repo_tree(
            repo, recursive=True, revision=info.sha, repo_type="dataset"
        )
        files = [
            InputFile(
                entry.path,
                entry.size,
                entry.lfs.sha256 if entry.lfs else entry.blob_id,
                None,
                (repo, info.sha),
            )
            for entry in entries
            if isinstance(entry, hub.hf_api.RepoFile)
            and entry.path.endswith(tuple(FORMATS))
            and fnmatch.fnmatch(entry.path, pattern or "*")
        ]
    # Any: huggingface_hub's HTTP library, and so its errors, have changed.
    except Exception as error:
        said = " ".join(str(error).split())
        raise CorpusError(
            f"the hub gave no list of {repo}: {type(error).__name__}: {said}\n"
            + _by_hand(repo, pattern, revision)
        ) from error
    if not files:
        raise CorpusError(f"{repo} on the hub has no files {pattern or '*'}")
    return sorted(files)


def _by_hand(repo, pattern, revision):
    return (
        "Without a network: on a machine that has one, run\n"
        f"    hf download {repo} --repo-type dataset"
        f"{f' --revision {revision}' if revision else ''}"
        f" --include '{pattern or '*'}' --local-dir DIR\n"
        "bring DIR here and give it as --input DIR. (A repository that asks"
        " for a login: `hf auth login`.)"
    )


def local_path(file):
    """Where the file lies, fetched from the hub now if it must be.

    Raises CorpusError where a local file is no longer the one that was found.
    """
    if file.path is not None:
        path = Path(file.path)
        if not path.is_file() or local_file(file.name, path) != file:
            raise CorpusError(
                f"{path} has changed since this preparation began; bring the"
                " old file back, or begin anew with --overwrite"
            )
        return path
    import huggingface_hub as hub

    repo, revision = file.hub
    try:
        return Path(
            hub.hf_hub_download(
                repo, file.name, repo_type="dataset", revision=revision
            )
        )
    except Exception as error:  # see _hub_files
        raise CorpusError(
            f"the hub gave no {file.name} of {repo}: {error}\n"
            "Run the same command again to continue, where the hub is in"
            " reach; or begin anew with files brought here: --input DIR"
            " --overwrite"
        ) from error


# Blocks


def read_blocks(files, start, column):
    """Blocks of all files in order, from `start`, a (file, block).

    Raises CorpusError, naming the file, for damaged ones and for a table
    without `column`.
    """
    number, skip = start
    before = sum(file.size for file in files[:number])
    while number < len(files):
        file = files[number]
        if file.format[0] == "text":
            block = _text_block(files, number, before)
            yield block
            number, before = block.next[0], block.done
            continue
        kind, path = file.format[0], local_path(file)
        first = 0
        try:
            for i, (records, done) in enumerate(
                READERS[kind](file, path, column)
            ):
                if i >= skip:
                    yield Block(
                        [str(path)],
                        first,
                        records,
                        kind == "lines",
                        before + done * file.size,
                        (number, i + 1),
                    )
                first += len(records)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise CorpusError(
                f"{path} is damaged or cut off: {error}; fetch it again"
            ) from error
        number, skip = number + 1, 0
        before += file.size


def _text_block(files, number, done):
    """Whole text files, one document each, up to about BLOCK_BYTES."""
    texts, names, size = [], [], 0
    while (
        size < BLOCK_BYTES
        and number < len(files)
        and files[number].format[0] == "text"
    ):
        path = local_path(files[number])
        texts.append(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        names.append(str(path))
        size += len(texts[-1])
        done += files[number].size
        number += 1
    return Block(names, 0, texts, False, done, (number, 0))


def _read_lines(file, path, column):
    with pa.OSFile(str(path)) as raw:
        stream, compression = raw, file.format[1]
        if compression:
            stream = pa.CompressedInputStream(raw, compression)
        pieces = []
        while chunk := _read_full(stream):
            at_end = len(chunk) < BLOCK_BYTES
            end = len(chunk) if at_end else chunk.rfind(b"\n") + 1
            if not end:  # inside one long line
                pieces.append(chunk)
                continue
            lines = b"".join([*pieces, chunk[:end]]).split(b"\n")
            pieces = [chunk[end:]]
            if not lines[-1]:
                lines.pop()
            yield lines, raw.tell() / file.size
        if data := b"".join(pieces):
            yield [data], 1.0


def _read_full(stream):
    """BLOCK_BYTES, or what is left: the cuts depend on nothing else."""
    pieces, missing = [], BLOCK_BYTES
    while missing and (piece := stream.read(missing)):
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _read_parquet(file, path, column):
    # The other pools keep what was freed, and pre_buffer all that was read.
    pa.set_memory_pool(pa.system_memory_pool())
    with pq.ParquetFile(path, pre_buffer=False) as table:
        _check_column(path, table.schema_arrow, column)
        metadata, size, done = table.metadata, 1, 0
        for group in range(metadata.num_row_groups):
            for i in range(metadata.num_columns):
                part = metadata.row_group(group).column(i)
                if part.path_in_schema == column:
                    size += part.total_uncompressed_size
        rows = min(BLOCK_BYTES * metadata.num_rows // size, BLOCK_ROWS)
        for batch in table.iter_batches(max(rows, 1), columns=[column]):
            done += len(batch)
            yield _texts_of(batch.column(0)), done / metadata.num_rows


def _read_arrow(file, path, column):
    """Of both formats of Arrow; a record batch, however large, is a block."""
    with pa.memory_map(str(path)) as source:
        if source.read(len(ARROW_FILE)) == ARROW_FILE:
            with pa.ipc.open_file(source) as table:
                _check_column(path, table.schema, column)
                n = table.num_record_batches
                for i in range(n):
                    batch = table.get_batch(i)
                    yield _texts_of(batch.column(column)), (i + 1) / n
            return
        source.seek(0)
        with pa.ipc.open_stream(source) as batches:
            _check_column(path, batches.schema, column)
            for batch in batches:
                # The stream does not say how many rows it has: no progress.
                yield _texts_of(batch.column(column)), 0.0


def _texts_of(array):
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.view(BINARY.get(array.type, array.type)).to_pylist()


def _check_column(path, schema, column):
    if column not in schema.names:
        raise CorpusError(
            f"{path} has no column {column!r}, only {', '.join(schema.names)};"
            " name the one with the text: --column NAME"
        )
    kind = schema.field(column).type
    kind = getattr(kind, "value_type", kind)  # of a dictionary
    if kind not in TEXT_TYPES:
        raise CorpusError(
            f"{path}: column {column!r} holds {kind}, not text; name another"
            " one: --column NAME"
        )


READERS = {
    "lines": _read_lines,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}


# Texts


def texts(block, column, on_bad_text):
    """(UTF-8 text or None, what was done or None) for each record.

    Raises CorpusError at the first fault where `on_bad_text` is "stop";
    "skip" gives None for it, "replace" puts U+FFFD for what is not UTF-8
    (what has no text at all is skipped there too).
    """
    text_of = _json_text(column) if block.are_json else _plain_text
    for i, record in enumerate(block.records):
        text, fault = text_of(record)
        if fault is None:
            yield text, None
        elif on_bad_text == "stop":
            raise CorpusError(
                f"{block.where(i)}: {fault}; mend the file, or leave such"
                " records out (--on_bad_text=skip), or put U+FFFD for what is"
                " not UTF-8 (--on_bad_text=replace)"
            )
        elif on_bad_text == "replace" and text is not None:
            yield _replaced(text), "replaced"
        else:
            yield None, "skipped"


def _replaced(text):
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    utf16 = text.encode("utf-16-le", "surrogatepass")
    return utf16.decode("utf-16-le", "replace").encode()


def _plain_text(text):
    """(the text, or as much as there is of it; its fault or None)"""
    if text is None:
        return None, "its text is null"
    if not text.isascii():
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for start in range(0, len(text), LONG_BYTES):
                decoder.decode(text[start : start + LONG_BYTES])
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            return text, f"its text is not UTF-8 ({error})"
    return text, None


def _json_text(column):
    """As _plain_text, for lines of JSON."""

    def decoder(kind):
        record = msgspec.defstruct(
            "Record", [("text", kind)], rename={"text": column}
        )
        return msgspec.json.Decoder(record)

    short, long = decoder(str), decoder(msgspec.Raw)

    def text_of(line):
        try:
            if len(line) < LONG_BYTES:
                return short.decode(line).text.encode(), None
            literal = memoryview(long.decode(line).text)
            if literal[:1] == b'"':
                return _text_of_literal(literal), None
        except (msgspec.MsgspecError, UnicodeError):
            pass  # the reason is found below
        return _text_or_fault(line, column)

    return text_of


def _text_of_literal(literal):
    """The text of a long JSON string, decoded in pieces.

    Whole, it could take four bytes for each of its characters.
    """
    pieces, start, last = [], 1, len(literal) - 1
    while start < last:
        cut = NO_ESCAPE.search(literal, start + LONG_BYTES)
        end = cut.start() if cut else last
        piece = b'"%b"' % literal[start:end]
        pieces.append(msgspec.json.decode(piece, type=str).encode())
        start = end
    return b"".join(pieces)


def _text_or_fault(line, column):
    """As _plain_text, for a line that is not as it should be."""
    if not line.strip():
        return b"", None
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        # Its structure may be sound: replace inside the whole line.
        text, _ = _text_or_fault(line.decode("utf-8", "replace"), column)
        return text, f"it is not UTF-8 ({error})"
    except ValueError as error:
        return None, f"it is not JSON ({error})"
    if not isinstance(record, dict) or column not in record:
        fields = ", ".join(record) if isinstance(record, dict) else "none"
        return None, (
            f"it has no field {column!r}, only {fields} (--column names"
            " another)"
        )
    text = record[column]
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        return None, f"its text is {found}"
    try:
        return text.encode(), None
    except UnicodeEncodeError as error:
        return text, f"its text has a lone surrogate ({error})"
