"""Turn the running Python's standard library into a dataset.

The documents are the library's source files and its language reference
(the topics of `help()`); nothing is downloaded. A byte-level BPE is trained
on the training split. The same Python gives the same bytes every time.

    python data/python_stdlib/prepare.py
"""

import argparse
import hashlib
import json
import platform
import random
import sys
import sysconfig
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from training.dataset import (  # noqa: E402
    DatasetError,
    DatasetWriter,
    open_dataset,
)

RECIPE = 1  # raise when the choice of documents or their treatment changes
SEED = 1337
VAL_SHARE = 0.05  # of the documents
EOT = "<|endoftext|>"
EOT_ID = 0
BATCH_DOCUMENTS = 64
# Tests, installed packages, and pip's bundled wheels.
SKIPPED_FOLDERS = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "idle_test",
    "lib-dynload",
    "site-packages",
    "test",
    "tests",
}
# The first holds the topics in escaped form, the others belong to a site.
SKIPPED_FILES = {
    "pydoc_data/topics.py",
    "sitecustomize.py",
    "usercustomize.py",
}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE,
        help="folder of the dataset (default: this script's)",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=2048,
        help="tokens of the BPE, at least 257 (default: %(default)s)",
    )
    parser.add_argument(
        "--max_documents",
        type=int,
        default=None,
        help="use only so many documents (default: all)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a dataset that was made from other inputs",
    )
    options = parser.parse_args(arguments)
    if options.vocab_size < 257:
        parser.error(
            f"--vocab_size={options.vocab_size}: 256 bytes and {EOT} need at"
            " least 257"
        )
    if options.max_documents is not None and options.max_documents < 40:
        parser.error(
            f"--max_documents={options.max_documents}: at least 40, so that"
            " the validation split gets one"
        )
    return options


def is_table(name, text):
    """Whether a file is a generated table or a record of one build."""
    if name.startswith("encodings/"):
        return "decoding_table" in text or "decoding_map" in text
    return Path(name).name.startswith("_sysconfigdata")


def source_documents(root):
    """(name, text) of each source file below `root`; counts of those left out.

    Distributors leave out parts of the library (Debian: idlelib, tkinter),
    so whatever is there is taken.
    """
    documents, left_out = [], {"empty": 0, "not UTF-8": 0, "tables": 0}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if SKIPPED_FOLDERS & set(relative.parts) or name in SKIPPED_FILES:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            left_out["not UTF-8"] += 1
            continue
        if not text.strip():
            left_out["empty"] += 1
        elif is_table(name, text):
            left_out["tables"] += 1
        else:
            documents.append((name, text))
    return documents, left_out


def topic_documents():
    """(name, text) of each topic of the language reference."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        print("this Python has no pydoc_data.topics: source files only")
        return []
    return [(f"topics/{name}.txt", topics[name]) for name in topics]


def collect_documents(root, max_documents=None):
    """(name, text) in a mixed order that depends on the names alone."""
    documents, left_out = source_documents(root)
    documents = sorted(documents + topic_documents())
    random.Random(SEED).shuffle(documents)
    print(
        "left out: "
        + ", ".join(f"{count} {kind}" for kind, count in left_out.items())
    )
    if len(documents) < 40:
        raise DatasetError(
            f"only {len(documents)} documents below {root} and in the topics:"
            " install this Python's standard library with its source"
        )
    return documents[:max_documents]


def split_of(name):
    """The split of a document: a fixed share of the hashes of names."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return "val" if number < VAL_SHARE * 2**64 else "train"


def inputs_hash(documents, vocab_size):
    """SHA-256 (hex) of all that decides the dataset's content."""
    content = [RECIPE, SEED, VAL_SHARE, vocab_size]
    content += [
        (name, hashlib.sha256(text.encode()).hexdigest())
        for name, text in documents
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def is_done(out, source, overwrite):
    """Whether `out` holds this very dataset; DatasetError for another."""
    if overwrite or not (out / "meta.json").exists():
        return False
    try:
        found = open_dataset(out.absolute()).meta["source"]
    except DatasetError as error:
        raise DatasetError(f"{error}\n(--overwrite replaces it)") from error
    if found.get("inputs_sha256") != source["inputs_sha256"]:
        raise DatasetError(
            f"{out} holds a dataset made from other inputs ({found}); these"
            f" are {source}; replace it with --overwrite or choose --out"
        )
    return True


def train_tokenizer(texts, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if tokenizer.token_to_id(EOT) != EOT_ID:
        raise AssertionError("the trainer gives special tokens the first ids")
    return tokenizer


def tokenizer_files(tokenizer):
    """The two files from which `transformers.AutoTokenizer` loads it."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOT,
        "model_max_length": 2**31 - 1,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
    }


def encode(tokenizer, documents, writer):
    """Append every document to its split, in order."""
    # A document may contain the text "<|endoftext|>": it is text there.
    tokenizer.encode_special_tokens = True
    total = sum(len(text.encode()) for _, text in documents)
    with tqdm(
        total=total, desc="encoding", unit="B", unit_scale=True
    ) as progress:
        for start in range(0, len(documents), BATCH_DOCUMENTS):
            batch = documents[start : start + BATCH_DOCUMENTS]
            texts = [text for _, text in batch]
            encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
            for (name, text), encoding in zip(batch, encoded):
                split, content = split_of(name), text.encode()
                if split == "val" and tokenizer.decode(encoding.ids) != text:
                    raise AssertionError(f"{name} does not decode to itself")
                digest = hashlib.sha256(content).digest()
                writer.add(split, encoding.ids, len(content), digest)
                progress.update(len(content))


def prepare(options):
    start = time.perf_counter()
    root = Path(sysconfig.get_path("stdlib"))
    documents = collect_documents(root, options.max_documents)
    version = f"{platform.python_implementation()} "
    version += platform.python_version()
    source = {
        "corpus": f"standard library of {version}",
        "documents": len(documents),
        "vocab_size": options.vocab_size,
        "inputs_sha256": inputs_hash(documents, options.vocab_size),
    }
    if is_done(options.out, source, options.overwrite):
        print(f"{options.out} already holds this dataset: nothing to do")
        return
    texts = [text for name, text in documents if split_of(name) == "train"]
    print(f"training a BPE of {options.vocab_size} tokens ...")
    tokenizer = train_tokenizer(texts, options.vocab_size)
    files = tokenizer_files(tokenizer)
    record = {
        "name": f"python_stdlib_bpe{tokenizer.get_vocab_size()}",
        "size": tokenizer.get_vocab_size(),
        "sha256": hashlib.sha256(files["tokenizer.json"]).hexdigest(),
        "eot_id": EOT_ID,
        "eot_token": EOT,
        "path": "tokenizer",
    }
    with DatasetWriter(
        options.out,
        name="python_stdlib",
        vocab_size=options.vocab_size,
        tokenizer=record,
        source=source,
        overwrite=options.overwrite,
    ) as writer:
        for name, content in files.items():
            writer.add_file(f"tokenizer/{name}", content)
        encode(tokenizer, documents, writer)
        meta = writer.close()
    report(options.out, meta, time.perf_counter() - start)


def report(out, meta, seconds):
    print(f"{out}: {meta['source']['corpus']}, {seconds:.1f} s")
    for name, split in meta["splits"].items():
        print(
            f"  {name:5}  {split['documents']:4} documents"
            f"  {split['bytes'] / 1e6:6.2f} MB  {split['tokens']:9,} tokens"
            f"  {split['bytes'] / split['tokens']:.2f} bytes per token"
        )


def main():
    options = parse_arguments()
    try:
        prepare(options)
    except (DatasetError, OSError) as error:
        sys.exit(f"prepare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; nothing was changed")


if __name__ == "__main__":
    main()
