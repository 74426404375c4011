"""Loss per token and bits per byte of a model on held-out documents."""

import math

import numpy as np
import torch

from training.device import autocast
from training.distributed import Ranks, sum_over_ranks


@torch.no_grad()
def evaluate(model, eval_set, *, batch_size, device, dtype, ranks=Ranks(),
             progress=None, stopped=lambda: False):
    """Score every token of `eval_set` once; returns (val_loss, val_bpb).

    val_loss is the mean negative log-likelihood in nats per token,
    end-of-text tokens included. val_bpb is their sum over ln 2 times the UTF-8
    bytes of the documents' text, so that tokenizers can be compared; None
    where the dataset does not record bytes. All ranks take part and get the
    same result. `progress` wraps the batches; None is returned as soon as
    `stopped()`, which must agree on all ranks.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    batches = eval_set.batches(batch_size, ranks.rank, ranks.world_size)
    for x, y in progress(batches) if progress else batches:
        if stopped():
            model.train(was_training)
            return None
        x, y = x.to(device), y.to(device)
        with autocast(device, dtype):
            _, loss = model(x, y, return_logits=False, reduction='sum')
        total += loss.cpu().double()  # MPS has no float64
    model.train(was_training)
    nats = sum_over_ranks(total).item()
    bpb = None if eval_set.bytes is None else (
        bits_per_byte(nats, eval_set.bytes))
    return nats / eval_set.tokens, bpb


def sliding_windows(n: int, context: int, stride: int):
    """(start, first, end) of windows over a stream of n + 1 tokens.

    The inputs of a window are start .. end, at most `context` of them; the
    targets of the inputs first .. end are scored in it. Each of the n targets
    is scored once, and sees at least context - stride + 1 tokens, or all that
    stand before it (Baevski and Auli 2019, section 4.3, https://arxiv.org/abs/
    1809.10853).
    """
    if not 1 <= stride <= context:
        raise ValueError(f'stride={stride} must lie in 1 .. {context}, the '
                         'tokens of a window')
    done = 0
    while done < n:
        end = min(done + stride if done else context, n)
        yield max(0, end - context), done, end
        done = end


@torch.no_grad()
def stream_nats(model, ids, *, context, stride, batch_size, device, dtype,
                progress=None) -> float:
    """Negative log-likelihood in nats of ids[1:], each given those before.

    `ids` (n + 1,) int64, `model` in evaluation mode; see sliding_windows.
    `progress` wraps the batches.
    """
    windows = list(sliding_windows(len(ids) - 1, context, stride))
    batches = range(0, len(windows), batch_size)
    total = torch.zeros((), dtype=torch.float64)
    for at in progress(batches) if progress else batches:
        batch = windows[at:at + batch_size]
        shape = len(batch), max(end - start for start, _, end in batch)
        x, y = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        for row, (start, first, end) in enumerate(batch):
            x[row, :end - start] = ids[start:end]
            y[row, first - start:end - start] = ids[first + 1:end + 1]
        x, y = (torch.from_numpy(a).to(device) for a in (x, y))
        with autocast(device, dtype):
            _, loss = model(x, y, return_logits=False, reduction='sum')
        total += loss.cpu().double()  # MPS has no float64
    return total.item()


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """nats / (ln 2 x bytes): Gao et al. 2020, section 3.1,
    https://arxiv.org/abs/2101.00027, with the sums in place of the means."""
    return nats / (math.log(2) * n_bytes)
