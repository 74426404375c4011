"""Preparation that is killed, meets bad input, or runs out of disk.

A run is killed for real, by SIGKILL, at each of the system calls with which
it changes the disk. What must hold then: nothing under a final name is
incomplete, and running again gives the bytes of an undisturbed run.
"""

import json
import os
import resource
import shutil
import signal
import sys
from functools import partial

import numpy as np
import psutil
import pyarrow as pa
import pytest
import zstandard
from corpus_cases import (
    contents,
    make_texts,
    prepare,
    run_script,
    small_blocks,
    start_script,
    write_lines,
    write_parquet,
    write_raw_lines,
)
from forks import run_forked
from running import wait_for, wait_until_stopped

from training.dataset import DatasetError, open_dataset, verify

CHANGES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    return write_lines(tmp_path / "in.jsonl.zst", make_texts(60))


def in_child(action, before=lambda: None):
    """`before`, then `action`, in a fork; its exit status."""

    def both():
        before()
        action()

    return run_forked(both)


def killed_at(number, folder):
    """Arrange that this process kills itself at a change of `folder`.

    Counted are openings for writing and the calls in CHANGES; the kill comes
    before the call takes effect.
    """
    left = [number]

    def watch(event, arguments):
        if event == "open":
            path, _, flags = arguments
            counts = isinstance(flags, int) and flags & os.O_ACCMODE
        else:
            path, counts = arguments[0] if arguments else "", event in CHANGES
        if counts and str(folder) in str(path):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def kill_everywhere(out, run, expected, old=None):
    """Kill at the first, second, ... change, then run again; the count."""
    for number in range(1, 500):
        if old is not None:
            shutil.copytree(old, out)
        status = in_child(run, partial(killed_at, number, out))
        if status == 0:
            assert contents(out) == expected
            return number - 1
        assert status == -signal.SIGKILL
        found = contents(out) if out.exists() else {}
        former = contents(old) if old is not None else {}
        for name, data in found.items():
            if not name.startswith(".") and "/." not in name:
                assert data in (expected.get(name), former.get(name)), name
        if "meta.json" in found:
            assert found.keys() >= expected.keys()
            assert verify(open_dataset(out), progress=False) == []
        else:
            with pytest.raises(DatasetError):
                open_dataset(out)
        assert in_child(run) == 0
        assert contents(out) == expected, number
        shutil.rmtree(out)
    raise AssertionError("the run never came to its end")


def test_kill_at_every_change_of_the_disk(corpus, tiny_tokenizer, tmp_path):
    size = {"part_tokens": 12000}
    prepare(tmp_path / "whole", corpus, tiny_tokenizer, **size)
    expected = contents(tmp_path / "whole")
    assert len([name for name in expected if name.endswith(".bin")]) == 4
    out = tmp_path / "set"
    kills = kill_everywhere(
        out, lambda: prepare(out, corpus, tiny_tokenizer, **size), expected
    )
    assert kills > 30


def test_kill_while_another_dataset_is_replaced(
    corpus, tiny_tokenizer, tmp_path
):
    other = write_lines(tmp_path / "other.jsonl", make_texts(20, seed=1))
    prepare(tmp_path / "old", other, tiny_tokenizer, part_tokens=10**6)
    prepare(tmp_path / "whole", corpus, tiny_tokenizer, part_tokens=10**6)
    out = tmp_path / "set"

    def run():
        prepare(out, corpus, tiny_tokenizer, "--overwrite",
                part_tokens=10**6)

    kills = kill_everywhere(
        out, run, contents(tmp_path / "whole"), tmp_path / "old"
    )
    assert kills > 20


def test_finished_parts_are_not_made_again(corpus, tiny_tokenizer, tmp_path):
    out = tmp_path / "set"

    def run():
        prepare(out, corpus, tiny_tokenizer)

    assert in_child(run, lambda: killed_at(30, out)) == -signal.SIGKILL
    work = out / ".prepare"
    done = sorted(work.glob("*.json"))[:-1]  # without plan.json
    assert len(done) >= 2
    before = {path: path.stat().st_mtime_ns for path in work.glob("0*.bin")}

    def stop_early():  # dies at once, but past the parts that are there
        killed_at(6, out)

    in_child(run, stop_early)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before


# which a process runs before its script: it stands still where a part has been
# written, and is to get its name
STOP = """
import os, signal, sys
def watch(event, arguments):
    if event == "os.rename" and arguments[0].endswith(".train.bin.part"):
        os.kill(os.getpid(), signal.SIGSTOP)
sys.addaudithook(watch)
"""


def test_kill_of_a_run_on_two_cores(tiny_tokenizer, tmp_path):
    """The real command with its threads, killed as it writes."""
    texts = [text * 40 for text in make_texts(700)]
    corpus = write_parquet(tmp_path / "in.parquet", texts, row_group_size=90)
    arguments = [
        f"--input={corpus}", f"--tokenizer={tiny_tokenizer}", "--num_proc=2",
        "--name=test", f"--out={tmp_path / 'set'}",
    ]
    (tmp_path / "sitecustomize.py").write_text(STOP)
    run = start_script("custom", *arguments, PYTHONPATH=str(tmp_path))
    wait_until_stopped(run)
    part = tmp_path / "set" / ".prepare" / ".00000_00000.train.bin.part"
    assert psutil.Process(run.pid).num_threads() > 3
    run.kill()
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert part.exists() and not list((tmp_path / "set").glob("*.bin"))
    code, _, said = run_script("custom", *arguments)
    assert code == 0, said
    prepare(tmp_path / "whole", corpus, tiny_tokenizer, part_tokens=2**28,
            val_share=0.005)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_ctrl_c_keeps_what_is_finished(tiny_tokenizer, tmp_path):
    texts = [text * 400 for text in make_texts(700)]
    corpus = write_lines(tmp_path / "in.jsonl", texts)
    run = start_script(
        "custom", f"--input={corpus}", f"--tokenizer={tiny_tokenizer}",
        "--num_proc=2", f"--out={tmp_path / 'set'}",
    )
    lock = tmp_path / "set" / ".prepare" / "00000.lock"
    wait_for(lock.exists, run)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=30)
    assert run.returncode == 1
    assert "interrupted; the same command continues" in said
    assert "Traceback" not in said


def test_two_runs_at_once(corpus, tiny_tokenizer, tmp_path):
    from data.tokenize_corpus import locked

    (tmp_path / "set" / ".prepare").mkdir(parents=True)
    with locked(tmp_path / "set" / ".prepare" / "00000.lock"):
        with pytest.raises(SystemExit, match="another process is at work"):
            prepare(tmp_path / "set", corpus, tiny_tokenizer)
    prepare(tmp_path / "set", corpus, tiny_tokenizer)
    assert verify(open_dataset(tmp_path / "set"), progress=False) == []


# Disk


def test_full_disk(corpus, tiny_tokenizer, tmp_path):
    prepare(tmp_path / "whole", corpus, tiny_tokenizer)
    out = tmp_path / "set"

    def limit():
        soft = 10_000  # bytes of one file, less than a part
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, soft))

    messages = tmp_path / "messages"

    def run():
        try:
            prepare(out, corpus, tiny_tokenizer)
        except SystemExit as stop:
            messages.write_text(str(stop.code))
            raise

    assert in_child(run, limit) == 1
    said = messages.read_text()
    assert "File too large" in said
    assert "run the same command again" in said.replace("\n", " ")
    assert [path.name for path in out.iterdir()] == [".prepare"]
    assert not list((out / ".prepare").glob("*.bin*"))
    assert not list((out / ".prepare").glob(".*.part"))
    prepare(out, corpus, tiny_tokenizer)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_part_that_was_cut_is_noticed(corpus, tiny_tokenizer, tmp_path):
    out = tmp_path / "set"

    def run():
        prepare(out, corpus, tiny_tokenizer)

    in_child(run, lambda: killed_at(30, out))
    bin = sorted((out / ".prepare").glob("*.train.bin"))[0]
    os.truncate(bin, bin.stat().st_size - 4)
    with pytest.raises(SystemExit, match=r"remove .*/\.prepare/00000_\* and"):
        run()
    for path in (out / ".prepare").glob("00000_*"):
        path.unlink()
    run()
    assert verify(open_dataset(out), progress=False) == []


# Other inputs


def test_existing_dataset_of_other_inputs(corpus, tiny_tokenizer, tmp_path):
    out = tmp_path / "set"
    prepare(out, corpus, tiny_tokenizer)
    before = contents(out)
    other = write_lines(tmp_path / "b.jsonl.zst", make_texts(60, seed=3))
    for arguments in ([other], [corpus, "--val_share=0.3"]):
        path, *rest = arguments
        with pytest.raises(SystemExit, match="--overwrite"):
            prepare(out, path, tiny_tokenizer, *rest)
        assert contents(out) == before
    moved = shutil.move(corpus, tmp_path / "moved")
    shutil.move(moved, corpus)  # only time and place of a file may change
    os.utime(corpus, (1, 1))
    prepare(out, corpus, tiny_tokenizer)
    assert contents(out) == before
    prepare(out, other, tiny_tokenizer, "--overwrite")
    assert contents(out) != before
    assert verify(open_dataset(out), progress=False) == []


def test_unfinished_preparation_of_other_inputs(
    corpus, tiny_tokenizer, tmp_path
):
    out = tmp_path / "set"
    in_child(lambda: prepare(out, corpus, tiny_tokenizer),
             lambda: killed_at(20, out))
    write_lines(corpus, make_texts(61, seed=4))
    with pytest.raises(SystemExit, match="unfinished preparation of other"):
        prepare(out, corpus, tiny_tokenizer)
    prepare(out, corpus, tiny_tokenizer, "--overwrite")
    prepare(tmp_path / "whole", corpus, tiny_tokenizer)
    assert contents(out) == contents(tmp_path / "whole")


def test_file_that_changes_while_it_waits(tmp_path):
    from data.corpus_readers import CorpusError, find_inputs, local_path

    path = write_lines(tmp_path / "a.jsonl", ["some text"])
    (file,) = find_inputs([path])
    assert local_path(file) == path
    path.write_text(path.read_text().replace("some", "sane"))
    with pytest.raises(CorpusError, match="has changed since"):
        local_path(file)


# Bad texts

GOOD = [f"good text {n}" for n in range(20)]


def stopped(tmp_path, path, tokenizer, *arguments):
    with pytest.raises(SystemExit) as caught:
        prepare(tmp_path / "stopped", path, tokenizer, *arguments)
    left = list((tmp_path / "stopped").glob("*"))
    assert {entry.name for entry in left} <= {".prepare"}
    shutil.rmtree(tmp_path / "stopped", ignore_errors=True)
    return str(caught.value.code)


def source(tmp_path, path, tokenizer, *arguments):
    out = tmp_path / "out"
    prepare(out, path, tokenizer, *arguments)
    dataset = open_dataset(out)
    assert verify(dataset, progress=False) == []
    text = dataset.split("train").documents + dataset.split("val").documents
    shutil.rmtree(out)
    return dataset.meta["source"], text


def good_lines():
    return [json.dumps({"text": text}).encode() for text in GOOD]


BAD_LINES = {
    "invalid_utf8": (b'{"text": "caf\xe9 au lait"}', "is not UTF-8", 1),
    "surrogate": (b'{"text": "a \\ud83d b"}', "has a lone surrogate", 1),
    "null": (b'{"text": null}', "its text is null", 0),
    "number": (b'{"text": 7}', "its text is int", 0),
    "no_field": (b'{"body": "x"}', "no field 'text', only body", 0),
    "no_json": (b'{"text": "cut o', "is not JSON", 0),
    "no_object": (b'["text"]', "no field 'text', only none", 0),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines(kind, tiny_tokenizer, tmp_path):
    bad, said, replaced = BAD_LINES[kind]
    lines = good_lines()
    lines[7:7] = [bad]
    path = write_raw_lines(tmp_path / "in.jsonl.zst", b"\n".join(lines))
    message = stopped(tmp_path, path, tiny_tokenizer)
    assert f"{path}, record 7: " in message
    assert said in message and "--on_bad_text=skip" in message
    found, documents = source(tmp_path, path, tiny_tokenizer,
                              "--on_bad_text=skip")
    assert found["left_out"]["skipped"] == 1 and documents == 20
    found, documents = source(tmp_path, path, tiny_tokenizer,
                              "--on_bad_text=replace")
    assert found["replaced"] == replaced
    assert found["left_out"]["skipped"] == 1 - replaced
    assert documents == 20 + replaced


def test_bad_rows_of_parquet(tiny_tokenizer, tmp_path):
    rows = [text.encode() for text in GOOD]
    rows[3], rows[11] = b"caf\xe9", None
    path = write_parquet(tmp_path / "in.parquet", rows, type=pa.binary())
    message = stopped(tmp_path, path, tiny_tokenizer)
    assert f"{path}, record 3: its text is not UTF-8" in message
    found, documents = source(tmp_path, path, tiny_tokenizer,
                              "--on_bad_text=skip")
    assert found["left_out"]["skipped"] == 2 and documents == 18
    found, documents = source(tmp_path, path, tiny_tokenizer,
                              "--on_bad_text=replace")
    assert (found["replaced"], documents) == (1, 19)


def test_bad_text_in_a_worker_and_the_right_record(
    tiny_tokenizer, tmp_path, monkeypatch
):
    small_blocks(monkeypatch, 100)
    lines = good_lines()
    lines[17:17] = [b'{"text": null}']
    path = write_raw_lines(tmp_path / "in.jsonl", b"\n".join(lines))
    message = stopped(tmp_path, path, tiny_tokenizer, "--num_proc=2")
    assert f"{path}, record 17: its text is null" in message


def test_replaced_texts_hold_the_replacement():
    from data.corpus_readers import Block, texts

    data = b'{"text": "x\\ud83dy"}\n{"text": "caf\xe9!"}\n'
    block = Block(["f"], 0, data.splitlines(), True, 0, (0, 1))
    found = list(texts(block, "text", "replace"))
    assert found == [("x\ufffdy".encode(), "replaced"),
                     ("caf\ufffd!".encode(), "replaced")]


def test_empty_documents_are_skipped_and_counted(tiny_tokenizer, tmp_path):
    texts = ["", " \n", "\u3000\u2003", *GOOD, ""]
    for path in (
        write_lines(tmp_path / "in.jsonl", texts),
        write_parquet(tmp_path / "in.parquet", texts),
    ):
        found, documents = source(tmp_path, path, tiny_tokenizer)
        assert found["left_out"] == {"empty": 4, "skipped": 0}
        assert documents == 20
    path.unlink()
    path = write_lines(tmp_path / "in.jsonl", ["", " "])
    assert "no document went to train and val" in stopped(
        tmp_path, path, tiny_tokenizer
    )
    path = write_lines(tmp_path / "in.jsonl", GOOD)
    message = stopped(tmp_path, path, tiny_tokenizer, "--val_share=1e-9")
    assert "of 20 records no document went to val" in message


# Bad files


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_truncated_zstd(keep, tiny_tokenizer, tmp_path):
    data = write_lines(tmp_path / "a.jsonl.zst", make_texts()).read_bytes()
    path = tmp_path / "cut.jsonl.zst"
    path.write_bytes(data[: int(len(data) * keep)])
    message = stopped(tmp_path, path, tiny_tokenizer)
    assert f"{path} is damaged or cut off" in message
    path.write_bytes(b"no zstd at all" * 50)
    assert "damaged or cut off" in stopped(tmp_path, path, tiny_tokenizer)


def test_damaged_parquet(tiny_tokenizer, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", make_texts())
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert f"{path} is damaged" in stopped(tmp_path, path, tiny_tokenizer)
    path.write_bytes(b"")
    assert f"{path} is damaged" in stopped(tmp_path, path, tiny_tokenizer)


def test_missing_column(tiny_tokenizer, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", GOOD, column="content")
    message = stopped(tmp_path, path, tiny_tokenizer)
    assert f"{path} has no column 'text', only id, content" in message
    assert "--column NAME" in message
    message = stopped(tmp_path, path, tiny_tokenizer, "--column=id")
    assert "column 'id' holds int64, not text" in message
    found, documents = source(tmp_path, path, tiny_tokenizer,
                              "--column=content")
    assert documents == 20


def test_one_document_many_times_the_size_of_a_block(
    tiny_tokenizer, tmp_path, monkeypatch
):
    texts = make_texts(30)
    texts[12] = "".join(make_texts(900, seed=9))  # 300 KB, blocks are 4 KB
    inputs = [
        write_lines(tmp_path / "a.jsonl.zst", texts),
        write_lines(tmp_path / "a.jsonl", texts),
        write_parquet(tmp_path / "a.parquet", texts),
    ]
    prepare(tmp_path / "whole", inputs[0], tiny_tokenizer, part_tokens=10**6)
    whole = open_dataset(tmp_path / "whole")
    small_blocks(monkeypatch)
    for path in inputs:
        prepare(tmp_path / "set", path, tiny_tokenizer)
        made = open_dataset(tmp_path / "set")
        for name, split in whole.splits.items():
            other = made.split(name)
            assert other.text_sha256 == split.text_sha256
            assert np.array_equal(
                other.read(0, other.tokens), split.read(0, split.tokens)
            )
        shutil.rmtree(tmp_path / "set")


def test_window_of_zstd_larger_than_usual(tiny_tokenizer, tmp_path):
    lines = b"\n".join(good_lines())
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=27, enable_ldm=True
    )
    data = zstandard.ZstdCompressor(compression_params=parameters).compress(
        lines
    )
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(data)
    _, documents = source(tmp_path, path, tiny_tokenizer)
    assert documents == 20
