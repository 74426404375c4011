"""The order of windows, the prefetching loader, and the evaluation set."""

import hashlib
import threading

import numpy as np
import pytest
import torch

from training.data_loader import (
    EvalSet,
    TrainLoader,
    permute,
    sample_window,
)
from training.dataset import DatasetError, DatasetWriter, open_dataset

VOCAB_SIZE = 100_000
TOKENIZER = {
    "name": "test",
    "size": VOCAB_SIZE,
    "sha256": "",
    "eot_id": 0,
    "eot_token": "<|endoftext|>",
    "path": None,
}
TRAIN_TOKENS = 1600
GOLDEN_ORDER = [7, 2, 10, 11, 8, 0, 4, 1, 6, 9, 3, 5]
GOLDEN_FAR = 9230595976
VAL_LENGTHS = [5, 1, 40, 17, 64, 30, 2, 90]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Every train token is its own position + 1; val's are unique too."""
    folder = tmp_path_factory.mktemp("loader") / "set"
    with DatasetWriter(
        folder,
        name="test",
        vocab_size=VOCAB_SIZE,
        tokenizer=TOKENIZER,
        source={},
        shard_tokens=500,
    ) as writer:
        for start in range(0, TRAIN_TOKENS, 100):
            ids = np.arange(start + 1, start + 100)
            digest = hashlib.sha256(b"%d" % start).digest()
            writer.add("train", ids, 300, digest)
        start = 1
        for length in VAL_LENGTHS:
            ids = np.arange(start, start + length)
            digest = hashlib.sha256(b"%d" % length).digest()
            writer.add("val", ids, 4 * length, digest)
            start += length
        writer.close()
    return open_dataset(folder)


@pytest.fixture(scope="module")
def plain_dataset(tmp_path_factory):
    """nanoGPT's format: neither documents nor an end-of-text id."""
    folder = tmp_path_factory.mktemp("plain")
    for split in ("train", "val"):
        np.arange(1000, dtype="<u2").tofile(folder / f"{split}.bin")
    return open_dataset(folder)


def loader(dataset, **options):
    options = {
        "block_size": 16,
        "batch_size": 4,
        "accumulation": 1,
        "seed": 1,
        **options,
    }
    return TrainLoader(dataset.split("train"), **options)


# The permutation

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 10, 31, 97, 100, 101, 128, 1000, 1009, 65537]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("seed, epoch", [(0, 0), (1337, 3), (-5, 10**6)])
def test_permute_is_a_bijection(n, seed, epoch):
    image = permute(np.arange(n), n, seed, epoch)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permute_every_small_size():
    for n in range(1, 300):
        image = permute(np.arange(n), n, 7, 1)
        assert np.array_equal(np.sort(image), np.arange(n)), n


def test_permute_of_a_part_shape_or_int_agrees():
    n = 12345
    whole = permute(np.arange(n), n, 3, 4)
    some = np.array([[0, 77], [12344, 5]])
    assert np.array_equal(permute(some, n, 3, 4), whole[some])
    assert [permute(i, n, 3, 4) for i in (0, 9, n - 1)] == [
        whole[0],
        whole[9],
        whole[-1],
    ]
    assert isinstance(permute(9, n, 3, 4), int)
    epochs = np.array([[4, 5], [6, 4]])
    mixed = permute(some, n, 3, epochs)
    for place in np.ndindex(2, 2):
        assert mixed[place] == permute(int(some[place]), n, 3, epochs[place])


def test_permute_of_a_huge_range_in_constant_memory():
    n = 10**12 + 39
    image = permute(np.arange(n - 1000, n), n, 1, 1)
    assert len(set(image.tolist())) == 1000
    assert 0 <= image.min() and image.max() < n
    assert image.max() > 0.9 * n and image.min() < 0.1 * n


def test_permutations_differ_by_seed_and_epoch():
    n = 1000
    images = [
        permute(np.arange(n), n, seed, epoch)
        for seed in range(8)
        for epoch in range(8)
    ]
    for i, first in enumerate(images):
        for second in images[:i]:
            # Two random permutations agree in about one place.
            assert np.sum(first == second) < 10


def test_the_permutation_looks_random():
    n = 10_000
    image = permute(np.arange(n), n, 42, 0).astype(float)
    assert np.sum(image == np.arange(n)) < 10
    for lag in (1, 2, 100):  # sqrt(n) is the width of the network's grid
        pair = np.corrcoef(image[:-lag], image[lag:])[0, 1]
        assert abs(pair) < 0.05
    halves = (image < n / 2).reshape(100, 100).sum(axis=1)
    assert 3 < halves.std() < 7  # hypergeometric: 4.97
    # Over many epochs each window comes first about equally often.
    first = [permute(0, 10, 42, epoch) for epoch in range(5000)]
    counts = np.bincount(first, minlength=10)
    assert np.sum((counts - 500) ** 2 / 500) < 30  # chi-squared, 9 degrees


def test_the_order_is_the_documented_one():
    """Another order would silently change what a resumed run trains on."""
    order = permute(np.arange(12), 12, 1337, 0).tolist()
    assert sorted(order) == list(range(12))
    assert order == GOLDEN_ORDER
    assert permute(10**9, 10**10, 1337, 2) == GOLDEN_FAR


@pytest.mark.parametrize("index", [-1, 10])
def test_permute_outside_its_range(index):
    with pytest.raises(ValueError, match="0 .. 9"):
        permute(index, 10, 0, 0)


def test_sample_window_is_an_epoch_after_an_epoch():
    windows = sample_window(np.arange(3 * 17), 17, seed=5).reshape(3, 17)
    assert np.array_equal(np.sort(windows, axis=1), [list(range(17))] * 3)
    assert len({tuple(row) for row in windows.tolist()}) == 3


# The loader


def test_a_batch_is_the_windows_and_their_shift(dataset):
    split = dataset.split("train")
    stream = split.read(0, split.tokens)
    with loader(dataset, accumulation=2) as batches:
        for step in range(5):
            for samples in batches.sample_numbers(step):
                x, y = batches.next_batch()
                assert x.shape == y.shape == (4, 16)
                assert x.dtype == y.dtype == torch.int64
                assert x.is_contiguous() and y.is_contiguous()
                for row, sample in enumerate(samples):
                    window = sample_window(sample, 99, 1)
                    due = stream[window * 16 : window * 16 + 17]
                    assert x[row].tolist() == due[:-1].tolist()
                    assert y[row].tolist() == due[1:].tolist()


def test_sample_numbers_follow_the_formula(dataset):
    batch, accumulation, world = 3, 4, 2
    for rank in range(world):
        with loader(
            dataset,
            batch_size=batch,
            accumulation=accumulation,
            rank=rank,
            world_size=world,
        ) as batches:
            assert batches.sample_numbers(7).tolist() == [
                [
                    7 * batch * accumulation * world
                    + (micro * world + rank) * batch
                    + row
                    for row in range(batch)
                ]
                for micro in range(accumulation)
            ]


def starts(x):
    """The windows of a batch; position + 1 is the id, bar end-of-text."""
    return [(int(row.max()) - 1) // 16 for row in x]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_epoch_shows_each_window_once_on_any_number_of_ranks(
    dataset, world
):
    """99 windows, 12 samples a step: 33 steps are exactly four epochs."""
    ranks = [
        loader(
            dataset,
            batch_size=3,
            accumulation=4 // world,
            rank=rank,
            world_size=world,
        )
        for rank in range(world)
    ]
    seen, per_step = [], []
    for _ in range(33):
        step = []
        for _ in range(4 // world):
            for batches in ranks:
                step += starts(batches.next_batch()[0])
        seen += step
        per_step.append(sorted(step))
    for batches in ranks:
        batches.close()
    epochs = np.array(seen).reshape(4, 99)
    assert np.array_equal(np.sort(epochs, axis=1), [list(range(99))] * 4)
    due = sample_window(np.arange(33 * 12), 99, 1).reshape(33, 12)
    assert per_step == np.sort(due, axis=1).tolist()  # for any world size


@pytest.mark.parametrize("step", [1, 7, 500])
def test_resuming_equals_going_on(dataset, step):
    with loader(dataset, accumulation=3) as going_on:
        for _ in range(step * 3):
            going_on.next_batch()
        with loader(dataset, accumulation=3, start_step=step) as resumed:
            for _ in range(9):
                for one, other in zip(
                    going_on.next_batch(), resumed.next_batch()
                ):
                    assert torch.equal(one, other)


def test_a_split_smaller_than_a_batch_repeats_epochs(dataset):
    with loader(dataset, block_size=800, batch_size=7) as batches:
        assert batches.n_windows == 1
        x, _ = batches.next_batch()
        assert (x == x[0]).all()


@pytest.mark.parametrize("block_size", [1600, 5000])
def test_a_split_without_a_window_is_refused(dataset, block_size):
    with pytest.raises(DatasetError) as caught:
        loader(dataset, block_size=block_size)
    message = str(caught.value)
    assert "has 1600 tokens" in message and str(block_size + 1) in message
    assert "block_size to at most 1599" in message


def test_an_exception_of_the_thread_is_raised_again(tmp_path):
    for split in ("train", "val"):
        ids = np.arange(20_000) % 50_000
        if split == "train":
            ids[15_000] = 60_000
        ids.astype("<u2").tofile(tmp_path / f"{split}.bin")
    dataset = open_dataset(tmp_path)
    with loader(dataset) as batches:
        for _ in range(2):  # at the bad window, and ever after
            with pytest.raises(DatasetError, match="token 15000 is 60000"):
                while True:
                    batches.next_batch()


def test_close_ends_the_thread(dataset):
    before = threading.active_count()
    batches = loader(dataset)
    batches.next_batch()
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        batches.next_batch()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_equal_those_on_the_cpu(dataset):
    with (
        loader(dataset) as cpu,
        loader(dataset, device="cuda") as gpu,
    ):
        for _ in range(50):
            for one, other in zip(cpu.next_batch(), gpu.next_batch()):
                assert other.is_cuda and other.is_contiguous()
                assert torch.equal(one, other.cpu())


# Evaluation


def scored(eval_set, batch_size, world):
    """(context before each target, target) in stream order, over all ranks."""
    ranks = [
        list(eval_set.batches(batch_size, rank, world))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    rows = []
    for turn in zip(*ranks):
        for x, y in turn:
            assert x.shape == y.shape and len(x) == batch_size
            assert x.dtype == y.dtype == torch.int64
            rows += zip(x.tolist(), y.tolist())
    pairs = [pair for x, y in rows for pair in zip(x, y)]
    return [(x, y) for x, y in pairs if y != -1]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("block_size", [1, 16, 63, 64, 1000])
def test_every_token_is_scored_once(dataset, block_size, batch_size, world):
    split = dataset.split("val")
    eval_set = EvalSet(
        split, eval_bytes=10**9, block_size=block_size, eot_id=0
    )
    stream = split.read(0, split.tokens).tolist()
    assert eval_set.tokens == split.tokens == sum(VAL_LENGTHS) + 8
    assert (eval_set.documents, eval_set.bytes) == (8, split.bytes)
    due = list(zip([0, *stream], stream))
    assert scored(eval_set, batch_size, world) == due


@pytest.mark.parametrize(
    "eval_bytes, documents",
    [(0, 1), (19, 1), (20, 1), (23, 1), (24, 2), (183, 2), (184, 3)],
)
def test_whole_documents_within_eval_bytes(dataset, eval_bytes, documents):
    eval_set = EvalSet(
        dataset.split("val"),
        eval_bytes=eval_bytes,
        block_size=16,
        eot_id=0,
    )
    lengths = VAL_LENGTHS[:documents]
    assert eval_set.documents == documents
    assert eval_set.bytes == 4 * sum(lengths)
    assert eval_set.tokens == sum(lengths) + documents
    assert len(scored(eval_set, 2, 2)) == eval_set.tokens


def test_the_hash_names_the_text(dataset):
    def of(eval_bytes, block_size):
        return EvalSet(
            dataset.split("val"),
            eval_bytes=eval_bytes,
            block_size=block_size,
            eot_id=0,
        ).text_sha256

    assert of(24, 16) == of(30, 64) != of(184, 16)
    text = dataset.split("val").text_sha256
    assert of(24, 16) == hashlib.sha256(f"{text} 2".encode()).hexdigest()


def test_evaluation_without_document_records(plain_dataset):
    eval_set = EvalSet(
        plain_dataset.split("val"),
        eval_bytes=400,
        block_size=16,
        eot_id=plain_dataset.eot_id,
    )
    assert eval_set.tokens == 99  # 400 // 4, the first of them as context
    assert eval_set.documents is eval_set.bytes is None
    assert eval_set.text_sha256 is None
    due = list(zip(range(99), range(1, 100)))
    assert scored(eval_set, 3, 2) == due


def test_evaluation_of_a_single_token_is_refused(tmp_path):
    for split in ("train", "val"):
        np.zeros(1, "<u2").tofile(tmp_path / f"{split}.bin")
    with pytest.raises(DatasetError, match="evaluation needs two"):
        EvalSet(
            open_dataset(tmp_path).split("val"),
            eval_bytes=100,
            block_size=4,
            eot_id=None,
        )
