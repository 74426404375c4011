"""The pipeline from a corpus to a dataset, on real files of every kind."""

import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pytest
import zstandard
from corpus_cases import (
    ROOT,
    contents,
    make_texts,
    prepare,
    run_script,
    small_blocks,
    write_lines,
    write_parquet,
)
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from data import corpus_encoder, corpus_readers
from data.corpus_encoder import Encoder
from data.corpus_readers import CorpusError, find_inputs
from data.corpus_tokenizer import load_tokenizer
from data.tokenize_corpus import locked
from training.dataset import open_dataset, verify
from training.dataset_writer import NO_HARD_LINKS

EOT = 598  # of the tiny tokenizer


def reference(tokenizer):
    """tokenizers with every special token as plain text."""
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    return Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))


def documents(split):
    """The ids of each document, without end-of-text."""
    ids = split.read(0, split.tokens)
    ends = np.flatnonzero(ids == EOT)
    assert ends[-1] == len(ids) - 1
    return [row[:-1].tolist() for row in np.split(ids, ends[:-1] + 1)]


def text_hash(texts):
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    return hashlib.sha256(b"".join(digests)).hexdigest()


@pytest.fixture(scope="module")
def texts():
    return make_texts()


@pytest.fixture(scope="module")
def lines(texts, tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("in") / "a.jsonl.zst", texts)


@pytest.fixture(scope="module")
def made(lines, tiny_tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "set"
    prepare(out, lines, tiny_tokenizer)
    return out


# What is written


def test_ids_are_those_of_the_reference(made, texts, tiny_tokenizer):
    dataset = open_dataset(made)
    assert verify(dataset, progress=False) == []
    found = {name: documents(s) for name, s in dataset.splits.items()}
    encoded = [
        e.ids for e in reference(tiny_tokenizer).encode_batch(texts)
    ]
    order = {tuple(ids): n for n, ids in enumerate(encoded)}
    assert len(order) == len(texts) == 300
    taken = {s: [order[tuple(ids)] for ids in found[s]] for s in found}
    assert sorted(taken["train"] + taken["val"]) == list(range(300))
    assert 30 < len(taken["val"]) < 90
    for name, numbers in taken.items():
        assert numbers == sorted(numbers)
        split, kept = dataset.split(name), [texts[n] for n in numbers]
        assert split.text_sha256 == text_hash(kept)
        assert split.bytes == sum(len(text.encode()) for text in kept)
        assert split.documents == len(kept)
    val = dataset.split("val")
    sizes = [len(texts[n].encode()) for n in taken["val"]]
    assert val.document_bytes.tolist() == sizes
    lengths = [len(ids) + 1 for ids in found["val"]]
    assert val.document_tokens.tolist() == lengths


def test_record(made, tiny_tokenizer):
    meta = open_dataset(made).meta
    data = (tiny_tokenizer / "tokenizer.json").read_bytes()
    assert meta["tokenizer"] == {
        "name": tiny_tokenizer.name,
        "size": 600,
        "sha256": hashlib.sha256(data).hexdigest(),
        "eot_id": EOT,
        "eot_token": "<|endoftext|>",
        "path": "tokenizer",
    }
    assert (meta["name"], meta["vocab_size"]) == ("test", 640)
    assert meta["source"]["special_tokens"] == "encoded as plain text"
    assert meta["source"]["records"] == 300
    assert meta["dtype"] == "uint32"
    # All in one block, so in one part: one bin for each split.
    names = {path.name for path in made.iterdir()}
    assert names == {
        "train.bin", "val.bin", "val_documents.npy", "meta.json", "meta.pkl",
        "tokenizer",
    }


def test_parts_hold_whole_documents(
    lines, made, tiny_tokenizer, tmp_path, monkeypatch
):
    small_blocks(monkeypatch)
    prepare(tmp_path / "set", lines, tiny_tokenizer)
    parts, whole = open_dataset(tmp_path / "set"), open_dataset(made)
    assert len(parts.split("train").files) > 3
    for name in parts.splits:
        a, b = parts.split(name), whole.split(name)
        assert a.text_sha256 == b.text_sha256
        assert np.array_equal(a.read(0, a.tokens), b.read(0, b.tokens))
        for number, file in enumerate(a.files):
            assert file["name"] == f"{name}_{number:05d}.bin"
            bin = np.fromfile(parts.folder / file["name"], "<u4")
            assert bin[-1] == EOT
    assert verify(parts, progress=False) == []
    assert not (tmp_path / "set" / ".prepare").exists()


def test_two_workers_write_the_same_bytes(
    lines, tiny_tokenizer, tmp_path, monkeypatch
):
    small_blocks(monkeypatch)
    prepare(tmp_path / "1", lines, tiny_tokenizer)
    prepare(tmp_path / "2", lines, tiny_tokenizer, "--num_proc=2")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def bins(folder):
    files = contents(folder)
    return {n: data for n, data in files.items() if n.endswith((".bin", "y"))}


def dictionary(texts):
    return pa.array(texts).dictionary_encode().type


@pytest.mark.parametrize(
    "write",
    [
        lambda p, t: write_lines(p / "a.jsonl", t, meta={"x": 1}),
        lambda p, t: (p / "a.jsonl.gz").write_bytes(
            gzip.compress(write_lines(p / "b", t).read_bytes())
        ) and p / "a.jsonl.gz",
        lambda p, t: write_parquet(p / "a.parquet", t),
        lambda p, t: write_parquet(p / "a.parquet", t, row_group_size=7),
        lambda p, t: write_parquet(p / "a.parquet", t, type=pa.large_string()),
        lambda p, t: write_parquet(p / "a.parquet", t, type=pa.string_view()),
        lambda p, t: write_parquet(p / "a.parquet", t, type=dictionary(t)),
        lambda p, t: write_parquet(
            p / "a.parquet", [x.encode() for x in t], type=pa.binary()
        ),
    ],
    ids=["jsonl", "gzip", "parquet", "row_groups", "large", "view",
         "dictionary", "binary"],
)
def test_formats_give_the_same_bins(
    write, texts, made, tiny_tokenizer, tmp_path
):
    prepare(tmp_path / "set", write(tmp_path, texts), tiny_tokenizer)
    assert bins(tmp_path / "set") == bins(made)


@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
def test_both_formats_of_arrow(kind, texts, made, tiny_tokenizer, tmp_path):
    """Their batches are blocks, so that parts end elsewhere."""
    table = pa.table({"text": texts})
    with kind(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=70)
    prepare(tmp_path / "set", tmp_path / "a.arrow", tiny_tokenizer)
    for split in "train", "val":
        joined = [
            b"".join(f.read_bytes() for f in sorted(d.glob(f"{split}*.bin")))
            for d in (tmp_path / "set", made)
        ]
        assert joined[0] == joined[1]


def test_saved_datasets_and_text_files(texts, made, tiny_tokenizer, tmp_path):
    saved = datasets.Dataset.from_dict({"n": range(300), "text": texts})
    saved.save_to_disk(tmp_path / "saved")
    prepare(tmp_path / "a", tmp_path / "saved", tiny_tokenizer)
    assert bins(tmp_path / "a") == bins(made)
    folder = tmp_path / "texts" / "deep"
    folder.mkdir(parents=True)
    for n, text in enumerate(texts):
        (folder / f"{n:03}.txt").write_bytes(text.encode())
    (folder / "000.txt").write_bytes(b"\xef\xbb\xbf" + texts[0].encode())
    (folder / "image.png").write_bytes(b"\x89PNG")
    prepare(tmp_path / "b", tmp_path / "texts", tiny_tokenizer)
    assert bins(tmp_path / "b") == bins(made)


def test_two_zstd_frames_and_no_last_newline(
    texts, made, tiny_tokenizer, tmp_path
):
    data = write_lines(tmp_path / "a", texts).read_bytes().rstrip(b"\n")
    frames = [zstandard.compress(data[:9000]), zstandard.compress(data[9000:])]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    prepare(tmp_path / "set", tmp_path / "b.jsonl.zst", tiny_tokenizer)
    assert bins(tmp_path / "set") == bins(made)


def test_the_split_depends_on_the_text_alone(
    texts, made, tiny_tokenizer, tmp_path
):
    """The same text under another tokenizer, in other files, another order."""
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([])
    (tmp_path / "other").mkdir()
    tokenizer.save(str(tmp_path / "other" / "tokenizer.json"))
    files = [
        write_lines(tmp_path / "2.jsonl", texts[:100]),
        write_parquet(tmp_path / "1.parquet", texts[100:]),
    ]
    prepare(tmp_path / "a", files, tmp_path / "other")
    a, b = open_dataset(tmp_path / "a"), open_dataset(made)
    for name in a.splits:
        assert a.split(name).text_sha256 == b.split(name).text_sha256
    assert a.split("val").tokens != b.split("val").tokens
    prepare(tmp_path / "b", files[::-1], tmp_path / "other")
    moved = open_dataset(tmp_path / "b").split("val")
    assert moved.documents == a.split("val").documents
    assert moved.text_sha256 != a.split("val").text_sha256


@pytest.mark.parametrize(
    ("write", "suffix"), [(write_lines, ".jsonl"), (write_parquet, ".parquet")]
)
def test_max_documents_takes_the_first(
    write, suffix, texts, tiny_tokenizer, tmp_path, monkeypatch
):
    small_blocks(monkeypatch)
    first = write_lines(tmp_path / "first.jsonl", texts[:77])
    prepare(tmp_path / "a", first, tiny_tokenizer)
    files = [
        write(tmp_path / f"1{suffix}", texts[:50]),
        write(tmp_path / f"2{suffix}", texts[50:]),
    ]
    prepare(tmp_path / "b", files, tiny_tokenizer, "--max_documents=77")
    a, b = open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")
    assert b.meta["source"]["records"] == 77
    for name in a.splits:
        assert a.split(name).text_sha256 == b.split(name).text_sha256


# Lanes: many machines


def test_shards_of_many_machines(texts, tiny_tokenizer, tmp_path, monkeypatch,
                                 capsys):
    small_blocks(monkeypatch)
    inputs = tmp_path / "in"
    inputs.mkdir()
    for n in range(10):
        write_lines(inputs / f"{n}.jsonl.zst", texts[n * 30 : n * 30 + 30])
    settings = {"files_per_lane": 3}

    def run(out, *arguments):
        prepare(tmp_path / out, inputs, tiny_tokenizer, *arguments, **settings)

    run("one")
    with pytest.raises(SystemExit, match=r"4 of 4 lanes .*: 0, 1, 2, 3;"):
        run("two", "--merge")
    run("two", "--shard=1/2")
    with pytest.raises(SystemExit, match=r"2 of 4 lanes .*: 0, 2;"):
        run("two", "--merge")
    assert not list((tmp_path / "two").glob("*.bin"))
    run("two", "--shard=0/3")  # another count of machines is no matter
    run("two", "--shard=2/3")
    run("two", "--merge")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify(open_dataset(tmp_path / "two"), progress=False) == []
    capsys.readouterr()
    run("two", "--shard=0/2")
    assert "already holds this dataset" in capsys.readouterr().out
    # a merge with other options throws no lane away
    run("three", "--shard=0/1")
    lanes = contents(tmp_path / "three")
    with pytest.raises(SystemExit, match="unfinished preparation of other"):
        run("three", "--merge", "--overwrite", "--val_share=0.3")
    assert contents(tmp_path / "three") == lanes
    # nor does another preparation while somebody is at work on one
    with locked(tmp_path / "three" / ".prepare" / "00002.lock"):
        with pytest.raises(SystemExit, match="another process is at work"):
            run("three", "--shard=0/1", "--overwrite", "--val_share=0.3")
    assert contents(tmp_path / "three") == lanes


@pytest.mark.parametrize("number", NO_HARD_LINKS)
def test_without_hard_links_bins_are_copied(
    lines, made, tiny_tokenizer, tmp_path, monkeypatch, number
):
    def refuse(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    prepare(tmp_path / "set", lines, tiny_tokenizer)
    assert bins(tmp_path / "set") == bins(made)
    assert verify(open_dataset(tmp_path / "set"), progress=False) == []


def test_wrong_options_are_refused(tiny_tokenizer, tmp_path, capsys):
    for arguments, said in (
        (["--shard=2/2"], "0 <= I < N"),
        (["--shard=0/2", "--merge"], "--shard goes with neither"),
        (["--val_share=1"], "between 0 and 1"),
        (["--max_documents=0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            prepare(tmp_path / "x", "in", tiny_tokenizer, *arguments,
                    files_per_lane=1)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# Encoding


def random_strings(count):
    """Strings with many rare characters, some newer than any table."""
    rng = random.Random(0)
    marks = [
        chr(c) for c in range(0x110000) if unicodedata.combining(chr(c))
    ]
    points = [*range(32, 0xD800), *range(0xE000, 0x20000)]
    return [
        "".join(
            chr(rng.choice(points)) + rng.choice("ab1 '\n<")
            + "".join(rng.choices(marks, k=rng.randint(0, 2)))
            for _ in range(rng.randint(1, 12))
        )
        for _ in range(count)
    ]


def test_rare_characters_are_encoded_as_the_reference_does(
    tiny_tokenizer, monkeypatch
):
    encoder = Encoder(load_tokenizer(str(tiny_tokenizer)))
    strings = random_strings(1500) + ["a\u0301\u1ab1\u0323", "\U00011de9 x"]
    assert any(s != unicodedata.normalize("NFC", s)
               for s in strings)
    assert sum(
        (encoder._kind(s) == corpus_encoder.RARE).any() for s in strings
    ) > 100
    # Words, of which a part is encoded by the reference alone, and pieces.
    strings += ["x y".join(strings[n : n + 9]) for n in range(0, 1400, 7)]
    strings += ["\n".join(strings[n : n + 9]) for n in range(0, 1400, 7)]
    strings.append("a\u0301 line x y" * 50 + "\U00011de9 x\n\nlast e\u0301")
    monkeypatch.setattr(corpus_encoder, "PIECE_BYTES", 40)
    data = [string.encode() for string in strings]
    batches = list(encoder.batches(data))
    assert sum(map(len, batches)) > len(strings) + 500
    assert encoded_ids(encoder, data) == [
        e.ids for e in reference(tiny_tokenizer).encode_batch(strings)
    ]


def encoded_ids(encoder, data):
    """The ids of each document, without end-of-text."""
    tokens = [0] * len(data)
    arrays = [*encoder.encode_documents(data, tokens, Counter())]
    rows = np.split(np.concatenate(arrays), np.cumsum(tokens)[:-1])
    assert [row[-1] for row in rows] == [encoder.eot_id] * len(data)
    return [row[:-1].tolist() for row in rows]


def words_of(pattern):
    """Content of a tokenizer with a word pattern, GPT-2's for None."""
    last = pre_tokenizers.ByteLevel(False, use_regex=pattern is None)
    steps = [last]
    if pattern:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    words = pre_tokenizers.Sequence(steps) if pattern else last
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    return words, json.loads(tokenizer.to_str())


@pytest.mark.parametrize("pattern", [None, *corpus_encoder.LINE_PATTERNS])
def test_pieces_are_cut_where_words_end(pattern):
    words, content = words_of(pattern)
    border, cuts = corpus_encoder.border_of(content), 0
    if pattern is None:  # as the official file of GPT-2 has it
        del content["pre_tokenizer"]["use_regex"]
        assert corpus_encoder.border_of(content) == border
    spaces = [" ", "  ", "\n", " \n", "\r\n", "\n\n", "\t", "\u3000\n", ". "]
    rng = random.Random(2)
    for string in random_strings(1000):
        text = "".join(
            part + rng.choice(("", "a", "."))
            + rng.choice(spaces) + rng.choice(("a", "", "'s", "\u4f60"))
            for part in re.split("([ \n])", string)
        )
        data = text.encode()
        starts = [0, *(m.start() for m in border.finditer(data)), len(data)]
        pieces = [data[i:j].decode() for i, j in zip(starts, starts[1:])]
        cuts += len(pieces) - 1
        found = [w for p in pieces for w, _ in words.pre_tokenize_str(p)]
        assert found == [w for w, _ in words.pre_tokenize_str(text)], text
    assert cuts > 100


def test_other_word_patterns_are_never_cut():
    _, content = words_of(r"\p{L}+( \p{L}+)*|\s+|.")
    assert corpus_encoder.border_of(content) is None
    content["pre_tokenizer"] = None
    assert corpus_encoder.border_of(content) is None
    _, content = words_of(None)
    content["normalizer"] = {"type": "Prepend", "prepend": "x"}
    assert corpus_encoder.border_of(content) is None


def test_long_json_strings_are_decoded_in_pieces(monkeypatch):
    monkeypatch.setattr(corpus_readers, "LONG_BYTES", 5)
    texts = [*random_strings(200), '"\\"\\\\ \\', "\U0001f469" * 9 + '"' * 9]
    for text in texts:
        for ascii in (True, False):
            literal = json.dumps(text, ensure_ascii=ascii).encode()
            found = corpus_readers._text_of_literal(memoryview(literal))
            assert found == text.encode()
            line = b'{"n": [1], "text": %b, "b": "\\"text\\": 1"}' % literal
            block = corpus_readers.Block(["f"], 0, [line], True, 0, (0, 1))
            found = list(corpus_readers.texts(block, "text", "stop"))
            assert found == [(text.encode(), None)]


def test_special_tokens_are_plain_text(tiny_tokenizer):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    encoder = Encoder(tokenizer)
    assert encoder.fallback is None
    found = encoded_ids(encoder, [b"<|endoftext|>", b"<think>x"])
    assert EOT not in sum(found, []) and EOT + 1 not in sum(found, [])


def sentencepiece_like(path):
    """A LLaMA-2 in small: </s> is in the vocabulary and merges lead to it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True,
                                     fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(),
        decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials,
                                  show_progress=False)
    tokenizer.train_from_iterator(["the cat </s> <s> sat " * 20], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        t for t in content["added_tokens"] if t["id"] < 3
    ]
    vocab = content["model"]["vocab"]
    vocab.setdefault("</", len(vocab))
    vocab.setdefault("s>", len(vocab))
    content["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    path.mkdir()
    (path / "tokenizer.json").write_text(json.dumps(content))


def test_sentencepiece_tokenizer_with_byte_fallback(texts, tmp_path):
    sentencepiece_like(tmp_path / "llama")
    tokenizer = load_tokenizer(str(tmp_path / "llama"))
    assert tokenizer.record["eot_token"] == "</s>"
    assert tokenizer.record["eot_id"] == 2
    naive = Tokenizer.from_str(json.dumps(
        json.loads(tokenizer.files["tokenizer.json"]) | {"added_tokens": []}
    ))
    assert 2 in naive.encode("a</s>b").ids  # what must not happen
    path = write_lines(tmp_path / "a.jsonl", texts)
    prepare(tmp_path / "fast", path, tmp_path / "llama")
    prepare(tmp_path / "slow", path, tmp_path / "llama",
            "--encoder=tokenizers")
    assert contents(tmp_path / "fast") == contents(tmp_path / "slow")
    split = open_dataset(tmp_path / "fast").split("train")
    ids = split.read(0, split.tokens)
    assert (ids == 2).sum() == split.documents


def test_tokenizer_that_gigatoken_does_not_load(
    texts, tmp_path, capsys
):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, "[UNK]"))
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False)])
    (tmp_path / "words").mkdir()
    tokenizer.save(str(tmp_path / "words" / "tokenizer.json"))
    path = write_lines(tmp_path / "a.jsonl", texts)
    prepare(tmp_path / "set", path, tmp_path / "words")
    assert "encoding with tokenizers" in capsys.readouterr().out
    dataset = open_dataset(tmp_path / "set")
    assert dataset.vocab_size == 64 and dataset.eot_id == 2
    assert dataset.split("train").tokens == 2 * dataset.split("train").documents


def test_a_wrong_id_of_the_fast_library_is_found(tiny_tokenizer):
    encoder = Encoder(load_tokenizer(str(tiny_tokenizer)))
    texts = [text.encode() for text in make_texts(20)]
    rows = encoder.encode_pieces(texts)
    first = zlib.crc32(texts[0]) % 20  # where the sample begins
    assert encoder.check_sample(texts, rows) == 20 - first > 2
    rows[first] = rows[first].copy()
    rows[first][3] += 1
    with pytest.raises(CorpusError, match="gigatoken and tokenizers disagree"):
        encoder.check_sample(texts, rows)
    long = [b"word " * 20_000]
    assert encoder.check_sample(long, encoder.encode_pieces(long)) == 1


def test_ids_beyond_vocab_size_are_refused(lines, tiny_tokenizer, tmp_path):
    with pytest.raises(SystemExit, match="size 600 .* vocab_size 599"):
        prepare(tmp_path / "x", lines, tiny_tokenizer, "--vocab_size=599")
    prepare(tmp_path / "y", lines, tiny_tokenizer, "--vocab_size=600")
    assert open_dataset(tmp_path / "y").vocab_size == 600


def test_tokenizers_that_are_not_the_datasets(tiny_tokenizer, tmp_path):
    with pytest.raises(CorpusError, match=r"600 ids .* GPT-2's has 50257"):
        load_tokenizer(str(tiny_tokenizer), "gpt2")
    with pytest.raises(CorpusError, match="--eot_token"):
        load_tokenizer(str(tiny_tokenizer), eot_token="<eos>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match="tokenizer.json is damaged"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(CorpusError, match="neither a sentencepiece"):
        load_tokenizer(str(tmp_path))


# The command


def test_no_network_says_what_to_fetch(tmp_path, tiny_tokenizer):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    code, _, said = run_script(
        "slimpajama_6b_llama2", f"--out={tmp_path / 'x'}", **env
    )
    assert code == 1 and "Traceback" not in said
    assert "https://huggingface.co/meta-llama/Llama-2-7b-hf" in said
    assert "hf auth login" in said and "--tokenizer PATH" in said
    code, _, said = run_script(
        "custom", "--input=hub:DKYoon/SlimPajama-6B:data/train-*.parquet",
        f"--tokenizer={tiny_tokenizer}", f"--out={tmp_path / 'x'}", **env,
    )
    assert code == 1 and "Traceback" not in said
    assert "hf download DKYoon/SlimPajama-6B --repo-type dataset" in said
    assert "--include 'data/train-*.parquet'" in said and "--input DIR" in said


def test_every_prepare_takes_the_same_options(tmp_path):
    sizes = {}
    for path in sorted((ROOT / "data").glob("*/prepare.py")):
        text = path.read_text()
        if "tokenize_corpus" in text:
            sizes[path.parent.name] = len(text.splitlines())
            assert (path.parent / "README.md").is_file()
    assert sorted(sizes) == [
        "custom", "slimpajama_627b_qwen3", "slimpajama_6b_gpt2",
        "slimpajama_6b_llama2", "slimpajama_6b_llama3", "slimpajama_6b_qwen3",
    ]
    assert max(sizes.values()) < 40
    code, out, _ = run_script("slimpajama_627b_qwen3", "--help", cwd=tmp_path)
    assert code == 0
    for option in ("--input", "--tokenizer", "--max_documents", "--num_proc",
                   "--out", "--overwrite", "--on_bad_text", "--shard",
                   "--merge"):
        assert option in out


def test_qwen3_end_to_end(qwen3_folder, tmp_path):
    """Parquet and .jsonl.zst, from the script's own folder, two workers."""
    texts = make_texts(2000)
    inputs = [
        write_parquet(tmp_path / "a.parquet", texts[:900]),
        write_lines(tmp_path / "b.jsonl.zst", texts[900:]),
    ]
    code, out, said = run_script(
        "slimpajama_6b_qwen3", "--input", *inputs, "--out", "made",
        f"--tokenizer={qwen3_folder}", "--num_proc=2", cwd=tmp_path,
    )
    assert code == 0, said
    assert "special-token text inside a document is plain text" in out
    assert "MB/s" in said and "tokens/s" in said
    dataset = open_dataset(tmp_path / "made")
    assert dataset.name == "slimpajama_6b_qwen3"
    assert (dataset.vocab_size, dataset.eot_id) == (151936, 151643)
    assert dataset.tokenizer_size == 151669
    split = dataset.split("train")
    ids = split.read(0, split.tokens)
    assert (ids == 151643).sum() == split.documents
    assert np.sort(ids)[-split.documents - 1] < 151643
    rust = reference(qwen3_folder)
    first = next(t for t in texts if rust.encode(t).ids == ids[: np.argmax(
        ids == 151643)].tolist())
    assert first in texts[:20]


# The inspector


def inspect(*arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "data" / "inspect_dataset.py"),
         *map(str, arguments)],
        capture_output=True, text=True, timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_inspector_shows_text_and_borders(made, texts):
    code, out, said = inspect(made, "--split=val", "--count=3000")
    assert code == 0, said
    assert "600 ids, end of text <|endoftext|> (598)" in out
    assert "every bin agrees with its record" in out
    val = open_dataset(made).split("val")
    assert f"{val.bytes:,} bytes of text" in out
    assert f"{val.bytes / val.tokens:.3f} bytes per token" in out
    shown = out.split("=====")[1].split("\n", 1)[1]
    pieces = shown.split("\n----- document border -----\n")
    ids = val.read(0, 3000)
    assert len(pieces) == (ids == EOT).sum() + 1 > 1
    nfc = [unicodedata.normalize("NFC", text) for text in texts]
    assert all(piece in nfc for piece in pieces[:-1])


def test_inspector_finds_damage(made, tmp_path):
    for name, data in contents(made).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    ids = np.fromfile(tmp_path / "train.bin", "<u4")
    ids[5000] = 70_000
    ids.tofile(tmp_path / "train.bin")
    code, out, _ = inspect(tmp_path, "--offset=10", "--count=5")
    assert code == 1
    assert "WRONG: train.bin: token 5000 is 70000, vocab_size is 640" in out
    assert "WRONG: train.bin differs from its recorded sha256" in out
    code, _, said = inspect(made, "--offset=9999999")
    assert code == 1 and re.search(r"has tokens 0 \.\. \d+", said)
    code, _, said = inspect(tmp_path / "nothing")
    assert code == 1 and "no dataset" in said and "Traceback" not in said


def test_find_inputs_names_everything_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.dat").write_text("a document")
    assert [f.name for f in find_inputs([tmp_path / "a.dat"])] == ["a.dat"]
    with pytest.raises(CorpusError) as caught:
        find_inputs([tmp_path / "empty", tmp_path / "gone.parquet"])
    assert "no file below it ends in" in str(caught.value)
    assert "gone.parquet: no such file" in str(caught.value)
    assert corpus_readers.FORMATS[".jsonl.zst"] == ("lines", "zstd")
