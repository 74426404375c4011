"""The parts a block is built from: norms, positions, attention, feed-forward,
and the loss.

Shapes: B batch, T time, C width (n_embd), H query heads, K key/value heads,
D head size, F feed-forward width (d_ff), V vocabulary rows, N = B*T.

To add a choice, write one class (or function) and one line in its dictionary,
and name it in CHOICES of model_config.py.
"""

import functools
import importlib.util
import math

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model_config import ModelArchitectureConfig

# --- norms -----------------------------------------------------------------


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    Statistics in fp32 whatever the input; the output has the input's dtype.
    `bias` False leaves the bias out, which nn.LayerNorm did not allow when
    GPT-2 training scripts took up this class.
    """

    def __init__(self, dim: int, eps: float, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x):
        bias = None if self.bias is None else self.bias.float()
        y = F.layer_norm(x.float(), self.weight.shape, self.weight.float(),
                         bias, self.eps)
        return y.type_as(x)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. Statistics in
    fp32 whatever the input; the output has the input's dtype. It has no bias.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        # with one dtype for input and weight PyTorch takes its fused kernel;
        # FSDP hands over weights in bf16
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(),
                       self.eps)
        return y.type_as(x)


NORMALIZATIONS = {
    'layernorm': lambda dim, c: LayerNorm(dim, c.norm_eps, c.bias),
    'rmsnorm': lambda dim, c: RMSNorm(dim, c.norm_eps),
}


def build_norm(config: ModelArchitectureConfig, dim: int) -> nn.Module:
    return NORMALIZATIONS[config.normalization](dim, config)


# --- positions -------------------------------------------------------------


def llama3_scaled(inv_freq, scaling: dict):
    """Slow the low frequencies of RoPE by `factor`, as Llama 3.1 does.

    Wavelengths below original_max / high_freq_factor stay, those above
    original_max / low_freq_factor are stretched by `factor`, and those between
    are interpolated. inv_freq (D/2,) fp32. Source: Grattafiori et al. 2024,
    section 3.2 and the released configurations of Llama 3.1 and 3.2.
    """
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    original = scaling['original_max_position_embeddings']
    wavelength = 2 * math.pi / inv_freq
    slowed = inv_freq / scaling['factor']
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed + smooth * inv_freq
    result = torch.where(wavelength > original / low, slowed, between)
    return torch.where(wavelength < original / high, inv_freq, result)


class RoPEPositionEncoding(nn.Module):
    """Rotary positions: turns q and k by an angle that grows with position.

    Su et al. 2021, https://arxiv.org/abs/2104.09864; dimension i is paired
    with i + dim/2, as in the released LLaMA and Qwen weights on the hub.
    `dim` is the head size D, `inv_freq` (D/2,) and the tables `cos` and `sin`
    (max_seq_len, D/2) are fp32, and none of them is saved with the weights.
    """

    def __init__(self, dim, max_seq_len, theta=10000.0, scaling=None):
        super().__init__()
        self.dim = dim
        self.max_seq_len = max_seq_len
        self.theta = theta
        exponents = torch.arange(0, dim, 2).float()
        inv_freq = 1.0 / (theta ** (exponents / dim))
        if scaling:
            inv_freq = llama3_scaled(inv_freq, scaling)
        angles = torch.outer(torch.arange(max_seq_len).float(), inv_freq)
        self.register_buffer('inv_freq', inv_freq, persistent=False)
        self.register_buffer('cos', angles.cos(), persistent=False)
        self.register_buffer('sin', angles.sin(), persistent=False)

    def forward(self, x):
        """Turn x (B, T, heads, D) for positions 0..T-1; same dtype.

        The rotation is computed in fp32: in bf16 the angles of neighbouring
        positions would fall together at long contexts.
        """
        T = x.shape[1]
        return turn(x, self.cos[:T, None, :], self.sin[:T, None, :])

    def at(self, positions):
        """The same for other positions, (T,) or (B, T) int64: a function."""
        cos, sin = self.cos[positions], self.sin[positions]  # (..., T, D/2)
        return functools.partial(turn, cos=cos[..., None, :],
                                 sin=sin[..., None, :])


def turn(x, cos, sin):
    """x (B, T, heads, D) by angles whose cos and sin are (..., T, 1, D/2)."""
    x1, x2 = x.float().chunk(2, dim=-1)                 # (B, T, heads, D/2)
    turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return turned.type_as(x)


def build_rope(config: ModelArchitectureConfig) -> nn.Module | None:
    if config.position_encoding != 'rope':
        return None
    return RoPEPositionEncoding(config.head_dim, config.block_size,
                                config.rope_theta, config.rope_scaling)


# --- attention -------------------------------------------------------------
# each: q (B, T, H, D), k and v (B, S, K, D), S >= T -> (B, T, H, D), causal:
# query t sees keys up to t + S - T, or what mask (B, 1, T, S) bool has True


def sdpa_attention(q, k, v, dropout, mask=None):
    """PyTorch's scaled_dot_product_attention; keys are not repeated for GQA."""
    dtype = q.dtype
    if q.device.type == 'cpu' and dtype == torch.bfloat16 and q.requires_grad:
        # the CPU kernel's bf16 backward takes 4 to 6 times as long as fp32
        # (RESULTS.md, "Attention on a CPU")
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))        # (B, heads, T, D)
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if mask is None and 1 < T < S:
        # a chunk after a cache: is_causal would align top left
        mask = causal_mask(T, S, q.device)
    if T == 1 and H != K:
        # one query a head: those of a group are a sequence to their keys,
        # which the CPU's kernel would otherwise copy for each of them
        q = q.view(B, K, H // K, D)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout,
        is_causal=mask is None and T > 1, enable_gqa=q.shape[1] != k.shape[1])
    return y.reshape(B, H, T, D).transpose(1, 2).to(dtype)


def eager_attention(q, k, v, dropout, mask=None):
    """softmax(q k^T / sqrt(D)) v written out, softmax in fp32; for reading,
    counting FLOPs and checking the others."""
    group = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(group, dim=2)
    v = v.repeat_interleave(group, dim=2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))        # (B, H, T, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    scores = scores.masked_fill(~mask, float('-inf'))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return (weights @ v).transpose(1, 2)


def flash_attention(q, k, v, dropout, mask=None):
    """The flash-attn package's FlashAttention-2, else PyTorch's SDPA.

    What runs is decided by `attention_in_use`, which the run prints; a mask,
    which only generation from padded prompts has, the package cannot take.
    """
    if mask is not None or attention_in_use(
            'flash_attn_2', q.device.type, q.dtype)[0] == 'sdpa':
        return sdpa_attention(q, k, v, dropout, mask)
    from flash_attn import flash_attn_func
    return flash_attn_func(q, k, v, dropout_p=dropout, causal=True)


def causal_mask(T, S, device):
    """(T, S) bool, True where query t may see key s."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


ATTENTION_BACKENDS = {
    'flash_attn_2': flash_attention,
    'sdpa': sdpa_attention,
    'eager': eager_attention,
}


# looked up once: torch.compile does not trace the search for a package
FLASH_ATTN_INSTALLED = importlib.util.find_spec('flash_attn') is not None


def attention_in_use(backend: str, device_type: str,
                     dtype: torch.dtype) -> tuple[str, str]:
    """(name, reason) of the attention that really runs for a request."""
    if backend != 'flash_attn_2':
        return backend, 'as configured'
    if device_type != 'cuda':
        return 'sdpa', f'flash-attn does not run on {device_type}'
    if dtype not in (torch.bfloat16, torch.float16):
        return 'sdpa', 'flash-attn computes in 16 bit only'
    if not FLASH_ATTN_INSTALLED:
        return 'sdpa', 'the flash-attn package is not installed'
    return backend, 'as configured'


class CausalSelfAttention(nn.Module):
    """Multi-head or grouped-query attention; q, k and v are one matmul."""

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.qkv = nn.Linear(config.n_embd, width, bias=config.bias)
        self.proj = nn.Linear(self.n_head * self.head_dim, config.n_embd,
                              bias=config.bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = build_norm(config, self.head_dim)
            self.k_norm = build_norm(config, self.head_dim)
        self.attend = ATTENTION_BACKENDS[config.attention_backend]
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None):
        """x (B, T, C) -> (B, T, C).

        `cache` is a layer's part of a KVCache, whose tokens come before x.
        """
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)  # (B, T, H + 2K, D)
        q, k, v = qkv.split(
            (self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        mask = None
        if cache is not None:
            k, v = cache.append(k, v)                        # (B, S, K, D)
            mask = cache.mask
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, mask)
        return self.residual_dropout(self.proj(y.reshape(B, T, -1)))


# --- feed-forward ----------------------------------------------------------

ACTIVATIONS = {
    'gelu': F.gelu,
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),
    'silu': F.silu,
    'relu': F.relu,
}


class StandardFFN(nn.Module):
    """down(activation(up(x))), the MLP of GPT-2."""

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.residual_dropout(self.down(self.activation(self.up(x))))


class SwiGLU(nn.Module):
    """down(activation(gate(x)) * up(x)); gate and up are one matmul.

    Shazeer 2020, https://arxiv.org/abs/2002.05202; SwiGLU proper with 'silu'.
    """

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.d_ff,
                                 bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)         # (B, T, F) each
        return self.residual_dropout(self.down(self.activation(gate) * up))


FEED_FORWARDS = {
    'standard': StandardFFN,
    'swiglu': SwiGLU,
}

# --- head and loss ---------------------------------------------------------

# Rows of logits that exist at a time. On a GPU fewer would read and write the
# head's gradient too often; on a CPU more would only take memory.
LOSS_CHUNK_ROWS = {'cuda': 2048, 'cpu': 512}


def softmax_chunk(logits, targets, with_gradient):
    """log p of each row's target; the logits (n, V) become the softmax.

    targets (n,) int64, -1 for rows that count nothing: 0 stands in all their
    results. Computed in fp32, returned as (n, 1) fp32; the softmax, for the
    gradient, takes the place of the logits in their dtype.
    """
    x = logits.float()  # logits themselves if they are fp32
    ignored = (targets < 0)[:, None]
    lse = x.logsumexp(dim=-1, keepdim=True)
    log_p = x.gather(1, targets.clamp(min=0)[:, None]) - lse
    if with_gradient:
        logits.copy_(x.sub_(lse).exp_().masked_fill_(ignored, 0.0))
    return log_p.masked_fill_(ignored, 0.0)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of x @ weight.T, some rows at a time.

    The gradients are computed along with the loss, so that no chunk's logits
    outlive it. Returns the sum over rows; rows with target -1 count nothing.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softmax):
        # x (N, C) and w (V, C) in the compute dtype; the loss is fp32
        w = weight.to(x.dtype)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        N, size = x.shape[0], LOSS_CHUNK_ROWS.get(x.device.type, 2048)
        # one buffer for all chunks: new memory costs a CPU as much as a pass
        buffer = x.new_empty(min(size, N), w.shape[0])
        dx = torch.empty_like(x) if needs_x else None
        dw = torch.empty_like(weight, dtype=torch.float32) if needs_w else None
        loss = x.new_zeros((), dtype=torch.float32)
        for start in range(0, N, size):
            rows = slice(start, start + size)
            logits = buffer[:min(size, N - start)]           # (n, V)
            torch.mm(x[rows], w.t(), out=logits)
            target = targets[rows]
            log_p = softmax(logits, target, needs_x or needs_w)
            loss -= log_p.sum()
            # the gradient is softmax - onehot; p - 1 is taken in fp32, since
            # near p = 1 bf16 would leave nothing of it. Ignored rows: 0 - 0
            grad = logits.scatter_(1, target.clamp(min=0)[:, None],
                                   log_p.expm1().to(logits.dtype))
            if needs_x:
                torch.mm(grad, w, out=dx[rows])
            if needs_w and x.dtype == torch.float32:
                torch.addmm(dw, grad.t(), x[rows], beta=float(start > 0),
                            out=dw)
            elif needs_w and x.is_cuda:
                # the product is added up in fp32 where it is computed
                torch.addmm(dw, grad.t(), x[rows], beta=float(start > 0),
                            out_dtype=torch.float32, out=dw)
            elif needs_w:
                product = grad.t() @ x[rows]
                dw.add_(product) if start else dw.copy_(product)
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        dx, dw = ctx.saved_tensors
        # in place: the gradient of the head is large. So backward works once
        if dx is not None:
            dx.mul_(grad_loss.to(dx.dtype))
        if dw is not None:
            dw.mul_(grad_loss)
        return dx, dw, None, None


def linear_cross_entropy(x, weight, targets, softmax=softmax_chunk):
    """Sum of -log softmax(x @ weight.T)[target] without holding the logits.

    x (N, C) fp32 or bf16, weight (V, C), targets (N,) int64 with -1 for rows
    that count nothing -> fp32 scalar. Under autocast the products run in the
    autocast dtype; the softmax and the sum over chunks of the weight's
    gradient are fp32. `softmax` is `softmax_chunk`, compiled or not.
    """
    device_type = x.device.type
    if not torch.is_grad_enabled():
        weight = weight.detach()  # else its gradient is computed for nothing
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, targets, softmax)
