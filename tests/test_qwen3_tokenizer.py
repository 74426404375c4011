"""The Qwen3 tokenizer, rebuilt from its BPE ranks, against other programs.

Ids are compared with tiktoken, which is given the same ranks and Python's own
NFC, and with gigatoken: neither shares code with `tokenizers`. The package
with the ranks is fetched once; everything after that works without a network,
from a local web server where a hub is needed.

    pytest tests/test_qwen3_tokenizer.py
"""

import base64
import functools
import hashlib
import http.server
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
from pathlib import Path

import gigatoken
import pytest
import tiktoken
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from data import download_qwen3_tokenizer as qwen3

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / 'data' / 'download_qwen3_tokenizer.py'

N_STRINGS = 2_500  # of each kind


def nfc(text):
    return unicodedata.normalize('NFC', text)


# First and last code point of blocks, at least one for each large script.
BLOCKS = (
    (0x0041, 0x024F), (0x0370, 0x03FF), (0x0400, 0x052F), (0x0531, 0x058A),
    (0x0591, 0x05F4), (0x0600, 0x06FF), (0x0700, 0x074F), (0x0780, 0x07B1),
    (0x07C0, 0x07FF), (0x0900, 0x097F), (0x0980, 0x09FE), (0x0A01, 0x0A76),
    (0x0A81, 0x0AFF), (0x0B01, 0x0B77), (0x0B82, 0x0BFA), (0x0C00, 0x0C7F),
    (0x0C80, 0x0CF2), (0x0D00, 0x0D7F), (0x0D81, 0x0DF4), (0x0E01, 0x0E5B),
    (0x0E81, 0x0EDF), (0x0F00, 0x0FDA), (0x1000, 0x109F), (0x10A0, 0x10FF),
    (0x1100, 0x11FF), (0x1200, 0x1399), (0x13A0, 0x13FD), (0x1401, 0x167F),
    (0x16A0, 0x16F8), (0x1780, 0x17F9), (0x1800, 0x18AA), (0x1E00, 0x1FFE),
    (0x2000, 0x206F), (0x2070, 0x218B), (0x2190, 0x23FF), (0x2C00, 0x2D2D),
    (0x3000, 0x30FF), (0x3105, 0x318E), (0x3400, 0x9FFC), (0xA000, 0xA4C6),
    (0xAC00, 0xD7A3), (0xF900, 0xFAD9), (0xFB00, 0xFDFF), (0xFE20, 0xFFEE),
    (0x10330, 0x1034A), (0x12000, 0x12399), (0x13000, 0x1342E),
    (0x1D100, 0x1D1E8), (0x1D400, 0x1D7FF), (0x1E900, 0x1E95F),
    (0x20000, 0x2A6DD),
)
SPACES = (
    ' ', ' ', ' ', '\t', '\n', '\r', '\r\n', '\x0b', '\x0c', '\x1c', '\x85',
    '\u00a0', '\u1680', '\u2003', '\u2009', '\u200b', '\u2028', '\u2029',
    '\u202f', '\u3000', '\ufeff',
)
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", '\u2019s', "'x",
                "'S", "'T", "'RE", "'Ve", "'M", "'LL", "'D", "'\u017f")
EMOJI = (
    '\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466',
    '\U0001f3f3\ufe0f\u200d\U0001f308', '\U0001f469\U0001f3fd\u200d\U0001f680',
    '\u2764\ufe0f', '\u2764\ufe0e', '1\ufe0f\u20e3', '#\u20e3',
    '\U0001f1fa\U0001f1f3', '\U0001f44d\U0001f3ff', '\u200d', '\ufe0f',
    '\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f',
)
CODE = (
    'def ', 'f(x, y)', ' -> None:', '\n    ', '\n\t\t', 'return', "{'a': 1}",
    '==', '!=', '//', '/* ', ' */', '<div class=\"x\">', '</div>', '&amp;',
    'x_1', 'camelCase', '0x7fff', '1e-6', '#include <', ';\n', '\\n', '$(', '`',
    '~/.', '::', '->', '||', '<|', '|>', '[[', ']]', '%s', '\r\n', 'SELECT *',
)
NEARLY_SPECIAL = (
    '<|endoftext|', '|endoftext|>', '<|im_start |>', '<|IM_END|>', '<think',
    'think>', '< /think>', '<|<|im_end|>|>', '<|extra_0|>',
)


def assigned(first, last):
    return [
        char for char in map(chr, range(first, last + 1))
        if unicodedata.category(char) not in ('Cn', 'Co', 'Cs')
    ]


ALL_CHARS = assigned(0, 0x10FFFF)
MARKS = [char for char in ALL_CHARS if unicodedata.category(char)[0] == 'M']
SCRIPTS = [assigned(*block) for block in BLOCKS]
LETTERS = 'abcdefghijklmnopqrstuvwxyzABCXYZ\u00e9\u00df\u00f1\u0142\u0130\u0131'


def scripts(rng):
    words = []
    for _ in range(rng.randint(1, 6)):
        script = rng.choice(SCRIPTS)
        words.append(''.join(rng.choices(script, k=rng.randint(1, 9))))
    return rng.choice((' ', '', ', ', '\n')).join(words)


def any_characters(rng):
    return ''.join(rng.choices(ALL_CHARS, k=rng.randint(1, 24)))


def combining_marks(rng):
    text = ''
    for _ in range(rng.randint(1, 10)):
        text += rng.choice(rng.choice((LETTERS, rng.choice(SCRIPTS))))
        text += ''.join(rng.choices(MARKS, k=rng.choice((0, 1, 1, 2, 4))))
    form = rng.choice((None, 'NFC', 'NFD', 'NFKD'))
    return text if form is None else unicodedata.normalize(form, text)


def emoji(rng):
    pictures = assigned(0x1F300, 0x1FAF6)
    parts = rng.choices((*EMOJI, *rng.choices(pictures, k=6), ' ', 'a'),
                        k=rng.randint(1, 9))
    return ''.join(parts)


def whitespace(rng):
    text = ''
    for _ in range(rng.randint(1, 8)):
        text += rng.choice(SPACES) * rng.choice((1, 1, 2, 3, 7, 40))
        text += rng.choice(('', '', 'x', 'word', '7', '!', '\u6f22'))
    return text


def digits(rng):
    kinds = ('0123456789', '0123456789', '\u0660\u0661\u0662\u0669',
             '\u0966\u096f', '\u00b2\u00b3\u00bd\u2167\u2460\u3007',
             '\uff10\uff19', '.,-+eE%/: ')
    n = rng.randint(1, 30)
    return ''.join(rng.choice(rng.choice(kinds)) for _ in range(n))


def contractions(rng):
    return ''.join(
        ''.join(rng.choices(LETTERS, k=rng.randint(0, 6)))
        + rng.choice(CONTRACTIONS)
        + ''.join(rng.choices(LETTERS + ' \n', k=rng.randint(0, 3)))
        for _ in range(rng.randint(1, 6))
    )


def code(rng):
    return ''.join(rng.choices(CODE, k=rng.randint(1, 25)))


def control_characters(rng):
    chars = [chr(n) for n in (*range(0x20), *range(0x7F, 0xA0), 0xAD, 0x061C,
                              0x200B, 0x200E, 0x202E, 0x2066, 0xFFFE, 0xFFFD,
                              0x10FFFF, 0xE000)]
    return ''.join(rng.choices(chars + list('ab1 .'), k=rng.randint(1, 20)))


def special_tokens(rng):
    # U+0338 would join with the ">" before it, were NFC done first.
    others = (*NEARLY_SPECIAL, '\u0338', 'e\u0301', ' ', '\n', 'user', '1')
    parts = rng.choices((*qwen3.ADDED_TOKENS, *rng.choices(others, k=20)),
                        k=rng.randint(1, 8))
    return ''.join(parts)


KINDS = {
    maker.__name__: maker
    for maker in (scripts, any_characters, combining_marks, emoji, whitespace,
                  digits, contractions, code, control_characters,
                  special_tokens)
}


@functools.cache
def varied_strings(kind):
    rng = random.Random(f'qwen3 {kind}')
    return ['', *(KINDS[kind](rng) for _ in range(N_STRINGS - 1))]


@functools.cache
def newer_than_tables():
    """Characters that the NFC of `tokenizers` does not know, but Python's does.

    Its tables are those of an old Unicode version (unicode-normalization-
    alignments 0.1.12): a mark added later is not moved past other marks, and a
    letter added later is not composed. gigatoken has current tables.
    """
    ages = unicodedata.ucd_3_2_0
    old = {}
    for char in MARKS:
        if ages.category(char) != 'Cn' and unicodedata.combining(char):
            old.setdefault(unicodedata.combining(char), char)
    rust_nfc = normalizers.NFC().normalize_str
    found = set()
    for char in ALL_CHARS:
        tries = [unicodedata.normalize('NFD', char)]
        if unicodedata.combining(char):
            tries += [f'a{char}{mark}' for mark in old.values()]
            tries += [f'a{mark}{char}' for mark in old.values()]
        if any(rust_nfc(text) != nfc(text) for text in tries):
            # A new letter is made of parts of which one at least is new.
            found.update(c for c in tries[0] if ages.category(c) == 'Cn')
            found.add(char)
    return frozenset(found)


class Independent:
    """Qwen3's tokenizer by tiktoken: its own BPE and its own regex engine."""

    def __init__(self, ranks):
        self.ids = {t: len(ranks) + n for n, t in enumerate(qwen3.ADDED_TOKENS)}
        self.encoding = tiktoken.Encoding(
            'qwen3',
            pat_str=(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            mergeable_ranks=ranks,
            special_tokens=self.ids,
        )

    def pieces(self, text, added):
        """Added tokens as they are and NFC of the text between them."""
        if not added:
            return [nfc(text)]
        parts = re.split('(' + '|'.join(map(re.escape, added)) + ')', text)
        return [p if p in added else nfc(p) for p in parts]

    def encode(self, text, added=qwen3.ADDED_TOKENS):
        ids = []
        for piece in self.pieces(text, added):
            if piece in added:
                ids.append(self.ids[piece])
            else:
                ids += self.encoding.encode_ordinary(piece)
        return ids

    def normalised(self, text):
        return ''.join(self.pieces(text, qwen3.ADDED_TOKENS))


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    try:
        return qwen3.download_wheel(tmp_path_factory.mktemp('wheel'))
    except qwen3.SourceUnreachable as error:
        pytest.skip(f'the package of the BPE ranks is out of reach: {error}')


@pytest.fixture(scope='session')
def ranks(wheel):
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read('dashscope/resources/qwen.tiktoken')
    pairs = (line.split() for line in data.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@pytest.fixture(scope='session')
def silent_hub_run(tmp_path_factory):
    """The command, begun early, with a hub that accepts and never answers."""
    path = tmp_path_factory.mktemp('silent')
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        silent.listen()
        url = f'http://127.0.0.1:{silent.getsockname()[1]}'
        run = start_script('--source', 'hub', '--save_path', path / 'new',
                           HF_ENDPOINT=url, HF_HOME=str(path / 'home'))
        yield run, path
        run.kill()
        run.communicate()


@pytest.fixture(scope='session')
def build(silent_hub_run, wheel, tmp_path_factory):
    """The command without a hub: what it said, and its folder.

    pip takes the wheel that `wheel` has fetched.
    """
    path = tmp_path_factory.mktemp('built')
    done = run_script('--save_path', 'deep/qwen3', cwd=path,
                      HF_ENDPOINT=dead_url(), HF_HOME=str(path / 'home'),
                      **offline_pip(wheel.parent))
    assert done.returncode == 0, done.stderr
    return done.stdout, path / 'deep' / 'qwen3'


@pytest.fixture(scope='session')
def folder(build):
    return build[1]


@pytest.fixture(scope='session')
def text(folder):
    return (folder / 'tokenizer.json').read_text(encoding='utf-8')


@pytest.fixture(scope='session')
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope='session')
def rust(text):
    return Tokenizer.from_str(text)


@pytest.fixture(scope='session')
def fast(text):
    return gigatoken.Tokenizer.from_json(text)


@pytest.fixture(scope='session')
def independent(ranks):
    return Independent(ranks)


def offline_pip(links):
    """Let pip see one folder and neither an index nor a configuration."""
    return {'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': str(links),
            'PIP_CONFIG_FILE': os.devnull}


def no_pip_index(monkeypatch, links):
    for name, value in offline_pip(links).items():
        monkeypatch.setenv(name, value)


def start_script(*options, python=(), cwd=None, **env):
    """Begin the command as a user does, with those hub settings alone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    return subprocess.Popen(
        [sys.executable, *python, str(SCRIPT), *map(str, options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env=kept | {'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1'} | env,
    )


def run_script(*options, **settings):
    run = start_script(*options, **settings)
    out, err = run.communicate(timeout=60)
    return subprocess.CompletedProcess(run.args, run.returncode, out, err)


def dead_url():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return f'http://127.0.0.1:{probe.getsockname()[1]}'


@pytest.fixture
def hub_server(folder):
    """A web server with the two files where a hub has them, in `.files`."""
    files = {p.name: p.read_bytes() for p in folder.iterdir()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            name = self.path.removeprefix('/Qwen/Qwen3-0.6B/resolve/main/')
            body = files.get(name)
            self.send_response(404 if body is None else 200)
            self.send_header('Content-Length', str(len(body or b'')))
            self.send_header('X-Repo-Commit', '0' * 40)
            self.send_header('ETag', hashlib.sha256(body or b'').hexdigest())
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(body or b'')

        do_GET = do_HEAD = answer

        def log_message(self, *args):
            """Keep pytest's output free of requests."""

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.files = files
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# Ids


def test_strings_are_varied():
    distinct = {s for kind in KINDS for s in varied_strings(kind)}
    newer = newer_than_tables()
    assert sum(newer.isdisjoint(s) for s in distinct) >= 20_000


def test_only_newer_characters_are_left_out():
    ages = unicodedata.ucd_3_2_0
    assert [c for c in newer_than_tables() if ages.category(c) != 'Cn'] == []


@pytest.mark.parametrize('kind', KINDS)
def test_ids_equal_independent_implementation(
    kind, rust, fast, tokenizer, independent
):
    strings = varied_strings(kind)
    expected = [independent.encode(s) for s in strings]
    assert fast.encode_batch_list(strings) == expected

    newer = newer_than_tables()
    kept = [n for n, s in enumerate(strings) if newer.isdisjoint(s)]
    strings = [strings[n] for n in kept]
    expected = [expected[n] for n in kept]
    assert [e.ids for e in rust.encode_batch(strings)] == expected
    assert tokenizer(strings)['input_ids'] == expected
    back = rust.decode_batch(expected, skip_special_tokens=False)
    assert back == [independent.normalised(s) for s in strings]


def test_flagged_special_tokens_can_be_plain_text(text, independent):
    rust = Tokenizer.from_str(text)
    rust.encode_special_tokens = True
    strings = varied_strings('special_tokens')
    others = qwen3.OTHER_ADDED_TOKENS
    expected = [independent.encode(s, others) for s in strings]
    assert [e.ids for e in rust.encode_batch(strings)] == expected
    assert max(map(max, filter(None, expected))) == 151_668
    assert rust.encode('<|endoftext|>').ids == [27, 91, 8691, 723, 427, 91, 29]


def test_without_added_tokens_all_text_is_plain(text, independent):
    content = json.loads(text) | {'added_tokens': []}
    strings = varied_strings('special_tokens')
    expected = [independent.encode(s, ()) for s in strings]
    content = json.dumps(content)
    rust = Tokenizer.from_str(content)
    fast = gigatoken.Tokenizer.from_json(content)
    assert [e.ids for e in rust.encode_batch(strings)] == expected
    assert fast.encode_batch_list(strings) == expected
    assert max(map(max, filter(None, expected))) < 151_643


def test_known_ids(tokenizer):
    assert tokenizer.encode('Hello, world!') == [9707, 11, 1879, 0]
    assert tokenizer.encode('e\u0301') == tokenizer.encode('\u00e9') == [963]
    assert tokenizer.encode('<|im_end|>') == [151_645]


# What is written


def test_file_is_the_published_one(text):
    data = text.encode()
    assert len(data) == 11_422_654
    assert hashlib.sha256(data).hexdigest() == qwen3.TOKENIZER_SHA256
    model = json.loads(text)['model']
    assert len(model['vocab']) == 151_643
    assert len(model['merges']) == 151_387
    assert model['merges'][:2] == [['\u0120', '\u0120'], ['\u0120\u0120'] * 2]


def test_sizes_and_special_tokens(tokenizer):
    assert (tokenizer.vocab_size, len(tokenizer)) == (151_643, 151_669)
    assert max(tokenizer.get_vocab().values()) < 151_936
    assert tokenizer.eos_token == '<|im_end|>'
    assert tokenizer.pad_token == '<|endoftext|>'
    assert tokenizer.pad_token_id == 151_643
    assert tokenizer.bos_token is None
    assert tokenizer.unk_token is None


def test_added_tokens_and_flags(tokenizer):
    decoder = tokenizer.added_tokens_decoder
    assert sorted(decoder) == list(range(151_643, 151_669))
    special = [i for i, token in decoder.items() if token.special]
    assert sorted(special) == list(range(151_643, 151_657))
    assert not any(
        t.normalized or t.lstrip or t.rstrip or t.single_word
        for t in decoder.values()
    )
    assert decoder[151_667].content == '<think>'
    assert decoder[151_659].content == '<|fim_prefix|>'


# The parts


def toy_ranks(*tokens):
    ranks = {bytes((n,)): n for n in range(256)}
    return ranks | {token: 256 + n for n, token in enumerate(tokens)}


def test_merges_come_from_ranks():
    # By rank "bc" is joined before "ab", so "abc" is "a" + "bc".
    ranks = toy_ranks(b'bc', b'ab', b'abc', b'ababc')
    content = qwen3.build_tokenizer_json(ranks)
    assert content['model']['merges'] == [
        ['b', 'c'], ['a', 'b'], ['a', 'bc'], ['ab', 'abc'],
    ]
    assert content['model']['vocab']['\u0120'] == 0x20
    assert content['added_tokens'][0]['id'] == 260
    rust = Tokenizer.from_str(json.dumps(content))
    assert rust.encode('abcab').ids == [258, 257]


def test_ranks_that_no_merge_builds():
    with pytest.raises(qwen3.TokenizerError, match="b'abc' with rank 256"):
        qwen3.build_tokenizer_json(toy_ranks(b'abc'))
    with pytest.raises(qwen3.TokenizerError, match="b'ab' and b'c'"):
        qwen3.last_merge(b'abc', {b'ab': 3, b'abc': 4, b'c': 5})


def test_all_faults_of_ranks_are_named():
    ranks = toy_ranks(b'ab')
    del ranks[b'q']
    with pytest.raises(qwen3.TokenizerError) as caught:
        qwen3.build_tokenizer_json(ranks)
    assert '[113]' in str(caught.value)
    assert '256 ranks are not 0 to 255' in str(caught.value)


def test_changed_rank_file_is_refused(wheel):
    data = qwen3.read_ranks_from_wheel(wheel)
    assert len(qwen3.parse_ranks(data)) == 151_643
    changed = data.replace(b' 7\n', b' 8\n', 1)
    assert len(changed) == len(data)
    for wrong in (changed, data[:-1], b''):
        with pytest.raises(qwen3.TokenizerError) as caught:
            qwen3.parse_ranks(wrong)
        assert qwen3.RANKS_SHA256 in str(caught.value)
        assert hashlib.sha256(wrong).hexdigest() in str(caught.value)


def make_wheel(path, ranks):
    info = 'dashscope-1.25.2.dist-info'
    path = path / 'dashscope-1.25.2-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(
            f'{info}/METADATA',
            'Metadata-Version: 2.1\nName: dashscope\nVersion: 1.25.2\n',
        )
        archive.writestr(
            f'{info}/WHEEL',
            'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
        )
        archive.writestr(f'{info}/RECORD', '')
        if ranks is not None:
            archive.writestr('dashscope/resources/qwen.tiktoken', ranks)
    return path


def test_package_with_other_ranks_writes_nothing(tmp_path, monkeypatch):
    (tmp_path / 'links').mkdir()
    make_wheel(tmp_path / 'links', b'x' * 2_561_218)
    no_pip_index(monkeypatch, tmp_path / 'links')
    with pytest.raises(qwen3.TokenizerError, match='SHA-256') as caught:
        qwen3.download_qwen3_tokenizer(tmp_path / 'new' / 'tokenizer', 'pypi')
    assert not isinstance(caught.value, qwen3.SourceUnreachable)
    assert [p.name for p in tmp_path.iterdir()] == ['links']


def test_wheels_that_are_not_as_published(tmp_path):
    with pytest.raises(qwen3.TokenizerError, match='holds no dashscope/'):
        qwen3.read_ranks_from_wheel(make_wheel(tmp_path, None))
    with pytest.raises(qwen3.TokenizerError, match='5 bytes; expected 2,561'):
        qwen3.read_ranks_from_wheel(make_wheel(tmp_path, b'IQ== '))
    (tmp_path / 'cut.whl').write_bytes(b'PK\x03\x04')
    with pytest.raises(qwen3.TokenizerError, match='cut.whl is damaged'):
        qwen3.read_ranks_from_wheel(tmp_path / 'cut.whl')


# The folder


def copy_of(folder, path):
    path.mkdir(parents=True)
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def state_of(path):
    stats = {p.name: p.stat() for p in path.iterdir()}
    return {name: (s.st_mtime_ns, s.st_ino) for name, s in stats.items()}


def test_default_folder_starts_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert qwen3.parse_arguments([]).save_path == ROOT / 'qwen3_tokenizer'


def test_existing_tokenizer_is_checked_and_kept(
    folder, tmp_path, monkeypatch, capsys
):
    path = copy_of(folder, tmp_path / 'mine')
    before = state_of(path)
    no_pip_index(monkeypatch, tmp_path)  # nothing to fetch from
    monkeypatch.chdir(tmp_path)
    returned = qwen3.download_qwen3_tokenizer('mine', source='pypi')
    assert len(returned) == 151_669
    assert state_of(path) == before
    report = capsys.readouterr().out
    assert f'already in {path}: checked and kept' in report
    assert '151,643 BPE tokens + 26 added tokens = 151,669 ids' in report
    assert '151,936' in report
    assert 'eos_token: <|im_end|> (151645)' in report
    assert 'pad_token: <|endoftext|> (151643)' in report
    assert 'bos_token: none' in report and 'unk_token: none' in report


def test_overwrite_without_a_source_keeps_the_old(
    folder, tmp_path, monkeypatch
):
    path = copy_of(folder, tmp_path / 'mine')
    before = state_of(path)
    (tmp_path / 'empty').mkdir()
    no_pip_index(monkeypatch, tmp_path / 'empty')
    with pytest.raises(qwen3.SourceUnreachable, match='To do it by hand'):
        qwen3.download_qwen3_tokenizer(path, 'pypi', overwrite=True)
    assert state_of(path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'mine']


def write_wrong_tokenizer(text, path):
    content = json.loads(text)
    merges = content['model']['merges']
    merges[5], merges[6] = merges[6], merges[5]
    content['normalizer'] = None
    (path / 'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')


def test_wrong_tokenizer_is_refused(folder, text, tmp_path):
    path = copy_of(folder, tmp_path / 'mine')
    write_wrong_tokenizer(text, path)
    before = state_of(path)
    with pytest.raises(qwen3.TokenizerError, match='--overwrite') as caught:
        qwen3.download_qwen3_tokenizer(path, 'pypi')
    assert 'its merges differs' in str(caught.value)
    assert 'its normalizer differs' in str(caught.value)
    assert 'vocab differs' not in str(caught.value)
    assert state_of(path) == before


def test_wrong_config_is_refused(folder, tmp_path):
    path = copy_of(folder, tmp_path / 'mine')
    config = json.loads((path / 'tokenizer_config.json').read_text())
    config |= {'eos_token': '<|endoftext|>', 'bos_token': '<|im_start|>'}
    (path / 'tokenizer_config.json').write_text(json.dumps(config))
    with pytest.raises(qwen3.TokenizerError) as caught:
        qwen3.check_tokenizer(path)
    said = str(caught.value)
    assert 'its eos_token is <|endoftext|>, expected <|im_end|>' in said
    assert 'its bos_token is <|im_start|>, expected None' in said


def test_what_transformers_saves_is_accepted(tokenizer, folder, tmp_path):
    tokenizer.save_pretrained(tmp_path / 'saved')
    saved = (tmp_path / 'saved' / 'tokenizer.json').read_bytes()
    assert saved != (folder / 'tokenizer.json').read_bytes()
    assert len(qwen3.check_tokenizer(tmp_path / 'saved')) == 151_669


def test_tokenizer_json_copied_by_hand_gets_its_config(folder, text, tmp_path):
    (tmp_path / 'tokenizer.json').write_text(text, encoding='utf-8')
    returned = qwen3.download_qwen3_tokenizer(tmp_path, 'pypi')
    assert returned.pad_token_id == 151_643
    written = (tmp_path / 'tokenizer_config.json').read_bytes()
    assert written == (folder / 'tokenizer_config.json').read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_overwrite_deletes_no_foreign_files(folder, tmp_path):
    path = copy_of(folder, tmp_path / 'mine')
    (path / 'thesis.tex').write_text('x')
    with pytest.raises(qwen3.TokenizerError, match='thesis.tex'):
        qwen3.download_qwen3_tokenizer(path, 'pypi', overwrite=True)
    assert (path / 'thesis.tex').read_text() == 'x'
    with pytest.raises(qwen3.TokenizerError, match='is a file'):
        qwen3.download_qwen3_tokenizer(path / 'thesis.tex', 'pypi')
    with pytest.raises(qwen3.TokenizerError, match='one of hub, pypi, auto'):
        qwen3.download_qwen3_tokenizer(tmp_path / 'new', 'disk')


# The command


def test_unreachable_hub_is_said_and_writes_nothing(tmp_path):
    begun = time.monotonic()
    done = run_script('--source', 'hub', '--save_path', 'new', cwd=tmp_path,
                      HF_ENDPOINT=dead_url(), HF_HOME=str(tmp_path / 'home'))
    assert time.monotonic() - begun < 15
    assert done.returncode == 1
    assert 'the hub gave no Qwen/Qwen3-0.6B: ConnectError' in done.stderr
    assert 'copy tokenizer.json of Qwen/Qwen3-0.6B' in done.stderr
    assert str(tmp_path / 'new' / 'tokenizer.json') in done.stderr
    assert 'Traceback' not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} <= {'home'}


def test_offline_mode_is_named(tmp_path):
    done = run_script('--source', 'hub', '--save_path', tmp_path / 'new',
                      HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'home'))
    assert done.returncode == 1
    assert 'HF_HUB_OFFLINE' in done.stderr
    assert not (tmp_path / 'new').exists()


def test_hub_that_never_answers_is_given_up(silent_hub_run, build):
    run, path = silent_hub_run
    # 5 s, and 3 s that huggingface_hub takes of its own; else it waits on.
    _, said = run.communicate(timeout=20)
    assert run.returncode == 1
    assert 'the hub gave no Qwen/Qwen3-0.6B: ReadTimeout' in said
    assert not (path / 'new').exists()


def test_auto_falls_back_from_a_missing_hub(build):
    said, folder = build
    assert said.count('Not from hub: the hub gave no Qwen/Qwen3-0.6B') == 1
    assert 'ConnectError' in said
    assert f'Saved Qwen3 tokenizer to {folder}' in said
    assert sorted(p.name for p in folder.parent.iterdir()) == ['qwen3']
    assert sorted(p.name for p in folder.iterdir()) == [
        'tokenizer.json', 'tokenizer_config.json',
    ]


def test_no_source_names_every_reason(tmp_path):
    done = run_script('--save_path', tmp_path / 'new', HF_ENDPOINT=dead_url(),
                      HF_HOME=str(tmp_path / 'home'), **offline_pip(tmp_path))
    assert done.returncode == 1
    assert '- hub: the hub gave no' in done.stderr
    assert '- pypi: pip download dashscope==1.25.2 failed' in done.stderr
    assert not (tmp_path / 'new').exists()


def test_hub_files_replace_a_wrong_tokenizer(
    hub_server, folder, text, tmp_path
):
    path = copy_of(folder, tmp_path / 'mine')
    write_wrong_tokenizer(text, path)
    env = {'HF_ENDPOINT': hub_server.url, 'HF_HOME': str(tmp_path / 'home')}
    done = run_script('--source', 'hub', '--save_path', path, '--overwrite',
                      **env)
    assert done.returncode == 0, done.stderr
    assert '= 151,669 ids' in done.stdout
    assert (path / 'tokenizer.json').read_text('utf-8') == text
    assert sorted(p.name for p in path.iterdir()) == [
        'tokenizer.json', 'tokenizer_config.json',
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['home', 'mine']


def test_other_file_on_the_hub_writes_nothing(hub_server, tmp_path):
    hub_server.files['tokenizer.json'] = b'<html>log in</html>'
    env = {'HF_ENDPOINT': hub_server.url, 'HF_HOME': str(tmp_path / 'home')}
    done = run_script('--source', 'hub', '--save_path', tmp_path / 'new', **env)
    assert done.returncode == 1
    assert '(19 bytes) is not a byte-level BPE tokenizer' in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['home']


def test_missing_pip_is_named(tmp_path):
    # -S leaves site-packages, and pip with it, out of sys.path.
    done = run_script('--source', 'pypi', '--save_path', tmp_path / 'new',
                      python=['-S'])
    assert done.returncode == 1
    assert 'pip is missing' in done.stderr and 'ensurepip' in done.stderr
    assert list(tmp_path.iterdir()) == []
