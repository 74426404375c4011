"""Runs whose loss is too good to be true.

A model that sees what it is to predict (no causal mask, targets that are not
shifted, validation text within the training text) gets a loss far below what
its compute can reach, and gets there in a way in which no loss falls. Two
bounds, each passed by every sound system that we know of:

Level. Bits per byte of text after C training FLOPs lie near
1.05 (C / 5e17)^-0.055: this project's quickstart 1.9 at 8e12, nanochat's d24
0.748 at 4.33e19 (its dev/LEADERBOARD.md, run 1); in between, modded-nanogpt's
loss of 3.28 is 1.05 at 4.5 bytes a token, for some 5e17 (estimated from its
parameters and tokens). Source code comes to half of that in the best models.
The floor is 0.4 of the line.

Slope. d log(loss) / d log(tokens) between two evaluations, the second with at
least half as many tokens again: -0.1 to -0.3 after warm-up in our runs, -0.05
to -0.1 in large ones (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361).
Even an excess loss that falls as 1 / sqrt(tokens) to a floor of zero has -0.5.
"""

import math

from training.run_summary import RunSummary

LINE_AT, LINE_FLOPS, LINE_POWER = 1.05, 5e17, -0.055
FLOOR_SHARE = 0.4
STEEPEST_SLOPE = -0.7
LEAST_STRETCH = 1.5  # tokens of the second evaluation over those of the first
ADVICE = ('Look for attention to later tokens, targets that are not shifted, '
          'and validation text within the training text before believing it')


def floor_bpb(flops: float) -> float:
    """Bits per byte below which nothing sound has been at this compute."""
    return FLOOR_SHARE * LINE_AT * (flops / LINE_FLOPS) ** LINE_POWER


def slopes(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(place of the later evaluation, log-log slope up to it)."""
    found, before = [], None
    for x, y in curve:
        if before is None:
            before = x, y
        elif x >= LEAST_STRETCH * before[0]:
            if y > 0 and before[1] > 0:
                found.append((x, math.log(y / before[1])
                              / math.log(x / before[0])))
            before = x, y
    return found


def suspicions(run: RunSummary) -> list[str]:
    """What is too good to be true in a run, in words."""
    found = []
    for flops, bpb in run.curve('flops', 'val_bpb'):
        # a model that another run or lab has trained has more behind it
        if not run.begun_from and bpb < floor_bpb(flops):
            found.append(
                f'{bpb:.3f} bits per byte after {flops:.2g} FLOPs, where '
                f'nothing sound is below {floor_bpb(flops):.2f}')
            break
    steep = [(x, s) for x, s in slopes(run.curve('tokens', 'val_loss'))
             if s < STEEPEST_SLOPE]
    if steep:
        x, s = steep[0]
        found.append(f'its loss falls with slope {s:.2f} in log-log up to '
                     f'{x:,.0f} tokens, where {STEEPEST_SLOPE} is beyond any '
                     'sound curve')
    return found
