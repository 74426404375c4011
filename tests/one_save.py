"""Saves one checkpoint, of weights and moments that are a function of STEP.

Run on each rank of a job, for what kills it meanwhile; see test_faults.py.

    python tests/one_save.py RUN_FOLDER STEP KEEP
"""

import sys
from pathlib import Path

import torch

from model_builder import ConfigurableGPT
from model_config import get_preset_config
from training import checkpoint
from training.distributed import join, ranks_of_environment
from training.strategies import MOMENTS, build_strategy

ADAMW = dict(learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def build(step, ranks):
    """The strategy whose state at `step` is to be saved."""
    torch.manual_seed(step)
    model = ConfigurableGPT(get_preset_config(
        'gpt2', n_layer=1, n_embd=8, n_head=2, vocab_size=30, block_size=8))
    strategy = build_strategy(
        model, ranks, ADAMW, use_zero1=True, use_fsdp=False,
        reshard_after_forward=False, dtype='float32',
        device=torch.device('cpu'))
    for piece in strategy.pieces():
        for kind in MOMENTS:
            strategy.moment(piece, kind).copy_(piece.weight * step)
    strategy.optimizer_steps = step
    return strategy


if __name__ == '__main__':
    run_folder, step, keep = sys.argv[1:]
    ranks = ranks_of_environment()
    join(ranks, 5.0)
    checkpoint.save_checkpoint(Path(run_folder), build(int(step), ranks),
                               step=int(step), keep=int(keep))
