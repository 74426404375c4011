"""Query heads for each key/value head: 1 (multi-head), 2, 4 (multi-query).

What the fewer key/value heads save goes into the feed-forward layer.

    python sweep.py config/sweep_gqa_ratio.py --jobs 2
"""

base = 'config/quickstart.py'
arch_preset = 'qwen3'
grid = {'num_key_value_heads': [4, 2, 1]}    # n_head is 4
equal_params = 800_000
tune = {'learning_rate': [1.5e-3, 3e-3, 6e-3]}
seeds = 3
