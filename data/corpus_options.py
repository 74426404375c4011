"""The options that every `prepare.py` takes.

    python data/custom/prepare.py --help
"""

import argparse
import os
from pathlib import Path

from data.corpus_tokenizer import KNOWN


def parse_arguments(corpus, doc, arguments=None):
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    given = corpus.inputs is not None
    add("--input", nargs="+", metavar="PATH", required=not given,
        default=[corpus.inputs] if given else None,
        help="files, folders, or hub:OWNER/NAME[@REVISION][:PATTERN]"
        + (f" (default: {corpus.inputs})" if given else ""))
    add("--tokenizer", metavar="PATH", required=corpus.tokenizer is None,
        help="tokenizer.json, tokenizer.model, a folder with one,"
        f" {', '.join(KNOWN)} or a hub repository"
        + (f" (default: {corpus.tokenizer})" if corpus.tokenizer else ""))
    own = corpus.tokenizer is not None  # a corpus with a folder of its own
    add("--out", type=Path, help="folder (default: "
        + (f"{corpus.folder})" if own else "data/NAME)"))
    add("--name", help="name of the dataset (default: "
        + (f"{corpus.folder.name})" if own else "that of --out)"))
    add("--column", default="text", help="with the text (default: text)")
    add("--max_documents", type=count, metavar="N",
        help="read only the first N records")
    add("--num_proc", type=count, metavar="N", default=usable_cores(),
        help="cores to use; the bytes do not depend on it (default:"
        " %(default)s, all)")
    add("--on_bad_text", choices=("stop", "skip", "replace"), default="stop",
        help="for text that is null, missing, not UTF-8 or has a lone"
        " surrogate (default: stop)")
    add("--val_share", type=share, default=corpus.val_share,
        help="of the documents, for validation (default: %(default)s)")
    add("--encoder", choices=("auto", "tokenizers"), default="auto",
        help="auto: gigatoken, where its ids are those of tokenizers")
    add("--overwrite", action="store_true",
        help="replace another dataset; throw away an unfinished one")
    if corpus.tokenizer is None:
        add("--eot_token", help="end of text (default: the usual one)")
        add("--vocab_size", type=count, help="embedding rows")
    if corpus.files_per_lane is not None:
        add("--shard", type=shard, metavar="I/N",
            help="prepare only lanes I, I + N, ...: for N machines or jobs")
        add("--merge", action="store_true", help="only join what is prepared")
    parser.set_defaults(eot_token=None, vocab_size=None, shard=None,
                        merge=False)
    options = parser.parse_args(arguments)
    if options.shard and (
        options.merge or options.max_documents is not None
    ):
        parser.error("--shard goes with neither --merge nor --max_documents")
    folder = corpus.folder
    if options.out is None and corpus.tokenizer is None:
        if options.name is None:
            parser.error("give a --name (then it is data/NAME) or --out")
        folder = folder.parent / options.name
    if corpus.tokenizer is not None:
        options.name = options.name or corpus.folder.name
    options.out = (options.out or folder).expanduser().absolute()
    options.name = options.name or options.out.name
    return options


def usable_cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return number


def share(text):
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text}: between 0 and 1")
    return number


def shard(text):
    index, _, total = text.partition("/")
    if not (index + total).isdecimal() or not int(index) < int(total):
        raise argparse.ArgumentTypeError(f"{text}: I/N with 0 <= I < N")
    return int(index), int(total)
