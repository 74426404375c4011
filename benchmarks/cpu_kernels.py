"""bf16 against fp32 on this CPU: the matmuls of a linear layer, attention.

Tells whether --dtype=bfloat16 pays here, and why `sdpa_attention` computes in
fp32 where gradients are needed. Interleaved, medians; ratios are what counts.

    python benchmarks/cpu_kernels.py
"""

import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model_components import eager_attention  # noqa: E402

REPEATS = 5


def medians(functions: dict) -> dict:
    """{name: median milliseconds}, all functions in turn, REPEATS times."""
    times = {name: [] for name in functions}
    for repeat in range(REPEATS + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if repeat:  # the first round is warm-up
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def linear(n, dtype):
    """Forward and backward of a linear layer, 1024 rows, n x n weights."""
    x = torch.randn(1024, n, dtype=dtype, requires_grad=True)
    w = torch.randn(n, n, dtype=dtype, requires_grad=True)
    return lambda: (x @ w.t()).sum().backward()


def attention(function, dtype, B=4, T=256, H=4, K=2, D=64):
    """Forward and backward of causal attention, (B, T, heads, D)."""
    q = torch.randn(B, T, H, D, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(B, T, K, D, dtype=dtype, requires_grad=True)
            for _ in range(2))
    return lambda: function(q, k, v).sum().backward()


def sdpa(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True,
                                        enable_gqa=True)


def sdpa_in_fp32(q, k, v):
    return sdpa(q.float(), k.float(), v.float()).to(q.dtype)


def main():
    bf16, fp32 = torch.bfloat16, torch.float32
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    print(f'{platform.processor() or platform.machine()}, '
          f'{torch.get_num_threads()} threads, torch {torch.__version__}; '
          f'fast bf16: {"yes" if fast else "no"}\n')
    print('| forward and backward, ms | fp32 | bf16 | bf16 / fp32 |')
    print('| --- | --- | --- | --- |')
    for n in (128, 256):
        t = medians({'fp32': linear(n, fp32), 'bf16': linear(n, bf16)})
        report(f'linear layer, 1024 rows, {n} x {n}', t)
    t = medians({'fp32': attention(sdpa, fp32), 'bf16': attention(sdpa, bf16)})
    report('SDPA', t)
    t = medians({'fp32': attention(sdpa, fp32),
                 'bf16': attention(sdpa_in_fp32, bf16)})
    report('SDPA, bf16 inputs computed in fp32', t)
    t = medians({
        'fp32': attention(lambda *a: eager_attention(*a, 0.0), fp32),
        'bf16': attention(lambda *a: eager_attention(*a, 0.0), bf16)})
    report('eager attention', t)


def report(name, t):
    print(f'| {name} | {t["fp32"]:.1f} | {t["bf16"]:.1f} | '
          f'{t["bf16"] / t["fp32"]:.1f} |')


if __name__ == '__main__':
    main()
