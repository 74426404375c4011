"""What a run will need: memory of each GPU, hours, disk; printed as a plan."""

import dataclasses
import textwrap

import torch

from training.flops import Gpu, flops_per_token, gpu_of
from training.memory import (
    STRATEGIES,
    Setting,
    count_parameters,
    memory_plan,
)
from training.settings import recomputation
from training.terminal import WIDTH, format_table, print_rows

# On top of what is counted: a GPU's context, NCCL's buffers, and what the
# allocator cannot use. An assumption, to be held against a GPU.
OVERHEAD_GB = {'cuda': 1.5}

HEADS = {'weights': 'weights', 'gradients': 'grads', 'optimizer': 'optim',
         'activations': 'activ', 'loss': 'loss', 'buffers': 'buffers'}


def activation_settings(options: dict) -> list[tuple[str, float]]:
    """(activation_checkpointing, activation_memory_budget) worth a look."""
    budgets = [1.0]
    if options['compile']:
        budgets = sorted({1.0, 0.9, 0.5, options['activation_memory_budget']},
                         reverse=True)
    return [('none', budget) for budget in budgets] + [('full', 1.0)]


def setting_of(options: dict, accumulation: int, world_size: int,
               device_type: str, dtype: str) -> Setting:
    """The memory setting of a run's options."""
    strategy = 'fsdp' if options['use_fsdp'] else (
        'zero1' if options['use_zero1'] else 'ddp')
    checkpointing = recomputation(options)[0]
    return Setting(
        batch_size=options['batch_size'], accumulation=accumulation,
        world_size=world_size,
        strategy=strategy if world_size > 1 else 'ddp', dtype=dtype,
        compile=options['compile'],
        activation_checkpointing=checkpointing,
        activation_memory_budget=1.0 if checkpointing == 'full' else (
            options['activation_memory_budget']),
        fsdp_reshard_after_forward=options['fsdp_reshard_after_forward'],
        device_type=device_type)


def total_gb(config, setting: Setting) -> float:
    """GB of 1e9 bytes that a step takes, overhead included."""
    return (sum(memory_plan(config, setting).values()) / 1e9
            + OVERHEAD_GB.get(setting.device_type, 0.0))


def largest_batch(config, setting: Setting, memory_gb: float) -> int:
    """The largest batch_size that fits; 0 if none does."""

    def fits(batch):
        return total_gb(config, dataclasses.replace(
            setting, batch_size=batch)) <= memory_gb

    batch = 1
    while fits(batch * 2) and batch < 4096:
        batch *= 2
    step = batch
    while step:
        while fits(batch + step):
            batch += step
        step //= 2
    return batch if fits(batch) else 0


def describe_activations(setting: Setting) -> str:
    if setting.activation_checkpointing == 'full':
        return 'full'
    budget = setting.activation_memory_budget
    return 'none' if budget == 1 else f'budget {budget:g}'


def memory_table(config, setting: Setting, options: dict,
                 memory_gb: float | None) -> str:
    """Lines of at most 80 columns; the run's own setting is marked."""
    small = memory_gb is None and total_gb(config, setting) < 1
    unit, digits = (1e6, 0) if small else (1e9, 1)
    heads = ['MB' if small else 'GB', 'recompute', *HEADS.values(), 'total']
    if memory_gb:
        heads.append('batch')
    rows = []
    for strategy in STRATEGIES if setting.world_size > 1 else ('ddp',):
        before = None
        for checkpointing, budget in activation_settings(options):
            other = dataclasses.replace(
                setting, strategy=strategy,
                activation_checkpointing=checkpointing,
                activation_memory_budget=budget)
            parts = memory_plan(config, other)
            if parts == before and other != setting:
                continue  # the partitioner finds nothing more to leave out
            before = parts
            total = total_gb(config, other)
            name = strategy if setting.world_size > 1 else 'single'
            row = [('*' if other == setting else ' ') + name,
                   describe_activations(other),
                   *(f'{parts[part] / unit:.{digits}f}' for part in HEADS),
                   f'{total * 1e9 / unit:.{digits}f}'
                   + ('!' if memory_gb and total > memory_gb else '')]
            if memory_gb:
                row.append(str(largest_batch(config, other, memory_gb)))
            rows.append(row)
    return format_table(heads, rows, left=(0, 1))


def print_dry_run(options: dict, plan: dict, dataset, world_size: int):
    """The plan of a run on the device that it was started on."""
    device = plan['device']
    gpu = gpu_of(plan['device_name'])
    if gpu and device.type == 'cuda':
        total = torch.cuda.get_device_properties(device).total_memory
        gpu = dataclasses.replace(gpu, memory_gb=total / 1e9)
    print_plan(
        plan['config'], options, plan, gpu=gpu, mfu=0.4,
        setting=setting_of(options, plan['accumulation'], world_size,
                           device.type, plan['dtype'][0]),
        train_tokens=dataset.split('train').tokens)


def print_plan(config, options: dict, plan: dict, *, gpu: Gpu | None,
               setting: Setting, mfu: float, train_tokens: int | None):
    """The plan of a run: `plan` holds tokens_per_iter and max_iters, `gpu`
    is None where peaks and memory are not known."""
    counts = count_parameters(config)
    full, causal = flops_per_token(config)
    tokens = plan['tokens_per_iter'] * plan['max_iters']
    n = setting.world_size
    memory_gb = gpu and gpu.memory_gb
    peak = options['peak_tflops'] or gpu and (
        gpu.bf16 if setting.dtype == 'bfloat16' else gpu.fp32)
    rows = [
        ('architecture', config.get_architecture_name()),
        ('parameters', f'{counts["total"]:,} '
                       f'({counts["non_embedding"]:,} non-embedding)'),
        ('FLOPs', f'{full / 1e9:.4g} G a token ({causal / 1e9:.4g} G causal), '
                  f'{full * tokens:.3g} in all'),
        ('batch', f'{setting.batch_size} x {config.block_size} tokens x '
                  f'{setting.accumulation} micro-steps x {n} processes = '
                  f'{plan["tokens_per_iter"]:,} tokens an update'),
        ('budget', f'{plan["max_iters"]:,} updates = {tokens:,} tokens'
                   + (f', {tokens / train_tokens:.2f} epochs'
                      if train_tokens else '')),
        ('device', f'{n} x {gpu.name if gpu else setting.device_type}'
                   + (f', {memory_gb:g} GB' if memory_gb else '')
                   + (f', {peak:g} TFLOP/s {setting.dtype}' if peak else '')),
    ]
    if peak:
        rate = mfu * peak * 1e12 * n / full
        hours = tokens / rate / 3600
        rows.append(('time', f'{rate:,.0f} tokens/s at {mfu:.0%} MFU: '
                             f'{hours:,.1f} hours, {hours * n:,.0f} of one '
                             'device'))
    checkpoints = options['keep_checkpoints'] + 2  # the best, and a new one
    rows.append(('disk', f'{4 * (train_tokens or tokens) / 1e9:,.1f} GB of '
                         f'training tokens, '
                         f'{12 * counts["total"] / 1e9:,.1f} GB a '
                         f'checkpoint, {checkpoints} at most'))
    print_rows(rows)
    overhead = OVERHEAD_GB.get(setting.device_type)
    notes = ('Memory of each device at the fullest moment of a step (1 GB is '
             '1e9 bytes); * as configured')
    if overhead:
        notes += f'; {overhead} GB for the context in the total'
    if memory_gb:
        notes += '; ! does not fit; batch: the largest batch_size that does'
    print('\n' + textwrap.fill(notes + '.', WIDTH) + '\n')
    print(memory_table(config, setting, options, memory_gb))
