"""Look at a dataset: what it is, its text, and whether it is whole.

    python data/inspect_dataset.py python_stdlib --offset 1000 --count 200
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.dataset import DatasetError, open_dataset, verify  # noqa: E402

BORDER = "\n----- document border -----\n"


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dataset", help="a name in data/, or a folder")
    add("--split", choices=("train", "val"), default="train")
    add("--offset", type=int, default=0, help="first token to show")
    add("--count", type=int, default=200, help="tokens to show")
    add("--windows", type=int, default=1, help="windows, spread evenly")
    add(
        "--no_check",
        action="store_true",
        help="leave out the full check, which reads every bin",
    )
    return parser.parse_args(arguments)


def load_tokenizer(dataset):
    """The dataset's own tokenizer, or None where it brings none."""
    from tokenizers import Tokenizer

    if dataset.tokenizer_folder is None:
        return None
    return Tokenizer.from_file(str(dataset.tokenizer_folder / "tokenizer.json"))


def describe(dataset):
    """Lines on what the dataset is and how large."""
    tokenizer = dataset.meta["tokenizer"]
    lines = [
        f"{dataset.name}: {dataset.folder}",
        f"ids: {dataset.dtype}, {dataset.vocab_size:,} embedding rows",
    ]
    if tokenizer:
        lines.append(
            f"tokenizer: {tokenizer['name']}, {tokenizer['size']:,} ids,"
            f" end of text {tokenizer['eot_token']} ({tokenizer['eot_id']})"
        )
    for key, value in dataset.meta["source"].items():
        lines.append(f"source: {key} = {value}")
    for name, split in dataset.splits.items():
        line = f"{name}: {split.tokens:,} tokens in {len(split.files)} bins"
        if split.bytes is not None:
            line += (
                f", {split.documents:,} documents, {split.bytes:,} bytes of"
                f" text, {split.bytes / split.tokens:.3f} bytes per token,"
                f" text_sha256 {split.text_sha256[:16]}"
            )
        lines.append(line)
    return lines


def window(dataset, tokenizer, split, offset, count):
    """The text of tokens `offset` .. `offset + count`, borders marked.

    Without a tokenizer the ids themselves. A character whose bytes are cut
    by the window shows as U+FFFD.
    """
    ids = dataset.split(split).read(offset, count).tolist()
    pieces = [[]]
    for id in ids:
        if id == dataset.eot_id:
            pieces.append([])
        else:
            pieces[-1].append(id)
    if tokenizer is None:
        shown = [" ".join(map(str, piece)) for piece in pieces]
    else:
        shown = [
            tokenizer.decode(piece, skip_special_tokens=False)
            for piece in pieces
        ]
    return BORDER.join(shown)


def inspect(options):
    """Print everything; whether the dataset is whole."""
    dataset = open_dataset(options.dataset)
    print("\n".join(describe(dataset)))
    tokenizer = load_tokenizer(dataset)
    split = dataset.split(options.split)
    if (
        not 0 <= options.offset < split.tokens
        or options.count < 1
        or not 1 <= options.windows <= split.tokens - options.offset
    ):
        raise DatasetError(
            f"--offset={options.offset} --count={options.count}"
            f" --windows={options.windows}: {options.split} has tokens 0 .."
            f" {split.tokens - 1}, and at least one is shown"
        )
    step = (split.tokens - options.offset) // options.windows
    for i in range(options.windows):
        start = options.offset + i * step
        count = min(options.count, split.tokens - start)
        print(f"\n===== {options.split}, tokens {start} .. {start + count - 1}")
        print(window(dataset, tokenizer, options.split, start, count))
    if options.no_check:
        return True
    problems = verify(dataset)
    print("\nevery bin agrees with its record" if not problems else "")
    for problem in problems:
        print(f"WRONG: {problem}")
    return not problems


def main():
    options = parse_arguments()
    # A terminal or a pipe that is not UTF-8 should not end the look.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        whole = inspect(options)
    except (DatasetError, OSError) as error:
        sys.exit(f"inspect_dataset.py: {error}")
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
