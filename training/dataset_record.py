"""The dataset format: names, errors, and the checks of a folder's record.

A dataset is `data/<name>/` with little-endian bins of ids, one or more a
split, `meta.json` (the record: sizes, hashes, tokenizer),
`val_documents.npy` (tokens and bytes of each validation document) and
`tokenizer/`. nanoGPT's own folders, `train.bin` and `val.bin` of uint16
with or without a `meta.pkl`, get a record here in which what they do not
say (documents, bytes, hashes) is None.

    python -c "from training.dataset import open_dataset; \
print(open_dataset('python_stdlib').meta)"
"""

import hashlib
import json
import pickle
import re
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
FORMAT_VERSION = 1
SPLITS = ("train", "val")
PEEK_IDS = 4096
NANOGPT_VOCAB_SIZE = 50304  # nanoGPT's rows for GPT-2's 50,257 ids
# the usual names of the token that ends a document
EOT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
DTYPES = {"uint32": np.dtype("<u4"), "uint16": np.dtype("<u2")}


class DatasetError(ValueError):
    """A dataset that cannot be read or written as asked."""

    @classmethod
    def of(cls, what, problems):
        return cls("\n  - ".join([f"{what}:", *problems]))


def leftovers(folder):
    """Temporary files below `folder`: of a running or a killed writer."""
    return sorted([*folder.glob(".*.part"), *folder.glob("*/.*.part")])


def bins(folder, split="train|val"):
    """The bins of a split in order, under their final names."""
    named = re.compile(rf"({split})(_\d{{5,}})?\.bin")
    return sorted(p for p in folder.iterdir() if named.fullmatch(p.name))


def hash_file(path):
    """SHA-256 of a small file, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_count(value, low=0):
    """Whether a value of a record is a whole number of at least `low`."""
    return type(value) is int and value >= low


def tokenizer_problems(meta):
    """What is wrong with a record's vocabulary and tokenizer, as sentences."""
    vocab_size, tokenizer = meta.get("vocab_size"), meta.get("tokenizer")
    if not is_count(vocab_size, 1) or vocab_size > 2**32:
        return [f"vocab_size is {vocab_size!r}; it must be 1 .. 2**32"]
    if not isinstance(tokenizer, dict):
        return [f"tokenizer is {tokenizer!r}; it must be an object"]
    problems = []
    size, eot_id = tokenizer.get("size"), tokenizer.get("eot_id")
    if not is_count(size, 1) or size > vocab_size:
        problems.append(
            f"tokenizer size {size!r} is not within vocab_size {vocab_size};"
            " every token needs an embedding row"
        )
    if not is_count(eot_id) or eot_id >= vocab_size:
        problems.append(
            f"end-of-text id {eot_id!r} is not within vocab_size {vocab_size}"
        )
    if not isinstance(tokenizer.get("path"), (str, type(None))):
        problems.append(f"tokenizer path {tokenizer['path']!r} is no string")
    return problems


def prepare_command(folder):
    """The command that makes a dataset, for error messages."""
    if (folder / "prepare.py").is_file():
        return f"`python data/{folder.name}/prepare.py`"
    if folder.resolve().parent == REPOSITORY / "data":
        return f"`python data/custom/prepare.py --name {folder.name} ...`"
    return f"`python data/NAME/prepare.py --out {folder}`"


def read_record(folder):
    """The content of meta.json, its structure checked."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(
            f"{path} is not JSON ({error}); prepare the dataset again:"
            f" {prepare_command(folder)}"
        ) from error
    if not isinstance(meta, dict):
        meta = {}
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format_version {version!r}, this code reads"
            f" {FORMAT_VERSION}; prepare the dataset again"
        )
    problems = tokenizer_problems(meta)
    if not isinstance(meta.get("name"), str):
        problems.append(f"name is {meta.get('name')!r}; it must be a string")
    if meta.get("dtype") not in list(DTYPES):
        problems.append(
            f"dtype is {meta.get('dtype')!r}; it must be one of {list(DTYPES)}"
        )
    splits = meta.get("splits")
    splits = splits if isinstance(splits, dict) else {}
    for split in SPLITS:
        problems += _split_problems(split, splits.get(split))
    if problems:
        raise DatasetError.of(f"{path} is not a valid record", problems)
    return meta


def _split_problems(split, record):
    if not isinstance(record, dict):
        return [f"split {split!r} is missing"]
    wrong = [
        f"split {split!r}: {key} is {record.get(key)!r}; it must be at least 1"
        for key in ("tokens", "documents", "bytes")
        if not is_count(record.get(key), 1)
    ]
    if not isinstance(record.get("text_sha256"), str):
        wrong.append(f"split {split!r}: text_sha256 is missing")
    files = record.get("files")
    if not isinstance(files, list) or not all(map(_is_file_record, files)):
        return [*wrong, f"split {split!r}: files is not a list of records"]
    total = sum(file["tokens"] for file in files)
    if total != record.get("tokens"):
        wrong.append(
            f"split {split!r}: its files have {total} tokens together, the"
            f" split {record.get('tokens')!r}"
        )
    return wrong


def _is_file_record(file):
    return (
        isinstance(file, dict)
        and isinstance(file.get("name"), str)
        and file["name"] == Path(file["name"]).name  # stays in the folder
        and is_count(file.get("tokens"), 1)
        and is_count(file.get("max_id"))
        and isinstance(file.get("sha256"), str)
    )


def file_problems(folder, meta, split):
    """Size and type of each bin of a split, from its first ids."""
    vocab_size, name = meta["vocab_size"], meta["dtype"]
    dtype = DTYPES[name]
    problems = []
    for file in meta["splits"][split]["files"]:
        path = folder / file["name"]
        if not path.is_file():
            problems.append(f"{file['name']} is missing")
            continue
        size, due = path.stat().st_size, file["tokens"] * dtype.itemsize
        if size != due:
            problems.append(
                f"{file['name']} has {size} bytes; {file['tokens']} tokens of"
                f" {name} need {due}: it is cut off or of another type"
            )
            continue
        if file["max_id"] is not None and file["max_id"] >= vocab_size:
            problems.append(
                f"{file['name']} holds id {file['max_id']}, vocab_size is"
                f" {vocab_size}"
            )
        ids = np.fromfile(path, dtype, PEEK_IDS)
        if name == "uint16" and _looks_like_uint32(ids):
            problems.append(
                f"{file['name']} looks like uint32 presented as uint16"
            )
        elif ids.max() >= vocab_size:
            where = int(np.argmax(ids >= vocab_size))
            hint = "looks like uint16 presented as uint32"
            problems.append(
                f"{file['name']}: token {where} is {ids[where]}, vocab_size"
                f" is {vocab_size}; it "
                + (hint if name == "uint32" else "has another vocabulary")
            )
    return problems


def _looks_like_uint32(ids):
    """Whether these uint16 are the halves of uint32 ids below 196,608.

    Every second one is then the high half: 0, 1 or 2 for any vocabulary in
    use, which tokens of text never are throughout.
    """
    return len(ids) >= 16 and ids[1::2].max() <= 2 and ids.max() > 2


def tokenizer_file_problems(folder, tokenizer):
    if not tokenizer.get("path"):
        return []
    path = folder / tokenizer["path"] / "tokenizer.json"
    if not path.is_file():
        return [f"{path} is missing"]
    if hash_file(path) != tokenizer.get("sha256"):
        return [f"{path} is not the tokenizer that the ids were made with"]
    return []


def read_lengths(folder, record):
    """Problems of the list of validation documents, and the list."""
    file = record.get("documents_file")
    name = file.get("name") if isinstance(file, dict) else None
    if not isinstance(name, str) or name != Path(name).name:
        return ["split 'val': documents_file is missing"], None
    if not (folder / name).is_file():
        return [f"{name} is missing"], None
    if hash_file(folder / name) != file.get("sha256"):
        return [f"{name} differs from the record (sha256)"], None
    try:
        lengths = np.load(folder / name, allow_pickle=False)
    except ValueError as error:
        return [f"{name} is not an array of numbers ({error})"], None
    shape = (record["documents"], 2)
    if lengths.dtype != np.uint64 or lengths.shape != shape:
        return [
            f"{name} is {lengths.dtype} of shape {lengths.shape}; the record"
            f" needs uint64 of shape {shape}"
        ], None
    sums = [int(total) for total in lengths.sum(axis=0)]
    if sums != [record["tokens"], record["bytes"]]:
        return [
            f"{name} adds up to {sums[0]} tokens and {sums[1]} bytes, the"
            f" record has {record['tokens']} and {record['bytes']}"
        ], None
    return [], lengths


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain values only: a pickle that names any global is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_pickle(path):
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise DatasetError(
            f"{path} is not loaded: {error}; only plain values are read from"
            " a pickle, nothing in it is run"
        ) from error
    if not isinstance(meta, dict):
        raise DatasetError(f"{path} holds {type(meta).__name__}, not a dict")
    return meta


def nanogpt_record(folder):
    """A record for a folder in nanoGPT's format, and its problems."""
    path = folder / "meta.pkl"
    plain = _read_pickle(path) if path.is_file() else {}
    dtype = plain.get("dtype", "uint16")
    vocab_size = plain.get("vocab_size", NANOGPT_VOCAB_SIZE)
    if dtype not in list(DTYPES) or not is_count(vocab_size, 1):
        raise DatasetError(
            f"{path} gives dtype {dtype!r} and vocab_size {vocab_size!r};"
            f" needed are one of {list(DTYPES)} and a whole number"
        )
    problems, splits = [], {}
    for split in SPLITS:
        files = []
        for path in bins(folder, split):
            count, rest = divmod(path.stat().st_size, DTYPES[dtype].itemsize)
            if rest or not count:
                problems.append(
                    f"{path.name} has {path.stat().st_size} bytes, no"
                    f" positive multiple of the {DTYPES[dtype].itemsize} of"
                    f" {dtype}: it is empty, cut off or of another type"
                )
                continue
            head = np.fromfile(path, np.uint8, PEEK_IDS)
            files.append(
                {
                    "name": path.name,
                    "tokens": count,
                    "max_id": None,
                    "sha256": None,
                    "head_sha256": hashlib.sha256(head.data).hexdigest(),
                }
            )
        if not bins(folder, split):
            problems.append(f"split {split!r} is missing: no {split}.bin")
        splits[split] = {
            "tokens": sum(file["tokens"] for file in files),
            "documents": None,
            "bytes": None,
            "text_sha256": None,
            "files": files,
        }
    meta = {
        "format_version": None,
        "name": folder.name,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokenizer": None,
        "source": {"format": "nanoGPT"},
        "splits": splits,
    }
    return meta, problems
