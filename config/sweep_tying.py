"""Head and embedding sharing their weights, or not, at equal parameters.

All parameters count here: an untied head takes its 0.4 million from the
feed-forward layers. With equal_params in place of equal_total_params it would
come on top, at equal FLOPs.

    python sweep.py config/sweep_tying.py --jobs 2
"""

base = 'config/quickstart.py'
arch_preset = 'qwen3'
grid = {'weight_tying': [True, False]}
equal_total_params = 1_170_000
tune = {'learning_rate': [1.5e-3, 3e-3, 6e-3]}
seeds = 3
