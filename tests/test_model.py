"""Positions, attention, blocks, initialisation, generation, compilation.

Equality with transformers is in test_parity.py.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model_builder import ConfigurableGPT
from model_components import (
    ATTENTION_BACKENDS,
    RoPEPositionEncoding,
    attention_in_use,
)
from model_config import CHOICES, get_preset_config
from model_generation import draw

THETAS = [1e4, 5e5, 1e6]
V = 61


def tiny(preset='llama3', seed=0, **kw):
    values = dict(n_layer=2, n_head=4, n_embd=32, head_dim=8, d_ff=48,
                  block_size=24, vocab_size=V, attention_backend='sdpa')
    torch.manual_seed(seed)
    return ConfigurableGPT(get_preset_config(preset, **values | kw))


def perturbed(preset='llama3', std=0.2, **kw):
    """Weights large enough that every part shows in the logits."""
    model = tiny(preset, **kw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def tokens(batch=2, length=24, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, V, (batch, length), generator=g)


# --- RoPE ------------------------------------------------------------------

def exact_turn(x, positions, inv_freq):
    """RoPE in fp64, as multiplication of complex numbers."""
    x = np.asarray(x, np.float64)                       # (T, D)
    half = x.shape[-1] // 2
    pairs = x[:, :half] + 1j * x[:, half:]              # i with i + D/2
    pairs = pairs * np.exp(1j * np.outer(positions, inv_freq))
    return np.concatenate([pairs.real, pairs.imag], -1)


def exact_inv_freq(dim, theta):
    return np.float64(theta) ** (-np.arange(0, dim, 2) / dim)


@pytest.mark.parametrize('dim', [64, 128])
@pytest.mark.parametrize('theta', THETAS)
def test_rope_tables_against_fp64(theta, dim):
    """An fp32 angle is off by its own rounding, angle * 2^-24, and by that of
    inv_freq: the rounded exponent times ln(theta), and 3 roundings."""
    T = 32768
    rope = RoPEPositionEncoding(dim, T, theta)
    exponents = np.arange(0, dim, 2) / dim
    inv_freq = exact_inv_freq(dim, theta)
    relative = 2.0**-24 * (exponents * math.log(theta) + 4)
    assert (rope.dim, rope.max_seq_len, rope.theta) == (dim, T, theta)
    assert rope.inv_freq.dtype == rope.cos.dtype == torch.float32
    assert rope.cos.shape == rope.sin.shape == (T, dim // 2)
    assert (np.abs(rope.inv_freq.numpy() / inv_freq - 1) <= relative).all()

    angles = np.outer(np.arange(T), inv_freq)
    tolerance = angles * relative + 2.0**-23
    for table, truth in (rope.cos, np.cos(angles)), (rope.sin, np.sin(angles)):
        assert (np.abs(table.numpy() - truth) <= tolerance).all()  # no NaN
    assert tolerance.max() < 0.02


@pytest.mark.parametrize('theta', THETAS)
def test_rope_turns_pairs_by_the_angle(theta):
    dim, T = 32, 32768
    rope = RoPEPositionEncoding(dim, T, theta)
    x = torch.randn(1, T, 2, dim, generator=torch.Generator().manual_seed(0))
    y = rope(x)
    assert y.shape == x.shape and y.dtype == torch.float32
    assert y.isfinite().all()
    truth = exact_turn(x[0, :, 1], np.arange(T), exact_inv_freq(dim, theta))
    # |x| <= 5.5, an angle is off by at most 0.01 (see above), mostly by none
    error = np.abs(y[0, :, 1].numpy() - truth)
    assert error.max() < 0.06
    assert np.median(error) < 1e-5
    assert error[:100].max() < 2e-4
    torch.testing.assert_close(y[:, 0], x[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize('theta', THETAS)
def test_rope_products_depend_on_the_distance_alone(theta):
    dim, T = 64, 32768
    rope = RoPEPositionEncoding(dim, T, theta)
    q, k = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))
    turned_q = rope(q.expand(1, T, 1, dim))[0, :, 0]
    turned_k = rope(k.expand(1, T, 1, dim))[0, :, 0]
    for distance in (0, 1, 7, 1000):
        products = (turned_q[distance:] * turned_k[:T - distance]).sum(-1)
        truth = exact_turn(q[None], [distance], exact_inv_freq(dim, theta))
        truth = (truth[0] * k.numpy()).sum()
        # |q| |k| is about 64, of which angles take 0.01 at most
        assert (products - truth).abs().max() < 0.05
        assert (products[:2000] - truth).abs().max() < 5e-3
    far = (turned_q[1000] * turned_k[0]).sum()
    assert (far - (q * k).sum()).abs() > 1   # and on the distance it does


def test_rope_keeps_the_dtype_and_computes_in_fp32():
    rope = RoPEPositionEncoding(16, 4096)
    x = torch.randn(1, 4096, 1, 16, generator=torch.Generator().manual_seed(0))
    y = rope(x.bfloat16())
    assert y.dtype == torch.bfloat16
    # one rounding of the input's fp32 result, not of the angles
    expected = rope(x.bfloat16().float()).bfloat16()
    assert torch.equal(y, expected)


def llama31_inv_freq(dim, theta, scaling):
    """The rule of Llama 3.1, one frequency at a time."""
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    original = scaling['original_max_position_embeddings']
    result, regions = [], set()
    for freq in exact_inv_freq(dim, theta):
        wavelength = 2 * math.pi / freq
        if wavelength < original / high:
            result.append(freq)
            regions.add('kept')
        elif wavelength > original / low:
            result.append(freq / scaling['factor'])
            regions.add('slowed')
        else:
            share = (original / wavelength - low) / (high - low)
            result.append((1 - share) * freq / scaling['factor']
                          + share * freq)
            regions.add('between')
    return np.array(result), regions


@pytest.mark.parametrize('dim, theta, factor, low, high, original', [
    (128, 5e5, 8.0, 1.0, 4.0, 8192),     # Llama 3.1
    (64, 5e5, 32.0, 1.0, 4.0, 8192),     # Llama 3.2 1B
    (128, 1e4, 4.0, 2.0, 16.0, 2048),
])
def test_llama3_rope_scaling(dim, theta, factor, low, high, original):
    scaling = dict(rope_type='llama3', factor=factor, low_freq_factor=low,
                   high_freq_factor=high,
                   original_max_position_embeddings=original)
    model = tiny(n_layer=1, head_dim=dim, rope_theta=theta, block_size=20,
                 rope_scaling=scaling)
    expected, regions = llama31_inv_freq(dim, theta, scaling)
    assert regions == {'kept', 'slowed', 'between'}
    inv_freq = model.rope.inv_freq.double().numpy()
    # between, the difference from `low` loses digits: a few 1e-6
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-5)
    np.testing.assert_allclose(
        model.rope.cos.numpy(), np.cos(np.outer(np.arange(20), expected)),
        atol=2e-5)


@pytest.mark.parametrize('preset', ['llama2', 'llama3', 'qwen3'])
def test_rope_of_a_model(preset):
    config = get_preset_config(preset)
    with torch.device('meta'):
        model = ConfigurableGPT(config)
    rope = model.rope
    assert (rope.dim, rope.max_seq_len, rope.theta) == (
        config.head_dim, config.block_size, config.rope_theta)
    assert rope.inv_freq.dtype == torch.float32
    assert [k for k in model.state_dict() if 'rope' in k or 'freq' in k] == []
    assert rope.cos.shape == rope.sin.shape == (
        config.block_size, config.head_dim // 2)


# --- attention -------------------------------------------------------------

def exact_attention(q, k, v):
    """One query at a time, in fp64."""
    q, k, v = (t.double() for t in (q, k, v))
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    y = torch.zeros_like(q)
    for h in range(H):
        kv = h * K // H                      # H / K neighbours share one
        for t in range(T):
            seen = t + S - T + 1
            scores = torch.einsum('bd,bsd->bs', q[:, t, h], k[:, :seen, kv])
            weights = (scores / D**0.5).softmax(-1)
            y[:, t, h] = torch.einsum('bs,bsd->bd', weights, v[:, :seen, kv])
    return y


@pytest.mark.parametrize('backend', CHOICES['attention_backend'])
@pytest.mark.parametrize('T, S', [(1, 1), (9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize('H, K', [(4, 4), (4, 2), (6, 1)])
def test_attention(backend, H, K, T, S):
    """MHA, GQA and MQA; T < S are queries behind a cache of keys."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, T, H, 8, generator=g)
    k, v = torch.randn(2, 2, S, K, 8, generator=g)
    truth = exact_attention(q, k, v)
    y = ATTENTION_BACKENDS[backend](q, k, v, 0.0)
    assert y.shape == q.shape and y.dtype == torch.float32
    assert (y - truth).abs().max() < 1e-6
    half = ATTENTION_BACKENDS[backend](
        q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.0)
    assert half.dtype == torch.bfloat16
    assert (half - truth).abs().max() < 0.05
    with_grad = ATTENTION_BACKENDS[backend](
        q.bfloat16().requires_grad_(), k.bfloat16(), v.bfloat16(), 0.0)
    assert with_grad.dtype == torch.bfloat16
    assert (with_grad - truth).abs().max() < 0.05


@pytest.mark.parametrize('preset, kw', [
    ('gpt2', {}), ('llama3', dict(num_key_value_heads=1)), ('qwen3', {})])
def test_backends_agree_in_a_model(preset, kw):
    x, y = tokens(), tokens(seed=2)
    results = []
    for backend in CHOICES['attention_backend']:
        model = perturbed(preset, attention_backend=backend, **kw)
        logits, loss = model(x, y)
        loss.backward()
        results.append((logits, model.wte.weight.grad))
    for logits, grad in results[1:]:
        torch.testing.assert_close(logits, results[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('backend', CHOICES['attention_backend'])
@pytest.mark.parametrize('preset', ['gpt2', 'llama3', 'qwen3'])
def test_causality_to_the_bit(preset, backend):
    model = perturbed(preset, attention_backend=backend).eval()
    x = tokens()
    before = model(x)[0]
    for t in (1, 10, 23):
        changed = x.clone()
        changed[:, t:] = (changed[:, t:] + 1) % V
        after = model(changed)[0]
        assert torch.equal(after[:, :t], before[:, :t])
        # every later position sees the change
        assert ((after - before)[:, t:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize('n_kv', [1, 2])
def test_gqa_equals_mha_with_repeated_weights(n_kv):
    gqa = perturbed(num_key_value_heads=n_kv)
    mha = tiny(num_key_value_heads=4)
    state = gqa.state_dict()
    for name in [n for n in state if 'qkv' in n]:
        q, k, v = state[name].view(-1, 8, 32).split((4, n_kv, n_kv))
        k, v = (t.repeat_interleave(4 // n_kv, dim=0) for t in (k, v))
        state[name] = torch.cat((q, k, v)).flatten(0, 1)
    mha.load_state_dict(state)
    x = tokens()
    torch.testing.assert_close(gqa(x)[0], mha(x)[0], rtol=1e-5, atol=1e-5)


def test_qk_norm_takes_out_the_scale_of_q_and_k():
    x = tokens()
    for qk_norm in (True, False):
        model = perturbed('qwen3', n_layer=1, qk_norm=qk_norm)
        before = model(x)[0]
        with torch.no_grad():
            model.h[0].attn.qkv.weight[:-2 * 8].mul_(3)   # q and k, not v
        difference = (model(x)[0] - before).abs().max().item()
        assert (difference < 1e-3) == qk_norm
    attn = perturbed('qwen3', n_layer=1).h[0].attn
    assert attn.q_norm.weight.shape == attn.k_norm.weight.shape == (8,)
    assert attn.q_norm is not attn.k_norm


def test_qk_norm_normalises_each_head():
    attn = tiny('qwen3', n_layer=1).h[0].attn
    seen = {}
    for name in ('q_norm', 'k_norm'):
        getattr(attn, name).register_forward_hook(
            lambda module, _, out, name=name: seen.update({name: out}))
    attn(torch.randn(2, 5, 32))
    assert seen['q_norm'].shape == (2, 5, 4, 8)
    assert seen['k_norm'].shape == (2, 5, 2, 8)
    for out in seen.values():
        torch.testing.assert_close(out.square().mean(-1),
                                   torch.ones(out.shape[:-1]),
                                   rtol=0.05, atol=0)


@pytest.mark.parametrize('request_, device, dtype, expected', [
    ('sdpa', 'cuda', torch.bfloat16, 'sdpa'),
    ('eager', 'cpu', torch.float32, 'eager'),
    ('flash_attn_2', 'cpu', torch.bfloat16, 'sdpa'),
    ('flash_attn_2', 'cuda', torch.float32, 'sdpa'),
])
def test_attention_in_use(request_, device, dtype, expected):
    name, reason = attention_in_use(request_, device, dtype)
    assert name == expected
    assert (reason == 'as configured') == (name == request_)


# --- blocks and choices ----------------------------------------------------

def test_norms_by_hand():
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)) * 4
    for normalization in CHOICES['normalization']:
        norm = perturbed(normalization=normalization, bias=True,
                         norm_eps=0.5).ln_f
        centred = x - x.mean(-1, keepdim=True) * (
            normalization == 'layernorm')
        y = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt()
        y = y * norm.weight + getattr(norm, 'bias', torch.zeros(32))
        torch.testing.assert_close(norm(x), y)
        assert norm(x.bfloat16()).dtype == torch.bfloat16
        # statistics in fp32: the output is rounded once
        assert torch.equal(norm(x.bfloat16()),
                           norm(x.bfloat16().float()).bfloat16())


def test_bias_belongs_to_linear_layers_and_layernorm():
    names = {bias: {n for n, _ in tiny('gpt2', bias=bias).named_parameters()}
             for bias in (True, False)}
    assert not any('bias' in n for n in names[False])
    assert {n.removeprefix('h.0.') for n in names[True] - names[False]
            if not n.startswith('h.1.')} == {
        'attn_norm.bias', 'attn.qkv.bias', 'attn.proj.bias', 'ffn_norm.bias',
        'ffn.up.bias', 'ffn.down.bias', 'ln_f.bias'}


def test_pre_norm_keeps_the_stream_and_post_norm_normalises_it():
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    pre = perturbed(norm_position='pre', n_layer=1)
    post = perturbed(norm_position='post', n_layer=1)
    pre.h.load_state_dict(post.h.state_dict())
    (a,), (b,) = pre.h, post.h
    middle = x + a.attn(a.attn_norm(x), pre.rope)
    torch.testing.assert_close(a(x, pre.rope),
                               middle + a.ffn(a.ffn_norm(middle)))
    middle = b.attn_norm(x + b.attn(x, post.rope))
    torch.testing.assert_close(b(x, post.rope),
                               b.ffn_norm(middle + b.ffn(middle)))
    # a block that ends in a norm needs no other behind it
    assert not any('ln_f' in n for n, _ in post.named_parameters())
    assert pre.ln_f.weight.shape == (32,)
    hidden = tiny(norm_position='post').hidden_states(tokens())
    torch.testing.assert_close(hidden.square().mean(-1), torch.ones(2, 24),
                               rtol=1e-2, atol=0)


REFERENCE_ACTIVATIONS = {
    'gelu': lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    'gelu_tanh': lambda x: 0.5 * x * (1 + torch.tanh(
        (2 / math.pi)**0.5 * (x + 0.044715 * x**3))),
    'silu': lambda x: x / (1 + torch.exp(-x)),
    'relu': lambda x: x.clamp(min=0),
}


@pytest.mark.parametrize('ffn_type', CHOICES['ffn_type'])
@pytest.mark.parametrize('activation', CHOICES['activation'])
def test_feed_forward_by_hand(activation, ffn_type):
    ffn = perturbed(activation=activation, ffn_type=ffn_type, bias=True,
                    d_ff=40).h[0].ffn
    act = REFERENCE_ACTIVATIONS[activation]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    if ffn_type == 'swiglu':
        w, b = ffn.gate_up.weight, ffn.gate_up.bias
        y = act(x @ w[:40].T + b[:40]) * (x @ w[40:].T + b[40:])
    else:
        y = act(x @ ffn.up.weight.T + ffn.up.bias)
    y = y @ ffn.down.weight.T + ffn.down.bias
    torch.testing.assert_close(ffn(x), y, rtol=1e-5, atol=1e-5)
    assert act(x).min() < 0 or activation == 'relu'


SWITCHES = {'bias': (True, False), 'qk_norm': (True, False),
            'weight_tying': (True, False), 'num_key_value_heads': (1, 2, 4)}


@pytest.mark.parametrize('field, choice', [
    (field, choice) for field, choices in (CHOICES | SWITCHES).items()
    for choice in choices])
@pytest.mark.parametrize('preset', ['gpt2', 'llama3'])
def test_every_choice_trains(preset, field, choice):
    model = perturbed(preset, dropout=0.1, **{field: choice})
    assert getattr(model.config, field) == choice
    logits, loss = model(tokens(), tokens(seed=2))
    assert logits.shape == (2, 24, V) and logits.isfinite().all()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize('field', ['normalization', 'activation', 'qk_norm',
                                   'position_encoding', 'norm_position',
                                   'rope_theta', 'norm_eps'])
def test_a_choice_changes_the_function(field):
    """The same weights, another choice, other logits."""
    values = (CHOICES | SWITCHES | {'rope_theta': (1e4, 5e5),
                                    'norm_eps': (1e-5, 1e-1)})[field]
    base = perturbed(**{field: values[0]})
    for value in values[1:]:
        other = tiny(**{field: value})
        other.load_state_dict(base.state_dict(), strict=False)
        # the two forms of GELU differ by 1e-3, the others by 0.1 and more
        assert (other(tokens())[0] - base(tokens())[0]).abs().max() > 5e-4


@pytest.mark.parametrize('backend', CHOICES['attention_backend'])
def test_dropout_is_active_in_training_only(backend):
    model = perturbed(dropout=0.5, attention_backend=backend)
    reference = tiny(dropout=0.0, attention_backend=backend)
    reference.load_state_dict(model.state_dict())
    x = tokens()
    model.eval()
    assert torch.equal(model(x)[0], reference(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])
    torch.manual_seed(3)
    first = model(x)[0]
    torch.manual_seed(3)
    assert torch.equal(model(x)[0], first)
    # each place alone: embedding, both residual branches, attention weights
    drops = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.p for m in drops] == [0.5] * (1 + 2 * 2)
    places = [(m, 'p') for m in drops] + [(b.attn, 'dropout') for b in model.h]
    for active in places:
        for module, name in places:
            setattr(module, name, 0.5 if (module, name) == active else 0.0)
        assert not torch.equal(model(x)[0], reference(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], reference(x)[0])


def test_checkpointed_blocks_compute_the_same():
    results = []
    for checkpointed in (False, True):
        model = perturbed(dropout=0.2)
        runs = []
        model.h[0].ffn.register_forward_pre_hook(
            lambda *_, runs=runs: runs.append(1))
        if checkpointed:
            model.checkpoint_blocks()
        torch.manual_seed(4)
        loss = model(tokens(), tokens(seed=2), return_logits=False)[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        assert len(runs) == (2 if checkpointed else 1)  # once more, backward
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


# --- initialisation --------------------------------------------------------

@pytest.mark.parametrize('preset, tying', [
    ('gpt2', True), ('gpt2', False), ('llama3', True), ('llama3', False)])
def test_initial_weights(preset, tying):
    n_layer = 8
    model = tiny(preset, n_layer=n_layer, n_embd=128, d_ff=256, head_dim=32,
                 vocab_size=600, block_size=128, weight_tying=tying)
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert (p == 0).all(), name
        elif 'norm' in name or 'ln_f' in name:
            assert (p == 1).all(), name
        else:
            residual = name.endswith(('attn.proj.weight', 'ffn.down.weight'))
            std = 0.02 / math.sqrt(2 * n_layer) if residual else 0.02
            # 16,384 draws or more: a standard error of 0.6 %
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < 0.04 * std, name
            # a normal distribution has 68.3 % within one sigma
            within = (p.abs() < std).float().mean().item()
            assert within == pytest.approx(0.683, abs=0.02), name


def test_seeds_reproduce():
    a, b, c = tiny(seed=5), tiny(seed=5), tiny(seed=6)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(),
                               c.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.dim() < 2 or not torch.equal(p, r), name


def test_tied_weights_are_one_tensor_counted_once():
    tied, untied = tiny(weight_tying=True), tiny(weight_tying=False)
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight
    assert not torch.equal(untied.lm_head.weight, untied.wte.weight)
    assert untied.get_num_params() - tied.get_num_params() == V * 32
    assert tied.get_num_params(True) == untied.get_num_params(True)


def test_parameters_by_hand():
    # llama3: norm 32, q 32x32, k and v 32x8 each, proj 32x32, norm 32,
    # gate, up, down 32x48 each
    block = 32 + 32 * 32 + 2 * 32 * 8 + 32 * 32 + 32 + 3 * 32 * 48
    model = tiny(weight_tying=False)
    assert model.get_num_params(non_embedding=True) == 2 * block + 32
    assert model.get_num_params() == 2 * block + 32 + 2 * V * 32
    # gpt2: as above with biases, and positions
    block = 4 * (32 * 32 + 32) + 2 * 32 * 48 + 48 + 32 + 4 * 32
    model = tiny('gpt2')
    assert model.get_num_params(non_embedding=True) == 2 * block + 64
    assert model.get_num_params() == 2 * block + 64 + V * 32 + 24 * 32


# --- forward ---------------------------------------------------------------

@pytest.mark.parametrize('preset', ['gpt2', 'llama3'])
def test_a_sequence_beyond_block_size_is_refused(preset):
    model = tiny(preset, block_size=7)
    assert model(tokens(length=7))[0].shape == (2, 7, V)
    with pytest.raises(ValueError, match='8 tokens.*block_size=7'):
        model(tokens(length=8))


def test_bf16_autocast_keeps_the_weights_and_the_loss_in_fp32():
    model = perturbed(std=0.05)
    x, y = tokens(), tokens(seed=2)
    exact = model(x, y)[1].item()
    with torch.autocast('cpu', torch.bfloat16):
        assert model.hidden_states(x).dtype == torch.bfloat16
        losses = [model(x, y)[1], model(x, y, return_logits=False)[1]]
    for loss in losses:
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact, rel=5e-3)
    losses[1].backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# --- generation ------------------------------------------------------------

def with_head_bias(model, bias):
    """The same model whose logits have `bias` (V,) added."""
    head = torch.nn.Linear(32, V)
    head.weight = model.lm_head.weight
    head.bias = torch.nn.Parameter(bias)
    model.lm_head = head
    return model.eval()


def rng(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('preset', ['gpt2', 'llama3'])
def test_temperature_0_takes_the_likeliest_and_crops_the_context(preset):
    model = perturbed(preset, block_size=8).eval()
    start = tokens(length=3)
    out = model.generate(start, 20, temperature=0)
    assert out.shape == (2, 23) and torch.equal(out[:, :3], start)
    expected = start
    start_of_context = 0
    for _ in range(20):
        if expected.shape[1] - start_of_context > 8:
            start_of_context += 2  # a quarter of a block
        logits = model(expected[:, start_of_context:])[0][:, -1]
        expected = torch.cat((expected, logits.argmax(-1)[:, None]), 1)
    assert torch.equal(out, expected)
    assert len(out[0].unique()) > 3
    # top_k=1 is the same
    assert torch.equal(model.generate(start, 20, top_k=1), expected)
    # a prompt may be longer than the context
    long = tokens(length=30)
    assert torch.equal(model.generate(long, 1, temperature=0)[:, -1],
                       model(long[:, -8:])[0][:, -1].argmax(-1))


@pytest.mark.parametrize('options', [
    dict(temperature=0), dict(), dict(temperature=5.0), dict(top_k=60),
    dict(top_p=0.99), dict(top_k=61, top_p=1.0)])
def test_padding_rows_are_never_drawn(options):
    bias = torch.zeros(V)
    bias[50:] = 1e6
    model = with_head_bias(perturbed(), bias)
    out = model.generate(tokens(length=2), 40, n_ids=50, generator=rng(0),
                         **options)
    assert out[:, 2:].max() < 50
    free = model.generate(tokens(length=2), 5, generator=rng(0), **options)
    assert free[:, 2:].min() >= 50   # without n_ids they would be


def test_generation_ends_when_every_row_has_drawn_eos():
    bias = torch.zeros(V)
    bias[7] = 2.5                    # about one token in six
    model = with_head_bias(tiny(), bias)
    lengths = set()
    for seed in range(5):
        out = model.generate(torch.zeros(3, 1, dtype=torch.long), 200,
                             eos_id=7, generator=rng(seed))
        seen = (out[:, 1:] == 7).cumsum(1) > 0   # (B, new)
        assert seen[:, -1].all() and not seen[:, -2].all()
        lengths.add(out.shape[1])
    assert len(lengths) > 1
    full = model.generate(torch.zeros(3, 1, dtype=torch.long), 200,
                          generator=rng(0))
    assert full.shape == (3, 201)
    # an eos in the prompt ends nothing
    prompt = torch.tensor([[7, 0]])
    bias.data[7] = -1e6
    assert model.generate(prompt, 9, eos_id=7).shape == (1, 11)


def test_the_generator_alone_decides():
    model = perturbed(std=0.05).eval()
    start = tokens(length=2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a = model.generate(start, 30, generator=rng(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(a, model.generate(start, 30, generator=rng(1)))
    assert not torch.equal(a, model.generate(start, 30, generator=rng(2)))
    assert not a.requires_grad


PROBS = torch.tensor([0.05, 0.5, 0.15, 0.3])


def shares(n=4000, probs=PROBS, **options):
    """Share of each id in n draws."""
    drawn = draw(probs.log().expand(n, -1), generator=rng(0), **options)
    assert drawn.shape == (n, 1) and drawn.dtype == torch.int64
    return torch.bincount(drawn[:, 0], minlength=len(probs)) / n


@pytest.mark.parametrize('options, expected', [
    (dict(), [0.05, 0.5, 0.15, 0.3]),
    (dict(top_p=1.0), [0.05, 0.5, 0.15, 0.3]),
    (dict(top_p=0.96), [0.05, 0.5, 0.15, 0.3]),
    (dict(top_p=0.94), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
    (dict(top_p=0.81), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
    (dict(top_p=0.79), [0, 0.625, 0, 0.375]),
    (dict(top_p=0.51), [0, 0.625, 0, 0.375]),
    (dict(top_p=0.49), [0, 1, 0, 0]),
    (dict(top_p=1e-9), [0, 1, 0, 0]),
    (dict(top_p=0.0), [0, 1, 0, 0]),   # the likeliest always stays
    (dict(top_k=1), [0, 1, 0, 0]),
    (dict(top_k=2), [0, 0.625, 0, 0.375]),
    (dict(top_k=3), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
    (dict(top_k=400), [0.05, 0.5, 0.15, 0.3]),
    (dict(temperature=0), [0, 1, 0, 0]),
    (dict(temperature=0.5), [0.0068, 0.6849, 0.0616, 0.2466]),  # p^2
    (dict(temperature=2.0), [0.1205, 0.3810, 0.2087, 0.2952]),  # sqrt(p)
    # 0.6849 alone reaches 0.6 once the temperature has been applied
    (dict(temperature=0.5, top_p=0.6), [0, 1, 0, 0]),
])
def test_draw(options, expected):
    expected = torch.tensor(expected)
    found = shares(**options)
    assert torch.equal(found > 0, expected > 0)
    # 4,000 draws: three standard errors are 0.024
    assert (found - expected).abs().max() < 0.025


def test_top_k_keeps_k_even_among_equals():
    found = shares(probs=torch.full((6,), 1 / 6), top_k=2)
    assert (found > 0).sum() == 2


def test_draw_treats_rows_apart():
    logits = torch.tensor([[0.0, 9.0, 1.0], [9.0, 0.0, 1.0], [1.0, 0.0, 9.0]])
    for options in (dict(top_p=0.9), dict(top_k=1), dict(temperature=0)):
        assert draw(logits, **options).tolist() == [[1], [0], [2]]


# --- torch.compile ---------------------------------------------------------

@pytest.mark.slow
def test_compiles_whole_and_equals_eager(monkeypatch):
    import model_components
    monkeypatch.setitem(model_components.LOSS_CHUNK_ROWS, 'cpu', 20)  # 2 chunks
    model = tiny(n_layer=1, block_size=16, attention_backend='flash_attn_2')
    x, y = tokens(length=16), tokens(length=16, seed=2)
    y[0, :3] = -1
    results = []
    for forward in (model, torch.compile(model, fullgraph=True,
                                         dynamic=False)):
        model.zero_grad()
        _, loss = forward(x, y, return_logits=False)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_the_model_is_not_zero():
    """Guards the comparisons above: logits and loss are of the usual size."""
    model = perturbed()
    logits, loss = model(tokens(), tokens(seed=2))
    assert logits.std() > 0.5
    uniform = F.cross_entropy(torch.zeros(1, V), torch.zeros(1).long())
    assert tiny()(tokens(), tokens(seed=2))[1].item() == pytest.approx(
        uniform.item(), abs=0.1)
