"""AdamW with decay on matrices only, and the learning-rate schedules."""

import math

import torch


def build_optimizer(model, **options):
    """AdamW for the model's parameters; see `adamw`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return adamw(parameters, [p.dim() for p in parameters], **options)


def adamw(parameters, dims, *, learning_rate, weight_decay, betas, eps):
    """AdamW; weight decay on parameters of two or more dimensions only.

    Norm weights and biases are left out of the decay, as in GPT-3. `dims` are
    the dimensions that count: a parameter may be a flat part of a matrix. The
    fused kernel is taken wherever PyTorch has one for the device.
    """
    pairs = list(zip(parameters, dims, strict=True))
    groups = [
        {'params': [p for p, d in pairs if d >= 2],
         'weight_decay': weight_decay},
        {'params': [p for p, d in pairs if d < 2], 'weight_decay': 0.0},
    ]
    fused = {p.device.type for p in parameters} <= {'cpu', 'cuda', 'mps'}
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps,
                             fused=fused)


def learning_rate_at(step, *, schedule, learning_rate, min_lr, warmup_iters,
                     lr_decay_iters, wsd_decay_iters):
    """The learning rate of the update number `step`, counted from 0.

    Linear warm-up over `warmup_iters` updates, then `cosine` down to `min_lr`
    at `lr_decay_iters` (Loshchilov and Hutter 2017), or `wsd`: constant, then
    linear down to `min_lr` over the last `wsd_decay_iters` updates before
    `lr_decay_iters` (warm-up, stable, decay: Hu et al. 2024,
    https://arxiv.org/abs/2404.06395).
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / warmup_iters
    if step >= lr_decay_iters:
        return min_lr
    if schedule == 'cosine':
        done = (step - warmup_iters) / (lr_decay_iters - warmup_iters)
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        share = min(1.0, (lr_decay_iters - step) / max(1, wsd_decay_iters))
    return min_lr + share * (learning_rate - min_lr)
