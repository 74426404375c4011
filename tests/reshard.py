"""Loads every checkpoint under one strategy, saves it again, and trains on.

Run on each rank of a job. SPEC is a JSON file: `sources` {name: checkpoint},
`strategy` {use_zero1: ...}, `config` of the model, and `out`, a folder for what
comes of it: NAME/checkpoints/step_..., and NAME.json with the losses before
and after one update, and the bytes of AdamW's state on each rank.

    torchrun --standalone --nproc_per_node=2 tests/reshard.py SPEC
"""

import json
import sys
from pathlib import Path

import torch

from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training.checkpoint import load_checkpoint, save_checkpoint
from training.distributed import (
    join,
    ranks_of_environment,
    sum_over_ranks,
    values_of_ranks,
)
from training.strategies import build_strategy

ADAMW = dict(learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
MICRO_STEPS = 4  # of all ranks


def state_bytes(strategy):
    """What AdamW really holds here, its count of steps aside."""
    found = 0
    for state in strategy.optimizer.state.values():
        for name, value in state.items():
            if name != 'step':
                local = getattr(value, 'to_local', lambda v=value: v)()
                found += local.numel() * local.element_size()
    return found


def losses_of_an_update(strategy, ranks):
    """The global loss before and after one update on the same windows."""
    config, found = strategy.model.config, []
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, config.vocab_size, (MICRO_STEPS, 1, 17),
                           generator=generator)
    forward = strategy.wrap(strategy.model)
    mine = tokens[ranks.rank::ranks.world_size]
    for _ in range(2):
        total = torch.zeros(())
        for i, row in enumerate(mine):
            with strategy.accumulating(i == len(mine) - 1):
                _, loss = forward(row[:, :-1], row[:, 1:], return_logits=False)
                (loss / len(mine)).backward()
            total += loss.detach()
        found.append(sum_over_ranks(total).item() / MICRO_STEPS)
        strategy.clip(1.0)
        strategy.step()
    return found


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    ranks = ranks_of_environment()
    join(ranks, 60.0)
    config = ModelArchitectureConfig.from_dict(spec['config'])
    for name, source in spec['sources'].items():
        torch.manual_seed(99)  # nothing of the source is there by chance
        strategy = build_strategy(
            ConfigurableGPT(config), ranks, ADAMW, reshard_after_forward=False,
            dtype='float32', device=torch.device('cpu'),
            **{'use_zero1': False, 'use_fsdp': False} | spec['strategy'])
        state = load_checkpoint(Path(source), strategy)
        run_folder = Path(spec['out']) / name
        if ranks.is_main:
            run_folder.mkdir(parents=True)
        save_checkpoint(run_folder, strategy, step=state['step'])
        outcome = {'losses': losses_of_an_update(strategy, ranks),
                   'bytes': values_of_ranks(state_bytes(strategy)),
                   'reported': values_of_ranks(strategy.optimizer_bytes)}
        if ranks.is_main:
            run_folder.with_suffix('.json').write_text(json.dumps(outcome))


if __name__ == '__main__':
    main()
