"""Loss per token and bits per byte of a model on held-out documents."""

import math

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
        total += loss.double().cpu()
    model.train(was_training)
    nats = sum_over_ranks(total).item()
    bpb = None if eval_set.bytes is None else (
        nats / (math.log(2) * eval_set.bytes))
    return nats / eval_set.tokens, bpb
