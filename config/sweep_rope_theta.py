"""RoPE's base: LLaMA 2's, Llama 3's and Qwen3's, in Qwen3's architecture.

A large base is for long contexts; at 128 tokens expect no difference, which
is what a sweep should then show. Set block_size and a dataset for another.

    python sweep.py config/sweep_rope_theta.py --jobs 2
"""

base = 'config/quickstart.py'
arch_preset = 'qwen3'
grid = {'rope_theta': [1e4, 5e5, 1e6]}
tune = {'learning_rate': [1.5e-3, 3e-3, 6e-3]}
seeds = 3
