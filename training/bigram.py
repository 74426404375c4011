"""An interpolated bigram model: the baseline that a trained model must beat.

    p(b | a) = l2 c(a, b) / c(a) + l1 c(b) / N + l0 / V

with counts of the training split (Jelinek and Mercer 1980). The weights l are
fitted on the evaluated text itself by expectation maximisation, which makes
the baseline as strong as a model of this form can be.
"""

import numpy as np

from training.evaluation import bits_per_byte

MAX_TRAIN_TOKENS = 100_000_000  # counting more takes minutes
CHUNK = 2**24


def bigram_baseline(dataset, eval_set) -> tuple[float, float | None]:
    """(nats per token, bits per byte or None) on the documents of `eval_set`.

    Counts at most the first MAX_TRAIN_TOKENS tokens of the training split.
    """
    train = dataset.split('train')
    V = dataset.vocab_size
    ids = eval_set.stream()                              # (tokens + 1,)
    pairs = ids[:-1] * V + ids[1:]
    wanted = np.unique(pairs)  # pairs that are not evaluated need no count
    pair_counts = np.zeros(len(wanted), np.int64)
    unigrams = np.zeros(V, np.int64)
    contexts = np.zeros(V, np.int64)
    n = min(train.tokens, MAX_TRAIN_TOKENS)
    for start in range(0, n - 1, CHUNK):
        chunk = train.read(start, min(CHUNK + 1, n - start))
        a, b = chunk[:-1], chunk[1:]
        contexts += np.bincount(a, minlength=V)
        unigrams += np.bincount(b, minlength=V)
        found, counts = np.unique(a * V + b, return_counts=True)
        at = np.searchsorted(wanted, found)
        at[at == len(wanted)] = 0
        hit = wanted[at] == found
        pair_counts[at[hit]] += counts[hit]

    a, b = ids[:-1], ids[1:]
    seen = pair_counts[np.searchsorted(wanted, pairs)]
    bigram = seen / np.maximum(contexts[a], 1)
    unigram = unigrams[b] / unigrams.sum()
    parts = np.stack([bigram, unigram, np.full(len(a), 1 / V)])  # (3, tokens)
    weights = np.full(3, 1 / 3)
    for _ in range(100):
        posterior = weights[:, None] * parts
        p = posterior.sum(axis=0)
        new = (posterior / p).mean(axis=1)
        if np.abs(new - weights).max() < 1e-6:
            break
        weights = new
    nats = float(-np.log(p).sum())
    bpb = None if eval_set.bytes is None else (
        bits_per_byte(nats, eval_set.bytes))
    return nats / len(a), bpb
