"""A training step of this project against its peers', on the same shapes.

Forward, backward, clipping and fused AdamW, in turn A B A B in one process;
medians and ratios. The peers: `Qwen3ForCausalLM` of transformers, and nanoGPT's
design written out below. The floor is the step's matrix products alone. Memory
is what a step adds to weights, gradients and optimizer state, each in a
process of its own. bf16 is left out on a CPU without fast bf16.

    python benchmarks/vs_peers.py
    python benchmarks/vs_peers.py --shape small --dtype float32 --rounds 5
    python benchmarks/vs_peers.py --smoke    # tiny shapes, to see that it runs
"""

import argparse
import dataclasses
import gc
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model_builder import ConfigurableGPT  # noqa: E402
from model_components import LOSS_CHUNK_ROWS  # noqa: E402
from model_config import get_preset_config  # noqa: E402
from training.device import (  # noqa: E402
    autocast,
    computing_dtype,
    device_name,
    forget_peak,
    resident,
    resolve_device,
    synchronize,
)
from training.flops import matmul_weights  # noqa: E402
from training.optimizer import build_optimizer  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    contenders: tuple[str, str]  # ours and its peer
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    d_ff: int
    vocab_size: int
    batch_size: int
    block_size: int
    head_dim: int = 64


SHAPES = {
    'big': Shape(('qwen3', 'transformers'),
                 4, 256, 4, 2, 768, 151936, 4, 512),
    'small': Shape(('qwen3', 'transformers'),
                   6, 384, 6, 2, 1152, 4096, 8, 256),
    'gpt2': Shape(('gpt2', 'nanoGPT'), 6, 384, 6, 6, 1152, 4096, 8, 256),
    # for a GPU: Qwen3-0.6B, but untied as the others
    '0.6b': Shape(('qwen3', 'transformers'),
                  28, 1024, 16, 8, 3072, 151936, 4, 2048, 128),
}
SMOKE = dict(n_layer=2, n_embd=64, n_head=1, n_kv_head=1, d_ff=128,
             vocab_size=512, batch_size=2, block_size=32, head_dim=64)


def shape_of(name, smoke) -> Shape:
    return dataclasses.replace(SHAPES[name], **SMOKE if smoke else {})


# --- the contenders: each takes (x, y) and returns the mean loss -----------


def config_of(shape):
    """This project's architecture of a shape."""
    preset = shape.contenders[0]
    own = dict(activation='gelu')  # nanoGPT's; the preset has GPT-2's tanh
    if preset == 'qwen3':
        own = dict(head_dim=shape.head_dim, weight_tying=False)
    return get_preset_config(
        preset, n_layer=shape.n_layer, n_embd=shape.n_embd,
        n_head=shape.n_head, num_key_value_heads=shape.n_kv_head,
        d_ff=shape.d_ff, vocab_size=shape.vocab_size,
        block_size=shape.block_size, **own)


class Ours(nn.Module):
    """A preset of this project."""

    def __init__(self, shape):
        super().__init__()
        self.model = ConfigurableGPT(config_of(shape))

    def forward(self, x, y):
        return self.model(x, y, return_logits=False)[1]


class Transformers(nn.Module):
    """Qwen3ForCausalLM with SDPA and its own plain loss."""

    def __init__(self, shape):
        super().__init__()
        import transformers  # takes seconds: only where it is needed
        self.model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            num_hidden_layers=shape.n_layer, hidden_size=shape.n_embd,
            num_attention_heads=shape.n_head, head_dim=shape.head_dim,
            num_key_value_heads=shape.n_kv_head,
            intermediate_size=shape.d_ff, vocab_size=shape.vocab_size,
            max_position_embeddings=shape.block_size, use_cache=False,
            tie_word_embeddings=False, attn_implementation='sdpa'))

    def forward(self, x, y):
        # shift_labels are used as they are; labels would be shifted
        return self.model(x, labels=y, shift_labels=y).loss


class NanoGPTBlock(nn.Module):
    def __init__(self, shape):
        super().__init__()
        C = shape.n_embd
        self.n_head = shape.n_head
        self.ln_1 = nn.LayerNorm(C)
        self.c_attn = nn.Linear(C, 3 * C)
        self.c_proj = nn.Linear(C, C)
        self.ln_2 = nn.LayerNorm(C)
        self.c_fc = nn.Linear(C, shape.d_ff)
        self.mlp_proj = nn.Linear(shape.d_ff, C)

    def forward(self, x):
        B, T, C = x.shape
        heads = [t.view(B, T, self.n_head, -1).transpose(1, 2)
                 for t in self.c_attn(self.ln_1(x)).split(C, dim=2)]
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """nanoGPT's design: learned positions, LayerNorm, fused q, k and v, SDPA,
    GELU, biases, a tied head, all logits, F.cross_entropy."""

    def __init__(self, shape):
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.block_size, shape.n_embd)
        self.h = nn.ModuleList(
            NanoGPTBlock(shape) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd)
        self.lm_head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, y):
        positions = torch.arange(x.shape[1], device=x.device)
        x = self.wte(x) + self.wpe(positions)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1),
                               ignore_index=-1)


CONTENDERS = {'qwen3': Ours, 'transformers': Transformers,
              'gpt2': Ours, 'nanoGPT': NanoGPT}

# --- a step ------------------------------------------------------------------


def training_step(name, shape, dtype, device, compiled):
    """(step, parameters); `step()` makes one update and returns the loss."""
    torch.manual_seed(0)
    model = CONTENDERS[name](shape).to(device)
    optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.1,
                                betas=(0.9, 0.95), eps=1e-8)
    forward = model
    if compiled and isinstance(model, Ours):
        model.model.compile_parts()  # as train.py does
    elif compiled:
        forward = torch.compile(model, dynamic=False)
    x, y = torch.randint(0, shape.vocab_size, (
        2, shape.batch_size, shape.block_size), device=device)

    def step():
        with autocast(device, dtype):
            loss = forward(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, sum(p.numel() for p in model.parameters())


def matrix_products(shape, dtype, device):
    """The three products of every linear layer of ours, nothing else."""
    c = config_of(shape)
    up = 2 * c.d_ff if c.ffn_type == 'swiglu' else c.d_ff
    layer = [(c.n_embd, (c.n_head + 2 * c.num_key_value_heads) * c.head_dim),
             (c.n_head * c.head_dim, c.n_embd), (c.n_embd, up),
             (c.d_ff, c.n_embd)]
    layers = layer * c.n_layer + [(c.n_embd, c.vocab_size)]
    assert sum(a * b for a, b in layers) == matmul_weights(c)
    kind = getattr(torch, dtype)
    N = shape.batch_size * shape.block_size
    sizes = {size: (torch.randn(N, size[0], device=device, dtype=kind),
                    torch.randn(size[::-1], device=device, dtype=kind))
             for size in set(layers)}
    outputs = {size: torch.randn(N, size[1], device=device, dtype=kind)
               for size in set(layer)}
    # of the head: all logits would not fit a cache
    rows = min(N, LOSS_CHUNK_ROWS.get(device.type, 2048))

    def step():
        for size in layers:
            x, w = sizes[size]
            if size in outputs:
                g = outputs[size]
                x @ w.t(), g @ w, g.t() @ x
                continue
            for i in range(0, N, rows):
                g = x[i:i + rows] @ w.t()
                g @ w, g.t() @ x[i:i + rows]

    return step


def timed(steps: dict, device, rounds: int) -> dict:
    """{name: milliseconds of each round}, all steps in turn."""
    times = {name: [] for name in steps}
    for number in tqdm(range(rounds + 2), desc='rounds', leave=False,
                       disable=None):
        for name, step in steps.items():
            synchronize(device)
            begin = time.perf_counter()
            step()
            synchronize(device)
            if number >= 2:  # two rounds of warm-up, compilation included
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


# --- memory ------------------------------------------------------------------


def added_memory(step, n_parameters, device) -> int:
    """Bytes that a step adds to weights, gradients and optimizer state."""
    for _ in range(2):
        step()
    gc.collect()
    gradients = 4 * n_parameters  # they are dropped between steps
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        forget_peak(device)
        before = torch.cuda.memory_allocated(device)
        step()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        forget_peak(device)
        before = resident('VmRSS')
        step()
        peak = resident('VmHWM')
    return peak - before - gradients


def memory_of(name, options) -> float:
    """GB that a step of a contender adds, measured in a process of its own."""
    command = [sys.executable, __file__, '--memory_of', name,
               '--shape', options['shape'], '--dtype', options['dtype'],
               '--device', options['device']]
    for flag in 'eager', 'smoke':
        if options[flag]:
            command.append(f'--{flag}')
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE,
                            text=True).stdout
    return int(output) / 1e9


# --- the table ---------------------------------------------------------------


def report(name, dtype, device, options):
    """Measure one shape in one dtype and print its two rows."""
    shape = shape_of(name, options['smoke'])
    ours, peer = shape.contenders
    steps, n_parameters = {}, {}
    for model in shape.contenders:
        steps[model], n_parameters[model] = training_step(
            model, shape, dtype, device, not options['eager'])
    steps['products'] = matrix_products(shape, dtype, device)
    times = timed(steps, device, options['rounds'])
    median = {model: statistics.median(t) for model, t in times.items()}
    given = options | dict(shape=name, dtype=dtype, device=str(device))
    memory = {model: memory_of(model, given) for model in shape.contenders}
    # of each round, so that what slows the machine slows both
    speed = statistics.median(
        b / a for a, b in zip(times[ours], times[peer], strict=True))
    ratios = {ours: (f'{speed:.2f}', f'{memory[ours] / memory[peer]:.2f}'),
              peer: ('', '')}
    for model in shape.contenders:
        faster, less = ratios[model]
        print(f'| {name} | {dtype} | {model} | '
              f'{n_parameters[model] / 1e6:.1f} | {median[model]:.0f} | '
              f'{faster} | {median[model] / median["products"]:.2f} | '
              f'{memory[model]:.3f} | {less} |', flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shape', choices=SHAPES, action='append',
                        help='default: all but 0.6b, which is for a GPU')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16'],
                        action='append', help='default: both')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--eager', action='store_true',
                        help='without torch.compile')
    parser.add_argument('--smoke', action='store_true',
                        help='tiny shapes, to see that all of it runs')
    parser.add_argument('--memory_of', choices=CONTENDERS,
                        help='only print the bytes that a step of this one '
                        'adds')
    args = parser.parse_args()
    device = resolve_device(args.device)
    shapes = args.shape or [name for name in SHAPES if name != '0.6b']
    dtypes = args.dtype or ['float32', 'bfloat16']
    if args.memory_of:
        step, n = training_step(
            args.memory_of, shape_of(shapes[0], args.smoke), dtypes[0], device,
            not args.eager)
        print(added_memory(step, n, device))
        return
    print(f'{platform.machine()}, {device_name(device)}, Python '
          f'{platform.python_version()}, torch {torch.__version__}, '
          f'transformers {version("transformers")}; '
          f'{"eager" if args.eager else "compiled"}, {args.rounds} rounds\n')
    print('| shape | dtype | model | M parameters | ms | times as fast as its '
          'peer | over its products | GB added | of its peer\'s |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- | --- |')
    left_out = None
    for shape in shapes:
        for dtype in dtypes:
            runs, reason = computing_dtype(device, dtype)
            if runs == dtype:
                report(shape, dtype, device, vars(args))
            else:
                left_out = f'\n{dtype} is left out: {reason}.'
    print(left_out or '')


if __name__ == '__main__':
    main()
