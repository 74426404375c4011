"""Bytes that a training step adds to weights, optimizer state and, where they
are kept, gradients: measured in this process, and planned.

    python tests/step_memory.py '{"vocab_size": 4096}' '{"batch_size": 8}'
"""

import dataclasses
import gc
import json
import os
import sys
from pathlib import Path

if __name__ == '__main__' and 'MALLOC_MMAP_THRESHOLD_' not in os.environ:
    # freed memory goes back at once; read when a process starts
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model_builder import ConfigurableGPT  # noqa: E402
from model_config import get_preset_config  # noqa: E402
from training.device import forget_peak, resident  # noqa: E402
from training.memory import Setting, memory_plan  # noqa: E402
from training.optimizer import build_optimizer  # noqa: E402


def measured(config, setting):
    torch.manual_seed(0)
    model = ConfigurableGPT(config)
    optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.1,
                                betas=(0.9, 0.95), eps=1e-8)
    if setting.activation_checkpointing == 'full':
        model.checkpoint_blocks()
    if setting.compile:
        model.compile_parts(setting.activation_memory_budget)
    x = torch.randint(0, config.vocab_size,
                      (setting.batch_size, config.block_size))

    def step():
        for _ in range(setting.accumulation):
            model(x, x, return_logits=False)[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    gc.collect()
    forget_peak(x.device)
    before = resident('VmRSS')
    step()
    return resident('VmHWM') - before


def main():
    architecture, given = map(json.loads, sys.argv[1:])
    config = get_preset_config(**architecture)
    setting = Setting(**{'dtype': 'float32', 'device_type': 'cpu'} | given)
    plan = memory_plan(config, setting)
    print(json.dumps({
        'measured': measured(config, setting), **plan,
        'planned': sum(plan[part] for part in (
            'gradients', 'activations', 'loss', 'buffers')),
        'setting': dataclasses.asdict(setting)}))


if __name__ == '__main__':
    main()
