"""Qwen3's norm of each head's q and k, with and without.

It is said to allow higher rates: the rates tried reach far up.

    python sweep.py config/sweep_qk_norm.py --jobs 2
"""

base = 'config/quickstart.py'
arch_preset = 'qwen3'
grid = {'qk_norm': [False, True]}
tune = {'learning_rate': [1.5e-3, 3e-3, 6e-3, 12e-3, 24e-3]}
seeds = 3
