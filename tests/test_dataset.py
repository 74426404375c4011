"""The dataset format: round trips, damaged and foreign files, killed writers.
"""

import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import training.dataset_writer
from training.dataset import (
    DatasetError,
    DatasetWriter,
    open_dataset,
    verify,
)
from training.dataset_record import REPOSITORY, prepare_command

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 300
TOKENIZER = {
    "name": "test",
    "size": 290,
    "sha256": hashlib.sha256(b"{}").hexdigest(),
    "eot_id": 0,
    "eot_token": "<|endoftext|>",
    "path": "tokenizer",
}


def make_documents(count=40, seed=0):
    """[(split, ids, text)] with every fifth document for validation."""
    rng = np.random.default_rng(seed)
    return [
        (
            "val" if i % 5 == 0 else "train",
            rng.integers(1, 290, rng.integers(1, 60)),
            f"text {i} " * int(rng.integers(1, 9)),
        )
        for i in range(count)
    ]


def open_writer(folder, **options):
    options = {
        "name": "test",
        "vocab_size": VOCAB_SIZE,
        "tokenizer": TOKENIZER,
        "source": {"made": "here"},
        **options,
    }
    return DatasetWriter(folder, **options)


def add(writer, split, ids, text):
    digest = hashlib.sha256(text.encode()).digest()
    writer.add(split, ids, len(text.encode()), digest)


def write(folder, documents, **options):
    with open_writer(folder, **options) as writer:
        for document in documents:
            add(writer, *document)
        writer.add_file("tokenizer/tokenizer.json", b"{}")
        return writer.close()


def stream(documents, split):
    parts = [[*ids, 0] for s, ids, _ in documents if s == split]
    return np.concatenate(parts).astype(np.int64)


def visible(folder):
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )


def contents(folder):
    return {name: (folder / name).read_bytes() for name in visible(folder)}


def edit_meta(folder, change):
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def refused(folder, *needles):
    """The error of opening `folder`, which holds every needle."""
    with pytest.raises(DatasetError) as caught:
        open_dataset(folder)
    for needle in needles:
        assert re.search(needle, str(caught.value)), str(caught.value)


@pytest.fixture
def documents():
    return make_documents()


@pytest.fixture
def folder(tmp_path, documents):
    write(tmp_path / "set", documents)
    return tmp_path / "set"


@pytest.mark.parametrize("shard_tokens", [None, 1, 70])
def test_round_trip(tmp_path, documents, shard_tokens):
    meta = write(tmp_path, documents, shard_tokens=shard_tokens)
    dataset = open_dataset(tmp_path)
    assert dataset.meta == meta == json.loads(
        (tmp_path / "meta.json").read_text()
    )
    for name in ("train", "val"):
        split, due = dataset.split(name), stream(documents, name)
        texts = [text for s, _, text in documents if s == name]
        assert split.tokens == len(due)
        assert split.documents == len(texts)
        assert split.bytes == sum(len(text.encode()) for text in texts)
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        joined = hashlib.sha256(b"".join(digests)).hexdigest()
        assert split.text_sha256 == joined
        read = split.read(0, split.tokens)
        assert read.dtype == np.int64 and np.array_equal(read, due)
        for start in range(0, len(due) - 90, 7):  # across file borders
            out = np.full(90, -7)
            assert split.read(start, 90, out) is out
            assert np.array_equal(out, due[start : start + 90])
    files = dataset.split("train").files
    assert len(files) == {None: 1, 1: 32}.get(shard_tokens, len(files))
    if shard_tokens:  # whole documents, the last one reaching the size
        ends = np.cumsum([file["tokens"] for file in files])
        assert (stream(documents, "train")[ends - 1] == 0).all()
        assert all(file["tokens"] >= shard_tokens for file in files[:-1])
        assert all(file["tokens"] < shard_tokens + 60 for file in files)
    assert dataset.split("val").document_tokens.tolist() == [
        len(ids) + 1 for s, ids, _ in documents if s == "val"
    ]
    assert dataset.split("val").document_bytes.sum() == dataset.split(
        "val"
    ).bytes
    assert dataset.split("train").document_tokens is None
    assert (dataset.tokenizer_size, dataset.eot_id) == (290, 0)
    assert verify(dataset, progress=False) == []


def test_meta_pkl_holds_the_plain_keys(folder):
    # as nanoGPT's scripts read it; the fixture has written it
    meta = pickle.loads((folder / "meta.pkl").read_bytes())
    dataset = open_dataset(folder)
    assert meta == {
        "vocab_size": VOCAB_SIZE,
        "tokenizer": "test",
        "train_tokens": dataset.split("train").tokens,
        "val_tokens": dataset.split("val").tokens,
        "dtype": "uint32",
    }


def test_same_documents_give_the_same_bytes(tmp_path, folder, documents):
    write(tmp_path / "again", documents)
    assert contents(tmp_path / "again") == contents(folder)


def test_buffer_borders_do_not_show(tmp_path, folder, documents, monkeypatch):
    monkeypatch.setattr(training.dataset_writer, "BUFFER_IDS", 7)
    write(tmp_path / "small", documents)
    assert contents(tmp_path / "small") == contents(folder)


def test_fingerprint_follows_the_content(tmp_path, folder):
    first = open_dataset(folder).fingerprint
    write(tmp_path / "other", make_documents(seed=1))
    assert open_dataset(tmp_path / "other").fingerprint != first
    edit_meta(folder, lambda meta: meta.update(source={"made": "elsewhere"}))
    assert open_dataset(folder).fingerprint == first


@pytest.mark.parametrize(
    "ids, message",
    [
        ([1, 300], "token id 300 is outside 0 .. 299"),
        ([2**32 + 1], "token id 4294967297 is outside"),
        ([-1], "token id -1 is outside"),
        (np.array([2**40]), "outside"),
        ([2**70], "must be a non-empty row of integers"),
        ([1.0, 2.0], "must be a non-empty row of integers"),
        ([], "must be a non-empty row of integers"),
        ([[1, 2]], "must be a non-empty row of integers"),
    ],
)
def test_bad_ids_are_refused_before_the_cast(tmp_path, ids, message):
    with pytest.raises(DatasetError, match=message):
        with open_writer(tmp_path) as writer:
            add(writer, "train", [1], "a")
            add(writer, "train", ids, "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("test", [1], 1, bytes(32)),
        ("val", [1], 0, bytes(32)),
        ("val", [1], 1, b""),
    ],
)
def test_bad_documents_are_refused(tmp_path, arguments):
    with pytest.raises(DatasetError, match="split is one of"):
        with open_writer(tmp_path) as writer:
            writer.add(*arguments)


def test_a_split_without_documents_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no document went to val"):
        with open_writer(tmp_path) as writer:
            add(writer, "train", [1], "a")
            writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path):
    with pytest.raises(DatasetError) as caught:
        tokenizer = {**TOKENIZER, "size": 301, "eot_id": 300}
        open_writer(tmp_path, tokenizer=tokenizer)
    assert "size 301" in str(caught.value) and "id 300" in str(caught.value)


def test_an_existing_dataset_is_refused(folder, documents):
    before = contents(folder)
    with pytest.raises(DatasetError, match="already holds a dataset"):
        write(folder, documents[:20])
    assert contents(folder) == before


def test_overwrite_keeps_the_old_dataset_until_close(tmp_path):
    write(tmp_path, make_documents(), shard_tokens=70)
    before = contents(tmp_path)
    with open_writer(tmp_path, overwrite=True) as writer:
        add(writer, "train", [5], "a")
        add(writer, "val", [6], "b")
        assert contents(tmp_path) == before
    assert contents(tmp_path) == before  # left without close
    write(tmp_path, make_documents(20), overwrite=True)
    assert visible(tmp_path) == [
        "meta.json",
        "meta.pkl",
        "tokenizer/tokenizer.json",
        "train.bin",
        "val.bin",
        "val_documents.npy",
    ]
    assert verify(open_dataset(tmp_path), progress=False) == []


def test_foreign_bins_are_not_overwritten_unasked(tmp_path, documents):
    (tmp_path / "train.bin").write_bytes(b"somebody's")
    with pytest.raises(DatasetError, match="already holds a dataset"):
        write(tmp_path, documents)
    assert (tmp_path / "train.bin").read_bytes() == b"somebody's"


def test_two_writers_at_once(tmp_path, documents):
    with open_writer(tmp_path) as first:
        with pytest.raises(DatasetError, match="another process is writing"):
            open_writer(tmp_path)
        for document in documents:
            add(first, *document)
        first.add_file("tokenizer/tokenizer.json", b"{}")
        first.close()
    assert verify(open_dataset(tmp_path), progress=False) == []


def test_a_failed_close_leaves_nothing_under_a_final_name(tmp_path):
    (tmp_path / "val_documents.npy").mkdir()  # cannot be renamed over
    with pytest.raises(OSError):
        write(tmp_path, make_documents())
    assert visible(tmp_path) == []
    assert not (tmp_path / "meta.json").exists()


KILLED = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import test_dataset as t
import training.dataset_writer as w
w.BUFFER_IDS = 50
folder, phase = Path(sys.argv[1]), sys.argv[2]
if phase.startswith("rename"):
    left = int(phase.split()[1])
    real = os.replace
    def replace(*arguments):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        real(*arguments)
    os.replace = replace
    t.write(folder, t.make_documents(), overwrite=True)
else:
    writer = t.open_writer(folder)
    for document in t.make_documents():
        t.add(writer, *document)
    print("writing", flush=True)
    time.sleep(60)
"""


def start_killed(folder, phase):
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), phase],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_writer_leaves_nothing_and_is_cleaned_up(
    tmp_path, folder, documents
):
    target = tmp_path / "killed"
    process = start_killed(target, "documents")
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert visible(target) == []
    parts = list(target.glob(".*.part"))
    assert len(parts) == 3
    assert (target / ".train.bin.part").stat().st_size > 0
    refused(target, "incomplete", "prepare.py --out")
    (target / ".train_00009.bin.part").write_bytes(b"older still")
    write(target, documents)
    assert contents(target) == contents(folder)
    assert list(target.glob(".*.part")) == []


@pytest.mark.parametrize("renames", range(6))
def test_killed_between_renames(tmp_path, folder, documents, renames):
    target = tmp_path / "killed"
    write(target, make_documents(20, seed=3))
    process = start_killed(target, f"rename {renames}")
    assert process.wait(30) == -signal.SIGKILL
    assert not (target / "meta.json").exists()
    refused(target, "incomplete")
    due = contents(folder)
    bins = [name for name in visible(target) if name.endswith(".bin")]
    assert len(bins) == min(max(renames - 1, 0), 2)  # the tokenizer is first
    for name in bins:
        assert (target / name).read_bytes() == due[name]
    write(target, documents)
    assert contents(target) == due


def test_reads_outside_the_split(folder):
    split = open_dataset(folder).split("val")
    for start, count in [(0, split.tokens + 1), (split.tokens, 1), (-1, 2)]:
        with pytest.raises(DatasetError, match=f"has {split.tokens}"):
            split.read(start, count)
    with pytest.raises(DatasetError, match="into an array of shape"):
        split.read(0, 3, np.empty(4, np.int64))


def test_reading_beyond_2_to_the_32_bytes(tmp_path):
    """A sparse file of 2^31 tokens and some; the last ones are written."""
    # children import this file, and need no torch
    from training.data_loader import TrainLoader

    ids = np.arange(1, 1001, dtype="<u2")
    with open(tmp_path / "train.bin", "wb") as file:
        file.seek(2 * 2**31)
        file.write(ids.tobytes())
    ids.tofile(tmp_path / "val.bin")
    split = open_dataset(tmp_path).split("train")
    assert split.tokens == 2**31 + 1000
    found = split.read(2**31 - 2, 7)
    assert found.tolist() == [0, 0, 1, 2, 3, 4, 5]
    with TrainLoader(
        split, block_size=500, batch_size=2, accumulation=1, seed=0
    ) as loader:
        assert loader.n_windows == (2**31 + 999) // 500
        rows = np.empty((1, 501), np.int64)
        split.read_rows([(loader.n_windows - 1) * 500], rows)
    assert rows[0, -1] == (2**31 + 999) // 500 * 500 - 2**31 + 1


def test_names_and_folders(tmp_path, monkeypatch):
    with pytest.raises(DatasetError) as caught:
        open_dataset("no_such_set")
    said = str(caught.value)
    assert "python data/custom/prepare.py --name no_such_set" in said
    assert "scripts for custom, python_stdlib, slimpajama" in said
    assert prepare_command(REPOSITORY / "data" / "python_stdlib") == (
        "`python data/python_stdlib/prepare.py`"
    )
    with pytest.raises(DatasetError, match="prepare.py --out"):
        open_dataset(tmp_path / "nowhere")
    refused(tmp_path, "neither meta.json nor bins")
    write(tmp_path / "set", make_documents())
    monkeypatch.chdir(tmp_path / "set")
    assert open_dataset(".").folder == tmp_path / "set"


def test_all_problems_are_listed_together(folder):
    (folder / "train.bin").unlink()
    (folder / "val.bin").write_bytes(b"\0" * 7)
    (folder / "val_documents.npy").unlink()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(b"another")
    refused(
        folder,
        "train.bin is missing",
        "val.bin has 7 bytes",
        "val_documents.npy is missing",
        "not the tokenizer that the ids were made with",
        "prepare it again",
    )


@pytest.mark.parametrize("cut", [1, 4])
def test_a_cut_off_bin(folder, cut):
    content = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(content[:-cut])
    refused(folder, rf"train.bin has {len(content) - cut} bytes")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda meta: meta.update(format_version=2), "format_version 2"),
        (lambda meta: meta.update(dtype="int8"), "dtype is 'int8'"),
        (lambda meta: meta.update(dtype=["uint32"]), "dtype is .'uint32'"),
        (lambda meta: meta.update(vocab_size="9"), "vocab_size is '9'"),
        (lambda meta: meta.update(vocab_size=280), "size 290 is not within"),
        (lambda meta: meta.update(tokenizer=None), "tokenizer is None"),
        (lambda meta: meta.update(splits=3), "split 'train' is missing"),
        (lambda meta: meta["splits"].pop("val"), "split 'val' is missing"),
        (
            lambda meta: meta["splits"]["val"].pop("documents_file"),
            "documents_file is missing",
        ),
        (
            lambda meta: meta["splits"]["train"]["files"][0].update(tokens=5),
            "files have 5 tokens together",
        ),
        (
            lambda meta: meta["splits"]["train"]["files"][0].update(
                name="../train.bin"
            ),
            "files is not a list of records",
        ),
        (
            lambda meta: meta["splits"]["train"]["files"][0].update(
                max_id=300
            ),
            "train.bin holds id 300",
        ),
        (
            lambda meta: meta["splits"]["val"].update(bytes=1),
            "val_documents.npy adds up to",
        ),
        (
            lambda meta: meta["splits"]["val"].update(documents=9),
            r"needs uint64 of shape \(9, 2\)",
        ),
    ],
)
def test_a_wrong_record(folder, change, message):
    edit_meta(folder, change)
    refused(folder, message)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_record_that_is_none(folder, text):
    data = text.encode("utf-8", "surrogateescape")
    (folder / "meta.json").write_bytes(data)
    refused(folder, "meta.json (is not JSON|has format_version None)")


def test_a_changed_document_list(folder):
    np.save(folder / "val_documents.npy", np.zeros((8, 2), np.uint64))
    refused(folder, "differs from the record")


def test_a_document_list_with_objects_runs_nothing(tmp_path, folder):
    path = folder / "val_documents.npy"
    sentinel = tmp_path / "ran"
    with open(path, "wb") as file:
        np.save(file, np.array([Malicious(sentinel)], object))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_meta(
        folder,
        lambda meta: meta["splits"]["val"]["documents_file"].update(
            sha256=digest
        ),
    )
    refused(folder, "not an array of numbers")
    assert not sentinel.exists()


def test_verify_finds_one_flipped_byte(folder):
    dataset = open_dataset(folder)
    content = bytearray((folder / "train.bin").read_bytes())
    content[-5] ^= 1  # the top byte of the last id but one: a huge id
    (folder / "train.bin").write_bytes(content)
    problems = verify(dataset, progress=False)
    where = dataset.split("train").tokens - 2
    assert len(problems) == 3
    assert f"train.bin: token {where} is" in problems[0]
    assert "differs from its recorded sha256" in problems[1]
    assert "its largest id is" in problems[2]
    with pytest.raises(DatasetError, match=f"train.bin: token {where} is"):
        dataset.split("train").read(where - 3, 5)
    assert dataset.split("train").read(where - 3, 3).max() < VOCAB_SIZE


def test_verify_finds_a_changed_id_in_range(folder):
    content = bytearray((folder / "val.bin").read_bytes())
    content[8] ^= 1
    (folder / "val.bin").write_bytes(content)
    problems = verify(open_dataset(folder), progress=False)
    assert problems == ["val.bin differs from its recorded sha256"]


def test_verify_finds_missing_and_short_files(folder):
    dataset = open_dataset(folder)
    os.truncate(folder / "train.bin", 10)
    (folder / "val.bin").unlink()
    problems = verify(dataset, progress=False)
    assert "train.bin has 10 bytes" in problems[0]
    assert problems[-1] == "val.bin is missing"


def test_verify_finds_shifted_document_borders(folder):
    path = folder / "val_documents.npy"
    lengths = np.load(path)
    lengths[0, 0] += 1
    lengths[1, 0] -= 1
    np.save(path, lengths)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_meta(
        folder,
        lambda meta: meta["splits"]["val"]["documents_file"].update(
            sha256=digest
        ),
    )
    problems = verify(open_dataset(folder), progress=False)
    assert problems == [
        "val document 0 does not end with the end-of-text id"
    ]


def test_an_out_of_range_id_names_the_second_file(tmp_path):
    write(tmp_path, make_documents(), shard_tokens=70)
    dataset = open_dataset(tmp_path)
    path = tmp_path / "train_00001.bin"
    ids = np.fromfile(path, "<u4")
    ids[3] = 300
    ids.tofile(path)
    start = dataset.split("train").files[0]["tokens"]
    with pytest.raises(
        DatasetError, match="train_00001.bin: token 3 is 300, vocab_size"
    ):
        dataset.split("train").read(start - 5, 20)


# nanoGPT's own format


def nanogpt(folder, ids, dtype, meta=None):
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        np.asarray(ids, dtype).tofile(folder / f"{split}.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


IDS = np.random.default_rng(0).integers(0, 50257, 5001)


def test_nanogpt_bins_load(tmp_path):
    dataset = open_dataset(nanogpt(tmp_path, IDS, "<u2"))
    assert dataset.vocab_size == 50304 and dataset.dtype == np.uint16
    split = dataset.split("train")
    assert np.array_equal(split.read(0, 5001), IDS)
    assert (split.documents, split.bytes, split.text_sha256) == (None,) * 3
    assert split.document_tokens is None and dataset.eot_id is None
    assert verify(dataset, progress=False) == []
    np.asarray(IDS[::-1], "<u2").tofile(tmp_path / "train.bin")
    assert open_dataset(tmp_path).fingerprint != dataset.fingerprint


def test_nanogpt_character_set_loads(tmp_path):
    meta = {"vocab_size": 65, "itos": {0: "a"}, "stoi": {"a": 0}}
    dataset = open_dataset(nanogpt(tmp_path, IDS % 65, "<u2", meta))
    assert dataset.vocab_size == dataset.tokenizer_size == 65


def test_the_writers_meta_pkl_serves_without_meta_json(folder, documents):
    (folder / "meta.json").unlink()
    dataset = open_dataset(folder)
    assert dataset.dtype == np.uint32 and dataset.vocab_size == VOCAB_SIZE
    train = stream(documents, "train")
    assert np.array_equal(dataset.split("train").read(0, len(train)), train)


@pytest.mark.parametrize("top", [65, 50257, 151936])
def test_uint32_presented_as_uint16(tmp_path, top):
    ids = np.random.default_rng(1).integers(0, top, 5000)
    refused(
        nanogpt(tmp_path, ids, "<u4"),
        "train.bin looks like uint32 presented as uint16",
        "val.bin looks like uint32",
    )


def test_uint16_presented_as_uint32(tmp_path):
    meta = {"dtype": "uint32", "vocab_size": 151936}
    refused(
        nanogpt(tmp_path / "even", IDS[:-1], "<u2", meta),
        "train.bin: token .* looks like uint16 presented as uint32",
        "val.bin: token .* looks like uint16",
    )
    refused(
        nanogpt(tmp_path / "odd", IDS, "<u2", meta),
        "train.bin has 10002 bytes, no positive multiple of the 4 of uint32",
    )


def test_swapped_types_with_a_record(tmp_path, folder):
    ids = np.fromfile(folder / "train.bin", "<u4")
    doubled = np.tile(ids, 2).astype("<u2")  # of the recorded size
    doubled.tofile(folder / "train.bin")
    refused(folder, "train.bin: .*looks like uint16 presented as uint32")
    write(tmp_path / "other", make_documents())

    def pretend(meta):
        meta["dtype"] = "uint16"

    edit_meta(tmp_path / "other", pretend)
    refused(tmp_path / "other", "train.bin has .* cut off or of another type")


def test_a_vocabulary_of_three_is_no_uint32(tmp_path):
    meta = {"vocab_size": 3}
    dataset = open_dataset(nanogpt(tmp_path, IDS % 3, "<u2", meta))
    assert np.array_equal(dataset.split("val").read(0, 5001), IDS % 3)


def test_ids_of_another_vocabulary(tmp_path):
    meta = {"vocab_size": 65}
    refused(
        nanogpt(tmp_path, IDS, "<u2", meta),
        "train.bin: token 0 is .*, vocab_size is 65; it has another",
    )


def test_empty_odd_and_missing_bins(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"")
    refused(tmp_path, "train.bin has 0 bytes", "split 'val' is missing")
    (tmp_path / "val.bin").write_bytes(b"abc")
    refused(tmp_path, "val.bin has 3 bytes", "train.bin has 0 bytes")


class Malicious:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (Path(self.sentinel),)


@pytest.mark.parametrize("nested", [False, True])
def test_a_meta_pkl_with_code_runs_nothing(tmp_path, nested):
    sentinel = tmp_path / "ran"
    bomb = Malicious(sentinel)
    meta = {"vocab_size": 65, "itos": [bomb]} if nested else bomb
    folder = nanogpt(tmp_path / "set", IDS % 65, "<u2", meta)
    refused(folder, "meta.pkl is not loaded: it names pathlib.Path")
    assert not sentinel.exists()
    pickle.loads((folder / "meta.pkl").read_bytes())
    assert sentinel.exists()  # the file did hold code


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "meta.pkl is not loaded"),
        (b"\x80\x04garbage", "meta.pkl is not loaded"),
        (pickle.dumps([1]), "holds list, not a dict"),
        (pickle.dumps({"dtype": "int64"}), "gives dtype 'int64'"),
        (pickle.dumps({"vocab_size": -1}), "vocab_size -1"),
        (pickle.dumps({"dtype": ["uint16"]}), r"gives dtype \['uint16'\]"),
    ],
)
def test_a_damaged_meta_pkl(tmp_path, content, message):
    nanogpt(tmp_path, IDS, "<u2")
    (tmp_path / "meta.pkl").write_bytes(content)
    refused(tmp_path, message)


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on file size stands for it: the first write is cut short."""
    code = f"""
import resource, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
import test_dataset as t
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
t.write(Path(sys.argv[1]), t.make_documents())
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert "File too large" in result.stderr.splitlines()[-1]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writing_is_bounded_in_memory(tmp_path):
    """64 MB of ids, four times the buffer, with peak memory recorded."""
    code = f"""
import re, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import numpy as np
from pathlib import Path
import test_dataset as t
ids = np.random.default_rng(0).integers(1, 290, 10**6)
def peak():  # of this program alone: ru_maxrss begins at its parent's
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024
with t.open_writer(Path(sys.argv[1])) as writer:
    for _ in range(6):
        t.add(writer, "train", ids, "a")
        t.add(writer, "val", ids, "a")
    before = peak()
    for _ in range(16):
        t.add(writer, "train", ids, "a")
print(peak() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 8  # MB


def test_reading_a_window_opens_no_file(folder):
    """A memmap that is opened for each window is ten times as slow."""
    split = open_dataset(folder).split("train")
    split.read(0, 101)
    opened, watching = [], [True]

    def watch(event, arguments):
        if watching and event == "open" and str(folder) in str(arguments[0]):
            opened.append(arguments[0])

    sys.addaudithook(watch)
    out = np.empty(101, np.int64)
    for start in range(200):
        split.read(start, 101, out)
    watching.clear()  # a hook stays for the life of the process
    assert opened == []
