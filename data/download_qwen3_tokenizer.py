"""Save the Qwen3 tokenizer in a folder that transformers can load.

Two sources give the same `tokenizer.json`, byte for byte:

hub   The files of Qwen/Qwen3-0.6B, through huggingface_hub, from its cache
      where they are there already. No remote code is run.
pypi  For machines that reach a package index but no hub. The Python package
      `dashscope` (Apache 2.0, by the makers of Qwen) carries the BPE ranks;
      pip fetches it at a pinned version from whatever index it is configured
      for, and it is read as a zip file, neither installed nor imported.
auto  hub, and where that fails pypi, saying why.

The chat template is in the hub's tokenizer_config.json alone; pre-training a
base model has no use for it.

    python data/download_qwen3_tokenizer.py
"""

import argparse
import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEFAULT_SAVE_PATH = Path(__file__).resolve().parent.parent / "qwen3_tokenizer"
HUB_REPO = "Qwen/Qwen3-0.6B"
HUB_TIMEOUT_S = 5
PACKAGE, PACKAGE_VERSION = "dashscope", "1.25.2"
RANKS_MEMBER = "dashscope/resources/qwen.tiktoken"
RANKS_SHA256 = (
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
)
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# Of the hub's tokenizer.json, which the rebuilt one equals.
TOKENIZER_SHA256 = (
    "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
)
N_BPE_TOKENS, N_IDS = 151_643, 151_669
# Rows of the released models' embeddings: 128 * 1187, above the ids.
EMBEDDING_ROWS = 151_936

# Ids follow the BPE tokens, in this order.
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|>"
    " <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|>"
    " <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|>"
    " <|video_pad|>"
).split()
# Added as well, but not flagged special: `skip_special_tokens` keeps them in
# decoded text, and `encode_special_tokens` does not turn them into plain text.
OTHER_ADDED_TOKENS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|>"
    " <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response>"
    " <think> </think>"
).split()
ADDED_TOKENS = SPECIAL_TOKENS + OTHER_ADDED_TOKENS

# As in transformers' Qwen2Tokenizer: contractions, words, single digits,
# punctuation, line ends, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROLES = {
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
}


class TokenizerError(ValueError):
    """A tokenizer, or what one should be made from, is not what it must be."""


# Rebuilding from the ranks


def parse_ranks(data):
    """{token bytes: rank} of the rank file, which must be the published one.

    A line for each token: its bytes in base64, a space, its rank, which is
    also its id.
    """
    digest = hashlib.sha256(data).hexdigest()
    if digest != RANKS_SHA256:
        raise TokenizerError(
            f"{RANKS_MEMBER} is not the published rank file: SHA-256 {digest},"
            f" not {RANKS_SHA256}. Find out what the package index serves as"
            f" {PACKAGE}=={PACKAGE_VERSION}."
        )
    pairs = (line.split() for line in data.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def byte_alphabet():
    """The printable character that byte-level BPE writes for each byte.

    Bytes that are printable in Latin-1 stand for themselves; the others take,
    in order, the code points from 256 on (GPT-2, `bytes_to_unicode`).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: 256 + n for n, byte in enumerate(others)}
    return [chr(shifted.get(byte, byte)) for byte in range(256)]


def last_merge(token, ranks):
    """The pair that BPE joins last when it builds the token.

    BPE runs on the token's bytes with the ranks below the token's own: a
    merge was learnt from the merges before it.
    """
    limit = ranks[token]
    parts = [bytes((byte,)) for byte in token]
    while len(parts) > 2:
        joined = [
            ranks.get(left + right, limit)
            for left, right in zip(parts, parts[1:])
        ]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def build_tokenizer_json(ranks):
    """The content of tokenizer.json, from {token bytes: rank}."""
    character = byte_alphabet()

    def spell(token):
        return "".join(character[byte] for byte in token)

    vocab, merges = {}, []
    for token in sorted(ranks, key=ranks.__getitem__):
        vocab[spell(token)] = ranks[token]
        if len(token) > 1:
            merges.append([spell(part) for part in last_merge(token, ranks)])
    flags = ("add_prefix_space", "trim_offsets", "use_regex")
    byte_level = {"type": "ByteLevel", **dict.fromkeys(flags, False)}
    split = {
        "type": "Split",
        "pattern": {"Regex": SPLIT_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    added = [
        {"id": n, **added_token(token)}
        for n, token in enumerate(ADDED_TOKENS, start=len(ranks))
    ]
    both = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    model = {"type": "BPE", "dropout": None, "unk_token": None}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    model |= {"fuse_unk": False, "byte_fallback": False}
    model |= {"ignore_merges": False, "vocab": vocab, "merges": merges}
    return {  # in the order of the hub's file
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": both,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model,
    }


def added_token(token):
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    special = token in SPECIAL_TOKENS
    return {"content": token, **dict.fromkeys(flags, False), "special": special}


def build_tokenizer_config():
    """tokenizer_config.json: the hub's, without its chat template."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(n): added_token(token)
            for n, token in enumerate(ADDED_TOKENS, start=N_BPE_TOKENS)
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131_072,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        **ROLES,
    }


def to_bytes(content):  # in the form of the hub's file
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


# The sources


def download_wheel(folder):
    """Fetch the pinned package with pip into the folder; the wheel's path.

    Raises TokenizerError where pip is missing or no index answers.
    """
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    command = [
        *(sys.executable, "-m", "pip", "download", requirement, "--no-deps"),
        *("--only-binary=:all:", "--dest", str(folder), "--quiet"),
        *("--no-input", "--disable-pip-version-check"),
        *("--timeout", "15", "--retries", "1"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("ERROR")]
        raise TokenizerError(
            f"pip download {requirement} failed with status"
            f" {done.returncode}: {' '.join(said or lines[-3:])} (it asks the"
            " index that `pip config list` and PIP_INDEX_URL name; without"
            " pip: `python -m ensurepip`)"
        )
    return wheels[0]


def read_ranks_from_wheel(wheel):
    """The rank file out of the wheel, read as a zip file."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(RANKS_MEMBER)
    except (zipfile.BadZipFile, KeyError) as error:
        raise TokenizerError(
            f"{wheel.name} is damaged or no {PACKAGE}=={PACKAGE_VERSION}:"
            f" {error}"
        ) from error


def read_from_pypi():
    """The rebuilt files by name."""
    print(f"Downloading {PACKAGE}=={PACKAGE_VERSION} for its BPE ranks...")
    with tempfile.TemporaryDirectory(prefix="qwen3_ranks_") as folder:
        data = read_ranks_from_wheel(download_wheel(Path(folder)))
    return {
        TOKENIZER_FILE: to_bytes(build_tokenizer_json(parse_ranks(data))),
        CONFIG_FILE: to_bytes(build_tokenizer_config()),
    }


def fetch_from_hub(repo):
    """A repository's two files by name, from the cache where they are there.

    Raises TokenizerError where the hub does not give them.
    """
    import huggingface_hub as hub

    names = (TOKENIZER_FILE, CONFIG_FILE)
    try:
        paths = [hub.try_to_load_from_cache(repo, name) for name in names]
        if not all(isinstance(path, str) for path in paths):
            # One short question first: hf_hub_download retries for minutes.
            hub.get_hf_file_metadata(
                hub.hf_hub_url(repo, TOKENIZER_FILE), timeout=HUB_TIMEOUT_S
            )
            paths = [hub.hf_hub_download(repo, name) for name in names]
        return dict(zip(names, (Path(path).read_bytes() for path in paths)))
    # Any: huggingface_hub has changed its HTTP library twice, and with it the
    # classes that a lost connection raises. Nothing is hidden, see the text.
    except Exception as error:
        said = " ".join(str(error).split())
        raise TokenizerError(
            f"the hub gave no {repo}: {type(error).__name__}: {said}"
        ) from error


def read_from_hub():
    """The hub's files by name; TokenizerError where it does not answer."""
    print(f"Downloading Qwen3 tokenizer from the hub ({HUB_REPO})...")
    return fetch_from_hub(HUB_REPO)


SOURCES = {"hub": read_from_hub, "pypi": read_from_pypi}  # in auto's order


# The folder


def check_tokenizer(folder):
    """Load the folder's tokenizer, which must be Qwen3's; TokenizerError."""
    from transformers import AutoTokenizer

    def refuse(why):
        raise TokenizerError(
            f"{folder} does not hold the Qwen3 tokenizer: {why}"
        )

    for name in (TOKENIZER_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            refuse(f"{name} is missing")
    data = (folder / TOKENIZER_FILE).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != TOKENIZER_SHA256:
        refuse(
            f"its {TOKENIZER_FILE} ({len(data):,} bytes) is not the published"
            f" one: SHA-256 {digest}, not {TOKENIZER_SHA256}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {role: getattr(tokenizer, role) for role in ROLES}
    if found != ROLES or len(tokenizer) != N_IDS:
        refuse(
            f"it has {len(tokenizer):,} ids and {found}, expected {N_IDS:,}"
            f" and {ROLES}"
        )
    return tokenizer


def save_checked(files, folder):
    """Write the files aside and check them, then rename each into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}."
    ) as work:
        for name, data in files.items():
            with open(Path(work, name), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        tokenizer = check_tokenizer(Path(work))
        folder.mkdir(exist_ok=True)
        for name in files:
            os.replace(Path(work, name), folder / name)
    tokenizer.name_or_path = str(folder)
    return tokenizer


def print_report(tokenizer):
    """Print the sizes and special tokens, as counted in the tokenizer."""
    n_bpe, n_ids = tokenizer.vocab_size, len(tokenizer)
    print(
        f"  Vocabulary size: {n_bpe:,} BPE tokens + {n_ids - n_bpe} added"
        f" tokens = {n_ids:,} ids\n"
        f"  Embedding rows:  {EMBEDDING_ROWS:,} (vocab_size of model and"
        f" dataset; {EMBEDDING_ROWS - n_ids} rows that no id uses)\n"
        "  Special tokens:"
    )
    ids = tokenizer.get_vocab()
    for role in ROLES:
        token = getattr(tokenizer, role)
        print(f"    - {role}: {f'{token} ({ids[token]})' if token else 'none'}")
    end = "<|endoftext|>"
    print(f"  Documents are separated by {end} ({ids[end]}).")


def download_qwen3_tokenizer(
    save_path=DEFAULT_SAVE_PATH, source="auto", overwrite=False
):
    """Save the Qwen3 tokenizer in a folder, print its report and return it.

    A relative `save_path` starts from the working directory. `source` is
    "hub", "pypi", or "auto": the first that works. A tokenizer that is there
    is checked and kept unless `overwrite`. Raises TokenizerError with the
    reason and the remedy.
    """
    folder = Path(save_path).expanduser().resolve()
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        try:
            tokenizer = check_tokenizer(folder)
        except TokenizerError as error:
            raise TokenizerError(
                f"{error}. Replace it with --overwrite, or choose another"
                " --save_path."
            ) from error
        print(f"The Qwen3 tokenizer is already in {folder}: checked, kept.")
    else:
        tokenizer = fetch(folder, SOURCES if source == "auto" else [source])
        print(f"Saved Qwen3 tokenizer to {folder}")
    print_report(tokenizer)
    return tokenizer


def fetch(folder, names):
    """The tokenizer of the first source that works, saved in the folder."""
    reasons = []
    for name in names:
        try:
            return save_checked(SOURCES[name](), folder)
        except TokenizerError as error:
            reasons.append(f"- {name}: {error}")
            print(f"Not from {name}: {error}")
    raise TokenizerError(
        f"no Qwen3 tokenizer from {' or '.join(names)}:\n"
        + "\n".join(reasons)
        + f"\nBy hand: bring {TOKENIZER_FILE} and {CONFIG_FILE} of {HUB_REPO}"
        f" into {folder} and run this again, which checks them; or put the"
        f" wheel of {PACKAGE}=={PACKAGE_VERSION} into a folder, name that in"
        " PIP_FIND_LINKS and use --source pypi."
    )


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--save_path", default=DEFAULT_SAVE_PATH, help="default: %(default)s")
    add("--source", choices=(*SOURCES, "auto"), default="auto")
    add("--overwrite", action="store_true", help="replace its two files")
    return parser.parse_args(arguments)


def main():
    options = parse_arguments()
    try:
        download_qwen3_tokenizer(
            options.save_path, options.source, options.overwrite
        )
    except (TokenizerError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; no incomplete tokenizer was left")


if __name__ == "__main__":
    main()
