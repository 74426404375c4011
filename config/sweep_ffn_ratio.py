"""The feed-forward width as a multiple of the model's: 2, 8/3, 3, 3.5, 4.

Wider is larger: read the result at equal FLOPs (--by flops), not at equal
tokens.

    python sweep.py config/sweep_ffn_ratio.py --jobs 2
"""

base = 'config/quickstart.py'
arch_preset = 'qwen3'
grid = {'d_ff': [384, 512, 576, 672, 768]}   # n_embd is 192
tune = {'learning_rate': [1.5e-3, 3e-3, 6e-3]}
seeds = 3
