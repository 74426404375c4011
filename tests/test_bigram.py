"""The bigram baseline against dictionaries, loops and a grid search."""

import hashlib
import math
import pickle
from collections import Counter

import numpy as np
import pytest

from training import bigram
from training.bigram import bigram_baseline
from training.data_loader import EvalSet
from training.dataset import DatasetWriter, open_dataset

V, EOT = 12, 0


def documents(seed, count):
    """Texts of a Markov chain over 1..9; 10 and 11 occur in `val` alone."""
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(9, 0.3), size=10)
    for _ in range(count):
        ids = [int(rng.integers(1, 10))]
        for _ in range(int(rng.integers(0, 30))):
            ids.append(1 + int(rng.choice(9, p=table[ids[-1]])))
        yield ids


TRAIN = list(documents(0, 40))
# the chain of TRAIN, another chain, and ids that training never saw
VALIDATION = {
    'alike': list(documents(0, 60))[40:],
    'other': list(documents(7, 20)),
    'unseen': [[10, 11, 10], [3, 4, 11, 11], *list(documents(0, 44))[40:]],
    'training itself': TRAIN,
}


def write(folder, validation):
    with DatasetWriter(
            folder, name='tiny', vocab_size=V, source={}, shard_tokens=100,
            tokenizer=dict(name='t', size=V, sha256='', eot_id=EOT,
                           eot_token='<|endoftext|>', path=None)) as writer:
        for split, texts in ('train', TRAIN), ('val', validation):
            for ids in texts:
                digest = hashlib.sha256(repr(ids).encode()).digest()
                writer.add(split, ids, 3 * len(ids), digest)
        writer.close()
    return open_dataset(folder)


@pytest.fixture(scope='module', params=VALIDATION)
def case(request, tmp_path_factory):
    validation = VALIDATION[request.param]
    dataset = write(tmp_path_factory.mktemp('bigram') / 'tiny', validation)
    eval_set = EvalSet(dataset.split('val'), eval_bytes=10**9, block_size=16,
                       eot_id=EOT)
    return dataset, eval_set, validation


def joined(texts):
    return [i for ids in texts for i in [*ids, EOT]]


def parts(validation, n_train=None):
    """(tokens, 3): the bigram's, the unigram's and the uniform probability of
    every evaluated token, from dictionaries."""
    train = joined(TRAIN)[:n_train]
    pairs = Counter(zip(train[:-1], train[1:]))
    contexts, unigrams = Counter(train[:-1]), Counter(train[1:])
    stream = [EOT, *joined(validation)]
    return np.array([
        (pairs[a, b] / contexts[a] if contexts[a] else 0.0,
         unigrams[b] / (len(train) - 1), 1 / V)
        for a, b in zip(stream[:-1], stream[1:])])


def best_nats(p):
    """The least nats per token over all weights, by a long EM."""
    weights = np.full(3, 1 / 3)
    for _ in range(3000):
        posterior = p * weights
        weights = (posterior / posterior.sum(1, keepdims=True)).mean(0)
    return -np.log(p @ weights).mean()


def grid_nats(p, n=40):
    grid = np.array([(i, j, n - i - j) for i in range(n + 1)
                     for j in range(n + 1 - i)]) / n
    with np.errstate(divide='ignore'):
        return -np.log(p @ grid.T).mean(0).min()


def test_equals_brute_force(case):
    dataset, eval_set, validation = case
    nats, bpb = bigram_baseline(dataset, eval_set)
    p = parts(validation)
    assert len(p) == eval_set.tokens
    assert nats == pytest.approx(best_nats(p), abs=1e-4)
    n_bytes = sum(3 * len(ids) for ids in validation)
    assert bpb == pytest.approx(nats * len(p) / math.log(2) / n_bytes,
                                rel=1e-12)


def test_the_fit_is_as_good_as_a_grid_search(case):
    dataset, eval_set, validation = case
    p = parts(validation)
    nats, _ = bigram_baseline(dataset, eval_set)
    assert nats <= grid_nats(p) + 1e-6
    # no weights do better than the best, and fixed ones do clearly worse
    assert nats >= best_nats(p) - 1e-9
    assert nats < -np.log(p @ np.full(3, 1 / 3)).mean() - 0.01


@pytest.mark.parametrize('chunk', [1, 7, 50, 99, 100, 101])
def test_pairs_across_chunks_are_counted(case, chunk, monkeypatch):
    dataset, eval_set, _ = case
    whole = bigram_baseline(dataset, eval_set)
    monkeypatch.setattr(bigram, 'CHUNK', chunk)
    assert bigram_baseline(dataset, eval_set) == whole


def test_only_the_first_tokens_are_counted(case, monkeypatch):
    dataset, eval_set, validation = case
    monkeypatch.setattr(bigram, 'MAX_TRAIN_TOKENS', 150)
    nats, _ = bigram_baseline(dataset, eval_set)
    assert nats == pytest.approx(best_nats(parts(validation, 150)), abs=1e-4)


def test_only_the_evaluated_documents_are_scored(tmp_path):
    validation = VALIDATION['alike']
    dataset = write(tmp_path / 'tiny', validation)
    n_bytes = sum(3 * len(ids) for ids in validation[:5])
    eval_set = EvalSet(dataset.split('val'), eval_bytes=n_bytes,
                       block_size=16, eot_id=EOT)
    nats, bpb = bigram_baseline(dataset, eval_set)
    p = parts(validation[:5])
    assert nats == pytest.approx(best_nats(p), abs=1e-4)
    assert bpb == pytest.approx(nats * len(p) / math.log(2) / n_bytes,
                                rel=1e-12)


def test_without_recorded_bytes_there_are_no_bits_per_byte(tmp_path):
    """A folder in nanoGPT's format: uint16 bins alone."""
    for split, texts in ('train', TRAIN), ('val', VALIDATION['alike']):
        np.array(joined(texts), np.uint16).tofile(tmp_path / f'{split}.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': V}))
    dataset = open_dataset(tmp_path)
    eval_set = EvalSet(dataset.split('val'), eval_bytes=10**9, block_size=16,
                       eot_id=None)
    nats, bpb = bigram_baseline(dataset, eval_set)
    assert bpb is None
    # the first token is context only
    assert nats == pytest.approx(best_nats(parts(VALIDATION['alike'])[1:]),
                                 abs=1e-4)
