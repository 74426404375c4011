"""Tokens a second of greedy decoding, against transformers' `generate`.

The same random weights, one prompt, by turns A B A B in one process; medians,
and ratios within a round. A token's time is that between two tokens, so that
the reading of the prompt, which has a column of its own, is not in it. Memory
is the resident peak while a model generates, in a process of its own, with
the libraries. In fp32 the tokens must be equal; in bf16 the first are, until
the roundings of two computations part.

    python benchmarks/generation_speed.py
    python benchmarks/generation_speed.py --dtype float32 --rounds 3
    python benchmarks/generation_speed.py --smoke
"""

import argparse
import gc
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_convert import to_hf  # noqa: E402
from model_builder import ConfigurableGPT  # noqa: E402
from model_config import get_preset_config  # noqa: E402
from model_generation import hold_in_bf16  # noqa: E402
from training.device import (  # noqa: E402
    DTYPES,
    device_name,
    forget_peak,
    resident,
)

# config/full_qwen3_0.6b.py, the official Qwen3-0.6B
BIG = dict(n_layer=28, n_embd=1024, n_head=16, num_key_value_heads=8,
           d_ff=3072, block_size=2048, vocab_size=151936, rope_theta=1e6)
SMALL = dict(n_layer=2, n_embd=64, n_head=4, num_key_value_heads=2,
             head_dim=16, d_ff=128, block_size=64, vocab_size=512)
CONTENDERS = ['this project', 'transformers', 'transformers, static cache']


class Clock:
    """A streamer of transformers, and an on_token of this project."""

    def __init__(self):
        self.times = []

    def __call__(self, row, token):
        self.times.append(time.perf_counter())

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def contender(name, model, dtype):
    """A function (prompt (1, T) int64, n) -> (n ids, n times) from a
    ConfigurableGPT in fp32, which it may change."""
    if name == 'this project':
        if dtype == 'bfloat16':
            hold_in_bf16(model)

        def ours(prompt, n):
            clock = Clock()
            out = model.generate(prompt, n, temperature=0, on_token=clock)
            return out[0, -n:].tolist(), clock.times
        return ours
    hf = model if isinstance(model, transformers.PreTrainedModel) else (
        to_hf(model).to(DTYPES[dtype]))
    options = {'cache_implementation': 'static'} if 'static' in name else {}

    def theirs(prompt, n):
        clock = Clock()
        out = hf.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n,
            min_new_tokens=n, do_sample=False, eos_token_id=None,
            pad_token_id=0, streamer=clock, **options)
        # the streamer is given the prompt first
        return out[0, -n:].tolist(), clock.times[1:]
    return theirs


def build(shape):
    torch.manual_seed(0)
    return ConfigurableGPT(get_preset_config(
        'qwen3', weight_tying=True, **shape)).eval()


def measure(contenders, prompt, n, rounds):
    """{name: [(seconds of the prompt, seconds a token)]}, {name: ids}."""
    found, ids = {name: [] for name in contenders}, {}
    for number in tqdm(range(rounds + 1), 'rounds', disable=None):
        for name, generate in contenders.items():
            count = n if number else 3    # the first round is warm-up
            begin = time.perf_counter()
            new, times = generate(prompt, count)
            if number:
                ids[name] = new
                found[name].append((times[0] - begin, (
                    times[-1] - times[0]) / (count - 1)))
    return found, ids


def peak_memory(name, args) -> float:
    """GB resident at most while `name` generates 4 tokens."""
    command = [sys.executable, __file__, '--memory_of', name, '--dtype',
               args.dtype, '--prompt', str(args.prompt)]
    command += ['--smoke'] * args.smoke + (
        ['--threads', str(args.threads)] if args.threads else [])
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE,
                              text=True).stdout) / 1e9


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dtype', choices=DTYPES, default='bfloat16')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--prompt', type=int, default=64,
                        help='tokens of the prompt (default 64)')
    parser.add_argument('--new', type=int, default=64,
                        help='tokens that are drawn (default 64)')
    parser.add_argument('--threads', type=int, help="default: torch's")
    parser.add_argument('--smoke', action='store_true',
                        help='a tiny model, for a test')
    parser.add_argument('--memory_of', choices=CONTENDERS,
                        help='only print the peak of this one, in bytes')
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.prompt, args.new = 1, 8, 8
    if args.threads:
        torch.set_num_threads(args.threads)
    model = build(SMALL if args.smoke else BIG)
    n_parameters = model.get_num_params()
    prompt = torch.randint(0, model.config.vocab_size, (1, args.prompt),
                           generator=torch.Generator().manual_seed(1))
    if args.memory_of:
        generate = contender(args.memory_of, model, args.dtype)
        del model
        gc.collect()
        generate(prompt[:, :2], 2)
        forget_peak(torch.device('cpu'))
        generate(prompt, 4)
        print(resident('VmHWM'))
        return
    hf = to_hf(model).to(DTYPES[args.dtype])
    contenders = {name: contender(name, hf if 'transf' in name else model,
                                  args.dtype) for name in CONTENDERS}
    found, ids = measure(contenders, prompt, args.new, args.rounds)
    first = ids['this project']
    print(f'{platform.machine()}, {device_name(torch.device("cpu"))}, torch '
          f'{torch.__version__}, transformers {transformers.__version__}; '
          f'{n_parameters:,} parameters, {args.dtype}, {args.prompt} + '
          f'{args.new} tokens, {args.rounds} rounds\n')
    print('| | tokens/s | ms a token | here, times as fast | prompt, s | '
          'peak GB | tokens equal |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    ours = [token for _, token in found['this project']]
    for name, times in found.items():
        seconds = statistics.median(token for _, token in times)
        ratio = statistics.median(token / own for (_, token), own in zip(
            times, ours, strict=True))
        reading = statistics.median(prompt for prompt, _ in times)
        equal = next((i for i, pair in enumerate(zip(first, ids[name],
                      strict=True)) if pair[0] != pair[1]), len(first))
        memory = peak_memory(name, args)
        print(f'| {name} | {1 / seconds:.1f} | {1e3 * seconds:.1f} | '
              f'{ratio:.2f} | {reading:.2f} | {memory:.2f} | {equal} |',
              flush=True)
        if args.dtype == 'float32' and equal < len(first):
            raise SystemExit(f'{name} drew other tokens in fp32')


if __name__ == '__main__':
    main()
