"""Qwen3-0.6B, the official architecture: 596,049,920 parameters.

440,467,456 of them non-embedding.

    torchrun --standalone --nproc_per_node=2 train.py \
        config/full_qwen3_0.6b.py
"""

# architecture
arch_preset = 'qwen3'
n_layer = 28
n_head = 16
n_embd = 1024
num_key_value_heads = 8
d_ff = 3072
block_size = 2048         # the official 0.6B: 40,960
vocab_size = 151936
rope_theta = 1_000_000
dropout = 0.0
bias = False
weight_tying = True       # as the official 0.6B, against the preset

# training: 8 x 16 x 2048 = 262,144 tokens an update,
# x 25,000 updates = 6.55 billion tokens
dataset = 'slimpajama_6b_qwen3'
batch_size = 8
gradient_accumulation_steps = 16
max_iters = 25000
learning_rate = 3e-4
weight_decay = 1e-1

# system
dtype = 'bfloat16'
compile = True
activation_memory_budget = 0.9  # the cheap activations again
use_zero1 = True
use_fsdp = False

# output
out_dir = 'out-qwen3-0.6b'
eval_interval = 1000
log_interval = 10
always_save_checkpoint = False
checkpoint_interval = 250  # a kill costs at most so many updates
