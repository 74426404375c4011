"""Loading the tokenizer of a corpus, from a file, a folder or the hub.

    python data/custom/prepare.py --input FILE --tokenizer qwen3 --name mine
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import msgspec
from tokenizers import Tokenizer

from data.corpus_readers import CorpusError
from data.download_qwen3_tokenizer import (
    CONFIG_FILE,
    EMBEDDING_ROWS,
    N_IDS,
    TOKENIZER_FILE,
    TokenizerError,
    fetch_from_hub,
)
from training.dataset_record import (
    EOT_TOKENS,
    REPOSITORY,
    tokenizer_problems,
)


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
        "Qwen3",
        "Qwen/Qwen3-0.6B",
        N_IDS,
        EMBEDDING_ROWS,
        "<|endoftext|>",
        151643,
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


class CorpusTokenizer(NamedTuple):
    """A tokenizer as a dataset records it, with its two files."""

    record: dict  # name, size, sha256, eot_id, eot_token, path
    vocab_size: int
    files: dict[str, bytes]
    content: dict  # of tokenizer.json

    @property
    def plain_content(self):
        return plain_content(self.content, self.record["eot_token"])


def plain_content(content, eot_token):
    """A tokenizer.json without added tokens: everything is plain text.

    Merges that would build a special token go as well: sentencepiece
    never makes a control symbol such as </s> out of text.
    """
    special = {
        token["content"]
        for token in content["added_tokens"]
        if token["special"]
    } | {eot_token}
    model = dict(content["model"])
    if "merges" in model:  # pairs; in older files with a space between
        model["merges"] = [
            merge
            for merge in model["merges"]
            if "".join(
                merge.split(" ") if isinstance(merge, str) else merge
            ) not in special
        ]
    none = {"added_tokens": [], "truncation": None, "padding": None}
    return content | none | {"model": model}


def load_tokenizer(spec, known=None, eot_token=None, vocab_size=None):
    """The tokenizer of a path, a name in KNOWN or a hub repository.

    `spec` None means that of `known`, a name in KNOWN whose sizes the
    tokenizer must then have. Raises CorpusError, saying how to get it.
    """
    source = spec or known
    files = _read_files(str(source), known or source)
    content, vocab = _parse(source, files[TOKENIZER_FILE])
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
    return CorpusTokenizer(record, vocab_size, files, content)


def _parse(source, data):
    """(content, {token: id} with added tokens) of a tokenizer.json."""
    try:
        content = msgspec.json.decode(data)
        vocab = content["model"]["vocab"]
        if content["model"].get("type", "BPE") != "BPE":
            vocab = Tokenizer.from_str(data.decode()).get_vocab()
        added = content["added_tokens"]
        return content, vocab | {t["content"]: t["id"] for t in added}
    except Exception as error:  # tokenizers raises Exception itself
        raise CorpusError(
            f"{source}: its {TOKENIZER_FILE} is damaged: {error!r}"
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
    settings = b'{"tokenizer_class": "PreTrainedTokenizerFast"}'
    if config.is_file():
        settings = config.read_bytes()
    return {TOKENIZER_FILE: data, CONFIG_FILE: settings}


def _hub_files(repo):
    try:
        return fetch_from_hub(repo)
    except TokenizerError as error:
        raise CorpusError(
            f"no tokenizer {repo}: there is no such path, and {error}\n"
            f"Where it asks for a login: accept the license at"
            f" https://huggingface.co/{repo} and run `hf auth login`. Without"
            f" a network: bring its {TOKENIZER_FILE} or tokenizer.model here"
            " and give it as --tokenizer PATH."
        ) from error


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
        space = {"String": "\u2581"}
        content["decoder"] = {  # LLaMA-2's; without it words run together
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": space, "content": " "},
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
