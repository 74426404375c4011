"""What a test plants in a rank before train.py starts there.

Faults, at an exact instant, and witnesses of what the rank works with. A job of
running.WarmRanks names them in `before`, as Python source. train.py and
training/ know nothing of this file.

    before = 'import planted; planted.signal_at(rank, {1: (2, "SIGTERM")})'
"""

import hashlib
import os
import signal

import torch

from training import checkpoint, data_loader, evaluation, strategies


def around(owner, name, before=None, after=None):
    """Call `before(count)` and `after(count)` around owner.name, where count
    is 1 at the first call."""
    original, count = getattr(owner, name), 0

    def wrapped(*arguments, **named):
        nonlocal count
        count += 1
        here = count  # a call within the call counts too
        if before:
            before(here)
        result = original(*arguments, **named)
        if after:
            after(here)
        return result

    setattr(owner, name, wrapped)


def raise_signal(name):
    os.kill(os.getpid(), getattr(signal, name))


def signal_at_update(rank, at):
    """{rank: (update, signal)}: counted from 1 in this process, sent when its
    gradients are ready."""
    if rank in at:
        update, name = at[rank]
        around(strategies.Replicated, 'clip',
               lambda n: n == update and raise_signal(name))


def signal_at_evaluation(rank, at):
    """{rank: (batch, signal)}: of all evaluations in this process."""
    if rank in at:
        batch, name = at[rank]
        around(evaluation, 'autocast',
               lambda n: n == batch and raise_signal(name))


def signal_in_save(rank, at):
    """{rank: (file, signal)}: after the n-th file that this rank has written,
    before it is fsynced."""
    if rank in at:
        file, name = at[rank]
        around(checkpoint, 'save_file',
               after=lambda n: n == file and raise_signal(name))


def witness_batches(rank, path):
    """Append the SHA-256 of each batch of tokens to the file PATH_rank."""
    original = data_loader.TrainLoader.next_batch

    def next_batch(self):
        x, y = original(self)
        digest = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes())
        with open(f'{path}_{rank}', 'a') as f:
            f.write(digest.hexdigest() + '\n')
        return x, y

    data_loader.TrainLoader.next_batch = next_batch


def witness_gradients(rank, path):
    """Save the whole gradients of the first update, as its norm sees them."""
    from safetensors.torch import save_file
    original, saved = strategies.Replicated.clip, False

    def clip(self, max_norm):
        nonlocal saved
        if not saved:
            saved = True
            grads = {name: p.grad for name, p in self.model.named_parameters()}
            grads = {name: (g.full_tensor() if hasattr(g, 'full_tensor')
                            else g).clone() for name, g in grads.items()}
            if rank == 0:
                save_file(grads, path)
        return original(self, max_norm)

    strategies.Replicated.clip = clip


def quick_compiler():
    """torch.compile without its slow code generator: the same graphs, breaks
    and hooks, run by PyTorch's own kernels."""
    original = torch.compile

    def quick(model, **options):
        return original(model, backend='aot_eager', **options)

    torch.compile = quick
    torch._dynamo.config.compiled_autograd = False


def read_batches(path, ranks):
    """Of each micro-step of the job, in order, the hash of its batch."""
    lines = [open(f'{path}_{rank}').read().split() for rank in range(ranks)]
    return [digest for step in zip(*lines, strict=True) for digest in step]


