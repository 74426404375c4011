"""AdamW and the learning-rate schedules against computations by hand."""

import math

import numpy as np
import pytest
import torch

from model_builder import ConfigurableGPT
from model_config import PRESET_CONFIGS, get_preset_config
from training.optimizer import build_optimizer, learning_rate_at

SETTINGS = dict(learning_rate=3e-3, weight_decay=0.2, betas=(0.8, 0.9),
                eps=1e-3)


def tiny(preset, **kw):
    torch.manual_seed(0)
    return ConfigurableGPT(get_preset_config(
        preset, n_layer=2, n_head=4, n_embd=32, head_dim=8, d_ff=48,
        block_size=16, vocab_size=50, **kw))


@pytest.mark.parametrize('weight_tying', [True, False])
@pytest.mark.parametrize('preset', PRESET_CONFIGS)
def test_matrices_decay_and_vectors_do_not(preset, weight_tying):
    model = tiny(preset, weight_tying=weight_tying, bias=True)
    optimizer = build_optimizer(model, **SETTINGS)
    decay = {}
    for group in optimizer.param_groups:
        assert group['lr'] == 3e-3
        assert tuple(group['betas']) == (0.8, 0.9) and group['eps'] == 1e-3
        for parameter in group['params']:
            assert parameter not in decay     # a tied head is there once
            decay[parameter] = group['weight_decay']
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        vector = name.endswith('bias') or 'norm' in name or 'ln_f' in name
        assert decay[parameter] == (0.0 if vector else 0.2), name


def test_frozen_parameters_are_left_out():
    model = tiny('gpt2')
    model.wte.weight.requires_grad_(False)
    optimizer = build_optimizer(model, **SETTINGS)
    held = [p for g in optimizer.param_groups for p in g['params']]
    assert len(held) == len(list(model.parameters())) - 1


def adamw(p, grads, decay, lr=3e-3, beta1=0.8, beta2=0.9, eps=1e-3):
    """Loshchilov and Hutter 2019, algorithm 2, in fp64."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        p = p - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * p)
    return p


@pytest.mark.parametrize('n_steps', [1, 4])
def test_steps_equal_adamw_by_hand(n_steps):
    model = tiny('gpt2')
    optimizer = build_optimizer(model, **SETTINGS)
    rng = np.random.default_rng(0)
    before = {n: p.detach().double().numpy()
              for n, p in model.named_parameters()}
    grads = {n: rng.normal(0, 0.01, (n_steps, *p.shape))
             for n, p in before.items()}
    for step in range(n_steps):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(grads[name][step]).float()
        optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.2 if parameter.dim() > 1 else 0.0
        expected = adamw(before[name], grads[name], decay)
        np.testing.assert_allclose(parameter.detach().numpy(), expected,
                                   rtol=1e-5, atol=1e-7, err_msg=name)
        assert np.abs(expected - before[name]).max() > 1e-3


# a peak of 1.0, 10 updates of warm-up, the end at 110, min_lr 0.1
SCHEDULE = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=10,
                lr_decay_iters=110, wsd_decay_iters=20)
WARM_UP = [(0, 0.1), (1, 0.2), (4, 0.5), (9, 1.0)]
END = [(110, 0.1), (111, 0.1), (10**6, 0.1)]


@pytest.mark.parametrize('schedule, step, expected', [
    *[(s, *pair) for s in ('cosine', 'wsd') for pair in WARM_UP + END],
    ('cosine', 10, 1.0),
    ('cosine', 35, 0.1 + 0.9 * (0.5 + 0.25 * 2**0.5)),   # a quarter
    ('cosine', 60, 0.55),                                # half
    ('cosine', 85, 0.1 + 0.9 * (0.5 - 0.25 * 2**0.5)),
    ('cosine', 109, 0.1 + 0.9 * math.sin(math.pi / 200)**2),
    ('wsd', 10, 1.0), ('wsd', 50, 1.0), ('wsd', 90, 1.0),
    ('wsd', 91, 0.955), ('wsd', 100, 0.55), ('wsd', 109, 0.145),
])
def test_schedule(schedule, step, expected):
    lr = learning_rate_at(step, schedule=schedule, **SCHEDULE)
    assert lr == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
def test_schedule_rises_then_falls_within_its_bounds(schedule):
    rates = [learning_rate_at(step, schedule=schedule, **SCHEDULE)
             for step in range(150)]
    assert all(a <= b for a, b in zip(rates[:10], rates[1:11]))
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert max(rates) == 1.0 and min(rates) == 0.1


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
@pytest.mark.parametrize('change, step, expected', [
    (dict(warmup_iters=0), 0, 1.0),
    (dict(warmup_iters=0, lr_decay_iters=1, wsd_decay_iters=1), 0, 1.0),
    (dict(warmup_iters=0, lr_decay_iters=1, wsd_decay_iters=0), 1, 0.1),
    (dict(warmup_iters=110), 109, 1.0),   # warm-up up to the end
    (dict(warmup_iters=110), 110, 0.1),
    (dict(min_lr=0.0), 110, 0.0),
    (dict(min_lr=1.0), 60, 1.0),
])
def test_schedule_at_its_limits(schedule, change, step, expected):
    lr = learning_rate_at(step, schedule=schedule, **SCHEDULE | change)
    assert lr == pytest.approx(expected, rel=1e-12)
