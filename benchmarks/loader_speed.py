"""A training batch against that of nanoGPT's way of drawing one.

nanoGPT's way: map the bin anew, draw random offsets, slice and widen each row
for x and again for y, stack. Here: an order without repeats, an id check, one
read per row. Both on 100 MB of tokens, uint16 there and uint32 here.

    python benchmarks/loader_speed.py
"""

import hashlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.data_loader import TrainLoader  # noqa: E402
from training.dataset import DatasetWriter, open_dataset  # noqa: E402

B, T, ROUNDS, BATCHES = 8, 1024, 9, 100
TOKENS = 25_000_000  # 100 MB in uint32


def random_windows(path):
    """A batch as nanoGPT draws it: (x, y), each (B, T) int64."""
    data = np.memmap(path, dtype=np.uint16, mode='r')
    starts = torch.randint(len(data) - T, (B,))
    x = torch.stack([torch.from_numpy(data[i:i + T].astype(np.int64))
                     for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + T].astype(np.int64))
                     for i in starts])
    return x, y


def main():
    torch.set_num_threads(1)
    ids = np.random.default_rng(0).integers(1, 50257, TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ids.astype(np.uint16).tofile(folder / 'other.bin')
        writer = DatasetWriter(
            folder / 'own', name='own', vocab_size=50304, source={},
            tokenizer={'name': 'none', 'size': 50257, 'sha256': '0' * 64,
                       'eot_id': 0, 'eot_token': '', 'path': None})
        for split, part in (('train', ids), ('val', ids[:2000])):
            writer.add(split, part, len(part), hashlib.sha256().digest())
        writer.close()
        split = open_dataset(folder / 'own').split('train')
        with TrainLoader(split, block_size=T, batch_size=B, accumulation=1,
                         seed=0) as loader:
            waits, works = [], {'other': [], 'own': []}
            batches = loader._batches(0)
            for _ in range(ROUNDS):
                works['other'].append(per_batch(
                    lambda: random_windows(folder / 'other.bin')))
                works['own'].append(per_batch(lambda: next(batches)))
                waits.append(per_batch(loader.next_batch, pause=0.001))
    other, own = (statistics.median(works[name]) for name in works)
    wait = statistics.median(waits)
    print(f'B={B}, T={T}, {TOKENS:,} tokens, medians of {ROUNDS} rounds')
    print(f"nanoGPT's way: {other:.0f} us a batch")
    print(f'own work:      {own:.0f} us a batch, {other / own:.1f} times less')
    print(f'own wait:      {wait:.0f} us a batch with prefetching, '
          f'{other / wait:.1f} times less')


def per_batch(draw, pause=0.0):
    """Microseconds a call; `pause` seconds of other work between calls."""
    total = 0.0
    for _ in range(BATCHES):
        begin = time.perf_counter()
        draw()
        total += time.perf_counter() - begin
        if pause:
            time.sleep(pause)
    return total / BATCHES * 1e6


if __name__ == '__main__':
    main()
