"""A training batch against that of nanoGPT's way of drawing one.

nanoGPT's way: map the bin anew, draw random offsets, slice and widen each row
for x and again for y, stack. Here: an order without repeats, an id check, one
read per row. Both on 100 MB of tokens, uint16 there and uint32 here. Then the
share that loading has of a training step, that of the small shape of
vs_peers.py: the step waits for its batch while a thread reads the next ones.

    python benchmarks/loader_speed.py
    python benchmarks/loader_speed.py --smoke    # to see that it runs
"""

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.vs_peers import shape_of, training_step  # noqa: E402
from training.data_loader import TrainLoader  # noqa: E402
from training.dataset import DatasetWriter, open_dataset  # noqa: E402

B, T = 8, 1024


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
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--smoke', action='store_true',
                        help='little data and a tiny model')
    smoke = parser.parse_args().smoke
    tokens = 100_000 if smoke else 25_000_000  # 100 MB in uint32
    ids = np.random.default_rng(0).integers(1, 50257, tokens)
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
        # the writer lets go of what it has written: both start in memory
        for path in folder.glob('**/*.bin'):
            path.read_bytes()
        split = open_dataset(folder / 'own').split('train')
        compare(split, folder / 'other.bin', rounds=1 if smoke else 9,
                batches=5 if smoke else 100)
        share_of_a_step(split, smoke)


def compare(split, other_bin, rounds, batches):
    """A batch in nanoGPT's way and in ours, in turns, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with TrainLoader(split, block_size=T, batch_size=B, accumulation=1,
                     seed=0) as loader:
        waits, works = [], {'other': [], 'own': []}
        own_batches = loader._batches(0)
        for _ in range(rounds):
            works['other'].append(per_batch(
                lambda: random_windows(other_bin), batches))
            works['own'].append(per_batch(lambda: next(own_batches), batches))
            waits.append(per_batch(loader.next_batch, batches, pause=0.001))
    torch.set_num_threads(threads)
    other, own = (statistics.median(works[name]) for name in works)
    wait = statistics.median(waits)
    print(f'B={B}, T={T}, {split.tokens:,} tokens, medians of {rounds} rounds')
    print(f"nanoGPT's way: {other:.0f} us a batch")
    print(f'own work:      {own:.0f} us a batch, {other / own:.1f} times less')
    print(f'own wait:      {wait:.0f} us a batch with prefetching, '
          f'{other / wait:.1f} times less')


def share_of_a_step(split, smoke):
    """Print which share of the small shape's step its batch takes."""
    shape = shape_of('small', smoke)
    step, _ = training_step('qwen3', shape, 'float32', torch.device('cpu'),
                            compiled=not smoke)
    waits, steps = [], []
    with TrainLoader(split, block_size=shape.block_size,
                     batch_size=shape.batch_size, accumulation=1,
                     seed=0) as loader:
        for _ in range(4 if smoke else 20):
            begin = time.perf_counter()
            loader.next_batch()
            middle = time.perf_counter()
            step()
            waits.append(middle - begin)
            steps.append(time.perf_counter() - middle)
    # the first two compile and fill the queue
    wait, whole = (statistics.median(t[2:]) for t in (waits, steps))
    print(f'a step of {shape.batch_size} x {shape.block_size} tokens: '
          f'{whole * 1e3:.0f} ms, {wait * 1e6:.0f} us of waiting for its '
          f'batch: {wait / (wait + whole):.3%}')


def per_batch(draw, batches, pause=0.0):
    """Microseconds a call; `pause` seconds of other work between calls."""
    total = 0.0
    for _ in range(batches):
        begin = time.perf_counter()
        draw()
        total += time.perf_counter() - begin
        if pause:
            time.sleep(pause)
    return total / batches * 1e6


if __name__ == '__main__':
    main()
