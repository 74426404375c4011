"""What a test plants in a rank before train.py starts there.

Faults, at an exact instant, and witnesses of what the rank works with. A job of
running.WarmRanks names them in `before`, as Python source. train.py and
training/ know nothing of this file.

    before = ('import planted; '
              'planted.signal_at_update(rank, {1: (2, "SIGTERM")})')
"""

import hashlib
import os
import pathlib
import signal
import time

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


def unseen(rank, at):
    """{rank: path}: a file that a shared file system does not show there."""
    if rank in at:
        read = pathlib.Path.read_text

        def read_text(path, *arguments, **named):
            if str(path) == at[rank]:
                raise FileNotFoundError(2, 'No such file', str(path))
            return read(path, *arguments, **named)

        pathlib.Path.read_text = read_text


def impatient_in_save(rank, at):
    """{rank: (file, signal)}: as signal_in_save, and once more so late that
    it is no part of the first request."""
    from training.stop_signals import StopSignals
    StopSignals.SAME_REQUEST_S = 0.1

    def twice(n):
        if n == at[rank][0]:
            raise_signal(at[rank][1])
            time.sleep(0.2)
            raise_signal(at[rank][1])

    if rank in at:
        around(checkpoint, 'save_file', after=twice)


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


OPERATIONS = ('mkdir', 'fsync', 'rename', 'replace', 'symlink', 'unlink',
              'rmdir')


def kill_in_save(rank, at):
    """{rank: n}: SIGKILL before the n-th change that a save makes on disk.

    A file of tensors counts twice: not there yet, and half of it there.
    """
    if rank not in at:
        return
    count, saving = 0, False

    def reached():
        nonlocal count
        count += saving
        return saving and count == at[rank]

    def guarded(original):
        def operation(*arguments, **named):
            if reached():
                raise_signal('SIGKILL')
            return original(*arguments, **named)
        return operation

    for name in OPERATIONS:
        setattr(os, name, guarded(getattr(os, name)))
    save_file, save_checkpoint = (checkpoint.save_file,
                                  checkpoint.save_checkpoint)

    def half_written(tensors, path):
        if reached():
            raise_signal('SIGKILL')
        save_file(tensors, path)
        if reached():
            os.truncate(path, os.stat(path).st_size // 2)
            raise_signal('SIGKILL')

    def save(*arguments, **named):
        nonlocal saving
        saving = True
        try:
            return save_checkpoint(*arguments, **named)
        finally:
            saving = False

    checkpoint.save_file, checkpoint.save_checkpoint = half_written, save


def full_disk(limit=None):
    """No file may exceed `limit` bytes any more."""
    import resource
    unlimited = resource.RLIM_INFINITY
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or unlimited, unlimited))


def full_disk_in_save(rank, at, tries=1000):
    """{rank: save}: in the n-th share of a checkpoint that is written here,
    and `tries` - 1 more, no file may exceed 4 kB."""
    checkpoint.RETRY_AFTER_S = 0.1
    if rank in at:
        around(checkpoint, '_write_share', lambda n: full_disk(
            4096 if at[rank] <= n < at[rank] + tries else None))


def signal_while_starting(rank, at, where):
    """{rank: signal}: when this rank builds the model, or reads a file or a
    tensor of a checkpoint for the second time. A third is an error: the rank
    should have stopped."""
    from model_builder import ConfigurableGPT
    owner, name = {'building': (ConfigurableGPT, '__init__'),
                   'verifying': (checkpoint, '_check_content'),
                   'loading': (checkpoint.Tensors, 'read')}[where]
    due = 1 if where == 'building' else 2

    def reached(n):
        assert n <= due, f'{where} goes on after the signal'
        if n == due:
            raise_signal(at[rank])

    if rank in at:
        around(owner, name, reached)


def spoil(rank, at, what):
    """{rank: micro-step}: there, and once, the loss is `nan`, or one element
    of a gradient `inf` while the loss is as it should be."""
    from model_builder import ConfigurableGPT
    original, count, due = ConfigurableGPT.forward, 0, False

    def infinite(grad):
        nonlocal due
        if due:
            due, grad = False, grad.clone()
            grad[0] = float('inf')
        return grad

    def forward(self, *arguments, **named):
        nonlocal count, due
        if not self.training:
            return original(self, *arguments, **named)
        count += 1
        if count == 1 and what == 'inf':
            self.ln_f.weight.register_hook(infinite)
        here = count == at.get(rank)
        due = here and what == 'inf'
        logits, loss = original(self, *arguments, **named)
        return logits, loss * float('nan') if here and not due else loss

    ConfigurableGPT.forward = forward


def slow_updates(seconds):
    around(strategies.Replicated, 'clip', lambda n: time.sleep(seconds))


def truncate_at_update(rank, at, path):
    """{rank: update}: when its gradients are ready, the file is cut short."""
    if rank in at:
        around(strategies.Replicated, 'clip',
               lambda n: n == at[rank] and os.truncate(path, 1002))


def truncate_at_evaluation(rank, at, path):
    """{rank: batch}: of all evaluations in this process."""
    if rank in at:
        around(evaluation, 'autocast',
               lambda n: n == at[rank] and os.truncate(path, 1002))


def slow_once(rank, at):
    """{rank: seconds}: longer takes the second save, and the first batch of
    the third evaluation."""
    if rank in at:
        around(checkpoint, '_write_share',
               lambda n: n == 2 and time.sleep(at[rank]))
        original, count = data_loader.EvalSet.batches, 0

        def batches(self, *arguments):
            nonlocal count
            count += 1
            if count == 3:
                time.sleep(at[rank])
            return original(self, *arguments)

        data_loader.EvalSet.batches = batches


def witness_leaving(rank, path):
    """Write into PATH_rank whether the process group outlives its end."""
    import weakref

    from training import startup
    leave = startup.leave

    def leave_and_look(*error):
        group = weakref.ref(torch.distributed.group.WORLD)
        leave(*error)
        with open(f'{path}_{rank}', 'w') as f:
            f.write('there' if group() else 'gone')

    startup.leave = leave_and_look


def witness_timeout(rank, path):
    """Write into PATH_rank the timeout under which the ranks meet."""
    from training import startup
    join = startup.join

    def join_and_note(ranks, timeout_s):
        with open(f'{path}_{rank}', 'w') as f:
            f.write(str(timeout_s))
        join(ranks, timeout_s)

    startup.join = join_and_note
