"""What one GPU does with this project: is it right, how fast, how much memory.

Five parts: equality with transformers in bf16, attention backends, strategies,
a short training run, and a sweep of full models over micro-batches and
recomputation. Each, and each model of the sweep, is a process of its own with a
limit of time. What does not fit in memory is a row; what there is no time
for is left out and named. A dated entry goes to the head of RESULTS.md. Exit
status 1 if a number is wrong or a part fails.

    bash benchmarks/gpu_suite.sh
    python benchmarks/gpu_suite.py --smoke --parts parity attention
"""

import argparse
import datetime
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.configurator import exit_with  # noqa: E402
from training.device import (  # noqa: E402
    autocast,
    computing_dtype,
    device_name,
    resolve_device,
    synchronize,
)

BENCH = ROOT / 'benchmarks' / 'bench.py'
PACKAGES = ('torch', 'transformers', 'tokenizers', 'safetensors', 'triton',
            'flash-attn')

# --- equality with transformers ----------------------------------------------

FP32_TOLERANCE = 1e-4   # of the largest logit
BF16_TOLERANCE = 2.0    # times the error of transformers, against fp64


def parity(smoke):
    """The presets against transformers with the same weights: fp32 alike,
    bf16 as near to fp64 as transformers is."""
    from hf_convert import to_hf
    from model_builder import ConfigurableGPT
    from model_config import PRESET_CONFIGS, get_preset_config
    device = device_of(smoke)
    sizes = dict(n_layer=4, n_embd=512, n_head=8, vocab_size=4096,
                 block_size=512)
    B = 4
    if smoke:
        sizes, B = dict(n_layer=2, n_embd=32, n_head=4, vocab_size=64,
                        block_size=16), 2
    lines = table('preset', 'fp32: logits off by', 'bf16: logits off by',
                  'transformers', 'gradients off by', 'transformers')
    problems, numbers = [], {}
    for preset in PRESET_CONFIGS:
        torch.manual_seed(0)
        model = ConfigurableGPT(get_preset_config(preset, **sizes))
        with torch.no_grad():
            for p in model.parameters():  # nothing is hidden by ones or zeros
                p.add_(torch.randn_like(p) * 0.02)
        hf = to_hf(model).to(device)
        model = model.to(device)
        x, y = torch.randint(0, sizes['vocab_size'],
                             (2, B, sizes['block_size']), device=device)
        found = compare(model, hf, x, y)
        numbers[preset] = found
        lines.append(row(preset, *(f'{found[key]:.1e}' for key in (
            'fp32', 'bf16', 'bf16_hf', 'gradients', 'gradients_hf'))))
        if not found['fp32'] < FP32_TOLERANCE:
            problems.append(f'{preset}: fp32 logits differ by '
                            f'{found["fp32"]:.1e} of the largest')
        for key in 'bf16', 'gradients':
            if not found[key] < BF16_TOLERANCE * found[key + '_hf']:
                problems.append(
                    f'{preset}: {key} off by {found[key]:.1e} in bf16, '
                    f'transformers by {found[key + "_hf"]:.1e}')
    lines += ['', 'Against fp64; shares of the largest logit, and of the norm '
              'of all gradients. bf16 is autocast over fp32 weights.']
    return lines, problems, numbers


def compare(model, hf, x, y):
    """Errors of `model` and of `hf`, which have the same weights."""
    from training.hf_weights import state_from_hf
    names = [name for name, _ in model.named_parameters()]

    def of_hf(dtype):
        hf.zero_grad(set_to_none=True)
        with autocast(x.device, dtype):
            logits = hf(x).logits
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).to(max(logits.dtype, torch.float32,
                                        key=lambda d: d.itemsize)),
            y.flatten()).backward()
        grads = state_from_hf({n: p.grad for n, p in hf.named_parameters()},
                              model.config)
        return logits.detach().double(), flat(grads[n] for n in names)

    def of_model(dtype):
        model.zero_grad(set_to_none=True)
        with autocast(x.device, dtype):
            model(x, y, return_logits=False)[1].backward()
            with torch.no_grad():
                logits = model(x)[0]
        return logits.double(), flat(p.grad for p in model.parameters())

    fp32, bf16, bf16_hf = of_model('float32'), of_model('bfloat16'), of_hf(
        'bfloat16')
    hf.double()
    exact = of_hf('float64')
    scale, norm = exact[0].abs().max(), exact[1].norm()

    def error(found):
        return [((found[0] - exact[0]).abs().mean() / scale).item(),
                ((found[1] - exact[1]).norm() / norm).item()]

    (ours, ours_g), (theirs, theirs_g) = error(bf16), error(bf16_hf)
    return {'fp32': ((fp32[0] - exact[0]).abs().max() / scale).item(),
            'bf16': ours, 'bf16_hf': theirs,
            'gradients': ours_g, 'gradients_hf': theirs_g}


def flat(tensors):
    return torch.cat([t.flatten().double() for t in tensors])


# --- attention ---------------------------------------------------------------

ATTENTION_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def attention_backends():
    """{name: (function, SDPA's kernel or None)}"""
    from torch.nn.attention import SDPBackend

    from model_components import ATTENTION_BACKENDS
    sdpa = ATTENTION_BACKENDS['sdpa']
    found = {'eager': (ATTENTION_BACKENDS['eager'], None),
             'sdpa': (sdpa, None)}
    for name in ('FLASH_ATTENTION', 'CUDNN_ATTENTION', 'EFFICIENT_ATTENTION',
                 'MATH'):
        if hasattr(SDPBackend, name):
            found[f'sdpa, {name.lower()}'] = sdpa, getattr(SDPBackend, name)
    if importlib.util.find_spec('flash_attn') is not None:
        found['flash_attn_2'] = ATTENTION_BACKENDS['flash_attn_2'], None
    return found


def attention(smoke):
    """Forward and backward of each backend: equal to eager in fp32, and how
    long it takes."""
    device = device_of(smoke)
    B, T, H, K, D = (1, 64, 4, 2, 16) if smoke else (4, 2048, 16, 8, 128)
    dtype = torch.float32 if smoke else torch.bfloat16
    torch.manual_seed(0)
    qkv = [torch.randn(B, T, heads, D, device=device, dtype=dtype)
           for heads in (H, K, K)]
    backends = attention_backends()
    exact = flat(attended(backends['eager'], [t.float() for t in qkv]))
    lines = table('attention', 'off by', 'ms, forward and backward')
    problems, numbers = [], {}
    for name, backend in backends.items():
        try:
            error = ((flat(attended(backend, qkv)) - exact).norm()
                     / exact.norm()).item()
            ms = time_of(lambda backend=backend: attended(backend, qkv),
                         device, 3 if smoke else 20)
        except RuntimeError as problem:  # no such kernel here, or no memory
            reason = str(problem).splitlines()[0][:60]
            if name in ('eager', 'sdpa', 'flash_attn_2'):
                problems.append(f'attention {name}: {reason}')
            lines.append(row(name, 'not here', f'({reason})'))
            continue
        numbers[name] = {'error': error, 'ms': ms}
        lines.append(row(name, f'{error:.1e}', f'{ms:.2f}'))
        if not error < ATTENTION_TOLERANCE[dtype]:
            problems.append(f'attention {name} is off by {error:.1e}')
    lines += ['', f'{str(dtype).removeprefix("torch.")}, B={B} T={T} H={H} '
              f'K={K} D={D}; output and gradients against eager in fp32.']
    return lines, problems, numbers


def attended(backend, qkv):
    """The output and the gradients of q, k and v."""
    from torch.nn.attention import sdpa_kernel
    function, kernel = backend
    inputs = [t.detach().requires_grad_() for t in qkv]
    if kernel is None:
        y = function(*inputs, 0.0)
    else:
        with sdpa_kernel([kernel]):
            y = function(*inputs, 0.0)
    return y, *torch.autograd.grad(y, inputs, y.detach())


def time_of(function, device, rounds):
    """Median milliseconds of a call."""
    times = []
    for _ in range(rounds + 2):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times[2:])[rounds // 2]


# --- strategies --------------------------------------------------------------

STRATEGY_TOLERANCE = {'float32': 1e-5, 'bfloat16': 2e-2}


def strategies(smoke):
    """Ten updates under ZeRO-1 and FSDP2 on one device against ten without."""
    import torch.distributed as dist

    from training.strategies import FSDP, Replicated, Zero1
    device = device_of(smoke)
    dist.init_process_group('gloo' if smoke else 'nccl',
                            store=dist.HashStore(), rank=0, world_size=1)
    lines = table('strategy', 'dtype', 'last loss', 'without it',
                  'losses differ by')
    problems, numbers = [], {}
    for dtype, tolerance in STRATEGY_TOLERANCE.items():
        if computing_dtype(device, dtype)[0] != dtype:
            continue
        plain = ten_losses(Replicated, device, dtype, smoke)
        for name, build in (
                ('ZeRO-1', Zero1),
                ('FSDP2', functools.partial(FSDP, dtype=dtype, device=device,
                                            reshard_after_forward=False))):
            sharded = ten_losses(build, device, dtype, smoke)
            apart = max(abs(a - b) / a
                        for a, b in zip(plain, sharded, strict=True))
            numbers[f'{name}, {dtype}'] = apart
            lines.append(row(name, dtype, f'{sharded[-1]:.4f}',
                             f'{plain[-1]:.4f}', f'{apart:.1e}'))
            if not (apart < tolerance and plain[-1] < plain[0]):
                problems.append(f'{name} in {dtype}: losses {sharded}, '
                                f'without it {plain}')
    dist.destroy_process_group()
    return lines, problems, numbers


def ten_losses(build, device, dtype, smoke):
    from model_builder import ConfigurableGPT
    from model_config import get_preset_config
    from training.distributed import Ranks
    sizes = dict(n_layer=4, n_embd=512, n_head=8, vocab_size=4096,
                 block_size=512)
    if smoke:
        sizes = dict(n_layer=2, n_embd=64, n_head=4, vocab_size=128,
                     block_size=32)
    torch.manual_seed(0)
    model = ConfigurableGPT(get_preset_config('llama3', **sizes)).to(device)
    x = torch.randint(0, sizes['vocab_size'], (4, sizes['block_size'] + 1),
                      device=device)
    strategy = build(model, Ranks(), dict(
        learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8))
    losses = []
    for _ in range(10):
        with strategy.accumulating(True), autocast(device, dtype):
            loss = model(x[:, :-1], x[:, 1:], return_logits=False)[1]
            loss.backward()
        strategy.clip(1.0)
        strategy.step()
        strategy.drop_gradients()
        losses.append(loss.item())
    strategy.close()
    return losses


# --- a training run ----------------------------------------------------------

MUST_FALL_BY = 1.0  # nats a token, within 100 updates


def training(smoke, deadline):
    """100 updates of train.py on real text."""
    options = dict(
        arch_preset='qwen3', n_layer=6, n_embd=512, n_head=8, head_dim=64,
        num_key_value_heads=4, d_ff=1536, block_size=512, batch_size=32,
        learning_rate=1e-3)
    if smoke:
        options = dict(
            arch_preset='qwen3', n_layer=1, n_embd=64, n_head=2, head_dim=32,
            num_key_value_heads=1, d_ff=192, block_size=64, batch_size=4,
            learning_rate=1e-2, device='cpu', dtype='float32', compile=False,
            eval_bytes=2000)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = write_text(folder / 'text', smoke)
        options |= dict(dataset=folder / 'text', out_dir=folder / 'out',
                        max_iters=100, warmup_iters=10, eval_interval=100)
        limit = min(110, max(1, deadline - time.monotonic()))
        status, output = run_limited(
            [sys.executable, ROOT / 'train.py',
             *(f'--{k}={v}' for k, v in options.items())], limit)
        if status != 0:
            what = how_it_ended(status, output, limit)
            return [what], [f'train.py {what}'], {}
        metrics = folder / 'out' / 'latest' / 'metrics.jsonl'
        records = [json.loads(line)
                   for line in metrics.read_text().splitlines()]
    train = [r for r in records if r['kind'] == 'train']
    before, after = [r['val_loss'] for r in records if r['kind'] == 'eval']
    last = train[-1]
    numbers = {'first': train[0]['loss'], 'last': last['loss'],
               'val_before': before, 'val_after': after,
               'tokens_per_s': last['tokens_per_s']}
    lines = table('text', 'loss, first', 'last', 'validation, before', 'after',
                  'tokens/s')
    lines.append(row(text, *(f'{numbers[key]:.3f}' for key in (
        'first', 'last', 'val_before', 'val_after')),
        f'{last["tokens_per_s"]:,.0f}'))
    problems = []
    if not (last['loss'] < train[0]['loss'] - MUST_FALL_BY
            and after < before - MUST_FALL_BY):
        problems.append(f'the loss has not fallen by {MUST_FALL_BY} in 100 '
                        f'updates: {numbers}')
    return lines, problems, numbers


def write_text(folder, smoke):
    """A dataset of the standard library, or of this project's files as bytes
    where the former cannot be made; its name."""
    if not smoke and importlib.util.find_spec('tokenizers') is not None:
        status, output = run_limited(
            [sys.executable, ROOT / 'data' / 'python_stdlib' / 'prepare.py',
             '--out', folder], 120)
        if status == 0:
            return 'standard library'
        print('bytes in place of the standard library: '
              + how_it_ended(status, output, 120))
        shutil.rmtree(folder, ignore_errors=True)
    from training.dataset import DatasetWriter
    writer = DatasetWriter(
        folder, name='bytes', vocab_size=257, source={},
        tokenizer={'name': 'bytes', 'size': 257, 'sha256': '0' * 64,
                   'eot_id': 0, 'eot_token': '', 'path': None})
    files = sorted(path for path in ROOT.glob('*/*.py')
                   if not path.parts[-2].startswith('.'))
    for number, path in enumerate(sorted(ROOT.glob('*.py')) + files):
        data = path.read_bytes()
        if data:
            writer.add('train' if number else 'val', [1 + b for b in data],
                       len(data), hashlib.sha256(data).digest())
    writer.close()
    return 'bytes of this project'


# --- full models -------------------------------------------------------------


def sweep_settings(smoke):
    """(name, arguments of bench.py), the most telling ones first."""
    if smoke:
        tiny = ['--device=cpu', '--dtype=float32', '--compile=False',
                '--arch_preset=qwen3', '--n_layer=1', '--n_embd=32',
                '--n_head=2', '--head_dim=16', '--num_key_value_heads=1',
                '--block_size=16', '--vocab_size=64',
                '--gradient_accumulation_steps=1']
        return [('tiny', [*tiny, '--batch_size=4', '--d_ff=96']),
                # more than any machine can address
                ('tiny', [*tiny, '--batch_size=8', f'--d_ff={10**12}'])]
    both = {'0.6b': 'config/full_qwen3_0.6b.py',
            '1.5b': 'config/full_qwen3_1.5b.py'}
    chosen = [('0.6b', 16, 'none', 1.0), ('1.5b', 8, 'none', 1.0),
              ('1.5b', 8, 'none', 0.9), ('0.6b', 24, 'none', 1.0),
              ('1.5b', 12, 'none', 0.9), ('1.5b', 16, 'full', 1.0),
              ('1.5b', 64, 'none', 1.0), ('0.6b', 32, 'none', 0.9),
              ('0.6b', 8, 'none', 1.0), ('1.5b', 4, 'none', 1.0),
              ('0.6b', 64, 'full', 1.0), ('0.6b', 16, 'none', 0.9)]
    # real runs have 16 micro-steps and more: an update is a small part
    return [(name, [both[name], f'--batch_size={batch}',
                    f'--activation_checkpointing={checkpointing}',
                    f'--activation_memory_budget={budget}',
                    '--gradient_accumulation_steps=4'])
            for name, batch, checkpointing, budget in chosen]


def sweep(smoke, deadline):
    """bench.py on full models, each in a process of its own."""
    lines = table('model', 'batch', 'recompute', 'tokens/s', 'MFU',
                  'causal', 'peak, GB', 'planned', 'peak / planned')
    problems, numbers, ratios = [], [], []
    settings = sweep_settings(smoke)
    least = 5 if smoke else 30
    for number, (name, arguments) in enumerate(settings):
        left = deadline - time.monotonic()
        if left < least:
            lines += ['', f'No time was left for {len(settings) - number} '
                      f'of {len(settings)} settings.']
            break
        given = dict(a[2:].split('=') for a in arguments if a[:2] == '--')
        recompute = given.get('activation_checkpointing', 'none')
        budget = given.get('activation_memory_budget', '1.0')
        cells = [name, given['batch_size'],
                 recompute if budget == '1.0' else f'budget {budget}']
        result = run_bench(arguments, min(left, 120), smoke)
        numbers.append({'name': name, 'arguments': arguments, **result})
        if 'error' in result:
            lines.append(row(*cells, result['error'], *[''] * 5))
            if result['error'] == 'failed':
                problems.append(f'bench.py {" ".join(arguments)}: '
                                f'{result["reason"]}')
        else:
            shares = [f'{result[key]:.1%}' if result[key] else ''
                      for key in ('mfu', 'mfu_causal')]
            if result['peak_over_plan']:
                ratios.append(result['peak_over_plan'])
            lines.append(row(
                *cells, f'{result["tokens_per_s"]:,.0f}', *shares,
                *(f'{result[key]:.2f}' if result[key] else '' for key in (
                    'peak_gb', 'planned_gb', 'peak_over_plan'))))
        print(lines[-1], file=sys.stderr, flush=True)
    if ratios:
        lines += ['', f'Peak memory is {min(ratios):.2f} to {max(ratios):.2f} '
                  'of the plan, without the context of the GPU.']
    else:
        problems.append('no full model could be measured')
    return lines, problems, numbers


def run_bench(arguments, limit, smoke):
    """bench.py's results, or {'error': ..., 'reason': ...}."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'results.json'
        status, output = run_limited(
            [sys.executable, BENCH, *arguments, '--json', path,
             '--warmup', '2', '--updates', '3', '--split', '1'], limit)
        if path.exists():
            return json.loads(path.read_text())
    return {'error': 'no results',
            'reason': how_it_ended(status, output, limit)}


# --- running the parts -------------------------------------------------------

# seconds that each may take; the last two start their own processes
PARTS = {'parity': 80, 'attention': 60, 'strategies': 60, 'training': None,
         'sweep': None}
TITLES = {
    'parity': 'Equality with transformers',
    'attention': 'Attention',
    'strategies': 'ZeRO-1 and FSDP2 on one device',
    'training': '100 updates',
    'sweep': 'Full models'}


def device_of(smoke):
    return resolve_device('cpu' if smoke else 'cuda')


def row(*cells):
    return f'| {" | ".join(map(str, cells))} |'


def table(*heads):
    return [row(*heads), row(*['---'] * len(heads))]


def run_limited(command, limit):
    """(status, output); the status is None if it was stopped at the limit."""
    with tempfile.TemporaryFile('w+') as log:
        # with a group of its own: the compiler's workers go with it
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, text=True,
            stdin=subprocess.DEVNULL, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
        log.seek(0)
        return status, log.read()


def run_part(name, smoke, limit):
    """(lines, problems, numbers) of a part, run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'part.json'
        status, output = run_limited(
            [sys.executable, __file__, '--part', name, '--json', path,
             *(['--smoke'] if smoke else [])], limit)
        if status == 0:
            return json.loads(path.read_text())
    what = how_it_ended(status, output, limit)
    print(output[-3000:], file=sys.stderr)
    return [what], [f'{name} {what}'], {}


def how_it_ended(status, output, limit):
    if status is None:
        return f'stopped after {limit:.0f} s'
    last_line = (output.strip().splitlines() or ['nothing said'])[-1]
    return f'ended with status {status}: {last_line}'


def run_parts(names, smoke, deadline):
    """{part: (lines, problems, numbers)}, in turn; one that there is no time
    for is left out with a note."""
    found = {}
    for name in names:
        left = deadline - time.monotonic()
        if left < 5:
            found[name] = ['left out: no time'], [], {}
        elif PARTS[name] is None:
            found[name] = globals()[name](smoke, deadline)
        else:
            found[name] = run_part(name, smoke, min(left, PARTS[name]))
        lines, problems, _ = found[name]
        print(f'\n### {TITLES[name]}\n\n' + '\n'.join(lines), flush=True)
        for problem in problems:
            print(f'wrong: {problem}', file=sys.stderr, flush=True)
    return found


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device):
    """One paragraph: device, driver, versions, commit."""
    from training.run_log import source_commit
    parts = [device_name(device)]
    if device.type == 'cuda':
        total = torch.cuda.get_device_properties(device).total_memory
        parts.append(f'{total / 1e9:.1f} GB')
        if shutil.which('nvidia-smi'):
            driver = subprocess.run(
                ['nvidia-smi', '--query-gpu=driver_version',
                 '--format=csv,noheader'], capture_output=True, text=True)
            parts.append(f'driver {driver.stdout.split()[0]}'
                         if driver.stdout.split() else 'driver not told')
        parts.append(f'CUDA {torch.version.cuda}')
    parts.append(f'Python {platform.python_version()}')
    parts += [f'{name} {installed(name)}' for name in PACKAGES
              if installed(name)]
    commit = source_commit()
    parts.append(f'commit {commit[:12] + commit[40:]}' if commit
                 else 'commit not known')
    return ', '.join(parts) + '.'


def entry(device, command, found, seconds):
    """The lines of a RESULTS.md entry."""
    today = datetime.date.today().isoformat()
    lines = [f'## {today}: the GPU suite, {device_name(device)}', '',
             f'`{command}`, {seconds / 60:.1f} minutes. {machine(device)}']
    for name, (part, problems, _) in found.items():
        lines += ['', f'### {TITLES[name]}', '', *part]
        if problems:
            lines += ['', *(f'- wrong: {" ".join(p.split())}'
                            for p in problems)]
    return lines


def put_entry(path, lines):
    """Before the newest entry of a file, which is replaced as a whole."""
    text = path.read_text() if path.exists() else '# What was measured\n'
    head, mark, rest = text.partition('\n## ')
    new = head.rstrip('\n') + '\n\n' + '\n'.join(lines) + '\n' + (
        mark + rest if mark else '')
    aside = path.with_name(f'.{path.name}.part')
    aside.write_text(new)
    os.replace(aside, path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--smoke', action='store_true',
        help='the same path on a CPU with tiny models; writes no entry but '
        'to --out')
    add('--out', type=Path, help='file for the entry; default: RESULTS.md')
    add('--minutes', type=float, default=8.7,
        help='in all; default: %(default)s')
    add('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    add('--json', type=Path, help='write all numbers to this file')
    add('--part', choices=PARTS, help=argparse.SUPPRESS)  # in its process
    args = parser.parse_args(argv)
    if args.part:
        result = globals()[args.part](args.smoke)
        args.json.write_text(json.dumps(result))
        return 0
    begin = time.monotonic()
    try:
        device = device_of(args.smoke)
    except ValueError as error:
        exit_with(f'{error}; --smoke runs the same on a CPU')
    found = run_parts(args.parts, args.smoke, begin + 60 * args.minutes)
    command = ' '.join(['bash benchmarks/gpu_suite.sh', *(
        sys.argv[1:] if argv is None else argv)])
    lines = entry(device, command, found, time.monotonic() - begin)
    out = args.out or (None if args.smoke else ROOT / 'RESULTS.md')
    if out:
        put_entry(out, lines)
        print(f'\nwritten to {out}')
    if args.json:
        args.json.write_text(json.dumps(
            {name: {'problems': problems, 'numbers': numbers}
             for name, (_, problems, numbers) in found.items()}, indent=1))
    return int(any(problems for _, problems, _ in found.values()))


if __name__ == '__main__':
    sys.exit(main())
