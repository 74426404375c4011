"""The Qwen3 tokenizer, rebuilt from its BPE ranks, against other programs.

Ids are compared with tiktoken, which is given the same ranks and Python's own
NFC, and with gigatoken: neither shares code with `tokenizers`. The package
with the ranks is fetched once (conftest.py); everything after that works
without a network, from a local web server where a hub is needed.

    pytest tests/test_qwen3_tokenizer.py
"""

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
import unicodedata
import zipfile
from pathlib import Path

import gigatoken
import pytest
import tiktoken
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from data import download_qwen3_tokenizer as qwen3

SCRIPT = Path(qwen3.__file__)
N_STRINGS = 2_500  # of each kind


def nfc(text):
    return unicodedata.normalize("NFC", text)


# First and last code point of blocks, at least one for each large script.
BLOCKS = """
    41-24F 370-3FF 400-52F 531-58A 591-5F4 600-6FF 700-74F 780-7B1 7C0-7FF
    900-97F 980-9FE A01-A76 A81-AFF B01-B77 B82-BFA C00-C7F C80-CF2 D00-D7F
    D81-DF4 E01-E5B E81-EDF F00-FDA 1000-109F 10A0-10FF 1100-11FF 1200-1399
    13A0-13FD 1401-167F 16A0-16F8 1780-17F9 1800-18AA 1E00-1FFE 2000-206F
    2070-218B 2190-23FF 2C00-2D2D 3000-30FF 3105-318E 3400-9FFC A000-A4C6
    AC00-D7A3 F900-FAD9 FB00-FDFF FE20-FFEE 10330-1034A 12000-12399
    13000-1342E 1D100-1D1E8 1D400-1D7FF 1E900-1E95F 20000-2A6DD
""".split()
SPACES = [*"   \t\n\r\x0b\x0c\x1c\x85\u00a0\u1680\u2003\u2009\u200b\u2028"
          "\u2029\u202f\u3000\ufeff", "\r\n"]
CONTRACTIONS = ("'s 't 're 've 'm 'll 'd \u2019s 'x 'S 'T 'RE 'Ve 'M 'LL 'D"
                " '\u017f").split()
EMOJI = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
    " \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f469\U0001f3fd\u200d\U0001f680"
    " \u2764\ufe0f \u2764\ufe0e 1\ufe0f\u20e3 #\u20e3 \U0001f1fa\U0001f1f3"
    " \U0001f44d\U0001f3ff \u200d \ufe0f"
    " \U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
).split()
CODE = [*(
    "def|f(x, y)| -> None:|return|{'a': 1}|==|!=|//|/* | */|</div>|&amp;|x_1"
    '|camelCase|0x7fff|1e-6|#include <|\\n|$(|`|~/.|::|->|[[|]]|%s|SELECT *'
    '|<div class="x">'
).split("|"), "|", "||", "<|", "|>", "\n    ", "\n\t\t", ";\n", "\r\n"]
NEARLY_SPECIAL = [*(
    "<|endoftext|,|endoftext|>,<|im_start |>,<|IM_END|>,<think,think>,"
    "< /think>,<|<|im_end|>|>,<|extra_0|>,\u0338,e\u0301, ,\n,user,1"
).split(",")]  # U+0338 would join with the ">" before it, were NFC done first


def assigned(first, last):
    return [
        char
        for char in map(chr, range(first, last + 1))
        if unicodedata.category(char) not in ("Cn", "Co", "Cs")
    ]


ALL_CHARS = assigned(0, 0x10FFFF)
MARKS = [char for char in ALL_CHARS if unicodedata.category(char)[0] == "M"]
SCRIPTS = [
    assigned(*(int(n, 16) for n in block.split("-"))) for block in BLOCKS
]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCXYZ\u00e9\u00df\u00f1\u0142\u0130\u0131"
PICTURES = assigned(0x1F300, 0x1FAF6)
DIGITS = ("0123456789", "0123456789", "\u0660\u0661\u0662\u0669",
          "\u0966\u096f", "\u00b2\u00b3\u00bd\u2167\u2460\u3007",
          "\uff10\uff19", ".,-+eE%/: ")
CONTROLS = [chr(n) for n in (*range(0x20), *range(0x7F, 0xA0), 0xAD, 0x61C,
                             0x200B, 0x200E, 0x202E, 0x2066, 0xFFFE, 0xFFFD,
                             0x10FFFF, 0xE000)]


def joined(rng, choices, most, least=1):
    return "".join(rng.choices(choices, k=rng.randint(least, most)))


def scripts(rng):
    words = [joined(rng, rng.choice(SCRIPTS), 9)
             for _ in range(rng.randint(1, 6))]
    return rng.choice((" ", "", ", ", "\n")).join(words)


def combining_marks(rng):
    text = ""
    for _ in range(rng.randint(1, 10)):
        text += rng.choice(rng.choice((LETTERS, rng.choice(SCRIPTS))))
        text += "".join(rng.choices(MARKS, k=rng.choice((0, 1, 1, 2, 4))))
    form = rng.choice((None, "NFC", "NFD", "NFKD"))
    return text if form is None else unicodedata.normalize(form, text)


def emoji(rng):
    return joined(rng, (*EMOJI, *rng.choices(PICTURES, k=6), " ", "a"), 9)


def whitespace(rng):
    return "".join(
        rng.choice(SPACES) * rng.choice((1, 1, 2, 3, 7, 40))
        + rng.choice(("", "", "x", "word", "7", "!", "\u6f22"))
        for _ in range(rng.randint(1, 8))
    )


def contractions(rng):
    return "".join(
        joined(rng, LETTERS, 6, 0) + rng.choice(CONTRACTIONS)
        + joined(rng, LETTERS + " \n", 3, 0)
        for _ in range(rng.randint(1, 6))
    )


def digits(rng):
    n = rng.randint(1, 30)
    return "".join(rng.choice(rng.choice(DIGITS)) for _ in range(n))


def special_tokens(rng):
    others = rng.choices(NEARLY_SPECIAL, k=20)
    return joined(rng, (*qwen3.ADDED_TOKENS, *others), 8)


KINDS = {
    "scripts": scripts,
    "any_characters": lambda rng: joined(rng, ALL_CHARS, 24),
    "combining_marks": combining_marks,
    "emoji": emoji,
    "whitespace": whitespace,
    "digits": digits,
    "contractions": contractions,
    "code": lambda rng: joined(rng, CODE, 25),
    "control_characters": lambda rng: joined(rng, [*CONTROLS, *"ab1 ."], 20),
    "special_tokens": special_tokens,
}


@functools.cache
def varied_strings(kind):
    rng = random.Random(f"qwen3 {kind}")
    return ["", *(KINDS[kind](rng) for _ in range(N_STRINGS - 1))]


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
        if ages.category(char) != "Cn" and unicodedata.combining(char):
            old.setdefault(unicodedata.combining(char), char)
    rust_nfc = normalizers.NFC().normalize_str
    found = set()
    for char in ALL_CHARS:
        tries = [unicodedata.normalize("NFD", char)]
        if unicodedata.combining(char):
            tries += [f"a{char}{mark}" for mark in old.values()]
            tries += [f"a{mark}{char}" for mark in old.values()]
        if any(rust_nfc(text) != nfc(text) for text in tries):
            # A new letter is made of parts of which one at least is new.
            found.update(c for c in tries[0] if ages.category(c) == "Cn")
            found.add(char)
    return frozenset(found)


class Independent:
    """Qwen3's tokenizer by tiktoken: its own BPE and its own regex engine."""

    def __init__(self, ranks):
        self.ids = {t: len(ranks) + n for n, t in enumerate(qwen3.ADDED_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "qwen3",
            # Written out again: a slip in the script's must not be copied.
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
        parts = re.split("(" + "|".join(map(re.escape, added)) + ")", text)
        return [p if p in added else nfc(p) for p in parts]

    def encode(self, text, added=tuple(qwen3.ADDED_TOKENS)):
        ids = []
        for piece in self.pieces(text, added):
            if piece in added:
                ids.append(self.ids[piece])
            else:
                ids += self.encoding.encode_ordinary(piece)
        return ids


@pytest.fixture(scope="session")
def text(qwen3_folder):
    return (qwen3_folder / "tokenizer.json").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tokenizer(qwen3_folder):
    return AutoTokenizer.from_pretrained(qwen3_folder)


@pytest.fixture(scope="session")
def rust(text):
    return Tokenizer.from_str(text)


@pytest.fixture(scope="session")
def independent(qwen3_wheel):
    data = qwen3.read_ranks_from_wheel(qwen3_wheel)
    return Independent(qwen3.parse_ranks(data))


# Ids


def test_strings_are_varied():
    distinct = {s for kind in KINDS for s in varied_strings(kind)}
    newer = newer_than_tables()
    assert sum(newer.isdisjoint(s) for s in distinct) >= 20_000


def test_only_newer_characters_are_left_out():
    ages = unicodedata.ucd_3_2_0
    assert 50 < len(newer_than_tables()) < 200
    assert [c for c in newer_than_tables() if ages.category(c) != "Cn"] == []


def test_ids_equal_independent_implementation(rust, text, independent):
    fast, newer = gigatoken.Tokenizer.from_json(text), newer_than_tables()
    for kind in KINDS:
        strings = varied_strings(kind)
        expected = [independent.encode(s) for s in strings]
        assert fast.encode_batch_list(strings) == expected, kind
        kept = [n for n, s in enumerate(strings) if newer.isdisjoint(s)]
        found = rust.encode_batch([strings[n] for n in kept])
        assert [e.ids for e in found] == [expected[n] for n in kept], kind


def test_without_added_tokens_all_text_is_plain(text, independent):
    content = json.dumps(json.loads(text) | {"added_tokens": []})
    strings = varied_strings("special_tokens")
    expected = [independent.encode(s, ()) for s in strings]
    found = Tokenizer.from_str(content).encode_batch(strings)
    assert [e.ids for e in found] == expected
    assert max(map(max, filter(None, expected))) < 151_643


def test_known_ids(tokenizer):
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9") == [963]
    assert tokenizer.encode("<|im_end|>") == [151_645]
    assert tokenizer.decode([9707, 11, 1879, 0]) == "Hello, world!"


def test_file_is_the_published_one(text):
    data = text.encode()
    assert len(data) == 11_422_654
    assert hashlib.sha256(data).hexdigest() == qwen3.TOKENIZER_SHA256
    model = json.loads(text)["model"]
    assert (len(model["vocab"]), len(model["merges"])) == (151_643, 151_387)


def test_sizes_and_special_tokens(tokenizer):
    assert (tokenizer.vocab_size, len(tokenizer)) == (151_643, 151_669)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id == 151_643
    assert tokenizer.bos_token is tokenizer.unk_token is None
    decoder = tokenizer.added_tokens_decoder
    assert sorted(decoder) == list(range(151_643, 151_669))
    special = [i for i, token in decoder.items() if token.special]
    assert sorted(special) == list(range(151_643, 151_657))
    assert decoder[151_667].content == "<think>"


# The parts


def toy_ranks(*tokens):
    ranks = {bytes((n,)): n for n in range(256)}
    return ranks | {token: 256 + n for n, token in enumerate(tokens)}


def test_merges_come_from_ranks():
    # By rank "bc" is joined before "ab", so "abc" is "a" + "bc".
    ranks = toy_ranks(b"bc", b"ab", b"abc", b"ababc")
    content = qwen3.build_tokenizer_json(ranks)
    assert content["model"]["merges"] == [
        ["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "abc"],
    ]
    assert content["model"]["vocab"]["\u0120"] == 0x20
    rust = Tokenizer.from_str(json.dumps(content))
    assert rust.encode("abcab").ids == [258, 257]


def test_changed_rank_file_is_refused(qwen3_wheel, tmp_path):
    data = qwen3.read_ranks_from_wheel(qwen3_wheel)
    changed = data.replace(b" 7\n", b" 8\n", 1)
    assert len(changed) == len(data)
    for wrong in (changed, data[:-1], b""):
        with pytest.raises(qwen3.TokenizerError) as caught:
            qwen3.parse_ranks(wrong)
        assert hashlib.sha256(wrong).hexdigest() in str(caught.value)
    cut = tmp_path / "cut.whl"
    cut.write_bytes(b"PK\x03\x04")
    with pytest.raises(qwen3.TokenizerError, match="cut.whl is damaged"):
        qwen3.read_ranks_from_wheel(cut)
    with zipfile.ZipFile(cut, "w") as archive:
        archive.writestr("dashscope/resources/other.tiktoken", b"IQ== 0")
    with pytest.raises(qwen3.TokenizerError, match="no item named.*qwen.tikt"):
        qwen3.read_ranks_from_wheel(cut)


# The folder


def copy_of(folder, path):
    path.mkdir(parents=True)
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def state_of(path):
    stats = {p.name: p.stat() for p in path.iterdir()}
    return {name: (s.st_mtime_ns, s.st_ino) for name, s in stats.items()}


def no_index(monkeypatch, links):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def test_default_folder_starts_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = qwen3.parse_arguments([]).save_path
    assert path == SCRIPT.parent.parent / "qwen3_tokenizer"


def test_existing_tokenizer_is_checked_and_kept(
    qwen3_folder, tmp_path, monkeypatch, capsys
):
    path = copy_of(qwen3_folder, tmp_path / "mine")
    before = state_of(path)
    no_index(monkeypatch, tmp_path)  # nothing to fetch from
    monkeypatch.chdir(tmp_path)
    returned = qwen3.download_qwen3_tokenizer("mine", source="pypi")
    assert len(returned) == 151_669
    with pytest.raises(qwen3.TokenizerError, match="By hand: bring"):
        qwen3.download_qwen3_tokenizer("mine", "pypi", overwrite=True)
    assert state_of(path) == before
    report = capsys.readouterr().out
    assert f"already in {path}: checked, kept" in report
    assert "151,643 BPE tokens + 26 added tokens = 151,669 ids" in report
    assert "151,936" in report
    assert "eos_token: <|im_end|> (151645)" in report
    assert "bos_token: none" in report and "unk_token: none" in report


def test_wrong_tokenizer_is_refused(qwen3_folder, text, tmp_path):
    path = copy_of(qwen3_folder, tmp_path / "mine")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(qwen3.TokenizerError) as caught:
        qwen3.check_tokenizer(path)
    said = str(caught.value)
    assert "'bos_token': '<|im_start|>', 'eos_token': '<|endoftext|>'" in said
    assert "expected 151,669 and {'bos_token': None" in said
    (path / "tokenizer.json").write_text(text.replace("NFC", "NFD", 1))
    with pytest.raises(qwen3.TokenizerError, match="--overwrite") as caught:
        qwen3.download_qwen3_tokenizer(path, "pypi")
    assert qwen3.TOKENIZER_SHA256 in str(caught.value)


# The command


@pytest.fixture
def hub_server(qwen3_folder):
    """A web server with the two files where a hub has them, in `.files`."""
    files = {p.name: p.read_bytes() for p in qwen3_folder.iterdir()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            name = self.path.removeprefix("/Qwen/Qwen3-0.6B/resolve/main/")
            body = files.get(name)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", hashlib.sha256(body or b"").hexdigest())
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_GET = do_HEAD = answer

        def log_message(self, *args):
            """Keep pytest's output free of requests."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = files
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run_script(home, *options, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, options)],
        capture_output=True, text=True, timeout=60, cwd=home,
        env=kept | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
                    "HF_HOME": str(home / "home")} | env,
    )


def test_auto_falls_back_from_a_missing_hub(qwen3_build):
    said, folder = qwen3_build
    assert said.count("Not from hub: the hub gave no Qwen/Qwen3-0.6B") == 1
    assert f"Saved Qwen3 tokenizer to {folder}" in said
    assert sorted(p.name for p in folder.parent.iterdir()) == ["qwen3"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "tokenizer.json", "tokenizer_config.json",
    ]


@pytest.mark.slow
def test_hub_that_never_answers_is_given_up(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = run_script(tmp_path, "--source=hub", "--save_path=new",
                          HF_ENDPOINT=url)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the hub gave no Qwen/Qwen3-0.6B" in done.stderr
    assert "By hand: bring tokenizer.json" in done.stderr
    assert not (tmp_path / "new").exists()


def test_no_source_names_every_reason(tmp_path):
    done = run_script(tmp_path, "--save_path=new", HF_HUB_OFFLINE="1",
                      PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 1
    assert "- hub: the hub gave no" in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "- pypi: pip download dashscope==1.25.2 failed" in done.stderr
    assert not (tmp_path / "new").exists()


def test_hub_files_replace_a_wrong_tokenizer(
    hub_server, qwen3_folder, text, tmp_path
):
    path = copy_of(qwen3_folder, tmp_path / "mine")
    (path / "tokenizer.json").write_text("{}")
    options = ("--source=hub", f"--save_path={path}", "--overwrite")
    good = hub_server.files["tokenizer.json"]
    hub_server.files["tokenizer.json"] = b"<html>log in</html>"
    done = run_script(tmp_path, *options, HF_ENDPOINT=hub_server.url)
    assert done.returncode == 1
    assert "(19 bytes) is not the published one" in done.stderr
    assert (path / "tokenizer.json").read_text() == "{}"
    hub_server.files["tokenizer.json"] = good
    done = run_script(tmp_path, *options, HF_ENDPOINT=hub_server.url,
                      HF_HOME=str(tmp_path / "other"))
    assert done.returncode == 0, done.stderr
    assert (path / "tokenizer.json").read_text("utf-8") == text
