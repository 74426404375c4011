"""Token windows in an order that is a pure function, and the evaluation set.

A global sample number and a seed give a window, so resuming needs only the
step, and any number of ranks sees the same tokens. Windows do not overlap
(a window's last target is the next one's first input), an epoch is a
permutation of them computed in constant memory, and every epoch is another.

    python -c "from training.data_loader import sample_window; \
print([int(sample_window(s, 5, seed=1)) for s in range(10)])"
"""

import hashlib
import math
import queue
import threading

import numpy as np
import torch

from training.dataset import DatasetError

ROUNDS = 8  # of the Feistel network; four already make it pseudorandom
PREFETCHED_BATCHES = 3
PLANNED_ROWS = 4096  # windows computed at once: numpy's calls cost, not rows
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x):
    """SplitMix64's finaliser on a uint64 array: every bit reaches every one.

    https://doi.org/10.1145/2660193.2660195
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index, n, seed, epoch):
    """A permutation of 0 .. n - 1 for (seed, epoch), in constant memory.

    `index` is an int or an integer array, `epoch` an int or an array of the
    same shape; the result is int64 of index's shape, or an int. A Feistel
    network over a grid of about sqrt(n) x sqrt(n) cells, each round adding a
    keyed hash of one coordinate to the other modulo its size; an index that
    lands in one of the surplus cells is sent through again (cycle walking:
    Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    flat = np.atleast_1d(np.asarray(index, np.int64)).ravel()
    if n < 1 or (flat.size and not 0 <= flat.min() <= flat.max() < n):
        raise ValueError(f"indices to permute must lie in 0 .. {n - 1}")
    x = flat.astype(np.uint64)
    epochs = np.asarray(epoch, np.int64).ravel().astype(np.uint64)
    key = _mix(np.array([seed % 2**64], np.uint64) + GOLDEN)
    key = np.broadcast_to(_mix(key + epochs), x.shape)
    rows = math.isqrt(n - 1) + 1
    sizes = np.uint64(rows), np.uint64(-(-n // rows))
    out = _feistel(x, key, sizes)
    while (surplus := np.flatnonzero(out >= n)).size:
        out[surplus] = _feistel(out[surplus], key[surplus], sizes)
    out = out.astype(np.int64)
    return out.reshape(np.shape(index)) if np.ndim(index) else int(out[0])


def _feistel(x, key, sizes):
    here, there = np.divmod(x, sizes[1])  # below sizes[0], below sizes[1]
    own, other = sizes
    for _ in range(ROUNDS):
        key = key + GOLDEN
        here = (here + _mix(_mix(key) ^ there) % own) % own
        here, there, own, other = there, here, other, own
    return here * sizes[1] + there  # an even number of rounds: back in place


def sample_window(sample, n_windows, seed):
    """The window of a global sample number (int or int array)."""
    epoch, position = np.divmod(np.asarray(sample, np.int64), n_windows)
    return permute(position, n_windows, seed, epoch)


class TrainLoader:
    """Batches of a split for one rank, prefetched by a thread.

    The row j of micro-step m of step s on rank r has the global sample number
    s*G + (m*W + r)*B + j, with B `batch_size`, W `world_size`, A
    `accumulation` (micro-steps of a step on each rank) and G = B*A*W.
    Raises DatasetError for a split without a whole window.
    """

    def __init__(
        self,
        split,
        *,
        block_size,
        batch_size,
        accumulation,
        seed,
        rank=0,
        world_size=1,
        start_step=0,
        device="cpu",
    ):
        self.n_windows = (split.tokens - 1) // block_size
        if self.n_windows < 1:
            raise DatasetError(
                f"split {split.name!r} has {split.tokens} tokens, a window of"
                f" block_size {block_size} needs {block_size + 1}: set"
                f" block_size to at most {split.tokens - 1}, or give more text"
            )
        self._split, self._seed = split, seed
        self._block_size, self._batch_size = block_size, batch_size
        self._accumulation = accumulation
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._queue = queue.Queue(PREFETCHED_BATCHES)
        self._stop = threading.Event()
        self._error = None
        self._thread = threading.Thread(
            target=self._prefetch, args=(start_step,), daemon=True
        )
        self._thread.start()

    def sample_numbers(self, step, steps=1):
        """Global sample numbers of this rank, (steps * A, B) int64."""
        micro = np.arange(self._accumulation * steps) * self._world_size
        micro += step * self._accumulation * self._world_size + self._rank
        row = np.arange(self._batch_size)
        return micro[:, None] * self._batch_size + row

    def next_batch(self):
        """The next micro-step's x and y, (B, T) int64 on the device.

        An exception of the prefetching thread is raised here.
        """
        item = self._error or self._queue.get()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        # From pinned memory this copy runs beside the computation; PyTorch
        # keeps the pinned block until it is done.
        rows = item.to(self._device, non_blocking=True)  # (B, T + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def close(self):
        """Stop the thread; next_batch must not be called afterwards."""
        self._stop.set()
        self._error = RuntimeError("this loader is closed")
        self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _prefetch(self, step):
        try:
            if self._device.type == "cuda":
                # A new thread starts on GPU 0: pinning there would cost every
                # other rank a context on that GPU.
                torch.cuda.set_device(self._device)
            for batch in self._batches(step):
                if not self._put(batch):
                    return
        except BaseException as error:  # handed over: next_batch raises it
            self._put(error)

    def _put(self, item):
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def _batches(self, step):
        steps = 1 + PLANNED_ROWS // (self._accumulation * self._batch_size)
        while True:
            samples = self.sample_numbers(step, steps)
            for windows in sample_window(samples, self.n_windows, self._seed):
                yield self._fill(windows)
            step += steps

    def _fill(self, windows):
        size = self._block_size
        pin = self._device.type == "cuda"
        shape = len(windows), size + 1
        batch = torch.empty(shape, dtype=torch.int64, pin_memory=pin)
        self._split.read_rows((windows * size).tolist(), batch.numpy())
        return batch


class EvalSet:
    """The first whole documents of a split, every token scored once.

    As many documents as stay within `eval_bytes` of text, at least one. The
    stream is an end-of-text id and then their tokens; windows of `block_size`
    inputs follow one another. `tokens` counts the scored ones, `bytes` their
    text; `text_sha256` is equal for equal text under any tokenizer. Without
    document records the first `eval_bytes` // 4 tokens are taken, and
    `documents`, `bytes`, `text_sha256` are None; without an end-of-text id
    (`eot_id` None) the first token is context only.
    """

    def __init__(self, split, *, eval_bytes, block_size, eot_id):
        if split.document_bytes is None:
            self.documents = self.bytes = self.text_sha256 = None
            end = min(split.tokens, max(eval_bytes // 4, 2))
        else:
            sums = np.cumsum(split.document_bytes)
            within = int(np.searchsorted(sums, eval_bytes, side="right"))
            self.documents = max(within, 1)
            self.bytes = int(sums[self.documents - 1])
            end = int(split.document_tokens[: self.documents].sum())
            text = f"{split.text_sha256} {self.documents}"
            self.text_sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.tokens = end if eot_id is not None else end - 1
        if self.tokens < 1:
            raise DatasetError(
                f"split {split.name!r} has {split.tokens} token(s) and no"
                " end-of-text id: evaluation needs two, give more text"
            )
        self._split, self._eot_id = split, eot_id
        self._block_size = block_size
        self.n_windows = -(-self.tokens // block_size)

    def n_batches(self, batch_size, world_size=1):
        return -(-self.n_windows // (batch_size * world_size))

    def batches(self, batch_size, rank=0, world_size=1):
        """x and y, (B, T) int64; -1 as target where there is nothing to score.

        All ranks get the same number of batches; rows, or whole batches, of
        -1 fill up what the windows leave.
        """
        size = self._block_size
        for batch in range(self.n_batches(batch_size, world_size)):
            first = batch * batch_size * world_size
            x = np.zeros((batch_size, size), np.int64)
            y = np.full((batch_size, size), -1, np.int64)
            for row in range(batch_size):
                window = first + rank * batch_size + row
                count = min(size, self.tokens - window * size)
                if count > 0:
                    ids = self._stream(window * size, count + 1)
                    x[row, :count], y[row, :count] = ids[:-1], ids[1:]
            yield torch.from_numpy(x), torch.from_numpy(y)

    def stream(self):
        """The scored tokens after their context: (tokens + 1,) int64."""
        return self._stream(0, self.tokens + 1)

    def _stream(self, start, count):
        if self._eot_id is None:
            return self._split.read(start, count)
        if start:
            return self._split.read(start - 1, count)
        ids = np.full(count, self._eot_id, np.int64)
        self._split.read(0, count - 1, ids[1:])
        return ids
